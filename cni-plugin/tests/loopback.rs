//! The same program under the name `loopback`, in namespaces as runtimes make them: `lo` is there, and down.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Stdio;

use serde_json::{Value, json};
use support::{Call, Namespace, merge};
use tempfile::TempDir;

const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A folder with the link as it is installed, and a namespace for the runtime. No agent is anywhere.
struct Links {
    dir: TempDir,
    runtime: Namespace,
}

impl Links {
    fn new() -> Self {
        let dir = TempDir::new().expect("temporary directory");
        symlink(env!("CARGO_BIN_EXE_weft"), dir.path().join("weft")).expect("link");
        symlink("weft", dir.path().join("loopback")).expect("link");
        Self { dir, runtime: Namespace::new() }
    }

    /// As containerd calls it: for `lo`, and with a configuration of its own making.
    fn call(&self, verb: &str, netns: &str, version: &str, extra: Value) -> Call {
        let mut conf = json!({"cniVersion": version, "name": "cni-loopback", "type": "loopback"});
        merge(&mut conf, extra);
        let mut command = self.runtime.command(self.dir.path().join("loopback"));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "c1").env("CNI_NETNS", netns);
        command.env("CNI_IFNAME", "lo").env("CNI_PATH", self.dir.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Call { command, stdin: conf.to_string() }
    }
}

fn is_up(pod: &Namespace) -> bool {
    pod.link("lo")["flags"].as_array().expect("flags").contains(&json!("UP"))
}

#[test]
fn lo_is_up_from_add_to_del_and_the_answer_is_the_references() {
    let (links, pod) = (Links::new(), Namespace::new());
    let call = |verb| links.call(verb, &pod.path(), "1.0.0", json!({})).run();
    assert!(call("CHECK").refused(104).contains("interface lo is down"));
    // The second one finds it up.
    for _ in 0..2 {
        assert_eq!(
            call("ADD").ok(),
            json!({
                "cniVersion": "1.0.0",
                "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": pod.path()}],
                "ips": [{"interface": 0, "address": "127.0.0.1/8"}, {"interface": 0, "address": "::1/128"}],
            })
        );
        assert!(is_up(&pod) && pod.pings("127.0.0.1") && pod.pings("::1"));
        assert_eq!(call("CHECK").ok(), Value::Null);
    }
    for _ in 0..3 {
        assert_eq!(call("DEL").ok(), Value::Null);
        assert!(!is_up(&pod));
    }
}

#[test]
fn del_succeeds_without_a_namespace_and_spares_the_runtimes_own() {
    let links = Links::new();
    let file = links.dir.path().join("file");
    fs::write(&file, "").expect("write");
    for netns in ["", "/run/netns/wcni-none", "relative", file.to_str().expect("path")] {
        assert_eq!(links.call("DEL", netns, "0.3.1", json!({})).run().ok(), Value::Null);
    }
    assert_eq!(links.call("DEL", "", "0.3.1", json!({})).without("CNI_NETNS").run().ok(), Value::Null);
    links.runtime.ip(&["link", "set", "lo", "up"]);
    for overridden in ["0", "1"] {
        let call = links.call("DEL", &links.runtime.path(), "0.3.1", json!({}));
        call.env("CNI_NETNS_OVERRIDE", overridden).run().ok();
        assert!(is_up(&links.runtime), "the host's own loopback is down");
    }
    for verb in ["ADD", "CHECK"] {
        let text = links.call(verb, &links.runtime.path(), "0.4.0", json!({})).run().refused(8);
        assert!(text.contains("the host's own network namespace"), "{text}");
        let text = links.call(verb, "/run/netns/wcni-none", "0.4.0", json!({})).run().refused(8);
        assert!(text.contains("CNI_NETNS = \"/run/netns/wcni-none\": No such file"), "{text}");
    }
}

#[test]
fn every_version_has_its_shape_and_its_verbs() {
    let links = Links::new();
    let listed = links.call("VERSION", "dummy", "1.0.0", json!({})).stdin("").run().ok();
    assert_eq!(listed["supportedVersions"], json!(VERSIONS));
    let mut as_weft = links.runtime.command(links.dir.path().join("weft"));
    as_weft.env("CNI_COMMAND", "VERSION").stdin(Stdio::null());
    let answer = as_weft.output().expect("the plugin starts").stdout;
    assert_eq!(serde_json::from_slice::<Value>(&answer).expect("JSON"), listed, "by either name");
    for (n, version) in VERSIONS.into_iter().enumerate() {
        let pod = Namespace::new();
        let call = |verb, extra| links.call(verb, &pod.path(), version, extra).run();
        let result = call("ADD", json!({})).ok();
        assert_eq!(result["cniVersion"], version);
        let (v4, v6) = match n < 2 {
            true => (&result["ip4"]["ip"], &result["ip6"]["ip"]),
            false => (&result["ips"][0]["address"], &result["ips"][1]["address"]),
        };
        assert_eq!((v4, v6), (&json!("127.0.0.1/8"), &json!("::1/128")), "{result}");
        let check = call("CHECK", json!({"prevResult": result}));
        if n < 4 {
            drop(check.refused(1))
        } else {
            drop(check.ok())
        }
        for verb in ["STATUS", "GC"] {
            let outcome = call(verb, json!({"cni.dev/valid-attachments": []}));
            if n < 6 { drop(outcome.refused(1)) } else { drop(outcome.ok()) }
        }
        assert!(is_up(&pod), "GC is no DEL");
        call("DEL", json!({})).ok();
    }
}

#[test]
fn a_previous_result_is_passed_on() {
    let (links, pod) = (Links::new(), Namespace::new());
    let call =
        |previous: Value| links.call("ADD", &pod.path(), "1.1.0", json!({"prevResult": previous})).run().ok();
    // With what nobody here reads.
    let newest = json!({
        "cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": pod.path(), "socketPath": "/s"}],
        "ips": [{"address": "10.1.2.3/24", "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.2.1", "mtu": 1400}],
    });
    assert_eq!(call(newest.clone()), newest);
    assert!(is_up(&pod));
    let older = json!({
        "cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.1.2.3/24"}], "dns": {},
    });
    let expected = json!({"cniVersion": "1.1.0", "interfaces": [], "ips": [{"address": "10.1.2.3/24"}]});
    assert_eq!(call(older), expected);
    let bad = links.call("ADD", &pod.path(), "1.1.0", json!({"prevResult": {"cniVersion": "9"}})).run();
    assert!(bad.refused(6).contains("prevResult cannot be read"));
}

/// Without IPv6, and with an address beside the loopback's own.
#[test]
fn what_lo_has_is_what_is_told() {
    let (links, pod) = (Links::new(), Namespace::new());
    // Of this scope it comes before the loopback's own.
    pod.ip(&["address", "add", "192.0.2.7/32", "dev", "lo", "scope", "host"]);
    let output = pod.command("sysctl").args(["-q", "-w", "net.ipv6.conf.all.disable_ipv6=1"]).output();
    assert!(output.expect("sysctl").status.success());
    let result = links.call("ADD", &pod.path(), "1.0.0", json!({})).run().ok();
    assert_eq!(result["ips"], json!([{"interface": 0, "address": "127.0.0.1/8"}]));
    let person = links.call("", "", "1.0.0", json!({}));
    let told = { person }.command.output().expect("the plugin starts");
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("as CNI plugin loopback") && told.contains("0.3.1"), "{told}");
}
