//! rtnetlink messages as objects. What is not of our concern (other tables, other states) decodes to `None`.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::Nla;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoTun, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteScope, RouteType,
};
use weft_shared::names::LINK_GROUP;
use weft_shared::{IfName, Mac, Subnet};

use super::FoundLink;
use crate::object::{
    AddrForm, AddrScope, Alterations, BridgePort, FdbPath, Link, LinkKind, LinkMac, RouteForm, Tun, Vxlan,
    VxlanTuning,
};

/// linux/neighbour.h.
pub(super) const NDA_NH_ID: u16 = 13;

// linux/if_link.h, linux/if_tun.h.
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_TUN_GROUP: u16 = 2;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_PERSIST: u16 = 6;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFF_TAP: u8 = 2;

/// A new bridge's, in hundredths of a second.
pub(super) const BRIDGE_AGEING: u32 = 300 * 100;

/// IPv6 routes get this metric when none is asked for (`IP6_RT_PRIO_USER`).
const IPV6_DEFAULT_METRIC: u32 = 1024;

/// A link with its name and the index of its bridge.
pub(super) fn link(message: &LinkMessage) -> Option<(IfName, FoundLink, Option<u32>)> {
    let mut name = None;
    let (mut mac, mut mtu, mut group, mut master) = (None, 0, 0, None);
    let mut kind = LinkKind::Other("physical device".into());
    let (mut proto_down, mut carrier) = (false, false);
    let mut bridge: &[InfoBridge] = &[];
    let mut options: &[InfoBridgePort] = &[];
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse::<IfName>().ok(),
            LinkAttribute::Address(bytes) => mac = mac_of(bytes),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Group(value) => group = *value,
            LinkAttribute::Controller(index) => master = Some(*index),
            LinkAttribute::ProtoDown(on) => proto_down = *on != 0,
            LinkAttribute::Carrier(on) => carrier = *on != 0,
            LinkAttribute::LinkInfo(infos) => {
                kind = link_kind(infos).unwrap_or(kind);
                bridge = bridge_data(infos);
                options = port_options(infos);
            }
            _ => {}
        }
    }
    if let LinkKind::Tun(tun) = &mut kind {
        (tun.marked, tun.attached) = (group == LINK_GROUP, carrier);
    }
    let is_tunnel = matches!(kind, LinkKind::Vxlan(_) | LinkKind::Tun(_));
    let flags = message.header.flags;
    let up = flags.contains(LinkFlags::Up);
    let altered = Alterations {
        // Of a device without MAC addresses it says nothing, nor of one that has it from the start.
        noarp: flags.contains(LinkFlags::Noarp) && !matches!(kind, LinkKind::Tun(_) | LinkKind::Ifb),
        proto_down,
        enslaved: master.is_some() && is_tunnel,
        bridge_options: bridge.iter().any(|option| match option {
            InfoBridge::StpState(state) => *state != BridgeStpState::Disabled,
            InfoBridge::AgeingTime(time) => *time != BRIDGE_AGEING,
            _ => false,
        }),
        vlan_filtering: bridge.contains(&InfoBridge::VlanFiltering(true)),
    };
    let mut port = BridgePort {
        bridge: None,
        hairpin: false,
        isolated: false,
        mtu,
        up,
        marked: group == LINK_GROUP,
        altered: false,
    };
    for option in options {
        match option {
            InfoBridgePort::HairpinMode(on) => port.hairpin = *on,
            InfoBridgePort::Isolated(on) => port.isolated = *on,
            other => port.altered |= stops_packets(other),
        }
    }
    let mac = mac.map_or(LinkMac::None, LinkMac::Exactly);
    let link = Link { kind, mac, mtu, up, altered };
    Some((name?, FoundLink { index: message.header.index, link, group, port }, master))
}

/// Whether a port's option keeps packets from a pod that a new port would let through. Its state is not among them: as
/// long as the bridge has no spanning tree the kernel sets that right itself.
fn stops_packets(option: &InfoBridgePort) -> bool {
    match option {
        InfoBridgePort::Learning(on)
        | InfoBridgePort::UnicastFlood(on)
        | InfoBridgePort::MulticastFlood(on)
        | InfoBridgePort::BroadcastFlood(on) => !on,
        InfoBridgePort::Guard(on)
        | InfoBridgePort::Protect(on)
        | InfoBridgePort::NeighSupress(on)
        | InfoBridgePort::ProxyARP(on)
        | InfoBridgePort::ProxyARPWifi(on)
        | InfoBridgePort::VlanTunnel(on)
        | InfoBridgePort::Locked(on)
        | InfoBridgePort::Mab(on) => *on,
        _ => false,
    }
}

