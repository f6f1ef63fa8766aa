//! A borrowed view of one IPv4 packet, checked once, in a fixed order, with one reason each (RFC 791, RFC 1122 3.2.1).
//!
//! A datagram carries exactly one packet: flanneld sends what it read from its device and nothing else, so bytes
//! behind the packet's total length are as wrong as missing ones, and both are [`DropReason::BadTotalLength`].

use std::net::Ipv4Addr;

use super::checksum::{Sum, patched};
use super::counters::DropReason;

/// An IPv4 header without options.
pub const MIN_HEADER: usize = 20;
/// The largest packet, by the width of its length.
pub const MAX_TOTAL: usize = 65535;
/// The largest payload of a datagram: all segments of a message together, too.
pub const MAX_DATAGRAM: usize = MAX_TOTAL - MIN_HEADER - 8;

const TTL: usize = 8;
const CHECKSUM: usize = 10;
/// The upper half of the word that TTL and protocol share.
const TTL_STEP: u16 = 0x0100;

/// A packet that passed every check of [`Ipv4::parse`]: header complete and right, total length that of the slice.
#[derive(Debug, Clone, Copy)]
pub struct Ipv4<'a> {
    bytes: &'a [u8],
    header_len: usize,
}

impl<'a> Ipv4<'a> {
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let Some(header) = bytes.first_chunk::<MIN_HEADER>() else { return Err(DropReason::Short) };
        if header[0] >> 4 != 4 {
            return Err(DropReason::WrongVersion);
        }
        let header_len = usize::from(header[0] & 0xf) * 4;
        if header_len < MIN_HEADER {
            return Err(DropReason::BadHeader);
        }
        if bytes.len() < header_len {
            return Err(DropReason::Short);
        }
        if usize::from(u16::from_be_bytes([header[2], header[3]])) != bytes.len() {
            return Err(DropReason::BadTotalLength);
        }
        if !Sum::of(&bytes[..header_len]).is_right() {
            return Err(DropReason::BadHeader);
        }
        Ok(Self { bytes, header_len })
    }

    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.header_len..]
    }

    pub fn ttl(&self) -> u8 {
        self.bytes[TTL]
    }

    pub fn protocol(&self) -> u8 {
        self.bytes[9]
    }

    #[inline]
    pub fn source(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.word32(12))
    }

    #[inline]
    pub fn destination(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.word32(16))
    }

    /// Whether the packet is a part of a datagram only.
    pub fn is_fragment(&self) -> bool {
        u16::from_be_bytes([self.bytes[6], self.bytes[7]]) & 0x3fff != 0
    }

    /// Whether the packet is a fragment, but not its datagram's first.
    pub fn is_later_fragment(&self) -> bool {
        u16::from_be_bytes([self.bytes[6], self.bytes[7]]) & 0x1fff != 0
    }

    #[inline]
    fn word32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }
}

