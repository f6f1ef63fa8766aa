//! Keeps this node's lease, for ever: takes it, renews it in time, takes it again when it is lost. Nothing that a
//! store does ends the process; what is wrong is published and tried again.

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::NetworkConfig;

use self::rivalry::Rivalry;
use super::backoff::Backoff;
use super::{AcquireRequest, LeaseStore, LeaseUpdate, OwnedLease, StoreError};
use crate::durable::snapshot::{OwnSubnet, seconds};
use crate::netconf::{ConfigNotice, needs_restart};

mod rivalry;

const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// An operator who has just written the configuration is watching (flannel: 1 s).
const CONFIG_RETRY_MAX: Duration = Duration::from_secs(2);
/// The wall clock is asked again at least this often: timers stand still while a machine sleeps, leases do not.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// What is known of the own lease. While it is not held, pods keep what they have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseState {
    Acquiring {
        problem: Option<String>,
    },
    /// Known from disk alone: the store has not confirmed it since the agent's start.
    Recalled {
        own: OwnSubnet,
        saved: SystemTime,
        problem: Option<String>,
    },
    /// `problem`: why the last renewal failed, while the lease still runs; or that another node writes it too.
    Held {
        lease: OwnedLease,
        problem: Option<String>,
    },
    /// `owner` holds the subnet now; `None`: the key was gone, or its time ran out while the store was away.
    Lost {
        key: LeaseKey,
        owner: Option<String>,
        problem: Option<String>,
    },
}

/// The task that owns the lease.
#[derive(Debug)]
pub struct Keeper<S> {
    store: Arc<S>,
    want: AcquireRequest,
    margin: Duration,
    state: watch::Sender<LeaseState>,
    own_key: Arc<watch::Sender<OwnKey>>,
    attrs: watch::Receiver<LeaseAttrs>,
}

/// What the rest of the agent has of it.
#[derive(Debug, Clone)]
pub struct KeeperHandle {
    pub state: watch::Receiver<LeaseState>,
    own_key: Arc<watch::Sender<OwnKey>>,
    attrs: Arc<watch::Sender<LeaseAttrs>>,
}

/// Why there is no lease yet.
#[derive(Debug, thiserror::Error)]
enum Obstacle {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{0}")]
    Config(ConfigNotice),
}

/// What the watch said last of the key that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OwnKey {
    Ours,
    /// Our public IP, and yet not what we wrote.
    Rewritten,
    /// Gone, somebody else's or unreadable.
    Lost,
}

/// Reads the network configuration until there is a good one; `report` hears every failure, and `None` at the end.
pub async fn wait_for_config<S: LeaseStore>(
    store: &S,
    mut report: impl FnMut(Option<&StoreError>),
) -> NetworkConfig {
    let mut trouble = Trouble::new(CONFIG_RETRY_MAX);
    loop {
        match store.network_config().await {
            Ok(config) => {
                report(None);
                return config;
            }
            Err(error) => {
                report(Some(&error));
                let wait = trouble.wait(&error, "waiting for the network configuration");
                sleep(wait).await;
            }
        }
    }
}

impl LeaseState {
    /// As status names it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Acquiring { .. } => "acquiring",
            Self::Recalled { .. } => "recalled",
            Self::Held { .. } => "held",
            Self::Lost { .. } => "lost",
        }
    }

    pub fn held(&self) -> Option<&OwnedLease> {
        match self {
            Self::Held { lease, .. } => Some(lease),
            Self::Acquiring { .. } | Self::Recalled { .. } | Self::Lost { .. } => None,
        }
    }

    /// The subnet that the node lives in, held or not; a node that never had one has none.
    pub fn key(&self) -> Option<LeaseKey> {
        match self {
            Self::Acquiring { .. } => None,
            Self::Recalled { own, .. } => Some(own.key),
            Self::Held { lease, .. } => Some(lease.lease.key),
            Self::Lost { key, .. } => Some(*key),
        }
    }

    /// What the lease says; nothing while there is none.
    pub fn public_ip(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Recalled { own, .. } => Some(own.public_ip),
            Self::Held { lease, .. } => Some(lease.lease.attrs.public_ip),
            Self::Acquiring { .. } | Self::Lost { .. } => None,
        }
    }

    /// When the lease ends, in seconds since 1970; `None` for a reservation. What is not this node's has ended.
    pub fn expires(&self) -> Option<u64> {
        match self {
            Self::Recalled { own, .. } => own.expires,
            Self::Held { lease, .. } => lease.expires.map(seconds),
            Self::Acquiring { .. } | Self::Lost { .. } => Some(0),
        }
    }

    pub fn problem(&self) -> Option<&str> {
        match self {
            Self::Acquiring { problem }
            | Self::Recalled { problem, .. }
            | Self::Held { problem, .. }
            | Self::Lost { problem, .. } => problem.as_deref(),
        }
    }

    fn problem_mut(&mut self) -> &mut Option<String> {
        match self {
            Self::Acquiring { problem }
            | Self::Recalled { problem, .. }
            | Self::Held { problem, .. }
            | Self::Lost { problem, .. } => problem,
        }
    }
}

