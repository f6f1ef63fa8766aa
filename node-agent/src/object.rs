//! What weft keeps in the kernel, as values: each object has a key (what the kernel tells it apart by) and attributes.
//!
//! The order of [`Key`] is the order of creation: what comes later stands on what comes before, so a route is never
//! there before its neighbour and its forwarding entry. Removal goes the other way round.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_shared::names::ROUTE_PROTOCOL;
use weft_shared::protocol::Limit;
use weft_shared::{IfName, Mac, Subnet};

use crate::firewall::{Part, PartKey};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// The name that a device of ours should have, when somebody has given it another.
    Name(IfName),
    Link(IfName),
    /// Path below `/proc/sys`.
    Sysctl(String),
    /// Before anything that lets packets through: a connection keeps the translation it began with.
    Firewall(PartKey),
    BridgePort(IfName),
    /// What leaves by a device.
    Shaper(IfName),
    /// What comes in by a device.
    Redirect(IfName),
    Addr(IfName, IpNetwork),
    /// Before the neighbour: a peer's new MAC must lead somewhere when packets begin to carry it.
    Fdb(IfName, Mac),
    Neigh(IfName, IpAddr),
    /// Main table, of the metric that is wanted: 0 (IPv6: the default 1024), unless the wanted one says so.
    Route(Subnet),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A device of ours is called `now`.
    Name {
        name: IfName,
        now: IfName,
    },
    Link {
        name: IfName,
        link: Link,
    },
    Sysctl {
        path: String,
        value: String,
    },
    Firewall(Part),
    BridgePort {
        veth: IfName,
        port: BridgePort,
    },
    Shaper {
        dev: IfName,
        tbf: Tbf,
    },
    /// All that comes in by `dev` leaves by `to` first.
    Redirect {
        dev: IfName,
        to: IfName,
    },
    Addr {
        dev: IfName,
        addr: IpNetwork,
        scope: AddrScope,
        form: AddrForm,
    },
    Neigh {
        dev: IfName,
        ip: IpAddr,
        mac: Mac,
    },
    Fdb {
        dev: IfName,
        mac: Mac,
        dst: IpAddr,
        path: FdbPath,
    },
    Route {
        dst: Subnet,
        route: Route,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub kind: LinkKind,
    pub mac: LinkMac,
    pub mtu: u32,
    pub up: bool,
    pub altered: Alterations,
}

/// What a foreign hand can do to a device beside that. Found, and wanted only of an adopted bridge, which keeps its own
/// options: spanning tree may be what keeps an operator's loop closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Alterations {
    /// `arp off`: nothing is resolved on it.
    pub noarp: bool,
    pub proto_down: bool,
    /// It is a port of something: its packets go there.
    pub enslaved: bool,
    /// Spanning tree or ageing are not a new bridge's.
    pub bridge_options: bool,
    pub vlan_filtering: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    Vxlan(Vxlan),
    Bridge,
    Tun(Tun),
    /// Where what comes in by another device is queued (drivers/net/ifb.c).
    Ifb,
    /// Found in the kernel, never wanted: its kind's name.
    Other(String),
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vxlan(_) => f.write_str("VXLAN device"),
            Self::Bridge => f.write_str("bridge"),
            Self::Tun(tun) => f.write_str(if tun.tap { "TAP device" } else { "TUN device" }),
            Self::Ifb => f.write_str("intermediate functional block"),
            Self::Other(kind) => f.write_str(kind),
        }
    }
}

/// The attributes of a VXLAN device. Left out is what does no harm: checksums of the outer packet, the range of source
/// ports, local bypass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    pub vni: u32,
    /// Index of the underlay interface.
    pub underlay: u32,
    pub local: IpAddr,
    pub port: u16,
    pub gbp: bool,
    /// Found, never wanted: options that change what the device does with packets, in iproute2's words.
    pub foreign_options: BTreeSet<&'static str>,
    pub tuning: VxlanTuning,
}

/// What the kernel changes on a living device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanTuning {
    pub learning: bool,
    /// 0: as the underlay's route says.
    pub ttl: u8,
    pub tos: u8,
    /// Of the outer packet (`IFLA_VXLAN_DF`).
    pub df: u8,
    /// Seconds.
    pub ageing: u32,
}

impl VxlanTuning {
    /// A new device's.
    pub fn with_learning(learning: bool) -> Self {
        Self { learning, ttl: 0, tos: 0, df: 0, ageing: 300 }
    }
}

