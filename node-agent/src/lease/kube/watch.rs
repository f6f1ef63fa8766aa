//! One watch on all Nodes: a list in pages, then every change from its version on. A watch that the apiserver ends when
//! its time is up is taken up where it stands; whatever ends it otherwise is followed by another list, since what
//! answers next may be another history. Nothing is said to be gone before that list is whole.

use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::core::WatchEvent;
use tokio::sync::{mpsc, watch as latest};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};
use weft_shared::Subnet;
use weft_shared::lease::LeaseKey;

use super::super::backoff::{Backoff, jittered};
use super::super::{Departure, LeaseStore, LeaseUpdate, StoreError, StoreHealth, StoredConfig, health};
use super::connection::{DEADLINE, PAGE, WATCH_LENGTH};
use super::node::Node;
use super::world::{Reading, Said, World, read};
use super::{KubeStore, Verdict, netconf};

/// How long to wait for what.
#[derive(Debug, Clone)]
pub(super) struct Times {
    /// How often a healthy watch is compared with a list, for as many Nodes as one page has; more of them, more rarely.
    pub relist: Duration,
    /// A watch that is quiet for so long is asked whether anybody is there.
    pub quiet: Duration,
    /// And is given up when it has said nothing for so long: a bookmark comes about every minute.
    pub silent: Duration,
    pub retry: (Duration, Duration),
    /// How long whoever takes a range waits until all Nodes are known.
    pub known: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            relist: Duration::from_secs(300),
            quiet: Duration::from_secs(30),
            silent: Duration::from_secs(180),
            retry: (Duration::from_millis(100), Duration::from_secs(10)),
            known: DEADLINE,
        }
    }
}

/// An apiserver that ends a watch so little before its time means it no other way.
const SLACK: Duration = Duration::from_secs(5);
/// How often a keeper that has not yet heard is told that an older Node has its range.
const REMIND: Duration = Duration::from_millis(500);
/// By so much a list is put off for each Node: all agents of a cluster lose an apiserver at the same moment.
const SPREAD: Duration = Duration::from_millis(2);

pub(super) async fn run(
    store: &KubeStore,
    updates: mpsc::Sender<LeaseUpdate>,
    health: latest::Sender<StoreHealth>,
) {
    let config = updates.clone();
    tokio::select! {
        () = netconf::follow(&store.net_config, &config) => {}
        () = nodes(store, updates, health) => {}
    }
}

async fn nodes(store: &KubeStore, updates: mpsc::Sender<LeaseUpdate>, health: latest::Sender<StoreHealth>) {
    let mut watcher = Watcher::new(store, updates, health);
    let mut backoff = Backoff::new(store.times.retry.0, store.times.retry.1);
    loop {
        match watcher.once(&mut backoff).await {
            End::ReceiverGone => return,
            End::Due => continue,
            End::Relist(why) => warn!(store = %store.location(), why, "watch begins anew with a list"),
            End::Broken(error) => health::heard(&watcher.health, store, Some(&error)),
        }
        let nodes = watcher.seen.as_ref().map_or(0, |seen| seen.world.len());
        let spread = if nodes > PAGE as usize {
            jittered(SPREAD * u32::try_from(nodes).unwrap_or(0))
        } else {
            Duration::ZERO
        };
        if watcher.pause(backoff.wait() + spread).await.is_err() {
            return;
        }
    }
}

enum End {
    ReceiverGone,
    /// Time for a fresh list, with nothing wrong.
    Due,
    /// It cannot be taken up where it stands.
    Relist(&'static str),
    Broken(StoreError),
}

/// What the receiver has been told, and as of which version.
struct Seen {
    world: World,
    version: u64,
}

struct Watcher<'a> {
    store: &'a KubeStore,
    updates: mpsc::Sender<LeaseUpdate>,
    health: latest::Sender<StoreHealth>,
    /// The own Node's.
    name: Option<String>,
    own: Option<Own>,
    /// By which Nodes are judged.
    network: Option<Subnet>,
    seen: Option<Seen>,
    /// While an older Node has the own Node's range: what tells the keeper, and when to do so again.
    shadowed: Option<(LeaseUpdate, Instant)>,
}

