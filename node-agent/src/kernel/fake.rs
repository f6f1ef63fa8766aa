//! A kernel in memory for the tests of plan and pass: it enforces the same dependencies as the real one and can be
//! told to refuse.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use weft_shared::names::LINK_GROUP;
use weft_shared::{IfName, Mac, Subnet};

use super::{Dump, Errno, FoundAddr, FoundLink, Kernel, KernelError};
use crate::firewall::forward::place;
use crate::firewall::legacy::LegacyFilter;
use crate::firewall::{Part, Ruleset, host_ports};
use crate::object::{
    AddrForm, AddrScope, Alterations, BridgePort, FdbPath, Found, Key, Link, LinkKind, LinkMac, Object, Op,
    Route, RouteChange, RouteForm,
};
use crate::reconcile::observe::PROTOCOL_KERNEL;

#[derive(Debug, Default)]
pub(crate) struct FakeKernel {
    pub(crate) dump: Dump,
    pub(crate) sysctls: BTreeMap<String, String>,
    pub(crate) ruleset: Ruleset,
    /// Why the packet filter cannot be looked at.
    pub(crate) firewall_fault: Option<KernelError>,
    pub(crate) on_link: BTreeSet<IpAddr>,
    /// Token buckets and redirections.
    pub(crate) shaping: Vec<Object>,
    /// One answer for each coming operation: `true` refuses it. Empty: everything succeeds.
    pub(crate) faults: VecDeque<bool>,
    /// What is refused as long as it stands here.
    pub(crate) refused: BTreeMap<Key, KernelError>,
    /// Stop after so many further operations, as a killed agent does.
    pub(crate) dies_after: Option<usize>,
    pub(crate) applied: Vec<Op>,
    next_index: u32,
}

impl FakeKernel {
    pub(crate) fn with_underlay(iface: &str) -> Self {
        let mut kernel = Self { next_index: 2, ..Self::default() };
        let link = Link {
            kind: LinkKind::Other("veth".into()),
            mac: LinkMac::Exactly("02:00:00:00:00:aa".parse().expect("mac")),
            mtu: 1500,
            up: true,
            altered: Alterations::default(),
        };
        let iface: IfName = iface.parse().expect("name");
        kernel.dump.addrs.push(found_addr(&iface, "192.0.2.1/24".parse().expect("net")));
        kernel.add_link(iface, link, 0);
        kernel
    }

    pub(crate) fn add_link(&mut self, name: IfName, link: Link, group: u32) {
        self.next_index += 1;
        let port = BridgePort {
            bridge: None,
            hairpin: false,
            isolated: false,
            mtu: link.mtu,
            up: link.up,
            marked: group == LINK_GROUP,
            altered: false,
        };
        self.dump.links.insert(name, FoundLink { index: self.next_index, link, group, port });
    }

    /// As the kernel does: everything that stands on the device goes with it.
    pub(crate) fn delete_link(&mut self, name: &IfName) {
        self.dump.links.remove(name);
        self.dump.addrs.retain(|a| a.dev != *name);
        self.dump.neighs.retain(|(dev, ..)| dev != name);
        self.dump.fdb.retain(|(dev, ..)| dev != name);
        self.dump.routes.retain(|(_, route)| route.dev.as_ref() != Some(name));
        self.shaping.retain(|object| object.stands_on() != Some(name));
        for found in self.dump.links.values_mut() {
            // Ports lose their master with it.
            if found.port.bridge.as_ref() == Some(name) {
                found.port.bridge = None;
            }
        }
    }

    pub(crate) fn rename_link(&mut self, old: &IfName, new: &IfName) {
        let Some(found) = self.dump.links.remove(old) else { return };
        self.dump.links.insert(new.clone(), found);
        let rename = |dev: &mut IfName| {
            if dev == old {
                *dev = new.clone();
            }
        };
        self.dump.addrs.iter_mut().for_each(|a| rename(&mut a.dev));
        self.dump.neighs.iter_mut().for_each(|(dev, ..)| rename(dev));
        self.dump.fdb.iter_mut().for_each(|(dev, ..)| rename(dev));
        self.dump.routes.iter_mut().for_each(|(_, route)| route.dev.iter_mut().for_each(rename));
        self.dump.links.values_mut().for_each(|found| found.port.bridge.iter_mut().for_each(rename));
    }

    fn set_route(&mut self, dst: Subnet, route: &Route, found: Option<&Found>) {
        let routes = &mut self.dump.routes;
        let wanted = (dst, route.clone());
        let old = match found.map(|f| &f.object) {
            Some(Object::Route { route, .. }) => Some((dst, route.clone())),
            _ => None,
        };
        let prepend = |routes: &mut Vec<(Subnet, Route)>| {
            if !routes.contains(&wanted) {
                routes.insert(0, wanted.clone());
            }
        };
        match RouteChange::from_found(route, found) {
            RouteChange::Prepend => prepend(routes),
            // The kernel replaces the first that competes, whosever it is.
            RouteChange::Replace => {
                match routes.iter().position(|(d, r)| *d == dst && r.form.competes_with(&route.form)) {
                    Some(place) => routes[place] = wanted,
                    None => prepend(routes),
                }
            }
            RouteChange::MoveToFront => {
                routes.retain(|found| Some(found) != old.as_ref());
                prepend(routes);
            }
            RouteChange::PrependThenRemove => {
                prepend(routes);
                routes.retain(|found| Some(found) != old.as_ref());
            }
        }
    }

