//! Masquerade with real packets: who a packet claims to come from when it arrives.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use e2e::capture::{Capture, Frame};
use e2e::cluster::{Backend, Cluster, MONITOR_ALONE, READY, SWEEP_ALONE, Spec, scenario};
use e2e::firewall::{external_host, rules, sh, source_seen};
use e2e::netns::Netns;
use e2e::packet::Ethernet;
use e2e::promise::kept;
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::traffic::flows::Flows;
use e2e::wait::{SECOND, eventually};
use nix::sys::socket::{setsockopt, sockopt::BindToDevice};

const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 200);
const EXCLUDED: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 201);
const MULTICAST: Ipv4Addr = Ipv4Addr::new(239, 1, 1, 1);

/// Of datagrams to this port the test marks those of pods as kube-proxy does.
const MARKED: u16 = 7777;

fn masquerading(backend: Backend) -> Spec {
    Spec::etcd(2, backend).flag("--ip-masq").flag(&format!("--ip-masq-exclude={EXCLUDED}/32"))
}

fn outside(cluster: &Cluster) -> Result<Netns> {
    external_host(&cluster.bed, &cluster.underlay, &[OUTSIDE, EXCLUDED])
}

/// The first address of a node's own subnet: flannel.1's.
fn own_network(cluster: &Cluster, node: usize) -> Result<Ipv4Addr> {
    match cluster.nodes[node].lease_key()?.v4.addr() {
        IpAddr::V4(addr) => Ok(addr),
        IpAddr::V6(addr) => anyhow::bail!("{addr}"),
    }
}

fn who_claims_to_come(backend: Backend) -> Result<()> {
    scenario(masquerading(backend), |cluster| {
        let external = outside(cluster)?;
        let (near, far) = cluster.pod_pair()?;
        let (first, second) = (&cluster.nodes[0], &cluster.nodes[1]);
        let beside = first.pod("b")?;
        // Clients outside know the way to pods through the first node, whether they are its own or not.
        external.ip(&format!("route add 10.5.0.0/16 via {}", first.net.address))?;
        sh(
            first.netns(),
            &format!(
                "nft add table ip marks
                 nft 'add chain ip marks pre {{ type filter hook prerouting priority mangle; }}'
                 nft add rule ip marks pre udp dport {MARKED} meta mark set 0x4001"
            ),
        )?;
        // Where the node itself is the source, its address on the way out: the tunnel's, or the underlay's.
        let on_overlay = match backend {
            Backend::Vxlan | Backend::Udp => own_network(cluster, 0)?,
            Backend::HostGw => first.net.address,
        };
        for (what, from, to, address, port, expected) in [
            ("pod to outside", &near.netns, &external, OUTSIDE, 0, first.net.address),
            ("pod of the other node to outside", &far.netns, &external, OUTSIDE, 0, second.net.address),
            ("pod to an excluded destination", &near.netns, &external, EXCLUDED, 0, near.address),
            ("pod with kube-proxy's mark to outside", &near.netns, &external, OUTSIDE, MARKED, near.address),
            ("pod to pod on its node", &near.netns, &beside.netns, beside.address, 0, near.address),
            ("pod to pod on the other node", &near.netns, &far.netns, far.address, 0, near.address),
            ("pod to its node", &near.netns, first.netns(), first.net.address, 0, near.address),
            ("pod to the other node", &near.netns, second.netns(), second.net.address, 0, first.net.address),
            ("node to a pod of its own", first.netns(), &near.netns, near.address, 0, gateway(near.address)),
            ("node to a pod of the other node", first.netns(), &far.netns, far.address, 0, on_overlay),
            ("client outside to a local pod", &external, &near.netns, near.address, 0, OUTSIDE),
            (
                "client outside, through this node, to a remote pod",
                &external,
                &far.netns,
                far.address,
                0,
                on_overlay,
            ),
        ] {
            let seen = source_seen(from, ANY, to, address, port).context(what)?;
            assert_eq!(seen, IpAddr::from(expected), "{what}\n{}", rules(first.netns())?);
        }
        // Answers find their way back.
        for (from, to) in [
            (&near.netns, OUTSIDE),
            (first.netns(), far.address),
            (&external, near.address),
            (&external, far.address),
        ] {
            ping(from, to, 5, SECOND)?;
        }
        multicast(cluster, &external)
    })
}

