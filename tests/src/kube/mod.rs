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
use std::time::Duration;

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
use crate::wait::{eventually, until_ok};

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
        for number in (1..=nodes).map(NodeNumber) {
            let net = kube.underlay.attach(&kube.bed, number)?;
            kube.add_node(&net.netns, number)?;
        }
        for node in &kube.nodes {
            until_ok(&format!("{} to have a podCIDR", node.name), PATIENCE, || kube.pod_cidr(&node.name))?;
        }
        Ok(kube)
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
        eventually("every node to be Ready", PATIENCE, || {
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
            Ok(true)
        })
    }

    /// Waits until so many pods with that label run and are ready.
    pub fn wait_pods(&self, namespace: &str, label: &str, count: usize) -> Result<Vec<RunningPod>> {
        until_ok(&format!("{count} pods {label} in {namespace}"), PATIENCE, || {
            let pods = self.list(&["pods", "-n", namespace, "-l", label])?;
            let states: Vec<_> = pods.iter().map(state).collect();
            ensure!(pods.len() == count && pods.iter().all(is_ready), "{states:?}");
            pods.iter().map(|pod| self.running(pod)).collect()
        })
    }

    /// Waits until no pod has that label.
    pub fn wait_no_pods(&self, namespace: &str, label: &str) -> Result<Duration> {
        eventually(&format!("pods {label} in {namespace} to be gone"), PATIENCE, || {
            Ok(self.list(&["pods", "-n", namespace, "-l", label])?.is_empty())
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

    /// What a failed scenario's reader wants to see.
    pub fn explain(&mut self) -> String {
        let mut text = String::new();
        for args in [
            &["get", "nodes,pods", "-A", "-o", "wide"][..],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
            &["logs", "-n", weft::NAMESPACE, "-l", weft::LABEL, "--prefix", "--tail=20"],
        ] {
            let printed = self.kubectl(args).unwrap_or_else(|error| format!("{error:#}"));
            text += &format!("kubectl {}:\n{}", args.join(" "), tail(&printed));
        }
        for daemon in self.control.daemons() {
            let log = std::fs::read_to_string(&daemon.log).unwrap_or_default();
            text += &format!("{}, end of log:\n{}", daemon.name, tail(&log));
        }
        for node in &self.nodes {
            let printed = weft::ctl(node, &["status"]).unwrap_or_else(|error| format!("{error:#}"));
            text += &format!("weft on {}:\n{printed}\n", node.name);
            for service in ["containerd", "kubelet", "kube-proxy"] {
                let log = node.machine.read(&format!("/var/log/{service}.log")).unwrap_or_default();
                text += &format!("{service} on {}, end of log:\n{}", node.name, tail(&log));
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

/// In few words.
fn state(pod: &Value) -> String {
    let waiting = &pod["status"]["containerStatuses"][0]["state"];
    format!("{} {} {waiting}", pod["metadata"]["name"], pod["status"]["phase"])
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
    tail.iter().map(|line| format!("  {line}\n")).collect()
}
