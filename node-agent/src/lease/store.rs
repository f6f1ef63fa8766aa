//! The store that the settings name. Generic code takes a [`LeaseStore`]; the choice is made once, here.

use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::NetworkConfig;

#[cfg(feature = "kube")]
use super::KubeStore;
use super::{
    AcquireRequest, EmbeddedStore, EtcdStore, LeaseStore, LeaseUpdate, OwnedLease, Released, StoreError,
    StoreHealth,
};

#[derive(Debug, Clone)]
pub enum Store {
    Etcd(EtcdStore),
    Embedded(EmbeddedStore),
    #[cfg(feature = "kube")]
    Kube(KubeStore),
}

/// The same of whichever it is.
macro_rules! of_each {
    ($self:ident, $store:ident => $answer:expr) => {
        match $self {
            Self::Etcd($store) => $answer,
            Self::Embedded($store) => $answer,
            #[cfg(feature = "kube")]
            Self::Kube($store) => $answer,
        }
    };
}

impl Store {
    /// As status and metrics name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Etcd(_) => "etcd",
            Self::Embedded(_) => "embedded",
            #[cfg(feature = "kube")]
            Self::Kube(_) => "kubernetes",
        }
    }

    /// Whether a lease that nobody renews ends; otherwise it is what annotations of a Node say.
    pub fn expires_leases(&self) -> bool {
        match self {
            Self::Etcd(_) | Self::Embedded(_) => true,
            #[cfg(feature = "kube")]
            Self::Kube(_) => false,
        }
    }

    /// Whether no other machine can ever take part.
    pub fn one_machine_only(&self) -> bool {
        matches!(self, Self::Embedded(_))
    }
}

impl LeaseStore for Store {
    fn location(&self) -> String {
        of_each!(self, store => store.location())
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        of_each!(self, store => store.network_config().await)
    }

    async fn acquire(&self, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
        of_each!(self, store => store.acquire(want).await)
    }

    async fn renew(&self, held: &OwnedLease, ttl: Duration) -> Result<OwnedLease, StoreError> {
        of_each!(self, store => store.renew(held, ttl).await)
    }

    async fn rewrite(
        &self,
        held: &OwnedLease,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> Result<OwnedLease, StoreError> {
        of_each!(self, store => store.rewrite(held, attrs, ttl).await)
    }

    fn reconnect(&self) {
        of_each!(self, store => store.reconnect())
    }

    async fn release(&self, key: &LeaseKey, public_ip: Ipv4Addr) -> Result<Released, StoreError> {
        of_each!(self, store => store.release(key, public_ip).await)
    }

    async fn watch(&self, updates: mpsc::Sender<LeaseUpdate>, health: watch::Sender<StoreHealth>) {
        of_each!(self, store => store.watch(updates, health).await)
    }

    async fn public_ip_wish(&self) -> Result<Option<Ipv4Addr>, StoreError> {
        of_each!(self, store => store.public_ip_wish().await)
    }

    async fn network_available(&self) -> Result<(), StoreError> {
        of_each!(self, store => store.network_available().await)
    }

    fn rewritten(&self, lease: &Lease) -> String {
        of_each!(self, store => store.rewritten(lease))
    }
}
