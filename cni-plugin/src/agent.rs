//! A blocking client of the agent's socket, with one deadline for everything it does.

use std::fs::{self, DirBuilder};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use weft_shared::cni::Code;
use weft_shared::protocol::{self, Commit, Failure, FrameError, Reply, Request, Reservation, Reserve};

const RETRY_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("{0}")]
    Absent(Errno),
    #[error("{0}")]
    Untrusted(String),
    /// No agent for this caller, now or later; what was found instead.
    #[error("{0}")]
    Rootless(String),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("an answer to another question")]
    OutOfTurn,
    #[error(transparent)]
    Refused(Failure),
}

impl AgentError {
    /// The error in the runtime's terms; `down` is the code for an agent that is not there.
    pub(crate) fn into_failure(self, socket: &Path, down: Code) -> Failure {
        let path = socket.display();
        match &self {
            Self::Absent(e) => Failure::new(down, format!("weftd does not answer on {path}: {}", e.desc()))
                .with_details("is weftd running? see: systemctl status weftd"),
            Self::Rootless(found) => {
                let code = if down == Code::NotAvailable { down } else { Code::Rootless };
                let msg = "weft serves runtimes of the host's root: this one runs rootless, expected one that root has started";
                Failure::new(code, msg).with_details(format!("weftd on {path}: {found}"))
            }
            Self::Frame(FrameError::Closed) => Failure::new(down, format!("weftd on {path}: {self}"))
                .with_details("it may be restarting; see: journalctl -u weftd"),
            Self::Frame(FrameError::Io(e)) if e.kind() == io::ErrorKind::TimedOut => {
                Failure::new(down, format!("weftd on {path} did not answer in time"))
                    .with_details("it may be overloaded; see: journalctl -u weftd")
            }
            Self::Frame(FrameError::Version(_)) => {
                Failure::new(Code::ProtocolMismatch, format!("weftd on {path}: {self}"))
            }
            Self::Untrusted(_) | Self::Frame(_) | Self::OutOfTurn => {
                Failure::new(Code::Io, format!("weftd on {path}: {self}"))
            }
            Self::Refused(failure) => failure.clone(),
        }
    }
}

/// A connection. Closing it between Reserve and Commit tells the agent to undo the reservation.
pub(crate) struct Agent(BufReader<Stream>);

