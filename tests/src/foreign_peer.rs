//! A node of another make: a peer of the udp backend in Python, written from the wire description, sharing no code with
//! weft (`foreign_peer.py`). Its lease is put into etcd by hand, as flanneld would put it.

use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use weft_shared::Subnet;

use crate::cluster::Cluster;
use crate::netns::Netns;
use crate::underlay::{NodeNet, NodeNumber};

const PROGRAM: &str = include_str!("foreign_peer.py");
const PORT: u16 = 8285;

/// The namespace is its own pod: its addresses are on its device.
#[derive(Debug)]
pub struct ForeignPeer {
    pub net: NodeNet,
    pub subnet: Subnet,
    /// Where its kernel answers pings and lets sockets be bound.
    pub address: Ipv4Addr,
    child: Child,
}

impl ForeignPeer {
    pub const DEVICE: &str = "tun0";

    /// Joins the cluster with a subnet of its choice; `corrupt`: of the large packets that it sends every so many are
    /// broken, 0 for none.
    pub fn join(cluster: &Cluster, number: NodeNumber, subnet: &str, corrupt: u32) -> Result<Self> {
        let net = cluster.underlay.attach(&cluster.bed, number)?;
        let subnet: Subnet = subnet.parse()?;
        let mut routes = Vec::new();
        for node in &cluster.nodes {
            let key = node.lease_key()?;
            routes.push(format!("{}={}", key.v4, node.net.address));
        }
        let mut command = Command::new("python3");
        command.args([
            "-c",
            PROGRAM,
            Self::DEVICE,
            &net.address.to_string(),
            &PORT.to_string(),
            &corrupt.to_string(),
        ]);
        command.args(&routes).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = net.netns.spawn(&mut command).context("python3 is needed (package python3)")?;
        let stdout = child.stdout.take().context("stdout of python3")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line != "ready\n" {
            let _ = child.kill();
            bail!("the foreign peer said {line:?} and {:?}", child.wait()?);
        }
        let std::net::IpAddr::V4(address) = subnet.gateway() else { bail!("{subnet} is not IPv4") };
        let device = Self::DEVICE;
        let peer = Self { net, subnet, address, child };
        peer.net.netns.ip(&format!("address add {address}/32 dev {device}"))?;
        peer.net.netns.ip(&format!("link set {device} up mtu 1472"))?;
        peer.net.netns.ip(&format!("route add {} dev {device} src {address}", cluster.spec.network))?;
        let etcd = cluster.etcd.as_ref().context("a foreign peer needs etcd")?;
        let key = subnet.to_string().replace('/', "-");
        // As flanneld writes it for this backend: no type, no data.
        let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, peer.net.address);
        etcd.put_entry(key.as_bytes(), value.as_bytes())?;
        Ok(peer)
    }

    pub fn netns(&self) -> &Netns {
        &self.net.netns
    }
}

impl Drop for ForeignPeer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
