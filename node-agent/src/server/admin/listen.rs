//! Connections: every connection has a deadline, and their number a bound.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::debug;

const CONNECTIONS: usize = 64;
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// As flannel's health server.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// Serves connections until `stop`, then hands the listener to `close`; `deadline` bounds each of them as a whole.
pub(super) async fn serve<L>(
    mut listener: L,
    router: Router,
    deadline: Duration,
    stop: CancellationToken,
    close: impl FnOnce(L),
) where
    L: Listener,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let slot = tokio::select! {
            slot = Arc::clone(&slots).acquire_owned() => slot,
            () = stop.cancelled() => break,
        };
        let (io, _peer) = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        let (router, stop) = (router.clone(), stop.clone());
        connections.spawn(async move {
            let _slot = slot;
            if tokio::time::timeout(deadline, connection::<L>(io, router, HEADER_DEADLINE, stop))
                .await
                .is_err()
            {
                debug!(seconds = deadline.as_secs(), "admin connection closed at its deadline");
            }
        });
        while connections.try_join_next().is_some() {}
    }
    close(listener);
    let drained =
        tokio::time::timeout(STOP_DEADLINE, async { while connections.join_next().await.is_some() {} });
    if drained.await.is_err() {
        connections.abort_all();
    }
}

pub(super) async fn connection<L: Listener>(
    io: L::Io,
    router: Router,
    header: Duration,
    stop: CancellationToken,
) {
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "admin connection broke");
    }
}
