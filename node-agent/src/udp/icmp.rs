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
const DONT_FRAGMENT: u8 = 0x40;

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
    // Never to be cut, so that an identification of zero is right (RFC 6864 section 4.1).
    header[6] = DONT_FRAGMENT;
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

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;

    fn local() -> Local {
        Local {
            network: "10.5.0.0/16".parse().expect("a subnet"),
            subnets: vec!["10.5.1.0/24".parse().expect("a subnet")],
            device_addr: Ipv4Addr::new(10, 5, 1, 0),
        }
    }

    fn packet(protocol: u8, options: usize, payload: &[u8]) -> Vec<u8> {
        let mut p = vec![
            0x45 + (options / 4) as u8,
            0,
            0,
            0,
            0,
            1,
            0,
            0,
            1,
            protocol,
            0,
            0,
            10,
            5,
            1,
            2,
            10,
            5,
            2,
            3,
        ];
        p.resize(20 + options, 1);
        p.extend_from_slice(payload);
        let len = p.len() as u16;
        p[2..4].copy_from_slice(&len.to_be_bytes());
        repair(&mut p);
        p
    }

    fn repair(p: &mut [u8]) {
        p[10..12].fill(0);
        let sum = reference::checksum(&p[..reference::network_len(p)]);
        p[10..12].copy_from_slice(&sum.to_be_bytes());
    }

    fn answered(problem: Problem, p: &[u8]) -> Option<Vec<u8>> {
        // Not clean, as a buffer that is used again is not.
        let mut out = [0xee; MAX_ANSWER];
        answer(problem, &Ipv4::parse(p).expect("a packet"), &local(), &mut out).map(<[u8]>::to_vec)
    }

    #[test]
    fn an_answer_quotes_header_and_eight_bytes_and_both_checksums_are_right() {
        for (problem, kind) in [(Problem::TimeExceeded, [11, 0]), (Problem::NetUnreachable, [3, 0])] {
            for (options, payload) in [(0, 0), (0, 3), (0, 8), (0, 9), (0, 1000), (40, 100)] {
                let p = packet(17, options, &vec![0xab; payload]);
                let answer = answered(problem, &p).expect("an answer");
                let quoted = &p[..p.len().min(20 + options + 8)];
                assert_eq!(answer[28..], *quoted, "{payload} bytes behind {options} of options");
                assert_eq!(answer[20..22], kind);
                assert_eq!(answer[24..28], [0; 4]);
                assert_eq!(answer[12..20], [10, 5, 1, 0, 10, 5, 1, 2]);
                assert_eq!(reference::checksum(&answer[20..]), 0);
                let parsed = Ipv4::parse(&answer).expect("a packet");
                assert_eq!((parsed.protocol(), parsed.header_len(), parsed.ttl()), (1, 20, 64));
                assert_eq!(answer[1..8], [0xc0, 0, answer.len() as u8, 0, 0, 0x40, 0]);
            }
        }
    }

    #[test]
    fn echo_is_answered_and_errors_are_not() {
        for kind in 0..=u8::MAX {
            let wanted = matches!(kind, 0 | 8..=10 | 13..=18);
            let p = packet(1, 0, &[kind, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(answered(Problem::TimeExceeded, &p).is_some(), wanted, "type {kind}");
        }
        assert_eq!(
            answered(Problem::TimeExceeded, &packet(1, 0, &[])),
            None,
            "an ICMP packet without its type"
        );
    }

    #[test]
    fn nobody_is_told_of_what_is_no_ones_or_everybodys() {
        let with = |change: fn(&mut Vec<u8>)| {
            let mut p = packet(17, 0, &[0; 8]);
            change(&mut p);
            repair(&mut p);
            answered(Problem::NetUnreachable, &p).is_some()
        };
        assert!(with(|_| ()));
        assert!(with(|p| p[6] = 0x20), "a first fragment");
        assert!(!with(|p| p[7] = 1), "a later fragment");
        assert!(!with(|p| p[6] = 0x10), "a later fragment");
        for destination in [[224, 0, 0, 1], [239, 1, 2, 3], [255; 4], [10, 5, 255, 255], [10, 5, 1, 255]] {
            let mut p = packet(17, 0, &[0; 8]);
            p[16..20].copy_from_slice(&destination);
            repair(&mut p);
            assert_eq!(answered(Problem::NetUnreachable, &p), None, "to {destination:?}");
        }
        for source in
            [[0; 4], [0, 1, 2, 3], [127, 0, 0, 1], [224, 0, 0, 1], [255; 4], [10, 5, 1, 255], [10, 5, 1, 0]]
        {
            let mut p = packet(17, 0, &[0; 8]);
            p[12..16].copy_from_slice(&source);
            repair(&mut p);
            assert_eq!(answered(Problem::NetUnreachable, &p), None, "from {source:?}");
        }
    }

    #[test]
    fn some_at_once_and_then_so_many_a_second() {
        let start = Instant::now() + Duration::from_secs(1000);
        let mut limit = RateLimit::new();
        let mut allowed =
            |at: Duration, tries: u32| (0..tries).filter(|_| limit.allow(start + at)).count() as u32;
        assert_eq!(allowed(Duration::ZERO, 500), RateLimit::BURST);
        assert_eq!(allowed(Duration::from_millis(10), 500), 10);
        assert_eq!(allowed(Duration::from_micros(10_500), 500), 0);
        assert_eq!(allowed(Duration::from_micros(11_000), 500), 1);
        // However long nothing was sent, no more than that at once.
        assert_eq!(allowed(Duration::from_secs(900), 500), RateLimit::BURST);
        // Within a second under fire: the rate, and what was saved.
        let within: u32 =
            (0..1000).map(|ms| allowed(Duration::from_secs(1000) + Duration::from_millis(ms), 5)).sum();
        assert_eq!(within, RateLimit::BURST + RateLimit::PER_SECOND - 1);
        // A clock that goes back gives nothing away.
        assert_eq!(allowed(Duration::ZERO, 500), 0);
    }
}
