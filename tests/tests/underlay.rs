//! The underlay changed under a running agent: another address, MTU, name, interface; gone and back. Pods talk again
//! within a second of each, by the kernel's announcements alone and by the sweep alone, and peers follow.

use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, Cluster, MONITOR_ALONE, READY, SWEEP_ALONE, Spec, scenario};
use e2e::kernel::query;
use e2e::node::Node;
use e2e::pod::Pod;
use e2e::promise::{Steps, kept_throughout};
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::underlay::Underlay;
use e2e::wait::{SECOND, eventually};

const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 11);
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 51);
const SECOND_CARD: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 61);

/// One node whose underlay is changed, its pod, and a pod elsewhere.
struct Bench<'a> {
    cluster: &'a Cluster,
    near: &'a Pod,
    far: &'a Pod,
    backend: Backend,
    by: &'static str,
}

impl Bench<'_> {
    fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    fn ip(&self, commands: &[&str]) -> Result<()> {
        commands.iter().try_for_each(|command| self.node().netns().ip(command).map(drop))
    }

    /// Right: both pods reach each other, and the node and its peer both say `address` on `iface` with `mtu`.
    fn right(&self, steps: &mut Steps, what: &str, iface: &str, address: Ipv4Addr, mtu: u64) -> Result<()> {
        let start = Instant::now();
        eventually(&format!("{what}: everything to be right"), READY, || {
            self.state_is(iface, address, mtu)?;
            ping(&self.near.netns, self.far.address, 1, Duration::from_millis(200))?;
            ping(&self.far.netns, self.near.address, 1, Duration::from_millis(200))?;
            Ok(true)
        })?;
        let took = start.elapsed();
        report::took(format_args!("{} by {}: {what}", self.backend.kind(), self.by), took);
        steps.took(what, took);
        Ok(())
    }

    fn state_is(&self, iface: &str, address: Ipv4Addr, mtu: u64) -> Result<()> {
        let status = self.node().status()?;
        ensure!(status.ready, "waits for {:?}", status.waiting_for);
        let underlay = status.underlay.context("underlay")?;
        ensure!(
            (underlay.iface.as_str(), underlay.address) == (iface, address.into())
                && underlay.problem.is_none(),
            "{underlay:?}"
        );
        let key = status.lease.context("lease")?.key;
        let peers = self.cluster.nodes[1].status()?.peers;
        let seen = peers.iter().find(|peer| peer.key == key).context("the peer knows no such lease")?;
        ensure!(seen.public_ip == address && seen.programmed, "the peer has {seen:?}");
        let pod_mtu = if self.backend == Backend::Vxlan { mtu - 50 } else { mtu };
        let env = fs::read_to_string(self.node().agent.subnet_file())?;
        ensure!(env.contains(&format!("FLANNEL_MTU={pod_mtu}\n")), "{env}");
        let devices = if self.backend == Backend::Vxlan { &["cni0", "flannel.1"][..] } else { &["cni0"] };
        for device in devices {
            let link = query(self.node().netns(), &format!("ip -json link show {device}"))?;
            ensure!(link[0]["mtu"] == pod_mtu, "{}", link[0]);
        }
        Ok(())
    }
}

fn followed(backend: Backend, by: &'static str, flags: &[&str], promised: Duration) -> Result<()> {
    kept_throughout(promised, |steps| follow(backend, by, flags, steps))
}

