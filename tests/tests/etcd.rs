//! An etcd that operators run for production, and what happens to it: certificates, a login, three members, a leader that
//! dies, a quorum that is lost, a member that is cut off, a store that is restored from a snapshot.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, Cluster, EtcdKind, READY, Spec, scenario, scenario_prepared};
use e2e::kernel::KernelView;
use e2e::monitor::Monitor;
use e2e::report;
use e2e::traffic::datagrams::{Stream, nothing_missing};
use e2e::traffic::echo::ping;
use e2e::underlay::NodeNumber;
use e2e::wait::{SECOND, eventually};

fn lease_of(cluster: &Cluster, node: usize) -> Result<(String, String)> {
    let lease = cluster.nodes[node].status()?.lease.context("a lease")?;
    Ok((lease.key.to_string(), lease.state))
}

/// Certificates on both sides and a login with the least rights; then the leader dies, and a node joins all the same.
#[test]
fn three_members_with_certificates_and_a_login_lose_their_leader() -> Result<()> {
    let spec = Spec::etcd(2, Backend::Vxlan).on(EtcdKind::ThreeSecured).flag("--lease-ttl=8s");
    scenario(spec, |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let streams = [
            Stream::start(&near.netns, &far.netns, far.address, 200)?,
            Stream::start(&far.netns, &near.netns, near.address, 200)?,
        ];
        let before = (lease_of(cluster, 0)?, lease_of(cluster, 1)?);
        let etcd = cluster.etcd()?;
        let leader = etcd.leader()?;
        etcd.members[leader].kill()?;
        let since = Instant::now();
        // Acquired, renewed and watched through the members that are left.
        let third = cluster.add_node(NodeNumber(3))?;
        third.agent.start()?;
        cluster.wait_converged()?;
        report::took("leader killed: a new node is everybody's peer", since.elapsed());
        let renewed = |cluster: &Cluster, node: usize| -> Result<u64> {
            cluster.nodes[node].status()?.lease.context("a lease")?.expires_in.context("it expires")
        };
        for node in 0..2 {
            eventually("a renewal without the leader", READY, || Ok(renewed(cluster, node)? >= 6))?;
        }
        cluster.etcd()?.resume()?;
        assert_eq!(before, (lease_of(cluster, 0)?, lease_of(cluster, 1)?));
        nothing_missing(streams)
    })
}

/// Each mistake is named by what etcd or TLS says of it and by the setting to look at.
#[test]
fn wrong_certificates_logins_and_rights_are_named() -> Result<()> {
    scenario_prepared(Spec::etcd(1, Backend::HostGw).on(EtcdKind::ThreeSecured), |cluster| {
        cluster.put_config()?;
        let etcd = cluster.etcd()?;
        for args in [
            &["user", "add", "reader:secret"][..],
            &["role", "add", "reader"],
            &["role", "grant-permission", "reader", "read", "/coreos.com/network/config"],
            &["user", "grant-role", "reader", "reader"],
            &["user", "add", "nobody:secret"],
        ] {
            etcd.ctl(args)?;
        }
        let good = etcd.agent_flags();
        let endpoint = etcd.endpoint();
        let file = |name: &str| etcd.security.file(name);
        let (stranger_ca, stranger) = (
            format!("--etcd-cafile={}", file("stranger.crt")),
            [
                format!("--etcd-certfile={}", file("nobody.crt")),
                format!("--etcd-keyfile={}", file("nobody.key")),
            ],
        );
        let node = &mut cluster.nodes[0];
        // The last one given counts.
        let with = |extra: &[String]| [&good[..], extra].concat();
        let without = |name: &str| good.iter().filter(|f| !f.contains(name)).cloned().collect::<Vec<_>>();
        let user = |name: &str| with(&[format!("--etcd-username={name}")]);
        let no_login: Vec<String> =
            good.iter().filter(|f| !f.contains("username") && !f.contains("password")).cloned().collect();
        let no_cert: Vec<String> =
            good.iter().filter(|f| !f.contains("certfile") && !f.contains("keyfile")).cloned().collect();
        let plain = without("-etcd-")
            .into_iter()
            .chain([format!("--etcd-endpoints={}", endpoint.replace("https", "http"))]);
        let denied = "permission denied: expected a role that may read /coreos.com/network/config and read and write \
                      keys that begin with /coreos.com/network/subnets/";
        for (what, flags, expected) in [
            (
                "password",
                with(&["--etcd-password=wrong".to_owned()]),
                &["authentication failed", "--etcd-password"][..],
            ),
            // etcd then takes the name in the certificate for the user's.
            ("no login", no_login, &[denied]),
            ("no rights", user("nobody"), &[denied]),
            ("rights to read the configuration only", user("reader"), &[denied]),
            ("CA", with(&[stranger_ca]), &["UnknownIssuer", "--etcd-cafile"]),
            ("client certificate", with(&stranger), &["--etcd-certfile"]),
            ("no client certificate", no_cert, &["--etcd-certfile"]),
            ("no TLS", plain.collect(), &["does not answer"]),
        ] {
            node.agent.flags = flags;
            node.agent.start()?;
            let said = |status: &weft_agent::status::Status| {
                let lease = status.lease.as_ref().and_then(|lease| lease.problem.clone());
                [status.store.problem.clone(), lease, Some(status.waiting_for.concat())]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join("\n")
            };
            eventually(&format!("status to name: {what}"), READY, || {
                let status = node.status()?;
                let text = said(&status);
                ensure!(!status.ready && expected.iter().all(|e| text.contains(e)), "it says {text}");
                ensure!(!text.contains("wrong"), "a password is shown: {text}");
                report::figure(format_args!("{what}: {text}"));
                Ok(true)
            })?;
            node.agent.kill()?;
        }
        // And all is well with the right ones.
        node.agent.flags = good;
        node.agent.start()?;
        node.agent.wait_ready(READY)
    })
}

