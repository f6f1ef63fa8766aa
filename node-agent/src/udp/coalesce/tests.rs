use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::reference;
use super::*;

const ALL: Rules = Rules { tcp: true, udp: true };

/// One way in which a packet is not simply the next of its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Twist {
    Shorter,
    Longer,
    Empty,
    Flags(u8),
    Tos,
    Ttl,
    IdAhead,
    IdBehind,
    MayFragment,
    Evil,
    SequenceAhead,
    SequenceBehind,
    Acknowledgment,
    Window,
    Urgent,
    TransportOptions,
    NetworkOptions,
    CorruptHeader,
    CorruptPayload,
    NoChecksum,
    OtherZero,
    UdpLength,
    FirstFragment,
    LaterFragment,
    OtherProtocol,
}

#[derive(Debug, Clone)]
struct FlowShape {
    v6: bool,
    tcp: bool,
    port: u16,
    size: usize,
    options: usize,
    sequence: u32,
    id: u16,
    id_step: u16,
    dont_fragment: bool,
    tos: u8,
}

const FIN: u8 = 1;
const URG: u8 = 0x20;
const CWR: u8 = 0x80;

fn twists() -> impl Strategy<Value = Option<Twist>> {
    use Twist::*;
    let rare = prop::sample::select(vec![
        Shorter,
        Longer,
        Empty,
        Flags(PSH),
        Flags(FIN),
        Flags(URG),
        Flags(ECE),
        Flags(CWR),
        Flags(2),
        Flags(4),
        Tos,
        Ttl,
        IdAhead,
        IdBehind,
        MayFragment,
        Evil,
        SequenceAhead,
        SequenceBehind,
        Acknowledgment,
        Window,
        Urgent,
        TransportOptions,
        NetworkOptions,
        CorruptHeader,
        CorruptPayload,
        NoChecksum,
        OtherZero,
        UdpLength,
        FirstFragment,
        LaterFragment,
        OtherProtocol,
    ]);
    prop_oneof![12 => Just(None), 3 => rare.prop_map(Some)]
}

fn flows() -> impl Strategy<Value = FlowShape> {
    let size = prop_oneof![
        4 => 1usize..4,
        4 => 60..70usize,
        2 => 1400..1473usize,
        // Few of these fill a datagram.
        1 => Just(16000usize),
    ];
    (
        (prop::bool::weighted(0.3), any::<bool>(), 1u16..5, size, 0usize..11),
        (prop_oneof![any::<u32>(), Just(u32::MAX - 2000)], prop_oneof![any::<u16>(), Just(0xffff), Just(0)]),
        (prop_oneof![4 => Just(1u16), 2 => Just(0), 1 => Just(2)], prop::bool::weighted(0.8), 0u8..4),
    )
        .prop_map(|((v6, tcp, port, size, options), (sequence, id), (id_step, dont_fragment, tos))| {
            FlowShape { v6, tcp, port, size, options: options * 4, sequence, id, id_step, dont_fragment, tos }
        })
}

