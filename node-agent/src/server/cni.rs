//! The plugin's socket: one task per connection, frames of [`weft_shared::protocol`], everything with a deadline.
//!
//! A connection is the life of an ADD: [`crate::ipam`] undoes what is not committed when it ends. Who may speak is
//! settled by the directory (root, 0700), the socket (0600) and the peer's credentials (unix(7), `SO_PEERCRED`), in that
//! order. No peer can hold up another: connections, frames and waiting are bounded.

mod connection;
mod listener;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::protocol::{Failure, Reply, encode};

pub use self::listener::BindError;
use self::listener::Listener;
use crate::ipam::Ipam;
use crate::pods::Fabric;

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
            uid: 0,
        }
    }
}

#[derive(Debug)]
pub struct Server<F: Fabric> {
    listener: Listener,
    ipam: Arc<Ipam<F>>,
    limits: Limits,
}

impl<F: Fabric> Server<F> {
    /// Drains the tombstones and starts to listen, both under their exclusive lock: a DEL either left a tombstone that
    /// is seen here, or finds the socket.
    pub async fn bind(socket: &Path, ipam: Arc<Ipam<F>>, limits: Limits) -> Result<Self, BindError> {
        listener::secure_directory(socket, limits.uid)?;
        let lock = listener::lock_tombstones(ipam.tombstones_dir()).await?;
        listener::refuse_live(socket).await?;
        ipam.clean_tombstones().map_err(|e| BindError::io(ipam.tombstones_dir(), e))?;
        ipam.drain_tombstones().await;
        let listener = Listener::bind(socket)?;
        drop(lock);
        info!(path = %socket.display(), "listening for the CNI plugin");
        Ok(Self { listener, ipam, limits })
    }

    /// Serves until told to stop, then lets open transactions end.
    pub async fn run(self, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended {
                        warn!(%error, "connection ended badly");
                    }
                    continue;
                }
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok(stream) if connections.len() >= self.limits.connections => {
                    let details = format!("{} connections are open", connections.len());
                    refuse(&stream, Code::TryAgainLater, "the agent is busy", details);
                }
                Ok(stream) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == self.limits.uid => {
                        let serve = connection::serve(stream, self.ipam.clone(), self.limits, stop.clone());
                        connections.spawn(serve);
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
        self.listener.close();
        let drained =
            timeout(self.limits.drain, async { while connections.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            warn!(connections = connections.len(), "left in the middle; the next agent undoes them");
            connections.shutdown().await;
        }
    }
}

/// A last word to a peer that is not served. A fresh socket has room for it; if not, it is not worth waiting for.
fn refuse(stream: &tokio::net::UnixStream, code: Code, msg: &str, details: String) {
    let reply = Reply::Failed(Failure::new(code, msg).with_details(details));
    if let Ok(frame) = encode(&reply) {
        let _ = stream.try_write(&frame);
    }
}
