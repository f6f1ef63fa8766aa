//! What is refused, in which order, with which code; nothing of it reaches the agent.

mod support;

use serde_json::json;
use support::{Namespace, Node};

/// Environment, stdin, the code, and a part of the text.
type Fault<'a> = (&'a [(&'a str, &'a str)], &'a str, u32, &'a str);

const ALL: [&str; 4] = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"];

#[test]
fn the_first_fault_in_the_references_order_is_reported() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    let good = node.conf("1.1.0", json!({}));
    let long = " ".repeat((1 << 20) + 1);
    let bad_everything = r#"{"cniVersion":"9","name":"a/b"}"#;
    // Each row has all the faults of the rows below it, as far as that can be.
    let table: &[Fault<'_>] = &[
        (&[("CNI_COMMAND", "FOO"), ("CNI_CONTAINERID", ""), ("CNI_IFNAME", "a/b")], "{", 4, "FOO"),
        (
            &[("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")],
            "{",
            4,
            "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME",
        ),
        (&[("CNI_NETNS", ""), ("CNI_IFNAME", "a/b")], "{", 4, "CNI_NETNS"),
        (&[("CNI_CONTAINERID", "-x"), ("CNI_IFNAME", "a/b")], "{", 4, "CNI_CONTAINERID: container ID \"-x\""),
        (&[("CNI_IFNAME", "a/b")], "{", 4, "CNI_IFNAME"),
        (&[], &long, 6, "1048576"),
        (&[], "", 6, "JSON"),
        (&[], "{", 6, "JSON"),
        (&[], r#"{"cniVersion":"9"}"#, 7, "name is missing"),
        (&[], bad_everything, 7, "a/b"),
        (
            &[],
            r#"{"cniVersion":"9","name":"n","mtu":"x"}"#,
            1,
            "0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0",
        ),
        (&[], r#"{"cniVersion":"1.0.0","name":"n","prevResult":{},"mtu":1}"#, 7, "prevResult"),
        (&[("CNI_ARGS", "IP")], r#"{"cniVersion":"1.0.0","name":"n","mtu":1}"#, 4, "CNI_ARGS"),
        (&[("CNI_NETNS", "/x")], r#"{"cniVersion":"1.0.0","name":"n","mtu":1}"#, 7, "mtu = 1: expected"),
        (&[("CNI_NETNS", "/x")], r#"{"cniVersion":"1.0.0","name":"n","vlan":9}"#, 2, "vlan = 9: expected"),
        (&[("CNI_NETNS", "/x")], r#"{"cniVersion":"1.0.0","name":"n","socket":"x"}"#, 7, "socket = \"x\""),
    ];
    for (env, stdin, code, part) in table {
        let mut call = node.call("ADD", "c1", &pod.path(), &good).stdin(stdin);
        for (name, value) in *env {
            call = call.env(name, value);
        }
        let text = call.run().refused(*code);
        assert!(text.contains(part), "{env:?}: {text}");
    }
    assert!(agent.books().requests.is_empty());
    // The same call without a fault: the table above has not failed for a reason of its own.
    node.add("c1", &pod).ok();
}

#[test]
fn errors_are_printed_in_the_configurations_version() {
    let node = Node::new();
    let conf = node.conf("0.3.1", json!({"mtu": 5}));
    let outcome = node.call("ADD", "c1", "/x", &conf).run();
    assert_eq!(outcome.json["cniVersion"], "0.3.1");
    outcome.refused(7);
}

#[test]
fn what_is_no_namespace_of_a_container_is_refused() {
    let node = Node::new();
    let agent = node.agent();
    let fifo = node.dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).expect("fifo");
    let plain = node.dir.path().join("plain");
    std::fs::write(&plain, "").expect("file");
    let (fifo, plain) = (fifo.display().to_string(), plain.display().to_string());
    let own = node.ns.path();
    for (path, part) in [
        (fifo.as_str(), "not a network namespace"),
        (plain.as_str(), "not a network namespace"),
        ("/proc/self/ns/mnt", "not a network namespace"),
        ("/proc/self/status", "not a network namespace"),
        ("/proc", "not a network namespace"),
        ("/run/netns/wcni-none", "No such file"),
        (own.as_str(), "the host's own"),
    ] {
        let conf = node.conf("1.1.0", json!({}));
        let text = node.call("ADD", "c1", path, &conf).run().refused(8);
        assert!(text.contains(part) && text.contains(path), "{path}: {text}");
    }
    assert!(agent.books().requests.is_empty());
    let conf = node.conf("1.1.0", json!({}));
    node.call("ADD", "c1", &own, &conf).env("CNI_NETNS_OVERRIDE", "TRUE").run().ok();
    assert!(node.ns.link_names().contains(&"eth0".to_owned()));
}

#[test]
fn version_needs_nothing_and_reads_nothing() {
    let node = Node::new();
    let mut call = node.call("VERSION", "", "dummy", &json!({}));
    for name in &ALL[1..] {
        call = call.without(name);
    }
    // A pipe that nobody closes: whoever reads it waits for ever.
    let mut child = call.command.spawn().expect("start");
    let _open = child.stdin.take().expect("piped");
    let reply = support::Outcome::of(child.wait_with_output().expect("end")).ok();
    assert_eq!(reply["cniVersion"], "1.1.0");
    assert_eq!(
        reply["supportedVersions"],
        json!(["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    );
}

#[test]
fn a_person_gets_an_answer() {
    let weft = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_weft"));
        for name in ALL {
            command.env_remove(name);
        }
        command
    };
    let about = weft().output().expect("run");
    assert!(about.status.success() && about.stdout.is_empty());
    let text = String::from_utf8_lossy(&about.stderr);
    assert!(text.contains("CNI plugin") && text.contains("0.1.0, 0.2.0"), "{text}");
    let version = weft().arg("--version").output().expect("run");
    assert!(version.status.success());
    assert_eq!(version.stdout, format!("weft {}\n", env!("CARGO_PKG_VERSION")).into_bytes());
}
