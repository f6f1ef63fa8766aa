//! Ports of the host that lead to pods: from everywhere, kept against every hand, gone with the pod.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::books::invariant;
use e2e::cluster::{Backend, Cluster, MONITOR_ALONE, READY, Spec, scenario};
use e2e::firewall::{external_host, sh};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::{Pod, Sandbox};
use e2e::report;
use e2e::traffic::named::{Answer, Named, UdpClient, ask_tcp, ask_udp};
use e2e::wait::{SECOND, eventually};
use serde_json::{Value, json};

const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 200);
const TABLE: &str = "weft-hostports";

const BAD_CONFIGURATION: u64 = 7;
const HOST_PORT_TAKEN: u64 = 108;

fn mapping(protocol: &str, host_port: u16, host_ip: &str) -> Value {
    json!({ "hostPort": host_port, "containerPort": 80, "protocol": protocol, "hostIP": host_ip })
}

/// Port 8080 of every address.
fn everywhere() -> Vec<Value> {
    vec![mapping("tcp", 8080, ""), mapping("udp", 8080, "")]
}

fn sandbox(node: &Node, name: &str, mappings: &[Value]) -> Result<Sandbox> {
    let mut sandbox = Sandbox::create(node, name)?;
    sandbox.call.config["capabilities"] = json!({ "portMappings": true });
    sandbox.call.config["runtimeConfig"] = json!({ "portMappings": mappings });
    sandbox.call.args = Some(format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME={name}"));
    Ok(sandbox)
}

/// A pod that serves its name on port 80.
fn served(node: &Node, name: &str, mappings: &[Value]) -> Result<(Pod, Named)> {
    let pod = sandbox(node, name, mappings)?.wire()?;
    let server = Named::start(&pod.netns, name, ANY, 80)?;
    Ok((pod, server))
}

fn gateway(pod: &Pod) -> Ipv4Addr {
    let [a, b, c, _] = pod.address.octets();
    Ipv4Addr::new(a, b, c, 1)
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address, port)
}

fn ruleset(node: &Node) -> Result<String> {
    sh(node.netns(), "nft -s list ruleset")
}

/// Whether any port leads anywhere, by the packet filter.
fn leads_anywhere(node: &Node) -> Result<bool> {
    Ok(ruleset(node)?.contains("dnat to"))
}

fn answers(client: &Netns, to: SocketAddrV4, name: &str) -> Result<bool> {
    Ok(ask_tcp(client, to)?.is_some_and(|answer| answer.server == name))
}

#[test]
fn a_port_leads_to_its_pod_from_everywhere_and_nowhere_else() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--ip-masq"), |cluster| {
        let external = external_host(&cluster.bed, &cluster.underlay, &[OUTSIDE])?;
        let (first, second) = (&cluster.nodes[0], &cluster.nodes[1]);
        let (host, other_host) = (first.net.address, second.net.address);
        let mut mappings = everywhere();
        mappings.extend([
            mapping("TCP", 8081, &host.to_string()),
            mapping("tcp", 8082, "127.0.0.1"),
            mapping("tcp", 8083, "0.0.0.0"),
        ]);
        let (pod, _server) = served(first, "web", &mappings)?;
        let (beside, far) = (first.pod("beside")?, second.pod("far")?);
        let (node, bridge, local) = (first.netns(), gateway(&pod), Ipv4Addr::LOCALHOST);
        let masqueraded = Some(bridge);
        for (what, from, to, seen) in [
            ("outside", &external, at(host, 8080), Some(OUTSIDE)),
            ("the other node", second.netns(), at(host, 8080), Some(other_host)),
            ("a pod of the other node", &far.netns, at(host, 8080), Some(other_host)),
            ("the node itself, by its address", node, at(host, 8080), Some(host)),
            ("the node itself, by its loopback", node, at(local, 8080), masqueraded),
            ("the pod itself", &pod.netns, at(host, 8080), masqueraded),
            ("the pod itself, by its gateway", &pod.netns, at(bridge, 8080), masqueraded),
            ("another pod of the node", &beside.netns, at(host, 8080), masqueraded),
            ("outside, on the one address", &external, at(host, 8081), Some(OUTSIDE)),
            ("the loopback, on another", node, at(local, 8081), None),
            ("a pod, on another", &beside.netns, at(bridge, 8081), None),
            ("the loopback alone", node, at(local, 8082), masqueraded),
            ("outside, on the loopback alone", &external, at(host, 8082), None),
            ("outside, on all of IPv4", &external, at(host, 8083), Some(OUTSIDE)),
            ("a port that leads nowhere", &external, at(host, 8084), None),
            ("a pod, to the other node's port", &beside.netns, at(other_host, 8080), None),
            ("the pod's own port is nobody else's", &external, at(host, 80), None),
        ] {
            let expected = seen.map(|client| Answer { server: "web".into(), client: client.into() });
            let tcp = ask_tcp(from, to)
                .with_context(|| format!("{what}\n{}", ruleset(first).unwrap_or_default()))?;
            ensure!(tcp == expected, "{what}: {tcp:?}, expected {expected:?}\n{}", ruleset(first)?);
            if to.port() == 8080 {
                let udp = ask_udp(from, to).with_context(|| format!("{what}, by UDP"))?;
                ensure!(udp == expected, "{what}, by UDP: {udp:?}, expected {expected:?}");
            }
        }
        let shown = first.agent.ctl(&["pods"])?;
        ensure!(shown.contains("8080/udp -> 80") && shown.contains("127.0.0.1:8082/tcp -> 80"), "{shown}");
        kept_from_the_loopback(first, &beside)?;

        // With the DEL, not some time after it.
        pod.unwire()?;
        for port in [8080, 8081, 8083] {
            ensure!(ask_tcp(&external, at(host, port))?.is_none(), "port {port} after DEL");
        }
        ensure!(ask_udp(&external, at(host, 8080))?.is_none(), "UDP after DEL");
        ensure!(!leads_anywhere(first)?, "{}", ruleset(first)?);
        beside.delete()
    })
}