/// A device of drivers/net/tun.c. Left out is what the first queue brings along that is attached: the virtio header,
/// packet information, offloads. Whether anybody forwards is not the device's: without a queue it has no carrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tun {
    /// Found, never wanted: it carries Ethernet frames.
    pub tap: bool,
    pub multi_queue: bool,
    /// It outlives the process that made it, addresses and routes with it.
    pub persistent: bool,
    /// Found, never wanted: a user or a group other than root may attach to it.
    pub owned: bool,
    /// It carries our link group, which it gets in a message of its own: this kind cannot be made by netlink.
    pub marked: bool,
    /// Found, of no consequence for one of ours: some process has it open.
    pub attached: bool,
}

impl Tun {
    /// What forwarding threads attach to.
    pub fn for_queues() -> Self {
        Self { tap: false, multi_queue: true, persistent: true, owned: false, marked: true, attached: false }
    }

    /// Whether one of ours needs no more than its mark.
    fn can_be_made_of(&self, found: &Tun) -> bool {
        *self == Tun { marked: self.marked, attached: self.attached, ..*found }
    }

    /// Whether a process that is not ours lives by `found`: flanneld's device goes with it, and it with its device.
    ///
    /// A device in use that is like ours but for the mark is not denied, for most likely our own threads use it: they attach
    /// before the first look, and the mark comes after the device is made, or a foreign hand took it away while no agent
    /// ran. Nobody else is known to make such a device: flanneld's (pkg/ip/tun.go) is neither persistent nor of many
    /// queues.
    pub fn is_denied_by(&self, found: &Tun) -> bool {
        !found.marked && (!found.persistent || (found.attached && !self.can_be_made_of(found)))
    }
}

/// A token bucket filter as a device's root (net/sched/sch_tbf.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tbf {
    /// Bytes a second.
    pub rate: u64,
    /// Size of the bucket, in bytes. Of one that was found it is 0, if it is not the one that is wanted: the kernel shows
    /// the time that it takes to fill.
    pub burst: u32,
    /// Bytes that wait for tokens; more are dropped.
    pub limit: u32,
}

impl Tbf {
    /// What the reference's bandwidth plugin makes of a limit: what waits goes within 25 ms, after a full bucket.
    pub fn of(limit: Limit) -> Self {
        const LATENCY_MS: u128 = 25;
        let waiting = u128::from(limit.rate) * LATENCY_MS / 1000 + u128::from(limit.burst);
        let waiting = u32::try_from(waiting).unwrap_or(u32::MAX);
        Self { rate: limit.rate, burst: limit.burst, limit: waiting }
    }
}

/// How far an address is valid (`ifa_scope`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddrScope {
    Global,
    Link,
    Host,
}

/// What else an address can be. All of it is found, none of it wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AddrForm {
    /// It has a lifetime, and goes by itself.
    pub expires: bool,
    /// Metric of its connected route.
    pub metric: u32,
    /// It brings no connected route (`noprefixroute`).
    pub routeless: bool,
    /// The other end of a point-to-point address.
    pub peer: Option<IpAddr>,
}

impl AddrForm {
    /// Whether the kernel gets from this to a plain address without deleting it.
    pub fn can_be_replaced(&self) -> bool {
        !self.routeless && self.peer.is_none()
    }
}

/// How a forwarding entry leads to its destination: by the device's own port, VNI and interface, unless it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FdbPath {
    pub port: Option<u16>,
    pub vni: Option<u32>,
    /// Index of an interface.
    pub via: Option<u32>,
    /// A nexthop object instead of a destination.
    pub nexthop: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkMac {
    Exactly(Mac),
    /// Given at creation and left alone afterwards: an adopted bridge keeps the address its pods know.
    AtCreation(Mac),
    /// It has none: packets, not frames.
    None,
    /// Whatever the kernel gives it: no frame is addressed to it.
    Any,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgePort {
    /// `None` is only ever found, never wanted.
    pub bridge: Option<IfName>,
    pub hairpin: bool,
    pub isolated: bool,
    pub mtu: u32,
    pub up: bool,
    /// It carries our link group.
    pub marked: bool,
    /// Another option that stops packets is not a new port's: learning, flooding, locks, ARP suppression.
    pub altered: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub gateway: Option<IpAddr>,
    /// `None` is only ever found: several next hops, or none, as of a blackhole.
    pub dev: Option<IfName>,
    /// The gateway is reachable through `dev` whatever the addresses say (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// `rtm_protocol`.
    pub protocol: u8,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    pub form: RouteForm,
}

/// What else a route can be, in the kernel's numbers. All of it is found, none of it wanted but for a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RouteForm {
    /// Not unicast: `rtm_type`.
    pub kind: Option<u8>,
    pub tos: u8,
    /// Not the default one.
    pub metric: Option<u32>,
    /// Not the one that goes with its gateway, or with having none.
    pub scope: Option<u8>,
    /// A nexthop object.
    pub nexthop: Option<u32>,
    /// Metrics such as a locked MTU, an encapsulation, several next hops, realms.
    pub extras: bool,
}

