//! Throughput of one TCP stream and round trips of one UDP exchange: the lab's bench.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use crate::netns::Netns;

const CHUNK: usize = 128 << 10;
const PATIENCE: Duration = Duration::from_secs(30);

/// Bits per second that arrive over `duration`, by one stream.
pub fn throughput(from: &Netns, to: &Netns, address: Ipv4Addr, duration: Duration) -> Result<f64> {
    let listener = to.enter(|| Ok(TcpListener::bind(SocketAddrV4::new(address, 0))?))?;
    let target = listener.local_addr()?;
    let mut stream = from.enter(|| Ok(TcpStream::connect_timeout(&target, PATIENCE)?))?;
    let receiver = thread::spawn(move || -> Result<f64> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut chunk = vec![0; CHUNK];
        let start = Instant::now();
        let mut bytes = 0_u64;
        loop {
            match stream.read(&mut chunk)? {
                0 => return Ok(bytes as f64 * 8.0 / start.elapsed().as_secs_f64()),
                len => bytes += len as u64,
            }
        }
    });
    let chunk = vec![0x5a; CHUNK];
    let end = Instant::now() + duration;
    while Instant::now() < end {
        stream.write_all(&chunk).context("stream stopped")?;
    }
    drop(stream);
    receiver.join().map_err(|_| anyhow!("the receiver panicked"))?
}

/// The median of `rounds` round trips of a small datagram.
pub fn round_trip(from: &Netns, to: &Netns, address: Ipv4Addr, rounds: usize) -> Result<Duration> {
    let far = to.enter(|| Ok(UdpSocket::bind(SocketAddrV4::new(address, 0))?))?;
    let target = far.local_addr()?;
    let near = from.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(target)?;
        Ok(socket)
    })?;
    near.set_read_timeout(Some(PATIENCE))?;
    far.set_read_timeout(Some(PATIENCE))?;
    let server = thread::spawn(move || -> Result<()> {
        let mut buffer = [0; 64];
        loop {
            let (len, sender) = far.recv_from(&mut buffer)?;
            // An empty datagram says goodbye.
            if len == 0 {
                return Ok(());
            }
            far.send_to(&buffer[..len], sender)?;
        }
    });
    let mut times = Vec::with_capacity(rounds);
    let mut buffer = [0; 64];
    for _ in 0..rounds {
        let start = Instant::now();
        near.send(b"round trip")?;
        near.recv(&mut buffer).context("no answer")?;
        times.push(start.elapsed());
    }
    near.send(&[])?;
    server.join().map_err(|_| anyhow!("the server panicked"))??;
    times.sort_unstable();
    times.get(rounds / 2).copied().context("no rounds")
}
