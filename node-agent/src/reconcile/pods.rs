//! What wired pods need from the kernel: their bridges with the gateways' addresses, their ports as they were made, their
//! limits, and a way from the host's loopback to those that have ports of the host.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use weft_shared::IfName;
use weft_shared::names::{LINK_GROUP, bridge_mac, egress_ifname};

use super::observe::PROTOCOL_KERNEL;
use crate::firewall::{HostPort, Ruleset, host_ports};
use crate::kernel::{Dump, Kernel, KernelError};
use crate::object::{
    AddrForm, AddrScope, Alterations, BridgePort, Desired, Key, Link, LinkKind, LinkMac, Object, Route,
    RouteForm, Tbf,
};
use crate::pods::{BridgePortNeed, PodNeeds};

/// `node` gives a new bridge of this node its own MAC, the same at every start.
pub(super) fn desired(pods: &PodNeeds, node: Ipv4Addr, dump: &Dump) -> Desired {
    let mut desired = Desired::default();
    for (name, need) in &pods.bridges {
        let mac = need.mac.map_or(LinkMac::AtCreation(bridge_mac(node, name)), LinkMac::Exactly);
        // One that weft made has its group; another's spanning tree and filters are whoever's made it.
        let adopted = dump.links.get(name).filter(|found| found.group != LINK_GROUP);
        let found = adopted.map(|found| found.link.altered).unwrap_or_default();
        let altered = Alterations {
            bridge_options: found.bridge_options,
            vlan_filtering: found.vlan_filtering,
            ..Alterations::default()
        };
        let link = Link { kind: LinkKind::Bridge, mac, mtu: need.mtu, up: true, altered };
        desired.insert(Object::Link { name: name.clone(), link });
        // No pod is to give the node routes.
        let path = format!("net/ipv6/conf/{name}/accept_ra");
        desired.insert(Object::Sysctl { path, value: "0".into() });
        for subnet in &need.subnets {
            let Some(addr) = subnet.with_len(subnet.gateway()) else { continue };
            let form = AddrForm::default();
            desired.insert(Object::Addr { dev: name.clone(), addr, scope: AddrScope::Global, form });
            // The kernel makes it along with the address and does not miss it when somebody deletes it.
            let connected = Route {
                gateway: None,
                dev: Some(name.clone()),
                onlink: false,
                protocol: PROTOCOL_KERNEL,
                source: Some(addr.ip()),
                form: RouteForm::default(),
            };
            desired.insert(Object::Route { dst: *subnet, route: connected });
        }
    }
    for (veth, port) in &pods.bridge_ports {
        match dump.links.get(veth) {
            Some(found) if found.index == port.ifindex => desired.extend(limits(veth, port)),
            // Whose name another device has taken.
            Some(_) => continue,
            // Nothing stands on a pair that is gone: its attachment is about to be.
            None => {}
        }
        let port = BridgePort {
            bridge: Some(port.options.name.clone()),
            hairpin: port.options.hairpin,
            isolated: port.options.isolated,
            mtu: port.mtu,
            up: true,
            marked: true,
            altered: false,
        };
        desired.insert(Object::BridgePort { veth: veth.clone(), port });
    }
    desired
}

/// What goes to a pod leaves by its veth's host end; what it sends comes in there, where nothing can wait, and is
/// led through a device of its own.
fn limits(veth: &IfName, port: &BridgePortNeed) -> Desired {
    let mut desired = Desired::default();
    if let Some(limit) = port.limits.ingress {
        desired.insert(Object::Shaper { dev: veth.clone(), tbf: Tbf::of(limit) });
    }
    if let Some((limit, ifb)) = port.limits.egress.zip(egress_ifname(veth)) {
        let altered = Alterations::default();
        let link = Link { kind: LinkKind::Ifb, mac: LinkMac::Any, mtu: port.mtu, up: true, altered };
        desired.insert(Object::Link { name: ifb.clone(), link });
        desired.insert(Object::Shaper { dev: ifb.clone(), tbf: Tbf::of(limit) });
        desired.insert(Object::Redirect { dev: veth.clone(), to: ifb });
    }
    desired
}