fn follow(backend: Backend, by: &'static str, flags: &[&str], steps: &mut Steps) -> Result<()> {
    scenario(Spec::etcd(2, backend).flags(flags), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let key = cluster.nodes[0].lease_key()?;
        let vtep = || -> Result<Option<String>> {
            let links = query(cluster.nodes[0].netns(), "ip -json link show type vxlan")?;
            Ok(links.first().and_then(|link| link["address"].as_str()).map(str::to_owned))
        };
        let mac = vtep()?;
        let bench = Bench { cluster, near: &near, far: &far, backend, by };
        let default = format!("route add default via {}", Underlay::GATEWAY);

        bench.ip(&[
            &format!("address delete {OWN}/24 dev eth0"),
            &format!("address add {OTHER}/24 dev eth0"),
            &format!("route replace default via {}", Underlay::GATEWAY),
        ])?;
        bench.right(steps, "another address", "eth0", OTHER, 1500)?;
        let status = bench.node().status()?;
        assert_eq!(status.lease.context("lease")?.key, key, "the subnet stays");
        assert_eq!(vtep()?, mac, "and the VTEP's MAC");
        bench.ip(&[
            &format!("address delete {OTHER}/24 dev eth0"),
            &format!("address add {OWN}/24 dev eth0"),
            &format!("route replace default via {}", Underlay::GATEWAY),
        ])?;
        bench.right(steps, "the first address again", "eth0", OWN, 1500)?;

        bench.ip(&["link set eth0 mtu 1400"])?;
        bench.right(steps, "a smaller MTU", "eth0", OWN, 1400)?;
        bench.ip(&["link set eth0 mtu 1500"])?;
        bench.right(steps, "the first MTU again", "eth0", OWN, 1500)?;

        bench.ip(&["link set eth0 down", "link set eth0 name lan0", "link set lan0 up", &default])?;
        bench.right(steps, "renamed", "lan0", OWN, 1500)?;
        bench.ip(&["link set lan0 down", "link set lan0 name eth0", "link set eth0 up", &default])?;
        bench.right(steps, "renamed back", "eth0", OWN, 1500)?;

        bench.ip(&["link set eth0 down"])?;
        let said = eventually("down to be said", READY, || {
            let underlay = bench.node().status()?.underlay.context("underlay")?;
            Ok(underlay.problem.is_some_and(|problem| problem.contains("eth0 is down")))
        })?;
        steps.took("down, said", said);
        bench.ip(&["link set eth0 up", &default])?;
        bench.right(steps, "down and up", "eth0", OWN, 1500)?;
        let port = &bench.node().net.port;
        cluster.underlay.netns.ip(&format!("link set {port} down"))?;
        cluster.underlay.netns.ip(&format!("link set {port} up"))?;
        bench.right(steps, "carrier lost and back", "eth0", OWN, 1500)?;

        bench.ip(&["link delete eth0"])?;
        let said = eventually("the loss to be said", READY, || {
            let waiting = bench.node().status()?.waiting_for.concat();
            if waiting.contains("the underlay: ") { Ok(true) } else { bail!("waits for {waiting:?}") }
        })?;
        steps.took("loss, said", said);
        bench.ip(&["link set cni0 mtu 1280"])?;
        let usual = if backend == Backend::Vxlan { 1450 } else { 1500 };
        let took = eventually("the bridge to be repaired all the same", READY, || {
            Ok(query(bench.node().netns(), "ip -json link show cni0")?[0]["mtu"] == usual)
        })?;
        report::took(format_args!("{} by {by}: bridge repaired without underlay", backend.kind()), took);
        steps.took("bridge repaired without underlay", took);
        cluster.underlay.plug_in(bench.node().netns(), port, OWN)?;
        bench.right(steps, "interface removed and back", "eth0", OWN, 1500)?;
        assert_eq!(vtep()?, mac);

        // Sticky: a default route elsewhere moves nothing as long as the interface has its address.
        cluster.underlay.connect(bench.node().netns(), "n1b", "eth1", SECOND_CARD)?;
        bench.ip(&[&format!("route replace default via {} dev eth1", Underlay::GATEWAY)])?;
        let passes = || Ok::<_, anyhow::Error>(bench.node().status()?.dataplane.context("dataplane")?.passes);
        let seen = passes()?;
        if by == "the sweep" {
            eventually("two passes more", READY, || Ok(passes()? > seen + 2))?;
        }
        bench.state_is("eth0", OWN, 1500)?;
        bench.ip(&[&format!("address delete {OWN}/24 dev eth0")])?;
        bench.right(steps, "moved to the other interface", "eth1", SECOND_CARD, 1500)?;
        assert_eq!(bench.node().lease_key()?, key);
        assert_eq!(bench.node().status()?.pods.attachments, 1);
        Ok(())
    })
}

#[test]
fn the_monitor_follows_the_underlay_by_vxlan() -> Result<()> {
    followed(Backend::Vxlan, "the monitor", &MONITOR_ALONE, SECOND)
}

#[test]
fn the_monitor_follows_the_underlay_by_host_gw() -> Result<()> {
    followed(Backend::HostGw, "the monitor", &MONITOR_ALONE, SECOND)
}

#[test]
fn the_sweep_alone_follows_the_underlay_by_vxlan() -> Result<()> {
    followed(Backend::Vxlan, "the sweep", &SWEEP_ALONE, SECOND * 5)
}

#[test]
fn the_sweep_alone_follows_the_underlay_by_host_gw() -> Result<()> {
    followed(Backend::HostGw, "the sweep", &SWEEP_ALONE, SECOND * 5)
}
