//! Open TCP connections that must live through whatever a scenario does to the agent.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use crate::netns::Netns;
use crate::wait::let_pass;

/// Longer than any outage that a scenario allows, so that a slow echo is no failure and a dead one is.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two rounds: connections are to be there, not to take a processor from what is tested.
const PACE: Duration = Duration::from_millis(20);

/// Connections on which a number goes back and forth, all served by one thread per side.
#[derive(Debug)]
pub struct Flows {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    client: JoinHandle<Result<()>>,
    server: JoinHandle<()>,
}

impl Flows {
    pub fn open(from: &Netns, to: &Netns, address: Ipv4Addr, count: usize) -> Result<Self> {
        let listener = to.enter(|| Ok(TcpListener::bind(SocketAddrV4::new(address, 0))?))?;
        let target = listener.local_addr()?;
        let mut near = Vec::new();
        let mut far = Vec::new();
        for _ in 0..count {
            let stream = from.enter(|| Ok(TcpStream::connect_timeout(&target, PATIENCE)?))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            near.push(stream);
            let (stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            far.push(stream);
        }
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = thread::spawn({
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            move || exchange(near, &stop, &rounds)
        });
        let server = thread::spawn(move || echo(far));
        Ok(Self { stop, rounds, client, server })
    }

    /// How often every connection has carried a number there and back.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Ends after a last round; an error names the first connection that was reset or fell silent.
    pub fn end(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.client.join().map_err(|_| anyhow!("the client panicked"))?;
        self.server.join().map_err(|_| anyhow!("the server panicked"))?;
        ended.map(|()| self.rounds.load(Ordering::Relaxed))
    }
}

fn exchange(mut streams: Vec<TcpStream>, stop: &AtomicBool, rounds: &AtomicU64) -> Result<()> {
    let mut number = 0_u64;
    loop {
        let last = stop.load(Ordering::Relaxed);
        for (flow, stream) in streams.iter_mut().enumerate() {
            stream
                .write_all(&number.to_be_bytes())
                .with_context(|| format!("flow {flow} in round {number}"))?;
        }
        for (flow, stream) in streams.iter_mut().enumerate() {
            let mut back = [0; 8];
            stream.read_exact(&mut back).with_context(|| format!("flow {flow} in round {number}"))?;
            anyhow::ensure!(back == number.to_be_bytes(), "flow {flow} brought back another number");
        }
        number += 1;
        rounds.store(number, Ordering::Relaxed);
        if last {
            return Ok(());
        }
        let_pass(PACE);
    }
}

/// Serves the connections in the order in which the client writes to them, until the first is closed.
fn echo(mut streams: Vec<TcpStream>) {
    loop {
        for stream in &mut streams {
            let mut number = [0; 8];
            if stream.read_exact(&mut number).and_then(|()| stream.write_all(&number)).is_err() {
                return;
            }
        }
    }
}
