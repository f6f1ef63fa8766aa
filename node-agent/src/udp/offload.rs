//! What the packet path can leave to the kernel, each probed by trying and given up when the device refuses it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use nix::errno::Errno;

/// A capability, named as switch, status and metrics name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Offload {
    /// `IFF_VNET_HDR`: without it none of the four that follow.
    VnetHdr,
    /// Reads give TCP super-packets (`TUN_F_TSO4`, `TUN_F_TSO6`).
    TunTso,
    /// Reads give UDP super-packets (`TUN_F_USO4`, `TUN_F_USO6`; Linux 6.2).
    TunUso,
    /// Received TCP segments are written to the device as one.
    CoalesceTcp,
    /// Received UDP datagrams are written to the device as one (Linux 6.2).
    CoalesceUdp,
    /// `UDP_SEGMENT`: one send, many datagrams.
    UdpSegment,
    /// `UDP_GRO`: one receive, many datagrams.
    UdpGro,
    /// Reads of the device wait by themselves, and where they must not wait they say so (`RWF_NOWAIT` on TUN devices:
    /// Linux 6.5); without it `poll` waits.
    TunNowait,
}

/// So many datagrams the kernel takes at most as one, of the socket's as of the device's: `UDP_MAX_SEGMENTS` of linux/udp.h
/// before Linux 6.9; 128 since.
pub const UDP_MAX_SEGMENTS: u16 = 64;

/// Which capabilities may be tried; all of them by default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offloads(BTreeSet<Offload>);

/// What has been tried so far.
pub type Outcomes = BTreeMap<Offload, Outcome>;

/// What became of a capability.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    InUse,
    /// By the operator's switch.
    SwitchedOff,
    /// By the kernel, and how.
    Refused(String),
}

impl Offload {
    pub const ALL: [Self; 8] = [
        Self::VnetHdr,
        Self::TunTso,
        Self::TunUso,
        Self::CoalesceTcp,
        Self::CoalesceUdp,
        Self::UdpSegment,
        Self::UdpGro,
        Self::TunNowait,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::VnetHdr => "vnet-hdr",
            Self::TunTso => "tun-tso",
            Self::TunUso => "tun-uso",
            Self::CoalesceTcp => "coalesce-tcp",
            Self::CoalesceUdp => "coalesce-udp",
            Self::UdpSegment => "udp-segment",
            Self::UdpGro => "udp-gro",
            Self::TunNowait => "tun-nowait",
        }
    }
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Outcome {
    /// Tries it, if it may be tried.
    pub(super) fn of<T>(allowed: bool, call: &str, attempt: impl FnOnce() -> Result<T, Errno>) -> Self {
        if !allowed {
            return Self::SwitchedOff;
        }
        match attempt() {
            Ok(_) => Self::InUse,
            Err(errno) => Self::refused(call, errno),
        }
    }

    pub(super) fn refused(call: &str, errno: Errno) -> Self {
        Self::Refused(format!("{call}: {}", errno.desc()))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse => f.write_str("in use"),
            Self::SwitchedOff => f.write_str("switched off"),
            Self::Refused(how) => write!(f, "refused: {how}"),
        }
    }
}

impl Default for Offloads {
    fn default() -> Self {
        Self(Offload::ALL.into())
    }
}

impl Offloads {
    pub fn without(mut self, off: Offload) -> Self {
        self.0.remove(&off);
        self
    }

    pub fn allows(&self, offload: Offload) -> bool {
        self.0.contains(&offload)
    }
}
