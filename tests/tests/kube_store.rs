//! The Kubernetes store on a real API server and its etcd: agents in namespace nodes, Node objects made through the API,
//! no kubelet. What the API says is read with kubectl.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::bed::Bed;
use e2e::binaries::Binaries;
use e2e::cluster::READY;
use e2e::dist::CHECKOUT;
use e2e::etcd::Etcd;
use e2e::kube::{ControlPlane, Programs};
use e2e::node::Node;
use e2e::traffic::datagrams::{Stream, nothing_missing};
use e2e::traffic::echo::ping;
use e2e::underlay::{NodeNumber, Underlay};
use e2e::wait::{SECOND, eventually, until_ok};
use serde_json::{Value, json};
use weft_agent::status::NetworkPolicyState;

const PREFIX: &str = "flannel.alpha.coreos.com";
/// As kube-flannel's manifest has it, the ConfigMap's key.
const NET_CONF: &str =
    r#"{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}"#;

/// Fields drop in order: agents end before the control plane, that before its store, the store before the namespaces.
struct Cluster {
    nodes: Vec<Node>,
    control: ControlPlane,
    etcd: Etcd,
    bed: Bed,
    _underlay: Underlay,
}

impl Cluster {
    /// An API server and two agents that are not started; no Node is there yet.
    fn prepare() -> Result<Self> {
        let bed = Bed::for_test()?;
        let binaries = Binaries::find()?;
        let underlay = Underlay::create(&bed)?;
        let etcd = Etcd::start(&underlay.netns, Underlay::GATEWAY, &bed.dir("etcd")?)?;
        let dir = bed.dir("kube")?;
        let mut control =
            ControlPlane::start(&underlay.netns, &dir, &Programs::find()?, &etcd.endpoint(), 2)?;
        // The test gives the ranges out.
        control.controllers.kill()?;
        let net_conf = bed.dir("config")?.join("net-conf.json");
        fs::write(&net_conf, NET_CONF)?;
        let mut nodes = Vec::new();
        for number in (1..=2).map(NodeNumber) {
            let net = underlay.attach(&bed, number)?;
            let mut node = Node::new(bed.root(), number, net, &binaries)?;
            node.agent.flags = vec![
                "--kube-subnet-mgr".to_owned(),
                "--ip-masq".to_owned(),
                format!("--kubeconfig-file={}", dir.join("admin.conf").display()),
                format!("--net-config-path={}", net_conf.display()),
            ];
            nodes.push(node);
        }
        Ok(Self { nodes, control, etcd, bed, _underlay: underlay })
    }

    fn net_conf(&self) -> PathBuf {
        self.bed.root().join("config/net-conf.json")
    }

    fn create(&self, name: &str, cidr: Option<&str>, annotations: &Value) -> Result<()> {
        let file = self.bed.root().join(format!("{name}.json"));
        let cidrs: Vec<&str> = cidr.into_iter().collect();
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "annotations": annotations},
            "spec": {"podCIDR": cidr, "podCIDRs": cidrs},
        });
        fs::write(&file, node.to_string())?;
        self.control.kubectl(&["create", "-f", &file.display().to_string()])?;
        Ok(())
    }

    fn get(&self, name: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.control.kubectl(&["get", "node", name, "-o", "json"])?)?)
    }

    fn annotate(&self, name: &str, annotation: &str) -> Result<()> {
        let annotation = format!("{PREFIX}/{annotation}");
        self.control.kubectl(&["annotate", "--overwrite", "node", name, &annotation])?;
        Ok(())
    }

    /// Keys of the peers that the first node's kernel has.
    fn peers(&self) -> Result<Vec<String>> {
        let peers = self.nodes[0].status()?.peers;
        Ok(peers.into_iter().filter(|peer| peer.programmed).map(|peer| peer.key.to_string()).collect())
    }

    fn until_peers(&self, what: &str, expected: &[&str]) -> Result<()> {
        eventually(what, READY, || {
            let peers = self.peers()?;
            ensure!(peers == expected, "peers {peers:?}, refused {:?}", self.nodes[0].status()?.refused);
            Ok(true)
        })?;
        Ok(())
    }

    fn explain(&self) -> String {
        self.nodes.iter().map(|node| node.agent.explain()).collect()
    }
}

