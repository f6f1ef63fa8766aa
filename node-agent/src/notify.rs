//! systemd's readiness protocol (sd_notify(3)): one datagram to the socket named in `NOTIFY_SOCKET`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `state`, such as `READY=1`, if anybody wants to know.
pub fn notify(socket: Option<&OsStr>, state: &str) -> io::Result<()> {
    let Some(path) = socket.filter(|s| !s.is_empty()) else {
        return Ok(());
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_datagram_to_whoever_asked() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).expect("bind");
        notify(Some(path.as_os_str()), "READY=1").expect("notify");
        let mut buffer = [0; 32];
        let length = systemd.recv(&mut buffer).expect("a datagram");
        assert_eq!(&buffer[..length], b"READY=1");
        notify(None, "READY=1").expect("nobody asked");
        assert!(notify(Some(dir.path().join("gone").as_os_str()), "READY=1").is_err());
    }
}
