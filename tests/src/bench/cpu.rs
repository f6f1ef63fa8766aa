//! Which cores everything runs on, and how long they were busy (proc(5), `/proc/stat`: steps of 10 ms).
//!
//! The whole core is looked at, not the processes: work in softirq, which is most of a kernel dataplane's, belongs to
//! no process.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// The two cores that measurements use: the last ones, since the first tends to get the machine's interrupts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cores(Vec<usize>);

/// From a start until now.
#[derive(Debug)]
pub struct Meter {
    cores: Vec<usize>,
    start: Instant,
    busy: Duration,
}

impl Cores {
    pub fn available() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let cores: Vec<usize> =
            (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
        ensure!(!cores.is_empty(), "no core is allowed");
        Ok(Self(cores[cores.len().saturating_sub(2)..].to_vec()))
    }

    pub fn has_two(&self) -> bool {
        self.0.len() == 2
    }

    pub fn last(&self) -> Vec<usize> {
        self.0.last().copied().into_iter().collect()
    }

    pub fn both(&self) -> Vec<usize> {
        self.0.clone()
    }
}

/// Every thread of a process; those that it starts later inherit it.
pub fn pin(pid: Pid, cores: &[usize]) -> Result<()> {
    let set = set_of(cores)?;
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        let name = task?.file_name();
        let tid = name.to_str().and_then(|tid| tid.parse().ok()).context("a thread's number")?;
        match sched_setaffinity(Pid::from_raw(tid), &set) {
            // Ended since the look.
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(e) => return Err(e).with_context(|| format!("pin {pid} to {cores:?}")),
        }
    }
    Ok(())
}

/// This process, before it has other threads.
pub fn pin_self(cores: &[usize]) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), &set_of(cores)?).with_context(|| format!("pin to {cores:?}"))
}

impl Meter {
    pub fn start(cores: &[usize]) -> Result<Self> {
        Ok(Self { cores: cores.to_vec(), busy: busy(cores)?, start: Instant::now() })
    }

    /// Wall time and the cores' busy time.
    pub fn stop(&self) -> Result<(Duration, Duration)> {
        let elapsed = self.start.elapsed();
        Ok((elapsed, busy(&self.cores)?.saturating_sub(self.busy)))
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

fn set_of(cores: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    cores.iter().try_for_each(|core| set.set(*core))?;
    Ok(set)
}

fn busy(cores: &[usize]) -> Result<Duration> {
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK)?.context("_SC_CLK_TCK")?;
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let mut ticks = 0;
    for core in cores {
        ticks += busy_ticks(&stat, *core)?;
    }
    Ok(Duration::from_secs(1) * ticks as u32 / ticks_per_second as u32)
}

/// user, nice, system, irq and softirq; not idle, waiting, or what the hypervisor took.
fn busy_ticks(stat: &str, core: usize) -> Result<u64> {
    let name = format!("cpu{core}");
    let line = stat.lines().find(|line| line.split(' ').next() == Some(&name));
    let numbers: Vec<u64> = line
        .with_context(|| format!("no {name} in /proc/stat"))?
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(numbers.len() >= 7, "{name} in /proc/stat has {} numbers", numbers.len());
    Ok([0, 1, 2, 5, 6].iter().map(|at| numbers[*at]).sum())
}

/// What the hypervisor has taken of all cores so far.
pub fn stolen() -> Result<Duration> {
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK)?.context("_SC_CLK_TCK")?;
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let ticks: u32 = stat.split_whitespace().nth(8).context("steal in /proc/stat")?.parse()?;
    Ok(Duration::from_secs(1) * ticks / ticks_per_second as u32)
}

#[cfg(test)]
mod tests {
    use nix::time::{ClockId, clock_gettime};

    use super::*;

    const STAT: &str = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n\
                        cpu1 100 20 3 4000 50000 600000 7000000 80000000 0 0\ncpu10 5 5 5 5 5 5 5 5 0 0\n";

    #[test]
    fn busy_is_neither_idle_nor_waiting_nor_stolen() -> Result<()> {
        assert_eq!(busy_ticks(STAT, 1)?, 7_600_123);
        assert!(busy_ticks(STAT, 2).is_err() && busy_ticks("cpu2 1 2 3", 2).is_err());
        Ok(())
    }

    #[test]
    fn a_meter_sees_a_core_at_work() -> Result<()> {
        let cores = Cores::available()?.last();
        std::thread::scope(|scope| {
            scope
                .spawn(|| -> Result<()> {
                    pin_self(&cores)?;
                    let meter = Meter::start(&cores)?;
                    // By the thread's own clock: others may want the core as well.
                    let worked = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
                    let begin = worked()?;
                    while worked()? - begin < Duration::from_millis(200) {}
                    let (elapsed, busy) = meter.stop()?;
                    assert!(elapsed >= Duration::from_millis(200), "{elapsed:?}");
                    assert!(busy >= Duration::from_millis(50) && busy <= elapsed * 2, "{busy:?}");
                    Ok(())
                })
                .join()
                .map_err(|_| anyhow::anyhow!("the thread panicked"))?
        })
    }
}
