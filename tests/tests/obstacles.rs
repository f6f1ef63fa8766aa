//! What keeps the agent from seeing or doing what it should: announcements lost, operations refused by the kernel, a
//! wire pulled. What fails is named, waits ever longer, holds up nothing else, and goes through when it can.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::kernel::KernelView;
use e2e::node::Node;
use e2e::promise::kept;
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually, let_pass};
use weft_agent::status::{DataplaneStatus, PendingObject};

fn dataplane(node: &Node) -> Result<DataplaneStatus> {
    node.status()?.dataplane.context("no dataplane in status")
}

/// Far more announcements than the monitor's receive buffer holds, while it cannot read.
#[test]
fn lost_announcements_are_counted_and_everything_is_looked_at() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--resync=3600"), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        let node = &cluster.nodes[0];
        let right = KernelView::of(node.netns())?;
        ensure!(dataplane(node)?.monitor_overruns == 0, "an overrun before the flood");
        let flood: String = (0..10_000)
            .map(|n| format!("route add 10.200.{}.{}/32 via 192.168.77.1\n", n / 250, n % 250))
            .chain((0..10_000).map(|n| format!("route delete 10.200.{}.{}/32\n", n / 250, n % 250)))
            .collect();
        let file = cluster.bed.root().join("flood");
        std::fs::write(&file, flood)?;
        let took = kept("monitor's buffer overrun", SECOND, || {
            let begin = node.agent.while_stopped(|| {
                node.netns().ip(&format!("-batch {}", file.display()))?;
                // After the flood: its announcement is among the lost.
                node.netns().ip("link delete flannel.1")?;
                node.netns().ip("link delete cni0")?;
                Ok(Instant::now())
            })?;
            eventually("everything to be right again", READY, || {
                let difference = right.difference(&KernelView::of(node.netns())?);
                if difference.is_empty() { Ok(true) } else { bail!("{difference}") }
            })?;
            Ok(begin.elapsed())
        })?;
        report::took("monitor's buffer overrun", took);
        ensure!(dataplane(node)?.monitor_overruns > 0, "the overrun is not counted");
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

/// The pending operation on the overlay's device.
fn pending_device(node: &Node) -> Result<PendingObject> {
    let pending = dataplane(node)?.pending;
    let device = pending.iter().find(|p| p.object == "link flannel.1");
    device.cloned().with_context(|| format!("no link flannel.1 among the pending {pending:?}"))
}

/// An operator's device with our VNI and port; one of ours in a namespace that is out of reach; our name as another
/// device's alternative name. Each makes the kernel refuse a new device.
#[test]
fn a_refused_device_is_named_waits_and_goes_through_when_the_obstacle_goes() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--resync=1"), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let node = &cluster.nodes[0];
        let away = cluster.bed.netns("away")?;
        let right = KernelView::of(node.netns())?;
        let into = format!("link set flannel.1 netns {}", away.path().display());
        let obstacles: [(&str, &[&str], &str); 3] = [
            (
                "a foreign device of the same VNI",
                &["link delete flannel.1", "link add other1 type vxlan id 1 dev eth0 dstport 8472"],
                "link delete other1",
            ),
            (
                "the name taken as an alternative name",
                &["link delete flannel.1", "link property add dev lo altname flannel.1"],
                "link property del dev lo altname flannel.1",
            ),
            ("the device moved to another namespace", &[&into], "away"),
        ];
        for (what, commands, way_out) in obstacles {
            let first = node.agent.while_stopped(|| {
                commands.iter().try_for_each(|command| node.netns().ip(command).map(drop))?;
                Ok(Instant::now())
            })?;
            let pending = eventually_pending(node, 4).with_context(|| what.to_owned())?;
            ensure!(pending.error.contains("flannel.1 exists: another device"), "{what}: {}", pending.error);
            // Waits of 0.1, 0.2 and 0.4 s lie between the first attempt and the fourth.
            ensure!(
                first.elapsed() > Duration::from_millis(600),
                "{what}: four attempts in {:?}",
                first.elapsed()
            );
            ensure!(!node.status()?.ready, "{what}: a node without its device is not ready");
            // Nothing else waits for it.
            let gateway = node.lease_key()?.v4.gateway();
            node.netns().ip(&format!("address delete {gateway}/24 dev cni0"))?;
            eventually("the gateway to come back meanwhile", READY, || {
                Ok(node.netns().ip("address show dev cni0")?.contains(&format!("{gateway}/24")))
            })?;
            pending_device(node).with_context(|| format!("{what}, after the gateway was mended"))?;
            let gone = Instant::now();
            if way_out == "away" {
                away.ip("link delete flannel.1")?;
            } else {
                node.netns().ip(way_out)?;
            }
            eventually("the device to come back", READY, || {
                let difference = right.difference(&KernelView::of(node.netns())?);
                if difference.is_empty() { Ok(true) } else { bail!("{difference}") }
            })
            .with_context(|| what.to_owned())?;
            report::took(format_args!("{what}, from the obstacle's end"), gone.elapsed());
            eventually("nothing to be pending", READY, || Ok(dataplane(node)?.pending.is_empty()))?;
            ping(&near.netns, far.address, 5, SECOND)?;
        }
        Ok(())
    })
}

