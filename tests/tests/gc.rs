//! Garbage collection against everything that can be known wrongly. A runtime's list, the agent's records, the paths
//! of namespaces and the veths themselves are each right, empty, stale or wrong, in every combination; after each GC
//! no address of a living veth can be had, what is listed and sound lives on, a foreign device of a veth's name is left
//! alone, and DEL clears the rest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use e2e::books::{address_inside, invariant, live_veths};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::{Pod, Sandbox, host_veth};
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use weft_shared::names::{LINK_GROUP, attachment_hash};
use weft_shared::protocol::Attachment;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Right,
    Empty,
    Stale,
    Wrong,
}
use Known::{Empty, Right, Stale, Wrong};

const ALL: [Known; 4] = [Right, Empty, Stale, Wrong];

/// A container whose namespace lives on by `held`, whatever becomes of its path.
struct Cell {
    path: Known,
    veth: Known,
    pod: Pod,
    inside: Netns,
    held: File,
}

impl Cell {
    fn create(node: &Node, id: String, path: Known, veth: Known) -> Result<Self> {
        let pod = Sandbox::create(node, &id)?.wire()?;
        let held = File::open(pod.netns.path())?;
        let inside = Netns::at(&PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd())));
        Ok(Self { path, veth, pod, inside, held })
    }

    fn record(&self, node: &Node) -> Result<PathBuf> {
        let attachment = Attachment {
            network: "weft".parse()?,
            container_id: self.pod.name.parse()?,
            ifname: "eth0".parse()?,
        };
        Ok(node.agent.run_dir().join(format!("attachments/{}.json", attachment_hash(&attachment))))
    }

    /// Done while no agent looks.
    fn tamper(&self, node: &Node, record: Known, other: &Cell) -> Result<()> {
        let file = self.record(node)?;
        match record {
            Right => {}
            Empty => fs::remove_file(&file)?,
            Stale => {
                let mut content: Value = serde_json::from_slice(&fs::read(&file)?)?;
                content["committed"]["host_ifindex"] = json!(999_999);
                fs::write(&file, content.to_string())?;
            }
            Wrong => {
                let content = fs::read(&file)?;
                fs::write(&file, &content[..content.len() / 2])?;
            }
        }
        match self.path {
            Right => {}
            Empty => self.pod.netns.remove()?,
            Stale => {
                self.pod.netns.remove()?;
                File::create_new(self.pod.netns.path())?;
            }
            Wrong => {
                self.pod.netns.remove()?;
                File::create_new(self.pod.netns.path())?;
                let other = PathBuf::from(format!("/proc/self/fd/{}", other.held.as_raw_fd()));
                mount(Some(&other), self.pod.netns.path(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            }
        }
        let veth = self.pod.host_veth()?;
        let replace = |group: u32| -> Result<()> {
            node.netns().ip(&format!("link delete {veth}"))?;
            // By descriptor: the path may be anybody's by now.
            let name = format!("peer{}", self.held.as_raw_fd());
            node.netns().ip(&format!("link add {veth} group {group} type veth peer name {name}"))?;
            node.netns().ip(&format!(
                "link set {name} netns /proc/{}/fd/{} name eth0",
                std::process::id(),
                self.held.as_raw_fd()
            ))?;
            self.inside.ip(&format!("address add {}/24 dev eth0", self.pod.address)).map(drop)
        };
        match self.veth {
            Right => Ok(()),
            Empty => node.netns().ip(&format!("link delete {veth}")).map(drop),
            Stale => replace(LINK_GROUP),
            Wrong => replace(0),
        }
    }

    /// Its address, if its interface still has one.
    fn living(&self) -> Result<Option<Ipv4Addr>> {
        address_inside(&self.inside)
    }

    fn finish(self, node: &Node) -> Result<()> {
        let mut call = self.pod.call.clone();
        call.netns = Some(PathBuf::new());
        if self.veth == Wrong {
            // Foreign: whoever made it takes it away.
            let _ = node.netns().ip(&format!("link delete {}", self.pod.host_veth()?));
        }
        call.del()?;
        self.pod.netns.remove()
    }
}

/// A container that asks for an address which should not be had.
fn can_be_had(node: &Node, probe: &Sandbox, address: Ipv4Addr) -> Result<bool> {
    let mut call = probe.call.clone();
    call.config["capabilities"] = json!({ "ips": true });
    call.config["runtimeConfig"] = json!({ "ips": [address.to_string()] });
    let outcome = call.run("ADD")?;
    if outcome.exit != Some(0) {
        return outcome.error().map(|_| false);
    }
    call.del()?;
    ensure!(!live_veths(node)?.contains(host_veth(&call)?.as_str()), "the probe is left");
    Ok(true)
}

/// Not ready while living veths have no record, until they are deleted.
fn start(node: &mut Node, lost: bool) -> Result<()> {
    if !lost {
        return node.agent.restart(READY);
    }
    node.agent.start()?;
    let named = || Ok(!node.status()?.pods.unknown.is_empty());
    eventually("veths without a record to be named", READY, named).map(drop)
}

fn valid(list: Known, cells: &[Cell]) -> Value {
    let entry = |id: &str, ifname: &str| json!({ "containerID": id, "ifname": ifname });
    let ids = || cells.iter().map(|cell| cell.pod.name.as_str());
    match list {
        Right => ids().map(|id| entry(id, "eth0")).collect(),
        Empty => json!([]),
        // Everything that a cache has ever held.
        Stale => ids().chain(["long-gone", "never-wired"]).map(|id| entry(id, "eth0")).collect(),
        Wrong => ids().map(|id| entry(id, "net1")).collect(),
    }
}

fn round(node: &mut Node, list: Known, record: Known) -> Result<()> {
    let mut cells = Vec::new();
    for path in ALL {
        for veth in ALL {
            let id = format!("{list:?}-{record:?}-{path:?}-{veth:?}").to_lowercase();
            cells.push(Cell::create(node, id, path, veth)?);
        }
    }
    node.agent.kill()?;
    for (n, cell) in cells.iter().enumerate() {
        cell.tamper(node, record, &cells[(n + 5) % cells.len()]).with_context(|| cell.pod.name.clone())?;
    }
    start(node, record == Empty)?;

    let probe = Sandbox::create(node, "probe")?;
    let mut call = probe.call.clone();
    call.netns = None;
    call.config["cni.dev/valid-attachments"] = valid(list, &cells);
    // It may answer that it could not undo everything: a foreign device stands where a veth was.
    let outcome = call.run("GC")?;
    ensure!(outcome.exit == Some(0) || outcome.error().is_ok(), "{outcome:?}");

    for cell in &cells {
        let living = cell.living()?;
        if living.is_some() && cell.veth != Wrong && can_be_had(node, &probe, cell.pod.address)? {
            // The agent may have taken it away meanwhile, but not after its address was free.
            let living = cell.living()?;
            ensure!(living.is_none(), "{}: {living:?} lives and can be had", cell.pod.name);
        }
        if cell.veth == Wrong {
            ensure!(living.is_some(), "{}: a foreign device was touched", cell.pod.name);
        }
        if record == Right && cell.veth == Right {
            let is_listed = matches!(list, Right | Stale);
            ensure!(living.is_some() == is_listed, "{}: {living:?}", cell.pod.name);
        }
    }
    for cell in cells {
        let name = cell.pod.name.clone();
        cell.finish(node).with_context(|| name)?;
    }
    probe.netns.remove()?;
    invariant(node, &[])
}

fn rounds(record: Known) -> Result<()> {
    scenario(Spec::embedded(1, Backend::Vxlan), |cluster| {
        let node = &mut cluster.nodes[0];
        for list in ALL {
            round(node, list, record).with_context(|| format!("list {list:?}, records {record:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn by_right_records() -> Result<()> {
    rounds(Right)
}

#[test]
fn without_records() -> Result<()> {
    rounds(Empty)
}

#[test]
fn by_stale_records() -> Result<()> {
    rounds(Stale)
}

#[test]
fn by_damaged_records() -> Result<()> {
    rounds(Wrong)
}

/// Whoever renames a veth or takes its link group away leaves the other end with its address.
#[test]
fn a_veth_without_its_name_or_mark_keeps_its_address() -> Result<()> {
    scenario(Spec::embedded(1, Backend::Vxlan), |cluster| {
        let node = &mut cluster.nodes[0];
        for (lost, hand) in [
            (false, "name elsewhere"),
            (false, "group default"),
            (false, "name elsewhere group default"),
            (true, "name elsewhere"),
        ] {
            let told = || format!("record lost: {lost}, {hand}");
            let cell = Cell::create(node, "renamed".to_owned(), Right, Right)?;
            node.agent.kill()?;
            let (file, veth) = (cell.record(node)?, cell.pod.host_veth()?);
            if lost {
                fs::remove_file(&file)?;
            } else {
                let content = fs::read(&file)?;
                fs::write(&file, &content[..content.len() - 2])?;
            }
            node.netns().ip(&format!("link set {veth} {hand}"))?;
            start(node, lost)?;
            let probe = Sandbox::create(node, "probe")?;
            ensure!(!can_be_had(node, &probe, cell.pod.address)?, "{}: it lives and can be had", told());
            let gone = "link delete elsewhere";
            let _ = node.netns().ip(gone).or_else(|_| node.netns().ip(&format!("link delete {veth}")));
            cell.pod.call.del().with_context(told)?;
            eventually("the address to be free", READY, || can_be_had(node, &probe, cell.pod.address))
                .with_context(told)?;
            probe.netns.remove()?;
            cell.pod.netns.remove()?;
        }
        invariant(node, &[])
    })
}

/// As in a container without mount propagation: every path of a namespace is a plain file there.
#[test]
fn an_agent_that_sees_no_namespace_frees_nothing_that_lives() -> Result<()> {
    scenario(Spec::embedded(1, Backend::Vxlan).flag("--resync=1"), |cluster| {
        let node = &mut cluster.nodes[0];
        let before = [node.pod("a")?, node.pod("b")?];
        node.agent.stop()?;
        node.agent.launcher = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
            .map(str::to_owned)
            .into_iter()
            .chain(["for pod in \"$0\"/*; do umount -l \"$pod\"; done; exec \"$@\"".to_owned()])
            .chain([before[0].netns.path().parent().context("a folder")?.display().to_string()])
            .collect();
        node.agent.restart(READY)?;
        let pods: Vec<Pod> = before.into_iter().chain([node.pod("c")?]).collect();
        let agent = fs::read_link(format!("/proc/{}/ns/mnt", node.agent.pid()?))?;
        ensure!(agent != fs::read_link("/proc/self/ns/mnt")?, "the agent sees what everybody sees");

        let mut call = pods[0].call.clone();
        call.netns = None;
        let ids: BTreeSet<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
        call.config["cni.dev/valid-attachments"] =
            ids.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
        call.run("GC")?.silent()?;
        let passes = || Ok::<_, anyhow::Error>(node.agent.status()?.dataplane.context("a dataplane")?.passes);
        let seen = passes()?;
        eventually("two more looks at the kernel", SECOND * 60, || Ok(passes()? > seen + 1))?;
        invariant(node, &pods)?;
        ping(&pods[0].netns, pods[2].address, 5, SECOND).map(drop)
    })
}
