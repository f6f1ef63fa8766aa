//! The node's own lease and the cluster's configuration, changed under a running agent: pods stay, and it is said.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::etcd::PREFIX;
use e2e::kernel::{KernelView, query};
use e2e::node::Node;
use e2e::pod::Sandbox;
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually, until_ok};
use weft_agent::status::StrandedStatus;

/// An address of the underlay that no node has.
const STRANGER: &str = "192.168.77.99";

/// As a node of the backend would write it.
fn value(backend: Backend, public_ip: &str) -> String {
    let data = match backend {
        Backend::Vxlan => r#","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}"#,
        Backend::HostGw => "",
        // flannel's udp publishes its address alone.
        Backend::Udp => return format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null}}"#),
    };
    format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendType":"{}"{data}}}"#, backend.kind())
}

fn addresses(node: &Node, dev: &str) -> Result<Vec<String>> {
    let links = query(node.netns(), &format!("ip -json -4 address show dev {dev}"))?;
    let addresses = links[0]["addr_info"].as_array().cloned().unwrap_or_default();
    Ok(addresses
        .iter()
        .map(|a| format!("{}/{}", a["local"].as_str().unwrap_or("?"), a["prefixlen"]))
        .collect())
}

/// The whole of it: two pods live in a subnet that another node takes, while no other is free.
fn taken_by_another(backend: Backend) -> Result<()> {
    let mut spec = Spec::etcd(2, backend);
    // Three subnets: flannel leaves the first one out.
    (spec.network, spec.subnet_len) = ("10.5.0.0/24".into(), 26);
    scenario(spec, |cluster| {
        let (first, second) = (cluster.nodes[0].pod("a")?, cluster.nodes[0].pod("b")?);
        let far = cluster.nodes[1].pod("a")?;
        ping(&first.netns, far.address, 5, SECOND)?;
        let lost = cluster.nodes[0].lease_key()?;
        let others = cluster.nodes[1].lease_key()?;
        let free = ["10.5.0.64-26", "10.5.0.128-26", "10.5.0.192-26"].into_iter();
        let free = free.map(|key| key.parse()).collect::<Result<Vec<weft_shared::lease::LeaseKey>, _>>()?;
        let free = *free.iter().find(|key| ![lost, others].contains(key)).context("the third")?;
        cluster.etcd()?.put_entry(free.to_string().as_bytes(), value(backend, "192.168.77.98").as_bytes())?;
        cluster.etcd()?.put_entry(lost.to_string().as_bytes(), value(backend, STRANGER).as_bytes())?;

        let node = &cluster.nodes[0];
        eventually("the loss to be said", READY, || {
            let waiting = node.status()?.waiting_for.concat();
            let expected = format!("{lost} is now held by {STRANGER}");
            if waiting.contains(&expected) { Ok(true) } else { bail!("waits for {waiting:?}") }
        })?;
        let sandbox = Sandbox::create(node, "new")?;
        let (code, error) = sandbox.call.run("ADD")?.error()?;
        assert!(code == 11 && error.to_string().contains(STRANGER), "{code} {error}");
        let (code, error) = sandbox.call.run("STATUS")?.error()?;
        assert!(code == 51 && error.to_string().contains(STRANGER), "{code} {error}");
        eventually("the want of a subnet to be said", READY, || {
            let problem = node.status()?.lease.and_then(|lease| lease.problem).unwrap_or_default();
            ensure!(problem.contains("no free subnet"), "{problem}");
            Ok(true)
        })?;
        assert_eq!(node.status()?.pods.attachments, 2, "pods keep address and wiring");
        ping(&first.netns, second.address, 5, SECOND)?;

        cluster.etcd()?.delete_lease(&free.to_string())?;
        let start = Instant::now();
        let node = &mut cluster.nodes[0];
        node.agent.wait_ready(READY)?;
        report::took(format_args!("{}: a new subnet after one became free", backend.kind()), start.elapsed());
        assert_eq!(node.lease_key()?, free);
        let new = sandbox.wire()?;
        assert!(free.v4.contains(new.address.into()), "{}", new.address);

        let node = &cluster.nodes[0];
        let status = node.status()?;
        assert_eq!(status.pods.attachments, 3);
        let stranded = StrandedStatus { subnet: lost.v4, pods: 2, owner: Some(STRANGER.parse()?) };
        assert_eq!(status.pods.stranded, [stranded]);
        let gateway = |key: weft_shared::lease::LeaseKey| format!("{}/26", key.v4.gateway());
        let mut gateways = addresses(node, "cni0")?;
        gateways.sort();
        let mut expected = [gateway(lost), gateway(free)];
        expected.sort();
        assert_eq!(gateways, expected, "the old gateway beside the new");
        if backend == Backend::Vxlan {
            assert_eq!(addresses(node, "flannel.1")?, [format!("{}/32", free.v4.addr())]);
        }
        let env = fs::read_to_string(node.agent.subnet_file())?;
        assert!(env.contains(&format!("FLANNEL_SUBNET={}\n", gateway(free))), "{env}");
        for (from, to) in [(&first, &second), (&first, &new), (&new, &second), (&new, &far), (&far, &new)] {
            ping(&from.netns, to.address, 5, SECOND)
                .with_context(|| format!("{} to {}", from.name, to.name))?;
        }

        // The old range goes with its last pod, and the subnet is reached where it is now.
        first.delete()?;
        second.delete()?;
        let took = eventually("the old range to go", READY, || {
            let (gateways, stranded) = (addresses(node, "cni0")?, node.status()?.pods.stranded);
            let peer = node.status()?.peers.into_iter().find(|peer| peer.key == lost).context("its owner")?;
            if gateways != [gateway(free)] || !stranded.is_empty() || !peer.programmed {
                bail!("{gateways:?}, {stranded:?}, {peer:?}");
            }
            Ok(true)
        })?;
        report::took(format_args!("{}: the old range gone after its last pod", backend.kind()), took);
        ping(&new.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

#[test]
fn a_subnet_taken_by_another_node_by_vxlan() -> Result<()> {
    taken_by_another(Backend::Vxlan)
}

#[test]
fn a_subnet_taken_by_another_node_by_host_gw() -> Result<()> {
    taken_by_another(Backend::HostGw)
}

/// Somebody made the bridge before weft did, with a MAC of his own.
#[test]
fn an_adopted_bridge_comes_back_with_the_mac_its_pods_know() -> Result<()> {
    const ADOPTED: &str = "02:00:00:00:ad:0b";
    scenario(Spec::etcd(2, Backend::HostGw), |cluster| {
        cluster.nodes[0].netns().ip(&format!("link add cni0 address {ADOPTED} type bridge"))?;
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let mac = |node: &Node| -> Result<bool> {
            Ok(query(node.netns(), "ip -json link show cni0")?[0]["address"] == ADOPTED)
        };
        let talks = |node: &Node| -> Result<Duration> {
            eventually("the bridge to be back, and the pod to talk", READY, || {
                ping(&near.netns, far.address, 1, Duration::from_millis(200))?;
                mac(node)
            })
        };
        cluster.nodes[0].netns().ip("link delete cni0")?;
        report::took("adopted bridge: back", talks(&cluster.nodes[0])?);
        // An agent that has never seen it knows it from the records.
        let node = &mut cluster.nodes[0];
        node.agent.kill()?;
        node.netns().ip("link delete cni0")?;
        node.agent.restart(READY)?;
        talks(node)?;
        Ok(())
    })
}

/// By hand a veth gets another name, or loses our mark: it is still its pod's, and goes with it.
#[test]
fn a_renamed_or_regrouped_veth_does_not_escape_its_del() -> Result<()> {
    scenario(Spec::etcd(1, Backend::HostGw), |cluster| {
        let node = &cluster.nodes[0];
        for (hand, mended) in [("name foreign0", "name"), ("group 77", "group")] {
            let pod = node.pod(mended)?;
            let veth = pod.host_veth()?;
            let index = |name: &str| -> Result<u64> {
                let links = query(node.netns(), &format!("ip -json link show {name}"))?;
                links[0]["ifindex"].as_u64().context("an index")
            };
            let own = index(veth.as_str())?;
            node.netns().ip(&format!("link set {veth} {hand}"))?;
            let took = eventually("name and group to be as they were", READY, || {
                let links = query(node.netns(), &format!("ip -json link show {veth}"))?;
                Ok(links[0]["ifindex"] == own && links[0]["group"] != "77")
            })?;
            report::took(format_args!("veth's {mended}: mended"), took);
            pod.unwire()?;
            let left = query(node.netns(), "ip -json link show")?;
            ensure!(!left.iter().any(|link| link["ifindex"] == own), "the veth is left: {left:?}");
            assert_eq!(node.status()?.pods.attachments, 0);
        }
        Ok(())
    })
}

#[test]
fn an_own_lease_deleted_by_hand_is_taken_again_at_once() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let own = cluster.nodes[0].lease_key()?.to_string();
        for _ in 0..3 {
            cluster.etcd()?.delete_lease(&own)?;
            let took =
                eventually("the key to be back", READY, || Ok(cluster.etcd()?.lease_keys()?.contains(&own)))?;
            report::took("lease deleted by hand: taken again", took);
        }
        cluster.wait_converged()?;
        assert_eq!(cluster.nodes[0].lease_key()?.to_string(), own);
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

#[test]
fn a_lease_that_expires_while_the_store_is_away_is_taken_again() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--lease-ttl=3s"), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let own = cluster.nodes[0].lease_key()?;
        cluster.etcd()?.kill()?;
        eventually("the lease to be lost", READY, || {
            Ok(cluster.nodes[0].status()?.lease.context("lease")?.state == "lost")
        })?;
        ping(&near.netns, far.address, 5, SECOND).context("the data path stays")?;
        cluster.etcd()?.resume()?;
        let took = eventually("it to be held again", READY, || {
            Ok(cluster.nodes[0].status()?.lease.context("lease")?.state == "held")
        })?;
        report::took("held again after the store was back", took);
        cluster.wait_converged()?;
        assert_eq!(cluster.nodes[0].lease_key()?, own);
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

#[test]
fn a_configuration_that_changes_is_applied_or_named() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let right = KernelView::of(cluster.nodes[0].netns())?;
        let good = cluster.spec.net_config()?;
        let key = format!("{PREFIX}/config");
        let with = |change: &str| good.replacen('{', &format!("{{{change},"), 1);
        /// What is put, and what of the notice: kind and a part of its text.
        type Case<'a> = (Option<String>, Option<(&'a str, &'a str)>);
        let cases: [Case<'_>; 8] = [
            (Some(with(r#""SubnetMin":"10.5.7.0","SubnetMax":"10.5.9.0""#)), None),
            (
                Some(good.replace("10.5.0.0/16", "10.6.0.0/16")),
                Some(("differs", "needs restart of weftd: Network = 10.6.0.0/16, in force: 10.5.0.0/16")),
            ),
            (
                Some(good.replace("vxlan", "host-gw")),
                Some(("differs", "Backend.Type = host-gw, in force: vxlan")),
            ),
            (
                Some(good.replace(r#""VNI":1"#, r#""VNI":7"#).replace("8472", "4789")),
                Some(("differs", "Backend.VNI = 7, in force: 1; Backend.Port = 4789, in force: 8472")),
            ),
            (
                Some(good.replace("10.5.0.0/16", "10.5.0.0/33")),
                Some(("invalid", "Network = \"10.5.0.0/33\"")),
            ),
            (Some("{".into()), Some(("invalid", "not JSON"))),
            (None, Some(("missing", "no network configuration"))),
            (Some(good.clone()), None),
        ];
        for (json, expected) in cases {
            match &json {
                Some(json) => cluster.etcd()?.put_config(json)?,
                None => drop(cluster.etcd()?.ctl(&["del", &key])?),
            }
            for node in &cluster.nodes {
                let took = eventually("the change to be said", READY, || {
                    let notice = node.status()?.network.context("network")?.notice;
                    match (&notice, expected) {
                        (None, None) => Ok(true),
                        (Some(notice), Some((kind, text)))
                            if notice.kind == kind && notice.text.contains(text) =>
                        {
                            Ok(true)
                        }
                        _ => bail!("{notice:?}, expected {expected:?} of {json:?}"),
                    }
                })?;
                report::took(format_args!("{expected:?} said"), took);
            }
            let status = cluster.nodes[0].status()?;
            assert!(status.ready, "{:?}", status.waiting_for);
            assert_eq!(right.difference(&KernelView::of(cluster.nodes[0].netns())?), "", "{json:?}");
        }
        ping(&near.netns, far.address, 5, SECOND)?;

        // The range is that of the moment: a subnet that must be leased anew comes out of it.
        let narrow = with(r#""SubnetMin":"10.5.77.0","SubnetMax":"10.5.78.0""#);
        cluster.etcd()?.put_config(&narrow)?;
        let first =
            || Ok::<_, anyhow::Error>(cluster.nodes[0].status()?.network.context("network")?.subnet_min);
        eventually("the range to be in force", READY, || Ok(first()? == "10.5.77.0".parse().ok()))?;
        let lost = cluster.nodes[0].lease_key()?;
        cluster.etcd()?.put_entry(lost.to_string().as_bytes(), value(Backend::Vxlan, STRANGER).as_bytes())?;
        let new = until_ok("a new subnet", READY, || {
            let key = cluster.nodes[0].lease_key()?;
            ensure!(key != lost, "still {key}");
            Ok(key.to_string())
        })?;
        assert!(["10.5.77.0-24", "10.5.78.0-24"].contains(&new.as_str()), "{new}");
        Ok(())
    })
}
