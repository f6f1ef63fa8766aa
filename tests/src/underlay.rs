//! The network under the overlay: a bridge in a namespace of its own, and nodes that hang on it by a veth pair each.
//!
//! Each node has one interface `eth0` and a default route through the bridge's address, as a machine in a rack has:
//! so the agent's choice of an interface by default route is exercised everywhere.

use std::net::Ipv4Addr;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::bed::Bed;
use crate::netns::Netns;

const BRIDGE: &str = "br0";

#[derive(Debug)]
pub struct Underlay {
    pub netns: Netns,
}

/// What makes a node: its name, its place in the underlay.
#[derive(Debug, Clone)]
pub struct NodeNet {
    pub name: String,
    pub netns: Netns,
    pub address: Ipv4Addr,
    /// The node's end in the underlay: the switch port that a capture listens on.
    pub port: String,
}

/// Nodes are numbered from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeNumber(pub u8);

impl NodeNumber {
    pub fn name(self) -> String {
        format!("n{}", self.0)
    }

    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 77, 10 + self.0)
    }
}

impl Underlay {
    /// Where nodes find the store, and their default gateway.
    pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

    pub fn create(bed: &Bed) -> Result<Self> {
        let netns = bed.netns("underlay")?;
        // A fixed address: a bridge otherwise takes the lowest of its ports' and changes it as nodes come.
        netns.ip(&format!("link add {BRIDGE} address 02:00:c0:a8:4d:01 type bridge forward_delay 0"))?;
        netns.ip(&format!("address add {}/24 dev {BRIDGE}", Self::GATEWAY))?;
        netns.ip(&format!("link set {BRIDGE} up"))?;
        Ok(Self { netns })
    }

    pub fn attach(&self, bed: &Bed, number: NodeNumber) -> Result<NodeNet> {
        let name = number.name();
        let netns = self.attach_host(bed, &name, number.address())?;
        Ok(NodeNet { port: name.clone(), name, netns, address: number.address() })
    }

    /// A machine on the underlay: a namespace, a port of its name.
    pub fn attach_host(&self, bed: &Bed, name: &str, address: Ipv4Addr) -> Result<Netns> {
        let netns = bed.netns(name)?;
        self.plug_in(&netns, name, address)?;
        Ok(netns)
    }

    /// Gives a machine the interface that it was attached with; it must have none of that name.
    pub fn plug_in(&self, netns: &Netns, port: &str, address: Ipv4Addr) -> Result<()> {
        self.connect(netns, port, "eth0", address)?;
        netns.ip(&format!("route add default via {}", Self::GATEWAY))?;
        Ok(())
    }

    /// One more interface of a machine's. Its MAC follows from the address, as a card keeps its own over a reboot.
    pub fn connect(&self, netns: &Netns, port: &str, iface: &str, address: Ipv4Addr) -> Result<()> {
        let [a, b, c, d] = address.octets();
        self.netns.ip(&format!(
            "link add {port} master {BRIDGE} type veth peer name {iface} address 02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x} netns {}",
            netns.path().display()
        ))?;
        self.netns.ip(&format!("link set {port} up"))?;
        netns.ip(&format!("address add {address}/24 dev {iface}"))?;
        netns.ip(&format!("link set {iface} up"))?;
        Ok(())
    }
}
