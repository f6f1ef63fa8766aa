//! The probes of one leg: request, wait, request again. Blocks; a silent target costs count times timeout.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Leg, Probes};

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
/// What ping(8) carries by default.
const PAYLOAD: usize = 56;
const HEADER: usize = 8;

pub(super) fn run(target: IpAddr, source: Option<Ipv4Addr>, probes: Probes) -> Leg {
    let IpAddr::V4(addr) = target else {
        return Leg::failed(target, "this version probes IPv4 only".to_owned());
    };
    let socket = match open(addr, source) {
        Ok(socket) => socket,
        Err(error) => return Leg::failed(target, error.to_string()),
    };
    let mut rtts = Vec::new();
    let mut problem = None;
    // Another ping to the same target on this machine sees our answers, and we see its.
    let id = next_id();
    for sequence in 0..probes.count {
        match echo(&socket, id, sequence as u16, probes.timeout) {
            Ok(Some(rtt)) => rtts.push(rtt.as_secs_f64() * 1000.0),
            Ok(None) => {}
            Err(error) => problem = Some(error.to_string()),
        }
    }
    let received = rtts.len() as u32;
    Leg {
        target,
        sent: probes.count,
        received,
        rtt_min: rtts.iter().copied().reduce(f64::min),
        rtt_avg: (received > 0).then(|| rtts.iter().sum::<f64>() / f64::from(received)),
        rtt_max: rtts.iter().copied().reduce(f64::max),
        problem,
    }
}

fn open(target: Ipv4Addr, source: Option<Ipv4Addr>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    if let Some(source) = source {
        // No bridge yet, no address: the kernel's choice is then all there is.
        match socket.bind(&sockaddr(source)) {
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => {}
            other => other?,
        }
    }
    socket.connect(&sockaddr(target))?;
    Ok(socket)
}

fn sockaddr(ip: Ipv4Addr) -> SockAddr {
    SocketAddr::from((ip, 0)).into()
}

/// One request; `None` when nothing came back in time.
fn echo(mut socket: &Socket, id: u16, sequence: u16, timeout: Duration) -> io::Result<Option<Duration>> {
    let start = Instant::now();
    socket.send(&request(id, sequence))?;
    let mut packet = [0; 1500];
    loop {
        let Some(left) = timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) else {
            return Ok(None);
        };
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match socket.read(&mut packet) {
            Ok(len) if is_reply(&packet[..len], id, sequence) => return Ok(Some(start.elapsed())),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
    }
}

