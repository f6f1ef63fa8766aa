//! The one invariant of ADD and DEL: addresses handed out, live veths and the agent's records agree.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, ensure};
use nix::net::if_::if_nameindex;
use weft_agent::status::AttachmentStatus;
use weft_shared::names::is_host_ifname;

use crate::cluster::READY;
use crate::kernel::query;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::wait::eventually;

/// The names of the host-side veths on the node: nobody but the plugin gives names of this form.
pub fn live_veths(node: &Node) -> Result<BTreeSet<String>> {
    let names = node.netns().enter(|| {
        let links = if_nameindex()?;
        Ok(links.iter().map(|link| link.name().to_string_lossy().into_owned()).collect::<BTreeSet<_>>())
    })?;
    Ok(names.into_iter().filter(|name| is_host_ifname(name)).collect())
}

/// The IPv4 address of a pod's interface, as its own kernel has it; `None` when there is no interface.
pub fn address_inside(pod: &Netns) -> Result<Option<Ipv4Addr>> {
    let links = query(pod, "ip -json -4 address show")?;
    let eth0 = links.iter().find(|link| link["ifname"] == "eth0");
    Ok(eth0.and_then(|link| link["addr_info"][0]["local"].as_str()?.parse().ok()))
}

/// The agent's records, by container ID: address, veth, state.
pub fn records(node: &Node) -> Result<BTreeMap<String, AttachmentStatus>> {
    Ok(node.status()?.pods.list.into_iter().map(|record| (record.container_id.clone(), record)).collect())
}

/// Waits until exactly these pods are in the books, and nothing else holds an address.
pub fn invariant(node: &Node, pods: &[Pod]) -> Result<()> {
    let handed: BTreeSet<Ipv4Addr> = pods.iter().map(|pod| pod.address).collect();
    ensure!(handed.len() == pods.len(), "an address was handed out twice");
    let expected =
        pods.iter().map(|pod| Ok(pod.host_veth()?.to_string())).collect::<Result<BTreeSet<_>>>()?;
    eventually("addresses, veths and records to agree", READY, || {
        let live = live_veths(node)?;
        ensure!(live == expected, "veths {live:?}, expected {expected:?}");
        let records = node.status()?.pods;
        ensure!(
            records.attachments == pods.len() && records.addresses_used == pods.len(),
            "{} pods, records {records:?}",
            pods.len()
        );
        let held: BTreeSet<IpAddr> = records.list.iter().flat_map(|r| r.addresses.clone()).collect();
        ensure!(
            held == handed.iter().copied().map(IpAddr::from).collect(),
            "handed out {handed:?}, held {held:?}"
        );
        Ok(true)
    })?;
    for pod in pods {
        let inside = address_inside(&pod.netns)?;
        ensure!(inside == Some(pod.address), "{} has {inside:?}, was given {}", pod.name, pod.address);
    }
    Ok(())
}
