//! From the peers to the device.
//!
//! A wake-up receives what is there, up to a batch; what passes the checks is put together again and written, one write
//! per group and none left over at the end of the batch. What came alone goes straight on.

use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::poll;
use nix::sys::uio::writev;

use super::coalesce::{Coalescer, Rules, Write};
use super::counters::{DropReason, Tally};
use super::inbox::Inbox;
use super::link::Link;
use super::offload::{Offload, Outcome};
use super::packet::Ipv4;
use super::peers::PeerTable;
use super::virtio::{self, GsoKind, VirtioHeader};

/// Packets put together at a time: twice what eight messages of `UDP_GRO` hold, which is as many as come at a time.
const PACKETS: usize = 1024;
/// The most parts of one write: a prefix and [`Coalescer`]'s largest group.
const PARTS: usize = 1 + 128;
/// After an error of the socket that is no packet's.
const SOCKET_ERROR_WAIT_MS: u8 = 10;

/// All memory is taken at the start.
pub(super) struct Ingress {
    inbox: Inbox,
    coalescer: Coalescer,
    tally: Tally,
    /// The socket's count of overruns that has been published.
    overruns: u32,
    learnt: Learnt,
}

/// Who sent a packet and whether it may come in: what the next one of the same flow need not look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Admitted {
    outer: SocketAddrV4,
    source: Ipv4Addr,
    destination: Ipv4Addr,
}

/// What is known of the device of one attachment.
#[derive(Debug, Clone, Copy)]
struct Learnt {
    rules: Rules,
    /// A group of this kind has been taken: a later refusal is about the packet, not about the kind.
    proven: Rules,
    gone: bool,
}

/// Writes groups, and learns what the device takes.
struct Writer<'a, W, R> {
    write: W,
    /// Told once what is given up.
    refused: R,
    vnet_hdr: bool,
    learnt: &'a mut Learnt,
}

impl Ingress {
    pub(super) fn new() -> Self {
        let nothing = Rules { tcp: false, udp: false };
        Self {
            inbox: Inbox::new(),
            coalescer: Coalescer::new(PACKETS, nothing),
            tally: Tally::default(),
            overruns: 0,
            learnt: Learnt::new(nothing),
        }
    }

    /// With a device of which nothing is known yet but what may be tried.
    pub(super) fn begin(&mut self, rules: Rules) {
        self.learnt = Learnt::new(rules);
        self.coalescer.set_rules(rules);
    }

    /// Writes what comes, until the device is gone or the link is over.
    pub(super) fn serve(&mut self, link: &Link<'_>) {
        while !link.is_over() && !self.learnt.gone {
            self.step(link);
        }
    }

    fn step(&mut self, link: &Link<'_>) {
        self.tally.traffic.calls += 1;
        match self.inbox.receive(link.socket.as_fd()) {
            Ok(messages) => self.pass(link, &link.shared.peers.load(), messages),
            Err(Errno::EINTR) => {}
            // Of no packet; what it is will pass or not, and must not keep a core busy meanwhile.
            Err(_) => {
                let _ = poll(&mut [], SOCKET_ERROR_WAIT_MS);
            }
        }
        self.tally.publish(&link.shared.ingress);
    }

    fn pass(&mut self, link: &Link<'_>, table: &PeerTable, messages: usize) {
        let Self { inbox, coalescer, tally, overruns, learnt } = self;
        let mut device = Writer {
            // Where a foreign hand has limited the device's buffer writes wait, and must not outlast the link.
            write: |parts: &[IoSlice<'_>]| match writev(&link.queue, parts) {
                Err(Errno::EINTR) if link.is_over() => Err(Errno::EAGAIN),
                result => result,
            },
            refused: |offload, outcome| link.shared.tell_outcome(offload, outcome),
            vnet_hdr: link.vnet_hdr,
            learnt,
        };
        let arena = inbox.arena();
        let mut admitted = None;
        for index in 0..messages {
            let message = inbox.message(index);
            if let Some(total) = message.overruns {
                tally.dropped(DropReason::Overrun, total.wrapping_sub(*overruns).into());
                *overruns = total;
            }
            if message.truncated {
                tally.dropped(DropReason::Oversized, 1);
                continue;
            }
            let mut start = message.at.start;
            // At least once: a datagram may be empty.
            loop {
                let end = message.at.end.min(start + message.size);
                match admit(table, message.from, &arena[start..end], &mut admitted) {
                    Err(reason) => tally.dropped(reason, 1),
                    // Nothing to be joined with: straight on.
                    Ok(()) if messages == 1 && end - start == message.at.len() => {
                        device.write_alone(&arena[start..end], tally);
                    }
                    Ok(()) => {
                        if coalescer.push(arena, start..end).is_err() {
                            device.write(coalescer, arena, tally);
                            // There is room now.
                            let _ = coalescer.push(arena, start..end);
                        }
                    }
                }
                start = end;
                if start >= message.at.end {
                    break;
                }
            }
        }
        device.write(coalescer, arena, tally);
    }
}

