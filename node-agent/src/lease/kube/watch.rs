//! One watch on all Nodes: a list in pages, then every change from its version on. A watch that the apiserver ends when
//! its time is up is taken up where it stands; whatever ends it otherwise is followed by another list, since what
//! answers next may be another history. Nothing is said to be gone before that list is whole.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::core::WatchEvent;
use tokio::sync::{mpsc, watch as latest};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::super::backoff::{Backoff, jittered};
use super::super::{LeaseStore, LeaseUpdate, StoreError, StoreHealth, health};
use super::connection::{PAGE, WATCH_LENGTH};
use super::node::Node;
use super::world::{Said, World, read};
use super::{KubeStore, netconf};

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
}

impl Default for Times {
    fn default() -> Self {
        Self {
            relist: Duration::from_secs(300),
            quiet: Duration::from_secs(30),
            silent: Duration::from_secs(180),
            retry: (Duration::from_millis(100), Duration::from_secs(10)),
        }
    }
}

/// An apiserver that ends a watch so little before its time means it no other way.
const SLACK: Duration = Duration::from_secs(5);
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
    let mut watcher = Watcher { store, updates, health, name: None, seen: None };
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
    seen: Option<Seen>,
}

impl Watcher<'_> {
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
        if let Some(node) = own {
            world.add(former.unwrap_or(&nobody), &node, self.read(&node));
        }
        // Whom another history does not have, nobody can tell how it went: that is left to the snapshot.
        let departed = match &self.seen {
            Some(seen) if seen.version <= version && seen.world.shares_a_node_with(&world) => {
                seen.world.departed(&world)
            }
            _ => Vec::new(),
        };
        self.store.shared.set_elder(self.elder(&world));
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
                let said = self.read(&node);
                let updates = self.seen.as_mut().map(|seen| seen.world.set(&node, said));
                (node, updates)
            }
            WatchEvent::Deleted(node) => {
                self.advance(&node.metadata.resource_version)?;
                let updates = self.seen.as_mut().map(|seen| seen.world.remove(&node.metadata.name));
                (node, updates)
            }
        };
        let updates = updates.unwrap_or_default();
        if let Some(seen) = self.seen.as_ref().filter(|_| !updates.is_empty()) {
            self.store.shared.set_elder(self.elder(&seen.world));
        }
        for update in updates {
            match &update {
                LeaseUpdate::Remove { key, .. } => {
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
        let own = self.name.as_deref() == Some(node.metadata.name.as_str());
        let published = if own { self.store.shared.published() } else { None };
        read(node, &self.store.prefix, own, published.as_ref())
    }

    fn elder<'w>(&self, world: &'w World) -> Option<&'w str> {
        world.elder_of(self.name.as_deref()?)
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

const NO_VERSION: &str = "what it says has no resourceVersion";
const WENT_BACK: &str = "its resourceVersion went back";

fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}
