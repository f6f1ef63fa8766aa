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
use tokio::time::timeout;
use weft_shared::Subnet;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::NetworkConfig;

pub use self::annotations::Prefix;
pub use self::config::{KubeConfig, NodeIdentity};

use self::annotations::Published;
use self::connection::Connection;
use self::node::Node;
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
    published: Mutex<Option<Published>>,
    /// The range that this node's is to be of.
    network: latest::Sender<Option<Subnet>>,
    verdict: latest::Sender<Verdict>,
    /// Whether the keeper has the lease, by what this store has told it.
    held: latest::Sender<bool>,
}

/// What the watch makes of the own Node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Verdict {
    /// Every change up to here is in it.
    version: u64,
    /// By which the other Nodes were judged.
    network: Option<Subnet>,
    /// The object that was seen, and its range.
    own: Option<(String, LeaseKey)>,
    /// The older Node that has this range.
    elder: Option<String>,
}

impl Shared {
    fn published<T>(&self, look: impl FnOnce(&mut Option<Published>) -> T) -> T {
        look(&mut self.published.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn publish(&self, attrs: &LeaseAttrs) {
        self.published(|published| {
            let public_ip = published.take().and_then(|former| former.public_ip);
            *published = Some(Published { attrs: attrs.clone(), public_ip });
        });
    }

    fn publish_ip(&self, annotation: Option<&str>) {
        self.published(|published| {
            if let Some(published) = published {
                published.public_ip = annotation.map(str::to_owned);
            }
        });
    }

    fn lease_out_of(&self, network: Subnet) {
        self.network.send_if_modified(|known| known.replace(network) != Some(network));
    }

    fn elder(&self) -> Option<String> {
        self.verdict.borrow().elder.clone()
    }

    /// As [`Shared::elder`], once the watch has seen everything that went before this state of the own Node.
    async fn elder_before(
        &self,
        node: &Node,
        key: LeaseKey,
        network: Subnet,
        patience: Duration,
    ) -> Option<Option<String>> {
        let version = node.version();
        let own = Some((node.metadata.uid.clone(), key));
        let mut verdict = self.verdict.subscribe();
        let seen = verdict.wait_for(|verdict| {
            (&verdict.own, verdict.network) == (&own, Some(network)) && Some(verdict.version) >= version
        });
        let seen = timeout(patience, seen).await.ok()?.ok()?;
        Some(seen.elder.clone())
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
