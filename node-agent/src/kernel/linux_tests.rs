//! Against the kernel itself: every kind of object is made, altered by iproute2, seen wrong and put right.
//! Each test has a network namespace of its own; root is needed, and a refusal is a failure.

use std::panic::catch_unwind;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use weft_shared::names::LINK_GROUP;
use weft_shared::protocol::Attachment;

use super::*;
use crate::kernel::Kernel;
use crate::object::{
    AddrForm, AddrScope, Alterations, BridgePort, Desired, FdbPath, Link, LinkKind, LinkMac, Object,
    Observed, Route, Vxlan, VxlanTuning,
};
use crate::reconcile::observe::{Ownership, PROTOCOL_KERNEL, observe};
use crate::reconcile::plan::plan;

/// Runs `test` in a thread with a fresh network namespace, which goes with the thread.
pub(in crate::kernel) fn in_namespace(test: impl FnOnce() + Send) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own needs root");
        test();
    };
    if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
        std::panic::resume_unwind(panic);
    }
}

pub(in crate::kernel) fn ip(args: &str) {
    let output = Command::new("ip").args(args.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

fn bridge(args: &str) {
    let output =
        Command::new("bridge").args(args.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "bridge {args}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(in crate::kernel) fn name(text: &str) -> IfName {
    text.parse().expect(text)
}

fn veth_name() -> IfName {
    weft_shared::names::host_ifname(&Attachment {
        network: "weft".parse().expect("name"),
        container_id: "c1".parse().expect("ID"),
        ifname: name("eth0"),
    })
}

/// eth0 with 192.0.2.1/24, and a pod's veth with our mark.
pub(super) fn underlay(kernel: &mut LinuxKernel) -> u32 {
    ip("link add eth0 type veth peer name far0");
    ip("address add 192.0.2.1/24 dev eth0");
    ip("link set eth0 up");
    ip("link set far0 up");
    ip(&format!("link add {} group {LINK_GROUP} type veth peer name pod0", veth_name()));
    ip("link set pod0 up");
    let (links, _) = kernel.links_and_addrs().expect("dump");
    links[&name("eth0")].index
}

/// One object of every kind.
pub(super) fn desired(underlay: u32) -> Desired {
    let dev = name("flannel.1");
    let vxlan = Vxlan {
        vni: 1,
        underlay,
        local: "192.0.2.1".parse().expect("ip"),
        port: 8472,
        gbp: false,
        foreign_options: Default::default(),
        tuning: VxlanTuning::with_learning(false),
    };
    let mac = |text: &str| text.parse().expect("mac");
    let device = Link {
        kind: LinkKind::Vxlan(vxlan),
        mac: LinkMac::Exactly(mac("02:00:00:00:00:01")),
        mtu: 1450,
        up: true,
        altered: Alterations::default(),
    };
    let cni0 = Link {
        kind: LinkKind::Bridge,
        mac: LinkMac::AtCreation(mac("02:00:00:00:00:09")),
        mtu: 1450,
        up: true,
        altered: Alterations::default(),
    };
    let port = BridgePort {
        bridge: Some(name("cni0")),
        hairpin: true,
        isolated: false,
        mtu: 1450,
        up: true,
        marked: true,
        altered: false,
    };
    let overlay = Route::via("10.5.2.0".parse().expect("ip"), &dev, true);
    let direct = Route::via("192.0.2.3".parse().expect("ip"), &name("eth0"), false);
    let connected = Route {
        gateway: None,
        protocol: PROTOCOL_KERNEL,
        source: "10.5.1.1".parse().ok(),
        ..Route::via("10.5.1.1".parse().expect("ip"), &name("cni0"), false)
    };
    let form = AddrForm::default();
    let mut desired = Desired::default();
    for object in [
        Object::Link { name: dev.clone(), link: device },
        Object::Link { name: name("cni0"), link: cni0 },
        Object::Sysctl { path: "net/ipv4/ip_forward".into(), value: "1".into() },
        Object::Sysctl { path: "net/ipv6/conf/flannel.1/accept_ra".into(), value: "0".into() },
        Object::BridgePort { veth: veth_name(), port },
        Object::Addr {
            dev: dev.clone(),
            addr: "10.5.1.0/32".parse().expect("net"),
            scope: AddrScope::Global,
            form,
        },
        Object::Addr {
            dev: name("cni0"),
            addr: "10.5.1.1/24".parse().expect("net"),
            scope: AddrScope::Global,
            form,
        },
        Object::Neigh {
            dev: dev.clone(),
            ip: "10.5.2.0".parse().expect("ip"),
            mac: mac("02:00:00:00:00:02"),
        },
        Object::Fdb {
            dev,
            mac: mac("02:00:00:00:00:02"),
            dst: "192.0.2.2".parse().expect("ip"),
            path: FdbPath::default(),
        },
        Object::Route { dst: "10.5.1.0/24".parse().expect("net"), route: connected },
        Object::Route { dst: "10.5.2.0/24".parse().expect("net"), route: overlay },
        Object::Route { dst: "10.5.3.0/24".parse().expect("net"), route: direct },
    ] {
        desired.insert(object);
    }
    desired
}

fn look(kernel: &mut LinuxKernel, desired: &Desired) -> Observed {
    look_with(kernel, desired, name("flannel.1"))
}

pub(super) fn look_with(kernel: &mut LinuxKernel, desired: &Desired, dev: IfName) -> Observed {
    let dump = kernel.dump(Some(&dev)).expect("dump");
    let sysctls = kernel.sysctls(&desired.sysctl_paths()).expect("sysctls");
    let ownership = Ownership {
        networks: vec!["10.5.0.0/16".parse().expect("net")],
        subnet_len: 24,
        underlay: name("eth0"),
        device: Some(dev),
        vtep_mac: "02:00:00:00:00:01".parse().expect("mac"),
        bridges: vec![name("cni0")],
        forced: Default::default(),
        adopt_flannels: false,
        indices: Default::default(),
    };
    observe(&dump, &sysctls, desired, &ownership)
}

/// Applies until nothing is left, as a pass does; the number of operations.
fn settle(kernel: &mut LinuxKernel, desired: &Desired) -> usize {
    settle_with(kernel, desired, &name("flannel.1"))
}

pub(super) fn settle_with(kernel: &mut LinuxKernel, desired: &Desired, dev: &IfName) -> usize {
    let mut done = 0;
    for _ in 0..4 {
        let ops = plan(desired, &look_with(kernel, desired, dev.clone()), true);
        if ops.is_empty() {
            return done;
        }
        done += ops.len();
        for (op, result) in ops.iter().zip(kernel.apply(&ops)) {
            result.unwrap_or_else(|e| panic!("{}: {e}", op.key()));
        }
    }
    panic!("never settles: {:?}", plan(desired, &look_with(kernel, desired, dev.clone()), true));
}

#[test]
fn every_kind_of_object_is_made_and_then_left_alone() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        assert!(settle(&mut kernel, &desired) >= desired.objects().count() - 1);
        assert_eq!(settle(&mut kernel, &desired), 0);
    });
}

