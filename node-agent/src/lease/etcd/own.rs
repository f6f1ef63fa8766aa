//! The own lease: taken and renewed by transactions that compare revisions.

use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use etcd_client::{Compare, CompareOp, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp};
use tokio::time::sleep;
use tracing::debug;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};

use super::super::backoff::{Backoff, random};
use super::super::selection::{Action, Entry, select};
use super::super::{AcquireRequest, OwnedLease, Released, StoreError};
use super::{EtcdStore, history};

/// Races lost in a row before the caller hears of it.
const ATTEMPTS: u32 = 16;

/// Takes a subnet in one transaction on the whole prefix: no key in it may be younger than the snapshot that the
/// choice was made from. Comparing the key alone would let two nodes take one IPv4 half with two IPv6 halves. Renewals
/// leave create revisions alone, so they disturb nobody. Whatever overlaps our new lease is therefore younger than
/// ours and has to give way; there is no need to read again.
pub(super) async fn acquire(store: &EtcdStore, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
    let mut backoff = Backoff::new(Duration::from_millis(4), Duration::from_millis(250));
    let (mut grant, mut freed) = (None, None);
    let mut result = Err(StoreError::Contended(ATTEMPTS));
    for _ in 0..ATTEMPTS {
        match attempt(store, want, &mut grant, &mut freed).await {
            Ok(Some(owned)) => result = Ok(owned),
            Ok(None) => {
                sleep(backoff.wait()).await;
                continue;
            }
            Err(error) => result = Err(error),
        }
        break;
    }
    // A lease object that no key hangs on is nobody's. After silence it may be that a write of ours arrives late and
    // hangs our key on it: to revoke it then would remove the key.
    let used = match &result {
        Ok(owned) => owned.lease_id,
        Err(StoreError::Unavailable { .. }) => return result,
        Err(_) => 0,
    };
    if let Some(unused) = grant.filter(|grant| grant.id != used) {
        revoke(store, unused.id).await;
    }
    result
}

pub(super) async fn renew(
    store: &EtcdStore,
    held: &OwnedLease,
    ttl: Duration,
) -> Result<OwnedLease, StoreError> {
    let mut seen = held.clone();
    // Once more with the revision that somebody else's write of our own lease has given it.
    for _ in 0..2 {
        if seen.expires.is_some() {
            let grant = Grant::new(store, ttl).await?;
            match put(store, &seen, Some(&grant)).await {
                Ok(Some(renewed)) => {
                    // The key hangs on the new object now, the old one would linger until its own end.
                    revoke_if_bare(store, seen.lease_id).await;
                    return Ok(renewed);
                }
                // As in `acquire`: after silence the write may yet arrive.
                Err(silence @ StoreError::Unavailable { .. }) => return Err(silence),
                refused => {
                    revoke(store, grant.id).await;
                    refused?;
                }
            }
        }
        let current = current(store, &seen).await?;
        let unchanged = current.attrs.as_ref() == Some(&held.lease.attrs);
        seen = OwnedLease {
            lease: Lease { create_revision: current.create_revision, ..held.lease.clone() },
            mod_revision: current.mod_revision,
            lease_id: current.lease_id,
            expires: if current.reserved { None } else { seen.expires.or(Some(SystemTime::now())) },
        };
        if current.reserved {
            match if unchanged { Some(seen.clone()) } else { put(store, &seen, None).await? } {
                Some(kept) => return Ok(kept),
                None => continue,
            }
        }
    }
    Err(StoreError::Contended(2))
}

/// Written over the revision that was seen last; where that has gone, once more over what is ours by its value.
pub(super) async fn rewrite(
    store: &EtcdStore,
    held: &OwnedLease,
    attrs: &LeaseAttrs,
    ttl: Duration,
) -> Result<OwnedLease, StoreError> {
    let mut target =
        OwnedLease { lease: Lease { attrs: attrs.clone(), ..held.lease.clone() }, ..held.clone() };
    for _ in 0..2 {
        let grant = match target.expires {
            Some(_) => Some(Grant::new(store, ttl).await?),
            None => None,
        };
        match put(store, &target, grant.as_ref()).await {
            Ok(Some(written)) => {
                if grant.is_some() {
                    revoke_if_bare(store, target.lease_id).await;
                }
                return Ok(written);
            }
            // As in `acquire`: after silence the write may yet arrive.
            Err(silence @ StoreError::Unavailable { .. }) => return Err(silence),
            refused => {
                revoke(store, grant.map_or(0, |grant| grant.id)).await;
                refused?;
            }
        }
        let current = match current(store, held).await {
            Err(StoreError::Lost { .. }) => current(store, &target).await?,
            other => other?,
        };
        target = OwnedLease {
            lease: Lease { create_revision: current.create_revision, ..target.lease },
            mod_revision: current.mod_revision,
            lease_id: current.lease_id,
            expires: if current.reserved { None } else { target.expires.or(Some(SystemTime::now())) },
        };
    }
    Err(StoreError::Contended(2))
}

