//! Entry points for arbitrary bytes, through the whole pure path: `node-agent/fuzz` runs them under libFuzzer, and a
//! unit test replays the inputs of `node-agent/fuzz/seeds`.
//!
//! A byte of switches in front lets an input ask for right lengths and checksums, without which a fuzzer would hardly
//! get behind the first check.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::Range;

use super::coalesce::{Coalescer, Rules};
use super::icmp::{self, Problem};
use super::packet::{Ipv4, MIN_HEADER, decrement_ttl};
use super::peers::{Local, Peer, PeerTable, SourcePolicy};
use super::segment::Segments;
use super::virtio::{self, VirtioHeader};
use super::{layout::Layout, reference};

/// Lengths and checksums are made right first.
pub const REPAIR: u8 = 1;
/// Packets go to coalescing without the checks in front of it, which it must not depend on.
pub const UNCHECKED: u8 = 2;
pub const STRICT: u8 = 4;
pub const BEHIND_NAT: u8 = 8;
pub const NO_TCP: u8 = 16;
pub const NO_UDP: u8 = 32;

/// In the place of a length: so many packets, up to 32, go on where the last one ended.
pub const FOLLOW: u8 = 0x80;

const MOST: usize = 600;

/// A batch of datagrams: switches, then each as length (upper byte below 0x80 first) and bytes, or as [`FOLLOW`] with
/// a place and a pattern by which the last one differs.
///
/// # Panics
/// When anything that is promised of the packet path does not hold.
pub fn datagrams(input: &[u8]) {
    let Some((switches, input)) = input.split_first() else { return };
    let packets = packets(input, switches & REPAIR != 0);
    let (arena, mut ranges) = (packets.concat(), Vec::new());
    let mut end = 0;
    for packet in &packets {
        end += packet.len();
        ranges.push(end - packet.len()..end);
    }
    let policy = SourcePolicy { strict: switches & STRICT != 0, behind_nat: switches & BEHIND_NAT != 0 };
    let table = table(policy);
    let admitted = |range: &Range<usize>| {
        let packet = Ipv4::parse(&arena[range.clone()])?;
        table.admit(SENDER, packet.source(), packet.destination()).map(|()| packet)
    };
    if switches & UNCHECKED == 0 {
        ranges.retain(|range| match admitted(range) {
            Ok(packet) => {
                check_admitted(packet.bytes(), policy);
                true
            }
            Err(_) => false,
        });
    }
    let rules = Rules { tcp: switches & NO_TCP == 0, udp: switches & NO_UDP == 0 };
    let mut coalescer = Coalescer::new(MOST, rules);
    // Twice, for what a batch leaves behind must not matter to the next.
    let mut batch = || {
        for range in &ranges {
            assert_eq!(coalescer.push(&arena, range.clone()), Ok(()));
        }
        reference::checked_writes(&mut coalescer, &arena, &ranges)
    };
    let groups = batch();
    assert_eq!(batch(), groups);
    for group in groups.iter().filter(|group| group.len() > 1) {
        let first = &arena[ranges[group[0]].clone()];
        assert!(if reference::protocol(first) == 6 { rules.tcp } else { rules.udp });
    }
}

/// One read of the device: switches, its header, a packet.
///
/// # Panics
/// When anything that is promised of the packet path does not hold.
pub fn read(input: &[u8]) {
    let Some((switches, input)) = input.split_first() else { return };
    let mut input = input.to_vec();
    if let Some(packet) = input.get_mut(virtio::LEN..)
        && switches & REPAIR != 0
    {
        repair(packet);
    }
    let Some((header, packet)) = VirtioHeader::split(&mut input) else { return };
    let before = packet.to_vec();
    if let Ok(parsed) = Ipv4::parse(packet) {
        check_answers(&parsed);
        let ttl = parsed.ttl();
        match decrement_ttl(packet) {
            Ok(()) => {
                let after = Ipv4::parse(packet).expect("a header that is still right");
                assert_eq!(after.ttl(), ttl - 1);
            }
            Err(_) => assert!(ttl <= 1 && packet == before),
        }
    }
    let read = packet.to_vec();
    let Ok(mut segments) = Segments::new(&header, packet) else { return };
    let (mut headers, mut cut) = ([0xee; Segments::MAX_HEADERS], Vec::new());
    let count = segments.remaining();
    while let Some(segment) = segments.next(&mut headers) {
        cut.push([&headers[..segment.headers], segment.payload].concat());
    }
    assert_eq!(cut.len(), count);
    match (header.gso, header.checksum) {
        (Some(gso), _) => {
            assert_eq!(cut, reference::segments(&read, gso.size.into()));
            assert!(cut.iter().all(|packet| reference::is_right(packet) && packet.len() <= read.len()));
        }
        (None, Some(checksum)) => {
            let start = usize::from(checksum.start);
            let at = start + usize::from(checksum.offset);
            assert_eq!((&cut[0][..at], &cut[0][at + 2..]), (&read[..at], &read[at + 2..]));
            // What the field held is the rest of the sum; a field at an odd place would be no checksum.
            let sum = reference::checksum(&[&read[at..at + 2], &cut[0][start..]].concat());
            assert!(sum == 0 || checksum.offset % 2 == 1);
        }
        (None, None) => assert_eq!(cut, [read]),
    }
}

