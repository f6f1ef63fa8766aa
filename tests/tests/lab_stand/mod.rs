//! The lab as a newcomer uses it, by its script; and the host afterwards, which must be as it was.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use e2e::binaries::Binaries;
use e2e::host::{HostSnapshot, marked_processes};

pub(crate) const ROOT: &str = "/run/weft-lab";

/// There is one lab on a machine: one test at a time.
pub(crate) struct Lab {
    _turn: MutexGuard<'static, ()>,
    binaries: Binaries,
    mark: String,
    before: HostSnapshot,
}

impl Lab {
    pub(crate) fn new() -> Result<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(!Path::new(ROOT).exists(), "{ROOT} exists: take that lab down first");
        let mark = format!("WEFT_LAB_TEST={}", std::process::id());
        Ok(Self { _turn: turn, binaries: Binaries::find()?, mark, before: HostSnapshot::take()? })
    }

    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/lab"));
        command.args(arguments.split_whitespace()).env("WEFT_BIN_DIR", &self.binaries.dir);
        if let Some((name, value)) = self.mark.split_once('=') {
            command.env(name, value);
        }
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn output(&self, arguments: &str) -> Result<Output> {
        Ok(self.command(arguments).output()?)
    }

    /// What it prints when it succeeds.
    pub(crate) fn run(&self, arguments: &str) -> Result<String> {
        let output = self.output(arguments)?;
        let text = both(&output);
        ensure!(output.status.success(), "lab {arguments}: {}: {text}", output.status);
        Ok(text)
    }

    /// What it prints when it refuses.
    pub(crate) fn refuse(&self, arguments: &str) -> Result<String> {
        let output = self.output(arguments)?;
        let text = both(&output);
        ensure!(!output.status.success(), "lab {arguments} succeeded: {text}");
        Ok(text)
    }

    /// Takes the lab down; the host must be what it was before.
    pub(crate) fn down(&self) -> Result<()> {
        self.run("down")?;
        ensure!(!Path::new(ROOT).exists());
        let left = marked_processes(&self.mark)?;
        ensure!(left.is_empty(), "left running: {left:?}");
        let difference = self.before.difference(&HostSnapshot::take()?);
        ensure!(difference.is_empty(), "the host changed:\n{difference}");
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.run("down");
    }
}

fn both(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}
