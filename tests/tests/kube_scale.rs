//! A cluster of 5,000 Nodes in a real API server, and what one agent costs in it: time to the last entry, memory,
//! processor time while every Node sends heartbeats. Figures are printed; asserted is that heartbeats change nothing.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::bed::Bed;
use e2e::binaries::Binaries;
use e2e::etcd::Etcd;
use e2e::kube::{ControlPlane, Programs};
use e2e::node::Node;
use e2e::report;
use e2e::underlay::{NodeNumber, Underlay};
use e2e::wait::eventually;

const NODES: usize = 5000;
const LONG: Duration = Duration::from_secs(900);
const NET_CONF: &str = r#"{"Network": "10.128.0.0/10", "Backend": {"Type": "vxlan"}}"#;

/// Nodes as kubelet and kube-flannel leave them, images and conditions included.
const NODES_PY: &str = include_str!("kube_scale.py");

#[test]
fn an_agent_among_five_thousand_nodes() -> Result<()> {
    let bed = Bed::for_test()?;
    let binaries = Binaries::find()?;
    let underlay = Underlay::create(&bed)?;
    let etcd = Etcd::start(&underlay.netns, Underlay::GATEWAY, &bed.dir("etcd")?)?;
    let dir = bed.dir("kube")?;
    let mut control = ControlPlane::start(&underlay.netns, &dir, &Programs::find()?, &etcd.endpoint(), 1)?;
    control.controllers.kill()?;
    control.scheduler.kill()?;
    let net_conf = bed.root().join("net-conf.json");
    fs::write(&net_conf, NET_CONF)?;
    let script = |what: &str, more: &[&str]| {
        let mut command = Command::new("python3");
        command.args(["-c", NODES_PY, what]).arg(control.ca()).arg(NODES.to_string());
        command.arg(Underlay::GATEWAY.to_string()).args(more);
        command
    };
    let since = Instant::now();
    underlay.netns.run(&mut script("create", &[])).context("python3 is needed (package python3)")?;
    report::took(format!("{} Nodes created", NODES - 1), since.elapsed());

    let net = underlay.attach(&bed, NodeNumber(1))?;
    let mut node = Node::new(bed.root(), NodeNumber(1), net, &binaries)?;
    let own = format!(
        r#"{{"apiVersion":"v1","kind":"Node","metadata":{{"name":"{}"}},"spec":{{"podCIDR":"10.128.1.0/24"}}}}"#,
        node.name()
    );
    let file = bed.root().join("own.json");
    fs::write(&file, own)?;
    control.kubectl(&["create", "-f", &file.display().to_string()])?;
    node.agent.flags = vec![
        "--kube-subnet-mgr".to_owned(),
        format!("--kubeconfig-file={}", dir.join("admin.conf").display()),
        format!("--net-config-path={}", net_conf.display()),
    ];
    let since = Instant::now();
    node.agent.start()?;
    eventually("every peer to be in the kernel", LONG, || {
        let status = node.status()?;
        let programmed = status.peers.iter().filter(|peer| peer.programmed).count();
        ensure!(
            programmed == NODES - 1,
            "{programmed} of {}, waiting for {:?}",
            status.peers.len(),
            status.waiting_for
        );
        Ok(true)
    })?;
    report::took("an agent's start to the last entry", since.elapsed());
    let mib = |bytes: u64| bytes / (1 << 20);
    let before = node.status()?;
    report::figure(format_args!("resident memory: {} MiB", mib(before.host.agent_memory)));

    // A minute of heartbeats, and a minute without.
    let minute = |beats: bool| -> Result<(f64, u64)> {
        let from = node.status()?.host.agent_cpu;
        let began = Instant::now();
        let mut command = script("beat", &[if beats { "60" } else { "0" }]);
        command.stdout(Stdio::piped());
        let count = underlay.netns.run(&mut command)?.trim().parse()?;
        if !beats {
            eventually("a minute to pass", LONG, || Ok(began.elapsed() >= Duration::from_secs(60)))?;
        }
        let used = node.status()?.host.agent_cpu - from;
        Ok((used * 60.0 / began.elapsed().as_secs_f64(), count))
    };
    let (idle, _) = minute(false)?;
    let (busy, beats) = minute(true)?;
    let after = node.status()?;
    report::figure(format_args!(
        "processor time per minute: {idle:.2} s without heartbeats, {busy:.2} s under {beats} of them"
    ));
    report::figure(format_args!("resident memory afterwards: {} MiB", mib(after.host.agent_memory)));
    ensure!(beats > 0, "no heartbeat reached the API");
    assert_eq!((after.peers.len(), after.store.relists), (NODES - 1, before.store.relists));
    let repairs = |status: &weft_agent::status::Status| status.dataplane.as_ref().map(|d| d.repairs);
    assert_eq!(repairs(&after), repairs(&before), "a heartbeat is no change");
    Ok(())
}
