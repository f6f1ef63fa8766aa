//! One connection, from its first request to its end.

use std::future;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};
use weft_shared::cni::Code;
use weft_shared::protocol::{Failure, FrameError, Reply, Request, decode, encode, frame_len};

use super::Limits;
use crate::ipam::{Connection, Ipam, verb};
use crate::pods::Fabric;

/// What every connection is served with.
pub(super) struct Conversation<F: Fabric> {
    pub(super) ipam: Arc<Ipam<F>>,
    pub(super) limits: Limits,
    /// Requests under way, which outlive their connection.
    pub(super) workers: TaskTracker,
    pub(super) stop: CancellationToken,
}

impl<F: Fabric> Conversation<F> {
    pub(super) async fn serve(self, mut stream: UnixStream) {
        let connection = self.ipam.connect();
        let end = self.converse(&mut stream, &connection).await;
        debug!(?end, "connection over");
        connection.closed(matches!(end, End::ByPeer)).await;
    }

    async fn converse(&self, stream: &mut UnixStream, connection: &Connection<F>) -> End {
        let limits = &self.limits;
        loop {
            let wiring = connection.is_open();
            let patience = if wiring { limits.wiring } else { limits.idle };
            let request = tokio::select! {
                biased;
                request = receive(stream, patience, limits.idle) => request,
                () = self.stop.cancelled(), if !wiring => return End::ByUs,
            };
            let request = match request {
                Ok(request) => request,
                Err(Unreceived::Closed) => return End::ByPeer,
                Err(Unreceived::Late) => {
                    debug!("no request in time");
                    return End::ByUs;
                }
                Err(Unreceived::Unreadable(error)) => {
                    let failure = unreadable(&error);
                    warn!(%error, "unreadable request");
                    self.ipam.count_failure("unreadable", failure.code);
                    let _ = send(stream, &Reply::Failed(failure), limits.idle).await;
                    return End::ByUs;
                }
            };
            let answer = tokio::select! {
                reply = self.answer(connection, request) => reply,
                () = hung_up(stream) => return End::ByPeer,
            };
            match send(stream, &answer, limits.idle).await {
                Ok(()) => {}
                Err(Unreceived::Closed) => return End::ByPeer,
                Err(_) => return End::ByUs,
            }
        }
    }

    /// Carries a request out in a task of its own: what was begun in the kernel is ended, whoever waits for it.
    async fn answer(&self, connection: &Connection<F>, request: Request) -> Reply {
        let verb = verb(&request);
        let patience = match request {
            Request::Reserve(_) => self.limits.reserve,
            Request::Gc { .. } => self.limits.gc,
            Request::Status => self.limits.status,
            _ => self.limits.request,
        };
        let (worker, id) = (self.ipam.clone(), connection.id());
        let work = self.workers.spawn(async move { worker.handle(id, request).await });
        let failure = match timeout(patience, work).await {
            Ok(Ok(reply)) => return reply,
            Ok(Err(error)) => {
                Failure::new(Code::Internal, "the agent failed, see its log").with_details(error.to_string())
            }
            Err(_elapsed) => Failure::new(Code::TryAgainLater, "the agent is too slow")
                .with_details(format!("{verb} not done in {patience:?}")),
        };
        warn!(verb, code = failure.code, details = failure.details, "request not answered properly");
        self.ipam.count_failure(verb, failure.code);
        Reply::Failed(failure)
    }
}

#[derive(Debug)]
enum End {
    /// The other side is gone: it does nothing more.
    ByPeer,
    /// We gave up; what the other side does is unknown.
    ByUs,
}

enum Unreceived {
    Closed,
    Late,
    Unreadable(FrameError),
}

impl From<io::Error> for Unreceived {
    fn from(_: io::Error) -> Self {
        // Reset or broken pipe: what a unix socket reports when the other side is gone.
        Self::Closed
    }
}

/// `patience` for the frame's beginning, `whole` for the rest of it. Memory grows with what arrives, not with what is
/// announced.
async fn receive(
    stream: &mut UnixStream,
    patience: Duration,
    whole: Duration,
) -> Result<Request, Unreceived> {
    let mut header = [0; 4];
    let late = |_| Unreceived::Late;
    if timeout(patience, stream.read(&mut header[..1])).await.map_err(late)?? == 0 {
        return Err(Unreceived::Closed);
    }
    let rest = async {
        stream.read_exact(&mut header[1..]).await?;
        let len = frame_len(header).map_err(Unreceived::Unreadable)?;
        let mut json = Vec::new();
        let read = stream.take(len as u64).read_to_end(&mut json).await?;
        if read < len {
            return Err(Unreceived::Closed);
        }
        decode(&json).map_err(Unreceived::Unreadable)
    };
    timeout(whole, rest).await.map_err(late)?
}

async fn send(stream: &mut UnixStream, reply: &Reply, patience: Duration) -> Result<(), Unreceived> {
    let frame = encode(reply).map_err(Unreceived::Unreadable)?;
    timeout(patience, stream.write_all(&frame)).await.map_err(|_| Unreceived::Late)??;
    Ok(())
}

/// Returns when the other side is gone. One that sends ahead is noticed later, when its next request is read.
async fn hung_up(stream: &UnixStream) {
    while stream.ready(Interest::READABLE).await.is_ok() {
        let mut byte = [MaybeUninit::uninit()];
        // Looks without taking; `try_io` forgets readiness only when there is nothing.
        match stream.try_io(Interest::READABLE, || SockRef::from(stream).peek(&mut byte)) {
            Ok(0) => return,
            Ok(_) => future::pending().await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

fn unreadable(error: &FrameError) -> Failure {
    let (code, msg) = match error {
        FrameError::Version(_) => (Code::ProtocolMismatch, "plugin and agent do not match"),
        _ => (Code::Decode, "the agent cannot read the request"),
    };
    // Said to the other side, so its words are turned round.
    let details = match error {
        FrameError::Version(theirs) => format!(
            "the plugin speaks protocol version {theirs}, this agent version {}: upgrade weft and weftd together",
            weft_shared::protocol::PROTOCOL_VERSION
        ),
        other => other.to_string(),
    };
    Failure::new(code, msg).with_details(details)
}
