//! Whole passes against a kernel in memory: what is reported, what stays pending, what counts as a repair.

use std::sync::atomic::{AtomicU64, Ordering};

use weft_shared::Mac;
use weft_shared::lease::Lease;
use weft_shared::names::LINK_GROUP;
use weft_shared::netconf::NetworkConfig;

use super::*;
use crate::dataplane::Backend;
use crate::firewall::forward::{HostChain, Keeper};
use crate::firewall::legacy::LegacyTable;
use crate::firewall::{ChainId, ChainPolicy, Family, Part};
use crate::kernel::fake::{FakeKernel, found_addr};
use crate::object::{Alterations, Link, LinkKind, LinkMac, Route, RouteForm, Tun};
use crate::pods::BridgeNeed;
use crate::reconcile::observe::PROTOCOL_KERNEL;

pub(in crate::reconcile) fn inputs(config: &str, peers: &[(&str, &str)]) -> Inputs {
    let config = NetworkConfig::parse(config).expect("valid");
    let backend = Backend::new(&config, "02:00:00:00:00:01".parse().expect("mac"));
    let underlay = Underlay {
        iface: "eth0".parse().expect("name"),
        index: 0,
        addr: "192.0.2.1".parse().expect("ip"),
        mtu: 0,
        public_ip: "192.0.2.1".parse().expect("ip"),
        chosen_by: "a test".into(),
    };
    let node = NodeInputs {
        config,
        backend,
        vtep_mac: "02:00:00:00:00:01".parse().expect("mac"),
        lease: "10.5.1.0-24".parse().expect("key"),
        underlay,
        first_start: false,
    };
    let lease = |(key, value): &(&str, &str)| Lease {
        key: key.parse().expect("key"),
        attrs: serde_json::from_str(value).expect("attrs"),
        create_revision: 1,
    };
    let peers = peers.iter().map(lease).collect();
    Inputs { node: Some(node), peers, has_snapshot: true, ..Inputs::default() }
}

/// Later than every backoff so far.
fn soon() -> Instant {
    static MINUTES: AtomicU64 = AtomicU64::new(0);
    Instant::now() + Duration::from_secs(60 * MINUTES.fetch_add(1, Ordering::Relaxed))
}

fn looked(outcome: Result<Outcome, Aborted>) -> Report {
    match outcome.expect("the kernel answers") {
        Outcome::Node(report) => *report,
        Outcome::HostPorts(_) => panic!("the node is known"),
    }
}

const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;
const UDP: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp"}}"#;
const UDP_PEER: (&str, &str) = ("10.5.3.0-24", r#"{"PublicIP":"192.0.2.3","PublicIPv6":null}"#);
const PEER: (&str, &str) = (
    "10.5.2.0-24",
    r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}"#,
);

#[test]
fn a_first_pass_makes_everything_and_a_second_nothing() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert("cni0".parse().expect("name"), need);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.pending.len(), report.repairs), (0, 0));
    assert!(report.usable && report.after_snapshot);
    let bridge = &report.devices[&"cni0".parse().expect("name")];
    assert_eq!(
        bridge.mac,
        weft_shared::names::bridge_mac("192.0.2.1".parse().expect("ip"), &"cni0".parse().expect("name"))
    );
    assert!(report.peers.values().all(|p| p.problem().is_none()));
    assert!(!kernel.applied.is_empty());

    kernel.applied.clear();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((kernel.applied.len(), report.repairs), (0, 0));
}

#[test]
fn a_foreign_hand_is_a_repair_and_a_changed_input_is_not() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(VXLAN, &[PEER]);
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    kernel.delete_link(&"flannel.1".parse().expect("name"));
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!(report.pending.len(), 0);
    assert!(report.repairs >= 4, "device, address and three entries came back: {}", report.repairs);
    let mut fewer = inputs.clone();
    fewer.peers.clear();
    let report = looked(pass(&mut kernel, &mut memory, &fewer, 2, soon()));
    assert_eq!(report.repairs, 0);
    assert!(kernel.dump.routes.is_empty() && kernel.dump.fdb.is_empty() && kernel.dump.neighs.is_empty());
}

#[test]
fn a_refused_operation_is_pending_and_tried_again() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(VXLAN, &[PEER]);
    // Everything before the neighbour succeeds; the neighbour does not, in one pass.
    let mut willing = FakeKernel::with_underlay("eth0");
    looked(pass(&mut willing, &mut Memory::default(), &inputs, 1, soon()));
    let before = willing.applied.iter().take_while(|op| !matches!(op.key(), Key::Neigh(..))).count();
    kernel.faults = std::iter::repeat_n(false, before).chain([true]).collect();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!(report.pending.len(), 1, "{:?}", report.pending);
    assert_eq!(report.pending[0].key.to_string(), "neighbour 10.5.2.0 dev flannel.1");
    assert!(report.usable, "one peer's trouble does not stop the node");
    let peer = report.peers.values().next().expect("one peer");
    assert!(peer.problem().is_some_and(|p| p.contains("neighbour 10.5.2.0")), "{peer:?}");
    assert!(memory.retry_at().is_some());
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.pending.len(), memory.retry_at()), (0, None));
}

