//! Hosts whose forward hook drops, as Docker, ufw and careful operators leave it: pods reach each other all the same,
//! what somebody decided stays decided, and whatever is taken away comes back.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::agent::{Agent, while_stopped};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::firewall::{DOCKER_20, DOCKER_28, UFW, rules, sh};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::Pod;
use e2e::promise::{Steps, kept_throughout};
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually};

const MOMENT: Duration = Duration::from_millis(200);
/// A container of Docker's on the first node.
const CONTAINER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);

struct Host {
    name: &'static str,
    close: String,
    open: &'static str,
    /// The chain that ours stand in, and what lists it.
    list: &'static str,
    /// Hands that take something of ours away or alter it.
    hands: &'static [&'static str],
    promised: Duration,
}

const IPTABLES_OPEN: &str = "iptables-nft -P FORWARD ACCEPT; iptables-nft -F; iptables-nft -X; iptables-nft -t nat -F; iptables-nft -t nat -X";
const IPTABLES_HANDS: &[&str] = &[
    "iptables-nft -D FORWARD -s 10.5.0.0/16 -m comment --comment 'weft forward' -j ACCEPT",
    "nft replace rule ip filter FORWARD handle $(nft -a list chain ip filter FORWARD | sed -n 's/.*weft forward.*handle //p' | head -1) ip saddr 10.6.0.0/16 counter accept comment '\"weft forward\"'",
    "iptables-nft -I FORWARD -j DROP",
];

/// A host's own ruleset loaded anew, as `systemctl reload nftables` does it.
const RELOAD: &str = "nft -f - <<'EOF'
flush ruleset
table inet host {
    chain onward {
        type filter hook forward priority 5; policy drop;
        ct state invalid drop
        ct state established accept
    }
}
EOF
";

const POLICY_HANDS: &[&str] =
    &[IPTABLES_HANDS[0], IPTABLES_HANDS[1], IPTABLES_HANDS[2], "iptables-nft -F FORWARD"];

fn restore(rules: &str) -> String {
    format!("iptables-nft-restore <<'EOF'\n{rules}EOF\n")
}

fn hosts() -> Vec<Host> {
    let nft = |family: &str, policy: &str, rule: &str| {
        format!(
            "nft add table {family} host
             nft 'add chain {family} host onward {{ type filter hook forward priority 5; {policy} }}'
             nft add rule {family} host onward ct state invalid drop
             {rule}"
        )
    };
    let iptables = |name, close: &str| Host {
        name,
        close: close.into(),
        open: IPTABLES_OPEN,
        list: "iptables-nft -S FORWARD",
        hands: IPTABLES_HANDS,
        promised: SECOND,
    };
    let nftables = |name, family: &str, close| Host {
        name,
        close,
        open: if family == "ip" { "nft delete table ip host" } else { "nft delete table inet host" },
        list: if family == "ip" {
            "nft -s list chain ip host onward"
        } else {
            "nft -s list chain inet host onward"
        },
        hands: &[],
        promised: SECOND,
    };
    vec![
        Host { hands: POLICY_HANDS, ..iptables("iptables -P FORWARD DROP", "iptables-nft -P FORWARD DROP") },
        Host {
            name: "iptables-legacy -P FORWARD DROP",
            close: "iptables-legacy -w 5 -P FORWARD DROP".into(),
            open: "iptables-legacy -w 5 -P FORWARD ACCEPT; iptables-legacy -w 5 -F",
            list: "iptables-legacy -w 5 -S FORWARD",
            hands: &[
                "iptables-legacy -w 5 -F FORWARD",
                "iptables-legacy -w 5 -D FORWARD 1",
                "iptables-legacy -w 5 -R FORWARD 1 -s 10.6.0.0/16 -m comment --comment 'weft forward' -j ACCEPT",
            ],
            promised: SECOND * 4,
        },
        iptables(
            "REJECT as the last rule",
            "iptables-nft -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
             iptables-nft -A FORWARD -j REJECT --reject-with icmp-host-prohibited",
        ),
        Host {
            hands: &[RELOAD, "nft flush chain inet host onward"],
            ..nftables("nft chain of family inet, policy drop", "inet", nft("inet", "policy drop;", ""))
        },
        nftables("nft chain of family ip, policy drop", "ip", nft("ip", "policy drop;", "")),
        nftables(
            "nft chain that ends in drop",
            "inet",
            nft("inet", "", "nft add rule inet host onward counter drop"),
        ),
        iptables("dockerd 20 to 27", &restore(DOCKER_20)),
        iptables("dockerd 28", &restore(DOCKER_28)),
        iptables("ufw", &restore(UFW)),
    ]
}

/// Runs a script on every node, the agents stopped meanwhile, and sees that it did what it should.
fn strike(nodes: &[Node], script: &str, shows: impl Fn() -> Result<()>) -> Result<()> {
    let agents: Vec<&Agent> = nodes.iter().map(|node| &node.agent).collect();
    let shown = while_stopped(&agents, || {
        nodes.iter().try_for_each(|node| sh(node.netns(), script).map(drop))?;
        shows()
    });
    shown.with_context(|| script.to_owned())
}

