//! Two forwarders against the kernel; root is needed, and a refusal is a failure.

mod bed;
mod guard;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use super::coalesce::Rules;
use super::egress::Egress;
use super::ingress::Ingress;
use super::link::Link;
use super::socket::Socket;
use super::*;
use crate::tun::Queue;
use bed::{
    DEADLINE, Node, connected, datagrams, dropped_sending, eventually, forgo_raw_sockets, forwards, stream,
    uninterrupted,
};

#[test]
fn carries_pings_datagrams_and_streams_with_everything_on() {
    let (one, two, first, second) = connected(&Offloads::default());
    one.ping(two.pod());
    two.ping(one.pod());
    datagrams(&one, &two, 100_000);
    stream(&one, &two, 32 << 20);
    let sent = first.state().counters.sent;
    assert!(sent.packets > 2 * sent.calls, "batches and super-packets: {sent:?}");
    let received = second.state().counters.received;
    assert!(received.packets > 2 * received.calls, "batches and groups: {received:?}");
    for forwarder in [&first, &second] {
        let state = forwarder.state();
        let outcomes: Vec<_> = Offload::ALL.iter().map(|offload| state.offloads.get(offload)).collect();
        for (offload, outcome) in Offload::ALL.into_iter().zip(outcomes) {
            assert!(outcome == Some(&Outcome::InUse) || !bed::knows(offload), "{offload}: {outcome:?}");
        }
        let dropped = (&state.counters.dropped_sending, &state.counters.dropped_receiving);
        assert!(dropped.0.is_empty() && dropped.1.is_empty(), "{dropped:?}");
    }
}

/// Each by itself, and all of them.
#[test]
fn carries_the_same_with_each_offload_switched_off() {
    let nothing = Offload::ALL.into_iter().fold(Offloads::default(), Offloads::without);
    let settings = Offload::ALL.into_iter().map(|off| Offloads::default().without(off)).chain([nothing]);
    for offloads in settings {
        let (one, two, first, second) = connected(&offloads);
        one.ping(two.pod());
        datagrams(&one, &two, 5_000);
        stream(&two, &one, 4 << 20);
        for forwarder in [&first, &second] {
            let state = forwarder.state();
            for offload in Offload::ALL {
                let header = offloads.allows(Offload::VnetHdr);
                let on = match offload {
                    Offload::VnetHdr | Offload::UdpSegment | Offload::UdpGro | Offload::TunNowait => {
                        offloads.allows(offload)
                    }
                    _ => header && offloads.allows(offload),
                };
                let outcome = state.offloads.get(&offload);
                if on && !bed::knows(offload) {
                    assert!(matches!(outcome, Some(Outcome::Refused(_))), "{offload}: {outcome:?}");
                    continue;
                }
                let wanted = if on { Outcome::InUse } else { Outcome::SwitchedOff };
                assert_eq!(outcome, Some(&wanted), "{offload} with {offloads:?}");
            }
        }
        let features = one.netns.run(|| bed::command("ethtool", "-k flannel0"));
        for (offload, feature) in
            [(Offload::TunTso, "tcp-segmentation-offload"), (Offload::TunUso, "tx-udp-segmentation")]
        {
            let on = offloads.allows(Offload::VnetHdr) && offloads.allows(offload) && bed::knows(offload);
            let line = format!("{feature}: {}", if on { "on" } else { "off" });
            assert!(features.contains(&line), "{line} with {offloads:?} in {features}");
        }
    }
}

#[test]
fn an_agent_of_another_mode_attaches_to_the_same_device() {
    let (one, two, first, _second) = connected(&Offloads::default());
    stream(&one, &two, 1 << 20);
    drop(first);
    let plain = one.start(&Offloads::default().without(Offload::VnetHdr), &[two.peer()]);
    forwards(&plain);
    one.passes_packets();
    stream(&one, &two, 1 << 20);
    stream(&two, &one, 1 << 20);
    drop(plain);
    let again = one.start(&Offloads::default(), &[two.peer()]);
    forwards(&again);
    one.passes_packets();
    stream(&one, &two, 1 << 20);
    assert_eq!(again.state().offloads.get(&Offload::TunTso), Some(&Outcome::InUse));
}

