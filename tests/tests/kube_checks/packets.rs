//! From pod to pod.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::kernel::query;
use e2e::kube::RunningPod;
use e2e::netns::Netns;
use e2e::traffic::echo::ping;
use e2e::traffic::transfer::transfer;
use e2e::wait::{SECOND, until_ok};

const MIB: u64 = 1 << 20;
/// IPv4 and ICMP (RFC 791, 792).
const HEADERS: u64 = 28;

/// Every pair of pods, on whichever nodes, by packets of every size that may pass and by none that may not.
pub(crate) fn pods_reach_each_other(pods: &[RunningPod], mtu: u64) -> Result<()> {
    for from in pods {
        let link = query(&from.netns, "ip -json link show eth0")?;
        ensure!(link[0]["mtu"] == mtu, "the MTU of {} should be {mtu}: {link:?}", from.name);
        for to in pods.iter().filter(|to| to.name != from.name) {
            ping(&from.netns, to.address, 10, SECOND).with_context(|| format!("{from:?} to {to:?}"))?;
            let size = |size: u64| echo_of(&from.netns, to, size);
            until_ok("an answer to a packet of the MTU", SECOND * 30, || size(mtu))?;
            let error = format!("{:#}", size(mtu + 1).expect_err("one byte more than the MTU"));
            ensure!(error.contains("essage too long"), "{error}");
        }
    }
    Ok(())
}

/// Not to be fragmented (ip(7), `IP_PMTUDISC_DO`).
fn echo_of(from: &Netns, to: &RunningPod, size: u64) -> Result<()> {
    let payload = (size - HEADERS).to_string();
    let mut command = Command::new("sh");
    command.args(["-c", "ping -M do -c 1 -W 5 -s $0 $1 2>&1"]).args([&payload, &to.address.to_string()]);
    let output = from.output(&mut command)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// 100 MiB each way, compared by hash.
pub(crate) fn bulk_arrives_whole(near: &RunningPod, far: &RunningPod) -> Result<()> {
    ensure!(near.node != far.node, "{near:?} and {far:?} are on one node");
    for (from, to) in [(near, far), (far, near)] {
        let moved = transfer(&from.netns, &to.netns, to.address, 100 * MIB)?;
        ensure!(moved.sent == moved.received, "{moved:?}");
    }
    Ok(())
}
