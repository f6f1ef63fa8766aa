//! What a run has measured, sample by sample, and the file that keeps it: table, picture and goals are derived from it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use weft_agent::status::PacketPathStatus;

use super::choice::{Configuration, Load, Selection, Setting};
use super::stats::Summary;
use super::surroundings::Surroundings;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Figure {
    #[serde(rename = "gbit_per_s")]
    Gbps,
    #[serde(rename = "thousand_datagrams_per_s")]
    Kpps,
    /// A share of 1.
    #[serde(rename = "loss")]
    Loss,
    #[serde(rename = "cpu_s_per_gbyte")]
    CpuPerGb,
    #[serde(rename = "p50_us")]
    P50,
    #[serde(rename = "p99_us")]
    P99,
    #[serde(rename = "exchanges_per_s")]
    PerSecond,
    #[serde(rename = "cpu_us_per_exchange")]
    CpuPerExchange,
}

/// The figures of one measurement.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sample(pub BTreeMap<Figure, f64>);

/// Where and when a run was, and how long it looked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Conditions {
    #[serde(flatten)]
    pub surroundings: Surroundings,
    pub rounds: usize,
    pub seconds: f64,
    pub warm_up_seconds: f64,
}

/// One load on one configuration in one setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cell {
    pub setting: Setting,
    pub load: Load,
    pub configuration: Configuration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Results {
    pub conditions: Conditions,
    /// By round: rounds that failed are not there.
    pub samples: BTreeMap<Cell, BTreeMap<usize, Sample>>,
    /// What an agent's packet path said of itself at the end.
    pub packet_paths: BTreeMap<Configuration, PacketPathStatus>,
    /// What failed, and why.
    pub failures: Vec<String>,
}

/// The file's form of a cell; `summary` is for readers of the file and not read back.
#[derive(Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    cell: Cell,
    #[serde(skip_deserializing)]
    summary: BTreeMap<Figure, Summary>,
    /// To node-to-node traffic in the same setting, round by round.
    #[serde(skip_deserializing)]
    ratio_to_node: BTreeMap<Figure, Summary>,
    samples: BTreeMap<usize, Sample>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    conditions: Conditions,
    #[serde(default)]
    packet_paths: BTreeMap<Configuration, PacketPathStatus>,
    failures: Vec<String>,
    cells: Vec<Entry>,
}

impl Figure {
    pub const ALL: [Self; 8] = [
        Self::Gbps,
        Self::Kpps,
        Self::Loss,
        Self::CpuPerGb,
        Self::P50,
        Self::P99,
        Self::PerSecond,
        Self::CpuPerExchange,
    ];
}

/// Of payload that arrived.
pub fn rates(bytes: u64, elapsed: Duration, busy: Duration) -> BTreeMap<Figure, f64> {
    let bytes = bytes as f64;
    [
        (Figure::Gbps, bytes * 8.0 / elapsed.as_secs_f64() / 1e9),
        (Figure::CpuPerGb, busy.as_secs_f64() / (bytes / 1e9)),
    ]
    .into()
}

impl Results {
    pub fn new(conditions: Conditions) -> Self {
        Self { conditions, samples: BTreeMap::new(), packet_paths: BTreeMap::new(), failures: Vec::new() }
    }

    pub fn add(&mut self, cell: Cell, round: usize, sample: Sample) {
        self.samples.entry(cell).or_default().insert(round, sample);
    }

    pub fn summary(&self, cell: Cell, figure: Figure) -> Option<Summary> {
        Summary::of(self.samples.get(&cell)?.values().filter_map(|sample| sample.0.get(&figure).copied()))
    }

    /// Of a cell's figure to another configuration's, pair by pair within each round, so that what befalls a round
    /// befalls both.
    pub fn ratio(&self, cell: Cell, to: Configuration, figure: Figure) -> Option<Summary> {
        let ours = self.samples.get(&cell)?;
        let theirs = self.samples.get(&Cell { configuration: to, ..cell })?;
        Summary::of(ours.iter().filter_map(|(round, sample)| {
            let (ours, theirs) = (sample.0.get(&figure)?, theirs.get(round)?.0.get(&figure)?);
            (*theirs > 0.0).then_some(ours / theirs)
        }))
    }

    /// Of what was measured at all.
    pub fn selection(&self) -> Selection {
        let has = |is: &dyn Fn(&Cell) -> bool| self.samples.keys().any(is);
        Selection {
            configurations: Configuration::ALL
                .into_iter()
                .filter(|c| has(&|cell| cell.configuration == *c))
                .collect(),
            settings: Setting::ALL.into_iter().filter(|s| has(&|cell| cell.setting == *s)).collect(),
            loads: Load::ALL.into_iter().filter(|l| has(&|cell| cell.load == *l)).collect(),
        }
    }