impl Agent {
    /// Connects, trying again for `patience` while nobody listens: an agent that restarts is away for a moment.
    pub(crate) fn connect(path: &Path, patience: Duration, deadline: Instant) -> Result<Self, AgentError> {
        let give_up = (Instant::now() + patience).min(deadline);
        loop {
            let error = match trusted_dir(path).and_then(|()| connect_once(path)) {
                Ok(fd) => return Ok(Self(BufReader::new(Stream { fd, deadline }))),
                Err(e) => e,
            };
            // EAGAIN: the queue of connections is full.
            let passing =
                matches!(error, AgentError::Absent(Errno::ENOENT | Errno::ECONNREFUSED | Errno::EAGAIN));
            if !passing || Instant::now() >= give_up {
                return Err(if is_rootless(path) { AgentError::Rootless(error.to_string()) } else { error });
            }
            #[expect(
                clippy::disallowed_methods,
                reason = "a socket that does not exist yet cannot be waited for"
            )]
            thread::sleep(RETRY_EVERY);
        }
    }

    /// Asks for what the plan is made of; [`Agent::reserved`] waits for the answer.
    pub(crate) fn reserve(&mut self, reserve: Reserve) -> Result<(), AgentError> {
        self.tell(&Request::Reserve(reserve))
    }

    pub(crate) fn reserved(&mut self) -> Result<Reservation, AgentError> {
        match self.hear()? {
            Reply::Reserved(reservation) => Ok(reservation),
            other => Err(unexpected(other)),
        }
    }

    /// Says that the wiring stands; [`Agent::committed`] waits for the answer.
    pub(crate) fn commit(&mut self, commit: Commit) -> Result<(), AgentError> {
        self.tell(&Request::Commit(commit))
    }

    pub(crate) fn committed(&mut self) -> Result<(), AgentError> {
        self.acknowledged()
    }

    /// Any request that is answered by a plain `Done`.
    pub(crate) fn done(&mut self, request: &Request) -> Result<(), AgentError> {
        self.tell(request)?;
        self.acknowledged()
    }

    fn acknowledged(&mut self) -> Result<(), AgentError> {
        match self.hear()? {
            Reply::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    fn tell(&mut self, request: &Request) -> Result<(), AgentError> {
        Ok(protocol::write_frame(self.0.get_mut(), request)?)
    }

    fn hear(&mut self) -> Result<Reply, AgentError> {
        Ok(protocol::read_frame(&mut self.0)?)
    }
}

fn unexpected(reply: Reply) -> AgentError {
    match reply {
        Reply::Failed(failure) => AgentError::Refused(failure),
        Reply::Done | Reply::Reserved(_) => AgentError::OutOfTurn,
    }
}

fn connect_once(path: &Path) -> Result<OwnedFd, AgentError> {
    let absent = AgentError::Absent;
    // Non-blocking, so that a full queue answers EAGAIN instead of holding us.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(absent)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path).map_err(absent)?).map_err(absent)?;
    let uid = getsockopt(&fd, PeerCredentials).map_err(absent)?.uid();
    // The pid would prove nothing: it may be of another namespace, or reused.
    if uid == 0 {
        Ok(fd)
    } else {
        Err(AgentError::Untrusted(format!("the listener runs as uid {uid}: expected 0")))
    }
}

/// Refuses a directory in which others than root could put a socket of their own. Tightening it is the agent's part.
fn trusted_dir(socket: &Path) -> Result<(), AgentError> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    let meta = match fs::symlink_metadata(dir) {
        Ok(meta) => meta,
        Err(e) => return Err(AgentError::Absent(Errno::from_raw(e.raw_os_error().unwrap_or_default()))),
    };
    if meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0 {
        return Ok(());
    }
    let found = if meta.is_symlink() {
        "a symbolic link".to_owned()
    } else {
        format!("owned by uid {} with mode {:o}", meta.uid(), meta.mode() & 0o7777)
    };
    Err(AgentError::Untrusted(format!(
        "directory {} is {found}: expected a directory of root that others cannot write",
        dir.display()
    )))
}

/// Whether this process is not the host's root, nor that of a namespace with a file system of its own: in a user namespace
/// of somebody's without rights (user_namespaces(7)) `/` belongs to nobody, and an agent of root's is out of reach. One that
/// runs in there too has a directory that belongs to the namespace's root.
fn is_rootless(socket: &Path) -> bool {
    let of_root = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.uid() == 0);
    let dir = socket.parent().unwrap_or(Path::new("/"));
    !nix::unistd::geteuid().is_root() || !of_root(Path::new("/")) && !of_root(dir)
}

/// Makes the directory of the socket as the agent would, for a DEL that comes before the agent's first start.
pub(crate) fn ensure_dir(socket: &Path) -> Result<(), AgentError> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(AgentError::Frame(e.into())),
        _ => trusted_dir(socket),
    }
}

/// A stream whose every read and write ends at the deadline.
struct Stream {
    fd: OwnedFd,
    deadline: Instant,
}

impl Stream {
    fn wait(&self, events: PollFlags) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.fd.as_fd(), events)], timeout) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::read(&self.fd, buffer) {
                Err(Errno::EAGAIN | Errno::EINTR) => self.wait(PollFlags::POLLIN)?,
                Err(Errno::ECONNRESET) => return Ok(0),
                other => return Ok(other?),
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::write(&self.fd, bytes) {
                Err(Errno::EAGAIN | Errno::EINTR) => self.wait(PollFlags::POLLOUT)?,
                // The answer that explains the hang-up may still be there to read.
                Err(Errno::EPIPE) => return Ok(bytes.len()),
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