fn gateway(pod: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, _] = pod.octets();
    Ipv4Addr::new(a, b, c, 1)
}

/// The node speaks with an address of the overlay to a multicast group, and to somebody else for comparison.
fn multicast(cluster: &Cluster, external: &Netns) -> Result<()> {
    let node = &cluster.nodes[0];
    node.netns().ip("route add 239.0.0.0/8 dev eth0")?;
    let overlay = gateway(cluster.nodes[0].pod("m")?.address);
    assert_eq!(
        source_seen(node.netns(), overlay, external, OUTSIDE, 0)?,
        IpAddr::from(node.net.address),
        "an address of the overlay to outside"
    );
    let capture = Capture::start(external)?;
    let socket = node.netns().enter(|| {
        let socket = UdpSocket::bind(SocketAddrV4::new(overlay, 0))?;
        // A bound address chooses the way to a group, and this one's is the bridge.
        setsockopt(&socket, BindToDevice, &"eth0".into())?;
        Ok(socket)
    })?;
    socket.send_to(b"to all", SocketAddrV4::new(MULTICAST, 5000))?;
    let source = capture.wait_for("a datagram to the group", READY, |frame: &Frame| {
        let ip = Ethernet::parse(&frame.bytes)?.ipv4()?;
        (ip.destination == MULTICAST && ip.protocol == 17).then_some(ip.source)
    })?;
    assert_eq!(source, overlay, "a multicast group sees who really speaks");
    Ok(())
}

#[test]
fn addresses_are_kept_and_masqueraded_as_flannels_rules_say_over_vxlan() -> Result<()> {
    who_claims_to_come(Backend::Vxlan)
}

#[test]
fn addresses_are_kept_and_masqueraded_as_flannels_rules_say_by_host_gw() -> Result<()> {
    who_claims_to_come(Backend::HostGw)
}

#[test]
fn addresses_are_kept_and_masqueraded_as_flannels_rules_say_by_udp() -> Result<()> {
    who_claims_to_come(Backend::Udp)
}

#[test]
fn off_unless_set_and_subnet_env_says_which() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let external = outside(cluster)?;
        let pod = cluster.nodes[0].pod("a")?;
        assert_eq!(source_seen(&pod.netns, ANY, &external, OUTSIDE, 0)?, IpAddr::from(pod.address));
        let env = |cluster: &Cluster| fs::read_to_string(cluster.nodes[0].agent.subnet_file());
        ensure!(env(cluster)?.contains("FLANNEL_IPMASQ=false\n"), "{}", env(cluster)?);
        ensure!(!rules(cluster.nodes[0].netns())?.contains("postrtg"));

        let agent = &mut cluster.nodes[0].agent;
        agent.stop()?;
        agent.flags.push("--ip-masq".into());
        agent.restart(READY)?;
        ensure!(env(cluster)?.contains("FLANNEL_IPMASQ=true\n"), "{}", env(cluster)?);
        let node = cluster.nodes[0].net.address;
        assert_eq!(source_seen(&pod.netns, ANY, &external, OUTSIDE, 0)?, IpAddr::from(node));

        let agent = &mut cluster.nodes[0].agent;
        agent.stop()?;
        agent.flags.pop();
        agent.restart(READY)?;
        eventually("the masquerade to go", READY, || {
            Ok(!rules(cluster.nodes[0].netns())?.contains("postrtg"))
        })?;
        assert_eq!(source_seen(&pod.netns, ANY, &external, OUTSIDE, 0)?, IpAddr::from(pod.address));
        Ok(())
    })
}

