//! A node of its own for a subject: a namespace on an underlay, with an agent where the plugin has one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use weft_shared::Subnet;

use super::container::Container;
use super::subject::{Kind, Place, Subject};
use crate::bed::Bed;
use crate::cluster::{Backend, Cluster, Spec};
use crate::kernel::query;
use crate::netns::Netns;
use crate::node::Node;
use crate::wait::eventually;

/// A device that is to go goes within.
const GONE: Duration = Duration::from_secs(10);

/// How many addresses there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    Ordinary,
    /// [`Pool::SMALL`].
    Small,
}

impl Pool {
    /// A /28: thirteen pods beside the gateway.
    pub const SMALL: usize = 13;
}

#[derive(Debug)]
pub struct Stand {
    pub subject: Subject,
    pub place: Place,
    cluster: Cluster,
    serial: Cell<u32>,
    links: BTreeSet<String>,
    containers: RefCell<Vec<Netns>>,
}

impl Stand {
    pub fn new(subject: &Subject, pool: Pool) -> Result<Self> {
        let mut spec = Spec::embedded(1, Backend::HostGw);
        if pool == Pool::Small {
            spec = Spec { network: "10.5.0.0/26".into(), subnet_len: 28, ..spec };
        }
        let bed = Bed::for_test()?;
        let data = bed.dir("plugin")?;
        let cluster = match subject.kind {
            Kind::Weft => Cluster::start(bed, spec)?,
            Kind::Bridge => Cluster::prepare(bed, spec)?,
        };
        let node = &cluster.nodes[0];
        let subnet = match (subject.kind, pool) {
            (Kind::Weft, _) => node.lease_key()?.v4,
            (Kind::Bridge, Pool::Ordinary) => "10.5.7.0/24".parse()?,
            (Kind::Bridge, Pool::Small) => "10.5.0.16/28".parse()?,
        };
        let place = Place { network: "weft".into(), subnet, socket: node.agent.cni_socket(), data };
        let links = link_names(node.netns())?;
        let containers = RefCell::default();
        Ok(Self { subject: subject.clone(), place, cluster, serial: Cell::new(0), links, containers })
    }

    pub fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    /// The runtime's namespace.
    pub fn netns(&self) -> &Netns {
        self.node().netns()
    }

    /// A host beside the node.
    pub fn outside(&self) -> &Netns {
        &self.cluster.underlay.netns
    }

    pub fn subnet(&self) -> Subnet {
        self.place.subnet
    }

    /// The address of that place in the pods' subnet.
    pub fn address(&self, place: u32) -> Result<String> {
        Ok(self.subnet().nth(place).context("an address in the subnet")?.to_string())
    }

    /// A container that waits for its ADD, of the newest version.
    pub fn container(&self) -> Result<Container<'_>> {
        self.container_of("1.1.0")
    }

    pub fn container_of(&self, version: &str) -> Result<Container<'_>> {
        let number = self.serial.replace(self.serial.get() + 1);
        let name = format!("c{number}");
        let netns = Netns::create(&self.node().pod_netns_path(&name))?;
        self.containers.borrow_mut().push(netns.clone());
        Ok(Container::new(self, name, netns, self.subject.config(version, &self.place)))
    }

    /// Does something under the eyes of nobody: an agent that mends would do so at once.
    pub fn unattended<T>(&self, hand: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.subject.kind {
            Kind::Weft => self.node().agent.while_stopped(hand),
            Kind::Bridge => hand(),
        }
    }

    /// Whether no container has left anything on the node, but for the bridge. Then an agent's books must be empty too.
    pub fn is_as_new(&self) -> Result<bool> {
        let left: Vec<_> = link_names(self.netns())?.difference(&self.links).cloned().collect();
        if !left.is_empty() && left != ["cni0"] {
            return Ok(false);
        }
        if self.subject.kind == Kind::Weft {
            eventually("the agent's books to be empty", GONE, || {
                let pods = self.node().status()?.pods;
                if pods.attachments + pods.addresses_used == 0 { Ok(true) } else { bail!("{pods:?}") }
            })?;
        }
        Ok(true)
    }

    /// Every rule of the node's packet filter.
    pub fn packet_filter(&self) -> Result<String> {
        let nft = self.netns().run(Command::new("nft").args(["list", "ruleset"]))?;
        Ok(nft + &self.iptables()?)
    }

    pub fn iptables(&self) -> Result<String> {
        self.netns().run(&mut Command::new("iptables-save"))
    }

    /// Interfaces of the node that containers have brought.
    pub fn host_links(&self) -> Result<BTreeSet<String>> {
        let mut links = link_names(self.netns())?;
        links.retain(|name| !self.links.contains(name) && name != "cni0");
        Ok(links)
    }

    /// Waits for the end of every interface that containers have brought.
    pub fn wait_bare(&self) -> Result<()> {
        eventually("the containers' interfaces to go", GONE, || {
            let links = self.host_links()?;
            if links.is_empty() { Ok(true) } else { bail!("{links:?} are there") }
        })
        .map(drop)
    }

    /// The row of `ip -details link show`, `None` when there is no such interface.
    pub fn link(&self, netns: &Netns, name: &str) -> Result<Option<Value>> {
        let rows = query(netns, "ip -json -details link show")?;
        Ok(rows.into_iter().find(|row| row["ifname"] == name))
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        // The agent sees veths go one by one while it runs; afterwards nobody waits for them.
        for netns in self.containers.borrow_mut().drain(..) {
            let _ = netns.remove();
        }
    }
}

fn link_names(netns: &Netns) -> Result<BTreeSet<String>> {
    let rows = query(netns, "ip -json link show")?;
    Ok(rows.iter().filter_map(|row| row["ifname"].as_str().map(str::to_owned)).collect())
}
