//! A kernel in memory for the tests of plan and pass: it enforces the same dependencies as the real one and can be
//! told to refuse.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use weft_shared::IfName;

use super::{Dump, Errno, FoundAddr, FoundLink, Kernel, KernelError};
use crate::firewall::forward::place;
use crate::firewall::{self, Part, Ruleset};
use crate::object::{AddrScope, BridgePort, Found, Key, Link, LinkKind, LinkMac, Object, Op};

#[derive(Debug, Default)]
pub(crate) struct FakeKernel {
    pub(crate) dump: Dump,
    sysctls: BTreeMap<String, String>,
    pub(crate) ruleset: Ruleset,
    /// Why the packet filter cannot be looked at.
    pub(crate) firewall_fault: Option<KernelError>,
    pub(crate) on_link: BTreeSet<IpAddr>,
    /// One answer for each coming operation: `true` refuses it. Empty: everything succeeds.
    pub(crate) faults: VecDeque<bool>,
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
        };
        let iface: IfName = iface.parse().expect("name");
        kernel.dump.addrs.push(found_addr(&iface, "192.0.2.1/24".parse().expect("net")));
        kernel.add_link(iface, link, 0);
        kernel
    }

    pub(crate) fn add_link(&mut self, name: IfName, link: Link, group: u32) {
        self.next_index += 1;
        let port = BridgePort { bridge: None, hairpin: false, isolated: false, mtu: link.mtu, up: link.up };
        self.dump.links.insert(name, FoundLink { index: self.next_index, link, group, port });
    }

    /// As the kernel does: everything that stands on the device goes with it.
    pub(crate) fn delete_link(&mut self, name: &IfName) {
        self.dump.links.remove(name);
        self.dump.addrs.retain(|a| a.dev != *name);
        self.dump.neighs.retain(|(dev, ..)| dev != name);
        self.dump.fdb.retain(|(dev, ..)| dev != name);
        self.dump.routes.retain(|(_, route)| route.dev != *name);
    }

    fn set(&mut self, object: &Object, found: Option<&Found>) -> Result<(), KernelError> {
        if let Some(dev) = object.stands_on()
            && !self.dump.links.contains_key(dev)
        {
            return Err(KernelError::NoDevice(dev.clone()));
        }
        match object {
            Object::Link { name, link } => {
                let exists = self.dump.links.get(name).map(|l| l.link.clone());
                match exists {
                    Some(have) if have.kind == link.kind => {
                        if let Some(found) = self.dump.links.get_mut(name) {
                            let mac =
                                if matches!(link.mac, LinkMac::Exactly(_)) { link.mac } else { have.mac };
                            found.link = Link { mac, ..link.clone() };
                        }
                    }
                    Some(_) if found.is_none() => return Err(KernelError::Refused(Errno(nix::libc::EEXIST))),
                    _ => {
                        self.delete_link(name);
                        let mac = LinkMac::Exactly(link.mac.value());
                        self.add_link(name.clone(), Link { mac, ..link.clone() }, 0);
                    }
                }
            }
            Object::Sysctl { path, value } => {
                self.sysctls.insert(path.clone(), value.clone());
            }
            Object::Firewall(part) => self.set_firewall(part),
            Object::Port { veth, port } => {
                let found =
                    self.dump.links.get_mut(veth).ok_or_else(|| KernelError::NoDevice(veth.clone()))?;
                found.port = port.clone();
            }
            Object::Addr { dev, addr, .. } => {
                if !self.dump.addrs.iter().any(|a| a.dev == *dev && a.addr == *addr) {
                    self.dump.addrs.push(found_addr(dev, *addr));
                }
            }
            Object::Neigh { dev, ip, mac } => {
                self.dump.neighs.retain(|(d, i, _)| (d, i) != (dev, ip));
                self.dump.neighs.push((dev.clone(), *ip, *mac));
            }
            Object::Fdb { dev, mac, dst } => {
                self.dump.fdb.retain(|(d, m, _)| (d, m) != (dev, mac));
                self.dump.fdb.push((dev.clone(), *mac, *dst));
            }
            Object::Route { dst, route } => {
                let replaced = found.filter(|f| f.ours).map(|f| &f.object);
                if let Some(Object::Route { route: old, .. }) = replaced {
                    self.dump.routes.retain(|(d, r)| d != dst || r != old);
                }
                self.dump.routes.insert(0, (*dst, route.clone()));
            }
        }
        Ok(())
    }

    fn remove(&mut self, object: &Object) {
        match object {
            Object::Link { name, .. } => self.delete_link(name),
            Object::Firewall(part) => self.remove_firewall(part),
            Object::Sysctl { .. } | Object::Port { .. } => {}
            Object::Addr { dev, addr, .. } => self.dump.addrs.retain(|a| a.dev != *dev || a.addr != *addr),
            Object::Neigh { dev, ip, .. } => self.dump.neighs.retain(|(d, i, _)| (d, i) != (dev, ip)),
            Object::Fdb { dev, mac, dst } => {
                self.dump.fdb.retain(|entry| *entry != (dev.clone(), *mac, *dst))
            }
            Object::Route { dst, route } => self.dump.routes.retain(|(d, r)| d != dst || r != route),
        }
    }

    fn set_firewall(&mut self, part: &Part) {
        self.remove_firewall(part);
        match part {
            Part::Table { .. } => self.ruleset.own.push(part.clone()),
            Part::Accepts { chain, rules, .. } => {
                if let Some(host) = self.ruleset.forward.iter_mut().find(|host| host.id == *chain) {
                    let at = place(host).unwrap_or(host.rules.len());
                    host.rules.splice(at..at, rules.iter().cloned());
                }
            }
            Part::Legacy { rules, .. } => {
                if let Some(table) = &mut self.ruleset.legacy {
                    table.chains.entry("FORWARD".into()).or_default().extend(rules.iter().cloned());
                }
            }
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
                if let Some(table) = &mut self.ruleset.legacy {
                    table.chains.values_mut().for_each(|chain| chain.retain(|rule| !rules.contains(rule)));
                }
            }
        }
    }

    /// Every key that a route needs before packets may follow it.
    pub(crate) fn route_without_neighbour(&self) -> Option<Key> {
        let on_overlay = self.dump.routes.iter().filter(|(_, r)| r.onlink);
        let mut dangling = on_overlay.filter(|(_, r)| {
            !self.dump.neighs.iter().any(|(dev, ip, _)| *dev == r.dev && Some(*ip) == r.gateway)
        });
        dangling.next().map(|(dst, _)| Key::Route(*dst))
    }
}

pub(crate) fn found_addr(dev: &IfName, addr: ipnetwork::IpNetwork) -> FoundAddr {
    FoundAddr {
        dev: dev.clone(),
        addr,
        scope: AddrScope::Global,
        deprecated: false,
        dynamic: false,
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

    fn firewall(&mut self, _: &firewall::Settings) -> Result<Ruleset, KernelError> {
        self.firewall_fault.clone().map_or_else(|| Ok(self.ruleset.clone()), Err)
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
