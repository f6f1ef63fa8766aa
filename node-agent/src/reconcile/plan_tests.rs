//! Properties of planning against a kernel in memory: random worlds, random faults.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use weft_shared::names::{LINK_GROUP, ROUTE_PROTOCOL, host_ifname};
use weft_shared::protocol::Attachment;
use weft_shared::{IfName, Mac, Subnet};

use super::*;
use crate::kernel::Kernel;
use crate::kernel::fake::{FakeKernel, found_addr};
use crate::object::{
    AddrForm, AddrScope, BridgePort, FdbPath, Link, LinkKind, LinkMac, Route, RouteForm, Vxlan, VxlanTuning,
};
use crate::reconcile::observe::{Ownership, PROTOCOL_KERNEL, observe};

fn name(text: &str) -> IfName {
    text.parse().expect(text)
}

fn device() -> IfName {
    name("flannel.1")
}

fn device_link(mtu: u32, port: u16) -> Link {
    let vxlan = Vxlan {
        vni: 1,
        underlay: 3,
        local: Ipv4Addr::new(192, 0, 2, 1).into(),
        port,
        gbp: false,
        foreign_options: Default::default(),
        tuning: VxlanTuning::with_learning(false),
    };
    Link {
        kind: LinkKind::Vxlan(vxlan),
        mac: LinkMac::Exactly(mac(1)),
        mtu,
        up: true,
        altered: Default::default(),
    }
}

fn mac(n: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, n])
}

fn public(n: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, n).into()
}

/// How a peer is reached: its MAC and address by the tunnel, its address alone by a plain route.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Tunnel(u8, u8),
    Direct(u8),
}

fn subnet(n: u8, v6: bool) -> Subnet {
    if v6 { format!("fd00:5:{n:x}::/64") } else { format!("10.5.{n}.0/24") }.parse().expect("net")
}

/// The entries of peer `n` in one family.
fn entries(n: u8, v6: bool, way: Way) -> Vec<Object> {
    let subnet = subnet(n, v6);
    match way {
        Way::Tunnel(vtep, address) => vec![
            Object::Fdb { dev: device(), mac: mac(vtep), dst: public(address), path: FdbPath::default() },
            Object::Neigh { dev: device(), ip: subnet.addr(), mac: mac(vtep) },
            Object::Route { dst: subnet, route: Route::via(subnet.addr(), &device(), true) },
        ],
        Way::Direct(address) => {
            vec![Object::Route { dst: subnet, route: Route::via(public(address), &name("eth0"), false) }]
        }
    }
}

type Peers = BTreeMap<(u8, bool), Way>;

fn peers() -> impl Strategy<Value = Peers> {
    let way = prop_oneof![
        3 => (10..40_u8, 50..90_u8).prop_map(|(vtep, address)| Way::Tunnel(vtep, address)),
        1 => (50..90_u8).prop_map(Way::Direct),
    ];
    prop::collection::btree_map((2..9_u8, any::<bool>()), way, 0..8)
}

/// Two pods' ports, by the names that the plugin gives.
fn veths() -> Vec<IfName> {
    let veth = |id: &str| {
        host_ifname(&Attachment {
            network: name("weft").to_string().parse().expect("network"),
            container_id: id.parse().expect("ID"),
            ifname: name("eth0"),
        })
    };
    vec![veth("c1"), veth("c2")]
}

fn desired(peers: &Peers, mtu: u32, port: u16) -> Desired {
    let mut desired = Desired::default();
    let link = Link {
        kind: LinkKind::Bridge,
        mac: LinkMac::AtCreation(mac(9)),
        mtu,
        up: true,
        altered: Default::default(),
    };
    let connected = Route {
        gateway: None,
        protocol: PROTOCOL_KERNEL,
        source: "10.5.1.1".parse().ok(),
        ..Route::via(public(1), &name("cni0"), false)
    };
    let (scope, form) = (AddrScope::Global, AddrForm::default());
    for object in [
        Object::Link { name: device(), link: device_link(mtu, port) },
        Object::Link { name: name("cni0"), link },
        Object::Sysctl { path: "net/ipv4/ip_forward".into(), value: "1".into() },
        Object::Addr { dev: device(), addr: "10.5.1.0/32".parse().expect("net"), scope, form },
        Object::Addr { dev: name("cni0"), addr: "10.5.1.1/24".parse().expect("net"), scope, form },
        Object::Route { dst: "10.5.1.0/24".parse().expect("net"), route: connected },
        Object::Route { dst: "10.5.0.0/16".parse().expect("net"), route: with_metric() },
    ] {
        desired.insert(object);
    }
    for veth in veths() {
        let port = BridgePort {
            bridge: Some(name("cni0")),
            hairpin: true,
            isolated: false,
            mtu,
            up: true,
            marked: true,
            altered: false,
        };
        desired.insert(Object::BridgePort { veth, port });
    }
    for ((n, v6), way) in peers {
        entries(*n, *v6, *way).into_iter().for_each(|object| desired.insert(object));
    }
    desired
}

