//! Addresses and routes of the container's interface.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_shared::Subnet;
use weft_shared::cni::RouteForm;

use super::link::{Link, found, push_get_link, push_up};
use super::message::{Attributes, attribute, attributes, u16_at, u32_at};
use super::uapi::*;
use super::{Netlink, NetlinkError};

/// An address on an interface.
pub(crate) type Address = IpNetwork;

/// A route through a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Route {
    pub(crate) dst: Subnet,
    pub(crate) gateway: IpAddr,
    pub(crate) form: RouteForm,
}

impl Route {
    /// In the main table, with the kernel's defaults.
    pub(crate) fn new(dst: Subnet, gateway: IpAddr) -> Self {
        Self { dst, gateway, form: RouteForm::default() }
    }

    /// Whether a route that was found is the one that is wanted: what is not said of that is not compared, but for its
    /// table.
    pub(crate) fn is(&self, wanted: &Self) -> bool {
        fn fits<T: PartialEq>(found: Option<T>, wanted: Option<T>) -> bool {
            wanted.is_none() || found == wanted
        }
        let (found, form) = (&self.form, &wanted.form);
        (self.dst, self.gateway) == (wanted.dst, wanted.gateway)
            && table(found) == table(form)
            && fits(found.priority, form.priority)
            && fits(found.scope, form.scope)
            && fits(found.mtu, form.mtu)
            && fits(found.advmss, form.advmss)
    }
}

/// 0 is the main table to the kernel as well.
fn table(form: &RouteForm) -> u32 {
    form.table.filter(|table| *table != 0).unwrap_or(RT_TABLE_MAIN.into())
}

impl Netlink {
    /// Gives an interface its addresses, brings it up, adds its routes and looks it up, in one `sendmsg`. From then on the
    /// kernel announces its IPv4 addresses whenever its MAC address is set (`arp_notify`, ip-sysctl.rst).
    pub(crate) fn configure(
        &mut self,
        ifindex: u32,
        addresses: &[Address],
        routes: &[Route],
    ) -> Result<Option<Link>, NetlinkError> {
        let mut batch = self.batch();
        for address in addresses {
            let fixed = ifaddrmsg(ifindex, family(address.ip()), address.prefix());
            batch.push(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &fixed, |a| {
                let ip = octets(address.ip());
                a.bytes(IFA_LOCAL, &ip).bytes(IFA_ADDRESS, &ip);
                if let IpNetwork::V4(v4) = address
                    && v4.prefix() < 31
                {
                    a.bytes(IFA_BROADCAST, &v4.broadcast().octets());
                }
            });
        }
        push_up(&mut batch, ifindex, |a| {
            a.nest(IFLA_AF_SPEC, |a| {
                a.nest(u16::from(AF_INET), |a| {
                    a.nest(IFLA_INET_CONF, |a| {
                        a.u32(IPV4_DEVCONF_ARP_NOTIFY, 1);
                    });
                });
            });
        });
        for route in routes {
            let fixed = rtmsg(family(route.dst.addr()), route.dst.len(), &route.form);
            // Behind an equal route: a pod may have a second interface of ours, and the first one's keeps its place.
            batch.push(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, &fixed, |a| {
                if route.dst.len() > 0 {
                    a.bytes(RTA_DST, &octets(route.dst.addr()));
                }
                a.bytes(RTA_GATEWAY, &octets(route.gateway)).u32(RTA_OIF, ifindex);
                push_form(a, &route.form);
            });
        }
        push_get_link(&mut batch, ifindex, |_| {});
        let mut outcomes = self.transact(batch)?;
        let link = outcomes.pop().unwrap_or(Err(NetlinkError::Garbled));
        outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))?;
        found(link)
    }

    /// Every address of one interface.
    pub(crate) fn addresses(&mut self, ifindex: u32) -> Result<Vec<Address>, NetlinkError> {
        let fixed = [&[AF_UNSPEC, 0, 0, 0], ifindex.to_ne_bytes().as_slice()].concat();
        let found = self.dump(RTM_GETADDR, &fixed, parse_address)?;
        // A kernel without strict checking ignores the filter.
        Ok(found.into_iter().filter(|(index, _)| *index == ifindex).map(|(_, address)| address).collect())
    }

    /// The routes that go through a gateway and this interface, of every table. A container's tables are short and
    /// quiet, so reading them whole is cheaper and surer than a lookup per destination.
    pub(crate) fn routes(&mut self, ifindex: u32, v4: bool) -> Result<Vec<Route>, NetlinkError> {
        let mut fixed = [0; 12];
        fixed[0] = if v4 { AF_INET } else { AF_INET6 };
        let found = self.dump(RTM_GETROUTE, &fixed, parse_route)?;
        Ok(found
            .into_iter()
            .flatten()
            .filter(|(index, _)| *index == ifindex)
            .map(|(_, route)| route)
            .collect())
    }
}

fn ifaddrmsg(ifindex: u32, family: u8, prefix: u8) -> [u8; 8] {
    // The address comes out of the node's own pool: nobody is asked whether it is free.
    let flags = if family == AF_INET6 { IFA_F_NODAD } else { 0 };
    let [a, b, c, d] = ifindex.to_ne_bytes();
    [family, prefix, flags, RT_SCOPE_UNIVERSE, a, b, c, d]
}

