//! weft as the network of a Kubernetes cluster: real control plane, real kubelets; installed by its image and its manifest.

mod kube_checks;

use anyhow::Result;
use e2e::cluster::Backend;
use e2e::kube::{ProxyMode, kube, kube_with_weft, reference, weft};
use e2e::report::took;

use kube_checks::restarts::{
    everything_of_a_node_is_replaced, nothing_is_lost_while, the_api_is_away_for_a_minute,
    the_api_is_killed_during_a_roll,
};
use kube_checks::{churn, joining, pods_on_each, services, the_network_works};

/// What a packet's way costs of an underlay of 1500.
const VXLAN_MTU: u64 = 1450;
const HOST_GW_MTU: u64 = 1500;
const UDP_MTU: u64 = 1472;

#[test]
fn vxlan_carries_a_cluster_with_kube_proxy_by_iptables() -> Result<()> {
    kube_with_weft(3, ProxyMode::Iptables, Backend::Vxlan, |kube| {
        let pods = pods_on_each(kube)?;
        the_network_works(kube, &pods, VXLAN_MTU)?;
        let times = churn::thirty_pods_come_and_go(kube, &kube.nodes[0], weft::addresses)?;
        took("30 pods ready, weft", times.up);
        took("30 pods gone, weft", times.down);
        services::clear(kube)
    })
}

#[test]
fn host_gw_carries_a_cluster_with_kube_proxy_by_nftables() -> Result<()> {
    kube_with_weft(3, ProxyMode::Nftables, Backend::HostGw, |kube| {
        let pods = pods_on_each(kube)?;
        the_network_works(kube, &pods, HOST_GW_MTU)?;
        services::clear(kube)
    })
}

#[test]
fn udp_carries_a_cluster() -> Result<()> {
    kube_with_weft(3, ProxyMode::Iptables, Backend::Udp, |kube| {
        let pods = pods_on_each(kube)?;
        the_network_works(kube, &pods, UDP_MTU)?;
        services::clear(kube)
    })
}

#[test]
fn restarts_lose_nothing_by_vxlan() -> Result<()> {
    kube_with_weft(3, ProxyMode::Iptables, Backend::Vxlan, |kube| {
        let pods = pods_on_each(kube)?;
        nothing_is_lost_while(kube, &pods[0], &pods[1], |kube| {
            everything_of_a_node_is_replaced(kube, "n1")?;
            the_api_is_killed_during_a_roll(kube)?;
            the_api_is_away_for_a_minute(kube, "n1")
        })
    })
}

#[test]
fn restarts_lose_nothing_by_host_gw() -> Result<()> {
    kube_with_weft(3, ProxyMode::Nftables, Backend::HostGw, |kube| {
        let pods = pods_on_each(kube)?;
        nothing_is_lost_while(kube, &pods[0], &pods[1], |kube| {
            everything_of_a_node_is_replaced(kube, "n1")?;
            the_api_is_killed_during_a_roll(kube)
        })
    })
}

#[test]
fn a_node_is_drained_and_deleted_and_joins_again() -> Result<()> {
    kube_with_weft(3, ProxyMode::Iptables, Backend::Vxlan, |kube| {
        joining::a_node_is_drained_deleted_and_joined_again(kube, "n3", VXLAN_MTU)
    })
}

/// The harness by a network that is known to work; its times are what weft's are shown beside.
#[test]
fn the_stock_plugins_make_a_cluster() -> Result<()> {
    kube(3, ProxyMode::Iptables, |kube| {
        reference::install(kube)?;
        took("all nodes Ready, bridge and host-local", kube.wait_nodes_ready()?);
        let pods = pods_on_each(kube)?;
        the_network_works(kube, &pods, 1500)?;
        let times = churn::thirty_pods_come_and_go(kube, &kube.nodes[0], reference::addresses)?;
        took("30 pods ready, bridge and host-local", times.up);
        took("30 pods gone, bridge and host-local", times.down);
        services::clear(kube)
    })
}
