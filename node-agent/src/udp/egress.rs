//! From the device to the peers.
//!
//! A wake-up reads what is there into one arena, up to a batch, and sends all of it by one `sendmmsg`; a packet that came
//! alone is sent as it lies there. A super-packet of the device becomes one `UDP_SEGMENT` message; packets of one size to
//! one peer share one as well.

use std::net::SocketAddrV4;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::counters::{DropReason, Tally};
use super::icmp::{self, MAX_ANSWER, Problem, RateLimit};
use super::link::Link;
use super::offload::{Offload, Outcome};
use super::outbox::{self, Batch, Flow, Join, Outbox};
use super::pace::{GATHER, Pace};
use super::packet::{Ipv4, MAX_DATAGRAM, MAX_TOTAL, decrement_ttl};
use super::peers::PeerTable;
use super::segment::Segments;
use super::virtio::{self, VirtioHeader};

/// The largest packet and the header in front of it.
const MAX_READ: usize = virtio::LEN + MAX_TOTAL;
/// Eight super-packets, and room for one whole read behind them.
const ARENA: usize = 8 * (1 << 16) + MAX_READ;
const READS: usize = 256;
/// Reads begin at multiples of a cache line.
const ALIGN: usize = 64;
/// How long all messages of a batch together may wait for room in the socket, before what is left of it is dropped.
/// Meanwhile the device's queue fills, which is where the kernel drops.
const WRITABLE_WITHIN: Duration = Duration::from_millis(100);
/// So many reads that fail one after the other are no longer one packet's matter.
const FAILURES: u32 = 16;
/// Then nothing is read for so long, or failing would keep a core busy.
const FAILURE_WAIT_MS: u8 = 10;
/// How long runs are done without after one was refused. The refusal is about the way to one peer, and routes change.
const RUNS_AGAIN: Duration = Duration::from_secs(60);

/// The thread's own: all memory is taken at the start.
pub(super) struct Egress {
    arena: Box<[u8]>,
    reads: Vec<(usize, usize)>,
    outbox: Outbox,
    limit: RateLimit,
    tally: Tally,
    /// Reads that failed since one did not.
    failures: u32,
    runs: Runs,
}

/// Whether runs of datagrams are sent as one message.
#[derive(Debug, Clone, Copy)]
struct Runs {
    known: bool,
    refused: Option<Instant>,
}

/// The time that one batch may wait for room in the socket.
#[derive(Debug, Default)]
struct Patience {
    until: Option<Instant>,
}

/// What a read of the device ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    /// There may be more.
    Full,
    /// There is no more at the moment, or the wait for it was interrupted.
    Empty,
    Gone,
}

impl Egress {
    pub(super) fn new() -> Self {
        Self {
            arena: vec![0; ARENA].into_boxed_slice(),
            reads: Vec::with_capacity(READS),
            outbox: Outbox::new(),
            limit: RateLimit::new(),
            tally: Tally::default(),
            failures: 0,
            runs: Runs::new(false),
        }
    }

    /// With a device attached to anew; `runs`: the socket knows `UDP_SEGMENT`.
    pub(super) fn begin(&mut self, runs: bool) {
        self.failures = 0;
        self.runs = Runs::new(runs);
    }

    /// Sends what comes, until the device is gone or the link is over.
    pub(super) fn serve(&mut self, link: &Link<'_>, stop: BorrowedFd<'_>) {
        // How many reads a batch may have: few as long as little comes, for the last one finds nothing.
        let mut most = 1;
        let mut pace = Pace::new(Instant::now());
        while !link.is_over() {
            let (end, count) = self.step(link, most, stop);
            let flood = count > 0 && pace.gathers(count, Instant::now());
            match end {
                Read::Gone => return,
                Read::Full => most = (most * 2).min(READS),
                Read::Empty if flood => {
                    gather();
                    most = READS;
                }
                Read::Empty if count <= 1 => most = 1,
                Read::Empty => {}
            }
        }
    }

