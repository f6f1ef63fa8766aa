//! The plugin's socket: one task per connection, frames of [`weft_shared::protocol`], everything with a deadline.
//!
//! A connection is the life of an ADD: [`crate::ipam`] undoes what is not committed when it ends. Who may speak is
//! settled by the directory (root's, nobody else writes to it), the socket (0600) and the peer's credentials (unix(7), `SO_PEERCRED`), in that
//! order. No peer can hold up another: connections, frames and waiting are bounded.

mod connection;
mod lock;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::protocol::{Failure, Reply, encode};

use self::connection::Conversation;
use crate::ipam::Ipam;
use crate::ipam::keep::LOOK;
use crate::pods::Fabric;
use crate::server::socket::{self, ROOT, Socket, SocketError};

/// Every wait of the server; those that a plugin must outlast, or the other way round, are from [`deadline`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub connections: usize,
    /// From connect, or from the last answer, to the next request; also for the whole of one frame in either direction.
    pub idle: Duration,
    /// From Reserve's answer to Commit.
    pub wiring: Duration,
    /// Until Reserve is answered. What takes longer goes on and is settled.
    pub reserve: Duration,
    /// The same for Commit, DEL and CHECK.
    pub request: Duration,
    pub gc: Duration,
    pub status: Duration,
    /// For open transactions after the agent was told to stop.
    pub drain: Duration,
    /// Who may speak: root.
    pub uid: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            idle: Duration::from_secs(5),
            wiring: deadline::WIRING,
            reserve: deadline::RESERVE_ANSWER,
            request: deadline::ANSWER,
            gc: deadline::GC_ANSWER,
            status: deadline::STATUS_ANSWER,
            drain: Duration::from_secs(5),
            uid: ROOT,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("--cni-socket: {0}")]
    Socket(#[from] SocketError),
    #[error("{path} has been locked by a plugin for {seconds} s: expected a moment")]
    Locked { path: PathBuf, seconds: u64 },
    #[error("{path}: {error}")]
    Tombstones { path: PathBuf, error: io::Error },
}

#[derive(Debug)]
pub struct Server<F: Fabric> {
    path: PathBuf,
    socket: Socket,
    ipam: Arc<Ipam<F>>,
    limits: Limits,
}

impl<F: Fabric> Server<F> {
    /// Drains the tombstones and starts to listen, both under their exclusive lock: a DEL either left a tombstone that
    /// is seen here, or finds the socket.
    pub async fn bind(path: &Path, ipam: Arc<Ipam<F>>, limits: Limits) -> Result<Self, BindError> {
        let socket = listen(path, &ipam, limits).await?;
        info!(path = %path.display(), "listening for the CNI plugin");
        Ok(Self { path: path.to_owned(), socket, ipam, limits })
    }

    /// Somebody has deleted the socket, or the directory it was in.
    async fn listen_again(&mut self, said: &mut String) {
        // Who finds the socket finds the records' directory as well; what it lacks is said by whoever keeps it.
        if self.ipam.restore().is_err() {
            return;
        }
        match listen(&self.path, &self.ipam, self.limits).await {
            Ok(socket) => {
                warn!(path = %self.path.display(), "the socket was deleted: listening there again");
                self.socket = socket;
                self.ipam.tombstones_moved();
                said.clear();
            }
            Err(error) if error.to_string() != *said => {
                warn!(path = %self.path.display(), %error, "the socket was deleted, and cannot be made again yet");
                *said = error.to_string();
            }
            Err(_) => {}
        }
    }

    /// Serves until told to stop, then lets open transactions end.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = String::new();
        let workers = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended {
                        warn!(%error, "connection ended badly");
                    }
                    continue;
                }
                accepted = self.socket.accept() => accepted,
                _ = look.tick() => {
                    if !self.socket.is_there() {
                        self.listen_again(&mut said).await;
                    }
                    continue;
                }
            };
            match accepted {
                Ok(stream) if connections.len() >= self.limits.connections => {
                    let details = format!("{} connections are open", connections.len());
                    refuse(&stream, Code::TryAgainLater, "the agent is busy", details);
                }
                Ok(stream) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == self.limits.uid => {
                        let conversation = Conversation {
                            ipam: self.ipam.clone(),
                            limits: self.limits,
                            workers: workers.clone(),
                            stop: stop.clone(),
                        };
                        connections.spawn(conversation.serve(stream));
                    }
                    Ok(peer) => {
                        warn!(uid = peer.uid(), pid = peer.pid(), "refused: not root");
                        let details = format!("uid {}, expected {}", peer.uid(), self.limits.uid);
                        refuse(
                            &stream,
                            Code::BadConfiguration,
                            "only root may ask for pod addresses",
                            details,
                        );
                    }
                    Err(error) => warn!(%error, "refused: peer unknown"),
                },
                // Out of descriptors, most likely; the peer waits in the backlog.
                Err(error) => {
                    warn!(%error, "cannot accept");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
        self.socket.close();
        workers.close();
        let drained = timeout(self.limits.drain, async {
            while connections.join_next().await.is_some() {}
            // A peer that hung up leaves work behind.
            workers.wait().await;
        });
        if drained.await.is_err() {
            let (connections, requests) = (connections.len(), workers.len());
            warn!(connections, requests, "left in the middle; the next agent undoes them");
        }
        connections.shutdown().await;
    }
}

async fn listen<F: Fabric>(path: &Path, ipam: &Ipam<F>, limits: Limits) -> Result<Socket, BindError> {
    socket::secure_directory(path, limits.uid)?;
    let tombstones = ipam.tombstones_dir();
    let _lock = lock::lock_tombstones(tombstones).await?;
    socket::refuse_live(path).await?;
    let unclean = |error| BindError::Tombstones { path: tombstones.to_owned(), error };
    ipam.clean_tombstones().map_err(unclean)?;
    ipam.drain_tombstones().await;
    Ok(Socket::bind(path)?)
}

/// A last word to a peer that is not served. A fresh socket has room for it; if not, it is not worth waiting for.
fn refuse(stream: &tokio::net::UnixStream, code: Code, msg: &str, details: String) {
    let reply = Reply::Failed(Failure::new(code, msg).with_details(details));
    if let Ok(frame) = encode(&reply) {
        let _ = stream.try_write(&frame);
    }
}
