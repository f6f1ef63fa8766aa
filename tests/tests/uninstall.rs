//! `weftctl uninstall`: a node that weft leaves is as it was before weft came. The node is compared as a whole: links,
//! addresses, routes, neighbours, rulesets, kernel settings, files; foreign things of every sort stand on it.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Backend, READY, Spec, scenario_prepared};
use e2e::host::HostSnapshot;
use e2e::node::Node;
use e2e::pod::{Pod, Sandbox};
use e2e::random::{Moments, Random};
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually, let_pass};
use serde_json::{Value, json};

const FORWARD: &str = "ipv4/ip_forward";

/// What came back.
#[derive(Debug)]
struct Said {
    status: Option<i32>,
    text: String,
}

impl Said {
    fn well(self) -> Result<String> {
        ensure!(self.status == Some(0), "{self:?}");
        Ok(self.text)
    }

    fn refused(self, why: &str) -> Result<String> {
        ensure!(self.status == Some(1), "{self:?}");
        ensure!(self.text.contains("REFUSED") && self.text.contains(why), "{why}: {self:?}");
        ensure!(self.text.ends_with("nothing was removed\n"), "{self:?}");
        Ok(self.text)
    }
}

fn command(node: &Node, args: &[&str]) -> Command {
    let mut command = Command::new(node.binaries.ctl());
    command.arg("uninstall").arg("--cni-conf-dir").arg(conf_dir(node)).args(args);
    command.arg("--").args(node.agent.options());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn uninstall(node: &Node, args: &[&str]) -> Result<Said> {
    let output = node.netns().output(&mut command(node, args))?;
    let text = [output.stdout, output.stderr].concat();
    Ok(Said { status: output.status.code(), text: String::from_utf8_lossy(&text).into_owned() })
}

fn conf_dir(node: &Node) -> PathBuf {
    node.agent.dir().join("net.d")
}

/// Once no address is being looked for duplicates of: its routes come after that.
fn snapshot(node: &Node) -> Result<HostSnapshot> {
    eventually("addresses to be settled", READY, || {
        Ok(node.netns().ip("-o address show tentative")?.trim().is_empty())
    })?;
    HostSnapshot::of_node(node.netns(), node.agent.dir(), &["weftd.log"])
}

fn same(before: &HostSnapshot, node: &Node, what: &str) -> Result<()> {
    let difference = before.difference(&snapshot(node)?);
    ensure!(difference.is_empty(), "{what}:\n{difference}");
    Ok(())
}

/// Things of an operator's and of other programs', of every sort that weft has something of as well.
fn furnish(node: &Node) -> Result<()> {
    let netns = node.netns();
    for command in [
        "link add br-other type bridge",
        "address add 10.5.250.1/24 dev br-other",
        "link set br-other up",
        "link add flannel.9 type vxlan id 9 dstport 4789 local 192.168.77.11 nolearning",
        "link add vethother type veth peer name vethpeer",
        "route add 10.99.0.0/24 via 192.168.77.1",
        "route add 10.5.251.0/24 via 192.168.77.1 proto static",
        "route add blackhole 10.98.0.0/24 table 100",
        "neighbor add 192.168.77.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
        "rule add from 10.97.0.0/24 table 100",
    ] {
        netns.ip(command)?;
    }
    netns.run(Command::new("nft").arg("add table ip other { chain forward { type filter hook forward priority 0; policy drop; ip saddr 10.97.0.0/16 accept; }; }"))?;
    // What Docker and ufw leave: pods' packets pass by weft's accepts alone.
    netns.run(Command::new("iptables-legacy").args(["-P", "FORWARD", "DROP"]))?;
    netns.run(Command::new("iptables").args(["-P", "FORWARD", "DROP"]))?;
    fs::create_dir_all(conf_dir(node))?;
    fs::write(conf_dir(node).join("50-other.conflist"), r#"{"name":"other","plugins":[{"type":"bridge"}]}"#)?;
    netns.set_sysctl(FORWARD, "0")
}

/// What an operator puts on the node beside the agent.
fn install_conflist(node: &Node) -> Result<()> {
    let mut conflist: Value = serde_json::from_str(include_str!("../../conf/10-weft.conflist"))?;
    conflist["plugins"][0]["socket"] = json!(node.agent.cni_socket());
    Ok(fs::write(conf_dir(node).join("10-weft.conflist"), conflist.to_string())?)
}

fn leaves_as_it_was(backend: Backend) -> Result<()> {
    scenario_prepared(Spec::etcd(2, backend).flag("--ip-masq"), |cluster| {
        furnish(&cluster.nodes[0])?;
        if backend != Backend::Udp {
            // The name alone makes nothing weft's.
            cluster.nodes[0].netns().ip("tuntap add dev flannel0 mode tun multi_queue")?;
        }
        let before = snapshot(&cluster.nodes[0])?;
        cluster.put_config()?;
        cluster.start_agents()?;
        install_conflist(&cluster.nodes[0])?;
        let far = cluster.nodes[1].pod("far")?;
        let first = cluster.nodes[0].pod("first")?;
        let mut second = Sandbox::create(&cluster.nodes[0], "n1-second")?;
        second.call.config["runtimeConfig"] = json!({
            "portMappings": [{ "hostPort": 53, "containerPort": 53 }],
            "bandwidth": { "egressRate": 8_000_000, "egressBurst": 800_000 },
        });
        let second = second.wire()?;
        ping(&far.netns, second.address, 5, SECOND)?;
        first.delete()?;

        // Not under a running agent, which would put everything back.
        uninstall(&cluster.nodes[0], &["--force"])?.refused("systemctl disable --now weftd")?;
        assert_eq!(cluster.nodes[0].agent.stop()?.code(), Some(0));
        // Not under pods, nor under what others have hung on the bridge; and a look changes nothing.
        let node = &cluster.nodes[0];
        node.netns().ip("link set vethother master cni0")?;
        let installed = snapshot(node)?;
        let text = uninstall(node, &[])?.refused("1 pod is attached")?;
        assert!(
            text.contains("n1-second")
                && text.contains("1 other port is attached")
                && text.contains("vethother on cni0, which is not weft's"),
            "{text}"
        );
        let text = uninstall(node, &["--force", "--dry-run", "--release-lease"])?.well()?;
        for expected in ["conflist", "lease", "rules", "veth", "bridge", "ip_forward back to 0", "a dry run"]
        {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        same(&installed, node, "a refusal and a dry run")?;
        node.netns().ip("link set vethother nomaster")?;
        second.delete()?;

        // The store is away: everything goes but the memory of the lease, which another run needs.
        cluster.etcd()?.kill()?;
        let said = uninstall(&cluster.nodes[0], &["--release-lease"])?;
        assert_eq!(said.status, Some(1), "{said:?}");
        assert!(
            said.text.contains("FAILED   lease") && said.text.contains("kept for another run"),
            "{said:?}"
        );
        let left = before.difference(&snapshot(&cluster.nodes[0])?);
        assert!(left.lines().all(|line| line.starts_with("+ file:") && line.contains("/state")), "{left}");
        cluster.etcd()?.resume()?;
        let leases = cluster.etcd()?.lease_keys()?.len();
        let text = uninstall(&cluster.nodes[0], &["--release-lease"])?.well()?;
        assert!(text.contains("removed  lease"), "{text}");
        same(&before, &cluster.nodes[0], "after uninstall")?;
        assert_eq!((leases, cluster.etcd()?.lease_keys()?.len()), (2, 1), "leases before and after");

        let again = uninstall(&cluster.nodes[0], &["--release-lease"])?.well()?;
        assert!(again.ends_with("nothing of weft is left to remove\n"), "{again}");
        same(&before, &cluster.nodes[0], "the second time")?;

        // The others go on, and the node may come back.
        cluster.nodes[1].wait_peers(0, READY)?;
        ping(&cluster.nodes[1].net.netns, far.address, 5, SECOND)?;
        cluster.nodes[0].agent.start()?;
        cluster.wait_converged()?;
        let back = cluster.nodes[0].pod("back")?;
        ping(&back.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}

#[test]
fn a_vxlan_node_is_left_as_it_was() -> Result<()> {
    leaves_as_it_was(Backend::Vxlan)
}

#[test]
fn a_host_gw_node_is_left_as_it_was() -> Result<()> {
    leaves_as_it_was(Backend::HostGw)
}

#[test]
fn a_udp_node_is_left_as_it_was() -> Result<()> {
    leaves_as_it_was(Backend::Udp)
}

#[test]
fn an_uninstall_that_is_cut_off_can_be_run_again() -> Result<()> {
    const KILLS: u64 = 6;
    scenario_prepared(Spec::embedded(2, Backend::Vxlan), |cluster| {
        furnish(&cluster.nodes[0])?;
        cluster.put_config()?;
        // The store, which stays, is there before.
        cluster.nodes[1].agent.start()?;
        cluster.nodes[1].agent.wait_ready(READY)?;
        let before = snapshot(&cluster.nodes[0])?;
        let mut random = Random::of_the_moment();
        let mut moments = Moments::within(Duration::from_millis(100));
        let (mut cut_off, mut round) = (0, 0);
        while cut_off < KILLS {
            ensure!(round < KILLS * 10, "{cut_off} of {round} were cut off");
            round += 1;
            let node = &mut cluster.nodes[0];
            node.agent.restart(READY)?;
            install_conflist(node)?;
            let pods = (0..3).map(|n| node.pod(&format!("{round}-{n}"))).collect::<Result<Vec<Pod>>>()?;
            // Every other time the agent was killed, and its socket and an ADD of its last moments lie there.
            if round % 2 == 0 {
                node.agent.kill()?;
            } else {
                node.agent.stop()?;
            }
            let mut running: Child = node.netns().spawn(&mut command(node, &["--force"]))?;
            // The moment is the test.
            let_pass(moments.next(&mut random));
            running.kill()?;
            let hit = running.wait()?.code().is_none();
            moments.learn(hit);
            cut_off += u64::from(hit);
            let text = uninstall(node, &["--force"])?.well()?;
            ensure!(text.contains("store.db: network configuration and leases"), "{text}");
            same(&before, node, &format!("round {round}"))?;
            for pod in pods {
                let left = e2e::kernel::query(&pod.netns, "ip -json link show")?;
                ensure!(left.len() == 1, "{left:?} is left in the pod");
                pod.netns.remove()?;
            }
        }
        report::figure(format_args!(
            "{cut_off} of {round} runs of uninstall were cut off, every second one left the node as it was"
        ));
        Ok(())
    })
}

#[test]
fn what_was_there_before_weft_stays_but_the_tunnel() -> Result<()> {
    scenario_prepared(Spec::etcd(2, Backend::Vxlan), |cluster| {
        cluster.put_config()?;
        cluster.nodes[1].agent.start()?;
        cluster.nodes[1].agent.wait_ready(READY)?;
        let node = &mut cluster.nodes[0];
        furnish(node)?;
        // Already as weft wants it: not weft's to put back.
        node.netns().set_sysctl(FORWARD, "1")?;
        for command in [
            "link add cni0 address 02:00:00:00:00:07 type bridge",
            "link set cni0 up",
            "link set vethother master cni0",
        ] {
            node.netns().ip(command)?;
        }
        let before = snapshot(node)?;
        // As flanneld leaves it: the tunnel, and a route to a peer that is long gone.
        for command in [
            "link add flannel.1 mtu 1450 type vxlan id 1 dev eth0 local 192.168.77.11 dstport 8472 nolearning",
            "link set flannel.1 up",
            "address add 10.5.7.0/32 dev flannel.1",
            "neighbor add 10.5.9.0 lladdr 02:00:00:00:00:09 dev flannel.1 nud permanent",
            "route add 10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink",
        ] {
            node.netns().ip(command)?;
        }
        let made_by = |node: &Node| e2e::kernel::query(node.netns(), "ip -json link show dev flannel.1");
        let tunnel = made_by(node)?;
        node.agent.restart(READY)?;
        node.pod("a")?;
        assert_eq!(made_by(node)?[0]["ifindex"], tunnel[0]["ifindex"], "the tunnel was not adopted");
        node.agent.stop()?;

        // Gone back to flannel: nothing of this is weft's any more.
        let flanneld = node.agent.dir().join("flanneld");
        fs::copy("/bin/sleep", &flanneld).context("a process of that name")?;
        let mut flannels = node.netns().spawn(Command::new(&flanneld).arg("100"))?;
        eventually("a flanneld to run", READY, || {
            Ok(fs::read_to_string(format!("/proc/{}/comm", flannels.id()))?.trim() == "flanneld")
        })?;
        uninstall(node, &["--force"])?.refused("flanneld runs in this network namespace")?;
        flannels.kill()?;
        flannels.wait()?;
        fs::remove_file(&flanneld)?;

        let text = uninstall(node, &["--force"])?.well()?;
        assert!(
            text.contains("stays    bridge cni0, with its addresses: it was there before weft"),
            "{text}"
        );
        assert!(text.contains("expires by itself; --release-lease"), "{text}");
        let difference = before.difference(&snapshot(node)?);
        // A bridge that is not weft's keeps what it has: the gateway's address, the MTU of the last pods.
        let of_bridge =
            |line: &str| [": cni0", "dev cni0", "conf/cni0/"].iter().any(|part| line.contains(part));
        let unexpected: Vec<&str> = difference.lines().filter(|line| !of_bridge(line)).collect();
        assert!(unexpected.is_empty(), "{difference}");
        Ok(())
    })
}

/// The same command, by one who can change no kernel setting.
fn with_settings_read_only(command: &Command) -> Command {
    const MOUNTS: &str =
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"";
    let mut wrapped = Command::new("unshare");
    wrapped.args(["--mount", "sh", "-c", MOUNTS, "sh"]).arg(command.get_program()).args(command.get_args());
    wrapped
}

#[test]
fn a_setting_that_cannot_be_put_back_is_not_forgotten() -> Result<()> {
    scenario_prepared(Spec::embedded(1, Backend::HostGw), |cluster| {
        let node = &mut cluster.nodes[0];
        fs::create_dir_all(conf_dir(node))?;
        node.netns().set_sysctl(FORWARD, "0")?;
        let before = snapshot(node)?;
        cluster.put_config()?;
        cluster.start_agents()?;
        let node = &mut cluster.nodes[0];
        node.agent.stop()?;
        let output = node.netns().output(&mut with_settings_read_only(&command(node, &[])))?;
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("FAILED   sysctl    net.ipv4.ip_forward back to 0"), "{text}");
        assert!(text.contains("run/sysctls.json: kept for another run"), "{text}");
        assert!(
            !text.contains("removed  files     ") || !text.contains("/state: 2 files\nremoved"),
            "{text}"
        );
        assert_eq!(node.netns().sysctl(FORWARD)?, "1");
        let text = uninstall(node, &["--remove-store"])?.well()?;
        assert!(text.contains("removed  sysctl    net.ipv4.ip_forward back to 0"), "{text}");
        same(&before, node, "after uninstall")
    })
}

#[test]
fn a_setting_that_somebody_changed_and_a_store_that_others_use_stay() -> Result<()> {
    scenario_prepared(Spec::embedded(2, Backend::HostGw), |cluster| {
        let store = cluster.bed.root().join("store.db");
        for node in &cluster.nodes {
            node.netns().set_sysctl(FORWARD, "0")?;
            fs::create_dir_all(conf_dir(node))?;
        }
        cluster.put_config()?;
        cluster.start_agents()?;
        for node in &mut cluster.nodes {
            node.agent.stop()?;
        }
        let [near, far] = cluster.nodes.as_slice() else { unreachable!("two nodes") };
        near.netns().set_sysctl(FORWARD, "2")?;
        fs::write(near.agent.state_dir().join("notes.txt"), "the operator's")?;
        let text = uninstall(near, &["--remove-store"])?.refused("holds leases of other nodes: ")?;
        assert!(text.contains(&far.net.address.to_string()), "{text}");
        let text = uninstall(near, &["--release-lease"])?.well()?;
        assert!(text.contains("sysctl net.ipv4.ip_forward = 2: somebody has changed it"), "{text}");
        assert!(text.contains("notes.txt: not weft's"), "{text}");
        assert_eq!(near.netns().sysctl(FORWARD)?, "2");
        assert!(near.agent.state_dir().join("notes.txt").exists() && store.exists());

        let json = far.netns().output(&mut command(far, &["--json", "--release-lease", "--remove-store"]))?;
        let said: Value = serde_json::from_slice(&json.stdout)?;
        assert_eq!(
            (json.status.code(), &said["removed"], &said["failed"]),
            (Some(0), &json!(true), &json!([])),
            "{said}"
        );
        assert!(
            said["removes"].as_array().is_some_and(|all| all.iter().any(|t| t["kind"] == "store")),
            "{said}"
        );
        assert_eq!(far.netns().sysctl(FORWARD)?, "0");
        assert!(!store.exists(), "the store is left");
        Ok(())
    })
}