    /// Waits for a packet, reads up to `most` times and sends what came; says how many reads gave something.
    fn step(&mut self, link: &Link<'_>, most: usize, stop: BorrowedFd<'_>) -> (Read, usize) {
        let end = self.read(
            most,
            |buffer, waits| {
                if waits { link.queue.read(buffer) } else { link.queue.read_now(buffer) }
            },
        );
        if !self.reads.is_empty() {
            let table = link.shared.peers.load();
            self.pass(link, &table, stop);
        }
        self.tally.publish(&link.shared.egress);
        if self.failures >= FAILURES {
            let _ = poll(&mut [PollFd::new(stop, PollFlags::empty())], FAILURE_WAIT_MS);
        }
        (end, self.reads.len())
    }

    /// `read` is to wait as long as it has given nothing.
    fn read(&mut self, most: usize, mut read: impl FnMut(&mut [u8], bool) -> Result<usize, Errno>) -> Read {
        self.reads.clear();
        let mut start = 0;
        while self.reads.len() < most && start + MAX_READ <= self.arena.len() {
            self.tally.traffic.calls += 1;
            let waits = self.reads.is_empty();
            match read(&mut self.arena[start..start + MAX_READ], waits) {
                Ok(len) => {
                    self.failures = 0;
                    self.reads.push((start, len));
                    start = (start + len).next_multiple_of(ALIGN);
                }
                Err(Errno::EAGAIN) => return Read::Empty,
                Err(Errno::EINTR) if waits => return Read::Empty,
                Err(Errno::EINTR) => {}
                // linux drivers/net/tun.c: tun_chr_read_iter without a device, tun_ring_recv while it goes.
                Err(Errno::EBADFD | Errno::EFAULT) => return Read::Gone,
                // One packet that cannot be handed over, and is no more (tun_put_user).
                Err(_) => {
                    self.tally.dropped(DropReason::ReadFailed, 1);
                    self.failures = self.failures.saturating_add(1);
                    // It is to be known before the next wait.
                    if waits || self.failures >= FAILURES {
                        return Read::Empty;
                    }
                }
            }
        }
        Read::Full
    }

    fn pass(&mut self, link: &Link<'_>, table: &PeerTable, stop: BorrowedFd<'_>) {
        let Self { arena, reads, outbox, limit, tally, runs, .. } = self;
        let may_run = runs.may_be_tried();
        let patience = Patience::default();
        let is_alone = reads.len() == 1;
        let mut out = Out { link, stop, batch: outbox.begin(), tally, runs, is_alone, may_run, patience };
        let (mut rest, mut at) = (&mut **arena, 0);
        for (start, len) in reads.iter().copied() {
            let (bytes, behind) = rest.split_at_mut(start - at + len);
            let bytes = &mut bytes[start - at..];
            (rest, at) = (behind, start + len);
            if let Err((reason, count)) = out.packet(table, limit, bytes) {
                out.tally.dropped(reason, count);
            }
        }
        out.flush();
    }
}

/// One batch on its way.
struct Out<'a, 'p> {
    link: &'a Link<'a>,
    stop: BorrowedFd<'a>,
    batch: Batch<'a, 'p>,
    tally: &'a mut Tally,
    runs: &'a mut Runs,
    /// One read is the whole batch.
    is_alone: bool,
    /// In this batch, and not refused in it.
    may_run: bool,
    patience: Patience,
}

