//! What the packet path has to equal, written as plainly as possible and sharing no code with it: checksums one word at
//! a time, segmentation by building every packet anew. For tests and fuzz targets alone.

use std::collections::BTreeMap;
use std::ops::Range;

use super::coalesce::Coalescer;
use super::virtio::GsoKind;

/// RFC 1071, word by word.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) * 256 + u32::from(*word.get(1).unwrap_or(&0));
        while sum > 0xffff {
            sum = sum - 0x1_0000 + 1;
        }
    }
    !(sum as u16)
}

fn get(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) * 256 + usize::from(bytes[at + 1])
}

fn put(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at] = (value / 256) as u8;
    bytes[at + 1] = (value % 256) as u8;
}

pub fn is_v4(packet: &[u8]) -> bool {
    packet[0] >> 4 == 4
}

/// Of the network header; IPv6 without extensions.
pub fn network_len(packet: &[u8]) -> usize {
    if is_v4(packet) { usize::from(packet[0] % 16) * 4 } else { 40 }
}

pub fn protocol(packet: &[u8]) -> u8 {
    if is_v4(packet) { packet[9] } else { packet[6] }
}

pub fn headers_len(packet: &[u8]) -> usize {
    let network = network_len(packet);
    network + if protocol(packet) == 6 { usize::from(packet[network + 12] >> 4) * 4 } else { 8 }
}

/// A pseudo-header and all that is behind the network header.
fn covered(packet: &[u8]) -> Vec<u8> {
    let network = network_len(packet);
    let addresses = if is_v4(packet) { &packet[12..20] } else { &packet[8..40] };
    let len = (packet.len() - network) as u32;
    [addresses, &[0, 0, 0, protocol(packet)], &len.to_be_bytes(), &packet[network..]].concat()
}

fn checksum_at(packet: &[u8]) -> usize {
    network_len(packet) + if protocol(packet) == 6 { 16 } else { 6 }
}

/// Whether header and TCP or UDP checksum are right; a UDP packet without checksum is not.
pub fn is_right(packet: &[u8]) -> bool {
    let header = !is_v4(packet) || checksum(&packet[..network_len(packet)]) == 0;
    let given = protocol(packet) == 6 || get(packet, checksum_at(packet)) != 0;
    header && given && checksum(&covered(packet)) == 0
}

/// Writes lengths and checksums to what the bytes are.
pub fn finish(packet: &mut [u8]) {
    let (network, len) = (network_len(packet), packet.len());
    if protocol(packet) == 17 {
        put(packet, network + 4, len - network);
    }
    if is_v4(packet) {
        put(packet, 2, len);
        put(packet, 10, 0);
        let header = checksum(&packet[..network]);
        put(packet, 10, header.into());
    } else {
        put(packet, 4, len - 40);
    }
    if matches!(protocol(packet), 6 | 17) {
        let at = checksum_at(packet);
        put(packet, at, 0);
        let whole = checksum(&covered(packet));
        put(packet, at, if whole == 0 && protocol(packet) == 17 { 0xffff } else { whole.into() });
    }
}

/// The packets that a super-packet with `size` bytes of payload in each stands for.
pub fn segments(packet: &[u8], size: usize) -> Vec<Vec<u8>> {
    let (headers, payload) = packet.split_at(headers_len(packet));
    let network = network_len(packet);
    let count = payload.len().div_ceil(size);
    let make = |(index, chunk): (usize, &[u8])| {
        let mut segment = [headers, chunk].concat();
        if is_v4(packet) {
            put(&mut segment, 4, (get(packet, 4) + index) % 0x1_0000);
        }
        if protocol(packet) == 6 {
            let sequence = u32::from_be_bytes([
                packet[network + 4],
                packet[network + 5],
                packet[network + 6],
                packet[network + 7],
            ]);
            let sequence = sequence.wrapping_add((index * size) as u32);
            segment[network + 4..network + 8].copy_from_slice(&sequence.to_be_bytes());
            if index != count - 1 {
                segment[network + 13] &= 0b1111_0110;
            }
            if index != 0 {
                segment[network + 13] &= 0b0111_1111;
            }
        }
        finish(&mut segment);
        segment
    };
    payload.chunks(size).enumerate().map(make).collect()
}

/// The super-packet of packets that follow each other: the first one's headers, all their payload, the last one's PSH.
pub fn merged(packets: &[Vec<u8>]) -> Vec<u8> {
    let headers = headers_len(&packets[0]);
    let mut whole = packets[0].clone();
    for packet in &packets[1..] {
        whole.extend_from_slice(&packet[headers..]);
    }
    if protocol(&whole) == 6 {
        let flags = network_len(&whole) + 13;
        whole[flags] |= packets[packets.len() - 1][flags] & 8;
    }
    whole
}

/// The same packet with the identification that means nothing taken out, if it does mean nothing.
pub fn without_identification(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    // Whole, and never to be cut: RFC 6864 section 4.1.
    if is_v4(&packet) && get(&packet, 6) & 0x7fff == 0x4000 {
        put(&mut packet, 4, 0);
        let network = network_len(&packet);
        put(&mut packet, 10, 0);
        let header = checksum(&packet[..network]);
        put(&mut packet, 10, header.into());
    }
    packet
}

