//! A node that runs out of something: room in the run directory, the right to write there, file descriptors. Each call
//! ends within its deadline and in words, nothing is leaked, and with the shortage everything is over.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::books::invariant;
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario, scenario_prepared};
use e2e::node::Node;
use e2e::pod::{Pod, Sandbox};
use e2e::report;
use e2e::wait::{SECOND, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use weft_shared::cni::Code;
use weft_shared::deadline;

/// The run directory on a file system of its own, which goes with this value.
struct Small {
    path: PathBuf,
}

impl Small {
    const OPTIONS: &str = "size=256k,mode=700";

    fn mount(path: &Path) -> Result<Self> {
        fs::create_dir(path)?;
        mount(Some("weft-e2e"), path, Some("tmpfs"), MsFlags::empty(), Some(Self::OPTIONS))
            .with_context(|| format!("tmpfs on {}", path.display()))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Not a byte is left.
    fn fill(&self) -> Result<()> {
        let mut filler = File::create(self.filler())?;
        for size in [4096, 1] {
            let piece = vec![0; size];
            loop {
                match filler.write_all(&piece) {
                    Ok(()) => {}
                    Err(e) if e.kind() == std::io::ErrorKind::StorageFull => break,
                    Err(e) => return Err(e).context("fill"),
                }
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// As whoever looks at the path from now on finds it; a file system with a file open for writing cannot be made so.
    fn read_only(&self) -> Result<ReadOnly<'_>> {
        let on_itself = |flags| mount(Some(&self.path), &self.path, None::<&str>, flags, None::<&str>);
        on_itself(MsFlags::MS_BIND)?;
        let over = ReadOnly(&self.path);
        on_itself(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
        Ok(over)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        unmount(&self.path);
    }
}

/// Until it goes.
struct ReadOnly<'a>(&'a Path);

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        unmount(self.0);
    }
}

fn unmount(path: &Path) {
    if let Err(error) = umount2(path, MntFlags::MNT_DETACH) {
        eprintln!("unmount {}: {error}", path.display());
    }
}

/// A node whose run directory is small, and a pod on it.
fn on_small(body: impl FnOnce(&mut Node, &Small, Pod) -> Result<()>) -> Result<()> {
    scenario_prepared(Spec::embedded(1, Backend::Vxlan), |cluster: &mut Cluster| {
        let small = Small::mount(&cluster.nodes[0].agent.run_dir())?;
        cluster.put_config()?;
        cluster.start_agents()?;
        let node = &mut cluster.nodes[0];
        let pod = node.pod("before")?;
        let done = body(node, &small, pod);
        // It holds the directory.
        if node.agent.is_running() {
            node.agent.kill()?;
        }
        done
    })
}

fn refused(sandbox: &Sandbox, verb: &str, code: Code, part: &str) -> Result<()> {
    let (got, error) = sandbox.call.run(verb)?.error()?;
    ensure!(
        got == code as u64 && error.to_string().contains(part),
        "{verb}: {error}, expected code {} and {part:?}",
        code as u64
    );
    Ok(())
}

#[test]
fn a_full_run_directory_is_named_and_nothing_is_lost() -> Result<()> {
    on_small(|node, small, pod| {
        let next = Sandbox::create(node, "next")?;
        let gone = node.pod("gone")?;
        small.fill()?;
        refused(&next, "ADD", Code::Io, "No space left")?;
        invariant(node, &[pod.clone(), gone.clone()])?;
        // DEL needs no room.
        gone.unwire()?;
        invariant(node, std::slice::from_ref(&pod))?;
        // Room for one record came free by that.
        small.fill()?;
        refused(&next, "ADD", Code::Io, "No space left")?;

        // Without an agent DEL has to leave word, and says that it cannot: the runtime tries again.
        node.agent.kill()?;
        let dead = Sandbox { netns: pod.netns.clone(), call: pod.call.clone() };
        refused(&dead, "DEL", Code::TryAgainLater, "No space left")?;
        small.clear()?;
        dead.call.del()?;
        node.agent.restart(READY)?;
        invariant(node, &[])?;
        let pod = next.wire()?;
        invariant(node, &[pod])
    })
}

#[test]
fn a_run_directory_that_cannot_be_written_is_named_and_nothing_is_lost() -> Result<()> {
    on_small(|node, small, pod| {
        let next = Sandbox::create(node, "next")?;
        let gone = node.pod("gone")?;
        let read_only = small.read_only()?;
        refused(&next, "ADD", Code::Io, "Read-only file system")?;
        invariant(node, &[pod.clone(), gone.clone()])?;
        gone.unwire()?;
        invariant(node, std::slice::from_ref(&pod))?;
        node.agent.kill()?;
        let dead = Sandbox { netns: pod.netns.clone(), call: pod.call.clone() };
        refused(&dead, "DEL", Code::TryAgainLater, "Read-only file system")?;
        // No agent can live there, and it says where.
        node.agent.start()?;
        let status = node.agent.reap(READY)?;
        let log = node.agent.log();
        let last = log.lines().last().unwrap_or_default();
        ensure!(
            !status.success() && last.contains("Read-only file system") && last.contains("run"),
            "{status}: {last}"
        );

        drop(read_only);
        dead.call.del()?;
        // The record of `gone` could not be removed: that its veth is gone is found out.
        node.agent.restart(READY)?;
        invariant(node, &[])?;
        let pod = next.wire()?;
        invariant(node, &[pod])
    })
}

/// The agent may open no file of this number or higher.
fn set_limit(node: &Node, limit: usize) -> Result<()> {
    let mut command = Command::new("prlimit");
    command.arg(format!("--pid={}", node.agent.pid()?)).arg(format!("--nofile={limit}:"));
    let output = command.output().context("prlimit")?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[test]
fn an_agent_without_descriptors_says_so_in_time_and_goes_on_with_them() -> Result<()> {
    const ENOUGH: usize = 1024;
    scenario(Spec::embedded(1, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let pod = node.pod("before")?;
        let mut refusals = Vec::new();
        let open = fs::read_dir(format!("/proc/{}/fd", node.agent.pid()?))?.count();
        // Without any it cannot accept; with about as many as it has now it comes to one step or another.
        for limit in [0, open - 1, open, open + 1, open + 2] {
            set_limit(node, limit)?;
            let sandbox = Sandbox::create(node, &format!("limit{limit}"))?;
            let start = Instant::now();
            let outcome = sandbox.call.run("ADD")?;
            let took = start.elapsed();
            ensure!(took < deadline::ADD_ALARM, "ADD with {limit} descriptors took {took:?}");
            set_limit(node, ENOUGH)?;
            if outcome.exit == Some(0) {
                sandbox.call.del()?;
            } else {
                let (code, error) = outcome.error()?;
                ensure!([Code::TryAgainLater as u64, Code::Io as u64].contains(&code), "{error}");
                report::figure(format_args!("{limit} descriptors, {took:.1?}: {error}"));
                refusals.push(limit);
            }
            invariant(node, std::slice::from_ref(&pod))
                .with_context(|| format!("after an ADD with {limit} descriptors"))?;
        }
        ensure!(refusals.contains(&0), "an ADD without descriptors works");

        // DEL does without it.
        set_limit(node, 0)?;
        let start = Instant::now();
        pod.unwire()?;
        let took = start.elapsed();
        ensure!(took < deadline::DEL_OR_CHECK + SECOND * 3, "DEL took {took:?}");
        set_limit(node, ENOUGH)?;
        invariant(node, &[])?;
        // What its last look at the kernel lacked it tries again by itself.
        eventually("the node to be ready again", READY, || Ok(node.status()?.ready))?;
        let pod = node.pod("after")?;
        invariant(node, &[pod])
    })
}
