//! The tombstones' exclusive lock (see [`weft_shared::tombstone`]), waited for in bounded time.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use weft_shared::deadline::TOMBSTONE_LOCK;
use weft_shared::tombstone;

use super::BindError;

pub(super) async fn lock_tombstones(dir: &Path) -> Result<File, BindError> {
    let io = |error| BindError::Tombstones { path: dir.to_owned(), error };
    let file = tombstone::lock_file(dir).map_err(io)?;
    let patience = Instant::now() + TOMBSTONE_LOCK;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(io(error)),
            Err(TryLockError::WouldBlock) if Instant::now() > patience => {
                return Err(BindError::Locked {
                    path: tombstone::lock_path(dir),
                    seconds: TOMBSTONE_LOCK.as_secs(),
                });
            }
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(20)).await,
        }
    }
}
