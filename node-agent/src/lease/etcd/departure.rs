//! How leases departed. The DELETE event of a key removed by hand and that of an expired lease are the same; what tells
//! them apart is the lease object, which outlives the one and ends with the other.
//!
//! Every node asks about every departure, so what is asked is bounded: one question per lease object, a few at a time,
//! none after the deadline. Whatever stays unanswered counts as expired: that keeps the peer's entries for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::GetOptions;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use weft_shared::lease::LeaseKey;

use super::super::selection::Entry;
use super::super::{Departure, StoreError};
use super::EtcdStore;

/// For all questions about one batch of departures; the watch stands still meanwhile.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
const AT_ONCE: usize = 16;

/// The lease objects that still live, out of those that keys have departed from.
pub(super) async fn alive(store: &EtcdStore, leases: impl IntoIterator<Item = i64>) -> BTreeSet<i64> {
    let deadline = Instant::now() + store.patience;
    let mut waiting = leases.into_iter().filter(|id| *id != 0).collect::<BTreeSet<_>>().into_iter();
    let mut asked = JoinSet::new();
    let mut alive = BTreeSet::new();
    loop {
        for id in waiting.by_ref().take(AT_ONCE - asked.len()) {
            let store = store.clone();
            asked.spawn(async move { is_alive(&store, id).await.unwrap_or(false).then_some(id) });
        }
        match timeout_at(deadline, asked.join_next()).await {
            Ok(Some(answer)) => alive.extend(answer.ok().flatten()),
            Ok(None) | Err(_) => return alive,
        }
    }
}

/// How the key that was under `lease` departed. Nothing but a hand removes what has no lease.
pub(super) fn judge(lease: i64, alive: &BTreeSet<i64>) -> Departure {
    if lease == 0 || alive.contains(&lease) { Departure::ByHand } else { Departure::Expired }
}

/// Whether the store's history at `revision` is the one that `entries` were seen in: another store, or an older copy of
/// this one, has lease objects that say nothing of ours.
pub(super) async fn remembers(
    store: &EtcdStore,
    revision: i64,
    entries: &BTreeMap<LeaseKey, Entry>,
) -> Result<bool, StoreError> {
    let range = GetOptions::new().with_range(store.paths.end.clone()).with_revision(revision);
    let found = store.range(range).await?;
    let found = found.kvs().iter().filter_map(|kv| store.paths.parse(kv).0).filter(|entry| entry.well_spelt);
    let found: BTreeMap<LeaseKey, Entry> = found.map(|entry| (entry.key, entry)).collect();
    Ok(entries.iter().all(|(key, entry)| found.get(key) == Some(entry)))
}

async fn is_alive(store: &EtcdStore, id: i64) -> Result<bool, StoreError> {
    let asked =
        store.connection.call(|client| async move { client.lease_client().time_to_live(id, None).await });
    Ok(asked.await?.ttl() > 0)
}
