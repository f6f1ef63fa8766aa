//! Numbered datagrams at a steady rate: every number that does not arrive is known.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use crate::netns::Netns;
use crate::wait::let_pass;

/// The receiver may be off the processor for seconds: what is measured is the network, not the scheduler.
const RECEIVE_BUFFER: usize = 32 << 20;
/// A sender that was off the processor for longer goes on at its pace, for a burst of all that is overdue would test
/// queues.
const MOST_OVERDUE: Duration = Duration::from_millis(50);
/// How long the last datagrams may still be under way once the sender has stopped.
const DRAIN: Duration = Duration::from_secs(3);

/// A stream of datagrams from one namespace to another, running until it is ended.
#[derive(Debug)]
pub struct Stream {
    name: String,
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Vec<(u64, Instant)>>,
    sent_all: Arc<AtomicBool>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tally {
    pub name: String,
    pub sent: u64,
    /// Numbers that never arrived.
    pub missing: Vec<u64>,
    pub duplicates: u64,
    /// The longest time between two arrivals.
    pub longest_gap: Duration,
    /// When each arrived, in the order of arrival.
    pub arrivals: Vec<Instant>,
}

impl Stream {
    pub fn start(from: &Netns, to: &Netns, address: Ipv4Addr, per_second: u32) -> Result<Self> {
        let receiver = to.enter(|| {
            let socket = UdpSocket::bind(SocketAddrV4::new(address, 0))?;
            setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            Ok(socket)
        })?;
        let target = receiver.local_addr()?;
        let sender = from.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(target)?;
            Ok(socket)
        })?;
        let (stop, sent_all) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let sending = thread::spawn({
            let stop = Arc::clone(&stop);
            move || send(&sender, per_second, &stop)
        });
        let receiving = thread::spawn({
            let sent_all = Arc::clone(&sent_all);
            move || receive(&receiver, &sent_all)
        });
        let name = format!("{} to {}", from.name(), to.name());
        Ok(Self { name, stop, sender: sending, receiver: receiving, sent_all })
    }

    /// No more is sent; [`Stream::end`] counts what was.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Stops sending, lets the last ones arrive, and counts.
    pub fn end(self) -> Result<Tally> {
        self.stop();
        let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"))?;
        self.sent_all.store(true, Ordering::Relaxed);
        let arrived = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))?;
        let sent = sent.with_context(|| format!("datagrams {}", self.name))?;
        let received = arrived.len() as u64;
        let (mut numbers, arrivals): (Vec<u64>, Vec<Instant>) = arrived.into_iter().unzip();
        let gaps = arrivals.windows(2).map(|pair| pair[1].duration_since(pair[0]));
        let longest_gap = gaps.max().unwrap_or_default();
        numbers.sort_unstable();
        numbers.dedup();
        let duplicates = received - numbers.len() as u64;
        let mut arrived = numbers.into_iter().peekable();
        let missing = (0..sent).filter(|n| arrived.next_if_eq(n).is_none()).collect();
        Ok(Tally { name: self.name, sent, missing, duplicates, longest_gap, arrivals })
    }
}

impl Tally {
    /// The time without arrivals in which `moment` lies, and its end.
    pub fn silence(&self, moment: Instant) -> Option<(Duration, Instant)> {
        let pair = self.arrivals.windows(2).find(|pair| pair[0] <= moment && moment < pair[1])?;
        Some((pair[1].duration_since(pair[0]), pair[1]))
    }

    /// At least so many were sent, and every one arrived.
    pub fn is_whole(&self, at_least: u64) -> Result<()> {
        let Self { name, sent, missing, .. } = self;
        ensure!(*sent >= at_least, "{name} sent only {sent}");
        ensure!(missing.is_empty(), "{name}: {} of {sent} missing: {missing:?}", missing.len());
        Ok(())
    }
}

/// Ends streams, each of which must have sent something and lost nothing.
pub fn nothing_missing(streams: impl IntoIterator<Item = Stream>) -> Result<()> {
    for stream in streams {
        stream.end()?.is_whole(1)?;
    }
    Ok(())
}

fn send(socket: &UdpSocket, per_second: u32, stop: &AtomicBool) -> Result<u64> {
    let interval = Duration::from_secs(1) / per_second;
    let (mut number, mut due) = (0_u64, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        // A send that the kernel refuses (no route, for instance) ends the stream with its reason.
        socket.send(&number.to_be_bytes()).with_context(|| format!("datagram {number}"))?;
        number += 1;
        let now = Instant::now();
        due = (due + interval).max(now.checked_sub(MOST_OVERDUE).unwrap_or(now));
        let_pass(due.saturating_duration_since(now));
    }
    Ok(number)
}

fn receive(socket: &UdpSocket, sent_all: &AtomicBool) -> Vec<(u64, Instant)> {
    let mut numbers = Vec::new();
    let mut buffer = [0; 64];
    let mut quiet_since = None;
    loop {
        match socket.recv(&mut buffer) {
            Ok(8) => {
                let mut number = [0; 8];
                number.copy_from_slice(&buffer[..8]);
                numbers.push((u64::from_be_bytes(number), Instant::now()));
                quiet_since = None;
            }
            Ok(_) => {}
            Err(_) if sent_all.load(Ordering::Relaxed) => {
                if quiet_since.get_or_insert_with(Instant::now).elapsed() > DRAIN {
                    return numbers;
                }
            }
            Err(_) => {}
        }
    }
}
