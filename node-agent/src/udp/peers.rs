//! Who is where, and who may send what: one immutable value for the packet path.

use std::net::{Ipv4Addr, SocketAddrV4};

use weft_shared::Subnet;

/// A peer's subnet and where its datagrams go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub subnet: Subnet,
    pub addr: SocketAddrV4,
}

/// This node, as far as checks need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// The overlay's.
    pub network: Subnet,
    /// Leased to this node; more than one while pods of an earlier lease live.
    pub subnets: Vec<Subnet>,
    /// The TUN device's, the source of ICMP errors.
    pub device_addr: Ipv4Addr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourcePolicy {
    /// An inner source outside the overlay is refused too.
    pub strict: bool,
    /// Datagrams may come from any address; the inner source must then lie inside some peer's subnet.
    pub behind_nat: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTable {
    local: Local,
    policy: SourcePolicy,
    peers: Vec<Peer>,
}

impl PeerTable {
    pub fn new(local: Local, policy: SourcePolicy, peers: impl IntoIterator<Item = Peer>) -> Self {
        Self { local, policy, peers: peers.into_iter().collect() }
    }
}
