//! The lab: a small cluster on one machine to look at and to try things on. `scripts/lab` builds and starts it.
//!
//! Everything is in one bed, `/run/weft-lab`, and in namespaces mounted there: nothing in the host's own network
//! namespace, no sysctl, no firewall rule, no file elsewhere. `down` therefore needs no record of what `up` did, and
//! works as well after an `up` that was killed.

pub mod bench;
pub mod kubernetes;
pub mod matrix;
pub mod out;
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
use out::say;
use state::State;

const ROOT: &str = "/run/weft-lab";
/// The bench makes a lab of its own and takes it away, whatever stands beside it.
const BENCH_ROOT: &str = "/run/weft-lab-bench";
const PODS_PER_NODE: [&str; 2] = ["a", "b"];
/// Requests until a silent pair counts as unreachable.
const PING_TRIES: u16 = 5;

/// Brings the lab up and shows that it works.
pub fn up(nodes: u8, backend: Backend, store: Option<StoreKind>, kubernetes: bool) -> Result<()> {
    let started = Instant::now();
    if Path::new(ROOT).exists() {
        bail!("{ROOT} exists: a lab is up, or one was left unfinished. `scripts/lab down` removes it");
    }
    if kubernetes {
        return kubernetes::up(nodes, backend);
    }
    let store = store.unwrap_or(StoreKind::Embedded);
    require_tools(&[("ip", "iproute2")])?;
    if store == StoreKind::Etcd {
        require_tools(&[("etcd", "etcd-server"), ("etcdctl", "etcd-client")])?;
    }
    say(format!("Starting {nodes} nodes, {} on a store of kind {} ...", backend.kind(), store.kind()));
    let spec = match store {
        StoreKind::Embedded => Spec::embedded(nodes, backend),
        StoreKind::Etcd => Spec::etcd(nodes, backend),
    };
    let spec = spec.flag("--ip-masq");
    let cluster = Cluster::start(Bed::create(Path::new(ROOT))?, spec)?;
    say(format!(
        "{nodes} agents are ready and know each other after {:.1} s.",
        started.elapsed().as_secs_f64()
    ));

    let mut state = State::new(nodes, backend, store, &cluster.binaries);
    for node in &cluster.nodes {
        for name in PODS_PER_NODE {
            state.add_pod(node, &node.pod(name)?);
        }
    }
    say(format!("{} pods are wired.\n", state.pods.len()));
    let matrix = Matrix::measure(&state.pod_netns(Path::new(ROOT)), PING_TRIES)?;
    state.save(Path::new(ROOT))?;
    cluster.keep();
    say(format!("{matrix}\nUp in {:.1} s. Try:\n{}", started.elapsed().as_secs_f64(), suggestions(&state)));
    if matrix.is_complete() {
        Ok(())
    } else {
        bail!("not every pod reaches every other; the lab stands for a look")
    }
}

/// What every agent says of itself.
pub fn status() -> Result<()> {
    let (state, nodes) = open()?;
    match &state.kubernetes {
        Some(cluster) => kubernetes::status(&state, cluster),
        None => all_answered(&ask(&nodes, &["status"])),
    }
}

/// Every agent pings every other over underlay and overlay, then every pod every other.
pub fn ping() -> Result<()> {
    let (state, nodes) = open()?;
    let (silent, matrix) = match &state.kubernetes {
        Some(_) => (Vec::new(), kubernetes::matrix(&state)?),
        None => {
            let silent = ask(&nodes, &["ping", "all"]);
            (silent, Matrix::measure(&state.pod_netns(Path::new(ROOT)), PING_TRIES)?)
        }
    };
    say(format!("\n{matrix}"));
    if !matrix.is_complete() {
        bail!("not every pod reaches every other");
    }
    all_answered(&silent)
}

