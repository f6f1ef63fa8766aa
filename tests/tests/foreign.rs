//! What is not weft's is never touched, however much it looks like weft's: a node full of foreign things, and a complete
//! dump of it before and after passes, restarts, kills and a peer's coming and going.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::host::{difference, sysctl_facts};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::wait::eventually;

/// Commands, whole: each makes something that is nobody's business. PEER is the subnet of the peer, PORT a pod's port.
const FOREIGN: &[&str] = &[
    // Links: names like ours, kinds like ours.
    "ip link add veth12345678901 type veth peer name vethabcdefghijk",
    "ip link add vethaaaaaaaaaaa type veth peer name vethbbbbbbbbbbb",
    "ip link set vethaaaaaaaaaaa alias weft:looks/like/ours",
    "ip link add cni1 type bridge stp_state 1",
    "ip link set veth12345678901 master cni1",
    "ip link set vethaaaaaaaaaaa master cni0",
    "ip link set vethaaaaaaaaaaa type bridge_slave hairpin on flood off",
    "ip link add flannel.9 type vxlan id 9 dev eth0 dstport 8472",
    "ip link add vxlan7 type vxlan id 7 dev eth0 local 192.168.77.11 dstport 4790 learning l2miss",
    "ip link add flow0 type vxlan external dstport 4791",
    "ip link add mac0 link eth0 type macvlan mode bridge",
    "ip tuntap add dev flannel0 mode tun",
    "ip link property add dev cni1 altname flannel.2",
    "ip link set cni1 up",
    "ip link set flannel.9 up",
    "ip link set vxlan7 up",
    "ip link set flow0 up",
    "ip link set vethaaaaaaaaaaa up",
    "ip link set veth12345678901 up",
    // Addresses: every scope, on our devices and inside Network.
    "ip address add 10.96.0.10/32 dev lo",
    "ip address add 10.5.240.1/24 dev cni1",
    "ip address add 10.97.0.1/32 dev eth0",
    "ip address add 10.97.1.1/32 dev eth0 scope link",
    "ip address add 10.97.2.1/32 dev eth0 scope host",
    "ip address add 192.168.77.211/24 dev eth0 label eth0:second",
    "ip address add 172.30.0.1/24 dev cni0",
    "ip address add 172.30.0.2/24 dev cni0",
    "ip address add 172.20.0.1/32 dev flannel.1",
    "ip address add 172.21.0.1 peer 172.21.0.2/32 dev flannel.1",
    "ip address add fd00:9::1/64 dev cni0 nodad",
    "ip address add fd00:8::1/64 dev flannel.1 nodad",
    "ip address add fd00:7::1/64 dev eth0 nodad",
    "ip address add 10.98.0.1/24 dev cni1 valid_lft 5000 preferred_lft 5000",
    // Routes: inside and outside Network, of every kind.
    "ip route add 10.99.0.0/24 via 192.168.77.1",
    "ip route add 10.99.1.0/24 via 192.168.77.1 proto static metric 20",
    "ip route add 10.99.2.0/24 via 192.168.77.1 proto bird src 10.97.0.1 mtu lock 1200",
    "ip route add 10.5.200.0/24 via 192.168.77.1",
    "ip route add 10.5.201.0/24 via 192.168.77.1 metric 50",
    "ip route add 10.5.64.0/20 via 192.168.77.1 proto static",
    "ip route add PEER via 192.168.77.1 metric 50",
    "ip route add PEER via 192.168.77.1 tos 0x10",
    "ip route append PEER via 192.168.77.1 proto static",
    "ip route add PEER via 192.168.77.1 table 100",
    "ip route add 10.5.203.0/24 dev cni0",
    "ip route add blackhole 10.5.202.0/24",
    "ip route add unreachable 10.99.3.0/24",
    "ip route add prohibit 10.99.4.0/24 metric 5",
    "ip route add throw 10.99.5.0/24 table 100",
    "ip route add local 10.99.6.0/24 dev lo",
    "ip route add 10.99.7.0/24 nexthop via 192.168.77.1 weight 2 nexthop via 192.168.77.12 dev eth0",
    "ip route add 10.5.204.0/24 nexthop via 192.168.77.1 nexthop via 192.168.77.12",
    "ip nexthop add id 70 via 192.168.77.1 dev eth0",
    "ip nexthop add id 71 via 192.168.77.12 dev eth0",
    "ip nexthop add id 72 group 70/71",
    "ip route add 10.99.8.0/24 nhid 70",
    "ip route add 10.5.205.0/24 nhid 72",
    "ip route add 172.31.0.0/16 via 172.31.0.1 dev flannel.1 onlink",
    "ip route add 10.99.9.0/24 encap ip id 5 dst 192.168.77.1 dev flow0",
    "ip route add 10.99.10.0/24 via inet6 fd00:7::9 dev eth0",
    "ip -6 route add fd00:99::/64 via fd00:7::9",
    "ip -6 route add blackhole fd00:98::/64",
    "ip -6 route add fd00:97::/64 nexthop via fd00:7::9 nexthop via fd00:7::a",
    // Neighbours and forwarding entries: on other devices, and on ours what is not permanent or not unicast.
    "ip neighbor add 192.168.77.200 lladdr 02:00:00:00:00:33 dev eth0 nud permanent",
    "ip neighbor add 172.30.0.9 lladdr 02:00:00:00:00:34 dev cni0 nud permanent",
    "ip neighbor add 172.20.0.9 lladdr 02:00:00:00:00:35 dev flannel.1 nud noarp",
    "ip neighbor add proxy 192.168.77.201 dev eth0",
    "ip -6 neighbor add fd00:7::9 lladdr 02:00:00:00:00:36 dev eth0 nud permanent",
    "bridge fdb add 02:00:00:00:00:41 dev vxlan7 dst 192.168.77.12 self permanent",
    "bridge fdb add 02:00:00:00:00:42 dev flannel.9 dst 192.168.77.12 self permanent",
    "bridge fdb add 02:00:00:00:00:43 dev PORT master static",
    "bridge fdb add 02:00:00:00:00:44 dev flannel.1 dst 192.168.77.1 self dynamic",
    "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.168.77.1 self permanent",
    // Rules, queues, tables.
    "ip rule add from 10.96.0.0/16 lookup 100 priority 1000",
    "ip rule add to 10.5.0.0/16 fwmark 0x77 lookup 100 priority 1001",
    "ip -6 rule add from fd00:96::/64 lookup 100 priority 1000",
    "tc qdisc add dev eth0 root handle 1: htb default 1",
    "tc class add dev eth0 parent 1: classid 1:1 htb rate 10gbit",
    "tc qdisc add dev flannel.1 root pfifo limit 700",
    "tc qdisc add dev cni0 clsact",
    "tc filter add dev cni0 ingress protocol ip prio 5 u32 match ip dst 10.99.99.99/32 flowid 1:1",
    "nft add table inet foreign",
    "nft add set inet foreign addresses { type ipv4_addr; flags interval; }",
    "nft add element inet foreign addresses { 10.5.0.0/16 }",
    "nft add chain inet foreign forward { type filter hook forward priority 0; policy accept; }",
    "nft add rule inet foreign forward ip saddr @addresses tcp dport 9999 drop",
    "iptables -N FOREIGN",
    "iptables -A FORWARD -s 10.99.0.0/16 -j FOREIGN",
    "iptables -t nat -A POSTROUTING -s 10.99.0.0/16 -j MASQUERADE",
];

