//! What a run has measured, call by call, and the file that keeps it: table, picture and goals are derived from it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::attachment::Verb;
use super::choice::{HostPorts, Load, Plugin, Selection};
use super::launch::Peak;
use crate::bench::stats::{Summary, quantile};
use crate::bench::surroundings::Surroundings;

/// Tells this file from those of other benchmarks.
const BENCHMARK: &str = "cni";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Conditions {
    #[serde(flatten)]
    pub surroundings: Surroundings,
    pub rounds: usize,
    /// Of those that are called one after the other, in a round.
    pub pods: usize,
    /// Of the reference plugins.
    pub reference: String,
}

/// Host ports, load and plugin: the order in which tables show them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cell {
    pub host_ports: HostPorts,
    pub load: Load,
    pub plugin: Plugin,
}

/// A verb for every pod of a round.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// From exec to exit of each call; of a chain's calls together.
    pub times_ms: Vec<f64>,
    /// From the first exec to the last exit.
    pub wall_ms: f64,
    /// Of each call.
    pub plugin_cpu_ms: f64,
    pub agent_cpu_ms: f64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub add: Batch,
    pub del: Batch,
    /// From the first DEL's exec until the node has no interface of theirs.
    pub gone_ms: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Executable {
    pub bytes: u64,
    /// Unknown for what is called by another: that one's is the higher of both.
    pub peak: Option<Peak>,
}

/// What a sample is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Figure {
    AddP50,
    AddWall,
    DelP50,
    DelWall,
    Gone,
    /// Of a pod, from ADD to DEL, plugin and agent.
    Cpu,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Results {
    pub conditions: Conditions,
    /// By round: rounds that failed are not there.
    pub samples: BTreeMap<Cell, BTreeMap<usize, Sample>>,
    pub executables: BTreeMap<String, Executable>,
    /// What failed, and why.
    pub failures: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    cell: Cell,
    samples: BTreeMap<usize, Sample>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    benchmark: String,
    conditions: Conditions,
    executables: BTreeMap<String, Executable>,
    failures: Vec<String>,
    cells: Vec<Entry>,
}

impl Sample {
    pub fn figure(&self, figure: Figure) -> Option<f64> {
        match figure {
            Figure::AddP50 => quantile(&self.add.sorted(), 0.5),
            Figure::AddWall => Some(self.add.wall_ms),
            Figure::DelP50 => quantile(&self.del.sorted(), 0.5),
            Figure::DelWall => Some(self.del.wall_ms),
            Figure::Gone => Some(self.gone_ms),
            Figure::Cpu => {
                Some([&self.add, &self.del].iter().map(|b| b.plugin_cpu_ms + b.agent_cpu_ms).sum())
            }
        }
    }

    fn batch(&self, verb: Verb) -> &Batch {
        match verb {
            Verb::Add => &self.add,
            Verb::Del => &self.del,
        }
    }
}

impl Batch {
    fn sorted(&self) -> Vec<f64> {
        let mut times = self.times_ms.clone();
        times.sort_by(f64::total_cmp);
        times
    }
}

impl Results {
    pub fn new(conditions: Conditions) -> Self {
        Self { conditions, samples: BTreeMap::new(), executables: BTreeMap::new(), failures: Vec::new() }
    }

    pub fn add(&mut self, cell: Cell, round: usize, sample: Sample) {
        self.samples.entry(cell).or_default().insert(round, sample);
    }

    /// Over the rounds.
    pub fn summary(&self, cell: Cell, figure: Figure) -> Option<Summary> {
        Summary::of(self.samples.get(&cell)?.values().filter_map(|sample| sample.figure(figure)))
    }

    /// Of a cell's figure to another plugin's, pair by pair within each round, so that what befalls a round befalls both.
    pub fn ratio(&self, cell: Cell, to: Plugin, figure: Figure) -> Option<Summary> {
        let ours = self.samples.get(&cell)?;
        let theirs = self.samples.get(&Cell { plugin: to, ..cell })?;
        Summary::of(ours.iter().filter_map(|(round, sample)| {
            let (ours, theirs) = (sample.figure(figure)?, theirs.get(round)?.figure(figure)?);
            (theirs > 0.0).then_some(ours / theirs)
        }))
    }

    /// Of all calls of all rounds: a round alone has too few for a tail.
    pub fn of_all_calls(&self, cell: Cell, verb: Verb, share: f64) -> Option<f64> {
        let samples = self.samples.get(&cell)?.values();
        let mut times: Vec<f64> = samples.flat_map(|sample| sample.batch(verb).times_ms.clone()).collect();
        times.sort_by(f64::total_cmp);
        quantile(&times, share)
    }