#[test]
fn without_its_underlay_a_node_keeps_its_bridge_and_takes_nothing_away() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    let bridge: weft_shared::IfName = "cni0".parse().expect("name");
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert(bridge.clone(), need);
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    kernel.dump.links.remove(&"eth0".parse::<weft_shared::IfName>().expect("name"));
    let before = kernel.dump.clone();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!(kernel.dump, before);
    assert!(report.underlay_lost && !report.usable && report.underlay.is_none());
    assert_eq!(report.underlay_problem.as_deref(), Some("interface eth0 is gone"));
    kernel.delete_link(&bridge);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert!(kernel.dump.links.contains_key(&bridge) && report.devices.contains_key(&bridge));
    assert_eq!(kernel.dump.routes, before.routes, "peers are served again as soon as there is an underlay");
}

#[test]
fn flannels_host_gw_routes_are_taken_over_once_at_a_first_start() {
    let via = |gateway: &str| Route {
        protocol: 3,
        ..Route::via(gateway.parse().expect("ip"), &"eth0".parse().expect("name"), false)
    };
    let stale = ("10.5.7.0/24".parse().expect("net"), via("192.0.2.7"));
    let operators = ("10.5.64.0/20".parse().expect("net"), via("192.0.2.9"));
    let mut inputs = inputs(
        HOST_GW,
        &[("10.5.2.0-24", r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"host-gw"}"#)],
    );

    for (first_start, left) in [(true, 2), (false, 3)] {
        let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
        kernel.on_link.insert("192.0.2.2".parse().expect("ip"));
        kernel.dump.routes = vec![stale.clone(), operators.clone()];
        inputs.node.as_mut().expect("node").first_start = first_start;
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        assert_eq!(report.pending.len(), 0);
        assert_eq!(kernel.dump.routes.len(), left, "{:?}", kernel.dump.routes);
        assert!(kernel.dump.routes.contains(&operators), "another length is an operator's");
        kernel.dump.routes.push(stale.clone());
        looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        assert!(kernel.dump.routes.contains(&stale), "later ones are an operator's");
    }
}

#[test]
fn what_keeps_failing_is_not_tried_at_every_announcement() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(VXLAN, &[PEER]);
    let mut now = Instant::now();
    let mut tried = 0;
    for _ in 0..1000 {
        kernel.faults = vec![true; 40].into();
        let before = kernel.faults.len();
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
        tried += usize::from(kernel.faults.len() < before);
        assert!(!report.pending.is_empty());
        now += Duration::from_millis(10);
    }
    assert!((5..=8).contains(&tried), "in ten seconds the waits double from 0.1 s: tried {tried} times");
    let mut other = inputs.clone();
    other.has_snapshot = false;
    kernel.faults.clear();
    let report = looked(pass(&mut kernel, &mut memory, &other, 2, now));
    assert_eq!(report.pending, [], "other inputs are tried at once");
}

#[test]
fn a_broken_underlay_is_named() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(VXLAN, &[PEER]);
    let problem = |kernel: &mut FakeKernel, memory: &mut Memory| {
        looked(pass(kernel, memory, &inputs, 1, soon())).underlay_problem.unwrap_or_default()
    };
    assert_eq!(problem(&mut kernel, &mut memory), "");
    kernel.dump.addrs.retain(|a| a.dev.as_str() != "eth0");
    assert!(problem(&mut kernel, &mut memory).contains("192.0.2.1 is no longer on eth0"));
    kernel.dump.links.get_mut(&"eth0".parse::<weft_shared::IfName>().expect("name")).expect("eth0").link.up =
        false;
    assert_eq!(problem(&mut kernel, &mut memory), "eth0 is down");
}

#[test]
fn a_bridge_has_the_mac_that_its_pods_were_told_whatever_it_was_found_with() {
    let mut kernel = FakeKernel::with_underlay("eth0");
    let mut inputs = inputs(VXLAN, &[PEER]);
    let bridge: weft_shared::IfName = "cni0".parse().expect("name");
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert(bridge.clone(), need);
    let mac = |report: Report| report.devices[&bridge].mac;
    let told = mac(looked(pass(&mut kernel, &mut Memory::default(), &inputs, 1, soon())));
    inputs.pods.bridges.get_mut(&bridge).expect("needed").mac = Some(told);
    // While no agent ran.
    let foreign = "02:00:00:00:00:99".parse().expect("mac");
    kernel.dump.links.get_mut(&bridge).expect("bridge").link.mac = LinkMac::Exactly(foreign);
    let mut memory = Memory::default();
    assert_eq!(mac(looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()))), told);
    kernel.delete_link(&bridge);
    assert_eq!(mac(looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()))), told);
}

#[test]
fn a_bridge_that_weft_made_is_no_adopted_one_at_another_public_ip() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    let bridge: weft_shared::IfName = "cni0".parse().expect("name");
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert(bridge.clone(), need);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    inputs.pods.bridges.get_mut(&bridge).expect("needed").mac = Some(report.devices[&bridge].mac);
    inputs.node.as_mut().expect("node").underlay.public_ip = "192.0.2.9".parse().expect("ip");
    for (group, mended) in [(LINK_GROUP, true), (0, false)] {
        let found = kernel.dump.links.get_mut(&bridge).expect("bridge");
        found.group = group;
        found.link.altered.bridge_options = true;
        looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
        assert_eq!(!kernel.dump.links[&bridge].link.altered.bridge_options, mended, "group {group}");
    }
}

