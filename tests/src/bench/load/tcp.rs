//! Bulk TCP: one process with a thread per stream on each side, congestion control cubic whatever the machine's default.

use std::ffi::OsString;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::socket::{setsockopt, sockopt::TcpCongestion};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::super::cpu::Meter;
use super::super::program::{LONGEST, Said, say};
use super::super::result::{Sample, rates};
use super::{PATIENCE, Timing};
use crate::wait::let_pass;

const CHUNK: usize = 128 << 10;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sink {
    pub bind: Ipv4Addr,
    pub streams: usize,
    pub timing: Timing,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Source {
    pub to: SocketAddrV4,
    pub streams: usize,
}

impl Sink {
    pub fn run(&self, cores: &[usize]) -> Result<()> {
        let listener = TcpListener::bind(SocketAddrV4::new(self.bind, 0))?;
        say(&Said::Listening(SocketAddrV4::new(self.bind, listener.local_addr()?.port())))?;
        let received = Arc::new(AtomicU64::new(0));
        for _ in 0..self.streams {
            let (stream, _) = listener.accept()?;
            let received = Arc::clone(&received);
            thread::spawn(move || swallow(stream, &received));
        }
        let_pass(self.timing.warm_up);
        let (meter, before) = (Meter::start(cores)?, received.load(Ordering::Relaxed));
        let_pass(self.timing.window);
        let (bytes, (elapsed, busy)) = (received.load(Ordering::Relaxed) - before, meter.stop()?);
        ensure!(bytes > 0, "no byte arrived in {elapsed:?}");
        let sample = Sample(rates(bytes, elapsed, busy));
        say(&Said::Measured(sample))
    }
}

impl Source {
    pub fn run(&self) -> Result<()> {
        let threads: Vec<_> = (0..self.streams)
            .map(|_| connect(self.to))
            .map(|stream| stream.map(|stream| thread::spawn(move || feed(stream))))
            .collect::<Result<_>>()?;
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a stream panicked"))??;
        }
        Ok(())
    }
}

fn connect(to: SocketAddrV4) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    setsockopt(&socket, TcpCongestion, &OsString::from("cubic")).context("congestion control cubic")?;
    socket.connect_timeout(&to.into(), PATIENCE).with_context(|| format!("connect to {to}"))?;
    let stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(LONGEST))?;
    Ok(stream)
}

fn swallow(mut stream: TcpStream, received: &AtomicU64) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(length @ 1..) = stream.read(&mut chunk) {
        received.fetch_add(length as u64, Ordering::Relaxed);
    }
}

/// Until the sink has seen enough and goes.
fn feed(mut stream: TcpStream) -> Result<()> {
    let chunk = vec![0x5a; CHUNK];
    loop {
        match stream.write_all(&chunk) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => return Ok(()),
            Err(e) => return Err(e).context("stream"),
        }
    }
}
