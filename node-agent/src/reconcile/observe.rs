//! From a dump to what concerns us: which of the kernel's objects are ours, and which stand in our way.
//!
//! Ours is: a route with our protocol; a permanent neighbour or forwarding entry on the overlay's device; an address
//! of the overlay's network on a device we own; a tunnel's end that weft made or that bears our VTEP MAC. Routes that
//! flanneld left behind are adopted. Everything else is foreign: it is seen only where it has the key of something we
//! want, and it is never removed.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;

use weft_shared::names::{LINK_GROUP, ROUTE_PROTOCOL, is_egress_ifname};
use weft_shared::{IfName, Mac, Subnet};

use crate::kernel::{Dump, FoundLink};
use crate::object::{Desired, Found, Key, LinkKind, Object, Observed, Obstacle, Route, RouteForm};

/// `RTPROT_KERNEL`: routes that come and go with an address.
pub const PROTOCOL_KERNEL: u8 = 2;
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
    /// This node's, whatever its backend is now.
    pub vtep_mac: Mac,
    pub bridges: Vec<IfName>,
    /// Those of them whose every IPv4 address is ours to remove.
    pub forced: BTreeSet<IfName>,
    /// Until the first complete pass of a first start: host-gw routes of a flanneld that ran here count as ours.
    pub adopt_flannels: bool,
    /// Indices of our devices as they were last in place: an index outlives a name, and is not used twice.
    pub indices: BTreeMap<IfName, u32>,
}

impl Ownership {
    fn owns_route(&self, dst: Subnet, route: &Route) -> bool {
        let inside = self.networks.iter().any(|n| n.covers(dst));
        let as_flannels = inside && route.form.is_in_plain_slot() && route.protocol != PROTOCOL_KERNEL;
        let on_our_device = as_flannels && self.device.is_some() && self.device == route.dev;
        let flannels = self.adopt_flannels
            && as_flannels
            && dst.len() == self.subnet_len
            && route.protocol == PROTOCOL_BOOT
            && route.gateway.is_some()
            && route.dev.as_ref() == Some(&self.underlay);
        route.protocol == ROUTE_PROTOCOL || on_our_device || flannels
    }

    fn owns_addr(&self, dev: &IfName, addr: Subnet) -> bool {
        let our_device = self.device.as_ref() == Some(dev) || self.bridges.contains(dev);
        let forced = addr.is_ipv4() && self.forced.contains(dev);
        forced || (our_device && self.networks.iter().any(|n| n.covers(addr)))
    }

    /// A tunnel's end: of a backend that this node had before, nothing is left; or what a pod that is gone was limited by.
    fn owns_link(&self, name: &IfName, found: &FoundLink) -> bool {
        match &found.link.kind {
            LinkKind::Tun(tun) => tun.marked,
            LinkKind::Vxlan(_) => {
                let adopted = name.as_str().starts_with("flannel") && found.link.mac.value() == self.vtep_mac;
                found.group == LINK_GROUP || adopted
            }
            LinkKind::Ifb => found.group == LINK_GROUP && is_egress_ifname(name.as_str()),
            LinkKind::Bridge | LinkKind::Other(_) => false,
        }
    }

    /// Whether another process lives by the device that has the name of a wanted one.
    fn is_denied(&self, name: &IfName, found: &FoundLink, wanted: &Object) -> bool {
        let Object::Link { link, .. } = wanted else { return false };
        let denied = matches!((&link.kind, &found.link.kind),
            (LinkKind::Tun(want), LinkKind::Tun(have)) if want.is_denied_by(have));
        denied && self.indices.get(name) != Some(&found.index)
    }