    /// Of what was measured at all.
    pub fn selection(&self) -> Selection {
        let has = |is: &dyn Fn(&Cell) -> bool| self.samples.keys().any(is);
        Selection {
            plugins: Plugin::ALL.into_iter().filter(|p| has(&|cell| cell.plugin == *p)).collect(),
            loads: Load::ALL.into_iter().filter(|l| has(&|cell| cell.load == *l)).collect(),
            host_ports: HostPorts::ALL.into_iter().filter(|p| has(&|cell| cell.host_ports == *p)).collect(),
        }
    }

    /// A line for each cell: there are thousands of numbers.
    pub fn to_json(&self) -> Result<String> {
        let cells: Vec<String> = self
            .samples
            .iter()
            .map(|(cell, samples)| serde_json::to_string(&Entry { cell: *cell, samples: samples.clone() }))
            .collect::<Result<_, _>>()?;
        let head = Document {
            benchmark: BENCHMARK.to_owned(),
            conditions: self.conditions.clone(),
            executables: self.executables.clone(),
            failures: self.failures.clone(),
            cells: Vec::new(),
        };
        let head = serde_json::to_string_pretty(&head)?;
        let open = head.strip_suffix("[]\n}").context("cells come last")?;
        Ok(format!("{open}[\n{}\n]}}\n", cells.join(",\n")))
    }

    pub fn from_json(text: &str) -> Result<Self> {
        let document: Document = serde_json::from_str(text)?;
        ensure!(
            document.benchmark == BENCHMARK,
            "benchmark {:?}: expected {BENCHMARK:?}",
            document.benchmark
        );
        let Document { conditions, executables, failures, cells, .. } = document;
        let samples = cells.into_iter().map(|entry| (entry.cell, entry.samples)).collect();
        Ok(Self { conditions, samples, executables, failures })
    }

    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::from_json(&text).with_context(|| format!("{}: not the figures of a run", path.display()))
    }
}

/// Whether a file is of this benchmark.
pub fn is_ours(text: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(text).is_ok_and(|value| value["benchmark"] == BENCHMARK)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::result::tests::surroundings;

    pub(in super::super) fn results(rounds: usize) -> Results {
        Results::new(Conditions { surroundings: surroundings(), rounds, pods: 3, reference: "v0".into() })
    }

    pub(in super::super) fn cell(plugin: Plugin, load: Load) -> Cell {
        Cell { host_ports: HostPorts::None, load, plugin }
    }

    /// ADD's times, and DEL's twice as long.
    pub(in super::super) fn sample(times_ms: &[f64]) -> Sample {
        let batch = |factor: f64| Batch {
            times_ms: times_ms.iter().map(|time| time * factor).collect(),
            wall_ms: times_ms.iter().sum::<f64>() * factor,
            plugin_cpu_ms: 0.5 * factor,
            agent_cpu_ms: 0.25 * factor,
        };
        Sample { add: batch(1.0), del: batch(2.0), gone_ms: 50.0 }
    }

    #[test]
    fn a_ratio_is_of_pairs_in_the_same_round_and_a_tail_of_all_calls() {
        let mut results = results(3);
        let (weft, floor) = (cell(Plugin::Weft, Load::Alone), cell(Plugin::Floor, Load::Alone));
        // The machine was twice as fast in the second round; the third is missing on one side.
        results.add(weft, 0, sample(&[3.0, 2.0, 9.0]));
        results.add(floor, 0, sample(&[2.0, 2.0, 2.0]));
        results.add(weft, 1, sample(&[1.5]));
        results.add(floor, 1, sample(&[1.0]));
        results.add(weft, 2, sample(&[1000.0]));
        let ratio = results.ratio(weft, Plugin::Floor, Figure::AddP50);
        assert_eq!(ratio, Some(Summary { median: 1.5, q1: 1.5, q3: 1.5, n: 2 }));
        assert_eq!(results.ratio(weft, Plugin::Reference, Figure::AddP50), None);
        assert_eq!(results.of_all_calls(weft, Verb::Add, 1.0), Some(1000.0));
        assert_eq!(results.of_all_calls(weft, Verb::Del, 0.0), Some(3.0));
        assert_eq!(results.summary(floor, Figure::Cpu).map(|s| s.median), Some(0.75 * 3.0));
    }

    #[test]
    fn a_run_is_read_back_as_it_was_written() -> Result<()> {
        let mut results = results(1);
        results.add(cell(Plugin::Reference, Load::Hundred), 0, sample(&[1.5, 2.25]));
        results.add(cell(Plugin::Weft, Load::Hundred), 0, sample(&[0.5]));
        results.failures.push("round 1: broken".into());
        let peak = Peak { kib: 1400, launcher_kib: 900 };
        results.executables.insert("weft".into(), Executable { bytes: 700_000, peak: Some(peak) });
        let text = results.to_json()?;
        assert_eq!(Results::from_json(&text)?, results);
        assert!(is_ours(&text) && text.contains("\"times_ms\":[1.5,2.25]"), "{text}");
        let other = text.replace("\"cni\"", "\"other\"");
        assert!(!is_ours(&other) && Results::from_json(&other).is_err());
        Ok(())
    }
}
