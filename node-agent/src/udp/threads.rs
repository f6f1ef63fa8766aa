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
    /// Hangs up when the thread ends, by a panic as well.
    end: PipeReader,
}

/// Returns when the device is gone or the stop has been asked for; panics when one of the threads does.
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
    let ids = [const { OnceLock::new() }; 2];
    let [first, second] = &ids;
    let ended = thread::scope(|scope| {
        let first = Worker::start(scope, "udp-egress", first, egress)?;
        let second = Worker::start(scope, "udp-ingress", second, ingress);
        if let Ok(second) = &second {
            wait_for_any([stop, first.end.as_fd(), second.end.as_fd()]);
        }
        link.over.store(true, Relaxed);
        let (second, failed) = match second {
            Ok(second) => (Some(second), None),
            Err(error) => (None, Some(error)),
        };
        let threads = [Some(first), second].map(|worker| worker.map(|worker| worker.thread));
        while threads.iter().flatten().any(|thread| !thread.is_finished()) {
            ids.iter().filter_map(OnceLock::get).for_each(|id| interrupt::interrupt(*id));
            let _ = poll(&mut [], AGAIN_MS);
        }
        let ends: Vec<_> = threads.into_iter().flatten().map(ScopedJoinHandle::join).collect();
        failed.map_or(Ok(ends), Err)
    })?;
    for panic in ended.into_iter().filter_map(Result::err) {
        resume_unwind(panic);
    }
    Ok(())
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
        Ok(Self { thread, end })
    }
}

/// Until one of them hangs up.
fn wait_for_any(ends: [BorrowedFd<'_>; 3]) {
    let mut fds = ends.map(|end| PollFd::new(end, PollFlags::empty()));
    while !matches!(poll(&mut fds, PollTimeout::NONE), Ok(1..)) {}
}
