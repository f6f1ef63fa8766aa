//! The network configuration from stdin: bounded in length and in time. A runtime that never closes its end of the pipe
//! must not keep the plugin for ever: it gets an error in words.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read as read_some;
use weft_shared::cni::Code;
use weft_shared::protocol::Failure;

/// prevResult and a pod's annotations fit many times over.
const MAX_STDIN: usize = 1 << 20;

/// Everything up to the end of the stream.
pub(crate) fn read(stdin: BorrowedFd<'_>, deadline: Instant) -> Result<Vec<u8>, Failure> {
    let failed = |why: &dyn std::fmt::Display| {
        Failure::new(Code::Io, format!("cannot read the network configuration from stdin: {why}"))
    };
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stdin, PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(failed(&"it has not ended in time: expected the runtime to close it")),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(failed(&e.desc())),
        }
        match read_some(stdin, &mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(e) => return Err(failed(&e.desc())),
        }
        if bytes.len() > MAX_STDIN {
            let msg = format!("the network configuration on stdin is longer than {MAX_STDIN} bytes");
            return Err(Failure::new(Code::Decode, msg));
        }
    }
}
