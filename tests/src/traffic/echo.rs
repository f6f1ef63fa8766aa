//! ICMP echo by raw socket (RFC 792), so that the lab's table needs no program for it.

use std::io::{self, Read as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// Round-trip time of the first of `tries` requests that is answered, sent every `timeout`. An answer that comes later
/// than the next request is one all the same.
pub fn ping(from: &Netns, to: Ipv4Addr, tries: u16, timeout: Duration) -> Result<Duration> {
    let socket = from.enter(|| {
        Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).context("raw socket: root is needed")
    })?;
    socket.connect(&SocketAddrV4::new(to, 0).into()).with_context(|| format!("no route to {to}"))?;
    let id = next_id();
    let mut sent = Vec::new();
    for sequence in 0..tries {
        sent.push(Instant::now());
        let outcome = socket.send(&request(id, sequence));
        let answered = match outcome {
            Ok(_) => wait_reply(&socket, id, sequence, Instant::now() + timeout)?,
            // ICMP errors for an earlier request arrive here; the next one may do better.
            Err(e) if is_icmp_error(&e) => None,
            Err(e) => return Err(e).with_context(|| format!("echo request to {to}")),
        };
        if let Some(sent) = answered.and_then(|answered| sent.get(usize::from(answered))) {
            return Ok(sent.elapsed());
        }
    }
    bail!("{to} does not answer {tries} echo requests from {}", from.name())
}

/// The number of the first request up to `newest` that is answered until the deadline.
fn wait_reply(mut socket: &Socket, id: u16, newest: u16, deadline: Instant) -> Result<Option<u16>> {
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut buffer) {
            Ok(len) => {
                let number = reply_to(&buffer[..len], id).filter(|number| *number <= newest);
                if number.is_some() {
                    return Ok(number);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) if is_icmp_error(&e) || e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn is_icmp_error(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable)
}

fn request(id: u16, sequence: u16) -> Vec<u8> {
    let mut message = vec![ECHO_REQUEST, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend(*b"weft lab echo request of some 48 bytes of data..");
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// The number of the request of that identifier that this is a reply to. Raw IPv4 sockets deliver the IP header too.
fn reply_to(packet: &[u8], id: u16) -> Option<u16> {
    let header = packet.first().map_or(0, |b| usize::from(b & 0x0f) * 4);
    let icmp = packet.get(header..header + 8)?;
    let ours = icmp[0] == ECHO_REPLY && icmp[4..6] == id.to_be_bytes();
    ours.then(|| u16::from_be_bytes([icmp[6], icmp[7]]))
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Parallel pings of one process must not take each other's replies.
fn next_id() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    (std::process::id() as u16).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_sums_to_zero_and_only_its_reply_matches() {
        let message = request(7, 9);
        assert_eq!(checksum(&message), 0);
        let mut reply = vec![0x45; 20];
        reply.extend(&message);
        assert_eq!(reply_to(&reply, 7), None, "the request itself");
        reply[20] = ECHO_REPLY;
        assert_eq!(reply_to(&reply, 7), Some(9));
        assert_eq!((reply_to(&reply, 8), reply_to(&reply[..24], 7)), (None, None));
    }
}
