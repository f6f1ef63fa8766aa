//! A listening socket as a file: a directory that nobody else writes to, one agent at a time, and no moment in which
//! the socket is open to others (unix(7): who may connect is a matter of the file's mode and of its directories').

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tracing::warn;

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("{path} is answered by another weftd: stop that one, or give this one another socket")]
    InUse { path: PathBuf },
    #[error("{path} is {found}: expected {expected}")]
    Unsafe { path: PathBuf, found: String, expected: &'static str },
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
}

/// A node's pods may all start at once; a client beyond that waits in connect.
const BACKLOG: u32 = 1024;

/// The agent's user.
pub(super) const ROOT: u32 = 0;

/// A socket and its file. Dropped without [`Socket::close`] the file stays, as after a crash.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// What may be removed when the socket is closed.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

/// Makes the socket's directory, or makes sure of it, by the rule that the plugin goes by as well: it is `uid`'s, and
/// nobody else writes to it. One that was there is not changed: it may be `/run`.
pub(super) fn secure_directory(socket: &Path, uid: u32) -> Result<(), SocketError> {
    let dir = socket.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let io = |error| SocketError::io(dir, error);
    if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(dir)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(io(error));
    }
    let meta = fs::symlink_metadata(dir).map_err(io)?;
    let found = if meta.is_symlink() {
        "a symbolic link".to_owned()
    } else if !meta.is_dir() {
        "there and no directory".to_owned()
    } else if meta.uid() != uid {
        format!("owned by uid {}", meta.uid())
    } else if meta.mode() & 0o022 != 0 {
        format!("open to others, mode {:o}", meta.mode() & 0o7777)
    } else {
        return Ok(());
    };
    let expected = "a directory that root alone writes to, not a symbolic link";
    Err(SocketError::Unsafe { path: dir.to_owned(), found, expected })
}

/// A socket that somebody answers is another agent's; a dead one's is replaced.
pub(super) async fn refuse_live(path: &Path) -> Result<(), SocketError> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| SocketError::io(path, e))?,
    };
    if !found.file_type().is_socket() {
        return Err(SocketError::Unsafe {
            path: path.to_owned(),
            found: "there and no socket".to_owned(),
            expected: "nothing, or the socket of an agent that is gone",
        });
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full backlog is a live agent's.
        Ok(_) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketError::InUse { path: path.to_owned() })
        }
        Err(error) => Err(SocketError::io(path, error)),
    }
}

/// The name that a socket has until it is finished.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

impl Socket {
    /// Bound under another name, closed to others, then renamed: whoever finds the socket finds it finished.
    pub(super) fn bind(path: &Path) -> Result<Self, SocketError> {
        let temporary = unfinished(path);
        let io = |error| SocketError::io(&temporary, error);
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        let socket = UnixSocket::new_stream().map_err(io)?;
        socket.bind(&temporary).map_err(io)?;
        fs::set_permissions(&temporary, Permissions::from_mode(0o600)).map_err(io)?;
        let listener = socket.listen(BACKLOG).map_err(io)?;
        let found = fs::symlink_metadata(&temporary).map_err(io)?;
        fs::rename(&temporary, path).map_err(|e| SocketError::io(path, e))?;
        let file = SocketFile { path: path.to_owned(), identity: (found.dev(), found.ino()) };
        Ok(Self { listener, file })
    }

    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    /// Whether whoever connects to the path comes here.
    pub(super) fn is_there(&self) -> bool {
        self.file.is_ours()
    }

    pub(super) fn close(self) {
        drop(self.listener);
        self.file.remove();
    }
}

impl SocketFile {
    fn is_ours(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|f| (f.dev(), f.ino()) == self.identity)
    }

    /// Only if it is ours still: a successor may have put its own there.
    pub(super) fn remove(&self) {
        if self.is_ours()
            && let Err(error) = fs::remove_file(&self.path)
        {
            warn!(path = %self.path.display(), %error, "socket not removed");
        }
    }
}

impl SocketError {
    fn io(path: &Path, error: io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }
}
