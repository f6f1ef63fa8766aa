//! The three questions to the kernel that no safe interface asks.
#![expect(unsafe_code, reason = "ioctl, getsockopt and sigaction without a safe wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::alarm;

/// linux/nsfs.h
const NS_GET_NSTYPE: u32 = 0xb703;
/// asm-generic/socket.h (Linux 5.14)
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Whether a descriptor of nsfs is a network namespace's.
pub(crate) fn is_netns(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: NS_GET_NSTYPE takes no argument and writes to no memory of ours; the descriptor is open.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) };
    kind == libc::CLONE_NEWNET
}

/// The identity of the network namespace that a socket was opened in; an older kernel has none.
pub(crate) fn netns_cookie(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `cookie`, which is that long, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(cookie)
}

/// Ends the process after `span`, in whole seconds, whatever it then waits for, until dropped. A runtime may have left the signal
/// ignored or blocked; both are inherited through exec.
#[derive(Debug)]
pub(crate) struct Alarm(());

impl Alarm {
    pub(crate) fn arm(span: Duration) -> Self {
        // SAFETY: SIG_DFL installs no handler, so no code of ours runs in a signal's context.
        let _ = unsafe { signal(Signal::SIGALRM, SigHandler::SigDfl) };
        let _ = SigSet::from(Signal::SIGALRM).thread_unblock();
        alarm::set(span.as_secs().try_into().unwrap_or(u32::MAX));
        Self(())
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        alarm::cancel();
    }
}
