//! Two nodes with one public IP. A store finds a node's lease by that address (flannel's `tryAcquireLease`), so both
//! hold the same key, and each sees its value overwritten by the other's. Neither can be right for long: to write back
//! at once would only load the store, so each takes the lease back ever more rarely and says what is wrong.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::super::backoff::Backoff;
use super::super::{LeaseStore, OwnedLease};

/// The first wait is also what tells a rival from a late echo: an update older than our own write is followed by it.
const TAKE_BACK_MIN: Duration = Duration::from_secs(1);
const TAKE_BACK_MAX: Duration = Duration::from_secs(60);
/// Longer than both nodes' longest waits together.
const QUIET: Duration = Duration::from_secs(300);

#[derive(Debug)]
pub(super) struct Rivalry {
    backoff: Backoff,
    /// When the rival's last write had to be undone; `None`: there is no rival.
    last: Option<Instant>,
}

impl Rivalry {
    pub(super) fn new() -> Self {
        Self { backoff: Backoff::new(TAKE_BACK_MIN, TAKE_BACK_MAX), last: None }
    }

    /// How long the rival's value is left alone this time.
    pub(super) fn wait(&mut self) -> Duration {
        self.backoff.wait()
    }

    /// The value was ours again before the wait was over.
    pub(super) fn false_alarm(&mut self) {
        if self.last.is_none() {
            self.backoff.reset();
        }
    }

    /// The value is still not ours.
    pub(super) fn declare(&mut self, store: &impl LeaseStore, held: &OwnedLease) {
        if self.last.replace(Instant::now()).is_none() {
            let (key, public_ip) = (held.lease.key, held.lease.attrs.public_ip);
            warn!(%key, %public_ip, "{}", store.rewritten(&held.lease));
        }
    }

    pub(super) fn problem(&self, store: &impl LeaseStore, held: &OwnedLease) -> Option<String> {
        self.last.map(|_| store.rewritten(&held.lease))
    }

    /// Whether the rival has just now been quiet for long enough to be forgotten.
    pub(super) fn is_over(&mut self, now: Instant) -> bool {
        let over = self.last.is_some_and(|last| now.saturating_duration_since(last) >= QUIET);
        if over {
            info!(seconds = QUIET.as_secs(), "no other node has overwritten the lease for a while");
            *self = Self::new();
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgotten_after_a_quiet_while_only() {
        let mut rivalry = Rivalry::new();
        let now = Instant::now();
        assert!(!rivalry.is_over(now + QUIET), "no rival yet");
        let long_waited =
            |rivalry: &mut Rivalry| (0..8).map(|_| rivalry.wait()).last() > Some(TAKE_BACK_MAX / 2);
        assert!(long_waited(&mut rivalry));
        rivalry.last = Some(now);
        rivalry.false_alarm();
        assert!(!rivalry.is_over(now + QUIET / 2));
        assert!(rivalry.wait() >= TAKE_BACK_MAX / 2, "waits on");
        assert!(rivalry.is_over(now + QUIET) && !rivalry.is_over(now + QUIET));
        assert!(rivalry.wait() <= TAKE_BACK_MIN, "begins anew");
    }

    #[test]
    fn a_false_alarm_costs_nothing() {
        let mut rivalry = Rivalry::new();
        for _ in 0..4 {
            assert!(rivalry.wait() <= TAKE_BACK_MIN);
            rivalry.false_alarm();
        }
    }
}
