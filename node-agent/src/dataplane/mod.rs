//! Dataplanes: pure functions from this node and the peers' leases to what the kernel must hold.
//!
//! Nothing here asks the kernel or a store anything; what a dataplane needs to know of the host is in [`LocalNode`].

pub mod hostgw;
pub mod udp;
pub mod vxlan;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::{BackendConfig, NetworkConfig};
use weft_shared::{IfName, Mac, Subnet};

use crate::object::{Desired, Key, Object};
use crate::underlay::Underlay;

pub use hostgw::HostGw;
pub use udp::UdpPlane;
pub use vxlan::VxlanPlane;

/// This node, as the dataplanes see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalNode {
    pub lease: LeaseKey,
    pub underlay: Underlay,
    /// Of the network that the underlay's address is in; a point-to-point link has none.
    pub broadcast: Option<Ipv4Addr>,
    /// Peers' addresses that the underlay reaches without a gateway; empty unless the dataplane asks for it.
    pub on_link: BTreeSet<IpAddr>,
}

/// What one dataplane wants, and what became of each peer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    pub desired: Desired,
    pub peers: BTreeMap<LeaseKey, PeerPlan>,
}

/// The objects that serve one peer, or why it is not served.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerPlan {
    pub keys: Vec<Key>,
    pub problem: Option<String>,
}

impl Wanted {
    fn serve(&mut self, peer: &Lease, objects: Vec<Object>) {
        let plan = self.peers.entry(peer.key).or_default();
        for object in objects {
            plan.keys.push(object.key());
            self.desired.insert(object);
        }
    }

    fn refuse(&mut self, peer: &Lease, problem: String) {
        self.peers.entry(peer.key).or_default().problem = Some(problem);
    }
}

pub trait Dataplane {
    /// As it stands in leases; empty for udp.
    fn backend_type(&self) -> &'static str;

    /// The overlay's device, if there is one.
    fn device(&self) -> Option<&IfName>;

    /// The value that this node publishes.
    fn lease_attrs(&self, public_ip: Ipv4Addr) -> LeaseAttrs;

    /// MTU of pods on an underlay of this MTU.
    fn pod_mtu(&self, underlay_mtu: u32) -> u32;

    /// The address on a peer that answers a ping through the overlay.
    fn probe(&self, peer: &LeaseKey) -> IpAddr;

    /// Whether [`LocalNode::on_link`] decides anything.
    fn asks_for_on_link(&self) -> bool;

    /// `peers` are of this backend.
    fn desired(&self, local: &LocalNode, peers: &[&Lease]) -> Wanted;
}

/// The dataplane that the network configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    Vxlan(VxlanPlane),
    HostGw(HostGw),
    Udp(UdpPlane),
}

impl Backend {
    /// `vtep_mac` is this node's, durable: peers have it in their tables.
    pub fn new(config: &NetworkConfig, vtep_mac: Mac) -> Self {
        match &config.backend {
            BackendConfig::Vxlan(vxlan) => Self::Vxlan(VxlanPlane::new(vxlan.clone(), vtep_mac)),
            BackendConfig::HostGw => Self::HostGw(HostGw),
            BackendConfig::Udp(_) => Self::Udp(UdpPlane::new(config.v4.network)),
        }
    }

    /// What should be in the kernel for these leases. A lease of another backend's, or of an address that is no
    /// station's, is refused here, for all of them.
    pub fn desired(&self, local: &LocalNode, peers: &[Lease]) -> Wanted {
        let plane = self.plane();
        let (same, other): (Vec<_>, Vec<_>) =
            peers.iter().partition(|p| p.attrs.backend_type == plane.backend_type());
        let (broadcast, same): (Vec<_>, Vec<_>) =
            same.into_iter().partition(|p| Some(p.attrs.public_ip) == local.broadcast);
        let mut wanted = plane.desired(local, &same);
        for peer in broadcast {
            let (ip, dev) = (peer.attrs.public_ip, &local.underlay.iface);
            wanted.refuse(
                peer,
                format!("PublicIP = {ip}: expected a node's address, not {dev}'s broadcast one"),
            );
        }
        for peer in other {
            let theirs = &peer.attrs.backend_type;
            let ours = match plane.backend_type() {
                "" => "none, which is udp".to_owned(),
                ours => format!("{ours:?}"),
            };
            wanted.refuse(peer, format!("BackendType = {theirs:?}: expected {ours}, this node's"));
        }
        wanted
    }

    /// What can be asked whatever the backend is.
    pub fn plane(&self) -> &dyn Dataplane {
        match self {
            Self::Vxlan(plane) => plane,
            Self::HostGw(plane) => plane,
            Self::Udp(plane) => plane,
        }
    }
}

/// Of the family of `subnet`.
pub(crate) fn public_addr(peer: &Lease, subnet: Subnet) -> Result<IpAddr, String> {
    let key = if subnet.is_ipv4() { "PublicIP" } else { "PublicIPv6" };
    let missing = || format!("{key} is missing: expected the address that leads to {subnet}");
    peer.attrs.public_addr(subnet).ok_or_else(missing)
}