impl KeeperHandle {
    /// Shows the keeper an update of the watch. One that says that our key is gone makes it look at once, one that says
    /// that the key is not as we wrote it after a while; the echo of its own writes does not.
    pub fn observe(&self, update: &LeaseUpdate) {
        let seen =
            self.state.borrow().held().and_then(|held| own_key(&held.lease, &self.attrs.borrow(), update));
        if let Some(seen) = seen {
            self.own_key.send_replace(seen);
        }
    }

    /// What this node publishes from now on: the lease that is held is rewritten at once.
    pub fn publish(&self, attrs: LeaseAttrs) {
        self.attrs.send_if_modified(|published| {
            let differs = *published != attrs;
            *published = attrs;
            differs
        });
    }
}

impl<S: LeaseStore> Keeper<S> {
    /// `margin`: how long before its end a lease is renewed (flannel's `subnet-lease-renew-margin`).
    pub fn new(store: Arc<S>, want: AcquireRequest, margin: Duration) -> (Self, KeeperHandle) {
        let (state, receiver) = watch::channel(LeaseState::Acquiring { problem: None });
        let own_key = Arc::new(watch::Sender::new(OwnKey::Ours));
        let (attrs_sender, attrs) = watch::channel(want.attrs.clone());
        let handle =
            KeeperHandle { state: receiver, own_key: own_key.clone(), attrs: Arc::new(attrs_sender) };
        (Self { store, want, margin, state, own_key, attrs }, handle)
    }

    /// What the node lives in until the store answers.
    pub fn recalling(self, own: OwnSubnet, saved: SystemTime) -> Self {
        self.state.send_replace(LeaseState::Recalled { own, saved, problem: None });
        self
    }

    /// Never ends. It may be dropped at any point: the lease then stays in the store until it expires, as flannel
    /// leaves it, so that a restarted agent finds it.
    pub async fn run(mut self) -> std::convert::Infallible {
        let mut rivalry = Rivalry::new();
        loop {
            self.own_key.send_replace(OwnKey::Ours);
            let held = self.acquire().await;
            info!(key = %held.lease.key, reservation = held.expires.is_none(), "lease held");
            self.want.previous = Some(held.lease.key);
            self.publish_held(held.clone(), rivalry.problem(&*self.store, &held));
            let (owner, problem) = self.hold(held.clone(), &mut rivalry).await;
            let key = held.lease.key;
            warn!(%key, owner, problem, "lease lost");
            self.state.send_replace(LeaseState::Lost { key, owner, problem });
        }
    }

    /// The state stays what it was (acquiring, recalled or lost) until there is a lease; only the problem is kept
    /// current.
    async fn acquire(&mut self) -> OwnedLease {
        let mut trouble = Trouble::new(RETRY_MAX);
        loop {
            self.want.attrs = self.attrs.borrow_and_update().clone();
            match self.try_acquire().await {
                Ok(owned) => return owned,
                Err(error) => {
                    let wait = trouble.wait(&error, "no lease yet");
                    self.report(Some(error.to_string()));
                    sleep(wait).await;
                }
            }
        }
    }

    /// By the range that is to be leased out of now (flannel reads it anew as well). A subnet of another network is
    /// none that this node could use, and one of a network that nobody wants any more is not to be taken.
    ///
    /// The watch tells the configuration as well, but not in time: it may not have begun, or lie behind when a lease is
    /// lost. Whoever read what is to be followed by an acquisition right before it leases nothing out of a range that
    /// an operator has just closed.
    async fn try_acquire(&mut self) -> Result<OwnedLease, Obstacle> {
        match self.store.network_config().await {
            Ok(stored) => match needs_restart(&self.want.config, &stored) {
                changes if changes.is_empty() => self.want.config = stored,
                changes => return Err(Obstacle::Config(ConfigNotice::Differs(changes))),
            },
            // The last good one stays in force.
            Err(StoreError::NoConfig { .. } | StoreError::BadConfig(_)) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.store.acquire(&self.want).await?)
    }

    /// Renews until the lease is lost: to whom, or why.
    async fn hold(
        &mut self,
        mut held: OwnedLease,
        rivalry: &mut Rivalry,
    ) -> (Option<String>, Option<String>) {
        loop {
            self.until_due(&held, rivalry).await;
            let mut trouble = Trouble::new(RETRY_MAX);
            // Before the write: what is seen from now on may be an answer to it.
            self.own_key.send_replace(OwnKey::Ours);
            self.want.attrs = self.attrs.borrow_and_update().clone();
            held = loop {
                match self.renew(&held).await {
                    Ok(renewed) => break renewed,
                    Err(StoreError::Lost { owner, .. }) => return (owner, None),
                    Err(error) => {
                        let wait = trouble.wait(&error, "lease not renewed");
                        if held.expires.is_some_and(|expires| expires <= SystemTime::now()) {
                            return (None, Some(format!("expired: {error}")));
                        }
                        self.report(Some(error.to_string()));
                        sleep(wait.min(remaining(held.expires).unwrap_or(wait))).await;
                    }
                }
            };
            self.publish_held(held.clone(), rivalry.problem(&*self.store, &held));
        }
    }

