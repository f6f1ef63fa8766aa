//! The reference runtime: libcni by way of cnitool, in a node, with the host's `/var/lib` covered so that its cache
//! stays in the bed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail};
use e2e::cluster::{Backend, Spec, scenario};
use e2e::kernel::query;
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::Sandbox;
use e2e::traffic::echo::ping;
use serde_json::{Value, json};

/// Where Debian's containernetworking-plugins lie.
const STOCK_PLUGINS: &str = "/usr/lib/cni";

/// cnitool with a configuration directory and a cache of its own.
struct CniTool {
    program: PathBuf,
    node: Netns,
    conf_dir: PathBuf,
    var_lib: PathBuf,
    path: String,
    capabilities: Option<Value>,
}

impl CniTool {
    fn new(node: &Node, bed: &Path, conflist: &Value) -> Result<Self> {
        let (conf_dir, var_lib) = (bed.join("net.d"), bed.join("var-lib"));
        fs::create_dir_all(&conf_dir)?;
        fs::create_dir_all(&var_lib)?;
        fs::write(conf_dir.join("10-weft.conflist"), conflist.to_string())?;
        let path = format!("{}:{STOCK_PLUGINS}", node.binaries.dir.display());
        let node = node.netns().clone();
        Ok(Self { program: find_cnitool()?, node, conf_dir, var_lib, path, capabilities: None })
    }

    fn output(&self, verb: &str, netns: &Netns) -> Result<Output> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.arg(r#"mount --bind "$0" /var/lib && exec "$@""#).arg(&self.var_lib);
        command.arg(&self.program).args([verb, "weft"]).arg(netns.path());
        command.env("NETCONFPATH", &self.conf_dir).env("CNI_PATH", &self.path);
        if let Some(capabilities) = &self.capabilities {
            command.env("CAP_ARGS", capabilities.to_string());
        }
        self.node.output(&mut command)
    }

    fn run(&self, verb: &str, netns: &Netns) -> Result<String> {
        let output = self.output(verb, netns)?;
        let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        if !output.status.success() {
            bail!("cnitool {verb}: {}", text.concat());
        }
        Ok(text[0].clone())
    }
}

/// `scripts/test` puts it into `target/tools`; one in `PATH` does as well.
fn find_cnitool() -> Result<PathBuf> {
    let exe = env::current_exe()?;
    let beside = exe.ancestors().map(|dir| dir.join("tools/cnitool")).find(|path| path.is_file());
    let in_path = || {
        let path = env::var_os("PATH")?;
        env::split_paths(&path).map(|dir| dir.join("cnitool")).find(|path| path.is_file())
    };
    beside.or_else(in_path).context(
        "cnitool is missing: `scripts/test` installs it, or \
         `go install github.com/containernetworking/cni/cnitool@v1.3.0`",
    )
}

fn conflist(version: &str, node: &Node, after: &[Value]) -> Value {
    let weft = json!({
        "type": "weft", "socket": node.agent.cni_socket(), "capabilities": { "ips": true },
    });
    let plugins: Vec<Value> = std::iter::once(weft).chain(after.iter().cloned()).collect();
    json!({ "cniVersion": version, "name": "weft", "plugins": plugins })
}

#[test]
fn add_check_status_gc_del() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let far = cluster.nodes[1].pod("a")?;
        let tool = CniTool::new(node, cluster.bed.root(), &conflist("1.1.0", node, &[]))?;
        let pod = Sandbox::create(node, "by-cnitool")?.netns;
        tool.run("status", &pod)?;
        let result: Value = serde_json::from_str(&tool.run("add", &pod)?)?;
        assert_eq!(result["cniVersion"], "1.1.0", "{result}");
        ping(&pod, far.address, 5, std::time::Duration::from_secs(1))?;
        tool.run("check", &pod)?;
        assert_eq!(node.status()?.pods.attachments, 1);

        // Without arguments libcni itself deletes what its cache holds; a second DEL finds nothing, and succeeds.
        tool.run("gc", &pod)?;
        tool.run("del", &pod)?;
        tool.run("del", &pod)?;
        assert_eq!(query(&pod, "ip -json link show")?.len(), 1, "eth0 is left");
        assert_eq!(node.status()?.pods.attachments, 0);
        Ok(())
    })
}

