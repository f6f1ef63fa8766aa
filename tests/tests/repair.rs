//! Every kind of kernel object that weft makes, deleted or altered by a foreign hand: seen wrong, seen right again.
//!
//! The agent is stopped while the hand is at work, so that the wrong state is certainly there when it is looked at.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::kernel::{KernelView, query};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::Pod;
use e2e::traffic::echo::ping;
use e2e::wait::eventually;
use nix::sys::signal::Signal;

const SECOND: Duration = Duration::from_secs(1);

/// What the foreign hand needs to know of the node under test.
struct Target<'a> {
    netns: &'a Netns,
    /// The peer's lease: `10.5.7.0/24`, its network address, its VTEP.
    peer_subnet: String,
    peer_network: String,
    peer_vtep: String,
    peer_node: String,
    own_network: String,
    own_node: String,
    port: String,
}

type Hand = fn(&Target<'_>) -> Vec<String>;

/// `ip` commands, or `bridge` commands after that word.
fn common_faults() -> Vec<(&'static str, Hand)> {
    vec![
        ("bridge deleted", |_| vec!["link delete cni0".into()]),
        ("bridge MTU", |_| vec!["link set cni0 mtu 1280".into()]),
        ("bridge down", |_| vec!["link set cni0 down".into()]),
        ("gateway address deleted", |t| {
            vec![format!("address delete {}1/24 dev cni0", t.own_network.trim_end_matches('0'))]
        }),
        ("gateway address with another length", |t| {
            let gateway = format!("{}1", t.own_network.trim_end_matches('0'));
            vec![
                format!("address delete {gateway}/24 dev cni0"),
                format!("address add {gateway}/16 dev cni0"),
            ]
        }),
        ("port without its bridge", |t| vec![format!("link set {} nomaster", t.port)]),
        ("port's hairpin", |t| {
            vec![format!("bridge link set dev {} hairpin {}", t.port, flipped(t, "hairpin"))]
        }),
        ("port's isolation", |t| {
            vec![format!("bridge link set dev {} isolated {}", t.port, flipped(t, "isolated"))]
        }),
        ("port's MTU", |t| vec![format!("link set {} mtu 1280", t.port)]),
        ("route deleted", |t| vec![format!("route delete {}", t.peer_subnet)]),
        ("route through another gateway", |t| {
            vec![format!("route replace {} via 192.168.77.1 dev eth0 proto 87", t.peer_subnet)]
        }),
        ("forwarding off", |_| vec!["sysctl ipv4/ip_forward 0".into()]),
    ]
}

fn vxlan_faults() -> Vec<(&'static str, Hand)> {
    vec![
        ("device deleted", |_| vec!["link delete flannel.1".into()]),
        ("device MTU", |_| vec!["link set flannel.1 mtu 1300".into()]),
        ("device MAC", |_| vec!["link set flannel.1 address 02:00:00:00:00:77".into()]),
        ("device down", |_| vec!["link set flannel.1 down".into()]),
        ("device down and up: the kernel drops routes without a word", |_| {
            vec!["link set flannel.1 down".into(), "link set flannel.1 up".into()]
        }),
        ("device with another port", |t| {
            vec![
                "link delete flannel.1".into(),
                format!(
                    "link add flannel.1 type vxlan id 1 dev eth0 local {} dstport 4789 nolearning",
                    t.own_node
                ),
            ]
        }),
        ("device address deleted", |t| vec![format!("address delete {}/32 dev flannel.1", t.own_network)]),
        ("device address with another scope", |t| {
            vec![
                format!("address delete {}/32 dev flannel.1", t.own_network),
                format!("address add {}/32 dev flannel.1 scope link", t.own_network),
            ]
        }),
        ("neighbour deleted", |t| vec![format!("neighbor delete {} dev flannel.1", t.peer_network)]),
        ("neighbour with another MAC", |t| {
            vec![format!(
                "neighbor replace {} lladdr 02:00:00:00:00:66 dev flannel.1 nud permanent",
                t.peer_network
            )]
        }),
        ("FDB entry deleted", |t| {
            vec![format!("bridge fdb delete {} dev flannel.1 dst {} self", t.peer_vtep, t.peer_node)]
        }),
        ("FDB entry to another node", |t| {
            vec![format!("bridge fdb replace {} dev flannel.1 dst 192.168.77.99 self permanent", t.peer_vtep)]
        }),
        ("FDB entry too much", |_| {
            vec!["bridge fdb append 02:00:00:00:00:55 dev flannel.1 dst 192.168.77.98 self permanent".into()]
        }),
        ("neighbour too much", |_| {
            vec!["neighbor add 10.5.250.0 lladdr 02:00:00:00:00:44 dev flannel.1 nud permanent".into()]
        }),
        ("route of ours too much", |_| {
            vec!["route add 10.5.251.0/24 via 10.5.251.0 dev flannel.1 onlink proto 87".into()]
        }),
    ]
}

/// The other value of a port's flag.
fn flipped(target: &Target<'_>, flag: &str) -> &'static str {
    let port =
        query(target.netns, &format!("ip -json -details link show {}", target.port)).unwrap_or_default();
    let on = port.first().is_some_and(|link| link["linkinfo"]["info_slave_data"][flag] == true);
    if on { "off" } else { "on" }
}

fn strike(netns: &Netns, command: &str) -> Result<()> {
    if let Some(words) = command.strip_prefix("bridge ") {
        netns.bridge(words)?;
    } else if let Some(words) = command.strip_prefix("sysctl ") {
        let (key, value) = words.split_once(' ').context("a key and a value")?;
        netns.set_sysctl(key, value)?;
    } else {
        netns.ip(command)?;
    }
    Ok(())
}

fn target<'a>(node: &'a Node, cluster: &Cluster, pod: &Pod) -> Result<Target<'a>> {
    let own = node.status()?.lease.context("own lease")?.key.v4;
    let peer = &cluster.nodes[1];
    let peer_subnet = peer.status()?.lease.context("lease of the peer")?.key.v4;
    let vtep = query(peer.netns(), "ip -json link show type vxlan")?;
    Ok(Target {
        netns: node.netns(),
        peer_network: peer_subnet.addr().to_string(),
        peer_subnet: peer_subnet.to_string(),
        peer_vtep: vtep.first().and_then(|link| link["address"].as_str()).unwrap_or_default().to_owned(),
        peer_node: peer.net.address.to_string(),
        own_network: own.addr().to_string(),
        own_node: node.net.address.to_string(),
        port: pod.host_veth()?.to_string(),
    })
}

