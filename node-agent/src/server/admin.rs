//! The operator's HTTP: health, readiness, metrics and state over TCP, and the same with `/ping` over a unix socket.
//!
//! Paths and texts of `/healthz` and `/readyz` are flannel's (main.go, `mustRunHealthz`). Unlike there, a port that
//! cannot be bound is an error with the setting's name, and a client that says nothing is let go.

mod listen;
mod routes;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::socket::{self, ROOT, Socket, SocketError};
use crate::metrics::{Metrics, StatusSource};

/// A scrape takes milliseconds.
const TCP_DEADLINE: Duration = Duration::from_secs(30);
/// A ping of all peers of a large cluster takes minutes when they are silent.
const SOCKET_DEADLINE: Duration = Duration::from_secs(600);

/// What the handlers answer from.
#[derive(Clone)]
pub struct AdminState {
    pub status: StatusSource,
    pub metrics: Arc<Metrics>,
}

/// The bound listeners, not yet served: what cannot be bound is known before anything else starts.
#[derive(Debug)]
pub struct Admin {
    tcp: Option<TcpListener>,
    socket: Socket,
}

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("--admin-listen = {addr}: cannot listen there: {error}; give another address, or off")]
    Tcp { addr: SocketAddr, error: io::Error },
    #[error("--admin-socket: {0}")]
    Socket(#[from] SocketError),
}

impl Admin {
    pub async fn bind(listen: Option<SocketAddr>, path: &Path) -> Result<Self, BindError> {
        let tcp = match listen {
            None => None,
            Some(addr) => {
                let bound = TcpListener::bind(addr).await;
                Some(bound.map_err(|error| BindError::Tcp { addr, error })?)
            }
        };
        socket::secure_directory(path, ROOT)?;
        socket::refuse_live(path).await?;
        Ok(Self { tcp, socket: Socket::bind(path)? })
    }

    /// Answers until `stop`, then lets requests under way finish for a moment.
    pub async fn serve(self, state: AdminState, stop: CancellationToken) {
        let public = routes::public(state.clone());
        let tcp = async {
            if let Some(listener) = self.tcp {
                listen::serve(listener, public, TCP_DEADLINE, stop.clone()).await;
            }
        };
        let Socket { listener, file } = self.socket;
        let unix = listen::serve(listener, routes::operator(state), SOCKET_DEADLINE, stop.clone());
        tokio::join!(tcp, unix);
        file.remove();
    }
}

impl std::fmt::Debug for AdminState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdminState").finish_non_exhaustive()
    }
}
