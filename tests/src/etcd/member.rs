//! One member: a process that is ended, started again, frozen and cut off from its like.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{PORT, Security};
use crate::netns::Netns;

const PEER_PORT: u16 = 2380;

#[derive(Debug)]
pub struct Member {
    pub name: String,
    pub netns: Netns,
    pub address: Ipv4Addr,
    dir: PathBuf,
    child: Option<Child>,
}

impl Member {
    pub(super) fn new(name: &str, netns: &Netns, address: Ipv4Addr, dir: &Path) -> Self {
        Self { name: name.to_owned(), netns: netns.clone(), address, dir: dir.to_owned(), child: None }
    }

    /// Starts it, unless it runs, without waiting for anything.
    pub(super) fn start(&mut self, cluster: &str, security: &Security) -> Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        let (client, peer) = (self.client_url(security), self.peer_url());
        let log = File::options().create(true).append(true).open(self.dir.join("etcd.log"))?;
        let mut command = Command::new("setsid");
        command.args(["etcd", "--logger=zap", "--log-level=warn", "--name", &self.name]);
        command.arg(format!("--data-dir={}", self.data().display()));
        for (flag, url) in [
            ("--listen-client-urls", &client),
            ("--advertise-client-urls", &client),
            ("--listen-peer-urls", &peer),
            ("--initial-advertise-peer-urls", &peer),
        ] {
            command.arg(format!("{flag}={url}"));
        }
        command.arg(format!("--initial-cluster={cluster}")).args(security.member_flags());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(self.netns.spawn(&mut command).context("package etcd-server")?);
        Ok(())
    }

    pub fn client_url(&self, security: &Security) -> String {
        format!("{}://{}:{PORT}", security.scheme(), self.address)
    }

    pub fn peer_url(&self) -> String {
        format!("http://{}:{PEER_PORT}", self.address)
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL)?;
            child.wait()?;
        }
        Ok(())
    }

    /// Cuts it off from the other members; whoever else talks to it goes on.
    pub fn isolate(&self) -> Result<()> {
        let rules = format!(
            "table inet cut {{
                chain in {{ type filter hook input priority 0; tcp dport {PEER_PORT} drop; tcp sport {PEER_PORT} drop; }}
                chain out {{ type filter hook output priority 0; tcp dport {PEER_PORT} drop; tcp sport {PEER_PORT} drop; }}
            }}"
        );
        self.netns.run(Command::new("nft").arg(rules))?;
        Ok(())
    }

    pub fn rejoin(&self) -> Result<()> {
        self.netns.run(Command::new("nft").args(["delete", "table", "inet", "cut"]))?;
        Ok(())
    }

    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(super) fn wipe(&self) -> Result<()> {
        Ok(fs::remove_dir_all(self.data())?)
    }

    pub(super) fn detach(&mut self) {
        self.child = None;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
