//! Every pod pair: does it reach, and how long is the round trip.

use std::fmt;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::lab::ping_timeout;
use crate::lab::state::LabPod;
use crate::netns::Netns;
use crate::traffic::echo::ping;

/// Rows ping columns.
#[derive(Debug)]
pub struct Matrix {
    pods: Vec<LabPod>,
    /// `None` where nothing came back; a pod does not ping itself.
    cells: Vec<Vec<Cell>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cell {
    Itself,
    Reached(Duration),
    Silent,
}

impl Matrix {
    pub fn measure(pods: &[(LabPod, Netns)], tries: u16) -> Result<Self> {
        // Rows side by side: a silent pair takes its whole timeout.
        let rows = thread::scope(|scope| {
            let row = |(from, netns): &'_ (LabPod, Netns)| {
                pods.iter().map(|(to, _)| cell(netns, from, to, tries)).collect::<Vec<_>>()
            };
            let running: Vec<_> = pods.iter().map(|pod| scope.spawn(move || row(pod))).collect();
            running.into_iter().map(|row| row.join()).collect::<Vec<_>>()
        });
        let cells = rows.into_iter().map(|row| row.map_err(|_| anyhow!("a ping panicked")));
        Ok(Self {
            pods: pods.iter().map(|(pod, _)| pod.clone()).collect(),
            cells: cells.collect::<Result<_>>()?,
        })
    }

    /// Every pod reaches every other.
    pub fn is_complete(&self) -> bool {
        !self.cells.iter().flatten().any(|cell| *cell == Cell::Silent)
    }
}

fn cell(netns: &Netns, from: &LabPod, to: &LabPod, tries: u16) -> Cell {
    if from.name == to.name {
        return Cell::Itself;
    }
    // The first exchange resolves neighbours; the second is the round trip worth showing.
    match ping(netns, to.address, tries, ping_timeout())
        .and_then(|_| ping(netns, to.address, tries, ping_timeout()))
    {
        Ok(time) => Cell::Reached(time),
        Err(_) => Cell::Silent,
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Round trips between pods in ms, row to column:")?;
        write!(f, "{:<6} {:<16}", "pod", "address")?;
        for pod in &self.pods {
            write!(f, "{:>8}", pod.name)?;
        }
        writeln!(f)?;
        for (pod, row) in self.pods.iter().zip(&self.cells) {
            write!(f, "{:<6} {:<16}", pod.name, pod.address)?;
            for cell in row {
                match cell {
                    Cell::Itself => write!(f, "{:>8}", "-")?,
                    Cell::Reached(time) => write!(f, "{:>8.3}", time.as_secs_f64() * 1e3)?,
                    Cell::Silent => write!(f, "{:>8}", "SILENT")?,
                }
            }
            writeln!(f)?;
        }
        let silent = self.cells.iter().flatten().filter(|cell| **cell == Cell::Silent).count();
        let pairs = self.pods.len() * self.pods.len().saturating_sub(1);
        writeln!(f, "{} of {pairs} ordered pairs reach.", pairs - silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_pair_is_seen() {
        let pod = |name: &str, last: u8| LabPod {
            name: name.into(),
            node: "n1".into(),
            address: [10, 5, 1, last].into(),
        };
        let reached = Cell::Reached(Duration::from_micros(123));
        let pods = vec![pod("n1-a", 2), pod("n1-b", 3)];
        let whole = Matrix {
            pods: pods.clone(),
            cells: vec![vec![Cell::Itself, reached], vec![reached, Cell::Itself]],
        };
        assert!(whole.is_complete());
        assert!(whole.to_string().contains("2 of 2 ordered pairs reach."), "{whole}");
        let torn =
            Matrix { pods, cells: vec![vec![Cell::Itself, reached], vec![Cell::Silent, Cell::Itself]] };
        assert!(!torn.is_complete());
        let text = torn.to_string();
        assert!(text.contains("SILENT") && text.contains("0.123") && text.contains("1 of 2"), "{text}");
    }
}
