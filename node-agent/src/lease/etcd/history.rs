//! Which subnets were leased a little while ago, as far as etcd remembers.
//!
//! etcd keeps every revision until it is compacted, but no clock: how long ago a revision was, nobody can say, and a key
//! that is gone has left no time behind. So the leases are looked up at a few revisions, each four times as far back as
//! the one before. What is found there and is not there now was freed since. This knows of every lease that lived three
//! times as long, in revisions, as it has been gone, by whatever program it was written. On a store of flannel's own a
//! day is about one revision for each node, so that the last of the looks goes back a day for 16,000 nodes; a store that
//! others write to as well, or that is compacted every few minutes (Kubernetes' is), remembers less. It is a preference
//! and no promise, and costs reads of keys alone, once, by a node that takes a new subnet.

use std::collections::BTreeSet;
use std::time::Duration;

use etcd_client::{GetOptions, KeyValue};
use tokio::time::timeout;
use weft_shared::lease::LeaseKey;

use super::{EtcdStore, World, text};

/// Revisions to look back.
const LOOKS: [i64; 8] = [1, 4, 16, 64, 256, 1024, 4096, 16_384];
/// A node that boots does not wait for more of the past.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) async fn freed_lately(store: &EtcdStore, now: &World) -> Vec<LeaseKey> {
    let mut found: BTreeSet<LeaseKey> = BTreeSet::new();
    let looks = async {
        for revision in LOOKS.iter().map(|back| now.revision - back).filter(|revision| *revision > 0) {
            let range = GetOptions::new().with_range(store.paths.end.clone()).with_revision(revision);
            // Compacted; what lies further back is so too.
            let Ok(then) = store.range(range.with_keys_only()).await else { return };
            let key = |kv: &KeyValue| store.paths.name(&text(kv.key())).parse::<LeaseKey>().ok();
            found.extend(then.kvs().iter().filter_map(key));
        }
    };
    // What was found in time counts.
    let _ = timeout(PATIENCE, looks).await;
    let here: BTreeSet<LeaseKey> = now.entries.iter().map(|entry| entry.key).collect();
    found.difference(&here).copied().collect()
}