/// Runs a command in the namespace of a node or of a pod.
pub fn exec(target: &str, command: &[OsString]) -> Result<ExitStatus> {
    let (state, nodes) = open()?;
    if let Some(cluster) = &state.kubernetes {
        return kubernetes::exec(&state, cluster, target, command);
    }
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

/// Runs kubectl on a lab that is a Kubernetes cluster.
pub fn kubectl(args: &[OsString]) -> Result<ExitStatus> {
    let (state, _) = open()?;
    match &state.kubernetes {
        Some(cluster) => kubernetes::run_kubectl(cluster, args),
        None => bail!("the lab is no Kubernetes cluster: `scripts/lab up --kubernetes` starts one"),
    }
}

/// Removes whatever is there of the lab and of a bench that was cut short.
pub fn down() -> Result<()> {
    let mut found = false;
    let _cgroups = kubernetes::cgroups();
    for root in [ROOT, BENCH_ROOT] {
        found |= Path::new(root).exists();
        teardown(Path::new(root))?;
    }
    say(if found { "The lab is gone." } else { "There is no lab." });
    Ok(())
}

/// Asks every agent and prints the answers. Returns the nodes whose agent gave none.
fn ask<'a>(nodes: &'a [Node], question: &[&str]) -> Vec<&'a str> {
    let mut silent = Vec::new();
    for node in nodes {
        say(format!("--- {} ({})", node.name(), node.net.address));
        if !node.agent.is_listening() {
            say(not_running(node));
            silent.push(node.name());
            continue;
        }
        match node.agent.ctl(question) {
            Ok(text) => say(text.trim_end()),
            Err(error) => {
                say(format!("{error:#}\nlog: {}", node.agent.log_path().display()));
                silent.push(node.name());
            }
        }
    }
    silent
}

fn all_answered(silent: &[&str]) -> Result<()> {
    if silent.is_empty() { Ok(()) } else { bail!("no answer from the agent of {}", silent.join(", ")) }
}

/// No service manager watches the lab's agents: whoever ended one starts it again.
fn not_running(node: &Node) -> String {
    let (name, log) = (node.name(), node.agent.log_path());
    let again = match node.agent.command_line() {
        Some(line) => format!(
            ", or start it again with:\n  scripts/lab exec {name} setsid -f {line} >>{} 2>&1",
            log.display()
        ),
        None => String::new(),
    };
    format!("the agent of {name} is not running; scripts/lab down && scripts/lab up{again}")
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
        Backend::Udp => "scripts/lab exec n1 ip link delete flannel0",
    };
    let between = if near.node == far.node { "pod to pod, on one node" } else { "pod to pod, across nodes" };
    [
        ("scripts/lab status".to_owned(), "what each agent says of itself"),
        (format!("scripts/lab exec {} ping -c 3 {}", near.name, far.address), between),
        ("scripts/lab exec n1 ip route".to_owned(), "what the agent put into the kernel"),
        (heal.to_owned(), "break it; then `scripts/lab ping` and see it mended"),
        ("scripts/lab down".to_owned(), "remove everything"),
    ]
    .iter()
    .map(|(command, why)| format!("  {command:<52} # {why}\n"))
    .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::binaries::Binaries;
    use crate::underlay::NodeNumber;
    use state::LabPod;

    #[test]
    fn the_suggested_ping_says_where_it_goes() {
        let binaries = Binaries { dir: "/usr/bin".into() };
        let mut state = State::new(1, Backend::Vxlan, StoreKind::Embedded, &binaries);
        let pod = |name: &str, node: &str, last: u8| LabPod {
            name: name.into(),
            node: node.into(),
            address: [10, 5, 1, last].into(),
        };
        state.pods = vec![pod("n1-a", "n1", 2), pod("n1-b", "n1", 3)];
        assert!(suggestions(&state).contains("on one node") && !suggestions(&state).contains("across nodes"));
        state.pods.push(pod("n2-a", "n2", 2));
        assert!(suggestions(&state).contains("across nodes"));
    }

    #[test]
    fn an_agent_that_is_not_running_is_named_with_the_way_to_start_it() -> Result<()> {
        let bed = tempfile::tempdir()?;
        let binaries = Binaries { dir: "/usr/bin".into() };
        let node = Node::open(bed.path(), NodeNumber(2), &binaries)?;
        let bare = not_running(&node);
        assert!(
            bare.ends_with("the agent of n2 is not running; scripts/lab down && scripts/lab up"),
            "{bare}"
        );
        fs::write(node.agent.log_path(), "--- start: weftd --node-name=n2 \n{}\n--- start: weftd later\n")?;
        let text = not_running(&node);
        assert!(text.contains("scripts/lab exec n2 setsid -f weftd --node-name=n2 >>"), "{text}");

        assert_eq!(ask(std::slice::from_ref(&node), &["status"]), ["n2"]);
        let refused = all_answered(&["n2"]).expect_err("n2 is silent").to_string();
        assert!(refused.contains("n2"), "{refused}");
        fs::create_dir_all(node.agent.run_dir())?;
        let _listener = std::os::unix::net::UnixListener::bind(node.agent.admin_socket())?;
        assert!(node.agent.is_listening());
        Ok(())
    }
}