fn rtmsg(family: u8, dst_len: u8, form: &RouteForm) -> [u8; 12] {
    // A number that does not fit here is told by attribute.
    let table = u8::try_from(table(form)).unwrap_or(RT_TABLE_UNSPEC);
    let scope = form.scope.unwrap_or(RT_SCOPE_UNIVERSE);
    [family, dst_len, 0, 0, table, RTPROT_BOOT, scope, RTN_UNICAST, 0, 0, 0, 0]
}

fn push_form(a: &mut Attributes<'_>, form: &RouteForm) {
    if let Some(priority) = form.priority {
        a.u32(RTA_PRIORITY, priority);
    }
    if table(form) > u8::MAX.into() {
        a.u32(RTA_TABLE, table(form));
    }
    if form.mtu.is_some() || form.advmss.is_some() {
        a.nest(RTA_METRICS, |a| {
            for (kind, value) in [(RTAX_MTU, form.mtu), (RTAX_ADVMSS, form.advmss)] {
                if let Some(value) = value {
                    a.u32(kind, value);
                }
            }
        });
    }
}

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn ip(octets: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(octets)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from))
        .ok()
}

fn parse_address(payload: &[u8]) -> Option<(u32, Address)> {
    let (prefix, ifindex) = (*payload.get(1)?, u32_at(payload, 4)?);
    let (mut local, mut address) = (None, None);
    for (kind, value) in attributes(payload.get(8..)?) {
        match kind {
            IFA_LOCAL => local = ip(value),
            IFA_ADDRESS => address = ip(value),
            _ => {}
        }
    }
    Some((ifindex, IpNetwork::new(local.or(address)?, prefix).ok()?))
}

/// One route for each of its next hops: IPv6 joins appended routes into one with several.
fn parse_route(payload: &[u8]) -> Option<Vec<(u32, Route)>> {
    let (family, len) = (*payload.first()?, *payload.get(1)?);
    let (mut table, scope) = (u32::from(*payload.get(4)?), *payload.get(6)?);
    let mut form = RouteForm { scope: Some(scope), ..RouteForm::default() };
    let (mut dst, mut hops) = (None, Vec::new());
    let (mut gateway, mut oif) = (None, None);
    for (kind, value) in attributes(payload.get(12..)?) {
        match kind {
            RTA_DST => dst = ip(value),
            RTA_GATEWAY => gateway = ip(value),
            RTA_OIF => oif = u32_at(value, 0),
            RTA_MULTIPATH => hops = next_hops(value),
            RTA_TABLE => table = u32_at(value, 0)?,
            RTA_PRIORITY => form.priority = u32_at(value, 0),
            RTA_METRICS => {
                form.mtu = attribute(value, RTAX_MTU).and_then(|value| u32_at(value, 0));
                form.advmss = attribute(value, RTAX_ADVMSS).and_then(|value| u32_at(value, 0));
            }
            _ => {}
        }
    }
    hops.extend(oif.zip(gateway));
    let zero: IpAddr = if family == AF_INET { [0; 4].into() } else { [0; 16].into() };
    let dst = Subnet::new(dst.unwrap_or(zero), len)?;
    form.table = Some(table);
    Some(hops.into_iter().map(|(oif, gateway)| (oif, Route { dst, gateway, form })).collect())
}

/// Interface and gateway of each `struct rtnexthop`.
fn next_hops(mut bytes: &[u8]) -> Vec<(u32, IpAddr)> {
    let mut hops = Vec::new();
    while let (Some(len), Some(oif)) = (u16_at(bytes, 0).map(usize::from), u32_at(bytes, 4)) {
        let Some(attributes) = bytes.get(8..len) else { break };
        hops.extend(attribute(attributes, RTA_GATEWAY).and_then(ip).map(|gateway| (oif, gateway)));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

#[cfg(test)]
mod tests {
    use super::super::message::{Batch, messages};
    use super::*;

    #[test]
    fn a_route_reads_back_as_it_was_written() {
        let form = RouteForm {
            mtu: Some(1400),
            advmss: Some(1300),
            priority: Some(7),
            table: Some(1007),
            scope: None,
        };
        let wanted = Route { form, ..Route::new("192.0.2.0/24".parse().expect("net"), [10, 1, 2, 1].into()) };
        let mut batch = Batch::starting_at(1);
        batch.push(RTM_NEWROUTE, 0, &rtmsg(AF_INET, 24, &form), |a| {
            a.bytes(RTA_DST, &[192, 0, 2, 0]).bytes(RTA_GATEWAY, &[10, 1, 2, 1]).u32(RTA_OIF, 4);
            push_form(a, &form);
        });
        let message = messages(&batch.bytes).next().expect("message");
        let found = parse_route(message.payload).expect("route");
        assert!(found[0].0 == 4 && found[0].1.is(&wanted), "{found:?}");
        for other in [
            RouteForm { table: None, ..form },
            RouteForm { priority: Some(8), ..form },
            RouteForm { mtu: Some(1500), ..form },
            RouteForm { advmss: Some(1), ..form },
            RouteForm { scope: Some(253), ..form },
        ] {
            assert!(!found[0].1.is(&Route { form: other, ..wanted }), "{other:?}");
        }
        let bare = RouteForm { table: form.table, ..RouteForm::default() };
        assert!(found[0].1.is(&Route { form: bare, ..wanted }), "what is not said is not compared");
        assert_eq!(
            (rtmsg(AF_INET, 0, &RouteForm::default())[4], rtmsg(AF_INET, 0, &bare)[4]),
            (RT_TABLE_MAIN, 0)
        );
    }
}
