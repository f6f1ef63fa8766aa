//! From a dump to what concerns us: which of the kernel's objects are ours, and which stand in our way.
//!
//! Ours is: a route with our protocol; a permanent neighbour or forwarding entry on the overlay's device; an address
//! of the overlay's network on a device we own. Routes that flanneld left behind are adopted. Everything else is
//! foreign: it is seen only where it has the key of something we want, and it is never removed.

use std::collections::BTreeMap;

use weft_shared::names::ROUTE_PROTOCOL;
use weft_shared::{IfName, Subnet};

use crate::kernel::Dump;
use crate::object::{Desired, Found, Key, Object, Observed, Route};

/// `RTPROT_BOOT`: what `ip route` and flanneld give their routes.
const PROTOCOL_BOOT: u8 = 3;

/// By what ours is told from foreign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ownership {
    pub networks: Vec<Subnet>,
    /// Length of a leased subnet, for telling flanneld's host-gw routes.
    pub subnet_len: u8,
    pub underlay: IfName,
    pub device: Option<IfName>,
    pub bridges: Vec<IfName>,
    /// Until the first complete pass of a first start: host-gw routes of a flanneld that ran here count as ours.
    pub adopt_flannels: bool,
}

impl Ownership {
    fn owns_route(&self, dst: Subnet, route: &Route) -> bool {
        let inside = self.networks.iter().any(|n| n.covers(dst));
        let on_our_device = self.device.as_ref() == Some(&route.dev) && inside;
        let flannels = self.adopt_flannels
            && inside
            && dst.len() == self.subnet_len
            && route.protocol == PROTOCOL_BOOT
            && route.gateway.is_some()
            && route.dev == self.underlay;
        route.protocol == ROUTE_PROTOCOL || on_our_device || flannels
    }

    fn owns_addr(&self, dev: &IfName, addr: Subnet) -> bool {
        let our_device = self.device.as_ref() == Some(dev) || self.bridges.contains(dev);
        our_device && self.networks.iter().any(|n| n.covers(addr))
    }
}

/// `sysctls`: those of `desired`, as far as this kernel has them.
pub fn observe(
    dump: &Dump,
    sysctls: &BTreeMap<String, String>,
    desired: &Desired,
    ownership: &Ownership,
) -> Observed {
    let mut observed = Observed::default();
    let mut see = |object: Object, ours: bool| {
        let key = object.key();
        let wanted = desired.get(&key);
        if !ours && wanted.is_none() {
            return;
        }
        let satisfies = |object: &Object| wanted.is_some_and(|w| w.satisfied_by(object));
        match observed.objects.get_mut(&key) {
            None => {
                observed.objects.insert(key, Found { object, ours });
            }
            // Several under one key: the one that is right counts, else one of ours; the rest of ours is too much.
            Some(first) => {
                let better = ours && (!first.ours || (satisfies(&object) && !satisfies(&first.object)));
                let spare = if better {
                    std::mem::replace(first, Found { object, ours })
                } else {
                    Found { object, ours }
                };
                if spare.ours {
                    observed.surplus.push(spare.object);
                }
            }
        }
    };
    for (name, found) in &dump.links {
        see(Object::Link { name: name.clone(), link: found.link.clone() }, false);
        if found.is_our_veth(name) {
            see(Object::Port { veth: name.clone(), port: found.port.clone() }, false);
        }
    }
    for (path, value) in sysctls {
        see(Object::Sysctl { path: path.clone(), value: value.clone() }, false);
    }
    for found in &dump.addrs {
        let ours = ownership.owns_addr(&found.dev, Subnet::host(found.addr.ip()));
        see(Object::Addr { dev: found.dev.clone(), addr: found.addr, scope: found.scope }, ours);
    }
    for (dev, ip, mac) in &dump.neighs {
        see(Object::Neigh { dev: dev.clone(), ip: *ip, mac: *mac }, true);
    }
    for (dev, mac, dst) in &dump.fdb {
        see(Object::Fdb { dev: dev.clone(), mac: *mac, dst: *dst }, true);
    }
    for (dst, route) in &dump.routes {
        see(Object::Route { dst: *dst, route: route.clone() }, ownership.owns_route(*dst, route));
    }
    // What this kernel does not have cannot be wrong.
    for (key, object) in desired.objects() {
        if let Key::Sysctl(path) = key
            && !sysctls.contains_key(path)
        {
            observed.objects.insert(key.clone(), Found { object: object.clone(), ours: false });
        }
    }
    observed
}
