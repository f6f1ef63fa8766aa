//! A small rtnetlink client over a blocking socket.
//!
//! An ADD lives for a few milliseconds and needs five kinds of message, so they are written by hand: a general codec
//! costs the process more time to start than the kernel's whole work (net/core/rtnetlink.c, drivers/net/veth.c,
//! net/bridge/br_netlink.c). Several messages go in one `sendmsg`; replies are matched by sequence number, since a
//! refused message answers in its own time and an acknowledgement says nothing about its neighbours.

mod inet;
mod link;
mod message;
mod uapi;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub(crate) use inet::{Address, Route};
pub(crate) use link::{Link, PortOptions, VethPair};
use message::{Batch, attribute, messages, text, u32_at};
use uapi::*;

/// The kernel's dump and reply datagrams are at most 32 KiB (`netlink_recvmsg`).
const RECEIVE_BUFFER: usize = 32 << 10;
/// How often a dump that changed under our hands is begun again.
const DUMP_ATTEMPTS: usize = 5;

#[derive(Debug, thiserror::Error)]
pub(crate) enum NetlinkError {
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    #[error("{errno}{}{text}", if text.is_empty() { "" } else { ": " })]
    Refused { errno: Errno, text: String },
    #[error("the kernel's answer could not be read")]
    Garbled,
    #[error("the table changed under {DUMP_ATTEMPTS} readings")]
    Interrupted,
}

impl NetlinkError {
    pub(crate) fn is(&self, expected: Errno) -> bool {
        matches!(self, Self::Refused { errno, .. } if *errno == expected)
    }
}

/// What became of one message: the payloads it was answered with, or the refusal.
type Outcome = Result<Vec<Vec<u8>>, NetlinkError>;

/// A message on its way to its outcome.
#[derive(Default)]
struct Pending {
    payloads: Vec<Vec<u8>>,
    interrupted: bool,
    ended: Option<Result<(), NetlinkError>>,
}

/// A socket in the network namespace where it was opened, wherever the thread goes afterwards.
pub(crate) struct Netlink {
    socket: Socket,
    next_seq: u32,
    received: Vec<u8>,
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_ROUTE)?;
        // Extended acknowledgements say in words what was wrong; strict checking makes dumps honour their filter.
        // Kernels that lack them work without.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, next_seq: 1, received: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    fn batch(&self) -> Batch {
        Batch::starting_at(self.next_seq)
    }

    /// Sends a batch and waits for the end of each of its messages.
    fn transact(&mut self, batch: Batch) -> Result<Vec<Outcome>, NetlinkError> {
        self.next_seq = self.next_seq.wrapping_add(batch.len as u32);
        self.socket.send_to(&batch.bytes, &SocketAddr::new(0, 0), 0)?;
        let mut pending: Vec<_> = (0..batch.len).map(|_| Pending::default()).collect();
        while pending.iter().any(|p| p.ended.is_none()) {
            self.received.clear();
            self.socket.recv_from(&mut self.received, 0)?;
            for message in messages(&self.received) {
                // Anything else is late news of an earlier batch.
                let Some(p) = pending.get_mut(message.seq.wrapping_sub(batch.first_seq) as usize) else {
                    continue;
                };
                p.interrupted |= message.kind != NLMSG_ERROR && message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_ERROR => p.ended = Some(verdict(message.payload, message.flags)),
                    NLMSG_DONE if p.interrupted => p.ended = Some(Err(NetlinkError::Interrupted)),
                    NLMSG_DONE => p.ended = Some(Ok(())),
                    _ => p.payloads.push(message.payload.to_vec()),
                }
            }
        }
        let outcome = |p: Pending| p.ended.unwrap_or(Err(NetlinkError::Garbled)).map(|()| p.payloads);
        Ok(pending.into_iter().map(outcome).collect())
    }

    /// Sends a batch of which every message must succeed.
    fn apply(&mut self, batch: Batch) -> Result<(), NetlinkError> {
        self.transact(batch)?.into_iter().try_for_each(|outcome| outcome.map(drop))
    }

    fn dump<T>(
        &mut self,
        kind: u16,
        fixed: &[u8],
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut batch = self.batch();
            batch.push(kind, NLM_F_DUMP, fixed, |_| {});
            match self.transact(batch)?.pop() {
                Some(Err(NetlinkError::Interrupted)) => {}
                Some(outcome) => {
                    return Ok(outcome?.iter().filter_map(|payload| read(payload)).collect());
                }
                None => return Err(NetlinkError::Garbled),
            }
        }
        Err(NetlinkError::Interrupted)
    }
}

/// `struct nlmsgerr`: the errno, the message it is about (its header alone when capped), then attributes.
fn verdict(payload: &[u8], flags: u16) -> Result<(), NetlinkError> {
    let code = u32_at(payload, 0).ok_or(NetlinkError::Garbled)? as i32;
    if code == 0 {
        return Ok(());
    }
    let request_len = u32_at(payload, 4).map_or(0, |len| len as usize);
    let skip = if flags & NLM_F_CAPPED != 0 { NLMSG_HEADER } else { request_len.next_multiple_of(4) };
    let attributes = payload.get(4 + skip..).filter(|_| flags & NLM_F_ACK_TLVS != 0).unwrap_or_default();
    let text = attribute(attributes, NLMSGERR_ATTR_MSG).and_then(text).unwrap_or_default();
    Err(NetlinkError::Refused { errno: Errno::from_raw(code.wrapping_neg()), text })
}

/// Link events of the namespace where it was opened.
pub(crate) struct LinkEvents(Socket);

impl LinkEvents {
    pub(crate) fn subscribe() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.add_membership(RTNLGRP_LINK)?;
        Ok(Self(socket))
    }

    /// Waits for news of one of these links, at most until `deadline`. False when there was none in time.
    pub(crate) fn wait_for(&self, links: &[u32], deadline: Instant) -> io::Result<bool> {
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            }
            buffer.clear();
            match self.0.recv_from(&mut buffer, 0) {
                // Overrun: something was lost, perhaps what is waited for.
                Err(e) if e.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(true),
                received => received?,
            };
            let is_about = |index: Option<u32>| index.is_some_and(|index| links.contains(&index));
            if messages(&buffer).any(|m| m.kind == RTM_NEWLINK && is_about(u32_at(m.payload, 4))) {
                return Ok(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_the_kernels_words() {
        let mut payload = (-17_i32).to_ne_bytes().to_vec();
        payload.extend_from_slice(&16_u32.to_ne_bytes());
        payload.extend_from_slice(&[0; 12]);
        let mut batch = Batch::starting_at(0);
        batch.push(0, 0, &[], |a| {
            a.str(NLMSGERR_ATTR_MSG, "name taken");
        });
        payload.extend_from_slice(&batch.bytes[NLMSG_HEADER..]);
        let error = verdict(&payload, NLM_F_CAPPED | NLM_F_ACK_TLVS).expect_err("refused");
        assert!(error.is(Errno::EEXIST) && error.to_string().ends_with(": name taken"), "{error}");
        let silent = verdict(&payload, 0).expect_err("refused");
        assert!(silent.is(Errno::EEXIST) && !silent.to_string().contains("name taken"));
        assert!(verdict(&0_u32.to_ne_bytes(), 0).is_ok());
        assert!(matches!(verdict(&[1], 0), Err(NetlinkError::Garbled)));
        // A length that lies must not reach beyond the message.
        payload[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(verdict(&payload, NLM_F_ACK_TLVS).is_err());
    }
}
