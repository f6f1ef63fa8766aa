//! From a socket and a device to two threads that forward between them, again and again: the port may be another's for
//! a while, the device may come late and may be taken away.
//!
//! One thread looks for both and then forwards itself, with a second one beside it (`turn`) for as long as the device
//! stays.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::coalesce::Rules;
use super::egress::Egress;
use super::ingress::Ingress;
use super::offload::{Offload, Outcome, Outcomes};
use super::socket::{HostSocket, Socket};
use super::{Settings, Shared, turn};
use crate::tun::{AttachError, Features, Queue};

/// Between two looks for a device that is not there: the reconciler makes it within milliseconds when it was taken
/// away, and a look costs two system calls.
const DEVICE_WAIT: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
/// Between two tries to bind: another program has the port, or the address is not there yet.
const SOCKET_WAIT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// What both threads work with while the device stays.
pub(super) struct Link<'a> {
    pub(super) shared: &'a Shared,
    pub(super) socket: &'a Socket,
    pub(super) host: &'a HostSocket,
    pub(super) queue: Queue,
    /// Whether a virtio header is in front of every packet.
    pub(super) vnet_hdr: bool,
    /// `UDP_SEGMENT` may be used; goes off at run time.
    pub(super) runs: AtomicBool,
    pub(super) rules: Rules,
    /// One of the two threads is to end, so the other must.
    pub(super) over: AtomicBool,
}

impl Link<'_> {
    pub(super) fn is_over(&self) -> bool {
        self.shared.is_stopped() || self.over.load(Relaxed)
    }
}

/// Forwards until told to stop, by `stop` hanging up.
pub(super) fn run(shared: &Shared, settings: &Settings, stop: &PipeReader) {
    if catch_unwind(AssertUnwindSafe(|| forward(shared, settings, stop.as_fd()))).is_err() {
        tracing::error!("the udp backend's thread ended by a panic");
        shared.tell_problem("its thread ended by a panic: a bug".into());
    }
}

fn forward(shared: &Shared, settings: &Settings, stop: BorrowedFd<'_>) {
    let mut egress = Egress::new();
    let mut ingress = Ingress::new();
    let open = || Ok((Socket::open(settings.listen, &settings.offloads)?, HostSocket::open()?));
    let Some((socket, host)) =
        acquire(shared, stop, SOCKET_WAIT, open, |error: &io::Error| format!("{}: {error}", settings.listen))
    else {
        return;
    };
    for (offload, outcome) in socket.outcomes() {
        shared.tell_outcome(*offload, outcome.clone());
    }
    let mut runs = socket.outcomes().get(&Offload::UdpSegment) == Some(&Outcome::InUse);
    loop {
        let attached = acquire(shared, stop, DEVICE_WAIT, || attach(settings), AttachError::to_string);
        let Some((queue, outcomes)) = attached else { return };
        let in_use = |offload| outcomes.get(&offload) == Some(&Outcome::InUse);
        let link = Link {
            shared,
            socket: &socket,
            host: &host,
            vnet_hdr: in_use(Offload::VnetHdr),
            rules: Rules { tcp: in_use(Offload::CoalesceTcp), udp: in_use(Offload::CoalesceUdp) },
            queue,
            runs: AtomicBool::new(runs),
            over: AtomicBool::new(false),
        };
        for (offload, outcome) in outcomes {
            shared.tell_outcome(offload, outcome);
        }
        shared.tell_works(settings);
        if let Err(error) = turn::forward(&link, &mut egress, &mut ingress, stop) {
            shared.tell_problem(format!("no thread: {error}"));
            if is_stopped_within(stop, SOCKET_WAIT.1) {
                return;
            }
        }
        if shared.is_stopped() {
            return;
        }
        runs = link.runs.load(Relaxed);
        shared.tell_problem(format!("device {} is gone", settings.device));
        shared.device_lost.fetch_add(1, Relaxed);
        // Whatever the reason, not at once: one that stays must not keep a core busy.
        if is_stopped_within(stop, DEVICE_WAIT.0) {
            return;
        }
    }
}

/// Tries until it succeeds, or until `stop` hangs up: `None`.
fn acquire<T, E>(
    shared: &Shared,
    stop: BorrowedFd<'_>,
    (mut wait, longest): (Duration, Duration),
    mut attempt: impl FnMut() -> Result<T, E>,
    problem: impl Fn(&E) -> String,
) -> Option<T> {
    loop {
        match attempt() {
            Ok(value) => return Some(value),
            Err(error) => shared.tell_problem(problem(&error)),
        }
        if is_stopped_within(stop, wait) {
            return None;
        }
        wait = (wait * 2).min(longest);
    }
}

