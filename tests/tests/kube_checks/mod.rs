//! What a cluster's network has to do for Kubernetes, whatever network it is.

pub(crate) mod churn;
pub(crate) mod joining;
pub(crate) mod packets;
pub(crate) mod restarts;
pub(crate) mod services;

use anyhow::{Result, ensure};
use e2e::kube::{Kube, RunningPod, web};
use ipnetwork::IpNetwork;
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
    for pod in &pods {
        let cidr: IpNetwork = kube.pod_cidr(&pod.node)?.parse()?;
        ensure!(cidr.contains(pod.address.into()), "{pod:?} is not of its node's {cidr}");
    }
    Ok(pods)
}

/// Everything that pods and services do between nodes.
pub(crate) fn the_network_works(kube: &Kube, pods: &[RunningPod], mtu: u64) -> Result<()> {
    packets::pods_reach_each_other(pods, mtu)?;
    packets::bulk_arrives_whole(&pods[0], &pods[1])?;
    services::a_service_is_balanced_over_nodes(kube, pods)?;
    services::a_host_port_leads_to_its_pod(kube, pods)?;
    services::a_local_service_sees_its_client(kube, pods)?;
    services::exec_and_logs_work(kube, pods)?;
    services::the_api_answers_a_pod(kube, &pods[1])
}
