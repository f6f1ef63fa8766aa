//! UDP as fast as it goes, more than arrives: what is told is what was delivered, and what was lost on the way.
//!
//! Every datagram carries its flow and its number, so the receiver knows the loss without asking the sender.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use serde::{Deserialize, Serialize};

use super::super::cpu::Meter;
use super::super::program::{LONGEST, Said, say};
use super::super::result::{Figure, Sample, rates};
use super::super::sys::Batch;
use super::Timing;

const RECEIVE_BUFFER: usize = 8 << 20;
/// Traffic that stops for so long has failed.
const SILENCE: Duration = Duration::from_secs(2);
const SMALL: usize = 64;
const BURST: usize = 32;
/// Bytes of payload. Half of the flows keep one of these, the others take the next with each datagram.
pub const SIZES: [usize; 8] = [64, 128, 256, 400, 576, 800, 1100, 1400];
pub const FLOWS: usize = 64;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sink {
    pub bind: Ipv4Addr,
    pub timing: Timing,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Source {
    pub to: SocketAddrV4,
    pub pattern: Pattern,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pattern {
    /// One flow of 64 bytes, 32 in one system call.
    Small,
    /// 64 flows in turns, one datagram each.
    Mixed,
}

impl Sink {
    pub fn run(&self, cores: &[usize]) -> Result<()> {
        let socket = UdpSocket::bind(SocketAddrV4::new(self.bind, 0))?;
        setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
        say(&Said::Listening(SocketAddrV4::new(self.bind, socket.local_addr()?.port())))?;
        let mut batch = Batch::new(64, 2048);
        // The source starts when it starts; after that silence is an error.
        batch.receive(socket.as_fd())?;
        socket.set_read_timeout(Some(SILENCE))?;
        let start = Instant::now();
        while start.elapsed() < self.timing.warm_up {
            receive(&socket, &mut batch)?;
        }
        let meter = Meter::start(cores)?;
        let mut tally = Tally::default();
        while meter.elapsed() < self.timing.window {
            let count = receive(&socket, &mut batch)?;
            batch.received(count).for_each(|datagram| tally.count(datagram));
        }
        let (elapsed, busy) = meter.stop()?;
        ensure!(tally.datagrams > 0, "no datagram of ours arrived in {elapsed:?}");
        let mut sample = Sample(rates(tally.bytes, elapsed, busy));
        sample.0.insert(Figure::Kpps, tally.datagrams as f64 / elapsed.as_secs_f64() / 1e3);
        sample.0.insert(Figure::Loss, tally.loss());
        say(&Said::Measured(sample))
    }
}

fn receive(socket: &UdpSocket, batch: &mut Batch) -> Result<usize> {
    match batch.receive(socket.as_fd()) {
        Ok(count) => Ok(count),
        Err(e) if e.kind() == ErrorKind::WouldBlock => bail!("no datagram for {SILENCE:?}"),
        Err(e) => Err(e).context("receive"),
    }
}

/// What arrived in the window, and the span of numbers of each flow.
#[derive(Debug, Default)]
struct Tally {
    datagrams: u64,
    bytes: u64,
    flows: BTreeMap<u16, (u64, u64)>,
}

impl Tally {
    fn count(&mut self, datagram: &[u8]) {
        let Some((flow, number)) = unmark(datagram) else { return };
        self.datagrams += 1;
        self.bytes += datagram.len() as u64;
        let (first, last) = self.flows.entry(flow).or_insert((number, number));
        *first = number.min(*first);
        *last = number.max(*last);
    }

    /// The share of those sent between the first and the last that arrived.
    fn loss(&self) -> f64 {
        let sent: u64 = self.flows.values().map(|(first, last)| last - first + 1).sum();
        1.0 - self.datagrams as f64 / sent.max(1) as f64
    }
}

impl Source {
    pub fn run(&self) -> Result<()> {
        match self.pattern {
            Pattern::Small => send_small(&connected(self.to)?),
            Pattern::Mixed => {
                send_mixed(&(0..FLOWS).map(|_| connected(self.to)).collect::<Result<Vec<_>>>()?)
            }
        }
    }
}

fn connected(to: SocketAddrV4) -> Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(to).with_context(|| format!("no route to {to}"))?;
    Ok(socket)
}

fn send_small(socket: &UdpSocket) -> Result<()> {
    let mut batch = Batch::new(BURST, SMALL);
    let (start, mut number) = (Instant::now(), 0);
    while start.elapsed() < LONGEST {
        for index in 0..batch.len() {
            mark(batch.datagram_mut(index), 0, number + index as u64);
        }
        match batch.send(socket.as_fd()) {
            Ok(sent) => number += sent as u64,
            Err(e) if is_passing(&e) => {}
            Err(e) => return Err(e).context("send"),
        }
    }
    Ok(())
}

fn send_mixed(sockets: &[UdpSocket]) -> Result<()> {
    let mut payload = [0; SIZES[SIZES.len() - 1]];
    let start = Instant::now();
    let mut number = 0;
    while start.elapsed() < LONGEST {
        for (flow, socket) in sockets.iter().enumerate() {
            let datagram = &mut payload[..size_of_datagram(flow, number)];
            mark(datagram, flow as u16, number);
            match socket.send(datagram) {
                Ok(_) => {}
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(e).context("send"),
            }
        }
        number += 1;
    }
    Ok(())
}

fn size_of_datagram(flow: usize, number: u64) -> usize {
    let step = if flow < FLOWS / 2 { 0 } else { number as usize };
    SIZES[(flow + step) % SIZES.len()]
}

/// No buffer at the moment, or an ICMP error for an earlier one.
fn is_passing(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error().map(nix::Error::from_raw),
        Some(nix::Error::ENOBUFS | nix::Error::EAGAIN | nix::Error::ECONNREFUSED | nix::Error::EINTR)
    )
}

fn mark(datagram: &mut [u8], flow: u16, number: u64) {
    datagram[..2].copy_from_slice(&flow.to_be_bytes());
    datagram[2..10].copy_from_slice(&number.to_be_bytes());
}

fn unmark(datagram: &[u8]) -> Option<(u16, u64)> {
    let flow = u16::from_be_bytes(datagram.get(..2)?.try_into().ok()?);
    Some((flow, u64::from_be_bytes(datagram.get(2..10)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(flow: u16, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; SMALL];
        mark(&mut bytes, flow, number);
        bytes
    }

    #[test]
    fn loss_is_what_lies_between_first_and_last_and_did_not_arrive() {
        let mut tally = Tally::default();
        for number in [100, 102, 101, 107] {
            tally.count(&datagram(1, number));
        }
        tally.count(&datagram(2, 7));
        tally.count(b"foreign");
        assert_eq!((tally.datagrams, tally.bytes), (5, 5 * SMALL as u64));
        assert!((tally.loss() - (1.0 - 5.0 / 9.0)).abs() < 1e-9, "{}", tally.loss());
    }

    #[test]
    fn half_of_the_flows_keep_their_size_and_all_sizes_occur() {
        let sizes = |flow| (0..8).map(|number| size_of_datagram(flow, number)).collect::<Vec<_>>();
        assert_eq!(sizes(2), [256; 8]);
        assert_eq!(sizes(33), [128, 256, 400, 576, 800, 1100, 1400, 64]);
        assert_eq!((0..8).map(|flow| size_of_datagram(flow, 5)).collect::<Vec<_>>(), SIZES);
    }
}
