//! Objects as rtnetlink messages. Each function names the iproute2 command that does the same.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::DefaultNla;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkProtocolDownReason,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use weft_shared::names::LINK_GROUP;
use weft_shared::{IfName, Mac, Subnet};

use super::decode::{BRIDGE_AGEING, NDA_NH_ID, scope_of};
use crate::object::{AddrForm, BridgePort, FdbPath, Link, LinkKind, LinkMac, Route, Vxlan, VxlanTuning};

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
        // Refused: the kernel makes these for /dev/net/tun only.
        LinkKind::Tun(_) => info.push(LinkInfo::Kind(InfoKind::Tun)),
        LinkKind::Ifb => info.push(LinkInfo::Kind(InfoKind::Ifb)),
        LinkKind::Other(kind) => info.push(LinkInfo::Kind(InfoKind::Other(kind.clone()))),
    }
    let mut message = up_or_down(0, link.up);
    message.attributes = vec![
        LinkAttribute::IfName(name.to_string()),
        LinkAttribute::Group(LINK_GROUP),
        LinkAttribute::Mtu(link.mtu),
        LinkAttribute::LinkInfo(info),
    ];
    if let LinkMac::Exactly(mac) | LinkMac::AtCreation(mac) = link.mac {
        message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    }
    message
}

/// `ip link set dev NAME mtu MTU [address MAC] [group GROUP] up arp on nomaster protodown off`
///
/// Only what differs: a MAC that is written again flushes the device's neighbours, permanent ones included.
pub(super) fn change_link(index: u32, link: &Link, have: &Link) -> LinkMessage {
    let mut message = up_or_down(index, link.up);
    let attributes = &mut message.attributes;
    if link.mtu != have.mtu {
        attributes.push(LinkAttribute::Mtu(link.mtu));
    }
    if let LinkMac::Exactly(mac) = link.mac
        && mac != have.mac.value()
    {
        attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    }
    if let (LinkKind::Tun(want), LinkKind::Tun(have)) = (&link.kind, &have.kind)
        && want.marked
        && !have.marked
    {
        attributes.push(LinkAttribute::Group(LINK_GROUP));
    }
    if have.altered.enslaved {
        attributes.push(LinkAttribute::Controller(0));
    }
    if have.altered.proto_down {
        // Reasons that others gave keep the kernel from letting go.
        let no_reason = vec![LinkProtocolDownReason::Mask(u32::MAX), LinkProtocolDownReason::Value(0)];
        attributes.push(LinkAttribute::ProtoDownReason(no_reason));
        attributes.push(LinkAttribute::ProtoDown(0));
    }
    let options = match (&link.kind, &have.kind) {
        (LinkKind::Bridge, _) => {
            let mut options = Vec::new();
            if have.altered.bridge_options && !link.altered.bridge_options {
                options.push(InfoBridge::StpState(BridgeStpState::Disabled));
                options.push(InfoBridge::AgeingTime(BRIDGE_AGEING));
            }
            // A kernel without VLAN filtering refuses to switch it off.
            if have.altered.vlan_filtering && !link.altered.vlan_filtering {
                options.push(InfoBridge::VlanFiltering(false));
            }
            (!options.is_empty()).then_some((InfoKind::Bridge, InfoData::Bridge(options)))
        }
        (LinkKind::Vxlan(want), LinkKind::Vxlan(have)) if want.tuning != have.tuning => {
            Some((InfoKind::Vxlan, InfoData::Vxlan(vxlan_tuning(want.tuning))))
        }
        _ => None,
    };
    if let Some((kind, data)) = options {
        attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]));
    }
    if have.altered.noarp {
        message.header.change_mask |= LinkFlags::Noarp;
    }
    message
}

/// `ip link set dev OLD name NAME`
pub(super) fn rename_link(index: u32, name: &IfName) -> LinkMessage {
    let mut message = link_by_index(index);
    message.attributes = vec![LinkAttribute::IfName(name.to_string())];
    message
}

/// `ip link set dev NAME down`
pub(super) fn down(index: u32) -> LinkMessage {
    up_or_down(index, false)
}

/// `ip link set dev VETH master BRIDGE mtu MTU group GROUP up`
pub(super) fn enslave(index: u32, bridge: u32, port: &BridgePort) -> LinkMessage {
    let mut message = up_or_down(index, port.up);
    message.attributes = vec![
        LinkAttribute::Controller(bridge),
        LinkAttribute::Mtu(port.mtu),
        LinkAttribute::Group(LINK_GROUP),
    ];
    message
}