fn eventually_pending(node: &Node, attempts: u32) -> Result<PendingObject> {
    e2e::wait::until_ok("the refusal to be in status", READY, || {
        let pending = pending_device(node)?;
        ensure!(pending.attempts >= attempts, "{pending:?}");
        Ok(pending)
    })
}

/// The kernel keeps addresses and routes of a link without carrier; the agent must not do otherwise.
fn wire_pulled(backend: Backend) -> Result<()> {
    scenario(Spec::etcd(2, backend).flag("--resync=1"), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let (node, switch) = (&cluster.nodes[0], &cluster.underlay.netns);
        let right = KernelView::of(node.netns())?;
        let passes = dataplane(node)?.passes;
        switch.ip(&format!("link set {} down", node.net.port))?;
        ensure!(
            ping(&near.netns, far.address, 1, Duration::from_millis(200)).is_err(),
            "no wire, and an answer"
        );
        eventually("passes without a carrier", READY, || Ok(dataplane(node)?.passes > passes + 3))?;
        ensure!(right.difference(&KernelView::of(node.netns())?).is_empty(), "something was taken away");
        switch.ip(&format!("link set {} up", node.net.port))?;
        let begin = Instant::now();
        eventually("packets to pass again", READY, || {
            ping(&near.netns, far.address, 1, Duration::from_millis(200))?;
            Ok(true)
        })?;
        report::took(format_args!("{} wire pulled and put back", backend.kind()), begin.elapsed());
        ensure!(right.difference(&KernelView::of(node.netns())?).is_empty(), "something is not as it was");
        Ok(())
    })
}

#[test]
fn a_wire_pulled_changes_nothing_by_vxlan() -> Result<()> {
    wire_pulled(Backend::Vxlan)
}

#[test]
fn a_wire_pulled_changes_nothing_by_host_gw() -> Result<()> {
    wire_pulled(Backend::HostGw)
}

/// A hand that is quicker than ours: the pass gives up and says so, and the last word is ours once it rests.
#[test]
fn a_hand_that_never_rests_is_named() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let right = KernelView::of(node.netns())?;
        let rest = std::sync::atomic::AtomicBool::new(false);
        let named = std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !rest.load(std::sync::atomic::Ordering::Relaxed) {
                        let _ = node.netns().ip("link set flannel.1 mtu 1300");
                        let_pass(Duration::from_micros(200));
                    }
                });
            }
            let named = eventually("the contest to be in status", READY, || {
                let pending = pending_device(node)?;
                Ok(pending.error.contains("somebody else changes it"))
            });
            rest.store(true, std::sync::atomic::Ordering::Relaxed);
            named
        });
        named?;
        eventually("the last word", READY, || Ok(KernelView::of(node.netns())? == right))?;
        eventually("nothing to be pending", READY, || Ok(dataplane(node)?.pending.is_empty()))?;
        Ok(())
    })
}
