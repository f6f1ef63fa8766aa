//! The alternative that the udp backend is measured against: flannel's way of forwarding (flannel
//! pkg/backend/udp/proxy_amd64.c) - one thread, one packet per system call, a linear list of peers. It lives here alone.
//!
//! As there: TTL is lowered on both sides, the header checksum is patched (RFC 1624), and a peer that was found moves to
//! the front of the list. What it does not do, answering unroutable packets by ICMP, no load here asks for.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use ipnetwork::Ipv4Network;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::sys;

const HEADER: usize = 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Naive {
    pub device: String,
    pub listen: SocketAddrV4,
    pub mtu: usize,
    /// Subnet and where its datagrams go.
    pub peers: Vec<(Ipv4Network, SocketAddrV4)>,
}

impl Naive {
    /// Makes device and socket in this thread's namespace, says so, and forwards until the process ends.
    pub fn run(mut self, ready: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut tun = sys::tun(&self.device).with_context(|| format!("TUN device {}", self.device))?;
        let socket = UdpSocket::bind(self.listen).with_context(|| format!("UDP {}", self.listen))?;
        socket.set_nonblocking(true)?;
        ready()?;
        let mut buffer = vec![0; self.mtu];
        loop {
            let mut waits = [tun.as_fd(), socket.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            // Polling is left out for as long as either side has something.
            loop {
                let sent = self.send_one(&mut tun, &socket, &mut buffer)?;
                let received = receive_one(&socket, &mut tun, &mut buffer)?;
                if !sent && !received {
                    break;
                }
            }
        }
    }

    /// Whether the device had a packet.
    fn send_one(&mut self, tun: &mut File, socket: &UdpSocket, buffer: &mut [u8]) -> Result<bool> {
        let length = match tun.read(buffer) {
            Ok(length) => length,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e).context("read from the device"),
        };
        let packet = &mut buffer[..length];
        let Some(to) = destination(packet).and_then(|to| self.peer_of(to)) else { return Ok(true) };
        if lower_ttl(packet) {
            // A datagram that the socket does not take is lost, as on any wire.
            let _ = socket.send_to(packet, to);
        }
        Ok(true)
    }

    fn peer_of(&mut self, destination: Ipv4Addr) -> Option<SocketAddrV4> {
        let at = self.peers.iter().position(|(subnet, _)| subnet.contains(destination))?;
        self.peers.swap(0, at);
        self.peers.first().map(|(_, to)| *to)
    }
}

/// Whether the socket had a datagram.
fn receive_one(socket: &UdpSocket, tun: &mut File, buffer: &mut [u8]) -> Result<bool> {
    let length = match socket.recv(buffer) {
        Ok(length) => length,
        Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
        // An ICMP error for an earlier datagram: the peer is not up yet.
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => return Ok(true),
        Err(e) => return Err(e).context("receive from the socket"),
    };
    let packet = &mut buffer[..length];
    if destination(packet).is_some() && lower_ttl(packet) {
        while tun.write(packet).is_err_and(|e| e.kind() == ErrorKind::WouldBlock) {}
    }
    Ok(true)
}

/// None when it is no IPv4 packet: the kernel also sends IPv6 router solicitations.
fn destination(packet: &[u8]) -> Option<Ipv4Addr> {
    if packet.len() < HEADER || packet[0] >> 4 != 4 {
        return None;
    }
    Some(<[u8; 4]>::try_from(&packet[16..HEADER]).ok()?.into())
}

/// One hop less, with the checksum patched to match. False when the packet has come to its end.
fn lower_ttl(header: &mut [u8]) -> bool {
    if header[8] <= 1 {
        return false;
    }
    header[8] -= 1;
    // TTL is the high byte of its word: the sum over the header falls by 0x0100, so its complement rises by that.
    let sum = u32::from(u16::from_be_bytes([header[10], header[11]])) + 0x0100;
    let folded = (sum & 0xffff) + (sum >> 16);
    // Both are zero in one's complement; a sender would have written this one.
    let checksum = if folded == 0xffff { 0 } else { folded as u16 };
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071, over a header whose checksum field is zeroed first.
    fn checksum_of(header: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for (at, word) in header.chunks(2).enumerate() {
            sum += if at == 5 { 0 } else { u32::from(u16::from_be_bytes([word[0], word[1]])) };
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn header(id: u16, ttl: u8) -> Vec<u8> {
        let mut header = vec![0x45, 0, 0, 84];
        header.extend(id.to_be_bytes());
        header.extend([0x40, 0, ttl, 17, 0, 0, 10, 5, 1, 2, 10, 5, 2, 3]);
        let sum = checksum_of(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    #[test]
    fn the_patched_checksum_is_the_one_computed_anew() {
        for id in 0..=u16::MAX {
            let mut packet = header(id, 64);
            assert!(lower_ttl(&mut packet));
            assert_eq!(packet[8], 63);
            assert_eq!(u16::from_be_bytes([packet[10], packet[11]]), checksum_of(&packet), "id {id}");
        }
    }

    #[test]
    fn a_packet_ends_at_its_last_hop() {
        for ttl in [0, 1] {
            let mut packet = header(7, ttl);
            assert!(!lower_ttl(&mut packet));
            assert_eq!(packet, header(7, ttl), "left as it was");
        }
    }

    #[test]
    fn the_first_subnet_that_holds_the_destination_wins_and_moves_to_the_front() -> Result<()> {
        let peer = |subnet: &str, port| -> Result<_> {
            Ok((subnet.parse()?, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)))
        };
        let mut naive = Naive {
            device: "flannel0".into(),
            listen: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8285),
            mtu: 1472,
            peers: vec![peer("10.5.1.0/24", 1)?, peer("10.5.2.0/24", 2)?, peer("10.5.3.0/24", 3)?],
        };
        let port = |to: Option<SocketAddrV4>| to.map(|to| to.port());
        assert_eq!(port(naive.peer_of(destination(&header(1, 9)).context("IPv4")?)), Some(2));
        assert_eq!(naive.peers.iter().map(|(_, to)| to.port()).collect::<Vec<_>>(), [2, 1, 3]);
        assert_eq!(port(naive.peer_of("10.6.0.1".parse()?)), None);
        assert_eq!(destination(&header(1, 9)[..19]), None);
        assert_eq!(destination(&[0x60; 40]), None);
        Ok(())
    }
}
