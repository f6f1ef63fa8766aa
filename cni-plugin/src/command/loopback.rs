//! weft under the name `loopback`: the plugin that containerd and CRI-O call beside the network's own for every container,
//! to bring `lo` up. It answers as the reference does (containernetworking/plugins, plugins/main/loopback), and needs no
//! agent: an interface that every namespace has is nobody's to allocate.

use std::io::Write;

use weft_shared::IfName;
use weft_shared::cni::{CniResult, Code, Interface, IpConfig, NetConf, SpecVersion};
use weft_shared::protocol::Failure;

use super::{bad_netns, print};
use crate::netlink::{Link, NetlinkError};
use crate::netns::Netns;
use crate::wiring::Pod;

/// Whatever `CNI_IFNAME` says.
const LO: &str = "lo";
/// `ip link` shows it; the kernel keeps zeros.
const MAC: &str = "00:00:00:00:00:00";

/// ADD: `lo` is up, and the kernel has given it its addresses with that. A result of plugins before this one is passed on.
pub(crate) fn add(
    conf: &NetConf,
    netns_path: &str,
    own_netns_is_fine: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let previous = conf.prev_result_as_configured()?;
    let (mut pod, lo) = open(netns_path, own_netns_is_fine)?;
    let failed = |e: NetlinkError| Failure::new(Code::Wiring, format!("cannot bring {LO} up: {e}"));
    pod.netlink().set_up(lo.index).map_err(failed)?;
    if let Some(text) = previous {
        return print(&text, out);
    }
    let addresses = pod.netlink().addresses(lo.index).map_err(failed)?;
    // One of each family, as the reference tells them; others may have been put there for something else.
    let first = |v4: bool| addresses.iter().find(|a| a.ip().is_loopback() && a.is_ipv4() == v4).copied();
    let ips = [first(true), first(false)].into_iter().flatten();
    let result = CniResult {
        interfaces: vec![Interface {
            name: LO.to_owned(),
            mac: MAC.to_owned(),
            mtu: None,
            sandbox: netns_path.to_owned(),
        }],
        ips: ips.map(|address| IpConfig { interface: Some(0), address, gateway: None }).collect(),
        ..CniResult::default()
    };
    print(&result.render(conf.version)?, out)
}

/// DEL: nothing is left to fail for. `lo` goes down if it is there.
pub(crate) fn del(netns_path: Option<&str>) {
    // Never the host's own, whatever CNI_NETNS_OVERRIDE says: its services would be cut off.
    if let Some(path) = netns_path
        && let Ok((mut pod, lo)) = open(path, false)
    {
        let _ = pod.netlink().set_down(lo.index);
    }
}

/// CHECK: `lo` is up.
pub(crate) fn check(conf: &NetConf, netns_path: &str, own_netns_is_fine: bool) -> Result<(), Failure> {
    conf.require(SpecVersion::WITH_CHECK, "CHECK")?;
    let (_, lo) = open(netns_path, own_netns_is_fine)?;
    if lo.up { Ok(()) } else { Err(Failure::new(Code::NotAsAdded, format!("interface {LO} is down"))) }
}

/// GC and STATUS: nothing is kept, nothing is needed.
pub(crate) fn nothing_to_do(conf: &NetConf, verb: &str) -> Result<(), Failure> {
    conf.require(SpecVersion::WITH_GC_AND_STATUS, verb)
}

fn open(netns_path: &str, own_netns_is_fine: bool) -> Result<(Pod, Link), Failure> {
    let netns = Netns::open(netns_path, own_netns_is_fine).map_err(|e| bad_netns(netns_path, &e))?;
    let mut pod = Pod::open(netns).map_err(|e| bad_netns(netns_path, &e))?;
    let name = LO.parse::<IfName>().map_err(|e| bad_netns(netns_path, &e))?;
    let lo = pod.netlink().link_by_name(&name).map_err(|e| bad_netns(netns_path, &e))?;
    let lo = lo.ok_or_else(|| bad_netns(netns_path, &format!("it has no interface {LO}")))?;
    Ok((pod, lo))
}
