//! Reads captured frames: Ethernet II, IPv4 (RFC 791), UDP (RFC 768), VXLAN (RFC 7348 section 5).
//!
//! Written apart from the agent's code on purpose: the tests' reader must not share its mistakes.

use std::net::Ipv4Addr;

use weft_shared::Mac;

const ETHERTYPE_IPV4: u16 = 0x0800;
const PROTOCOL_UDP: u8 = 17;
const VXLAN_HEADER: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ethernet<'a> {
    pub destination: Mac,
    pub source: Mac,
    pub ethertype: u16,
    pub payload: &'a [u8],
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipv4<'a> {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: u8,
    pub ttl: u8,
    pub payload: &'a [u8],
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Udp<'a> {
    pub source: u16,
    pub destination: u16,
    pub payload: &'a [u8],
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan<'a> {
    pub vni: u32,
    pub inner: Ethernet<'a>,
}

impl<'a> Ethernet<'a> {
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let (header, payload) = frame.split_at_checked(14)?;
        Some(Self {
            destination: mac(&header[0..6])?,
            source: mac(&header[6..12])?,
            ethertype: u16_at(header, 12)?,
            payload,
        })
    }

    pub fn ipv4(&self) -> Option<Ipv4<'a>> {
        if self.ethertype != ETHERTYPE_IPV4 {
            return None;
        }
        Ipv4::parse(self.payload)
    }
}

impl<'a> Ipv4<'a> {
    /// What stands behind the packet's end, such as the padding of a short frame, is left out.
    pub fn parse(packet: &'a [u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0x0f) * 4;
        let total = usize::from(u16_at(packet, 2)?);
        Some(Self {
            source: address(packet, 12)?,
            destination: address(packet, 16)?,
            protocol: *packet.get(9)?,
            ttl: *packet.get(8)?,
            payload: packet.get(header..total)?,
        })
    }

    /// The packet that fills `bytes` to the last one (flannel's udp backend).
    pub fn alone(bytes: &'a [u8]) -> Option<Self> {
        let version = bytes.first()? >> 4;
        let total = usize::from(u16_at(bytes, 2)?);
        Self::parse(bytes).filter(|_| version == 4 && total == bytes.len())
    }

    pub fn udp(&self) -> Option<Udp<'a>> {
        if self.protocol != PROTOCOL_UDP {
            return None;
        }
        Some(Udp {
            source: u16_at(self.payload, 0)?,
            destination: u16_at(self.payload, 2)?,
            payload: self.payload.get(8..)?,
        })
    }
}

impl<'a> Udp<'a> {
    pub fn vxlan(&self) -> Option<Vxlan<'a>> {
        let (header, inner) = self.payload.split_at_checked(VXLAN_HEADER)?;
        // The I flag says that the VNI is valid; all else in the first word is reserved.
        if header[0] & 0x08 == 0 {
            return None;
        }
        let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
        Some(Vxlan { vni, inner: Ethernet::parse(inner)? })
    }
}

fn mac(bytes: &[u8]) -> Option<Mac> {
    Some(Mac(bytes.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ICMP echo request in VXLAN, VNI 7, written by hand from the RFCs.
    fn frame() -> Vec<u8> {
        let ipv4 = |protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]| {
            let total = (20 + payload.len()) as u16;
            let mut packet = vec![0x45, 0];
            packet.extend(total.to_be_bytes());
            packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend(from);
            packet.extend(to);
            packet.extend(payload);
            packet
        };
        let ethernet = |to: u8, from: u8, payload: &[u8]| {
            let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0];
            frame.extend(payload);
            frame
        };
        let inner = ethernet(0x22, 0x11, &ipv4(1, [10, 0, 1, 2], [10, 0, 2, 3], &[8, 0, 0, 0]));
        let mut udp = vec![0xc0, 0, 0x21, 0x18];
        udp.extend(((16 + inner.len()) as u16).to_be_bytes());
        udp.extend([0, 0, 0x08, 0, 0, 0, 0, 0, 7, 0]);
        udp.extend(inner);
        ethernet(0xb, 0xa, &ipv4(17, [192, 168, 77, 11], [192, 168, 77, 12], &udp))
    }

    #[test]
    fn a_tunnelled_packet_is_read_to_the_bottom() {
        let bytes = frame();
        let outer = Ethernet::parse(&bytes).expect("ethernet").ipv4().expect("ipv4");
        assert_eq!(outer.source, Ipv4Addr::new(192, 168, 77, 11));
        let udp = outer.udp().expect("udp");
        assert_eq!(udp.destination, 8472);
        let vxlan = udp.vxlan().expect("vxlan");
        assert_eq!((vxlan.vni, vxlan.inner.destination), (7, Mac([2, 0, 0, 0, 0, 0x22])));
        let inner = vxlan.inner.ipv4().expect("inner");
        assert_eq!(inner.destination, Ipv4Addr::new(10, 0, 2, 3));
        assert_eq!((inner.protocol, inner.payload), (1, &[8, 0, 0, 0][..]));
    }

    #[test]
    fn a_cut_frame_is_no_packet() {
        let bytes = frame();
        for len in 0..bytes.len() {
            let inner = Ethernet::parse(&bytes[..len])
                .and_then(|e| e.ipv4()?.udp()?.vxlan()?.inner.ipv4().map(|ip| ip.payload.len()));
            assert_eq!(inner, None, "cut at {len}");
        }
    }
}
