//! Who does what: the first thread serves the device and, as long as little comes, the socket as well; under load, and
//! before the first one waits for room to send, the second one takes the socket over.
//!
//! One thread for both is what a request and its response are fastest with: the response is often there when the
//! request has been written, and is sent without anybody being woken. Two threads carry more: each keeps to its batches,
//! on a core of its own if there is one.

use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::egress::{Egress, READS, Read};
use super::ingress::{Came, Ingress};
use super::link::Link;
use super::pace::{GATHER, Pace};

/// Up to so many packets at a time the device is asked through `poll` whether there is more: fewer calls than reading
/// until nothing comes.
const FEW: usize = 8;
/// So many small batches one after the other end the second thread's turn, as silence does.
const QUIET_BATCHES: u32 = 64;

struct Turn<'a> {
    /// Locked by whose turn it is, so that nobody ever waits for it.
    ingress: Mutex<&'a mut Ingress>,
    is_seconds: AtomicBool,
    /// A byte for each turn that ends; a full one says enough, and is not waited for.
    ended: (PipeReader, PipeWriter),
}

/// Returns when the device is gone or the stop has been asked for; panics when one of the threads does.
pub(super) fn forward(
    link: &Link<'_>,
    egress: &mut Egress,
    ingress: &mut Ingress,
    stop: BorrowedFd<'_>,
) -> io::Result<()> {
    forward_by(link, egress, ingress, stop, |ingress| ingress.serve(link, QUIET_BATCHES))
}

/// `serve` is what the second thread does with its turn.
pub(super) fn forward_by(
    link: &Link<'_>,
    egress: &mut Egress,
    ingress: &mut Ingress,
    stop: BorrowedFd<'_>,
    serve: impl Fn(&mut Ingress) + Sync,
) -> io::Result<()> {
    egress.begin(link.runs);
    ingress.begin(link.rules);
    let ended = io::pipe()?;
    for end in [ended.0.as_fd(), ended.1.as_fd()] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let turn = Turn { ingress: Mutex::new(ingress), is_seconds: AtomicBool::new(false), ended };
    thread::scope(|scope| {
        let second = thread::Builder::new().name("udp-ingress".into()).spawn_scoped(scope, || {
            let _end = End { link, turn: &turn, second: thread::current() };
            turn.second(link, &serve);
        })?;
        let end = End { link, turn: &turn, second: second.thread().clone() };
        turn.first(link, egress, &end.second, stop);
        Ok(())
    })
}

#[expect(clippy::disallowed_methods, reason = "time itself is meant")]
fn gather() {
    thread::sleep(GATHER);
}

/// Held by either thread, ends the other one, also by a panic: one that lives on alone would carry packets one way, and
/// nobody would know. The scope passes the panic on.
struct End<'a, 'i> {
    link: &'a Link<'a>,
    turn: &'a Turn<'i>,
    second: Thread,
}

impl Drop for End<'_, '_> {
    fn drop(&mut self) {
        self.link.over.store(true, Ordering::Relaxed);
        self.second.unpark();
        // Where the first one waits for the end of the turn in which this comes.
        let _ = (&self.turn.ended.1).write(&[0]);
    }
}

impl<'a> Turn<'a> {
    fn first(&self, link: &Link<'_>, egress: &mut Egress, second: &Thread, stop: BorrowedFd<'_>) {
        let (mut device, mut socket) = (true, true);
        let mut most = 1;
        let mut pace = Pace::new(Instant::now());
        let hand_over = || {
            self.is_seconds.store(true, Ordering::Release);
            second.unpark();
        };
        while !link.is_over() {
            let is_seconds = self.is_seconds.load(Ordering::Acquire);
            if socket && !is_seconds {
                match self.ingress().step(link) {
                    Came::Nothing => {}
                    // What was written may be answered already.
                    Came::Few => device = true,
                    Came::Many => {
                        device = true;
                        hand_over();
                    }
                    Came::DeviceGone => return,
                }
            }
            if device {
                // Whoever waits for room to send must not keep what comes from being received.
                let (end, count) = egress.step(link, most, stop, &hand_over);
                let flood = count > 0 && pace.gathers(count, Instant::now());
                match end {
                    Read::Gone => return,
                    Read::Full => {
                        most = (most * 2).min(READS);
                        if most > FEW {
                            socket = true;
                            continue;
                        }
                    }
                    Read::Empty if count <= 1 => most = 1,
                    Read::Empty => {}
                }
                if flood {
                    gather();
                    (most, socket) = (READS, true);
                    continue;
                }
            }
            match self.wait(link, stop) {
                Some(ready) => (device, socket) = ready,
                None => return,
            }
        }
    }

    /// Whether device and socket have something; `None` when the device is gone.
    fn wait(&self, link: &Link<'_>, stop: BorrowedFd<'_>) -> Option<(bool, bool)> {
        let is_seconds = self.is_seconds.load(Ordering::Acquire);
        let other = if is_seconds { self.ended.0.as_fd() } else { link.socket.as_fd() };
        let mut fds = [
            PollFd::new(link.queue.as_fd(), PollFlags::POLLIN),
            PollFd::new(other, PollFlags::POLLIN),
            PollFd::new(stop, PollFlags::empty()),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            return Some((true, true));
        }
        let came = |index: usize| fds[index].revents().unwrap_or(PollFlags::empty());
        let (device, other) = (came(0), came(1));
        if device.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL) {
            return None;
        }
        if is_seconds && !other.is_empty() {
            let _ = (&self.ended.0).read(&mut [0; 64]);
        }
        Some((!device.is_empty(), !other.is_empty()))
    }

    fn second(&self, link: &Link<'_>, serve: &impl Fn(&mut Ingress)) {
        while !link.is_over() {
            if !self.is_seconds.load(Ordering::Acquire) {
                thread::park();
                continue;
            }
            serve(&mut self.ingress());
            self.is_seconds.store(false, Ordering::Release);
            let _ = (&self.ended.1).write(&[0]);
        }
    }

    fn ingress(&self) -> MutexGuard<'_, &'a mut Ingress> {
        self.ingress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
