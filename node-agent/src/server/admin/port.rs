//! The two listeners, each kept for as long as the agent lives: a port that somebody else has is waited for, a socket
//! whose file is deleted is made anew.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::serve::Listener;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep};
use tracing::{info, warn};

use crate::ipam::keep::LOOK;
use crate::server::socket::{self, ROOT, Socket, SocketError};

/// Doubled with every attempt, up to the longest.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What `--admin-listen` names, bound or not yet. Pods need none of it, so nothing waits for it.
#[derive(Debug)]
pub(super) struct Port {
    addr: SocketAddr,
    listener: Option<TcpListener>,
    wait: Duration,
    problem: watch::Sender<Option<String>>,
}

impl Port {
    pub(super) async fn bind(addr: SocketAddr, problem: watch::Sender<Option<String>>) -> Self {
        let mut port = Self { addr, listener: None, wait: FIRST_WAIT, problem };
        port.attempt().await;
        port
    }

    async fn attempt(&mut self) {
        let addr = self.addr;
        match TcpListener::bind(addr).await {
            Ok(listener) => {
                if self.problem.send_replace(None).is_some() {
                    info!(%addr, "listening for HTTP after all");
                }
                (self.listener, self.wait) = (Some(listener), FIRST_WAIT);
            }
            Err(error) => {
                let text = format!(
                    "--admin-listen = {addr}: cannot listen there: {error}; give another address, or off"
                );
                // Said once, and again when it is for another reason.
                if self.problem.send_replace(Some(text.clone())).as_ref() != Some(&text) {
                    warn!(problem = %text, "no HTTP by TCP until it can be listened there, which is tried again; the rest goes on");
                }
            }
        }
    }
}

impl Listener for Port {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            if let Some(listener) = &mut self.listener {
                return Listener::accept(listener).await;
            }
            sleep(self.wait).await;
            self.wait = (self.wait * 2).min(LONGEST_WAIT);
            self.attempt().await;
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.as_ref().map_or(Ok(self.addr), TcpListener::local_addr)
    }
}

/// The operator's socket, by which everything is answered.
#[derive(Debug)]
pub(super) struct Standing {
    path: PathBuf,
    socket: Socket,
    look: Interval,
    /// Why it could not be made anew when that was tried last.
    said: String,
}

impl Standing {
    pub(super) async fn bind(path: &Path) -> Result<Self, SocketError> {
        let socket = listen(path).await?;
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self { path: path.to_owned(), socket, look, said: String::new() })
    }

    pub(super) fn close(self) {
        self.socket.close();
    }

    async fn listen_again(&mut self) {
        match listen(&self.path).await {
            Ok(socket) => {
                warn!(path = %self.path.display(), "the socket was deleted: listening there again");
                self.socket = socket;
                self.said.clear();
            }
            Err(error) if error.to_string() != self.said => {
                warn!(path = %self.path.display(), %error, "the socket was deleted, and cannot be made again yet");
                self.said = error.to_string();
            }
            Err(_) => {}
        }
    }
}

async fn listen(path: &Path) -> Result<Socket, SocketError> {
    socket::secure_directory(path, ROOT)?;
    socket::refuse_live(path).await?;
    Socket::bind(path)
}

impl Listener for Standing {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (UnixStream, Self::Addr) {
        loop {
            tokio::select! {
                accepted = Listener::accept(&mut self.socket.listener) => return accepted,
                _ = self.look.tick() => {}
            }
            if !self.socket.is_there() {
                self.listen_again().await;
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        UnixListener::local_addr(&self.socket.listener)
    }
}
