//! Subnet leases: the seam that every store implements, and what the agent makes of them.
//!
//! ```text
//! store (etcd, Kubernetes, embedded) --LeaseUpdate--> table: which peers can be used
//!        ^-- acquire, renew -- keeper: this node's own lease, for ever
//! ```
//! `table`, `allocator` and `selection` do no I/O.

pub mod allocator;
pub mod backoff;
pub mod embedded;
pub mod etcd;
pub mod keeper;
#[cfg(feature = "kube")]
pub mod kube;
pub mod selection;
pub mod table;

#[cfg(test)]
mod contract;
pub mod health;
mod store;

pub use embedded::EmbeddedStore;
pub use etcd::{EtcdConfig, EtcdStore};
pub use keeper::{Keeper, KeeperHandle, LeaseState, wait_for_config};
#[cfg(feature = "kube")]
pub use kube::{KubeConfig, KubeStore};
pub use store::Store;
pub use table::LeaseTable;

use std::fmt;
use std::future::Future;
use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::{ConfigError, NetworkConfig};

/// A place where the cluster's network configuration and leases live.
///
/// A store retries nothing by itself except its watch: callers own the backoff, so that what is wrong is always known
/// in one place. Every call has a deadline inside and ends in bounded time.
pub trait LeaseStore: Send + Sync + 'static {
    /// Where it is, for people: `etcd at http://127.0.0.1:2379, prefix /coreos.com/network`.
    fn location(&self) -> String;

    fn network_config(&self) -> impl Future<Output = Result<NetworkConfig, StoreError>> + Send;

    /// Takes a subnet: the own one again (found by public IP, else the previous subnet) or a free one.
    fn acquire(&self, want: &AcquireRequest) -> impl Future<Output = Result<OwnedLease, StoreError>> + Send;

    /// Extends the lease if, and only if, the key is still ours; never overwrites another owner. A reservation is only
    /// looked after: its value is put right, nothing makes it expire.
    fn renew(
        &self,
        held: &OwnedLease,
        ttl: Duration,
    ) -> impl Future<Output = Result<OwnedLease, StoreError>> + Send;

    /// Extends the lease and gives it another value, such as a new public IP. As [`LeaseStore::renew`]: the key is still
    /// ours by the value that was held, or by the new one.
    fn rewrite(
        &self,
        held: &OwnedLease,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> impl Future<Output = Result<OwnedLease, StoreError>> + Send;

    /// Gives up connections made so far: they may be from an address that this node has no more, and would only be found
    /// dead when they do not answer in time.
    fn reconnect(&self);

    /// Gives the lease of this public IP back, if the key is still its: for a node that leaves for good.
    fn release(
        &self,
        key: &LeaseKey,
        public_ip: Ipv4Addr,
    ) -> impl Future<Output = Result<Released, StoreError>> + Send;

    /// Sends a full snapshot, then every change, until the receiver is gone. A broken watch is resumed, or begun anew
    /// with another snapshot; nothing is ever sent that would read as an empty world because the store is away.
    fn watch(
        &self,
        updates: mpsc::Sender<LeaseUpdate>,
        health: watch::Sender<StoreHealth>,
    ) -> impl Future<Output = ()> + Send;

    /// The public IP that an operator has written beside this node, where a store has a place for that; it wins over
    /// `--public-ip`.
    fn public_ip_wish(&self) -> impl Future<Output = Result<Option<Ipv4Addr>, StoreError>> + Send {
        async { Ok(None) }
    }

    /// Everything is in place for the first time since the lease was taken: whoever else waits for a network on this
    /// node may be told. Called again until it is done.
    fn network_available(&self) -> impl Future<Output = Result<(), StoreError>> + Send {
        async { Ok(()) }
    }

    /// What may be wrong when the own lease was found with another value, and was written back.
    fn rewritten(&self, lease: &Lease) -> String {
        format!(
            "another node publishes this node's public IP {} and overwrites lease {}; give each its own --public-ip",
            lease.attrs.public_ip, lease.key
        )
    }
}

#[derive(Debug, Clone)]
pub struct AcquireRequest {
    pub config: NetworkConfig,
    pub attrs: LeaseAttrs,
    /// What this node held before, from its own durable state or from subnet.env.
    pub previous: Option<LeaseKey>,
    pub ttl: Duration,
}

/// Our own lease, with what a store needs to prove that it is still ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedLease {
    pub lease: Lease,
    /// Revision of the last write, compared at every renewal.
    pub mod_revision: u64,
    /// The store's lease object behind the key; 0 for none.
    pub lease_id: i64,
    /// `None` for a reservation, which never expires and is never renewed.
    pub expires: Option<SystemTime>,
}

/// What became of a lease that was to be given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Released {
    Done,
    /// It had expired, or was removed by hand.
    Gone,
    /// An operator's reservation, which only an operator removes.
    Reserved,
    /// Somebody else holds the subnet by now.
    Foreign {
        owner: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseUpdate {
    /// The whole world: what is not in it does not exist.
    Snapshot {
        leases: Vec<Lease>,
        malformed: Vec<Malformed>,
    },
    Upsert(Lease),
    Remove {
        key: LeaseKey,
        how: Departure,
    },
    /// One entry that could not be read; whatever was known under that key is unchanged.
    Malformed(Malformed),
    /// An entry whose key is no lease key is gone.
    MalformedGone(String),
    /// The network configuration as it is in the store now: before every snapshot, and whenever it changes.
    Config(StoredConfig),
}

/// How a lease came to be gone. The store shows no difference: it is told by what became of the lease object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// Somebody removed the key while its lease was alive, or removed a reservation.
    ByHand,
    /// Its time ran out; or nobody can tell.
    Expired,
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ByHand => "removed by hand",
            Self::Expired => "expired",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredConfig {
    Valid(NetworkConfig),
    Invalid(ConfigError),
    Missing,
}

impl StoredConfig {
    fn parse(value: Option<&[u8]>) -> Self {
        let Some(value) = value else { return Self::Missing };
        match NetworkConfig::parse(&String::from_utf8_lossy(value)) {
            Ok(config) => Self::Valid(config),
            Err(error) => Self::Invalid(error),
        }
    }
}

/// An entry below the leases' prefix that is no lease.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Malformed {
    pub key: String,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreHealth {
    pub connected: bool,
    /// Why not, while not connected.
    pub problem: Option<String>,
    /// Times the watch had to begin anew with a snapshot.
    pub relists: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No answer, or none in time. Worth retrying.
    #[error("{location} does not answer: {reason}")]
    Unavailable { location: String, reason: String },
    /// It answers, and refuses: credentials, permissions.
    #[error("{location} refused: {reason}")]
    Refused { location: String, reason: String },
    /// `key` is where it should be, with what may be wrong about that; `command` is what an operator would type.
    #[error("no network configuration at {key}; write one with: {command}")]
    NoConfig { key: String, command: String },
    #[error(transparent)]
    BadConfig(#[from] ConfigError),
    #[error(
        "no free subnet between {min} and {max} (SubnetLen {len}): enlarge Network or remove stale leases"
    )]
    Exhausted { min: String, max: String, len: u8 },
    /// The key is gone, or somebody else's.
    #[error("lease {key} is {}", owner.as_ref().map_or("gone from the store".to_owned(), |o| format!("now held by {o}")))]
    Lost { key: LeaseKey, owner: Option<String> },
    /// What the lease depends on is not as it has to be; whose doing that is, the reason says.
    #[error("{reason}")]
    NodeUnfit { node: String, reason: String },
    /// Others were faster, every time.
    #[error("lost the race for a subnet {0} times in a row")]
    Contended(u32),
}