#[test]
fn a_stopped_forwarder_leaves_device_address_and_route_and_the_next_goes_on() {
    let (one, two, first, _second) = connected(&Offloads::default());
    one.ping(two.pod());
    drop(first);
    assert!(one.netns.ip("route show dev flannel0").contains("10.5.0.0/16"));
    assert!(one.netns.ip("address show dev flannel0").contains("10.5.1.0/32"));
    let again = one.start(&Offloads::default(), &[two.peer()]);
    forwards(&again);
    one.passes_packets();
    one.ping(two.pod());
}

/// Ends what goes on beside a test, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn a_device_taken_away_under_traffic_is_attached_to_anew() {
    taken_away_under_traffic(&Offloads::default());
}

#[test]
fn a_device_that_poll_waits_for_is_attached_to_anew_as_well() {
    taken_away_under_traffic(&Offloads::default().without(Offload::TunNowait));
}

fn taken_away_under_traffic(offloads: &Offloads) {
    let (one, two, first, second) = connected(offloads);
    let socket = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| {
            while !over.load(SeqCst) {
                let _ = socket.send_to(&[0; 500], (two.pod(), 9));
            }
        });
        for round in 1..=3 {
            for (node, forwarder) in [(&one, &first), (&two, &second)] {
                node.netns.ip("link del flannel0");
                eventually("the loss is noticed", || forwarder.state().counters.device_lost == round);
                let wanted = Some("there is no device flannel0");
                eventually("it says so", || forwarder.state().problem.as_deref() == wanted);
                node.make_device();
                forwards(forwarder);
                node.passes_packets();
            }
        }
    });
    one.ping(two.pod());
    stream(&one, &two, 1 << 20);
}

/// The other one would carry packets one way, and nobody would know.
#[test]
fn a_panic_of_either_thread_ends_the_other_one_as_well() {
    let (one, two) = Node::pair();
    let (hang_up, _stop) = io::pipe().expect("pipe");
    let settings = one.settings(&Offloads::default());
    let shared = Shared::new(one.table([two.peer()]));
    let (socket, queue) = one.netns.run(|| {
        let socket = Socket::open(settings.listen, &settings.offloads).expect("socket");
        let mut queue = Queue::attach(&settings.device, true).expect("queue");
        // Or `poll` waits, on an older kernel.
        let _ = queue.wait_in_reads();
        (socket, queue)
    });
    let mut link = Link {
        shared: &shared,
        socket: &socket,
        host: None,
        queue,
        vnet_hdr: true,
        runs: true,
        rules: Rules { tcp: true, udp: true },
        over: AtomicBool::new(false),
    };
    for egress_panics in [true, false] {
        link.over = AtomicBool::new(false);
        let link = &link;
        let (mut egress, mut ingress) = (Egress::new(), Ingress::new());
        let forward = || {
            let first = || if egress_panics { panic!("a bug") } else { egress.serve(link, hang_up.as_fd()) };
            let second = || if egress_panics { ingress.serve(link) } else { panic!("a bug") };
            threads::forward_by(link, hang_up.as_fd(), first, second)
        };
        let result = thread::scope(|scope| {
            let forwarding = scope.spawn(|| catch_unwind(AssertUnwindSafe(forward)));
            let end = Instant::now() + DEADLINE;
            while !forwarding.is_finished() {
                // Nothing else would end the one that is left, nor this test.
                if Instant::now() > end {
                    eprintln!("the other thread goes on");
                    std::process::abort();
                }
                thread::yield_now();
            }
            forwarding.join().expect("caught")
        });
        assert!(result.is_err(), "the panic is passed on, when both have ended");
    }
}

