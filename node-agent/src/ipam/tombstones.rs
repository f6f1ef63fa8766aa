//! The DELs of a time without an agent (see [`weft_shared::tombstone`]): noticed by inotify(7), applied like the DEL
//! that each one is, and removed.

use std::fs::{self, DirBuilder};
use std::future;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};
use weft_shared::protocol::Attachment;
use weft_shared::replace::is_leftover;
use weft_shared::tombstone::{self, Tombstone};

use super::Ipam;
use super::boottime::Boottime;
use super::locks::NameGuard;
use crate::pods::Fabric;

impl<F: Fabric> Ipam<F> {
    /// Applies and removes every tombstone there is. One that cannot be applied yet stays for the next time.
    pub async fn drain_tombstones(&self) {
        let dir = &self.config.tombstones;
        let found = tombstone::list(dir).unwrap_or_else(|error| {
            warn!(path = %dir.display(), %error, "tombstones cannot be listed");
            Vec::new()
        });
        for (path, tombstone) in found {
            let Some(tombstone) = tombstone else {
                if path.exists() {
                    warn!(path = %path.display(), "unreadable tombstone removed");
                    remove(&path);
                }
                continue;
            };
            match self.apply(&tombstone).await {
                Ok(()) => {
                    info!(attachment = %tombstone.attachment, "tombstone drained");
                    self.counters.tombstones_drained.inc();
                    // A plugin may have put a later one in its place.
                    if read(&path).is_none_or(|now| now == tombstone) {
                        remove(&path);
                    }
                }
                Err(error) => {
                    warn!(attachment = %tombstone.attachment, %error, "tombstone not applied yet");
                }
            }
        }
    }

    /// Removes what a killed plugin left half-written. Only under the exclusive lock: no plugin is writing.
    pub fn clean_tombstones(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.config.tombstones)? {
            let path = entry?.path();
            if is_leftover(&path) {
                remove(&path);
            }
        }
        Ok(())
    }

    pub fn tombstones_dir(&self) -> &Path {
        &self.config.tombstones
    }

    /// An ADD consumes the tombstone of its key: it was meant for an attachment before this one.
    pub(super) async fn consume_tombstone(
        &self,
        key: &Attachment,
        guard: &NameGuard<'_>,
    ) -> Result<(), String> {
        let path = tombstone::path_of(key, &self.config.tombstones);
        let Some(tombstone) = read(&path) else { return Ok(()) };
        if self.buries(&tombstone) {
            self.undo_locked(key, guard).await?;
        }
        self.counters.tombstones_drained.inc();
        remove(&path);
        Ok(())
    }

    async fn apply(&self, tombstone: &Tombstone) -> Result<(), String> {
        if self.buries(tombstone) { self.undo(&tombstone.attachment).await } else { Ok(()) }
    }

    /// Marks the attachment as deleted if the tombstone is meant for it; true when there is something to undo.
    fn buries(&self, tombstone: &Tombstone) -> bool {
        if tombstone.boot_id != self.config.boot_id {
            return false;
        }
        let mut state = self.state();
        state.unclaimed.remove(&tombstone.attachment);
        let written = Boottime::from_nanos(tombstone.boottime_ns);
        let buried = state.table.abort(&tombstone.attachment, Some(written));
        if buried {
            self.publish(&state);
        }
        buried || state.table.may_delete(&tombstone.attachment)
    }
}

fn read(path: &Path) -> Option<Tombstone> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(path = %path.display(), %error, "tombstone not removed");
        }
        _ => {}
    }
}

/// Notices new tombstones. Without inotify the slow look finds them.
pub(super) struct Watch {
    dir: PathBuf,
    inotify: Option<AsyncFd<Inotify>>,
}

impl Watch {
    pub(super) fn new(dir: &Path) -> Self {
        let inotify = crate::inotify::open();
        let inotify =
            inotify.inspect_err(|error| warn!(%error, "no inotify: tombstones are noticed late")).ok();
        let mut watch = Self { dir: dir.to_owned(), inotify };
        watch.renew();
        watch
    }

    /// Watches the directory that is there now (a tombstone is written beside and renamed); one that is watched already stays so.
    pub(super) fn renew(&mut self) {
        let Some(inotify) = &mut self.inotify else { return };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        if let Err(error) =
            made.and_then(|()| inotify.get_mut().watches().add(&self.dir, WatchMask::MOVED_TO))
        {
            warn!(path = %self.dir.display(), %error, "tombstones are noticed late");
        }
    }

    /// Returns when the directory may hold a new one.
    pub(super) async fn changed(&mut self) {
        let Some(inotify) = &mut self.inotify else { return future::pending().await };
        loop {
            let mut buffer = [0; 4096];
            let Ok(mut ready) = inotify.readable_mut().await else { return future::pending().await };
            // Which file it was does not matter, nor whether the queue overflowed: all are looked at.
            let read = ready.try_io(|fd| fd.get_mut().read_events(&mut buffer).map(drop));
            match read {
                Ok(Ok(())) => return,
                Ok(Err(error)) => {
                    warn!(%error, "inotify failed: tombstones are noticed late");
                    return future::pending().await;
                }
                Err(_would_block) => {}
            }
        }
    }
}