/// What somebody else does to the kernel, in commands: `ip` unless they begin with `bridge` or `sysctl`. VETH is the
/// pod's port.
const FOREIGN_HANDS: &[(&str, &[&str])] = &[
    ("device deleted", &["link del flannel.1"]),
    ("device down: its routes go unannounced", &["link set flannel.1 down"]),
    ("device MTU", &["link set flannel.1 mtu 1400"]),
    ("device MAC", &["link set flannel.1 address 02:00:00:00:00:77"]),
    ("device without ARP", &["link set flannel.1 arp off"]),
    ("device held down by protocol", &["link set flannel.1 protodown on"]),
    (
        "device held down for a reason",
        &["link set flannel.1 protodown on", "link set flannel.1 protodown_reason 3 on"],
    ),
    ("device made a port", &["link add br9 type bridge", "link set flannel.1 master br9"]),
    ("device renamed", &["link set flannel.1 name foreign1"]),
    ("device learns", &["link set flannel.1 type vxlan learning"]),
    ("device TTL", &["link set flannel.1 type vxlan ttl 3"]),
    ("device TOS", &["link set flannel.1 type vxlan tos 0x10"]),
    ("device DF", &["link set flannel.1 type vxlan df set"]),
    ("device ageing", &["link set flannel.1 type vxlan ageing 20"]),
    ("device with a default destination", &["link set flannel.1 type vxlan remote 192.0.2.66"]),
    (
        "device made anew on another port",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 4789 nolearning",
        ],
    ),
    (
        "device made anew with another VNI",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 9 dev eth0 local 192.0.2.1 dstport 8472 nolearning",
        ],
    ),
    (
        "device made anew on another interface",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev far0 local 192.0.2.1 dstport 8472 nolearning",
        ],
    ),
    (
        "device made anew with another source",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.9 dstport 8472 nolearning",
        ],
    ),
    (
        "device made anew with group policy",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning gbp",
        ],
    ),
    (
        "device made anew as an ARP proxy",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning proxy",
        ],
    ),
    (
        "device made anew with route short circuit",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning rsc",
        ],
    ),
    (
        "device made anew with misses reported",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning l2miss l3miss",
        ],
    ),
    (
        "device made anew for few addresses",
        &[
            "link del flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 8472 nolearning maxaddress 1",
        ],
    ),
    (
        "device made anew for metadata",
        &["link del flannel.1", "link add flannel.1 type vxlan external dstport 8472"],
    ),
    ("a device of another kind in its place", &["link del flannel.1", "link add flannel.1 type bridge"]),
    ("underlay down and up", &["link set eth0 down", "link set eth0 up"]),
    ("bridge deleted", &["link del cni0"]),
    ("bridge down", &["link set cni0 down"]),
    ("bridge MTU", &["link set cni0 mtu 1300"]),
    ("bridge without ARP", &["link set cni0 arp off"]),
    ("bridge renamed", &["link set cni0 name foreign0"]),
    ("bridge with spanning tree", &["link set cni0 type bridge stp_state 1"]),
    ("bridge that floods everything", &["link set cni0 type bridge ageing_time 0"]),
    ("forwarding off", &["sysctl net/ipv4/ip_forward 0"]),
    ("port without bridge", &["link set VETH nomaster"]),
    ("port on another bridge", &["link add br9 type bridge", "link set VETH master br9"]),
    ("port without hairpin", &["link set VETH type bridge_slave hairpin off"]),
    ("port isolated", &["link set VETH type bridge_slave isolated on"]),
    ("port not learning", &["link set VETH type bridge_slave learning off"]),
    ("port without unknown unicast", &["link set VETH type bridge_slave flood off"]),
    ("port without broadcast", &["link set VETH type bridge_slave bcast_flood off"]),
    ("port without multicast", &["link set VETH type bridge_slave mcast_flood off"]),
    ("port with BPDU guard", &["link set VETH type bridge_slave guard on"]),
    ("port never root", &["link set VETH type bridge_slave root_block on"]),
    ("port suppressing neighbours", &["link set VETH type bridge_slave neigh_suppress on"]),
    ("port proxying ARP", &["link set VETH type bridge_slave proxy_arp on"]),
    ("port locked", &["link set VETH type bridge_slave locked on"]),
    ("port MTU", &["link set VETH mtu 1280"]),
    ("port down", &["link set VETH down"]),
    ("port without our mark", &["link set VETH group 0"]),
    ("address deleted", &["address del 10.5.1.0/32 dev flannel.1"]),
    (
        "address with another scope",
        // Another one stays: with its last address a device loses its routes, and that would be seen instead.
        &[
            "address replace 172.20.0.9/32 dev flannel.1",
            "address del 10.5.1.0/32 dev flannel.1",
            "address add 10.5.1.0/32 dev flannel.1 scope link",
        ],
    ),
    ("address with an end", &["address change 10.5.1.0/32 dev flannel.1 valid_lft 100 preferred_lft 100"]),
    ("gateway deleted", &["address del 10.5.1.1/24 dev cni0"]),
    (
        "gateway with another length",
        &["address del 10.5.1.1/24 dev cni0", "address add 10.5.1.1/16 dev cni0"],
    ),
    (
        "gateway with a peer",
        &["address del 10.5.1.1/24 dev cni0", "address add 10.5.1.1 peer 10.5.77.1/24 dev cni0"],
    ),
    (
        "gateway without its connected route",
        &["address del 10.5.1.1/24 dev cni0", "address add 10.5.1.1/24 dev cni0 noprefixroute"],
    ),
    (
        "gateway with a costly connected route",
        &["address del 10.5.1.1/24 dev cni0", "address add 10.5.1.1/24 dev cni0 metric 77"],
    ),
    (
        "gateway second to another",
        &[
            "address del 10.5.1.1/24 dev cni0",
            "address add 10.5.1.7/24 dev cni0",
            "address add 10.5.1.1/24 dev cni0",
        ],
    ),
    ("connected route deleted", &["route del 10.5.1.0/24 dev cni0"]),
    ("connected route elsewhere", &["route replace 10.5.1.0/24 via 192.0.2.44"]),
    ("stale address of the overlay", &["address add 10.5.9.0/32 dev flannel.1"]),
    ("neighbour deleted", &["neighbour del 10.5.2.0 dev flannel.1"]),
    (
        "neighbour with another MAC",
        &["neighbour replace 10.5.2.0 lladdr 02:00:00:00:00:88 dev flannel.1 nud permanent"],
    ),
    (
        "neighbour not permanent",
        &["neighbour replace 10.5.2.0 lladdr 02:00:00:00:00:02 dev flannel.1 nud stale"],
    ),
    (
        "neighbour unquestioned",
        &["neighbour replace 10.5.2.0 lladdr 02:00:00:00:00:88 dev flannel.1 nud noarp"],
    ),
    ("stale neighbour", &["neighbour add 10.5.8.0 lladdr 02:00:00:00:00:08 dev flannel.1 nud permanent"]),
    ("forwarding entry deleted", &["bridge fdb del 02:00:00:00:00:02 dev flannel.1"]),
    (
        "forwarding entry elsewhere",
        &["bridge fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.0.2.99 self permanent"],
    ),
    (
        "forwarding entry to another port",
        &["bridge fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.0.2.2 port 4789 self permanent"],
    ),
    (
        "forwarding entry to another VNI",
        &["bridge fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.0.2.2 vni 99 self permanent"],
    ),
    (
        "forwarding entry through an interface",
        &["bridge fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.0.2.2 via far0 self permanent"],
    ),
    (
        "forwarding entry that ages",
        &["bridge fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.0.2.2 self dynamic"],
    ),
    (
        "forwarding entry through a nexthop object",
        &[
            "nexthop add id 12 via 192.0.2.99 fdb",
            "nexthop add id 102 group 12 fdb",
            "bridge fdb del 02:00:00:00:00:02 dev flannel.1",
            "bridge fdb add 02:00:00:00:00:02 dev flannel.1 nhid 102 self permanent",
        ],
    ),
    (
        "stale forwarding entry",
        &["bridge fdb add 02:00:00:00:00:08 dev flannel.1 dst 192.0.2.8 self permanent"],
    ),
    ("route deleted", &["route del 10.5.2.0/24"]),
    ("route elsewhere", &["route replace 10.5.3.0/24 via 192.0.2.44 proto 87"]),
    ("route without onlink gateway", &["route replace 10.5.2.0/24 dev flannel.1"]),
    ("route with a locked MTU", &["route replace 10.5.3.0/24 via 192.0.2.3 dev eth0 proto 87 mtu lock 600"]),
    ("route with a window", &["route replace 10.5.3.0/24 via 192.0.2.3 dev eth0 proto 87 window 1000"]),
    ("route with a source", &["route replace 10.5.3.0/24 via 192.0.2.3 dev eth0 proto 87 src 10.5.1.0"]),
    ("route of another scope", &["route replace 10.5.3.0/24 dev eth0 proto 87 scope link"]),
    ("route turned into a blackhole", &["route replace blackhole 10.5.3.0/24 proto 87"]),
    ("route turned into a foreign blackhole", &["route replace blackhole 10.5.3.0/24"]),
    (
        "route over several hops",
        &["route replace 10.5.3.0/24 proto 87 nexthop via 192.0.2.3 dev eth0 nexthop via 192.0.2.4 dev eth0"],
    ),
    (
        "route through a nexthop object",
        &["nexthop add id 7 via 192.0.2.5 dev eth0", "route replace 10.5.3.0/24 nhid 7 proto 87"],
    ),
    (
        "route with a metric",
        &["route del 10.5.3.0/24", "route add 10.5.3.0/24 via 192.0.2.3 metric 9 proto 87"],
    ),
    ("route with a TOS", &["route del 10.5.3.0/24", "route add 10.5.3.0/24 via 192.0.2.3 tos 0x10 proto 87"]),
    ("route of another protocol", &["route replace 10.5.3.0/24 via 192.0.2.3 dev eth0 proto static"]),
    ("route behind a foreign one", &["route prepend 10.5.3.0/24 via 192.0.2.254 proto static"]),
    ("route behind a foreign blackhole", &["route prepend blackhole 10.5.3.0/24"]),
    (
        "route wrong, and behind a foreign one",
        &["route replace 10.5.3.0/24 via 192.0.2.44 proto 87", "route prepend 10.5.3.0/24 via 192.0.2.253"],
    ),
    ("stale route", &["route add 10.5.8.0/24 via 10.5.8.0 dev flannel.1 onlink"]),
    ("stale route with a metric", &["route add 10.5.8.0/24 via 192.0.2.8 metric 300 proto 87"]),
    ("stale blackhole", &["route add blackhole 10.5.8.0/24 proto 87"]),
    (
        "stale route over several hops",
        &["route add 10.5.8.0/24 proto 87 nexthop via 192.0.2.3 nexthop via 192.0.2.4"],
    ),
    ("second route to the same subnet", &["route append 10.5.3.0/24 via 192.0.2.45 proto 87"]),
];

