//! The store that the settings name. Generic code takes a [`LeaseStore`]; the choice is made once, here.

use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use weft_shared::lease::{LeaseAttrs, LeaseKey};
use weft_shared::netconf::NetworkConfig;

use super::{
    AcquireRequest, EmbeddedStore, EtcdStore, LeaseStore, LeaseUpdate, OwnedLease, Released, StoreError,
    StoreHealth,
};

#[derive(Debug, Clone)]
pub enum Store {
    Etcd(EtcdStore),
    Embedded(EmbeddedStore),
}

impl Store {
    /// As status and metrics name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Etcd(_) => "etcd",
            Self::Embedded(_) => "embedded",
        }
    }

    /// Whether no other machine can ever take part.
    pub fn one_machine_only(&self) -> bool {
        matches!(self, Self::Embedded(_))
    }
}

impl LeaseStore for Store {
    fn location(&self) -> String {
        match self {
            Self::Etcd(store) => store.location(),
            Self::Embedded(store) => store.location(),
        }
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        match self {
            Self::Etcd(store) => store.network_config().await,
            Self::Embedded(store) => store.network_config().await,
        }
    }

    async fn acquire(&self, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
        match self {
            Self::Etcd(store) => store.acquire(want).await,
            Self::Embedded(store) => store.acquire(want).await,
        }
    }

    async fn renew(&self, held: &OwnedLease, ttl: Duration) -> Result<OwnedLease, StoreError> {
        match self {
            Self::Etcd(store) => store.renew(held, ttl).await,
            Self::Embedded(store) => store.renew(held, ttl).await,
        }
    }

    async fn rewrite(
        &self,
        held: &OwnedLease,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> Result<OwnedLease, StoreError> {
        match self {
            Self::Etcd(store) => store.rewrite(held, attrs, ttl).await,
            Self::Embedded(store) => store.rewrite(held, attrs, ttl).await,
        }
    }

    fn reconnect(&self) {
        match self {
            Self::Etcd(store) => store.reconnect(),
            Self::Embedded(store) => store.reconnect(),
        }
    }

    async fn release(&self, key: &LeaseKey, public_ip: Ipv4Addr) -> Result<Released, StoreError> {
        match self {
            Self::Etcd(store) => store.release(key, public_ip).await,
            Self::Embedded(store) => store.release(key, public_ip).await,
        }
    }

    async fn watch(&self, updates: mpsc::Sender<LeaseUpdate>, health: watch::Sender<StoreHealth>) {
        match self {
            Self::Etcd(store) => store.watch(updates, health).await,
            Self::Embedded(store) => store.watch(updates, health).await,
        }
    }
}
