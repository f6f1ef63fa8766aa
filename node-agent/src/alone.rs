//! One agent per network namespace: two would mend each other's work for ever.
//!
//! An abstract socket's name (unix(7)) is taken per network namespace and goes with the process, however that ends.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The place of this namespace's agent, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Place {
    _name: UnixDatagram,
}

/// `None`: somebody else has it.
pub(crate) fn take_place() -> io::Result<Option<Place>> {
    let name = SocketAddr::from_abstract_name("weftd")?;
    match UnixDatagram::bind_addr(&name) {
        Ok(name) => Ok(Some(Place { _name: name })),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(e) => Err(e),
    }
}