    pub fn to_json(&self) -> Result<String> {
        let entry = |(cell, samples): (&Cell, &BTreeMap<usize, Sample>)| Entry {
            cell: *cell,
            summary: of_all(|figure| self.summary(*cell, figure)),
            ratio_to_node: of_all(|figure| self.ratio(*cell, Configuration::Node, figure)),
            samples: samples.clone(),
        };
        let document = Document {
            conditions: self.conditions.clone(),
            packet_paths: self.packet_paths.clone(),
            failures: self.failures.clone(),
            cells: self.samples.iter().map(entry).collect(),
        };
        Ok(serde_json::to_string_pretty(&document)?)
    }

    pub fn from_json(text: &str) -> Result<Self> {
        let mut document: Document = serde_json::from_str(text)?;
        let samples = std::mem::take(&mut document.cells)
            .into_iter()
            .map(|entry| (entry.cell, entry.samples))
            .collect();
        let Document { conditions, packet_paths, failures, .. } = document;
        Ok(Self { conditions, samples, packet_paths, failures })
    }

    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::from_json(&text).with_context(|| format!("{}: not the figures of a run", path.display()))
    }
}

fn of_all(summary: impl Fn(Figure) -> Option<Summary>) -> BTreeMap<Figure, Summary> {
    Figure::ALL.into_iter().filter_map(|figure| Some((figure, summary(figure)?))).collect()
}

#[cfg(test)]
pub mod tests {
    use weft_agent::status::{DropCount, OffloadStatus, TrafficStatus};

    use super::*;

    pub(in super::super) fn surroundings() -> Surroundings {
        Surroundings {
            machine: "2 cores of a <test> machine".into(),
            kernel: "6.18.0".into(),
            commit: "0123abc".into(),
            date: "2026-11-26".into(),
            load_average_before: 0.25,
            stolen: 0.0125,
        }
    }

    pub(in super::super) fn conditions() -> Conditions {
        Conditions { surroundings: surroundings(), rounds: 3, seconds: 0.5, warm_up_seconds: 0.2 }
    }

    pub(in super::super) fn packet_path() -> PacketPathStatus {
        let offload = |name: &str, outcome: &str, detail: Option<&str>| OffloadStatus {
            name: name.into(),
            outcome: outcome.into(),
            detail: detail.map(str::to_owned),
        };
        PacketPathStatus {
            listen: ([192, 168, 77, 11], 8285).into(),
            problem: None,
            offloads: vec![
                offload("tun-tso", "in-use", None),
                offload("tun-uso", "refused", Some("EINVAL")),
                offload("udp-gro", "in-use", None),
            ],
            sent: TrafficStatus { packets: 4000, bytes: 0, calls: 100 },
            received: TrafficStatus { packets: 300, bytes: 0, calls: 200 },
            dropped: vec![DropCount { direction: "sent".into(), reason: "send-failed".into(), packets: 7 }],
            icmp_errors_sent: 0,
            icmp_errors_suppressed: 0,
            device_lost: 0,
            icmp_problem: None,
            panics: 0,
        }
    }

    pub(in super::super) fn cell(setting: Setting, load: Load, configuration: Configuration) -> Cell {
        Cell { setting, load, configuration }
    }

    pub(in super::super) fn sample(figures: &[(Figure, f64)]) -> Sample {
        Sample(figures.iter().copied().collect())
    }

    #[test]
    fn a_ratio_is_of_pairs_in_the_same_round() {
        let mut results = Results::new(conditions());
        let ours = cell(Setting::Full, Load::Tcp1, Configuration::Udp);
        let theirs = Cell { configuration: Configuration::Node, ..ours };
        // The machine was twice as fast in the second round, and the third is missing on one side.
        for (round, a, b) in [(0, 5.0, 10.0), (1, 10.0, 20.0), (3, 6.0, 12.0)] {
            results.add(ours, round, sample(&[(Figure::Gbps, a)]));
            results.add(theirs, round, sample(&[(Figure::Gbps, b)]));
        }
        results.add(ours, 2, sample(&[(Figure::Gbps, 1000.0)]));
        let ratio = results.ratio(ours, Configuration::Node, Figure::Gbps);
        assert_eq!(ratio, Some(Summary { median: 0.5, q1: 0.5, q3: 0.5, n: 3 }));
        assert_eq!(results.summary(ours, Figure::Gbps).map(|s| s.n), Some(4));
        assert_eq!(results.ratio(ours, Configuration::Vxlan, Figure::Gbps), None);
        assert_eq!(results.summary(ours, Figure::P50), None);
    }

    #[test]
    fn a_run_is_read_back_as_it_was_written() -> Result<()> {
        let mut results = Results::new(conditions());
        let a = cell(Setting::NoSeg, Load::Exchange16, Configuration::HostGw);
        results.add(a, 0, sample(&[(Figure::P50, 20.5), (Figure::PerSecond, 1e5)]));
        results.failures.push("round 1: broken".into());
        results.packet_paths.insert(Configuration::UdpPlain, packet_path());
        let text = results.to_json()?;
        assert_eq!(Results::from_json(&text)?, results);
        for part in ["\"host-gw\"", "\"no-seg\"", "\"rr-16\"", "\"p50_us\": 20.5", "\"median\": 20.5"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(results.selection().configurations, [Configuration::HostGw]);
        Ok(())
    }
}
