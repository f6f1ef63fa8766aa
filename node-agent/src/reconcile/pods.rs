//! What wired pods need from the kernel: their bridges with the gateways' addresses, and their ports as they were made.

use std::net::Ipv4Addr;

use weft_shared::names::{LINK_GROUP, bridge_mac};

use super::observe::PROTOCOL_KERNEL;
use crate::kernel::Dump;
use crate::object::{
    AddrForm, AddrScope, Alterations, BridgePort, Desired, Link, LinkKind, LinkMac, Object, Route, RouteForm,
};
use crate::pods::PodPorts;

/// `node` gives a new bridge of this node its own MAC, the same at every start.
pub(super) fn desired(pods: &PodPorts, node: Ipv4Addr, dump: &Dump) -> Desired {
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
    for (veth, port) in &pods.ports {
        let port = BridgePort {
            bridge: Some(port.options.name.clone()),
            hairpin: port.options.hairpin,
            isolated: port.options.isolated,
            mtu: port.mtu,
            up: true,
            marked: true,
            altered: false,
        };
        desired.insert(Object::Port { veth: veth.clone(), port });
    }
    desired
}
