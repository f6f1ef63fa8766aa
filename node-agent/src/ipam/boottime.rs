//! `CLOCK_BOOTTIME` (clock_gettime(2)): never set, counts through suspend, the same for every process and every network
//! namespace. It orders what agent, plugin and tombstones say, and means nothing after a reboot.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Nanoseconds since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Boottime(u64);

impl Boottime {
    pub fn now() -> Self {
        let now =
            clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap_or_else(|e| unreachable!("CLOCK_BOOTTIME: {e}"));
        Self::from_nanos(Duration::from(now).as_nanos() as u64)
    }

    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span.as_nanos() as u64))
    }

    /// Zero when `self` is not after `earlier`.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
