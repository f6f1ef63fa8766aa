//! The machine and this process as the operating system sees them. The only user of sysinfo.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use crate::status::HostStatus;

/// Reads the changing figures when asked; keeps those that cannot change.
#[derive(Debug)]
pub struct Host {
    started: Instant,
    fixed: HostStatus,
    /// `None` where /proc cannot be read: the figures then stay zero.
    process: Mutex<Option<System>>,
}

impl Host {
    /// To be made when the agent starts: its uptime counts from here.
    pub fn new() -> Self {
        let unknown = |_| "unknown".to_owned();
        Self {
            started: Instant::now(),
            fixed: HostStatus {
                hostname: hostname(),
                kernel: System::kernel_version().unwrap_or_else(unknown),
                distribution: format!(
                    "{} {}",
                    System::name().unwrap_or_else(unknown),
                    System::os_version().unwrap_or_default()
                ),
                ..HostStatus::default()
            },
            process: Mutex::new(System::new().ok()),
        }
    }

    pub fn status(&self) -> HostStatus {
        let mut status = self.fixed.clone();
        status.host_uptime = System::uptime().unwrap_or_default();
        status.agent_uptime = self.started.elapsed().as_secs();
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(system) = process.as_mut() {
            let own = Pid::from_u32(std::process::id());
            let what = ProcessRefreshKind::nothing().with_memory().with_cpu().without_tasks();
            system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), true, what);
            if let Some(process) = system.process(own) {
                status.agent_memory = process.memory();
                status.agent_cpu = process.accumulated_cpu_time() as f64 / 1000.0;
            }
        }
        status
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

pub fn hostname() -> String {
    System::host_name().unwrap_or_else(|_| "localhost".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_proc() {
        let status = Host::new().status();
        let proc = |file: &str| std::fs::read_to_string(format!("/proc/{file}")).expect(file);
        assert_eq!(status.hostname, proc("sys/kernel/hostname").trim());
        assert_eq!(status.kernel, proc("sys/kernel/osrelease").trim());
        assert!(!status.distribution.is_empty());
        let uptime: f64 = proc("uptime").split(' ').next().expect("field").parse().expect("seconds");
        assert!(status.host_uptime.abs_diff(uptime as u64) <= 2, "{}", status.host_uptime);
        let pages: u64 = proc("self/statm").split(' ').nth(1).expect("field").parse().expect("pages");
        assert!(status.agent_memory.abs_diff(pages * 4096) < 16 << 20, "{}", status.agent_memory);
    }

    #[test]
    fn processor_time_grows_with_work() {
        let host = Host::new();
        let before = host.status().agent_cpu;
        let deadline = Instant::now() + std::time::Duration::from_secs(20);
        let mut work = 0_u64;
        while host.status().agent_cpu <= before {
            assert!(Instant::now() < deadline, "stayed at {before}");
            work = (0..1_000_000).fold(work, |sum, n| std::hint::black_box(sum ^ n));
        }
    }
}
