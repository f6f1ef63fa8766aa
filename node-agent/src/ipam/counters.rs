//! Counts what address management does, for [`PodCounters`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::status::{FailureCount, PodCounters};

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) adds: Counter,
    pub(super) dels: Counter,
    pub(super) tombstones_drained: Counter,
    pub(super) orphans_removed: Counter,
    pub(super) dead_freed: Counter,
    pub(super) rolled_back: Counter,
    /// By verb and CNI code.
    failures: Mutex<BTreeMap<(&'static str, u32), u64>>,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
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

    pub(super) fn snapshot(&self) -> PodCounters {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count =
            |(&(verb, code), &count): (&(&str, u32), &u64)| FailureCount { verb: verb.into(), code, count };
        PodCounters {
            adds: self.adds.get(),
            dels: self.dels.get(),
            rolled_back: self.rolled_back.get(),
            tombstones_drained: self.tombstones_drained.get(),
            orphans_removed: self.orphans_removed.get(),
            dead_freed: self.dead_freed.get(),
            failures: failures.iter().map(count).collect(),
        }
    }
}
