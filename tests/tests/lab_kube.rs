//! The lab as a Kubernetes cluster, by its script; and the host afterwards, which must be as it was.

mod lab_stand;

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use lab_stand::{Lab, ROOT};

/// What these containers have outside of the lab's folder.
fn cgroups(ids: &str) -> Result<usize> {
    let output = Command::new("find").args(["/sys/fs/cgroup", "-type", "d"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter(|path| ids.lines().any(|id| path.ends_with(id))).count())
}

#[test]
fn a_cluster_comes_up_is_used_and_goes() -> Result<()> {
    let lab = Lab::new()?;
    let refused = lab.refuse("up --kubernetes --store etcd")?;
    ensure!(refused.contains("--store") && !std::path::Path::new(ROOT).exists(), "{refused}");
    let table = lab.run("up --kubernetes --nodes 2")?;
    ensure!(table.contains("2 of 2 ordered pairs reach."), "{table}");
    let nodes = lab.run("kubectl get nodes --no-headers")?;
    ensure!(nodes.lines().filter(|line| line.contains(" Ready ")).count() == 2, "{nodes}");
    // As it is suggested: by the service's address, which leads to a pod.
    let line = table.lines().find(|line| line.contains("kubectl exec")).context("a suggestion")?;
    let answer = lab.run(line.trim().trim_start_matches("scripts/lab "))?;
    ensure!(answer.starts_with("hello-"), "{answer}");
    let status = lab.run("status")?;
    for expected in ["--- n1 (", "--- n2 (", "pod/hello-"] {
        ensure!(status.contains(expected), "{status}");
    }
    ensure!(lab.run("ping")?.contains("2 of 2 ordered pairs reach."));
    ensure!(lab.run("exec n1 ip route")?.contains("flannel.1"));
    ensure!(lab.run("exec n2 ctr --namespace k8s.io containers list")?.contains("localhost/weft"));
    let pod = lab.run("kubectl get pods -o jsonpath={.items[0].metadata.name}")?;
    ensure!(lab.run(&format!("exec {pod} ip -o address"))?.contains("eth0"));
    ensure!(lab.refuse("exec n9 true")?.contains("n9"));
    let ids = lab.run("exec n1 ctr --namespace k8s.io containers list -q")?;
    ensure!(cgroups(&ids)? > 0, "containers have cgroups: {ids}");
    lab.down()?;
    ensure!(cgroups(&ids)? == 0, "cgroups of {ids} are left");
    Ok(())
}
