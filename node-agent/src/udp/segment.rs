//! What a read of the device gives, a packet or a super-packet, as the packets that go on the wire.
//!
//! A super-packet's segments are what the kernel's own segmentation makes of it (linux net/ipv4/af_inet.c
//! `inet_gso_segment`, tcp_offload.c `tcp_gso_segment`, udp_offload.c `__udp_gso_segment`): IPv4 identifications count
//! up, FIN and PSH are on the last segment, CWR on the first, everything else on all of them. The payload is not
//! copied: a segment is a header of its own and a slice of what was read.

use super::checksum::Sum;
use super::counters::DropReason;
use super::layout::{Layout, MAX_HEADERS, Transport, Version, get, put};
use super::virtio::{Gso, GsoKind, PartialChecksum, VirtioHeader};

const TCP_FLAGS: usize = 13;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
const BAD: DropReason = DropReason::BadOffload;

/// The packets that are still to come of one read.
#[derive(Debug, Clone)]
pub struct Segments<'a> {
    rest: Rest<'a>,
}

/// One packet for the wire: as many bytes of header as were written, and what follows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Bytes at the beginning of the `headers` handed in; 0 when the packet goes as it is.
    pub headers: usize,
    pub payload: &'a [u8],
}

#[derive(Debug, Clone)]
enum Rest<'a> {
    Whole(&'a [u8]),
    Super(Super<'a>),
    Nothing,
}

#[derive(Debug, Clone)]
struct Super<'a> {
    layout: Layout,
    /// The super-packet's own: TCP's flags and sequence number, IPv4's identification are those of the next segment.
    headers: [u8; MAX_HEADERS],
    payload: &'a [u8],
    size: usize,
    /// Over what is the same in all segments: IPv4 header without length, identification and checksum.
    network_sum: Sum,
    /// Addresses, protocol and the transport header without its lengths, sequence number, flags and checksum.
    transport_sum: Sum,
    sequence: u32,
    identification: u16,
    flags: u8,
    first: bool,
}

impl<'a> Segments<'a> {
    /// Room that a segment's headers may need.
    pub const MAX_HEADERS: usize = MAX_HEADERS;

    /// `packet` is one read without the header in front; a checksum that is still partial is completed in place.
    #[inline]
    pub fn new(header: &VirtioHeader, packet: &'a mut [u8]) -> Result<Self, DropReason> {
        if usize::from(header.hdr_len) > packet.len() {
            return Err(BAD);
        }
        let rest = match (header.gso, header.checksum) {
            (Some(gso), checksum) => Rest::Super(Super::new(gso, checksum, packet)?),
            (None, Some(checksum)) => {
                complete(packet, checksum)?;
                Rest::Whole(packet)
            }
            (None, None) => Rest::Whole(packet),
        };
        Ok(Self { rest })
    }

    /// How many packets a read stands for, good or bad, as far as that can be told; at least one.
    pub fn count(header: &VirtioHeader, packet: &[u8]) -> usize {
        let Some(gso) = header.gso else { return 1 };
        let payload = Layout::of(packet).map_or(0, |layout| packet.len() - layout.headers);
        payload.div_ceil(usize::from(gso.size).max(1)).max(1)
    }

    /// How many packets are still to come.
    pub fn remaining(&self) -> usize {
        match &self.rest {
            Rest::Whole(_) => 1,
            Rest::Super(s) => s.payload.len().div_ceil(s.size),
            Rest::Nothing => 0,
        }
    }

    /// The next packet; its headers are written to the beginning of `headers`, which has [`Self::MAX_HEADERS`] bytes
    /// or more. What those hold behind them is of no meaning.
    #[inline]
    pub fn next(&mut self, headers: &mut [u8]) -> Option<Segment<'a>> {
        match &mut self.rest {
            Rest::Super(s) => {
                let segment = s.next(headers);
                if s.payload.is_empty() {
                    self.rest = Rest::Nothing;
                }
                Some(segment)
            }
            Rest::Whole(packet) => {
                let payload = *packet;
                self.rest = Rest::Nothing;
                Some(Segment { headers: 0, payload })
            }
            Rest::Nothing => None,
        }
    }
}

/// As the kernel's `skb_checksum_help`: a sum of zero is written as its other form, for UDP has another use for it.
#[inline]
fn complete(packet: &mut [u8], partial: PartialChecksum) -> Result<(), DropReason> {
    let start = usize::from(partial.start);
    let covered = packet.get_mut(start..).ok_or(BAD)?;
    let at = usize::from(partial.offset);
    let checksum = match Sum::of(covered).checksum() {
        0 => 0xffff,
        other => other,
    };
    covered.get_mut(at..at + 2).ok_or(BAD)?.copy_from_slice(&checksum.to_be_bytes());
    Ok(())
}