/// The next packet of a flow, which goes on behind it.
fn packet(flow: &mut FlowShape, twist: Option<Twist>, fill: u8) -> Vec<u8> {
    let is = |what: Twist| twist == Some(what);
    let size = match twist {
        Some(Twist::Shorter) => flow.size / 2 + 1,
        Some(Twist::Longer) => flow.size + 1,
        Some(Twist::Empty) => 0,
        _ => flow.size,
    };
    let protocol = match (is(Twist::OtherProtocol), flow.tcp) {
        (true, _) => 1,
        (false, true) => 6,
        (false, false) => 17,
    };
    let mut p = Vec::new();
    let ttl = 60 + u8::from(is(Twist::Ttl));
    let tos = flow.tos ^ if is(Twist::Tos) { 3 } else { 0 };
    if flow.v6 {
        p.extend([0x60 | tos >> 4, tos << 4, 0, 7, 0, 0, protocol, ttl]);
        p.extend([0xfd; 15]);
        p.push(1);
        p.extend([0xfd; 15]);
        p.push(2);
    } else {
        let options = if is(Twist::NetworkOptions) { 2 } else { 0 };
        let id = match twist {
            Some(Twist::IdAhead) => flow.id.wrapping_add(1),
            Some(Twist::IdBehind) => flow.id.wrapping_sub(1),
            _ => flow.id,
        };
        let mut field = if flow.dont_fragment != is(Twist::MayFragment) { 0x4000u16 } else { 0 };
        field |= match twist {
            Some(Twist::Evil) => 0x8000,
            Some(Twist::FirstFragment) => 0x2000,
            Some(Twist::LaterFragment) => 0x0003,
            _ => 0,
        };
        p.extend([0x45 + options, tos, 0, 0]);
        p.extend(id.to_be_bytes());
        p.extend(field.to_be_bytes());
        p.extend([ttl, protocol, 0, 0, 10, 5, 1, 2, 10, 5, 2, 3]);
        p.resize(20 + usize::from(options) * 4, 1);
    }
    let network = p.len();
    p.extend(flow.port.to_be_bytes());
    p.extend(5001u16.to_be_bytes());
    if flow.tcp {
        let sequence = match twist {
            Some(Twist::SequenceAhead) => flow.sequence.wrapping_add(1),
            Some(Twist::SequenceBehind) => flow.sequence.wrapping_sub(1),
            _ => flow.sequence,
        };
        p.extend(sequence.to_be_bytes());
        p.extend([9, 9, 9, 8 + u8::from(is(Twist::Acknowledgment))]);
        let flags = match twist {
            Some(Twist::Flags(flags)) => ACK | flags,
            _ => ACK,
        };
        p.extend([(5 + flow.options / 4) as u8 * 16, flags, 1, u8::from(is(Twist::Window)), 0, 0, 0]);
        p.push(u8::from(is(Twist::Urgent)));
        p.resize(p.len() + flow.options, 1 + u8::from(is(Twist::TransportOptions)));
    } else {
        p.extend([0; 4]);
    }
    let headers = p.len();
    p.extend((0..size).map(|i| fill.wrapping_mul(31).wrapping_add(i as u8)));
    if is(Twist::OtherZero) && size >= 2 {
        // The last word is what makes the sum come to zero.
        p[headers..headers + 2].fill(0);
        reference::finish(&mut p);
        let at = network + if flow.tcp { 16 } else { 6 };
        let sum = [p[at], p[at + 1]];
        p[headers..headers + 2].copy_from_slice(&sum);
    }
    reference::finish(&mut p);
    match twist {
        Some(Twist::CorruptHeader) => p[11] ^= 1,
        Some(Twist::CorruptPayload) => {
            if let Some(last) = p.last_mut() {
                *last ^= 1;
            }
        }
        Some(Twist::NoChecksum) if !flow.tcp => p[network + 6..network + 8].fill(0),
        Some(Twist::OtherZero) if flow.tcp && p[network + 16..network + 18] == [0, 0] => {
            p[network + 16..network + 18].fill(0xff);
        }
        Some(Twist::UdpLength) if !flow.tcp && size > 1 => {
            // A length that is too short, under a checksum that fits it.
            let len = (8 + size - 1) as u16;
            p[network + 4..network + 6].copy_from_slice(&len.to_be_bytes());
            let sum = u16::from_be_bytes([p[network + 6], p[network + 7]]);
            let sum = u32::from(sum) + 1;
            let sum = (sum + (sum >> 16)) as u16;
            p[network + 6..network + 8].copy_from_slice(&sum.to_be_bytes());
        }
        _ => {}
    }
    flow.sequence = flow.sequence.wrapping_add(size as u32);
    flow.id = flow.id.wrapping_add(flow.id_step);
    p
}

fn batch() -> impl Strategy<Value = Vec<Vec<u8>>> {
    (prop::collection::vec(flows(), 1..4), prop::collection::vec((0usize..4, 1usize..9, twists()), 1..30))
        .prop_map(|(mut flows, steps)| {
            let mut packets = Vec::new();
            let count = flows.len();
            for (flow, run, twist) in steps {
                let flow = &mut flows[flow % count];
                for index in 0..run {
                    // A run, and at its end what breaks it.
                    let twist = twist.filter(|_| index + 1 == run);
                    packets.push(packet(flow, twist, packets.len() as u8));
                }
            }
            packets
        })
}

fn arena(packets: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
    let mut ends = 0;
    let ranges = packets.iter().map(|packet| {
        ends += packet.len();
        ends - packet.len()..ends
    });
    let ranges = ranges.collect();
    (packets.concat(), ranges)
}

fn coalesce(coalescer: &mut Coalescer, packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    let (arena, ranges) = arena(packets);
    for range in &ranges {
        coalescer.push(&arena, range.clone()).expect("room");
    }
    reference::checked_writes(coalescer, &arena, &ranges)
}