impl Route {
    /// One of ours.
    pub fn via(gateway: IpAddr, dev: &IfName, onlink: bool) -> Self {
        Self {
            gateway: Some(gateway),
            dev: Some(dev.clone()),
            onlink,
            protocol: ROUTE_PROTOCOL,
            source: None,
            form: RouteForm::default(),
        }
    }
}

impl RouteForm {
    /// Whether it competes with a plain route to the same subnet: TOS and metric are looked at first.
    pub fn is_in_plain_slot(&self) -> bool {
        self.competes_with(&Self::default())
    }

    /// Whether only the order of the two decides which gets the packets.
    pub fn competes_with(&self, other: &Self) -> bool {
        (self.tos, self.metric) == (other.tos, other.metric)
    }

    /// Whether all packets to the same subnet try this first, wherever it stands (IPv4).
    pub fn comes_before(&self, other: &Self) -> bool {
        self.tos == other.tos && self.metric.unwrap_or(0) < other.metric.unwrap_or(0)
    }
}

impl Vxlan {
    /// Whether the kernel gets from `found` to this without a new device.
    pub fn can_be_made_of(&self, found: &Vxlan) -> bool {
        *self == Vxlan { tuning: self.tuning, ..found.clone() }
    }
}

impl LinkMac {
    pub fn value(self) -> Mac {
        match self {
            Self::Exactly(mac) | Self::AtCreation(mac) => mac,
            Self::None | Self::Any => Mac([0; 6]),
        }
    }
}

impl Object {
    pub fn key(&self) -> Key {
        match self {
            Self::Name { name, .. } => Key::Name(name.clone()),
            Self::Link { name, .. } => Key::Link(name.clone()),
            Self::Sysctl { path, .. } => Key::Sysctl(path.clone()),
            Self::Firewall(part) => Key::Firewall(part.key()),
            Self::BridgePort { veth, .. } => Key::BridgePort(veth.clone()),
            Self::Shaper { dev, .. } => Key::Shaper(dev.clone()),
            Self::Redirect { dev, .. } => Key::Redirect(dev.clone()),
            Self::Addr { dev, addr, .. } => Key::Addr(dev.clone(), *addr),
            Self::Neigh { dev, ip, .. } => Key::Neigh(dev.clone(), *ip),
            Self::Fdb { dev, mac, .. } => Key::Fdb(dev.clone(), *mac),
            Self::Route { dst, .. } => Key::Route(*dst),
        }
    }

    /// Whether what was found is what this object asks for.
    pub fn satisfied_by(&self, found: &Object) -> bool {
        match (self, found) {
            (Self::Link { link: want, .. }, Self::Link { link: have, .. }) => {
                let mac = match (want.mac, have.mac) {
                    (LinkMac::Exactly(want), LinkMac::Exactly(have)) => want == have,
                    _ => true,
                };
                let kind = match (&want.kind, &have.kind) {
                    (LinkKind::Tun(want), LinkKind::Tun(have)) => {
                        *want == Tun { attached: want.attached, ..*have }
                    }
                    (want, have) => want == have,
                };
                let rest = |link: &Link| (link.mtu, link.up, link.altered);
                mac && kind && rest(want) == rest(have)
            }
            _ => self == found,
        }
    }

    /// Whether the kernel can get from `found` to this object only by deleting the device first.
    pub fn needs_recreation(&self, found: &Object) -> bool {
        match (self, found) {
            (Self::Link { link: want, .. }, Self::Link { link: have, .. }) => {
                match (&want.kind, &have.kind) {
                    (LinkKind::Vxlan(want), LinkKind::Vxlan(have)) => !want.can_be_made_of(have),
                    (LinkKind::Tun(want), LinkKind::Tun(have)) => !want.can_be_made_of(have),
                    (LinkKind::Ifb, have) => *have != LinkKind::Ifb,
                    (LinkKind::Vxlan(_) | LinkKind::Tun(_), _) => true,
                    (LinkKind::Bridge | LinkKind::Other(_), _) => false,
                }
            }
            _ => false,
        }
    }

    /// The device that takes this object with it when it is deleted.
    pub fn stands_on(&self) -> Option<&IfName> {
        match self {
            Self::Name { .. }
            | Self::Link { .. }
            | Self::Sysctl { .. }
            | Self::Firewall(_)
            | Self::BridgePort { .. } => None,
            Self::Shaper { dev, .. }
            | Self::Redirect { dev, .. }
            | Self::Addr { dev, .. }
            | Self::Neigh { dev, .. }
            | Self::Fdb { dev, .. } => Some(dev),
            Self::Route { route, .. } => route.dev.as_ref(),
        }
    }
}

