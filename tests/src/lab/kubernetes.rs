//! The lab as a Kubernetes cluster: Kubernetes' own programs, and weft installed by the manifest that a user applies.

use std::ffi::OsString;
use std::fs;
use std::mem::ManuallyDrop;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::matrix::Matrix;
use super::out::say;
use super::state::{LabPod, State};
use super::{PING_TRIES, ROOT};
use crate::bed::{Bed, netns_path};
use crate::binaries::{Binaries, require_tools};
use crate::cgroups::Cgroups;
use crate::cluster::{Backend, StoreKind};
use crate::kube::weft::{self, Weft};
use crate::kube::{self, Kube, ProxyMode, web};
use crate::machine;
use crate::netns::Netns;
use crate::underlay::NodeNumber;

/// The lab's pods, one on each node.
const PODS: &str = "hello";

/// What is kept of the cluster besides names.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cluster {
    /// With the options that every call needs.
    kubectl: Vec<String>,
    /// The first process of each node.
    first: Vec<u32>,
}

/// Brings it up and shows that pods reach each other.
pub fn up(nodes: u8, backend: Backend) -> Result<()> {
    let started = Instant::now();
    require_tools(&[
        ("ip", "iproute2"),
        ("etcd", "etcd-server"),
        ("etcdctl", "etcd-client"),
        ("openssl", "openssl"),
        ("containerd", "containerd"),
        ("runc", "runc"),
        ("iptables", "iptables"),
    ])?;
    say(format!("Starting a Kubernetes cluster of {nodes} nodes, {} ...", backend.kind()));
    let binaries = Binaries::find()?;
    let mut bed = Bed::create(Path::new(ROOT))?;
    let weft = Weft::prepare(&binaries, &bed.dir("weft")?, backend)?;
    bed.keep();
    // From here on a failure leaves it for a look, as a cluster whose pods are silent does; `down` removes it.
    let kube = ManuallyDrop::new(Kube::start(bed, nodes, ProxyMode::Iptables, weft.images())?);
    weft.install(&kube)?;
    say(format!("Every node is Ready after {:.1} s.", started.elapsed().as_secs_f64()));
    kube.apply(&web::daemon_set(PODS, &json!({})).to_string())?;
    kube.apply(&web::service(PODS, PODS, &json!({})).to_string())?;
    kube.wait_pods("default", &format!("app={PODS}"), usize::from(nodes))?;
    let mut state = State::new(nodes, backend, StoreKind::Embedded, &binaries);
    state.kubernetes = Some(Cluster {
        kubectl: kube.control.kubectl_line().to_vec(),
        first: kube.nodes.iter().map(|node| node.machine.first()).collect(),
    });
    state.save(Path::new(ROOT))?;
    let matrix = matrix(&state)?;
    let pod = format!("daemonset/{PODS}");
    say(format!(
        "\n{matrix}\nUp in {:.1} s. Try:\n\
         \x20 scripts/lab kubectl get nodes,pods -A -o wide          # kubectl, as the cluster's administrator\n\
         \x20 scripts/lab kubectl exec {pod} -- wget -qO- http://{}/cgi-bin/who\n\
         \x20 scripts/lab kubectl logs -n {} {}   # what weft says\n\
         \x20 scripts/lab exec n1 ip route                           # a command on a node\n\
         \x20 scripts/lab status                                     # what each agent says of itself\n\
         \x20 scripts/lab down                                       # remove everything",
        started.elapsed().as_secs_f64(),
        kube.service_address(PODS)?,
        weft::NAMESPACE,
        weft::DAEMON_SET,
    ));
    ensure!(matrix.is_complete(), "not every pod reaches every other; the lab stands for a look");
    Ok(())
}

/// The cluster by kubectl, and what every agent says of itself.
pub fn status(state: &State, cluster: &Cluster) -> Result<()> {
    say(kubectl(cluster, &["get", "nodes,pods", "-A", "-o", "wide"])?);
    let mut silent = Vec::new();
    for (number, first) in (1..=state.nodes).map(NodeNumber).zip(&cluster.first) {
        say(format!("--- {} ({})", number.name(), number.address()));
        let answer = weft::ctl_at(&state.binaries(), &machine::path_below(*first, weft::SOCKET), &["status"]);
        match answer {
            Ok(text) => say(text.trim_end()),
            Err(error) => {
                say(format!("{error:#}"));
                silent.push(number.name());
            }
        }
    }
    ensure!(silent.is_empty(), "no answer from the agent of {}", silent.join(", "));
    Ok(())
}