fn scenario(body: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    let mut cluster = Cluster::prepare()?;
    body(&mut cluster).with_context(|| cluster.explain())
}

/// As flanneld's patch leaves a Node.
fn flannels(mac: &str, ip: &str) -> Value {
    json!({
        format!("{PREFIX}/backend-data"): format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#),
        format!("{PREFIX}/backend-type"): "vxlan",
        format!("{PREFIX}/kube-subnet-manager"): "true",
        format!("{PREFIX}/public-ip"): ip,
    })
}

#[test]
fn agents_are_nodes_of_a_cluster() -> Result<()> {
    scenario(|cluster| {
        let [n1, n2] = [0, 1].map(|n| cluster.nodes[n].name().to_owned());
        // Without a Node, and without a range: waited for, by name.
        cluster.nodes[0].agent.start()?;
        let waits_for = |cluster: &Cluster, text: &str| {
            eventually(&format!("status to say: {text}"), READY, || {
                let status = cluster.nodes[0].status()?;
                ensure!(status.store.kind == "kubernetes", "{:?}", status.store);
                ensure!(
                    !status.ready && status.waiting_for.concat().contains(text),
                    "{:?}",
                    status.waiting_for
                );
                Ok(true)
            })
        };
        waits_for(cluster, "there is no such Node")?;
        cluster.create(&n1, None, &json!({"example.com/theirs": "stays"}))?;
        waits_for(cluster, "pod cidr not assigned")?;
        let range = json!({"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}});
        cluster.control.kubectl(&["patch", "node", &n1, "-p", &range.to_string()])?;
        cluster.create(&n2, Some("10.244.2.0/24"), &json!({}))?;
        cluster.nodes[1].agent.start()?;
        for node in &mut cluster.nodes {
            node.agent.wait_ready(READY)?;
            node.wait_peers(1, READY)?;
        }
        let (near, far) = (cluster.nodes[0].pod("a")?, cluster.nodes[1].pod("a")?);
        ping(&near.netns, far.address, 5, SECOND)?;

        // Byte for byte, and nothing else of the Node.
        let node = cluster.get(&n1)?;
        let link = cluster.nodes[0].netns().ip("-j link show flannel.1")?;
        let link: Value = serde_json::from_str(&link)?;
        let mac = link[0]["address"].as_str().context("a MAC")?;
        let mut expected = flannels(mac, &cluster.nodes[0].net.address.to_string());
        expected["example.com/theirs"] = "stays".into();
        assert_eq!(node["metadata"]["annotations"], expected);
        eventually("NetworkUnavailable to be False", READY, || {
            let conditions = cluster.get(&n1)?["status"]["conditions"].clone();
            let ours =
                conditions.as_array().into_iter().flatten().find(|c| c["type"] == "NetworkUnavailable");
            let ours = ours.with_context(|| format!("conditions {conditions}"))?;
            ensure!(ours["status"] == "False" && ours["reason"] == "FlannelIsUp", "{ours}");
            Ok(true)
        })?;

        // A flanneld's Node is a peer, garbage is named, whom no agent looks after is neither.
        cluster.create("foreign", Some("10.244.3.0/25"), &flannels("c6:d2:32:6f:8f:44", "192.0.2.3"))?;
        cluster.create("garbage", Some("10.244.4.0/24"), &flannels("no mac", "192.0.2.4"))?;
        cluster.create("plain", Some("10.244.5.0/24"), &json!({}))?;
        cluster.until_peers("flannel's Node", &["10.244.2.0-24", "10.244.3.0-25"])?;
        let refused = |cluster: &Cluster| -> Result<Vec<String>> {
            Ok(cluster.nodes[0].status()?.refused.into_iter().map(|r| r.key).collect())
        };
        eventually("the garbage by name", READY, || Ok(refused(cluster)? == ["node/garbage"]))?;
        let page = cluster.nodes[0].agent.ctl(&["status"])?;
        ensure!(page.contains("REFUSED node/garbage") && page.contains("Nodes' podCIDRs"), "{page}");
        cluster.nodes[0].agent.metric("weft_lease_refused{key=\"node/garbage\"}")?;
        cluster.nodes[0].agent.metric("weft_store_kind{kind=\"kubernetes\"}")?;
        ping(&near.netns, far.address, 1, SECOND).map(drop)
    })
}

#[test]
fn what_befalls_the_api_does_not_befall_the_pods() -> Result<()> {
    scenario(|cluster| {
        let [n1, n2] = [0, 1].map(|n| cluster.nodes[n].name().to_owned());
        cluster.create(&n1, Some("10.244.1.0/24"), &json!({}))?;
        cluster.create(&n2, Some("10.244.2.0/24"), &json!({}))?;
        cluster.create("foreign", Some("10.244.3.0/24"), &flannels("c6:d2:32:6f:8f:44", "192.0.2.3"))?;
        for node in &mut cluster.nodes {
            node.agent.start()?;
        }
        for node in &mut cluster.nodes {
            node.agent.wait_ready(READY)?;
            node.wait_peers(2, READY)?;
        }
        let (near, far) = (cluster.nodes[0].pod("a")?, cluster.nodes[1].pod("a")?);
        ping(&near.netns, far.address, 5, SECOND)?;
        let stream = Stream::start(&near.netns, &far.netns, far.address, 100)?;
        // The API goes, its history too; what happened meanwhile is found by the next list.
        cluster.control.api.kill()?;
        eventually("status to say that the store is away", READY, || {
            let status = cluster.nodes[0].status()?;
            ensure!(!status.store.connected && status.store.problem.is_some(), "{:?}", status.store);
            Ok(true)
        })?;
        assert_eq!(cluster.peers()?, ["10.244.2.0-24", "10.244.3.0-24"]);
        // A start without it goes on with what it said last.
        cluster.nodes[0].agent.stop()?;
        cluster.nodes[0].agent.restart(READY)?;
        ensure!(
            cluster.nodes[0].status()?.store.recalled_age.is_some(),
            "{:?}",
            cluster.nodes[0].status()?.store
        );
        cluster.until_peers("the peers from disk", &["10.244.2.0-24", "10.244.3.0-24"])?;
        let foreign = "/registry/minions/foreign";
        cluster.etcd.ctl(&["del", foreign])?;
        let revision: Value = serde_json::from_str(&cluster.etcd.ctl(&["get", foreign, "-w", "json"])?)?;
        cluster.etcd.ctl(&["compact", &revision["header"]["revision"].to_string()])?;
        cluster.control.start_api()?;
        cluster.nodes[1].wait_peers(1, READY).context("the peer that went meanwhile to go")?;
        // Who knows it from disk alone cannot say how it went, and keeps it for a while.
        eventually("the other to count it as expired", READY, || {
            let status = cluster.nodes[0].status()?;
            ensure!(status.store.recalled_age.is_none(), "{:?}", status.store);
            let gone = status.peers.iter().find(|peer| peer.key.to_string() == "10.244.3.0-24");
            Ok(gone.is_some_and(|peer| peer.grace_left.is_some()))
        })?;

        // Joined again with another range: here, and at the other end.
        nothing_missing([stream])?;
        cluster.control.kubectl(&["delete", "node", &n2])?;
        cluster.until_peers("a deleted Node to go", &["10.244.3.0-24"])?;
        cluster.create(&n2, Some("10.244.9.0/24"), &json!({}))?;
        cluster.until_peers("its new range", &["10.244.3.0-24", "10.244.9.0-24"])?;
        cluster.nodes[1].agent.wait_ready(READY)?;
        let fresh = cluster.nodes[1].pod("b")?;
        ensure!(fresh.address.octets()[2] == 9, "{}", fresh.address);
        ping(&near.netns, fresh.address, 5, SECOND)?;

        // An operator's address is what peers are told; the file is followed, and what cannot be applied is said.
        cluster.annotate(&n2, "public-ip-overwrite=192.0.2.99")?;
        eventually("the overwrite to reach the peers", READY, || {
            let peers = cluster.nodes[0].status()?.peers;
            Ok(peers.iter().any(|peer| peer.public_ip.to_string() == "192.0.2.99"))
        })?;
        cluster.annotate(&n2, "public-ip-overwrite-")?;
        eventually("and back", READY, || {
            let peers = cluster.nodes[0].status()?.peers;
            Ok(peers.iter().any(|peer| peer.public_ip == cluster.nodes[1].net.address))
        })?;
        fs::write(cluster.net_conf(), NET_CONF.replace("vxlan", "host-gw"))?;
        eventually("the notice", READY, || {
            let network = cluster.nodes[0].status()?.network.context("a network")?;
            Ok(network.notice.is_some_and(|notice| notice.text.contains("Backend.Type = host-gw")))
        })?;
        ping(&near.netns, fresh.address, 5, SECOND).map(drop)
    })
}

/// With the rights of the manifest: policies that nobody enforces are named by status, metric and one Event; chains of an
/// enforcer's end that; a right that is missing leaves everything else as it is.
#[test]
fn network_policies_without_an_enforcer_are_named() -> Result<()> {
    scenario(|cluster| {
        let manifest = Path::new(CHECKOUT).join("conf/kubernetes/weft.yaml");
        cluster.control.kubectl(&["apply", "-f", &manifest.display().to_string()])?;
        let token = cluster.control.kubectl(&["-n", "kube-weft", "create", "token", "weft"])?;
        let config = cluster.control.kubeconfig("weft.conf", token.trim())?;
        for node in &mut cluster.nodes {
            node.agent.flags.retain(|flag| !flag.starts_with("--kubeconfig-file"));
            node.agent.flags.push(format!("--kubeconfig-file={}", config.display()));
            node.agent.flags.push("--network-policy-check=1s".to_owned());
        }
        for number in 1..=2 {
            let name = NodeNumber(number).name();
            cluster.create(&name, Some(&format!("10.244.{number}.0/24")), &json!({}))?;
        }
        for node in &mut cluster.nodes {
            node.agent.start()?;
        }
        for node in &mut cluster.nodes {
            node.agent.wait_ready(READY)?;
            node.wait_peers(1, READY)?;
        }
        let state = |cluster: &Cluster, node: usize, expected: NetworkPolicyState| {
            eventually(&format!("policies of node {node} to be {expected:?}"), READY, || {
                let policies = cluster.nodes[node].status()?.network_policies.context("policies")?;
                ensure!(policies.state == expected, "{policies:?}");
                Ok(true)
            })
        };
        let unenforced = |cluster: &Cluster, node: usize| {
            cluster.nodes[node].agent.metric("weft_network_policies_unenforced")
        };
        for node in 0..2 {
            state(cluster, node, NetworkPolicyState::None)?;
            ensure!(unenforced(cluster, node)? == 0.0);
        }

        for name in ["deny", "deny-more"] {
            let policy = json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {"name": name}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
            });
            let file = cluster.bed.root().join(format!("{name}.json"));
            fs::write(&file, policy.to_string())?;
            cluster.control.kubectl(&["create", "-f", &file.display().to_string()])?;
        }
        for node in 0..2 {
            state(cluster, node, NetworkPolicyState::Unenforced)?;
            ensure!(unenforced(cluster, node)? == 1.0);
            eventually("both to be counted", READY, || {
                Ok(cluster.nodes[node]
                    .status()?
                    .network_policies
                    .is_some_and(|policies| policies.count == Some(2)))
            })?;
            let text = cluster.nodes[node].agent.ctl(&["status"])?;
            let said =
                "policies   NOT ENFORCED: 2 NetworkPolicies exist, and nothing that weft knows enforces them";
            ensure!(text.contains(said), "{text}");
        }
        let warned = |cluster: &Cluster, node: usize| cluster.nodes[node].agent.log();
        let events = |cluster: &Cluster| -> Result<Vec<Value>> {
            let text = cluster.control.kubectl(&["get", "events", "-A", "-o", "json"])?;
            let all: Value = serde_json::from_str(&text)?;
            let all = all["items"].as_array().context("items")?.clone();
            Ok(all.into_iter().filter(|event| event["reason"] == "NetworkPoliciesNotEnforced").collect())
        };
        // Both have told.
        eventually("both to have said so", READY, || {
            Ok((0..2).all(|node| {
                warned(cluster, node).contains("nothing that weft knows enforces them on this node")
            }))
        })?;
        let event = until_ok("the Event", READY, || {
            let mut all = events(cluster)?;
            ensure!(all.len() == 1, "one Event: {all:?}");
            Ok(all.remove(0))
        })?;
        ensure!(event["type"] == "Warning" && event["metadata"]["namespace"] == "default", "{event}");
        ensure!(
            event["message"].as_str().is_some_and(
                |note| note.contains(": 2 NetworkPolicies exist, and nothing that weft knows enforces")
            ),
            "{event}"
        );
        // An enforcer on one node is none on the other.
        let netns = cluster.nodes[0].netns();
        let nft = |script: &str| netns.run(Command::new("nft").arg(script));
        nft("add table ip filter; add chain ip filter cali-FORWARD")?;
        state(cluster, 0, NetworkPolicyState::Enforced)?;
        ensure!(unenforced(cluster, 0)? == 0.0);
        let text = cluster.nodes[0].agent.ctl(&["status"])?;
        ensure!(
            text.contains("policies   enforced by Calico (nftables chain ip filter cali-FORWARD)"),
            "{text}"
        );
        state(cluster, 1, NetworkPolicyState::Unenforced)?;
        nft("delete chain ip filter cali-FORWARD")?;
        state(cluster, 0, NetworkPolicyState::Unenforced)?;

        // Without the rights: unknown, named, and nothing else is different.
        let rules = cluster.control.kubectl(&["get", "clusterrole", "weft", "-o", "json"])?;
        let mut role: Value = serde_json::from_str(&rules)?;
        let rules = role["rules"].as_array_mut().context("rules")?;
        rules.retain(|rule| rule["resources"] != json!(["networkpolicies"]));
        ensure!(rules.len() == 2, "{rules:?}");
        let file = cluster.bed.root().join("role.json");
        fs::write(&file, role.to_string())?;
        cluster.control.kubectl(&["replace", "-f", &file.display().to_string()])?;
        cluster.control.kubectl(&["-n", "default", "delete", "role", "weft"])?;
        for node in 0..2 {
            state(cluster, node, NetworkPolicyState::Unknown)?;
        }
        cluster.nodes[0].agent.stop()?;
        cluster.nodes[0].agent.restart(READY)?;
        state(cluster, 0, NetworkPolicyState::Unknown)?;
        eventually("the right to be named", READY, || {
            let policies = cluster.nodes[0].status()?.network_policies.context("policies")?;
            Ok(policies.problem.is_some_and(|problem| problem.contains("Grant list of networkpolicies")))
        })?;
        ensure!(
            cluster.nodes[0].agent.metric("weft_network_policies_unenforced").is_err(),
            "it is not known"
        );
        let status = cluster.nodes[0].status()?;
        ensure!(status.ready && status.store.connected && status.store.problem.is_none(), "{status:?}");
        cluster.nodes[0].wait_peers(1, READY)?;
        let (near, far) = (cluster.nodes[0].pod("a")?, cluster.nodes[1].pod("a")?);
        ping(&near.netns, far.address, 5, SECOND).map(drop)
    })
}