/// What no operation changes: somebody else has what is wanted, and it is not ours to take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    #[error("{0} is in use by another process (a running flanneld?)")]
    InUse(IfName),
    #[error("its packets take a route of somebody else's, {0}")]
    Overruled(String),
}

/// What should be in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired(BTreeMap<Key, Object>);

impl Desired {
    pub fn insert(&mut self, object: Object) {
        self.0.insert(object.key(), object);
    }

    pub fn extend(&mut self, other: Desired) {
        self.0.extend(other.0);
    }

    pub fn objects(&self) -> impl DoubleEndedIterator<Item = (&Key, &Object)> {
        self.0.iter()
    }

    pub fn get(&self, key: &Key) -> Option<&Object> {
        self.0.get(key)
    }

    /// The limits among them.
    pub fn limits(&self) -> Vec<&Object> {
        let is_limit = |object: &&Object| matches!(object, Object::Shaper { .. } | Object::Redirect { .. });
        self.0.values().filter(is_limit).collect()
    }

    /// Paths of the settings among them.
    pub fn sysctl_paths(&self) -> Vec<&str> {
        let paths = self.0.keys().filter_map(|key| match key {
            Key::Sysctl(path) => Some(path.as_str()),
            _ => None,
        });
        paths.collect()
    }
}

/// What is in the kernel, as far as it concerns us.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    pub objects: BTreeMap<Key, Found>,
    /// Further objects of ours under a key that `objects` holds already, such as a second route to the same subnet.
    pub surplus: Vec<Object>,
    /// Devices of ours under another name: the right one, and what they are called now.
    pub renamed: BTreeMap<IfName, IfName>,
    /// By what is wanted and cannot be had.
    pub obstacles: BTreeMap<Key, Obstacle>,
}

impl Observed {
    /// Whether an object would have to be done to a device that is somebody else's.
    pub fn denies(&self, object: &Object) -> bool {
        let is_its = |dev: &IfName| match object {
            Object::Link { name, .. } => name == dev,
            Object::Sysctl { path, .. } => path.contains(&format!("/conf/{dev}/")),
            other => other.stands_on() == Some(dev),
        };
        self.obstacles.values().any(|obstacle| matches!(obstacle, Obstacle::InUse(dev) if is_its(dev)))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub object: Object,
    /// It carries our mark: it may be changed, and goes when nothing wants it.
    pub ours: bool,
    /// A foreign route to the same subnet and of the same metric stands before it and takes its packets.
    pub overruled: bool,
}

/// How the kernel gets from a found route to a wanted one without touching anybody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteChange {
    /// Put it before whatever is there (`ip route prepend`): nothing of ours is.
    Prepend,
    /// Ours is the first of its kind, so it is the one that a replacement replaces.
    Replace,
    /// Ours gets no packets where it stands: taken away, then put in front.
    MoveToFront,
    /// Ours competes elsewhere, by its metric or its TOS: the right one first, then away with it.
    PrependThenRemove,
}

impl RouteChange {
    pub fn from_found(wanted: &Route, found: Option<&Found>) -> Self {
        match found {
            Some(Found { object: Object::Route { route, .. }, ours: true, overruled }) => {
                match (route.form.competes_with(&wanted.form), overruled) {
                    (false, _) => Self::PrependThenRemove,
                    (true, true) => Self::MoveToFront,
                    (true, false) => Self::Replace,
                }
            }
            _ => Self::Prepend,
        }
    }
}

/// One step from what is to what should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Make it so; `found` is what the key holds now.
    Set {
        object: Object,
        found: Option<Found>,
    },
    Remove(Object),
}

impl Op {
    pub fn key(&self) -> Key {
        match self {
            Self::Set { object, .. } | Self::Remove(object) => object.key(),
        }
    }
}

impl fmt::Display for Key {
    /// In the words of iproute2, for status and logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "name {name}"),
            Self::Link(name) => write!(f, "link {name}"),
            Self::Sysctl(path) => write!(f, "sysctl {}", path.replace('/', ".")),
            Self::Firewall(part) => write!(f, "{part}"),
            Self::BridgePort(veth) => write!(f, "bridge port {veth}"),
            Self::Shaper(dev) => write!(f, "token bucket on {dev}"),
            Self::Redirect(dev) => write!(f, "redirection of what comes in by {dev}"),
            Self::Addr(dev, addr) => write!(f, "address {addr} dev {dev}"),
            Self::Neigh(dev, ip) => write!(f, "neighbour {ip} dev {dev}"),
            Self::Fdb(dev, mac) => write!(f, "fdb {mac} dev {dev}"),
            Self::Route(dst) => write!(f, "route {dst}"),
        }
    }
}
