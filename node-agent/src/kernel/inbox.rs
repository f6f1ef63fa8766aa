//! Netlink datagrams, one after the other in a buffer that stays: a look at a node of many pods reads dozens of 32 KiB.

use std::io;

use netlink_sys::Socket;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};

use super::KernelError;

/// The kernel answers within the system call, unless it waits for the RTNL lock behind a long teardown, or for another's
/// commit.
const ANSWER_SECONDS: i64 = 10;
/// A dump's datagrams have up to 32 KiB (net/netlink/af_netlink.c `netlink_recvmsg`), announcements less.
const LONGEST: usize = 64 << 10;

pub(super) struct Inbox {
    /// Whose, in errors.
    sender: &'static str,
    datagram: Vec<u8>,
}

impl Inbox {
    pub(super) fn of(sender: &'static str) -> Self {
        Self { sender, datagram: Vec::new() }
    }

    /// The next datagram, whole; `EMSGSIZE` for one that is longer than any that is known of.
    pub(super) fn next(&mut self, socket: &Socket, flags: i32) -> io::Result<&[u8]> {
        self.datagram.clear();
        self.datagram.reserve(LONGEST);
        let length = socket.recv(&mut self.datagram, libc::MSG_TRUNC | flags)?;
        if length > self.datagram.len() {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        Ok(&self.datagram)
    }

    /// The next one of an answer that is due.
    pub(super) fn answer(&mut self, socket: &Socket) -> Result<&[u8], KernelError> {
        loop {
            match self.next(socket, 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let silence = format!("no answer from {} in {ANSWER_SECONDS} s", self.sender);
                    return Err(KernelError::Socket(silence));
                }
                Err(e) => return Err(e.into()),
                Ok(_) => return Ok(&self.datagram),
            }
        }
    }
}

/// For a socket whose answers are waited for.
pub(super) fn answer_timeout(socket: &Socket) -> Result<(), KernelError> {
    receive_timeout(socket, ANSWER_SECONDS)
}

/// A receive that finds nothing ends after `seconds` with `EAGAIN`.
pub(super) fn receive_timeout(socket: &Socket, seconds: i64) -> Result<(), KernelError> {
    setsockopt(socket, ReceiveTimeout, &TimeVal::seconds(seconds))
        .map_err(|e| KernelError::Socket(e.to_string()))
}