impl<'p> Out<'_, 'p> {
    /// Puts one read, which may stand for many packets, into the batch, or says why not.
    fn packet(
        &mut self,
        table: &PeerTable,
        limit: &mut RateLimit,
        read: &'p mut [u8],
    ) -> Result<(), (DropReason, u64)> {
        let (header, packet) = if self.link.vnet_hdr {
            VirtioHeader::split(read).ok_or((DropReason::BadOffload, 1))?
        } else {
            (VirtioHeader::default(), read)
        };
        let all = Segments::count(&header, packet) as u64;
        let view = Ipv4::parse(packet).map_err(|reason| (reason, all))?;
        let Some(peer) = table.route(view.destination()) else {
            self.answer(Problem::NetUnreachable, &view, table, limit);
            return Err((DropReason::NoRoute, all));
        };
        let (to, flow) = (peer.addr, flow(&view));
        if view.ttl() <= 1 {
            self.answer(Problem::TimeExceeded, &view, table, limit);
            return Err((DropReason::TtlExceeded, all));
        }
        decrement_ttl(packet).map_err(|reason| (reason, all))?;
        let mut segments = Segments::new(&header, packet).map_err(|reason| (reason, all))?;
        loop {
            if !self.batch.has_room(Segments::MAX_HEADERS) {
                self.flush();
            }
            let Some(segment) = segments.next(self.batch.headers()) else { return Ok(()) };
            if segment.headers + segment.payload.len() > MAX_DATAGRAM {
                return Err((DropReason::Oversized, 1 + segments.remaining() as u64));
            }
            if self.is_alone && segment.headers == 0 {
                return self.send_alone(to, segment.payload);
            }
            let join = match segments.remaining() {
                _ if !self.may_run => Join::Alone,
                0 if segment.headers > 0 => Join::Tail,
                _ => Join::SameSize,
            };
            self.batch.push(to, segment.headers, segment.payload, flow, join);
        }
    }

    /// Tells the sender, as far as it may be told and the limit allows.
    fn answer(&mut self, problem: Problem, about: &Ipv4<'_>, table: &PeerTable, limit: &mut RateLimit) {
        let Some(host) = self.link.host else { return };
        let mut answer = [0; MAX_ANSWER];
        let Some(answer) = icmp::answer(problem, about, table.local(), &mut answer) else { return };
        if !limit.allow(Instant::now()) {
            self.tally.icmp_suppressed += 1;
            return;
        }
        self.tally.traffic.calls += 1;
        if host.send(answer, about.source()).is_ok() {
            self.tally.icmp_sent += 1;
        }
    }

    /// A packet that nothing can be sent together with.
    fn send_alone(&mut self, to: SocketAddrV4, packet: &[u8]) -> Result<(), (DropReason, u64)> {
        let socket = self.link.socket.as_fd();
        self.attempt(|_| outbox::send_one(socket, to, packet)).map_err(|_| (DropReason::SendFailed, 1))?;
        self.tally.traffic.packets += 1;
        self.tally.traffic.bytes += packet.len() as u64;
        Ok(())
    }

    /// Sends the batch. What the socket does not take is counted, and what comes behind it is sent all the same.
    fn flush(&mut self) {
        if self.batch.messages().is_empty() {
            return;
        }
        let socket = self.link.socket.as_fd();
        self.patience = Patience::default();
        let mut at = 0;
        while at < self.batch.messages().len() {
            match self.attempt(|batch| batch.send(socket, at)) {
                Ok(taken) => {
                    self.note_runs(at..at + taken);
                    for message in &self.batch.messages()[at..at + taken] {
                        self.tally.traffic.packets += u64::from(message.segments);
                        self.tally.traffic.bytes += message.bytes as u64;
                    }
                    at += taken;
                }
                // No room for the rest either.
                Err(Errno::EAGAIN) => {
                    let rest: u64 = self.batch.messages()[at..].iter().map(|m| u64::from(m.segments)).sum();
                    self.tally.dropped(DropReason::SendFailed, rest);
                    break;
                }
                Err(errno) => {
                    if self.sends_plainly(at, errno) {
                        self.send_plainly(at);
                    } else {
                        let segments = self.batch.messages()[at].segments;
                        self.tally.dropped(DropReason::SendFailed, segments.into());
                    }
                    at += 1;
                }
            }
        }
        self.batch.clear();
    }

    fn send_plainly(&mut self, message: usize) {
        let socket = self.link.socket.as_fd();
        let whole = self.batch.messages()[message];
        let (mut at, all) = (0, usize::from(whole.segments));
        while at < all {
            match self.attempt(|batch| batch.send_plainly(socket, message, at)) {
                Ok(taken) => {
                    self.tally.traffic.packets += taken as u64;
                    self.tally.traffic.bytes +=
                        (at..at + taken).map(|index| whole.datagram_len(index) as u64).sum::<u64>();
                    at += taken;
                }
                Err(Errno::EAGAIN) => {
                    self.tally.dropped(DropReason::SendFailed, (all - at) as u64);
                    return;
                }
                Err(_) => {
                    self.tally.dropped(DropReason::SendFailed, 1);
                    at += 1;
                }
            }
        }
    }

    /// Tries again when the socket was full and has room again: `EAGAIN` when it has none in time.
    fn attempt(
        &mut self,
        mut send: impl FnMut(&mut Batch<'_, 'p>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        loop {
            self.tally.traffic.calls += 1;
            match send(&mut self.batch) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if !self.link.is_over() => {
                    let Some(left) = self.patience.left(Instant::now()) else { return Err(Errno::EAGAIN) };
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
                    wait_for_room(self.link.socket.as_fd(), self.stop, timeout);
                }
                result => return result,
            }
        }
    }

    /// A run that was taken ends what an earlier refusal said.
    fn note_runs(&mut self, sent: Range<usize>) {
        let has_run = || self.batch.messages()[sent].iter().any(|message| message.segments > 1);
        // Those that were in the batch before the refusal say nothing.
        if self.runs.refused.is_some() && self.may_run && has_run() {
            self.runs.refused = None;
            self.link.shared.tell_outcome(Offload::UdpSegment, Outcome::InUse);
        }
    }

    /// Whether a refused message is to go datagram by datagram.
    fn sends_plainly(&mut self, message: usize, errno: Errno) -> bool {
        match Refused::of(errno) {
            _ if self.batch.messages()[message].segments == 1 => false,
            Refused::AllRuns => {
                self.may_run = false;
                self.runs.refused = Some(Instant::now());
                let outcome = Outcome::refused("sendmmsg with UDP_SEGMENT", errno);
                self.link.shared.tell_outcome(Offload::UdpSegment, outcome);
                true
            }
            Refused::Run => true,
            Refused::Datagrams => false,
        }
    }
}

