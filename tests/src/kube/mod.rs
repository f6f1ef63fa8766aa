//! A Kubernetes cluster: Kubernetes' own programs, a real etcd, nodes that are machines of their own. Nothing is mocked.
//!
//! ```text
//! underlay's namespace: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl
//!  +- n1, n2, ...: containerd, kubelet, kube-proxy, pods
//! ```
//! The network of its pods is what a scenario installs: weft by its manifest, or the stock plugins ([`mod@reference`]).

mod control;
mod node;
mod programs;
pub mod reference;
pub mod web;
pub mod weft;

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;

use crate::bed::Bed;
use crate::binaries::Binaries;
use crate::cluster::Backend;
use crate::etcd::Etcd;
use crate::image;
use crate::machine::Machine;
use crate::netns::Netns;
use crate::underlay::{NodeNumber, Underlay};
use crate::wait::patiently;

pub use control::{ControlPlane, Daemon};
pub use node::{KubeNode, cgroups_of, pod_netns};
pub use programs::Programs;
pub use weft::Weft;

/// Of the pods; each node has a /24 of it, from the controller manager.
pub const POD_NETWORK: &str = "10.244.0.0/16";
pub const SERVICE_NETWORK: &str = "10.96.0.0/16";
/// For whatever the cluster does by itself, on a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(180);
const LOG_TAIL_LINES: usize = 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyMode {
    Iptables,
    Nftables,
}

impl ProxyMode {
    fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

/// Fields drop in order: nodes end before the control plane, that before its store, the store before the namespaces.
#[derive(Debug)]
pub struct Kube {
    pub nodes: Vec<KubeNode>,
    pub control: ControlPlane,
    pub etcd: Etcd,
    pub underlay: Underlay,
    pub bed: Bed,
    programs: Programs,
    proxy: ProxyMode,
    /// Further archives that every node has.
    images: Vec<PathBuf>,
}

/// A pod that runs, as the API has it and as this machine sees it.
#[derive(Debug, Clone)]
pub struct RunningPod {
    pub name: String,
    pub node: String,
    pub address: Ipv4Addr,
    /// The node's, for a pod of the host's network.
    pub netns: Netns,
}

impl Kube {
    /// Control plane and nodes, registered and without a network. `images`: archives that every node has besides busybox.
    pub fn start(bed: Bed, nodes: u8, proxy: ProxyMode, images: &[PathBuf]) -> Result<Self> {
        let programs = Programs::find()?;
        let dir = bed.dir("image")?;
        image::oci_image(&dir, &image::NAMES)?;
        let underlay = Underlay::create(&bed)?;
        let etcd = Etcd::start(&underlay.netns, Underlay::GATEWAY, &bed.dir("etcd")?)?;
        let control =
            ControlPlane::start(&underlay.netns, &bed.dir("kube")?, &programs, &etcd.endpoint(), nodes)?;
        let mut images = images.to_vec();
        images.insert(0, dir.join("image.tar"));
        let mut kube = Self { nodes: Vec::new(), control, etcd, underlay, bed, programs, proxy, images };
        match kube.join(nodes) {
            Ok(()) => Ok(kube),
            Err(error) => Err(anyhow!("{error:#}\n{}", kube.explain())),
        }
    }

    fn join(&mut self, nodes: u8) -> Result<()> {
        for number in (1..=nodes).map(NodeNumber) {
            let net = self.underlay.attach(&self.bed, number)?;
            self.add_node(&net.netns, number)?;
        }
        for node in &self.nodes {
            patiently(&format!("{} to have a podCIDR", node.name), PATIENCE, || self.pod_cidr(&node.name))?;
        }
        Ok(())
    }

    /// A machine with nothing on it becomes a node, in a namespace that hangs on the underlay.
    fn add_node(&mut self, netns: &Netns, number: NodeNumber) -> Result<()> {
        let name = number.name();
        let machine = Machine::start(netns, &self.bed.dir(&format!("roots/{name}"))?, &name)?;
        let images: Vec<&Path> = self.images.iter().map(PathBuf::as_path).collect();
        let address = number.address();
        let node = KubeNode::join(machine, address, &self.control, &self.programs, &images, self.proxy)?;
        self.nodes.push(node);
        Ok(())
    }

