//! A real etcd, as an operator of flannel runs it: one member in the underlay's namespace, or several, each in a
//! namespace of its own; plain, or with certificates and a login.

mod member;
mod security;

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::bed::Bed;
use crate::netns::Netns;
use crate::underlay::Underlay;
use crate::wait::eventually;

pub use member::Member;
pub use security::Security;

/// flannel's default.
pub const PREFIX: &str = "/coreos.com/network";
const PORT: u16 = 2379;
const SERVING: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Etcd {
    pub members: Vec<Member>,
    pub security: Security,
    /// Where `etcdctl` runs.
    netns: Netns,
}

impl Etcd {
    /// Starts a single member whose data lies in `dir`, and waits until it serves.
    pub fn start(netns: &Netns, address: Ipv4Addr, dir: &Path) -> Result<Self> {
        let member = Member::new("s1", netns, address, dir);
        let mut etcd = Self { members: vec![member], security: Security::plain(), netns: netns.clone() };
        etcd.resume()?;
        Ok(etcd)
    }

    /// Starts three members, each behind a port of the underlay's; `secured`: with certificates for everybody, and with
    /// a login that has the least rights that an agent needs.
    pub fn start_three(bed: &Bed, underlay: &Underlay, secured: bool) -> Result<Self> {
        let mut members = Vec::new();
        for number in 1..=3 {
            let (name, address) = (format!("s{number}"), Ipv4Addr::new(192, 168, 77, 100 + number));
            let netns = underlay.attach_host(bed, &name, address)?;
            members.push(Member::new(&name, &netns, address, &bed.dir(&format!("etcd/{name}"))?));
        }
        let dir = bed.dir("etcd")?;
        let security = if secured { Security::certified(&dir, &members)? } else { Security::plain() };
        let mut etcd = Self { members, security, netns: underlay.netns.clone() };
        etcd.resume()?;
        if secured {
            etcd.enable_login()?;
        }
        Ok(etcd)
    }

    /// Starts whatever does not run, on the data that is there, and waits until it serves.
    pub fn resume(&mut self) -> Result<()> {
        let cluster: Vec<String> =
            self.members.iter().map(|m| format!("{}={}", m.name, m.peer_url())).collect();
        for member in &mut self.members {
            member.start(&cluster.join(","), &self.security)?;
        }
        eventually("etcd to serve", SERVING, || {
            self.ctl(&["endpoint", "health"])?;
            Ok(true)
        })?;
        Ok(())
    }

    /// As `--etcd-endpoints` takes them.
    pub fn endpoint(&self) -> String {
        let urls: Vec<String> = self.members.iter().map(|m| m.client_url(&self.security)).collect();
        urls.join(",")
    }

    /// What an agent is told of this store.
    pub fn agent_flags(&self) -> Vec<String> {
        let mut flags = vec![format!("--etcd-endpoints={}", self.endpoint())];
        flags.extend(self.security.agent_flags());
        flags
    }

    /// `kill -9` of all members: what is committed is on disk.
    pub fn kill(&mut self) -> Result<()> {
        self.members.iter_mut().try_for_each(Member::kill)
    }

    /// The member that leads, and that all others that answer agree on.
    pub fn leader(&self) -> Result<usize> {
        for (index, member) in self.members.iter().enumerate() {
            let printed =
                self.ctl_at(&member.client_url(&self.security), &["endpoint", "status", "-w", "json"]);
            let Ok(printed) = printed else { continue };
            let status: serde_json::Value = serde_json::from_str(&printed)?;
            let status = &status[0]["Status"];
            if status["leader"].is_u64() && status["leader"] == status["header"]["member_id"] {
                return Ok(index);
            }
        }
        bail!("no member says that it leads")
    }

    /// `etcdctl` in the underlay, at the members that run: an independent reader and writer.
    pub fn ctl<A: AsRef<OsStr>>(&self, args: &[A]) -> Result<String> {
        let running = self.members.iter().filter(|m| m.is_running());
        let urls: Vec<String> = running.map(|m| m.client_url(&self.security)).collect();
        self.ctl_at(&urls.join(","), args)
    }

    pub fn ctl_at<A: AsRef<OsStr>>(&self, endpoints: &str, args: &[A]) -> Result<String> {
        let mut command = Command::new("etcdctl");
        command.env_remove("ETCDCTL_ENDPOINTS").env("ETCDCTL_API", "3");
        command.args(["--endpoints", endpoints, "--dial-timeout=10s", "--command-timeout=15s"]);
        command.args(self.security.etcdctl_flags()).args(args);
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

    /// Writes an entry below the leases' prefix that never expires. Any bytes will do.
    pub fn put_entry(&self, key: &[u8], value: &[u8]) -> Result<()> {
        self.ctl(&[OsStr::new("put"), OsStr::new("--"), &lease_path(key), OsStr::from_bytes(value)])?;
        Ok(())
    }

    pub fn delete_lease(&self, key: &str) -> Result<()> {
        self.delete_entry(key.as_bytes())
    }

    /// The same for whatever key.
    pub fn delete_entry(&self, key: &[u8]) -> Result<()> {
        self.ctl(&[OsStr::new("del"), &lease_path(key)])?;
        Ok(())
    }

    /// `etcdctl snapshot save`, from the first member.
    pub fn save(&self, file: &Path) -> Result<()> {
        let first = self.members.first().context("a member")?.client_url(&self.security);
        self.ctl_at(&first, &["snapshot", "save", &file.display().to_string()])?;
        Ok(())
    }

    /// Ends it and puts back what [`Etcd::save`] wrote; `token` other than the default makes another cluster of it.
    pub fn restore(&mut self, file: &Path, token: Option<&str>) -> Result<()> {
        self.kill()?;
        let [member] = &self.members[..] else { bail!("only a single member is restored") };
        member.wipe()?;
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["snapshot", "restore"]).arg(file);
        command.arg(format!("--name={}", member.name)).arg(format!("--data-dir={}", member.data().display()));
        command.arg(format!("--initial-cluster={}={}", member.name, member.peer_url()));
        command.arg(format!("--initial-advertise-peer-urls={}", member.peer_url()));
        command.args(token.map(|token| format!("--initial-cluster-token={token}")));
        self.netns.run(&mut command)?;
        self.resume()
    }

    /// The least that an agent needs: to read the configuration, to read and write leases.
    fn enable_login(&mut self) -> Result<()> {
        let (config, leases) = (format!("{PREFIX}/config"), format!("{PREFIX}/subnets/"));
        for args in [
            &["user", "add", "root:rootpw"][..],
            &["user", "grant-role", "root", "root"],
            &["user", "add", "flannel:secret"],
            &["role", "add", "weft"],
            &["role", "grant-permission", "weft", "read", &config],
            &["role", "grant-permission", "weft", "readwrite", "--prefix", &leases],
            &["user", "grant-role", "flannel", "weft"],
            &["auth", "enable"],
        ] {
            // Root's role is made by etcd itself in some versions, by hand in others.
            if args[1] == "grant-role" && args[2] == "root" {
                let _ = self.ctl(&["role", "add", "root"]);
            }
            self.ctl(args)?;
        }
        self.security.log_in();
        Ok(())
    }

    /// Leaves it running when this value goes.
    pub fn detach(mut self) {
        self.members.iter_mut().for_each(Member::detach);
    }
}

fn lease_path(key: &[u8]) -> OsString {
    OsString::from_vec([PREFIX.as_bytes(), b"/subnets/", key].concat())
}