    fn set(&mut self, object: &Object, found: Option<&Found>) -> Result<(), KernelError> {
        if let Some(dev) = object.stands_on()
            && !self.dump.links.contains_key(dev)
        {
            return Err(KernelError::NoDevice(dev.clone()));
        }
        match object {
            Object::Name { name, now } => {
                if self.dump.links.contains_key(name) {
                    return Err(KernelError::Refused(Errno(nix::libc::EEXIST)));
                }
                self.rename_link(now, name);
            }
            Object::Link { name, link } => {
                let exists = self.dump.links.get(name).map(|l| l.link.clone());
                match exists {
                    Some(have)
                        if !object
                            .needs_recreation(&Object::Link { name: name.clone(), link: have.clone() }) =>
                    {
                        if let Some(found) = self.dump.links.get_mut(name) {
                            let mac =
                                if matches!(link.mac, LinkMac::Exactly(_)) { link.mac } else { have.mac };
                            found.link = Link { mac, ..link.clone() };
                        }
                    }
                    Some(_) if found.is_none() => return Err(KernelError::Refused(Errno(nix::libc::EEXIST))),
                    _ => {
                        self.delete_link(name);
                        let mac = match link.mac {
                            LinkMac::AtCreation(mac) => LinkMac::Exactly(mac),
                            other => other,
                        };
                        self.add_link(name.clone(), Link { mac, ..link.clone() }, LINK_GROUP);
                    }
                }
            }
            Object::Sysctl { path, value } => {
                self.sysctls.insert(path.clone(), value.clone());
            }
            Object::Firewall(part) => self.set_firewall(part),
            Object::BridgePort { veth, port } => {
                let found =
                    self.dump.links.get_mut(veth).ok_or_else(|| KernelError::NoDevice(veth.clone()))?;
                found.port = port.clone();
                found.group = LINK_GROUP;
            }
            Object::Shaper { dev, .. } | Object::Redirect { dev, .. } => {
                if !self.dump.links.contains_key(dev) {
                    return Err(KernelError::NoDevice(dev.clone()));
                }
                self.shaping.retain(|other| other.key() != object.key());
                self.shaping.push(object.clone());
            }
            Object::Addr { dev, addr, .. } => {
                let old: Vec<FoundAddr> =
                    self.dump.addrs.extract_if(.., |a| a.dev == *dev && a.addr == *addr).collect();
                old.iter().for_each(|a| self.connected(a, false));
                let new = found_addr(dev, *addr);
                self.connected(&new, true);
                self.dump.addrs.push(new);
            }
            Object::Neigh { dev, ip, mac } => {
                self.dump.neighs.retain(|(d, i, _)| (d, i) != (dev, ip));
                self.dump.neighs.push((dev.clone(), *ip, *mac));
            }
            // A replacement replaces the first of several destinations, unless the wanted one is among them.
            Object::Fdb { dev, mac, dst, path } => {
                let entry = (dev.clone(), *mac, *dst, *path);
                let of_mac = |(d, m, ..): &(IfName, Mac, IpAddr, FdbPath)| (d, m) == (dev, mac);
                if !self.dump.fdb.contains(&entry) {
                    match self.dump.fdb.iter_mut().find(|entry| of_mac(entry)) {
                        Some(first) => *first = entry,
                        None => self.dump.fdb.push(entry),
                    }
                }
            }
            Object::Route { dst, route } => self.set_route(*dst, route, found),
        }
        Ok(())
    }

    /// The route that the kernel makes and removes along with an address.
    fn connected(&mut self, addr: &FoundAddr, is_there: bool) {
        let Some(dst) = Subnet::new(addr.addr.ip(), addr.addr.prefix()).filter(|dst| dst.len() < 32) else {
            return;
        };
        let route = Route {
            gateway: None,
            dev: Some(addr.dev.clone()),
            onlink: false,
            protocol: PROTOCOL_KERNEL,
            source: Some(addr.addr.ip()),
            form: RouteForm::default(),
        };
        self.dump.routes.retain(|found| *found != (dst, route.clone()));
        if is_there && !addr.form.routeless {
            self.dump.routes.push((dst, route));
        }
    }

    fn remove(&mut self, object: &Object) {
        match object {
            Object::Link { name, .. } => self.delete_link(name),
            Object::Firewall(part) => self.remove_firewall(part),
            Object::Name { .. }
            | Object::Sysctl { .. }
            | Object::BridgePort { .. }
            | Object::Shaper { .. }
            | Object::Redirect { .. } => {}
            Object::Addr { dev, addr, form, .. } => {
                let is_it = |a: &mut FoundAddr| a.dev == *dev && a.addr == *addr && a.form == *form;
                let gone: Vec<FoundAddr> = self.dump.addrs.extract_if(.., is_it).collect();
                gone.iter().for_each(|a| self.connected(a, false));
            }
            Object::Neigh { dev, ip, .. } => self.dump.neighs.retain(|(d, i, _)| (d, i) != (dev, ip)),
            Object::Fdb { dev, mac, dst, path } => {
                self.dump.fdb.retain(|entry| *entry != (dev.clone(), *mac, *dst, *path))
            }
            Object::Route { dst, route } => self.dump.routes.retain(|(d, r)| d != dst || r != route),
        }
    }

