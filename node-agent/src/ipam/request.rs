//! What a Reserve may ask for, beyond what its types say. The peer is root, but a value that is wrong must be named here:
//! later it would be a log line or a kernel error.

use std::collections::BTreeSet;

use weft_shared::cni::Code;
use weft_shared::protocol::{Failure, Limit, PortMapping, Protocol, Reserve, WrongMapping};

use crate::pods::PodNetwork;

const MAX_TEXT: usize = 4096;
const MAX_REQUESTED: usize = 16;
/// Every IPv4 host must take datagrams of this size (RFC 791, section 3.2).
const MIN_MTU: u32 = 68;

pub(super) fn check_reserve(reserve: &Reserve) -> Result<(), Failure> {
    for (what, value) in [("netns", Some(&reserve.netns)), ("pod", reserve.pod.as_ref())] {
        if value.is_some_and(|value| value.len() > MAX_TEXT) {
            return Err(invalid(format!("{what}: expected at most {MAX_TEXT} bytes")));
        }
    }
    if reserve.requested.len() > MAX_REQUESTED {
        let count = reserve.requested.len();
        return Err(invalid(format!("{count} requested addresses: expected at most {MAX_REQUESTED}")));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = reserve.requested.iter().find(|address| !seen.insert(**address)) {
        return Err(invalid(format!("requested address {twice} is given twice")));
    }
    Ok(())
}

/// The MTU of the pod's interface.
pub(super) fn mtu(reserve: &Reserve, network: &PodNetwork) -> Result<u32, Failure> {
    match reserve.bridge.mtu {
        None => Ok(network.mtu),
        Some(mtu) if (MIN_MTU..=network.mtu).contains(&mtu) => Ok(mtu),
        Some(mtu) => Err(invalid(format!(
            "mtu = {mtu}: expected {MIN_MTU} to {}, the MTU of the overlay on this node",
            network.mtu
        ))),
    }
}

/// What the pod's address and its ports on the host must have in common.
pub(super) fn check_ports(reserve: &Reserve, network: &PodNetwork) -> Result<(), Failure> {
    let ports = &reserve.host_ports;
    PortMapping::check(ports).map_err(|wrong| {
        let what = match wrong {
            WrongMapping::TooMany => format!("{} ports of the host", ports.len()),
            WrongMapping::NoHostPort { at }
            | WrongMapping::NoContainerPort { at }
            | WrongMapping::Twice { at } => {
                format!("port of the host = {} to {}", ports[at], ports[at].container_port)
            }
        };
        invalid(format!("{what}: {wrong}"))
    })?;
    let is_tunnels =
        |port: &&PortMapping| port.protocol == Protocol::Udp && Some(port.host_port) == network.tunnel_port;
    if let Some(port) = ports.iter().find(is_tunnels) {
        return Err(invalid(format!(
            "hostPort of port {port}: expected another than the overlay's own, by which this node's peers reach it"
        )));
    }
    let ipv4 = network.subnet.is_ipv4();
    let out_of_reach =
        |port: &&PortMapping| port.host_ip.is_some_and(|ip| !ip.is_unspecified() && ip.is_ipv4() != ipv4);
    match ports.iter().find(out_of_reach) {
        Some(port) => {
            let family = if ipv4 { "IPv4" } else { "IPv6" };
            Err(invalid(format!("hostIP of port {port}: expected an {family} address, as the pod's is")))
        }
        None => Ok(()),
    }
}

/// A token bucket lets no packet through that is larger than it (net/sched/sch_tbf.c): it must have room for one.
pub(super) fn check_bandwidth(reserve: &Reserve, mtu: u32) -> Result<(), Failure> {
    const ETHERNET_HEADER: u32 = 14;
    let least = mtu + ETHERNET_HEADER;
    for (direction, limit) in [("ingress", reserve.bandwidth.ingress), ("egress", reserve.bandwidth.egress)] {
        if let Some(Limit { rate: 0, .. }) = limit {
            return Err(invalid(format!("{direction}Rate = 0: expected at least 8 bits a second")));
        }
        if let Some(limit) = limit.filter(|limit| limit.burst < least) {
            let (given, least) = (u64::from(limit.burst) * 8, u64::from(least) * 8);
            let why = "one packet of the pod's MTU";
            return Err(invalid(format!(
                "{direction}Burst = {given}: expected at least {least} bits, {why}"
            )));
        }
    }
    Ok(())
}

pub(super) fn invalid(details: String) -> Failure {
    Failure::new(Code::BadConfiguration, "invalid network configuration").with_details(details)
}
