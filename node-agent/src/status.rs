//! What the agent says of itself: one document for `/debug/state`, `weftctl status --json` and readiness.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use weft_shared::lease::LeaseKey;
use weft_shared::{IfName, Subnet};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: String,
    /// The first ADD can succeed.
    pub ready: bool,
    /// What readiness waits for; empty when ready.
    pub waiting_for: Vec<String>,
    pub store: StoreStatus,
    pub network: Option<NetworkStatus>,
    pub lease: Option<LeaseStatus>,
    pub underlay: Option<UnderlayStatus>,
    pub dataplane: Option<DataplaneStatus>,
    pub peers: Vec<PeerStatus>,
    /// Leases and entries of the store that are not used, each with the reason.
    pub refused: Vec<RefusedLease>,
    pub pods: PodStatus,
    pub host: HostStatus,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// `etcd` or `embedded`.
    pub kind: String,
    pub location: String,
    pub connected: bool,
    pub problem: Option<String>,
    /// An embedded store serves the agents of one machine only.
    pub one_machine_only: bool,
    /// Since start: how often the watch had to begin anew with a snapshot.
    pub relists: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkStatus {
    pub network: Subnet,
    pub subnet_len: u8,
    /// `vxlan` or `host-gw`.
    pub backend: String,
    /// UDP port of the tunnel, if the backend has one.
    pub port: Option<u16>,
    pub vni: Option<u32>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeaseStatus {
    pub key: LeaseKey,
    pub public_ip: IpAddr,
    /// `held`, `acquiring` or `lost`.
    pub state: String,
    /// Seconds; absent for a reservation, which does not expire.
    pub expires_in: Option<u64>,
    pub problem: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UnderlayStatus {
    pub iface: IfName,
    pub address: IpAddr,
    pub mtu: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DataplaneStatus {
    /// The overlay's device, if the backend has one.
    pub device: Option<IfName>,
    /// MTU of pods.
    pub mtu: u32,
    /// Objects that should be in the kernel, and are.
    pub objects: usize,
    /// Objects that should be and are not, or should not and are.
    pub pending: Vec<PendingObject>,
    /// Passes since start, and operations that mended something after the first complete pass.
    pub passes: u64,
    pub repairs: u64,
    pub last_error: Option<String>,
    /// Seconds since the last complete pass.
    pub last_pass_ago: Option<f64>,
    /// Netlink events are being received; without them only the sweep repairs.
    pub monitor: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PendingObject {
    pub object: String,
    pub error: String,
    pub attempts: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub key: LeaseKey,
    pub public_ip: IpAddr,
    pub backend: String,
    /// Every object of this peer is in the kernel.
    pub programmed: bool,
    /// Why not, or why the dataplane cannot serve it.
    pub problem: Option<String>,
    /// The address that answers an overlay ping.
    pub overlay_probe: IpAddr,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusedLease {
    pub key: String,
    pub reason: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PodStatus {
    pub attachments: usize,
    pub addresses_used: usize,
    pub addresses_total: usize,
    pub bridges: Vec<IfName>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostStatus {
    pub hostname: String,
    pub kernel: String,
    pub distribution: String,
    /// Seconds.
    pub host_uptime: u64,
    pub agent_uptime: u64,
    /// Bytes.
    pub agent_memory: u64,
    /// Seconds of processor time since the agent's start.
    pub agent_cpu: f64,
}
