//! The udp backend's device on nodes that change hands: from flanneld and back to it, from vxlan and back to it. What the
//! kernel holds of it is struck in `repair`, and taken off a node in `uninstall`.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Backend, READY, Spec, scenario, scenario_prepared};
use e2e::kernel::query;
use e2e::node::Node;
use e2e::promise::kept;
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Makes the device that is named in its argument, says which it got, and has it until it ends: flanneld's is neither
/// persistent nor of several queues.
const DEVICE_HOLDER: &str = r#"
import fcntl, os, signal, struct, sys
tun = os.open("/dev/net/tun", os.O_RDWR)
got = fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1001))
print(got[:16].rstrip(b"\0").decode(), flush=True)
signal.pause()
"#;

/// What flanneld does to the kernel, and nothing else of it.
struct Flanneld {
    device: String,
    process: Child,
}

impl Flanneld {
    fn start(node: &Node, subnet: &str) -> Result<Self> {
        let mut command = Command::new("python3");
        command.args(["-c", DEVICE_HOLDER, "flannel%d"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = node.netns().spawn(&mut command).context("python3 is needed (package python3)")?;
        let mut device = String::new();
        BufReader::new(process.stdout.take().context("stdout")?).read_line(&mut device)?;
        let flanneld = Self { device: device.trim().to_owned(), process };
        let dev = &flanneld.device;
        for command in [
            format!("address add {subnet}/32 dev {dev}"),
            format!("link set {dev} up mtu 1472"),
            format!("route add 10.5.0.0/16 dev {dev}"),
        ] {
            node.netns().ip(&command)?;
        }
        Ok(flanneld)
    }

    /// Its device and all that stands on it go with it.
    fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.process.id().try_into()?), Signal::SIGTERM)?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Flanneld {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Devices named as flannel names them.
fn devices(node: &Node) -> Result<Vec<String>> {
    let links = query(node.netns(), "ip -json link show")?;
    let names = links.iter().filter_map(|link| link["ifname"].as_str());
    Ok(names.filter(|name| name.starts_with("flannel")).map(ToOwned::to_owned).collect())
}

/// What flanneld has made, and stands beside it; not the link-local addresses, which the kernel gives by itself.
fn seen(node: &Node) -> Result<Vec<String>> {
    ["link", "-4 address", "-6 address show scope global", "route"]
        .into_iter()
        .map(|what| node.netns().ip(what))
        .collect()
}

fn way_to(node: &Node, address: &str) -> Result<String> {
    Ok(node.netns().ip(&format!("route get {address}"))?.lines().next().unwrap_or_default().to_owned())
}

fn pending(node: &Node) -> Result<String> {
    let pending = node.status()?.dataplane.context("no dataplane yet")?.pending;
    Ok(pending.iter().map(|p| format!("{}: {}\n", p.object, p.error)).collect())
}

#[test]
fn a_node_is_taken_over_from_flanneld_and_given_back_to_it() -> Result<()> {
    let took = kept("udp: from the end of flanneld to device, address and route", SECOND, there_and_back)?;
    report::took("udp: from the end of flanneld to device, address and route", took);
    Ok(())
}

/// The time without device, address and route.
fn there_and_back() -> Result<Duration> {
    let mut without = Duration::MAX;
    scenario_prepared(Spec::etcd(2, Backend::Udp), |cluster| {
        // To flannel udp is what an absent Backend means.
        cluster.etcd()?.put_config(r#"{"Network":"10.5.0.0/16"}"#)?;
        cluster.nodes[1].agent.start()?;
        cluster.nodes[1].agent.wait_ready(READY)?;
        let address = cluster.nodes[0].net.address;
        let value = format!(r#"{{"PublicIP":"{address}","PublicIPv6":null}}"#);
        cluster.etcd()?.put_entry(b"10.5.77.0-24", value.as_bytes())?;
        let peer = cluster.nodes[1].lease_key()?.v4.addr().to_string();

        let flanneld = Flanneld::start(&cluster.nodes[0], "10.5.77.0")?;
        assert_eq!(flanneld.device, "flannel0");
        let before = seen(&cluster.nodes[0])?;
        let node = &mut cluster.nodes[0];
        node.agent.start()?;
        let in_use = "link flannel0: flannel0 is in use by another process (a running flanneld?)";
        eventually("the obstacle to be named", READY, || Ok(pending(node)?.contains(in_use)))?;
        let status = node.status()?;
        ensure!(!status.ready && status.waiting_for.concat().contains(in_use), "{:?}", status.waiting_for);
        ensure!(status.peers.iter().all(|peer| !peer.programmed), "{:?}", status.peers);
        assert_eq!(seen(node)?, before, "touched");

        flanneld.stop()?;
        let gone = Instant::now();
        let by_ours = format!("{peer} dev flannel0 src 10.5.77.0");
        eventually("weft to take over", READY, || Ok(way_to(node, &peer)?.starts_with(&by_ours)))?;
        without = gone.elapsed();
        node.agent.wait_ready(READY)?;
        assert_eq!((node.lease_key()?.to_string(), pending(node)?), ("10.5.77.0-24".into(), String::new()));
        let far = cluster.nodes[1].pod("a")?;
        let near = cluster.nodes[0].pod("a")?;
        ping(&near.netns, far.address, 5, SECOND)?;

        // And back: nothing is taken away from a node that goes back to flannel without an uninstall.
        let node = &mut cluster.nodes[0];
        node.agent.stop()?;
        assert_eq!(devices(node)?, ["flannel0"]);
        let flanneld = Flanneld::start(node, "10.5.77.0")?;
        assert_eq!(flanneld.device, "flannel1");
        assert!(way_to(node, &peer)?.contains("dev flannel1"), "{}", way_to(node, &peer)?);

        // A weftd that is started all the same leaves flanneld the packets, and says so.
        node.agent.start()?;
        node.agent.wait_ready(READY)?;
        let overruled = "route 10.5.0.0/16: its packets take a route of somebody else's, 10.5.0.0/16 dev flannel1 proto 3 metric 0";
        eventually("the foreign route to be named", READY, || Ok(pending(node)?.contains(overruled)))?;
        assert!(way_to(node, &peer)?.contains("dev flannel1"), "{}", way_to(node, &peer)?);
        assert_eq!(devices(node)?, ["flannel0", "flannel1"]);
        flanneld.stop()?;
        eventually("nothing to be in the way", READY, || Ok(pending(node)?.is_empty()))?;
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })?;
    Ok(without)
}

#[test]
fn a_cluster_that_changes_its_backend_and_back_keeps_its_pods_and_nothing_of_the_other() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let leases = [cluster.nodes[0].lease_key()?, cluster.nodes[1].lease_key()?];
        for (backend, device) in [("udp", "flannel0"), ("vxlan", "flannel.1")] {
            let config = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{backend}"}}}}"#);
            cluster.etcd()?.put_config(&config)?;
            for node in &mut cluster.nodes {
                eventually("the change to be said", READY, || {
                    let notice = node.status()?.network.and_then(|network| network.notice);
                    Ok(notice.is_some_and(|n| n.text.contains(&format!("Backend.Type = {backend}"))))
                })?;
                node.agent.stop()?;
                node.agent.restart(READY)?;
            }
            cluster.wait_converged()?;
            for node in &cluster.nodes {
                eventually("the other backend's to go", READY, || Ok(devices(node)? == [device]))?;
                let routes = node.netns().ip("route show proto 87")?;
                ensure!(routes.lines().all(|route| route.contains(device)), "{backend}: {routes}");
                assert_eq!(pending(node)?, "");
            }
            assert_eq!([cluster.nodes[0].lease_key()?, cluster.nodes[1].lease_key()?], leases, "{backend}");
            ping(&near.netns, far.address, 5, SECOND)?;
        }
        Ok(())
    })
}

#[test]
fn whose_packets_are_believed_is_taken_over_by_a_running_node_and_the_port_is_not() -> Result<()> {
    scenario(Spec::etcd(1, Backend::Udp), |cluster| {
        let notice = |node: &Node| -> Result<String> {
            let notice = node.status()?.network.context("no network")?.notice;
            Ok(notice.map(|n| n.text).unwrap_or_default())
        };
        cluster.etcd()?.put_config(
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","StrictSource":true,"PeersBehindNAT":true}}"#,
        )?;
        let node = &cluster.nodes[0];
        eventually("the policies to be taken over", READY, || {
            Ok(node.agent.log().contains("port 8285, StrictSource, PeersBehindNAT"))
        })?;
        assert_eq!(notice(node)?, "");
        cluster.etcd()?.put_config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":9000}}"#)?;
        let node = &cluster.nodes[0];
        eventually("the port to need a restart", READY, || {
            Ok(notice(node)?.contains("Backend.Port = 9000, in force: 8285"))
        })?;
        Ok(())
    })
}
