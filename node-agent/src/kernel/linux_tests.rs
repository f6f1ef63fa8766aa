//! Against the kernel itself: every kind of object is made, altered by iproute2, seen wrong and put right.
//! Each test has a network namespace of its own; root is needed, and a refusal is a failure.

use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use weft_shared::names::VETH_GROUP;
use weft_shared::protocol::Attachment;

use super::*;
use crate::kernel::Kernel;
use crate::object::{
    AddrScope, BridgePort, Desired, Link, LinkKind, LinkMac, Object, Observed, Route, Vxlan,
};
use crate::reconcile::observe::{Ownership, observe};
use crate::reconcile::plan::plan;

/// Runs `test` in a thread with a fresh network namespace, which goes with the thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own needs root");
        test();
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(args: &str) {
    let output = Command::new("ip").args(args.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

fn bridge(args: &str) {
    let output =
        Command::new("bridge").args(args.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "bridge {args}: {}", String::from_utf8_lossy(&output.stderr));
}

fn name(text: &str) -> IfName {
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
fn underlay(kernel: &mut LinuxKernel) -> u32 {
    ip("link add eth0 type veth peer name far0");
    ip("address add 192.0.2.1/24 dev eth0");
    ip("link set eth0 up");
    ip("link set far0 up");
    ip(&format!("link add {} group {VETH_GROUP} type veth peer name pod0", veth_name()));
    let (links, _) = kernel.links_and_addrs().expect("dump");
    links[&name("eth0")].index
}

/// One object of every kind.
fn desired(underlay: u32) -> Desired {
    let dev = name("flannel.1");
    let vxlan = Vxlan {
        vni: 1,
        underlay,
        local: "192.0.2.1".parse().expect("ip"),
        port: 8472,
        learning: false,
        gbp: false,
    };
    let mac = |text: &str| text.parse().expect("mac");
    let device = Link {
        kind: LinkKind::Vxlan(vxlan),
        mac: LinkMac::Exactly(mac("02:00:00:00:00:01")),
        mtu: 1450,
        up: true,
    };
    let cni0 = Link {
        kind: LinkKind::Bridge,
        mac: LinkMac::AtCreation(mac("02:00:00:00:00:09")),
        mtu: 1450,
        up: true,
    };
    let port = BridgePort { bridge: Some(name("cni0")), hairpin: true, isolated: false, mtu: 1450, up: true };
    let overlay = Route {
        gateway: "10.5.2.0".parse().ok(),
        dev: dev.clone(),
        onlink: true,
        protocol: weft_shared::names::ROUTE_PROTOCOL,
    };
    let direct =
        Route { gateway: "192.0.2.3".parse().ok(), dev: name("eth0"), onlink: false, ..overlay.clone() };
    let mut desired = Desired::default();
    for object in [
        Object::Link { name: dev.clone(), link: device },
        Object::Link { name: name("cni0"), link: cni0 },
        Object::Sysctl { path: "net/ipv4/ip_forward".into(), value: "1".into() },
        Object::Sysctl { path: "net/ipv6/conf/flannel.1/accept_ra".into(), value: "0".into() },
        Object::Port { veth: veth_name(), port },
        Object::Addr {
            dev: dev.clone(),
            addr: "10.5.1.0/32".parse().expect("net"),
            scope: AddrScope::Global,
        },
        Object::Addr {
            dev: name("cni0"),
            addr: "10.5.1.1/24".parse().expect("net"),
            scope: AddrScope::Global,
        },
        Object::Neigh {
            dev: dev.clone(),
            ip: "10.5.2.0".parse().expect("ip"),
            mac: mac("02:00:00:00:00:02"),
        },
        Object::Fdb { dev, mac: mac("02:00:00:00:00:02"), dst: "192.0.2.2".parse().expect("ip") },
        Object::Route { dst: "10.5.2.0/24".parse().expect("net"), route: overlay },
        Object::Route { dst: "10.5.3.0/24".parse().expect("net"), route: direct },
    ] {
        desired.insert(object);
    }
    desired
}

fn look(kernel: &mut LinuxKernel, desired: &Desired) -> Observed {
    let dev = name("flannel.1");
    let dump = kernel.dump(Some(&dev)).expect("dump");
    let sysctls = kernel.sysctls(&desired.sysctl_paths()).expect("sysctls");
    let ownership = Ownership {
        networks: vec!["10.5.0.0/16".parse().expect("net")],
        subnet_len: 24,
        underlay: name("eth0"),
        device: Some(name("flannel.1")),
        bridges: vec![name("cni0")],
        adopt_flannels: false,
    };
    observe(&dump, &sysctls, desired, &ownership)
}

/// Applies until nothing is left, as a pass does; the number of operations.
fn settle(kernel: &mut LinuxKernel, desired: &Desired) -> usize {
    let mut done = 0;
    for _ in 0..4 {
        let ops = plan(desired, &look(kernel, desired), true);
        if ops.is_empty() {
            return done;
        }
        done += ops.len();
        for (op, result) in ops.iter().zip(kernel.apply(&ops)) {
            result.unwrap_or_else(|e| panic!("{}: {e}", op.key()));
        }
    }
    panic!("never settles: {:?}", plan(desired, &look(kernel, desired), true));
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

/// What somebody else does to the kernel.
type Hand = Box<dyn Fn()>;

#[test]
fn every_deletion_and_every_alteration_is_seen_and_put_right() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let desired = desired(underlay(&mut kernel));
        settle(&mut kernel, &desired);
        let veth = veth_name();
        let foreign_hands: Vec<(&str, Hand)> = vec![
            ("device deleted", Box::new(|| ip("link del flannel.1"))),
            ("device down: its routes go unannounced", Box::new(|| ip("link set flannel.1 down"))),
            ("device MTU", Box::new(|| ip("link set flannel.1 mtu 1400"))),
            ("device MAC", Box::new(|| ip("link set flannel.1 address 02:00:00:00:00:77"))),
            (
                "device made anew on another port",
                Box::new(|| {
                    ip("link del flannel.1");
                    ip("link add flannel.1 type vxlan id 1 dev eth0 local 192.0.2.1 dstport 4789 nolearning");
                }),
            ),
            (
                "a device of another kind in its place",
                Box::new(|| {
                    ip("link del flannel.1");
                    ip("link add flannel.1 type bridge");
                }),
            ),
            (
                "underlay down and up",
                Box::new(|| {
                    ip("link set eth0 down");
                    ip("link set eth0 up");
                }),
            ),
            ("bridge deleted", Box::new(|| ip("link del cni0"))),
            ("bridge down", Box::new(|| ip("link set cni0 down"))),
            ("bridge MTU", Box::new(|| ip("link set cni0 mtu 1300"))),
            (
                "forwarding off",
                Box::new(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("sysctl")),
            ),
            (
                "port without bridge",
                Box::new({
                    let v = veth.clone();
                    move || ip(&format!("link set {v} nomaster"))
                }),
            ),
            (
                "port without hairpin",
                Box::new({
                    let v = veth.clone();
                    move || ip(&format!("link set {v} type bridge_slave hairpin off"))
                }),
            ),
            (
                "port isolated",
                Box::new({
                    let v = veth.clone();
                    move || ip(&format!("link set {v} type bridge_slave isolated on"))
                }),
            ),
            (
                "port MTU",
                Box::new({
                    let v = veth.clone();
                    move || ip(&format!("link set {v} mtu 1280"))
                }),
            ),
            (
                "port down",
                Box::new({
                    let v = veth.clone();
                    move || ip(&format!("link set {v} down"))
                }),
            ),
            ("address deleted", Box::new(|| ip("address del 10.5.1.0/32 dev flannel.1"))),
            (
                "address with another scope",
                Box::new(|| {
                    // Another one stays: with its last address a device loses its routes, and that would be seen instead.
                    ip("address replace 172.20.0.9/32 dev flannel.1");
                    ip("address del 10.5.1.0/32 dev flannel.1");
                    ip("address add 10.5.1.0/32 dev flannel.1 scope link");
                }),
            ),
            ("gateway deleted", Box::new(|| ip("address del 10.5.1.1/24 dev cni0"))),
            (
                "gateway with another length",
                Box::new(|| {
                    ip("address del 10.5.1.1/24 dev cni0");
                    ip("address add 10.5.1.1/16 dev cni0");
                }),
            ),
            ("stale address of the overlay", Box::new(|| ip("address add 10.5.9.0/32 dev flannel.1"))),
            ("neighbour deleted", Box::new(|| ip("neighbour del 10.5.2.0 dev flannel.1"))),
            (
                "neighbour with another MAC",
                Box::new(|| {
                    ip("neighbour replace 10.5.2.0 lladdr 02:00:00:00:00:88 dev flannel.1 nud permanent")
                }),
            ),
            (
                "neighbour not permanent",
                Box::new(|| {
                    ip("neighbour replace 10.5.2.0 lladdr 02:00:00:00:00:02 dev flannel.1 nud stale")
                }),
            ),
            (
                "stale neighbour",
                Box::new(|| {
                    ip("neighbour add 10.5.8.0 lladdr 02:00:00:00:00:08 dev flannel.1 nud permanent")
                }),
            ),
            ("forwarding entry deleted", Box::new(|| bridge("fdb del 02:00:00:00:00:02 dev flannel.1"))),
            (
                "forwarding entry elsewhere",
                Box::new(|| {
                    bridge("fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.0.2.99 self permanent")
                }),
            ),
            (
                "stale forwarding entry",
                Box::new(|| bridge("fdb add 02:00:00:00:00:08 dev flannel.1 dst 192.0.2.8 self permanent")),
            ),
            ("route deleted", Box::new(|| ip("route del 10.5.2.0/24"))),
            ("route elsewhere", Box::new(|| ip("route replace 10.5.3.0/24 via 192.0.2.44 proto 87"))),
            ("route without onlink gateway", Box::new(|| ip("route replace 10.5.2.0/24 dev flannel.1"))),
            ("stale route", Box::new(|| ip("route add 10.5.8.0/24 via 10.5.8.0 dev flannel.1 onlink"))),
            (
                "second route to the same subnet",
                Box::new(|| ip("route append 10.5.3.0/24 via 192.0.2.45 proto 87")),
            ),
        ];
        for (what, foreign_hand) in foreign_hands {
            foreign_hand();
            assert!(settle(&mut kernel, &desired) > 0, "{what}: not seen");
            assert_eq!(settle(&mut kernel, &desired), 0, "{what}: not put right");
        }
    });
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
        let before = Command::new("ip").args(["route", "show", "table", "all"]).output().expect("ip").stdout;
        assert_eq!(plan(&desired, &look(&mut kernel, &desired), true), vec![]);
        ip("link set flannel.1 mtu 1400");
        settle(&mut kernel, &desired);
        let after = Command::new("ip").args(["route", "show", "table", "all"]).output().expect("ip").stdout;
        assert_eq!(String::from_utf8_lossy(&before), String::from_utf8_lossy(&after));
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
            let route =
                Route { gateway: gateway.parse().ok(), dev: name("eth0"), onlink: false, protocol: 87 };
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
