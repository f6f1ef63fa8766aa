//! Limits of pods' bandwidth: by amount over time, with wide margins, kept against foreign hands, gone with the pod.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::books::invariant;
use e2e::cluster::{Backend, MONITOR_ALONE, READY, Spec, scenario};
use e2e::firewall::sh;
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::{Pod, Sandbox};
use e2e::promise::kept;
use e2e::report;
use e2e::traffic::transfer::transfer;
use e2e::wait::{SECOND, eventually};
use serde_json::{Value, json};
use weft_shared::names::egress_ifname;

const BAD_CONFIGURATION: u64 = 7;

/// A megabyte a second, after 64 KiB.
const RATE: u64 = 8_000_000;
const BURST: u64 = 8 * 65_536;
/// A second and a half of it, and more than socket buffers hold.
const AMOUNT: u64 = 1_500_000;

fn sandbox(node: &Node, name: &str, bandwidth: &Value) -> Result<Sandbox> {
    let mut sandbox = Sandbox::create(node, name)?;
    sandbox.call.config["capabilities"] = json!({ "bandwidth": true });
    sandbox.call.config["runtimeConfig"] = json!({ "bandwidth": bandwidth });
    Ok(sandbox)
}

fn ingress() -> Value {
    json!({ "ingressRate": RATE, "ingressBurst": BURST })
}

/// As containerd writes it.
fn egress() -> Value {
    json!({ "IngressRate": 0, "IngressBurst": 0, "EgressRate": RATE, "EgressBurst": BURST })
}

fn takes(from: &Netns, to: &Pod) -> Result<Duration> {
    let start = Instant::now();
    let sent = transfer(from, &to.netns, to.address, AMOUNT)?;
    ensure!(sent.sent == sent.received);
    Ok(start.elapsed())
}

/// Queues and filters of a node, without what counts.
fn queues(node: &Node) -> Result<String> {
    sh(
        node.netns(),
        "tc qdisc show
         for dev in $(ip -o link | cut -d: -f2 | cut -d@ -f1); do tc filter show dev $dev ingress 2>/dev/null || true; done
         ip -o link show type ifb | cut -d: -f2",
    )
}

fn veth(pod: &Pod) -> Result<String> {
    Ok(pod.host_veth()?.to_string())
}

fn ifb(pod: &Pod) -> Result<String> {
    Ok(egress_ifname(&pod.host_veth()?).context("a name")?.to_string())
}

#[test]
fn each_direction_is_as_fast_as_it_was_asked_to_be() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let far = cluster.nodes[1].pod("far")?;
        let slow_to = sandbox(node, "slow-to", &ingress())?.wire()?;
        let slow_from = sandbox(node, "slow-from", &egress())?.wire()?;
        // All at once: what one is held back by is nobody else's.
        let both: Vec<(&str, bool, Duration)> = thread::scope(|scope| {
            let jobs = [
                ("to a pod that is limited so", true, &far.netns, &slow_to),
                ("from a pod that is limited so", true, &slow_from.netns, &far),
                ("from a pod that is limited the other way", false, &slow_to.netns, &far),
                ("to a pod that is limited the other way", false, &far.netns, &slow_from),
            ];
            let started: Vec<_> = jobs
                .into_iter()
                .map(|(what, limited, from, to)| scope.spawn(move || Ok((what, limited, takes(from, to)?))))
                .collect();
            started
                .into_iter()
                .map(|job| job.join().map_err(|_| anyhow!("a transfer panicked"))?)
                .collect::<Result<_>>()
        })?;
        for (what, limited, took) in both {
            report::took(format_args!("{AMOUNT} bytes {what}"), took);
            // 1.43 s by the token bucket; more when the machine is busy.
            let slow = took.as_millis() >= 1200;
            ensure!(slow || !limited, "{what}: {took:?}\n{}", queues(node)?);
        }
        for (what, from, to) in [
            ("from a pod that is limited the other way", &slow_to.netns, &far),
            ("to a pod that is limited the other way", &far.netns, &slow_from),
        ] {
            kept(what, SECOND, || takes(from, to)).with_context(|| queues(node).unwrap_or_default())?;
        }
        Ok(())
    })
}

