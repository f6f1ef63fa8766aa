//! Where and when a run was: figures say nothing without it.

use std::fs;
use std::process::Command;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::cpu;

/// The commit that the programs are built from, said by the script that builds them.
pub const COMMIT: &str = "WEFT_COMMIT";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Surroundings {
    pub machine: String,
    pub kernel: String,
    pub commit: String,
    pub date: String,
    pub load_average_before: f64,
    /// The share of all cores' time that the hypervisor took while the run went on.
    pub stolen: f64,
}

/// What the hypervisor takes from now on.
#[derive(Debug)]
pub struct TheftWatch {
    start: Instant,
    stolen: Duration,
}

impl Surroundings {
    pub fn now() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        let model = read("/proc/cpuinfo")?;
        let model = model.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
        let load = read("/proc/loadavg")?;
        let load = load.split(' ').next().context("/proc/loadavg")?.parse().context("/proc/loadavg")?;
        let mut commit = std::env::var(COMMIT).unwrap_or_else(|_| "of an unknown commit".to_owned());
        if cfg!(debug_assertions) {
            commit += " (DEBUG BUILD: these figures say nothing)";
        }
        let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output().context("date")?;
        Ok(Self {
            machine: format!("{}, {} cores", model.unwrap_or("unknown processor"), available_parallelism()?),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            commit,
            date: String::from_utf8_lossy(&date.stdout).trim().to_owned(),
            load_average_before: load,
            stolen: 0.0,
        })
    }
}

impl TheftWatch {
    pub fn start() -> Result<Self> {
        Ok(Self { start: Instant::now(), stolen: cpu::stolen()? })
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Of all cores' time.
    pub fn share(&self) -> Result<f64> {
        let all = self.elapsed().as_secs_f64() * available_parallelism()?.get() as f64;
        Ok(cpu::stolen()?.saturating_sub(self.stolen).as_secs_f64() / all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surroundings_name_machine_and_kernel() -> Result<()> {
        let surroundings = Surroundings::now()?;
        assert!(surroundings.machine.contains("cores"), "{surroundings:?}");
        assert!(surroundings.kernel.contains('.'), "{surroundings:?}");
        assert!(surroundings.date.ends_with("UTC"), "{surroundings:?}");
        Ok(())
    }
}
