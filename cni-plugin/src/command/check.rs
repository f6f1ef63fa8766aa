//! CHECK: is the container still wired as the result of its ADD says? Runtimes call it on the way of a pod's start, so
//! it is a handful of questions. Later plugins may have changed MAC and MTU: `prevResult` is the measure, not memory.

use std::net::IpAddr;
use std::time::Instant;

use weft_shared::cni::{CniArgs, CniResult, Code, InterfaceConf, IpConfig, NetConf, SpecVersion, Target};
use weft_shared::deadline;
use weft_shared::names::host_ifname;
use weft_shared::protocol::{Attachment, BridgeOptions, Failure, Request};
use weft_shared::{IfName, Mac, Subnet};

use super::bad_netns;
use crate::agent::Agent;
use crate::netlink::{Link, Netlink, NetlinkError, Route};
use crate::netns::Netns;
use crate::sysctl;
use crate::wiring::Pod;

pub(crate) fn check(
    conf: &NetConf,
    target: &Target,
    netns_path: &str,
    own_netns_is_fine: bool,
    deadline: Instant,
) -> Result<(), Failure> {
    conf.require(SpecVersion::WITH_CHECK, "CHECK")?;
    let Some(result) = conf.prev_result()? else {
        let msg = "prevResult is missing: expected the result of the ADD";
        return Err(Failure::new(Code::BadConfiguration, msg));
    };
    let attachment = conf.attachment(target);
    let asked = InterfaceConf::parse(conf, &CniArgs::default())?;
    let host_name = host_ifname(&attachment);
    let expected = Expected::from_result(&result, target, netns_path, &host_name, &asked.routes)?;
    let netns = Netns::open(netns_path, own_netns_is_fine).map_err(|e| bad_netns(netns_path, &e))?;
    let mut pod = Pod::open(netns).map_err(|e| bad_netns(netns_path, &e))?;

    let container = check_container(pod.netlink(), target, &expected)?;
    check_host(&attachment, &container, &expected, &asked.bridge)?;

    let socket = conf.socket()?;
    let addresses = expected.ips.iter().map(|ip| ip.address.ip()).collect();
    Agent::connect(&socket, deadline::CHECK_CONNECT, deadline)
        .and_then(|mut agent| agent.done(&Request::Check { attachment, addresses }))
        .map_err(|e| e.into_failure(&socket, Code::TryAgainLater))
}

/// What `prevResult` says of our interface.
struct Expected {
    mac: Option<Mac>,
    mtu: Option<u32>,
    /// Of the end on the node.
    host_mtu: Option<u32>,
    bridge: Option<String>,
    ips: Vec<IpConfig>,
    routes: Vec<Route>,
}

impl Expected {
    fn from_result(
        result: &CniResult,
        target: &Target,
        sandbox: &str,
        host_name: &IfName,
        asked: &[weft_shared::cni::Route],
    ) -> Result<Self, Failure> {
        let ours = |i: &weft_shared::cni::Interface| {
            i.name == target.ifname.as_str() && !i.sandbox.is_empty() && i.sandbox == sandbox
        };
        let Some(index) = result.interfaces.iter().position(ours) else {
            let msg = format!("prevResult has no interface {} in {sandbox:?}", target.ifname);
            return Err(Failure::new(Code::BadConfiguration, msg));
        };
        let host_end =
            result.interfaces.iter().find(|i| i.sandbox.is_empty() && i.name == host_name.as_str());
        let ips: Vec<_> = result.ips.iter().filter(|ip| ip.interface == Some(index)).cloned().collect();
        let gateways: Vec<IpAddr> = ips.iter().filter_map(|ip| ip.gateway).collect();
        // Routes through other gateways are other plugins', but for those that the configuration asks for. Results before
        // 1.1.0 do not say what else these are.
        let route = |r: &weft_shared::cni::Route| {
            let family = |g: &IpAddr| g.is_ipv4() == r.dst.is_ipv4();
            let gateway = r.gw.or_else(|| gateways.iter().copied().find(family))?;
            let asked = asked.iter().find(|a| a.dst == r.dst && a.gw.is_none_or(|gw| gw == gateway));
            let form = asked.map_or(r.form, |asked| asked.form);
            let ours = asked.is_some() || gateways.contains(&gateway);
            ours.then_some(Route { dst: Subnet::from(r.dst), gateway, form })
        };
        Ok(Self {
            mac: result.interfaces[index].mac.parse().ok(),
            mtu: result.interfaces[index].mtu,
            host_mtu: host_end.and_then(|i| i.mtu),
            bridge: result.interfaces.first().filter(|i| i.sandbox.is_empty()).map(|i| i.name.clone()),
            routes: result.routes.iter().filter_map(route).collect(),
            ips,
        })
    }
}

