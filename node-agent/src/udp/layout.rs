//! Where the headers of a TCP or UDP packet end: what segmentation and coalescing both have to know first.
//!
//! IPv4 and IPv6 alike: so that an IPv6 overlay will need no other segmentation. Today flannel's wire has IPv4 alone, and
//! both directions turn IPv6 away before it comes here ([`super::packet::Ipv4::parse`]). Whatever is no whole, unfragmented TCP or UDP packet directly
//! behind its network header has no layout, and neither of the two touches it.

use super::checksum::Sum;

/// Of IPv4 with options, or IPv6, and TCP with options.
pub const MAX_HEADERS: usize = 60 + 60;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const TCP_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V4,
    V6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub version: Version,
    pub transport: Transport,
    /// Length of the network header.
    pub network: usize,
    /// Length of all headers: where the payload begins.
    pub headers: usize,
}

impl Layout {
    /// Lengths in the network header must be those of `packet`; nothing that depends on the payload is looked at, nor
    /// UDP's own length.
    #[inline]
    pub fn of(packet: &[u8]) -> Option<Self> {
        let (version, network, protocol) = match packet.first()? >> 4 {
            4 => {
                let header = packet.first_chunk::<20>()?;
                let network = usize::from(header[0] & 0xf) * 4;
                let whole = usize::from(u16::from_be_bytes([header[2], header[3]])) == packet.len();
                // Neither more fragments nor an offset.
                let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
                if network < 20 || !whole || fragment {
                    return None;
                }
                (Version::V4, network, header[9])
            }
            6 => {
                let header = packet.first_chunk::<IPV6_HEADER>()?;
                if usize::from(u16::from_be_bytes([header[4], header[5]])) + IPV6_HEADER != packet.len() {
                    return None;
                }
                (Version::V6, IPV6_HEADER, header[6])
            }
            _ => return None,
        };
        let (transport, header) = match protocol {
            TCP => {
                let header = usize::from(packet.get(network + 12)? >> 4) * 4;
                if header < TCP_HEADER {
                    return None;
                }
                (Transport::Tcp, header)
            }
            UDP => (Transport::Udp, UDP_HEADER),
            _ => return None,
        };
        let headers = network + header;
        (packet.len() >= headers).then_some(Self { version, transport, network, headers })
    }

    /// Source and destination, one behind the other.
    #[inline]
    pub fn addresses<'a>(&self, headers: &'a [u8]) -> &'a [u8] {
        match self.version {
            Version::V4 => &headers[12..20],
            Version::V6 => &headers[8..40],
        }
    }

    /// The sum over the pseudo-header of a packet with these headers and `payload` bytes behind them.
    #[inline]
    pub fn pseudo(&self, headers: &[u8], payload: usize) -> Sum {
        Sum::pseudo(self.addresses(headers), self.protocol(), self.headers - self.network + payload)
    }

    #[inline]
    pub fn protocol(&self) -> u8 {
        match self.transport {
            Transport::Tcp => TCP,
            Transport::Udp => UDP,
        }
    }

    /// Where the transport's checksum field is, from the transport header on.
    #[inline]
    pub fn checksum_offset(&self) -> usize {
        match self.transport {
            Transport::Tcp => 16,
            Transport::Udp => 6,
        }
    }

    /// Writes the lengths into the network header, and UDP's, for `payload` bytes behind the headers. The header
    /// checksum is the caller's.
    #[inline]
    pub fn set_lengths(&self, headers: &mut [u8], payload: usize) {
        let all = self.headers + payload;
        match self.version {
            Version::V4 => put(headers, 2, all as u16),
            Version::V6 => put(headers, 4, (all - IPV6_HEADER) as u16),
        }
        if self.transport == Transport::Udp {
            put(headers, self.network + 4, (UDP_HEADER + payload) as u16);
        }
    }
}

/// The big-endian field at `at`.
#[inline]
pub fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
pub fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
