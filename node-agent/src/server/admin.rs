//! The operator's HTTP: health, readiness, metrics and state over TCP, and the same with `/ping` over a unix socket.
//!
//! Paths and texts of `/healthz` and `/readyz` are flannel's (main.go, `mustRunHealthz`). Unlike there, a port that
//! cannot be bound is named in status and tried again, and a client that says nothing is let go.

mod listen;
mod port;
mod routes;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::port::{Port, Standing};
use super::SocketError;
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

/// The listeners, not yet served: a socket that cannot be bound is known before anything else starts.
#[derive(Debug)]
pub struct Admin {
    tcp: Option<Port>,
    socket: Standing,
    port_problem: watch::Receiver<Option<String>>,
}

#[derive(Debug, thiserror::Error)]
#[error("--admin-socket: {0}")]
pub struct BindError(#[from] SocketError);

impl Admin {
    pub async fn bind(listen: Option<SocketAddr>, path: &Path) -> Result<Self, BindError> {
        let socket = Standing::bind(path).await?;
        let (problem, port_problem) = watch::channel(None);
        let tcp = match listen {
            None => None,
            Some(addr) => Some(Port::bind(addr, problem).await),
        };
        Ok(Self { tcp, socket, port_problem })
    }

    /// Why there is nothing at `--admin-listen`, for as long as there is not.
    pub fn port_problem(&self) -> watch::Receiver<Option<String>> {
        self.port_problem.clone()
    }

    /// Answers until `stop`, then lets requests under way finish for a moment.
    pub async fn serve(self, state: AdminState, stop: CancellationToken) {
        let public = routes::public(state.clone());
        let tcp = async {
            if let Some(port) = self.tcp {
                listen::serve(port, public, TCP_DEADLINE, stop.clone(), drop).await;
            }
        };
        let operator = routes::operator(state);
        let unix = listen::serve(self.socket, operator, SOCKET_DEADLINE, stop.clone(), Standing::close);
        tokio::join!(tcp, unix);
    }
}

impl std::fmt::Debug for AdminState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdminState").finish_non_exhaustive()
    }
}
