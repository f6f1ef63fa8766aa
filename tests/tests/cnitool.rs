//! The reference runtime: libcni by way of cnitool, in a node, with the host's `/var/lib` covered so that its cache
//! stays in the bed.

use std::env;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::kernel::query;
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::pod::Sandbox;
use e2e::traffic::echo::ping;
use e2e::traffic::named::{Named, ask_tcp};
use e2e::wait::{SECOND, eventually};
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
        let path = format!("{}:{STOCK_PLUGINS}", node.binaries.dir.display());
        let node = node.netns().clone();
        let tool = Self { program: find_cnitool()?, node, conf_dir, var_lib, path, capabilities: None };
        tool.configure(conflist)?;
        Ok(tool)
    }

    /// Another list from the next call on.
    fn configure(&self, conflist: &Value) -> Result<()> {
        Ok(fs::write(self.conf_dir.join("10-weft.conflist"), conflist.to_string())?)
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
        ping(&pod, far.address, 5, SECOND)?;
        tool.run("check", &pod)?;
        assert_eq!(node.status()?.pods.attachments, 1);

        // Without arguments libcni itself deletes what its cache holds, and names nobody as valid: a pod that another runtime
        // wired is none of its. A second DEL finds nothing, and succeeds.
        let of_another = node.pod("of-another-runtime")?;
        tool.run("gc", &pod)?;
        tool.run("del", &pod)?;
        tool.run("del", &pod)?;
        assert_eq!(query(&pod, "ip -json link show")?.len(), 1, "eth0 is left");
        assert_eq!(node.status()?.pods.attachments, 1);
        ping(&of_another.netns, far.address, 5, std::time::Duration::from_secs(1))?;
        tool.run("status", &pod)?;
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

/// Where a host port leads, by whose rules.
fn leads(node: &Node) -> Result<(bool, bool)> {
    let ours = node.netns().run(Command::new("nft").args(["list", "ruleset"]))?;
    let portmaps = node.netns().run(Command::new("iptables-save").args(["-t", "nat"]))?;
    let of_weft =
        ours.split("table ").any(|table| table.contains("weft-hostports") && table.contains("dport 9090"));
    Ok((of_weft, portmaps.contains("--dport 9090")))
}

const BY_WEFT: (bool, bool) = (true, false);
const BY_PORTMAP: (bool, bool) = (false, true);
const BY_BOTH: (bool, bool) = (true, true);
const NOWHERE: (bool, bool) = (false, false);

fn answers_at_9090(node: &Node) -> Result<bool> {
    Ok(ask_tcp(node.netns(), SocketAddrV4::new(node.net.address, 9090))?.is_some())
}

#[test]
fn the_installed_list_maps_a_host_port() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let mut tool = CniTool::new(node, cluster.bed.root(), &installed_conflist(node)?)?;
        tool.capabilities = Some(published());
        let pod = Sandbox::create(node, "published")?.netns;
        let _server = Named::start(&pod, "published", Ipv4Addr::UNSPECIFIED, 80)?;
        tool.run("add", &pod)?;
        assert_eq!(leads(node)?, BY_WEFT);
        assert!(answers_at_9090(node)?);
        tool.run("check", &pod)?;
        tool.run("del", &pod)?;
        assert_eq!(leads(node)?, NOWHERE);
        assert_eq!(node.status()?.pods.attachments, 0);
        Ok(())
    })
}

fn published() -> Value {
    json!({ "portMappings": [{ "hostPort": 9090, "containerPort": 80, "protocol": "tcp" }] })
}

/// Token buckets in a node, and devices that are made for them.
fn buckets(node: &Node) -> Result<(usize, usize)> {
    let queues = node.netns().run(Command::new("tc").args(["qdisc", "show"]))?;
    let devices = node.netns().ip("-o link show type ifb")?;
    Ok((queues.matches("qdisc tbf").count(), devices.lines().count()))
}

/// A list that names the stock plugins for the capabilities goes on working, and its pods are deleted when weft has
/// taken over.
#[test]
fn chained_portmap_and_bandwidth_keep_their_pods_until_they_go() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
        let bandwidth = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
        let stock = conflist("1.0.0", node, &[portmap.clone(), bandwidth]);
        let mut tool = CniTool::new(node, cluster.bed.root(), &stock)?;
        let mut capabilities = published();
        capabilities["bandwidth"] = json!({
            "ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000,
        });
        tool.capabilities = Some(capabilities);
        let (old, new) = (Sandbox::create(node, "old")?.netns, Sandbox::create(node, "new")?.netns);
        let _servers = [&old, &new].map(|pod| Named::start(pod, "any", Ipv4Addr::UNSPECIFIED, 80));
        for _ in 0..2 {
            tool.run("add", &old)?;
            assert_eq!((leads(node)?, buckets(node)?), (BY_PORTMAP, (2, 1)));
            assert!(answers_at_9090(node)?);
            tool.run("del", &old)?;
            assert_eq!((leads(node)?, buckets(node)?), (NOWHERE, (0, 0)));
        }

        // Until the last of their pods is gone portmap's capability is declared at both, which lead to the same place;
        // bandwidth stays without its own, for a device has one root.
        tool.run("add", &old)?;
        let mut both = conflist("1.0.0", node, &[portmap, json!({ "type": "bandwidth" })]);
        both["plugins"][0]["capabilities"] = json!({ "portMappings": true, "bandwidth": true });
        tool.configure(&both)?;
        tool.run("del", &old)?;
        assert_eq!((leads(node)?, buckets(node)?), (NOWHERE, (0, 0)));
        tool.run("add", &new)?;
        assert_eq!((leads(node)?, buckets(node)?), (BY_BOTH, (2, 1)));
        assert!(answers_at_9090(node)?);
        tool.run("del", &new)?;
        eventually("the limits to go", READY, || Ok(buckets(node)? == (0, 0)))?;
        assert_eq!((leads(node)?, node.status()?.pods.attachments), (NOWHERE, 0));
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