/// Deletes the key if it is as it was when it was found ours: a renewal or another owner in between is looked at anew.
/// The lease object is left to expire: while it lives, the other nodes can tell that the key was removed on purpose.
pub(super) async fn release(
    store: &EtcdStore,
    key: &LeaseKey,
    public_ip: Ipv4Addr,
) -> Result<Released, StoreError> {
    for _ in 0..ATTEMPTS {
        let path = store.paths.lease(key);
        let get = path.clone();
        let found =
            store.connection.call(|client| async move { client.kv_client().get(get, None).await }).await?;
        let Some(kv) = found.kvs().first() else { return Ok(Released::Gone) };
        let Some(entry) = store.paths.parse(kv).0 else { return Ok(Released::Gone) };
        let verdict = entry.release(public_ip);
        if verdict != Released::Done {
            return Ok(verdict);
        }
        let txn = Txn::new()
            .when([Compare::mod_revision(path.clone(), CompareOp::Equal, entry.mod_revision as i64)])
            .and_then([TxnOp::delete(path, None)]);
        let response =
            store.connection.call(|client| async move { client.kv_client().txn(txn).await }).await?;
        if response.succeeded() {
            return Ok(Released::Done);
        }
    }
    Err(StoreError::Contended(ATTEMPTS))
}

/// `None`: the race was lost.
async fn attempt(
    store: &EtcdStore,
    want: &AcquireRequest,
    grant: &mut Option<Grant>,
    freed: &mut Option<Vec<LeaseKey>>,
) -> Result<Option<OwnedLease>, StoreError> {
    let world = store.read().await?;
    let mut selection = select(&world.entries, want, &[], random())?;
    if selection.is_new {
        let freed = match freed {
            Some(freed) => &*freed,
            slot => &*slot.insert(history::freed_lately(store, &world).await),
        };
        selection = select(&world.entries, want, freed, random())?;
    }

    let mut compares = Vec::new();
    let mut ops = Vec::new();
    for stale in &selection.stale {
        debug!(key = %stale.key, "own lease no longer fits the network, removing it");
        let path = store.paths.lease(&stale.key);
        compares.push(Compare::mod_revision(path.clone(), CompareOp::Equal, stale.mod_revision as i64));
        ops.push(TxnOp::delete(path, None));
    }
    let (key, create_revision, reserved) = match &selection.action {
        Action::Reuse(entry) => {
            let path = store.paths.lease(&entry.key);
            compares.push(Compare::mod_revision(path, CompareOp::Equal, entry.mod_revision as i64));
            (entry.key, Some(entry.create_revision), entry.reserved)
        }
        Action::Create(key) => {
            let path = store.paths.lease(key);
            compares.push(Compare::version(path, CompareOp::Equal, 0));
            compares.push(
                Compare::create_revision(store.paths.subnets.clone(), CompareOp::Less, world.revision + 1)
                    .with_range(store.paths.end.clone()),
            );
            (*key, None, false)
        }
    };
    let untouched = match &selection.action {
        Action::Reuse(entry) if reserved && entry.attrs.as_ref() == Some(&want.attrs) => Some(entry),
        _ => None,
    };
    if let Some(entry) = untouched.filter(|_| ops.is_empty()) {
        return Ok(Some(reservation(entry, &want.attrs)));
    }
    let grant = match grant {
        _ if reserved => None,
        Some(grant) if grant.is_fresh() => Some(&*grant),
        slot => Some(&*slot.insert(Grant::new(store, want.ttl).await?)),
    };
    if untouched.is_none() {
        ops.push(put_op(store, &key, &want.attrs, grant));
    }
    let txn = Txn::new().when(compares).and_then(ops);
    let response = store.connection.call(|client| async move { client.kv_client().txn(txn).await }).await?;
    if !response.succeeded() {
        return Ok(None);
    }
    let revision = response.header().map_or(0, |h| h.revision()).try_into().unwrap_or(0);
    if let Action::Reuse(entry) = &selection.action
        && grant.is_some()
    {
        revoke_if_bare(store, entry.lease_id).await;
    }
    let mod_revision = match untouched {
        Some(entry) => entry.mod_revision,
        None => revision,
    };
    let lease =
        Lease { key, attrs: want.attrs.clone(), create_revision: create_revision.unwrap_or(revision) };
    Ok(Some(owned(lease, mod_revision, grant)))
}