/// Docker's bridge on a node, with a container on it.
fn container(cluster: &Cluster, node: &Node) -> Result<Netns> {
    let netns = cluster.bed.netns("container")?;
    for command in [
        "link add docker0 type bridge",
        "address add 172.17.0.1/16 dev docker0",
        "link set docker0 up",
        &format!("link add c0 master docker0 type veth peer name eth0 netns {}", netns.path().display()),
        "link set c0 up",
    ] {
        node.netns().ip(command)?;
    }
    for command in [
        &format!("address add {CONTAINER}/16 dev eth0"),
        "link set eth0 up",
        "route add default via 172.17.0.1",
    ] {
        netns.ip(command)?;
    }
    Ok(netns)
}

fn pods_reach_each_other(near: &Pod, far: &Pod) -> Result<()> {
    ping(&near.netns, far.address, 1, MOMENT)?;
    ping(&far.netns, near.address, 1, MOMENT).map(drop)
}

#[test]
fn pods_reach_each_other_whatever_the_host_drops() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--resync=3600").flag("--iptables-resync=1"), |cluster| {
        let _container = container(cluster, &cluster.nodes[0])?;
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, CONTAINER, 5, SECOND)?;
        ping(&near.netns, far.address, 5, SECOND)?;
        for host in hosts() {
            // What a host does is done again from the beginning: it opens before it closes once more.
            kept_throughout(host.promised, |steps| {
                closed(cluster, &near, &far, &host, steps)?;
                strike(&cluster.nodes, host.open, || Ok(()))?;
                let gone = eventually("our rules to leave the chain that drops no more", READY, || {
                    let left: Vec<String> =
                        cluster.nodes.iter().map(|n| rules(n.netns())).collect::<Result<_>>()?;
                    ensure!(left.iter().all(|rules| !rules.contains("weft forward")), "{left:?}");
                    Ok(true)
                })?;
                took(steps, &format!("{}, opened again, our rules gone", host.name), gone);
                Ok(())
            })
            .with_context(|| host.name)?;
        }
        Ok(())
    })
}

fn took(steps: &mut Steps, what: &str, time: Duration) {
    report::took(what, time);
    steps.took(what, time);
}

fn closed(cluster: &Cluster, near: &Pod, far: &Pod, host: &Host, steps: &mut Steps) -> Result<()> {
    let dropped = || {
        ensure!(pods_reach_each_other(near, far).is_err(), "the host lets packets through");
        Ok(())
    };
    strike(&cluster.nodes, &host.close, dropped)?;
    let reached =
        eventually("pods to reach each other", READY, || pods_reach_each_other(near, far).map(|()| true))?;
    took(steps, host.name, reached);
    if host.name == "dockerd 28" {
        ensure!(ping(&near.netns, CONTAINER, 2, MOMENT).is_err(), "Docker's isolation is overruled");
    }
    let node = &cluster.nodes[0];
    let right = sh(node.netns(), host.list)?;
    assert_eq!(right.matches("weft forward").count(), 2, "{right}");
    for hand in host.hands {
        let altered = || {
            let wrong = sh(node.netns(), host.list)?;
            ensure!(wrong != right, "does not show: {wrong}");
            Ok(())
        };
        strike(std::slice::from_ref(node), hand, altered)?;
        let mended = eventually("our rules to be right again", READY, || {
            let now = sh(node.netns(), host.list)?;
            ensure!(now.matches("weft forward").count() == 2 && !now.contains("10.6.0.0"), "{now}");
            pods_reach_each_other(near, far).map(|()| true)
        })
        .with_context(|| hand.to_string())?;
        took(steps, &format!("{}, {hand}", host.name), mended);
    }
    Ok(())
}

#[test]
fn switched_off_the_drop_stands_and_status_names_chain_and_setting() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--iptables-forward-rules=false"), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        for node in &cluster.nodes {
            sh(node.netns(), "iptables-nft -P FORWARD DROP")?;
        }
        let node = &cluster.nodes[0];
        eventually("status to name the chain", READY, || {
            let told = node.agent.ctl(&["status"])?;
            ensure!(
                told.contains(
                    "ADVICE nftables chain ip filter FORWARD drops forwarded packets of 10.5.0.0/16"
                ),
                "{told}"
            );
            ensure!(told.contains("to mend it: --iptables-forward-rules=true"), "{told}");
            Ok(true)
        })?;
        ensure!(pods_reach_each_other(&near, &far).is_err(), "the host lets packets through");
        ensure!(!rules(node.netns())?.contains("weft"), "{}", rules(node.netns())?);
        Ok(())
    })
}

