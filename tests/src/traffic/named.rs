//! Servers that say who they are and whom they are spoken to by: where a packet went, and what became of its source on
//! the way.

use std::cell::Cell;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::netns::Netns;
use crate::wait::let_pass;

/// Between two looks at whether it is to end.
const PACE: Duration = Duration::from_millis(10);
/// A datagram is sent again when its answer takes longer, so many times.
const RETRY: Duration = Duration::from_secs(1);
const TRIES: u32 = 20;
/// A connection's may need a second and a third attempt, which the kernel makes after one second and three (RFC 6298).
const TCP_PATIENCE: Duration = Duration::from_secs(20);

/// A server on one port of every address, by TCP and UDP, until it is dropped.
#[derive(Debug)]
pub struct Named {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub server: String,
    /// As the server sees it.
    pub client: IpAddr,
}

impl Named {
    pub fn start(netns: &Netns, name: &str, address: Ipv4Addr, port: u16) -> Result<Self> {
        let (tcp, udp) = netns.enter(|| {
            let place = SocketAddrV4::new(address, port);
            Ok((TcpListener::bind(place)?, UdpSocket::bind(place)?))
        })?;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(PACE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let threads = vec![
            thread::spawn({
                let (stop, name) = (Arc::clone(&stop), name.to_owned());
                move || serve_tcp(&tcp, &name, &stop)
            }),
            thread::spawn({
                let (stop, name) = (Arc::clone(&stop), name.to_owned());
                move || serve_udp(&udp, &name, &stop)
            }),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(listener: &TcpListener, name: &str, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            // A client that is gone meanwhile says so itself.
            Ok((mut stream, client)) => drop(stream.write_all(line(name, client).as_bytes())),
            Err(_) => let_pass(PACE),
        }
    }
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut question = [0; 64];
        if let Ok((len, client)) = socket.recv_from(&mut question) {
            let number = String::from_utf8_lossy(&question[..len]);
            let _ = socket.send_to(format!("{} {number}", line(name, client)).as_bytes(), client);
        }
    }
}

fn line(name: &str, client: SocketAddr) -> String {
    format!("{name} {}", client.ip())
}

/// One connection; `None` when nobody listens there.
pub fn ask_tcp(from: &Netns, to: SocketAddrV4) -> Result<Option<Answer>> {
    let mut text = String::new();
    let read =
        from.enter(|| Ok(TcpStream::connect_timeout(&to.into(), TCP_PATIENCE)))?.and_then(|mut stream| {
            stream.set_read_timeout(Some(TCP_PATIENCE))?;
            stream.read_to_string(&mut text)
        });
    heard(read.map(|_| text), to)
}

/// A client's one socket: all it sends is one flow.
#[derive(Debug)]
pub struct UdpClient {
    socket: UdpSocket,
    to: SocketAddrV4,
    asked: Cell<u32>,
}

impl UdpClient {
    pub fn open(from: &Netns, to: SocketAddrV4) -> Result<Self> {
        let socket = from.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(RETRY))?;
        Ok(Self { socket, to, asked: Cell::new(0) })
    }

    /// A question, and what comes back; `None` when nobody listens there. Each has a number, and so has its answer: one
    /// that comes late is no answer to the next.
    pub fn ask(&self) -> Result<Option<Answer>> {
        self.asked.set(self.asked.get() + 1);
        heard(self.answer(self.asked.get()), self.to)
    }

    fn answer(&self, number: u32) -> io::Result<String> {
        let mut buffer = [0; 128];
        let mut tries = 0;
        loop {
            self.socket.send(number.to_string().as_bytes())?;
            loop {
                match self.socket.recv(&mut buffer) {
                    Ok(len) => {
                        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
                        if let Some(answer) = text.strip_suffix(&format!(" {number}")) {
                            return Ok(answer.to_owned());
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries < TRIES => break,
                    Err(error) => return Err(error),
                }
            }
            tries += 1;
        }
    }
}

pub fn ask_udp(from: &Netns, to: SocketAddrV4) -> Result<Option<Answer>> {
    UdpClient::open(from, to)?.ask()
}

fn heard(read: io::Result<String>, to: SocketAddrV4) -> Result<Option<Answer>> {
    let nobody = [io::ErrorKind::ConnectionRefused, io::ErrorKind::ConnectionReset];
    let text = match read {
        Err(error) if nobody.contains(&error.kind()) => return Ok(None),
        other => other.with_context(|| format!("{to} does not answer"))?,
    };
    let (server, client) = text.split_once(' ').with_context(|| format!("{to} says {text:?}"))?;
    Ok(Some(Answer { server: server.to_owned(), client: client.parse()? }))
}
