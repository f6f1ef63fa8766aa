//! What went through, and what did not and why.
//!
//! Each direction has one thread that counts, in plain numbers of its own, and publishes them once per batch; whoever
//! asks reads what was published. Nobody waits for anybody.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why a packet was dropped; the reason's name is what metrics say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// Shorter than an IPv4 header, or than it says.
    Short,
    WrongVersion,
    /// The datagram is not as long as the packet in it says.
    BadTotalLength,
    /// Header length or header checksum.
    BadHeader,
    /// What the device's own header says of a packet cannot be.
    BadOffload,
    /// A datagram larger than the buffer, or a packet larger than a datagram can be.
    Oversized,
    /// The outer source is no peer's.
    UnknownPeer,
    /// The inner source is not the sender's to use.
    SourceRefused,
    /// Not for this node.
    NotOurs,
    /// No peer has the destination.
    NoRoute,
    TtlExceeded,
    /// The socket did not take it.
    SendFailed,
    /// The device did not take it.
    WriteFailed,
    /// The device did not give it.
    ReadFailed,
    /// The socket's buffer overran: the kernel dropped it (`SO_RXQ_OVFL`).
    Overrun,
}

impl DropReason {
    pub const ALL: [Self; 15] = [
        Self::Short,
        Self::WrongVersion,
        Self::BadTotalLength,
        Self::BadHeader,
        Self::BadOffload,
        Self::Oversized,
        Self::UnknownPeer,
        Self::SourceRefused,
        Self::NotOurs,
        Self::NoRoute,
        Self::TtlExceeded,
        Self::SendFailed,
        Self::WriteFailed,
        Self::ReadFailed,
        Self::Overrun,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::WrongVersion => "wrong-version",
            Self::BadTotalLength => "bad-total-length",
            Self::BadHeader => "bad-header",
            Self::BadOffload => "bad-offload",
            Self::Oversized => "oversized",
            Self::UnknownPeer => "unknown-peer",
            Self::SourceRefused => "source-refused",
            Self::NotOurs => "not-ours",
            Self::NoRoute => "no-route",
            Self::TtlExceeded => "ttl-exceeded",
            Self::SendFailed => "send-failed",
            Self::WriteFailed => "write-failed",
            Self::ReadFailed => "read-failed",
            Self::Overrun => "overrun",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// From the device to peers: packets as peers see them, bytes of inner packets.
    pub sent: Traffic,
    /// From peers to the device.
    pub received: Traffic,
    /// What has not occurred is absent.
    pub dropped_sending: BTreeMap<DropReason, u64>,
    pub dropped_receiving: BTreeMap<DropReason, u64>,
    /// ICMP errors written back, and those that the rate limit held back.
    pub icmp_sent: u64,
    pub icmp_suppressed: u64,
    /// How often the device went away under the threads.
    pub device_lost: u64,
    /// How often the threads were started anew because one of them panicked.
    pub panics: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
    /// System calls that read, write, send or receive: what batching and offloads save.
    pub calls: u64,
}

/// One direction since the start. Its thread alone writes.
#[derive(Debug, Default)]
pub(super) struct Direction {
    packets: AtomicU64,
    bytes: AtomicU64,
    calls: AtomicU64,
    dropped: [AtomicU64; DropReason::ALL.len()],
    icmp_sent: AtomicU64,
    icmp_suppressed: AtomicU64,
}

/// One direction since it was last published.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) traffic: Traffic,
    dropped: [u64; DropReason::ALL.len()],
    pub(super) icmp_sent: u64,
    pub(super) icmp_suppressed: u64,
}

impl Tally {
    pub(super) fn dropped(&mut self, reason: DropReason, packets: u64) {
        self.dropped[reason as usize] += packets;
    }

    pub(super) fn publish(&mut self, to: &Direction) {
        let Self { traffic, dropped, icmp_sent, icmp_suppressed } = std::mem::take(self);
        let pairs = [
            (&to.packets, traffic.packets),
            (&to.bytes, traffic.bytes),
            (&to.calls, traffic.calls),
            (&to.icmp_sent, icmp_sent),
            (&to.icmp_suppressed, icmp_suppressed),
        ];
        for (total, new) in pairs.into_iter().chain(to.dropped.iter().zip(dropped)) {
            if new != 0 {
                // There is one writer, so that nothing is lost between the two.
                total.store(total.load(Relaxed).wrapping_add(new), Relaxed);
            }
        }
    }
}

impl Direction {
    pub(super) fn traffic(&self) -> Traffic {
        Traffic {
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            calls: self.calls.load(Relaxed),
        }
    }

    pub(super) fn dropped(&self) -> BTreeMap<DropReason, u64> {
        let counts = self.dropped.iter().map(|count| count.load(Relaxed));
        DropReason::ALL.into_iter().zip(counts).filter(|(_, count)| *count != 0).collect()
    }

    /// ICMP errors sent and held back.
    pub(super) fn icmp(&self) -> (u64, u64) {
        (self.icmp_sent.load(Relaxed), self.icmp_suppressed.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_counted_under_its_own_name() {
        let (direction, mut tally) = (Direction::default(), Tally::default());
        for (count, reason) in (1..).zip(DropReason::ALL) {
            assert_eq!(reason as usize, count as usize - 1, "{reason}: ALL is in the order of declaration");
            tally.dropped(reason, count);
        }
        tally.publish(&direction);
        tally.dropped(DropReason::Overrun, 1);
        tally.publish(&direction);
        let counts: Vec<(DropReason, u64)> = direction.dropped().into_iter().collect();
        assert_eq!(counts.first(), Some(&(DropReason::Short, 1)));
        assert_eq!(counts.last(), Some(&(DropReason::Overrun, 16)), "published twice, and added up");
        assert_eq!(counts.len(), DropReason::ALL.len());
    }
}
