//! Request and response over TCP: on each connection one small request is under way at a time.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::super::cpu::Meter;
use super::super::program::{Said, say};
use super::super::result::{Figure, Sample};
use super::{PATIENCE, Timing};

/// Bytes of a request and of its response.
const MESSAGE: usize = 64;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Server {
    pub bind: Ipv4Addr,
    pub connections: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Client {
    pub to: SocketAddrV4,
    pub connections: usize,
    pub timing: Timing,
}

impl Server {
    pub fn run(&self) -> Result<()> {
        let listener = TcpListener::bind(SocketAddrV4::new(self.bind, 0))?;
        say(&Said::Listening(SocketAddrV4::new(self.bind, listener.local_addr()?.port())))?;
        let mut streams = Vec::new();
        for _ in 0..self.connections {
            let (stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            streams.push(stream);
        }
        let mut message = [0; MESSAGE];
        let mut ready = Ready::of(&streams);
        loop {
            ready.wait()?;
            for (index, mut stream) in streams.iter().enumerate() {
                if !ready.has(index) {
                    continue;
                }
                match stream.read_exact(&mut message).and_then(|()| stream.write_all(&message)) {
                    Ok(()) => {}
                    // The client has seen enough.
                    Err(e) if is_end(e.kind()) => return Ok(()),
                    Err(e) => return Err(e).context("serve"),
                }
            }
        }
    }
}

impl Client {
    pub fn run(&self, cores: &[usize]) -> Result<()> {
        let mut streams = Vec::new();
        for _ in 0..self.connections {
            let stream = TcpStream::connect_timeout(&self.to.into(), PATIENCE)
                .with_context(|| format!("connect to {}", self.to))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            streams.push(stream);
        }
        let mut sent = Vec::new();
        for mut stream in &streams {
            stream.write_all(&[0x5a; MESSAGE])?;
            sent.push(Instant::now());
        }
        let mut times = Vec::with_capacity(1 << 20);
        exchange(&streams, &mut sent, self.timing.warm_up, &mut times)?;
        times.clear();
        let meter = Meter::start(cores)?;
        exchange(&streams, &mut sent, self.timing.window, &mut times)?;
        let (elapsed, busy) = meter.stop()?;
        ensure!(!times.is_empty(), "no response in {elapsed:?}");
        say(&Said::Measured(figures(times, elapsed, busy)))
    }
}

fn exchange(
    streams: &[TcpStream],
    sent: &mut [Instant],
    duration: Duration,
    times: &mut Vec<Duration>,
) -> Result<()> {
    let start = Instant::now();
    let mut message = [0; MESSAGE];
    let mut ready = Ready::of(streams);
    while start.elapsed() < duration {
        ready.wait()?;
        for (index, mut stream) in streams.iter().enumerate() {
            if ready.has(index) {
                stream.read_exact(&mut message).context("response")?;
                times.push(sent[index].elapsed());
                sent[index] = Instant::now();
                stream.write_all(&message).context("request")?;
            }
        }
    }
    Ok(())
}

/// Which connections have something to read. A single one is simply read, which waits as well and costs one system
/// call less.
struct Ready<'a>(Vec<PollFd<'a>>);

impl<'a> Ready<'a> {
    fn of(streams: &'a [TcpStream]) -> Self {
        Self(streams.iter().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)).collect())
    }

    fn wait(&mut self) -> Result<()> {
        if self.0.len() > 1 {
            let ready = poll(&mut self.0, PollTimeout::try_from(PATIENCE)?)?;
            ensure!(ready > 0, "nothing to read for {PATIENCE:?}");
        }
        Ok(())
    }

    fn has(&self, index: usize) -> bool {
        self.0.len() == 1 || self.0[index].any().unwrap_or(false)
    }
}

fn is_end(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

fn figures(mut times: Vec<Duration>, elapsed: Duration, busy: Duration) -> Sample {
    times.sort_unstable();
    let count = times.len();
    let at = |share: f64| times[((count as f64 * share) as usize).min(count - 1)].as_secs_f64() * 1e6;
    Sample(
        [
            (Figure::P50, at(0.50)),
            (Figure::P99, at(0.99)),
            (Figure::PerSecond, count as f64 / elapsed.as_secs_f64()),
            (Figure::CpuPerExchange, busy.as_secs_f64() * 1e6 / count as f64),
        ]
        .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let times: Vec<Duration> = (1..=100).rev().map(Duration::from_micros).collect();
        let sample = figures(times, Duration::from_secs(2), Duration::from_secs(1));
        let wanted = [
            (Figure::P50, 51.0),
            (Figure::P99, 100.0),
            (Figure::PerSecond, 50.0),
            (Figure::CpuPerExchange, 10_000.0),
        ];
        for (figure, value) in wanted {
            assert!((sample.0[&figure] - value).abs() < 1e-6, "{figure:?} {:?}", sample.0);
        }
        let one = figures(vec![Duration::from_micros(7)], Duration::from_secs(1), Duration::ZERO);
        assert!((one.0[&Figure::P99] - 7.0).abs() < 1e-6);
    }
}
