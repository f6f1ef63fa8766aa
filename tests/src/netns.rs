//! A network namespace kept alive by a bind mount (network_namespaces(7)), at a path of our own choosing.
//!
//! Not below `/run/netns`: `ip netns add` turns that directory into a shared mount, which would stay behind on a host
//! that had none. Code enters a namespace on a thread made for it and lost with it, so no thread ever comes back
//! changed; a process started from there is born in the namespace.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::{fmt, panic, thread};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Netns {
    path: PathBuf,
}

impl Netns {
    /// Makes a new namespace, its loopback up, and mounts it on `path`, which must not exist.
    pub fn create(path: &Path) -> Result<Self> {
        let kind = || format!("make network namespace {}", path.display());
        File::create_new(path).with_context(kind)?;
        let mounted = on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare: root is needed")?;
            mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .context("bind mount")
        });
        if mounted.is_err() {
            let _ = fs::remove_file(path);
        }
        mounted.with_context(kind)?;
        let netns = Self::at(path);
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The namespace that an earlier [`Netns::create`] mounted on `path`.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name by which people know it: the last component of its path.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(OsStr::to_str).unwrap_or("?")
    }

    /// Runs `f` inside, on a thread of its own. Sockets opened there stay in the namespace wherever they are used.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_own_thread(|| {
            let file = File::open(&self.path)?;
            setns(file, CloneFlags::CLONE_NEWNET)?;
            f()
        })
        .with_context(|| format!("in network namespace {}", self.name()))
    }

    /// Starts a process inside.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        // Not the whole command: its environment would come along.
        self.enter(|| command.spawn().with_context(|| format!("start {:?}", command.get_program())))
    }

    /// Runs a process inside to its end, whatever that is.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.enter(|| command.output().with_context(|| format!("run {command:?}")))
    }

    /// Runs a process inside that must succeed, and returns what it wrote to stdout.
    pub fn run(&self, command: &mut Command) -> Result<String> {
        let output = self.output(command)?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("in {}: {command:?}: {}: {}", self.name(), output.status, stderr.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `ip` with the words of `args`: the harness's foreign hand and its independent reader.
    pub fn ip(&self, args: &str) -> Result<String> {
        self.run(Command::new("ip").args(args.split_whitespace()))
    }

    /// `bridge` with the words of `args`.
    pub fn bridge(&self, args: &str) -> Result<String> {
        self.run(Command::new("bridge").args(args.split_whitespace()))
    }

    /// Reads a file below `/proc/sys/net`, whose content depends on the reader's namespace.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = format!("/proc/sys/net/{key}");
        Ok(self.enter(|| fs::read_to_string(&path).context(path))?.trim().to_owned())
    }

    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.enter(|| fs::write(&path, value).context(path))
    }

    /// Takes the mount away; the kernel destroys the namespace when its last process and socket are gone.
    pub fn remove(&self) -> Result<()> {
        match umount2(&self.path, MntFlags::MNT_DETACH) {
            // Created and not mounted when its maker died.
            Ok(()) | Err(nix::Error::EINVAL) => {}
            Err(nix::Error::ENOENT) => return Ok(()),
            Err(e) => return Err(e).with_context(|| format!("unmount {}", self.path.display())),
        }
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn on_own_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(f).join().unwrap_or_else(|cause| panic::resume_unwind(cause)))
}
