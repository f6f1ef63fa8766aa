//! The watch: a snapshot at revision R, every change from R+1 on; begun anew with another snapshot when the connection
//! was lost or the history is another.

use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::{mpsc, watch as latest};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::warn;

use super::super::backoff::{Backoff, jittered};
use super::super::health;
use super::super::selection::key_named;
use super::super::{LeaseStore, LeaseUpdate, StoreError, StoreHealth};
use super::connection::DEADLINE;
use super::{EtcdStore, MAX_MESSAGE};

/// Leases that one relist interval is meant for: each node reads them all, so the interval grows with their number
/// and the store's load stays that of a small cluster.
const LEASES_PER_RELIST: u32 = 500;

pub(super) async fn run(
    store: &EtcdStore,
    updates: mpsc::Sender<LeaseUpdate>,
    health: latest::Sender<StoreHealth>,
) {
    let mut watcher = Watcher { store, updates, health, place: None };
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        match watcher.once(&mut backoff).await {
            End::ReceiverGone => return,
            End::Due => watcher.place = None,
            End::Relist(why) => {
                warn!(store = %store.location(), why, "watch begins anew with a snapshot");
                watcher.place = None;
                watcher.health.send_modify(|health| health.relists += 1);
                // A store that keeps telling us to start over must not be hammered.
                if watcher.pause(backoff.wait()).await.is_err() {
                    return;
                }
            }
            End::Broken(error) => {
                health::disconnected(&watcher.health, store, &error);
                // What answers next may be another store, restored or begun anew, that has come past our revision in
                // the meantime: only a snapshot tells.
                if watcher.place.take().is_some() {
                    watcher.health.send_modify(|health| health.relists += 1);
                }
                if watcher.pause(backoff.wait()).await.is_err() {
                    return;
                }
            }
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

/// Where in the store's history the receiver stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    cluster: u64,
    /// Everything up to here has been sent.
    revision: i64,
    relist_at: Instant,
}

struct Watcher<'a> {
    store: &'a EtcdStore,
    updates: mpsc::Sender<LeaseUpdate>,
    health: latest::Sender<StoreHealth>,
    place: Option<Place>,
}

impl Watcher<'_> {
    /// A snapshot if one is needed, then changes until something ends it.
    async fn once(&mut self, backoff: &mut Backoff) -> End {
        if self.place.is_none()
            && let Err(end) = self.snapshot().await
        {
            return end;
        }
        match self.follow(backoff).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn snapshot(&mut self) -> Result<(), End> {
        let world = self.store.read().await.map_err(End::Broken)?;
        let leases = u32::try_from(world.entries.len()).unwrap_or(u32::MAX);
        let interval = self.store.relist * (leases / LEASES_PER_RELIST).max(1);
        let place = Place {
            cluster: world.cluster,
            revision: world.revision,
            relist_at: Instant::now() + jittered(interval),
        };
        for entry in &world.malformed {
            warn!(key = %entry.key, reason = %entry.reason, "entry is no lease, skipped");
        }
        self.send(world.into_update()).await?;
        self.place = Some(place);
        health::connected(&self.health, self.store);
        Ok(())
    }

    async fn follow(&mut self, backoff: &mut Backoff) -> Result<std::convert::Infallible, End> {
        let Some(mut place) = self.place else { return Err(End::Relist("no snapshot")) };
        let live = self.store.connection.live().await.map_err(End::Broken)?;
        let followed = async {
            let mut stream = self.open(live.client(), place.revision + 1).await?;
            loop {
                let response = tokio::select! {
                    () = self.updates.closed() => return Err(End::ReceiverGone),
                    () = sleep_until(place.relist_at) => return Err(End::Due),
                    response = stream.message() => response,
                };
                let response = match response {
                    Ok(Some(response)) => response,
                    Ok(None) => return Err(End::Broken(self.ended())),
                    Err(error) => return Err(End::Broken(self.store.connection.error(&error))),
                };
                self.check(&response, place)?;
                if response.created() {
                    backoff.reset();
                    health::connected(&self.health, self.store);
                }
                for update in self.changes(&response) {
                    self.send(update).await?;
                }
                place.revision = progress(&response).unwrap_or(place.revision).max(place.revision);
                self.place = Some(place);
            }
        }
        .await;
        if let Err(End::Broken(_)) = &followed {
            self.store.connection.forget(&live).await;
        }
        followed
    }

    async fn open(&self, client: etcd_client::Client, from: i64) -> Result<WatchStream, End> {
        let options = WatchOptions::new()
            .with_range(self.store.paths.end.clone())
            .with_start_revision(from)
            .with_progress_notify();
        let mut client = client.watch_client().max_decoding_message_size(MAX_MESSAGE);
        let opened = timeout(DEADLINE, client.watch(self.store.paths.subnets.clone(), Some(options))).await;
        match opened {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(End::Broken(self.store.connection.error(&error))),
            Err(_) => Err(End::Broken(self.store.connection.silent(DEADLINE))),
        }
    }

    /// Whether this is still the history that the snapshot belongs to. A watch from a revision that the store has not
    /// reached is accepted and silent, so a store that was replaced shows only in the header.
    fn check(&self, response: &WatchResponse, place: Place) -> Result<(), End> {
        if response.compact_revision() > 0 {
            return Err(End::Relist("the revision to resume from has been compacted"));
        }
        if response.canceled() {
            let reason = format!("watch cancelled: {}", response.cancel_reason());
            return Err(End::Broken(StoreError::Unavailable { location: self.store.location(), reason }));
        }
        match response.header() {
            Some(header) if header.cluster_id() != place.cluster => {
                Err(End::Relist("another cluster answers"))
            }
            Some(header) if header.revision() < place.revision => {
                Err(End::Relist("the store's revision went back"))
            }
            _ => Ok(()),
        }
    }

    fn changes(&self, response: &WatchResponse) -> Vec<LeaseUpdate> {
        let paths = &self.store.paths;
        let mut updates = Vec::new();
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            if event.event_type() == EventType::Put {
                let (entry, malformed) = paths.parse(kv);
                match malformed {
                    Some(malformed) => {
                        warn!(key = %malformed.key, reason = %malformed.reason, "entry is no lease, skipped");
                        updates.push(LeaseUpdate::Malformed(malformed));
                    }
                    None => updates.extend(entry.and_then(|e| e.lease()).map(LeaseUpdate::Upsert)),
                }
            } else {
                let path = String::from_utf8_lossy(kv.key());
                let name = paths.name(&path);
                updates.push(match key_named(name) {
                    Ok(key) => LeaseUpdate::Remove(key),
                    Err(_) => LeaseUpdate::MalformedGone(name.to_owned()),
                });
            }
        }
        updates
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
