//! inotify(7) on tokio's reactor. The one island of unsafe code that this takes.

use std::io;

use inotify::Inotify;
use tokio::io::unix::AsyncFd;

/// A new instance that watches nothing yet and becomes readable with its first event.
#[expect(unsafe_code, reason = "tokio cannot know that the descriptor stays the same one")]
pub(crate) fn open() -> io::Result<AsyncFd<Inotify>> {
    let inotify = Inotify::init()?;
    // SAFETY: `Inotify` owns its descriptor, names the same one for as long as it lives, and closes it when dropped.
    Ok(unsafe { AsyncFd::register(inotify) }?)
}
