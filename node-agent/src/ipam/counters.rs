//! What address management has done since the agent's start, for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) adds: Counter,
    pub(super) dels: Counter,
    pub(super) tombstones_drained: Counter,
    pub(super) orphans_removed: Counter,
    pub(super) dead_freed: Counter,
    pub(super) rolled_back: Counter,
    failures: Mutex<BTreeMap<(&'static str, u32), u64>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CountersSnapshot {
    /// ADDs that were committed.
    pub adds: u64,
    /// DELs that were answered, and attachments that GC removed.
    pub dels: u64,
    /// Failed requests by verb and CNI code.
    pub failures: BTreeMap<(&'static str, u32), u64>,
    pub tombstones_drained: u64,
    /// Host-side veths with our mark and no record that were deleted.
    pub orphans_removed: u64,
    /// Attachments that lost their veth without a DEL.
    pub dead_freed: u64,
    /// ADDs that were undone because their connection closed before Commit.
    pub rolled_back: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(super) fn failed(&self, verb: &'static str, code: u32) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        *failures.entry((verb, code)).or_default() += 1;
    }

    pub(super) fn snapshot(&self) -> CountersSnapshot {
        CountersSnapshot {
            adds: self.adds.get(),
            dels: self.dels.get(),
            failures: self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            tombstones_drained: self.tombstones_drained.get(),
            orphans_removed: self.orphans_removed.get(),
            dead_freed: self.dead_freed.get(),
            rolled_back: self.rolled_back.get(),
        }
    }
}
