//! Keeps this node's lease, for ever: takes it, renews it in time, takes it again when it is lost. Nothing that a
//! store does ends the process; what is wrong is published and tried again.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::netconf::NetworkConfig;

use super::backoff::Backoff;
use super::{AcquireRequest, LeaseStore, LeaseUpdate, OwnedLease, StoreError};

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
    /// `problem`: why the last renewal failed, while the lease still runs.
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
    own_changed: Arc<Notify>,
}

/// What the rest of the agent has of it.
#[derive(Debug, Clone)]
pub struct KeeperHandle {
    pub state: watch::Receiver<LeaseState>,
    own_changed: Arc<Notify>,
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
                let wait = trouble.wait(&error, "no network configuration yet");
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
            Self::Held { .. } => "held",
            Self::Lost { .. } => "lost",
        }
    }

    pub fn held(&self) -> Option<&OwnedLease> {
        match self {
            Self::Held { lease, .. } => Some(lease),
            Self::Acquiring { .. } | Self::Lost { .. } => None,
        }
    }

    pub fn problem(&self) -> Option<&str> {
        match self {
            Self::Acquiring { problem } | Self::Held { problem, .. } | Self::Lost { problem, .. } => {
                problem.as_deref()
            }
        }
    }

    fn problem_mut(&mut self) -> &mut Option<String> {
        match self {
            Self::Acquiring { problem } | Self::Held { problem, .. } | Self::Lost { problem, .. } => problem,
        }
    }
}

impl KeeperHandle {
    /// Shows the keeper an update of the watch. One that says that our key is gone, or is not as we wrote it, makes it
    /// look at once; the echo of its own writes does not.
    pub fn observe(&self, update: &LeaseUpdate) {
        let foreign = match &*self.state.borrow() {
            LeaseState::Held { lease, .. } => differs(&lease.lease, update),
            LeaseState::Acquiring { .. } | LeaseState::Lost { .. } => false,
        };
        if foreign {
            self.own_changed.notify_one();
        }
    }
}

impl<S: LeaseStore> Keeper<S> {
    /// `margin`: how long before its end a lease is renewed (flannel's `subnet-lease-renew-margin`).
    pub fn new(store: Arc<S>, want: AcquireRequest, margin: Duration) -> (Self, KeeperHandle) {
        let (state, receiver) = watch::channel(LeaseState::Acquiring { problem: None });
        let own_changed = Arc::new(Notify::new());
        let handle = KeeperHandle { state: receiver, own_changed: own_changed.clone() };
        (Self { store, want, margin, state, own_changed }, handle)
    }

    /// Never ends. It may be dropped at any point: the lease then stays in the store until it expires, as flannel
    /// leaves it, so that a restarted agent finds it.
    pub async fn run(mut self) -> std::convert::Infallible {
        loop {
            let held = self.acquire().await;
            info!(key = %held.lease.key, reservation = held.expires.is_none(), "lease held");
            self.want.previous = Some(held.lease.key);
            self.publish_held(held.clone());
            let (owner, problem) = self.hold(held.clone()).await;
            let key = held.lease.key;
            warn!(%key, owner, problem, "lease lost");
            self.state.send_replace(LeaseState::Lost { key, owner, problem });
        }
    }

    /// The state stays what it was (acquiring or lost) until there is a lease; only the problem is kept current.
    async fn acquire(&self) -> OwnedLease {
        let mut trouble = Trouble::new(RETRY_MAX);
        loop {
            match self.store.acquire(&self.want).await {
                Ok(owned) => return owned,
                Err(error) => {
                    let wait = trouble.wait(&error, "no lease yet");
                    self.report(Some(error.to_string()));
                    sleep(wait).await;
                }
            }
        }
    }

    /// Renews until the lease is lost: to whom, or why.
    async fn hold(&self, mut held: OwnedLease) -> (Option<String>, Option<String>) {
        loop {
            self.until_due(&held).await;
            let mut trouble = Trouble::new(RETRY_MAX);
            held = loop {
                match self.store.renew(&held, self.want.ttl).await {
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
            self.publish_held(held.clone());
        }
    }

    /// Until the lease is to be renewed, or somebody has touched it.
    async fn until_due(&self, held: &OwnedLease) {
        let margin = if self.margin < self.want.ttl { self.margin } else { self.want.ttl / 3 };
        loop {
            let left = match remaining(held.expires) {
                Some(left) if left <= margin => return,
                Some(left) => (left - margin).min(LONGEST_SLEEP),
                None => LONGEST_SLEEP,
            };
            if timeout(left, self.own_changed.notified()).await.is_ok() {
                return;
            }
        }
    }

    fn publish_held(&self, lease: OwnedLease) {
        self.state.send_replace(LeaseState::Held { lease, problem: None });
    }

    fn report(&self, problem: Option<String>) {
        self.state.send_if_modified(|state| {
            let changed = *state.problem_mut() != problem;
            *state.problem_mut() = problem;
            changed
        });
    }
}

/// Whether `update` says of our key anything but what we wrote.
fn differs(own: &Lease, update: &LeaseUpdate) -> bool {
    match update {
        LeaseUpdate::Snapshot { leases, .. } => {
            leases.iter().find(|lease| lease.key == own.key).is_none_or(|lease| lease.attrs != own.attrs)
        }
        LeaseUpdate::Upsert(lease) => lease.key == own.key && lease.attrs != own.attrs,
        LeaseUpdate::Remove(key) => *key == own.key,
        LeaseUpdate::Malformed(entry) => entry.key == own.key.to_string(),
        LeaseUpdate::MalformedGone(_) => false,
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

    fn wait(&mut self, error: &StoreError, what: &str) -> Duration {
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
