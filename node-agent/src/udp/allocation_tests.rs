//! Nothing is allocated per packet: a pass in both directions, counted by the allocator.
#![expect(unsafe_code, reason = "a global allocator is unsafe by definition")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::net::{SocketAddrV4, UdpSocket};
use std::ops::Range;
use std::os::fd::AsFd;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::coalesce::{Coalescer, Rules};
use super::outbox::{Flow, Join, Outbox};
use super::packet::{Ipv4, decrement_ttl};
use super::segment::Segments;
use super::virtio::{Gso, GsoKind, PartialChecksum, VirtioHeader};
use super::{Local, Peer, PeerTable, SourcePolicy, reference};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: all of it is done by the system's allocator; a thread's counter has no destructor and takes no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: what the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: what the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SEGMENT: usize = 1432;
const SEGMENTS: usize = 40;

fn packet(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0; 40 + SEGMENT * SEGMENTS];
    (packet[0], packet[8], packet[9]) = (0x45, 64, 6);
    packet[12..16].copy_from_slice(&from);
    packet[16..20].copy_from_slice(&to);
    // Data offset and ACK.
    (packet[32], packet[33]) = (0x50, 0x10);
    reference::finish(&mut packet);
    packet
}

#[test]
fn no_packet_costs_an_allocation() {
    let apart = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own needs root");
        UdpSocket::bind("0.0.0.0:0").expect("a socket")
    };
    let socket = thread::spawn(apart).join().expect("a socket");
    let subnet = |text: &str| text.parse().expect("a subnet");
    let from: SocketAddrV4 = "192.0.2.2:8285".parse().expect("an address");
    let local = Local {
        network: subnet("10.5.0.0/16"),
        subnets: vec![subnet("10.5.1.0/24")],
        device_addr: [10, 5, 1, 0].into(),
    };
    let peer = Peer { subnet: subnet("10.5.2.0/24"), addr: from };
    let table = PeerTable::new(local, SourcePolicy::default(), [peer]);
    let (ours, theirs) = ([10, 5, 1, 9], [10, 5, 2, 9]);
    let header = VirtioHeader {
        checksum: Some(PartialChecksum { start: 20, offset: 16 }),
        gso: Some(Gso { kind: GsoKind::TcpV4, size: SEGMENT as u16 }),
        hdr_len: 40,
    };
    let mut read = [&header.encode()[..], &packet(ours, theirs)].concat();
    let received = reference::segments(&packet(theirs, ours), SEGMENT);
    let ranges: Vec<Range<usize>> =
        (0..SEGMENTS).map(|at| at * (SEGMENT + 40)..(at + 1) * (SEGMENT + 40)).collect();
    let arena = received.concat();
    let mut outbox = Outbox::new();
    let mut coalescer = Coalescer::new(SEGMENTS, Rules { tcp: true, udp: true });

    let before = ALLOCATIONS.get();
    for _ in 0..3 {
        let (header, packet) = VirtioHeader::split(&mut read).expect("a header");
        let to = table.route(Ipv4::parse(packet).expect("a packet").destination()).expect("a peer").addr;
        decrement_ttl(packet).expect("hops");
        let mut segments = Segments::new(&header, packet).expect("a super-packet");
        let mut batch = outbox.begin();
        while let Some(segment) = segments.next(batch.headers()) {
            batch.push(to, segment.headers, segment.payload, Flow::Of(1), Join::SameSize);
        }
        assert_eq!(batch.messages().iter().map(|message| message.segments).sum::<u16>(), SEGMENTS as u16);
        // There is no way to the peer; all but the last step is done.
        assert!(batch.send(socket.as_fd(), 0).is_err());

        for range in &ranges {
            let packet = Ipv4::parse(&arena[range.clone()]).expect("a packet");
            assert_eq!(table.admit(from, packet.source(), packet.destination()), Ok(()));
            assert_eq!(coalescer.push(&arena, range.clone()), Ok(()));
        }
        let mut packets = 0;
        while let Some(write) = coalescer.next_write(&arena) {
            packets += write.packets;
        }
        assert_eq!(packets, SEGMENTS);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0, "allocations");
    drop(black_box(Box::new(1)));
    assert_eq!(ALLOCATIONS.get() - before, 1, "the count counts");
}
