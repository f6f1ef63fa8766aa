//! Every kind of kernel object that weft makes, deleted or altered by a foreign hand: seen wrong, seen right again.
//!
//! The agent is stopped while the hand is at work, so that the wrong state is certainly there when it is looked at.
//! Each test prints a table of repair times, up to the end of the look that found everything right (a look costs some
//! 50 ms); `WEFT_FAULT_ROUNDS=3` strikes three times and prints medians.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, Cluster, MONITOR_ALONE, READY, SWEEP_ALONE, Spec, scenario};
use e2e::kernel::{KernelView, query};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::Pod;
use e2e::promise::kept;
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually};
use weft_shared::names::LINK_GROUP;

/// A fault's name, and the commands of the foreign hand: `ip` unless they begin with `bridge`, `sysctl` or `switch`,
/// which is `ip` at the other end of the node's cable. Words in capitals are filled in ([`Target::fill`]).
type Fault = (&'static str, &'static [&'static str]);

/// What a foreign hand puts before or beside ours is its own and stays; the test takes it away again.
const FOREIGN: &str = "192.168.77.254";

/// What pods hang on.
const PODS: &[Fault] = &[
    ("bridge deleted", &["link delete cni0"]),
    ("bridge MTU", &["link set cni0 mtu 1280"]),
    ("bridge down", &["link set cni0 down"]),
    ("bridge MAC", &["link set cni0 address 02:00:00:00:00:99"]),
    ("bridge without ARP", &["link set cni0 arp off"]),
    ("bridge with spanning tree", &["link set cni0 type bridge stp_state 1"]),
    ("bridge that floods everything", &["link set cni0 type bridge ageing_time 0"]),
    ("bridge renamed", &["link set cni0 name foreign0"]),
    (
        // With our group, for one without it counts as adopted and stays unmarked.
        "bridge renamed, and another one in its place",
        &["link set cni0 name foreign0", "link add cni0 group GROUP type bridge", "link delete foreign0"],
    ),
    ("gateway address deleted", &["address delete GATEWAY/24 dev cni0"]),
    ("gateway addresses flushed", &["address flush dev cni0 scope global"]),
    (
        "gateway address with another length",
        &["address delete GATEWAY/24 dev cni0", "address add GATEWAY/16 dev cni0"],
    ),
    (
        "gateway address without its connected route",
        &["address delete GATEWAY/24 dev cni0", "address add GATEWAY/24 dev cni0 noprefixroute"],
    ),
    (
        "gateway address with a metric",
        &["address delete GATEWAY/24 dev cni0", "address add GATEWAY/24 dev cni0 metric 77"],
    ),
    (
        "gateway address with an end",
        &["address change GATEWAY/24 dev cni0 valid_lft 1000 preferred_lft 1000"],
    ),
    ("connected route deleted", &["route delete OWN_SUBNET dev cni0"]),
    ("forwarding off on the bridge", &["sysctl ipv4/conf/cni0/forwarding 0"]),
    ("port without its bridge", &["link set PORT nomaster"]),
    ("port down", &["link set PORT down"]),
    ("port's hairpin", &["bridge link set dev PORT hairpin FLIPPED_HAIRPIN"]),
    ("port's isolation", &["bridge link set dev PORT isolated FLIPPED_ISOLATED"]),
    ("port's MTU", &["link set PORT mtu 1280"]),
    ("port's learning", &["bridge link set dev PORT learning off"]),
    ("port's flooding", &["bridge link set dev PORT flood off"]),
    ("port's broadcasts", &["bridge link set dev PORT bcast_flood off"]),
    ("port's lock", &["link set PORT type bridge_slave locked on"]),
    ("port's ARP suppression", &["bridge link set dev PORT neigh_suppress on"]),
    ("port's group", &["link set PORT group 0"]),
    ("port renamed", &["link set PORT name foreign1"]),
];

/// What any backend has.
const ROUTES: &[Fault] = &[
    ("route deleted", &["route delete PEER_SUBNET"]),
    ("route through another gateway", &["route replace PEER_SUBNET via 192.168.77.1 dev eth0 proto 87"]),
    ("route replaced by a blackhole of our protocol", &["route replace blackhole PEER_SUBNET proto 87"]),
    ("route behind a foreign one", &["route prepend PEER_SUBNET via 192.168.77.254 proto static"]),
    ("route of ours with a metric", &["route add PEER_SUBNET via 192.168.77.1 metric 9 proto 87"]),
    ("forwarding off", &["sysctl ipv4/ip_forward 0"]),
    ("forwarding off on the underlay", &["sysctl ipv4/conf/eth0/forwarding 0"]),
];

/// What takes the routes through the underlay along; the kernel says nothing of IPv4 routes that go so.
const HOST_GW: &[Fault] = &[
    (
        "underlay down and up",
        &["link set eth0 down", "link set eth0 up", "route add default via 192.168.77.1"],
    ),
    (
        "underlay flushed and back",
        &[
            "address flush dev eth0 scope global",
            "address add OWN_NODE/24 dev eth0",
            "route add default via 192.168.77.1",
        ],
    ),
];

const VXLAN: &[Fault] = &[
    ("device deleted", &["link delete flannel.1"]),
    ("device MTU", &["link set flannel.1 mtu 1300"]),
    ("device MAC", &["link set flannel.1 address 02:00:00:00:00:77"]),
    ("device down", &["link set flannel.1 down"]),
    ("device down and up", &["link set flannel.1 down", "link set flannel.1 up"]),
    ("device without ARP", &["link set flannel.1 arp off"]),
    ("device held down by protocol", &["link set flannel.1 protodown on"]),
    ("device made a port of the bridge", &["link set flannel.1 master cni0"]),
    ("device renamed", &["link set flannel.1 name foreign2"]),
    ("device that learns", &["link set flannel.1 type vxlan learning"]),
    ("device with a TTL", &["link set flannel.1 type vxlan ttl 1"]),
    ("device with a default destination", &["link set flannel.1 type vxlan remote 192.168.77.99"]),
    (
        "device with another port",
        &[
            "link delete flannel.1",
            "link add flannel.1 type vxlan id 1 dev eth0 local OWN_NODE dstport 4789 nolearning",
        ],
    ),
    (
        "device with another VNI",
        &[
            "link delete flannel.1",
            "link add flannel.1 type vxlan id 7 dev eth0 local OWN_NODE dstport 8472 nolearning",
        ],
    ),
    (
        "device for metadata",
        &["link delete flannel.1", "link add flannel.1 type vxlan external dstport 8472"],
    ),
    ("a bridge in the device's place", &["link delete flannel.1", "link add flannel.1 type bridge"]),
    ("forwarding off on the device", &["sysctl ipv4/conf/flannel.1/forwarding 0"]),
    ("device address deleted", &["address delete OWN_NETWORK/32 dev flannel.1"]),
    (
        "device address with another scope",
        &[
            "address delete OWN_NETWORK/32 dev flannel.1",
            "address add OWN_NETWORK/32 dev flannel.1 scope link",
        ],
    ),
    ("neighbour deleted", &["neighbor delete PEER_NETWORK dev flannel.1"]),
    (
        "neighbour with another MAC",
        &["neighbor replace PEER_NETWORK lladdr 02:00:00:00:00:66 dev flannel.1 nud permanent"],
    ),
    (
        "neighbour not permanent",
        &["neighbor replace PEER_NETWORK lladdr PEER_VTEP dev flannel.1 nud reachable"],
    ),
    ("FDB entry deleted", &["bridge fdb delete PEER_VTEP dev flannel.1 dst PEER_NODE self"]),
    (
        "FDB entry to another node",
        &["bridge fdb replace PEER_VTEP dev flannel.1 dst 192.168.77.99 self permanent"],
    ),
    (
        "FDB entry to another port",
        &["bridge fdb replace PEER_VTEP dev flannel.1 dst PEER_NODE port 4789 self permanent"],
    ),
    (
        "FDB entry to another VNI",
        &["bridge fdb replace PEER_VTEP dev flannel.1 dst PEER_NODE vni 99 self permanent"],
    ),
    (
        "FDB entry through an interface",
        &["bridge fdb replace PEER_VTEP dev flannel.1 dst PEER_NODE via cni0 self permanent"],
    ),
    (
        "FDB entry too much",
        &["bridge fdb append 02:00:00:00:00:55 dev flannel.1 dst 192.168.77.98 self permanent"],
    ),
    ("neighbour too much", &["neighbor add 10.5.250.0 lladdr 02:00:00:00:00:44 dev flannel.1 nud permanent"]),
    ("route of ours too much", &["route add 10.5.251.0/24 via 10.5.251.0 dev flannel.1 onlink proto 87"]),
    (
        "route with a locked MTU",
        &["route replace PEER_SUBNET via PEER_NETWORK dev flannel.1 onlink proto 87 mtu lock 600"],
    ),
    (
        "route with another source",
        &["route replace PEER_SUBNET via PEER_NETWORK dev flannel.1 onlink proto 87 src OWN_NODE"],
    ),
];

const UDP: &[Fault] = &[
    ("device deleted", &["link delete flannel0"]),
    ("device MTU", &["link set flannel0 mtu 1300"]),
    ("device down", &["link set flannel0 down"]),
    ("device down and up", &["link set flannel0 down", "link set flannel0 up"]),
    ("device renamed", &["link set flannel0 name foreign2"]),
    ("device's group", &["link set flannel0 group 0"]),
    ("device given up by its queues' hand", &["tuntap delete dev flannel0 mode tun multi_queue"]),
    (
        "a device of one queue in the device's place",
        &["link delete flannel0", "tuntap add dev flannel0 mode tun"],
    ),
    (
        "a device for frames in the device's place",
        &["link delete flannel0", "tuntap add dev flannel0 mode tap multi_queue"],
    ),
    ("a bridge in the device's place", &["link delete flannel0", "link add flannel0 type bridge"]),
    ("forwarding off on the device", &["sysctl ipv4/conf/flannel0/forwarding 0"]),
    ("IPv6 on the device", &["sysctl ipv6/conf/flannel0/disable_ipv6 0"]),
    ("device address deleted", &["address delete OWN_NETWORK/32 dev flannel0"]),
    ("address too much", &["address add 10.5.250.0/32 dev flannel0"]),
    ("route deleted", &["route delete NETWORK"]),
    ("route without its metric", &["route delete NETWORK", "route add NETWORK dev flannel0 proto 87"]),
    ("route elsewhere", &["route replace NETWORK via 192.168.77.1 metric 4096 proto 87"]),
    (
        "route replaced by a blackhole of our protocol",
        &["route replace blackhole NETWORK metric 4096 proto 87"],
    ),
    ("route with a locked MTU", &["route replace NETWORK dev flannel0 metric 4096 proto 87 mtu lock 600"]),
    ("route of ours too much", &["route add 10.5.251.0/24 dev flannel0 proto 87"]),
];

/// What the foreign hand needs to know of the node under test.
struct Target<'a> {
    netns: &'a Netns,
    switch: &'a Netns,
    words: BTreeMap<&'static str, String>,
}

impl<'a> Target<'a> {
    fn of(node: &'a Node, cluster: &'a Cluster, pod: &Pod) -> Result<Self> {
        let own = node.lease_key()?.v4;
        let peer = &cluster.nodes[1];
        let peer_subnet = peer.lease_key()?.v4;
        let vtep = query(peer.netns(), "ip -json link show type vxlan")?;
        let vtep = vtep.first().and_then(|link| link["address"].as_str()).unwrap_or_default();
        let words = [
            ("NODE", node.net.port.clone()),
            ("NETWORK", cluster.spec.network.clone()),
            ("PEER_NETWORK", peer_subnet.addr().to_string()),
            ("PEER_SUBNET", peer_subnet.to_string()),
            ("PEER_VTEP", vtep.to_owned()),
            ("PEER_NODE", peer.net.address.to_string()),
            ("OWN_NETWORK", own.addr().to_string()),
            ("OWN_SUBNET", own.to_string()),
            ("OWN_NODE", node.net.address.to_string()),
            ("GATEWAY", own.gateway().to_string()),
            ("GROUP", LINK_GROUP.to_string()),
            ("PORT", pod.host_veth()?.to_string()),
        ];
        Ok(Self { netns: node.netns(), switch: &cluster.underlay.netns, words: words.into() })
    }

    fn fill(&self, command: &str) -> String {
        let fill = |word: &str| {
            let (name, rest) = word.split_once('/').map_or((word, None), |(name, len)| (name, Some(len)));
            let value = match name.strip_prefix("FLIPPED_") {
                Some(flag) => self.flipped(&flag.to_lowercase()).to_owned(),
                None => self.words.get(name).cloned().unwrap_or_else(|| name.to_owned()),
            };
            rest.map_or(value.clone(), |len| format!("{value}/{len}"))
        };
        command.split_whitespace().map(fill).collect::<Vec<_>>().join(" ")
    }

    /// The other value of a port's flag.
    fn flipped(&self, flag: &str) -> &'static str {
        let port = query(self.netns, &format!("ip -json -details link show {}", self.words["PORT"]));
        let port = port.unwrap_or_default();
        let on = port.first().is_some_and(|link| link["linkinfo"]["info_slave_data"][flag] == true);
        if on { "off" } else { "on" }
    }

    fn strike(&self, command: &str) -> Result<()> {
        let command = self.fill(command);
        if let Some(words) = command.strip_prefix("bridge ") {
            self.netns.bridge(words)?;
        } else if let Some(words) = command.strip_prefix("switch ") {
            self.switch.ip(words)?;
        } else if let Some(words) = command.strip_prefix("sysctl ") {
            let (key, value) = words.split_once(' ').context("a key and a value")?;
            self.netns.set_sysctl(key, value)?;
        } else {
            self.netns.ip(&command)?;
        }
        Ok(())
    }
}