/// Re-assembly by its definition: a packet joins the last group of its flow when segmentation gives all of them back.
fn expected(packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut open: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    for (index, packet) in packets.iter().enumerate() {
        let flow = reference::flow(packet).expect("a flow");
        if Layout::of(packet).is_none() {
            // Of any flow between these addresses, of whatever protocol in IPv6.
            let pair = if reference::is_v4(packet) { flow[..10].to_vec() } else { vec![6] };
            open.retain(|other, _| !other.starts_with(&pair));
            groups.push(vec![index]);
            continue;
        }
        if !may_be_joined(packet) {
            open.remove(&flow);
            groups.push(vec![index]);
            continue;
        }
        if let Some(group) = open.get(&flow).map(|group| &mut groups[*group]) {
            let mut all: Vec<Vec<u8>> = group.iter().map(|i| packets[*i].clone()).collect();
            all.push(packet.clone());
            if is_super_packet(&all) {
                group.push(index);
                continue;
            }
        }
        open.insert(flow, groups.len());
        groups.push(vec![index]);
    }
    groups
}

fn may_be_joined(packet: &[u8]) -> bool {
    let network = reference::network_len(packet);
    let plain = packet.len() > reference::headers_len(packet) && matches!(network, 20 | 40);
    let tcp = reference::protocol(packet) == 6;
    plain && (!tcp || packet[network + 13] & !(PSH | ECE) == ACK)
}

fn is_super_packet(packets: &[Vec<u8>]) -> bool {
    let headers = reference::headers_len(&packets[0]);
    let most = if reference::protocol(&packets[0]) == 6 { 128 } else { 64 };
    if packets.len() > most
        || packets.iter().any(|p| !reference::is_right(p) || reference::headers_len(p) != headers)
    {
        return false;
    }
    let whole = reference::merged(packets);
    if whole.len() > 65535 {
        return false;
    }
    let cut = reference::segments(&whole, packets[0].len() - headers);
    let atomic = |packets: &[Vec<u8>]| {
        packets.iter().map(|p| reference::without_identification(p)).collect::<Vec<_>>()
    };
    let same_id = reference::is_v4(&whole) && packets.iter().all(|p| p[4..6] == packets[0][4..6]);
    cut == packets || same_id && atomic(&cut) == atomic(packets)
}

/// Whether each flow has a place of its own, by which the outcome is exactly that of the definition.
fn places_are_distinct(packets: &[Vec<u8>]) -> bool {
    let mut slots: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
    let mut pairs: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
    packets.iter().all(|packet| {
        let flow = reference::flow(packet).expect("a flow");
        let pair_key = if reference::is_v4(packet) { flow[..10].to_vec() } else { vec![6] };
        let pair_free = *pairs.entry(pair(packet)).or_insert_with(|| pair_key.clone()) == pair_key;
        let slot_free = Layout::of(packet)
            .is_none_or(|layout| *slots.entry(slot(&layout, packet)).or_insert_with(|| flow.clone()) == flow);
        pair_free && slot_free
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 60 } else { 20_000 }))]

    #[test]
    fn segmenting_what_was_joined_gives_it_back_and_nothing_more_could_be_joined(packets in batch()) {
        let mut coalescer = Coalescer::new(packets.len(), ALL);
        let groups = coalesce(&mut coalescer, &packets);
        if places_are_distinct(&packets) {
            prop_assert_eq!(groups, expected(&packets));
        }
        // And the table that the batch left behind does not matter to the next.
        let again = coalesce(&mut coalescer, &packets);
        if places_are_distinct(&packets) {
            prop_assert_eq!(again, expected(&packets));
        }
    }
}

fn run(flow: &mut FlowShape, count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| packet(flow, None, i as u8)).collect()
}

fn tcp() -> FlowShape {
    FlowShape {
        v6: false,
        tcp: true,
        port: 1,
        size: 1448,
        options: 12,
        sequence: 1,
        id: 7,
        id_step: 1,
        dont_fragment: true,
        tos: 0,
    }
}

fn udp() -> FlowShape {
    FlowShape { tcp: false, size: 1000, options: 0, ..tcp() }
}

fn sizes(groups: &[Vec<usize>]) -> Vec<usize> {
    groups.iter().map(Vec::len).collect()
}

#[test]
fn a_stream_is_one_write() {
    let mut coalescer = Coalescer::new(100, ALL);
    assert_eq!(sizes(&coalesce(&mut coalescer, &run(&mut tcp(), 44))), [44]);
    assert_eq!(sizes(&coalesce(&mut coalescer, &run(&mut udp(), 60))), [60]);
    assert_eq!(sizes(&coalesce(&mut coalescer, &run(&mut FlowShape { v6: true, ..tcp() }, 40))), [40]);
    // A datagram holds no more, nor does the kernel take more of UDP.
    assert_eq!(sizes(&coalesce(&mut coalescer, &run(&mut tcp(), 50))), [45, 5]);
    assert_eq!(sizes(&coalesce(&mut coalescer, &run(&mut FlowShape { size: 10, ..udp() }, 100))), [64, 36]);
}

