//! A real etcd in the underlay's namespace, as an operator of flannel runs it.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::Netns;
use crate::wait::eventually;

/// flannel's default.
pub const PREFIX: &str = "/coreos.com/network";
const PORT: u16 = 2379;

#[derive(Debug)]
pub struct Etcd {
    netns: Netns,
    address: Ipv4Addr,
    dir: PathBuf,
    child: Option<Child>,
}

impl Etcd {
    /// Starts a member whose data lies in `dir`, and waits until it serves.
    pub fn start(netns: &Netns, address: Ipv4Addr, dir: &Path) -> Result<Self> {
        let mut etcd = Self { netns: netns.clone(), address, dir: dir.to_owned(), child: None };
        etcd.resume()?;
        Ok(etcd)
    }

    /// Starts it again on the data that is there.
    pub fn resume(&mut self) -> Result<()> {
        let client = self.endpoint();
        let peer = format!("http://{}:2380", self.address);
        let log = File::options().create(true).append(true).open(self.dir.join("etcd.log"))?;
        let mut command = Command::new("setsid");
        command.args(["etcd", "--name=s1", "--logger=zap", "--log-level=warn"]);
        command.arg(format!("--data-dir={}", self.dir.join("data").display()));
        for (flag, url) in [
            ("--listen-client-urls", &client),
            ("--advertise-client-urls", &client),
            ("--listen-peer-urls", &peer),
            ("--initial-advertise-peer-urls", &peer),
        ] {
            command.arg(format!("{flag}={url}"));
        }
        command.arg(format!("--initial-cluster=s1={peer}"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(self.netns.spawn(&mut command).context("package etcd-server")?);
        eventually("etcd to serve", Duration::from_secs(20), || {
            self.ctl(&["endpoint", "health"])?;
            Ok(true)
        })?;
        Ok(())
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}:{PORT}", self.address)
    }

    /// `kill -9`: what is committed is on disk.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL)?;
            child.wait()?;
        }
        Ok(())
    }

    /// `etcdctl` in the underlay: an independent reader and writer.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new("etcdctl");
        command.env_remove("ETCDCTL_ENDPOINTS").env("ETCDCTL_API", "3");
        command
            .args(["--endpoints", &self.endpoint(), "--dial-timeout=2s", "--command-timeout=3s"])
            .args(args);
        self.netns.run(&mut command)
    }

    pub fn put_config(&self, json: &str) -> Result<()> {
        self.ctl(&["put", &format!("{PREFIX}/config"), json])?;
        Ok(())
    }

    /// The leases' keys, without the prefix: `10.5.52.0-24`.
    pub fn lease_keys(&self) -> Result<Vec<String>> {
        let prefix = format!("{PREFIX}/subnets/");
        let keys = self.ctl(&["get", &prefix, "--prefix", "--keys-only"])?;
        Ok(keys.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect())
    }

    pub fn delete_lease(&self, key: &str) -> Result<()> {
        self.ctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
        Ok(())
    }

    /// Leaves it running when this value goes.
    pub fn detach(mut self) {
        self.child = None;
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
