//! Objects that somebody else keeps changing. Each repair succeeds and is undone at once, so no operation ever fails:
//! only counting them tells. What is repaired that often is left alone for longer and longer, like a failure, and named.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::object::Key;

/// Repairs in one stretch before the object counts as contested.
const CONTESTED: u32 = 100;
/// A stretch ends when nothing had to be repaired for so long; longer than the longest wait between two attempts.
const QUIET: Duration = Duration::from_secs(15);
/// Repairs of one object in one stretch that an operator is told of.
const TOLD: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Restless(BTreeMap<Key, Stretch>);

#[derive(Debug)]
struct Stretch {
    repairs: u32,
    last: Instant,
}

impl Restless {
    /// Notes a repair; `true` while it is worth a line in the log.
    pub(super) fn repaired(&mut self, key: &Key, now: Instant) -> bool {
        let stretch = self.0.entry(key.clone()).or_insert(Stretch { repairs: 0, last: now });
        stretch.repairs = stretch.repairs.saturating_add(1);
        stretch.last = now;
        stretch.repairs <= TOLD
    }

    /// Forgets what has been quiet.
    pub(super) fn settle(&mut self, now: Instant) {
        self.0.retain(|_, stretch| now.saturating_duration_since(stretch.last) < QUIET);
    }

    /// Others are wanted now: what was repaired before says nothing of them.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn contested(&self) -> BTreeSet<Key> {
        let often = self.0.iter().filter(|(_, stretch)| stretch.repairs >= CONTESTED);
        often.map(|(key, _)| key.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contested_after_many_repairs_until_it_is_quiet() {
        let (mut restless, key) = (Restless::default(), Key::Sysctl("net/ipv4/ip_forward".into()));
        let mut now = Instant::now();
        let told = (0..CONTESTED - 1).filter(|_| restless.repaired(&key, now)).count();
        assert_eq!((told as u32, restless.contested().len()), (TOLD, 0));
        now += QUIET / 2;
        restless.repaired(&key, now);
        restless.settle(now + QUIET / 2);
        assert_eq!(restless.contested(), BTreeSet::from([key.clone()]));
        restless.settle(now + QUIET);
        assert!(restless.contested().is_empty() && restless.repaired(&key, now + QUIET), "begins anew");
    }
}