#[test]
fn a_peer_at_the_broadcast_address_is_refused_by_the_prefix_of_now() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let eth0: weft_shared::IfName = "eth0".parse().expect("name");
    let last = PEER.1.replace("192.0.2.2", "192.0.2.3");
    let inputs = inputs(VXLAN, &[(PEER.0, &last)]);
    for (addr, refused) in
        [("192.0.2.1/24", false), ("192.0.2.1/30", true), ("192.0.2.1/31", false), ("192.0.2.1/32", false)]
    {
        kernel.dump.addrs.retain(|found| found.dev != eth0);
        kernel.dump.addrs.push(found_addr(&eth0, addr.parse().expect(addr)));
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        let problem = report.peers.values().next().and_then(|peer| peer.problem());
        assert_eq!(
            problem.is_some_and(|p| p.contains("eth0's broadcast one")),
            refused,
            "{addr}: {problem:?}"
        );
    }
}

#[test]
fn a_subnet_that_pods_still_live_in_is_never_routed_away() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    let need = BridgeNeed { subnets: vec!["10.5.2.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert("cni0".parse().expect("name"), need);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let away = kernel.dump.routes.iter().find(|(_, route)| route.gateway.is_some());
    assert_eq!(away, None);
    let problem = report.peers.values().next().and_then(|peer| peer.problem()).unwrap_or_default();
    assert!(problem.contains("pods of this node still have addresses"), "{problem}");
}

#[test]
fn a_bridge_named_like_the_overlays_device_does_not_take_its_place() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    inputs
        .pods
        .bridges
        .insert("flannel.1".parse().expect("name"), BridgeNeed { subnets: vec![], mtu: 1450, mac: None });
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let device = &kernel.dump.links[&"flannel.1".parse::<weft_shared::IfName>().expect("name")];
    assert!(matches!(device.link.kind, crate::object::LinkKind::Vxlan(_)), "{device:?}");
}

#[test]
fn every_peer_of_the_udp_backend_stands_on_the_same_device_and_route() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(UDP, &[UDP_PEER, PEER]);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.pending.len(), report.repairs, report.usable), (0, 0, true));
    let problem = |report: &Report, (key, _): (&str, &str)| {
        report.peers[&key.parse().expect("key")].problem().map(ToOwned::to_owned)
    };
    assert_eq!(problem(&report, UDP_PEER), None);
    assert!(problem(&report, PEER).is_some_and(|why| why.contains("expected none, which is udp")));
    let made = kernel.applied.len();
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!(kernel.applied.len(), made, "what is right is not touched");

    kernel.dump.routes.retain(|(_, route)| route.protocol == PROTOCOL_KERNEL);
    kernel.faults = [true].into();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert!(problem(&report, UDP_PEER).is_some_and(|why| why.starts_with("route 10.5.0.0/16: ")));
}

#[test]
fn a_device_that_another_process_lives_by_is_waited_for_and_made_as_soon_as_it_is_gone() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(UDP, &[UDP_PEER]);
    let dev: weft_shared::IfName = "flannel0".parse().expect("name");
    let flannels = Tun { persistent: false, multi_queue: false, marked: false, ..Tun::for_queues() };
    let link = Link {
        kind: LinkKind::Tun(flannels),
        mac: LinkMac::None,
        mtu: 1472,
        up: true,
        altered: Default::default(),
    };
    kernel.add_link(dev.clone(), link, 0);
    kernel.dump.addrs.push(found_addr(&dev, "10.5.7.0/32".parse().expect("net")));
    let plain = RouteForm::default();
    let route = Route { gateway: None, protocol: 3, form: plain, ..Route::via([0; 4].into(), &dev, false) };
    kernel.dump.routes.push(("10.5.0.0/16".parse().expect("net"), route));
    let before = kernel.dump.clone();
    let mut now = Instant::now();
    for attempt in 1..=6 {
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
        assert_eq!(kernel.dump, before, "nothing of a living flanneld is touched");
        let [pending] = report.pending.as_slice() else { panic!("{:?}", report.pending) };
        let said = format!("{}: {}", pending.key, pending.error);
        let expected = "link flannel0: flannel0 is in use by another process (a running flanneld?)";
        assert_eq!((said.as_str(), pending.attempts), (expected, attempt));
        assert!(!report.usable);
        let peer = report.peers.values().next().and_then(|peer| peer.problem());
        assert_eq!(peer, Some(expected));
        now = memory.retry_at().expect("tried again");
    }
    // Long before that.
    kernel.delete_link(&dev);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, now - Duration::from_secs(3)));
    assert!(report.pending.is_empty() && report.usable, "{:?}", report.pending);
    assert!(kernel.dump.routes.iter().any(|(_, route)| route.dev.as_ref() == Some(&dev)));
    assert_eq!(memory.retry_at(), None);
}

#[test]
fn a_device_that_is_known_as_ours_stays_ours_whatever_mark_it_lost() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(UDP, &[UDP_PEER]);
    let dev: weft_shared::IfName = "flannel0".parse().expect("name");
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let LinkKind::Tun(tun) = &mut kernel.dump.links.get_mut(&dev).expect("made").link.kind else {
        panic!("no TUN device")
    };
    (tun.marked, tun.persistent, tun.attached) = (false, false, true);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert!(report.pending.is_empty() && report.usable, "{:?}", report.pending);
    assert_eq!(kernel.dump.links[&dev].link.kind, LinkKind::Tun(Tun::for_queues()));
}