    /// What our device `name` is called now: it has the index that ours had, or is of the same kind with the same MAC
    /// or, without one, with our mark, which tells after a restart of the agent.
    fn renamed<'a>(&self, dump: &'a Dump, name: &IfName, wanted: &Object) -> Option<&'a IfName> {
        let index = self.indices.get(name);
        let is_it = |found: &FoundLink| {
            let alike = match wanted {
                Object::Link { link, .. } => {
                    let same = discriminant(&link.kind) == discriminant(&found.link.kind);
                    let marked = |kind: &LinkKind| !matches!(kind, LinkKind::Tun(tun) if !tun.marked);
                    same && link.mac.value() == found.link.mac.value() && marked(&found.link.kind)
                }
                _ => false,
            };
            index == Some(&found.index) || (index.is_none() && alike)
        };
        let taken = dump.links.contains_key(name);
        dump.links.iter().find(|(_, found)| !taken && is_it(found)).map(|(now, _)| now)
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
    let mut foreign_routes: BTreeSet<Key> = BTreeSet::new();
    let mut see = |object: Object, ours: bool| {
        let key = object.key();
        let wanted = desired.get(&key);
        let slot = match wanted {
            Some(Object::Route { route, .. }) => route.form,
            _ => RouteForm::default(),
        };
        let competes = matches!(&object, Object::Route { route, .. } if route.form.competes_with(&slot));
        if competes && !ours {
            foreign_routes.insert(key.clone());
        }
        if let (Some(_), false, Object::Route { dst, route }) = (wanted, ours, &object)
            && route.form.comes_before(&slot)
        {
            observed.obstacles.entry(key.clone()).or_insert_with(|| Obstacle::Overruled(words(*dst, route)));
        }
        // A foreign route elsewhere, by its metric or TOS, has not our key.
        let is_elsewhere = matches!(key, Key::Route(_)) && !competes;
        if !ours && (wanted.is_none() || is_elsewhere) {
            return;
        }
        let overruled = competes && ours && foreign_routes.contains(&key);
        let satisfies = |object: &Object| wanted.is_some_and(|w| w.satisfied_by(object));
        match observed.objects.get_mut(&key) {
            None => {
                observed.objects.insert(key, Found { object, ours, overruled });
            }
            // Several under one key: the one that is right counts, else one of ours; the rest of ours is too much.
            Some(first) => {
                let better = ours && (!first.ours || (satisfies(&object) && !satisfies(&first.object)));
                let found = Found { object, ours, overruled };
                let spare = if better { std::mem::replace(first, found) } else { found };
                if spare.ours {
                    observed.surplus.push(spare.object);
                }
            }
        }
    };
    let mut denied = Vec::new();
    for (name, found) in &dump.links {
        let object = Object::Link { name: name.clone(), link: found.link.clone() };
        if desired.get(&object.key()).is_some_and(|wanted| ownership.is_denied(name, found, wanted)) {
            denied.push(name.clone());
        }
        see(object, ownership.owns_link(name, found));
        // Its mark may be what somebody took away: a name of ours for which a port is on record tells as well.
        let on_record = found.is_veth() && desired.get(&Key::BridgePort(name.clone())).is_some();
        if found.is_our_veth(name) || on_record {
            see(Object::BridgePort { veth: name.clone(), port: found.port.clone() }, false);
        }
    }
    for (path, value) in sysctls {
        see(Object::Sysctl { path: path.clone(), value: value.clone() }, false);
    }
    for found in &dump.addrs {
        let ours = ownership.owns_addr(&found.dev, Subnet::host(found.addr.ip()));
        see(
            Object::Addr { dev: found.dev.clone(), addr: found.addr, scope: found.scope, form: found.form },
            ours,
        );
    }
    for (dev, ip, mac) in &dump.neighs {
        see(Object::Neigh { dev: dev.clone(), ip: *ip, mac: *mac }, true);
    }
    for (dev, mac, dst, path) in &dump.fdb {
        see(Object::Fdb { dev: dev.clone(), mac: *mac, dst: *dst, path: *path }, true);
    }
    for (dst, route) in &dump.routes {
        see(Object::Route { dst: *dst, route: route.clone() }, ownership.owns_route(*dst, route));
    }
    for name in denied {
        observed.obstacles.insert(Key::Link(name.clone()), Obstacle::InUse(name));
    }
    for (key, object) in desired.objects() {
        if let Key::Link(name) | Key::BridgePort(name) = key
            && let Some(now) = ownership.renamed(dump, name, object)
        {
            observed.renamed.insert(name.clone(), now.clone());
        }
        // What this kernel does not have cannot be wrong.
        if let Key::Sysctl(path) = key
            && !sysctls.contains_key(path)
        {
            observed
                .objects
                .insert(key.clone(), Found { object: object.clone(), ours: false, overruled: false });
        }
    }
    observed
}

/// In those of iproute2.
fn words(dst: Subnet, route: &Route) -> String {
    let mut words = dst.to_string();
    if let Some(gateway) = route.gateway {
        words.push_str(&format!(" via {gateway}"));
    }
    if let Some(dev) = &route.dev {
        words.push_str(&format!(" dev {dev}"));
    }
    format!("{words} proto {} metric {}", route.protocol, route.form.metric.unwrap_or(0))
}