#[test]
fn rights_that_change_under_a_running_agent_are_said_and_mended() -> Result<()> {
    let spec = Spec::etcd(1, Backend::HostGw).on(EtcdKind::ThreeSecured).flag("--lease-ttl=4s");
    scenario(spec, |cluster| {
        let subnet = lease_of(cluster, 0)?.0;
        let permission = ["weft", "--prefix", "/coreos.com/network/subnets/"];
        cluster.etcd()?.ctl(&[&["role", "revoke-permission"][..], &permission].concat())?;
        eventually("the refusal to be named", READY, || {
            let lease = cluster.nodes[0].status()?.lease.context("a lease")?;
            ensure!(lease.problem.as_ref().is_some_and(|p| p.contains("permission denied")), "{lease:?}");
            Ok(true)
        })?;
        let grant = ["role", "grant-permission", "weft", "readwrite", "--prefix", permission[2]];
        cluster.etcd()?.ctl(&grant)?;
        let took = eventually("the lease to be held again", READY, || {
            let lease = cluster.nodes[0].status()?.lease.context("a lease")?;
            Ok(lease.state == "held" && lease.problem.is_none())
        })?;
        report::took("rights given back: held again", took);
        assert_eq!(lease_of(cluster, 0)?.0, subnet);
        cluster.nodes[0].agent.wait_ready(READY)
    })
}

#[test]
fn a_quorum_lost_for_longer_than_the_lease_costs_no_packet() -> Result<()> {
    let spec = Spec::etcd(2, Backend::Vxlan).on(EtcdKind::Three).flag("--lease-ttl=4s");
    scenario(spec, |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let streams = [
            Stream::start(&near.netns, &far.netns, far.address, 200)?,
            Stream::start(&far.netns, &near.netns, near.address, 200)?,
        ];
        let before = (lease_of(cluster, 0)?, lease_of(cluster, 1)?);
        let kernel = KernelView::of(cluster.nodes[0].netns())?;
        for member in &mut cluster.etcd()?.members[..2] {
            member.kill()?;
        }
        // Longer than a renewal.
        eventually("a renewal to fail", READY, || {
            Ok(cluster.nodes[0].status()?.lease.context("a lease")?.problem.is_some())
        })?;
        // Longer than the lease.
        for node in 0..2 {
            eventually("the lease to be over", READY, || Ok(lease_of(cluster, node)?.1 == "lost"))?;
        }
        // A member that is left without a leader ends its watches when it has noticed, not when the lease is over.
        eventually("the store to count as away", READY, || {
            let store = cluster.nodes[0].status()?.store;
            ensure!(!store.connected && store.problem.is_some(), "{store:?}");
            Ok(true)
        })?;
        assert_eq!(kernel.difference(&KernelView::of(cluster.nodes[0].netns())?), "");

        cluster.etcd()?.resume()?;
        let took = eventually("both leases to be held again", READY, || {
            Ok((lease_of(cluster, 0)?, lease_of(cluster, 1)?) == before)
        })?;
        report::took("quorum back: leases held again", took);
        cluster.wait_converged()?;
        assert_eq!(kernel.difference(&KernelView::of(cluster.nodes[0].netns())?), "");
        nothing_missing(streams)
    })
}

