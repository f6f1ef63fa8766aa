//! `DirectRouting`: a plain route to peers in the same segment, the tunnel to the others, and no packet lost when a
//! peer changes from one to the other.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario_prepared};
use e2e::kernel::query;
use e2e::node::Node;
use e2e::report;
use e2e::traffic::datagrams::Stream;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually};
use serde_json::{Value, json};

const DATAGRAMS_PER_SECOND: u32 = 1000;
const ROUNDS: usize = 8;

fn start_with_direct_routing(cluster: &mut Cluster) -> Result<()> {
    let mut config: Value = serde_json::from_str(&cluster.spec.net_config()?)?;
    config["Backend"]["DirectRouting"] = json!(true);
    cluster.etcd()?.put_config(&config.to_string())?;
    cluster.start_agents()
}

/// How packets of `from` go to the pods of `to`: the device, and what the overlay's device holds of the peer.
fn way(from: &Node, to: &Node) -> Result<(String, usize)> {
    let subnet = to.lease_key()?.v4;
    let routes = query(from.netns(), &format!("ip -json route show {subnet}"))?;
    let [route] = routes.as_slice() else { bail!("routes to {subnet}: {routes:?}") };
    let neighbours = query(from.netns(), "ip -json neighbor show dev flannel.1 nud permanent")?;
    let neighbours = neighbours.iter().filter(|n| n["dst"] == json!(subnet.addr().to_string())).count();
    let entries = query(from.netns(), "bridge -json fdb show dev flannel.1")?;
    let entries = entries.iter().filter(|e| e["dst"] == json!(to.net.address.to_string())).count();
    Ok((route["dev"].as_str().unwrap_or_default().to_owned(), neighbours + entries))
}

fn wait_way(from: &Node, to: &Node, device: &str, entries: usize) -> Result<Duration> {
    let what = format!("{} to reach {} through {device}", from.name(), to.name());
    eventually(&what, READY, || {
        let now = way(from, to)?;
        if now == (device.to_owned(), entries) { Ok(true) } else { bail!("now {now:?}") }
    })
}

#[test]
fn a_mixed_network_takes_the_shortest_way_to_every_node() -> Result<()> {
    scenario_prepared(Spec::etcd(3, Backend::Vxlan), |cluster| {
        // The third node moves to a segment of its own, behind the router.
        let router = &cluster.underlay.netns;
        router.set_sysctl("ipv4/ip_forward", "1")?;
        router.ip("link add br1 type bridge forward_delay 0")?;
        router.ip("address add 192.168.78.1/24 dev br1")?;
        router.ip("link set br1 up")?;
        router.ip("link set n3 master br1")?;
        let third = cluster.nodes[2].netns();
        third.ip("address flush dev eth0 scope global")?;
        third.ip("address add 192.168.78.13/24 dev eth0")?;
        third.ip("route add default via 192.168.78.1")?;
        cluster.nodes[2].net.address = "192.168.78.13".parse()?;
        start_with_direct_routing(cluster)?;

        let pods = cluster.nodes.iter().map(|node| node.pod("a")).collect::<Result<Vec<_>>>()?;
        for (from, near) in pods.iter().enumerate() {
            for (to, far) in pods.iter().enumerate().filter(|(to, _)| *to != from) {
                let (device, entries) = if from < 2 && to < 2 { ("eth0", 0) } else { ("flannel.1", 2) };
                wait_way(&cluster.nodes[from], &cluster.nodes[to], device, entries)?;
                ping(&near.netns, far.address, 5, SECOND)
                    .with_context(|| format!("from {} to {}", near.name, far.name))?;
            }
        }
        Ok(())
    })
}

#[test]
fn nothing_is_lost_when_a_peer_moves_behind_a_gateway_and_back() -> Result<()> {
    scenario_prepared(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let router = &cluster.underlay.netns;
        router.set_sysctl("ipv4/ip_forward", "1")?;
        // A router that shortens the way again would undo what is tested.
        router.set_sysctl("ipv4/conf/all/send_redirects", "0")?;
        router.set_sysctl("ipv4/conf/br0/send_redirects", "0")?;
        start_with_direct_routing(cluster)?;
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let [first, second] = cluster.nodes.as_slice() else { bail!("two nodes") };
        wait_way(first, second, "eth0", 0)?;
        wait_way(second, first, "eth0", 0)?;
        let there = Stream::start(&near.netns, &far.netns, far.address, DATAGRAMS_PER_SECOND)?;
        let back = Stream::start(&far.netns, &near.netns, near.address, DATAGRAMS_PER_SECOND)?;
        let (mut away, mut home) = (Vec::new(), Vec::new());
        let mut leave = |node: &Node, peer: &Node| {
            node.netns().ip(&format!("route add {}/32 via 192.168.77.1", peer.net.address))?;
            away.push(wait_way(node, peer, "flannel.1", 2)?);
            anyhow::Ok(())
        };
        let mut come_back = |node: &Node, peer: &Node| {
            node.netns().ip(&format!("route delete {}/32 via 192.168.77.1", peer.net.address))?;
            home.push(wait_way(node, peer, "eth0", 0)?);
            anyhow::Ok(())
        };
        for _ in 0..ROUNDS {
            // One alone: each sends by another way than it is sent to. Then both.
            leave(first, second)?;
            come_back(first, second)?;
            leave(first, second)?;
            leave(second, first)?;
            come_back(first, second)?;
            come_back(second, first)?;
        }
        for (what, mut times) in [("to the tunnel", away), ("back to the route", home)] {
            times.sort();
            report::took(format_args!("{what}: median"), times[times.len() / 2]);
            report::took(format_args!("{what}: longest"), times[times.len() - 1]);
        }
        for tally in [there.end()?, back.end()?] {
            tally.is_whole(u64::from(DATAGRAMS_PER_SECOND / 10))?;
        }
        Ok(())
    })
}

#[test]
fn a_link_that_goes_and_comes_back_is_seen() -> Result<()> {
    scenario_prepared(Spec::etcd(2, Backend::Vxlan).flag("--resync=3600"), |cluster| {
        start_with_direct_routing(cluster)?;
        let (near, far) = cluster.pod_pair()?;
        let [first, second] = cluster.nodes.as_slice() else { bail!("two nodes") };
        wait_way(first, second, "eth0", 0)?;
        first.netns().ip("link set eth0 down")?;
        // Without a way to the peer the tunnel is what is kept ready.
        wait_way(first, second, "flannel.1", 2)?;
        first.netns().ip("link set eth0 up")?;
        wait_way(first, second, "eth0", 0)?;
        first.netns().ip("route add default via 192.168.77.1")?;
        eventually("packets to pass again", READY, || {
            ping(&near.netns, far.address, 1, SECOND)?;
            Ok(true)
        })?;
        Ok(())
    })
}