/// `weftctl uninstall` finds its Node as weftd does, and says of a Node's annotations what is true of them.
#[test]
fn an_uninstall_knows_its_node_and_what_it_leaves_there() -> Result<()> {
    scenario(|cluster| {
        let name = cluster.nodes[0].name().to_owned();
        cluster.create(&name, Some("10.244.1.0/24"), &json!({"example.com/theirs": "stays"}))?;
        cluster.nodes[0].agent.start()?;
        cluster.nodes[0].agent.wait_ready(READY)?;
        cluster.nodes[0].agent.stop()?;
        let node = &cluster.nodes[0];
        let uninstall = |args: &[&str]| {
            let options = node.agent.options();
            let mut command = Command::new(node.binaries.ctl());
            command.env("NODE_NAME", &name).args(["uninstall", "--keep-conflists"]).args(args).arg("--");
            command.args(options.iter().filter(|option| !option.starts_with("--node-name")));
            node.netns().run(&mut command)
        };
        let text = uninstall(&["--dry-run"])?;
        let left = "stays    weft's annotations of the Node with podCIDR 10.244.1.0/24 in Kubernetes by ";
        ensure!(
            text.contains(left) && text.contains("they do not expire; --release-lease removes them"),
            "{text}"
        );
        ensure!(!text.contains("expires by itself"), "{text}");
        let text = uninstall(&["--release-lease"])?;
        let removed = "removed  lease     weft's annotations of the Node with podCIDR 10.244.1.0/24";
        ensure!(text.contains(removed), "{text}");
        let annotations = cluster.get(&name)?["metadata"]["annotations"].clone();
        ensure!(annotations == json!({"example.com/theirs": "stays"}), "{annotations}");
        Ok(())
    })
}

