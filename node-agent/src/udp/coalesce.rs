//! Received packets put together again, so that one write to the device stands for many: the decisive trick of this
//! backend, as each write costs the kernel a walk through its whole stack.
//!
//! What may be joined is what the kernel's own receive offload joins (linux net/ipv4/tcp_offload.c, udp_offload.c,
//! net/core/gro.c), with one rule above all: **segmenting a group gives its packets back byte for byte**. IPv4
//! identifications alone may come back different, and only where they mean nothing (don't-fragment is set and all of
//! the group have the same one: RFC 6864 section 4.1).
//!
//! A group of two and more is written with a partial checksum, by which the kernel takes every checksum in it for
//! right. So each one is verified before its packet joins. A packet that stays alone is written exactly as it came and
//! the kernel, or whoever it is for, verifies it.
//!
//! Order within a flow is kept: groups are written in the order of their first packets, and a packet joins only the
//! last group of its flow. Flows are found by one probe of a small table; a flow that loses its place there goes on in
//! a new group.

use std::ops::Range;

use super::checksum::Sum;
use super::layout::{Layout, MAX_HEADERS, Transport, Version, get, put};
use super::offload::UDP_MAX_SEGMENTS;
use super::packet::MAX_TOTAL;
use super::virtio::{self, Gso, GsoKind, PartialChecksum, VirtioHeader};

/// What the device takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    pub tcp: bool,
    pub udp: bool,
}

/// The packets of one batch. All memory is taken at the start.
#[derive(Debug)]
pub struct Coalescer {
    rules: Rules,
    limit: usize,
    packets: Vec<Packet>,
    groups: Vec<Group>,
    flows: Box<[Flow; FLOWS]>,
    /// How often something without ports has come between two addresses, in a slot chosen by these.
    portless: Box<[u32; PAIRS]>,
    /// Tells this batch's flows from those that still lie in the table.
    batch: u32,
    /// Which group is written next, and where its headers are put together.
    next: usize,
    prefix: [u8; virtio::LEN + MAX_HEADERS],
}

/// The batch has all the packets that there is room for: write it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// One write to the device: the prefix, then each payload.
#[derive(Debug)]
pub struct Write<'a> {
    /// The device's header, and the group's headers where it has more than one packet.
    pub prefix: &'a [u8],
    /// How many packets it stands for.
    pub packets: usize,
    /// What it is written as, to count it, and to give up what the device refuses.
    pub gso: Option<GsoKind>,
    list: &'a [Packet],
    first: u32,
    /// Bytes of each packet that the prefix stands for.
    headers: u32,
}

/// More than one flow in a slot costs groups, nothing else; 64 flows of a batch meet there seldom.
const FLOWS: usize = 256;
const PAIRS: usize = 64;
/// 64 KiB of the smallest usual segments (536 bytes), and few enough for one `writev`.
const MAX_TCP_PACKETS: u16 = 128;
/// Ends a list.
const NONE: u32 = u32::MAX;

const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const ECE: u8 = 0x40;
const DONT_FRAGMENT: u8 = 0x40;

/// Where one packet is in the arena, and which follows it in its group.
#[derive(Debug, Clone, Copy)]
struct Packet {
    start: u32,
    end: u32,
    next: u32,
}

#[derive(Debug, Clone, Copy)]
struct Group {
    first: u32,
    last: u32,
    /// Where it may be more than one packet.
    layout: Option<Layout>,
    /// Payload of all together, and of all but the last.
    payload: u32,
    size: u16,
    packets: u16,
    identification: Identification,
    /// The first packet's checksums, looked at when a second one wants to join.
    verified: bool,
    /// The last packet had it.
    push: bool,
}

/// How IPv4 identifications go on; the second packet decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identification {
    Undecided,
    Counting,
    Fixed,
}

/// The open group of a flow.
#[derive(Debug, Clone, Copy, Default)]
struct Flow {
    batch: u32,
    group: u32,
    /// Of [`Coalescer::portless`] when the group was opened.
    portless: u32,
}

/// A packet that may be in a group.
#[derive(Debug, Clone, Copy)]
struct Candidate<'a> {
    bytes: &'a [u8],
    layout: Layout,
}

