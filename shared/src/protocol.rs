//! What the plugin says to the agent over the unix socket.
//!
//! A frame is a four-byte big-endian length and that many bytes of JSON, at most [`MAX_FRAME`]. Every frame carries the
//! protocol version; unknown fields are ignored, so either side can be upgraded first.
//!
//! ADD is a transaction on one connection: `Reserve`, wire, `Commit`. A connection that closes between the two tells
//! the agent to undo the reservation.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use crate::bandwidth::{Bandwidth, Limit};
pub use crate::cni::Failure;
use crate::cni::{ContainerId, NetworkName};
pub use crate::host_ports::{PortMapping, Protocol, WrongMapping};
use crate::{IfName, Mac, Subnet};

pub const PROTOCOL_VERSION: u32 = 1;
/// A GC request of a full node (250 pods) is about 30 KiB.
pub const MAX_FRAME: usize = 1 << 20;

/// What the runtime calls an attachment: one interface of one container in one network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    pub network: NetworkName,
    pub container_id: ContainerId,
    pub ifname: IfName,
}

/// In one word, for logs: none of the parts has a slash.
impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container_id, self.ifname)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// ADD, first half: record the intent, answer [`Reply::Reserved`].
    Reserve(Reserve),
    /// ADD, second half, on the same connection: the veth is wired.
    Commit(Commit),
    /// DEL, or an ADD whose result could not be delivered. Done when the address is free and the veth is gone.
    Release { attachment: Attachment },
    /// CHECK: does the agent still hold this attachment with these addresses?
    Check { attachment: Attachment, addresses: Vec<IpAddr> },
    /// GC: every attachment of `network` that is not in `valid` goes.
    Gc { network: NetworkName, valid: Vec<Attachment> },
    /// STATUS: would an ADD succeed now?
    Status,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reserve {
    pub attachment: Attachment,
    /// `CNI_NETNS` as given: for people and logs, never evidence.
    pub netns: String,
    /// `SO_NETNS_COOKIE` of the container's network namespace: its identity for as long as this boot lasts.
    pub netns_cookie: Option<u64>,
    /// Addresses that must be assigned; empty means the agent chooses.
    #[serde(default)]
    pub requested: Vec<IpAddr>,
    pub bridge: BridgeOptions,
    /// `namespace/name` of the pod, when the runtime said so: for people.
    #[serde(default)]
    pub pod: Option<String>,
    /// Ports of the host that lead to the pod.
    #[serde(default, rename = "ports", skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<PortMapping>,
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
}

/// What the network configuration asks of the bridge and of this attachment's port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeOptions {
    pub name: IfName,
    /// Frames may leave through the port they came in by: a pod reaches itself through a Service.
    pub hairpin: bool,
    /// The port may talk to non-isolated ports only (`BRIDGE_ISOLATED`).
    pub isolated: bool,
    /// In bytes, at most the dataplane's MTU; absent means the dataplane's.
    pub mtu: Option<u32>,
    /// IPv4 addresses on the bridge that weft has not put there go.
    #[serde(default, skip_serializing_if = "is_false")]
    pub force_address: bool,
    /// What the pod sends out of the overlay has the node's address, whatever the node does for the others.
    #[serde(default, skip_serializing_if = "is_false")]
    pub masquerade: bool,
}

impl BridgeOptions {
    /// What an older agent would take for absent, and leave undone.
    pub fn needs_newer_agent(&self) -> bool {
        self.force_address || self.masquerade
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    pub attachment: Attachment,
    pub host_ifindex: u32,
    pub host_mac: Mac,
    pub container_mac: Mac,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Reserved(Reservation),
    Done,
    Failed(Failure),
}

/// Everything the plugin needs to wire the container; it asks the kernel nothing that the agent knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reservation {
    pub addresses: Vec<PodAddress>,
    /// Prefixes that go through the gateway even when the pod has no default route of ours: the overlay.
    pub overlay: Vec<Subnet>,
    /// Of the pod's interface, in bytes.
    pub mtu: u32,
    pub bridge: IfName,
    /// Index of the bridge in the node's network namespace.
    pub bridge_ifindex: u32,
    pub bridge_mac: Mac,
    pub host_ifname: IfName,
    /// Those of the request, in place. An agent that knows nothing of them answers none, and is found out by that.
    #[serde(default, rename = "ports", skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<PortMapping>,
    /// In the same way; in place from Commit on.
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
    /// The request's, as they were understood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<BridgeOptions>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddress {
    /// The pod's address with the leased subnet's prefix length.
    pub address: IpNetwork,
    pub gateway: IpAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the other side closed the connection")]
    Closed,
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLong(usize),
    #[error(
        "the other side speaks protocol version {0}, this side version {PROTOCOL_VERSION}: upgrade weft and weftd together"
    )]
    Version(u32),
    #[error("frame is not a message of this protocol: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    body: T,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// One frame, length included.