/// One hop of the overlay: decrements the TTL of a packet that [`Ipv4::parse`] accepted and patches its header
/// checksum. A packet that must not go further is left as it is, for the ICMP error that quotes it.
#[inline]
pub fn decrement_ttl(packet: &mut [u8]) -> Result<(), DropReason> {
    let Some(header) = packet.first_chunk_mut::<MIN_HEADER>() else { return Err(DropReason::Short) };
    if header[TTL] <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let old = u16::from_be_bytes([header[TTL], header[TTL + 1]]);
    let checksum = u16::from_be_bytes([header[CHECKSUM], header[CHECKSUM + 1]]);
    header[TTL] -= 1;
    header[CHECKSUM..CHECKSUM + 2].copy_from_slice(&patched(checksum, old, old - TTL_STEP).to_be_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;

    /// From a pod to another.
    fn packet(ttl: u8, options: usize, payload: &[u8]) -> Vec<u8> {
        let mut p =
            vec![0x45 + (options / 4) as u8, 0, 0, 0, 0, 1, 0, 0, ttl, 17, 0, 0, 10, 5, 1, 2, 10, 5, 2, 3];
        p.resize(20 + options, 1);
        p.extend([0x12, 0x34, 0x00, 0x35, 0, 0, 0, 0]);
        p.extend_from_slice(payload);
        reference::finish(&mut p);
        p
    }

    fn with(change: impl FnOnce(&mut Vec<u8>)) -> Result<(), DropReason> {
        let mut p = packet(64, 0, b"payload");
        change(&mut p);
        Ipv4::parse(&p).map(|_| ())
    }

    #[test]
    fn what_a_packet_says() {
        let bytes = packet(7, 8, b"abc");
        let parsed = Ipv4::parse(&bytes).expect("a packet");
        assert_eq!(parsed.source(), Ipv4Addr::new(10, 5, 1, 2));
        assert_eq!(parsed.destination(), Ipv4Addr::new(10, 5, 2, 3));
        assert_eq!((parsed.ttl(), parsed.protocol(), parsed.header_len()), (7, 17, 28));
        assert_eq!(&parsed.payload()[8..], b"abc");
        assert!(!parsed.is_later_fragment());
        assert_eq!(parsed.bytes(), bytes);
    }

    #[test]
    fn each_fault_has_one_reason() {
        assert_eq!(with(|_| ()), Ok(()));
        assert_eq!(with(Vec::clear), Err(DropReason::Short));
        assert_eq!(with(|p| p.truncate(19)), Err(DropReason::Short));
        assert_eq!(with(|p| p[0] = 0x65), Err(DropReason::WrongVersion));
        assert_eq!(with(|p| p[0] = 0x05), Err(DropReason::WrongVersion));
        assert_eq!(with(|p| p[0] = 0x40), Err(DropReason::BadHeader));
        let too_short = |p: &mut Vec<u8>| {
            // Under a checksum that fits it.
            p[0] = 0x44;
            p[10..12].fill(0);
            let sum = reference::checksum(&p[..16]);
            p[10..12].copy_from_slice(&sum.to_be_bytes());
        };
        assert_eq!(with(too_short), Err(DropReason::BadHeader));
        assert_eq!(with(|p| p[0] = 0x4f), Err(DropReason::Short), "options that are not there");
        assert_eq!(with(|p| p.truncate(34)), Err(DropReason::BadTotalLength), "truncated");
        assert_eq!(with(|p| p.push(0)), Err(DropReason::BadTotalLength), "trailing bytes");
        assert_eq!(with(|p| p[10] ^= 1), Err(DropReason::BadHeader));
        assert_eq!(with(|p| p[15] ^= 1), Err(DropReason::BadHeader));
    }

    #[test]
    fn every_ttl_is_decremented_once_and_none_wraps() {
        for ttl in 0..=u8::MAX {
            let mut bytes = packet(ttl, 4, b"x");
            let before = bytes.clone();
            let outcome = decrement_ttl(&mut bytes);
            if ttl <= 1 {
                assert_eq!((outcome, &bytes), (Err(DropReason::TtlExceeded), &before), "TTL {ttl}");
            } else {
                assert_eq!((outcome, &bytes), (Ok(()), &packet(ttl - 1, 4, b"x")), "TTL {ttl}");
            }
        }
        assert_eq!(decrement_ttl(&mut [0x45; 19]), Err(DropReason::Short));
    }

    #[test]
    fn a_patched_header_is_right_whatever_the_checksum_was() {
        // Every checksum that a header can have.
        let mut bytes = packet(64, 0, b"");
        for id in 0..=u16::MAX {
            bytes[4..6].copy_from_slice(&id.to_be_bytes());
            bytes[8] = 64;
            reference::finish(&mut bytes);
            decrement_ttl(&mut bytes).expect("far to go");
            let patched = bytes.clone();
            reference::finish(&mut bytes);
            assert_eq!(bytes, patched);
        }
    }
}
