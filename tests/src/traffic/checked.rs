//! Datagrams whose every byte is known from their number: single ones of all sizes, trains that the kernel cuts
//! (`UDP_SEGMENT`), and some that are fragmented.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBufForce, UdpGsoSegment};

use crate::netns::Netns;
use crate::random::Random;

/// Number and length.
const HEADER: usize = 12;
/// What a pod's MTU leaves on an underlay of 1500: 28 for the tunnel, 28 for the packet's own headers.
const LARGEST: u64 = 1500 - 28 - 28;
/// Not more than so many are under way: what is tested is content, and a flood loses some in any queue.
const WINDOW: u64 = 256;
/// What has not arrived then is lost; until then somebody on the way may just be off the processor.
const PATIENCE: Duration = Duration::from_secs(4);
/// A prime, so that neighbours of every kind differ.
const PLACES: u64 = 4_099;
const RECEIVE_BUFFER: usize = 32 << 20;
/// `UDP_MAX_SEGMENTS` of linux/udp.h before Linux 6.9.
const MAX_TRAIN: u64 = 64;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    pub sent: u64,
    pub missing: u64,
    pub corrupt: u64,
    pub duplicates: u64,
}

impl Checked {
    pub fn is_whole(&self) -> Result<()> {
        let Self { sent, missing, corrupt, duplicates } = self;
        ensure!(
            (*missing, *corrupt, *duplicates) == (0, 0, 0),
            "of {sent} datagrams {missing} are missing, {corrupt} corrupt, {duplicates} came twice"
        );
        Ok(())
    }
}

/// Sends at least `count` datagrams and compares what arrives.
pub fn checked(from: &Netns, to: &Netns, address: Ipv4Addr, count: u64) -> Result<Checked> {
    let receiver = to.enter(|| {
        let socket = UdpSocket::bind(SocketAddrV4::new(address, 0))?;
        setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        Ok(socket)
    })?;
    let target = receiver.local_addr()?;
    let sender = from.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(target)?;
        Ok(socket)
    })?;
    let (arrived, all_sent) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(u64::MAX)));
    let receiving = thread::spawn({
        let (arrived, all_sent) = (Arc::clone(&arrived), Arc::clone(&all_sent));
        move || receive(&receiver, &arrived, &all_sent)
    });
    let sent = send(&sender, count, &arrived);
    all_sent.store(*sent.as_ref().unwrap_or(&0), Ordering::Relaxed);
    let (seen, corrupt) = receiving.join().map_err(|_| anyhow!("the receiver panicked"))??;
    let sent = sent?;
    let known = seen.iter().take(sent as usize);
    let missing = sent - known.clone().filter(|times| **times > 0).count() as u64;
    let duplicates = known.map(|times| u64::from(times.saturating_sub(1))).sum();
    Ok(Checked { sent, missing, corrupt, duplicates })
}

/// Number, length, and bytes out of `noise` from a place that is the number's own.
fn content(noise: &[u8], number: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(number.to_be_bytes());
    bytes.extend((length as u32).to_be_bytes());
    let place = (number % PLACES) as usize;
    bytes.extend_from_slice(&noise[place..place + length - HEADER]);
    bytes
}

fn noise() -> Vec<u8> {
    let mut noise = vec![0; 65_536 + PLACES as usize];
    Random::seeded(PLACES).fill(&mut noise);
    noise
}

fn send(socket: &UdpSocket, count: u64, arrived: &AtomicU64) -> Result<u64> {
    let mut random = Random::seeded(count);
    let noise = noise();
    let (mut number, mut written_off) = (0, 0);
    while number < count {
        let mut still = (0, Instant::now());
        loop {
            let here = arrived.load(Ordering::Relaxed);
            if number < here + written_off + WINDOW {
                break;
            }
            if here != still.0 {
                still = (here, Instant::now());
            } else if still.1.elapsed() > PATIENCE {
                written_off = number - here;
            }
            thread::yield_now();
        }
        let (train, size) = match random.below(64) {
            0..6 => (1, 2_000 + random.below(7_000)),
            6..24 => (1, HEADER as u64 + random.below(LARGEST - HEADER as u64 + 1)),
            _ => (2 + random.below(MAX_TRAIN - 1), 40 + random.below(LARGEST - 39)),
        };
        let train = train.min(65_000 / size);
        let mut bytes = Vec::new();
        for place in 0..train {
            // The last of a train may be shorter.
            let last = place + 1 == train && train > 1;
            let size = if last { HEADER as u64 + random.below(size - HEADER as u64 + 1) } else { size };
            bytes.extend(content(&noise, number + place, size as usize));
        }
        let segment = if train > 1 { size as i32 } else { 0 };
        setsockopt(socket, UdpGsoSegment, &segment).context("UDP_SEGMENT")?;
        socket.send(&bytes).with_context(|| format!("datagram {number}"))?;
        number += train;
    }
    Ok(number)
}

/// How often each number came, and how many were not what they should be.
fn receive(socket: &UdpSocket, arrived: &AtomicU64, all_sent: &AtomicU64) -> Result<(Vec<u8>, u64)> {
    let mut seen: Vec<u8> = Vec::new();
    let mut corrupt = 0;
    let noise = noise();
    let mut buffer = vec![0; 65_536];
    let mut quiet_since: Option<Instant> = None;
    loop {
        let Ok(length) = socket.recv(&mut buffer) else {
            let quiet = quiet_since.get_or_insert_with(Instant::now).elapsed();
            let sent = all_sent.load(Ordering::Relaxed);
            if arrived.load(Ordering::Relaxed) >= sent || sent < u64::MAX && quiet > PATIENCE {
                return Ok((seen, corrupt));
            }
            continue;
        };
        quiet_since = None;
        arrived.fetch_add(1, Ordering::Relaxed);
        let bytes = &buffer[..length];
        let number = bytes.first_chunk().map(|number| u64::from_be_bytes(*number));
        match number.filter(|number| length >= HEADER && *number < 1 << 24) {
            Some(number) if content(&noise, number, length) == bytes => {
                let place = number as usize;
                if seen.len() <= place {
                    seen.resize(place + 1, 0);
                }
                seen[place] = seen[place].saturating_add(1);
            }
            _ => corrupt += 1,
        }
    }
}
