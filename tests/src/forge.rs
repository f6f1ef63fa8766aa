//! Packets written by hand, right or wrong on purpose: IPv4 (RFC 791) with UDP (RFC 768) inside.

use std::net::Ipv4Addr;

const PROTOCOL_UDP: u8 = 17;

/// A UDP packet. Its bytes are right unless they are changed afterwards.
#[derive(Debug, Clone)]
pub struct Forged {
    pub source: (Ipv4Addr, u16),
    pub destination: (Ipv4Addr, u16),
    pub ttl: u8,
    pub payload: Vec<u8>,
}

impl Forged {
    pub fn new(source: Ipv4Addr, destination: (Ipv4Addr, u16), payload: &[u8]) -> Self {
        Self { source: (source, 4711), destination, ttl: 64, payload: payload.to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let length = 8 + self.payload.len() as u16;
        let mut udp = Vec::new();
        udp.extend(self.source.1.to_be_bytes());
        udp.extend(self.destination.1.to_be_bytes());
        udp.extend(length.to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(&self.payload);
        let mut pseudo = Vec::new();
        pseudo.extend(self.source.0.octets());
        pseudo.extend(self.destination.0.octets());
        pseudo.extend([0, PROTOCOL_UDP]);
        pseudo.extend(length.to_be_bytes());
        pseudo.extend(&udp);
        // A sum of zero is sent as all ones: zero says that there is none.
        let sum = Some(checksum(&pseudo)).filter(|sum| *sum != 0).unwrap_or(0xffff);
        udp[6..8].copy_from_slice(&sum.to_be_bytes());

        let mut packet = vec![0x45, 0];
        packet.extend((20 + length).to_be_bytes());
        packet.extend([0, 0, 0x40, 0, self.ttl, PROTOCOL_UDP, 0, 0]);
        packet.extend(self.source.0.octets());
        packet.extend(self.destination.0.octets());
        mend_header(&mut packet);
        packet.extend(udp);
        packet
    }
}

/// Puts the right header checksum into a packet whose header has been changed.
pub fn mend_header(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// RFC 1071.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_what_is_right_are_zero() {
        // The example of RFC 1071, section 3.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        let packet = Forged::new(Ipv4Addr::new(10, 5, 2, 9), (Ipv4Addr::new(10, 5, 1, 2), 9), b"odd").bytes();
        assert_eq!(packet.len(), 31);
        assert_eq!(checksum(&packet[..20]), 0);
        let mut pseudo = [&packet[12..20], &[0, 17, 0, 11]].concat();
        pseudo.extend(&packet[20..]);
        assert_eq!(checksum(&pseudo), 0);
    }
}
