//! The border between address management and the rest of the agent: what a pod gets, and what wired pods need kept.

use std::collections::BTreeMap;

use weft_shared::protocol::BridgeOptions;
use weft_shared::{IfName, Mac, Subnet};

/// What a pod that is added now gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetwork {
    /// The leased subnet of this node: addresses come out of it, `.1` is the gateway.
    pub subnet: Subnet,
    /// The overlay's networks, routed through the gateway.
    pub overlay: Vec<Subnet>,
    /// The dataplane's MTU.
    pub mtu: u32,
}

/// The bridge as it stands in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BridgeFacts {
    pub ifindex: u32,
    pub mac: Mac,
}

/// What the attachments in the records need from the kernel: their ports, and the bridges they hang on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodPorts {
    /// Committed attachments, by host-side veth.
    pub ports: BTreeMap<IfName, Port>,
    /// Bridges that Reserve has named, and the leased subnets whose gateway each carries.
    pub bridges: BTreeMap<IfName, BridgeNeed>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub ifindex: u32,
    pub options: BridgeOptions,
    pub mtu: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeNeed {
    pub subnets: Vec<Subnet>,
    pub mtu: u32,
}

/// A host-side veth with our mark, as the last pass over the kernel saw it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeenVeth {
    pub name: IfName,
    pub ifindex: u32,
}

/// One look at the kernel: everything with our mark that was there. `pass` grows with every look.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SeenVeths {
    pub pass: u64,
    pub veths: Vec<SeenVeth>,
}
