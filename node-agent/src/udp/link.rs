//! From a socket and a device to two threads that forward between them, again and again: the port may be another's for
//! a while, the device may come late and may be taken away.
//!
//! One thread looks for both and then has two more forward (`threads`) for as long as the device stays. A panic of either
//! ends both, and both start anew.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::again::Pause;
use super::coalesce::Rules;
use super::egress::Egress;
use super::ingress::Ingress;
use super::offload::{Offload, Outcome, Outcomes};
use super::socket::{HostSocket, Socket};
use super::{Settings, Shared, threads};
use crate::tun::{AttachError, Features, Queue};

/// Between two looks for a device that is not there: the reconciler makes it within milliseconds when it was taken
/// away, and a look costs two system calls.
const DEVICE_WAIT: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
/// Before attaching to the device anew: usually it was replaced, and each millisecond costs packets; but one that can be
/// attached to and not be read must not keep a core and the log busy.
const LINK_WAIT: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// After a panic. What one packet brings about may be over with it, and the node has no overlay meanwhile, so the first
/// wait is short; a packet that is sent again and again ends each start at once, and once a second is what that may cost
/// in memory taken anew and in the log.
const PANIC_WAIT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Between two tries to bind: another program has the port, or the address is not there yet.
const SOCKET_WAIT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// What both threads work with while the device stays.
pub(super) struct Link<'a> {
    pub(super) shared: &'a Shared,
    pub(super) socket: &'a Socket,
    /// Without CAP_NET_RAW there is none, and no ICMP errors.
    pub(super) host: Option<&'a HostSocket>,
    pub(super) queue: Queue,
    /// Whether a virtio header is in front of every packet.
    pub(super) vnet_hdr: bool,
    /// The socket knows `UDP_SEGMENT`.
    pub(super) runs: bool,
    pub(super) rules: Rules,
    /// Both threads are to end.
    pub(super) over: AtomicBool,
}

impl Link<'_> {
    pub(super) fn is_over(&self) -> bool {
        self.shared.is_stopped() || self.over.load(Relaxed)
    }
}

/// Forwards until told to stop, by `stop` hanging up.
pub(super) fn run(shared: &Shared, settings: &Settings, stop: &PipeReader) {
    supervise(shared, stop.as_fd(), || forward(shared, settings, stop.as_fd()));
}

/// Until `forward` returns; begins it again whenever it panics. Nothing that the panic may have left half done is used
/// again: socket, queue and memory are new.
fn supervise(shared: &Shared, stop: BorrowedFd<'_>, mut forward: impl FnMut()) {
    let mut pause = Pause::new(PANIC_WAIT);
    loop {
        let began = Instant::now();
        if catch_unwind(AssertUnwindSafe(&mut forward)).is_ok() {
            return;
        }
        let times = shared.panics.fetch_add(1, Relaxed) + 1;
        tracing::error!(times, "a thread of the udp backend panicked: a bug; its threads start anew");
        shared.tell_problem("one of its threads panicked: a bug; they start anew");
        if is_stopped_within(stop, pause.after(began.elapsed())) {
            return;
        }
    }
}

fn forward(shared: &Shared, settings: &Settings, stop: BorrowedFd<'_>) {
    let mut egress = Egress::new();
    let mut ingress = Ingress::new();
    let open = || Socket::open(settings.listen, &settings.offloads);
    let problem = |error: &io::Error| format!("{}: {error}", settings.listen);
    let Some(socket) = acquire(shared, stop, SOCKET_WAIT, open, problem) else { return };
    for (offload, outcome) in socket.outcomes() {
        shared.tell_outcome(*offload, outcome.clone());
    }
    let runs = socket.outcomes().get(&Offload::UdpSegment) == Some(&Outcome::InUse);
    let mut host = None;
    let mut pause = Pause::new(LINK_WAIT);
    loop {
        if host.is_none() {
            host = open_host_socket(shared);
        }
        let attached = acquire(shared, stop, DEVICE_WAIT, || attach(settings), AttachError::to_string);
        let Some((queue, outcomes)) = attached else { return };
        let in_use = |offload| outcomes.get(&offload) == Some(&Outcome::InUse);
        let link = Link {
            shared,
            socket: &socket,
            host: host.as_ref(),
            vnet_hdr: in_use(Offload::VnetHdr),
            rules: Rules { tcp: in_use(Offload::CoalesceTcp), udp: in_use(Offload::CoalesceUdp) },
            queue,
            runs,
            over: AtomicBool::new(false),
        };
        // The socket's as well: what was refused in use is tried again.
        for (offload, outcome) in socket.outcomes().clone().into_iter().chain(outcomes) {
            shared.tell_outcome(offload, outcome);
        }
        shared.tell_works(settings);
        let began = Instant::now();
        let ended = threads::forward(&link, &mut egress, &mut ingress, stop);
        if shared.is_stopped() {
            return;
        }
        match ended {
            Ok(()) => {
                shared.tell_problem(&format!("device {} is gone", settings.device));
                shared.device_lost.fetch_add(1, Relaxed);
            }
            Err(error) => shared.tell_problem(&format!("no threads: {error}")),
        }
        // A queue that nobody reads must not swallow packets meanwhile.
        drop(link);
        if is_stopped_within(stop, pause.after(began.elapsed())) {
            return;
        }
    }
}

