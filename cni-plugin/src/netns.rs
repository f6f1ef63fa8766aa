//! The container's network namespace: opened once, checked, then used only through its descriptor, so that nothing
//! can be put in its place between the check and the use.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, PROC_SUPER_MAGIC, fstatfs};

use crate::sys;

/// The calling thread's own namespace. `/proc/self` would be the process's first thread's.
const OWN: &str = "/proc/thread-self/ns/net";

#[derive(Debug)]
pub(crate) struct Netns(File);

#[derive(Debug, thiserror::Error)]
pub(crate) enum NetnsError {
    #[error("{0}")]
    Open(#[from] io::Error),
    #[error("not a network namespace")]
    Other,
    #[error("the host's own network namespace: expected the container's")]
    Own,
}

impl Netns {
    /// Opens a namespace that is not the caller's own, unless `own_is_fine`.
    pub(crate) fn open(path: &str, own_is_fine: bool) -> Result<Self, NetnsError> {
        // A FIFO in its place must not hold the runtime up.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let filesystem = fstatfs(&file).map_err(io::Error::from)?.filesystem_type();
        // Before Linux 3.19 the files lay in proc itself; a directory or pipe of proc fails the next question.
        if filesystem != NSFS_MAGIC && filesystem != PROC_SUPER_MAGIC {
            return Err(NetnsError::Other);
        }
        if !sys::is_netns(file.as_fd()) {
            return Err(NetnsError::Other);
        }
        let (theirs, ours) = (file.metadata()?, std::fs::metadata(OWN)?);
        if !own_is_fine && (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
            return Err(NetnsError::Own);
        }
        Ok(Self(file))
    }

    /// Runs `work` with the calling thread inside.
    pub(crate) fn enter<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let home = File::open(OWN)?;
        setns(&self.0, CloneFlags::CLONE_NEWNET)?;
        let result = work();
        setns(&home, CloneFlags::CLONE_NEWNET)?;
        result
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
