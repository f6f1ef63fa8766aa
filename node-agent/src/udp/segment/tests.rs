use proptest::prelude::*;

use super::super::reference;
use super::*;

/// A packet as the device gives it: its checksum field holds the pseudo-header's sum.
fn partial(mut packet: Vec<u8>) -> Vec<u8> {
    reference::finish(&mut packet);
    let layout = Layout::of(&packet).expect("a whole packet");
    let pseudo = layout.pseudo(&packet, packet.len() - layout.headers).fold();
    put(&mut packet, layout.network + layout.checksum_offset(), pseudo);
    packet
}

fn header(packet: &[u8], size: u16) -> VirtioHeader {
    let layout = Layout::of(packet).expect("a whole packet");
    let kind = match (layout.transport, layout.version) {
        (Transport::Tcp, Version::V4) => GsoKind::TcpV4,
        (Transport::Tcp, Version::V6) => GsoKind::TcpV6,
        (Transport::Udp, _) => GsoKind::Udp,
    };
    VirtioHeader {
        checksum: Some(PartialChecksum {
            start: layout.network as u16,
            offset: layout.checksum_offset() as u16,
        }),
        gso: (size > 0).then_some(Gso { kind, size }),
        hdr_len: layout.headers as u16,
    }
}

fn all(header: &VirtioHeader, packet: &mut [u8]) -> Result<Vec<Vec<u8>>, DropReason> {
    let mut segments = Segments::new(header, packet)?;
    let (mut out, mut packets) = ([0xaa; MAX_HEADERS], Vec::new());
    let count = segments.remaining();
    while let Some(segment) = segments.next(&mut out) {
        packets.push([&out[..segment.headers], segment.payload].concat());
        assert_eq!(segments.remaining(), count - packets.len());
    }
    Ok(packets)
}

prop_compose! {
    /// Whole super-packets of every kind; lengths and checksums are still to be written.
    fn super_packet()(
        v6 in any::<bool>(),
        tcp in any::<bool>(),
        network_options in 0usize..11,
        transport_options in 0usize..11,
        fixed in prop::collection::vec(any::<u8>(), 60),
        flags in any::<u8>(),
        payload in prop_oneof![
            prop::collection::vec(any::<u8>(), 1..9000),
            // All the same, among them what sums up to zero.
            (prop::sample::select(vec![0u8, 0xff]), 1usize..9000).prop_map(|(byte, len)| vec![byte; len]),
        ],
    ) -> Vec<u8> {
        let mut p = fixed[..if v6 { 40 } else { 20 }].to_vec();
        let protocol = if tcp { 6 } else { 17 };
        if v6 {
            p[0] = 0x60;
            p[6] = protocol;
        } else {
            p[0] = 0x45 + network_options as u8;
            p[6] &= 0xc0;
            p[7] = 0;
            p[9] = protocol;
            p.resize(20 + network_options * 4, 1);
        }
        if tcp {
            let at = p.len();
            p.extend_from_slice(&fixed[40..60]);
            p[at + 12] = (5 + transport_options as u8) << 4;
            p[at + 13] = flags;
            p.resize(at + 20 + transport_options * 4, 1);
        } else {
            p.extend_from_slice(&fixed[40..48]);
        }
        p.extend(payload);
        p
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 200 } else { 20_000 }))]

    #[test]
    fn a_super_packet_is_cut_as_the_reference_cuts_it(packet in super_packet(), size in 1u16..2000) {
        let mut read = partial(packet);
        let wanted = reference::segments(&read, size.into());
        let header = header(&read, size);
        prop_assert_eq!(all(&header, &mut read), Ok(wanted));
    }

    #[test]
    fn a_packet_that_is_none_is_completed_in_place(packet in super_packet()) {
        let mut wanted = packet.clone();
        reference::finish(&mut wanted);
        let layout = Layout::of(&wanted).expect("a whole packet");
        let at = layout.network + layout.checksum_offset();
        if wanted[at..at + 2] == [0, 0] {
            // Of the two zeros the kernel writes this one, whatever the protocol.
            wanted[at..at + 2].fill(0xff);
        }
        let mut read = partial(packet);
        let header = header(&read, 0);
        let written = all(&header, &mut read).map(|packets| packets.concat());
        prop_assert_eq!(written, Ok(wanted));
    }

    /// A sum that comes to zero, in the middle of a super-packet: TCP writes it so, UDP as its other form.
    #[test]
    fn a_sum_of_zero(packet in super_packet(), size in 2u16..200) {
        let size = usize::from(size);
        let mut packet = packet;
        packet.resize(packet.len() + size, 0);
        reference::finish(&mut packet);
        let headers = reference::headers_len(&packet);
        packet[headers..headers + 2].fill(0);
        let first = reference::segments(&packet, size).remove(0);
        let at = reference::network_len(&packet) + if reference::protocol(&packet) == 6 { 16 } else { 6 };
        packet[headers..headers + 2].copy_from_slice(&first[at..at + 2]);
        let mut read = partial(packet);
        let header = header(&read, size as u16);
        let cut = all(&header, &mut read).expect("a super-packet");
        let zero = if reference::protocol(&read) == 6 { [0, 0] } else { [0xff, 0xff] };
        prop_assert_eq!(&cut[0][at..at + 2], &zero);
        prop_assert_eq!(cut, reference::segments(&read, size));
    }

    /// Nothing that a header may say makes it panic, nor makes packets that are longer than what was read.
    #[test]
    fn a_header_may_say_anything(
        bytes in prop::array::uniform10(any::<u8>()),
        kind in prop::sample::select(vec![0u8, 1, 4, 5]),
        mut packet in super_packet(),
        cut in 0usize..200,
    ) {
        packet.truncate(packet.len().max(cut) - cut);
        let mut bytes = bytes;
        bytes[1] = kind;
        let Some(header) = VirtioHeader::decode(&bytes) else { return Ok(()) };
        let len = packet.len();
        if let Ok(packets) = all(&header, &mut packet) {
            prop_assert!(packets.iter().all(|p| p.len() <= len));
        }
    }
}

