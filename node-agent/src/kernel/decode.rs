//! rtnetlink messages as objects. What is not of our concern (other tables, other states) decodes to `None`.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use weft_shared::{IfName, Mac, Subnet};

use super::FoundLink;
use crate::object::{AddrScope, BridgePort, Link, LinkKind, LinkMac, Vxlan};

/// IPv6 routes get this metric when none is asked for (`IP6_RT_PRIO_USER`).
const IPV6_DEFAULT_METRIC: u32 = 1024;

/// A link with its name and the index of its bridge.
pub(super) fn link(message: &LinkMessage) -> Option<(IfName, FoundLink, Option<u32>)> {
    let mut name = None;
    let (mut mac, mut mtu, mut group, mut bridge) = (Mac([0; 6]), 0, 0, None);
    let mut kind = LinkKind::Other("physical device".into());
    let (mut hairpin, mut isolated) = (false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse::<IfName>().ok(),
            LinkAttribute::Address(bytes) => mac = mac_of(bytes).unwrap_or(mac),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Group(value) => group = *value,
            LinkAttribute::Controller(index) => bridge = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                kind = link_kind(infos).unwrap_or(kind);
                for option in port_options(infos) {
                    match option {
                        InfoBridgePort::HairpinMode(on) => hairpin = *on,
                        InfoBridgePort::Isolated(on) => isolated = *on,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let up = message.header.flags.contains(LinkFlags::Up);
    let found = FoundLink {
        index: message.header.index,
        link: Link { kind, mac: LinkMac::Exactly(mac), mtu, up },
        group,
        port: BridgePort { bridge: None, hairpin, isolated, mtu, up },
    };
    Some((name?, found, bridge))
}

pub(super) struct Address {
    pub(super) index: u32,
    pub(super) addr: IpNetwork,
    pub(super) scope: AddrScope,
    pub(super) deprecated: bool,
    pub(super) dynamic: bool,
    pub(super) temporary: bool,
}

pub(super) fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut peer) = (None, None);
    let header = message.header.flags;
    let mut deprecated = header.contains(AddressHeaderFlags::Deprecated);
    let mut permanent = header.contains(AddressHeaderFlags::Permanent);
    let mut secondary = header.contains(AddressHeaderFlags::Secondary);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Flags(flags) => {
                deprecated |= flags.contains(AddressFlags::Deprecated);
                permanent |= flags.contains(AddressFlags::Permanent);
                secondary |= flags.contains(AddressFlags::Secondary);
            }
            _ => {}
        }
    }
    // On a point-to-point link the two differ and `Local` is ours; IPv6 sends `Address` alone.
    let addr = IpNetwork::new(local.or(peer)?, message.header.prefix_len).ok()?;
    Some(Address {
        index: message.header.index,
        addr,
        scope: match message.header.scope {
            AddressScope::Link => AddrScope::Link,
            AddressScope::Host | AddressScope::Nowhere => AddrScope::Host,
            _ => AddrScope::Global,
        },
        deprecated,
        dynamic: !permanent,
        // The flag's two names (linux/if_addr.h): IFA_F_SECONDARY in IPv4, IFA_F_TEMPORARY in IPv6.
        temporary: secondary && addr.is_ipv6(),
    })
}

/// A permanent neighbour: device, address, MAC.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<(u32, IpAddr, Mac)> {
    let (dst, mac) = neighbour_attributes(message);
    is_permanent(message).then_some((message.header.ifindex, dst?, mac?))
}

/// A permanent unicast forwarding entry with a destination: device, MAC, destination.
pub(super) fn fdb(message: &NeighbourMessage) -> Option<(u32, Mac, IpAddr)> {
    let (dst, mac) = neighbour_attributes(message);
    let wanted = message.header.family == AddressFamily::Bridge && is_permanent(message);
    wanted.then_some((message.header.ifindex, mac.filter(Mac::is_unicast)?, dst?))
}

/// A set of bits, not one state: `bridge fdb add` gives `NUD_NOARP | NUD_PERMANENT`.
fn is_permanent(message: &NeighbourMessage) -> bool {
    let permanent = u16::from(NeighbourState::Permanent);
    u16::from(message.header.state) & permanent != 0
}

