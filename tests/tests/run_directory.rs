//! The run directory, deleted by a foreign hand under a running weftd: what was in it comes back from memory, at once
//! for the plugin, and whole for the next agent.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::books::invariant;
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::node::Node;
use e2e::pod::Pod;
use e2e::report;
use e2e::wait::{SECOND, eventually};

/// Both sockets, and a record for each pod.
fn wait_until_whole(node: &Node, pods: usize) -> Result<()> {
    let took = eventually("sockets and records to be there again", 30 * SECOND, || {
        let status = node.agent.status()?;
        let records = fs::read_dir(node.agent.run_dir().join("attachments"))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.len() > 50 && name.ends_with(".json"));
        let records = records.count();
        ensure!(records == pods && status.pods.attachments == pods, "{records} records of {pods}");
        ensure!(node.agent.cni_socket().exists(), "no socket for the plugin");
        Ok(true)
    })?;
    report::took("the run directory is whole again", took);
    Ok(())
}

/// weftd may be writing meanwhile.
fn remove(dir: &Path) -> Result<()> {
    eventually("the run directory to be deleted", 30 * SECOND, || match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(true),
    })?;
    Ok(())
}

fn every_pod_outlives_a_restart(node: &mut Node, pods: &[Pod]) -> Result<()> {
    wait_until_whole(node, pods.len())?;
    node.agent.kill()?;
    node.agent.restart(READY)?;
    let status = node.agent.status()?;
    ensure!(status.pods.unknown.is_empty(), "addresses are unknown of {:?}", status.pods.unknown);
    invariant(node, pods)
}

#[test]
fn a_deleted_run_directory_comes_back_from_memory() -> Result<()> {
    scenario(Spec::embedded(1, Backend::Vxlan), |cluster| {
        let node = &mut cluster.nodes[0];
        let mut pods = vec![node.pod("one")?, node.pod("two")?];
        let run = node.agent.run_dir();

        remove(&run)?;
        // A runtime's next ADD comes before anything has been noticed, or after: it waits for the socket.
        pods.push(node.pod("three")?);
        every_pod_outlives_a_restart(node, &pods)?;
        let mode = fs::metadata(&run)?.permissions().mode() & 0o777;
        ensure!(mode == 0o700, "{} has mode {mode:o}", run.display());

        // Moved away: what holds on to the files moves along.
        let aside = run.with_file_name("aside");
        fs::rename(&run, &aside)?;
        pods.push(node.pod("four")?);
        every_pod_outlives_a_restart(node, &pods)?;

        for file in ["cni.sock", "admin.sock"] {
            fs::remove_file(run.join(file))?;
        }
        let last = pods.pop().context("a pod")?;
        last.unwire()?;
        every_pod_outlives_a_restart(node, &pods)
    })
}