/// Strikes once per fault; every one must show, and must be mended within what is promised.
fn mended(backend: Backend, faults: &[&[Fault]], flags: &[&str], promised: Duration) -> Result<()> {
    let rounds = match std::env::var("WEFT_FAULT_ROUNDS") {
        Ok(text) => text.parse().context("WEFT_FAULT_ROUNDS: expected a number")?,
        Err(_) => 1,
    };
    scenario(Spec::etcd(2, backend).flags(flags), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let node = &cluster.nodes[0];
        let target = Target::of(node, cluster, &near)?;
        let right = KernelView::of(node.netns())?;
        let mut failures = Vec::new();
        for (fault, commands) in faults.iter().copied().flatten() {
            let mut times = Vec::new();
            for _ in 0..rounds {
                match kept(fault, promised, || strike_and_watch(node, &target, commands, &right)) {
                    Ok(time) => times.push(time),
                    Err(error) => failures.push(format!("{error:#}")),
                }
                // The next fault needs the right state to start from.
                eventually(&format!("nothing to be left of: {fault}"), READY, || {
                    let difference = right.difference(&KernelView::of(node.netns())?);
                    if difference.is_empty() { Ok(true) } else { bail!("{difference}") }
                })
                .with_context(|| failures.join("\n"))?;
            }
            times.sort();
            if let Some(median) = times.get(times.len() / 2) {
                report::took(format_args!("{} {fault}", backend.kind()), *median);
            }
        }
        ensure!(failures.is_empty(), "not mended in time:\n{}", failures.join("\n"));
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

fn strike_and_watch(
    node: &Node,
    target: &Target<'_>,
    commands: &[&str],
    right: &KernelView,
) -> Result<Duration> {
    let (wrong, begin) = node.agent.while_stopped(|| {
        commands.iter().try_for_each(|command| target.strike(command))?;
        Ok((KernelView::of(node.netns())?, Instant::now()))
    })?;
    ensure!(wrong != *right, "the fault does not show");
    eventually("the kernel to be right again", READY, || {
        let difference = right.difference(&KernelView::of(node.netns())?);
        let wrong = |line: &str| !(line.starts_with('+') && line.contains(FOREIGN));
        if difference.lines().any(wrong) { bail!("{difference}") } else { Ok(true) }
    })?;
    let mended = begin.elapsed();
    if commands.iter().any(|command| command.contains(FOREIGN)) {
        target
            .strike(&format!("route delete PEER_SUBNET via {FOREIGN}"))
            .context("the foreign route went")?;
    }
    Ok(mended)
}

#[test]
fn the_monitor_mends_vxlan_within_a_second() -> Result<()> {
    mended(Backend::Vxlan, &[ROUTES, VXLAN], &MONITOR_ALONE, SECOND)
}

#[test]
fn the_monitor_mends_what_pods_hang_on_within_a_second() -> Result<()> {
    mended(Backend::Vxlan, &[PODS], &MONITOR_ALONE, SECOND)
}

#[test]
fn the_monitor_mends_host_gw_within_a_second() -> Result<()> {
    mended(Backend::HostGw, &[ROUTES, HOST_GW], &MONITOR_ALONE, SECOND)
}

#[test]
fn the_monitor_mends_udp_within_a_second() -> Result<()> {
    mended(Backend::Udp, &[UDP], &MONITOR_ALONE, SECOND)
}

#[test]
fn the_sweep_alone_mends_vxlan() -> Result<()> {
    mended(Backend::Vxlan, &[VXLAN], &SWEEP_ALONE, SECOND * 5)
}

#[test]
fn the_sweep_alone_mends_what_pods_hang_on() -> Result<()> {
    mended(Backend::Vxlan, &[PODS], &SWEEP_ALONE, SECOND * 5)
}

#[test]
fn the_sweep_alone_mends_host_gw() -> Result<()> {
    mended(Backend::HostGw, &[ROUTES, HOST_GW], &SWEEP_ALONE, SECOND * 5)
}

#[test]
fn the_sweep_alone_mends_udp() -> Result<()> {
    mended(Backend::Udp, &[UDP], &SWEEP_ALONE, SECOND * 5)
}
