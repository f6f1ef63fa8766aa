//! runc makes cgroups in the hierarchies of the machine that tests run on; of containers that are killed with their host
//! they stay.

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::wait::{SECOND, eventually};

/// Removes what is left of containers' cgroups when it goes: after the machine, whose end they outlive by a moment.
#[derive(Debug, Default)]
pub struct Cgroups(Mutex<Vec<String>>);

impl Cgroups {
    /// By the ends of their paths, which may be patterns of find(1); with what lies below.
    pub fn of(ends: impl IntoIterator<Item: Into<String>>) -> Self {
        Self(Mutex::new(ends.into_iter().map(Into::into).collect()))
    }

    pub fn add(&self, end: String) {
        self.ends().push(end);
    }

    fn ends(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what can be removed. Whether nothing is left.
    fn remove(&self) -> Result<bool> {
        let ends = self.ends();
        if ends.is_empty() {
            return Ok(true);
        }
        let mut command = Command::new("find");
        command.args(["/sys/fs/cgroup", "-depth", "-type", "d", "("]);
        for (nth, end) in ends.iter().enumerate() {
            command.args((nth > 0).then_some("-o"));
            command.args(["-path", &format!("*/{end}"), "-o", "-path", &format!("*/{end}/*")]);
        }
        // What lives cannot be removed, and is told.
        let output = command.args([")", "!", "-exec", "rmdir", "{}", ";", "-print"]).output()?;
        Ok(output.stdout.is_empty())
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        if let Err(error) = eventually("cgroups of containers to go", SECOND * 10, || self.remove()) {
            eprintln!("{error:#}");
        }
    }
}
