//! The network configuration in a file that a ConfigMap is mounted over. kubelet changes it by moving a symbolic link
//! beside it, an operator by an editor: either is an event of the directory. A slow look stands behind it.

use std::io;
use std::path::Path;
use std::time::Duration;

use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::warn;
use weft_shared::netconf::{EXAMPLE, NetworkConfig};

use super::super::{LeaseUpdate, StoreError, StoredConfig};

/// How often the file is read without having been told to: it may be a link to another directory's.
const SWEEP: Duration = Duration::from_secs(30);
/// What comes right behind a first event is read with it.
const SETTLE: Duration = Duration::from_millis(50);

pub(super) async fn read(path: &Path) -> Result<NetworkConfig, StoreError> {
    match text(path).await {
        Ok(Some(text)) => Ok(NetworkConfig::parse_for_nodes(&text)?),
        Ok(None) => Err(StoreError::NoConfig {
            key: format!("{} (is --net-config-path right?)", path.display()),
            command: format!(
                "echo '{EXAMPLE}' >{}, or mount the ConfigMap's net-conf.json there",
                path.display()
            ),
        }),
        Err(error) => {
            let location = format!("--net-config-path = {}", path.display());
            Err(StoreError::Refused { location, reason: error.to_string() })
        }
    }
}

/// What stands there now; `None` when that cannot be read, which is no word of an operator's.
pub(super) async fn stored(path: &Path) -> Option<StoredConfig> {
    match text(path).await {
        Ok(Some(text)) => Some(match NetworkConfig::parse_for_nodes(&text) {
            Ok(config) => StoredConfig::Valid(config),
            Err(error) => StoredConfig::Invalid(error),
        }),
        Ok(None) => Some(StoredConfig::Missing),
        Err(error) => {
            warn!(file = %path.display(), %error, "network configuration cannot be read");
            None
        }
    }
}

/// Sends every change, until the receiver is gone.
pub(super) async fn follow(path: &Path, updates: &mpsc::Sender<LeaseUpdate>) {
    let mut bell = None;
    let mut known = None;
    let mut said = String::new();
    loop {
        if bell.is_none() {
            match hang(path) {
                Ok(hung) => bell = Some(hung),
                Err(error) if error.to_string() == said => {}
                Err(error) => {
                    warn!(%error, "no inotify, the sweep alone notices changes");
                    said = error.to_string();
                }
            }
        }
        let now = stored(path).await;
        if now.is_some() && now != known {
            // The first one is told before the first snapshot anyway.
            if let Some(config) = now.clone()
                && updates.send(LeaseUpdate::Config(config)).await.is_err()
            {
                return;
            }
            known = now;
        }
        tokio::select! {
            () = updates.closed() => return,
            rung = timeout(SWEEP, ring(&mut bell)) => match rung {
                Ok(Ok(())) => sleep(SETTLE).await,
                // The directory itself was replaced.
                Ok(Err(_)) => { bell = None; sleep(SETTLE).await; }
                Err(_) => bell = None,
            }
        }
    }
}

async fn text(path: &Path) -> io::Result<Option<String>> {
    match tokio::fs::read_to_string(path).await {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn hang(path: &Path) -> io::Result<AsyncFd<Inotify>> {
    let inotify = crate::inotify::open()?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let moved = WatchMask::MOVED_TO | WatchMask::MOVED_FROM | WatchMask::CREATE | WatchMask::DELETE;
    let gone = WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
    inotify.get_ref().watches().add(dir, moved | WatchMask::CLOSE_WRITE | gone)?;
    Ok(inotify)
}

/// For ever, without a bell.
async fn ring(bell: &mut Option<AsyncFd<Inotify>>) -> io::Result<()> {
    let Some(bell) = bell else { return std::future::pending().await };
    let mut guard = bell.readable_mut().await?;
    let mut buffer = [0; 4096];
    let mut replaced = false;
    loop {
        match guard.get_inner_mut().read_events(&mut buffer) {
            Ok(events) => {
                let gone = inotify::EventMask::IGNORED
                    | inotify::EventMask::DELETE_SELF
                    | inotify::EventMask::MOVE_SELF;
                replaced |= events.into_iter().any(|event| event.mask.intersects(gone));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
                return if replaced { Err(io::Error::other("the directory is another")) } else { Ok(()) };
            }
            Err(e) => return Err(e),
        }
    }
}