fn is_stopped_within(stop: BorrowedFd<'_>, wait: Duration) -> bool {
    let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
    // An interrupted wait is a short one.
    matches!(poll(&mut [PollFd::new(stop, PollFlags::empty())], timeout), Ok(1..))
}

/// Waits for `events` of `fd`, or for `stop` to hang up; says what came of `fd`.
pub(super) fn wait_for(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    stop: BorrowedFd<'_>,
    timeout: PollTimeout,
) -> PollFlags {
    let mut fds = [PollFd::new(fd, events), PollFd::new(stop, PollFlags::empty())];
    match poll(&mut fds, timeout) {
        Ok(_) => fds[0].revents().unwrap_or(PollFlags::empty()),
        Err(_) => PollFlags::empty(),
    }
}

/// The device in the best mode that it and the operator allow.
fn attach(settings: &Settings) -> Result<(Queue, Outcomes), AttachError> {
    let allows = |offload| settings.offloads.allows(offload);
    let mut outcomes = Outcomes::new();
    let (queue, header) = if allows(Offload::VnetHdr) {
        match Queue::attach(&settings.device, true) {
            Ok(queue) => (queue, Outcome::InUse),
            // Of the wrong kind, or a kernel that knows no such header: the second try tells.
            Err(AttachError::WrongKind(_)) => (
                Queue::attach(&settings.device, false)?,
                Outcome::refused("TUNSETIFF with IFF_VNET_HDR", Errno::EINVAL),
            ),
            Err(error) => return Err(error),
        }
    } else {
        (Queue::attach(&settings.device, false)?, Outcome::SwitchedOff)
    };
    let vnet_hdr = header == Outcome::InUse;
    // Writes show whether they are taken; reads are asked for.
    for offload in [Offload::CoalesceTcp, Offload::CoalesceUdp, Offload::TunTso, Offload::TunUso] {
        let outcome = match &header {
            Outcome::InUse if allows(offload) => Outcome::InUse,
            Outcome::Refused(how) if allows(offload) => Outcome::Refused(how.clone()),
            _ => Outcome::SwitchedOff,
        };
        outcomes.insert(offload, outcome);
    }
    outcomes.insert(Offload::VnetHdr, header);
    let (tso, uso) = (allows(Offload::TunTso), allows(Offload::TunUso));
    ask_for_super_packets(|f| queue.set_features(f), vnet_hdr && tso, vnet_hdr && uso, &mut outcomes)
        .map_err(|errno| AttachError::Io("TUNSETOFFLOAD", errno.into()))?;
    if !vnet_hdr {
        // What came before may be a super-packet of an earlier attachment's, with nothing to tell it by.
        queue.discard();
    }
    Ok((queue, outcomes))
}

/// The best that the kernel takes; what it does not know must not take the other along.
fn ask_for_super_packets(
    mut ask: impl FnMut(Features) -> Result<(), Errno>,
    tso: bool,
    uso: bool,
    outcomes: &mut Outcomes,
) -> Result<(), Errno> {
    let mut last = Errno::EINVAL;
    for (with_tso, with_uso) in [(tso, uso), (tso, false), (false, uso), (false, false)] {
        match ask(Features { tso: with_tso, uso: with_uso }) {
            Ok(()) => {
                for (offload, wanted, got) in
                    [(Offload::TunTso, tso, with_tso), (Offload::TunUso, uso, with_uso)]
                {
                    if wanted && !got {
                        outcomes.insert(offload, Outcome::refused("TUNSETOFFLOAD", last));
                    }
                }
                return Ok(());
            }
            Err(errno) => last = errno,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_udp_super_packets_still_gives_those_of_tcp() {
        let old = |features: Features| if features.uso { Err(Errno::EINVAL) } else { Ok(()) };
        let mut outcomes = Outcomes::new();
        assert_eq!(ask_for_super_packets(old, true, true, &mut outcomes), Ok(()));
        let refused: Vec<_> = outcomes.keys().copied().collect();
        assert_eq!(refused, [Offload::TunUso]);
        let mut asked = Vec::new();
        let none = |features: Features| {
            asked.push((features.tso, features.uso));
            if features.tso || features.uso { Err(Errno::EINVAL) } else { Ok(()) }
        };
        assert_eq!(ask_for_super_packets(none, true, true, &mut outcomes), Ok(()));
        assert_eq!(outcomes.len(), 2, "both refused: {outcomes:?}");
        assert_eq!(asked, [(true, true), (true, false), (false, true), (false, false)]);
    }
}
