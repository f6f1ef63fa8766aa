//! What a router tells a sender (RFC 792, RFC 1122 section 3.2.2, RFC 1812 section 4.3): that the packet's time is
//! over, or that nobody has its destination. flanneld sends the second alone, unlimited, and none about any ICMP.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use super::checksum::Sum;
use super::packet::{Ipv4, MIN_HEADER};
use super::peers::{Local, can_be_a_source};

const PROTOCOL: u8 = 1;
const ICMP_HEADER: usize = 8;
/// What is quoted behind the offender's header (RFC 792).
const QUOTED: usize = 8;
/// RFC 1812 4.3.2.2 leaves it open; this is what hosts use.
const TTL: u8 = 64;
/// Internetwork control, as a router's messages go (RFC 1812 4.3.2.5).
const TOS: u8 = 0xc0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// Type 11, code 0: time to live exceeded in transit.
    TimeExceeded,
    /// Type 3, code 0.
    NetUnreachable,
}

/// Room for any answer.
pub const MAX_ANSWER: usize = MIN_HEADER + ICMP_HEADER + 60 + QUOTED;

/// Writes the answer to `about` into `out` and says how long it is; `None` where there must be none: about another
/// error, a later fragment, what was sent to many, or when the source is nobody's that could be told.
pub fn answer<'a>(
    problem: Problem,
    about: &Ipv4<'_>,
    local: &Local,
    out: &'a mut [u8; MAX_ANSWER],
) -> Option<&'a [u8]> {
    let source = about.source();
    let told = can_be_a_source(source) && source != local.device_addr && !is_broadcast(source, local);
    let to_many = about.destination().is_multicast() || is_broadcast(about.destination(), local);
    if !told || to_many || about.is_later_fragment() || is_error(about) {
        return None;
    }
    // Only what the packet has: it may be shorter than its header and eight bytes.
    let quoted = &about.bytes()[..about.bytes().len().min(about.header_len() + QUOTED)];
    let len = MIN_HEADER + ICMP_HEADER + quoted.len();
    let out = &mut out[..len];
    let (header, message) = out.split_at_mut(MIN_HEADER);

    message[..ICMP_HEADER].fill(0);
    message[..2].copy_from_slice(&match problem {
        Problem::TimeExceeded => [11, 0],
        Problem::NetUnreachable => [3, 0],
    });
    message[ICMP_HEADER..].copy_from_slice(quoted);
    let checksum = Sum::of(message).checksum();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    header.fill(0);
    header[0] = 0x45;
    header[1] = TOS;
    header[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    header[8] = TTL;
    header[9] = PROTOCOL;
    header[12..16].copy_from_slice(&local.device_addr.octets());
    header[16..20].copy_from_slice(&source.octets());
    let checksum = Sum::of(header).checksum();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    Some(out)
}

/// Whether the packet is an ICMP error, or of a type that nobody has defined and that may be one; echo and the other
/// questions are answered, or `traceroute -I` would see nothing.
fn is_error(packet: &Ipv4<'_>) -> bool {
    const QUESTIONS_AND_ANSWERS: [u8; 10] = [0, 8, 9, 10, 13, 14, 15, 16, 17, 18];
    packet.protocol() == PROTOCOL
        && packet.payload().first().is_none_or(|kind| !QUESTIONS_AND_ANSWERS.contains(kind))
}

/// Broadcast as far as this node can know: to everybody here, in the overlay, in one of our own subnets.
fn is_broadcast(addr: Ipv4Addr, local: &Local) -> bool {
    addr.is_broadcast()
        || local
            .subnets
            .iter()
            .chain([&local.network])
            .any(|subnet| subnet.len() < 31 && subnet.last() == IpAddr::V4(addr))
}

/// A token bucket: some at once, then so many a second. What Linux allows itself by default
/// (`net.ipv4.icmp_msgs_burst`, `icmp_msgs_per_sec` before 6.12).
#[derive(Debug)]
pub struct RateLimit {
    /// Up to when tokens have been given out, as a time: `BURST` of them lie between this and now at most.
    paid_until: Option<Instant>,
}

impl RateLimit {
    pub const BURST: u32 = 50;
    pub const PER_SECOND: u32 = 1000;
    const INTERVAL: Duration = Duration::from_nanos(1_000_000_000 / Self::PER_SECOND as u64);

    pub const fn new() -> Self {
        Self { paid_until: None }
    }

    /// Whether one more may be sent at `now`, and takes its token if so.
    pub fn allow(&mut self, now: Instant) -> bool {
        // As if the bucket had been full at the beginning, and never fuller than that.
        let saved = Self::INTERVAL * Self::BURST;
        let next = match self.paid_until {
            Some(paid) if now.saturating_duration_since(paid) < saved => paid + Self::INTERVAL,
            _ => match now.checked_sub(saved) {
                Some(full) => full + Self::INTERVAL,
                // A clock that has only just begun: one at a time until it can be told how full the bucket is.
                None => now,
            },
        };
        let allowed = next <= now;
        if allowed {
            self.paid_until = Some(next);
        }
        allowed
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}
