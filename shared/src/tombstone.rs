//! What a DEL leaves behind when no agent answers: a file that tells the next one to free the address.
//!
//! The plugin writes under the shared lock, the agent drains under the exclusive one before it listens: a DEL therefore
//! either reaches the agent or is seen by it. Names are hashes, so a repeated DEL replaces its own file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::names::attachment_hash;
use crate::protocol::Attachment;
use crate::replace::{Survive, is_leftover, replace_file};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    pub attachment: Attachment,
    /// [`boot_id`] of the time: a tombstone of another boot is void.
    pub boot_id: String,
    /// `CLOCK_BOOTTIME` in nanoseconds: it buries only what was reserved before.
    pub boottime_ns: u64,
    pub netns_cookie: Option<u64>,
}

/// What tells this boot from every other (random(4)).
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Where the tombstones of the agent behind `socket` lie.
pub fn dir_beside(socket: &Path) -> PathBuf {
    socket.with_file_name("tombstones")
}

/// Where the lock of the tombstones lies.
pub fn lock_path(dir: &Path) -> PathBuf {
    dir.join("lock")
}

/// Whether a file of that directory is a tombstone, the lock, or what a writer that was cut short has left.
pub fn is_ours(path: &Path) -> bool {
    is_tombstone(path) || is_leftover(path) || path.ends_with("lock")
}

fn is_tombstone(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "json")
}

/// Opens the lock file beside the tombstones, making both if need be. The caller locks it.
pub fn lock_file(dir: &Path) -> io::Result<File> {
    // Root's alone, and so is what has to be made above it.
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(lock_path(dir))
}

/// The file that a tombstone of this attachment would be.
pub fn path_of(attachment: &Attachment, dir: &Path) -> PathBuf {
    dir.join(format!("{}.json", attachment_hash(attachment)))
}

impl Tombstone {
    pub fn path(&self, dir: &Path) -> PathBuf {
        path_of(&self.attachment, dir)
    }

    /// Writes the file whole or not at all.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        replace_file(&self.path(dir), &serde_json::to_vec(self)?, 0o600, Survive::Crash)
    }
}

/// Every readable tombstone with its path. A file that is none (a torn write of a killed plugin) is reported by path.
pub fn list(dir: &Path) -> io::Result<Vec<(PathBuf, Option<Tombstone>)>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if is_tombstone(&path) {
            let tombstone = fs::read(&path).ok().and_then(|json| serde_json::from_slice(&json).ok());
            found.push((path, tombstone));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}
