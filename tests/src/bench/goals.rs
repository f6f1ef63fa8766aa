//! What the udp backend is meant to reach, each as a ratio of one run, and whether it did.

use super::choice::{Configuration, Load, Setting};
use super::result::{Cell, Figure, Results};
use super::stats::Summary;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    pub what: &'static str,
    pub setting: Setting,
    pub load: Load,
    pub figure: Figure,
    pub to: Configuration,
    pub wanted: Wanted,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wanted {
    /// The median ratio.
    AtLeast(f64),
    /// A smaller figure is better: the median ratio is 1, as precisely as it is shown.
    NoWorse,
}

const fn tcp(setting: Setting, to: Configuration, ratio: f64) -> Goal {
    Goal {
        what: "TCP, one stream",
        setting,
        load: Load::Tcp1,
        figure: Figure::Gbps,
        to,
        wanted: Wanted::AtLeast(ratio),
    }
}

const fn small(setting: Setting) -> Goal {
    Goal {
        what: "small packets, one flow",
        setting,
        load: Load::Udp1,
        figure: Figure::Kpps,
        to: Configuration::Node,
        wanted: Wanted::AtLeast(0.85),
    }
}

/// Measured first, then set: 2.6 to 3.6 times.
const fn mixed(setting: Setting) -> Goal {
    Goal {
        what: "64 flows of mixed sizes",
        setting,
        load: Load::Udp64,
        figure: Figure::Kpps,
        to: Configuration::Naive,
        wanted: Wanted::AtLeast(2.5),
    }
}

const fn latency(setting: Setting) -> Goal {
    Goal {
        what: "request/response, one connection, p50",
        setting,
        load: Load::Exchange1,
        figure: Figure::P50,
        to: Configuration::Naive,
        wanted: Wanted::NoWorse,
    }
}

pub const GOALS: [Goal; 14] = [
    tcp(Setting::Full, Configuration::Naive, 12.0),
    tcp(Setting::NoSeg, Configuration::Naive, 5.0),
    tcp(Setting::Gro, Configuration::Naive, 7.0),
    tcp(Setting::Full, Configuration::Vxlan, 0.35),
    tcp(Setting::Gro, Configuration::Vxlan, 0.55),
    small(Setting::Full),
    small(Setting::NoSeg),
    small(Setting::Gro),
    mixed(Setting::Full),
    mixed(Setting::NoSeg),
    mixed(Setting::Gro),
    latency(Setting::Full),
    latency(Setting::NoSeg),
    latency(Setting::Gro),
];

/// None when the run did not measure it.
pub fn verdict(goal: &Goal, results: &Results) -> Option<(Summary, bool)> {
    let cell = Cell { setting: goal.setting, load: goal.load, configuration: Configuration::Udp };
    let ratio = results.ratio(cell, goal.to, goal.figure)?;
    let is_met = match goal.wanted {
        Wanted::AtLeast(wanted) => ratio.median >= wanted,
        Wanted::NoWorse => ratio.median < 1.005,
    };
    Some((ratio, is_met))
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::{cell, conditions, sample};
    use super::*;

    fn run(figure: Figure, load: Load, udp: &[f64], other: (Configuration, f64)) -> Results {
        let mut results = Results::new(conditions());
        for (round, value) in udp.iter().enumerate() {
            results.add(cell(Setting::Full, load, Configuration::Udp), round, sample(&[(figure, *value)]));
            results.add(cell(Setting::Full, load, other.0), round, sample(&[(figure, other.1)]));
        }
        results
    }

    #[test]
    fn a_throughput_goal_is_met_by_the_median() {
        let goal = tcp(Setting::Full, Configuration::Naive, 12.0);
        let of = |udp: &[f64]| {
            let results = run(Figure::Gbps, Load::Tcp1, udp, (Configuration::Naive, 0.5));
            verdict(&goal, &results).map(|(ratio, is_met)| (ratio.median, is_met))
        };
        assert_eq!(of(&[6.0, 6.5, 1.0]), Some((12.0, true)));
        assert_eq!(of(&[5.5, 6.5, 1.0]), Some((11.0, false)));
        assert_eq!(verdict(&small(Setting::Full), &Results::new(conditions())), None);
    }

    #[test]
    fn latency_is_no_worse_when_the_median_is_no_greater() {
        let of = |udp: &[f64]| {
            let results = run(Figure::P50, Load::Exchange1, udp, (Configuration::Naive, 50.0));
            verdict(&latency(Setting::Full), &results).map(|(_, is_met)| is_met)
        };
        assert_eq!(of(&[40.0, 45.0, 49.0]), Some(true));
        assert_eq!(of(&[48.0, 50.0, 52.0, 53.0, 54.0]), Some(false), "a quarter of the rounds is not most");
        assert_eq!(of(&[40.0, 50.2, 70.0]), Some(true), "1.004 is shown as 1.00");
        assert_eq!(of(&[51.0, 52.0, 53.0]), Some(false));
    }
}