impl Coalescer {
    /// For batches of up to `limit` packets.
    pub fn new(limit: usize, rules: Rules) -> Self {
        Self {
            rules,
            limit,
            packets: Vec::with_capacity(limit),
            groups: Vec::with_capacity(limit),
            flows: Box::new([Flow::default(); FLOWS]),
            portless: Box::new([0; PAIRS]),
            batch: 1,
            next: 0,
            prefix: [0; virtio::LEN + MAX_HEADERS],
        }
    }

    /// What is joined from now on.
    pub fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// One more packet: where it is in `arena`, which is one and the same for the whole batch.
    #[inline]
    pub fn push(&mut self, arena: &[u8], at: Range<usize>) -> Result<(), Full> {
        if self.packets.len() == self.limit {
            return Err(Full);
        }
        let bytes = &arena[at.clone()];
        let index = self.packets.len() as u32;
        self.packets.push(Packet { start: at.start as u32, end: at.end as u32, next: NONE });
        let Some(layout) = Layout::of(bytes) else {
            // A fragment may be of any flow between its addresses: none of them may be added to behind its back.
            let seen = &mut self.portless[pair(bytes)];
            *seen = seen.wrapping_add(1);
            self.open(index, None, 0);
            return Ok(());
        };
        let portless = self.portless[pair(bytes)];
        let slot = slot(&layout, bytes);
        let flow = self.flows[slot];
        let Some(candidate) = Candidate::new(self.rules, layout, bytes) else {
            // Nothing of its flow may get in front of it; that the slot may be another flow's costs that one a group.
            self.flows[slot].batch = 0;
            self.open(index, None, 0);
            return Ok(());
        };
        if flow.batch == self.batch && flow.portless == portless {
            match self.join(arena, flow.group as usize, index, &candidate) {
                Joined::Open => return Ok(()),
                Joined::Closed => {
                    self.flows[slot].batch = 0;
                    return Ok(());
                }
                Joined::Refused => {}
            }
        }
        let payload = bytes.len() - layout.headers;
        let group = self.open(index, Some(layout), payload);
        // Nothing follows what asks to be delivered now.
        let batch = if candidate.has(PSH) { 0 } else { self.batch };
        self.flows[slot] = Flow { batch, group, portless };
        Ok(())
    }

