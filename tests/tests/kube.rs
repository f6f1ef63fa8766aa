//! weft as the network of a Kubernetes cluster: real control plane, real kubelets.

mod kube_checks;

use anyhow::Result;
use e2e::kube::{ProxyMode, kube, reference};
use e2e::report::took;

use kube_checks::{churn, packets, pods_on_each, services};

/// The harness by a network that is known to work; its times are what weft's are shown beside.
#[test]
fn the_stock_plugins_make_a_cluster() -> Result<()> {
    kube(3, ProxyMode::Iptables, &[], |kube| {
        reference::install(kube)?;
        took("all nodes Ready", kube.wait_nodes_ready()?);
        let pods = pods_on_each(kube)?;
        packets::pods_reach_each_other(&pods, 1500)?;
        services::a_service_is_balanced_over_nodes(kube, &pods)?;
        packets::bulk_arrives_whole(&pods[0], &pods[1])?;
        services::a_host_port_leads_to_its_pod(kube, &pods)?;
        services::a_local_service_sees_its_client(kube, &pods)?;
        services::exec_and_logs_work(kube, &pods)?;
        services::the_api_answers_a_pod(kube, &pods[1])?;
        let times = churn::thirty_pods_come_and_go(kube, &kube.nodes[0], reference::addresses)?;
        took("30 pods ready, bridge and host-local", times.up);
        took("30 pods gone, bridge and host-local", times.down);
        services::clear(kube)
    })
}