/// `ip link set dev VETH type bridge_slave hairpin on|off isolated on|off`, and the rest as a new port has it when a
/// foreign hand has been there.
pub(super) fn port_options(index: u32, port: &BridgePort, altered: bool) -> LinkMessage {
    let mut options =
        vec![InfoBridgePort::HairpinMode(port.hairpin), InfoBridgePort::Isolated(port.isolated)];
    if altered {
        options.extend([
            InfoBridgePort::Learning(true),
            InfoBridgePort::UnicastFlood(true),
            InfoBridgePort::MulticastFlood(true),
            InfoBridgePort::BroadcastFlood(true),
            InfoBridgePort::Guard(false),
            InfoBridgePort::Protect(false),
            InfoBridgePort::NeighSupress(false),
            InfoBridgePort::ProxyARP(false),
            InfoBridgePort::ProxyARPWifi(false),
            InfoBridgePort::VlanTunnel(false),
            InfoBridgePort::Mab(false),
            InfoBridgePort::Locked(false),
        ]);
    }
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

/// `ip address add ADDR [peer PEER] dev DEV`; `form` names the one to delete.
pub(super) fn address(index: u32, addr: IpNetwork, form: AddrForm) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(addr.ip());
    message.header.prefix_len = addr.prefix();
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes =
        vec![AddressAttribute::Local(addr.ip()), AddressAttribute::Address(form.peer.unwrap_or(addr.ip()))];
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

/// `bridge fdb replace MAC dev DEV dst IP [port PORT] [vni VNI] [via DEV] self permanent`
pub(super) fn fdb(index: u32, mac: Mac, dst: IpAddr, path: FdbPath) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![lladdr(mac)];
    match path.nexthop {
        Some(id) => message
            .attributes
            .push(NeighbourAttribute::Other(DefaultNla::new(NDA_NH_ID, id.to_ne_bytes().to_vec()))),
        None => message.attributes.push(NeighbourAttribute::Destination(neighbour_address(dst))),
    }
    message.attributes.extend(path.port.map(NeighbourAttribute::Port));
    message.attributes.extend(path.vni.map(NeighbourAttribute::Vni));
    message.attributes.extend(path.via.map(NeighbourAttribute::IfIndex));
    message
}

/// `ip route replace DST [via GATEWAY] dev DEV [onlink] proto PROTOCOL [src SOURCE] [metric METRIC]`
pub(super) fn route(index: Option<u32>, dst: Subnet, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.addr());
    message.header.destination_prefix_length = dst.len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.scope = scope_of(dst, route.gateway.is_some());
    message.header.kind = RouteType::Unicast;
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::from(dst.addr()))];
    message.attributes.extend(index.map(RouteAttribute::Oif));
    message.attributes.extend(route.gateway.map(|ip| RouteAttribute::Gateway(RouteAddress::from(ip))));
    message.attributes.extend(route.source.map(|ip| RouteAttribute::PrefSource(RouteAddress::from(ip))));
    message.attributes.extend(route.form.metric.map(RouteAttribute::Priority));
    message
}

/// `ip route delete`, of exactly this one as it was found: the protocol keeps others' out of it.
pub(super) fn route_to_delete(index: Option<u32>, dst: Subnet, found: &Route) -> RouteMessage {
    let form = found.form;
    let mut message = route(index, dst, found);
    message.header.tos = form.tos;
    message.header.scope = form.scope.map_or(message.header.scope, Into::into);
    message.header.kind = form.kind.map_or(RouteType::Unicast, Into::into);
    if let Some(id) = form.nexthop {
        // A nexthop object's device and gateway are not the route's own.
        message.attributes.retain(|a| !matches!(a, RouteAttribute::Oif(_) | RouteAttribute::Gateway(_)));
        message.attributes.push(RouteAttribute::NhId(id));
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
        InfoVxlan::Learning(vxlan.tuning.learning),
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

fn vxlan_tuning(tuning: VxlanTuning) -> Vec<InfoVxlan> {
    vec![
        InfoVxlan::Learning(tuning.learning),
        InfoVxlan::Ttl(tuning.ttl),
        InfoVxlan::Tos(tuning.tos),
        InfoVxlan::Df(tuning.df.into()),
        InfoVxlan::Ageing(tuning.ageing),
    ]
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
