//! From the device to the peers.
//!
//! A wake-up reads what is there into one arena, up to a batch, and sends all of it by one `sendmmsg`. A super-packet
//! of the device becomes one `UDP_SEGMENT` message; packets of one size to one peer share one as well.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::unistd::read;

use super::counters::{DropReason, Tally};
use super::icmp::{self, MAX_ANSWER, Problem, RateLimit};
use super::link::{Link, wait_for};
use super::offload::{Offload, Outcome};
use super::outbox::{Batch, Flow, Join, Outbox};
use super::packet::{Ipv4, MAX_DATAGRAM, MAX_TOTAL, decrement_ttl};
use super::peers::PeerTable;
use super::segment::Segments;
use super::virtio::{self, VirtioHeader};

/// The largest packet and the header in front of it.
const MAX_READ: usize = virtio::LEN + MAX_TOTAL;
/// Eight super-packets, and room for one whole read behind them.
const ARENA: usize = 8 * (1 << 16) + MAX_READ;
pub(super) const READS: usize = 256;
/// Reads begin at multiples of a cache line.
const ALIGN: usize = 64;
/// How long the socket may make no room before what is waiting is dropped. Meanwhile the device's queue fills, which
/// is where the kernel drops.
const WRITABLE_WITHIN_MS: u8 = 100;

/// The thread's own: all memory is taken at the start.
pub(super) struct Egress {
    arena: Box<[u8]>,
    reads: Vec<(usize, usize)>,
    outbox: Outbox,
    limit: RateLimit,
    tally: Tally,
}

/// What a read of the device ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// There may be more.
    Full,
    /// There is no more at the moment.
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
        }
    }

    /// Reads up to `most` times and sends what came; says how many reads gave something.
    pub(super) fn step(&mut self, link: &Link<'_>, most: usize, stop: BorrowedFd<'_>) -> (Read, usize) {
        let end = self.read(link, most);
        if !self.reads.is_empty() {
            let table = link.shared.peers.load();
            self.pass(link, &table, stop);
        }
        self.tally.publish(&link.shared.egress);
        (end, self.reads.len())
    }

    fn read(&mut self, link: &Link<'_>, most: usize) -> Read {
        self.reads.clear();
        let mut start = 0;
        while self.reads.len() < most && start + MAX_READ <= self.arena.len() {
            self.tally.traffic.calls += 1;
            match read(&link.queue, &mut self.arena[start..start + MAX_READ]) {
                Ok(len) => {
                    self.reads.push((start, len));
                    start = (start + len).next_multiple_of(ALIGN);
                }
                Err(Errno::EAGAIN) => return Read::Empty,
                Err(Errno::EINTR) => {}
                // EBADFD, or EFAULT out of a read that waited (tun_ring_recv); whatever else it says, attaching anew
                // after a moment is the remedy.
                Err(_) => return Read::Gone,
            }
        }
        Read::Full
    }

    fn pass(&mut self, link: &Link<'_>, table: &PeerTable, stop: BorrowedFd<'_>) {
        let Self { arena, reads, outbox, limit, tally } = self;
        let mut out = Out { link, stop, batch: outbox.begin(), tally, runs: link.runs.load(Relaxed) };
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
    /// Runs of datagrams as one message.
    runs: bool,
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
        let view = Ipv4::parse(packet).map_err(|reason| (reason, 1))?;
        let Some(peer) = table.route(view.destination()) else {
            self.answer(Problem::NetUnreachable, &view, table, limit);
            return Err((DropReason::NoRoute, 1));
        };
        let (to, flow) = (peer.addr, flow(&view));
        if view.ttl() <= 1 {
            self.answer(Problem::TimeExceeded, &view, table, limit);
            return Err((DropReason::TtlExceeded, 1));
        }
        decrement_ttl(packet).map_err(|reason| (reason, 1))?;
        let mut segments = Segments::new(&header, packet).map_err(|_| (DropReason::BadOffload, 1))?;
        loop {
            if !self.batch.has_room(Segments::MAX_HEADERS) {
                self.flush();
            }
            let Some(segment) = segments.next(self.batch.headers()) else { return Ok(()) };
            if segment.headers + segment.payload.len() > MAX_DATAGRAM {
                return Err((DropReason::Oversized, 1));
            }
            let join = match segments.remaining() {
                _ if !self.runs => Join::Alone,
                0 if segment.headers > 0 => Join::Tail,
                _ => Join::SameSize,
            };
            self.batch.push(to, segment.headers, segment.payload, flow, join);
        }
    }

    /// Tells the sender, as far as it may be told and the limit allows.
    fn answer(&mut self, problem: Problem, about: &Ipv4<'_>, table: &PeerTable, limit: &mut RateLimit) {
        let mut answer = [0; MAX_ANSWER];
        let Some(answer) = icmp::answer(problem, about, table.local(), &mut answer) else { return };
        if !limit.allow(Instant::now()) {
            self.tally.icmp_suppressed += 1;
            return;
        }
        self.tally.traffic.calls += 1;
        if self.link.host.send(answer, about.source()).is_ok() {
            self.tally.icmp_sent += 1;
        }
    }

    /// Sends the batch. What the socket does not take is counted, and what comes behind it is sent all the same.
    fn flush(&mut self) {
        let socket = self.link.socket.as_fd();
        let mut at = 0;
        while at < self.batch.messages().len() {
            match self.attempt(|batch| batch.send(socket, at)) {
                Ok(taken) => {
                    for message in &self.batch.messages()[at..at + taken] {
                        self.tally.traffic.packets += u64::from(message.segments);
                        self.tally.traffic.bytes += message.bytes as u64;
                    }
                    at += taken;
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
                Err(_) => {
                    self.tally.dropped(DropReason::SendFailed, 1);
                    at += 1;
                }
            }
        }
    }

    /// Tries again once when the socket was full and has room again.
    fn attempt(
        &mut self,
        mut send: impl FnMut(&mut Batch<'_, 'p>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        let mut waited = false;
        loop {
            self.tally.traffic.calls += 1;
            match send(&mut self.batch) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if !waited => {
                    waited = true;
                    wait_for(
                        self.link.socket.as_fd(),
                        PollFlags::POLLOUT,
                        self.stop,
                        WRITABLE_WITHIN_MS.into(),
                    );
                }
                result => return result,
            }
        }
    }

    /// Whether a refused message is to go datagram by datagram.
    fn sends_plainly(&mut self, message: usize, errno: Errno) -> bool {
        match Refused::of(errno) {
            _ if self.batch.messages()[message].segments == 1 => false,
            Refused::AllRuns => {
                self.runs = false;
                self.link.runs.store(false, Relaxed);
                let outcome = Outcome::refused("sendmmsg with UDP_SEGMENT", errno);
                self.link.shared.tell_outcome(Offload::UdpSegment, outcome);
                true
            }
            Refused::Run => true,
            Refused::Datagrams => false,
        }
    }
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
    /// The device cannot complete checksums, and never will (before Linux 6.11), or the path transforms packets.
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
