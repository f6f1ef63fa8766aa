//! Told by inotify that the file was written, reads it whole and sends what differs from the last time.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch as latest};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};
use weft_shared::lease::LeaseKey;

use super::super::backoff::{Backoff, jittered};
use super::super::health;
use super::super::selection::{Entry, brief, key_named};
use super::super::{Departure, LeaseStore, LeaseUpdate, StoreError, StoreHealth, StoredConfig};
use super::EmbeddedStore;
use super::database::{Database, World};

pub(super) async fn run(
    store: &EmbeddedStore,
    updates: mpsc::Sender<LeaseUpdate>,
    health: latest::Sender<StoreHealth>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut known: Option<World> = None;
    let mut bell = None;
    let mut relist_at = Instant::now();
    loop {
        // From time to time everything, so that a change that came and went between two looks is healed as well.
        let relist = Instant::now() >= relist_at;
        let wait = match look(store, &mut bell).await {
            Ok(world) => {
                backoff.reset();
                health::heard(&health, store, None);
                let replaced = known.as_ref().is_some_and(|known| !known.is_succeeded_by(&world));
                let former = known.as_ref().filter(|_| !replaced);
                let mut changes = former.map(|former| changes(former, &world)).unwrap_or_default();
                if relist || former.is_none() {
                    relist_at = Instant::now() + jittered(store.sweep);
                    // How leases departed, the snapshot cannot say.
                    changes.retain(|change| matches!(change, LeaseUpdate::Remove { .. }));
                    changes.insert(0, world.stored_config());
                    changes.push(world.snapshot());
                }
                if replaced {
                    warn!(store = %store.location(), "another file, watch begins anew with a snapshot");
                    health.send_modify(|health| health.relists += 1);
                }
                let named = known.as_ref().map_or(&[][..], |known| &known.malformed);
                for entry in world.malformed.iter().filter(|entry| !named.contains(entry)) {
                    warn!(key = brief(&entry.key), reason = %entry.reason, "entry is no lease, skipped");
                }
                for update in changes {
                    if let LeaseUpdate::Remove { key, how } = &update {
                        info!(%key, %how, "lease departed");
                    }
                    if updates.send(update).await.is_err() {
                        return;
                    }
                }
                let expiry = world.next_expiry.map(until);
                known = Some(world);
                let sweep = relist_at.saturating_duration_since(Instant::now());
                expiry.map_or(sweep, |expiry| expiry.min(sweep))
            }
            Err(error) => {
                health::heard(&health, store, Some(&error));
                backoff.wait()
            }
        };
        tokio::select! {
            () = updates.closed() => return,
            rung = timeout(wait, ring(&mut bell)) => {
                if let Ok(Err(error)) = rung {
                    warn!(%error, "inotify failed, the sweep alone notices changes until it is back");
                    bell = None;
                    sleep(backoff.wait()).await;
                }
            }
        }
    }
}

/// Reads the file, after the bell has been hung: what changes later rings it.
async fn look(store: &EmbeddedStore, bell: &mut Option<Bell>) -> Result<World, StoreError> {
    let path = store.path.clone();
    // Makes the file where there is none, so that there is something to watch.
    store.blocking(move || Database::open(&path).map(drop)).await?;
    if bell.as_ref().is_none_or(|bell| bell.stale) {
        *bell = Bell::hang(&store.path)
            .inspect_err(|error| warn!(%error, "no inotify, the sweep alone notices changes"))
            .ok();
    }
    let path = store.path.clone();
    let world = store.blocking(move || Database::open(&path)?.world()).await?;
    if world.next_expiry.is_some_and(|expiry| expiry <= SystemTime::now()) {
        store.write(|_| Ok(())).await?;
        let path = store.path.clone();
        return store.blocking(move || Database::open(&path)?.world()).await;
    }
    Ok(world)
}

impl World {
    fn snapshot(&self) -> LeaseUpdate {
        let leases = self.entries.iter().filter_map(Entry::lease).collect();
        LeaseUpdate::Snapshot { leases, malformed: self.malformed.clone() }
    }

    fn stored_config(&self) -> LeaseUpdate {
        LeaseUpdate::Config(StoredConfig::parse(self.config.as_deref().map(str::as_bytes)))
    }

    /// How a lease departed that was there: by expiry if its time has come, else by somebody's hand.
    fn departure(&self, key: &LeaseKey, now: SystemTime) -> Departure {
        if self.ends.get(key).is_some_and(|end| *end <= now) { Departure::Expired } else { Departure::ByHand }
    }

    /// Whether `later` is the same file's, and not an older copy of it.
    fn is_succeeded_by(&self, later: &World) -> bool {
        self.identity == later.identity && self.revision <= later.revision
    }
}

/// From what was sent to what there is.
fn changes(before: &World, world: &World) -> Vec<LeaseUpdate> {
    let by_key = |world: &World| -> BTreeMap<_, _> {
        world.entries.iter().filter(|e| e.well_spelt).map(|e| (e.key, e.lease())).collect()
    };
    let (old, new) = (by_key(before), by_key(world));
    let now = SystemTime::now();
    let removed = old.keys().filter(|key| !new.contains_key(key));
    let removed = removed.map(|key| LeaseUpdate::Remove { key: *key, how: before.departure(key, now) });
    let config = (before.config != world.config).then(|| world.stored_config());
    let written = new
        .iter()
        .filter(|(key, lease)| old.get(key) != Some(lease))
        .filter_map(|(_, lease)| lease.clone().map(LeaseUpdate::Upsert));
    let malformed = world.malformed.iter().filter(|entry| !before.malformed.contains(entry));
    let gone = before.malformed.iter().filter(|entry| {
        key_named(&entry.key).is_err() && !world.malformed.iter().any(|other| other.key == entry.key)
    });
    config
        .into_iter()
        .chain(removed)
        .chain(written)
        .chain(malformed.cloned().map(LeaseUpdate::Malformed))
        .chain(gone.map(|entry| LeaseUpdate::MalformedGone(entry.key.clone())))
        .collect()
}

/// inotify on the database file. Hung anew when the file itself is replaced.
struct Bell {
    inotify: AsyncFd<Inotify>,
    stale: bool,
}

impl Bell {
    fn hang(path: &Path) -> io::Result<Self> {
        let inotify = crate::inotify::open()?;
        let gone = WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ATTRIB;
        inotify.get_ref().watches().add(path, WatchMask::MODIFY | gone)?;
        Ok(Self { inotify, stale: false })
    }

    async fn rung(&mut self) -> io::Result<()> {
        let mut guard = self.inotify.readable_mut().await?;
        let mut buffer = [0; 4096];
        loop {
            match guard.get_inner_mut().read_events(&mut buffer) {
                Ok(events) => {
                    // Anything but a write: the name may stand for another file by now.
                    for event in events {
                        self.stale |= event.mask != inotify::EventMask::MODIFY;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    guard.clear_ready();
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }
}

/// For ever, without a bell.
async fn ring(bell: &mut Option<Bell>) -> io::Result<()> {
    match bell {
        Some(bell) => bell.rung().await,
        None => std::future::pending().await,
    }
}

fn until(expiry: SystemTime) -> Duration {
    // A little later, so that the row has expired when it is looked at.
    expiry.duration_since(SystemTime::now()).unwrap_or_default() + Duration::from_millis(2)
}
