//! Ends a system call in which a thread waits, by a signal to that thread alone (signal(7): `EINTR`).
//!
//! SIGURG, as Go's runtime uses it: nobody sends it by mistake, and where nobody has asked for it it is ignored.
#![expect(unsafe_code, reason = "signal handlers and tgkill have no safe wrapper")]

use std::io;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Pid, getpid, gettid};

const SIGNAL: Signal = Signal::SIGURG;

/// Of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ThreadId(Pid);

/// From here on the signal ends system calls instead of being ignored.
pub(super) fn prepare() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // Without SA_RESTART, which would begin the call anew.
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any moment.
    unsafe { sigaction(SIGNAL, &action) }?;
    Ok(())
}

/// The calling thread, in which the signal is let through from here on.
pub(super) fn this_thread() -> ThreadId {
    // It cannot fail: the mask is a valid one.
    let _ = SigSet::from(SIGNAL).thread_unblock();
    ThreadId(gettid())
}

/// Ends the call that the thread is in, if it is in one; it must not have ended.
pub(super) fn interrupt(thread: ThreadId) {
    // SAFETY: tgkill takes numbers and touches no memory.
    unsafe {
        libc::syscall(libc::SYS_tgkill, getpid().as_raw(), thread.0.as_raw(), SIGNAL as libc::c_int);
    }
}
