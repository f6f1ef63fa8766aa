//! The header in front of every packet of a device with `IFF_VNET_HDR`: what is still to be done to it (linux
//! include/uapi/linux/virtio_net.h, include/linux/virtio_net.h, drivers/net/tun_vnet.h).
//!
//! The ten-byte form (`TUNSETVNETHDRSZ` 10), in the machine's byte order, which is what the kernel uses unless told.

/// On the device, in bytes: as a queue sets it.
pub const LEN: usize = crate::tun::VNET_HDR_LEN;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Set beside a TCP type when the packet has CWR, which segmentation leaves on the first segment alone in any case.
const GSO_ECN: u8 = 0x80;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VirtioHeader {
    pub checksum: Option<PartialChecksum>,
    pub gso: Option<Gso>,
    /// A hint: how much of the packet lies in one piece. Its writer's headers are at most that long.
    pub hdr_len: u16,
}

/// The checksum field holds the pseudo-header's sum; the rest, from `start` on, is to be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialChecksum {
    pub start: u16,
    /// From `start`.
    pub offset: u16,
}

/// One packet that stands for several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    pub kind: GsoKind,
    /// Bytes of payload of each but the last.
    pub size: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoKind {
    TcpV4,
    TcpV6,
    /// Of either version.
    Udp,
}

impl VirtioHeader {
    /// The header in front of `read` and the packet behind it; `None` when the read is too short or of a kind that
    /// was not asked for.
    #[inline]
    pub fn split(read: &mut [u8]) -> Option<(Self, &mut [u8])> {
        let (header, packet) = read.split_first_chunk_mut::<LEN>()?;
        Some((Self::decode(header)?, packet))
    }

    #[inline]
    pub fn decode(b: &[u8; LEN]) -> Option<Self> {
        let field = |at: usize| u16::from_ne_bytes([b[at], b[at + 1]]);
        let kind = match b[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(GsoKind::TcpV4),
            GSO_TCPV6 => Some(GsoKind::TcpV6),
            GSO_UDP_L4 => Some(GsoKind::Udp),
            _ => return None,
        };
        Some(Self {
            checksum: (b[0] & NEEDS_CSUM != 0).then(|| PartialChecksum { start: field(6), offset: field(8) }),
            gso: kind.map(|kind| Gso { kind, size: field(4) }),
            hdr_len: field(2),
        })
    }

    #[inline]
    pub fn encode(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        if let Some(PartialChecksum { start, offset }) = self.checksum {
            b[0] = NEEDS_CSUM;
            b[6..8].copy_from_slice(&start.to_ne_bytes());
            b[8..10].copy_from_slice(&offset.to_ne_bytes());
        }
        if let Some(Gso { kind, size }) = self.gso {
            b[1] = match kind {
                GsoKind::TcpV4 => GSO_TCPV4,
                GsoKind::TcpV6 => GSO_TCPV6,
                GsoKind::Udp => GSO_UDP_L4,
            };
            b[4..6].copy_from_slice(&size.to_ne_bytes());
        }
        b[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_as_linux_lays_it_out() {
        let header = VirtioHeader {
            checksum: Some(PartialChecksum { start: 20, offset: 16 }),
            gso: Some(Gso { kind: GsoKind::TcpV4, size: 1448 }),
            hdr_len: 52,
        };
        let mut bytes = vec![1, 1];
        for field in [52u16, 1448, 20, 16] {
            bytes.extend(field.to_ne_bytes());
        }
        assert_eq!(header.encode()[..], bytes);
        bytes.extend([7, 7, 7]);
        assert_eq!(VirtioHeader::split(&mut bytes), Some((header, &mut [7, 7, 7][..])));
        assert_eq!(VirtioHeader::default().encode(), [0; LEN]);
    }

    #[test]
    fn kinds_that_were_not_asked_for_are_refused() {
        let decode = |kind| VirtioHeader::decode(&[0, kind, 0, 0, 0, 0, 0, 0, 0, 0]);
        // The third is the old UFO, which fragments; 0x81 is TCP with CWR.
        assert_eq!(decode(3), None);
        assert_eq!(decode(2), None);
        assert_eq!(decode(0x81).and_then(|h| h.gso).map(|g| g.kind), Some(GsoKind::TcpV4));
        assert_eq!(decode(0), Some(VirtioHeader::default()));
        assert_eq!(VirtioHeader::split(&mut [0; 9]), None);
        // DATA_VALID, which asks for nothing.
        assert_eq!(VirtioHeader::decode(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Some(VirtioHeader::default()));
    }
}