/// What opens the way from the loopback to pods must not open the way back.
fn kept_from_the_loopback(node: &Node, pod: &Pod) -> Result<()> {
    let private = Ipv4Addr::new(127, 0, 0, 2);
    let secret = node.netns().enter(|| Ok(UdpSocket::bind(at(private, 5555))?))?;
    secret.set_read_timeout(Some(Duration::from_millis(100)))?;
    pod.netns.ip("route delete local 127.0.0.0/8 dev lo table local")?;
    pod.netns.ip(&format!("route add {private} via {} dev eth0 src {}", gateway(pod), pod.address))?;
    let sender = pod.netns.enter(|| Ok(UdpSocket::bind(at(pod.address, 0))?))?;
    let arrives = || {
        sender.send_to(b"let me in", at(private, 5555))?;
        Ok(secret.recv(&mut [0; 16]).is_ok())
    };
    for _ in 0..3 {
        ensure!(!arrives()?, "a pod reaches the host's loopback\n{}", ruleset(node)?);
    }
    node.agent.while_stopped(|| {
        sh(node.netns(), &format!("nft flush chain ip {TABLE} guard"))?;
        eventually("the same datagram to pass without the guard", READY, arrives)
    })?;
    eventually("the guard to be back", READY, || Ok(!arrives()?))?;
    Ok(())
}