/// Whether an object is what an attachment is limited by.
pub(crate) fn is_limit_of(veth: &IfName, key: &Key) -> bool {
    let egress = egress_ifname(veth);
    match key {
        Key::Link(dev) => Some(dev) == egress.as_ref(),
        Key::Shaper(dev) | Key::Redirect(dev) => dev == veth || Some(dev) == egress.as_ref(),
        _ => false,
    }
}

/// Packets with a loopback address may come and go by a bridge.
const ROUTE_LOCALNET: &str = "route_localnet";
/// By each of them, whatever its own setting says (linux/inetdevice.h, `IN_DEV_NET_ROUTE_LOCALNET`).
const ROUTE_LOCALNET_OF_ALL: &str = "net/ipv4/conf/all/route_localnet";

fn route_localnet(bridge: &IfName) -> String {
    format!("net/ipv4/conf/{bridge}/{ROUTE_LOCALNET}")
}

/// Whether a setting is what [`loopback`] asks for: without it host ports work everywhere but on 127.0.0.1.
pub(super) fn is_of_loopback(path: &str) -> bool {
    path.ends_with(ROUTE_LOCALNET)
}

/// The way between the host's loopback and pods.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct WayToLoopback {
    /// Bridges by which pods could send there, or will: whoever has opened them, portmap does it too.
    pub(super) open: BTreeSet<IfName>,
    /// By the setting of all, which is somebody else's: none is needed of a bridge's own.
    open_for_all: bool,
}

/// A bridge that no record speaks of may have been opened in former times, and have pods on it all the same.
pub(super) fn way_to_loopback(
    pods: &PodNeeds,
    dump: &Dump,
    kernel: &mut impl Kernel,
) -> Result<WayToLoopback, KernelError> {
    let mut is_on = |path: &str| {
        let read = kernel.sysctls(&[path])?;
        Ok::<_, KernelError>(read.get(path).is_some_and(|value| value == "1"))
    };
    let mut way = WayToLoopback::default();
    let recorded: BTreeSet<&IfName> = pods.bridges.keys().collect();
    let bridges: BTreeSet<&IfName> = recorded.iter().copied().chain(marked_bridges(dump)).collect();
    if bridges.is_empty() {
        return Ok(way);
    }
    way.open_for_all = is_on(ROUTE_LOCALNET_OF_ALL)?;
    for bridge in bridges {
        let will_be = needs_loopback(pods) && recorded.contains(bridge);
        if way.open_for_all || will_be || is_on(&route_localnet(bridge))? {
            way.open.insert(bridge.clone());
        }
    }
    Ok(way)
}

/// Bridges that weft made, and those that veths of its pods hang on.
fn marked_bridges(dump: &Dump) -> impl Iterator<Item = &IfName> {
    dump.links.iter().filter(|(_, found)| found.group == LINK_GROUP).filter_map(|(name, found)| {
        let is_bridge = matches!(found.link.kind, LinkKind::Bridge);
        if is_bridge { Some(name) } else { found.port.bridge.as_ref().filter(|_| found.is_our_veth(name)) }
    })
}

/// The way from 127.0.0.1 to pods, once they are kept from it themselves. It stays: a setting tells nobody who else
/// lives by it.
pub(super) fn loopback(pods: &PodNeeds, way: &WayToLoopback, seen: &Ruleset) -> Desired {
    let mut desired = Desired::default();
    let wanted = needs_loopback(pods) && !way.open_for_all;
    for bridge in pods.bridges.keys().filter(|bridge| wanted && host_ports::guards(seen, bridge)) {
        desired.insert(Object::Sysctl { path: route_localnet(bridge), value: "1".into() });
    }
    desired
}

fn needs_loopback(pods: &PodNeeds) -> bool {
    pods.host_ports.iter().any(HostPort::is_on_loopback)
}
