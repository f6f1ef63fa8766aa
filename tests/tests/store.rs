//! What others put into the store, and how they leave it: malformed entries of every kind, leases that two claim, peers
//! that depart by hand and by expiry.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, Cluster, READY, Spec, StoreKind, scenario, scenario_prepared};
use e2e::kernel::KernelView;
use e2e::node::Node;
use e2e::promise::kept;
use e2e::report;
use e2e::traffic::datagrams::{Stream, nothing_missing};
use e2e::traffic::echo::ping;
use e2e::underlay::NodeNumber;
use e2e::wait::{SECOND, eventually};
use weft_agent::status::RefusedLease;

/// Enough for one renewal by a busy machine, and short enough to wait for its end.
const TTL: &str = "--lease-ttl=6s";
const GRACE: Duration = Duration::from_secs(10);

fn holds(node: &Node, subnet: IpAddr) -> Result<bool> {
    Ok(KernelView::of(node.netns())?.holds(subnet))
}

fn remove_by_hand(cluster: &mut Cluster, key: &str) -> Result<()> {
    if let Some(etcd) = &cluster.etcd {
        return etcd.delete_lease(key);
    }
    let database = rusqlite::Connection::open(cluster.store_file())?;
    database.busy_timeout(READY)?;
    let removed = database.execute("DELETE FROM leases WHERE key = ?1", [key])?;
    ensure!(removed == 1, "no lease {key}");
    Ok(())
}

fn departures(store: StoreKind) -> Result<()> {
    let spec = match store {
        StoreKind::Etcd => Spec::etcd(3, Backend::Vxlan),
        StoreKind::Embedded => Spec::embedded(3, Backend::Vxlan),
    };
    scenario(spec.flag(TTL).flag(&format!("--expired-peer-grace={}s", GRACE.as_secs())), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let network = cluster.nodes[1].lease_key()?.v4.addr();
        let by_hand = cluster.nodes[2].lease_key()?;
        let stream = Stream::start(&near.netns, &far.netns, far.address, 200)?;

        // By expiry: its agent is gone, its pods are not.
        cluster.nodes[1].agent.kill()?;
        let expired = |cluster: &Cluster| -> Result<bool> {
            let peers = cluster.nodes[0].status()?.peers;
            let peer = peers.iter().find(|p| p.key.v4.addr() == network);
            Ok(peer
                .with_context(|| format!("{network} is no peer any more: {peers:?}"))?
                .grace_left
                .is_some())
        };
        let mut alive = Instant::now();
        eventually("the lease to expire", READY, || {
            let look = Instant::now();
            let expired = expired(cluster)?;
            alive = if expired { alive } else { look };
            Ok(expired)
        })?;
        let agent = &cluster.nodes[0].agent;
        assert!(agent.ctl(&["peers"])?.contains("programmed; expired, "), "{}", agent.ctl(&["peers"])?);
        assert_eq!(agent.metric("weft_peers_expired")?, 1.0);
        assert!(holds(&cluster.nodes[0], network)?, "its entries stay");
        ping(&near.netns, far.address, 5, SECOND).context("pods of an expired peer")?;
        nothing_missing([stream]).context("to an expired peer")?;
        eventually("the grace to end", READY, || {
            Ok(!holds(&cluster.nodes[0], network)? && cluster.nodes[0].status()?.peers.len() == 1)
        })?;
        assert!(alive.elapsed() >= GRACE, "gone {:?} after it was last seen alive", alive.elapsed());

        // It comes back, and expires again; and is back before the grace ends.
        cluster.nodes[1].agent.restart(READY)?;
        cluster.nodes[0].wait_peers(2, READY)?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let before = KernelView::of(cluster.nodes[0].netns())?;
        cluster.nodes[1].agent.kill()?;
        eventually("the lease to expire again", READY, || expired(cluster))?;
        cluster.nodes[1].agent.start()?;
        eventually("the peer to be alive again", READY, || Ok(!expired(cluster)?))?;
        assert_eq!(before.difference(&KernelView::of(cluster.nodes[0].netns())?), "");

        // By hand: not as slowly as by expiry.
        let took = kept("removed by hand, gone", GRACE / 2, || {
            if !cluster.nodes[2].agent.is_running() {
                cluster.nodes[2].agent.restart(READY)?;
                cluster.nodes[0].wait_peers(2, READY)?;
            }
            cluster.nodes[2].agent.kill()?;
            assert!(holds(&cluster.nodes[0], by_hand.v4.addr())?);
            remove_by_hand(cluster, &by_hand.to_string())?;
            eventually("the entries of a lease removed by hand to go", READY, || {
                Ok(!holds(&cluster.nodes[0], by_hand.v4.addr())?)
            })
        })?;
        report::took(format_args!("{} store: removed by hand, gone", store.kind()), took);
        Ok(())
    })
}