#[test]
fn a_foreign_route_that_takes_the_packets_is_named_and_ours_is_there_all_the_same() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(UDP, &[UDP_PEER]);
    let network: Subnet = "10.5.0.0/16".parse().expect("net");
    let foreign = |metric: Option<u32>, tos: u8| {
        let form = RouteForm { metric, tos, ..RouteForm::default() };
        let route = Route::via("192.0.2.9".parse().expect("ip"), &"eth0".parse().expect("name"), false);
        (network, Route { protocol: 3, form, ..route })
    };
    for (route, overrules) in [
        (foreign(None, 0), true),
        (foreign(Some(4095), 0), true),
        (foreign(Some(4097), 0), false),
        (foreign(None, 16), false),
    ] {
        kernel.dump.routes = vec![route.clone()];
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        assert!(kernel.dump.routes.contains(&route), "theirs stays");
        assert_eq!(kernel.dump.routes.iter().filter(|(_, route)| route.protocol == 87).count(), 1);
        let said: Vec<String> = report.pending.iter().map(|p| format!("{}: {}", p.key, p.error)).collect();
        let named = format!(
            "route 10.5.0.0/16: its packets take a route of somebody else's, 10.5.0.0/16 via 192.0.2.9 dev eth0 proto 3 metric {}",
            route.1.form.metric.unwrap_or(0)
        );
        assert_eq!(said, if overrules { vec![named] } else { vec![] });
        assert!(report.usable, "pods can be added while packets go another way");
        kernel.dump.routes.retain(|(_, route)| route.protocol != 87);
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        assert_eq!(report.repairs, 1, "what is mended meanwhile is counted");
    }
}

#[test]
fn a_node_that_changes_its_backend_leaves_nothing_of_the_other_once_it_knows_its_peers() {
    let mac: Mac = "02:00:00:00:00:01".parse().expect("mac");
    let devices = |kernel: &FakeKernel| {
        let names = kernel.dump.links.keys().map(ToString::to_string);
        names.filter(|name| name.starts_with("flannel")).collect::<Vec<_>>()
    };
    for marked in [true, false] {
        let mut kernel = FakeKernel::with_underlay("eth0");
        looked(pass(&mut kernel, &mut Memory::default(), &inputs(VXLAN, &[PEER]), 1, soon()));
        let vxlan: weft_shared::IfName = "flannel.1".parse().expect("name");
        let device = kernel.dump.links.get_mut(&vxlan).expect("made");
        assert_eq!(device.link.mac, LinkMac::Exactly(mac));
        if !marked {
            // As flanneld made it, and weft adopted it.
            device.group = 0;
        }
        // An operator's own.
        let foreign =
            Link { mac: LinkMac::Exactly("02:00:00:00:00:09".parse().expect("mac")), ..device.link.clone() };
        kernel.add_link("flannel.9".parse().expect("name"), foreign, 0);
        let tun = Tun { marked: false, ..Tun::for_queues() };
        let link = Link {
            kind: LinkKind::Tun(tun),
            mac: LinkMac::None,
            mtu: 1500,
            up: true,
            altered: Default::default(),
        };
        kernel.add_link("tun7".parse().expect("name"), link, 0);

        let mut udp = inputs(UDP, &[UDP_PEER]);
        udp.has_snapshot = false;
        looked(pass(&mut kernel, &mut Memory::default(), &udp, 1, soon()));
        assert_eq!(devices(&kernel), ["flannel.1", "flannel.9", "flannel0"], "not before it knows its peers");
        udp.has_snapshot = true;
        looked(pass(&mut kernel, &mut Memory::default(), &udp, 1, soon()));
        assert_eq!(devices(&kernel), ["flannel.9", "flannel0"]);
        assert!(kernel.dump.routes.iter().all(|(_, route)| route.dev.as_ref() != Some(&vxlan)));

        looked(pass(&mut kernel, &mut Memory::default(), &inputs(HOST_GW, &[]), 1, soon()));
        assert_eq!(devices(&kernel), ["flannel.9"]);
        assert!(kernel.dump.links.contains_key(&"tun7".parse::<weft_shared::IfName>().expect("name")));
        assert!(kernel.dump.routes.iter().all(|(_, route)| route.protocol != 87));
    }
}

