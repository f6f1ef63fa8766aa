//! A borrowed view of one IPv4 packet, checked once, in a fixed order, with one reason each (RFC 791, RFC 1122 3.2.1).
//!
//! A datagram carries exactly one packet: flanneld sends what it read from its device and nothing else, so bytes
//! behind the packet's total length are as wrong as missing ones, and both are [`DropReason::BadTotalLength`].

use std::net::Ipv4Addr;

use super::checksum::{Sum, patched};
use super::counters::DropReason;

/// An IPv4 header without options.
pub const MIN_HEADER: usize = 20;

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