pub(super) struct FoundRoute {
    pub(super) dst: Subnet,
    pub(super) oif: u32,
    pub(super) gateway: Option<IpAddr>,
    pub(super) onlink: bool,
    pub(super) protocol: u8,
    pub(super) metric: u32,
}

/// A unicast route of the main table through one device.
pub(super) fn route(message: &RouteMessage) -> Option<FoundRoute> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let (mut dst, mut oif, mut gateway, mut metric) = (None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(ip) => dst = ip_of(ip),
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Gateway(ip) => gateway = ip_of(ip),
            RouteAttribute::Priority(value) => metric = *value,
            _ => {}
        }
    }
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let ours = table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && header.kind == RouteType::Unicast
        && header.tos == 0
        && !header.flags.contains(RouteFlags::Cloned);
    ours.then_some(FoundRoute {
        dst: Subnet::new(dst.unwrap_or(any), header.destination_prefix_length)?,
        oif: oif?,
        gateway,
        onlink: header.flags.contains(RouteFlags::Onlink),
        protocol: header.protocol.into(),
        metric,
    })
}

impl FoundRoute {
    /// The metric that a route gets when it is made without one: the only one we use.
    pub(super) fn has_default_metric(&self) -> bool {
        self.metric == if self.dst.is_ipv4() { 0 } else { IPV6_DEFAULT_METRIC }
    }

    /// Made by the kernel itself, along with an address.
    pub(super) fn is_kernels(&self) -> bool {
        self.protocol == u8::from(RouteProtocol::Kernel)
    }
}

/// The answer to a route lookup: device, gateway, preferred source.
pub(super) fn lookup(message: &RouteMessage) -> Option<(u32, Option<IpAddr>, Option<IpAddr>)> {
    let (mut oif, mut gateway, mut source) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Gateway(ip) => gateway = ip_of(ip),
            RouteAttribute::Via(_) => gateway = Some(std::net::Ipv6Addr::UNSPECIFIED.into()),
            RouteAttribute::PrefSource(ip) => source = ip_of(ip),
            _ => {}
        }
    }
    (message.header.kind == RouteType::Unicast).then_some((oif?, gateway, source))
}

fn link_kind(infos: &[LinkInfo]) -> Option<LinkKind> {
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })?;
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    });
    Some(match (kind, data) {
        (InfoKind::Bridge, _) => LinkKind::Bridge,
        (InfoKind::Vxlan, Some(data)) => LinkKind::Vxlan(vxlan(data)),
        (other, _) => LinkKind::Other(other.to_string()),
    })
}

fn vxlan(data: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan {
        vni: 0,
        underlay: 0,
        local: std::net::Ipv4Addr::UNSPECIFIED.into(),
        port: 0,
        learning: false,
        gbp: false,
    };
    for attribute in data {
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Link(index) => vxlan.underlay = *index,
            InfoVxlan::Local(ip) => vxlan.local = (*ip).into(),
            InfoVxlan::Local6(ip) => vxlan.local = (*ip).into(),
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Learning(on) => vxlan.learning = *on,
            InfoVxlan::Gbp => vxlan.gbp = true,
            _ => {}
        }
    }
    vxlan
}

fn port_options(infos: &[LinkInfo]) -> &[InfoBridgePort] {
    infos
        .iter()
        .find_map(|info| match info {
            LinkInfo::PortData(InfoPortData::BridgePort(options)) => Some(options.as_slice()),
            _ => None,
        })
        .unwrap_or_default()
}

fn neighbour_attributes(message: &NeighbourMessage) -> (Option<IpAddr>, Option<Mac>) {
    let (mut dst, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => dst = Some((*ip).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => dst = Some((*ip).into()),
            // In the bridge family the address has no family of its own; its length tells.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => dst = ip_of_bytes(bytes),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = mac_of(bytes),
            _ => {}
        }
    }
    (dst, mac)
}

fn mac_of(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn ip_of_bytes(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