/// A table that belongs to a process, as firewalld's may, and one of firewalld's name: nobody else writes there.
#[test]
fn a_chain_that_cannot_be_ours_is_named_with_the_command() -> Result<()> {
    scenario(Spec::etcd(1, Backend::HostGw), |cluster| {
        let node = &cluster.nodes[0];
        let told = |what: &str| {
            eventually(what, READY, || {
                let told = node.agent.ctl(&["status"])?;
                ensure!(told.contains(what), "{told}");
                Ok(true)
            })
        };
        sh(
            node.netns(),
            "nft add table inet firewalld
             nft 'add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }'
             nft 'add chain inet firewalld filter_FORWARD_POLICIES'
             nft add rule inet firewalld filter_FORWARD ct state established,related accept
             nft add rule inet firewalld filter_FORWARD jump filter_FORWARD_POLICIES
             nft add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited",
        )?;
        told("ADVICE nftables chain inet firewalld filter_FORWARD drops forwarded packets of 10.5.0.0/16")?;
        told("firewall-cmd --permanent --zone=trusted --add-source=10.5.0.0/16 && firewall-cmd --reload")?;
        ensure!(!sh(node.netns(), "nft list table inet firewalld")?.contains("weft"));
        // As firewalld writes it when told so.
        sh(
            node.netns(),
            "nft add chain inet firewalld filter_FWD_trusted
             nft add rule inet firewalld filter_FORWARD_POLICIES ip saddr 10.5.0.0/16 goto filter_FWD_trusted",
        )?;
        eventually("the advice to go", READY, || Ok(!node.agent.ctl(&["status"])?.contains("ADVICE")))?;
        Ok(())
    })
}

/// Every way of the settings that reverse-path filter, bridge netfilter and the forward hook can be set.
fn every_setting(backend: Backend) -> Result<()> {
    scenario(Spec::etcd(2, backend).flag("--ip-masq"), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        let beside = cluster.nodes[0].pod("b")?;
        let outside = e2e::underlay::Underlay::GATEWAY;
        for node in &cluster.nodes {
            sh(node.netns(), "iptables-nft -P FORWARD DROP")?;
        }
        eventually("pods to reach each other", READY, || pods_reach_each_other(&near, &far).map(|()| true))?;
        let tunnels: &[&str] = if backend == Backend::Vxlan { &["0", "1", "2"] } else { &["-"] };
        let mut combinations = 0;
        for bridged in ["0", "1"] {
            for bridge in ["0", "1", "2"] {
                for underlay in ["0", "1", "2"] {
                    for tunnel in tunnels {
                        for node in &cluster.nodes {
                            let set = |key: &str, value: &str| node.netns().set_sysctl(key, value);
                            node.netns().set_sysctl("bridge/bridge-nf-call-iptables", bridged)?;
                            set("ipv4/conf/all/rp_filter", "0")?;
                            set("ipv4/conf/cni0/rp_filter", bridge)?;
                            set("ipv4/conf/eth0/rp_filter", underlay)?;
                            if *tunnel != "-" {
                                set("ipv4/conf/flannel.1/rp_filter", tunnel)?;
                            }
                        }
                        for (what, from, to) in [
                            ("pod to pod on its node", &near.netns, beside.address),
                            ("pod to pod on the other node", &near.netns, far.address),
                            ("and back", &far.netns, near.address),
                            ("node to remote pod", cluster.nodes[0].netns(), far.address),
                            ("pod to outside", &near.netns, outside),
                            ("pod to the other node", &near.netns, cluster.nodes[1].net.address),
                        ] {
                            ping(from, to, 5, SECOND).with_context(|| {
                                format!("{what}, bridge-nf-call-iptables {bridged}, rp_filter of bridge {bridge}, underlay {underlay}, tunnel {tunnel}")
                            })?;
                        }
                        combinations += 1;
                    }
                }
            }
        }
        report::figure(format_args!("{}: {combinations} combinations", backend.kind()));
        Ok(())
    })
}

#[test]
fn reverse_path_filter_and_bridge_netfilter_in_every_combination_over_vxlan() -> Result<()> {
    every_setting(Backend::Vxlan)
}

#[test]
fn reverse_path_filter_and_bridge_netfilter_in_every_combination_by_host_gw() -> Result<()> {
    every_setting(Backend::HostGw)
}

/// kube-proxy's Services need bridged packets in the packet filter; without them a node says so.
#[test]
fn kube_proxy_beside_a_bridge_that_passes_it_by_is_named() -> Result<()> {
    scenario(Spec::etcd(1, Backend::HostGw), |cluster| {
        let node = &cluster.nodes[0];
        let advised = || {
            Ok::<_, anyhow::Error>(node.agent.ctl(&["status"])?.contains("bridge-nf-call-iptables is not 1"))
        };
        node.netns().set_sysctl("bridge/bridge-nf-call-iptables", "0")?;
        sh(node.netns(), "iptables-nft -t nat -N KUBE-SERVICES")?;
        eventually("the advice", READY, advised)?;
        node.netns().set_sysctl("bridge/bridge-nf-call-iptables", "1")?;
        sh(node.netns(), "nft add table ip wake")?;
        eventually("the advice to go", READY, || advised().map(|a| !a))?;
        Ok(())
    })
}
