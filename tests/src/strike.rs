//! `kill -9` at an exact place: after the Nth system call of a process, counted by ptrace(2).
//!
//! Between two system calls a process changes nothing that anybody else could see, so these are all the places there are:
//! strike at the first, the second, and on until a run ends before its turn.
//!
//! Each strike has a thread of its own: what ptrace(2) traces belongs to a thread, and is free again when that ends.
//! Nobody else may wait for the process meanwhile, or would be told of stops that are the tracer's.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

/// What `PTRACE_GETEVENTMSG` says at the end of a system call (linux/ptrace.h, `PTRACE_EVENTMSG_SYSCALL_EXIT`).
const SYSCALL_EXIT: libc::c_long = 2;
/// Tells the tracer to let go. Whoever it is sent to ignores it, but its tracer sees it.
const LET_GO: Signal = Signal::SIGWINCH;

/// Looked at first and taken afterwards: the end of the process is its parent's to take.
const ANY_CHANGE: WaitPidFlag = WaitPidFlag::WEXITED.union(WaitPidFlag::WSTOPPED).union(WaitPidFlag::WNOWAIT);

/// Where a process was killed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Counted from 1.
    pub call: u64,
    pub name: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "call {} ({})", self.call, self.name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Struck(Place),
    /// It ended by itself or was let go, after so many calls.
    Spared {
        calls: u64,
    },
}

/// A process whose system calls are counted, and that does not survive one of them.
#[derive(Debug)]
pub struct Strike {
    thread: JoinHandle<Result<End>>,
    leash: Leash,
}

/// Lets a process live that is not struck yet. Harmless when it was.
#[derive(Debug, Clone)]
pub struct Leash(Arc<Mutex<Option<Pid>>>);

/// The program, held before its first instruction until [`Strike::at_held`].
pub fn held(program: &Path) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "kill -STOP $$ && exec \"$0\""]).arg(program);
    command
}

impl Strike {
    /// Counts from the program's exec on, which is the first call. `child` is of [`held`].
    pub fn at_held(child: &Child, nth: u64) -> Result<Self> {
        Self::start(pid_of(child), nth, false)
    }

    /// Counts from now on, in all threads together.
    pub fn at_running(pid: Pid, nth: u64) -> Result<Self> {
        Self::start(pid, nth, true)
    }

    fn start(leader: Pid, nth: u64, counting: bool) -> Result<Self> {
        let leash = Leash(Arc::new(Mutex::new(Some(leader))));
        let (attached, wait) = mpsc::channel();
        let tracer = Tracer {
            leader,
            nth,
            counting,
            calls: 0,
            struck: None,
            letting_go: false,
            new: BTreeSet::new(),
            attached,
        };
        let thread = thread::Builder::new().name("strike".into()).spawn({
            let leash = leash.clone();
            move || {
                let end = tracer.run();
                // Whoever waits for this thread may collect the process, and its number be another's.
                leash.pid().take();
                end
            }
        })?;
        let strike = Self { thread, leash };
        match wait.recv() {
            Ok(()) => Ok(strike),
            Err(_) => {
                let end = strike.end()?;
                bail!("{leader} ended before it was traced: {end:?}")
            }
        }
    }

    pub fn leash(&self) -> Leash {
        self.leash.clone()
    }

    /// Waits until the process was struck, has ended or was let go. It is left to be collected by its parent.
    pub fn end(self) -> Result<End> {
        self.thread.join().map_err(|_| anyhow!("the tracer panicked"))?
    }
}

impl Leash {
    pub fn let_go(&self) -> Result<()> {
        match *self.pid() {
            Some(pid) => Ok(kill(pid, LET_GO)?),
            None => Ok(()),
        }
    }

    fn pid(&self) -> std::sync::MutexGuard<'_, Option<Pid>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Tracer {
    leader: Pid,
    nth: u64,
    counting: bool,
    calls: u64,
    struck: Option<Place>,
    letting_go: bool,
    /// Threads that have not stopped yet for the first time.
    new: BTreeSet<Pid>,
    /// Told when there is none of these any more.
    attached: mpsc::Sender<()>,
}

impl Tracer {
    fn run(mut self) -> Result<End> {
        self.attach().with_context(|| format!("attach to {}", self.leader))?;
        loop {
            let change = match wait_for(None, ANY_CHANGE) {
                Err(Errno::ECHILD) if self.letting_go => return Ok(self.result()),
                change => change?,
            };
            match change {
                WaitStatus::Exited(tid, _) | WaitStatus::Signaled(tid, ..) => {
                    if tid == self.leader {
                        return Ok(self.result());
                    }
                    wait_for(Some(tid), WaitPidFlag::WEXITED)?;
                    self.is_attached(tid);
                }
                WaitStatus::PtraceSyscall(tid) => {
                    if take_stop(tid)? {
                        self.at_call(tid)?;
                    }
                }
                WaitStatus::PtraceEvent(tid, signal, event) => {
                    if take_stop(tid)? {
                        self.at_event(tid, signal, event)?;
                    }
                }
                other => bail!("{other:?} of a traced process"),
            }
        }
    }

