//! A directory below `/run` that holds everything a lab or a test makes: mounted namespaces, sockets, logs, stores.
//!
//! What is to be torn down is read from the directory and from the kernel, never from a record that a killed maker may
//! not have finished: a process is ours when its network namespace is one that is mounted here.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use crate::netns::Netns;
use crate::wait::{eventually, until_ok};

/// Beds of tests lie here, each named by the process that made it.
const TEST_BEDS: &str = "/run/weft-e2e";

static TEST_BEDS_TURN: Mutex<()> = Mutex::new(());

#[derive(Debug)]
pub struct Bed {
    root: PathBuf,
    /// Held for as long as somebody is making or using the bed.
    _lock: Flock<File>,
    keep: bool,
}

impl Bed {
    /// Makes the directory, which must not exist.
    pub fn create(root: &Path) -> Result<Self> {
        if !Uid::effective().is_root() {
            bail!("network namespaces need root: run this as root or with sudo");
        }
        fs::create_dir(root).with_context(|| format!("make {}", root.display()))?;
        let lock = lock(root)?.with_context(|| format!("{} is in use", root.display()))?;
        fs::create_dir(root.join("netns"))?;
        Ok(Self { root: root.to_owned(), _lock: lock, keep: false })
    }

    /// A bed for one test. Beds that killed test processes left behind are torn down first.
    pub fn for_test() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        // One test at a time: the last bed to go takes the directory along.
        let _turn = TEST_BEDS_TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let beds = Path::new(TEST_BEDS);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            sweep_dead(beds)?;
        }
        let root = beds.join(format!("{}-{number}", std::process::id()));
        until_ok("a bed", Duration::from_secs(60), || {
            fs::create_dir_all(beds)?;
            match Self::create(&root) {
                // Another process, whose last bed went just now, has taken the directory along.
                Err(error) if is_not_found(&error) => Err(error),
                made => Ok(made),
            }
        })?
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn netns(&self, name: &str) -> Result<Netns> {
        Netns::create(&netns_path(&self.root, name))
    }

    /// A directory inside, made if need be.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }

    /// The same on a file system in memory, as what lies below `/run` does on a host. It goes with the bed.
    pub fn dir_in_memory(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir(name)?;
        mount(Some("weft-bed"), &dir, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .with_context(|| format!("tmpfs on {}", dir.display()))?;
        Ok(dir)
    }

    /// Leaves everything standing when this value goes: the lab outlives its maker.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = remove_all(&self.root) {
            eprintln!("teardown of {}: {error:#}", self.root.display());
        }
        let _turn = TEST_BEDS_TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails while other beds lie there.
        let _ = fs::remove_dir(TEST_BEDS);
    }
}

/// Where the namespace `name` of the bed at `root` is mounted.
pub fn netns_path(root: &Path, name: &str) -> PathBuf {
    root.join("netns").join(name)
}

/// Ends every process of the bed, unmounts its namespaces, removes the directory. Refused while its maker is at work.
pub fn teardown(root: &Path) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(root) else { return Ok(()) };
    if !metadata.is_dir() {
        bail!("{} is not a directory: something else made it", root.display());
    }
    let Some(_lock) = lock(root)? else {
        bail!("{} is being made or used by another process: end that first", root.display())
    };
    remove_all(root)
}

/// Tears down the beds whose makers live no more.
fn sweep_dead(beds: &Path) -> Result<()> {
    let entries = match fs::read_dir(beds) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let maker = path.file_name().and_then(|n| n.to_str()?.split('-').next()?.parse::<i32>().ok());
        if maker.is_none_or(|pid| kill(Pid::from_raw(pid), None).is_err()) {
            // Another test process may be at it as well.
            if let Err(error) = teardown(&path) {
                eprintln!("what a killed test left at {}: {error:#}", path.display());
            }
        }
    }
    Ok(())
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn lock(root: &Path) -> Result<Option<Flock<File>>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(root.join("lock"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(e).with_context(|| format!("lock {}", root.display())),
    }
}

fn remove_all(root: &Path) -> Result<()> {
    let mounted: Vec<Netns> = match fs::read_dir(root.join("netns")) {
        Ok(entries) => entries.map(|e| Ok(Netns::at(&e?.path()))).collect::<io::Result<_>>()?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e.into()),
    };
    let namespaces = mounted.iter().map(|netns| namespace_of(netns.path()));
    // A link that leads nowhere is nobody's namespace; tests make such, to be found by what they test.
    let there = namespaces.filter(|found| !matches!(found, Err(e) if e.kind() == io::ErrorKind::NotFound));
    let ours = there.collect::<io::Result<BTreeSet<_>>>()?;
    // A process may fork between the look and the signal; what is born is found by the next look.
    eventually("processes of the bed to end", Duration::from_secs(60), || {
        let alive = processes_in(&ours)?;
        for pid in &alive {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        Ok(alive.is_empty())
    })?;
    for netns in mounted {
        netns.remove()?;
    }
    unmount_below(root)?;
    fs::remove_dir_all(root).with_context(|| format!("remove {}", root.display()))
}

/// What [`Bed::dir_in_memory`] has made, by the kernel's own list (proc_pid_mountinfo(5)).
fn unmount_below(root: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split_whitespace().nth(4)).map(Path::new);
    for point in points.filter(|point| point.starts_with(root) && *point != root) {
        umount2(point, MntFlags::MNT_DETACH).with_context(|| format!("unmount {}", point.display()))?;
    }
    Ok(())
}

/// Device and inode of an nsfs file: the namespace's identity for as long as it is mounted (namespaces(7)).
fn namespace_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|m| (m.dev(), m.ino()))
}

fn processes_in(namespaces: &BTreeSet<(u64, u64)>) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Gone meanwhile, or a zombie: neither holds a namespace.
        let Ok(namespace) = namespace_of(&entry.path().join("ns/net")) else { continue };
        if namespaces.contains(&namespace) && pid != std::process::id() as i32 {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}
