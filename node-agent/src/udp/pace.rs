//! When to let packets gather: interrupt moderation, as network cards have it.
//!
//! Where sender and agent share a core, each packet that is sent wakes the agent, which takes it away, alone, before
//! the next one is there: a flood of small packets then costs a switch of threads, a walk through the kernel's stack and
//! a wake-up of the peer for each. From [`FLOOD`] on, until there is less than [`EBB`], the device is left alone for
//! [`GATHER`] after each batch that leaves it empty, and its queue (500 packets, linux drivers/net/tun.c,
//! `TUN_READQ_SIZE`) fills meanwhile. Otherwise nothing waits.

use std::time::{Duration, Instant};

/// Reads of the device per [`WINDOW`], so 50,000 packets/s: one that stands for many counts as one, so bulk TCP stays
/// far below.
const FLOOD: u128 = 50;
/// Half of it: where processors are busy a flood comes unevenly, and sending its packets one by one slows it down further.
const EBB: u128 = 25;
/// Rates are taken over so long or longer.
const WINDOW: Duration = Duration::from_millis(1);
/// The kernel adds up to 50 µs (`PR_SET_TIMERSLACK`). At 50,000 packets/s 20 to 22 of them come together; the queue is
/// full at 1,000,000 packets/s. Half as long carries a twentieth less (measured).
pub(super) const GATHER: Duration = Duration::from_micros(400);

#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    packets: usize,
    flood: bool,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, packets: 0, flood: false }
    }

    /// Notes a batch; whether to wait before the next one.
    pub(super) fn gathers(&mut self, packets: usize, now: Instant) -> bool {
        self.packets += packets;
        let passed = now.duration_since(self.since);
        if passed >= WINDOW {
            let rate = self.packets as u128 * WINDOW.as_nanos() / passed.as_nanos();
            self.flood = rate >= if self.flood { EBB } else { FLOOD };
            (self.since, self.packets) = (now, 0);
        }
        self.flood
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Batches of so many packets, so many microseconds apart: how many of the last ten were told to wait.
    fn waits(packets: usize, apart: u64) -> usize {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut told = Vec::new();
        for _ in 0..1000 {
            now += Duration::from_micros(apart);
            told.push(pace.gathers(packets, now));
        }
        told.iter().rev().take(10).filter(|wait| **wait).count()
    }

    #[test]
    fn a_flood_gathers_and_what_is_less_does_not_wait() {
        assert_eq!(waits(1, 10), 10, "100,000/s, one by one");
        assert_eq!(waits(20, 150), 10, "130,000/s, gathered already");
        assert_eq!(waits(256, 3000), 10, "85,000/s, in batches as large as they can be");
        assert_eq!(waits(1, 50), 0, "20,000/s");
        assert_eq!(waits(8, 400), 0, "20,000/s in small batches");
    }

    #[test]
    fn a_flood_goes_on_until_there_is_half_of_it() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut gathers = |packets| {
            now += Duration::from_millis(1);
            pace.gathers(packets, now)
        };
        assert!(!gathers(49));
        assert!(gathers(50) && gathers(25));
        assert!(!gathers(24) && !gathers(49));
    }

    #[test]
    fn a_pause_ends_a_flood() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let mut gathers = |packets, after| {
            now += after;
            pace.gathers(packets, now)
        };
        assert!(gathers(60, Duration::from_micros(1100)));
        assert!(!gathers(60, Duration::from_secs(1)), "so many in a second are few");
        assert!(!gathers(60, Duration::from_micros(10)), "the window is not over");
    }
}