fn check_container(pod: &mut Netlink, target: &Target, expected: &Expected) -> Result<Link, Failure> {
    let name = &target.ifname;
    let link = pod
        .link_by_name(name)
        .map_err(unreadable)?
        .ok_or_else(|| wrong(format!("interface {name} is gone from the container")))?;
    if link.kind.as_deref() != Some("veth") {
        let kind = link.kind.as_deref().unwrap_or("of no kind");
        return Err(wrong(format!("interface {name} is {kind}: expected veth")));
    }
    if !link.up {
        return Err(wrong(format!("interface {name} is down")));
    }
    if let (Some(expected), Some(found)) = (expected.mac, link.mac)
        && expected != found
    {
        return Err(wrong(format!("interface {name} has MAC address {found}: expected {expected}")));
    }
    // A lower one is a later plugin's right, and tuning does not say so in its result; a higher one loses packets.
    if let (Some(expected), Some(found)) = (expected.mtu, link.mtu)
        && found > expected
    {
        return Err(wrong(format!("interface {name} has MTU {found}: expected at most {expected}")));
    }
    let addresses = pod.addresses(link.index).map_err(unreadable)?;
    if let Some(ip) = expected.ips.iter().find(|ip| !addresses.contains(&ip.address)) {
        return Err(wrong(format!("interface {name} does not have address {}", ip.address)));
    }
    for v4 in [true, false] {
        let mut wanted = expected.routes.iter().filter(|r| r.dst.is_ipv4() == v4).peekable();
        if wanted.peek().is_none() {
            continue;
        }
        let found = pod.routes(link.index, v4).map_err(unreadable)?;
        if let Some(route) = wanted.find(|wanted| !found.iter().any(|found| found.is(wanted))) {
            return Err(wrong(format!("route to {} via {} on {name} is gone", route.dst, route.gateway)));
        }
    }
    Ok(link)
}

fn check_host(
    attachment: &Attachment,
    container: &Link,
    expected: &Expected,
    asked: &BridgeOptions,
) -> Result<(), Failure> {
    let mut host = Netlink::open().map_err(|e| unreadable(e.into()))?;
    let name = host_ifname(attachment);
    let link = host
        .link_by_name(&name)
        .map_err(unreadable)?
        .ok_or_else(|| wrong(format!("host interface {name} is gone")))?;
    if !link.up {
        return Err(wrong(format!("host interface {name} is down")));
    }
    if link.peer != Some(container.index) || container.peer != Some(link.index) {
        return Err(wrong(format!(
            "host interface {name} is not the other end of the container's {}",
            attachment.ifname
        )));
    }
    if let (Some(expected), Some(found)) = (expected.host_mtu, link.mtu)
        && found > expected
    {
        return Err(wrong(format!("host interface {name} has MTU {found}: expected at most {expected}")));
    }
    let Some(bridge) = &expected.bridge else { return Ok(()) };
    let gone = || wrong(format!("bridge {bridge} is gone"));
    let dev: IfName = bridge.parse().map_err(|_| gone())?;
    let found = host.link_by_name(&dev).map_err(unreadable)?.ok_or_else(gone)?;
    if found.kind.as_deref() != Some("bridge") {
        return Err(wrong(format!("{bridge} is not a bridge")));
    }
    if !found.up {
        return Err(wrong(format!("bridge {bridge} is down")));
    }
    if link.master != Some(found.index) {
        return Err(wrong(format!("host interface {name} is not a port of bridge {bridge}")));
    }
    let switched = |on: bool| if on { "on" } else { "off" };
    for (what, found, expected) in [
        ("hairpin mode", link.port.hairpin, asked.hairpin),
        ("port isolation", link.port.isolated, asked.isolated),
    ] {
        if found != expected {
            let (found, expected) = (switched(found), switched(expected));
            return Err(wrong(format!("{what} of host interface {name} is {found}: expected {expected}")));
        }
    }
    let carried = host.addresses(found.index).map_err(unreadable)?;
    let gateways = expected.ips.iter().filter_map(|ip| ip.gateway);
    for gateway in gateways {
        if !carried.iter().any(|address| address.ip() == gateway) {
            return Err(wrong(format!("bridge {bridge} does not have the gateway's address {gateway}")));
        }
        if gateway.is_ipv4() && sysctl::forwards_ipv4(&dev) == Some(false) {
            return Err(wrong(format!(
                "net.ipv4.conf.{bridge}.forwarding = 0: expected 1, for the node to carry the container's packets"
            )));
        }
    }
    Ok(())
}

fn wrong(msg: String) -> Failure {
    Failure::new(Code::NotAsAdded, msg)
}

fn unreadable(e: NetlinkError) -> Failure {
    Failure::new(Code::TryAgainLater, format!("the kernel could not be asked: {e}"))
}
