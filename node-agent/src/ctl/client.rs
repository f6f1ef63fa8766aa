//! One HTTP/1.0 request over the admin socket: the server closes after its answer, so there is no framing to follow.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

/// A status with thousands of peers is a few megabytes.
const MAX_ANSWER: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "weftd does not answer at {}: {error}\n\
         Is it running (systemctl status weftd)? If it has another --run-dir or --admin-socket, say so with --socket FILE or WEFT_SOCKET",
        socket.display()
    )]
    Unreachable { socket: PathBuf, error: io::Error },
    #[error("weftd at {} stopped answering: {error}", socket.display())]
    Broken { socket: PathBuf, error: io::Error },
    #[error("permission denied at {}: only root may ask weftd (try sudo weftctl)", socket.display())]
    Denied { socket: PathBuf },
    /// The agent understood and says no.
    #[error("{0}")]
    Refused(String),
    /// The agent has not heard yet what was asked for.
    #[error("{0}")]
    NotKnown(String),
    #[error("weftd at {} gave an answer that this weftctl does not understand ({what}): are both of one version?", socket.display())]
    Foreign { socket: PathBuf, what: String },
}

impl ClientError {
    /// A refused request names something that does not exist: usage.
    pub(super) fn exit_status(&self) -> u8 {
        if matches!(self, Self::Refused(_)) { 2 } else { 1 }
    }
}

/// Sends a request without a body and reads the JSON of its answer.
pub(super) fn request<T: DeserializeOwned>(
    socket: &Path,
    method: &str,
    path: &str,
    deadline: Duration,
) -> Result<T, ClientError> {
    let path_of = || socket.to_owned();
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => ClientError::Denied { socket: path_of() },
        _ => ClientError::Unreachable { socket: path_of(), error },
    })?;
    let answer = exchange(&mut stream, method, path, deadline)
        .map_err(|error| ClientError::Broken { socket: path_of(), error })?;
    let foreign = |what: String| ClientError::Foreign { socket: path_of(), what };
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| foreign("no HTTP".to_owned()))?;
    match head.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok()) {
        Some(200) => serde_json::from_str(body).map_err(|e| foreign(e.to_string())),
        Some(400..500) => Err(ClientError::Refused(body.trim_end().to_owned())),
        _ => Err(foreign(head.lines().next().unwrap_or_default().to_owned())),
    }
}

fn exchange(stream: &mut UnixStream, method: &str, path: &str, deadline: Duration) -> io::Result<String> {
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))?;
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: weftd\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {deadline:?}"))
        }
        _ => e,
    })?;
    Ok(answer)
}

/// Percent-encodes a query's value (RFC 3986, section 2.1).
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => escaped.push(byte as char),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}