/// The own Node as it was seen last, whatever its annotations say.
struct Own {
    uid: String,
    created: u64,
    key: LeaseKey,
}

impl<'a> Watcher<'a> {
    fn new(
        store: &'a KubeStore,
        updates: mpsc::Sender<LeaseUpdate>,
        health: latest::Sender<StoreHealth>,
    ) -> Self {
        let (name, own, network, seen, shadowed) = (None, None, None, None, None);
        Self { store, updates, health, name, own, network, seen, shadowed }
    }

    async fn once(&mut self, backoff: &mut Backoff) -> End {
        let relist_at = match self.list().await {
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

    /// Everything there is, and then the word. Returns when the next list is due.
    async fn list(&mut self) -> Result<Instant, End> {
        let name = self.store.node_name().await.map_err(End::Broken)?.to_owned();
        self.name = Some(name);
        self.network = self.network().await;
        let former = self.seen.as_ref().map(|seen| &seen.world);
        let nobody = World::default();
        let mut world = World::default();
        let mut token: Option<String> = None;
        // Of the first page: what happened while the others were read comes again, and is then known already.
        let mut version = None;
        // Read last: what it is compared with may be published meanwhile.
        let mut own = None;
        loop {
            let page = self.store.connection.nodes(PAGE, token.as_deref()).await;
            let page = match page {
                Err(kube::Error::Api(status)) if status.code == 410 => {
                    return Err(End::Relist("the list took longer than its version is kept"));
                }
                page => page.map_err(|e| End::Broken(self.store.connection.error(&e)))?,
            };
            for node in page.items {
                if self.name.as_deref() == Some(&node.metadata.name) {
                    own = Some(node);
                } else {
                    world.add(former.unwrap_or(&nobody), &node, self.read(&node));
                }
            }
            version.get_or_insert(number(&page.metadata.resource_version).ok_or(End::Relist(NO_VERSION))?);
            token = page.metadata.r#continue.filter(|token| !token.is_empty());
            if token.is_none() {
                break;
            }
        }
        let version = version.unwrap_or_default();
        if let Some(node) = &own {
            world.add(former.unwrap_or(&nobody), node, self.read(node));
        }
        // Whom another history does not have, nobody can tell how it went: that is left to the snapshot.
        let departed = match &self.seen {
            Some(seen) if seen.version <= version && seen.world.shares_a_node_with(&world) => {
                seen.world.departed(&world)
            }
            _ => Vec::new(),
        };
        self.own = own.as_ref().and_then(Own::of);
        self.judge(&world, version);
        if let Some(config) = netconf::stored(&self.store.net_config).await {
            self.send(LeaseUpdate::Config(config)).await?;
        }
        for update in departed {
            self.send(update).await?;
        }
        let snapshot = world.snapshot();
        if let LeaseUpdate::Snapshot { malformed, .. } = &snapshot {
            for entry in malformed {
                warn!(key = %entry.key, reason = %entry.reason, "Node is no peer");
            }
        }
        self.send(snapshot).await?;
        let pages = u32::try_from(world.len()).unwrap_or(u32::MAX) / PAGE;
        self.seen = Some(Seen { world, version });
        health::heard(&self.health, self.store, None);
        Ok(Instant::now() + jittered(self.store.times.relist * pages.max(1)))
    }

    /// One watch after the other, for as long as each ends as it was asked to.
    async fn follow(&mut self, relist_at: Instant, backoff: &mut Backoff) -> Result<Infallible, End> {
        loop {
            let began = Instant::now();
            self.watch(relist_at, backoff).await?;
            if began.elapsed() + SLACK < WATCH_LENGTH {
                return Err(End::Broken(self.unavailable("it ended the watch")));
            }
        }
    }

    /// Until the apiserver ends it.
    async fn watch(&mut self, relist_at: Instant, backoff: &mut Backoff) -> Result<(), End> {
        let Some(from) = self.seen.as_ref().map(|seen| seen.version) else {
            return Err(End::Relist(NO_VERSION));
        };
        let stream = self.store.connection.watch_nodes(&from.to_string()).await;
        let mut stream = pin!(stream.map_err(|e| self.ended(&e))?);
        backoff.reset();
        let mut heard = Instant::now();
        loop {
            let quiet = self.store.times.quiet;
            let event = tokio::select! {
                () = self.updates.closed() => return Err(End::ReceiverGone),
                () = sleep_until(relist_at) => return Err(End::Due),
                () = self.network_changed() => return Err(End::Due),
                () = self.reminder() => {
                    self.remind().await?;
                    continue;
                }
                event = timeout(quiet, stream.next()) => event,
            };
            match event {
                Ok(Some(Ok(event))) => {
                    heard = Instant::now();
                    self.take(event).await?;
                }
                Ok(None) => return Ok(()),
                Ok(Some(Err(error))) => return Err(self.ended(&error)),
                Err(_) if heard.elapsed() >= self.store.times.silent => {
                    return Err(End::Relist("the watch has been silent for too long"));
                }
                Err(_) => self.check().await?,
            }
        }
    }

    async fn take(&mut self, event: WatchEvent<Node>) -> Result<(), End> {
        let (node, updates) = match event {
            WatchEvent::Bookmark(bookmark) => return self.advance(&bookmark.metadata.resource_version),
            WatchEvent::Error(status) => return Err(self.ended(&kube::Error::Api(status))),
            WatchEvent::Added(node) | WatchEvent::Modified(node) => {
                self.advance(&node.metadata.resource_version)?;
                if self.is_own(&node) {
                    self.own = Own::of(&node);
                }
                let said = self.read(&node);
                let updates = self.seen.as_mut().map(|seen| seen.world.set(&node, said));
                (node, updates)
            }
            WatchEvent::Deleted(node) => {
                self.advance(&node.metadata.resource_version)?;
                if self.is_own(&node) {
                    self.own = None;
                }
                let updates = self.seen.as_mut().map(|seen| seen.world.remove(&node.metadata.name));
                (node, updates)
            }
        };
        let updates = updates.unwrap_or_default();
        let own = self.is_own(&node);
        if own || !updates.is_empty() {
            let seen = self.seen.take();
            if let Some(seen) = &seen {
                self.judge(&seen.world, seen.version);
            }
            self.seen = seen;
        }
        for update in updates {
            match &update {
                LeaseUpdate::Remove { key, .. } if !own => {
                    info!(%key, node = %node.metadata.name, "subnet is a Node's no more")
                }
                LeaseUpdate::Malformed(entry) => {
                    warn!(key = %entry.key, reason = %entry.reason, "Node is no peer");
                }
                _ => {}
            }
            self.send(update).await?;
        }
        Ok(())
    }

    /// Versions of one history only grow.
    fn advance(&mut self, version: &str) -> Result<(), End> {
        let version = number(version).ok_or(End::Relist(NO_VERSION))?;
        let Some(seen) = &mut self.seen else { return Ok(()) };
        if version < seen.version {
            return Err(End::Relist(WENT_BACK));
        }
        seen.version = version;
        Ok(())
    }

    /// Whether anybody is there, and of this history: one Node, and the version that a list has now.
    async fn check(&self) -> Result<(), End> {
        let page = self.store.connection.nodes(1, None).await;
        let page = page.map_err(|e| End::Broken(self.store.connection.error(&e)))?;
        let Some(seen) = &self.seen else { return Ok(()) };
        match number(&page.metadata.resource_version) {
            None => Err(End::Relist(NO_VERSION)),
            Some(version) if version < seen.version => Err(End::Relist(WENT_BACK)),
            Some(_) => {
                let known = |node: &Node| seen.world.is_known(&node.metadata.name, &node.metadata.uid);
                match page.items.first() {
                    Some(node) if !known(node) => {
                        Err(End::Relist("a Node is there that the watch has not told"))
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    fn read(&self, node: &Node) -> Said {
        let own = self.is_own(node);
        let published = if own { self.store.shared.published(|published| published.clone()) } else { None };
        let by = Reading { prefix: &self.store.prefix, network: self.network };
        read(node, by, own, published.as_ref())
    }

    fn is_own(&self, node: &Node) -> bool {
        self.name.as_deref() == Some(node.metadata.name.as_str())
    }

    /// The range that the agent leases out of; before it has said so, what the file says.
    async fn network(&self) -> Option<Subnet> {
        let told = *self.store.shared.network.borrow();
        match told {
            Some(network) => Some(network),
            None => match netconf::stored(&self.store.net_config).await {
                Some(StoredConfig::Valid(config)) => Some(config.v4.network),
                _ => None,
            },
        }
    }

    async fn network_changed(&self) {
        let mut network = self.store.shared.network.subscribe();
        let changed = network.wait_for(|network| network.is_some() && *network != self.network);
        if changed.await.is_err() {
            pending().await
        }
    }

    /// Whether an older Node has the own Node's range, for whoever is about to take it, or has it.
    fn judge(&mut self, world: &World, version: u64) {
        let own = self.own.as_ref().zip(self.name.as_deref());
        let elder = own.and_then(|(own, name)| world.elder_of(name, own.created, &own.key));
        let loss = elder.zip(self.own.as_ref()).map(|((_, lease), own)| match lease.key == own.key {
            true => LeaseUpdate::Upsert(lease.clone()),
            false => LeaseUpdate::Remove { key: own.key, how: Departure::ByHand },
        });
        let verdict = Verdict {
            version,
            network: self.network,
            own: self.own.as_ref().map(|own| (own.uid.clone(), own.key)),
            elder: elder.map(|(name, _)| name.to_owned()),
        };
        let due = self.shadowed.take().map_or_else(Instant::now, |(_, due)| due);
        self.shadowed = loss.map(|loss| (loss, due));
        self.store.shared.verdict.send_replace(verdict);
    }

    /// Until the keeper, which has what an older Node has, is to be told. It hears of nothing before it has the lease,
    /// which is a moment after this store has given it: hence again and again.
    async fn reminder(&self) {
        let Some((_, due)) = self.shadowed else { return pending().await };
        let mut held = self.store.shared.held.subscribe();
        if held.wait_for(|held| *held).await.is_err() {
            return pending().await;
        }
        sleep_until(due).await;
    }

    async fn remind(&mut self) -> Result<(), End> {
        let Some((loss, due)) = &mut self.shadowed else { return Ok(()) };
        *due = Instant::now() + REMIND;
        let loss = loss.clone();
        self.send(loss).await
    }

    fn ended(&self, error: &kube::Error) -> End {
        match error {
            kube::Error::Api(status) if status.code == 410 => {
                End::Relist("the version to go on from is kept no more")
            }
            error => End::Broken(self.store.connection.error(error)),
        }
    }

    fn unavailable(&self, reason: &str) -> StoreError {
        StoreError::Unavailable { location: self.store.location(), reason: reason.into() }
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
}

impl Own {
    /// `None`: it has no range.
    fn of(node: &Node) -> Option<Self> {
        let (uid, created) = (node.metadata.uid.clone(), node.created());
        Some(Self { uid, created, key: node.key().ok()? })
    }
}

const NO_VERSION: &str = "what it says has no resourceVersion";
const WENT_BACK: &str = "its resourceVersion went back";

fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}
