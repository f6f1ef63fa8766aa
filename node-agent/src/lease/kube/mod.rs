//! Leases as annotations of Nodes, as flannel's `--kube-subnet-mgr` keeps them (pkg/subnet/kube): a Node's podCIDR is its
//! subnet, its annotations say how to reach it, the network configuration lies in a file that a ConfigMap is mounted
//! over. The cluster gives the ranges out, so nothing is allocated here and nothing expires.
//!
//! Each agent of a cluster of thousands has one watch on all Nodes, which change with every heartbeat: of each only the
//! fields that are read are kept, what changes none of them ends with a comparison, and nothing is written that stands
//! there already.

mod annotations;
mod config;
mod connection;
mod netconf;
mod node;
mod own;
mod policies;
mod watch;
mod world;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OnceCell, mpsc, watch as latest};
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::NetworkConfig;

pub use self::annotations::Prefix;
pub use self::config::{KubeConfig, NodeIdentity};

use self::connection::Connection;
use super::{AcquireRequest, LeaseStore, LeaseUpdate, OwnedLease, Released, StoreError, StoreHealth};

#[derive(Debug, Clone)]
pub struct KubeStore {
    connection: Arc<Connection>,
    prefix: Prefix,
    net_config: PathBuf,
    set_network_available: bool,
    shared: Arc<Shared>,
    times: watch::Times,
}

/// What the watch and the own lease know of each other.
#[derive(Debug, Default)]
struct Shared {
    node: OnceCell<String>,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    published: Option<LeaseAttrs>,
    /// The older Node that has this node's range.
    elder: Option<String>,
}

impl Shared {
    fn with<T>(&self, look: impl FnOnce(&mut Told) -> T) -> T {
        look(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn publish(&self, attrs: &LeaseAttrs) {
        self.with(|told| told.published = Some(attrs.clone()));
    }

    fn published(&self) -> Option<LeaseAttrs> {
        self.with(|told| told.published.clone())
    }

    fn elder(&self) -> Option<String> {
        self.with(|told| told.elder.clone())
    }

    fn set_elder(&self, elder: Option<&str>) {
        self.with(|told| told.elder = elder.map(str::to_owned));
    }
}

impl KubeStore {
    /// Reads nothing and connects to nothing yet.
    pub fn new(config: &KubeConfig) -> Self {
        Self::over(config, Connection::new(config))
    }

    fn over(config: &KubeConfig, connection: Connection) -> Self {
        Self {
            connection: Arc::new(connection),
            prefix: config.prefix.clone(),
            net_config: config.net_config.clone(),
            set_network_available: config.set_network_available,
            shared: Arc::default(),
            times: watch::Times::default(),
        }
    }

    /// How many NetworkPolicies there are in the cluster.
    pub async fn network_policies(&self) -> Result<u64, StoreError> {
        policies::count(self).await
    }

    /// Writes the Event which says that nobody enforces them, unless it is there.
    pub async fn tell_of_network_policies(&self, note: &str) -> Result<(), StoreError> {
        policies::tell(self, note).await
    }

    async fn node_name(&self) -> Result<&str, StoreError> {
        let (namespace, pod) = match self.connection.identity() {
            NodeIdentity::Name(name) => return Ok(name),
            NodeIdentity::OfPod { namespace, name } => (namespace, name),
        };
        let name = self.shared.node.get_or_try_init(|| async {
            let name = self.connection.node_of_pod(namespace, pod).await?;
            name.ok_or_else(|| StoreError::Refused {
                location: self.location(),
                reason: format!(
                    "pod {namespace}/{pod} is not there or on no Node: expected this agent's, by POD_NAMESPACE and POD_NAME"
                ),
            })
        });
        name.await.map(String::as_str)
    }
}

impl LeaseStore for KubeStore {
    fn location(&self) -> String {
        self.connection.location.clone()
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        netconf::read(&self.net_config).await
    }

    async fn acquire(&self, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
        own::acquire(self, want).await
    }

    async fn renew(&self, held: &OwnedLease, _ttl: Duration) -> Result<OwnedLease, StoreError> {
        own::renew(self, held, &held.lease.attrs).await
    }

    async fn rewrite(
        &self,
        held: &OwnedLease,
        attrs: &LeaseAttrs,
        _ttl: Duration,
    ) -> Result<OwnedLease, StoreError> {
        own::renew(self, held, attrs).await
    }

    fn reconnect(&self) {
        self.connection.reset();
    }

    async fn release(&self, key: &LeaseKey, public_ip: Ipv4Addr) -> Result<Released, StoreError> {
        own::release(self, key, public_ip).await
    }

    async fn watch(&self, updates: mpsc::Sender<LeaseUpdate>, health: latest::Sender<StoreHealth>) {
        watch::run(self, updates, health).await;
    }

    async fn public_ip_wish(&self) -> Result<Option<Ipv4Addr>, StoreError> {
        own::public_ip_wish(self).await
    }

    async fn network_available(&self) -> Result<(), StoreError> {
        match self.set_network_available {
            true => own::network_available(self).await,
            false => Ok(()),
        }
    }

    fn rewritten(&self, _lease: &Lease) -> String {
        "another hand changed the annotations that this node writes on its Node, and they were put back; if that goes \
         on, another agent runs under this Node's name (NODE_NAME)"
            .into()
    }
}

#[cfg(test)]
mod tests;
