//! Hosts as an operator has them: each a machine with a root of its own, weft from the tarball, Debian's etcd on the
//! underlay. Which runtime calls weft there is the scenario's.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::bed::Bed;
use crate::cgroups::Cgroups;
use crate::dist::Dist;
use crate::etcd::Etcd;
use crate::image;
use crate::machine::Machine;
use crate::underlay::{NodeNumber, Underlay};
use crate::wait::{SECOND, eventually};

const LOG_TAIL_LINES: usize = 25;
const NETWORK: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

const RECORD: &str = "/var/log/cni-calls";
/// In front of the plugins: what comes by environment is written to [`RECORD`], a line for each call.
const RECORDER: &str = r#"#!/bin/sh
plugin=$(basename "$0")
echo "$plugin|$CNI_COMMAND|$CNI_CONTAINERID|$CNI_NETNS|$CNI_ARGS" >>/var/log/cni-calls
exec "/usr/libexec/cni/$plugin"
"#;

/// What a runtime asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedCall {
    pub verb: String,
    pub container_id: String,
    pub netns: String,
    pub args: String,
}

/// Fields drop in order: hosts end before the store, the store before the namespaces.
#[derive(Debug)]
pub struct Fleet {
    pub hosts: Vec<Host>,
    pub etcd: Etcd,
    pub underlay: Underlay,
    pub bed: Bed,
}

/// The machine ends before its containers' cgroups are removed.
#[derive(Debug)]
pub struct Host {
    pub machine: Machine,
    pub cgroups: Arc<Cgroups>,
    /// In the underlay.
    pub address: Ipv4Addr,
}

impl Fleet {
    /// Machines with the tarball unpacked and the image at hand; nothing is installed, nothing runs.
    pub fn prepare(count: u8) -> Result<Self> {
        let bed = Bed::for_test()?;
        let dist = Dist::native()?;
        image::oci_image(&bed.dir("image")?, &image::NAMES)?;
        let underlay = Underlay::create(&bed)?;
        let etcd = Etcd::start(&underlay.netns, Underlay::GATEWAY, &bed.dir("etcd")?)?;
        etcd.put_config(NETWORK)?;
        let mut fleet = Self { hosts: Vec::new(), etcd, underlay, bed };
        for number in (1..=count).map(NodeNumber) {
            let net = fleet.underlay.attach(&fleet.bed, number)?;
            let name = format!("host{}", number.0);
            let machine = Machine::start(&net.netns, &fleet.bed.dir(&name)?, &name)?;
            machine.copy(&dist.tarball, "/root/weft.tar.gz")?;
            machine.sh(&format!("tar xzf weft.tar.gz && mv {} weft", dist.name()))?;
            for file in ["image.tar", "rootfs.tar"] {
                machine.copy(&fleet.image_dir().join(file), &format!("/root/{file}"))?;
            }
            fleet.hosts.push(Host { machine, cgroups: Arc::default(), address: net.address });
        }
        Ok(fleet)
    }

    /// weft on every host, ready, and every peer programmed everywhere.
    pub fn install_weft(&self) -> Result<()> {
        for host in &self.hosts {
            host.install_weft(&self.etcd)?;
        }
        for host in &self.hosts {
            host.machine.sh("systemctl start weftd")?;
        }
        for host in &self.hosts {
            eventually(&format!("the peers of {}", host.machine.name), SECOND * 30, || {
                let peers: Value = serde_json::from_str(&host.machine.sh("weftctl peers --json")?)?;
                let peers = peers.as_array().context("peers")?;
                Ok(peers.len() + 1 == self.hosts.len() && peers.iter().all(|peer| peer["programmed"] == true))
            })?;
        }
        Ok(())
    }

    /// What a failed scenario's reader wants to see.
    pub fn explain(&self) -> String {
        self.hosts.iter().map(Host::explain).collect()
    }

    fn image_dir(&self) -> PathBuf {
        self.bed.root().join("image")
    }
}

impl Host {
    /// By the tarball's install script; the agent is told of the store and not started.
    pub fn install_weft(&self, etcd: &Etcd) -> Result<String> {
        let text = self.machine.sh("weft/install")?;
        let endpoints = etcd.endpoint();
        self.machine.sh(&format!("echo FLANNELD_ETCD_ENDPOINTS={endpoints} >>/etc/weft/weftd.env"))?;
        Ok(text)
    }

    /// What weftd has on record.
    pub fn pods(&self) -> Result<Vec<Value>> {
        Ok(serde_json::from_str(&self.machine.sh("weftctl pods --json")?)?)
    }

    /// From now on every call of a plugin is written down, as the runtime made it.
    pub fn record_calls(&self) -> Result<()> {
        self.machine.put("/usr/lib/cni/recorder", RECORDER.as_bytes())?;
        let script = "mkdir /usr/libexec/cni; cd /usr/lib/cni; chmod 755 recorder; mv weft loopback /usr/libexec/cni; \
                      mv recorder weft; ln -s weft loopback";
        self.machine.sh(script).map(drop)
    }

    /// The calls of the plugin `weft` since, in their order.
    pub fn calls(&self) -> Result<Vec<RecordedCall>> {
        let text = self.machine.read(RECORD)?;
        let calls = text.lines().filter_map(|line| {
            let mut words = line.split('|').map(str::to_owned);
            let mut word = || words.next().unwrap_or_default();
            (word() == "weft").then(|| RecordedCall {
                verb: word(),
                container_id: word(),
                netns: word(),
                args: word(),
            })
        });
        Ok(calls.collect())
    }

    /// Host-side ends of pods' veths.
    pub fn veths(&self) -> Result<usize> {
        let links = self.machine.netns.ip("-o link show type veth")?;
        Ok(links.lines().filter(|link| link.contains(" master cni0 ")).count())
    }

    /// Waits until no pod has left anything: no record, no veth.
    pub fn wait_without_pods(&self) -> Result<()> {
        let what = format!("the last pod of {} to be gone", self.machine.name);
        eventually(&what, SECOND * 60, || Ok(self.pods()?.is_empty() && self.veths()? == 0)).map(drop)
    }

    fn explain(&self) -> String {
        let log = |name: &str| {
            let text = self.machine.read(&format!("/var/log/{name}.log")).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
            format!("{name} on {}, end of log:\n  {}\n", self.machine.name, tail.join("\n  "))
        };
        ["weftd", "containerd"].map(log).concat()
    }
}

/// Runs `body` on so many hosts with weft ready; a failure carries the logs.
pub fn fleet(count: u8, body: impl FnOnce(&Fleet) -> Result<()>) -> Result<()> {
    fleet_prepared(count, |fleet| {
        fleet.install_weft()?;
        body(fleet)
    })
}

/// The same before anything is installed.
pub fn fleet_prepared(count: u8, body: impl FnOnce(&Fleet) -> Result<()>) -> Result<()> {
    let fleet = Fleet::prepare(count)?;
    body(&fleet).with_context(|| fleet.explain())
}