#[test]
fn the_packet_filter_is_kept_like_everything_else() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    inputs.firewall.masquerade = true;
    let host = HostChain {
        id: ChainId::new(Family::Inet, "host", "forward"),
        policy: ChainPolicy::Drop,
        keeper: Keeper::Anybody,
        rules: vec![],
        called: BTreeMap::new(),
    };
    kernel.ruleset.forward.push(host);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.pending.len(), kernel.ruleset.own.len()), (0, 1));
    assert_eq!(kernel.ruleset.forward[0].rules.len(), 2);
    // Before any port, address or route: what a connection begins with it keeps.
    let place = |wanted: fn(&Key) -> bool| kernel.applied.iter().position(|op| wanted(&op.key()));
    assert!(place(|key| matches!(key, Key::Firewall(_))) < place(|key| matches!(key, Key::Addr(..))));

    kernel.ruleset.own.clear();
    kernel.ruleset.forward[0].rules.pop();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.repairs, report.pending.len()), (2, 0));
    let made = kernel.applied.len();
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!(kernel.applied.len(), made, "what is right is not touched");

    // A new subnet beside the old one, whose pods are still there: both are local.
    let need = BridgeNeed { subnets: vec!["10.5.9.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert("cni0".parse().expect("name"), need);
    looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
    let Part::Table { chains, .. } = &kernel.ruleset.own[0] else { panic!("{:?}", kernel.ruleset.own) };
    assert_eq!(chains[1].rules.len(), 1 + 2 * 3 + 2);

    kernel.ruleset.forward[0].policy = ChainPolicy::Accept;
    inputs.firewall.masquerade = false;
    inputs.firewall.forward = false;
    looked(pass(&mut kernel, &mut memory, &inputs, 3, soon()));
    assert!(kernel.ruleset.own.is_empty() && kernel.ruleset.forward[0].rules.is_empty());
}

#[test]
fn a_packet_filter_that_cannot_be_looked_at_is_pending_and_nothing_else_waits_for_it() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    inputs.firewall.masquerade = true;
    kernel.firewall_fault = Some(KernelError::NoNftables);
    for attempts in 1..3 {
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        let pending: Vec<_> = report.pending.iter().map(|p| (p.key.to_string(), p.attempts)).collect();
        assert_eq!(pending, [("nftables table ip flannel-ipv4".to_owned(), attempts)]);
        assert!(report.pending[0].error.to_string().contains("module nf_tables"));
        assert!(report.usable && report.peers.values().all(|peer| peer.problem().is_none()));
        let unseen = report.enforcers.unseen.unwrap_or_default();
        assert!(unseen.contains("module nf_tables"), "whoever enforces policies may go unseen: {unseen:?}");
    }
    kernel.firewall_fault = None;
    kernel.ruleset.enforcers.insert("Calico", "its chain".into());
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.pending.len(), kernel.ruleset.own.len()), (0, 1));
    assert_eq!((report.enforcers.found.len(), report.enforcers.unseen), (1, None));
}

#[test]
fn iptables_legacy_is_looked_at_again_where_it_is_in_use() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(VXLAN, &[PEER]);
    let now = soon();
    looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
    assert_eq!(memory.retry_at(), None);
    let saved = "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n";
    kernel.ruleset.legacy = LegacyFilter::Table(LegacyTable::parse(saved));
    let until = now + inputs.firewall.legacy_period;
    kernel.ruleset.legacy_until = Some(until);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
    assert_eq!(report.pending.len(), 0);
    assert_eq!(kernel.ruleset.legacy.table().map(|table| table.chains["FORWARD"].len()), Some(2));
    assert_eq!(memory.retry_at(), Some(until), "announced by nobody");
}

#[test]
fn iptables_legacy_that_cannot_be_read_is_pending_and_nothing_is_written_there() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[PEER]);
    kernel.ruleset.legacy = LegacyFilter::Unreadable("its program is missing".into());
    for attempts in 1..3 {
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        let pending: Vec<_> =
            report.pending.iter().map(|p| (p.key.to_string(), p.error.to_string(), p.attempts)).collect();
        let expected = ("accept rules in iptables-legacy FORWARD", "its program is missing");
        assert_eq!(pending, [(expected.0.to_owned(), expected.1.to_owned(), attempts)]);
        assert!(report.usable);
    }
    let wrote = kernel.applied.iter().any(|op| op.key() == Key::Firewall(PartKey::Legacy));
    assert!(!wrote, "{:?}", kernel.applied);
    inputs.firewall.forward = false;
    assert_eq!(looked(pass(&mut kernel, &mut memory, &inputs, 2, soon())).pending, [], "not asked for");
    inputs.firewall.forward = true;
    assert_eq!(looked(pass(&mut kernel, &mut memory, &inputs, 3, soon())).pending.len(), 1);
    kernel.ruleset.legacy = LegacyFilter::Unused;
    assert_eq!(looked(pass(&mut kernel, &mut memory, &inputs, 3, soon())).pending, []);
}

#[test]
fn a_setting_that_somebody_keeps_changing_is_named_and_no_longer_fought_for_at_once() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let inputs = inputs(HOST_GW, &[]);
    let mut now = Instant::now();
    looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
    let forward = Key::Sysctl("net/ipv4/ip_forward".into());
    let mut report = Report::default();
    kernel.applied.clear();
    // A second of a hand that strikes every 5 ms.
    for _ in 0..200 {
        now += Duration::from_millis(5);
        let off = Object::Sysctl { path: "net/ipv4/ip_forward".into(), value: "0".into() };
        kernel.apply(&[Op::Set { object: off, found: None }]);
        report = looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
    }
    let named: Vec<_> = report.pending.iter().map(|p| (&p.key, &p.error)).collect();
    assert_eq!(named, [(&forward, &KernelError::Contested)]);
    let repairs = kernel.applied.len() - 200;
    assert!((100..120).contains(&repairs), "{repairs} repairs");
    assert!(!report.usable, "it is wrong while it waits");

    // The hand rests: mended with the next attempt, and forgotten when it has been quiet.
    now += Duration::from_secs(10);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
    assert!(report.usable && report.pending.len() == 1, "{:?}", report.pending);
    now += Duration::from_secs(20);
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, now));
    assert_eq!(report.pending.len(), 0);
}

