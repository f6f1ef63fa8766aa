//! Leases in etcd v3, in flannel's layout byte for byte (pkg/subnet/etcd): `<prefix>/config` is the network's JSON,
//! `<prefix>/subnets/<key>` one lease each, every lease under a lease object of its own.
//!
//! Ownership is proved by comparing revisions in transactions, on creation and on renewal alike. A snapshot is one
//! range read; nothing ever costs an RPC per key.

mod config;
mod connection;
mod departure;
mod history;
mod own;
mod watch;

use std::borrow::Cow;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, GetResponse, KeyValue, Txn, TxnOp, TxnOpResponse};
use tokio::sync::{mpsc, watch as latest};
use weft_shared::lease::{LeaseAttrs, LeaseKey};
use weft_shared::netconf::{EXAMPLE, NetworkConfig};

pub use self::config::{BadTlsFile, ClientCert, EtcdConfig, Login, Secret};

use self::connection::Connection;
use super::selection::{Entry, Stored};
use super::{
    AcquireRequest, LeaseStore, LeaseUpdate, Malformed, OwnedLease, Released, StoreError, StoreHealth,
    StoredConfig,
};

/// How often a healthy watch is checked against a fresh snapshot.
const RELIST: Duration = Duration::from_secs(300);

#[derive(Debug, Clone)]
pub struct EtcdStore {
    connection: Arc<Connection>,
    paths: Paths,
    relist: Duration,
    quiet: Duration,
    patience: Duration,
}

impl EtcdStore {
    /// Reads the TLS files; connects to nothing yet.
    pub fn new(config: &EtcdConfig) -> Result<Self, BadTlsFile> {
        let paths = Paths::new(&config.prefix);
        let connection = Connection::new(config, &paths)?;
        let (connection, patience) = (Arc::new(connection), departure::PATIENCE);
        Ok(Self { connection, paths, relist: RELIST, quiet: watch::QUIET, patience })
    }

    /// Changes how often a healthy watch is checked against a fresh snapshot.
    pub fn with_relist(self, relist: Duration) -> Self {
        Self { relist, ..self }
    }

    /// Changes for how long a watch may be quiet before it is asked where it stands.
    pub fn with_quiet(self, quiet: Duration) -> Self {
        Self { quiet, ..self }
    }

    /// Changes how long may be asked how a batch of leases departed.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Everything below the leases' prefix, at one revision.
    async fn read(&self) -> Result<World, StoreError> {
        let response = self.range(GetOptions::new().with_range(self.paths.end.clone())).await?;
        let header = response.header();
        let at = header.map_or((0, 0), |h| (h.cluster_id(), h.revision()));
        Ok(self.paths.world(at, response.kvs()))
    }

    /// The same, with the configuration at that revision.
    async fn read_with_config(&self) -> Result<(World, StoredConfig), StoreError> {
        let range = GetOptions::new().with_range(self.paths.end.clone());
        let txn = Txn::new().and_then([
            TxnOp::get(self.paths.subnets.clone(), Some(range)),
            TxnOp::get(self.paths.config.clone(), None),
        ]);
        let response = self.connection.call(|client| async move {
            client.kv_client().max_decoding_message_size(MAX_MESSAGE).txn(txn).await
        });
        let response = response.await?;
        let header = response.header();
        let at = header.map_or((0, 0), |h| (h.cluster_id(), h.revision()));
        let answers = response.op_responses();
        let [Some(TxnOpResponse::Get(leases)), Some(TxnOpResponse::Get(config))] =
            [answers.first(), answers.get(1)]
        else {
            let reason = "it answered a transaction of two reads with something else".into();
            return Err(StoreError::Unavailable { location: self.location(), reason });
        };
        Ok((
            self.paths.world(at, leases.kvs()),
            StoredConfig::parse(config.kvs().first().map(KeyValue::value)),
        ))
    }

