//! The watch: a snapshot at revision R, every change from R+1 on; begun anew with another snapshot when the connection
//! was lost or the history is another.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use etcd_client::{Client, Event, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::{mpsc, watch as latest};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};
use weft_shared::lease::LeaseKey;

use super::super::backoff::{Backoff, jittered};
use super::super::health;
use super::super::selection::{Entry, brief, key_named};
use super::super::{Departure, LeaseStore, LeaseUpdate, StoreError, StoreHealth, StoredConfig};
use super::connection::DEADLINE;
use super::{EtcdStore, MAX_MESSAGE, departure, text};

/// Leases that one relist interval is meant for: each node reads them all, so the interval grows with their number
/// and the store's load stays that of a small cluster.
const LEASES_PER_RELIST: u32 = 500;
/// A watch that has been quiet for so long is asked where it stands, and has so long to answer: a quiet watch and a dead
/// one look alike. etcd by itself speaks every ten minutes.
pub(super) const QUIET: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(5);
/// Our names for the two watches on one stream.
const LEASES: i64 = 1;
const CONFIG: i64 = 2;

pub(super) async fn run(
    store: &EtcdStore,
    updates: mpsc::Sender<LeaseUpdate>,
    health: latest::Sender<StoreHealth>,
) {
    let mut watcher = Watcher { store, updates, health, seen: None };
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        match watcher.once(&mut backoff).await {
            End::ReceiverGone => return,
            End::Due => continue,
            End::Relist(why) => warn!(store = %store.location(), why, "watch begins anew with a snapshot"),
            End::Broken(error) => health::heard(&watcher.health, store, Some(&error)),
        }
        // A store that keeps telling us to start over must not be hammered.
        if watcher.pause(backoff.wait()).await.is_err() {
            return;
        }
    }
}

/// Why a stretch of watching ended.
enum End {
    ReceiverGone,
    /// Time for a fresh snapshot, with nothing wrong.
    Due,
    /// It cannot be resumed.
    Relist(&'static str),
    /// The connection is gone.
    Broken(StoreError),
}

/// What the receiver has been told, and as of which point in which store's history.
#[derive(Debug)]
struct Seen {
    cluster: u64,
    revision: i64,
    /// With the lease object behind each key, which says how the key departed when it does.
    entries: BTreeMap<LeaseKey, Entry>,
}

struct Watcher<'a> {
    store: &'a EtcdStore,
    updates: mpsc::Sender<LeaseUpdate>,
    health: latest::Sender<StoreHealth>,
    seen: Option<Seen>,
}