#[test]
fn the_loopback_is_led_to_pods_once_they_are_kept_from_it() {
    const OPEN: &str = "net/ipv4/conf/cni0/route_localnet";
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[]);
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert("cni0".parse().expect("name"), need);
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let applied = |kernel: &mut FakeKernel| -> Vec<String> {
        let ops = std::mem::take(&mut kernel.applied);
        let about = |key: &Key| match key {
            Key::Sysctl(path) => path == OPEN,
            Key::Firewall(part) => firewall::host_ports::is_about(part),
            _ => false,
        };
        ops.iter().map(Op::key).filter(about).map(|key| key.to_string()).collect()
    };
    assert_eq!(applied(&mut kernel), [""; 0]);
    let mapping = weft_shared::protocol::PortMapping {
        protocol: weft_shared::protocol::Protocol::Udp,
        host_ip: None,
        host_port: 53,
        container_port: 53,
    };
    inputs.pods.host_ports = firewall::HostPort::of(&[mapping], &["10.5.1.2".parse().expect("ip")]).collect();
    let table = "nftables table ip weft-hostports";
    let flows = "UDP flows to host ports";
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
    assert_eq!(applied(&mut kernel), [table, flows, &format!("sysctl {}", OPEN.replace('/', "."))]);
    assert_eq!((report.pending.len(), report.repairs), (0, 0));
    // It stays open, for whoever else lives by it, and so does the guard.
    inputs.pods.host_ports.clear();
    looked(pass(&mut kernel, &mut memory, &inputs, 3, soon()));
    assert_eq!(applied(&mut kernel), [table, flows]);
    assert_eq!(kernel.sysctls(&[OPEN]).expect("sysctls")[OPEN], "1");
    assert!(firewall::host_ports::guards(&kernel.ruleset, &"cni0".parse().expect("name")));
    // A setting that cannot be written keeps 127.0.0.1 from the ports, not pods from the node.
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    inputs.pods.host_ports = firewall::HostPort::of(&[mapping], &["10.5.1.2".parse().expect("ip")]).collect();
    let mut willing = FakeKernel::with_underlay("eth0");
    looked(pass(&mut willing, &mut Memory::default(), &inputs, 1, soon()));
    let before = willing.applied.iter().take_while(|op| op.key() != Key::Sysctl(OPEN.into())).count();
    kernel.faults = std::iter::repeat_n(false, before).chain([true]).collect();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let pending: Vec<_> = report.pending.iter().map(|p| &p.key).collect();
    assert_eq!(pending, [&Key::Sysctl(OPEN.into())]);
    assert!(report.usable, "for want of the loopback no pod is refused");
}

#[test]
fn a_pods_limits_are_kept_and_go_with_its_veth() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[]);
    let bridge: IfName = "cni0".parse().expect("name");
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    inputs.pods.bridges.insert(bridge.clone(), need);
    let veth: IfName = "vethab2cd3ef4gh".parse().expect("name");
    let ifb: IfName = "wifbab2cd3ef4gh".parse().expect("name");
    let options = weft_shared::protocol::BridgeOptions {
        name: bridge,
        hairpin: true,
        isolated: false,
        mtu: None,
        force_address: false,
        masquerade: false,
    };
    let limit = Some(weft_shared::protocol::Limit { rate: 1000, burst: 3000 });
    let limits = weft_shared::protocol::Bandwidth { ingress: limit, egress: limit };
    let port = crate::pods::BridgePortNeed { ifindex: 0, options, mtu: 1450, limits };
    inputs.pods.bridge_ports.insert(veth.clone(), port);
    // Between the end of a pair and that of its attachment there is nothing to be limited.
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!(
        (report.pending.len(), kernel.shaping.len(), kernel.dump.links.contains_key(&ifb)),
        (0, 0, false)
    );

    let link = Link {
        kind: LinkKind::Other("veth".into()),
        ..kernel.dump.links[&"eth0".parse().expect("name")].link.clone()
    };
    kernel.add_link(veth.clone(), link, LINK_GROUP);
    // Its name on another device: that one is let be.
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let other = &kernel.dump.links[&veth].port;
    assert_eq!((report.pending.len(), kernel.shaping.len(), &other.bridge), (0, 0, &None));
    inputs.pods.bridge_ports.get_mut(&veth).expect("port").ifindex = kernel.dump.links[&veth].index;
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let shaped = |kernel: &FakeKernel| kernel.shaping.iter().map(|o| o.key().to_string()).collect::<Vec<_>>();
    let all = [
        "token bucket on vethab2cd3ef4gh",
        "token bucket on wifbab2cd3ef4gh",
        "redirection of what comes in by vethab2cd3ef4gh",
    ];
    assert_eq!(shaped(&kernel), all);
    kernel.applied.clear();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.repairs, kernel.applied.len(), report.pending.len()), (0, 0, 0));
    // Taken away with its device, and one of them altered.
    kernel.delete_link(&ifb);
    kernel.shaping[0] =
        Object::Shaper { dev: veth.clone(), tbf: crate::object::Tbf { rate: 1, burst: 0, limit: 1 } };
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!((report.pending.len(), kernel.shaping.len(), report.repairs), (0, 3, 3));
    assert!(!kernel.shaping.contains(&Object::Shaper {
        dev: veth.clone(),
        tbf: crate::object::Tbf { rate: 1, burst: 0, limit: 1 }
    }));
    // A device that cannot be made is that pod's trouble alone.
    kernel.delete_link(&ifb);
    kernel.faults = [true].into();
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    let first = report.pending.first().map(|p| p.key.clone());
    assert_eq!((first, report.usable), (Some(Key::Link(ifb.clone())), true), "{:?}", report.pending);
    assert!(
        report.pending.iter().all(|p| crate::reconcile::is_limit_of(&veth, &p.key)),
        "{:?}",
        report.pending
    );

    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    kernel.delete_link(&veth);
    inputs.pods.bridge_ports.clear();
    assert!(memory.known.contains_key(&ifb));
    looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
    assert!(!kernel.dump.links.contains_key(&ifb) && kernel.shaping.is_empty());
    looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
    assert_eq!(memory.known.keys().map(IfName::as_str).collect::<Vec<_>>(), ["cni0", "flannel.1"]);
}

