//! docs/install.md does what it says: its commands are extracted from the page and executed on three hosts with Debian's
//! etcd and containerd, in the page's order, on the hosts that each block names.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::bed::Bed;
use e2e::cgroups::Cgroups;
use e2e::dist::{CHECKOUT, Dist};
use e2e::image::{BUSYBOX, oci_image};
use e2e::machine::Machine;
use e2e::page::{Block, blocks};
use e2e::report;
use e2e::underlay::{NodeNumber, Underlay};
use e2e::wait::{SECOND, eventually};
use serde_json::Value;

/// The containers that it starts.
const CONTAINERS: [&str; 2] = ["here", "there"];

/// The hosts that a block names: none, if it is not run.
fn hosts(block: &Block) -> Result<Vec<usize>> {
    let Some(place) = &block.place else { return Ok(Vec::new()) };
    let mut words = place.split(' ');
    ensure!(matches!(words.next(), Some("host" | "hosts")), "hosts of {block:?}");
    let hosts = words.map(|n| n.parse::<usize>().map_err(Into::into)).collect::<Result<Vec<_>>>()?;
    ensure!(!hosts.is_empty() && hosts.iter().all(|n| (1..=3).contains(n)), "hosts of {block:?}");
    Ok(hosts)
}

struct Page {
    hosts: Vec<Machine>,
    /// Set once a container runs on host 2.
    address: Option<String>,
}

impl Page {
    fn host(&self, number: usize) -> Result<&Machine> {
        self.hosts.get(number - 1).context("a host of the page")
    }

    /// What is true in the reader's world before a block can work, and not in ours.
    fn before(&mut self, block: &Block) -> Result<()> {
        if block.note == "when all are ready" {
            for host in &self.hosts {
                eventually("both peers to be programmed", SECOND * 60, || {
                    let peers: Value = serde_json::from_str(&host.sh("weftctl peers --json")?)?;
                    let peers = peers.as_array().context("peers")?;
                    Ok(peers.len() == 2 && peers.iter().all(|peer| peer["programmed"] == true))
                })?;
            }
        }
        if block.note == "when no pod is left" {
            let host = self.host(2)?;
            eventually("the container's attachment to be swept", SECOND * 60, || {
                Ok(host.sh("weftctl pods --json")?.trim() == "[]")
            })?;
        }
        if block.note == "with ADDRESS set" {
            let pods: Value = serde_json::from_str(&self.host(2)?.sh("weftctl pods --json")?)?;
            let address =
                pods[0]["addresses"][0].as_str().with_context(|| format!("an address in {pods}"))?;
            self.address = Some(address.to_owned());
        }
        Ok(())
    }

    /// The same afterwards: packages start services on a host that has an init, and images come from the Internet.
    fn after(&self, block: &Block) -> Result<()> {
        for number in &hosts(block)? {
            if block.script.contains("apt-get install -y containerd") {
                self.host(*number)?.sh("systemctl start containerd")?;
            }
        }
        if block.script.contains("ctr images pull") {
            for host in &self.hosts {
                host.sh("ctr images import image.tar")?;
            }
        }
        Ok(())
    }

    fn run(&mut self, block: &Block) -> Result<()> {
        self.before(block)?;
        for number in &hosts(block)? {
            let host = self.host(*number)?;
            let address = self.address.as_deref().unwrap_or_default();
            let text = host.sh(&format!("export ADDRESS='{address}'\n{}", block.script))?;
            report::figure(format_args!("--- {}\n{}\n{text}", host.name, block.script));
            if block.note == "with ADDRESS set" {
                ensure!(text.contains("3 packets transmitted, 3 packets received"), "{text}");
            }
        }
        self.after(block)
    }
}

#[test]
fn the_install_page_works_as_written() -> Result<()> {
    let page = fs::read_to_string(Path::new(CHECKOUT).join("docs/install.md"))?;
    let blocks = blocks(&page)?;
    blocks.iter().try_for_each(|block| hosts(block).map(drop))?;
    ensure!(blocks.iter().filter(|block| block.place.is_some()).count() >= 12, "{blocks:?}");
    let _cgroups = Cgroups::of(CONTAINERS.map(|name| format!("default/{name}")));
    let bed = Bed::for_test()?;
    let dist = Dist::native()?;
    oci_image(&bed.dir("image")?, &[BUSYBOX])?;
    let underlay = Underlay::create(&bed)?;
    let mut page = Page { hosts: Vec::new(), address: None };
    for number in 1..=3 {
        let net = underlay.attach(&bed, NodeNumber(number))?;
        let name = format!("host{number}");
        let machine = Machine::start(&net.netns, &bed.dir(&name)?, &name)?;
        machine.copy(&bed.root().join("image/image.tar"), "/root/image.tar")?;
        for file in [&dist.tarball, &dist.package] {
            let name = file.file_name().context("a file")?.to_string_lossy();
            machine.copy(file, &format!("/root/{name}"))?;
            machine
                .copy(Path::new(&format!("{}.sha256", file.display())), &format!("/root/{name}.sha256"))?;
        }
        page.hosts.push(machine);
    }
    for block in &blocks {
        page.run(block).with_context(|| {
            let logs =
                page.hosts.iter().map(|host| host.sh("tail -n 20 /var/log/weftd.log").unwrap_or_default());
            logs.collect::<Vec<_>>().join("---\n")
        })?;
    }
    // Hosts 2 and 3 are without weft again, and host 1 has noticed nothing but that.
    for number in [2, 3] {
        let host = page.host(number)?;
        for path in [
            "/usr/bin/weftd",
            "/usr/local/bin/weftd",
            "/usr/lib/cni/weft",
            "/etc/weft",
            "/var/lib/weft",
            "/run/weft",
        ] {
            ensure!(!host.exists(path), "{path} is left on {}", host.name);
        }
        let links = host.netns.ip("-o link")?;
        ensure!(!links.contains("flannel") && !links.contains("cni0"), "{links}");
    }
    page.host(1)?.sh("weftctl status")?;
    Ok(())
}

#[test]
fn every_block_names_hosts_that_there_are() -> Result<()> {
    let named = |place: Option<&str>| {
        hosts(&Block { place: place.map(str::to_owned), note: String::new(), script: String::new() })
    };
    ensure!(named(Some("hosts 1 3"))? == [1, 3] && named(Some("host 2"))? == [2] && named(None)?.is_empty());
    for wrong in ["everywhere", "host 4", "hosts", "hosts x"] {
        named(Some(wrong)).expect_err(wrong);
    }
    Ok(())
}
