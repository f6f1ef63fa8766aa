//! An underlay that loses, reorders, doubles and breaks datagrams: a machine between the nodes of the udp backend.
//!
//! Each node publishes an address of this machine as its own (`--public-ip`). What arrives at the address of one goes
//! on to that node, from the address of the other: so both see the peer that they know.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use crate::bed::Bed;
use crate::random::Random;
use crate::underlay::Underlay;

const PORT: u16 = 8285;
const RECEIVE_BUFFER: usize = 8 << 20;
/// Datagrams that are held back go on behind this many later ones, or when nothing comes any more.
const HELD_BACK_FOR: usize = 3;

/// One out of so many each; 0 for never.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    pub lose: u64,
    pub reorder: u64,
    pub double: u64,
    /// A byte of the payload is changed, behind the inner headers.
    pub corrupt: u64,
}

#[derive(Debug)]
pub struct Tangle {
    stop: Arc<AtomicBool>,
    hands: Vec<JoinHandle<()>>,
    pub counts: Arc<Counts>,
}

#[derive(Debug, Default)]
pub struct Counts {
    pub lost: AtomicU64,
    pub reordered: AtomicU64,
    pub doubled: AtomicU64,
    pub corrupted: AtomicU64,
}

impl Tangle {
    /// What the first and the second node publish.
    pub const PUBLISHED: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 168, 77, 201), Ipv4Addr::new(192, 168, 77, 202)];

    /// Between these two nodes, from now on.
    pub fn start(bed: &Bed, underlay: &Underlay, nodes: [Ipv4Addr; 2], faults: Faults) -> Result<Self> {
        let netns = underlay.attach_host(bed, "tangle", Self::PUBLISHED[0])?;
        netns.ip(&format!("address add {}/24 dev eth0", Self::PUBLISHED[1]))?;
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        let mut sockets = Vec::new();
        for address in Self::PUBLISHED {
            sockets.push(netns.enter(|| {
                let socket = UdpSocket::bind(SocketAddrV4::new(address, PORT))?;
                setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
                socket.set_read_timeout(Some(Duration::from_millis(20)))?;
                Ok(socket)
            })?);
        }
        let mut hands = Vec::new();
        for to in 0..2 {
            let (from, out) = (sockets[to].try_clone()?, sockets[1 - to].try_clone()?);
            let target = SocketAddrV4::new(nodes[to], PORT);
            let (stop, counts) = (Arc::clone(&stop), Arc::clone(&counts));
            let random = Random::seeded(to as u64);
            hands.push(thread::spawn(move || pass_on(&from, &out, target, faults, random, &counts, &stop)));
        }
        Ok(Self { stop, hands, counts })
    }
}

impl Drop for Tangle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for hand in self.hands.drain(..) {
            let _ = hand.join();
        }
    }
}

fn pass_on(
    from: &UdpSocket,
    out: &UdpSocket,
    target: SocketAddrV4,
    faults: Faults,
    mut random: Random,
    counts: &Counts,
    stop: &AtomicBool,
) {
    let mut strikes = |one_in: u64, count: &AtomicU64| {
        let strikes = one_in > 0 && random.below(one_in) == 0;
        count.fetch_add(u64::from(strikes), Ordering::Relaxed);
        strikes
    };
    let mut buffer = vec![0; 65_536];
    let mut held: Option<(usize, Vec<u8>)> = None;
    // What cannot be sent is lost, as on any underlay.
    let send = |bytes: &[u8]| drop(out.send_to(bytes, target));
    while !stop.load(Ordering::Relaxed) {
        let Ok(length) = from.recv(&mut buffer) else {
            if let Some((_, bytes)) = held.take() {
                send(&bytes);
            }
            continue;
        };
        let bytes = &mut buffer[..length];
        if strikes(faults.lose, &counts.lost) {
            continue;
        }
        // Behind the headers of TCP with timestamps.
        if length > 100 && strikes(faults.corrupt, &counts.corrupted) {
            bytes[80] ^= 0x40;
        }
        if held.is_none() && strikes(faults.reorder, &counts.reordered) {
            held = Some((HELD_BACK_FOR, bytes.to_vec()));
            continue;
        }
        send(bytes);
        if strikes(faults.double, &counts.doubled) {
            send(bytes);
        }
        held = match held.take() {
            Some((0 | 1, late)) => {
                send(&late);
                None
            }
            Some((left, late)) => Some((left - 1, late)),
            None => None,
        };
    }
}