fn host_ports(mappings: &[(&str, &str)]) -> BTreeSet<firewall::HostPort> {
    let mapping = |(protocol, host_ip): &(&str, &str)| weft_shared::protocol::PortMapping {
        protocol: protocol.parse().expect("protocol"),
        host_ip: (!host_ip.is_empty()).then(|| host_ip.parse().expect("address")),
        host_port: 53,
        container_port: 53,
    };
    let mappings: Vec<_> = mappings.iter().map(mapping).collect();
    firewall::HostPort::of(&mappings, &["10.5.1.2".parse().expect("ip")]).collect()
}

/// What the table of host ports in the kernel leads where; `None`: there is no such table.
fn led(kernel: &FakeKernel) -> Option<Vec<String>> {
    let id = firewall::host_ports::table_id(Family::Ip);
    let table = kernel.ruleset.own.iter().find(|part| part.key() == PartKey::Table(id.clone()))?;
    Some(firewall::host_ports::led(table).iter().map(ToString::to_string).collect())
}

#[test]
fn the_loopback_is_opened_where_a_port_needs_it_and_nobody_else_has() {
    const ALL: &str = "net/ipv4/conf/all/route_localnet";
    let bridge: IfName = "cni0".parse().expect("name");
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    for (host_ip, all, opened, guarded) in [
        ("", "0", true, true),
        ("127.0.0.1", "0", true, true),
        ("192.0.2.1", "0", false, false),
        ("", "1", false, true),
        ("192.0.2.1", "1", false, true),
    ] {
        let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
        kernel.sysctls.insert(ALL.into(), all.into());
        let mut inputs = inputs(VXLAN, &[]);
        inputs.pods.bridges.insert(bridge.clone(), need.clone());
        inputs.pods.host_ports = host_ports(&[("tcp", host_ip)]);
        let report = looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
        assert_eq!(report.pending, []);
        let is_opened = kernel.sysctls.get("net/ipv4/conf/cni0/route_localnet").is_some_and(|v| v == "1");
        let is_guarded = firewall::host_ports::guards(&kernel.ruleset, &bridge);
        assert_eq!((is_opened, is_guarded), (opened, guarded), "{host_ip:?}, {all} for all");
        assert_eq!(led(&kernel).expect("a table").len(), 1);
    }
}

#[test]
fn a_bridge_that_is_open_stays_guarded_while_no_record_names_it() {
    let cni0: IfName = "cni0".parse().expect("name");
    let foreign: IfName = "br-foreign".parse().expect("name");
    let veth: IfName = "vethab2cd3ef4gh".parse().expect("name");
    // Made by weft; or another's, with a pod of weft's on it.
    for (group, port) in [(LINK_GROUP, false), (0, true)] {
        let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
        let link =
            |kind| Link { kind, mac: LinkMac::Any, mtu: 1450, up: true, altered: Alterations::default() };
        kernel.add_link(cni0.clone(), link(LinkKind::Bridge), group);
        kernel.add_link(foreign.clone(), link(LinkKind::Bridge), 0);
        if port {
            kernel.add_link(veth.clone(), link(LinkKind::Other("veth".into())), LINK_GROUP);
            kernel.dump.links.get_mut(&veth).expect("added").port.bridge = Some(cni0.clone());
        }
        for bridge in [&cni0, &foreign] {
            kernel.sysctls.insert(format!("net/ipv4/conf/{bridge}/route_localnet"), "1".into());
        }
        looked(pass(&mut kernel, &mut memory, &inputs(VXLAN, &[]), 1, soon()));
        assert!(firewall::host_ports::guards(&kernel.ruleset, &cni0), "group {group}");
        assert!(!firewall::host_ports::guards(&kernel.ruleset, &foreign), "none of weft's business");
    }
}