#[test]
fn a_peer_departs_by_hand_or_by_expiry_from_etcd() -> Result<()> {
    departures(StoreKind::Etcd)
}

#[test]
fn a_peer_departs_by_hand_or_by_expiry_from_an_embedded_store() -> Result<()> {
    departures(StoreKind::Embedded)
}

/// Entries that are no lease that anybody could use.
fn malformed() -> Vec<(Vec<u8>, Vec<u8>)> {
    const GOOD: &str = r#"{"PublicIP":"192.168.77.240","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"06:00:00:00:00:f0"}}"#;
    let ip = |ip: &str| GOOD.replace("192.168.77.240", ip);
    let data = |data: &str| format!(r#"{{"PublicIP":"192.168.77.241","BackendType":"vxlan"{data}}}"#);
    let text = [
        // Keys that are none, or are spelt otherwise.
        ("no-lease", GOOD.to_owned()),
        ("10.5.200.0-24/lock", GOOD.to_owned()),
        ("10.5.200.0", GOOD.to_owned()),
        ("10.5.200.0-32", GOOD.to_owned()),
        ("10.5.201.7-24", GOOD.to_owned()),
        ("10.5.202.0-024", GOOD.to_owned()),
        // Values that cannot be read.
        ("10.5.203.0-24", String::new()),
        ("10.5.204.0-24", "not json".to_owned()),
        ("10.5.205.0-24", "[]".to_owned()),
        ("10.5.206.0-24", "{}".to_owned()),
        ("10.5.207.0-24", r#"{"PublicIP":7}"#.to_owned()),
        ("10.5.208.0-24", r#"{"PublicIP":"192.168.77.241","BackendType":{}}"#.to_owned()),
        ("10.5.209.0-24", format!("{GOOD}{}", "x".repeat(100_000))),
        // Subnets that nobody leases.
        ("0.0.0.0-0", GOOD.to_owned()),
        ("10.6.1.0-24", GOOD.to_owned()),
        ("10.5.210.0-25", GOOD.to_owned()),
        // Addresses that nobody has.
        ("10.5.211.0-24", ip("0.0.0.0")),
        ("10.5.212.0-24", ip("127.0.0.1")),
        ("10.5.213.0-24", ip("224.0.0.1")),
        ("10.5.214.0-24", ip("255.255.255.255")),
        ("10.5.215.0-24", ip("10.5.215.9")),
        ("10.5.216.0-24", ip("10.5.1.9")),
        // What the dataplane cannot use.
        ("10.5.223.0-24", ip("192.168.77.255")),
        ("10.5.217.0-24", data("")),
        ("10.5.218.0-24", data(r#","BackendData":"x""#)),
        ("10.5.219.0-24", data(r#","BackendData":{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#)),
        ("10.5.220.0-24", data(r#","BackendData":{"VNI":9,"VtepMAC":"06:00:00:00:00:f1"}"#)),
        ("10.5.221.0-24", r#"{"PublicIP":"192.168.77.242","PublicIPv6":null}"#.to_owned()),
    ];
    let mut all: Vec<_> = text.into_iter().map(|(k, v)| (k.as_bytes().to_vec(), v.into_bytes())).collect();
    all.push((b"\xff\xfe".to_vec(), GOOD.as_bytes().to_vec()));
    all.push((b"10.5.222.0-24".to_vec(), b"\xff\xfe".to_vec()));
    all
}

/// Names under which the node's status tells of entries that it does not use.
fn named(node: &Node) -> Result<BTreeSet<String>> {
    let status = node.status()?;
    let unserved = status.peers.into_iter().filter(|p| p.problem.is_some()).map(|p| p.key.to_string());
    Ok(status.refused.into_iter().map(|refused| refused.key).chain(unserved).collect())
}

#[test]
fn malformed_entries_of_every_kind_are_named_and_disturb_nobody() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let before = KernelView::of(cluster.nodes[0].netns())?;
        let streams = [
            Stream::start(&near.netns, &far.netns, far.address, 500)?,
            Stream::start(&far.netns, &near.netns, near.address, 500)?,
        ];
        let entries = malformed();
        for (key, value) in &entries {
            cluster.etcd()?.put_entry(key, value)?;
        }
        let expected: BTreeSet<String> = entries
            .iter()
            .map(|(key, _)| String::from_utf8(key.clone()).unwrap_or_else(|_| key.escape_ascii().to_string()))
            .collect();
        for node in &cluster.nodes {
            let took = eventually("every entry to be named", READY, || {
                let named = named(node)?;
                let (missing, added) = (&expected - &named, &named - &expected);
                ensure!(missing.is_empty() && added.is_empty(), "not named {missing:?}, wrongly {added:?}");
                Ok(true)
            })?;
            report::took(format_args!("{}: all {} named", node.name(), expected.len()), took);
            let counted = node.agent.metric("weft_leases_refused")?
                + (node.agent.metric("weft_peers")? - node.agent.metric("weft_peers_programmed")?);
            assert_eq!(counted, expected.len() as f64, "counted on {}", node.name());
            assert!(node.status()?.refused.iter().all(|r| r.reason.len() < 500), "fit for people");
        }
        assert_eq!(before.difference(&KernelView::of(cluster.nodes[0].netns())?), "");

        // Who reads all of it at once gets a subnet of its own, and its peers.
        let third = cluster.add_node(NodeNumber(3))?;
        third.agent.start()?;
        third.agent.wait_ready(READY)?;
        let pod = third.pod("a")?;
        ping(&near.netns, pod.address, 5, SECOND)?;
        eventually("every entry to be named by the third", READY, || {
            let named = named(&cluster.nodes[2])?;
            ensure!(named == expected, "named {named:?}");
            Ok(true)
        })?;

        for (key, _) in &entries {
            cluster.etcd()?.delete_entry(key)?;
        }
        for node in &cluster.nodes {
            eventually("the status to be clear", READY, || {
                let named = named(node)?;
                ensure!(named.is_empty(), "{named:?}");
                Ok(true)
            })?;
            assert_eq!(node.agent.metric("weft_leases_refused")?, 0.0);
        }
        nothing_missing(streams)
    })
}

/// Every lease that the node uses, its own among them; and those that it does not, with the reason.
type Verdict = (BTreeSet<String>, Vec<RefusedLease>);

fn verdict(node: &Node) -> Result<Verdict> {
    let status = node.status()?;
    let own = status.lease.context("a lease")?;
    ensure!(own.state == "held", "{own:?}");
    let used = |key: String, ip: std::net::IpAddr| format!("{key} {ip}");
    let mut all: BTreeSet<String> =
        status.peers.into_iter().map(|p| used(p.key.to_string(), p.public_ip)).collect();
    all.insert(used(own.key.to_string(), own.public_ip));
    Ok((all, status.refused))
}

/// Waits until all nodes judge alike and `as_expected`.
fn agree(cluster: &Cluster, what: &str, as_expected: impl Fn(&Verdict) -> bool) -> Result<Verdict> {
    let mut agreed = None;
    eventually(what, READY, || {
        let verdicts = cluster.nodes.iter().map(verdict).collect::<Result<Vec<_>>>()?;
        let first = verdicts.first().context("nodes")?;
        ensure!(verdicts.iter().all(|v| v == first), "they differ: {verdicts:#?}");
        ensure!(as_expected(first), "{first:#?}");
        agreed = Some(first.clone());
        Ok(true)
    })?;
    agreed.context("agreed")
}

#[test]
fn of_leases_that_claim_the_same_the_elder_is_used_by_every_node() -> Result<()> {
    scenario(Spec::etcd(3, Backend::HostGw), |cluster| {
        let value = |ip: &str| format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"host-gw"}}"#);
        let own = cluster.nodes[0].lease_key()?;
        let own_ip = cluster.nodes[0].net.address.to_string();
        let before = agree(cluster, "three nodes", |(used, refused)| used.len() == 3 && refused.is_empty())?;
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let stream = Stream::start(&far.netns, &near.netns, near.address, 200)?;

        let put = |cluster: &mut Cluster, key: &str, ip: &str| -> Result<()> {
            cluster.etcd()?.put_entry(key.as_bytes(), value(ip).as_bytes())
        };
        // One subnet twice, the younger with another IPv6 half; in the order of keys the younger comes first.
        put(cluster, "10.5.200.0-24&fd00:0:0:2::-64", "192.168.77.201")?;
        put(cluster, "10.5.200.0-24", "192.168.77.202")?;
        // A node's own subnet, and a node's own address.
        put(cluster, &format!("{own}&fd00:0:0:1::-64"), "192.168.77.203")?;
        put(cluster, "10.5.201.0-24", &own_ip)?;
        // One address twice.
        put(cluster, "10.5.203.0-24", "192.168.77.204")?;
        put(cluster, "10.5.202.0-24", "192.168.77.204")?;
        let verdict = agree(cluster, "the same verdict everywhere", |(_, refused)| refused.len() == 4)?;
        let added: Vec<&String> = verdict.0.difference(&before.0).collect();
        assert_eq!(added, ["10.5.200.0-24 192.168.77.201", "10.5.203.0-24 192.168.77.204"]);
        assert!(before.0.is_subset(&verdict.0), "the nodes' own are the elder: {verdict:#?}");
        let refused: Vec<&str> = verdict.1.iter().map(|r| r.key.as_str()).collect();
        let mut expected =
            ["10.5.200.0-24", &format!("{own}&fd00:0:0:1::-64"), "10.5.201.0-24", "10.5.202.0-24"];
        expected.sort_unstable();
        assert_eq!(refused, expected);

        // The elder goes by hand: whoever comes next is used, by all.
        cluster.etcd()?.delete_lease("10.5.203.0-24")?;
        agree(cluster, "the younger to have its turn", |(used, refused)| {
            refused.len() == 3 && used.contains("10.5.202.0-24 192.168.77.204")
        })?;
        // Who starts now judges the same.
        cluster.nodes[2].agent.kill()?;
        cluster.nodes[2].agent.restart(READY)?;
        agree(cluster, "the same verdict after a restart", |(_, refused)| refused.len() == 3)?;
        nothing_missing([stream])
    })
}

#[test]
fn two_agents_with_one_public_ip_say_so_and_leave_the_others_alone() -> Result<()> {
    scenario_prepared(Spec::etcd(3, Backend::Vxlan), |cluster| {
        cluster.put_config()?;
        let twin = cluster.nodes[1].net.address;
        cluster.nodes[2].agent.flags.push(format!("--public-ip={twin}"));
        cluster.nodes[2].agent.flags.push("--iface=eth0".to_owned());
        for node in &mut cluster.nodes {
            node.agent.start()?;
        }
        let rival = format!("another node publishes this node's public IP {twin}");
        for node in &cluster.nodes[1..] {
            eventually("the rival to be named", READY, || {
                let lease = node.status()?.lease.context("no lease yet")?;
                ensure!(lease.problem.as_ref().is_some_and(|p| p.contains(&rival)), "{lease:?}");
                Ok(true)
            })?;
        }
        // To the others it is one node, whoever wrote last.
        cluster.nodes[0].agent.wait_ready(READY)?;
        cluster.nodes[0].wait_peers(1, READY)?;
        assert_eq!(cluster.etcd()?.lease_keys()?.len(), 2);

        // Told its own address, it is a node of its own.
        let agent = &mut cluster.nodes[2].agent;
        agent.flags.truncate(agent.flags.len() - 2);
        agent.kill()?;
        agent.start()?;
        cluster.wait_converged()?;
        let pods = cluster.nodes.iter().map(|node| node.pod("a")).collect::<Result<Vec<_>>>()?;
        for to in &pods[1..] {
            ping(&pods[0].netns, to.address, 5, SECOND)?;
        }
        ping(&pods[1].netns, pods[2].address, 5, SECOND)?;
        if cluster.etcd()?.lease_keys()?.len() != 3 {
            bail!("three nodes, three leases");
        }
        Ok(())
    })
}
