//! The border to the Linux kernel: one look at it, and operations on it. Nothing of netlink crosses this border.

mod apply;
mod attributes;
mod decode;
mod encode;
mod inbox;
mod iptables;
mod linux;
mod monitor;
mod nft;
mod own;
mod remember;
mod shaping;
mod socket;
mod sysctl;

#[cfg(test)]
pub(crate) mod fake;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use weft_shared::names::{LINK_GROUP, is_host_ifname};
use weft_shared::{IfName, Mac, Subnet};

use crate::firewall::Ruleset;
use crate::object::{AddrForm, AddrScope, BridgePort, FdbPath, Link, LinkKind, Object, Obstacle, Op, Route};

pub use linux::LinuxKernel;
pub use monitor::{Monitor, Neighbours};
pub use own::OwnRoute;
pub use remember::Remembering;

/// A kernel that can be looked at and changed; blocking, one caller at a time.
pub trait Kernel {
    /// One consistent look; neighbours and forwarding entries are those of `device`. An interrupted dump is repeated,
    /// never returned.
    fn dump(&mut self, device: Option<&IfName>) -> Result<Dump, KernelError>;

    /// Settings by their path below `/proc/sys`; one that this kernel does not have is absent.
    fn sysctls(&mut self, paths: &[&str]) -> Result<BTreeMap<String, String>, KernelError>;

    /// The packet filter, as far as it concerns us. A look that finds it unchanged costs next to nothing, if it is told
    /// that: iptables-legacy, which tells nobody, is looked at once in `legacy_period`.
    fn firewall(&mut self, legacy_period: Duration) -> Result<Ruleset, KernelError>;

    /// What stands where these limits are wanted.
    fn shaping(&mut self, wanted: &[&Object]) -> Result<Vec<Object>, KernelError>;

    /// Those of `peers` that are reached through `dev` without a gateway, by the kernel's own route lookup.
    fn on_link(&mut self, dev: &IfName, peers: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, KernelError>;

    /// Carries out every operation it can; one result for each, in order.
    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>>;
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dump {
    pub links: BTreeMap<IfName, FoundLink>,
    pub addrs: Vec<FoundAddr>,
    /// Permanent neighbours of the device.
    pub neighs: Vec<(IfName, IpAddr, Mac)>,
    /// Permanent unicast forwarding entries of the device.
    pub fdb: Vec<(IfName, Mac, IpAddr, FdbPath)>,
    /// The main table, the routes to one subnet in the order in which packets try them.
    pub routes: Vec<(Subnet, Route)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLink {
    pub index: u32,
    pub link: Link,
    pub group: u32,
    /// What a veth or bridge port needs; found for every link.
    pub port: BridgePort,
}

impl FoundLink {
    /// Whether it is a pod's host-side veth that we made: both marks are in the message that creates it.
    pub fn is_our_veth(&self, name: &IfName) -> bool {
        self.group == LINK_GROUP && is_host_ifname(name.as_str())
    }

    pub fn is_veth(&self) -> bool {
        matches!(&self.link.kind, LinkKind::Other(kind) if kind == "veth")
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundAddr {
    pub dev: IfName,
    pub addr: IpNetwork,
    pub scope: AddrScope,
    pub form: AddrForm,
    pub deprecated: bool,
    pub temporary: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    #[error("{0}")]
    Refused(Errno),
    #[error("the kernel changed while it was listed, {0} times in a row")]
    Interrupted(u32),
    #[error("device {0} does not exist")]
    NoDevice(IfName),
    #[error(
        "veth {0} was made for a pod and bears neither weft's name nor its mark: delete it, its pod still has the address"
    )]
    Unmarked(IfName),
    #[error("{name} exists and is a {kind}, not a bridge")]
    NotABridge { name: IfName, kind: String },
    #[error(
        "{0} exists: another device has the name, perhaps as its alternative name, or is a VXLAN device of the same VNI and port"
    )]
    Taken(IfName),
    #[error("/dev/net/tun: {0}")]
    NoTun(String),
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    #[error("netlink: {0}")]
    Socket(String),
    #[error("netlink: a message could not be read: {0}")]
    Malformed(String),
    #[error(
        "this kernel has no nf_tables (module nf_tables): neither masquerade nor accept rules are possible"
    )]
    NoNftables,
    #[error(
        "this kernel does not list connections (module nf_conntrack_netlink): UDP flows cannot be led to another pod"
    )]
    NoConntrack,
    #[error("{0}")]
    Iptables(String),
    #[error("does not stay as it was set: somebody else changes it")]
    Contested,
    #[error("/proc/sys/{path}: {reason}")]
    Sysctl { path: String, reason: String },
}

/// An `errno` with its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&io::Error::from_raw_os_error(self.0), f)
    }
}

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error.to_string())
    }
}
