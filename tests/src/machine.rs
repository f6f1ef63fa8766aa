//! A node with a root of its own: a copy-on-write view of this machine's file system, so that packages, settings and
//! services are installed for real, and nothing of it is left when the node goes.
//!
//! An overlay (kernel: Documentation/filesystems/overlayfs.rst) over `/`, its upper layer on tmpfs, in a mount
//! namespace of the first process of a PID namespace: with that process everything ends that was started there, containers
//! too. cgroups and devices stay the host's. There is no systemd:
//! `systemctl` is a stand-in (systemctl.py) that starts what unit files say.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::netns::Netns;
use crate::wait::{SECOND, eventually};

/// What is written below the root is gone with the namespace; `$1` is the directory for it, `$2` the host's name.
const ROOT: &str = r#"
set -e
mount -t tmpfs -o mode=755 weft-e2e "$1"
mkdir "$1/upper" "$1/work" "$1/merged"
mount -t overlay weft-e2e -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/merged"
cd "$1/merged"
mount -t proc weft-e2e proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 weft-e2e run
mount -t tmpfs -o mode=1777 weft-e2e tmp
# The last one says that systemd runs (sd_booted(3)).
mkdir -p run/lock var/lib/containerd run/systemd/system
# An overlay cannot be the upper layer of another.
mount -t tmpfs -o mode=711 weft-e2e var/lib/containerd
hostname "$2"
echo "$2" >etc/hostname
pivot_root . .
umount -l .
cd /
: >/run/machine-is-up
exec sleep infinity
"#;

#[derive(Debug)]
pub struct Machine {
    pub name: String,
    pub netns: Netns,
    /// unshare(1), and its child, which is the machine's first process.
    holder: Child,
    first: u32,
}

impl Machine {
    /// `dir` is an empty directory of the bed's.
    pub fn start(netns: &Netns, dir: &Path, name: &str) -> Result<Self> {
        // Of no terminal's session: a lab outlives the one that started it.
        let mut command = Command::new("setsid");
        command.args(["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]);
        command.args(["--propagation", "private", "sh", "-c", ROOT, "machine"]).arg(dir).arg(name);
        // Nor does it hold what others read to its end.
        let log = File::create(dir.with_extension("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let holder = netns.spawn(&mut command)?;
        let mut machine = Self { name: name.to_owned(), netns: netns.clone(), holder, first: 0 };
        eventually(&format!("the root of {name}"), SECOND * 60, || {
            if let Some(status) = machine.holder.try_wait()? {
                let why = fs::read_to_string(dir.with_extension("log")).unwrap_or_default();
                bail!("it could not be made: {status}: {why}");
            }
            let id = machine.holder.id();
            let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
            machine.first = children.trim().parse().context("its first process")?;
            Ok(machine.path("/run/machine-is-up").exists())
        })?;
        machine.put("/usr/local/sbin/systemctl", include_bytes!("systemctl.py"))?;
        machine.sh("chmod 755 /usr/local/sbin/systemctl")?;
        Ok(machine)
    }

    /// The process that everything of the machine lives and ends with.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Where the machine's file lies, seen from here.
    pub fn path(&self, path: &str) -> PathBuf {
        path_below(self.first, path)
    }

    pub fn put(&self, path: &str, content: &[u8]) -> Result<()> {
        let path = self.path(path);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&path, content).with_context(|| path.display().to_string())
    }

    pub fn read(&self, path: &str) -> Result<String> {
        fs::read_to_string(self.path(path)).with_context(|| format!("{path} of {}", self.name))
    }

    pub fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.path(path)).is_ok()
    }

    /// Puts a file of the host's there.
    pub fn copy(&self, from: &Path, to: &str) -> Result<()> {
        fs::copy(from, self.path(to)).with_context(|| format!("{} to {to}", from.display()))?;
        Ok(())
    }

    /// Whatever becomes of a script, as root in a shell of the machine's; the first command that fails ends it.
    pub fn output(&self, script: &str) -> Result<Output> {
        let mut command = enter(self.first);
        command.args(["bash", "-euo", "pipefail", "-c", script]);
        command.env_clear().env("HOME", "/root").env("DEBIAN_FRONTEND", "noninteractive");
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.stdin(Stdio::null()).output().with_context(|| format!("on {}: {script}", self.name))
    }

    /// What a script prints, errors too, and whether it succeeded.
    pub fn try_sh(&self, script: &str) -> Result<(bool, String)> {
        let output = self.output(script)?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// What a script prints that must succeed.
    pub fn sh(&self, script: &str) -> Result<String> {
        let (well, text) = self.try_sh(script)?;
        if well { Ok(text) } else { bail!("on {}: {script}\n{text}", self.name) }
    }

    /// What a script prints that must fail.
    pub fn refused(&self, script: &str) -> Result<String> {
        let (well, text) = self.try_sh(script)?;
        if well { bail!("on {}: {script} succeeded\n{text}", self.name) } else { Ok(text) }
    }
}

/// Where the file of a machine with that first process lies.
pub fn path_below(first: u32, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{first}/root{path}"))
}

/// What runs its arguments on the machine with that first process.
pub fn enter(first: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &first.to_string(), "--mount", "--uts", "--pid", "--net", "--wdns=/root"]);
    command
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