/// Writes our value under our key if the key is as we have seen it. `None`: it is not.
async fn put(
    store: &EtcdStore,
    seen: &OwnedLease,
    grant: Option<&Grant>,
) -> Result<Option<OwnedLease>, StoreError> {
    let lease = &seen.lease;
    let path = store.paths.lease(&lease.key);
    let txn = Txn::new()
        .when([Compare::mod_revision(path, CompareOp::Equal, seen.mod_revision as i64)])
        .and_then([put_op(store, &lease.key, &lease.attrs, grant)]);
    let response = store.connection.call(|client| async move { client.kv_client().txn(txn).await }).await?;
    let revision = response.header().map_or(0, |h| h.revision()).try_into().unwrap_or(0);
    Ok(response.succeeded().then(|| owned(lease.clone(), revision, grant)))
}

/// What is under our key now; an error when it is not ours any more.
async fn current(store: &EtcdStore, held: &OwnedLease) -> Result<Entry, StoreError> {
    let key = held.lease.key;
    let path = store.paths.lease(&key);
    let response =
        store.connection.call(|client| async move { client.kv_client().get(path, None).await }).await?;
    let entry = response.kvs().first().and_then(|kv| store.paths.parse(kv).0);
    match entry {
        None => Err(StoreError::Lost { key, owner: None }),
        Some(entry) if entry.belongs_to(&held.lease.attrs) => Ok(entry),
        Some(entry) => Err(StoreError::Lost { key, owner: Some(entry.owner()) }),
    }
}

fn put_op(store: &EtcdStore, key: &LeaseKey, attrs: &LeaseAttrs, grant: Option<&Grant>) -> TxnOp {
    let value = serde_json::to_vec(attrs).unwrap_or_else(|_| unreachable!("plain data"));
    let options = PutOptions::new().with_lease(grant.map_or(0, |grant| grant.id));
    TxnOp::put(store.paths.lease(key), value, Some(options))
}

fn owned(lease: Lease, mod_revision: u64, grant: Option<&Grant>) -> OwnedLease {
    OwnedLease {
        lease,
        mod_revision,
        lease_id: grant.map_or(0, |grant| grant.id),
        expires: grant.map(|grant| grant.expires),
    }
}

fn reservation(entry: &Entry, attrs: &LeaseAttrs) -> OwnedLease {
    let lease = Lease { key: entry.key, attrs: attrs.clone(), create_revision: entry.create_revision };
    owned(lease, entry.mod_revision, None)
}

/// A lease object of etcd: the key under it goes when it expires.
#[derive(Debug, Clone, Copy)]
struct Grant {
    id: i64,
    /// Counted from before the request, so never later than the store's own idea.
    expires: SystemTime,
    granted: std::time::Instant,
    ttl: Duration,
}

impl Grant {
    async fn new(store: &EtcdStore, ttl: Duration) -> Result<Self, StoreError> {
        let (before, granted) = (SystemTime::now(), std::time::Instant::now());
        let seconds = ttl.as_secs().max(1) as i64;
        let response = store
            .connection
            .call(|client| async move { client.lease_client().grant(seconds, None).await })
            .await?;
        let ttl = Duration::from_secs(response.ttl().try_into().unwrap_or(0));
        Ok(Self { id: response.id(), expires: before + ttl, granted, ttl })
    }

    /// Whether a retry may still use it.
    fn is_fresh(&self) -> bool {
        self.granted.elapsed() < self.ttl / 4
    }
}

/// Revokes a lease object that our key has left. By hand people hang several keys on one: then it is let be.
async fn revoke_if_bare(store: &EtcdStore, id: i64) {
    if id == 0 {
        return;
    }
    let keys = LeaseTimeToLiveOptions::new().with_keys();
    let asked = store
        .connection
        .call(|client| async move { client.lease_client().time_to_live(id, Some(keys)).await })
        .await;
    if asked.is_ok_and(|lease| lease.ttl() > 0 && lease.keys().is_empty()) {
        revoke(store, id).await;
    }
}

/// Best effort: what is not revoked expires by itself.
async fn revoke(store: &EtcdStore, id: i64) {
    if id != 0 {
        let revoked =
            store.connection.call(|client| async move { client.lease_client().revoke(id).await }).await;
        if let Err(error) = revoked {
            debug!(id, %error, "lease object left to expire");
        }
    }
}
