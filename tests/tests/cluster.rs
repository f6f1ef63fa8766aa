//! Whole clusters on a real etcd: pods of every node talk, peers come and go, the store goes away and comes back.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use e2e::cluster::{Backend, READY, Spec, scenario, scenario_prepared};
use e2e::kernel::KernelView;
use e2e::netns::Netns;
use e2e::pod::Pod;
use e2e::traffic::datagrams::{Stream, nothing_missing};
use e2e::traffic::echo::ping;
use e2e::traffic::flows::Flows;
use e2e::traffic::transfer::transfer;
use e2e::underlay::NodeNumber;
use e2e::wait::{SECOND, eventually};

const MIB: u64 = 1 << 20;
/// IPv4 and ICMP headers of an echo request.
const ECHO_HEADERS: u64 = 28;

/// An echo request of `size` bytes, IP header included, that may not be fragmented: by iputils, the independent sender.
fn echo_unfragmented(from: &Netns, to: &Pod, size: u64) -> Result<String> {
    let mut command = Command::new("ping");
    command.args(["-n", "-c1", "-W20", "-M", "do", "-s", &(size - ECHO_HEADERS).to_string()]);
    let output = from.output(command.arg(to.address.to_string()))?;
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    if output.status.success() { Ok(text) } else { bail!("{text}") }
}

fn mtu_of(pod: &Pod) -> Result<u64> {
    let links = e2e::kernel::query(&pod.netns, "ip -json link show eth0")?;
    links[0]["mtu"].as_u64().context("no MTU")
}

/// Every pod pings every other and holds TCP with it; the largest packet passes and one byte more stays at home.
fn pods_talk(nodes: u8, backend: Backend, mtu: u64) -> Result<()> {
    scenario(Spec::etcd(nodes, backend), |cluster| {
        assert_eq!(cluster.etcd()?.lease_keys()?.len(), usize::from(nodes));
        let pods = cluster.nodes.iter().map(|node| node.pod("a")).collect::<Result<Vec<_>>>()?;
        for (from, to) in pods.iter().flat_map(|from| pods.iter().map(move |to| (from, to))) {
            if from.name == to.name {
                continue;
            }
            let pair = || format!("{} to {}", from.name, to.name);
            ping(&from.netns, to.address, 5, SECOND).with_context(pair)?;
            Flows::open(&from.netns, &to.netns, to.address, 1)?.end().with_context(pair)?;
            assert_eq!(mtu_of(from)?, mtu, "MTU of {}", from.name);
            echo_unfragmented(&from.netns, to, mtu).with_context(pair)?;
            let refused =
                echo_unfragmented(&from.netns, to, mtu + 1).expect_err("one byte more went through");
            assert!(refused.to_string().contains("message too long"), "{}: {refused}", pair());
        }
        let (first, last) = (&pods[0], pods.last().context("pods")?);
        let moved = transfer(&first.netns, &last.netns, last.address, 100 * MIB)?;
        assert_eq!(moved.sent, moved.received, "100 MiB from {} to {}", first.name, last.name);
        Ok(())
    })
}

#[test]
fn two_nodes_by_vxlan() -> Result<()> {
    pods_talk(2, Backend::Vxlan, 1450)
}

#[test]
fn two_nodes_by_host_gw() -> Result<()> {
    pods_talk(2, Backend::HostGw, 1500)
}

#[test]
fn five_nodes_by_vxlan() -> Result<()> {
    pods_talk(5, Backend::Vxlan, 1450)
}

#[test]
fn five_nodes_by_host_gw() -> Result<()> {
    pods_talk(5, Backend::HostGw, 1500)
}