    fn result(self) -> End {
        self.struck.map_or(End::Spared { calls: self.calls }, End::Struck)
    }

    /// Every thread there is; what these make from now on comes by itself.
    fn attach(&mut self) -> Result<()> {
        let options =
            Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACEEXEC;
        let mut seen = BTreeSet::new();
        loop {
            let before = seen.len();
            for tid in self.threads()? {
                if !seen.insert(tid) {
                    continue;
                }
                match ptrace::seize(tid, options).and_then(|()| ptrace::interrupt(tid)) {
                    Ok(()) => drop(self.new.insert(tid)),
                    // It has ended, or came from one that is traced already.
                    Err(Errno::ESRCH | Errno::EPERM) if tid != self.leader => {}
                    Err(e) => return Err(e.into()),
                }
            }
            if seen.len() == before {
                return Ok(());
            }
        }
    }

    fn is_attached(&mut self, tid: Pid) {
        if self.new.remove(&tid) && self.new.is_empty() {
            let _ = self.attached.send(());
        }
    }

    fn at_call(&mut self, tid: Pid) -> Result<()> {
        let at = match ptrace::getevent(tid) {
            Err(Errno::ESRCH) => return Ok(()),
            at => at?,
        };
        let counts = at == SYSCALL_EXIT && self.new.is_empty() && !self.letting_go;
        if counts && self.struck.is_none() {
            self.calls += 1;
            if self.calls == self.nth {
                self.struck = Some(Place { call: self.nth, name: self.name_of_call(tid) });
                kill(self.leader, Signal::SIGKILL)?;
                return Ok(());
            }
        }
        self.resume(tid, None)
    }

    fn at_event(&mut self, tid: Pid, signal: Signal, event: i32) -> Result<()> {
        self.is_attached(tid);
        match (event, signal) {
            (0, LET_GO) => {
                self.letting_go = true;
                // Each has to stop once more to be released.
                for task in self.threads()? {
                    let _ = ptrace::interrupt(task);
                }
                self.resume(tid, None)
            }
            // Of a held program: it is held no more.
            (0, Signal::SIGSTOP) => self.resume(tid, None),
            (libc::PTRACE_EVENT_STOP, Signal::SIGSTOP) => {
                self.resume(tid, None)?;
                Ok(kill(self.leader, Signal::SIGCONT)?)
            }
            (0, _) => self.resume(tid, Some(signal)),
            (event, _) => {
                self.counting |= event == libc::PTRACE_EVENT_EXEC;
                self.resume(tid, None)
            }
        }
    }

    fn resume(&self, tid: Pid, signal: Option<Signal>) -> Result<()> {
        let resumed = if self.letting_go {
            ptrace::detach(tid, signal)
        } else if self.counting {
            ptrace::syscall(tid, signal)
        } else {
            ptrace::cont(tid, signal)
        };
        match resumed {
            // Killed meanwhile.
            Err(Errno::ESRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    fn threads(&self) -> Result<Vec<Pid>> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.leader))?;
        tasks.map(|task| Ok(Pid::from_raw(task?.file_name().to_string_lossy().parse()?))).collect()
    }