#[test]
fn what_the_device_does_not_take_is_not_joined() {
    let packets = [run(&mut tcp(), 3), run(&mut udp(), 2)].concat();
    let mut coalescer = Coalescer::new(100, Rules { tcp: false, udp: true });
    assert_eq!(sizes(&coalesce(&mut coalescer, &packets)), [1, 1, 1, 2]);
    coalescer.set_rules(Rules { tcp: true, udp: false });
    assert_eq!(sizes(&coalesce(&mut coalescer, &packets)), [3, 1, 1]);
}

#[test]
fn flows_of_a_batch_do_not_part_each_other() {
    let mut flows: Vec<FlowShape> =
        (0..32).map(|i| FlowShape { port: 1000 + i, size: 100, ..udp() }).collect();
    let packets: Vec<_> = (0..320).map(|i| packet(&mut flows[i % 32], None, i as u8)).collect();
    let groups = coalesce(&mut Coalescer::new(320, ALL), &packets);
    // Where two share a slot they part each other and nobody else.
    assert!(groups.len() < 32 + 320 / 4, "{} groups", groups.len());
    assert!(sizes(&groups).iter().filter(|size| **size == 10).count() > 16);
}

#[test]
fn a_fragment_ends_every_flow_between_its_addresses() {
    let mut flow = udp();
    let mut packets = run(&mut flow, 2);
    packets.push(packet(&mut FlowShape { port: 99, ..udp() }, Some(Twist::LaterFragment), 0));
    packets.extend(run(&mut flow, 2));
    assert_eq!(coalesce(&mut Coalescer::new(9, ALL), &packets), [vec![0, 1], vec![2], vec![3, 4]]);
}

#[test]
fn a_wrong_checksum_is_never_vouched_for() {
    for (twist, groups) in [
        (Twist::CorruptPayload, vec![vec![0, 1], vec![2], vec![3]]),
        (Twist::CorruptHeader, vec![vec![0, 1], vec![2], vec![3]]),
        (Twist::NoChecksum, vec![vec![0, 1], vec![2], vec![3]]),
    ] {
        let mut flow = udp();
        let packets: Vec<_> =
            [None, None, Some(twist), None].into_iter().map(|t| packet(&mut flow, t, 3)).collect();
        assert_eq!(coalesce(&mut Coalescer::new(9, ALL), &packets), groups, "{twist:?}");
    }
    // Nor the first of a flow, whose checksum nobody has looked at before the second comes.
    let mut flow = tcp();
    let packets: Vec<_> =
        [Some(Twist::CorruptPayload), None, None].into_iter().map(|t| packet(&mut flow, t, 3)).collect();
    assert_eq!(coalesce(&mut Coalescer::new(9, ALL), &packets), [vec![0], vec![1, 2]]);
}

#[test]
fn what_segmentation_would_write_otherwise_stays_alone() {
    let alone = |packets: &[Vec<u8>], what: &str| {
        assert_eq!(sizes(&coalesce(&mut Coalescer::new(9, ALL), packets)), vec![1; packets.len()], "{what}");
    };
    let mut flow = udp();
    let options: Vec<_> = (0..3).map(|i| packet(&mut flow, Some(Twist::NetworkOptions), i)).collect();
    alone(&options, "options of IPv4");

    // Checksums that come to zero, written in the form that nobody computes.
    for shape in [udp(), tcp()] {
        let mut flow = shape.clone();
        let mut packets = vec![packet(&mut flow, Some(Twist::OtherZero), 0), packet(&mut flow, None, 0)];
        if !shape.tcp {
            assert_eq!(packets[0][26..28], [0xff, 0xff]);
            packets[0][26..28].fill(0);
        }
        alone(&packets, "a sum of zero");
    }
    let mut flow = udp();
    let mut packets: Vec<_> = (0..2).map(|i| packet(&mut flow, None, i)).collect();
    let sum = [packets[0][10], packets[0][11]];
    // The identification takes what the sum lacks.
    let id = u16::from_be_bytes([packets[0][4], packets[0][5]]);
    let zero = (u32::from(id) + u32::from(u16::from_be_bytes(sum))) as u16;
    for (packet, id) in packets.iter_mut().zip([zero, zero.wrapping_add(1)]) {
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        reference::finish(packet);
    }
    assert_eq!(packets[0][10..12], [0, 0]);
    assert_eq!(sizes(&coalesce(&mut Coalescer::new(9, ALL), &packets)), [2]);
    packets[0][10..12].fill(0xff);
    alone(&packets, "a header's sum of zero");
}

