//! Addresses and routes of the container's interface.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_shared::Subnet;

use super::link::push_up;
use super::message::{attribute, attributes, u16_at, u32_at};
use super::uapi::*;
use super::{Netlink, NetlinkError};

/// An address on an interface.
pub(crate) type Address = IpNetwork;

/// A route through a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Route {
    pub(crate) dst: Subnet,
    pub(crate) gateway: IpAddr,
}

impl Netlink {
    /// Gives an interface its addresses, brings it up and adds its routes, in one `sendmsg`.
    pub(crate) fn configure(
        &mut self,
        ifindex: u32,
        addresses: &[Address],
        routes: &[Route],
    ) -> Result<(), NetlinkError> {
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
        push_up(&mut batch, ifindex);
        for route in routes {
            let fixed = rtmsg(family(route.dst.addr()), route.dst.len());
            // Behind an equal route: a pod may have a second interface of ours, and the first one's keeps its place.
            batch.push(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, &fixed, |a| {
                if route.dst.len() > 0 {
                    a.bytes(RTA_DST, &octets(route.dst.addr()));
                }
                a.bytes(RTA_GATEWAY, &octets(route.gateway)).u32(RTA_OIF, ifindex);
            });
        }
        self.apply(batch)
    }

    /// Every address of one interface.
    pub(crate) fn addresses(&mut self, ifindex: u32) -> Result<Vec<Address>, NetlinkError> {
        let fixed = [&[AF_UNSPEC, 0, 0, 0], ifindex.to_ne_bytes().as_slice()].concat();
        let found = self.dump(RTM_GETADDR, &fixed, parse_address)?;
        // A kernel without strict checking ignores the filter.
        Ok(found.into_iter().filter(|(index, _)| *index == ifindex).map(|(_, address)| address).collect())
    }

    /// The routes of the main table that go through a gateway and this interface. A container's table is short and
    /// quiet, so reading it whole is cheaper and surer than a lookup per destination.
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

fn rtmsg(family: u8, dst_len: u8) -> [u8; 12] {
    [family, dst_len, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0, 0, 0, 0]
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
    let (family, len, table) = (*payload.first()?, *payload.get(1)?, *payload.get(4)?);
    let (mut dst, mut hops) = (None, Vec::new());
    let (mut gateway, mut oif) = (None, None);
    for (kind, value) in attributes(payload.get(12..)?) {
        match kind {
            RTA_DST => dst = ip(value),
            RTA_GATEWAY => gateway = ip(value),
            RTA_OIF => oif = u32_at(value, 0),
            RTA_MULTIPATH => hops = next_hops(value),
            _ => {}
        }
    }
    hops.extend(oif.zip(gateway));
    let zero: IpAddr = if family == AF_INET { [0; 4].into() } else { [0; 16].into() };
    let dst = Subnet::new(dst.unwrap_or(zero), len).filter(|_| table == RT_TABLE_MAIN)?;
    Some(hops.into_iter().map(|(oif, gateway)| (oif, Route { dst, gateway })).collect())
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