const SENDER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, 1), 8285);

fn local() -> Local {
    let subnet = |text: &str| text.parse().expect("a subnet");
    Local {
        network: subnet("10.5.0.0/16"),
        subnets: vec![subnet("10.5.2.0/24")],
        device_addr: Ipv4Addr::new(10, 5, 2, 0),
    }
}

fn table(policy: SourcePolicy) -> PeerTable {
    let peer = |subnet: &str, addr| Peer { subnet: subnet.parse().expect("a subnet"), addr };
    let other = SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, 3), 8285);
    PeerTable::new(local(), policy, [peer("10.5.1.0/24", SENDER), peer("10.5.3.0/24", other)])
}

/// The rules once more, for the one table.
fn check_admitted(packet: &[u8], policy: SourcePolicy) {
    let (source, destination) = (&packet[12..16], &packet[16..20]);
    assert_eq!(destination[..3], [10, 5, 2]);
    match source {
        [10, 5, 1, _] => {}
        [10, 5, 3, _] => assert!(policy.behind_nat),
        [10, 5, ..] | [0 | 127 | 224..=239, ..] | [255, 255, 255, 255] => panic!("{source:?} was admitted"),
        _ => assert!(!policy.strict),
    }
}

fn check_answers(packet: &Ipv4<'_>) {
    let mut out = [0xee; icmp::MAX_ANSWER];
    for problem in [Problem::TimeExceeded, Problem::NetUnreachable] {
        let Some(answer) = icmp::answer(problem, packet, &local(), &mut out) else { continue };
        assert_eq!(reference::checksum(&answer[MIN_HEADER..]), 0);
        assert!(packet.bytes().starts_with(&answer[MIN_HEADER + 8..]));
        assert_eq!(answer[16..20], packet.source().octets());
        assert!(Ipv4::parse(answer).is_ok_and(|answer| answer.source() == local().device_addr));
        assert!(packet.protocol() != 1 || !matches!(packet.payload()[0], 3 | 4 | 5 | 11 | 12));
        assert!(!packet.destination().is_multicast() && !packet.is_later_fragment());
    }
}

fn packets(mut input: &[u8], right: bool) -> Vec<Vec<u8>> {
    let mut packets: Vec<Vec<u8>> = Vec::new();
    while let [first, second, rest @ ..] = input {
        if packets.len() + 32 > MOST {
            break;
        }
        if *first < FOLLOW {
            let (packet, rest) =
                rest.split_at(rest.len().min(usize::from(*first) << 8 | usize::from(*second)));
            packets.push(packet.to_vec());
            input = rest;
        } else {
            let count = usize::from(first % 32) + 1;
            for index in 0..count {
                let Some(mut packet) = packets.last().cloned() else { break };
                go_on(&mut packet);
                if let (true, Some(byte)) = (index + 1 == count, packet.get_mut(usize::from(*second))) {
                    *byte ^= rest.first().copied().unwrap_or(0);
                }
                packets.push(packet);
            }
            input = rest.get(1..).unwrap_or_default();
        }
    }
    if right {
        packets.iter_mut().for_each(|packet| repair(packet));
    }
    packets
}

/// The next of its flow: identification and sequence number.
fn go_on(packet: &mut [u8]) {
    let payload = Layout::of(packet).map(|layout| (layout, packet.len() - layout.headers));
    if packet.len() > 40 && reference::is_v4(packet) {
        let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(1);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
    }
    if let Some((layout, payload)) = payload
        && layout.protocol() == 6
        && let Some(field) = packet[layout.network + 4..].first_chunk_mut::<4>()
    {
        *field = u32::from_be_bytes(*field).wrapping_add(payload as u32).to_be_bytes();
    }
}

/// Lengths and checksums of what is TCP or UDP.
fn repair(packet: &mut [u8]) {
    let Some(first) = packet.first() else { return };
    let known = match first >> 4 {
        4 => {
            first % 16 >= 5 && packet.len() >= 20 + usize::from(first % 16) * 4 && matches!(packet[9], 6 | 17)
        }
        6 => packet.len() >= 60 && matches!(packet[6], 6 | 17),
        _ => false,
    };
    if known && packet.len() <= 65535 {
        reference::finish(packet);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    fn replay(folder: &str, target: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(folder);
        let inputs =
            std::fs::read_dir(&folder).expect("the seeds").map(|entry| entry.expect("an entry").path());
        let mut inputs: Vec<_> = inputs.collect();
        inputs.sort();
        assert!(inputs.len() >= 10, "{} of {}", inputs.len(), folder.display());
        for input in inputs {
            // Shown when it fails.
            eprintln!("{}", input.display());
            target(&std::fs::read(input).expect("a seed"));
        }
    }

    #[test]
    fn seeds_of_datagrams() {
        replay("datagrams", super::datagrams);
    }

    #[test]
    fn seeds_of_reads() {
        replay("read", super::read);
    }
}
