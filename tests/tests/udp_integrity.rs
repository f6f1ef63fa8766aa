//! Whatever the udp backend leaves to the kernel, every byte arrives as it was sent: in each single setting, and on
//! underlays that can do more or less.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Backend, Cluster, Spec, scenario};
use e2e::pod::Pod;
use e2e::report;
use e2e::traffic::checked::checked;
use e2e::traffic::echo::ping;
use e2e::traffic::transfer::transfer;
use e2e::wait::SECOND;
use weft_agent::udp::Offload;

const MIB: u64 = 1 << 20;

/// Datagrams and a TCP stream there, and a few of both back.
fn carried(near: &Pod, far: &Pod, datagrams: u64, bytes: u64) -> Result<()> {
    for (from, to, part) in [(near, far, 1), (far, near, 8)] {
        checked(&from.netns, &to.netns, to.address, datagrams / part)?.is_whole()?;
        let moved = transfer(&from.netns, &to.netns, to.address, bytes / part)?;
        ensure!(moved.sent == moved.received, "{} to {}: {moved:?}", from.name, to.name);
    }
    Ok(())
}

fn outcomes(cluster: &Cluster) -> Result<Vec<(String, String)>> {
    let path = cluster.nodes[0].packet_path()?;
    Ok(path.offloads.into_iter().map(|o| (o.name, o.outcome)).collect())
}

/// Whether TUN devices of this kernel have it: UDP super-packets came with Linux 6.2, reads that need not wait with 6.5.
fn knows(offload: &str) -> Result<bool> {
    let since = match offload {
        "tun-uso" | "coalesce-udp" => (6, 2),
        "tun-nowait" => (6, 5),
        _ => return Ok(true),
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("a kernel of release {release:?}")
    };
    Ok((major, minor) >= since)
}

/// Packets a system call carries: what batching and offloads are for.
fn figures(cluster: &Cluster, what: &str) -> Result<()> {
    let path = cluster.nodes[0].packet_path()?;
    let per_call =
        |traffic: weft_agent::status::TrafficStatus| traffic.packets as f64 / traffic.calls.max(1) as f64;
    let refused: Vec<String> = path
        .offloads
        .iter()
        .filter(|offload| offload.outcome == "refused")
        .map(|offload| format!("{}: {}", offload.name, offload.detail.clone().unwrap_or_default()))
        .collect();
    report::figure(format_args!(
        "{what}: {:.1} packets a call sent, {:.1} received; refused {refused:?}",
        per_call(path.sent),
        per_call(path.received)
    ));
    Ok(())
}

#[test]
fn everything_arrives_as_it_was_sent_with_all_offloads() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        carried(&near, &far, 100_000, 64 * MIB)?;
        figures(cluster, "all offloads")?;
        for node in &cluster.nodes {
            for offload in node.packet_path()?.offloads {
                let wanted = if knows(&offload.name)? { "in-use" } else { "refused" };
                ensure!(offload.outcome == wanted, "on this kernel: {offload:?}, expected {wanted}");
                ensure!(offload.detail.is_some() == (wanted == "refused"), "without a reason: {offload:?}");
            }
        }
        Ok(())
    })
}

#[test]
fn everything_arrives_with_each_offload_off_and_with_none() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        let all = Offload::ALL.map(Offload::name).join(",");
        let singles = Offload::ALL.map(|offload| offload.name().to_owned());
        for off in singles.into_iter().chain([all]) {
            for node in &mut cluster.nodes {
                node.agent.stop()?;
                node.agent.flags.retain(|flag| !flag.starts_with("--udp-offload-off"));
                node.agent.flags.push(format!("--udp-offload-off={off}"));
                node.agent.start()?;
            }
            cluster.wait_converged()?;
            ping(&near.netns, far.address, 5, SECOND).with_context(|| off.clone())?;
            carried(&near, &far, 3_000, 4 * MIB).with_context(|| format!("without {off}"))?;
            figures(cluster, &format!("without {off}"))?;
            for (name, outcome) in outcomes(cluster)? {
                let is_off = off.split(',').any(|off| off == name);
                // The device's four mean nothing without its header.
                let headless = off == "vnet-hdr" && !name.starts_with("udp-");
                ensure!(
                    is_off == (outcome == "switched-off") || headless && outcome != "in-use",
                    "without {off}: {name} is {outcome}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn everything_arrives_on_underlays_that_can_less() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        for (what, features) in [
            ("without segmentation", "tso off gso off tx-udp-segmentation off gro off"),
            ("with generic receive offload alone", "gro on"),
            ("without checksums", "tx off rx off"),
            ("with all it has", "tx on rx on tso on gso on tx-udp-segmentation on gro on"),
        ] {
            for node in &cluster.nodes {
                let mut ethtool = Command::new("ethtool");
                ethtool.args(["-K", "eth0"]).args(features.split_whitespace());
                node.netns().run(&mut ethtool).with_context(|| what.to_owned())?;
            }
            carried(&near, &far, 3_000, 4 * MIB).with_context(|| format!("an underlay {what}"))?;
            figures(cluster, &format!("an underlay {what}"))?;
        }
        Ok(())
    })
}