/// Settings that an operator has: none of them stops packets.
const SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/conf/eth0/arp_ignore", "1"),
    ("ipv4/conf/cni0/log_martians", "1"),
    ("ipv4/conf/cni1/forwarding", "0"),
    ("ipv4/conf/flannel.1/rp_filter", "2"),
    ("ipv4/neigh/cni0/gc_stale_time", "61"),
    ("ipv6/conf/cni0/hop_limit", "61"),
];

fn run(netns: &Netns, command: &str) -> Result<String> {
    let mut words = command.split_whitespace();
    netns.run(Command::new(words.next().context("empty command")?).args(words))
}

/// Everything that the namespace holds, a line each.
fn dump(netns: &Netns) -> Result<BTreeSet<String>> {
    let mut facts = BTreeSet::new();
    for command in [
        "ip -o link show",
        "ip -o -details link show type vxlan",
        "bridge -details link show",
        "ip -o address show",
        "ip route show table all",
        "ip -6 route show table all",
        "ip nexthop show",
        "ip rule show",
        "ip -6 rule show",
        "ip neighbor show nud permanent",
        "ip neighbor show nud noarp",
        "ip neighbor show proxy",
        "bridge fdb show",
        "tc qdisc show",
        "tc class show dev eth0",
        "tc filter show dev cni0 ingress",
        "nft --stateless list ruleset",
    ] {
        let mut places = std::collections::BTreeMap::<String, u32>::new();
        for line in run(netns, command)?.lines().filter(|line| !line.trim().is_empty() && !is_learned(line)) {
            // A running lifetime is a fact only as being there.
            let mut words: Vec<&str> = line.split_whitespace().collect();
            for running in ["expires", "valid_lft", "preferred_lft"] {
                if let Some(at) = words.iter().position(|word| *word == running) {
                    words[at + 1] = if words[at + 1] == "forever" { "forever" } else { "running" };
                }
            }
            let line = words.join(" ");
            // The order of alike things is a fact too: of routes to one subnet the first counts.
            let place = places.entry(words[0].to_owned()).and_modify(|n| *n += 1).or_insert(1);
            facts.insert(format!("{command} [{place}]: {line}"));
        }
    }
    netns.enter(|| sysctl_facts(Path::new("/proc/sys/net"), &mut facts))?;
    Ok(facts)
}