    /// Of the call that it has just done (proc_pid_syscall(5)).
    fn name_of_call(&self, tid: Pid) -> String {
        let path = format!("/proc/{}/task/{tid}/syscall", self.leader);
        let line = std::fs::read_to_string(path).unwrap_or_default();
        let number = line.split_whitespace().next().and_then(|word| word.parse().ok());
        number.map_or_else(|| "?".to_owned(), name_of)
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

/// Waits for one of this thread's own tracees, or for the one that is named.
fn wait_for(tid: Option<Pid>, flags: WaitPidFlag) -> nix::Result<WaitStatus> {
    let flags = flags | WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    loop {
        match waitid(tid.map_or(Id::All, Id::Pid), flags) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// Whether the thread still stands where it was seen, and was not killed there.
fn take_stop(tid: Pid) -> Result<bool> {
    match wait_for(Some(tid), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG) {
        Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => Ok(false),
        taken => Ok(taken.map(|_| true)?),
    }
}

/// The names of those calls that weft's programs make; another is told by its number.
fn name_of(number: libc::c_long) -> String {
    macro_rules! names {
        ($($call:ident => $name:literal,)*) => {
            match number {
                $(libc::$call => $name.to_owned(),)*
                number => format!("system call {number}"),
            }
        };
    }
    names! {
        SYS_accept4 => "accept4",
        SYS_access => "access",
        SYS_alarm => "alarm",
        SYS_arch_prctl => "arch_prctl",
        SYS_bind => "bind",
        SYS_brk => "brk",
        SYS_chdir => "chdir",
        SYS_clock_gettime => "clock_gettime",
        SYS_clock_nanosleep => "clock_nanosleep",
        SYS_clone => "clone",
        SYS_clone3 => "clone3",
        SYS_close => "close",
        SYS_connect => "connect",
        SYS_dup => "dup",
        SYS_epoll_create1 => "epoll_create1",
        SYS_epoll_ctl => "epoll_ctl",
        SYS_epoll_pwait => "epoll_pwait",
        SYS_epoll_wait => "epoll_wait",
        SYS_eventfd2 => "eventfd2",
        SYS_execve => "execve",
        SYS_exit => "exit",
        SYS_fchmod => "fchmod",
        SYS_fchmodat => "fchmodat",
        SYS_fcntl => "fcntl",
        SYS_fdatasync => "fdatasync",
        SYS_flock => "flock",
        SYS_fstat => "fstat",
        SYS_fstatfs => "fstatfs",
        SYS_fsync => "fsync",
        SYS_ftruncate => "ftruncate",
        SYS_futex => "futex",
        SYS_getdents64 => "getdents64",
        SYS_getegid => "getegid",
        SYS_geteuid => "geteuid",
        SYS_getgid => "getgid",
        SYS_getpid => "getpid",
        SYS_getrandom => "getrandom",
        SYS_getsockname => "getsockname",
        SYS_getsockopt => "getsockopt",
        SYS_gettid => "gettid",
        SYS_getuid => "getuid",
        SYS_inotify_add_watch => "inotify_add_watch",
        SYS_inotify_init1 => "inotify_init1",
        SYS_ioctl => "ioctl",
        SYS_listen => "listen",
        SYS_lseek => "lseek",
        SYS_lstat => "lstat",
        SYS_madvise => "madvise",
        SYS_membarrier => "membarrier",
        SYS_mkdir => "mkdir",
        SYS_mkdirat => "mkdirat",
        SYS_mmap => "mmap",
        SYS_mprotect => "mprotect",
        SYS_mremap => "mremap",
        SYS_munmap => "munmap",
        SYS_nanosleep => "nanosleep",
        SYS_newfstatat => "newfstatat",
        SYS_open => "open",
        SYS_openat => "openat",
        SYS_pipe2 => "pipe2",
        SYS_poll => "poll",
        SYS_ppoll => "ppoll",
        SYS_prctl => "prctl",
        SYS_pread64 => "pread64",
        SYS_pwrite64 => "pwrite64",
        SYS_read => "read",
        SYS_readlink => "readlink",
        SYS_readv => "readv",
        SYS_recvfrom => "recvfrom",
        SYS_recvmmsg => "recvmmsg",
        SYS_recvmsg => "recvmsg",
        SYS_rename => "rename",
        SYS_renameat => "renameat",
        SYS_rmdir => "rmdir",
        SYS_rt_sigaction => "rt_sigaction",
        SYS_rt_sigprocmask => "rt_sigprocmask",
        SYS_rt_sigreturn => "rt_sigreturn",
        SYS_sched_getaffinity => "sched_getaffinity",
        SYS_sched_yield => "sched_yield",
        SYS_sendmmsg => "sendmmsg",
        SYS_sendmsg => "sendmsg",
        SYS_sendto => "sendto",
        SYS_set_robust_list => "set_robust_list",
        SYS_set_tid_address => "set_tid_address",
        SYS_setitimer => "setitimer",
        SYS_setns => "setns",
        SYS_setsockopt => "setsockopt",
        SYS_sigaltstack => "sigaltstack",
        SYS_socket => "socket",
        SYS_socketpair => "socketpair",
        SYS_stat => "stat",
        SYS_statx => "statx",
        SYS_symlink => "symlink",
        SYS_umask => "umask",
        SYS_uname => "uname",
        SYS_unlink => "unlink",
        SYS_unlinkat => "unlinkat",
        SYS_unshare => "unshare",
        SYS_wait4 => "wait4",
        SYS_write => "write",
        SYS_writev => "writev",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn a_program_is_struck_at_each_of_its_calls_until_there_are_no_more() {
        let mut names = Vec::new();
        let calls = loop {
            let mut child = held(Path::new("/bin/true")).spawn().expect("start");
            let nth = names.len() as u64 + 1;
            let end = Strike::at_held(&child, nth).expect("traced").end().expect("an end");
            let status = child.wait().expect("collected");
            match end {
                End::Struck(place) => {
                    assert_eq!((place.call, status.signal()), (nth, Some(Signal::SIGKILL as i32)));
                    names.push(place.name);
                }
                End::Spared { calls } => {
                    assert!(status.success(), "{status}");
                    break calls;
                }
            }
        };
        assert_eq!(names[0], "execve");
        assert_eq!(names.len() as u64, calls, "{names:?}");
    }

    #[test]
    fn a_process_that_is_let_go_lives_on() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("start");
        for _ in 0..2 {
            let strike = Strike::at_running(pid_of(&child), u64::MAX).expect("traced");
            strike.leash().let_go().expect("told");
            assert!(matches!(strike.end().expect("an end"), End::Spared { .. }));
            assert!(child.try_wait().expect("asked").is_none(), "it has ended");
        }
        child.kill().expect("killed");
        child.wait().expect("collected");
    }
}
