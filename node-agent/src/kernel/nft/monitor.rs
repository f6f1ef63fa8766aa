//! The packet filter's announcements. A commit of thousands of rules is announced rule by rule and closed by its new
//! generation: only that wakes, so that one commit is one look. What kube-proxy writes into chains of its own, again and
//! again, is no reason to look: none of them is on the forward hook or ours, and a sweep sees it all the same.

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::uapi::{DEL_CHAIN, DEL_RULE, GROUP_NFTABLES, NEW_CHAIN, NEW_GEN, NEW_RULE, chain, rule};
use super::wire::{Received, messages};
use crate::kernel::KernelError;

/// The first attribute of everything that is in a table names the table.
const TABLE: u16 = 1;

/// A socket that hears every commit in the network namespace of the calling thread; [`KernelError::NoNftables`] where
/// there is nothing to hear.
pub(crate) fn listen() -> Result<Socket, KernelError> {
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EPROTONOSUPPORT) => KernelError::NoNftables,
        _ => error.into(),
    })?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.add_membership(GROUP_NFTABLES)?;
    Ok(socket)
}

/// A commit as it is being announced, in one datagram or many.
#[derive(Debug, Default)]
pub(crate) struct Commit {
    matters: bool,
}

impl Commit {
    /// Whether a commit ends in this datagram that is a reason to look.
    pub(crate) fn heard(&mut self, datagram: &[u8]) -> bool {
        let mut wakes = false;
        for message in messages(datagram) {
            if message.kind == NEW_GEN {
                wakes |= std::mem::take(&mut self.matters);
            } else {
                self.matters |= !is_kube_proxys(&message);
            }
        }
        wakes
    }
}

fn is_kube_proxys(message: &Received<'_>) -> bool {
    let attributes = message.attributes();
    let chain = match message.kind {
        NEW_CHAIN | DEL_CHAIN if attributes.get(chain::HOOK).is_none() => attributes.text(chain::NAME),
        NEW_RULE | DEL_RULE => attributes.text(rule::CHAIN),
        _ => None,
    };
    let has_no_hook = !matches!(message.kind, NEW_CHAIN | DEL_CHAIN) || chain.is_some();
    (attributes.text(TABLE) == Some("kube-proxy") && has_no_hook)
        || chain.is_some_and(|name| name.starts_with("KUBE-"))
}

#[cfg(test)]
mod tests {
    use super::super::uapi::{NEW_TABLE, table};
    use super::super::wire::{Attributes, Message};
    use super::*;

    #[test]
    fn a_commit_wakes_once_at_its_end_and_kube_proxys_own_does_not() {
        let rule = |table: &str, chain: &str| {
            Message::new(NEW_RULE, 0, 2, 0).text(rule::TABLE, table).text(rule::CHAIN, chain).bytes(1)
        };
        let chain = |name: &str| {
            Message::new(NEW_CHAIN, 0, 2, 0).text(chain::TABLE, "kube-proxy").text(chain::NAME, name)
        };
        let end = || Message::new(NEW_GEN, 0, 0, 0).bytes(1);
        let mut commit = Commit::default();
        assert!(!commit.heard(&rule("filter", "FORWARD")), "not before its end");
        assert!(commit.heard(&end()));
        assert!(!commit.heard(&end()), "the next one is another");
        let kubes =
            [rule("nat", "KUBE-SVC-1"), rule("kube-proxy", "service"), chain("service").bytes(1), end()];
        assert!(!commit.heard(&kubes.concat()));
        assert!(commit.heard(&[rule("nat", "KUBE-SVC-1"), rule("filter", "FORWARD"), end()].concat()));
        let on_a_hook = chain("filter-forward").nested(chain::HOOK, &Attributes::default().number(1, 2));
        assert!(
            commit.heard(&[on_a_hook.bytes(1), end()].concat()),
            "a new chain may be on the forward hook"
        );
        let table = Message::new(NEW_TABLE, 0, 2, 0).text(table::NAME, "flannel-ipv4").bytes(1);
        assert!(commit.heard(&[table, end()].concat()));
    }
}