#[test]
fn without_the_right_to_raw_sockets_packets_are_carried_and_it_says_what_is_missing() {
    let (one, two) = Node::pair();
    let first = one.netns.run(|| {
        forgo_raw_sockets();
        let table = one.table([two.peer()]);
        Forwarder::start(one.settings(&Offloads::default()), table).expect("threads")
    });
    let second = two.start(&Offloads::default(), &[one.peer()]);
    for (node, forwarder) in [(&one, &first), (&two, &second)] {
        forwards(forwarder);
        node.passes_packets();
    }
    let problem = "a raw socket, which needs CAP_NET_RAW: Operation not permitted (os error 1)";
    assert_eq!(first.state().icmp_problem.as_deref(), Some(problem));
    assert_eq!(second.state().icmp_problem, None);
    one.ping(two.pod());
    stream(&one, &two, 1 << 20);
    let socket = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    socket.send_to(b"nobody", "10.5.9.1:9").expect("sent");
    eventually("it is dropped", || dropped_sending(&first, DropReason::NoRoute) == 1);
    let counters = first.state().counters;
    assert_eq!((counters.icmp_sent, counters.icmp_suppressed), (0, 0));
}

#[test]
fn every_packet_of_a_dropped_super_packet_is_counted() {
    let (one, _two, first, _second) = connected(&Offloads::default());
    let socket = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    setsockopt(&socket, sockopt::UdpGsoSegment, &100).expect("UDP_SEGMENT");
    socket.send_to(&[0; 950], "10.5.9.1:9").expect("sent");
    eventually("ten are counted", || dropped_sending(&first, DropReason::NoRoute) == 10);
}

/// Each message by itself would wait for room in vain.
#[test]
fn an_underlay_that_takes_nothing_costs_a_batch_one_wait_and_what_comes_in_none() {
    let offloads = Offloads::default().without(Offload::UdpSegment).without(Offload::TunUso);
    let (one, two, first, _second) = connected(&offloads);
    one.netns.run(|| {
        bed::command("tc", "qdisc add dev eth0 root tbf rate 8kbit burst 10000 limit 100000000");
    });
    let socket = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    eventually("batch after batch is dropped", || {
        for _ in 0..50 {
            let _ = socket.send_to(&[0; 1400], (two.pod(), 9));
        }
        dropped_sending(&first, DropReason::SendFailed) > 2000
    });
    let receiver = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    receiver.set_read_timeout(Some(DEADLINE)).expect("timeout");
    let sender = two.netns.run(|| UdpSocket::bind((two.pod(), 0)).expect("bind"));
    sender.connect(receiver.local_addr().expect("address")).expect("connect");
    // One by one: with 0.1 s for each they would take 20 s.
    let start = Instant::now();
    for _ in 0..200 {
        for _ in 0..50 {
            let _ = socket.send_to(&[0; 1400], (two.pod(), 9));
        }
        sender.send(&[7; 100]).expect("sent");
        uninterrupted(|| receiver.recv(&mut [0; 200])).expect("received meanwhile");
    }
    let took = start.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
}

#[test]
fn a_stopped_forwarder_has_counted_everything() {
    let (one, two, mut first, _second) = connected(&Offloads::default());
    let socket = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| {
            while !over.load(SeqCst) {
                let _ = socket.send_to(&[0; 500], (two.pod(), 9));
            }
        });
        for _ in 0..10 {
            eventually("it is under load", || first.state().counters.sent.packets > 1000);
            let shared = Arc::clone(&first.shared);
            let counters = first.stop();
            assert_eq!(counters.sent, shared.egress.traffic(), "nothing after that");
            first = one.start(&Offloads::default(), &[two.peer()]);
        }
    });
}

