//! The real kernel, in the network namespace of the thread that opened it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage};
use weft_shared::IfName;
use weft_shared::names::{LINK_GROUP, SYSCTL_DIR};

use super::apply::{self, Indices};
use super::nft::Firewall;
use super::socket::RouteSocket;
use super::{Dump, Errno, FoundAddr, FoundLink, Kernel, KernelError, decode, encode, shaping, sysctl};
use crate::firewall::Ruleset;
use crate::object::{LinkKind, Object, Op, Route};

#[derive(Debug)]
pub struct LinuxKernel {
    pub(super) socket: RouteSocket,
    indices: Indices,
    firewall: Firewall,
    sysctl_dir: PathBuf,
}

impl LinuxKernel {
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self {
            socket: RouteSocket::open()?,
            indices: Indices::new(),
            firewall: Firewall::default(),
            sysctl_dir: SYSCTL_DIR.into(),
        })
    }

    /// Kernel settings are written below `dir`.
    pub fn with_sysctls_in(self, dir: &Path) -> Self {
        Self { sysctl_dir: dir.to_owned(), ..self }
    }

    /// Every link and every address: for choosing the underlay.
    pub fn links_and_addrs(&mut self) -> Result<(BTreeMap<IfName, FoundLink>, Vec<FoundAddr>), KernelError> {
        let links = self.links()?;
        let names: BTreeMap<u32, IfName> = links.iter().map(|(name, l)| (l.index, name.clone())).collect();
        self.indices = links.iter().map(|(name, l)| (name.clone(), l.index)).collect();
        let addrs = self.addrs(&names)?;
        Ok((links, addrs))
    }

    /// The device and the source address that the kernel would choose for `ip`.
    pub fn route_to(&mut self, ip: IpAddr) -> Result<Option<(u32, Option<IpAddr>)>, KernelError> {
        match self.socket.get(encode::route_lookup(ip)) {
            Ok(Some(Message::NewRoute(route))) => {
                Ok(decode::lookup(&route).map(|(oif, _, source)| (oif, source)))
            }
            Ok(_) | Err(KernelError::Refused(_)) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// Device of the first IPv4 default route of the main table, whatever its metric.
    pub fn default_route(&mut self) -> Result<Option<u32>, KernelError> {
        let routes = self.routes(AddressFamily::Inet)?;
        let mut unicast = routes
            .iter()
            .filter_map(decode::route)
            .filter(|r| r.dst.len() == 0 && r.form.kind.is_none() && r.form.tos == 0);
        Ok(unicast.find_map(|r| r.oif))
    }

    /// What kind of device has this name, if any has.
    pub fn kind_of(&mut self, name: &IfName) -> Result<Option<LinkKind>, KernelError> {
        match self.socket.get(encode::link_by_name(name)) {
            Ok(Some(Message::NewLink(message))) => {
                Ok(decode::link(&message).map(|(_, found, _)| found.link.kind))
            }
            Ok(_) | Err(KernelError::Refused(Errno(nix::libc::ENODEV))) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// Deletes a host-side veth if it carries our mark, and with it the pod's end: when this returns, neither can be
    /// found or sends, and the kernel frees them by itself. `Ok(false)`: there is no such veth of ours.
    pub fn delete_veth(&mut self, name: &IfName) -> Result<bool, KernelError> {
        self.delete_named(name).map(|deleted| deleted.is_some())
    }

    /// The veth of that name, then the one that had it when it was wired, under whatever name.
    pub fn delete_veths(&mut self, name: &IfName, wired: Option<u32>) -> Result<(), KernelError> {
        let deleted = self.delete_named(name)?;
        match wired {
            Some(index) if deleted != wired => self.delete_veth_of(index),
            _ => Ok(()),
        }
    }

    /// Its index, if there was one of ours.
    fn delete_named(&mut self, name: &IfName) -> Result<Option<u32>, KernelError> {
        match self.link(encode::link_by_name(name))? {
            Some((_, found)) if found.is_our_veth(name) => {
                self.unregister(found.index).map(|()| Some(found.index))
            }
            _ => Ok(None),
        }
    }

    /// Deletes the veth of that index under whatever name, if it has our link group.
    pub fn delete_veth_of(&mut self, index: u32) -> Result<(), KernelError> {
        match self.link(Message::GetLink(encode::link_by_index(index)))? {
            Some((name, found)) if found.is_veth() && found.group != LINK_GROUP => {
                Err(KernelError::Unmarked(name))
            }
            Some((_, found)) if found.is_veth() => self.unregister(index),
            _ => Ok(()),
        }
    }

    /// One that is gone is as good.
    fn unregister(&mut self, index: u32) -> Result<(), KernelError> {
        match self.socket.unregister(encode::link_by_index(index)) {
            Err(KernelError::Refused(Errno(nix::libc::ENODEV))) => Ok(()),
            other => other,
        }
    }

    fn link(&mut self, question: Message) -> Result<Option<(IfName, FoundLink)>, KernelError> {
        match self.socket.get(question) {
            Ok(Some(Message::NewLink(message))) => {
                Ok(decode::link(&message).map(|(name, found, _)| (name, found)))
            }
            Ok(_) | Err(KernelError::Refused(Errno(nix::libc::ENODEV))) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// Whether a link of this index exists here, whatever it is.
    pub fn link_exists(&mut self, index: u32) -> Result<bool, KernelError> {
        match self.socket.get(Message::GetLink(encode::link_by_index(index))) {
            Ok(answer) => Ok(answer.is_some()),
            Err(KernelError::Refused(Errno(nix::libc::ENODEV))) => Ok(false),
            Err(other) => Err(other),
        }
    }

    fn links(&mut self) -> Result<BTreeMap<IfName, FoundLink>, KernelError> {
        let messages = self.socket.dump(Message::GetLink(LinkMessage::default()))?;
        let decoded: Vec<_> = messages
            .iter()
            .filter_map(|message| match message {
                Message::NewLink(link) => decode::link(link),
                _ => None,
            })
            .collect();
        let names: BTreeMap<u32, IfName> =
            decoded.iter().map(|(name, l, _)| (l.index, name.clone())).collect();
        let with_bridge = decoded.into_iter().map(|(name, mut found, bridge)| {
            found.port.bridge = bridge.and_then(|index| names.get(&index).cloned());
            (name, found)
        });
        Ok(with_bridge.collect())
    }

    fn addrs(&mut self, names: &BTreeMap<u32, IfName>) -> Result<Vec<FoundAddr>, KernelError> {
        let messages = self.socket.dump(Message::GetAddress(AddressMessage::default()))?;
        let decoded = messages.iter().filter_map(|message| match message {
            Message::NewAddress(address) => decode::address(address),
            _ => None,
        });
        let named = decoded.filter_map(|a| {
            let dev = names.get(&a.index)?.clone();
            let decode::Address { addr, scope, form, deprecated, temporary, .. } = a;
            Some(FoundAddr { dev, addr, scope, form, deprecated, temporary })
        });
        Ok(named.collect())
    }

    fn routes(&mut self, family: AddressFamily) -> Result<Vec<RouteMessage>, KernelError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.attributes.push(RouteAttribute::Table(RouteHeader::RT_TABLE_MAIN.into()));
        let messages = match self.socket.dump(Message::GetRoute(filter)) {
            // A table nobody has used yet does not exist.
            Err(KernelError::Refused(Errno(nix::libc::ENOENT))) => Vec::new(),
            other => other?,
        };
        let routes = messages.into_iter().filter_map(|message| match message {
            Message::NewRoute(route) => Some(route),
            _ => None,
        });
        Ok(routes.collect())
    }

    fn neighbours(
        &mut self,
        family: AddressFamily,
        index: u32,
    ) -> Result<Vec<NeighbourMessage>, KernelError> {
        let mut filter = NeighbourMessage::default();
        filter.header.family = family;
        if family == AddressFamily::Bridge {
            // The forwarding dump takes the device in the header, the neighbour dump as an attribute.
            filter.header.ifindex = index;
        } else {
            filter.attributes.push(NeighbourAttribute::IfIndex(index));
        }
        let messages = self.socket.dump(Message::GetNeighbour(filter))?;
        let neighbours = messages.into_iter().filter_map(|message| match message {
            Message::NewNeighbour(neighbour) if neighbour.header.ifindex == index => Some(neighbour),
            _ => None,
        });
        Ok(neighbours.collect())
    }
}

impl Kernel for LinuxKernel {
    fn dump(&mut self, device: Option<&IfName>) -> Result<Dump, KernelError> {
        let (links, addrs) = self.links_and_addrs()?;
        let names: BTreeMap<u32, IfName> = links.iter().map(|(name, l)| (l.index, name.clone())).collect();
        let mut dump = Dump { links, addrs, ..Dump::default() };
        if let Some((dev, index)) = device.and_then(|dev| Some((dev, dump.links.get(dev)?.index))) {
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                let found = self.neighbours(family, index)?;
                dump.neighs.extend(
                    found.iter().filter_map(decode::neighbour).map(|(_, ip, mac)| (dev.clone(), ip, mac)),
                );
            }
            let found = self.neighbours(AddressFamily::Bridge, index)?;
            let entries = found.iter().filter_map(decode::fdb);
            dump.fdb.extend(entries.map(|(mac, dst, path)| (dev.clone(), mac, dst, path)));
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let found = self.routes(family)?;
            let routes = found.iter().filter_map(decode::route).filter_map(|r| {
                let dev = match r.oif {
                    Some(index) => Some(names.get(&index)?.clone()),
                    None => None,
                };
                let decode::FoundRoute { dst, gateway, onlink, protocol, source, form, .. } = r;
                Some((dst, Route { gateway, dev, onlink, protocol, source, form }))
            });
            dump.routes.extend(routes);
        }
        Ok(dump)
    }

    fn sysctls(&mut self, paths: &[&str]) -> Result<BTreeMap<String, String>, KernelError> {
        let mut found = BTreeMap::new();
        for path in paths {
            if let Some(value) = sysctl::read(path)? {
                found.insert((*path).to_owned(), value);
            }
        }
        Ok(found)
    }

    fn firewall(&mut self, legacy_period: Duration) -> Result<Ruleset, KernelError> {
        self.firewall.look(legacy_period)
    }

    fn shaping(&mut self, wanted: &[&Object]) -> Result<Vec<Object>, KernelError> {
        shaping::look(&mut self.socket, &self.indices, wanted)
    }

    fn on_link(&mut self, dev: &IfName, peers: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, KernelError> {
        let Some(index) = self.indices.get(dev).copied() else {
            return Ok(BTreeSet::new());
        };
        let mut on_link = BTreeSet::new();
        let answers = self.socket.get_all(peers.iter().map(|peer| encode::route_lookup(*peer)).collect())?;
        for (peer, answer) in peers.iter().zip(answers) {
            match answer {
                Ok(Some(Message::NewRoute(route))) => {
                    if matches!(decode::lookup(&route), Some((oif, None, _)) if oif == index) {
                        on_link.insert(*peer);
                    }
                }
                // Unreachable is an answer: not on-link.
                Ok(_) | Err(KernelError::Refused(_)) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(on_link)
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        apply::apply(&mut self.socket, &mut self.indices, &mut self.firewall, &self.sysctl_dir, ops)
    }
}

#[cfg(test)]
#[path = "linux_tests.rs"]
pub(super) mod tests;

#[cfg(test)]
#[path = "linux_tun_tests.rs"]
mod tun_tests;