#[test]
fn open_connections_keep_their_translation_through_restart_and_replacement() -> Result<()> {
    scenario(masquerading(Backend::Vxlan), |cluster| {
        let external = outside(cluster)?;
        let pod = cluster.nodes[0].pod("a")?;
        let flows = Flows::open(&pod.netns, &external, OUTSIDE, 8)?;
        let go_on = |what: &str| {
            let seen = flows.rounds();
            eventually(what, READY, || Ok(flows.rounds() > seen + 20))
        };
        go_on("connections to carry something")?;
        let handle =
            |cluster: &Cluster| sh(cluster.nodes[0].netns(), "nft -a list table ip flannel-ipv4 | head -1");
        let before = handle(cluster)?;
        cluster.nodes[0].agent.kill()?;
        go_on("connections without an agent")?;
        cluster.nodes[0].agent.restart(READY)?;
        go_on("connections after a restart")?;
        assert_eq!(handle(cluster)?, before, "a table that is right is not touched by a restart");

        let netns = cluster.nodes[0].netns();
        let took = kept("a table with a rule too much", SECOND, || {
            let before = handle(cluster)?;
            sh(netns, "nft add rule ip flannel-ipv4 postrtg accept")?;
            eventually("the table to be replaced", READY, || Ok(handle(cluster)? != before))
        })?;
        report::took("table with a rule too much", took);
        go_on("connections after the table was replaced")?;
        flows.end()?;
        // Nothing translates in between: what a connection sends then is lost to it, and often the connection too.
        let took = kept("nft flush ruleset", SECOND, || {
            sh(netns, "nft flush ruleset")?;
            eventually("the table to be back", READY, || Ok(rules(netns)?.contains("postrtg")))
        })?;
        report::took("nft flush ruleset", took);
        assert_eq!(
            source_seen(&pod.netns, ANY, &external, OUTSIDE, 0)?,
            IpAddr::from(cluster.nodes[0].net.address)
        );
        Ok(())
    })
}

/// What foreign hands do to our table and to forwarding, each seen wrong and then right again.
#[test]
fn table_and_forwarding_are_mended_within_a_second() -> Result<()> {
    for (flags, by_sweep) in [(&MONITOR_ALONE[..], false), (&SWEEP_ALONE, true)] {
        let promised = if by_sweep { SECOND * 5 } else { SECOND };
        scenario(masquerading(Backend::Vxlan).flags(flags), |cluster| {
            let (near, far) = cluster.pod_pair()?;
            let node = &cluster.nodes[0];
            let view = || {
                let conf = |dev: &str| node.netns().sysctl(&format!("ipv4/conf/{dev}/forwarding"));
                let forwarding = format!(
                    "{} {} {} {}",
                    node.netns().sysctl("ipv4/ip_forward")?,
                    conf("cni0")?,
                    conf("flannel.1")?,
                    conf("eth0")?
                );
                Ok::<_, anyhow::Error>((rules(node.netns())?, forwarding))
            };
            let right = view()?;
            let rule = "$(nft -a list chain ip flannel-ipv4 postrtg | sed -n 's/.*10.5.0.0.16 ip daddr !=.*handle //p')";
            for (fault, hand) in [
                ("nft flush ruleset", "nft flush ruleset".to_owned()),
                ("our table deleted", "nft delete table ip flannel-ipv4".into()),
                ("a chain of it flushed", "nft flush chain ip flannel-ipv4 postrtg".into()),
                ("a chain of it deleted", "nft delete chain ip flannel-ipv4 postrtg".into()),
                ("one rule deleted", format!("nft delete rule ip flannel-ipv4 postrtg handle {rule}")),
                (
                    "one rule altered",
                    format!(
                        "nft replace rule ip flannel-ipv4 postrtg handle {rule} ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade"
                    ),
                ),
                ("a rule too much", "nft insert rule ip flannel-ipv4 postrtg masquerade".into()),
                ("net.ipv4.ip_forward off", "echo 0 > /proc/sys/net/ipv4/ip_forward".into()),
                (
                    "net.ipv4.conf.all.forwarding off",
                    "echo 0 > /proc/sys/net/ipv4/conf/all/forwarding".into(),
                ),
                ("forwarding of cni0 off", "echo 0 > /proc/sys/net/ipv4/conf/cni0/forwarding".into()),
                (
                    "forwarding of flannel.1 off",
                    "echo 0 > /proc/sys/net/ipv4/conf/flannel.1/forwarding".into(),
                ),
                ("forwarding of the underlay off", "echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding".into()),
            ] {
                let took = kept(fault, promised, || {
                    let wrong = node.agent.while_stopped(|| {
                        sh(node.netns(), &hand)?;
                        view()
                    })?;
                    ensure!(wrong != right, "{fault}: does not show");
                    eventually(fault, READY, || {
                        ensure!(view()? == right, "{:?} instead of {right:?}", view()?);
                        Ok(true)
                    })
                })?;
                report::took(format_args!("{}{fault}", if by_sweep { "sweep alone, " } else { "" }), took);
            }
            ping(&near.netns, far.address, 5, SECOND)?;
            Ok(())
        })?;
    }
    Ok(())
}
