//! What a cluster's network has to do for Kubernetes, whatever network it is.

pub(crate) mod churn;
pub(crate) mod packets;
pub(crate) mod services;

use anyhow::Result;
use e2e::kube::{Kube, RunningPod, web};
use serde_json::json;

/// The label of the pods that all checks share, one on each node; each has a port of its host.
pub(crate) const EACH: &str = "each";
pub(crate) const HOST_PORT: u16 = 8080;

/// A pod on every node, in the order of the nodes.
pub(crate) fn pods_on_each(kube: &Kube) -> Result<Vec<RunningPod>> {
    let ports = json!({ "ports": [{ "containerPort": 80, "hostPort": HOST_PORT }] });
    kube.apply(&web::daemon_set(EACH, &ports).to_string())?;
    let mut pods = kube.wait_pods("default", "app=each", kube.nodes.len())?;
    pods.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(pods)
}
