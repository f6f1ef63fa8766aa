//! As much of rtnetlink(7) as the floor program needs.

use std::io::{self, Read as _};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

const HEADER: usize = 16;
const PATIENCE: Duration = Duration::from_secs(10);
const REQUEST: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
/// linux/netlink.h
pub(super) const NESTED: u16 = 0x8000;

/// A message without its sequence number.
#[derive(Debug)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// `fixed` is its fixed part.
    pub(super) fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags as u16 | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        push(&mut self.0, kind, value);
        self
    }

    /// An attribute that holds others.
    pub(super) fn nest(self, kind: u16, inner: &[(u16, &[u8])]) -> Self {
        self.with(kind | NESTED, &attributes(&[], inner))
    }
}

/// The value of an attribute that holds others, behind a fixed part that may be empty.
pub(super) fn attributes(fixed: &[u8], inner: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = fixed.to_vec();
    for (kind, value) in inner {
        push(&mut bytes, *kind, value);
    }
    bytes
}

/// With its terminating zero.
pub(super) fn text(value: &str) -> Vec<u8> {
    [value.as_bytes(), &[0]].concat()
}

fn push(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    to.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// A socket in the network namespace where it was opened.
#[derive(Debug)]
pub(super) struct Netlink(Socket);

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let protocol = Protocol::from(libc::NETLINK_ROUTE);
        let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(protocol))?;
        // What the kernel cannot read it does not answer.
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// Sends all in one system call; each must succeed. The payloads of what came back, but for the acknowledgements.
    pub(super) fn ask(&mut self, messages: Vec<Message>) -> Result<Vec<Vec<u8>>> {
        let mut bytes = Vec::new();
        let mut open = messages.len();
        for (number, Message(mut message)) in messages.into_iter().enumerate() {
            message[8..12].copy_from_slice(&(number as u32).to_ne_bytes());
            let length = message.len() as u32;
            message[..4].copy_from_slice(&length.to_ne_bytes());
            bytes.append(&mut message);
        }
        self.0.send(&bytes)?;
        let (mut buffer, mut payloads) = (vec![0; 32 << 10], Vec::new());
        while open > 0 {
            let length = self.0.read(&mut buffer)?;
            let mut rest = &buffer[..length];
            while rest.len() >= HEADER {
                let length = u32_at(rest, 0) as usize;
                ensure!(length >= HEADER + 4 && length <= rest.len(), "a message of {length} bytes");
                let (kind, payload) = (u16::from_ne_bytes([rest[4], rest[5]]), &rest[HEADER..length]);
                if kind != libc::NLMSG_ERROR as u16 {
                    payloads.push(payload.to_vec());
                } else if u32_at(payload, 0) == 0 {
                    open -= 1;
                } else {
                    let error = io::Error::from_raw_os_error(-(u32_at(payload, 0) as i32));
                    bail!("message {}: {error}", u32_at(rest, 8));
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
        Ok(payloads)
    }
}

/// 0 where there is nothing.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_comes_back_and_a_refusal_names_its_message() -> Result<()> {
        let ask =
            |name: &str| Message::new(libc::RTM_GETLINK, 0, &[0; 16]).with(libc::IFLA_IFNAME, &text(name));
        let mut netlink = Netlink::open()?;
        let found = netlink.ask(vec![ask("lo"), ask("lo")])?;
        assert_eq!(found.iter().map(|payload| u32_at(payload, 4)).collect::<Vec<_>>(), [1, 1]);
        let error = netlink.ask(vec![ask("lo"), ask("no-such-link")]).expect_err("no link").to_string();
        assert!(error.starts_with("message 1: No such device"), "{error}");
        Ok(())
    }

    #[test]
    fn attributes_are_padded_and_nests_hold_theirs() {
        let Message(bytes) = Message::new(16, 0, &[]).nest(18, &[(1, b"veth\0"), (2, &[7])]);
        let nest = [24_u16.to_ne_bytes(), (18 | NESTED).to_ne_bytes()].concat();
        assert_eq!(bytes[HEADER..HEADER + 4], nest);
        assert_eq!(bytes[HEADER + 8..HEADER + 16], *b"veth\0\0\0\0");
        assert_eq!((bytes.len() - HEADER, bytes[HEADER + 20]), (24, 7));
    }
}
