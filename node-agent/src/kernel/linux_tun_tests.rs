//! The udp backend's device, address and route against the kernel itself, as its dataplane wants them; and a flanneld
//! before, beside and after it, imitated by what it does to the kernel.

use std::panic::catch_unwind;
use std::process::Command;

use weft_shared::names::LINK_GROUP;
use weft_shared::netconf::NetworkConfig;

use super::tests::{
    desired as vxlan_desired, in_namespace, ip, look_with, name, settle_with, strike, underlay,
};
use super::*;
use crate::dataplane::{Backend, LocalNode};
use crate::object::{Desired, Key, Observed, Tun};
use crate::reconcile::plan::plan;
use crate::tun::{Queue, create};
use crate::underlay::Underlay;

fn desired(index: u32) -> Desired {
    let config = NetworkConfig::parse(r#"{"Network":"10.5.0.0/16"}"#).expect("udp");
    let local = LocalNode {
        lease: "10.5.1.0-24".parse().expect("key"),
        underlay: Underlay {
            iface: name("eth0"),
            index,
            addr: "192.0.2.1".parse().expect("ip"),
            mtu: 1500,
            public_ip: "192.0.2.1".parse().expect("ip"),
            chosen_by: "a test".into(),
        },
        broadcast: None,
        on_link: BTreeSet::new(),
    };
    Backend::new(&config, "02:00:00:00:00:01".parse().expect("mac")).desired(&local, &[]).desired
}

fn look(kernel: &mut LinuxKernel, desired: &Desired) -> Observed {
    look_with(kernel, desired, name("flannel0"))
}

fn settle(kernel: &mut LinuxKernel, desired: &Desired) -> usize {
    settle_with(kernel, desired, &name("flannel0"))
}

fn said(args: &str) -> String {
    let output = Command::new("ip").args(args.split_whitespace()).output().expect("iproute2 is installed");
    String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
}

/// What packets meet, in iproute2's words, without what differs between a device and its successor.
fn listing() -> Vec<String> {
    let link = said("-details -oneline link show dev flannel0");
    let flags = if link.contains(",UP") || link.contains("<UP") { "up" } else { "down" };
    let group = format!("group {LINK_GROUP}");
    let words = ["mtu 1472", group.as_str(), "tun type tun", "multi_queue", "persist on", "user", "master"];
    let link: Vec<String> = words.iter().map(|word| format!("{word}: {}", link.contains(word))).collect();
    let address = said("-oneline address show dev flannel0");
    let address = address.split_once(": ").map_or(String::new(), |(_, rest)| rest.to_owned());
    let first = said("route show 10.5.0.0/16 metric 4096").lines().next().unwrap_or_default().to_owned();
    [vec![flags.into(), address, first.replace(" linkdown", "").trim_end().to_owned()], link].concat()
}

/// Packets to a peer's pod, by the kernel's own lookup.
fn way_to_a_peer() -> String {
    said("route get 10.5.2.9")
}

#[test]
fn the_device_is_made_and_then_left_alone_with_and_without_queues() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        assert!(settle(&mut kernel, &desired) >= desired.objects().count());
        assert_eq!(settle(&mut kernel, &desired), 0);
        let right = listing();
        assert_eq!(
            right,
            [
                "up",
                "flannel0    inet 10.5.1.0/32 scope global flannel0\\       valid_lft forever preferred_lft forever",
                "10.5.0.0/16 dev flannel0 proto 87 scope link",
                "mtu 1472: true",
                "group 2003134068: true",
                "tun type tun: true",
                "multi_queue: true",
                "persist on: true",
                "user: false",
                "master: false",
            ]
        );
        assert!(way_to_a_peer().contains("dev flannel0"), "{}", way_to_a_peer());
        for vnet_hdr in [true, false] {
            let queues =
                [(); 2].map(|()| until("attached", || Queue::attach(&name("flannel0"), vnet_hdr).ok()));
            assert_eq!(settle(&mut kernel, &desired), 0, "with queues, virtio header {vnet_hdr}");
            drop(queues);
            assert_eq!(settle(&mut kernel, &desired), 0, "without a carrier");
        }
        assert_eq!(listing(), right);
    });
}

