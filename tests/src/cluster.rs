//! Nodes, an underlay and a store: the whole that scenarios and the lab start from.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::binaries::Binaries;
use crate::etcd::Etcd;
use crate::node::Node;
use crate::pod::Pod;
use crate::underlay::{NodeNumber, Underlay};

/// For what is not promised within a time: it comes, however little of a processor the scenario gets.
pub const READY: Duration = Duration::from_secs(60);

/// No sweep comes in time: what mends is the monitor.
pub const MONITOR_ALONE: [&str; 1] = ["--resync=3600"];
/// No event is heard: what mends is the sweep.
pub const SWEEP_ALONE: [&str; 2] = ["--netlink-monitor=false", "--resync=1"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Backend {
    Vxlan,
    HostGw,
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum StoreKind {
    Embedded,
    Etcd,
}

#[derive(Debug, Clone)]
pub struct Spec {
    pub nodes: u8,
    pub backend: Backend,
    pub store: StoreKind,
    pub network: String,
    pub subnet_len: u8,
    /// For every agent.
    pub flags: Vec<String>,
    pub etcd: EtcdKind,
}

/// What an etcd cluster is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EtcdKind {
    /// One plain member.
    Single,
    /// Three plain members.
    Three,
    /// Three members with certificates, and a login for the agents.
    ThreeSecured,
}

/// Fields drop in order: agents end before the store, the store before the namespaces.
#[derive(Debug)]
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub etcd: Option<Etcd>,
    pub underlay: Underlay,
    pub binaries: Binaries,
    pub spec: Spec,
    pub bed: Bed,
}

impl Backend {
    /// flannel's name for it.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp => "udp",
        }
    }
}

impl StoreKind {
    pub fn kind(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Etcd => "etcd",
        }
    }
}

impl Spec {
    /// Nodes on a real etcd.
    pub fn etcd(nodes: u8, backend: Backend) -> Self {
        Self {
            nodes,
            backend,
            store: StoreKind::Etcd,
            network: "10.5.0.0/16".to_owned(),
            subnet_len: 24,
            flags: Vec::new(),
            etcd: EtcdKind::Single,
        }
    }

    /// Nodes that share an embedded store.
    pub fn embedded(nodes: u8, backend: Backend) -> Self {
        Self { store: StoreKind::Embedded, ..Self::etcd(nodes, backend) }
    }

    pub fn on(self, etcd: EtcdKind) -> Self {
        Self { etcd, ..self }
    }

    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
        self
    }

    /// The configuration document, as it lies in the store: `conf/net-conf.json` with what this cluster varies.
    pub fn net_config(&self) -> Result<String> {
        let mut config: Value = serde_json::from_str(include_str!("../../conf/net-conf.json"))?;
        config["Network"] = json!(self.network);
        config["SubnetLen"] = json!(self.subnet_len);
        match self.backend {
            Backend::Vxlan | Backend::HostGw => config["Backend"]["Type"] = json!(self.backend.kind()),
            // The document's port is VXLAN's.
            Backend::Udp => config["Backend"] = json!({ "Type": self.backend.kind() }),
        }
        Ok(config.to_string())
    }
}

impl Cluster {
    /// Namespaces and store, no agent yet, no configuration in etcd.
    pub fn prepare(bed: Bed, spec: Spec) -> Result<Self> {
        let binaries = Binaries::find()?;
        let underlay = Underlay::create(&bed)?;
        let etcd = match spec.store {
            StoreKind::Etcd => Some(match spec.etcd {
                EtcdKind::Single => Etcd::start(&underlay.netns, Underlay::GATEWAY, &bed.dir("etcd")?)?,
                EtcdKind::Three => Etcd::start_three(&bed, &underlay, false)?,
                EtcdKind::ThreeSecured => Etcd::start_three(&bed, &underlay, true)?,
            }),
            StoreKind::Embedded => None,
        };
        let count = spec.nodes;
        let mut cluster = Self { nodes: Vec::new(), etcd, underlay, binaries, spec, bed };
        for number in 1..=count {
            cluster.add_node(NodeNumber(number))?;
        }
        Ok(cluster)
    }