    fn set_firewall(&mut self, part: &Part) {
        self.remove_firewall(part);
        match part {
            Part::Table { id, .. } => {
                self.ruleset.own.push(part.clone());
                if *id == host_ports::table_id(id.family) {
                    self.ruleset.flows = None;
                }
            }
            Part::Accepts { chain, rules, .. } => {
                if let Some(host) = self.ruleset.forward.iter_mut().find(|host| host.id == *chain) {
                    let at = place(host).unwrap_or(host.rules.len());
                    host.rules.splice(at..at, rules.iter().cloned());
                }
            }
            Part::Legacy { rules, .. } => {
                if let LegacyFilter::Table(table) = &mut self.ruleset.legacy {
                    table.chains.entry("FORWARD".into()).or_default().extend(rules.iter().cloned());
                }
            }
            Part::Flows(ports) => self.ruleset.flows = Some(ports.clone()),
        }
    }

    fn remove_firewall(&mut self, part: &Part) {
        match part {
            Part::Table { .. } => self.ruleset.own.retain(|own| own.key() != part.key()),
            Part::Accepts { chain, .. } => {
                let host = self.ruleset.forward.iter_mut().filter(|host| host.id == *chain);
                host.for_each(|host| host.rules.retain(|rule| !rule.is_marked()));
            }
            Part::Legacy { rules, .. } => {
                if let LegacyFilter::Table(table) = &mut self.ruleset.legacy {
                    table.chains.values_mut().for_each(|chain| chain.retain(|rule| !rules.contains(rule)));
                }
            }
            Part::Flows(_) => self.ruleset.flows = None,
        }
    }

    /// A route to a neighbour that is not there, or that no forwarding entry leads to.
    pub(crate) fn route_without_neighbour(&self) -> Option<Key> {
        let on_overlay = self.dump.routes.iter().filter(|(_, r)| r.onlink);
        let mut dangling = on_overlay.filter(|(_, r)| {
            let mac = self
                .dump
                .neighs
                .iter()
                .find(|(dev, ip, _)| Some(dev) == r.dev.as_ref() && Some(*ip) == r.gateway);
            !mac.is_some_and(|(dev, _, mac)| self.dump.fdb.iter().any(|(d, m, ..)| (d, m) == (dev, mac)))
        });
        dangling.next().map(|(dst, _)| Key::Route(*dst))
    }
}

pub(crate) fn found_addr(dev: &IfName, addr: ipnetwork::IpNetwork) -> FoundAddr {
    FoundAddr {
        dev: dev.clone(),
        addr,
        scope: AddrScope::Global,
        form: AddrForm::default(),
        deprecated: false,
        temporary: false,
    }
}

impl Kernel for FakeKernel {
    fn dump(&mut self, device: Option<&IfName>) -> Result<Dump, KernelError> {
        let mut dump = self.dump.clone();
        dump.neighs.retain(|(dev, ..)| device == Some(dev));
        dump.fdb.retain(|(dev, ..)| device == Some(dev));
        Ok(dump)
    }

    fn sysctls(&mut self, paths: &[&str]) -> Result<BTreeMap<String, String>, KernelError> {
        let value = |path: &str| self.sysctls.get(path).cloned().unwrap_or_else(|| "unset".into());
        Ok(paths.iter().map(|path| ((*path).to_owned(), value(path))).collect())
    }

    fn firewall(&mut self, _: Duration) -> Result<Ruleset, KernelError> {
        self.firewall_fault.clone().map_or_else(|| Ok(self.ruleset.clone()), Err)
    }

    fn shaping(&mut self, wanted: &[&Object]) -> Result<Vec<Object>, KernelError> {
        let asked = |object: &&Object| wanted.iter().any(|wanted| wanted.key() == object.key());
        Ok(self.shaping.iter().filter(asked).cloned().collect())
    }

    fn on_link(&mut self, _: &IfName, peers: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, KernelError> {
        Ok(self.on_link.intersection(peers).copied().collect())
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        ops.iter()
            .map(|op| {
                if self.dies_after == Some(0) || self.faults.pop_front().unwrap_or(false) {
                    return Err(KernelError::Refused(Errno(nix::libc::EBUSY)));
                }
                if let Some(error) = self.refused.get(&op.key()) {
                    return Err(error.clone());
                }
                self.dies_after = self.dies_after.map(|left| left - 1);
                self.applied.push(op.clone());
                match op {
                    Op::Set { object, found } => self.set(object, found.as_ref())?,
                    Op::Remove(object) => self.remove(object),
                }
                Ok(())
            })
            .collect()
    }
}