impl Runs {
    fn new(known: bool) -> Self {
        Self { known, refused: None }
    }

    /// Looks at the clock only while they are refused.
    fn may_be_tried(&self) -> bool {
        self.known && self.refused.is_none_or(|at| at.elapsed() >= RUNS_AGAIN)
    }
}

impl Patience {
    /// From the first wait on.
    fn left(&mut self, now: Instant) -> Option<Duration> {
        let until = *self.until.get_or_insert(now + WRITABLE_WITHIN);
        // What is shorter than poll can wait would be no wait.
        until.checked_duration_since(now).filter(|left| left.as_millis() > 0)
    }
}

/// Or until `stop` hangs up.
fn wait_for_room(socket: BorrowedFd<'_>, stop: BorrowedFd<'_>, timeout: PollTimeout) {
    let _ =
        poll(&mut [PollFd::new(socket, PollFlags::POLLOUT), PollFd::new(stop, PollFlags::empty())], timeout);
}

#[expect(clippy::disallowed_methods, reason = "time itself is meant")]
fn gather() {
    thread::sleep(GATHER);
}

/// Packets of one connection have the same, fragments none: only the first has ports.
fn flow(packet: &Ipv4<'_>) -> Flow {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    if packet.is_fragment() {
        return Flow::Any;
    }
    let ports = match (packet.protocol(), packet.payload().first_chunk::<4>()) {
        (TCP | UDP, Some(ports)) => u32::from_be_bytes(*ports),
        _ => 0,
    };
    let mixed = packet.source().to_bits().rotate_left(16) ^ packet.destination().to_bits() ^ ports;
    Flow::Of(mixed.wrapping_mul(0x9e37_79b1) >> 16)
}

