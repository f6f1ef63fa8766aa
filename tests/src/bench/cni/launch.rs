//! How much memory a plugin needs at most, from a process so small that its own does not hide it.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::reap::reap;

/// The hidden command of this executable.
pub const COMMAND: &str = "launch";

/// What it says on stderr; stdin and stdout are the plugin's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    pub kib: u64,
    /// The launcher's own, which a smaller figure cannot be told from.
    pub launcher_kib: u64,
}

impl Peak {
    /// Nothing but a bound, when the launcher had more.
    pub fn is_bound(self) -> bool {
        self.kib <= self.launcher_kib
    }
}

/// In the process that was started for it.
pub fn main(program: &str, arguments: impl Iterator<Item = String>) -> Result<()> {
    let own = own_peak_kib()?;
    let mut command = Command::new(program);
    let child = command.args(arguments).stderr(Stdio::null()).spawn().with_context(|| program.to_owned())?;
    let end = reap(child)?;
    ensure!(end.status.success(), "{program}: {}", end.status);
    let peak = Peak { kib: end.peak_kib, launcher_kib: own };
    serde_json::to_writer(std::io::stderr(), &peak)?;
    Ok(())
}

/// proc_pid_status(5): in kB, which are KiB.
fn own_peak_kib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.context("VmHWM in /proc/self/status")
}