fn tcp_packet(flags: u8, payload: usize) -> Vec<u8> {
    let mut p = vec![0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 5, 1, 2, 10, 5, 2, 3];
    p.extend([0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0]);
    p.extend((0..payload).map(|i| i as u8));
    partial(p)
}

#[test]
fn flags_are_where_they_belong_and_counters_wrap() {
    let mut read = tcp_packet(0xff, 250);
    let header = header(&read, 100);
    let cut = all(&header, &mut read).expect("a super-packet");
    assert_eq!(
        cut.iter().map(|p| p[33]).collect::<Vec<_>>(),
        [0xf6, 0x76, 0x7f],
        "CWR first; FIN and PSH last"
    );
    assert_eq!(cut.iter().map(|p| p.len()).collect::<Vec<_>>(), [140, 140, 90]);
    assert_eq!(cut.iter().map(|p| get(p, 4)).collect::<Vec<_>>(), [0xffff, 0, 1]);
    assert_eq!(cut[1][24..28], [0, 0, 0, 99], "sequence numbers wrap");
}

#[test]
fn what_cannot_be_is_refused() {
    let packet = tcp_packet(0x10, 250);
    let right = header(&packet, 100);
    let (gso, checksum) = (right.gso.expect("gso"), right.checksum.expect("checksum"));
    let refused = |what: &str, header: VirtioHeader, mut packet: Vec<u8>| {
        assert_eq!(all(&header, &mut packet), Err(DropReason::BadOffload), "{what}");
    };
    assert_eq!(all(&right, &mut packet.clone()).map(|p| p.len()), Ok(3));
    refused("size 0", VirtioHeader { gso: Some(Gso { size: 0, ..gso }), ..right }, packet.clone());
    refused("IPv6", VirtioHeader { gso: Some(Gso { kind: GsoKind::TcpV6, ..gso }), ..right }, packet.clone());
    refused("UDP", VirtioHeader { gso: Some(Gso { kind: GsoKind::Udp, ..gso }), ..right }, packet.clone());
    refused("headers longer than all", VirtioHeader { hdr_len: 291, ..right }, packet.clone());
    let elsewhere =
        |start, offset| VirtioHeader { checksum: Some(PartialChecksum { start, offset }), ..right };
    refused("checksum elsewhere", elsewhere(24, 16), packet.clone());
    refused("checksum elsewhere", elsewhere(20, 6), packet.clone());
    let alone = |start, offset| VirtioHeader { gso: None, ..elsewhere(start, offset) };
    refused("begins behind the end", alone(291, 0), packet.clone());
    refused("lies behind the end", alone(20, 269), packet.clone());
    refused("far behind", alone(u16::MAX, u16::MAX), packet.clone());
    assert!(all(&alone(20, checksum.offset), &mut packet.clone()).is_ok());
    refused("no payload", right, tcp_packet(0x10, 0));
    refused("cut short", right, packet[..200].to_vec());
    refused("nothing", right, Vec::new());
    let mut long = tcp_packet(0x10, 4);
    long[32] = 0xf0;
    refused("a TCP header of 60 bytes in a packet of 44", right, long);
    let mut fragment = packet.clone();
    fragment[6] = 0x20;
    refused("a fragment", right, fragment);
    let mut short = packet.clone();
    short[32] = 0x40;
    refused("a TCP header of 16 bytes", right, short);
}

#[test]
fn a_partial_sum_of_zero_is_written_as_its_other_form() {
    let partial =
        VirtioHeader { checksum: Some(PartialChecksum { start: 0, offset: 2 }), ..VirtioHeader::default() };
    assert_eq!(all(&partial, &mut [0xff, 0xff, 0, 0]), Ok(vec![vec![0xff; 4]]));
    assert_eq!(all(&partial, &mut [0x12, 0x34, 0, 1]), Ok(vec![vec![0x12, 0x34, 0xed, 0xca]]));
}

#[test]
fn a_packet_that_needs_nothing_goes_as_it_came() {
    let mut junk = vec![0xfe; 33];
    assert_eq!(all(&VirtioHeader::default(), &mut junk), Ok(vec![vec![0xfe; 33]]));
}
