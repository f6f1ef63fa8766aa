//! Netlink datagrams, one after the other in a buffer that stays: a look at a node of many pods reads dozens of 32 KiB.

use std::io;

use netlink_sys::Socket;
use nix::libc::MSG_TRUNC;
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};

use super::KernelError;

/// The kernel answers within the system call, unless it waits for the RTNL lock behind a long teardown, or for another's
/// commit.
const ANSWER_SECONDS: i64 = 10;
/// A dump's datagrams have up to 32 KiB (net/netlink/af_netlink.c `netlink_recvmsg`), announcements less.
const LONGEST: usize = 64 << 10;

#[derive(Default)]
pub(super) struct Inbox(Vec<u8>);

impl Inbox {
    /// The next datagram, whole.
    pub(super) fn next(&mut self, socket: &Socket, flags: i32) -> io::Result<&[u8]> {
        self.0.clear();
        self.0.reserve(LONGEST);
        let length = socket.recv(&mut self.0, MSG_TRUNC | flags)?;
        if length > self.0.len() {
            return Err(io::Error::other(format!("a datagram of {length} bytes, longer than any expected")));
        }
        Ok(&self.0)
    }

    /// The next one of an answer that is due.
    pub(super) fn answer(&mut self, socket: &Socket, of: &str) -> Result<&[u8], KernelError> {
        loop {
            match self.next(socket, 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let silence = format!("no answer from {of} in {ANSWER_SECONDS} s");
                    return Err(KernelError::Socket(silence));
                }
                Err(e) => return Err(e.into()),
                Ok(_) => return Ok(&self.0),
            }
        }
    }
}

/// For a socket whose answers are waited for.
pub(super) fn patience(socket: &Socket) -> Result<(), KernelError> {
    receive_timeout(socket, ANSWER_SECONDS)
}

pub(super) fn receive_timeout(socket: &Socket, seconds: i64) -> Result<(), KernelError> {
    setsockopt(socket, ReceiveTimeout, &TimeVal::seconds(seconds))
        .map_err(|e| KernelError::Socket(e.to_string()))
}