/// A wanted route that is not in the plain slot, as the udp backend has one.
fn with_metric() -> Route {
    let form = RouteForm { metric: Some(4096), ..RouteForm::default() };
    Route { gateway: None, form, ..Route::via(public(1), &device(), false) }
}

fn ownership() -> Ownership {
    Ownership {
        networks: vec!["10.5.0.0/16".parse().expect("net"), "fd00:5::/32".parse().expect("net")],
        subnet_len: 24,
        underlay: name("eth0"),
        device: Some(device()),
        vtep_mac: mac(1),
        bridges: vec![name("cni0")],
        forced: BTreeSet::new(),
        adopt_flannels: false,
        // As `kernel_after` makes them.
        indices: veths().into_iter().zip(4..).collect(),
    }
}

fn look(kernel: &mut FakeKernel, desired: &Desired) -> Observed {
    let dump = kernel.dump(Some(&device())).expect("the fake always answers");
    let sysctls = kernel.sysctls(&desired.sysctl_paths()).expect("the fake always answers");
    observe(&dump, &sysctls, desired, &ownership())
}

/// A kernel left behind by an earlier world: other peers, an older device, and an operator's own things.
fn kernel_after(before: &Peers, mtu: u32, port: u16, foreign: bool) -> FakeKernel {
    let mut kernel = FakeKernel::with_underlay("eth0");
    for veth in veths() {
        let link = Link {
            kind: LinkKind::Other("veth".into()),
            mac: LinkMac::Exactly(mac(5)),
            mtu,
            up: true,
            altered: Default::default(),
        };
        kernel.add_link(veth, link, LINK_GROUP);
    }
    let old = desired(before, mtu, port);
    let ops = plan(&old, &Observed::default(), true);
    assert!(kernel.apply(&ops).iter().all(Result::is_ok));
    settle(&mut kernel, &old, 3);
    if foreign {
        kernel.dump.routes.extend(foreign_routes());
        kernel.dump.addrs.push(found_addr(&device(), "172.20.0.1/32".parse().expect("net")));
    }
    kernel.applied.clear();
    kernel
}

/// Routes of an operator: one beside ours, one to the very subnet of a possible peer, one before ours to the network.
fn foreign_routes() -> Vec<(Subnet, Route)> {
    let via = |dst: &str| {
        let route = Route { protocol: 4, ..Route::via(public(254), &name("eth0"), false) };
        (dst.parse().expect(dst), route)
    };
    vec![via("172.16.0.0/12"), via("10.5.3.0/24"), via("10.5.0.0/16")]
}

fn settle(kernel: &mut FakeKernel, desired: &Desired, rounds: usize) -> Vec<Op> {
    for _ in 0..rounds {
        let ops = plan(desired, &look(kernel, desired), true);
        if ops.is_empty() {
            return ops;
        }
        kernel.apply(&ops);
    }
    plan(desired, &look(kernel, desired), true)
}

/// What a foreign hand does; the number chooses among what is there.
#[derive(Debug, Clone, Copy)]
enum Hand {
    DeleteRoute(usize),
    DeleteNeigh(usize),
    DeleteFdb(usize),
    DeleteAddr(usize),
    DeleteLink(usize),
    RenameLink(usize),
    AlterLink(usize),
    AlterPort(usize),
    Unmark(usize),
    NeighMac(usize),
    FdbPort(usize),
    SecondFdb(usize),
    RouteMetrics(usize),
    RouteMetric(usize),
    Blackhole(usize),
    SecondRoute(usize),
    ForeignInFront(usize),
    ForeignReplaces(usize),
    AddrForm(usize),
    StrayAddr(u8),
}