    /// The next write of this batch; after the last one, `None` and a new batch begins.
    #[inline]
    pub fn next_write(&mut self, arena: &[u8]) -> Option<Write<'_>> {
        let Some(group) = self.groups.get(self.next) else {
            self.clear();
            return None;
        };
        self.next += 1;
        let packets = usize::from(group.packets);
        let (gso, headers) = match group.layout {
            Some(layout) if packets > 1 => {
                let first = &arena[self.packets[group.first as usize].range()];
                (Some(group.write_prefix(&layout, first, &mut self.prefix)), layout.headers)
            }
            _ => {
                self.prefix[..virtio::LEN].copy_from_slice(&VirtioHeader::default().encode());
                (None, 0)
            }
        };
        Some(Write {
            prefix: &self.prefix[..virtio::LEN + headers],
            packets,
            gso,
            list: &self.packets,
            first: group.first,
            headers: headers as u32,
        })
    }

    /// Forgets the batch.
    pub fn clear(&mut self) {
        self.packets.clear();
        self.groups.clear();
        self.next = 0;
        self.batch = self.batch.wrapping_add(1);
        if self.batch == 0 {
            // Zero is what an empty slot says, and what comes after it was said four milliards of batches ago.
            self.flows.fill(Flow::default());
            self.batch = 1;
        }
    }

    fn open(&mut self, index: u32, layout: Option<Layout>, payload: usize) -> u32 {
        let group = self.groups.len() as u32;
        self.groups.push(Group {
            first: index,
            last: index,
            layout,
            payload: payload as u32,
            size: payload as u16,
            packets: 1,
            identification: Identification::Undecided,
            verified: false,
            push: false,
        });
        group
    }

    /// Adds the packet to the group if it is the one that segmentation would give next.
    #[inline]
    fn join(&mut self, arena: &[u8], group: usize, index: u32, candidate: &Candidate<'_>) -> Joined {
        let group = &mut self.groups[group];
        let first = &arena[self.packets[group.first as usize].range()];
        let payload = candidate.payload();
        let Some(identification) = candidate.follows(group, first) else { return Joined::Refused };
        if !group.verified {
            if !is_right(&candidate.layout, first) {
                return Joined::Refused;
            }
            group.verified = true;
        }
        if !is_right(&candidate.layout, candidate.bytes) {
            return Joined::Refused;
        }
        self.packets[group.last as usize].next = index;
        group.last = index;
        group.packets += 1;
        group.payload += payload as u32;
        group.identification = identification;
        group.push = candidate.has(PSH);
        if group.push || payload < usize::from(group.size) { Joined::Closed } else { Joined::Open }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Joined {
    Open,
    /// And nothing more may.
    Closed,
    Refused,
}

impl<'a> Candidate<'a> {
    /// A packet that segmentation could have made: payload, nothing but ordinary flags, every field in the one form
    /// that the kernel writes.
    #[inline]
    fn new(rules: Rules, layout: Layout, bytes: &'a [u8]) -> Option<Self> {
        let (network, transport) = bytes.split_at(layout.network);
        if bytes.len() == layout.headers {
            return None;
        }
        // With options, which may differ between first and later segments; or the other zero, which is no result of
        // computing a checksum.
        if layout.version == Version::V4 && (layout.network != 20 || get(network, 10) == 0xffff) {
            return None;
        }
        let ordinary = match layout.transport {
            Transport::Tcp => {
                let flags = transport[13] & !(PSH | ECE);
                rules.tcp && flags == ACK && transport[12] & 0xf == 0 && get(transport, 16) != 0xffff
            }
            Transport::Udp => {
                rules.udp && usize::from(get(transport, 4)) == transport.len() && get(transport, 6) != 0
            }
        };
        ordinary.then_some(Self { bytes, layout })
    }

    fn payload(&self) -> usize {
        self.bytes.len() - self.layout.headers
    }

    #[inline]
    fn has(&self, flag: u8) -> bool {
        self.layout.transport == Transport::Tcp && self.bytes[self.layout.network + 13] & flag != 0
    }

    /// Whether the packet is what comes next in a group that begins with `first`, apart from checksums; and how
    /// identifications go on then.
    #[inline]
    fn follows(&self, group: &Group, first: &[u8]) -> Option<Identification> {
        let Layout { version, transport, network, headers } = self.layout;
        if first.len() < headers {
            return None;
        }
        let (ours, theirs) = (&self.bytes[..headers], &first[..headers]);
        let same = |range: Range<usize>| ours[range.clone()] == theirs[range];
        let identification = match version {
            // Version, header length, TOS; fragment field, TTL, protocol; addresses.
            Version::V4 if same(0..2) && same(6..10) && same(12..20) => {
                let ahead = get(ours, 4).wrapping_sub(get(theirs, 4));
                let counting = ahead == group.packets;
                let fixed = ahead == 0 && ours[6] & DONT_FRAGMENT != 0;
                match group.identification {
                    Identification::Undecided | Identification::Counting if counting => {
                        Identification::Counting
                    }
                    Identification::Undecided | Identification::Fixed if fixed => Identification::Fixed,
                    _ => return None,
                }
            }
            // Version, traffic class, flow label; next header, hop limit, addresses.
            Version::V6 if same(0..4) && same(6..40) => Identification::Undecided,
            _ => return None,
        };
        let at = network;
        let (limit, goes_on) = match transport {
            Transport::Tcp => {
                let sequence = |h: &[u8]| u32::from(get(h, at + 4)) << 16 | u32::from(get(h, at + 6));
                let next = sequence(theirs).wrapping_add(group.payload);
                let goes_on = same(at..at + 4)
                    && sequence(ours) == next
                    && same(at + 8..at + 13)
                    && (ours[at + 13] ^ theirs[at + 13]) & !PSH == 0
                    // Window; urgent pointer and options.
                    && same(at + 14..at + 16)
                    && same(at + 18..headers);
                (MAX_TCP_PACKETS, goes_on)
            }
            Transport::Udp => (UDP_MAX_SEGMENTS, same(at..at + 4)),
        };
        let payload = self.payload();
        let fits = payload <= usize::from(group.size)
            && headers + group.payload as usize + payload <= MAX_TOTAL
            && group.packets < limit;
        (goes_on && fits).then_some(identification)
    }
}

/// Whether both checksums of a packet are right.
#[inline]
fn is_right(layout: &Layout, bytes: &[u8]) -> bool {
    let (network, transport) = bytes.split_at(layout.network);
    let header = layout.version == Version::V6 || Sum::of(network).is_right();
    header && (layout.pseudo(network, bytes.len() - layout.headers) + Sum::of(transport)).is_right()
}

impl Group {
    /// The device's header, and the headers of the one packet that stands for the group.
    fn write_prefix(
        &self,
        layout: &Layout,
        first: &[u8],
        prefix: &mut [u8; virtio::LEN + MAX_HEADERS],
    ) -> GsoKind {
        let payload = self.payload as usize;
        let kind = match (layout.transport, layout.version) {
            (Transport::Tcp, Version::V4) => GsoKind::TcpV4,
            (Transport::Tcp, Version::V6) => GsoKind::TcpV6,
            (Transport::Udp, _) => GsoKind::Udp,
        };
        let offset = layout.checksum_offset();
        let header = VirtioHeader {
            checksum: Some(PartialChecksum { start: layout.network as u16, offset: offset as u16 }),
            gso: Some(Gso { kind, size: self.size }),
            hdr_len: layout.headers as u16,
        };
        prefix[..virtio::LEN].copy_from_slice(&header.encode());
        let headers = &mut prefix[virtio::LEN..virtio::LEN + layout.headers];
        headers.copy_from_slice(&first[..layout.headers]);
        layout.set_lengths(headers, payload);
        if layout.version == Version::V4 {
            put(headers, 10, 0);
            let checksum = Sum::of(&headers[..layout.network]).checksum();
            put(headers, 10, checksum);
        }
        if layout.transport == Transport::Tcp && self.push {
            headers[layout.network + 13] |= PSH;
        }
        let pseudo = layout.pseudo(headers, payload).fold();
        put(headers, layout.network + offset, pseudo);
        kind
    }
}

impl Write<'_> {
    /// What follows the prefix, as places in the arena.
    pub fn payloads(&self) -> impl Iterator<Item = Range<usize>> {
        self.list(self.headers)
    }

    /// The packets as they came, for a device that refuses them joined.
    pub fn originals(&self) -> impl Iterator<Item = Range<usize>> {
        self.list(0)
    }

    fn list(&self, skip: u32) -> impl Iterator<Item = Range<usize>> {
        let mut next = self.first;
        std::iter::from_fn(move || {
            let packet = self.list.get(next as usize)?;
            next = packet.next;
            Some((packet.start + skip) as usize..packet.end as usize)
        })
    }
}

