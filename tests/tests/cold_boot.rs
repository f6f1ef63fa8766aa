//! Power is back: every node of a cluster starts at the same moment, on a store that has just come up itself.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Backend, READY, Spec, scenario_prepared};
use e2e::report;
use e2e::wait::eventually;

const NODES: u8 = 50;

#[test]
fn fifty_agents_at_once_get_a_subnet_each() -> Result<()> {
    // 63 subnets: of 64 the first is left out, as flannel does.
    let spec = Spec { subnet_len: 22, ..Spec::etcd(NODES, Backend::HostGw) };
    scenario_prepared(spec, |cluster| {
        cluster.put_config()?;
        let start = Instant::now();
        for node in &mut cluster.nodes {
            node.agent.start()?;
        }
        let etcd = cluster.etcd.as_ref().context("etcd")?;
        eventually("a lease for every node", 2 * READY, || {
            let keys = etcd.lease_keys()?.len();
            ensure!(keys == usize::from(NODES), "{keys} leases");
            Ok(true)
        })?;
        let leased = start.elapsed();
        for node in &mut cluster.nodes {
            node.agent.wait_ready(2 * READY)?;
        }
        let ready = start.elapsed();
        let mut subnets = BTreeSet::new();
        for node in &cluster.nodes {
            let status = node.status()?;
            let lease = status.lease.with_context(|| format!("{} has no lease", node.name()))?;
            ensure!(lease.state == "held", "{}: {lease:?}", node.name());
            ensure!(subnets.insert(lease.key.v4), "{} twice", lease.key);
            ensure!(node.agent.log().matches("lease held").count() == 1, "{} took several", node.name());
        }
        ensure!(subnets.len() == usize::from(NODES));
        for node in &cluster.nodes {
            node.wait_peers(usize::from(NODES) - 1, READY)?;
        }
        let programmed = start.elapsed();
        for (what, time) in [("leased", leased), ("ready", ready), ("peers programmed", programmed)] {
            report::took(format_args!("{NODES} agents at once: all {what}"), time);
        }
        Ok(())
    })
}