/// The member that the agent of a node talks to, by its open connections.
fn member_of(cluster: &mut Cluster, node: usize) -> Result<usize> {
    let sockets = cluster.nodes[node].netns().run(Command::new("ss").args([
        "-tnH",
        "state",
        "established",
        "dport",
        "=",
        ":2379",
    ]))?;
    let members = &cluster.etcd()?.members;
    let found: Vec<usize> =
        (0..members.len()).filter(|m| sockets.contains(&format!("{}:2379", members[*m].address))).collect();
    match found[..] {
        [member] => Ok(member),
        _ => bail!("connections to members {found:?}: {sockets}"),
    }
}

/// It still answers, from what it knew when it was cut off.
#[test]
fn an_agent_leaves_a_member_that_is_cut_off_from_the_others() -> Result<()> {
    scenario(Spec::etcd(2, Backend::HostGw).on(EtcdKind::Three), |cluster| {
        let value = |ip: &str| format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"host-gw"}}"#);
        let mut member = 0;
        eventually("one connection to be left of the race", READY, || {
            member = member_of(cluster, 0)?;
            Ok(true)
        })?;
        let others: Vec<String> = {
            let etcd = cluster.etcd()?;
            etcd.members[member].isolate()?;
            let others = etcd.members.iter().enumerate().filter(|(index, _)| *index != member);
            others.map(|(_, m)| m.client_url(&etcd.security)).collect()
        };
        let cut_off = Instant::now();
        let path = "/coreos.com/network/subnets/10.5.200.0-24";
        eventually("the others to take a write", READY, || {
            cluster.etcd()?.ctl_at(&others.join(","), &["put", path, &value("192.168.77.200")])?;
            Ok(true)
        })?;
        // Proof that it would serve stale reads.
        let stale = {
            let etcd = cluster.etcd()?;
            let url = etcd.members[member].client_url(&etcd.security);
            etcd.ctl_at(
                &url,
                &["get", "--consistency=s", "/coreos.com/network/subnets/", "--prefix", "--keys-only"],
            )?
        };
        assert!(stale.contains("/subnets/") && !stale.contains(path), "{stale}");
        eventually("the agent to learn what the others know", READY, || {
            let peers = cluster.nodes[0].status()?.peers;
            Ok(peers.iter().any(|p| p.key.to_string() == "10.5.200.0-24"))
        })?;
        report::took("member cut off: its agent knows what the others know", cut_off.elapsed());
        eventually("another member to be talked to", READY, || Ok(member_of(cluster, 0)? != member))?;
        assert!(cluster.nodes[0].status()?.store.connected);
        cluster.etcd()?.members[member].rejoin()
    })
}

/// The store forgets a node that joined after the snapshot was taken; nobody else does.
#[test]
fn a_store_restored_from_an_older_snapshot_takes_no_peer_away() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let file = cluster.bed.root().join("saved");
        cluster.etcd()?.save(&file)?;
        let third = cluster.add_node(NodeNumber(3))?;
        third.agent.start()?;
        cluster.wait_converged()?;
        let (near, far) = (cluster.nodes[0].pod("a")?, cluster.nodes[2].pod("a")?);
        ping(&near.netns, far.address, 5, SECOND)?;
        let before = (lease_of(cluster, 2)?, KernelView::of(cluster.nodes[0].netns())?);
        for token in [None, Some("another")] {
            let relists = cluster.nodes[0].status()?.store.relists;
            let monitors = [
                Monitor::start(cluster.nodes[0].netns(), "ip")?,
                Monitor::start(cluster.nodes[0].netns(), "bridge")?,
            ];
            let streams = [
                Stream::start(&near.netns, &far.netns, far.address, 200)?,
                Stream::start(&far.netns, &near.netns, near.address, 200)?,
            ];
            cluster.etcd()?.restore(&file, token)?;
            let took = eventually("the forgotten node to be back in the store", READY, || {
                Ok(cluster.etcd()?.lease_keys()?.contains(&before.0.0)
                    && cluster.nodes[0].status()?.store.relists > relists)
            })?;
            report::took(format_args!("store restored, token {token:?}: everybody is back in it"), took);
            cluster.wait_converged()?;
            assert_eq!(lease_of(cluster, 2)?, before.0);
            assert_eq!(before.1.difference(&KernelView::of(cluster.nodes[0].netns())?), "");
            for monitor in monitors {
                let events = monitor.events(cluster.nodes[0].netns())?;
                assert_eq!(events, Vec::<String>::new(), "nothing was touched meanwhile");
            }
            nothing_missing(streams)?;
        }
        Ok(())
    })
}
