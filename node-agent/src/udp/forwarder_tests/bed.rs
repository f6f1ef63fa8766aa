//! Two network namespaces with an underlay between them, a forwarder's device in each, and what pods would do.
#![expect(unsafe_code, reason = "capset has no safe wrapper")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{setsockopt, sockopt};

use crate::tun;
use crate::udp::{DropReason, Forwarder, Local, Offload, Offloads, Peer, PeerTable, Settings, SourcePolicy};

pub(super) const PORT: u16 = 8285;
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// A network namespace, which goes with the value.
#[derive(Debug)]
pub(super) struct Netns(File);

impl Netns {
    pub(super) fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own needs root");
            let netns = Self(File::open("/proc/thread-self/ns/net").expect("nsfs"));
            ip("link set lo up");
            netns
        };
        joined(thread::scope(|scope| scope.spawn(make).join()))
    }

    /// Runs `act` in a thread inside.
    pub(super) fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let run = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET).expect("the namespace lives");
            act()
        };
        joined(thread::scope(|scope| scope.spawn(run).join()))
    }

    pub(super) fn ip(&self, args: &str) -> String {
        self.run(|| ip(args))
    }
}

fn joined<T>(result: thread::Result<T>) -> T {
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn ip(args: &str) -> String {
    command("ip", args)
}

pub(super) fn command(program: &str, args: &str) -> String {
    let output = Command::new(program)
        .args(args.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("{program} is installed: {error}"));
    assert!(output.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether this kernel has it at all: UDP super-packets came to TUN devices with Linux 6.2, reads that need not wait with
/// 6.5.
pub(super) fn knows(offload: Offload) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok()).expect("a number");
    let since = match offload {
        Offload::TunUso | Offload::CoalesceUdp => (6, 2),
        Offload::TunNowait => (6, 5),
        _ => (0, 0),
    };
    (next(), next()) >= since
}

/// Number 1 and number 2.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) number: u8,
    pub(super) netns: Netns,
}

impl Node {
    /// With underlay 192.0.2.N on `eth0`, pod address 10.5.N.1, and the backend's device, address and route.
    pub(super) fn pair() -> (Self, Self) {
        let (one, two) = (Self { number: 1, netns: Netns::new() }, Self { number: 2, netns: Netns::new() });
        let far = format!("/proc/{}/fd/{}", std::process::id(), two.netns.0.as_raw_fd());
        one.netns.ip(&format!("link add eth0 type veth peer name eth0 netns {far}"));
        for node in [&one, &two] {
            let number = node.number;
            node.netns.run(|| {
                ip(&format!("address add 192.0.2.{number}/24 dev eth0"));
                ip("link set eth0 up");
                ip(&format!("address add 10.5.{number}.1/32 dev lo"));
            });
            node.make_device();
        }
        (one, two)
    }

    /// What the reconciler does.
    pub(super) fn make_device(&self) {
        let number = self.number;
        self.netns.run(|| {
            tun::create(&device()).expect("the device is made");
            ip("link set flannel0 mtu 1472");
            ip("link set flannel0 addrgenmode none");
            ip(&format!("address add 10.5.{number}.0/32 dev flannel0"));
            ip("link set flannel0 up");
            ip(&format!("route add 10.5.0.0/16 dev flannel0 src 10.5.{number}.1"));
        });
    }

    pub(super) fn underlay(&self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, self.number), PORT)
    }

    pub(super) fn pod(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 5, self.number, 1)
    }

    pub(super) fn peer(&self) -> Peer {
        Peer { subnet: self.subnet(), addr: self.underlay() }
    }

    fn subnet(&self) -> weft_shared::Subnet {
        format!("10.5.{}.0/24", self.number).parse().expect("subnet")
    }

    pub(super) fn table(&self, peers: impl IntoIterator<Item = Peer>) -> PeerTable {
        let local = Local {
            network: "10.5.0.0/16".parse().expect("network"),
            subnets: vec![self.subnet()],
            device_addr: Ipv4Addr::new(10, 5, self.number, 0),
        };
        PeerTable::new(local, SourcePolicy::default(), peers)
    }

    pub(super) fn settings(&self, offloads: &Offloads) -> Settings {
        Settings { device: device(), listen: self.underlay(), offloads: offloads.clone() }
    }

    pub(super) fn start(&self, offloads: &Offloads, peers: &[Peer]) -> Forwarder {
        let table = self.table(peers.iter().copied());
        self.netns.run(|| Forwarder::start(self.settings(offloads), table).expect("threads"))
    }

    /// The kernel lets packets through a link only some time after it has a carrier (net/core/link_watch.c).
    pub(super) fn passes_packets(&self) {
        for link in ["eth0", "flannel0"] {
            eventually("the link has a queue", || {
                !self.netns.ip(&format!("link show {link}")).contains("qdisc noop ")
            });
        }
    }

    pub(super) fn ping(&self, to: Ipv4Addr) {
        self.netns.run(|| command("ping", &format!("-n -c 3 -i 0.01 -W 5 {to}")));
    }
}

/// Takes CAP_NET_RAW from the calling thread and those that it starts.
pub(super) fn forgo_raw_sockets() {
    // linux/capability.h: version 3 and "this thread"; twice effective, permitted and inheritable.
    let (mut header, mut sets) = ([0x2008_0522_u32, 0], [0_u32; 6]);
    const CAP_NET_RAW: u32 = 13;
    // SAFETY: both calls read or write the two structures of capability.h, which have 8 and 24 bytes, as the arrays.
    let results = unsafe {
        let got = libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr());
        sets[0] &= !(1 << CAP_NET_RAW);
        (got, libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()))
    };
    assert_eq!(results, (0, 0), "{}", std::io::Error::last_os_error());
}

