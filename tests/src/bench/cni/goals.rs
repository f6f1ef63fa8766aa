//! What the plugin is meant to reach, each as a ratio of one run or as its own measure, and whether it did.

use super::attachment::Verb;
use super::choice::{HostPorts, Load, Plugin};
use super::result::{Cell, Figure, Results};

const MIB: f64 = 1024.0 * 1024.0;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    pub what: &'static str,
    /// What is measured is of this, or in this unit.
    pub to: &'static str,
    pub at_most: f64,
    pub measure: Measure,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measure {
    /// weft's figure to another's.
    Ratio(Load, Figure, Plugin),
    /// p99 to p50 of all calls.
    Tail(Verb),
    /// In MiB.
    Size,
    /// In MiB.
    Memory,
}

pub const GOALS: [Goal; 8] = [
    Goal {
        what: "ADD alone, p50",
        to: "the floor program's",
        at_most: 1.5,
        measure: Measure::Ratio(Load::Alone, Figure::AddP50, Plugin::Floor),
    },
    Goal {
        what: "ADD alone, p50",
        to: "that of bridge + host-local",
        at_most: 0.2,
        measure: Measure::Ratio(Load::Alone, Figure::AddP50, Plugin::Reference),
    },
    Goal {
        what: "100 ADDs at once, until the last has ended",
        to: "that of bridge + host-local",
        at_most: 0.25,
        measure: Measure::Ratio(Load::Hundred, Figure::AddWall, Plugin::Reference),
    },
    Goal { what: "ADD alone, p99", to: "its own p50", at_most: 4.0, measure: Measure::Tail(Verb::Add) },
    Goal { what: "DEL alone, p99", to: "its own p50", at_most: 4.0, measure: Measure::Tail(Verb::Del) },
    Goal {
        what: "DEL alone, p50",
        to: "that of bridge + host-local",
        at_most: 1.0 / 3.0,
        measure: Measure::Ratio(Load::Alone, Figure::DelP50, Plugin::Reference),
    },
    Goal { what: "size of the executable", to: "MiB", at_most: 2.0, measure: Measure::Size },
    Goal { what: "peak memory of a call", to: "MiB", at_most: 4.0, measure: Measure::Memory },
];

/// All without a port mapping, which is what the floor program can. None when the run did not measure it.
pub fn verdict(goal: &Goal, results: &Results) -> Option<(f64, bool)> {
    let cell = |load| Cell { host_ports: HostPorts::None, load, plugin: Plugin::Weft };
    let executable = results.executables.get(Plugin::Weft.name());
    let measured = match goal.measure {
        Measure::Ratio(load, figure, to) => results.ratio(cell(load), to, figure)?.median,
        Measure::Tail(verb) => {
            let quantile = |share| results.of_all_calls(cell(Load::Alone), verb, share);
            quantile(0.99)? / quantile(0.5)?
        }
        Measure::Size => executable?.bytes as f64 / MIB,
        Measure::Memory => executable?.peak?.kib as f64 / 1024.0,
    };
    Some((measured, measured <= goal.at_most))
}

#[cfg(test)]
mod tests {
    use super::super::launch::Peak;
    use super::super::result::Executable;
    use super::super::result::tests::{cell, results, sample};
    use super::*;

    fn outcomes(results: &Results) -> Vec<Option<bool>> {
        GOALS.iter().map(|goal| verdict(goal, results).map(|(_, is_met)| is_met)).collect()
    }

    #[test]
    fn each_goal_is_met_up_to_its_limit_and_missed_beyond() {
        let mut results = results(1);
        assert_eq!(outcomes(&results), [None; 8]);
        for load in [Load::Alone, Load::Hundred] {
            results.add(cell(Plugin::Floor, load), 0, sample(&[2.0]));
            results.add(cell(Plugin::Reference, load), 0, sample(&[15.0]));
            results.add(cell(Plugin::Weft, load), 0, sample(&[3.0]));
        }
        let peak = Some(Peak { kib: 4096, launcher_kib: 900 });
        results.executables.insert("weft".into(), Executable { bytes: 2 << 20, peak });
        assert_eq!(outcomes(&results), [Some(true); 8]);

        results.add(cell(Plugin::Weft, Load::Alone), 0, sample(&[6.0, 6.0, 100.0]));
        results.add(cell(Plugin::Weft, Load::Hundred), 0, sample(&[4.0]));
        let peak = Some(Peak { kib: 4097, launcher_kib: 900 });
        results.executables.insert("weft".into(), Executable { bytes: (2 << 20) + 1, peak });
        assert_eq!(outcomes(&results), [Some(false); 8]);
    }
}