pub(super) fn strike(command: &str) {
    let command = command.replace("VETH", veth_name().as_str());
    if let Some(words) = command.strip_prefix("bridge ") {
        bridge(words);
    } else if let Some((path, value)) = command.strip_prefix("sysctl ").and_then(|w| w.split_once(' ')) {
        std::fs::write(format!("/proc/sys/{path}"), value).expect("sysctl");
    } else {
        ip(&command);
    }
}

#[test]
fn every_deletion_and_every_alteration_is_seen_and_put_right() {
    let mended = |what: &str, commands: &[&str]| {
        in_namespace(|| {
            let mut kernel = LinuxKernel::open().expect("netlink");
            let desired = desired(underlay(&mut kernel));
            settle(&mut kernel, &desired);
            let right = listing_once_running();
            commands.iter().for_each(|command| strike(command));
            assert!(settle(&mut kernel, &desired) > 0, "{what}: not seen");
            assert_eq!(settle(&mut kernel, &desired), 0, "{what}: not put right");
            // The kernel's own words, so that what the dump leaves out counts as well.
            let now = listing_once_running();
            let missing: Vec<&String> = right.iter().filter(|line| !now.contains(line)).collect();
            assert_eq!(missing, Vec::<&String>::new(), "{what}: now {now:#?}");
        });
    };
    // One run shows everything.
    let fails = |(what, commands): &&(&str, &[&str])| catch_unwind(|| mended(what, commands)).is_err();
    let failed: Vec<&str> = FOREIGN_HANDS.iter().filter(fails).map(|(what, _)| *what).collect();
    assert_eq!(failed, Vec::<&str>::new());
}