#[test]
fn ports_are_kept_against_every_hand_and_go_with_their_pod() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan).flags(&MONITOR_ALONE), |cluster| {
        let external = external_host(&cluster.bed, &cluster.underlay, &[OUTSIDE])?;
        let to = at(cluster.nodes[0].net.address, 8080);
        let (pod, server) = served(&cluster.nodes[0], "kept", &everywhere())?;
        ensure!(answers(&external, to, "kept")?);

        for hand in [
            "nft flush ruleset".to_owned(),
            format!("nft delete table ip {TABLE}"),
            format!("nft flush chain ip {TABLE} ports"),
            format!("nft insert rule ip {TABLE} ports accept"),
            format!("nft delete chain ip {TABLE} prerouting"),
        ] {
            let node = &cluster.nodes[0];
            let right = ruleset(node)?;
            node.agent.while_stopped(|| {
                sh(node.netns(), &hand)?;
                ensure!(!answers(&external, to, "kept")?, "{hand} changes nothing");
                Ok(())
            })?;
            let took = eventually(&hand, READY, || Ok(ruleset(node)? == right))?;
            report::took(&hand, took);
            ensure!(answers(&external, to, "kept")?, "after {hand}");
        }

        // Without an agent, and with another one, which touches nothing that is right.
        let handle = |cluster: &Cluster| {
            sh(cluster.nodes[0].netns(), &format!("nft -a list table ip {TABLE} | head -1"))
        };
        let before = handle(cluster)?;
        cluster.nodes[0].agent.kill()?;
        ensure!(answers(&external, to, "kept")?, "without an agent");
        cluster.nodes[0].agent.restart(READY)?;
        ensure!(answers(&external, to, "kept")? && handle(cluster)? == before, "after a restart");
        // What goes while nobody looks comes back from the records.
        cluster.nodes[0].agent.kill()?;
        sh(cluster.nodes[0].netns(), "nft flush ruleset")?;
        cluster.nodes[0].agent.restart(READY)?;
        eventually("the ports to be back after a restart", READY, || answers(&external, to, "kept"))?;

        // A DEL that found no agent.
        cluster.nodes[0].agent.kill()?;
        pod.unwire()?;
        drop(server);
        ensure!(leads_anywhere(&cluster.nodes[0])?, "nobody was there to take it away");
        cluster.nodes[0].agent.restart(READY)?;
        eventually("the ports to go with the tombstone", READY, || Ok(!leads_anywhere(&cluster.nodes[0])?))?;
        invariant(&cluster.nodes[0], &[])?;

        // No DEL at all, and GC.
        let (vanished, server) = served(&cluster.nodes[0], "vanished", &everywhere())?;
        ensure!(answers(&external, to, "vanished")?);
        drop(server);
        vanished.netns.remove()?;
        eventually("the ports to go with the pod", READY, || Ok(!leads_anywhere(&cluster.nodes[0])?))?;
        let (collected, _server) = served(&cluster.nodes[0], "collected", &everywhere())?;
        let mut gc = collected.call.clone();
        gc.config["cni.dev/valid-attachments"] = json!([]);
        gc.run("GC")?.silent()?;
        ensure!(!leads_anywhere(&cluster.nodes[0])?, "after GC: {}", ruleset(&cluster.nodes[0])?);

        // Power is back: the kernel has forgotten, and nobody remembers for it.
        let (_gone, server) = served(&cluster.nodes[0], "gone", &everywhere())?;
        drop(server);
        cluster.nodes[0].agent.kill()?;
        cluster.reboot(0)?;
        cluster.nodes[0].agent.restart(READY)?;
        let rules = ruleset(&cluster.nodes[0])?;
        ensure!(!rules.contains(TABLE) && rules.contains("flannel-ipv4"), "{rules}");
        invariant(&cluster.nodes[0], &[])
    })
}

/// An agent that knows neither its store nor what it said last: pods live on, and may be deleted.
#[test]
fn without_a_lease_ports_stay_and_a_del_takes_them_away() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let external = external_host(&cluster.bed, &cluster.underlay, &[OUTSIDE])?;
        let to = at(cluster.nodes[0].net.address, 8080);
        let (pod, server) = served(&cluster.nodes[0], "kept", &everywhere())?;
        let (other, _other_server) = served(&cluster.nodes[0], "other", &[mapping("tcp", 8090, "")])?;
        cluster.etcd()?.kill()?;
        let node = &mut cluster.nodes[0];
        node.agent.kill()?;
        std::fs::remove_dir_all(node.agent.state_dir())?;
        node.agent.start()?;
        let node = &cluster.nodes[0];
        eventually("the agent to listen", SECOND * 20, || {
            Ok(std::os::unix::net::UnixStream::connect(node.agent.cni_socket()).is_ok())
        })?;
        ensure!(node.status()?.lease.is_none(), "it has a lease");
        ensure!(answers(&external, to, "kept")?, "without a lease");
        drop(server);
        pod.unwire()?;
        let rules = ruleset(node)?;
        ensure!(!rules.contains("dport 8080") && rules.contains("dport 8090"), "{rules}");
        let left: Vec<String> = node.status()?.pods.list.into_iter().map(|pod| pod.container_id).collect();
        ensure!(left == ["other"], "{left:?}");
        // As any table of ours, against every hand.
        sh(node.netns(), &format!("nft flush table ip {TABLE}"))?;
        eventually("the other's port to be back", SECOND * 20, || {
            answers(&external, at(node.net.address, 8090), "other")
        })?;
        cluster.etcd()?.resume()?;
        cluster.nodes[0].agent.wait_ready(READY)?;
        ensure!(answers(&external, at(cluster.nodes[0].net.address, 8090), "other")?, "with a lease again");
        invariant(&cluster.nodes[0], &[other])
    })
}

