//! The files below the run directory against a foreign hand that deletes them under a running agent: what they held is
//! in memory, and the next agent must find it.
//!
//! Looked at by stat(2), twice a second, not by inotify(7): that tells nothing of a directory's end while somebody holds
//! a file in it open, as the agent does with its lock, and tells of a deletion that is still under way.

use std::io;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Boottime, Ipam, State};
use crate::pods::Fabric;

/// An ADD waits longer than this for a socket that is not there.
pub(crate) const LOOK: Duration = Duration::from_millis(500);

impl<F: Fabric> Ipam<F> {
    /// Makes the records anew whenever their directory is gone, until told to stop.
    pub async fn keep_records(&self, stop: CancellationToken) {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = String::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {}
            }
            match self.restore() {
                Ok(()) => said.clear(),
                Err(error) if error != said => {
                    warn!(%error, path = %self.config.run_dir.display(), "the records were deleted, and cannot be written again yet");
                    said = error;
                }
                Err(_) => {}
            }
        }
    }

    /// At once, for whoever is about to let plugins in.
    pub fn restore(&self) -> Result<(), String> {
        if let Some(records) = self.restore_records()? {
            warn!(records, path = %self.config.run_dir.display(), "the records were deleted: written again");
            self.moved.notify_one();
        }
        Ok(())
    }

    /// The directory that plugins leave tombstones in may be another one than before.
    pub fn tombstones_moved(&self) {
        self.moved.notify_one();
    }

    /// How many were written, if they had to be.
    fn restore_records(&self) -> Result<Option<usize>, String> {
        let mut state = self.state();
        let is_there = state.records.is_there();
        if !state.is_short && is_there {
            return Ok(None);
        }
        // What fails on the way is begun anew.
        state.is_short = true;
        state.records.take_anew().map_err(|error| error.to_string())?;
        let written = state.write_all((self.clock)()).map_err(|error| error.to_string())?;
        // Whoever deletes the directory may still be at it, and take along what has just been written: once more at the
        // next look.
        state.is_short = !is_there;
        Ok(Some(written))
    }
}

impl State {
    fn write_all(&mut self, now: Boottime) -> io::Result<usize> {
        self.write_continuity(now)?;
        let mut written = 0;
        for (_, entry) in self.table.entries() {
            self.records.write(&entry.record)?;
            written += 1;
        }
        for (hash, damaged) in self.table.all_damaged() {
            self.records.write_damaged(hash, damaged)?;
            written += 1;
        }
        Ok(written)
    }
}