/// The bridge enables its port when the kernel's link watch has told it of the carrier.
fn listing_once_running() -> Vec<String> {
    let begin = std::time::Instant::now();
    loop {
        let listing = listing();
        if listing.iter().any(|line| line.contains("bridge_slave state forwarding")) {
            return listing;
        }
        assert!(begin.elapsed().as_secs() < 30, "the port never forwards: {listing:#?}");
    }
}

/// What packets meet, in iproute2's words, without what differs between a device and its successor and without the
/// kernel's timers.
fn listing() -> Vec<String> {
    const RESTLESS: [&str; 11] = [
        "state",
        "root_id",
        "designated",
        "timer",
        "tcn",
        "hello",
        "gc",
        "port_id",
        "port_no",
        "topology",
        "cost",
    ];
    let veth = veth_name();
    let lines = |program: &str, args: &str| {
        let output =
            Command::new(program).args(args.split_whitespace()).output().expect("iproute2 is installed");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.lines().map(|line| line.replace(" linkdown", "").trim_end().to_owned()).collect::<Vec<_>>()
    };
    let steady = |line: String| {
        let mut words = line.split_whitespace().skip(1);
        let mut kept = Vec::new();
        let mut is_port = false;
        while let Some(word) = words.next() {
            is_port |= word == "bridge_slave";
            let is_restless = RESTLESS.iter().any(|r| word.contains(r)) && !(is_port && word == "state");
            if is_restless {
                words.next();
            } else if word.starts_with('<') {
                kept.push(if word.contains("NOARP") { "NOARP" } else { "ARP" });
                kept.push(if word.contains(",UP") { "UP" } else { "DOWN" });
            } else {
                kept.push(word);
            }
        }
        kept.join(" ")
    };
    let devices = ["flannel.1", "cni0", veth.as_str()];
    let first_routes = ["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"]
        .into_iter()
        .flat_map(|dst| lines("ip", &format!("route show {dst}")).into_iter().take(1));
    first_routes
        .chain(
            devices
                .into_iter()
                .flat_map(|dev| lines("ip", &format!("-details -oneline link show {dev}")))
                .map(steady),
        )
        .chain(lines("ip", "neighbour show dev flannel.1 nud permanent"))
        .chain(lines("bridge", "fdb show dev flannel.1").into_iter().filter(|line| line.contains("dst")))
        .chain(lines("ip", "-oneline address show dev flannel.1").into_iter().map(unnumbered))
        .chain(lines("ip", "-oneline address show dev cni0").into_iter().map(unnumbered))
        .filter(|line| !line.contains("fe80"))
        .collect()
}