/// A test beside this one that has just forked holds the queues of before until it executes something else.
fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let begin = std::time::Instant::now();
    loop {
        if let Some(done) = attempt() {
            return done;
        }
        assert!(begin.elapsed().as_secs() < 30, "never: {what}");
        std::thread::yield_now();
    }
}

/// What somebody else does to the kernel, in commands: `ip` unless they begin with `sysctl`.
const FOREIGN_HANDS: &[(&str, &[&str])] = &[
    ("device deleted", &["link del flannel0"]),
    ("device down: its route goes unannounced", &["link set flannel0 down"]),
    ("device MTU", &["link set flannel0 mtu 1400"]),
    ("device renamed", &["link set flannel0 name foreign1"]),
    ("device without our mark", &["link set flannel0 group default"]),
    ("device given up", &["tuntap del dev flannel0 mode tun multi_queue"]),
    ("a device of one queue in its place", &["link del flannel0", "tuntap add dev flannel0 mode tun"]),
    (
        "a device for frames in its place",
        &["link del flannel0", "tuntap add dev flannel0 mode tap multi_queue"],
    ),
    (
        "a device for another user in its place",
        &["link del flannel0", "tuntap add dev flannel0 mode tun multi_queue user 65534"],
    ),
    (
        "a device for another group in its place",
        &["link del flannel0", "tuntap add dev flannel0 mode tun multi_queue group 65534"],
    ),
    ("a device as ours, half made", &["link del flannel0", "tuntap add dev flannel0 mode tun multi_queue"]),
    ("a device of another kind in its place", &["link del flannel0", "link add flannel0 type bridge"]),
    ("address deleted", &["address del 10.5.1.0/32 dev flannel0"]),
    ("stale address of the overlay", &["address add 10.5.9.0/32 dev flannel0"]),
    ("address with an end", &["address change 10.5.1.0/32 dev flannel0 valid_lft 100 preferred_lft 100"]),
    (
        "address with a peer",
        &["address del 10.5.1.0/32 dev flannel0", "address add 10.5.1.0 peer 10.5.1.0/16 dev flannel0"],
    ),
    ("IPv6 on the device", &["sysctl net/ipv6/conf/flannel0/disable_ipv6 0"]),
    ("route deleted", &["route del 10.5.0.0/16"]),
    (
        "route of another metric",
        &["route del 10.5.0.0/16", "route add 10.5.0.0/16 dev flannel0 metric 9 proto 87"],
    ),
    ("route without a metric", &["route del 10.5.0.0/16", "route add 10.5.0.0/16 dev flannel0 proto 87"]),
    ("second route without a metric", &["route add 10.5.0.0/16 dev flannel0 proto 87"]),
    ("route elsewhere", &["route replace 10.5.0.0/16 via 192.0.2.44 metric 4096 proto 87"]),
    ("route of another protocol", &["route replace 10.5.0.0/16 dev flannel0 metric 4096 proto static"]),
    (
        "route with a locked MTU",
        &["route replace 10.5.0.0/16 dev flannel0 metric 4096 proto 87 mtu lock 600"],
    ),
    ("route with a source", &["route replace 10.5.0.0/16 dev flannel0 metric 4096 proto 87 src 192.0.2.1"]),
    ("route turned into a blackhole", &["route replace blackhole 10.5.0.0/16 metric 4096 proto 87"]),
    (
        "route behind a foreign one of its metric",
        &["route prepend 10.5.0.0/16 via 192.0.2.254 metric 4096 proto static"],
    ),
    ("stale route", &["route add 10.5.8.0/24 dev flannel0"]),
    ("stale route of ours", &["route add 10.5.8.0/24 via 192.0.2.8 metric 300 proto 87"]),
];

