//! Leases in one SQLite file that the agents of one machine share: for the lab, a demo, a single host.
//!
//! Each operation opens the file, so that a file that was replaced is simply the new one, and is one transaction. With
//! SQLite's rollback journal every commit writes the database file itself while it holds the exclusive lock: inotify
//! on that file tells of every change by anybody, the sqlite3 shell included, and a reader that was woken early waits
//! for the lock and then sees the change. A slow sweep stands behind it.

mod database;
mod own;
mod watch;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch as latest};
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::{EXAMPLE, NetworkConfig};

use self::database::Database;
use super::selection::Entry;
use super::{AcquireRequest, LeaseStore, LeaseUpdate, OwnedLease, Released, StoreError, StoreHealth};

/// How often the file is read without having been told to.
const SWEEP: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct EmbeddedStore {
    path: PathBuf,
    sweep: Duration,
}

impl EmbeddedStore {
    /// Touches nothing yet; the file is made by the first operation.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), sweep: SWEEP }
    }

    /// Changes how often the file is read without having been told to.
    pub fn with_sweep(self, sweep: Duration) -> Self {
        Self { sweep, ..self }
    }

    /// Writes the network configuration, if it is a good one.
    pub async fn put_config(&self, json: &str) -> Result<(), StoreError> {
        NetworkConfig::parse(json)?;
        let json = json.to_owned();
        self.write(move |database| database.put_config(&json)).await
    }

    /// Every lease that has not expired.
    pub async fn leases(&self) -> Result<Vec<Lease>, StoreError> {
        let entries = self.write(|database| database.entries()).await?;
        Ok(entries.iter().filter_map(Entry::lease).collect())
    }

    /// One writing transaction, on a thread that may wait for the file. What has expired is gone before `work` looks.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let path = self.path.clone();
        self.blocking(move || {
            Database::open(&path)?.transaction(|database| {
                database.expire(SystemTime::now())?;
                work(database)
            })
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
            Err(StoreError::Unavailable { location: self.location(), reason: format!("worker: {e}") })
        })
    }
}

impl LeaseStore for EmbeddedStore {
    fn location(&self) -> String {
        database::location(&self.path)
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let path = self.path.clone();
        let json = self.blocking(move || Database::open(&path)?.config()).await?;
        let json = json.ok_or_else(|| StoreError::NoConfig {
            key: self.path.display().to_string(),
            command: format!("weftd --net-config FILE, where FILE holds {EXAMPLE}"),
        })?;
        Ok(NetworkConfig::parse(&json)?)
    }

    async fn acquire(&self, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
        let want = want.clone();
        self.write(move |database| own::acquire(database, &want)).await
    }

    async fn renew(&self, held: &OwnedLease, ttl: Duration) -> Result<OwnedLease, StoreError> {
        let held = held.clone();
        self.write(move |database| own::renew(database, &held, ttl)).await
    }

    async fn rewrite(
        &self,
        held: &OwnedLease,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> Result<OwnedLease, StoreError> {
        let (held, attrs) = (held.clone(), attrs.clone());
        self.write(move |database| own::rewrite(database, &held, &attrs, ttl)).await
    }

    /// A file has no connections.
    fn reconnect(&self) {}

    async fn release(&self, key: &LeaseKey, public_ip: Ipv4Addr) -> Result<Released, StoreError> {
        let key = *key;
        self.write(move |database| own::release(database, &key, public_ip)).await
    }

    async fn watch(&self, updates: mpsc::Sender<LeaseUpdate>, health: latest::Sender<StoreHealth>) {
        watch::run(self, updates, health).await;
    }
}

#[cfg(test)]
mod tests;