/// Without the index of the device.
fn unnumbered(line: String) -> String {
    line.split_once(": ").map_or(line.clone(), |(_, rest)| rest.to_owned())
}

#[test]
fn what_is_not_ours_stays() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        settle(&mut kernel, &desired);
        for foreign in [
            "route add 172.16.0.0/12 via 192.0.2.254",
            "route add 10.5.200.0/24 via 192.0.2.254 metric 50",
            "route add 10.5.201.0/24 via 192.0.2.254",
            "route append 10.5.3.0/24 via 192.0.2.254",
            "route add 10.5.2.0/24 via 192.0.2.254 table 100",
            "route add blackhole 10.5.202.0/24",
            "address add 172.20.0.1/32 dev flannel.1",
            "address add 10.9.0.1/24 dev cni0",
            "neighbour add 192.0.2.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
            "neighbour add 10.5.1.9 lladdr 02:00:00:00:00:79 dev cni0 nud permanent",
        ] {
            ip(foreign);
        }
        // Not IPv6's, which the kernel adds by itself.
        let routes = || {
            let output = Command::new("ip").args(["-4", "route", "show", "table", "all"]).output();
            String::from_utf8(output.expect("ip").stdout).expect("UTF-8")
        };
        let before = routes();
        assert_eq!(plan(&desired, &look(&mut kernel, &desired), true), vec![]);
        ip("link set flannel.1 mtu 1400");
        settle(&mut kernel, &desired);
        assert_eq!(before, routes());
    });
}