fn open_host_socket(shared: &Shared) -> Option<HostSocket> {
    match HostSocket::open() {
        Ok(socket) => {
            shared.tell_icmp(None);
            Some(socket)
        }
        Err(error) => {
            shared.tell_icmp(Some(format!("a raw socket, which needs CAP_NET_RAW: {error}")));
            None
        }
    }
}

/// Tries until it succeeds, or until `stop` hangs up: `None`.
fn acquire<T, E>(
    shared: &Shared,
    stop: BorrowedFd<'_>,
    waits: (Duration, Duration),
    mut attempt: impl FnMut() -> Result<T, E>,
    problem: impl Fn(&E) -> String,
) -> Option<T> {
    let mut pause = Pause::new(waits);
    loop {
        match attempt() {
            Ok(value) => return Some(value),
            Err(error) => shared.tell_problem(&problem(&error)),
        }
        if is_stopped_within(stop, pause.after(Duration::ZERO)) {
            return None;
        }
    }
}

fn is_stopped_within(stop: BorrowedFd<'_>, wait: Duration) -> bool {
    let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
    // An interrupted wait is a short one.
    matches!(poll(&mut [PollFd::new(stop, PollFlags::empty())], timeout), Ok(1..))
}

/// The device in the best mode that it and the operator allow.
fn attach(settings: &Settings) -> Result<(Queue, Outcomes), AttachError> {
    let allows = |offload| settings.offloads.allows(offload);
    let mut outcomes = Outcomes::new();
    let (mut queue, header) = if allows(Offload::VnetHdr) {
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
    let nowait = || queue.wait_in_reads();
    outcomes.insert(
        Offload::TunNowait,
        Outcome::of(allows(Offload::TunNowait), "preadv2 with RWF_NOWAIT", nowait),
    );
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
    use crate::udp::{Local, PeerTable, SourcePolicy};

    fn shared() -> Shared {
        let network = "10.5.0.0/16".parse().expect("network");
        let local = Local { network, subnets: vec![], device_addr: std::net::Ipv4Addr::new(10, 5, 1, 0) };
        Shared::new(PeerTable::new(local, SourcePolicy::default(), []))
    }

    #[test]
    fn what_panics_is_begun_again_and_counted_until_it_is_stopped() {
        let (shared, (hang_up, stop)) = (shared(), io::pipe().expect("pipe"));
        let mut begun = 0;
        supervise(&shared, hang_up.as_fd(), || {
            begun += 1;
            assert!(begun == 3, "the first two times");
            shared.tell_works(&settings());
        });
        assert_eq!((begun, shared.panics.load(Relaxed)), (3, 2));
        assert_eq!(shared.told().trouble.problem(), None);

        let mut stop = Some(stop);
        supervise(&shared, hang_up.as_fd(), || {
            drop(stop.take());
            panic!("while it is stopped");
        });
        assert_eq!(shared.panics.load(Relaxed), 3, "not begun again");
        let problem = shared.told().trouble.problem().cloned();
        assert!(problem.is_some_and(|problem| problem.contains("panicked")), "and it says so meanwhile");
    }

    fn settings() -> Settings {
        let device = "flannel0".parse().expect("name");
        Settings { device, listen: "192.0.2.1:8285".parse().expect("address"), offloads: Default::default() }
    }

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