    /// Extends the lease, and makes it say what this node publishes now.
    async fn renew(&self, held: &OwnedLease) -> Result<OwnedLease, StoreError> {
        let (attrs, ttl) = (&self.want.attrs, self.want.ttl);
        if *attrs == held.lease.attrs {
            self.store.renew(held, ttl).await
        } else {
            info!(key = %held.lease.key, public_ip = %attrs.public_ip, "rewriting the lease");
            self.store.rewrite(held, attrs, ttl).await
        }
    }

    /// Until the lease is to be renewed or rewritten, or taken back from whoever has touched it.
    async fn until_due(&self, held: &OwnedLease, rivalry: &mut Rivalry) {
        let margin = if self.margin < self.want.ttl { self.margin } else { self.want.ttl / 3 };
        let mut own_key = self.own_key.subscribe();
        let mut attrs = self.attrs.clone();
        let mut take_back = None;
        loop {
            let renewal = remaining(held.expires).map(|left| left.saturating_sub(margin));
            let mut wait = renewal.map_or(LONGEST_SLEEP, |left| left.min(LONGEST_SLEEP));
            if *attrs.borrow_and_update() != held.lease.attrs {
                return;
            }
            let seen = *own_key.borrow_and_update();
            match seen {
                OwnKey::Lost => return,
                OwnKey::Rewritten => {
                    let at = *take_back.get_or_insert_with(|| Instant::now() + rivalry.wait());
                    wait = wait.min(at.saturating_duration_since(Instant::now()));
                    if wait.is_zero() {
                        rivalry.declare(&*self.store, held);
                        self.report(rivalry.problem(&*self.store, held));
                        return;
                    }
                }
                OwnKey::Ours => {
                    if take_back.take().is_some() {
                        rivalry.false_alarm();
                    }
                    if rivalry.is_over(Instant::now()) {
                        self.report(None);
                    }
                    if wait.is_zero() {
                        return;
                    }
                }
            }
            // Either way the loop looks again.
            let _ = timeout(wait, async {
                tokio::select! {
                    Ok(()) = own_key.changed() => {}
                    Ok(()) = attrs.changed() => {}
                    else => std::future::pending().await,
                }
            })
            .await;
        }
    }

    fn publish_held(&self, lease: OwnedLease, problem: Option<String>) {
        self.state.send_replace(LeaseState::Held { lease, problem });
    }

    fn report(&self, problem: Option<String>) {
        self.state.send_if_modified(|state| {
            let changed = *state.problem_mut() != problem;
            *state.problem_mut() = problem;
            changed
        });
    }
}

/// What `update` says of our key, if anything. `published` may be on its way there.
fn own_key(own: &Lease, published: &LeaseAttrs, update: &LeaseUpdate) -> Option<OwnKey> {
    let judge = |lease: &Lease| match &lease.attrs {
        attrs if *attrs == own.attrs || attrs == published => OwnKey::Ours,
        attrs if attrs.public_ip == own.attrs.public_ip => OwnKey::Rewritten,
        _ => OwnKey::Lost,
    };
    match update {
        LeaseUpdate::Snapshot { leases, .. } => {
            Some(leases.iter().find(|lease| lease.key == own.key).map_or(OwnKey::Lost, judge))
        }
        LeaseUpdate::Upsert(lease) => (lease.key == own.key).then(|| judge(lease)),
        LeaseUpdate::Remove { key, .. } => (*key == own.key).then_some(OwnKey::Lost),
        LeaseUpdate::Malformed(entry) => (entry.key == own.key.to_string()).then_some(OwnKey::Lost),
        LeaseUpdate::MalformedGone(_) | LeaseUpdate::Config(_) => None,
    }
}

fn remaining(expires: Option<SystemTime>) -> Option<Duration> {
    expires.map(|expires| expires.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A run of failures: its backoff, and a log line when the text changes.
struct Trouble {
    backoff: Backoff,
    logged: Option<String>,
}

impl Trouble {
    fn new(longest: Duration) -> Self {
        Self { backoff: Backoff::new(RETRY_MIN, longest), logged: None }
    }

    fn wait(&mut self, error: &impl fmt::Display, what: &str) -> Duration {
        let text = error.to_string();
        if self.logged.as_ref() != Some(&text) {
            warn!(%error, "{what}, trying again");
            self.logged = Some(text);
        }
        self.backoff.wait()
    }
}

#[cfg(test)]
mod tests;
