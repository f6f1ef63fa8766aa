//! What wired pods need from the kernel: their bridges with the gateways' addresses, and their ports as they were made.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use weft_shared::IfName;
use weft_shared::names::bridge_mac;

use super::observe::PROTOCOL_KERNEL;
use crate::kernel::Dump;
use crate::object::{
    AddrForm, AddrScope, Alterations, BridgePort, Desired, Link, LinkKind, LinkMac, Object, Route, RouteForm,
};
use crate::pods::{DeviceFacts, PodPorts};

/// `node` gives a new bridge of this node its own MAC, the same at every start; `known` are the bridges as this agent
/// last saw them in place.
pub(super) fn desired(
    pods: &PodPorts,
    node: Ipv4Addr,
    dump: &Dump,
    known: &BTreeMap<IfName, DeviceFacts>,
) -> Desired {
    let mut desired = Desired::default();
    for (name, need) in &pods.bridges {
        let own_mac = bridge_mac(node, name);
        // What pods have in their neighbour tables stays, whoever changes or replaces the bridge.
        let recorded = pods.bridge_macs.get(name).copied();
        let mac = match known.get(name) {
            Some(known) => LinkMac::Exactly(known.mac),
            None => LinkMac::AtCreation(recorded.unwrap_or(own_mac)),
        };
        let found = dump.links.get(name).map(|found| &found.link);
        let adopted = match known.get(name).map(|known| known.mac).or(recorded) {
            Some(mac) => mac != own_mac,
            None => found.is_some_and(|found| found.mac.value() != own_mac),
        };
        let found = found.filter(|_| adopted).map(|found| found.altered).unwrap_or_default();
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
