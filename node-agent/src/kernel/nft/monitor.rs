//! The packet filter's announcements. A commit of thousands of rules is announced rule by rule and closed by its new
//! generation: only that wakes, so that one commit is one look.

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::uapi::{GROUP_NFTABLES, NEW_GEN};
use super::wire::messages;
use crate::kernel::KernelError;

/// A socket that hears every commit in the network namespace of the calling thread.
pub(crate) fn listen() -> Result<Socket, KernelError> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.add_membership(GROUP_NFTABLES)?;
    Ok(socket)
}

/// Whether a datagram ends a commit.
pub(crate) fn is_commit(datagram: &[u8]) -> bool {
    messages(datagram).any(|message| message.kind == NEW_GEN)
}