#[test]
fn of_tcp_nothing_but_ordinary_data_is_joined() {
    for (flags, groups) in [
        (0, vec![2]),
        (ECE, vec![2]),
        (PSH, vec![1, 1]),
        (FIN, vec![1, 1]),
        (URG, vec![1, 1]),
        (CWR, vec![1, 1]),
    ] {
        let mut flow = tcp();
        let packets: Vec<_> = (0..2).map(|i| packet(&mut flow, Some(Twist::Flags(flags)), i)).collect();
        assert_eq!(sizes(&coalesce(&mut Coalescer::new(9, ALL), &packets)), groups, "flags {flags:#x}");
    }
}

#[test]
fn identifications_count_or_stay_and_nothing_in_between() {
    let with = |ids: &[u16]| {
        let packets = ids.iter().map(|id| packet(&mut FlowShape { id: *id, ..udp() }, None, 0));
        coalesce(&mut Coalescer::new(9, ALL), &packets.collect::<Vec<_>>())
    };
    assert_eq!(with(&[7, 8, 9]), [[0, 1, 2]]);
    assert_eq!(with(&[7, 7, 7]), [[0, 1, 2]]);
    assert_eq!(with(&[7, 8, 7]), [vec![0, 1], vec![2]]);
    assert_eq!(with(&[7, 7, 9]), [vec![0, 1], vec![2]]);
    assert_eq!(with(&[7, 7, 8]), [vec![0, 1], vec![2]]);
}

#[test]
fn two_flows_in_one_place_are_two() {
    for shape in [udp(), tcp(), FlowShape { v6: true, ..udp() }, FlowShape { v6: true, ..tcp() }] {
        let mut flow = shape.clone();
        let first = packet(&mut flow, None, 0);
        let place = |packet: &[u8]| Layout::of(packet).map(|layout| slot(&layout, packet));
        // What would come next, but for a port or an address.
        let next = packet(&mut flow, None, 0);
        let (address, port) = if shape.v6 { (23, 41) } else { (15, 21) };
        for at in [address, port] {
            let others = (0..=u16::MAX).map(|value| {
                let mut other = next.clone();
                other[at - 1..=at].copy_from_slice(&value.to_be_bytes());
                reference::finish(&mut other);
                other
            });
            let mut others = others.filter(|other| *other != next && place(other) == place(&first));
            let other = others.next().expect("of so many one");
            let packets = [first.clone(), other];
            assert_eq!(sizes(&coalesce(&mut Coalescer::new(9, ALL), &packets)), [1, 1], "{shape:?} at {at}");
        }
        assert_eq!(sizes(&coalesce(&mut Coalescer::new(9, ALL), &[first, next])), [2]);
    }
}

#[test]
fn a_transport_header_longer_than_its_packet_is_nobodys() {
    let mut short = packet(&mut FlowShape { size: 4, options: 0, ..tcp() }, None, 0);
    short[32] = 0xf0;
    reference::finish(&mut short);
    let packets = [short.clone(), short];
    assert_eq!(sizes(&coalesce(&mut Coalescer::new(9, ALL), &packets)), [1, 1]);
}

#[test]
fn a_full_batch_says_so_and_loses_nothing() {
    let packets = run(&mut tcp(), 3);
    let (arena, ranges) = arena(&packets);
    let mut coalescer = Coalescer::new(2, ALL);
    assert_eq!(coalescer.push(&arena, ranges[0].clone()), Ok(()));
    assert_eq!(coalescer.push(&arena, ranges[1].clone()), Ok(()));
    assert_eq!(coalescer.push(&arena, ranges[2].clone()), Err(Full));
    assert_eq!(reference::checked_writes(&mut coalescer, &arena, &ranges[..2]), [[0, 1]]);
    assert_eq!(coalescer.push(&arena, ranges[2].clone()), Ok(()));
}

#[test]
fn a_batch_counter_that_wraps_does_not_revive_a_group() {
    let mut coalescer = Coalescer::new(9, ALL);
    let packets = run(&mut tcp(), 2);
    coalesce(&mut coalescer, &packets[..1]);
    coalescer.batch = u32::MAX;
    coalesce(&mut coalescer, &[]);
    assert_eq!(coalescer.batch, 1);
    assert_eq!(coalesce(&mut coalescer, &packets[1..]), [[0]]);
}
