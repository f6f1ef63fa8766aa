//! The network that weft is measured against: the CNI project's own plugins, and routes between the nodes as an
//! administrator writes them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{Kube, KubeNode, POD_NETWORK};
use crate::dist::CHECKOUT;

const PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// On every node, for its podCIDR.
pub fn install(kube: &Kube) -> Result<()> {
    let dir = PathBuf::from(CHECKOUT).join("target/tools/cni-plugins");
    for node in &kube.nodes {
        for plugin in PLUGINS {
            let to = format!("/opt/cni/bin/{plugin}");
            node.machine.copy(&dir.join(plugin), &to).context("scripts/test kube builds it")?;
        }
        let cidr = kube.pod_cidr(&node.name)?;
        let list = json!({
            "cniVersion": "1.0.0", "name": "reference",
            "plugins": [
                { "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "hairpinMode": true,
                  "ipam": { "type": "host-local", "subnet": cidr } },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        node.machine.put("/etc/cni/net.d/10-reference.conflist", list.to_string().as_bytes())?;
        for other in kube.nodes.iter().filter(|other| other.name != node.name) {
            let far = kube.pod_cidr(&other.name)?;
            node.machine.netns.ip(&format!("route replace {far} via {}", other.address))?;
        }
        node.machine.netns.set_sysctl("ipv4/ip_forward", "1")?;
        // Beyond the cluster nobody has a route to its pods.
        node.machine
            .sh(&format!("iptables -t nat -A POSTROUTING -s {cidr} ! -d {POD_NETWORK} -j MASQUERADE"))?;
    }
    Ok(())
}

/// host-local's record of a node: an address each, in `/var/lib/cni/networks`.
pub fn addresses(node: &KubeNode) -> Result<usize> {
    let dir = node.machine.path("/var/lib/cni/networks/reference");
    let names = fs::read_dir(&dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<Result<_>>()?;
    Ok(names.iter().filter(|name| name.parse::<std::net::Ipv4Addr>().is_ok()).count())
}