/// An operator's public IP, written while an agent ran, is heard by one that starts while the API is away: late.
#[test]
fn a_start_without_the_api_hears_what_an_operator_wishes_once_it_is_back() -> Result<()> {
    scenario(|cluster| {
        let names = [0, 1].map(|node| cluster.nodes[node].name().to_owned());
        for (node, cidr) in ["10.244.1.0/24", "10.244.2.0/24"].into_iter().enumerate() {
            cluster.create(&names[node], Some(cidr), &json!({}))?;
            cluster.nodes[node].agent.start()?;
            cluster.nodes[node].agent.wait_ready(READY)?;
        }
        let leased = |cluster: &Cluster, node: usize| {
            let lease = cluster.nodes[node].status()?.lease.context("a lease")?;
            Ok::<_, anyhow::Error>(lease.public_ip.to_string())
        };
        let notice = |cluster: &Cluster, node: usize| {
            let underlay = cluster.nodes[node].status()?.underlay.context("an underlay")?;
            Ok::<_, anyhow::Error>(underlay.notice.unwrap_or_default())
        };
        let own = [0, 1].map(|node| cluster.nodes[node].net.address.to_string());
        ensure!([leased(cluster, 0)?, leased(cluster, 1)?] == own);
        // One is wished that is not there yet, and one that is none.
        cluster.annotate(&names[0], "node-public-ip=192.168.77.98")?;
        cluster.annotate(&names[1], "node-public-ip=garbage")?;
        // What a start would choose now.
        let netns = cluster.nodes[1].netns();
        netns.ip(&format!("address change {}/24 dev eth0 valid_lft 7200 preferred_lft 7200", own[1]))?;
        netns.ip("address add 192.168.77.97/24 dev eth0")?;
        cluster.control.api.kill()?;
        for (node, own) in own.iter().enumerate() {
            cluster.nodes[node].agent.stop()?;
            cluster.nodes[node].agent.restart(READY)?;
            let status = cluster.nodes[node].status()?;
            ensure!(leased(cluster, node)? == *own && status.store.recalled_age.is_some(), "{status:?}");
        }
        cluster.control.start_api()?;
        for (node, reason) in
            ["no interface has the address 192.168.77.98", "/node-public-ip = \"garbage\": expected an IPv4"]
                .into_iter()
                .enumerate()
        {
            eventually("the reason in status", READY * 2, || Ok(notice(cluster, node)?.contains(reason)))?;
            let status = cluster.nodes[node].status()?;
            ensure!(status.ready && leased(cluster, node)? == own[node], "{status:?}");
        }
        cluster.nodes[0].netns().ip("address add 192.168.77.98/24 dev eth0")?;
        eventually("the wish to be met", READY, || Ok(leased(cluster, 0)? == "192.168.77.98"))?;
        eventually("and published", READY, || {
            Ok(cluster.get(&names[0])?["metadata"]["annotations"][format!("{PREFIX}/public-ip")]
                == "192.168.77.98")
        })?;
        // Nothing is wished any more: nothing moves.
        cluster.annotate(&names[1], "node-public-ip-")?;
        for node in 0..2 {
            eventually("no word of it", READY * 2, || Ok(notice(cluster, node)?.is_empty()))?;
            let said = cluster.nodes[node].agent.log().matches("the underlay stays as it is").count();
            ensure!(said == 1, "said {said} times");
        }
        let underlay = cluster.nodes[1].status()?.underlay.context("an underlay")?;
        ensure!(underlay.address.to_string() == own[1] && leased(cluster, 1)? == own[1], "{underlay:?}");
        Ok(())
    })
}

