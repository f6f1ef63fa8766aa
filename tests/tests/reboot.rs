//! A node whose store is away when it starts: it goes on with what the store said last, says so, and what the store
//! confirms later changes nothing.

use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::kernel::{KernelView, indexes, query};
use e2e::netns::Netns;
use e2e::pod::Sandbox;
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually};

fn vtep(netns: &Netns) -> Result<String> {
    let links = query(netns, "ip -json link show flannel.1")?;
    Ok(links[0]["address"].as_str().context("a MAC")?.to_owned())
}

/// The store is back: held again, and nothing is from disk any more.
fn confirmed(cluster: &Cluster) -> Result<bool> {
    let status = cluster.nodes[0].status()?;
    let state = status.lease.context("lease")?.state;
    if state != "held" || status.store.recalled_age.is_some() {
        bail!("lease {state}, {:?}", status.store);
    }
    Ok(true)
}

fn rebooted_without_store(backend: Backend) -> Result<()> {
    scenario(Spec::etcd(2, backend), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let own = cluster.nodes[0].lease_key()?;
        let mac = (backend == Backend::Vxlan).then(|| vtep(cluster.nodes[0].netns())).transpose()?;

        cluster.etcd()?.kill()?;
        cluster.nodes[0].agent.stop()?;
        near.netns.remove()?;
        cluster.reboot(0)?;
        let start = Instant::now();
        cluster.nodes[0].agent.restart(READY)?;
        cluster.nodes[0].wait_peers(1, READY)?;
        report::took(format_args!("{}: serving from disk", backend.kind()), start.elapsed());

        let node = &cluster.nodes[0];
        let status = node.status()?;
        let lease = status.lease.context("lease")?;
        assert_eq!((lease.key, lease.state.as_str()), (own, "recalled"));
        assert!(status.store.recalled_age.is_some() && !status.store.connected, "{:?}", status.store);
        assert!(node.agent.ctl(&["status"])?.contains("FROM DISK, saved "));
        if let Some(mac) = mac {
            assert_eq!(vtep(node.netns())?, mac, "peers have it in their tables");
            ping(&far.netns, own.v4.addr().to_string().parse()?, 5, SECOND).context("host address")?;
        }
        let again = node.pod("again")?;
        assert!(own.v4.contains(again.address.into()), "{}", again.address);
        ping(&far.netns, again.address, 5, SECOND)?;
        ping(&again.netns, far.address, 5, SECOND)?;

        let before = (KernelView::of(node.netns())?, indexes(node.netns())?);
        cluster.etcd()?.resume()?;
        let took = eventually("the store to confirm it", READY, || confirmed(cluster))?;
        report::took(format_args!("{}: confirmed by the store", backend.kind()), took);
        let node = &cluster.nodes[0];
        node.wait_peers(1, READY)?;
        assert_eq!(node.lease_key()?, own);
        assert_eq!(before.0.difference(&KernelView::of(node.netns())?), "");
        assert_eq!(before.1, indexes(node.netns())?, "a device was made anew");
        ping(&far.netns, again.address, 5, SECOND)?;
        Ok(())
    })
}

#[test]
fn a_reboot_without_a_store_by_vxlan() -> Result<()> {
    rebooted_without_store(Backend::Vxlan)
}

#[test]
fn a_reboot_without_a_store_by_host_gw() -> Result<()> {
    rebooted_without_store(Backend::HostGw)
}

/// The lease ran out meanwhile: existing pods are served, new ones wait for the store.
#[test]
fn a_subnet_whose_lease_ran_out_serves_existing_pods_only() -> Result<()> {
    // Without a sweep: readiness follows from the store's word, which changes nothing in the kernel.
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--lease-ttl=4s").flag("--resync=3600"), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let own = cluster.nodes[0].lease_key()?;
        cluster.etcd()?.kill()?;
        cluster.nodes[0].agent.stop()?;
        // Its kernel state is lost as well: what comes back comes from disk.
        cluster.nodes[0].netns().ip("link delete flannel.1")?;
        cluster.nodes[0].agent.start()?;
        let node = &cluster.nodes[0];
        eventually("the lease to have run out", READY, || {
            let waiting = node.status()?.waiting_for.concat();
            let expected = format!("the store to confirm {own}: its lease ran out");
            if waiting.contains(&expected) { Ok(true) } else { bail!("waits for {waiting:?}") }
        })?;
        node.wait_peers(1, READY)?;
        ping(&near.netns, far.address, 5, SECOND).context("an existing pod")?;
        let new = Sandbox::create(node, "new")?;
        let (code, error) = new.call.run("ADD")?.error()?;
        assert_eq!(code, 11, "{error}");
        assert!(error.to_string().contains("ran out while the store did not answer"), "{error}");
        let (code, error) = new.call.run("STATUS")?.error()?;
        assert_eq!(code, 50, "{error}");

        cluster.etcd()?.resume()?;
        eventually("the store to confirm it", READY, || confirmed(cluster))?;
        assert_eq!(cluster.nodes[0].lease_key()?, own);
        cluster.nodes[0].agent.wait_ready(READY)?;
        let pod = new.wire()?;
        ping(&pod.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

#[test]
fn a_damaged_snapshot_is_set_aside_and_waited_over() -> Result<()> {
    scenario(Spec::etcd(1, Backend::HostGw), |cluster| {
        let file = cluster.nodes[0].agent.state_dir().join("snapshot.json");
        cluster.nodes[0].agent.stop()?;
        assert!(fs::read_to_string(&file)?.contains("10.5.0.0/16"));
        fs::write(&file, "{\"format\":1,")?;
        cluster.etcd()?.kill()?;
        cluster.nodes[0].agent.start()?;
        eventually("the agent to wait for the store", READY, || {
            Ok(cluster.nodes[0].status()?.waiting_for.concat().contains("network configuration"))
        })?;
        assert!(!file.exists() && file.with_extension("json.unreadable").exists());
        cluster.etcd()?.resume()?;
        cluster.nodes[0].agent.wait_ready(READY)?;
        eventually("a new snapshot", READY, || Ok(file.exists()))?;
        Ok(())
    })
}
