//! What went through, and what did not and why.

use std::collections::BTreeMap;

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
    /// The socket's buffer overran: the kernel dropped it (`SO_RXQ_OVFL`).
    Overrun,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// From the device to peers: packets as peers see them, bytes of inner packets.
    pub sent: Traffic,
    /// From peers to the device.
    pub received: Traffic,
    pub dropped_sending: BTreeMap<DropReason, u64>,
    pub dropped_receiving: BTreeMap<DropReason, u64>,
    /// ICMP errors written back, and those that the rate limit held back.
    pub icmp_sent: u64,
    pub icmp_suppressed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
    /// System calls: what batching and offloads save.
    pub calls: u64,
}