impl Packet {
    fn range(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// A slot for what shares its flow.
#[inline]
fn slot(layout: &Layout, packet: &[u8]) -> usize {
    let at = layout.network;
    let ports = u32::from_ne_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
    let hash = addresses(packet, layout.version) ^ u64::from(ports) << 8 ^ u64::from(layout.protocol());
    mixed(hash) % FLOWS
}

/// A slot for what may share a flow without saying so: in IPv6 the protocol too may stand further behind.
#[inline]
fn pair(packet: &[u8]) -> usize {
    let hash = match packet.first().map(|b| b >> 4) {
        Some(4) if packet.len() >= 20 => addresses(packet, Version::V4) ^ u64::from(packet[9]),
        Some(6) if packet.len() >= 40 => addresses(packet, Version::V6),
        _ => 0,
    };
    mixed(hash) % PAIRS
}

#[inline]
fn addresses(packet: &[u8], version: Version) -> u64 {
    let range = match version {
        Version::V4 => 12..20,
        Version::V6 => 8..40,
    };
    packet[range]
        .as_chunks::<8>()
        .0
        .iter()
        .fold(0, |hash: u64, part| hash.wrapping_mul(MULTIPLIER).rotate_left(29) ^ u64::from_ne_bytes(*part))
}

/// Of the golden ratio (Knuth, TAOCP 6.4): neighbours come apart in the upper bits.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline]
fn mixed(hash: u64) -> usize {
    (hash.wrapping_mul(MULTIPLIER) >> 40) as usize
}

#[cfg(test)]
mod tests;
