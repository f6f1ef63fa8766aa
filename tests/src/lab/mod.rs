//! The lab: a small cluster on one machine to look at and to try things on. `scripts/lab` builds and starts it.
//!
//! Everything is in one bed, `/run/weft-lab`, and in namespaces mounted there: nothing in the host's own network
//! namespace, no sysctl, no firewall rule, no file elsewhere. `down` therefore needs no record of what `up` did, and
//! works as well after an `up` that was killed.
#![expect(clippy::print_stdout, reason = "the lab speaks to a person")]

pub mod bench;
pub mod matrix;
pub mod state;

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::bed::{Bed, teardown};
use crate::binaries::require_tools;
use crate::cluster::{Backend, Cluster, Spec, StoreKind};
use crate::node::Node;
use matrix::Matrix;
use state::State;

const ROOT: &str = "/run/weft-lab";
/// The bench makes a lab of its own and takes it away, whatever stands beside it.
const BENCH_ROOT: &str = "/run/weft-lab-bench";
const PODS_PER_NODE: [&str; 2] = ["a", "b"];
/// Requests until a silent pair counts as unreachable.
const PING_TRIES: u16 = 5;

/// Brings the lab up and shows that it works.
pub fn up(nodes: u8, backend: Backend, store: StoreKind) -> Result<()> {
    let started = Instant::now();
    if Path::new(ROOT).exists() {
        bail!("{ROOT} exists: a lab is up, or one was left unfinished. `scripts/lab down` removes it");
    }
    require_tools(&[("ip", "iproute2")])?;
    if store == StoreKind::Etcd {
        require_tools(&[("etcd", "etcd-server"), ("etcdctl", "etcd-client")])?;
    }
    println!("Starting {nodes} nodes, {} on a store of kind {} ...", backend.kind(), store.kind());
    let spec = match store {
        StoreKind::Embedded => Spec::embedded(nodes, backend),
        StoreKind::Etcd => Spec::etcd(nodes, backend),
    };
    let cluster = Cluster::start(Bed::create(Path::new(ROOT))?, spec)?;
    println!("{nodes} agents are ready and know each other after {:.1} s.", started.elapsed().as_secs_f64());

    let mut state = State::new(nodes, backend, store, &cluster.binaries);
    for node in &cluster.nodes {
        for name in PODS_PER_NODE {
            state.add_pod(node, &node.pod(name)?);
        }
    }
    println!("{} pods are wired.\n", state.pods.len());
    let matrix = Matrix::measure(&state.pod_netns(Path::new(ROOT)), PING_TRIES)?;
    state.save(Path::new(ROOT))?;
    cluster.keep();
    println!("{matrix}\nUp in {:.1} s. Try:\n{}", started.elapsed().as_secs_f64(), suggestions(&state));
    if matrix.is_complete() {
        Ok(())
    } else {
        bail!("not every pod reaches every other; the lab stands for a look")
    }
}

/// What every agent says of itself.
pub fn status() -> Result<()> {
    let (_, nodes) = open()?;
    let mut silent = Vec::new();
    for node in &nodes {
        println!("--- {} ({})", node.name(), node.net.address);
        match node.agent.ctl(&["status"]) {
            Ok(text) => println!("{}", text.trim_end()),
            Err(error) => {
                println!("{error:#}\nlog: {}", node.agent.log_path().display());
                silent.push(node.name().to_owned());
            }
        }
    }
    if silent.is_empty() { Ok(()) } else { bail!("no answer from the agent of {}", silent.join(", ")) }
}

/// Every agent pings every other over underlay and overlay, then every pod every other.
pub fn ping() -> Result<()> {
    let (state, nodes) = open()?;
    for node in &nodes {
        println!("--- from {}", node.name());
        match node.agent.ctl(&["ping", "all"]) {
            Ok(text) => println!("{}", text.trim_end()),
            Err(error) => println!("{error:#}"),
        }
    }
    let matrix = Matrix::measure(&state.pod_netns(Path::new(ROOT)), PING_TRIES)?;
    println!("\n{matrix}");
    if matrix.is_complete() { Ok(()) } else { bail!("not every pod reaches every other") }
}

/// Runs a command in the namespace of a node or of a pod.
pub fn exec(target: &str, command: &[OsString]) -> Result<ExitStatus> {
    let (state, nodes) = open()?;
    let netns = state.netns(Path::new(ROOT), target)?;
    let node = nodes.iter().find(|node| state.is_on(target, node)).context("every pod is on a node")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::iter::once(state.binaries().dir).chain(std::env::split_paths(&path));
    let (program, args) = command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(args).env("PATH", std::env::join_paths(dirs)?);
    command.env("WEFT_SOCKET", node.agent.admin_socket());
    Ok(netns.spawn(&mut command)?.wait()?)
}

/// Removes whatever is there of the lab and of a bench that was cut short.
pub fn down() -> Result<()> {
    let mut found = false;
    for root in [ROOT, BENCH_ROOT] {
        found |= Path::new(root).exists();
        teardown(Path::new(root))?;
    }
    println!("{}", if found { "The lab is gone." } else { "There is no lab." });
    Ok(())
}

/// The exit code that a shell would report for a command.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Time to wait for a pair's answer: a first packet may wait for neighbour resolution.
fn ping_timeout() -> Duration {
    Duration::from_secs(1)
}

fn open() -> Result<(State, Vec<Node>)> {
    let root = Path::new(ROOT);
    let state = State::load(root)?;
    let nodes = state.open_nodes(root)?;
    Ok((state, nodes))
}

fn suggestions(state: &State) -> String {
    let (near, far) = match (state.pods.first(), state.pods.last()) {
        (Some(near), Some(far)) => (near, far),
        _ => return String::new(),
    };
    let heal = match state.backend {
        Backend::Vxlan => "scripts/lab exec n1 ip link delete flannel.1",
        Backend::HostGw => "scripts/lab exec n1 ip route flush proto 87",
    };
    [
        ("scripts/lab status".to_owned(), "what each agent says of itself"),
        (format!("scripts/lab exec {} ping -c 3 {}", near.name, far.address), "pod to pod, across nodes"),
        ("scripts/lab exec n1 ip route".to_owned(), "what the agent put into the kernel"),
        (heal.to_owned(), "break it; then `scripts/lab ping` and see it mended"),
        ("scripts/lab down".to_owned(), "remove everything"),
    ]
    .iter()
    .map(|(command, why)| format!("  {command:<52} # {why}\n"))
    .collect()
}