/// Strikes once per fault; every one must show, and must be mended within `deadline`.
fn mended(backend: Backend, flags: &[&str], deadline: Duration) -> Result<()> {
    let spec = flags.iter().fold(Spec::etcd(2, backend), |spec, flag| spec.flag(flag));
    scenario(spec, |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let node = &cluster.nodes[0];
        let target = target(node, cluster, &near)?;
        let mut faults = common_faults();
        if backend == Backend::Vxlan {
            faults.extend(vxlan_faults());
        }
        let right = KernelView::of(node.netns())?;
        let mut failures = Vec::new();
        for (fault, hand) in faults {
            if let Err(error) = strike_and_watch(node, &target, hand, &right, deadline) {
                failures.push(format!("{fault}: {error:#}"));
                // The next fault needs the right state to start from.
                eventually("everything to be right again", READY, || {
                    Ok(KernelView::of(node.netns())? == right)
                })
                .with_context(|| failures.join("\n"))?;
            }
        }
        ensure!(failures.is_empty(), "not mended within {deadline:?}:\n{}", failures.join("\n"));
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

fn strike_and_watch(
    node: &Node,
    target: &Target<'_>,
    hand: Hand,
    right: &KernelView,
    deadline: Duration,
) -> Result<()> {
    node.agent.signal(Signal::SIGSTOP)?;
    let struck = hand(target).iter().try_for_each(|command| strike(node.netns(), command));
    let wrong = KernelView::of(node.netns());
    node.agent.signal(Signal::SIGCONT)?;
    struck?;
    ensure!(wrong? != *right, "the fault does not show");
    eventually("the kernel to be right again", deadline, || {
        let difference = right.difference(&KernelView::of(node.netns())?);
        if difference.is_empty() { Ok(true) } else { bail!("{difference}") }
    })?;
    Ok(())
}

/// No sweep comes in time: what mends is the monitor.
const MONITOR_ALONE: [&str; 1] = ["--resync=3600"];
/// No event is heard: what mends is the sweep.
const SWEEP_ALONE: [&str; 2] = ["--netlink-monitor=false", "--resync=1"];

#[test]
fn the_monitor_mends_vxlan_within_a_second() -> Result<()> {
    mended(Backend::Vxlan, &MONITOR_ALONE, SECOND)
}

#[test]
fn the_monitor_mends_host_gw_within_a_second() -> Result<()> {
    mended(Backend::HostGw, &MONITOR_ALONE, SECOND)
}

#[test]
fn the_sweep_alone_mends_vxlan() -> Result<()> {
    mended(Backend::Vxlan, &SWEEP_ALONE, SECOND * 5)
}

#[test]
fn the_sweep_alone_mends_host_gw() -> Result<()> {
    mended(Backend::HostGw, &SWEEP_ALONE, SECOND * 5)
}

#[test]
fn what_is_not_ours_is_left_alone() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--resync=1"), |cluster| {
        let node = &cluster.nodes[0];
        for foreign in [
            "route add 10.99.0.0/24 via 192.168.77.1",
            "route add 10.98.0.0/24 via 192.168.77.1 proto static",
            "neighbor add 192.168.77.200 lladdr 02:00:00:00:00:33 dev eth0 nud permanent",
            "address add 10.97.0.1/32 dev eth0",
            "link add veth12345678 type veth peer name vethabcdefgh",
        ] {
            node.netns().ip(foreign)?;
        }
        let before = KernelView::of(node.netns())?;
        let passes = || Ok::<_, anyhow::Error>(node.status()?.dataplane.context("dataplane")?.passes);
        let seen = passes()?;
        eventually("three passes more", READY, || Ok(passes()? > seen + 3))?;
        assert_eq!(before.difference(&KernelView::of(node.netns())?), "");
        Ok(())
    })
}
