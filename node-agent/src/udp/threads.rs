//! The two threads that carry packets while the device stays: `udp-egress` waits for the device, `udp-ingress` for the
//! socket, each in the very call that reads. Whoever started them waits beside them, until the stop hangs up or one of
//! them ends, and then ends both: one that lived on alone would carry packets one way, and nobody would know.
//!
//! A wait in `poll` in front of each read would be one system call more for every packet that comes alone, which a
//! request and its response are slower by. It would also be what a stop could wake; here a signal ends the read.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::resume_unwind;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, Scope, ScopedJoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::egress::Egress;
use super::ingress::Ingress;
use super::interrupt::{self, ThreadId};
use super::link::Link;

/// A signal that comes just before the read that it is to end is lost: it is sent again after so long.
const AGAIN_MS: u8 = 1;

struct Worker<'scope> {
    thread: ScopedJoinHandle<'scope, ()>,
    id: &'scope OnceLock<ThreadId>,
    /// Hangs up when the thread ends, by a panic as well.
    end: PipeReader,
}

/// Returns when the device is gone or the stop has been asked for, with an error when there cannot be threads; panics when
/// one of them does.
pub(super) fn forward(
    link: &Link<'_>,
    egress: &mut Egress,
    ingress: &mut Ingress,
    stop: BorrowedFd<'_>,
) -> io::Result<()> {
    egress.begin(link.runs);
    ingress.begin(link.rules);
    forward_by(link, stop, || egress.serve(link, stop), || ingress.serve(link))
}

/// Each returns when it cannot go on, or when the link is over and its read has been interrupted.
pub(super) fn forward_by(
    link: &Link<'_>,
    stop: BorrowedFd<'_>,
    egress: impl FnOnce() + Send,
    ingress: impl FnOnce() + Send,
) -> io::Result<()> {
    interrupt::prepare()?;
    let (egress_id, ingress_id) = (OnceLock::new(), OnceLock::new());
    thread::scope(|scope| {
        let egress = Worker::start(scope, "udp-egress", &egress_id, egress)?;
        match Worker::start(scope, "udp-ingress", &ingress_id, ingress) {
            Ok(ingress) => {
                wait_for_any([stop, egress.end.as_fd(), ingress.end.as_fd()]);
                end(link, [egress, ingress]);
                Ok(())
            }
            Err(error) => {
                end(link, [egress]);
                Err(error)
            }
        }
    })
}

/// Ends all of them, and then passes the first panic on.
fn end<const N: usize>(link: &Link<'_>, workers: [Worker<'_>; N]) {
    link.over.store(true, Relaxed);
    // Each of them, so not by `any`.
    while workers.iter().filter(|worker| worker.interrupted()).count() > 0 {
        let _ = poll(&mut [], AGAIN_MS);
    }
    if let Some(panic) = workers.map(|worker| worker.thread.join()).into_iter().find_map(Result::err) {
        resume_unwind(panic);
    }
}

impl<'scope> Worker<'scope> {
    fn start(
        scope: &'scope Scope<'scope, '_>,
        name: &str,
        id: &'scope OnceLock<ThreadId>,
        work: impl FnOnce() + Send + 'scope,
    ) -> io::Result<Self> {
        let (end, alive) = io::pipe()?;
        let thread = thread::Builder::new().name(name.into()).spawn_scoped(scope, move || {
            let _alive = alive;
            let _ = id.set(interrupt::this_thread());
            work();
        })?;
        Ok(Self { thread, id, end })
    }

    /// Interrupts the thread if it has not ended, and says so.
    fn interrupted(&self) -> bool {
        let runs = !self.thread.is_finished();
        if let (true, Some(id)) = (runs, self.id.get()) {
            interrupt::interrupt(*id);
        }
        runs
    }
}

/// Until one of them hangs up.
fn wait_for_any(ends: [BorrowedFd<'_>; 3]) {
    let mut fds = ends.map(|end| PollFd::new(end, PollFlags::empty()));
    while !matches!(poll(&mut fds, PollTimeout::NONE), Ok(1..)) {}
}