/// A flow of datagrams that never pauses: conntrack would keep its translation for ever.
#[test]
fn a_udp_flow_follows_its_port_from_pod_to_pod() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let external = external_host(&cluster.bed, &cluster.underlay, &[OUTSIDE])?;
        let host = cluster.nodes[0].net.address;
        let client = UdpClient::open(&external, at(host, 8080))?;
        let inside = UdpClient::open(cluster.nodes[0].netns(), at(host, 8080))?;
        let bystander = UdpClient::open(&external, at(host, 8090))?;
        let who = |client: &UdpClient| -> Result<String> {
            // An ICMP error of a moment before may be told now.
            let answer = client.ask().or_else(|_| client.ask())?;
            Ok(answer.map_or("nobody".to_owned(), |answer| answer.server))
        };
        let becomes = |expected: &str| {
            for client in [&client, &inside] {
                eventually(expected, READY, || {
                    let now = who(client)?;
                    ensure!(now == expected, "{now} answers");
                    Ok(true)
                })?;
            }
            anyhow::Ok(())
        };
        let _host = Named::start(cluster.nodes[0].netns(), "host", ANY, 8080)?;
        let _bystander = Named::start(cluster.nodes[0].netns(), "bystander", ANY, 8090)?;
        becomes("host")?;
        ensure!(who(&bystander)? == "bystander");
        let (first, first_server) = served(&cluster.nodes[0], "first", &everywhere())?;
        becomes("first")?;
        ensure!(who(&bystander)? == "bystander");
        drop(first_server);
        first.unwire()?;
        becomes("host")?;
        let (second, _second_server) = served(&cluster.nodes[0], "second", &everywhere())?;
        becomes("second")?;

        // The agent dies between the DEL and what follows from it.
        cluster.nodes[0].agent.kill()?;
        second.unwire()?;
        cluster.nodes[0].agent.restart(READY)?;
        becomes("host")?;
        let (_third, _third_server) = served(&cluster.nodes[0], "third", &everywhere())?;
        becomes("third")?;

        // Flows that began while a foreign hand had taken the rules away.
        let node = &cluster.nodes[0];
        node.agent
            .while_stopped(|| {
                sh(node.netns(), "nft flush ruleset")?;
                let late = UdpClient::open(&external, at(host, 8080))?;
                ensure!(who(&late)? == "host");
                Ok(late)
            })
            .and_then(|late| {
                eventually("a flow of the time without rules to follow", READY, || Ok(who(&late)? == "third"))
            })?;
        Ok(())
    })
}

#[test]
fn what_cannot_be_given_is_refused_by_name_and_leaves_nothing() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let (first, _server) = served(node, "first", &everywhere())?;
        let refused = |name: &str, mappings: &[Value]| {
            let (code, error) = sandbox(node, name, mappings)?.call.run("ADD")?.error()?;
            Ok::<_, anyhow::Error>((code, error.to_string()))
        };
        let (code, text) = refused("second", &[mapping("tcp", 9000, ""), mapping("udp", 8080, "127.0.0.1")])?;
        ensure!(
            code == HOST_PORT_TAKEN
                && text.contains("pod default/second, container second asks for port 127.0.0.1:8080/udp")
                && text.contains("pod default/first, container first has 8080/udp"),
            "{text}"
        );
        let twice = [mapping("tcp", 9000, ""), mapping("tcp", 9000, "192.168.77.11")];
        for (name, mappings, part) in [
            ("twice", &twice[..], "portMappings[1].hostPort = 9000: expected another port"),
            ("v6", &[mapping("tcp", 9000, "::1")], "hostIP of port [::1]:9000/tcp: expected an IPv4 address"),
            ("none", &[mapping("tcp", 0, "")], "portMappings[0].hostPort = 0: expected a port from 1"),
            ("icmp", &[mapping("icmp", 9000, "")], "protocol = \\\"icmp\\\": expected tcp, udp or sctp"),
        ] {
            let (code, text) = refused(name, mappings)?;
            ensure!(code == BAD_CONFIGURATION && text.contains(part), "{name}: {text}");
        }
        invariant(node, std::slice::from_ref(&first))?;

        // One whose pod is gone without a DEL keeps nobody out, and one that is deleted neither.
        node.agent.while_stopped(|| node.netns().ip(&format!("link delete {}", first.host_veth()?)))?;
        let (second, _second_server) = served(node, "successor", &everywhere())?;
        ensure!(answers(node.netns(), at(Ipv4Addr::LOCALHOST, 8080), "successor")?);
        second.unwire()?;
        let (third, _third_server) = served(node, "third", &everywhere())?;
        ensure!(answers(node.netns(), at(Ipv4Addr::LOCALHOST, 8080), "third")?);
        invariant(node, &[third])
    })
}