pub(super) fn device() -> weft_shared::IfName {
    "flannel0".parse().expect("name")
}

/// Both nodes with forwarders that know each other.
pub(super) fn connected(offloads: &Offloads) -> (Node, Node, Forwarder, Forwarder) {
    let (one, two) = Node::pair();
    let first = one.start(offloads, &[two.peer()]);
    let second = two.start(offloads, &[one.peer()]);
    for (node, forwarder) in [(&one, &first), (&two, &second)] {
        forwards(forwarder);
        node.passes_packets();
    }
    (one, two, first, second)
}

pub(super) fn forwards(forwarder: &Forwarder) {
    eventually("it forwards", || forwarder.state().problem.is_none());
}

/// An interrupted wait begins again: sockets with a timeout end it when the process was stopped and went on (signal(7)).
pub(super) fn uninterrupted<T>(mut call: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

pub(super) fn dropped_sending(forwarder: &Forwarder, reason: DropReason) -> u64 {
    forwarder.state().counters.dropped_sending.get(&reason).copied().unwrap_or_default()
}

pub(super) fn dropped_receiving(forwarder: &Forwarder, reason: DropReason) -> u64 {
    forwarder.state().counters.dropped_receiving.get(&reason).copied().unwrap_or_default()
}

pub(super) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        thread::yield_now();
    }
}

/// Bytes that tell where they belong: no two offsets look alike, however far apart.
fn pattern(from: u64, len: usize) -> Vec<u8> {
    let words = from / 8..=(from + len as u64) / 8;
    let bytes: Vec<u8> =
        words.flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()).collect();
    bytes[(from % 8) as usize..][..len].to_vec()
}

/// A stream of `bytes` from one node's pod to the other's, every byte of it compared.
pub(super) fn stream(from: &Node, to: &Node, bytes: u64) {
    let listener = to.netns.run(|| TcpListener::bind((to.pod(), 0)).expect("listen"));
    let target = listener.local_addr().expect("address");
    let mut outward = from.netns.run(|| TcpStream::connect_timeout(&target, DEADLINE).expect("connect"));
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let stream = &mut outward;
            stream.set_write_timeout(Some(DEADLINE)).expect("timeout");
            let mut at = 0;
            while at < bytes {
                let block = pattern(at, (bytes - at).min(100_000) as usize);
                stream.write_all(&block).expect("sent");
                at += block.len() as u64;
            }
        });
        let (mut stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(DEADLINE)).expect("timeout");
        let (mut at, mut block) = (0, vec![0; 1 << 16]);
        loop {
            let read = uninterrupted(|| stream.read(&mut block)).expect("received");
            if read == 0 {
                break;
            }
            assert!(block[..read] == pattern(at, read), "{read} bytes from {at} on");
            at += read as u64;
        }
        assert_eq!(at, bytes, "all of it");
        joined(sender.join());
    });
}

/// `count` datagrams of many sizes from one node's pod to the other's, each compared, none lost, none twice and none out
/// of order. Most are sent as super-packets, where the sender's kernel lets them reach the device whole.
pub(super) fn datagrams(from: &Node, to: &Node, count: u64) {
    let receiver = to.netns.run(|| UdpSocket::bind((to.pod(), 0)).expect("bind"));
    receiver.set_read_timeout(Some(DEADLINE)).expect("timeout");
    setsockopt(&receiver, sockopt::RcvBufForce, &(8 << 20)).expect("room for a window");
    let target = receiver.local_addr().expect("address");
    // What may be under way at once: the device's queue holds 500 packets.
    const WINDOW: u64 = 300;
    let (arrived, per_send) = (AtomicU64::new(0), 20_u64);
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let socket = from.netns.run(|| UdpSocket::bind((from.pod(), 0)).expect("bind"));
            socket.connect(target).expect("connect");
            let mut number = 0;
            while number < count {
                eventually("there is room for more", || number + per_send - arrived.load(SeqCst) < WINDOW);
                // One size in a run, another in the next; a plain send every fourth time.
                let run = if number / per_send % 4 == 3 { 1 } else { per_send.min(count - number) };
                let size = size_of_run(number);
                setsockopt(&socket, sockopt::UdpGsoSegment, &(size as i32)).expect("UDP_SEGMENT");
                let bytes: Vec<u8> = (number..number + run).flat_map(|n| datagram(n, size)).collect();
                assert_eq!(uninterrupted(|| socket.send(&bytes)).expect("sent"), bytes.len());
                number += run;
            }
        });
        let mut buffer = vec![0; 1 << 16];
        for number in 0..count {
            let len = uninterrupted(|| receiver.recv(&mut buffer))
                .unwrap_or_else(|error| panic!("datagram {number}: {error}"));
            let said = buffer[..8].first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
            assert_eq!(said, Some(number), "in order");
            assert!(buffer[..len] == datagram(number, len), "the content of {number}, {len} bytes");
            arrived.store(number + 1, SeqCst);
        }
        joined(sender.join());
    });
}

/// 9 to 1444 bytes: with headers up to the device's MTU.
fn size_of_run(number: u64) -> usize {
    9 + (number.wrapping_mul(0x9e37_79b9) >> 7) as usize % 1436
}

fn datagram(number: u64, size: usize) -> Vec<u8> {
    let mut bytes = pattern(number * 1471, size);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}
