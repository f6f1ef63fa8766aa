//! Properties of planning against a kernel in memory: random worlds, random faults.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use weft_shared::{IfName, Mac, Subnet};

use super::*;
use crate::kernel::Kernel;
use crate::kernel::fake::{FakeKernel, found_addr};
use crate::object::{AddrScope, Link, LinkKind, LinkMac, Route, Vxlan, VxlanTuning};
use crate::reconcile::observe::{Ownership, observe};

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

/// The entries of peer `n` in one family, with the MAC and the address that it announces.
fn entries(n: u8, v6: bool, vtep: u8, address: u8) -> Vec<Object> {
    let subnet: Subnet =
        if v6 { format!("fd00:5:{n:x}::/64") } else { format!("10.5.{n}.0/24") }.parse().expect("net");
    vec![
        Object::Neigh { dev: device(), ip: subnet.addr(), mac: mac(vtep) },
        Object::Fdb { dev: device(), mac: mac(vtep), dst: public(address), path: Default::default() },
        Object::Route { dst: subnet, route: Route::via(subnet.addr(), &device(), true) },
    ]
}

/// Peers by subnet: announced MAC and address.
type Peers = BTreeMap<(u8, bool), (u8, u8)>;

fn peers() -> impl Strategy<Value = Peers> {
    prop::collection::btree_map((2..9_u8, any::<bool>()), (10..40_u8, 50..90_u8), 0..8)
}

fn desired(peers: &Peers, mtu: u32, port: u16) -> Desired {
    let mut desired = Desired::default();
    desired.insert(Object::Link { name: device(), link: device_link(mtu, port) });
    desired.insert(Object::Addr {
        dev: device(),
        addr: "10.5.1.0/32".parse().expect("net"),
        scope: AddrScope::Global,
        form: Default::default(),
    });
    for ((n, v6), (vtep, address)) in peers {
        entries(*n, *v6, *vtep, *address).into_iter().for_each(|object| desired.insert(object));
    }
    desired
}

fn ownership() -> Ownership {
    Ownership {
        networks: vec!["10.5.0.0/16".parse().expect("net"), "fd00:5::/32".parse().expect("net")],
        subnet_len: 24,
        underlay: name("eth0"),
        device: Some(device()),
        bridges: vec![],
        adopt_flannels: false,
        indices: BTreeMap::new(),
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
    let old = desired(before, mtu, port);
    let ops = plan(&old, &Observed::default(), true);
    assert!(kernel.apply(&ops).iter().all(Result::is_ok));
    if foreign {
        kernel.dump.routes.extend(foreign_routes());
        kernel.dump.addrs.push(found_addr(&device(), "172.20.0.1/32".parse().expect("net")));
    }
    kernel.applied.clear();
    kernel
}

/// Routes of an operator: one beside ours, one to the very subnet of a possible peer.
fn foreign_routes() -> Vec<(Subnet, Route)> {
    let via = |dst: &str| {
        let route = Route { protocol: 4, ..Route::via(public(254), &name("eth0"), false) };
        (dst.parse().expect(dst), route)
    };
    vec![via("172.16.0.0/12"), via("10.5.3.0/24")]
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
        port in prop::sample::select(vec![8472_u16, 4789]), foreign in any::<bool>(),
    ) {
        let mut kernel = kernel_after(&before, mtu, port, foreign);
        let desired = desired(&after, 1450, 8472);
        let left = settle(&mut kernel, &desired, 2);
        prop_assert_eq!(left, vec![]);
        for route in foreign_routes().into_iter().filter(|_| foreign) {
            prop_assert!(kernel.dump.routes.contains(&route), "a foreign route went: {:?}", route);
        }
        // A device made anew comes without what others had put on it.
        let foreign_addr = foreign && port == 8472;
        prop_assert!(!foreign_addr || kernel.dump.addrs.iter().any(|a| a.addr.to_string() == "172.20.0.1/32"));
    }

    #[test]
    fn refused_operations_are_made_up_for(before in peers(), after in peers(), faults in prop::collection::vec(any::<bool>(), 0..60)) {
        let mut kernel = kernel_after(&before, 1400, 4789, true);
        let desired = desired(&after, 1450, 8472);
        kernel.faults = faults.into();
        prop_assert_eq!(settle(&mut kernel, &desired, 70), vec![]);
    }

    #[test]
    fn a_plan_cut_short_anywhere_never_leaves_a_route_to_nowhere(before in peers(), after in peers(), cut in 0..60_usize, recreated in any::<bool>()) {
        let mut kernel = kernel_after(&before, 1450, if recreated { 4789 } else { 8472 }, false);
        let desired = desired(&after, 1450, 8472);
        let ops = plan(&desired, &look(&mut kernel, &desired), true);
        kernel.dies_after = Some(cut);
        kernel.apply(&ops);
        prop_assert_eq!(kernel.route_without_neighbour(), None);
        kernel.dies_after = None;
        prop_assert_eq!(settle(&mut kernel, &desired, 3), vec![]);
    }
}

#[test]
fn nothing_is_removed_before_the_first_snapshot() {
    let before: Peers = [((2, false), (10, 50)), ((3, true), (11, 51))].into();
    let mut kernel = kernel_after(&before, 1450, 8472, false);
    let desired = desired(&Peers::new(), 1450, 8472);
    assert_eq!(plan(&desired, &look(&mut kernel, &desired), false), vec![]);
    let removals = plan(&desired, &look(&mut kernel, &desired), true);
    let keys: Vec<String> = removals.iter().map(|op| op.key().to_string()).collect();
    assert_eq!(removals.len(), 6);
    assert!(keys[0].starts_with("route") && keys[5].starts_with("fdb"), "routes go first: {keys:?}");
}

#[test]
fn a_changed_peer_is_replaced_before_the_old_entry_goes() {
    let mut kernel = kernel_after(&[((2, false), (10, 50))].into(), 1450, 8472, false);
    let desired = desired(&[((2, false), (11, 51))].into(), 1450, 8472);
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
