//! A node as a network namespace with a bridge, pods as others, and the plugin's binary run between them.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod double;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use double::Double;

const PREFIX: &str = "wcni-";
pub(crate) const BRIDGE_MAC: &str = "02:77:00:00:00:01";

/// A network namespace that goes with its owner.
pub(crate) struct Namespace(String);

impl Namespace {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        Self(name)
    }

    pub(crate) fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// `ip -json` inside; every object of the answer.
    pub(crate) fn ip_json(&self, args: &[&str]) -> Vec<Value> {
        let output = Command::new("ip").args(["-n", &self.0, "-d", "-json"]).args(args).output().expect("ip");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    pub(crate) fn ip(&self, args: &[&str]) {
        ip(&[&["-n", &self.0], args].concat());
    }

    /// The link of that name, or null.
    pub(crate) fn link(&self, name: &str) -> Value {
        let links = self.ip_json(&["link", "show"]);
        links.into_iter().find(|l| l["ifname"] == name).unwrap_or_default()
    }

    pub(crate) fn link_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .ip_json(&["link", "show"])
            .iter()
            .filter_map(|l| l["ifname"].as_str().map(str::to_owned))
            .filter(|name| name != "lo")
            .collect();
        names.sort();
        names
    }

    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg(program);
        command
    }

    pub(crate) fn read(&self, path: &str) -> String {
        let output = self.command("cat").arg(path).output().expect("cat");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn write(&self, path: &str, value: &str) {
        let status = self.command("sh").args(["-c", "echo \"$1\" >\"$0\"", path, value]).status();
        assert!(status.is_ok_and(|status| status.success()), "{path} = {value}");
    }

    pub(crate) fn pings(&self, address: &str) -> bool {
        let mut ping = self.command("ping");
        ping.args(["-c1", "-W2", "-q", address]).stdout(Stdio::null()).status().expect("ping").success()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).stderr(Stdio::null()).status();
    }
}

fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("the tests need iproute2");
    assert!(
        output.status.success(),
        "ip {args:?} (the tests need root): {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A node with the bridge that the agent would have made, and a run directory of its own.
pub(crate) struct Node {
    pub(crate) ns: Namespace,
    pub(crate) dir: TempDir,
}

impl Node {
    pub(crate) fn new() -> Self {
        let ns = Namespace::new();
        ns.ip(&["link", "add", "cni0", "address", BRIDGE_MAC, "type", "bridge"]);
        ns.ip(&["address", "add", "10.77.0.1/24", "dev", "cni0"]);
        ns.ip(&["-6", "address", "add", "fd77::1/64", "dev", "cni0", "nodad"]);
        ns.ip(&["link", "set", "cni0", "up"]);
        ns.write("/proc/sys/net/ipv4/ip_forward", "1");
        Self { ns, dir: TempDir::new().expect("temporary directory") }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("cni.sock")
    }

    pub(crate) fn agent(&self) -> Double {
        Double::listen(&self.socket(), &self.ns)
    }

    pub(crate) fn conf(&self, version: &str, extra: Value) -> Value {
        let mut conf =
            json!({"cniVersion": version, "name": "mesh", "type": "weft", "socket": self.socket()});
        merge(&mut conf, extra);
        conf
    }

    pub(crate) fn call(&self, verb: &str, id: &str, netns: &str, conf: &Value) -> Call {
        let mut command = self.ns.command(env!("CARGO_BIN_EXE_weft"));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/nowhere")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Call { command, stdin: conf.to_string() }
    }

    pub(crate) fn add(&self, id: &str, pod: &Namespace) -> Outcome {
        self.call("ADD", id, &pod.path(), &self.conf("1.1.0", json!({}))).run()
    }

    pub(crate) fn del(&self, id: &str, netns: &str) -> Outcome {
        self.call("DEL", id, netns, &self.conf("1.1.0", json!({}))).run()
    }

    pub(crate) fn tombstones(&self) -> Vec<weft_shared::tombstone::Tombstone> {
        let dir = weft_shared::tombstone::dir_beside(&self.socket());
        let found = weft_shared::tombstone::list(&dir).expect("list");
        found.into_iter().map(|(path, t)| t.unwrap_or_else(|| panic!("{path:?} is torn"))).collect()
    }
}

/// One invocation of the plugin, not yet started.
pub(crate) struct Call {
    pub(crate) command: Command,
    pub(crate) stdin: String,
}

impl Call {
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    pub(crate) fn stdin(mut self, text: &str) -> Self {
        text.clone_into(&mut self.stdin);
        self
    }

    pub(crate) fn stdout(mut self, file: File) -> Self {
        self.command.stdout(file);
        self
    }

    pub(crate) fn spawn(mut self) -> Child {
        let mut child = self.command.spawn().expect("the plugin starts");
        // A plugin that refuses its environment does not read.
        let _ = child.stdin.take().expect("piped").write_all(self.stdin.as_bytes());
        child
    }

    pub(crate) fn run(self) -> Outcome {
        Outcome::of(self.spawn().wait_with_output().expect("the plugin ends"))
    }
}

#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    /// Null when nothing was printed.
    pub(crate) json: Value,
}

impl Outcome {
    pub(crate) fn of(output: Output) -> Self {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(stderr, "", "runtimes forward stderr, so the plugin is silent there");
        let json = match output.stdout.as_slice() {
            [] => Value::Null,
            text => serde_json::from_slice(text).expect("stdout is JSON"),
        };
        Self { code: output.status.code(), json }
    }

    /// Success; the result if there was one.
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        assert_eq!(self.code, Some(0), "{}", self.json);
        self.json
    }

    /// An error object with that code; its text.
    #[track_caller]
    pub(crate) fn refused(self, code: u32) -> String {
        assert_eq!(self.code, Some(1), "{}", self.json);
        assert_eq!(self.json["code"], code, "{}", self.json);
        assert!(self.json["cniVersion"].is_string(), "{}", self.json);
        format!("{} {}", self.json["msg"].as_str().expect("msg"), self.json["details"])
    }
}

pub(crate) fn merge(into: &mut Value, extra: Value) {
    let (Some(into), Value::Object(extra)) = (into.as_object_mut(), extra) else { panic!("objects") };
    into.extend(extra);
}

/// Waits for a condition; the moments between two looks are nobody's measure.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        #[expect(clippy::disallowed_methods, reason = "the pace of waiting for a condition")]
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn host_veth(id: &str) -> String {
    let attachment = weft_shared::protocol::Attachment {
        network: "mesh".parse().expect("name"),
        container_id: id.parse().expect("ID"),
        ifname: "eth0".parse().expect("name"),
    };
    weft_shared::names::host_ifname(&attachment).to_string()
}

pub(crate) fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