/// Of two Nodes with one range the older has it, whoever starts first; a Node that weft refuses has nobody's.
#[test]
fn a_range_is_given_out_by_one_node() -> Result<()> {
    scenario(|cluster| {
        let [n1, n2] = [0, 1].map(|n| cluster.nodes[n].name().to_owned());
        // The oldest of all: its range is no part of Network, so that it is in nobody's way.
        cluster.create("wide", Some("10.0.0.0/8"), &flannels("c6:d2:32:6f:8f:44", "192.0.2.3"))?;
        cluster.create(&n1, Some("10.244.12.0/24"), &json!({}))?;
        cluster.create("loop", Some("10.244.5.0/24"), &flannels("c6:d2:32:6f:8f:45", "127.0.0.1"))?;
        cluster.nodes[0].agent.start()?;
        cluster.nodes[0].agent.wait_ready(READY)?;
        // Ages are told apart by the second.
        let created = |cluster: &Cluster, name: &str| {
            Ok::<_, anyhow::Error>(cluster.get(name)?["metadata"]["creationTimestamp"].clone())
        };
        eventually("a Node that is younger", READY, || {
            let _ = cluster.control.kubectl(&["delete", "node", &n2, "--ignore-not-found"])?;
            cluster.create(&n2, Some("10.244.12.0/24"), &json!({}))?;
            Ok(created(cluster, &n2)? != created(cluster, &n1)?)
        })?;
        // Whether a start sees the other in time is a matter of moments.
        for start in 0..5 {
            cluster.nodes[1].agent.start()?;
            eventually(&format!("start {start} to name who has its range"), READY, || {
                let status = cluster.nodes[1].status()?;
                let said = status.waiting_for.concat();
                ensure!(!status.ready && said.contains(&format!("now held by node/{n1}")), "{status:?}");
                Ok(true)
            })?;
            let annotations = cluster.get(&n2)?["metadata"]["annotations"].clone();
            ensure!(annotations.get(format!("{PREFIX}/public-ip")).is_none(), "{annotations}");
            cluster.nodes[1].agent.stop()?;
        }
        let status = cluster.nodes[0].status()?;
        ensure!(status.ready, "{:?}", status.waiting_for);
        let refused = |key: &str, reason: &str| {
            let named = status.refused.iter().find(|refused| refused.key == key);
            let named = named.with_context(|| format!("{key} among {:?}", status.refused))?;
            ensure!(named.reason.contains(reason), "{named:?}");
            Ok(())
        };
        refused("node/wide", "podCIDR 10.0.0.0/8: expected a network inside Network 10.244.0.0/16")?;
        refused("node/loop", "public-ip = \"127.0.0.1\": expected a unicast address, not a loopback one")?;
        // The older goes: its range is free.
        cluster.nodes[0].agent.stop()?;
        cluster.control.kubectl(&["delete", "node", &n1])?;
        cluster.nodes[1].agent.start()?;
        cluster.nodes[1].agent.wait_ready(READY)?;
        // And one that is older comes to have it, under the running agent.
        cluster.annotate("loop", "public-ip=192.0.2.4")?;
        let range = json!({"spec": {"podCIDR": "10.244.5.0/24", "podCIDRs": ["10.244.5.0/24"]}});
        cluster.control.kubectl(&["delete", "node", &n2])?;
        cluster.create(&n2, None, &json!({}))?;
        cluster.control.kubectl(&["patch", "node", &n2, "-p", &range.to_string()])?;
        eventually("the agent to know whose range it was given", READY, || {
            let status = cluster.nodes[1].status()?;
            ensure!(format!("{status:?}").contains("held by node/loop"), "{status:?}");
            Ok(true)
        })
        .map(drop)
    })
}