#[test]
fn a_route_of_an_operator_to_a_peers_subnet_is_overruled_not_replaced() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        ip("route add 10.5.3.0/24 via 192.0.2.254");
        settle(&mut kernel, &desired);
        let routes = Command::new("ip").args(["route", "show", "10.5.3.0/24"]).output().expect("ip").stdout;
        let routes = String::from_utf8_lossy(&routes).into_owned();
        let first = routes.lines().next().unwrap_or_default();
        assert!(first.contains("via 192.0.2.3") && routes.contains("via 192.0.2.254"), "{routes}");
    });
}

#[test]
fn failures_belong_to_their_operation_however_large_the_batch() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        underlay(&mut kernel);
        let route = |n: u32| {
            // Every tenth gateway lies on no link: the kernel refuses it (ENETUNREACH).
            let gateway = if n % 10 == 3 { "198.51.100.1" } else { "192.0.2.3" };
            let dst = format!("10.{}.{}.0/24", n / 256, n % 256);
            let route = Route::via(gateway.parse().expect("ip"), &name("eth0"), false);
            Op::Set { object: Object::Route { dst: dst.parse().expect("net"), route }, found: None }
        };
        let ops: Vec<Op> = (0..1000).map(route).collect();
        for (n, result) in kernel.apply(&ops).into_iter().enumerate() {
            let expected =
                if n % 10 == 3 { Err(KernelError::Refused(Errno(nix::libc::ENETUNREACH))) } else { Ok(()) };
            assert_eq!(result, expected, "operation {n}");
        }
        let routes = kernel.dump(None).expect("dump").routes;
        assert_eq!(routes.iter().filter(|(_, r)| r.protocol == 87).count(), 900);
    });
}