impl Watcher<'_> {
    /// A snapshot, then changes until something ends it. A broken watch is not resumed: what answers next may be
    /// another store, restored or begun anew, that has come past our revision in the meantime; only a snapshot tells.
    async fn once(&mut self, backoff: &mut Backoff) -> End {
        let relist_at = match self.snapshot().await {
            Ok(relist_at) => relist_at,
            Err(end) => return end,
        };
        let end = match self.follow(relist_at, backoff).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        if matches!(end, End::Relist(_) | End::Broken(_)) {
            self.health.send_modify(|health| health.relists += 1);
        }
        end
    }

    /// Returns when the next one is due.
    async fn snapshot(&mut self) -> Result<Instant, End> {
        let (world, config) = self.store.read_with_config().await.map_err(End::Broken)?;
        let leases = u32::try_from(world.entries.len()).unwrap_or(u32::MAX);
        let interval = self.store.relist * (leases / LEASES_PER_RELIST).max(1);
        for entry in &world.malformed {
            warn!(key = brief(&entry.key), reason = %entry.reason, "entry is no lease, skipped");
        }
        let seen = Seen {
            cluster: world.cluster,
            revision: world.revision,
            entries: world.entries.iter().filter(|e| e.well_spelt).map(|e| (e.key, e.clone())).collect(),
        };
        let departed = self.departed(&seen).await;
        self.send(LeaseUpdate::Config(config)).await?;
        for update in departed {
            self.send(update).await?;
        }
        self.send(world.into_update()).await?;
        self.seen = Some(seen);
        health::heard(&self.health, self.store, None);
        Ok(Instant::now() + jittered(interval))
    }

    /// Leases that were there when we last looked. Of those that another history has, nobody can tell.
    async fn departed(&self, now: &Seen) -> Vec<LeaseUpdate> {
        let Some(seen) = &self.seen else { return Vec::new() };
        let gone = seen.entries.iter().filter(|(key, _)| !now.entries.contains_key(key));
        let gone: BTreeMap<_, _> = gone.map(|(key, entry)| (*key, entry.clone())).collect();
        if gone.is_empty() {
            return Vec::new();
        }
        let same_history = seen.cluster == now.cluster
            && seen.revision <= now.revision
            && departure::remembers(self.store, seen.revision, &gone).await.unwrap_or(false);
        let alive =
            departure::alive(self.store, gone.values().map(|e| e.lease_id).filter(|_| same_history)).await;
        let how = |lease| if same_history { departure::judge(lease, &alive) } else { Departure::Expired };
        gone.into_iter().map(|(key, entry)| LeaseUpdate::Remove { key, how: how(entry.lease_id) }).collect()
    }

    async fn follow(&mut self, relist_at: Instant, backoff: &mut Backoff) -> Result<Infallible, End> {
        let Some(Seen { cluster, revision, .. }) = self.seen else { return Err(End::Relist("no snapshot")) };
        let live = self.store.connection.live().await.map_err(End::Broken)?;
        let followed = async {
            let mut stream = self.open(live.client(), revision + 1).await?;
            // Each watch catches up by itself.
            let mut all_reached = BTreeMap::from([(LEASES, revision), (CONFIG, revision)]);
            let mut asked = false;
            loop {
                let patience = if asked { ANSWER.min(self.store.quiet) } else { self.store.quiet };
                let response = tokio::select! {
                    error = self.store.connection.given_up(&live) => return Err(End::Broken(error)),
                    () = self.updates.closed() => return Err(End::ReceiverGone),
                    () = sleep_until(relist_at) => return Err(End::Due),
                    response = timeout(patience, stream.message()) => response,
                };
                let Ok(response) = response else {
                    if std::mem::replace(&mut asked, true) {
                        return Err(End::Relist("the watch does not say where it stands"));
                    }
                    stream
                        .request_progress()
                        .await
                        .map_err(|e| End::Broken(self.store.connection.error(&e)))?;
                    continue;
                };
                asked = false;
                let response = match response {
                    Ok(Some(response)) => response,
                    Ok(None) => return Err(End::Broken(self.ended())),
                    Err(error) => return Err(End::Broken(self.store.connection.error(&error))),
                };
                // The answer to our question is of no watch in particular.
                let both = all_reached.values().copied().min().unwrap_or(revision);
                let reached = all_reached.get_mut(&response.watch_id());
                self.check(&response, cluster, reached.as_deref().copied().unwrap_or(both))?;
                let Some(reached) = reached else { continue };
                if response.created() {
                    backoff.reset();
                    health::heard(&self.health, self.store, None);
                }
                for update in self.changes(&response).await {
                    self.send(update).await?;
                }
                *reached = progress(&response).unwrap_or(*reached).max(*reached);
                if let (Some(seen), Some(both)) = (&mut self.seen, all_reached.values().min()) {
                    seen.revision = *both;
                }
            }
        }
        .await;
        if let Err(End::Broken(_)) = &followed {
            self.store.connection.forget(&live).await;
        }
        followed
    }

    /// Two watches on one stream, so that a login needs to read no more than the two things there are.
    async fn open(&self, client: Client, from: i64) -> Result<WatchStream, End> {
        let options = |id| {
            WatchOptions::new()
                .with_start_revision(from)
                .with_progress_notify()
                .with_prev_key()
                .with_watch_id(id)
        };
        let paths = &self.store.paths;
        let leases = options(LEASES).with_range(paths.end.clone());
        let mut client = client.watch_client().max_decoding_message_size(MAX_MESSAGE);
        let opened = timeout(DEADLINE, async {
            let mut stream = client.watch(paths.subnets.clone(), Some(leases)).await?;
            stream.watch(paths.config.clone(), Some(options(CONFIG))).await?;
            Ok(stream)
        });
        match opened.await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(End::Broken(self.store.connection.error(&error))),
            Err(_) => Err(End::Broken(self.store.connection.silent(DEADLINE))),
        }
    }

    /// Whether this is still the history that the snapshot belongs to. A watch from a revision that the store has not
    /// reached is accepted and silent, so a store that was replaced shows only in the header.
    fn check(&self, response: &WatchResponse, cluster: u64, reached: i64) -> Result<(), End> {
        if response.compact_revision() > 0 {
            return Err(End::Relist("the revision to resume from has been compacted"));
        }
        if response.canceled() {
            let (location, why) = (self.store.location(), response.cancel_reason());
            // Never begun: that is how a missing permission looks.
            return Err(End::Broken(if response.created() {
                StoreError::Refused { location, reason: why.to_owned() }
            } else {
                StoreError::Unavailable { location, reason: format!("watch cancelled: {why}") }
            }));
        }
        match response.header() {
            Some(header) if header.cluster_id() != cluster => Err(End::Relist("another cluster answers")),
            Some(header) if header.revision() < reached => Err(End::Relist("the store's revision went back")),
            _ => Ok(()),
        }
    }

    async fn changes(&mut self, response: &WatchResponse) -> Vec<LeaseUpdate> {
        let deleted = response.events().iter().filter(|event| event.event_type() == EventType::Delete);
        let alive = departure::alive(self.store, deleted.filter_map(|e| Some(e.prev_kv()?.lease()))).await;
        let mut updates = Vec::new();
        for event in response.events() {
            let how = || match event.prev_kv() {
                Some(former) => departure::judge(former.lease(), &alive),
                // Compacted meanwhile.
                None => Departure::Expired,
            };
            updates.extend(self.change(event, how));
        }
        updates
    }

    fn change(&mut self, event: &Event, how: impl Fn() -> Departure) -> Option<LeaseUpdate> {
        let (kv, paths) = (event.kv()?, &self.store.paths);
        let present = event.event_type() == EventType::Put;
        if kv.key() == paths.config.as_bytes() {
            return Some(LeaseUpdate::Config(StoredConfig::parse(present.then_some(kv.value()))));
        }
        let seen = self.seen.as_mut().map(|seen| &mut seen.entries);
        if present {
            let (entry, malformed) = paths.parse(kv);
            let entry = entry.filter(|entry| entry.well_spelt);
            if let (Some(entry), Some(seen)) = (&entry, seen) {
                seen.insert(entry.key, entry.clone());
            }
            if let Some(malformed) = malformed {
                warn!(key = brief(&malformed.key), reason = %malformed.reason, "entry is no lease, skipped");
                return Some(LeaseUpdate::Malformed(malformed));
            }
            return entry.as_ref().and_then(Entry::lease).map(LeaseUpdate::Upsert);
        }
        let path = text(kv.key());
        let name = paths.name(&path);
        match key_named(name) {
            Ok(key) => {
                seen.map(|seen| seen.remove(&key));
                let how = how();
                info!(%key, %how, "lease departed");
                Some(LeaseUpdate::Remove { key, how })
            }
            Err(_) => Some(LeaseUpdate::MalformedGone(name.to_owned())),
        }
    }

    async fn send(&self, update: LeaseUpdate) -> Result<(), End> {
        self.updates.send(update).await.map_err(|_| End::ReceiverGone)
    }

    /// Waits, unless the receiver goes meanwhile.
    async fn pause(&self, duration: Duration) -> Result<(), End> {
        tokio::select! {
            () = self.updates.closed() => Err(End::ReceiverGone),
            () = sleep(duration) => Ok(()),
        }
    }

    fn ended(&self) -> StoreError {
        StoreError::Unavailable { location: self.store.location(), reason: "it ended the watch".into() }
    }
}

/// The revision up to which a response is complete. While a watcher catches up, the header runs ahead of the events,
/// so only a response without any vouches for the header's.
fn progress(response: &WatchResponse) -> Option<i64> {
    match response.events().last().and_then(|event| event.kv()) {
        Some(kv) => Some(kv.mod_revision()),
        None if response.created() => None,
        None => response.header().map(|header| header.revision()),
    }
}