    pub fn kubectl<A: AsRef<OsStr>>(&self, args: &[A]) -> Result<String> {
        self.control.kubectl(args)
    }

    /// `kubectl get ... -o json`.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], args].concat())?;
        serde_json::from_str(&text).with_context(|| text)
    }

    /// The items of a list.
    pub fn list(&self, args: &[&str]) -> Result<Vec<Value>> {
        Ok(self.get(args)?["items"].as_array().context("a list")?.clone())
    }

    /// `kubectl apply` of a manifest.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let file = self.bed.dir("kube")?.join("manifest.yaml");
        std::fs::write(&file, manifest)?;
        self.apply_file(&file)
    }

    pub fn apply_file(&self, file: &Path) -> Result<()> {
        self.kubectl(&[OsStr::new("apply"), OsStr::new("-f"), file.as_os_str()]).map(drop)
    }

    pub fn node(&self, name: &str) -> Result<&KubeNode> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| format!("there is no node {name}"))
    }

    pub fn pod_cidr(&self, node: &str) -> Result<String> {
        let object = self.get(&["node", node])?;
        let cidr = object["spec"]["podCIDR"].as_str();
        cidr.map(str::to_owned).with_context(|| format!("{node} has no podCIDR"))
    }

    /// Every node is Ready, and says so of its network too, where something said otherwise.
    pub fn wait_nodes_ready(&self) -> Result<Duration> {
        let since = Instant::now();
        patiently("every node to be Ready", PATIENCE, || {
            let nodes = self.list(&["nodes"])?;
            ensure!(nodes.len() == self.nodes.len(), "{} nodes", nodes.len());
            for node in &nodes {
                let name = node["metadata"]["name"].as_str().unwrap_or_default();
                for condition in node["status"]["conditions"].as_array().into_iter().flatten() {
                    let expected = match condition["type"].as_str() {
                        Some("Ready") => "True",
                        _ => "False",
                    };
                    ensure!(condition["status"] == expected, "{name}: {condition}");
                }
                ensure!(node["spec"]["taints"].is_null(), "{name}: {}", node["spec"]["taints"]);
            }
            Ok(since.elapsed())
        })
    }

    /// Waits until so many pods with that label run and are ready.
    pub fn wait_pods(&self, namespace: &str, label: &str, count: usize) -> Result<Vec<RunningPod>> {
        patiently(&format!("{count} pods {label} in {namespace}"), PATIENCE, || {
            let pods = self.list(&["pods", "-n", namespace, "-l", label])?;
            let states: Vec<_> = pods.iter().map(state).collect();
            ensure!(pods.len() == count && pods.iter().all(is_ready), "{states:?}");
            pods.iter().map(|pod| self.running(pod)).collect()
        })
    }

    /// Waits until no pod has that label.
    pub fn wait_no_pods(&self, namespace: &str, label: &str) -> Result<()> {
        patiently(&format!("pods {label} in {namespace} to be gone"), PATIENCE, || {
            let pods = self.list(&["pods", "-n", namespace, "-l", label])?;
            ensure!(pods.is_empty(), "{:?}", pods.iter().map(state).collect::<Vec<_>>());
            Ok(())
        })
    }

    fn running(&self, pod: &Value) -> Result<RunningPod> {
        let text = |value: &Value| value.as_str().map(str::to_owned).with_context(|| format!("{pod}"));
        let node = text(&pod["spec"]["nodeName"])?;
        let address: Ipv4Addr = text(&pod["status"]["podIP"])?.parse()?;
        let on = self.node(&node)?;
        let netns = match pod["spec"]["hostNetwork"] == true {
            true => on.machine.netns.clone(),
            false => on.pod_netns(address)?,
        };
        Ok(RunningPod { name: text(&pod["metadata"]["name"])?, node, address, netns })
    }

    /// What a failed scenario's reader wants to see, as far as it can be had: the API may be what has failed.
    pub fn explain(&mut self) -> String {
        let mut text = String::new();
        for args in [
            &["get", "nodes,pods", "-A", "-o", "wide"][..],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
        ] {
            let printed = self.kubectl(args).unwrap_or_else(|error| format!("{error:#}"));
            text += &format!("kubectl {}:\n{}", args.join(" "), tail(&printed, 2 * LOG_TAIL_LINES));
        }
        for daemon in self.control.daemons() {
            let log = std::fs::read_to_string(&daemon.log).unwrap_or_default();
            text += &format!("{}, end of log:\n{}", daemon.name, tail(&log, LOG_TAIL_LINES));
        }
        for node in &self.nodes {
            let printed = weft::ctl(node, &["status"]).unwrap_or_else(|error| format!("{error:#}"));
            text += &format!("weft on {}:\n{printed}\n", node.name);
            // Of every pod that the agent had there, and of every container, those that have ended too.
            let logs = node.machine.sh(&format!(
                "cd /var/log/pods && for log in $(ls -tr {}_*/*/*.log); do echo \"$log\"; tail -n 40 \"$log\"; done",
                weft::NAMESPACE
            ));
            let logs = logs.unwrap_or_else(|error| format!("{error:#}"));
            text += &format!("the agent's pods on {}:\n{}", node.name, tail(&logs, usize::MAX));
            for service in ["containerd", "kubelet", "kube-proxy"] {
                let log = node.machine.read(&format!("/var/log/{service}.log")).unwrap_or_default();
                text += &format!("{service} on {}, end of log:\n{}", node.name, tail(&log, LOG_TAIL_LINES));
            }
        }
        text
    }
}