/// Every pod of the cluster's own network, by whatever it was made.
pub fn matrix(state: &State) -> Result<Matrix> {
    Matrix::measure(&pods(state)?, PING_TRIES)
}

/// `kubectl`, with this terminal.
pub fn run_kubectl(cluster: &Cluster, args: &[OsString]) -> Result<ExitStatus> {
    let mut command = command(cluster)?;
    Ok(underlay().spawn(command.args(args))?.wait()?)
}

/// A command on a node, or in the network of a pod.
pub fn exec(state: &State, cluster: &Cluster, target: &str, line: &[OsString]) -> Result<ExitStatus> {
    let nodes = (1..=state.nodes).map(|number| NodeNumber(number).name());
    if let Some((_, first)) = nodes.zip(&cluster.first).find(|(name, _)| name == target) {
        let node = fs::metadata(format!("/proc/{first}/ns/net")).context("the node has ended")?;
        let netns = fs::metadata(netns_path(Path::new(ROOT), target))?;
        ensure!((node.dev(), node.ino()) == (netns.dev(), netns.ino()), "the node has ended");
        let mut command = machine::enter(*first);
        command.args(["env", &format!("WEFT_SOCKET={}", weft::SOCKET)]).args(line);
        return Ok(command.spawn()?.wait()?);
    }
    let pods = pods(state)?;
    let names = || pods.iter().map(|(pod, _)| pod.name.clone()).collect::<Vec<_>>().join(", ");
    let (_, netns) = pods
        .iter()
        .find(|(pod, _)| pod.name == target)
        .with_context(|| format!("there is no node or pod {target:?}; pods are {}", names()))?;
    let (program, args) = line.split_first().context("no command")?;
    Ok(netns.spawn(Command::new(program).args(args))?.wait()?)
}

/// What containers have outside of the lab's folder: removed when this value goes, once all have ended.
pub fn cgroups() -> Cgroups {
    let cluster = State::load(Path::new(ROOT)).ok().and_then(|state| state.kubernetes);
    Cgroups::of(cluster.iter().flat_map(|cluster| &cluster.first).flat_map(|first| kube::cgroups_of(*first)))
}

fn pods(state: &State) -> Result<Vec<(LabPod, Netns)>> {
    let cluster = state.kubernetes.as_ref().context("the lab is no Kubernetes cluster")?;
    let text = kubectl(cluster, &["get", "pods", "-A", "-o", "json"])?;
    let list: Value = serde_json::from_str(&text)?;
    let mut pods = Vec::new();
    for pod in list["items"].as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (node, address) = (text(&pod["spec"]["nodeName"]), text(&pod["status"]["podIP"]));
        let Ok(address) = address.parse::<Ipv4Addr>() else { continue };
        if pod["spec"]["hostNetwork"] == true || pod["status"]["phase"] != "Running" {
            continue;
        }
        let names = (1..=state.nodes).map(|number| NodeNumber(number).name());
        let (_, first) = names.zip(&cluster.first).find(|(name, _)| *name == node).context("its node")?;
        let netns = kube::pod_netns(&machine::path_below(*first, "/run/netns"), address)?;
        pods.push((LabPod { name: text(&pod["metadata"]["name"]), node, address }, netns));
    }
    Ok(pods)
}

fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<String> {
    underlay().run(command(cluster)?.args(args))
}

fn command(cluster: &Cluster) -> Result<Command> {
    let (program, options) = cluster.kubectl.split_first().context("no kubectl")?;
    let mut command = Command::new(program);
    command.env_remove("KUBECONFIG").args(options);
    Ok(command)
}

fn underlay() -> Netns {
    Netns::at(&netns_path(Path::new(ROOT), "underlay"))
}
