//! What does not belong to the overlay, by datagrams written by hand.

use std::net::{Ipv4Addr, UdpSocket};

use super::bed::{
    DEADLINE, Netns, Node, PORT, connected, dropped_receiving, dropped_sending, eventually, forwards,
    uninterrupted,
};
use super::*;
use crate::udp::checksum::Sum;

/// A UDP datagram in a packet, as a peer would send it.
fn packet(source: Ipv4Addr, destination: Ipv4Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    let len = 28 + payload.len() as u16;
    let mut bytes = vec![0x45, 0];
    bytes.extend(len.to_be_bytes());
    bytes.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    let sum = Sum::of(&bytes).checksum();
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(9_u16.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend((len - 20).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    let sum = (Sum::pseudo(&bytes[12..20], 17, usize::from(len) - 20) + Sum::of(&bytes[20..])).checksum();
    bytes[26..28].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// Node one is weft's, node two a socket.
fn alone() -> (Node, Node, Forwarder, UdpSocket) {
    let (one, two) = Node::pair();
    let first = one.start(&Offloads::default(), &[two.peer()]);
    forwards(&first);
    one.passes_packets();
    let peer = two.netns.run(|| UdpSocket::bind(two.underlay()).expect("bind"));
    peer.connect(one.underlay()).expect("connect");
    peer.set_read_timeout(Some(DEADLINE)).expect("timeout");
    (one, two, first, peer)
}

#[test]
fn what_does_not_belong_is_counted_by_reason_and_never_delivered() {
    let (one, two, first, peer) = alone();
    let pod = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    pod.set_read_timeout(Some(DEADLINE)).expect("timeout");
    let port = pod.local_addr().expect("address").port();
    let good = packet(two.pod(), one.pod(), port, b"good");
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let stranger = two.netns.run(|| {
        super::bed::command("ip", "address add 192.0.2.77/24 dev eth0");
        UdpSocket::bind("192.0.2.77:8285").expect("bind")
    });
    stranger.connect(one.underlay()).expect("connect");
    let from = |source: [u8; 4]| packet(source.into(), one.pod(), port, b"bad");
    let cases: [(DropReason, &UdpSocket, Vec<u8>); 11] = [
        (DropReason::Short, &peer, vec![]),
        (DropReason::Short, &peer, good[..19].to_vec()),
        (DropReason::WrongVersion, &peer, with(0, 0x65)),
        (DropReason::BadTotalLength, &peer, good[..good.len() - 1].to_vec()),
        (DropReason::BadTotalLength, &peer, [&good[..], &[0]].concat()),
        (DropReason::BadHeader, &peer, with(8, 63)),
        (DropReason::BadHeader, &peer, with(0, 0x44)),
        (DropReason::UnknownPeer, &stranger, good.clone()),
        (DropReason::SourceRefused, &peer, from([10, 5, 7, 1])),
        (DropReason::SourceRefused, &peer, from([10, 5, 1, 9])),
        (DropReason::NotOurs, &peer, packet(two.pod(), [10, 5, 8, 1].into(), port, b"bad")),
    ];
    let mut counts = std::collections::BTreeMap::new();
    for (reason, socket, datagram) in &cases {
        socket.send(datagram).expect("sent");
        *counts.entry(*reason).or_insert(0) += 1;
        let wanted = counts.clone();
        eventually(&format!("{datagram:?} is counted as {reason}"), || {
            first.state().counters.dropped_receiving == wanted
        });
    }
    peer.send(&good).expect("sent");
    let mut buffer = [0; 100];
    let len = uninterrupted(|| pod.recv(&mut buffer)).expect("the good one arrives");
    assert_eq!(&buffer[..len], b"good", "and nothing before it");
    eventually("it is counted, alone", || first.state().counters.received.packets == 1);
}

/// The peer's datagrams come as one buffer (`UDP_GRO`), good and bad ones mixed.
#[test]
fn a_corrupted_packet_among_good_ones_is_not_vouched_for() {
    let (one, two, _first, peer) = alone();
    let pod = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    pod.set_read_timeout(Some(DEADLINE)).expect("timeout");
    let port = pod.local_addr().expect("address").port();
    let numbered: Vec<Vec<u8>> =
        (0..20_u8).map(|number| packet(two.pod(), one.pod(), port, &[number; 60])).collect();
    let size = numbered[0].len();
    nix::sys::socket::setsockopt(&peer, nix::sys::socket::sockopt::UdpGsoSegment, &(size as i32))
        .expect("UDP_SEGMENT");
    let mut bytes = numbered.concat();
    for bad in [3, 4, 11, 19] {
        bytes[bad * size + 50] ^= 0x10;
    }
    peer.send(&bytes).expect("sent");
    for number in (0..20).filter(|number| ![3, 4, 11, 19].contains(number)) {
        let mut buffer = [0; 100];
        let len = uninterrupted(|| pod.recv(&mut buffer)).expect("received");
        assert_eq!(buffer[..len], [number; 60]);
    }
    peer.send(&numbered[0]).expect("sent");
    let mut buffer = [0; 100];
    assert_eq!(uninterrupted(|| pod.recv(&mut buffer)).expect("received"), 60);
    assert_eq!(buffer[0], 0, "the last one was bad, too");
}

#[test]
fn one_datagram_is_one_packet_from_port_to_port_with_its_ttl_one_less() {
    let (one, two, _first, peer) = alone();
    let pod = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    pod.set_ttl(64).expect("TTL");
    pod.send_to(b"hello", (two.pod(), 7)).expect("sent");
    let mut buffer = [0; 2000];
    let (len, from) = uninterrupted(|| peer.recv_from(&mut buffer)).expect("received");
    assert_eq!(from, one.underlay().into());
    let bytes = &buffer[..len];
    assert_eq!(len, 28 + 5, "an IPv4 packet and nothing else: {bytes:?}");
    assert_eq!((bytes[0], bytes[8], bytes[9]), (0x45, 63, 17), "TTL and protocol");
    assert_eq!(bytes[12..16], one.pod().octets());
    assert_eq!(bytes[16..20], two.pod().octets());
    assert!(Sum::of(&bytes[..20]).is_right());
    let transport = Sum::pseudo(&bytes[12..20], 17, 13) + Sum::of(&bytes[20..]);
    assert!(transport.is_right(), "the kernel had left the checksum to the device");
    assert_eq!(&bytes[28..], b"hello");
}

#[test]
fn a_ttl_that_ends_here_and_a_destination_of_nobody_are_answered() {
    let (one, two, first, _second) = connected(&Offloads::default());
    let ping = |args: &str| {
        one.netns.run(|| {
            let output = std::process::Command::new("ping").args(args.split_whitespace()).output();
            String::from_utf8_lossy(&output.expect("ping is installed").stdout).into_owned()
        })
    };
    let answer = ping(&format!("-n -c 1 -W 5 -t 1 {}", two.pod()));
    assert!(answer.contains("From 10.5.1.0") && answer.contains("Time to live exceeded"), "{answer}");
    let answer = ping("-n -c 1 -W 5 10.5.9.1");
    assert!(answer.contains("From 10.5.1.0") && answer.contains("Destination Net Unreachable"), "{answer}");
    eventually("both are counted", || first.state().counters.icmp_sent == 2);
    assert_eq!(dropped_sending(&first, DropReason::TtlExceeded), 1);
    assert_eq!(dropped_sending(&first, DropReason::NoRoute), 1);
    let flood = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    eventually("the answers are limited", || {
        // As many as the device's queue has room for: they are read at once, however late.
        for _ in 0..400 {
            let _ = flood.send_to(b"x", "10.5.9.1:9");
        }
        first.state().counters.icmp_suppressed > 0
    });
}

/// While there is no device nobody reads the socket; what it cannot hold is counted with the next datagram.
#[test]
fn what_the_socket_cannot_hold_is_counted() {
    let (one, two, first, peer) = alone();
    one.netns.ip("link del flannel0");
    eventually("the loss is noticed", || first.state().counters.device_lost == 1);
    let datagram = packet(two.pod(), one.pod(), 9, &[0; 1400]);
    let drops = || {
        let table = one.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/udp").expect("proc"));
        let line = table
            .lines()
            .find(|line| line.contains(&format!(":{PORT:04X} ")))
            .expect("the socket")
            .to_owned();
        line.split_whitespace().last().and_then(|drops| drops.parse::<u64>().ok()).expect("a number")
    };
    eventually("the buffer overruns", || {
        for _ in 0..1000 {
            peer.send(&datagram).expect("sent");
        }
        drops() > 0
    });
    one.make_device();
    forwards(&first);
    eventually("the overruns are counted", || {
        peer.send(&datagram).expect("sent");
        dropped_receiving(&first, DropReason::Overrun) == drops()
    });
}

#[test]
fn an_empty_namespace_has_nothing_to_attach_to() {
    let (one, two) = Node::pair();
    let elsewhere = Netns::new();
    let forwarder = elsewhere.run(|| {
        Forwarder::start(one.settings(&Offloads::default()), one.table([two.peer()])).expect("threads")
    });
    let wanted = "192.0.2.1:8285: Address not available (os error 99)";
    eventually("it says so", || forwarder.state().problem.as_deref() == Some(wanted));
}