#[test]
fn only_a_veth_with_our_mark_is_deleted() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        underlay(&mut kernel);
        ip("link add vethaaaaaaaaaaa type veth peer name other0");
        assert_eq!(kernel.delete_veth(&name("vethaaaaaaaaaaa")), Ok(false), "the name alone is not our mark");
        assert_eq!(kernel.delete_veth(&veth_name()), Ok(true));
        assert_eq!(kernel.delete_veth(&veth_name()), Ok(false));
        let (links, _) = kernel.links_and_addrs().expect("dump");
        assert!(links.contains_key(&name("vethaaaaaaaaaaa")) && !links.contains_key(&name("pod0")));
    });
}

/// The kernel waits long before it frees them; who has deleted them goes on before.
#[test]
fn neither_end_of_a_deleted_veth_can_be_found_or_used() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        underlay(&mut kernel);
        for round in 0..20 {
            let pod = std::net::UdpSocket::bind("0.0.0.0:0").expect("socket");
            if round > 0 {
                ip(&format!("link add {} group {LINK_GROUP} type veth peer name pod0", veth_name()));
            }
            ip("addr add 203.0.113.1/24 dev pod0");
            ip(&format!("link set {} up", veth_name()));
            ip("link set pod0 up");
            pod.send_to(b"alive", "203.0.113.2:9").expect("a route by the pod's end");
            let index = kernel.links_and_addrs().expect("dump").0[&veth_name()].index;
            assert_eq!(kernel.delete_veths(&veth_name(), Some(index)), Ok(()));
            let refused = pod.send_to(b"dead", "203.0.113.2:9").expect_err("no route").kind();
            assert_eq!(refused, std::io::ErrorKind::NetworkUnreachable);
            let (links, addrs) = kernel.links_and_addrs().expect("dump");
            assert!(!links.contains_key(&veth_name()) && !links.contains_key(&name("pod0")), "{links:?}");
            assert!(!addrs.iter().any(|found| found.addr.to_string().starts_with("203.")), "{addrs:?}");
            assert_eq!(kernel.link_exists(index), Ok(false));
        }
    });
}