#[test]
fn limits_are_kept_against_every_hand_and_go_with_their_pod() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan).flags(&MONITOR_ALONE), |cluster| {
        let mut both = ingress();
        both["egressRate"] = json!(RATE);
        both["egressBurst"] = json!(BURST);
        // The bridge stays.
        cluster.nodes[0].pod("plain")?.delete()?;
        let before = queues(&cluster.nodes[0])?;
        let pod = sandbox(&cluster.nodes[0], "kept", &both)?.wire()?;
        let right = queues(&cluster.nodes[0])?;
        let (veth, ifb) = (veth(&pod)?, ifb(&pod)?);
        ensure!(
            right.matches("rate 8Mbit burst 64Kb lat 25ms").count() == 2 && right.contains(&ifb),
            "{right}"
        );

        for hand in [
            format!("tc qdisc delete dev {veth} root"),
            format!("tc qdisc change dev {veth} root tbf rate 1gbit burst 64k latency 25ms"),
            format!("tc qdisc delete dev {veth} ingress"),
            format!("tc filter delete dev {veth} ingress"),
            format!("tc qdisc replace dev {ifb} root pfifo"),
            format!("ip link delete {ifb}"),
            format!("ip link set {ifb} down"),
        ] {
            let node = &cluster.nodes[0];
            node.agent.while_stopped(|| sh(node.netns(), &hand))?;
            let whole = || Ok(stable(&queues(node)?) == stable(&right) && is_up(node, &ifb)?);
            let took = eventually(&hand, READY, whole)?;
            report::took(&hand, took);
        }

        // Without an agent, and with another one, which touches nothing that is right.
        let kept = queues(&cluster.nodes[0])?;
        cluster.nodes[0].agent.kill()?;
        cluster.nodes[0].agent.restart(READY)?;
        ensure!(
            queues(&cluster.nodes[0])? == kept,
            "after a restart:\n{}\nbefore:\n{kept}",
            queues(&cluster.nodes[0])?
        );

        pod.unwire()?;
        let node = &cluster.nodes[0];
        let gone = || {
            let left = queues(node)?;
            ensure!(left == before, "{left}");
            Ok(true)
        };
        eventually("nothing of the limits to be left", READY, gone)?;
        // No DEL at all.
        let vanished = sandbox(node, "vanished", &both)?.wire()?;
        ensure!(queues(node)? != before);
        vanished.netns.remove()?;
        eventually("nothing to be left of a pod without DEL", READY, gone)?;
        invariant(node, &[])?;

        for (name, bandwidth, part) in [
            (
                "alone",
                json!({ "ingressRate": RATE }),
                "bandwidth.ingressBurst = null: expected a number of bits",
            ),
            (
                "small",
                json!({ "egressRate": RATE, "egressBurst": 8000 }),
                "egressBurst = 8000: expected at least 11712 bits",
            ),
        ] {
            let (code, error) = sandbox(node, name, &bandwidth)?.call.run("ADD")?.error()?;
            ensure!(code == BAD_CONFIGURATION && error.to_string().contains(part), "{name}: {error}");
        }
        gone()?;
        invariant(node, &[])
    })
}

fn is_up(node: &Node, dev: &str) -> Result<bool> {
    Ok(node.netns().ip(&format!("link show {dev}"))?.contains(",UP"))
}

/// Numbers that the kernel gives anew: of queues, of filters' tables and actions.
fn stable(queues: &str) -> String {
    let mut kept = Vec::new();
    let mut words = queues.split_whitespace();
    while let Some(word) = words.next() {
        match word {
            "index" | "refcnt" | "fh" | "ht" | "key" => drop(words.next()),
            word if word.ends_with(':') => {}
            word => kept.push(word),
        }
    }
    kept.join(" ")
}