#[test]
fn every_deletion_and_every_alteration_is_seen_and_put_right() {
    let mended = |what: &str, commands: &[&str]| {
        in_namespace(|| {
            let mut kernel = LinuxKernel::open().expect("netlink");
            let desired = desired(underlay(&mut kernel));
            settle(&mut kernel, &desired);
            let right = listing();
            commands.iter().for_each(|command| strike(command));
            assert!(settle(&mut kernel, &desired) > 0, "{what}: not seen");
            assert_eq!(settle(&mut kernel, &desired), 0, "{what}: not put right");
            assert_eq!(listing(), right, "{what}");
            assert!(way_to_a_peer().contains("dev flannel0"), "{what}: {}", way_to_a_peer());
            assert_eq!(look(&mut kernel, &desired).obstacles, BTreeMap::new(), "{what}");
        });
    };
    let fails = |(what, commands): &&(&str, &[&str])| catch_unwind(|| mended(what, commands)).is_err();
    let failed: Vec<&str> = FOREIGN_HANDS.iter().filter(fails).map(|(what, _)| *what).collect();
    assert_eq!(failed, Vec::<&str>::new());
}

#[test]
fn a_device_is_repaired_under_its_queues() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        settle(&mut kernel, &desired);
        let right = listing();
        let index = |kernel: &mut LinuxKernel| kernel.links().expect("links")[&name("flannel0")].index;
        let (made, queue) = (index(&mut kernel), Queue::attach(&name("flannel0"), true).expect("attached"));
        for command in ["link set flannel0 mtu 1300", "link set flannel0 down", "link set flannel0 group 7"] {
            ip(command);
            assert!(settle(&mut kernel, &desired) > 0, "{command}");
            assert_eq!((listing(), index(&mut kernel)), (right.clone(), made), "{command}");
        }
        drop(queue);
    });
}

/// While the queue is held the device is one that goes with the process that has it, as flanneld's does.
fn flannels_device() -> Queue {
    create(&name("flannel0")).expect("created");
    let queue = Queue::attach(&name("flannel0"), true).expect("attached");
    ip("tuntap del dev flannel0 mode tun multi_queue");
    ip("address add 10.5.7.0/32 dev flannel0");
    ip("link set flannel0 up mtu 1472");
    ip("route add 10.5.0.0/16 dev flannel0");
    queue
}

#[test]
fn a_living_flanneld_keeps_its_device_and_what_it_leaves_is_taken_over_when_it_goes() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        let flanneld = flannels_device();
        let all = || [said("-details link show flannel0"), said("-4 address show"), said("route show")];
        let before = all();
        let observed = look(&mut kernel, &desired);
        assert_eq!(plan(&desired, &observed, true), vec![]);
        let said: Vec<String> = observed.obstacles.values().map(ToString::to_string).collect();
        assert!(
            said.contains(&"flannel0 is in use by another process (a running flanneld?)".into()),
            "{said:?}"
        );
        assert_eq!(settle(&mut kernel, &desired), 0);
        assert_eq!(all(), before);

        drop(flanneld);
        until("its device is gone", || {
            let links = kernel.links().expect("links");
            (!links.contains_key(&name("flannel0"))).then_some(())
        });
        assert!(settle(&mut kernel, &desired) > 0);
        assert_eq!(look(&mut kernel, &desired).obstacles, BTreeMap::new());
        assert!(way_to_a_peer().contains("dev flannel0 src 10.5.1.0"), "{}", way_to_a_peer());
    });
}

