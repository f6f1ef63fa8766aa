//! Troubles of the udp backend's packet path, each of them on a pair of nodes that are talking: what goes wrong is
//! counted, named, and over as soon as its cause is.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::bed::Bed;
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::report;
use e2e::tangle::{Faults, Tangle};
use e2e::traffic::checked::checked;
use e2e::traffic::datagrams::Stream;
use e2e::traffic::echo::ping;
use e2e::traffic::flows::Flows;
use e2e::traffic::transfer::transfer;
use e2e::underlay::Underlay;
use e2e::wait::{SECOND, eventually, let_pass};

const PORT: u16 = 8285;
const MIB: u64 = 1 << 20;
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 51);

/// Loss, reordering, doubling and broken bytes between the nodes: datagrams are right or missing, TCP is right.
#[test]
fn an_underlay_that_loses_reorders_doubles_and_breaks() -> Result<()> {
    let mut cluster = Cluster::prepare(Bed::for_test()?, Spec::etcd(2, Backend::Udp))?;
    cluster.put_config()?;
    for (node, published) in cluster.nodes.iter_mut().zip(Tangle::PUBLISHED) {
        node.agent.flags.extend([format!("--public-ip={published}"), "--iface=eth0".to_owned()]);
    }
    let nodes = [cluster.nodes[0].net.address, cluster.nodes[1].net.address];
    let faults = Faults { lose: 200, reorder: 50, double: 200, corrupt: 200 };
    let tangle = Tangle::start(&cluster.bed, &cluster.underlay, nodes, faults)?;
    cluster.start_agents()?;
    let (near, far) = cluster.pod_pair()?;
    let moved = transfer(&near.netns, &far.netns, far.address, 4 * MIB)?;
    assert_eq!(moved.sent, moved.received);
    let moved = transfer(&far.netns, &near.netns, near.address, 2 * MIB)?;
    assert_eq!(moved.sent, moved.received);
    let got = checked(&near.netns, &far.netns, far.address, 5_000)?;
    ensure!(got.corrupt == 0, "{got:?}");
    ensure!(got.missing < got.sent / 4, "{got:?}");
    let counts = &tangle.counts;
    for (what, count) in [
        ("lost", &counts.lost),
        ("reordered", &counts.reordered),
        ("doubled", &counts.doubled),
        ("corrupted", &counts.corrupted),
    ] {
        ensure!(count.load(Ordering::Relaxed) > 5, "hardly anything was {what}");
    }
    Ok(())
}

/// Whole super-packets of the underlay are lost, as the receiving host's firewall would drop them.
#[test]
fn loss_by_the_receiving_hosts_firewall() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        let rules = format!(
            "add table ip lossy
             add chain ip lossy in {{ type filter hook input priority -10; }}
             add rule ip lossy in udp dport {PORT} numgen random mod 100 < 8 counter drop"
        );
        for node in &cluster.nodes {
            node.netns().run(Command::new("nft").arg(&rules))?;
        }
        let moved = transfer(&near.netns, &far.netns, far.address, 6 * MIB)?;
        assert_eq!(moved.sent, moved.received);
        let listed =
            cluster.nodes[1].netns().run(Command::new("nft").args(["list", "table", "ip", "lossy"]))?;
        ensure!(listed.contains("counter packets ") && !listed.contains("counter packets 0 "), "{listed}");
        Ok(())
    })
}

/// A thousand lease changes a minute go, for a quarter of one, through the store while pods talk.
#[test]
fn traffic_while_leases_come_and_go() -> Result<()> {
    const PACE: Duration = Duration::from_millis(60);
    const CHANGES: u32 = 252;
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let there = Stream::start(&near.netns, &far.netns, far.address, 1000)?;
        let flows = Flows::open(&near.netns, &far.netns, far.address, 20)?;
        let etcd = cluster.etcd()?;
        let start = Instant::now();
        for change in 0..CHANGES {
            let key = format!("10.5.{}.0-24", 240 + change % 8);
            if change / 8 % 2 == 0 {
                let value =
                    format!(r#"{{"PublicIP":"192.168.77.{}","PublicIPv6":null}}"#, 100 + change % 100);
                etcd.put_entry(key.as_bytes(), value.as_bytes())?;
            } else {
                etcd.delete_lease(&key)?;
            }
            let_pass((start + PACE * change).saturating_duration_since(Instant::now()));
        }
        let a_minute = f64::from(CHANGES) * 60.0 / start.elapsed().as_secs_f64();
        report::figure(format_args!(
            "{CHANGES} lease changes, {a_minute:.0} a minute, while a stream of 1,000 datagrams a second ran"
        ));
        flows.end()?;
        there.end()?.is_whole(1)?;
        // 252 changes are 31 rounds and a half: the last four that came stay.
        for node in &cluster.nodes {
            eventually("the last of them to be known", READY, || {
                let peers = node.status()?.peers.len();
                if peers == 1 + 8 - 4 { Ok(true) } else { bail!("{peers} peers") }
            })?;
        }
        Ok(())
    })
}