impl<'a> Super<'a> {
    #[inline]
    fn new(gso: Gso, checksum: Option<PartialChecksum>, packet: &'a [u8]) -> Result<Self, DropReason> {
        let layout = Layout::of(packet).ok_or(BAD)?;
        let as_said = match gso.kind {
            GsoKind::TcpV4 => layout.version == Version::V4 && layout.transport == Transport::Tcp,
            GsoKind::TcpV6 => layout.version == Version::V6 && layout.transport == Transport::Tcp,
            GsoKind::Udp => layout.transport == Transport::Udp,
        };
        // Where the checksum is follows from the packet; the device must not think otherwise.
        let same_place = checksum.is_none_or(|c| {
            usize::from(c.start) == layout.network && usize::from(c.offset) == layout.checksum_offset()
        });
        let (source, payload) = packet.split_at(layout.headers);
        if !as_said || !same_place || gso.size == 0 || payload.is_empty() {
            return Err(BAD);
        }
        let mut headers = [0; MAX_HEADERS];
        headers[..layout.headers].copy_from_slice(source);
        let (network, transport) = headers[..layout.headers].split_at_mut(layout.network);
        let (identification, network_sum) = match layout.version {
            Version::V4 => {
                let identification = get(network, 4);
                network[2..6].fill(0);
                network[10..12].fill(0);
                (identification, Sum::of(network))
            }
            Version::V6 => (0, Sum::default()),
        };
        let (sequence, flags) = match layout.transport {
            Transport::Tcp => {
                let sequence = (u32::from(get(transport, 4)) << 16) | u32::from(get(transport, 6));
                let flags = transport[TCP_FLAGS];
                transport[4..8].fill(0);
                transport[TCP_FLAGS] = 0;
                (sequence, flags)
            }
            Transport::Udp => {
                transport[4..6].fill(0);
                (0, 0)
            }
        };
        put(transport, layout.checksum_offset(), 0);
        let transport_sum =
            Sum::of(transport) + Sum::of(layout.addresses(source)) + Sum::word(u16::from(layout.protocol()));
        Ok(Self {
            layout,
            headers,
            payload,
            size: usize::from(gso.size),
            network_sum,
            transport_sum,
            sequence,
            identification,
            flags,
            first: true,
        })
    }

    #[inline]
    fn next(&mut self, out: &mut [u8]) -> Segment<'a> {
        let (payload, rest) = self.payload.split_at(self.size.min(self.payload.len()));
        self.payload = rest;
        let layout = self.layout;
        // All of the room at once: for a length known here that is a few moves, for another one a call.
        match out.first_chunk_mut::<MAX_HEADERS>() {
            Some(room) => *room = self.headers,
            None => out[..layout.headers].copy_from_slice(&self.headers[..layout.headers]),
        }
        let out = &mut out[..layout.headers];
        layout.set_lengths(out, payload.len());
        if layout.version == Version::V4 {
            let sum = self.network_sum + Sum::word(get(out, 2)) + Sum::word(self.identification);
            put(out, 4, self.identification);
            put(out, 10, sum.checksum());
            self.identification = self.identification.wrapping_add(1);
        }
        let transport = &mut out[layout.network..];
        let len = transport.len() + payload.len();
        let mut sum = self.transport_sum + Sum::word(len as u16) + Sum::of(payload);
        match layout.transport {
            Transport::Tcp => {
                let mut flags = self.flags;
                if !rest.is_empty() {
                    flags &= !(FIN | PSH);
                }
                if !self.first {
                    flags &= !CWR;
                }
                let sequence = self.sequence.to_be_bytes();
                transport[4..8].copy_from_slice(&sequence);
                transport[TCP_FLAGS] = flags;
                sum += Sum::of(&sequence) + Sum::word(u16::from(flags));
                put(transport, 16, sum.checksum());
                self.sequence = self.sequence.wrapping_add(payload.len() as u32);
            }
            Transport::Udp => {
                sum += Sum::word(len as u16);
                let checksum = match sum.checksum() {
                    // Zero would say that there is none.
                    0 => 0xffff,
                    other => other,
                };
                put(transport, 6, checksum);
            }
        }
        self.first = false;
        Segment { headers: layout.headers, payload }
    }
}

#[cfg(test)]
mod tests;
