//! What a finished `lab up` leaves for the other commands: who is there and by which names.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::kubernetes::Cluster;
use crate::bed::netns_path;
use crate::binaries::Binaries;
use crate::cluster::{Backend, StoreKind};
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::underlay::NodeNumber;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    pub nodes: u8,
    pub backend: Backend,
    pub store: StoreKind,
    pub pods: Vec<LabPod>,
    /// The cluster that the lab is, if it is one.
    pub kubernetes: Option<Cluster>,
    bin_dir: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabPod {
    pub name: String,
    pub node: String,
    pub address: Ipv4Addr,
}

impl State {
    pub fn new(nodes: u8, backend: Backend, store: StoreKind, binaries: &Binaries) -> Self {
        Self { nodes, backend, store, pods: Vec::new(), kubernetes: None, bin_dir: binaries.dir.clone() }
    }

    pub fn add_pod(&mut self, node: &Node, pod: &Pod) {
        let (name, node) = (pod.name.clone(), node.name().to_owned());
        self.pods.push(LabPod { name, node, address: pod.address });
    }

    pub fn save(&self, root: &Path) -> Result<()> {
        Ok(fs::write(path(root), serde_json::to_vec_pretty(self)?)?)
    }

    pub fn load(root: &Path) -> Result<Self> {
        let json = match fs::read(path(root)) {
            Ok(json) => json,
            Err(e) if e.kind() == io::ErrorKind::NotFound && root.exists() => {
                bail!(
                    "the lab in {} is not finished: wait for `up`, or remove it with `down`",
                    root.display()
                )
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                bail!("there is no lab: start one with `scripts/lab up`")
            }
            Err(e) => return Err(e).with_context(|| format!("read {}", path(root).display())),
        };
        serde_json::from_slice(&json).with_context(|| format!("{} is not readable", path(root).display()))
    }

    pub fn binaries(&self) -> Binaries {
        Binaries { dir: self.bin_dir.clone() }
    }

    pub fn open_nodes(&self, root: &Path) -> Result<Vec<Node>> {
        (1..=self.nodes).map(|n| Node::open(root, NodeNumber(n), &self.binaries())).collect()
    }

    /// The pods with their namespaces, in the order of the table.
    pub fn pod_netns(&self, root: &Path) -> Vec<(LabPod, Netns)> {
        self.pods.iter().map(|pod| (pod.clone(), Netns::at(&netns_path(root, &pod.name)))).collect()
    }

    /// The namespace of a node or pod by its name.
    pub fn netns(&self, root: &Path, target: &str) -> Result<Netns> {
        let names = self.names();
        if names.iter().any(|name| name == target) {
            Ok(Netns::at(&netns_path(root, target)))
        } else {
            bail!("there is no node or pod {target:?}; there are {}", names.join(", "))
        }
    }

    /// Whether `target` is the node, or a pod on it.
    pub fn is_on(&self, target: &str, node: &Node) -> bool {
        target == node.name() || self.pods.iter().any(|pod| pod.name == target && pod.node == node.name())
    }

    fn names(&self) -> Vec<String> {
        let nodes = (1..=self.nodes).map(|n| NodeNumber(n).name());
        nodes.chain(self.pods.iter().map(|pod| pod.name.clone())).collect()
    }
}

fn path(root: &Path) -> PathBuf {
    root.join("lab.json")
}
