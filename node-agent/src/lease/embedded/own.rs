//! The own lease, inside a transaction that holds the file's write lock: no race is left to lose.

use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};

use super::super::backoff::random;
use super::super::selection::{Action, Entry, select};
use super::super::{AcquireRequest, OwnedLease, Released, StoreError};
use super::database::Database;

pub(super) fn acquire(database: &Database, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
    let selection = select(&database.entries()?, want, &database.freed_lately()?, random())?;
    for stale in &selection.stale {
        database.delete(&stale.key)?;
    }
    let (lease, entry) = match selection.action {
        Action::Reuse(entry) => (entry.key, Some(entry)),
        Action::Create(key) => (key, None),
    };
    let reserved = entry.as_ref().is_some_and(|entry| entry.reserved);
    let lease = Lease { key: lease, attrs: want.attrs.clone(), create_revision: 0 };
    match entry.filter(|entry| reserved && entry.attrs.as_ref() == Some(&want.attrs)) {
        Some(untouched) => Ok(owned(lease, &untouched, None)),
        None => write(database, lease, Some(want.ttl).filter(|_| !reserved)),
    }
}

pub(super) fn renew(database: &Database, held: &OwnedLease, ttl: Duration) -> Result<OwnedLease, StoreError> {
    let current = current(database, held)?;
    if current.reserved && current.attrs.as_ref() == Some(&held.lease.attrs) {
        return Ok(owned(held.lease.clone(), &current, None));
    }
    write(database, held.lease.clone(), Some(ttl).filter(|_| !current.reserved))
}

pub(super) fn rewrite(
    database: &Database,
    held: &OwnedLease,
    attrs: &LeaseAttrs,
    ttl: Duration,
) -> Result<OwnedLease, StoreError> {
    let target = OwnedLease { lease: Lease { attrs: attrs.clone(), ..held.lease.clone() }, ..held.clone() };
    let current = match current(database, held) {
        Err(StoreError::Lost { .. }) => current(database, &target)?,
        other => other?,
    };
    write(database, target.lease, Some(ttl).filter(|_| !current.reserved))
}

/// In the file's write lock: what is looked at is what is deleted.
pub(super) fn release(
    database: &Database,
    key: &LeaseKey,
    public_ip: Ipv4Addr,
) -> Result<Released, StoreError> {
    let Some(entry) = database.entry(key)? else { return Ok(Released::Gone) };
    let verdict = entry.release(public_ip);
    if verdict == Released::Done {
        database.delete(key)?;
    }
    Ok(verdict)
}

/// What is under our key now; an error when it is not ours any more.
fn current(database: &Database, held: &OwnedLease) -> Result<Entry, StoreError> {
    let key = held.lease.key;
    match database.entry(&key)? {
        None => Err(StoreError::Lost { key, owner: None }),
        Some(entry) if entry.belongs_to(&held.lease.attrs) => Ok(entry),
        Some(entry) => Err(StoreError::Lost { key, owner: Some(entry.owner()) }),
    }
}

fn write(database: &Database, lease: Lease, ttl: Option<Duration>) -> Result<OwnedLease, StoreError> {
    let expires = ttl.map(|ttl| SystemTime::now() + ttl);
    let (create_revision, mod_revision) = database.put(&lease.key, &lease.attrs, expires)?;
    Ok(OwnedLease { lease: Lease { create_revision, ..lease }, mod_revision, lease_id: 0, expires })
}

fn owned(lease: Lease, entry: &Entry, expires: Option<SystemTime>) -> OwnedLease {
    let lease = Lease { create_revision: entry.create_revision, ..lease };
    OwnedLease { lease, mod_revision: entry.mod_revision, lease_id: entry.lease_id, expires }
}
