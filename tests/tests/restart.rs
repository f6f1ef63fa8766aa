//! The agent may die at any moment: packets, connections, addresses and everything that is right in the kernel stay.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::kernel::{KernelView, indexes};
use e2e::monitor::Monitor;
use e2e::random::Random;
use e2e::traffic::datagrams::Stream;
use e2e::traffic::echo::ping;
use e2e::traffic::flows::Flows;
use e2e::wait::{SECOND, eventually, let_pass};

const KILLS: usize = 20;
const FLOWS: usize = 100;
const DATAGRAMS_PER_SECOND: u32 = 1000;

/// 20 kills at random moments under load: nothing missing, nothing reset.
fn killed_under_load(backend: Backend) -> Result<()> {
    scenario(Spec::etcd(2, backend), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let there = Stream::start(&near.netns, &far.netns, far.address, DATAGRAMS_PER_SECOND)?;
        let back = Stream::start(&far.netns, &near.netns, near.address, DATAGRAMS_PER_SECOND)?;
        let flows = Flows::open(&near.netns, &far.netns, far.address, FLOWS)?;
        let mut random = Random::of_the_moment();
        for kill in 0..KILLS {
            let agent = &mut cluster.nodes[kill % 2].agent;
            // The moment is the test: from the first instruction of a start to well after it is ready.
            let_pass(Duration::from_millis(random.below(600)));
            agent.kill()?;
            agent.start()?;
        }
        cluster.wait_converged()?;
        let rounds = flows.rounds();
        eventually("every flow to carry on", READY, || Ok(flows.rounds() > rounds + 2))?;
        flows.end().context("a flow did not live")?;
        for tally in [there.end()?, back.end()?] {
            tally.is_whole(u64::from(DATAGRAMS_PER_SECOND / 10))?;
        }
        Ok(())
    })
}

#[test]
fn twenty_kills_lose_nothing_by_vxlan() -> Result<()> {
    killed_under_load(Backend::Vxlan)
}

#[test]
fn twenty_kills_lose_nothing_by_host_gw() -> Result<()> {
    killed_under_load(Backend::HostGw)
}

#[test]
fn a_restart_changes_nothing_that_is_right() -> Result<()> {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        scenario(Spec::etcd(2, backend), |cluster| {
            let (near, far) = cluster.pod_pair()?;
            ping(&near.netns, far.address, 5, SECOND)?;
            let node = &mut cluster.nodes[0];
            let before = (KernelView::of(node.netns())?, indexes(node.netns())?);
            let monitors = [Monitor::start(node.netns(), "ip")?, Monitor::start(node.netns(), "bridge")?];
            node.agent.kill()?;
            node.agent.restart(READY)?;
            node.wait_peers(1, READY)?;
            let after = (KernelView::of(node.netns())?, indexes(node.netns())?);
            assert_eq!(before.0.difference(&after.0), "", "{}", backend.kind());
            assert_eq!(before.1, after.1, "a device was made anew");
            for monitor in monitors {
                assert_eq!(monitor.events(node.netns())?, Vec::<String>::new(), "{}", backend.kind());
            }
            ping(&near.netns, far.address, 5, SECOND)?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn addresses_survive_a_kill() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let node = &mut cluster.nodes[0];
        let first = node.pod("a")?;
        let second = node.pod("b")?;
        node.agent.kill()?;
        node.agent.restart(READY)?;
        assert_eq!(node.status()?.pods.attachments, 2);
        let third = node.pod("c")?;
        assert!(
            ![first.address, second.address].contains(&third.address),
            "{} was handed out twice",
            third.address
        );
        ping(&first.netns, third.address, 5, SECOND)?;
        for pod in [first, second, third] {
            pod.delete()?;
        }
        eventually("no attachment to be left", READY, || Ok(node.status()?.pods.attachments == 0))?;
        Ok(())
    })
}

#[test]
fn entries_of_peers_that_left_meanwhile_go_at_start() -> Result<()> {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        scenario(Spec::etcd(3, backend), |cluster| {
            let lease = cluster.nodes[2].lease_key()?;
            let holds = |cluster: &Cluster| {
                Ok::<_, anyhow::Error>(KernelView::of(cluster.nodes[0].netns())?.holds(lease.v4.addr()))
            };
            assert!(holds(cluster)?);
            cluster.nodes[2].agent.kill()?;
            cluster.nodes[0].agent.kill()?;
            cluster.etcd()?.delete_lease(&lease.to_string())?;
            assert!(holds(cluster)?, "gone although no agent ran");
            cluster.nodes[0].agent.restart(READY)?;
            eventually("the entries of n3 to go", READY, || Ok(!holds(cluster)?))?;
            cluster.nodes[0].wait_peers(1, READY)
        })?;
    }
    Ok(())
}

#[test]
fn a_restart_without_a_store_keeps_the_data_path() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let before = KernelView::of(cluster.nodes[0].netns())?;
        cluster.etcd()?.kill()?;
        cluster.nodes[0].agent.kill()?;
        cluster.nodes[0].agent.start()?;
        eventually("the agent to say that it waits for the store", READY, || {
            let status = cluster.nodes[0].status()?;
            Ok(!status.store.connected && status.store.problem.is_some())
        })?;
        assert_eq!(before.difference(&KernelView::of(cluster.nodes[0].netns())?), "");
        ping(&near.netns, far.address, 5, SECOND)?;
        cluster.etcd()?.resume()?;
        cluster.wait_converged()
    })
}

#[test]
fn a_second_agent_writes_nothing() -> Result<()> {
    scenario(Spec::etcd(1, Backend::HostGw), |cluster| {
        let node = &cluster.nodes[0];
        let dir = cluster.bed.root().join("second");
        fs::create_dir(&dir)?;
        fs::write(dir.join("net-conf.json"), cluster.spec.net_config()?)?;
        let at = |option: &str, file: &str| format!("--{option}={}", dir.join(file).display());
        let mut second = Command::new(node.binaries.agent());
        second.args([at("run-dir", "run"), at("state-dir", "state"), at("subnet-file", "subnet.env")]);
        second.args([at("net-config", "net-conf.json")]);
        second.arg(format!("--store=embedded={}", dir.join("store.db").display()));
        let output = node.netns().output(&mut second)?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("another weftd runs in this network namespace"), "{text}");
        let left: Vec<_> = fs::read_dir(&dir)?.map(|e| Ok(e?.file_name())).collect::<Result<_>>()?;
        assert_eq!(left, ["net-conf.json"], "{text}");
        Ok(())
    })
}