#[test]
fn the_device_deleted_under_traffic() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let flows = Flows::open(&near.netns, &far.netns, far.address, 20)?;
        let stream = Stream::start(&far.netns, &near.netns, near.address, 1000)?;
        let node = &cluster.nodes[0];
        let mut deleted = Vec::new();
        for time in 1..=3 {
            node.netns().ip("link delete flannel0")?;
            deleted.push(Instant::now());
            let took = eventually("pods to talk again", READY, || {
                ping(&near.netns, far.address, 1, Duration::from_millis(200))?;
                Ok(true)
            })?;
            report::took(format_args!("flannel0 deleted by a foreign hand, time {time}"), took);
            eventually("the loss to be counted", READY, || {
                let path = node.packet_path()?;
                ensure!(path.device_lost == time, "{path:?}");
                Ok(true)
            })?;
        }
        eventually("the node to be ready", READY, || {
            let waiting = node.status()?.waiting_for;
            if waiting.is_empty() { Ok(true) } else { bail!("waits for {waiting:?}") }
        })?;
        let rounds = flows.rounds();
        eventually("every flow to carry on", READY, || Ok(flows.rounds() > rounds + 2))?;
        flows.end()?;
        let tally = stream.end()?;
        let mut gaps: Vec<Duration> =
            deleted.iter().filter_map(|moment| Some(tally.silence(*moment)?.0)).collect();
        gaps.sort_unstable();
        report::figure(format_args!("gaps by three deletions of flannel0: {gaps:.0?}"));
        ensure!(gaps.first().is_some_and(|gap| *gap < SECOND), "of three none is short: {gaps:?}");
        Ok(())
    })
}

/// More arrives than is read: the kernel drops it, and says how much.
#[test]
fn an_overrun_of_the_socket_is_counted() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let node = &cluster.nodes[0];
        assert_eq!(node.dropped("received", "overrun")?, 0);
        let target = SocketAddrV4::new(node.net.address, PORT);
        let socket = cluster.nodes[1].netns().enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        // Each is no packet, and as large as an underlay carries in one piece.
        let junk = [0; 1472];
        const SENT: u64 = 40_000;
        node.agent.while_stopped(|| {
            for _ in 0..SENT {
                socket.send_to(&junk, target)?;
            }
            Ok(())
        })?;
        // The count comes with the next datagram that is read.
        eventually("the overrun to be counted", READY, || {
            ping(&near.netns, far.address, 1, Duration::from_millis(200))?;
            let (overrun, junk) =
                (node.dropped("received", "overrun")?, node.dropped("received", "wrong-version")?);
            ensure!(overrun > 0 && overrun + junk == SENT, "{overrun} overrun, {junk} read");
            Ok(true)
        })?;
        report::figure(format_args!(
            "{} of {SENT} datagrams overran the socket",
            node.dropped("received", "overrun")?
        ));
        Ok(())
    })
}

#[test]
fn a_node_that_changes_its_address() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let own = cluster.nodes[0].net.address;
        for (from, to) in [(own, OTHER), (OTHER, own)] {
            let node = &cluster.nodes[0];
            node.netns().ip(&format!("address delete {from}/24 dev eth0"))?;
            node.netns().ip(&format!("address add {to}/24 dev eth0"))?;
            node.netns().ip(&format!("route replace default via {}", Underlay::GATEWAY))?;
            let took = eventually(&format!("pods to talk by {to}"), READY, || {
                ping(&near.netns, far.address, 1, Duration::from_millis(200))?;
                ping(&far.netns, near.address, 1, Duration::from_millis(200))?;
                let listen = node.packet_path()?.listen;
                ensure!(listen.ip() == to, "still at {listen}");
                Ok(true)
            })?;
            report::took(format_args!("udp: a node's address changes to {to}"), took);
            let path = node.packet_path()?;
            ensure!(path.sent.packets > 0, "counters are the agent's, not the threads': {path:?}");
        }
        Ok(())
    })
}

#[test]
fn a_port_that_is_taken_keeps_the_node_from_being_ready_and_is_named() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        cluster.nodes[0].agent.stop()?;
        let address = cluster.nodes[0].net.address;
        let squatter =
            cluster.nodes[0].netns().enter(|| Ok(UdpSocket::bind(SocketAddrV4::new(address, PORT))?))?;
        cluster.nodes[0].agent.start()?;
        let node = &cluster.nodes[0];
        eventually("the trouble to be named", READY, || {
            let status = node.status()?;
            let waiting = status.waiting_for.concat();
            let named =
                waiting.contains("the packet path: ") && waiting.contains(&format!("{address}:{PORT}"));
            ensure!(named && !status.ready, "waits for {waiting:?}");
            Ok(true)
        })?;
        let text = node.agent.ctl(&["status"])?;
        ensure!(text.contains("NOT READY") && text.contains("BROKEN: "), "{text}");
        assert_eq!(node.agent.metric("weft_packet_path_usable")?, 0.0);
        drop(squatter);
        let took =
            eventually("the node to be ready", READY, || Ok(node.status()?.ready)).context("port freed")?;
        report::took("ready after the port was free", took);
        assert_eq!(node.agent.metric("weft_packet_path_usable")?, 1.0);
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}