/// An operator's `public-ip-overwrite` is taken up under a running agent without a word of intruders; what is no address
/// is refused by name, and what peers were told last stays.
#[test]
fn an_overwrite_is_an_operators() -> Result<()> {
    scenario(|cluster| {
        let name = cluster.nodes[0].name().to_owned();
        cluster.create(&name, Some("10.244.1.0/24"), &json!({}))?;
        cluster.nodes[0].agent.start()?;
        cluster.nodes[0].agent.wait_ready(READY)?;
        let published = |cluster: &Cluster, expected: &str| {
            eventually(&format!("public-ip {expected}"), READY, || {
                let said =
                    cluster.get(&name)?["metadata"]["annotations"][format!("{PREFIX}/public-ip")].clone();
                ensure!(said == expected, "{said}");
                Ok(true)
            })
        };
        let problem = |cluster: &Cluster| {
            Ok::<_, anyhow::Error>(cluster.nodes[0].status()?.lease.context("a lease")?.problem)
        };
        for ip in ["192.0.2.98", "192.0.2.99"] {
            cluster.annotate(&name, &format!("public-ip-overwrite={ip}"))?;
            published(cluster, ip)?;
            ensure!(problem(cluster)?.is_none(), "{:?}", problem(cluster)?);
        }
        for garbage in ["10.0.0.1:8472", "garbage;x", "fd00::1"] {
            cluster.annotate(&name, &format!("public-ip-overwrite={garbage}"))?;
            let said = format!("{PREFIX}/public-ip-overwrite = {garbage:?}: expected an IPv4 address");
            eventually(&said, READY, || {
                let problem = problem(cluster)?;
                ensure!(problem.as_ref().is_some_and(|problem| problem.contains(&said)), "{problem:?}");
                Ok(true)
            })?;
            published(cluster, "192.0.2.99")?;
        }
        cluster.annotate(&name, "public-ip-overwrite-")?;
        published(cluster, &cluster.nodes[0].net.address.to_string())?;
        eventually("the problem to go", READY, || Ok(problem(cluster)?.is_none()))?;
        let log = cluster.nodes[0].agent.log();
        ensure!(!log.contains("another hand"), "{log}");
        // What an operator wishes beside the Node is not blamed on the option.
        cluster.nodes[0].agent.stop()?;
        cluster.annotate(&name, "node-public-ip=203.0.113.9")?;
        cluster.nodes[0].agent.start()?;
        eventually("the annotation to be named", READY, || {
            let waiting = cluster.nodes[0].status()?.waiting_for.concat();
            let said = "no interface has the address 203.0.113.9 of the Node's annotation node-public-ip";
            ensure!(waiting.contains(said), "{waiting}");
            Ok(true)
        })
        .map(drop)
    })
}
