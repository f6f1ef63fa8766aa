//! The lab as a newcomer uses it, by its script; and the host afterwards, which must be as it was.

mod lab_stand;

use std::fs;
use std::process::Stdio;

use anyhow::Result;
use e2e::cluster::READY;
use e2e::wait::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use lab_stand::{Lab, ROOT};

#[test]
fn up_status_ping_exec_down() -> Result<()> {
    let lab = Lab::new()?;
    let table = lab.run("up")?;
    assert!(table.contains("30 of 30 ordered pairs reach."), "{table}");
    assert_eq!(
        table.lines().filter(|line| line.trim_start().starts_with("scripts/lab")).count(),
        5,
        "{table}"
    );
    let status = lab.run("status")?;
    for node in ["n1", "n2", "n3"] {
        assert!(status.contains(node), "{status}");
    }
    assert!(status.contains("ONE MACHINE ONLY"), "{status}");
    let ping = lab.run("ping")?;
    assert!(ping.contains("30 of 30 ordered pairs reach."), "{ping}");
    assert!(lab.run("exec n1 ip route")?.contains("flannel.1"));
    assert!(lab.run("exec n1-a ip -o address")?.contains("eth0"));
    assert_eq!(lab.output("exec n1-a false")?.status.code(), Some(1), "the command's own exit code");
    assert!(lab.run("exec n1 weftctl status")?.contains("n1"));
    let unknown = lab.refuse("exec n1-a nosuchcmd")?;
    assert!(unknown.contains("nosuchcmd") && !unknown.contains("PATH"), "{unknown}");

    assert!(lab.refuse("up")?.contains("scripts/lab down"));
    let refused = lab.refuse("exec n9 true")?;
    assert!(refused.contains("n9") && refused.contains("n1-a"), "{refused}");
    lab.down()
}

#[test]
fn a_broken_overlay_shows_and_is_mended() -> Result<()> {
    let lab = Lab::new()?;
    lab.run("up --nodes 2 --backend host-gw --store etcd")?;
    lab.run("exec n2 ip link set eth0 down")?;
    let silent = lab.refuse("ping")?;
    assert!(silent.contains("SILENT"), "{silent}");
    lab.run("exec n2 ip link set eth0 up")?;
    lab.run("exec n2 ip route replace default via 192.168.77.1")?;
    eventually("every pair to reach again", READY, || Ok(lab.output("ping")?.status.success()))?;
    lab.down()
}

#[test]
fn down_after_an_up_that_was_killed() -> Result<()> {
    let lab = Lab::new()?;
    // Killed when the bed holds so many namespaces: at the underlay, among the nodes, among the pods.
    for namespaces in [0, 1, 3, 4, 6, 9] {
        let mut command = lab.command("up");
        let mut up = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        eventually("up to be midway", READY, || {
            Ok(up.try_wait()?.is_some() || fs::read_dir(format!("{ROOT}/netns"))?.count() >= namespaces)
        })?;
        kill(Pid::from_raw(up.id() as i32), Signal::SIGKILL)?;
        up.wait()?;
        assert!(lab.refuse("status")?.contains("down"), "after a kill at {namespaces}");
        assert!(lab.refuse("up")?.contains("down"), "after a kill at {namespaces}");
        lab.down()?;
    }
    Ok(())
}

#[test]
fn bad_input_is_refused_before_anything_is_made() -> Result<()> {
    let lab = Lab::new()?;
    for (arguments, expected) in [
        ("up --nodes 0", "1 to 20"),
        ("up --nodes many", "many"),
        ("up --backend gre", "vxlan, host-gw or udp"),
        ("up --store=zookeeper", "embedded or etcd"),
        ("up --colour", "--colour"),
        ("up 3", "3"),
        ("start", "start"),
        ("status", "scripts/lab up"),
        ("exec n1 true", "scripts/lab up"),
    ] {
        let refused = lab.refuse(arguments)?;
        assert!(refused.contains(expected), "{arguments}: {refused}");
    }
    lab.down()
}
