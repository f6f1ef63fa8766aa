//! A node: a namespace with an underlay interface, a directory of its own and an agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use weft_agent::status::{PacketPathStatus, Status};
use weft_shared::lease::LeaseKey;

use crate::agent::Agent;
use crate::bed::netns_path;
use crate::binaries::Binaries;
use crate::netns::Netns;
use crate::pod::Pod;
use crate::underlay::{NodeNet, NodeNumber};
use crate::wait::eventually;

#[derive(Debug)]
pub struct Node {
    pub number: NodeNumber,
    pub net: NodeNet,
    pub binaries: Binaries,
    pub agent: Agent,
    bed: PathBuf,
}

impl Node {
    pub fn new(bed: &Path, number: NodeNumber, net: NodeNet, binaries: &Binaries) -> Result<Self> {
        let dir = bed.join(&net.name);
        fs::create_dir_all(&dir)?;
        let agent = Agent::new(binaries, &net.netns, &dir, &net.name);
        Ok(Self { number, net, binaries: binaries.clone(), agent, bed: bed.to_owned() })
    }

    /// A node that an earlier process made in the bed; its agent is not ours to end.
    pub fn open(bed: &Path, number: NodeNumber, binaries: &Binaries) -> Result<Self> {
        let name = number.name();
        let net = NodeNet {
            netns: Netns::at(&netns_path(bed, &name)),
            port: name.clone(),
            address: number.address(),
            name,
        };
        Self::new(bed, number, net, binaries)
    }

    pub fn name(&self) -> &str {
        &self.net.name
    }

    pub fn netns(&self) -> &Netns {
        &self.net.netns
    }

    pub fn status(&self) -> Result<Status> {
        self.agent.status()
    }

    /// Of the lease that it has now, held or not.
    pub fn lease_key(&self) -> Result<LeaseKey> {
        let lease = self.status()?.lease;
        Ok(lease.with_context(|| format!("{} has no lease", self.name()))?.key)
    }

    /// Of the udp backend.
    pub fn packet_path(&self) -> Result<PacketPathStatus> {
        self.status()?.packet_path.with_context(|| format!("{} has no packet path", self.name()))
    }

    /// Packets dropped in one direction (`sent`, `received`) for one reason.
    pub fn dropped(&self, direction: &str, reason: &str) -> Result<u64> {
        let dropped = self.packet_path()?.dropped;
        let count = dropped.iter().find(|d| d.direction == direction && d.reason == reason);
        Ok(count.with_context(|| format!("no count of {direction} {reason}"))?.packets)
    }

    /// A new pod of that name, prefixed with the node's.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        Pod::create(self, &format!("{}-{name}", self.name()))
    }

    pub fn pod_netns_path(&self, name: &str) -> PathBuf {
        netns_path(&self.bed, name)
    }

    /// Waits until the agent has exactly `count` peers and all of them are in the kernel.
    pub fn wait_peers(&self, count: usize, deadline: Duration) -> Result<()> {
        eventually(&format!("{} to have {count} peers programmed", self.name()), deadline, || {
            let status = self.status()?;
            let programmed = status.peers.iter().filter(|p| p.programmed).count();
            if status.peers.len() != count || programmed != count {
                bail!("peers {:?}, refused {:?}", status.peers, status.refused);
            }
            Ok(true)
        })?;
        Ok(())
    }
}
