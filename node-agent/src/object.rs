//! What weft keeps in the kernel, as values: each object has a key (what the kernel tells it apart by) and attributes.
//!
//! The order of [`Key`] is the order of creation: what comes later stands on what comes before, so a route is never
//! there before its neighbour and its forwarding entry. Removal goes the other way round.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_shared::{IfName, Mac, Subnet};

use crate::firewall::{Part, PartKey};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Link(IfName),
    /// Path below `/proc/sys`.
    Sysctl(String),
    /// Before anything that lets packets through: a connection keeps the translation it began with.
    Firewall(PartKey),
    Port(IfName),
    Addr(IfName, IpNetwork),
    Neigh(IfName, IpAddr),
    Fdb(IfName, Mac),
    /// Main table, metric 0 (IPv6: the default 1024).
    Route(Subnet),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    Link { name: IfName, link: Link },
    Sysctl { path: String, value: String },
    Firewall(Part),
    Port { veth: IfName, port: BridgePort },
    Addr { dev: IfName, addr: IpNetwork, scope: AddrScope },
    Neigh { dev: IfName, ip: IpAddr, mac: Mac },
    Fdb { dev: IfName, mac: Mac, dst: IpAddr },
    Route { dst: Subnet, route: Route },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub kind: LinkKind,
    pub mac: LinkMac,
    pub mtu: u32,
    pub up: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    Vxlan(Vxlan),
    Bridge,
    /// Found in the kernel, never wanted: its kind's name.
    Other(String),
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vxlan(_) => f.write_str("VXLAN device"),
            Self::Bridge => f.write_str("bridge"),
            Self::Other(kind) => f.write_str(kind),
        }
    }
}

/// The attributes of a VXLAN device that only a new device can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    pub vni: u32,
    /// Index of the underlay interface.
    pub underlay: u32,
    pub local: IpAddr,
    pub port: u16,
    pub learning: bool,
    pub gbp: bool,
}

/// How far an address is valid (`ifa_scope`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddrScope {
    Global,
    Link,
    Host,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkMac {
    Exactly(Mac),
    /// Given at creation and left alone afterwards: an adopted bridge keeps the address its pods know.
    AtCreation(Mac),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgePort {
    /// `None` is only ever found, never wanted.
    pub bridge: Option<IfName>,
    pub hairpin: bool,
    pub isolated: bool,
    pub mtu: u32,
    pub up: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub gateway: Option<IpAddr>,
    pub dev: IfName,
    /// The gateway is reachable through `dev` whatever the addresses say (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// `rtm_protocol`.
    pub protocol: u8,
}

impl LinkMac {
    pub fn value(self) -> Mac {
        let (Self::Exactly(mac) | Self::AtCreation(mac)) = self;
        mac
    }
}

impl Object {
    pub fn key(&self) -> Key {
        match self {
            Self::Link { name, .. } => Key::Link(name.clone()),
            Self::Sysctl { path, .. } => Key::Sysctl(path.clone()),
            Self::Firewall(part) => Key::Firewall(part.key()),
            Self::Port { veth, .. } => Key::Port(veth.clone()),
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
                mac && (&want.kind, want.mtu, want.up) == (&have.kind, have.mtu, have.up)
            }
            _ => self == found,
        }
    }

    /// Whether the kernel can get from `found` to this object only by deleting the device first.
    pub fn needs_recreation(&self, found: &Object) -> bool {
        match (self, found) {
            (Self::Link { link: want, .. }, Self::Link { link: have, .. }) => {
                matches!(want.kind, LinkKind::Vxlan(_)) && want.kind != have.kind
            }
            _ => false,
        }
    }

    /// The device that takes this object with it when it is deleted.
    pub fn stands_on(&self) -> Option<&IfName> {
        match self {
            Self::Link { .. } | Self::Sysctl { .. } | Self::Firewall(_) | Self::Port { .. } => None,
            Self::Addr { dev, .. } | Self::Neigh { dev, .. } | Self::Fdb { dev, .. } => Some(dev),
            Self::Route { route, .. } => Some(&route.dev),
        }
    }
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
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub object: Object,
    /// It carries our mark: it may be changed, and goes when nothing wants it.
    pub ours: bool,
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
            Self::Link(name) => write!(f, "link {name}"),
            Self::Sysctl(path) => write!(f, "sysctl {}", path.replace('/', ".")),
            Self::Firewall(part) => write!(f, "{part}"),
            Self::Port(veth) => write!(f, "bridge port {veth}"),
            Self::Addr(dev, addr) => write!(f, "address {addr} dev {dev}"),
            Self::Neigh(dev, ip) => write!(f, "neighbour {ip} dev {dev}"),
            Self::Fdb(dev, mac) => write!(f, "fdb {mac} dev {dev}"),
            Self::Route(dst) => write!(f, "route {dst}"),
        }
    }
}
