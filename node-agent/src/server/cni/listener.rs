//! The socket as a file: a directory of ours alone, one agent at a time, and no moment in which it is open to others.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc::{O_DIRECTORY, O_NOFOLLOW};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};
use weft_shared::deadline::TOMBSTONE_LOCK;
use weft_shared::tombstone;

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("{path} is answered by another weftd: stop that one, or give this one another socket")]
    InUse { path: PathBuf },
    #[error("{path} is {found}: expected {expected}")]
    Unsafe { path: PathBuf, found: String, expected: &'static str },
    #[error("{path} has been locked by a plugin for {seconds} s: expected a moment")]
    Locked { path: PathBuf, seconds: u64 },
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
}

impl BindError {
    pub(super) fn io(path: &Path, error: io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }
}

/// A node's pods may all start at once; a plugin beyond that waits in connect.
const BACKLOG: u32 = 1024;

#[derive(Debug)]
pub(super) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file: what we may remove.
    identity: (u64, u64),
}

/// Makes the socket's directory, or makes sure of it, through one descriptor: what was looked at is what is changed.
pub(super) fn secure_directory(socket: &Path, uid: u32) -> Result<(), BindError> {
    let dir = socket.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let io = |error| BindError::io(dir, error);
    if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(dir)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(io(error));
    }
    let refuse = |found: &str| BindError::Unsafe {
        path: dir.to_owned(),
        found: found.to_owned(),
        expected: "a directory that belongs to root, not a symbolic link",
    };
    if fs::symlink_metadata(dir).map_err(io)?.is_symlink() {
        return Err(refuse("a symbolic link"));
    }
    let opened =
        OpenOptions::new().read(true).custom_flags(O_DIRECTORY | O_NOFOLLOW).open(dir).map_err(io)?;
    let found = opened.metadata().map_err(io)?;
    if found.uid() != uid {
        return Err(refuse(&format!("owned by uid {}", found.uid())));
    }
    if found.mode() & 0o7777 != 0o700 {
        info!(path = %dir.display(), mode = format!("{:o}", found.mode() & 0o7777), "directory closed to others");
        opened.set_permissions(Permissions::from_mode(0o700)).map_err(io)?;
    }
    Ok(())
}

/// The exclusive lock, waited for in bounded time.
pub(super) async fn lock_tombstones(dir: &Path) -> Result<File, BindError> {
    let file = tombstone::lock_file(dir).map_err(|e| BindError::io(dir, e))?;
    let patience = Instant::now() + TOMBSTONE_LOCK;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(BindError::io(dir, error)),
            Err(TryLockError::WouldBlock) if Instant::now() > patience => {
                let path = dir.join("lock");
                return Err(BindError::Locked { path, seconds: TOMBSTONE_LOCK.as_secs() });
            }
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A socket that somebody answers is another agent's; a dead one's is replaced.
pub(super) async fn refuse_live(path: &Path) -> Result<(), BindError> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| BindError::io(path, e))?,
    };
    if !found.file_type().is_socket() {
        return Err(BindError::Unsafe {
            path: path.to_owned(),
            found: "there and no socket".to_owned(),
            expected: "nothing, or the socket of an agent that is gone",
        });
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full backlog is a live agent's.
        Ok(_) => Err(BindError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(BindError::InUse { path: path.to_owned() })
        }
        Err(error) => Err(BindError::io(path, error)),
    }
}

impl Listener {
    /// Bound under another name, closed to others, then renamed: whoever finds the socket finds it finished.
    pub(super) fn bind(path: &Path) -> Result<Self, BindError> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        let io = |error| BindError::io(&temporary, error);
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        let socket = UnixSocket::new_stream().map_err(io)?;
        socket.bind(&temporary).map_err(io)?;
        fs::set_permissions(&temporary, Permissions::from_mode(0o600)).map_err(io)?;
        let listener = socket.listen(BACKLOG).map_err(io)?;
        let found = fs::symlink_metadata(&temporary).map_err(io)?;
        fs::rename(&temporary, path).map_err(|e| BindError::io(path, e))?;
        Ok(Self { listener, path: path.to_owned(), identity: (found.dev(), found.ino()) })
    }

    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    /// Stops listening. The file goes only if it is ours still: a successor may have put its own there.
    pub(super) fn close(self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|f| (f.dev(), f.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "socket not removed");
        }
    }
}