    async fn range(&self, options: GetOptions) -> Result<GetResponse, StoreError> {
        let start = self.paths.subnets.clone();
        let response = self.connection.call(|client| async move {
            client.kv_client().max_decoding_message_size(MAX_MESSAGE).get(start, Some(options)).await
        });
        response.await
    }
}

impl LeaseStore for EtcdStore {
    fn location(&self) -> String {
        self.connection.location.clone()
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let key = self.paths.config.clone();
        let response =
            self.connection.call(|client| async move { client.kv_client().get(key, None).await }).await?;
        let Some(kv) = response.kvs().first() else {
            let command = format!(
                "ETCDCTL_API=3 etcdctl --endpoints {}{} put {} '{EXAMPLE}'",
                self.connection.endpoints().join(","),
                self.connection.etcdctl_options,
                self.paths.config
            );
            let key = format!("{} (is --etcd-prefix right?)", self.paths.config);
            return Err(StoreError::NoConfig { key, command });
        };
        Ok(NetworkConfig::parse(&String::from_utf8_lossy(kv.value()))?)
    }

    async fn acquire(&self, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
        own::acquire(self, want).await
    }

    async fn renew(&self, held: &OwnedLease, ttl: Duration) -> Result<OwnedLease, StoreError> {
        own::renew(self, held, ttl).await
    }

    async fn rewrite(
        &self,
        held: &OwnedLease,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> Result<OwnedLease, StoreError> {
        own::rewrite(self, held, attrs, ttl).await
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
}

/// One message may hold every lease of the cluster: 5,000 are about 1 MiB, and tonic's limit is 4.
const MAX_MESSAGE: usize = 256 << 20;

/// A snapshot.
struct World {
    cluster: u64,
    revision: i64,
    entries: Vec<Entry>,
    malformed: Vec<Malformed>,
}

impl World {
    fn into_update(self) -> LeaseUpdate {
        let leases = self.entries.iter().filter_map(Entry::lease).collect();
        LeaseUpdate::Snapshot { leases, malformed: self.malformed }
    }
}

/// Where things are below the prefix.
#[derive(Debug, Clone)]
struct Paths {
    config: String,
    /// `<prefix>/subnets/`, and the end of the range that it begins: a key such as `<prefix>/subnets-x` is outside.
    subnets: String,
    end: String,
}

impl Paths {
    fn new(prefix: &str) -> Self {
        let below = |name: &str| match prefix {
            "/" => format!("/{name}"),
            prefix => format!("{prefix}/{name}"),
        };
        Self { config: below("config"), subnets: below("subnets/"), end: below("subnets0") }
    }

    fn lease(&self, key: &LeaseKey) -> String {
        format!("{}{key}", self.subnets)
    }

    fn name<'a>(&self, path: &'a str) -> &'a str {
        path.strip_prefix(&self.subnets).unwrap_or(path)
    }

    /// Everything that was read at (cluster, revision).
    fn world(&self, (cluster, revision): (u64, i64), kvs: &[KeyValue]) -> World {
        let mut world = World { cluster, revision, entries: Vec::new(), malformed: Vec::new() };
        for kv in kvs {
            let (entry, malformed) = self.parse(kv);
            world.entries.extend(entry);
            world.malformed.extend(malformed);
        }
        world
    }

    fn parse(&self, kv: &KeyValue) -> (Option<Entry>, Option<Malformed>) {
        let path = text(kv.key());
        let stored = Stored {
            name: self.name(&path),
            value: kv.value(),
            create_revision: kv.create_revision().try_into().unwrap_or(0),
            mod_revision: kv.mod_revision().try_into().unwrap_or(0),
            lease_id: kv.lease(),
            reserved: kv.lease() == 0,
        };
        stored.parse()
    }
}

/// Keys may be any bytes; escaped, different ones stay different.
fn text(key: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(key) {
        Ok(text) => text.into(),
        Err(_) => key.escape_ascii().to_string().into(),
    }
}

#[cfg(test)]
mod tests;
