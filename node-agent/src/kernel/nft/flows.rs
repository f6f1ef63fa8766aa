//! Connection tracking by its own netlink messages (uapi: linux/netfilter/nfnetlink_conntrack.h): UDP flows are listed and
//! deleted one by one. A flow that is deleted begins anew with its next packet, by the rules that are there then.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::libc::{EINVAL, ENOENT, EOPNOTSUPP};
use weft_shared::protocol::Protocol;

use super::socket::{CHANGE, NftSocket};
use super::wire::{Message, NESTED, Parsed, Received};
use crate::firewall::Family;
use crate::firewall::host_ports::Flow;
use crate::firewall::rule::Side;
use crate::kernel::{Errno, KernelError};

/// `NFNL_SUBSYS_CTNETLINK`, `IPCTNL_MSG_CT_GET`, `IPCTNL_MSG_CT_DELETE`.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;

/// `CTA_*`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_ADDRESSES: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const PROTOCOL: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;

/// A table that changes all the time is listed anew so often; what such a list lacks has just begun.
const TRIES: u32 = 3;

/// A UDP flow with what the kernel tells it apart by.
#[derive(Debug)]
pub(super) struct ListedFlow {
    pub(super) flow: Flow,
    family: Family,
    key: Vec<(u16, Vec<u8>)>,
}

/// Every UDP flow of a family.
pub(super) fn list(socket: &mut NftSocket, family: Family) -> Result<Vec<ListedFlow>, KernelError> {
    for _ in 0..TRIES {
        let read = |message: &Received<'_>| listed(message, family);
        if let Some(flows) = socket.dump(GET, family.nfproto(), |m| m, read).map_err(absent)? {
            return Ok(flows);
        }
    }
    Err(KernelError::Interrupted(TRIES))
}

/// A flow that is gone already is as good.
pub(super) fn delete(socket: &mut NftSocket, listed: &ListedFlow) -> Result<(), KernelError> {
    let message = Message::new(DELETE, CHANGE, listed.family.nfproto(), 0);
    let message = listed.key.iter().fold(message, |message, (kind, value)| message.attribute(*kind, value));
    match socket.request(message) {
        Err(KernelError::Refused(Errno(ENOENT))) => Ok(()),
        other => other,
    }
}

/// No such subsystem: the module is missing and cannot be loaded.
fn absent(error: KernelError) -> KernelError {
    match error {
        KernelError::Refused(Errno(EINVAL | EOPNOTSUPP)) => KernelError::NoConntrack,
        other => other,
    }
}

fn listed(message: &Received<'_>, family: Family) -> Option<ListedFlow> {
    let attributes = message.attributes();
    let (original, reply) = (attributes.nested(ORIGINAL)?, attributes.nested(REPLY)?);
    let flow = Flow { to: end(original, Side::Destination)?, answers: end(reply, Side::Source)? };
    let mut key = vec![(ORIGINAL | NESTED, original.0.to_vec())];
    key.extend([ID, ZONE].into_iter().filter_map(|kind| Some((kind, attributes.get(kind)?.to_vec()))));
    Some(ListedFlow { flow, family, key })
}

/// One end of a UDP flow's direction; `None` for another protocol.
fn end(tuple: Parsed<'_>, side: Side) -> Option<SocketAddr> {
    let (protocol, addresses) = (tuple.nested(TUPLE_PROTOCOL)?, tuple.nested(TUPLE_ADDRESSES)?);
    if protocol.get(PROTOCOL)? != [Protocol::Udp.number()] {
        return None;
    }
    // `CTA_IP_V4_SRC` to `CTA_IP_V6_DST`.
    let (v4, v6, port) = match side {
        Side::Source => (1, 3, SOURCE_PORT),
        Side::Destination => (2, 4, DESTINATION_PORT),
    };
    let address: IpAddr = match addresses.get(v4) {
        Some(bytes) => Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into(),
        None => Ipv6Addr::from(<[u8; 16]>::try_from(addresses.get(v6)?).ok()?).into(),
    };
    Some(SocketAddr::new(address, u16::from_be_bytes(protocol.get(port)?.try_into().ok()?)))
}