#[test]
fn a_renamed_veth_is_deleted_by_its_index_and_one_without_our_mark_is_named() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        underlay(&mut kernel);
        let index = kernel.links_and_addrs().expect("dump").0[&veth_name()].index;
        ip(&format!("link set {} name renamed0", veth_name()));
        ip("link set renamed0 group 0");
        assert_eq!(kernel.delete_veth_of(index), Err(KernelError::Unmarked(name("renamed0"))));
        ip(&format!("link set renamed0 group {LINK_GROUP}"));
        assert_eq!(kernel.delete_veth_of(index), Ok(()));
        assert_eq!(kernel.delete_veth_of(index), Ok(()), "it is gone");
        let bridge = kernel.links_and_addrs().expect("dump").0[&name("eth0")].index;
        assert_eq!(kernel.delete_veth_of(bridge + 100), Ok(()), "there never was one");
    });
}

#[test]
fn on_link_is_the_kernels_own_answer() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        underlay(&mut kernel);
        ip("route add 203.0.113.0/24 via 192.0.2.254");
        ip("route add 192.0.2.128/25 via 192.0.2.254");
        let peers = ["192.0.2.2", "192.0.2.200", "203.0.113.5", "8.8.8.8"].map(|ip| ip.parse().expect("ip"));
        let on_link = kernel.on_link(&name("eth0"), &peers.into()).expect("lookup");
        assert_eq!(
            on_link,
            ["192.0.2.2".parse().expect("ip")].into(),
            "a more specific route goes elsewhere"
        );
    });
}

#[test]
fn a_dump_that_races_with_changes_is_complete_or_an_error() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        underlay(&mut kernel);
        let route = |n: u32| {
            let dst = format!("10.{}.{}.0/24", n / 256, n % 256).parse().expect("net");
            let route = Route::via("192.0.2.3".parse().expect("ip"), &name("eth0"), false);
            Op::Set { object: Object::Route { dst, route }, found: None }
        };
        const ROUTES: u32 = 2000;
        let made = kernel.apply(&(0..ROUTES).map(route).collect::<Vec<_>>());
        assert!(made.iter().all(Result::is_ok));
        // A list of links in one datagram cannot race.
        (0..50).for_each(|n| ip(&format!("link add many{n} type bridge")));
        let mut indices = kernel.indices.clone();
        let over = std::sync::atomic::AtomicBool::new(false);
        let (mut looks, begin) = (0, std::time::Instant::now());
        thread::scope(|scope| {
            // In this thread's namespace: routes that come and go as fast as the kernel does it.
            scope.spawn(|| {
                let mut socket = RouteSocket::open().expect("netlink");
                let route = Route::via("192.0.2.3".parse().expect("ip"), &name("eth0"), false);
                let object = Object::Route { dst: "10.99.0.0/24".parse().expect("net"), route };
                let link = Link {
                    kind: LinkKind::Bridge,
                    mac: LinkMac::AtCreation("02:00:00:00:00:0b".parse().expect("mac")),
                    mtu: 1500,
                    up: false,
                    altered: Alterations::default(),
                };
                let bridge = Object::Link { name: name("br7"), link };
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for object in [&object, &bridge] {
                        let set = Op::Set { object: object.clone(), found: None };
                        for result in apply::apply(
                            &mut socket,
                            &mut indices,
                            &mut Firewall::default(),
                            std::path::Path::new(weft_shared::names::SYSCTL_DIR),
                            &[set, Op::Remove(object.clone())],
                        ) {
                            result.expect("the kernel takes it");
                        }
                    }
                }
            });
            // Where they share a core with others, dump and change seldom meet.
            let enough =
                |races: u64, seconds: u64| races >= 5 || seconds >= 30 && races > 0 || seconds >= 180;
            while !enough(kernel.socket.repeated_dumps, begin.elapsed().as_secs()) {
                looks += 1;
                match kernel.dump(None) {
                    Ok(dump) => {
                        let ours =
                            dump.routes.iter().filter(|(dst, _)| dst.addr().to_string() != "10.99.0.0");
                        assert_eq!(ours.filter(|(_, r)| r.protocol == 87).count(), ROUTES as usize);
                        assert!(
                            dump.links.contains_key(&name("eth0")) && dump.links.contains_key(&veth_name())
                        );
                    }
                    Err(KernelError::Interrupted(_)) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(kernel.socket.repeated_dumps > 0, "no dump raced in {looks} looks");
    });
}
