//! Many pods come and go.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::host::HostSnapshot;
use e2e::kube::web::deployment;
use e2e::kube::{Kube, KubeNode, PATIENCE};
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, patiently};

const PODS: usize = 30;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// Until all are ready.
    pub(crate) up: Duration,
    /// Until none has left anything.
    pub(crate) down: Duration,
}

/// 30 pods on one node, each with an address of its own that answers, and gone without a trace: no device, route, rule,
/// neighbour, kernel parameter or namespace, and no address on record as `addresses` counts them.
pub(crate) fn thirty_pods_come_and_go(
    kube: &Kube,
    node: &KubeNode,
    addresses: impl Fn(&KubeNode) -> Result<usize>,
) -> Result<Times> {
    let snapshot = || HostSnapshot::of_node(&node.machine.netns, &node.machine.path("/run/netns"), &[]);
    let (before, on_record) = (snapshot()?, addresses(node)?);
    let started = Instant::now();
    kube.apply(&deployment("many", &node.name, PODS).to_string())?;
    let pods = kube.wait_pods("default", "app=many", PODS)?;
    let up = started.elapsed();
    let different: BTreeSet<_> = pods.iter().map(|pod| pod.address).collect();
    ensure!(different.len() == PODS, "{pods:?}");
    ensure!(addresses(node)? == on_record + PODS, "{} on record", addresses(node)?);
    for pod in &pods {
        ping(&node.machine.netns, pod.address, 10, SECOND).with_context(|| format!("{pod:?}"))?;
    }
    let started = Instant::now();
    kube.kubectl(&["delete", "deployment", "many", "--wait=false"])?;
    kube.wait_no_pods("default", "app=many")?;
    patiently("nothing of 30 pods to be left", PATIENCE, || {
        let difference = before.difference(&snapshot()?);
        ensure!(difference.is_empty(), "{difference}");
        ensure!(addresses(node)? == on_record, "{} on record", addresses(node)?);
        Ok(())
    })?;
    Ok(Times { up, down: started.elapsed() })
}