/// Length of such a flow in IPv4: version, protocol, addresses.
const PORTLESS: usize = 10;

/// What tells one flow from another: version, protocol, addresses and, where there are any, ports.
pub fn flow(packet: &[u8]) -> Option<Vec<u8>> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 && packet[0] % 16 >= 5 => {
            let ports = packet.get(network_len(packet)..network_len(packet) + 4);
            let whole = get(packet, 6) & 0x3fff == 0 && matches!(packet[9], 6 | 17);
            Some([&[4, packet[9]], &packet[12..20], ports.filter(|_| whole).unwrap_or_default()].concat())
        }
        6 if packet.len() >= 44 => Some([&[6, packet[6]], &packet[8..44]].concat()),
        _ => None,
    }
}

/// Takes every write of a batch and checks all that is promised of them; gives the groups as indices into `pushed`.
///
/// # Panics
/// When a promise is broken.
pub fn checked_writes(coalescer: &mut Coalescer, arena: &[u8], pushed: &[Range<usize>]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut seen = vec![false; pushed.len()];
    while let Some(write) = coalescer.next_write(arena) {
        let ranges: Vec<Range<usize>> = write.originals().collect();
        let payloads: Vec<Range<usize>> = write.payloads().collect();
        assert_eq!(ranges.len(), write.packets);
        if let [alone] = &ranges[..] {
            assert_eq!(
                (write.gso, write.prefix),
                (None, &[0u8; 10][..]),
                "a packet alone is not vouched for"
            );
            assert_eq!(payloads, std::slice::from_ref(alone), "a packet alone goes as it came");
        } else {
            let packets: Vec<Vec<u8>> = ranges.iter().map(|range| arena[range.clone()].to_vec()).collect();
            let payload: Vec<&[u8]> = payloads.iter().map(|range| &arena[range.clone()]).collect();
            check_group(write.gso, write.prefix, &payload.concat(), &packets);
        }
        let mut group = Vec::new();
        for range in ranges {
            let index = (0..pushed.len()).find(|i| !seen[*i] && pushed[*i] == range);
            let index = index.expect("a packet that was pushed and not yet written");
            seen[index] = true;
            group.push(index);
        }
        groups.push(group);
    }
    assert!(seen.iter().all(|seen| *seen), "not written: {seen:?}");
    check_order(arena, pushed, &groups);
    groups
}

fn check_group(gso: Option<GsoKind>, prefix: &[u8], payload: &[u8], packets: &[Vec<u8>]) {
    let field = |at: usize| u16::from_ne_bytes([prefix[at], prefix[at + 1]]);
    let mut whole = [&prefix[10..], payload].concat();
    assert!(packets.iter().all(|packet| is_right(packet)), "vouched for a wrong checksum");
    assert!(whole.len() <= 65535);
    let (tcp, v4) = (protocol(&whole) == 6, is_v4(&whole));
    let (number, kind, most) = match (tcp, v4) {
        (true, true) => (1, GsoKind::TcpV4, 128),
        (true, false) => (4, GsoKind::TcpV6, 128),
        (false, _) => (5, GsoKind::Udp, 64),
    };
    assert!(packets.len() <= most);
    assert_eq!((prefix[0], prefix[1], gso), (1, number, Some(kind)));
    let headers = headers_len(&whole);
    assert_eq!((usize::from(field(2)), prefix.len() - 10), (headers, headers));
    assert_eq!(usize::from(field(6)), network_len(&whole));
    assert_eq!(usize::from(field(8)), if tcp { 16 } else { 6 });
    let size = usize::from(field(4));
    assert_eq!(size, packets[0].len() - headers);

    // What the kernel would make of it.
    let cut = segments(&whole, size);
    if cut != packets {
        let ids: Vec<usize> = packets.iter().map(|packet| get(packet, 4)).collect();
        assert!(
            v4 && ids.iter().all(|id| *id == ids[0]),
            "not what segmentation gives: {cut:x?} of {packets:x?}"
        );
        let plain =
            |packets: &[Vec<u8>]| packets.iter().map(|p| without_identification(p)).collect::<Vec<_>>();
        assert_eq!(plain(&cut), plain(packets));
    }
    // What it takes for granted of the group's own headers, and what it completes.
    let mut finished = whole.clone();
    finish(&mut finished);
    let (start, at) = (network_len(&whole), checksum_at(&whole));
    let completed = match checksum(&whole[start..]) {
        0 if !tcp => 0xffff,
        sum => sum,
    };
    let partial = usize::from(completed) == get(&finished, at);
    put(&mut whole, at, completed.into());
    assert!(partial && whole == finished, "header or partial checksum: {whole:x?}");
}

fn check_order(arena: &[u8], pushed: &[Range<usize>], groups: &[Vec<usize>]) {
    let written: Vec<usize> = groups.iter().flatten().copied().collect();
    let mut last: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    for index in written {
        let Some(flow) = flow(&arena[pushed[index].clone()]) else { continue };
        // A packet without ports may be of any flow between its addresses: it is in order with all of them.
        let pair = &flow[..flow.len().min(PORTLESS)];
        for (other, before) in &last {
            let related =
                *other == flow || *other == pair || flow.len() == PORTLESS && other.starts_with(pair);
            assert!(!related || *before < index, "{index} was written before {before}");
        }
        last.insert(flow, index);
    }
}