fn bridge_data(infos: &[LinkInfo]) -> &[InfoBridge] {
    let options = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Bridge(options)) => Some(options.as_slice()),
        _ => None,
    });
    options.unwrap_or_default()
}

pub(super) struct Address {
    pub(super) index: u32,
    pub(super) addr: IpNetwork,
    pub(super) scope: AddrScope,
    pub(super) form: AddrForm,
    pub(super) deprecated: bool,
    pub(super) temporary: bool,
}

pub(super) fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut peer) = (None, None);
    let header = message.header.flags;
    let mut deprecated = header.contains(AddressHeaderFlags::Deprecated);
    let mut permanent = header.contains(AddressHeaderFlags::Permanent);
    let mut secondary = header.contains(AddressHeaderFlags::Secondary);
    let mut form = AddrForm::default();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Flags(flags) => {
                deprecated |= flags.contains(AddressFlags::Deprecated);
                permanent |= flags.contains(AddressFlags::Permanent);
                secondary |= flags.contains(AddressFlags::Secondary);
                form.routeless = flags.contains(AddressFlags::Noprefixroute);
            }
            AddressAttribute::RoutePriority(metric) => form.metric = *metric,
            _ => {}
        }
    }
    // On a point-to-point link the two differ and `Local` is ours; IPv6 sends `Address` alone.
    let addr = IpNetwork::new(local.or(peer)?, message.header.prefix_len).ok()?;
    form.expires = !permanent;
    form.peer = peer.filter(|peer| *peer != addr.ip());
    // An address alone has no route to bring.
    form.routeless &= addr.prefix() < if addr.is_ipv4() { 32 } else { 128 };
    Some(Address {
        index: message.header.index,
        addr,
        scope: match message.header.scope {
            AddressScope::Link => AddrScope::Link,
            AddressScope::Host | AddressScope::Nowhere => AddrScope::Host,
            _ => AddrScope::Global,
        },
        form,
        deprecated,
        // The flag's two names (linux/if_addr.h): IFA_F_SECONDARY in IPv4, IFA_F_TEMPORARY in IPv6.
        temporary: secondary && addr.is_ipv6(),
    })
}

/// A permanent neighbour: device, address, MAC.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<(u32, IpAddr, Mac)> {
    let (dst, mac) = neighbour_attributes(message);
    is_permanent(message).then_some((message.header.ifindex, dst?, mac?))
}

/// A permanent unicast forwarding entry: MAC, destination (unspecified when a nexthop object stands for it) and how it
/// leads there.
pub(super) fn fdb(message: &NeighbourMessage) -> Option<(Mac, IpAddr, FdbPath)> {
    let (dst, mac) = neighbour_attributes(message);
    let wanted = message.header.family == AddressFamily::Bridge && is_permanent(message);
    let mut path = FdbPath::default();
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Port(port) => path.port = Some(*port),
            NeighbourAttribute::Vni(vni) => path.vni = Some(*vni),
            NeighbourAttribute::IfIndex(index) => path.via = Some(*index),
            NeighbourAttribute::Other(other) if other.kind() == NDA_NH_ID => {
                let mut id = [0; 4];
                if other.value_len() == id.len() {
                    other.emit_value(&mut id);
                    path.nexthop = Some(u32::from_ne_bytes(id));
                }
            }
            _ => {}
        }
    }
    let dst = dst.or(path.nexthop.map(|_| std::net::Ipv4Addr::UNSPECIFIED.into()));
    wanted.then_some((mac.filter(Mac::is_unicast)?, dst?, path))
}

/// A set of bits, not one state: `bridge fdb add` gives `NUD_NOARP | NUD_PERMANENT`.
fn is_permanent(message: &NeighbourMessage) -> bool {
    let permanent = u16::from(NeighbourState::Permanent);
    u16::from(message.header.state) & permanent != 0
}

pub(super) struct FoundRoute {
    pub(super) dst: Subnet,
    pub(super) oif: Option<u32>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) onlink: bool,
    pub(super) protocol: u8,
    pub(super) source: Option<IpAddr>,
    pub(super) form: RouteForm,
}