/// What the kernel does not like of a message that stands for several datagrams (linux net/ipv4/udp.c, `udp_send_skb`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    /// The device on the way to this peer cannot complete checksums (before Linux 6.11), or packets are transformed
    /// there; as long as that way is not another, no run will be taken.
    AllRuns,
    /// The datagrams are larger than the path to this peer takes in one piece; one by one they go as fragments.
    Run,
    Datagrams,
}

impl Refused {
    fn of(errno: Errno) -> Self {
        match errno {
            Errno::EIO => Self::AllRuns,
            Errno::EINVAL | Errno::EMSGSIZE => Self::Run,
            _ => Self::Datagrams,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What reading gives that often, and what it has counted.
    fn read_of(answers: &[Result<usize, Errno>]) -> (Read, usize, u64) {
        let mut egress = Egress::new();
        let mut answers = answers.iter().copied();
        let end = egress.read(READS, |_, _| answers.next().unwrap_or(Err(Errno::EAGAIN)));
        let direction = super::super::counters::Direction::default();
        egress.tally.publish(&direction);
        let failed = direction.dropped().get(&DropReason::ReadFailed).copied().unwrap_or_default();
        (end, egress.reads.len(), failed)
    }

    #[test]
    fn only_a_device_that_is_gone_ends_the_attachment() {
        assert_eq!(read_of(&[Ok(60), Err(Errno::EBADFD)]), (Read::Gone, 1, 0));
        assert_eq!(read_of(&[Ok(60), Err(Errno::EFAULT)]), (Read::Gone, 1, 0));
        let one_bad = [Ok(60), Err(Errno::EINVAL), Ok(60), Err(Errno::EINTR), Ok(60)];
        assert_eq!(read_of(&one_bad), (Read::Empty, 3, 1), "a packet that could not be handed over");
        assert_eq!(read_of(&[Err(Errno::EINVAL); 1000]), (Read::Empty, 0, 1), "known before the next wait");
        let mut mixed = vec![Ok(60)];
        mixed.extend([Err(Errno::EINVAL); 15]);
        mixed.push(Ok(60));
        mixed.extend([Err(Errno::EINVAL); 1000]);
        assert_eq!(
            read_of(&mixed),
            (Read::Empty, 2, 31),
            "one that is read begins the count anew, which has an end"
        );
        let interrupted = [Err(Errno::EINTR), Ok(60)];
        assert_eq!(read_of(&interrupted), (Read::Empty, 0, 0), "whoever interrupts the wait has a reason");
    }

    #[test]
    fn a_batch_waits_for_room_no_longer_than_once() {
        let (mut patience, start) = (Patience::default(), Instant::now());
        let mut left = |ms| patience.left(start + Duration::from_millis(ms)).map(|left| left.as_millis());
        assert_eq!(
            [left(0), left(60), left(99), left(100), left(500)],
            [Some(100), Some(40), Some(1), None, None]
        );
    }

    #[test]
    fn refused_runs_are_tried_again_after_a_minute() {
        let mut runs = Runs::new(true);
        assert!(runs.may_be_tried());
        let now = Instant::now();
        runs.refused = Some(now);
        assert!(!runs.may_be_tried());
        runs.refused = now.checked_sub(RUNS_AGAIN);
        assert!(runs.may_be_tried());
        assert!(!Runs::new(false).may_be_tried(), "unless the socket does not know them");
    }

    #[test]
    fn runs_are_given_up_only_when_no_run_will_ever_be_taken() {
        assert_eq!(Refused::of(Errno::EIO), Refused::AllRuns);
        assert_eq!(Refused::of(Errno::EMSGSIZE), Refused::Run);
        assert_eq!(Refused::of(Errno::EINVAL), Refused::Run);
        for errno in [Errno::ENETUNREACH, Errno::EPERM, Errno::ECONNREFUSED, Errno::ENOBUFS, Errno::EAGAIN] {
            assert_eq!(Refused::of(errno), Refused::Datagrams, "{errno}");
        }
    }
}