fn hands() -> impl Strategy<Value = Vec<Hand>> {
    let any_place = 0..40_usize;
    let hand = (0..20_u8, any_place).prop_map(|(which, n)| match which {
        0 => Hand::DeleteRoute(n),
        1 => Hand::DeleteNeigh(n),
        2 => Hand::DeleteFdb(n),
        3 => Hand::DeleteAddr(n),
        4 => Hand::DeleteLink(n),
        5 => Hand::RenameLink(n),
        6 => Hand::AlterLink(n),
        7 => Hand::AlterPort(n),
        8 => Hand::Unmark(n),
        9 => Hand::NeighMac(n),
        10 => Hand::FdbPort(n),
        11 => Hand::SecondFdb(n),
        12 => Hand::RouteMetrics(n),
        13 => Hand::RouteMetric(n),
        14 => Hand::Blackhole(n),
        15 => Hand::SecondRoute(n),
        16 => Hand::ForeignInFront(n),
        17 => Hand::ForeignReplaces(n),
        18 => Hand::AddrForm(n),
        _ => Hand::StrayAddr(n as u8),
    });
    prop::collection::vec(hand, 0..12)
}

fn chosen<T>(list: &mut [T], n: usize) -> Option<&mut T> {
    let len = list.len();
    list.get_mut(n.checked_rem(len)?)
}

fn take<T>(list: &mut Vec<T>, n: usize) -> Option<T> {
    n.checked_rem(list.len()).map(|at| list.remove(at))
}

fn is_ours(route: &Route) -> bool {
    route.protocol == ROUTE_PROTOCOL
}

fn strike(kernel: &mut FakeKernel, hand: Hand) {
    let ours = [device(), name("cni0")];
    let dump = &mut kernel.dump;
    let mut our_routes: Vec<usize> =
        (0..dump.routes.len()).filter(|at| is_ours(&dump.routes[*at].1)).collect();
    let foreign = Route { protocol: 4, ..Route::via(public(253), &name("eth0"), false) };
    match hand {
        Hand::DeleteRoute(n) => drop(take(&mut our_routes, n).map(|at| dump.routes.remove(at))),
        Hand::DeleteNeigh(n) => drop(take(&mut dump.neighs, n)),
        Hand::DeleteFdb(n) => drop(take(&mut dump.fdb, n)),
        Hand::DeleteAddr(n) => {
            let mut at: Vec<usize> =
                (0..dump.addrs.len()).filter(|at| ours.contains(&dump.addrs[*at].dev)).collect();
            drop(take(&mut at, n).map(|at| dump.addrs.remove(at)));
        }
        Hand::DeleteLink(n) => kernel.delete_link(&ours[n % 2]),
        Hand::RenameLink(n) => {
            let all: Vec<IfName> = ours.into_iter().chain(veths()).collect();
            kernel.rename_link(&all[n % all.len()], &name(&format!("foreign{n}")));
        }
        Hand::AlterLink(n) => {
            if let Some(found) = dump.links.get_mut(&ours[n % 2]) {
                found.link.altered.noarp = true;
                found.link.mtu = 1300;
            }
        }
        Hand::AlterPort(n) => {
            if let Some(found) = dump.links.get_mut(&veths()[n % 2]) {
                found.port.altered = true;
            }
        }
        Hand::Unmark(n) => {
            if let Some(found) = dump.links.get_mut(&veths()[n % 2]) {
                (found.group, found.port.marked) = (0, false);
            }
        }
        Hand::NeighMac(n) => drop(chosen(&mut dump.neighs, n).map(|entry| entry.2 = mac(200))),
        Hand::FdbPort(n) => drop(chosen(&mut dump.fdb, n).map(|entry| entry.3.port = Some(4789))),
        Hand::SecondFdb(n) => {
            if let Some((dev, mac, ..)) = chosen(&mut dump.fdb, n).cloned() {
                dump.fdb.insert(0, (dev, mac, public(99), FdbPath::default()));
            }
        }
        Hand::RouteMetrics(n) => {
            if let Some(at) = take(&mut our_routes, n) {
                dump.routes[at].1.form.extras = true;
            }
        }
        Hand::RouteMetric(n) => {
            if let Some(at) = take(&mut our_routes, n) {
                dump.routes[at].1.form.metric = Some(77);
            }
        }
        Hand::Blackhole(n) => {
            if let Some(at) = take(&mut our_routes, n) {
                let form = RouteForm { kind: Some(6), ..RouteForm::default() };
                dump.routes[at].1 =
                    Route { gateway: None, dev: None, onlink: false, form, ..foreign.clone() };
                dump.routes[at].1.protocol = ROUTE_PROTOCOL;
            }
        }
        Hand::SecondRoute(n) => {
            if let Some(at) = take(&mut our_routes, n) {
                let dst = dump.routes[at].0;
                dump.routes.push((dst, Route::via(public(252), &name("eth0"), false)));
            }
        }
        Hand::ForeignInFront(n) => {
            if let Some(at) = take(&mut our_routes, n) {
                let dst = dump.routes[at].0;
                if !dump.routes.contains(&(dst, foreign.clone())) {
                    dump.routes.insert(0, (dst, foreign));
                }
            }
        }
        Hand::ForeignReplaces(n) => {
            if let Some(at) = take(&mut our_routes, n)
                && !dump.routes.contains(&(dump.routes[at].0, foreign.clone()))
            {
                dump.routes[at].1 = foreign;
            }
        }
        Hand::AddrForm(n) => {
            if let Some(found) = chosen(&mut dump.addrs, n)
                && ours.contains(&found.dev)
            {
                found.form.expires = true;
                found.form.routeless = n % 2 == 0;
            }
        }
        Hand::StrayAddr(n) => {
            let addr = format!("10.5.250.{n}/32").parse().expect("net");
            dump.addrs.push(found_addr(&device(), addr));
        }
    }
}

