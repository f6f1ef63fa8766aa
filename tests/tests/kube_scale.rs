//! A cluster of 5,000 Nodes in a real API server, and what one agent costs in it: time to the last entry, memory,
//! processor time while Nodes send heartbeats. Figures are printed (docs/kubernetes.md, "Large clusters"); asserted is that
//! all peers come, that heartbeats change nothing, and that among so many peers the kernel is compared more rarely. What is measured is read from the kernel: an agent that is asked for
//! its status writes a document about 5,000 peers.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::bed::Bed;
use e2e::binaries::Binaries;
use e2e::etcd::Etcd;
use e2e::kube::{ControlPlane, Programs};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::report;
use e2e::underlay::{NodeNumber, Underlay};
use e2e::wait::{SECOND, eventually, let_pass, patiently};

const NODES: usize = 5000;
const LONG: Duration = Duration::from_secs(900);
const MINUTE: Duration = Duration::from_secs(60);
/// A kubelet patches the status of a Node on which nothing happens this often (`nodeStatusReportFrequency`); in between it
/// renews a Lease, which is another object.
const REPORT: Duration = Duration::from_secs(300);
/// As often as kubelets did before there were Leases: more than the API server of a small machine can take.
const FLOOD: Duration = Duration::from_secs(10);
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
    let script = |what: &str, more: &[String]| {
        let mut command = Command::new("python3");
        command.args(["-c", NODES_PY, what]).arg(control.ca()).arg(Underlay::GATEWAY.to_string()).args(more);
        command
    };
    let create = |from: usize, to: usize| {
        let range = [from.to_string(), to.to_string()];
        underlay.netns.run(&mut script("create", &range)).context("python3 is needed (package python3)")
    };
    let since = Instant::now();
    create(2, NODES)?;
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
    let programmed = |expected: usize, deadline: Duration| {
        patiently("every peer to be in the kernel", deadline, || {
            let routes = routes(node.netns())?;
            ensure!(
                routes == expected,
                "{routes} routes of {expected}; the agent says:\n{}",
                node.agent.log()
            );
            Ok(())
        })
    };
    // The last of a peer's entries.
    programmed(NODES - 1, LONG)?;
    report::took("an agent's start to the last entry", since.elapsed());
    let pid = node.agent.pid()?.as_raw();
    let (resident, peak) = memory(pid)?;
    report::figure(format_args!("resident memory: {resident} MiB, at most {peak} MiB until then"));

    let before = node.status()?;
    // A minute each, once the agent has come to rest.
    let minute = |beats: Option<Duration>| -> Result<()> {
        let (from, began) = (processor_time(pid)?, Instant::now());
        let count: u64 = match beats {
            None => {
                let_pass(MINUTE);
                0
            }
            Some(period) => {
                let seconds = [NODES as u64, MINUTE.as_secs(), period.as_secs()].map(|n| n.to_string());
                let mut command = script("beat", &seconds);
                command.stdout(Stdio::piped());
                underlay.netns.run(&mut command)?.trim().parse()?
            }
        };
        let used = (processor_time(pid)? - from) * MINUTE.as_secs_f64() / began.elapsed().as_secs_f64();
        report::figure(format_args!("processor time per minute: {used:.2} s under {count} heartbeats"));
        ensure!(beats.is_none() || count > 0, "no heartbeat reached the API");
        Ok(())
    };
    eventually("the agent to rest", LONG, || {
        let from = processor_time(pid)?;
        let_pass(SECOND);
        Ok(processor_time(pid)? - from < 0.05)
    })?;
    let passes = || node.status()?.dataplane.context("a data plane").map(|d| d.passes);
    let from = passes()?;
    minute(None)?;
    let swept = passes()? - from;
    // Every ten seconds among a thousand peers: among so many, five times as rarely.
    ensure!(swept < 4, "the kernel was looked at {swept} times in a minute in which nothing happened");
    minute(Some(REPORT))?;
    minute(Some(FLOOD))?;
    let (resident, peak) = memory(pid)?;
    report::figure(format_args!("resident memory afterwards: {resident} MiB, at most {peak} MiB"));
    let after = node.status()?;
    assert_eq!((after.peers.len(), after.store.relists), (NODES - 1, before.store.relists));
    let repairs = |status: &weft_agent::status::Status| status.dataplane.as_ref().map(|d| d.repairs);
    assert_eq!(repairs(&after), repairs(&before), "a heartbeat is no change");

    create(NODES + 1, NODES + 1)?;
    let since = Instant::now();
    eventually("the entry of one that joins", LONG, || Ok(routes(node.netns())? == NODES))?;
    report::took("a further Node's creation to its entry", since.elapsed());
    Ok(())
}

/// Into the tunnel.
fn routes(netns: &Netns) -> Result<usize> {
    // A device that is not there yet has none.
    let text = netns.ip("-4 -oneline route show").unwrap_or_default();
    Ok(text.lines().filter(|line| line.contains(" dev flannel.1 ") && line.contains(" via ")).count())
}

/// MiB that are resident, and that were at most (proc_pid_status(5)).
fn memory(pid: i32) -> Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = |name: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(name)).context(name.to_owned())?;
        Ok::<u64, anyhow::Error>(words.split_whitespace().next().context("a number")?.parse::<u64>()? >> 10)
    };
    Ok((value("VmRSS:")?, value("VmHWM:")?))
}

/// Seconds, of all threads (proc_pid_stat(5)), in hundredths.
fn processor_time(pid: i32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(") ").next().context("fields")?.split(' ').collect();
    let ticks = |place: usize| -> Result<f64> { Ok(fields.get(place).context("a field")?.parse::<f64>()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}