/// What the kernel takes note of by itself and forgets: groups that a device has spoken to, MACs that a bridge has heard.
fn is_learned(line: &str) -> bool {
    let is_group = line.contains(" lladdr 33:33:") || line.contains(" lladdr 01:00:5e:");
    let is_heard = line.contains(" master ") && line.split_whitespace().next().is_some_and(is_mac);
    is_group && line.ends_with("NOARP")
        || is_heard && !["permanent", "static"].iter().any(|kind| line.contains(kind))
}

fn is_mac(word: &str) -> bool {
    word.parse::<weft_shared::Mac>().is_ok()
}

/// Whole passes that begin after the call.
fn three_passes(node: &Node) -> Result<()> {
    let passes = || Ok::<_, anyhow::Error>(node.status()?.dataplane.context("dataplane")?.passes);
    let seen = passes()?;
    eventually("three passes more", READY, || {
        let now = passes()?;
        // A restarted agent counts anew.
        Ok(now < seen || now > seen + 3)
    })?;
    Ok(())
}

fn a_node_full_of_foreign_things(backend: Backend) -> Result<()> {
    scenario(Spec::etcd(2, backend).flag("--resync=1"), |cluster| {
        let pod = cluster.nodes[0].pod("a")?;
        let peer = cluster.nodes[1].lease_key()?.v4.to_string();
        let netns = cluster.nodes[0].netns().clone();
        let before = cluster.nodes[0].agent.while_stopped(|| {
            let mut made = 0;
            for command in FOREIGN {
                if backend == Backend::HostGw && command.split_whitespace().any(|word| word == "flannel.1") {
                    continue;
                }
                let command = command.replace("PEER", &peer).replace("PORT", pod.host_veth()?.as_str());
                run(&netns, &command)?;
                made += 1;
            }
            for (key, value) in
                SYSCTLS.iter().filter(|(key, _)| backend == Backend::Vxlan || !key.contains("flannel.1"))
            {
                netns.set_sysctl(key, value)?;
            }
            eventually("addresses to be no longer tentative", READY, || {
                Ok(!run(&netns, "ip address show")?.contains("tentative"))
            })?;
            let before = dump(&netns)?;
            ensure!(before.len() > made, "a dump of {} lines", before.len());
            Ok(before)
        })?;

        let unchanged = |what: &str| {
            let changes = difference(&before, &dump(&netns)?);
            if changes.is_empty() { Ok(()) } else { bail!("after {what}:\n{changes}") }
        };
        three_passes(&cluster.nodes[0])?;
        unchanged("passes")?;

        cluster.nodes[0].agent.stop()?;
        cluster.nodes[0].agent.restart(READY)?;
        three_passes(&cluster.nodes[0])?;
        unchanged("a restart")?;

        cluster.nodes[0].agent.kill()?;
        cluster.nodes[0].agent.restart(READY)?;
        three_passes(&cluster.nodes[0])?;
        unchanged("a kill")?;

        // A peer whose subnet has a foreign route already, with everything that a peer brings, comes and goes.
        let data = r#""BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}"#;
        let value = format!(
            r#"{{"PublicIP":"192.168.77.99","PublicIPv6":null,"BackendType":"{}",{data}}}"#,
            backend.kind()
        );
        cluster.etcd()?.put_entry(b"10.5.200.0-24", value.as_bytes())?;
        eventually("the peer to come", READY, || {
            Ok(run(&netns, "ip route show 10.5.200.0/24")?.contains("proto 87"))
        })?;
        let with_peer = run(&netns, "ip route show 10.5.200.0/24")?;
        let foreign_is_there = with_peer.lines().any(|line| line.contains("via 192.168.77.1 dev eth0"));
        ensure!(foreign_is_there, "the foreign route went when the peer came: {with_peer}");
        cluster.etcd()?.delete_lease("10.5.200.0-24")?;
        eventually("the peer to go", READY, || {
            Ok(!run(&netns, "ip route show 10.5.200.0/24")?.contains("proto 87"))
        })?;
        three_passes(&cluster.nodes[0])?;
        unchanged("a peer's coming and going")
    })
}

#[test]
fn foreign_things_outlive_everything_by_vxlan() -> Result<()> {
    a_node_full_of_foreign_things(Backend::Vxlan)
}

#[test]
fn foreign_things_outlive_everything_by_host_gw() -> Result<()> {
    a_node_full_of_foreign_things(Backend::HostGw)
}