#[test]
fn a_peer_leaves_and_returns() -> Result<()> {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        scenario(Spec::etcd(3, backend), |cluster| {
            let (near, far) = cluster.pod_pair()?;
            ping(&near.netns, far.address, 5, SECOND)?;
            let with_peer = KernelView::of(cluster.nodes[0].netns())?;
            let lease = cluster.nodes[1].lease_key()?.to_string();

            // Its key goes while its etcd lease lives: removed by hand, so its entries go at once.
            cluster.nodes[1].agent.kill()?;
            cluster.etcd()?.delete_lease(&lease)?;
            cluster.nodes[0].wait_peers(1, READY)?;
            // Status follows the leases, the kernel a pass later.
            eventually("the peer's entries to go", READY, || {
                let gone = with_peer.difference(&KernelView::of(cluster.nodes[0].netns())?);
                let is_less = gone.contains("- route") && !gone.contains("+ ");
                if is_less { Ok(true) } else { bail!("{gone:?}") }
            })?;

            cluster.nodes[1].agent.restart(READY)?;
            cluster.wait_converged()?;
            assert_eq!(cluster.nodes[1].lease_key()?.to_string(), lease);
            eventually("n1 to hold what it held", READY, || {
                let difference = with_peer.difference(&KernelView::of(cluster.nodes[0].netns())?);
                if difference.is_empty() { Ok(true) } else { bail!("{difference}") }
            })?;
            ping(&near.netns, far.address, 5, SECOND)?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_data_path_outlives_the_store() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let stream = Stream::start(&near.netns, &far.netns, far.address, 500)?;
        let before = KernelView::of(cluster.nodes[0].netns())?;
        cluster.etcd()?.kill()?;
        eventually("the agent to notice", READY * 2, || {
            let store = cluster.nodes[0].status()?.store;
            Ok(!store.connected && store.problem.is_some())
        })?;
        assert_eq!(before.difference(&KernelView::of(cluster.nodes[0].netns())?), "");

        cluster.etcd()?.resume()?;
        eventually("both agents to be connected again", READY * 2, || {
            Ok(cluster.nodes[0].status()?.store.connected && cluster.nodes[1].status()?.store.connected)
        })?;
        // The watch lives too: a node that comes now is learned.
        let third = cluster.add_node(NodeNumber(3))?;
        third.agent.start()?;
        cluster.wait_converged()?;
        nothing_missing([stream])
    })
}

#[test]
fn an_agent_waits_for_a_store_and_says_for_which() -> Result<()> {
    scenario_prepared(Spec::etcd(1, Backend::Vxlan), |cluster| {
        cluster.put_config()?;
        let endpoint = cluster.etcd()?.endpoint();
        cluster.etcd()?.kill()?;
        cluster.nodes[0].agent.start()?;
        eventually("the log to name endpoint and flag", READY, || {
            let log = cluster.nodes[0].agent.log();
            Ok(log.contains(&endpoint)
                && log.lines().any(|l| !l.starts_with("---") && l.contains("etcd-endpoints")))
        })?;
        let status = cluster.nodes[0].status()?;
        assert!(!status.ready && !status.waiting_for.is_empty(), "{status:?}");
        cluster.etcd()?.resume()?;
        cluster.nodes[0].agent.wait_ready(READY)
    })
}

#[test]
fn an_agent_waits_for_a_configuration_and_says_how_to_write_one() -> Result<()> {
    scenario_prepared(Spec::etcd(1, Backend::Vxlan), |cluster| {
        cluster.nodes[0].agent.start()?;
        eventually("the log to hold the command", READY, || {
            let log = cluster.nodes[0].agent.log();
            Ok(log
                .lines()
                .any(|line| line.contains("etcdctl") && line.contains("put /coreos.com/network/config")))
        })?;
        let status = cluster.nodes[0].status()?;
        assert!(!status.ready && status.waiting_for.concat().contains("etcdctl"), "{:?}", status.waiting_for);
        cluster.put_config()?;
        cluster.nodes[0].agent.wait_ready(READY)
    })
}

#[test]
fn systemd_is_told_when_the_first_add_can_succeed() -> Result<()> {
    scenario_prepared(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let path = cluster.bed.root().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_nonblocking(true)?;
        let received = || -> Result<String> {
            let mut buffer = [0; 4096];
            match socket.recv(&mut buffer) {
                Ok(len) => Ok(String::from_utf8_lossy(&buffer[..len]).into_owned()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(String::new()),
                Err(e) => Err(e.into()),
            }
        };
        cluster.nodes[0].agent.notify_socket = Some(path);
        cluster.nodes[0].agent.start()?;
        eventually("the agent to wait for a configuration", READY, || {
            Ok(!cluster.nodes[0].status()?.waiting_for.is_empty())
        })?;
        assert!(!received()?.contains("READY=1"), "ready without a configuration");
        cluster.put_config()?;
        eventually("READY=1", READY, || Ok(received()?.lines().any(|line| line == "READY=1")))?;
        cluster.nodes[0].pod("a").context("the first ADD, at once")?;
        Ok(())
    })
}

#[test]
fn nodes_that_share_an_embedded_store_say_so() -> Result<()> {
    scenario(Spec::embedded(2, Backend::HostGw), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let store = cluster.nodes[0].status()?.store;
        assert!(store.one_machine_only && store.kind == "embedded", "{store:?}");
        assert!(cluster.nodes[0].agent.log().contains("one machine only"));
        Ok(())
    })
}
