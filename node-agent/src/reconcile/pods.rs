//! What wired pods need from the kernel: their bridges with the gateways' addresses, and their ports as they were made.

use std::net::Ipv4Addr;

use weft_shared::names::bridge_mac;

use crate::object::{AddrScope, BridgePort, Desired, Link, LinkKind, LinkMac, Object};
use crate::pods::PodPorts;

/// `node` gives a new bridge of this node its own MAC, the same at every start.
pub(super) fn desired(pods: &PodPorts, node: Ipv4Addr) -> Desired {
    let mut desired = Desired::default();
    for (name, need) in &pods.bridges {
        let known = pods.bridge_macs.get(name).copied();
        let mac = LinkMac::AtCreation(known.unwrap_or_else(|| bridge_mac(node, name)));
        let link = Link { kind: LinkKind::Bridge, mac, mtu: need.mtu, up: true };
        desired.insert(Object::Link { name: name.clone(), link });
        for subnet in &need.subnets {
            if let Some(addr) = subnet.with_len(subnet.gateway()) {
                desired.insert(Object::Addr { dev: name.clone(), addr, scope: AddrScope::Global });
            }
        }
    }
    for (veth, port) in &pods.ports {
        let port = BridgePort {
            bridge: Some(port.options.name.clone()),
            hairpin: port.options.hairpin,
            isolated: port.options.isolated,
            mtu: port.mtu,
            up: true,
        };
        desired.insert(Object::Port { veth: veth.clone(), port });
    }
    desired
}