/// Of the routes of one metric that compete for a subnet the first counts: it must be the wanted one.
fn first_routes_are_ours(kernel: &FakeKernel, desired: &Desired) -> Result<(), TestCaseError> {
    for (key, object) in desired.objects() {
        if let (Key::Route(dst), Object::Route { route, .. }) = (key, object) {
            let first =
                kernel.dump.routes.iter().find(|(d, r)| d == dst && r.form.competes_with(&route.form));
            prop_assert_eq!(first, Some(&(*dst, route.clone())));
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_is_as_it_should_be_needs_nothing(peers in peers(), foreign in any::<bool>()) {
        let mut kernel = kernel_after(&peers, 1450, 8472, foreign);
        let desired = desired(&peers, 1450, 8472);
        settle(&mut kernel, &desired, 2);
        prop_assert_eq!(plan(&desired, &look(&mut kernel, &desired), true), vec![]);
    }

    #[test]
    fn applying_the_plan_gives_the_desired(
        before in peers(), after in peers(), mtu in prop::sample::select(vec![1450, 1400]),
        port in prop::sample::select(vec![8472_u16, 4789]), foreign in any::<bool>(), hands in hands(),
    ) {
        let mut kernel = kernel_after(&before, mtu, port, foreign);
        hands.iter().for_each(|hand| strike(&mut kernel, *hand));
        let theirs: Vec<_> = kernel.dump.routes.iter().filter(|(_, r)| r.protocol == 4).cloned().collect();
        let had_addr = kernel.dump.addrs.iter().any(|a| a.addr.to_string() == "172.20.0.1/32");
        let desired = desired(&after, 1450, 8472);
        let left = settle(&mut kernel, &desired, 4);
        prop_assert_eq!(left, vec![]);
        first_routes_are_ours(&kernel, &desired)?;
        for route in &theirs {
            prop_assert!(kernel.dump.routes.contains(route), "a foreign route went: {:?}", route);
        }
        // A device made anew comes without what others had put on it.
        let foreign_addr = had_addr && port == 8472;
        prop_assert!(!foreign_addr || kernel.dump.addrs.iter().any(|a| a.addr.to_string() == "172.20.0.1/32"));
    }

    #[test]
    fn refused_operations_are_made_up_for(
        before in peers(), after in peers(), faults in prop::collection::vec(any::<bool>(), 0..60), hands in hands(),
    ) {
        let mut kernel = kernel_after(&before, 1400, 4789, true);
        hands.iter().for_each(|hand| strike(&mut kernel, *hand));
        let desired = desired(&after, 1450, 8472);
        kernel.faults = faults.into();
        prop_assert_eq!(settle(&mut kernel, &desired, 70), vec![]);
        first_routes_are_ours(&kernel, &desired)?;
    }

    #[test]
    fn a_plan_cut_short_anywhere_never_leaves_a_route_to_nowhere(
        before in peers(), after in peers(), cut in 0..80_usize, recreated in any::<bool>(),
    ) {
        let mut kernel = kernel_after(&before, 1450, if recreated { 4789 } else { 8472 }, false);
        let desired = desired(&after, 1450, 8472);
        let ops = plan(&desired, &look(&mut kernel, &desired), true);
        kernel.dies_after = Some(cut);
        kernel.apply(&ops);
        prop_assert_eq!(kernel.route_without_neighbour(), None);
        kernel.dies_after = None;
        prop_assert_eq!(settle(&mut kernel, &desired, 3), vec![]);
    }

    /// A hand at work, an agent that dies, another hand, an agent that goes on.
    #[test]
    fn any_part_of_a_plan_and_another_plan_give_the_desired(
        before in peers(), after in peers(), cut in 0..80_usize, first in hands(), second in hands(),
    ) {
        let mut kernel = kernel_after(&before, 1450, 8472, true);
        first.iter().for_each(|hand| strike(&mut kernel, *hand));
        let desired = desired(&after, 1450, 8472);
        let ops = plan(&desired, &look(&mut kernel, &desired), true);
        kernel.dies_after = Some(cut);
        kernel.apply(&ops);
        kernel.dies_after = None;
        second.iter().for_each(|hand| strike(&mut kernel, *hand));
        prop_assert_eq!(settle(&mut kernel, &desired, 4), vec![]);
        first_routes_are_ours(&kernel, &desired)?;
    }
}

#[test]
fn nothing_is_removed_before_the_first_snapshot() {
    let before: Peers = [((2, false), Way::Tunnel(10, 50)), ((3, true), Way::Tunnel(11, 51))].into();
    let mut kernel = kernel_after(&before, 1450, 8472, false);
    let desired = desired(&Peers::new(), 1450, 8472);
    assert_eq!(plan(&desired, &look(&mut kernel, &desired), false), vec![]);
    let removals = plan(&desired, &look(&mut kernel, &desired), true);
    let keys: Vec<String> = removals.iter().map(|op| op.key().to_string()).collect();
    assert_eq!(removals.len(), 6);
    assert!(keys[0].starts_with("route") && keys[5].starts_with("fdb"), "routes go first: {keys:?}");
}

#[test]
fn a_route_that_went_with_its_device_is_not_replaced_but_made() {
    let mut kernel = kernel_after(&[((3, false), Way::Tunnel(10, 50))].into(), 1450, 4789, true);
    let foreign: Vec<_> = kernel.dump.routes.iter().filter(|(_, r)| r.protocol == 4).cloned().collect();
    assert!(foreign.iter().any(|(dst, _)| dst.to_string() == "10.5.3.0/24"), "one beside the peer's");
    let desired = desired(&[((3, false), Way::Direct(50))].into(), 1450, 8472);
    assert_eq!(settle(&mut kernel, &desired, 4), vec![]);
    assert!(foreign.iter().all(|route| kernel.dump.routes.contains(route)), "{:?}", kernel.dump.routes);
}

#[test]
fn a_changed_peer_is_replaced_before_the_old_entry_goes() {
    let mut kernel = kernel_after(&[((2, false), Way::Tunnel(10, 50))].into(), 1450, 8472, false);
    let desired = desired(&[((2, false), Way::Tunnel(11, 51))].into(), 1450, 8472);
    let ops = plan(&desired, &look(&mut kernel, &desired), true);
    let words: Vec<String> = ops
        .iter()
        .map(|op| format!("{} {}", if matches!(op, Op::Set { .. }) { "set" } else { "remove" }, op.key()))
        .collect();
    assert_eq!(
        words,
        [
            "set fdb 02:00:00:00:00:0b dev flannel.1",
            "set neighbour 10.5.2.0 dev flannel.1",
            "remove fdb 02:00:00:00:00:0a dev flannel.1",
        ]
    );
}

#[test]
fn a_forced_bridge_keeps_no_foreign_ipv4_address() {
    let mut kernel = FakeKernel::with_underlay("eth0");
    let cni0 = name("cni0");
    for addr in ["192.0.2.9/24", "fd99::1/64"] {
        kernel.dump.addrs.push(found_addr(&cni0, addr.parse().expect("net")));
    }
    kernel.dump.addrs.push(found_addr(&name("eth0"), "198.51.100.1/24".parse().expect("net")));
    let dump = kernel.dump(None).expect("the fake always answers");
    let removed = |forced: BTreeSet<IfName>| {
        let ownership = Ownership { forced, ..ownership() };
        let observed = observe(&dump, &BTreeMap::new(), &Desired::default(), &ownership);
        plan(&Desired::default(), &observed, true).iter().map(|op| op.key().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(removed(BTreeSet::new()), [""; 0]);
    let gone = removed([cni0].into());
    assert!(gone.len() == 1 && gone[0].contains("192.0.2.9"), "{gone:?}");
}