fn request(id: u16, sequence: u16) -> [u8; HEADER + PAYLOAD] {
    let mut message = [0; HEADER + PAYLOAD];
    message[0] = ECHO_REQUEST;
    message[4..6].copy_from_slice(&id.to_be_bytes());
    message[6..8].copy_from_slice(&sequence.to_be_bytes());
    message[HEADER..HEADER + 4].copy_from_slice(b"weft");
    let checksum = checksum(&message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// Whether an IPv4 packet, as a raw socket delivers it, answers our request.
fn is_reply(packet: &[u8], id: u16, sequence: u16) -> bool {
    let header = packet.first().map_or(0, |b| usize::from(b & 0xf) * 4);
    let Some(message) = packet.get(header..).filter(|m| m.len() >= HEADER) else { return false };
    message[0] == ECHO_REPLY
        && message[4..6] == id.to_be_bytes()
        && message[6..8] == sequence.to_be_bytes()
        && checksum(message) == 0
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn next_id() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    (std::process::id() as u16).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_rfc_1071() {
        // Section 3's example sums to ddf2.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[0xff]), !0xff00);
    }

    #[test]
    fn only_our_own_intact_answer_counts() {
        let packet = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut packet = vec![0x45; 20];
            let mut message = request(7, 9);
            message[0] = ECHO_REPLY;
            message[2..4].fill(0);
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            packet.extend(message);
            change(&mut packet);
            packet
        };
        assert!(is_reply(&packet(&|_| {}), 7, 9));
        assert!(!is_reply(&packet(&|_| {}), 8, 9));
        assert!(!is_reply(&packet(&|_| {}), 7, 10));
        let asked = [&[0x45; 20][..], &request(7, 9)].concat();
        assert!(!is_reply(&asked, 7, 9), "our own request, seen on loopback");
        assert!(!is_reply(&packet(&|p| p[50] ^= 1), 7, 9), "checksum");
        assert!(!is_reply(&packet(&|p| p.truncate(27)), 7, 9));
        assert!(!is_reply(&[], 7, 9));
    }

    /// Runs `body` in a network namespace of its own, with loopback up and a device that swallows everything.
    fn in_netns(body: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare needs root");
            // A known neighbour behind a veth that nobody listens on: silence instead of failed address resolution.
            for command in [
                "link set lo up",
                "link add hole type veth peer name far",
                "addr add 10.99.0.1/24 dev hole",
                "link set far up",
                "link set hole up",
                "neigh add 10.99.0.2 lladdr 02:00:00:00:00:02 dev hole nud permanent",
                "neigh add 10.99.0.3 lladdr 02:00:00:00:00:03 dev hole nud permanent",
            ] {
                let status = std::process::Command::new("ip").args(command.split(' ')).status();
                assert!(status.expect("ip is installed").success(), "ip {command}");
            }
            body();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    #[test]
    fn answers_silence_and_unreachable_are_told_apart() {
        in_netns(|| {
            let silence = Probes { count: 2, timeout: Duration::from_millis(100) };
            let probes = Probes { count: 2, timeout: Duration::from_secs(10) };
            let answered = run(ip("127.0.0.1"), None, probes);
            assert_eq!((answered.sent, answered.received, &answered.problem), (2, 2, &None), "{answered:?}");
            assert!(answered.rtt_min <= answered.rtt_avg && answered.rtt_avg <= answered.rtt_max);
            assert!(answered.rtt_min.is_some_and(|ms| ms > 0.0 && ms < 10_000.0), "{answered:?}");

            let silent = run(ip("10.99.0.2"), None, silence);
            assert_eq!((silent.sent, silent.received, &silent.problem, silent.rtt_avg), (2, 0, &None, None));

            let unreachable = run(ip("203.0.113.1"), None, probes);
            assert_eq!(unreachable.received, 0);
            assert!(unreachable.problem.is_some_and(|p| p.contains("unreachable")));

            // A source that is there is used; one that is not is left to the kernel.
            let own = run(ip("127.0.0.1"), Some(Ipv4Addr::new(10, 99, 0, 1)), probes);
            assert_eq!(own.received, 2, "{own:?}");
            let foreign = run(ip("127.0.0.1"), Some(Ipv4Addr::new(10, 99, 0, 9)), probes);
            assert_eq!(foreign.received, 2, "{foreign:?}");
        });
    }

    #[test]
    fn both_legs_of_every_peer_are_reported_in_order() {
        in_netns(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            let mut status = crate::status::sample::ready();
            status.peers[0].public_ip = ip("127.0.0.2");
            status.peers[0].overlay_probe = ip("10.99.0.2");
            status.peers[1].public_ip = ip("10.99.0.3");
            status.peers[1].overlay_probe = ip("127.0.0.3");
            let probes = Probes { count: 1, timeout: Duration::from_secs(1) };
            let reports = runtime.block_on(super::super::ping(&status, "all", probes)).expect("peers");
            let legs = reports.iter().flat_map(|r| [&r.underlay, &r.overlay]);
            let seen: Vec<_> = legs.map(|leg| (leg.target.to_string(), leg.answers())).collect();
            let expected =
                [("127.0.0.2", true), ("10.99.0.2", false), ("10.99.0.3", false), ("127.0.0.3", true)];
            assert_eq!(seen, expected.map(|(target, answers)| (target.to_owned(), answers)));
            assert!(reports[0].verdict.contains("UDP port 8472 (VXLAN, VNI 1)"), "{}", reports[0].verdict);
            assert_eq!(reports[1].peer, status.peers[1].key);
        });
    }
}