/// Runs `body` on a cluster of so many nodes without a network; a failure carries the logs.
pub fn kube(nodes: u8, proxy: ProxyMode, body: impl FnOnce(&mut Kube) -> Result<()>) -> Result<()> {
    run(Bed::for_test()?, nodes, proxy, &[], body)
}

/// The same where weft is installed, and every node Ready.
pub fn kube_with_weft(
    nodes: u8,
    proxy: ProxyMode,
    backend: Backend,
    body: impl FnOnce(&mut Kube) -> Result<()>,
) -> Result<()> {
    let bed = Bed::for_test()?;
    let weft = Weft::prepare(&Binaries::find()?, &bed.dir("weft")?, backend)?;
    run(bed, nodes, proxy, weft.images(), |kube| {
        weft.install(kube)?;
        body(kube)
    })
}

fn run(
    bed: Bed,
    nodes: u8,
    proxy: ProxyMode,
    images: &[PathBuf],
    body: impl FnOnce(&mut Kube) -> Result<()>,
) -> Result<()> {
    let mut kube = Kube::start(bed, nodes, proxy, images)?;
    body(&mut kube).map_err(|error| anyhow!("{error:#}\n{}", kube.explain()))
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    let ready = conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True");
    ready && pod["metadata"]["deletionTimestamp"].is_null()
}

/// In few words: where it is, whether it goes, and what its containers wait for or have ended of.
fn state(pod: &Value) -> String {
    let (metadata, status) = (&pod["metadata"], &pod["status"]);
    let mut words = vec![
        metadata["name"].to_string(),
        format!("on {}", pod["spec"]["nodeName"]),
        status["phase"].to_string(),
    ];
    if let Some(since) = metadata["deletionTimestamp"].as_str() {
        words.push(format!("deleted at {since}"));
    }
    for kind in ["initContainerStatuses", "containerStatuses"] {
        for container in status[kind].as_array().into_iter().flatten() {
            let Value::Object(state) = &container["state"] else { continue };
            let well =
                container["ready"] == true || state.get("terminated").is_some_and(|t| t["exitCode"] == 0);
            if !well {
                words.push(format!("{}: {}", container["name"], container["state"]));
            }
        }
    }
    for condition in status["conditions"].as_array().into_iter().flatten() {
        if condition["status"] != "True" && !condition["message"].is_null() {
            words.push(format!("{}: {}", condition["type"], condition["message"]));
        }
    }
    words.join(" ")
}

fn tail(text: &str, most: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(most)..];
    tail.iter().map(|line| format!("  {line}\n")).collect()
}