/// flanneld takes the first free name, tolerates an existing route, and has metric 0.
#[test]
fn a_flanneld_that_starts_beside_what_is_left_gets_the_packets_and_is_named() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        settle(&mut kernel, &desired);
        let _left = listing();
        create(&name("flannel1")).expect("flanneld's");
        for command in [
            "address add 10.5.1.0/32 dev flannel1",
            "link set flannel1 up mtu 1472",
            "route add 10.5.0.0/16 dev flannel1",
        ] {
            ip(command);
        }
        assert!(way_to_a_peer().contains("dev flannel1"), "{}", way_to_a_peer());
        // A weftd that runs all the same leaves it there, and says where its packets go.
        let observed = look(&mut kernel, &desired);
        assert_eq!(plan(&desired, &observed, true), vec![]);
        let named = observed.obstacles[&Key::Route("10.5.0.0/16".parse().expect("net"))].to_string();
        assert_eq!(
            named,
            "its packets take a route of somebody else's, 10.5.0.0/16 dev flannel1 proto 3 metric 0"
        );
        ip("route del 10.5.0.0/16 metric 4096");
        assert_eq!(settle(&mut kernel, &desired), 1, "ours comes back behind it");
        assert!(way_to_a_peer().contains("dev flannel1"), "{}", way_to_a_peer());
        // It exits: its device and its route go with it.
        ip("link del flannel1");
        assert!(way_to_a_peer().contains("dev flannel0"), "{}", way_to_a_peer());
        assert_eq!(look(&mut kernel, &desired).obstacles, BTreeMap::new());
    });
}

#[test]
fn what_is_not_ours_stays() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        settle(&mut kernel, &desired);
        for foreign in [
            "tuntap add dev tun7 mode tun",
            "tuntap add dev flannel3 mode tun multi_queue",
            "route add 10.5.0.0/16 via 192.0.2.254 metric 5000",
            "route add 10.5.0.0/16 via 192.0.2.254 tos 0x10",
            "route append 10.5.0.0/16 via 192.0.2.254 metric 4096",
            "route add 10.5.200.0/24 via 192.0.2.254",
            "route add 10.5.0.0/16 via 192.0.2.254 table 100",
            "address add 172.20.0.1/32 dev flannel0",
        ] {
            ip(foreign);
        }
        let all = || [said("-4 route show table all"), said("link show"), said("-4 address show")];
        let before = all();
        let observed = look(&mut kernel, &desired);
        assert_eq!((plan(&desired, &observed, true), observed.obstacles), (vec![], BTreeMap::new()));
        ip("link set flannel0 mtu 1400");
        settle(&mut kernel, &desired);
        assert_eq!(all(), before);
    });
}

#[test]
fn of_another_backend_nothing_is_left() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let index = underlay(&mut kernel);
        let (vxlan, udp) = (vxlan_desired(index), desired(index));
        let left = |kernel: &mut LinuxKernel| {
            let links = kernel.links().expect("links");
            let devices = links.into_keys().filter(|name| name.as_str().starts_with("flannel"));
            (devices.map(|name| name.to_string()).collect::<Vec<_>>(), said("route show proto 87"))
        };
        settle_with(&mut kernel, &vxlan, &name("flannel.1"));
        assert_eq!(left(&mut kernel).0, ["flannel.1"]);
        settle(&mut kernel, &udp);
        let (devices, routes) = left(&mut kernel);
        assert_eq!(devices, ["flannel0"]);
        assert_eq!(routes.lines().count(), 1, "{routes}");
        settle_with(&mut kernel, &vxlan, &name("flannel.1"));
        let (devices, routes) = left(&mut kernel);
        assert_eq!(devices, ["flannel.1"]);
        assert!(!routes.contains("flannel0") && !routes.contains("4096"), "{routes}");
    });
}

#[test]
fn who_keeps_a_device_that_is_not_ours() {
    let ours = Tun::for_queues();
    for (found, denied) in [
        (Tun { attached: true, ..ours }, false),
        (Tun { persistent: false, attached: true, ..ours }, false),
        (Tun { marked: false, attached: true, ..ours }, false),
        (Tun { marked: false, multi_queue: false, ..ours }, false),
        (Tun { marked: false, multi_queue: false, attached: true, ..ours }, true),
        (Tun { marked: false, tap: true, attached: true, ..ours }, true),
        (Tun { marked: false, persistent: false, ..ours }, true),
    ] {
        assert_eq!(ours.is_denied_by(&found), denied, "{found:?}");
    }
}