    /// Everything: every agent ready, every peer programmed everywhere.
    pub fn start(bed: Bed, spec: Spec) -> Result<Self> {
        let mut cluster = Self::prepare(bed, spec)?;
        cluster.put_config()?;
        cluster.start_agents()?;
        Ok(cluster)
    }

    /// One more node on the underlay, its agent not started.
    pub fn add_node(&mut self, number: NodeNumber) -> Result<&mut Node> {
        let net = self.underlay.attach(&self.bed, number)?;
        let mut node = Node::new(self.bed.root(), number, net, &self.binaries)?;
        node.agent.flags = match &self.etcd {
            Some(etcd) => etcd.agent_flags(),
            None => vec![
                format!("--store=embedded={}", self.store_file().display()),
                format!("--net-config={}", self.config_file().display()),
            ],
        };
        node.agent.flags.extend(self.spec.flags.iter().cloned());
        self.nodes.push(node);
        self.nodes.last_mut().context("a node was just added")
    }

    /// The configuration goes where this store's agents find it.
    pub fn put_config(&self) -> Result<()> {
        match &self.etcd {
            Some(etcd) => etcd.put_config(&self.spec.net_config()?),
            None => Ok(std::fs::write(self.config_file(), self.spec.net_config()?)?),
        }
    }

    pub fn start_agents(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.agent.start()?;
        }
        self.wait_converged()
    }

    pub fn wait_converged(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.agent.wait_ready(READY)?;
        }
        let peers = self.nodes.len() - 1;
        for node in &self.nodes {
            node.wait_peers(peers, READY).with_context(|| node.agent.explain())?;
        }
        Ok(())
    }

    /// What a reboot leaves of a node: its disk. The agent must have ended; pods' namespaces are the caller's.
    pub fn reboot(&self, index: usize) -> Result<()> {
        let node = &self.nodes[index];
        self.underlay.netns.ip(&format!("link delete {}", node.net.port))?;
        node.netns().remove()?;
        std::fs::remove_dir_all(node.agent.run_dir())?;
        std::fs::remove_file(node.agent.subnet_file())?;
        self.underlay.attach(&self.bed, node.number)?;
        Ok(())
    }

    pub fn etcd(&mut self) -> Result<&mut Etcd> {
        self.etcd.as_mut().context("this cluster has no etcd")
    }

    /// One pod on each of the first two nodes.
    pub fn pod_pair(&self) -> Result<(Pod, Pod)> {
        Ok((self.nodes[0].pod("a")?, self.nodes[1].pod("a")?))
    }

    pub fn store_file(&self) -> PathBuf {
        self.bed.root().join("store.db")
    }

    fn config_file(&self) -> PathBuf {
        self.bed.root().join("net-conf.json")
    }

    /// Everything goes on running without this process.
    pub fn keep(mut self) {
        for node in &mut self.nodes {
            node.agent.detach();
        }
        if let Some(etcd) = self.etcd.take() {
            etcd.detach();
        }
        self.bed.keep();
    }

    fn explain(&self) -> String {
        self.nodes.iter().map(|node| node.agent.explain()).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.explain());
        }
    }
}

/// Runs `body` on a fresh cluster; a failure carries the agents' logs.
pub fn scenario(spec: Spec, body: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    let mut cluster = Cluster::start(Bed::for_test()?, spec)?;
    body(&mut cluster).with_context(|| cluster.explain())
}

/// The same on a cluster whose agents the body starts.
pub fn scenario_prepared(spec: Spec, body: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    let mut cluster = Cluster::prepare(Bed::for_test()?, spec)?;
    body(&mut cluster).with_context(|| cluster.explain())
}