#[test]
fn check_fails_when_the_bridge_port_is_gone() -> Result<()> {
    scenario(Spec::etcd(1, Backend::HostGw), |cluster| {
        let node = &cluster.nodes[0];
        let tool = CniTool::new(node, cluster.bed.root(), &conflist("1.1.0", node, &[]))?;
        let pod = Sandbox::create(node, "by-cnitool")?.netns;
        tool.run("add", &pod)?;
        pod.ip("link set eth0 down")?;
        pod.ip("link set eth0 name other")?;
        let output = tool.output("check", &pod)?;
        assert!(!output.status.success(), "CHECK of a pod without eth0 succeeds");
        tool.run("del", &pod)?;
        Ok(())
    })
}

/// The list that is installed on nodes, `conf/10-weft.conflist`, for the agent of `node`.
fn installed_conflist(node: &Node) -> Result<Value> {
    let mut list: Value = serde_json::from_str(include_str!("../../conf/10-weft.conflist"))?;
    list["plugins"][0]["socket"] = json!(node.agent.cni_socket());
    Ok(list)
}

#[test]
fn the_installed_list_maps_a_host_port() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let mut tool = CniTool::new(node, cluster.bed.root(), &installed_conflist(node)?)?;
        tool.capabilities =
            Some(json!({ "portMappings": [{ "hostPort": 9090, "containerPort": 80, "protocol": "tcp" }] }));
        let pod = Sandbox::create(node, "chained")?.netns;
        let nat = || node.netns().run(Command::new("iptables-save").args(["-t", "nat"]));
        tool.run("add", &pod)?;
        assert!(nat()?.contains("--dport 9090"), "portmap did not understand our result: {}", nat()?);
        tool.run("del", &pod)?;
        assert!(!nat()?.contains("--dport 9090"), "{}", nat()?);
        assert_eq!(node.status()?.pods.attachments, 0);

        // CHECK without published ports: Debian's portmap 1.1.1 misses IPv6 chains that an IPv4 pod never gets.
        tool.capabilities = None;
        tool.run("add", &pod)?;
        tool.run("check", &pod)?;
        tool.run("del", &pod)?;
        Ok(())
    })
}

/// A later plugin changes what we made: CHECK holds the previous result against the pod, not our memory.
#[test]
fn check_accepts_what_tuning_changed() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let tuning = json!({ "type": "tuning", "mac": "02:00:00:00:01:02", "mtu": 1400 });
        let tool = CniTool::new(node, cluster.bed.root(), &conflist("1.0.0", node, &[tuning]))?;
        let pod = Sandbox::create(node, "tuned")?.netns;
        tool.run("add", &pod)?;
        let link = query(&pod, "ip -json link show eth0")?;
        assert_eq!((&link[0]["mtu"], &link[0]["address"]), (&json!(1400), &json!("02:00:00:00:01:02")));
        tool.run("check", &pod)?;
        tool.run("del", &pod)?;
        Ok(())
    })
}

#[test]
fn without_the_agent_status_fails_and_del_succeeds() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let bed = cluster.bed.root().to_owned();
        let node = &mut cluster.nodes[0];
        let tool = CniTool::new(node, &bed, &conflist("1.1.0", node, &[]))?;
        let pod = Sandbox::create(node, "by-cnitool")?.netns;
        tool.run("add", &pod)?;
        node.agent.kill()?;
        assert!(!tool.output("status", &pod)?.status.success());
        tool.run("del", &pod)?;
        assert_eq!(query(&pod, "ip -json link show")?.len(), 1);
        Ok(())
    })
}
