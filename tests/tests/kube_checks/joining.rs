//! A node goes and comes back.

use anyhow::{Result, ensure};
use e2e::kube::{Kube, PATIENCE, weft};
use e2e::wait::{eventually, until_ok};

use super::{packets, pods_on_each};

/// Drained, deleted and joined again: the others forget it, and know it again by whatever podCIDR it has then.
pub(crate) fn a_node_is_drained_deleted_and_joined_again(kube: &Kube, name: &str, mtu: u64) -> Result<()> {
    let others = || kube.nodes.iter().filter(|node| node.name != name);
    let old = kube.pod_cidr(name)?;
    kube.kubectl(&["drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--force"])?;
    kube.node(name)?.machine.sh("systemctl stop kubelet")?;
    kube.kubectl(&["delete", "node", name])?;
    for node in others() {
        eventually(&format!("{} to forget {name}", node.name), PATIENCE, || {
            let routes = node.machine.netns.ip("route show")?;
            ensure!(!routes.contains(&old), "{routes}");
            Ok(true)
        })?;
    }
    kube.node(name)?.machine.sh("systemctl start kubelet")?;
    kube.wait_nodes_ready()?;
    let new = kube.pod_cidr(name)?;
    for node in others() {
        until_ok(&format!("{} to know {name} again", node.name), PATIENCE, || {
            let routes = node.machine.netns.ip("route show")?;
            ensure!(routes.contains(&new), "{routes}");
            weft::ctl(node, &["peers"])
        })?;
    }
    packets::pods_reach_each_other(&pods_on_each(kube)?, mtu)
}
