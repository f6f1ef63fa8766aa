//! The end of a child and what it has used: wait4(2), which neither the standard library nor nix has.
//!
//! The time is that of the child and of all children that it has waited for: a plugin that calls another pays for it. The
//! peak of its memory is the highest of either kind too, and of this process's as well: until it starts its program, a
//! child is a copy of what started it (fs/exec.c `exec_mmap`). Hence `launch`.
#![expect(unsafe_code, reason = "wait4")]

use std::io;
use std::mem::zeroed;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus};
use std::time::Duration;

use nix::libc;

#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    pub(super) status: ExitStatus,
    /// In user and in kernel mode.
    pub(super) cpu: Duration,
    pub(super) peak_kib: u64,
}

/// Waits for it. The value is spent: nobody can wait, or send a signal, a second time.
pub(super) fn reap(child: Child) -> io::Result<End> {
    let mut status = 0;
    // SAFETY: zeroes are a valid value of this plain C structure.
    let mut usage: libc::rusage = unsafe { zeroed() };
    loop {
        // SAFETY: both places outlive the call, and the child has not been waited for.
        if unsafe { libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage) } >= 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let time =
        |t: libc::timeval| Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64);
    Ok(End {
        status: ExitStatus::from_raw(status),
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        peak_kib: usage.ru_maxrss as u64,
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_end_of_a_child_has_its_childrens_time() -> io::Result<()> {
        // Not the last command: the shell would become it.
        let script = "sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'; exit 7";
        let end = reap(Command::new("sh").arg("-c").arg(script).spawn()?)?;
        assert_eq!(end.status.code(), Some(7));
        assert!(end.cpu >= Duration::from_millis(10) && end.peak_kib > 100, "{end:?}");
        Ok(())
    }
}
