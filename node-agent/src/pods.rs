//! The border between address management and the rest of the agent: what a pod gets, and what wired pods need kept.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;

use weft_shared::protocol::{Bandwidth, BridgeOptions, Failure};
use weft_shared::{IfName, Mac, Subnet};

use crate::firewall::HostPort;

/// The rest of the agent, as address management sees it.
///
/// A future that is returned here is always driven to its end: what it asked of the kernel is over when it is.
pub trait Fabric: Send + Sync + 'static {
    fn pod_network(&self) -> Result<PodNetwork, NotReady>;

    /// Whether pods may hang on a bridge of this name; asked before anything is recorded.
    fn may_be_bridge(&self, name: &IfName) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Makes the bridge real, with the gateways that [`PodNeeds::bridges`] names for it (published before the call).
    fn ensure_bridge(&self, name: &IfName) -> impl Future<Output = Result<DeviceFacts, Failure>> + Send;

    /// Deletes a host-side veth if, and only if, it carries our mark; `Ok` when nothing of ours has that name any more.
    fn delete_veth(&self, name: &IfName) -> impl Future<Output = Result<(), String>> + Send;

    /// Deletes the veth of that index, whatever its name is by now, if it carries our mark. An error while one is there
    /// that has lost it: whoever still has the other end has the address.
    fn delete_by_index(&self, ifindex: u32) -> impl Future<Output = Result<(), String>> + Send;

    /// Both: the veth of an attachment, and what has become of it if it was renamed.
    fn delete_veths(
        &self,
        name: &IfName,
        wired: Option<u32>,
    ) -> impl Future<Output = Result<(), String>> + Send {
        async move {
            self.delete_veth(name).await?;
            match wired {
                Some(ifindex) => self.delete_by_index(ifindex).await,
                None => Ok(()),
            }
        }
    }

    /// Makes the node as [`PodNeeds`] says (published before the call); fails for what is named here alone.
    fn ensure(&self, extras: Extras) -> impl Future<Output = Result<(), String>> + Send;

    /// Puts a limited attachment's limits in place, as [`PodNeeds::bridge_ports`] names them (published before the call).
    fn ensure_limits(&self, veth: &IfName) -> impl Future<Output = Result<(), String>> + Send;

    /// Whether a link of this index exists in the node's namespace, whatever its name and mark: asked before an
    /// attachment counts as dead.
    fn link_exists(&self, ifindex: u32) -> impl Future<Output = Result<bool, String>> + Send;
}

/// What an attachment has beside its port and its address, to be in place before its ADD is answered and gone before its
/// address is free.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extras {
    /// Host ports lead where [`PodNeeds::host_ports`] says, and nowhere else.
    pub host_ports: Option<OldFlows>,
    /// Just the addresses of [`PodNeeds::masqueraded`] are masqueraded.
    pub masquerade: bool,
    /// This bridge carries no other addresses than its gateways.
    pub forced: Option<IfName>,
}

/// UDP flows that began before their host port led where it leads now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldFlows {
    /// Or the pod whose port it is would not be reached.
    MustFollow,
    /// It is tried, and tried again. A kernel that cannot be asked to (no nf_conntrack_netlink) must not keep an address
    /// from being freed, nor a TCP port from its pod.
    MayLag,
}

/// Why no pod can be added now, in words that name what is awaited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// New pods have to wait; those that are wired do not suffer.
    #[error("{0}")]
    Waiting(String),
    /// Those that are wired may suffer as well: another node has taken the subnet, the overlay's device cannot be made.
    #[error("{0}")]
    Degraded(String),
}

/// What a pod that is added now gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetwork {
    /// The leased subnet of this node: addresses come out of it, `.1` is the gateway.
    pub subnet: Subnet,
    /// The overlay's networks, routed through the gateway.
    pub overlay: Vec<Subnet>,
    /// The dataplane's MTU.
    pub mtu: u32,
    /// The UDP port that the peers' packets come to.
    pub tunnel_port: Option<u16>,
}

/// A device as it stands in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFacts {
    pub ifindex: u32,
    pub mac: Mac,
}

/// What the attachments in the records need from the kernel: their ports, and the bridges they hang on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodNeeds {
    /// Committed attachments, by host-side veth.
    pub bridge_ports: BTreeMap<IfName, BridgePortNeed>,
    /// Bridges that Reserve has named since boot, and the leased subnets whose gateway each carries: the one that new
    /// pods get, and those of pods that are still there.
    pub bridges: BTreeMap<IfName, BridgeNeed>,
    /// Ports of the host that lead to attachments, from Reserve on: the runtime is told of a pod that can be reached.
    pub host_ports: BTreeSet<HostPort>,
    /// Addresses of attachments that leave the overlay with the node's, from Reserve on.
    pub masqueraded: BTreeSet<IpAddr>,
    /// Bridges that carry no IPv4 addresses but the gateways'.
    pub forced: BTreeSet<IfName>,
}

impl PodNeeds {
    /// In which pods live, or will.
    pub fn subnets(&self) -> impl Iterator<Item = Subnet> {
        self.bridges.values().flat_map(|need| need.subnets.iter().copied())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgePortNeed {
    pub ifindex: u32,
    pub options: BridgeOptions,
    pub mtu: u32,
    pub limits: Bandwidth,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeNeed {
    pub subnets: Vec<Subnet>,
    pub mtu: u32,
    /// What pods have in their neighbour tables: it stays, whoever changes or replaces the bridge. `None` until the
    /// first pod has been told.
    pub mac: Option<Mac>,
}

/// A host-side veth with our link group, under whatever name, as the last pass over the kernel saw it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeenVeth {
    pub name: IfName,
    pub ifindex: u32,
}

/// One complete look at the kernel: everything with our mark that was there. `pass` is 0 before the first look and one
/// more with each; looks do not overlap, so whatever is done while look `n` is the last one published is certain to
/// be seen by look `n + 2`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SeenVeths {
    pub pass: u64,
    pub veths: Vec<SeenVeth>,
}
