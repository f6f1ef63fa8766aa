//! What is between two pods stays while whatever made it is replaced.

use anyhow::{Context as _, Result, ensure};
use e2e::kernel::KernelView;
use e2e::kube::web::deployment;
use e2e::kube::{Kube, PATIENCE, RunningPod, weft};
use e2e::traffic::datagrams::Stream;
use e2e::traffic::echo::ping;
use e2e::traffic::flows::Flows;
use e2e::wait::{SECOND, eventually, let_pass, patiently};

const FLOWS: usize = 50;
const DATAGRAMS_PER_SECOND: u32 = 1000;

/// Datagrams each way and open connections between two pods, while `disturb` does its work: none missing, none reset.
pub(crate) fn nothing_is_lost_while(
    kube: &mut Kube,
    near: &RunningPod,
    far: &RunningPod,
    disturb: impl FnOnce(&mut Kube) -> Result<()>,
) -> Result<()> {
    ping(&near.netns, far.address, 10, SECOND)?;
    let there = Stream::start(&near.netns, &far.netns, far.address, DATAGRAMS_PER_SECOND)?;
    let back = Stream::start(&far.netns, &near.netns, near.address, DATAGRAMS_PER_SECOND)?;
    let flows = Flows::open(&near.netns, &far.netns, far.address, FLOWS)?;
    disturb(kube)?;
    let rounds = flows.rounds();
    eventually("every flow to carry on", SECOND * 60, || Ok(flows.rounds() > rounds + 2))?;
    flows.end().context("a connection did not live")?;
    for tally in [there.end()?, back.end()?] {
        tally.is_whole(u64::from(DATAGRAMS_PER_SECOND / 10))?;
    }
    Ok(())
}

/// The agent's pod deleted, its DaemonSet rolled, kubelet and containerd restarted.
pub(crate) fn everything_of_a_node_is_replaced(kube: &mut Kube, node: &str) -> Result<()> {
    let old = weft::agent_on(kube, node)?;
    kube.kubectl(&["delete", "pod", "-n", weft::NAMESPACE, &old.name])?;
    patiently("another pod of the agent's", PATIENCE, || {
        let pods = weft::agents(kube)?;
        ensure!(pods.iter().any(|pod| pod.node == node && pod.name != old.name), "{pods:?}");
        Ok(())
    })?;
    roll(kube)?;
    for service in ["kubelet", "containerd"] {
        kube.node(node)?.machine.sh(&format!("systemctl restart {service}"))?;
        // Both are there again when a pod comes and goes.
        let name = format!("after-{service}");
        kube.apply(&deployment(&name, node, 1).to_string())?;
        kube.wait_pods("default", &format!("app={name}"), 1)?;
        kube.kubectl(&["delete", "deployment", &name, "--wait=false"])?;
        kube.wait_no_pods("default", &format!("app={name}"))?;
    }
    Ok(())
}

/// Every pod of the agent's replaced, one after the other.
fn roll(kube: &Kube) -> Result<()> {
    let before = weft::agents(kube)?;
    kube.kubectl(&["rollout", "restart", "-n", weft::NAMESPACE, weft::DAEMON_SET])?;
    all_replaced(kube, &before)
}

fn all_replaced(kube: &Kube, before: &[RunningPod]) -> Result<()> {
    // One node after the other.
    let timeout = format!("--timeout={}s", PATIENCE.as_secs() * before.len() as u64);
    kube.kubectl(&["rollout", "status", "-n", weft::NAMESPACE, weft::DAEMON_SET, &timeout])?;
    let after = weft::agents(kube)?;
    let kept = before.iter().find(|old| after.iter().any(|new| new.name == old.name));
    ensure!(kept.is_none(), "{kept:?} was not replaced");
    Ok(())
}

/// The API server is killed while the DaemonSet rolls, and comes back.
pub(crate) fn the_api_is_killed_during_a_roll(kube: &mut Kube) -> Result<()> {
    let before = weft::agents(kube)?;
    kube.kubectl(&["rollout", "restart", "-n", weft::NAMESPACE, weft::DAEMON_SET])?;
    eventually("the roll to be under way", PATIENCE, || {
        let pods = kube.list(&["pods", "-n", weft::NAMESPACE, "-l", weft::LABEL])?;
        let there = |old: &RunningPod| {
            let named = |pod: &&serde_json::Value| pod["metadata"]["name"] == old.name[..];
            pods.iter().find(named).is_some_and(|pod| pod["metadata"]["deletionTimestamp"].is_null())
        };
        Ok(!before.iter().all(there))
    })?;
    kube.control.api.kill()?;
    kube.control.start_api()?;
    all_replaced(kube, &before)
}

/// The API server is away for a minute: nothing changes on any node, and afterwards pods come as before.
pub(crate) fn the_api_is_away_for_a_minute(kube: &mut Kube, node: &str) -> Result<()> {
    let view = |kube: &Kube| KernelView::of(&kube.node(node)?.machine.netns);
    let before = view(kube)?;
    kube.control.api.kill()?;
    let_pass(SECOND * 60);
    let difference = before.difference(&view(kube)?);
    ensure!(difference.is_empty(), "changed without an API: {difference}");
    kube.control.start_api()?;
    kube.wait_nodes_ready()?;
    kube.apply(&deployment("after-api", node, 1).to_string())?;
    kube.wait_pods("default", "app=after-api", 1)?;
    kube.kubectl(&["delete", "deployment", "after-api", "--wait=false"])?;
    kube.wait_no_pods("default", "app=after-api")
}