#[test]
fn peers_change_under_traffic_and_nothing_is_lost() {
    let (one, two, first, second) = connected(&Offloads::default());
    let others = |count: u8| {
        let other = |n| Peer { subnet: format!("10.5.{n}.0/24").parse().expect("subnet"), ..two.peer() };
        (3..3 + count).map(other)
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| {
            let mut changes = 0_u8;
            while !over.load(SeqCst) {
                changes = changes.wrapping_add(1);
                first.set_peers(one.table(others(changes % 200).chain([two.peer()])));
                second.set_peers(two.table(others(changes % 200).chain([one.peer()])));
            }
        });
        datagrams(&one, &two, 20_000);
        stream(&two, &one, 4 << 20);
    });
    for forwarder in [&first, &second] {
        let counters = forwarder.state().counters;
        assert!(counters.dropped_sending.is_empty() && counters.dropped_receiving.is_empty(), "{counters:?}");
    }
}

#[test]
fn a_peer_that_cannot_be_sent_to_costs_the_others_nothing() {
    let (one, two, first, _second) = connected(&Offloads::default());
    let lost = Peer {
        subnet: "10.5.9.0/24".parse().expect("subnet"),
        // No route leads there: ENETUNREACH.
        addr: "203.0.113.9:8285".parse().expect("address"),
    };
    first.set_peers(one.table([two.peer(), lost]));
    let receiver = two.netns.run(|| UdpSocket::bind((two.pod(), 0)).expect("bind"));
    receiver.set_read_timeout(Some(DEADLINE)).expect("timeout");
    let target = receiver.local_addr().expect("address");
    let sender = one.netns.run(|| UdpSocket::bind((one.pod(), 0)).expect("bind"));
    for number in 0..100_u8 {
        sender.send_to(&[number; 100], ("10.5.9.1", 9)).expect("sent to nowhere");
        sender.send_to(&[number; 100], target).expect("sent");
    }
    for number in 0..100 {
        let mut buffer = [0; 200];
        assert_eq!(uninterrupted(|| receiver.recv(&mut buffer)).expect("received"), 100);
        assert_eq!(buffer[0], number);
    }
    eventually("all others are counted", || dropped_sending(&first, DropReason::SendFailed) == 100);
    eventually("and those alone", || first.state().counters.sent.packets == 100);
}

/// The kernel takes no run of datagrams that are larger than the path.
#[test]
fn a_path_of_a_smaller_mtu_gets_fragments_and_runs_are_kept_for_the_others() {
    let (one, two, first, _second) = connected(&Offloads::default());
    one.netns.ip("route add 192.0.2.2/32 dev eth0 mtu 1300");
    datagrams(&one, &two, 2_000);
    stream(&one, &two, 4 << 20);
    let state = first.state();
    assert_eq!(state.offloads.get(&Offload::UdpSegment), Some(&Outcome::InUse));
    assert_eq!(dropped_sending(&first, DropReason::SendFailed), 0);
}

#[test]
fn a_port_that_is_taken_is_named_and_used_when_it_is_free() {
    let (one, two) = Node::pair();
    let taken = one.netns.run(|| UdpSocket::bind(one.underlay()).expect("bind"));
    let first = one.start(&Offloads::default(), &[two.peer()]);
    let wanted = "192.0.2.1:8285: Address in use (os error 98)";
    eventually("it says so", || first.state().problem.as_deref() == Some(wanted));
    drop(taken);
    forwards(&first);
    // And one that waits is stopped as promptly as one that works.
    let waiting = one.start(&Offloads::default(), &[two.peer()]);
    eventually("it says so", || waiting.state().problem.as_deref() == Some(wanted));
    drop(waiting);
}

#[test]
fn a_device_of_another_program_is_left_alone_and_named() {
    let (one, two) = Node::pair();
    one.netns.ip("link del flannel0");
    one.netns.ip("tuntap add flannel0 mode tun");
    let first = one.start(&Offloads::default(), &[two.peer()]);
    let wanted = "device flannel0 is no multi-queue TUN device";
    eventually("it says so", || first.state().problem.as_deref() == Some(wanted));
    one.netns.ip("link del flannel0");
    one.make_device();
    forwards(&first);
}