#[test]
fn a_port_leads_nowhere_once_its_pod_is_gone_whatever_may_be_removed() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    let mut inputs = inputs(VXLAN, &[]);
    // Not before the first snapshot of leases.
    inputs.has_snapshot = false;
    inputs.pods.host_ports = host_ports(&[("tcp", "192.0.2.1")]);
    looked(pass(&mut kernel, &mut memory, &inputs, 1, soon()));
    assert_eq!(led(&kernel), Some(vec!["tcp 192.0.2.1:53 10.5.1.2:53".into()]));
    let full = kernel.ruleset.clone();
    inputs.pods.host_ports.clear();
    // What cannot be looked at may be anything.
    kernel.firewall_fault = Some(KernelError::Interrupted(10));
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
    let named =
        |report: &Report| report.pending.iter().any(|p| p.key.to_string().ends_with("ip weft-hostports"));
    assert!(named(&report), "{:?}", report.pending);
    kernel.firewall_fault = None;
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
    assert_eq!((report.pending.as_slice(), led(&kernel)), (&[][..], Some(vec![])));
    kernel.applied.clear();
    looked(pass(&mut kernel, &mut memory, &inputs, 2, soon()));
    assert_eq!(kernel.applied, []);
    inputs.has_snapshot = true;
    looked(pass(&mut kernel, &mut memory, &inputs, 3, soon()));
    assert_eq!(led(&kernel), None);
    // One that cannot be emptied is told.
    kernel.ruleset = full;
    inputs.has_snapshot = false;
    let key = Key::Firewall(PartKey::Table(firewall::host_ports::table_id(Family::Ip)));
    kernel.refused.insert(key.clone(), KernelError::Interrupted(10));
    let report = looked(pass(&mut kernel, &mut memory, &inputs, 4, soon()));
    assert!(named(&report), "{:?}", report.pending);
}

#[test]
fn host_ports_are_kept_before_the_node_is_known_and_nothing_else_is() {
    let (mut kernel, mut memory) = (FakeKernel::with_underlay("eth0"), Memory::default());
    // An earlier agent's.
    let mut known = inputs(VXLAN, &[PEER]);
    let need = BridgeNeed { subnets: vec!["10.5.1.0/24".parse().expect("net")], mtu: 1450, mac: None };
    known.pods.bridges.insert("cni0".parse().expect("name"), need);
    known.pods.host_ports = host_ports(&[("tcp", ""), ("udp", "192.0.2.1")]);
    known.firewall.masquerade = true;
    looked(pass(&mut kernel, &mut Memory::default(), &known, 1, soon()));
    let before = kernel.ruleset.clone();
    kernel.ruleset.flows = None;
    kernel.applied.clear();

    let mut unknown = Inputs { node: None, ..known };
    let mut look = |kernel: &mut FakeKernel, inputs: &Inputs, revision| -> Vec<String> {
        match pass(kernel, &mut memory, inputs, revision, soon()).expect("the kernel answers") {
            Outcome::HostPorts(pending) => pending.iter().map(|p| p.key.to_string()).collect(),
            Outcome::Node(_) => panic!("the node is not known"),
        }
    };
    let applied = |kernel: &mut FakeKernel| -> Vec<String> {
        std::mem::take(&mut kernel.applied).iter().map(|op| op.key().to_string()).collect()
    };
    let (table, flows) = ("nftables table ip weft-hostports", "UDP flows to host ports");
    // Nor while it is not known which pods there are.
    let unread = Inputs { pods: PodNeeds::default(), ..unknown.clone() };
    assert_eq!((look(&mut kernel, &unread, 1), applied(&mut kernel)), (vec![], vec![]));
    unknown.pods_recorded = true;
    assert_eq!(look(&mut kernel, &unknown, 1), [""; 0]);
    assert_eq!((applied(&mut kernel), &kernel.ruleset), (vec![flows.into()], &before));
    // A DEL.
    unknown.pods.host_ports = host_ports(&[("tcp", "")]);
    assert_eq!(look(&mut kernel, &unknown, 2), [""; 0]);
    assert_eq!(applied(&mut kernel), [table, flows]);
    assert_eq!(led(&kernel), Some(vec!["tcp *:53 10.5.1.2:53".into()]));
    // What is in the way is told, and tried again.
    unknown.pods.host_ports.clear();
    let key = Key::Firewall(PartKey::Flows);
    kernel.refused.insert(key, KernelError::NoConntrack);
    for _ in 0..2 {
        assert_eq!(look(&mut kernel, &unknown, 3), [flows]);
        assert_eq!(led(&kernel), Some(vec![]));
    }
    kernel.refused.clear();
    assert_eq!(look(&mut kernel, &unknown, 3), [""; 0]);
    let sysctls = std::mem::take(&mut kernel.sysctls);
    kernel.firewall_fault = Some(KernelError::NoNftables);
    assert_eq!(
        look(&mut kernel, &unknown, 3),
        [""; 0],
        "where there is no packet filter no port leads anywhere"
    );
    // The node is known: the same rules, and the rest.
    kernel.firewall_fault = None;
    kernel.sysctls = sysctls;
    kernel.applied.clear();
    let mut again = inputs(VXLAN, &[PEER]);
    (again.pods, again.firewall) = (unknown.pods, unknown.firewall);
    looked(pass(&mut kernel, &mut memory, &again, 4, soon()));
    assert!(!applied(&mut kernel).contains(&table.to_owned()));
}