pub fn encode<T: Serialize>(body: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, &Envelope { version: PROTOCOL_VERSION, body })?;
    let len = frame.len() - 4;
    if len > MAX_FRAME {
        return Err(FrameError::TooLong(len));
    }
    frame[..4].copy_from_slice(&(len as u32).to_be_bytes());
    Ok(frame)
}

/// The length that a frame's first four bytes announce.
pub fn frame_len(header: [u8; 4]) -> Result<usize, FrameError> {
    let len = u32::from_be_bytes(header) as usize;
    if len > MAX_FRAME { Err(FrameError::TooLong(len)) } else { Ok(len) }
}

/// Reads a frame's JSON; another version is told apart from nonsense.
pub fn decode<T: DeserializeOwned>(json: &[u8]) -> Result<T, FrameError> {
    let VersionOnly { version } = serde_json::from_slice(json)?;
    if version != PROTOCOL_VERSION {
        return Err(FrameError::Version(version));
    }
    Ok(serde_json::from_slice::<Envelope<T>>(json)?.body)
}

pub fn write_frame<T: Serialize>(to: &mut impl Write, body: &T) -> Result<(), FrameError> {
    Ok(to.write_all(&encode(body)?)?)
}

pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> Result<T, FrameError> {
    let eof_is_close = |e: io::Error| match e.kind() {
        io::ErrorKind::UnexpectedEof => FrameError::Closed,
        _ => FrameError::Io(e),
    };
    let mut header = [0; 4];
    from.read_exact(&mut header).map_err(eof_is_close)?;
    let mut json = vec![0; frame_len(header)?];
    from.read_exact(&mut json).map_err(eof_is_close)?;
    decode(&json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_went() {
        let request = Request::Gc { network: "weft".parse().expect("name"), valid: vec![] };
        let mut wire = Vec::new();
        write_frame(&mut wire, &request).expect("encode");
        write_frame(&mut wire, &Request::Status).expect("encode");
        let mut reader = wire.as_slice();
        assert_eq!(read_frame::<Request>(&mut reader).expect("first"), request);
        assert_eq!(read_frame::<Request>(&mut reader).expect("second"), Request::Status);
        assert!(matches!(read_frame::<Request>(&mut reader), Err(FrameError::Closed)));
    }

    #[test]
    fn a_frame_that_lies_is_refused() {
        let too_long = ((MAX_FRAME + 1) as u32).to_be_bytes();
        assert!(matches!(read_frame::<Request>(&mut too_long.as_slice()), Err(FrameError::TooLong(_))));
        let cut = [0, 0, 0, 9, b'{'];
        assert!(matches!(read_frame::<Request>(&mut cut.as_slice()), Err(FrameError::Closed)));
        assert!(matches!(
            decode::<Request>(br#"{"version":2,"body":{"op":"new"}}"#),
            Err(FrameError::Version(2))
        ));
        assert!(matches!(
            decode::<Request>(br#"{"version":1,"body":{"op":"new"}}"#),
            Err(FrameError::Malformed(_))
        ));
        assert!(matches!(decode::<Request>(b"hello"), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn an_attachment_that_could_not_be_is_refused_by_name() {
        let release = |id: &str| {
            let attachment = format!(r#"{{"network":"weft","container_id":"{id}","ifname":"eth0"}}"#);
            let body = format!(r#"{{"version":1,"body":{{"op":"release","attachment":{attachment}}}}}"#);
            decode::<Request>(body.as_bytes())
        };
        assert!(matches!(release("c1"), Ok(Request::Release { .. })));
        let error = release("../a").expect_err("a path").to_string();
        assert!(error.contains(r#"container ID "../a" must begin"#), "{error}");
    }
}
