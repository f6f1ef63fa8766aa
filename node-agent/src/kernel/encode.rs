//! Objects as rtnetlink messages. Each function names the iproute2 command that does the same.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVxlan, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use weft_shared::names::VETH_GROUP;
use weft_shared::{IfName, Mac, Subnet};

use crate::object::{BridgePort, Link, LinkKind, LinkMac, Route, Vxlan};

pub(super) fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// `ip link add NAME group GROUP address MAC mtu MTU type KIND ...`, brought up in the same message. The group marks the
/// device as made by us, and not adopted, from its first moment.
pub(super) fn new_link(name: &IfName, link: &Link) -> LinkMessage {
    let mut info = Vec::new();
    match &link.kind {
        LinkKind::Bridge => info.push(LinkInfo::Kind(InfoKind::Bridge)),
        LinkKind::Vxlan(vxlan) => {
            info.push(LinkInfo::Kind(InfoKind::Vxlan));
            info.push(LinkInfo::Data(InfoData::Vxlan(vxlan_data(vxlan))));
        }
        LinkKind::Other(kind) => info.push(LinkInfo::Kind(InfoKind::Other(kind.clone()))),
    }
    let mut message = up_or_down(0, link.up);
    message.attributes = vec![
        LinkAttribute::IfName(name.to_string()),
        LinkAttribute::Group(VETH_GROUP),
        LinkAttribute::Address(link.mac.value().0.to_vec()),
        LinkAttribute::Mtu(link.mtu),
        LinkAttribute::LinkInfo(info),
    ];
    message
}

/// `ip link set dev NAME mtu MTU [address MAC] up`
///
/// Only what differs: a MAC that is written again flushes the device's neighbours, permanent ones included.
pub(super) fn change_link(index: u32, link: &Link, have: &Link) -> LinkMessage {
    let mut message = up_or_down(index, link.up);
    if link.mtu != have.mtu {
        message.attributes.push(LinkAttribute::Mtu(link.mtu));
    }
    if let LinkMac::Exactly(mac) = link.mac
        && mac != have.mac.value()
    {
        message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    }
    message
}

/// `ip link set dev VETH master BRIDGE mtu MTU up`
pub(super) fn enslave(index: u32, bridge: u32, port: &BridgePort) -> LinkMessage {
    let mut message = up_or_down(index, port.up);
    message.attributes = vec![LinkAttribute::Controller(bridge), LinkAttribute::Mtu(port.mtu)];
    message
}

/// `ip link set dev VETH type bridge_slave hairpin on|off isolated on|off`
pub(super) fn port_options(index: u32, port: &BridgePort) -> LinkMessage {
    let options = vec![InfoBridgePort::HairpinMode(port.hairpin), InfoBridgePort::Isolated(port.isolated)];
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(options)),
    ])];
    message
}

/// `ip link show dev NAME`
pub(super) fn link_by_name(name: &IfName) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_string()));
    RouteNetlinkMessage::GetLink(message)
}

/// A message that names a link and nothing else.
pub(super) fn link_by_index(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

/// `ip address add ADDR dev DEV`
pub(super) fn address(index: u32, addr: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(addr.ip());
    message.header.prefix_len = addr.prefix();
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(addr.ip()), AddressAttribute::Address(addr.ip())];
    message
}

/// `ip neighbour replace IP lladdr MAC dev DEV nud permanent`
pub(super) fn neighbour(index: u32, ip: IpAddr, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![NeighbourAttribute::Destination(neighbour_address(ip)), lladdr(mac)];
    message
}

/// `bridge fdb replace MAC dev DEV dst IP self permanent`
pub(super) fn fdb(index: u32, mac: Mac, dst: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![lladdr(mac), NeighbourAttribute::Destination(neighbour_address(dst))];
    message
}

/// `ip route replace DST [via GATEWAY] dev DEV [onlink] proto PROTOCOL`
pub(super) fn route(index: u32, dst: Subnet, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.addr());
    message.header.destination_prefix_length = dst.len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.scope = if route.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
    message.header.kind = RouteType::Unicast;
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    message.attributes =
        vec![RouteAttribute::Destination(RouteAddress::from(dst.addr())), RouteAttribute::Oif(index)];
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    }
    message
}

/// `ip route get IP`
pub(super) fn route_lookup(ip: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(ip);
    message.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::from(ip))];
    RouteNetlinkMessage::GetRoute(message)
}

fn up_or_down(index: u32, up: bool) -> LinkMessage {
    let mut message = link_by_index(index);
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Up;
    message
}

fn vxlan_data(vxlan: &Vxlan) -> Vec<InfoVxlan> {
    let mut data = vec![
        InfoVxlan::Id(vxlan.vni),
        InfoVxlan::Link(vxlan.underlay),
        InfoVxlan::Learning(vxlan.learning),
        InfoVxlan::Port(vxlan.port),
        match vxlan.local {
            IpAddr::V4(local) => InfoVxlan::Local(local),
            IpAddr::V6(local) => InfoVxlan::Local6(local),
        },
    ];
    if vxlan.gbp {
        data.push(InfoVxlan::Gbp);
    }
    data
}

fn lladdr(mac: Mac) -> NeighbourAttribute {
    NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())
}

fn neighbour_address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }
}