/// Whether a datagram's packet is whole and may come in from there.
fn admit(
    table: &PeerTable,
    outer: SocketAddrV4,
    datagram: &[u8],
    last: &mut Option<Admitted>,
) -> Result<(), DropReason> {
    let packet = Ipv4::parse(datagram)?;
    let this = Admitted { outer, source: packet.source(), destination: packet.destination() };
    if *last != Some(this) {
        table.admit(this.outer, this.source, this.destination)?;
        *last = Some(this);
    }
    Ok(())
}

impl Learnt {
    fn new(rules: Rules) -> Self {
        Self { rules, proven: Rules { tcp: false, udp: false }, gone: false }
    }
}

impl<W, R> Writer<'_, W, R>
where
    W: FnMut(&[IoSlice<'_>]) -> Result<usize, Errno>,
    R: FnMut(Offload, Outcome),
{
    /// Writes all groups of the batch.
    fn write(&mut self, coalescer: &mut Coalescer, arena: &[u8], tally: &mut Tally) {
        while let Some(write) = coalescer.next_write(arena) {
            if self.learnt.gone {
                tally.dropped(DropReason::WriteFailed, write.packets as u64);
                continue;
            }
            match self.write_group(&write, arena, tally) {
                Ok(bytes) => {
                    tally.traffic.packets += write.packets as u64;
                    tally.traffic.bytes += bytes;
                    match write.gso {
                        Some(GsoKind::Udp) => self.learnt.proven.udp = true,
                        Some(GsoKind::TcpV4 | GsoKind::TcpV6) => self.learnt.proven.tcp = true,
                        None => {}
                    }
                }
                Err(Errno::EINVAL) if let Some(kind) = write.gso => {
                    self.refuse(kind);
                    for at in write.originals() {
                        self.write_alone(&arena[at], tally);
                    }
                }
                Err(errno) => self.failed(errno, write.packets, tally),
            }
        }
        coalescer.set_rules(self.learnt.rules);
    }

    /// Says how many bytes of inner packets went.
    fn write_group(&mut self, write: &Write<'_>, arena: &[u8], tally: &mut Tally) -> Result<u64, Errno> {
        let prefix = if self.vnet_hdr { write.prefix } else { &write.prefix[virtio::LEN..] };
        let headers = write.prefix.len() - virtio::LEN;
        if write.packets == 1 {
            let Some(at) = write.payloads().next() else { return Ok(0) };
            let bytes = headers + at.len();
            self.call(&[IoSlice::new(prefix), IoSlice::new(&arena[at])], tally)?;
            return Ok(bytes as u64);
        }
        let mut parts = [IoSlice::new(&[]); PARTS];
        parts[0] = IoSlice::new(prefix);
        let (mut count, mut payloads) = (1, 0);
        for (part, at) in parts[1..].iter_mut().zip(write.payloads()) {
            payloads += at.len();
            *part = IoSlice::new(&arena[at]);
            count += 1;
        }
        self.call(&parts[..count], tally)?;
        Ok((payloads + write.packets * headers) as u64)
    }

    fn write_alone(&mut self, packet: &[u8], tally: &mut Tally) {
        let header = VirtioHeader::default().encode();
        let header = if self.vnet_hdr { &header[..] } else { &[] };
        match self.call(&[IoSlice::new(header), IoSlice::new(packet)], tally) {
            Ok(()) => {
                tally.traffic.packets += 1;
                tally.traffic.bytes += packet.len() as u64;
            }
            Err(errno) => self.failed(errno, 1, tally),
        }
    }

    fn call(&mut self, parts: &[IoSlice<'_>], tally: &mut Tally) -> Result<(), Errno> {
        loop {
            tally.traffic.calls += 1;
            match (self.write)(parts) {
                Err(Errno::EINTR) => {}
                result => return result.map(drop),
            }
        }
    }

    /// The device did not take a group of this kind.
    fn refuse(&mut self, kind: GsoKind) {
        let (offload, proven, rule) = match kind {
            GsoKind::Udp => (Offload::CoalesceUdp, self.learnt.proven.udp, &mut self.learnt.rules.udp),
            GsoKind::TcpV4 | GsoKind::TcpV6 => {
                (Offload::CoalesceTcp, self.learnt.proven.tcp, &mut self.learnt.rules.tcp)
            }
        };
        if !proven && *rule {
            *rule = false;
            (self.refused)(offload, Outcome::refused("write of several packets as one", Errno::EINVAL));
        }
    }

    fn failed(&mut self, errno: Errno, packets: usize, tally: &mut Tally) {
        tally.dropped(DropReason::WriteFailed, packets as u64);
        // EIO is a device that is down, and stays ours.
        self.learnt.gone = errno == Errno::EBADFD;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three UDP datagrams of one flow, 100 bytes of payload each, one behind the other.
    fn flow() -> (Vec<u8>, usize) {
        let mut arena = Vec::new();
        for number in 0..3_u8 {
            let mut packet = vec![0_u8; 128];
            packet[..4].copy_from_slice(&[0x45, 0, 0, 128]);
            packet[6] = 0x40;
            packet[8..10].copy_from_slice(&[63, 17]);
            packet[12..20].copy_from_slice(&[10, 5, 2, 1, 10, 5, 1, 1]);
            packet[20..26].copy_from_slice(&[0x10, 0, 0x20, 0, 0, 108]);
            packet[28..].fill(number);
            let sum = super::super::checksum::Sum::of(&packet[..20]).checksum();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            let pseudo = super::super::checksum::Sum::pseudo(&packet[12..20], 17, 108);
            let sum = (pseudo + super::super::checksum::Sum::of(&packet[20..])).checksum();
            packet[26..28].copy_from_slice(&sum.to_be_bytes());
            arena.extend(packet);
        }
        (arena, 128)
    }

    fn batch(coalescer: &mut Coalescer, arena: &[u8], len: usize) {
        for start in (0..arena.len()).step_by(len) {
            coalescer.push(arena, start..start + len).expect("room");
        }
    }

    /// What was written, and what was given up.
    fn written(answers: &[Option<Errno>], batches: usize) -> (Vec<usize>, Vec<Offload>, Tally) {
        let all = Rules { tcp: true, udp: true };
        let (arena, len) = flow();
        let (mut sizes, mut refused, mut tally) = (Vec::new(), Vec::new(), Tally::default());
        let mut answers = answers.iter();
        let write = |parts: &[IoSlice<'_>]| {
            let size = parts.iter().map(|part| part.len()).sum();
            match answers.next() {
                Some(Some(errno)) => Err(*errno),
                _ => {
                    sizes.push(size);
                    Ok(size)
                }
            }
        };
        let mut learnt = Learnt::new(all);
        let refused_too = |offload, _| refused.push(offload);
        let mut writer = Writer { write, refused: refused_too, vnet_hdr: true, learnt: &mut learnt };
        let mut coalescer = Coalescer::new(8, all);
        for _ in 0..batches {
            batch(&mut coalescer, &arena, len);
            writer.write(&mut coalescer, &arena, &mut tally);
        }
        (sizes, refused, tally)
    }

    #[test]
    fn what_was_admitted_says_nothing_of_another_source_destination_or_sender() {
        use crate::udp::{Local, Peer, SourcePolicy};
        let subnet = |text: &str| text.parse::<weft_shared::Subnet>().expect("subnet");
        let peer = |subnet, addr: &str| Peer { subnet, addr: addr.parse().expect("address") };
        let local = Local {
            network: subnet("10.5.0.0/16"),
            subnets: vec![subnet("10.5.1.0/24")],
            device_addr: Ipv4Addr::new(10, 5, 1, 0),
        };
        let two = peer(subnet("10.5.2.0/24"), "192.0.2.2:8285");
        let three = peer(subnet("10.5.3.0/24"), "192.0.2.3:8285");
        let table = PeerTable::new(local, SourcePolicy::default(), [two, three]);
        let good = flow().0[..128].to_vec();
        let with = |at: usize, octet: u8| {
            let mut packet = good.clone();
            packet[at] = octet;
            packet[10..12].fill(0);
            let sum = super::super::checksum::Sum::of(&packet[..20]).checksum();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet
        };
        let mut last = None;
        for (outer, packet, wanted) in [
            (two.addr, &good, Ok(())),
            (two.addr, &good, Ok(())),
            (two.addr, &with(14, 3), Err(DropReason::SourceRefused)),
            (two.addr, &with(18, 9), Err(DropReason::NotOurs)),
            (three.addr, &good, Err(DropReason::SourceRefused)),
            ("203.0.113.1:8285".parse().expect("address"), &good, Err(DropReason::UnknownPeer)),
            (two.addr, &good, Ok(())),
        ] {
            assert_eq!(admit(&table, outer, packet, &mut last), wanted, "{outer} {:?}", &packet[12..20]);
        }
    }

    #[test]
    fn a_refused_group_goes_packet_by_packet_and_its_kind_is_not_tried_again() {
        let (sizes, refused, tally) = written(&[Some(Errno::EINVAL)], 2);
        assert_eq!(sizes, [138; 6], "nothing is lost: six packets with a header each");
        assert_eq!(refused, [Offload::CoalesceUdp], "told once");
        assert_eq!((tally.traffic.packets, tally.traffic.bytes), (6, 6 * 128));
    }

    #[test]
    fn a_kind_that_has_been_taken_is_not_given_up_for_one_packet() {
        let (sizes, refused, tally) = written(&[None, Some(Errno::EINVAL)], 3);
        assert_eq!(sizes, [338, 138, 138, 138, 338]);
        assert_eq!(refused, []);
        assert_eq!((tally.traffic.packets, tally.traffic.bytes), (9, 9 * 128));
    }
}