/// A route of the main table.
pub(super) fn route(message: &RouteMessage) -> Option<FoundRoute> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let (mut dst, mut oif, mut gateway, mut source) = (None, None, None, None);
    let mut metric = 0;
    let mut form = RouteForm { tos: header.tos, ..RouteForm::default() };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(ip) => dst = ip_of(ip),
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Gateway(ip) => gateway = ip_of(ip),
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::PrefSource(ip) => source = ip_of(ip),
            RouteAttribute::NhId(id) => form.nexthop = Some(*id),
            // Reported of every IPv6 route.
            RouteAttribute::CacheInfo(_) | RouteAttribute::Preference(_) => {}
            _ => form.extras = true,
        }
    }
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let dst = Subnet::new(dst.unwrap_or(any), header.destination_prefix_length)?;
    let default_metric = if dst.is_ipv4() { 0 } else { IPV6_DEFAULT_METRIC };
    let scope = scope_of(dst, gateway.is_some());
    form.metric = Some(metric).filter(|metric| *metric != default_metric);
    form.scope = Some(u8::from(header.scope)).filter(|found| *found != u8::from(scope));
    form.kind = Some(u8::from(header.kind)).filter(|kind| *kind != u8::from(RouteType::Unicast));
    let ours = table == u32::from(RouteHeader::RT_TABLE_MAIN) && !header.flags.contains(RouteFlags::Cloned);
    let onlink = header.flags.contains(RouteFlags::Onlink);
    ours.then_some(FoundRoute { dst, oif, gateway, onlink, protocol: header.protocol.into(), source, form })
}

/// The scope that goes with a gateway, or with having none. IPv6 knows no other than the widest.
pub(super) fn scope_of(dst: Subnet, has_gateway: bool) -> RouteScope {
    if has_gateway || !dst.is_ipv4() { RouteScope::Universe } else { RouteScope::Link }
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
        LinkInfo::Data(data) => Some(data),
        _ => None,
    });
    Some(match (kind, data) {
        (InfoKind::Bridge, _) => LinkKind::Bridge,
        (InfoKind::Ifb, _) => LinkKind::Ifb,
        (InfoKind::Vxlan, Some(InfoData::Vxlan(data))) => LinkKind::Vxlan(vxlan(data)),
        (InfoKind::Tun, Some(InfoData::Tun(data))) => LinkKind::Tun(tun(data)),
        (other, _) => LinkKind::Other(other.to_string()),
    })
}

/// As `tun_fill_info` of drivers/net/tun.c tells it.
fn tun(data: &[InfoTun]) -> Tun {
    let mut tun = Tun {
        tap: false,
        multi_queue: false,
        persistent: false,
        owned: false,
        marked: false,
        attached: false,
    };
    for nla in data.iter().filter(|nla| nla.value_len() > 0) {
        let mut value = vec![0; nla.value_len()];
        nla.emit_value(&mut value);
        match nla.kind() {
            IFLA_TUN_OWNER | IFLA_TUN_GROUP => tun.owned = true,
            IFLA_TUN_TYPE => tun.tap = value[0] == IFF_TAP,
            IFLA_TUN_PERSIST => tun.persistent = value[0] != 0,
            IFLA_TUN_MULTI_QUEUE => tun.multi_queue = value[0] != 0,
            _ => {}
        }
    }
    tun
}

fn vxlan(data: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan {
        vni: 0,
        underlay: 0,
        local: std::net::Ipv4Addr::UNSPECIFIED.into(),
        port: 0,
        gbp: false,
        foreign_options: Default::default(),
        tuning: VxlanTuning::with_learning(false),
    };
    for attribute in data {
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Link(index) => vxlan.underlay = *index,
            InfoVxlan::Local(ip) => vxlan.local = (*ip).into(),
            InfoVxlan::Local6(ip) => vxlan.local = (*ip).into(),
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Gbp => vxlan.gbp = true,
            InfoVxlan::Learning(on) => vxlan.tuning.learning = *on,
            InfoVxlan::Ttl(ttl) => vxlan.tuning.ttl = *ttl,
            InfoVxlan::Tos(tos) => vxlan.tuning.tos = *tos,
            InfoVxlan::Df(df) => vxlan.tuning.df = (*df).into(),
            InfoVxlan::Ageing(seconds) => vxlan.tuning.ageing = *seconds,
            other => vxlan.foreign_options.extend(foreign_vxlan_option(other)),
        }
    }
    vxlan
}

fn foreign_vxlan_option(option: &InfoVxlan) -> Option<&'static str> {
    match option {
        InfoVxlan::Group(_) | InfoVxlan::Group6(_) => Some("remote"),
        InfoVxlan::Proxy(true) => Some("proxy"),
        InfoVxlan::Rsc(true) => Some("rsc"),
        InfoVxlan::L2Miss(true) => Some("l2miss"),
        InfoVxlan::L3Miss(true) => Some("l3miss"),
        InfoVxlan::CollectMetadata(true) => Some("external"),
        InfoVxlan::Vnifilter(true) => Some("vnifilter"),
        InfoVxlan::RemCsumTX(true) | InfoVxlan::RemCsumRX(true) => Some("remcsum"),
        InfoVxlan::Gpe => Some("gpe"),
        InfoVxlan::TtlInheritFlag => Some("ttl inherit"),
        InfoVxlan::TtlInherit(on) if *on != 0 => Some("ttl inherit"),
        InfoVxlan::Limit(limit) if *limit != 0 => Some("maxaddress"),
        _ => None,
    }
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
