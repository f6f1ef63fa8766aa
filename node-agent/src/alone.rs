//! One agent per network namespace: two would mend each other's work for ever.
//!
//! An abstract socket's name (unix(7)) is taken per network namespace and goes with the process, however that ends.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// A process that was killed holds the name until the last of its threads has ended, and its parent may know before.
const GRACE: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_millis(5);

/// The place of this namespace's agent, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Place {
    _name: UnixDatagram,
}

const NAME: &str = "weftd";

/// `None`: somebody else has it.
pub(crate) fn take_place() -> io::Result<Option<Place>> {
    take(NAME)
}

/// The same, but waits for one that is about to end.
pub(crate) async fn wait_for_place() -> io::Result<Option<Place>> {
    wait_for(NAME).await
}

async fn wait_for(name: &str) -> io::Result<Option<Place>> {
    let end = Instant::now() + GRACE;
    loop {
        match take(name)? {
            None if Instant::now() < end => sleep(AGAIN).await,
            place => return Ok(place),
        }
    }
}

fn take(name: &str) -> io::Result<Option<Place>> {
    let name = SocketAddr::from_abstract_name(name)?;
    match UnixDatagram::bind_addr(&name) {
        Ok(name) => Ok(Some(Place { _name: name })),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_that_is_about_to_end_is_waited_for_and_one_that_stays_is_not() {
        let name = format!("weftd-alone-test-{}", std::process::id());
        let first = take(&name).expect("name").expect("free");
        let ending = tokio::spawn(async move {
            sleep(AGAIN * 4).await;
            drop(first);
        });
        let second = wait_for(&name).await.expect("name");
        assert!(second.is_some());
        ending.await.expect("ended");
        assert!(wait_for(&name).await.expect("name").is_none());
    }
}
