//! The plugin and the agent's records under everything that runtimes do to them, beyond what any plugin is asked for: that
//! is the conformance suite's (`conform.rs`).

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use cni_plugin::reply::SuccessReply;
use e2e::books::{invariant, live_veths};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::kernel::query;
use e2e::plugin::{finish, netconf};
use e2e::pod::{Pod, Sandbox, host_veth};
use e2e::random::{Moments, Random};
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually, let_pass};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const TRY_AGAIN_LATER: u64 = 11;

fn one_node() -> Spec {
    Spec::etcd(1, Backend::Vxlan)
}

/// Runs the jobs at the same moment, each on its own thread.
fn all_at_once<T: Send>(jobs: Vec<Box<dyn FnOnce() -> Result<T> + Send + '_>>) -> Result<Vec<T>> {
    let start = Barrier::new(jobs.len());
    thread::scope(|scope| {
        let started: Vec<_> = jobs
            .into_iter()
            .map(|job| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    job()
                })
            })
            .collect();
        started.into_iter().map(|job| job.join().map_err(|_| anyhow!("a job panicked"))?).collect()
    })
}

#[test]
fn two_hundred_at_once_keep_the_books_straight() -> Result<()> {
    const HALF: usize = 100;
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let sandboxes = |generation: &str| {
            (0..HALF).map(|n| Sandbox::create(node, &format!("{generation}{n}"))).collect::<Result<Vec<_>>>()
        };
        let adds = |sandboxes: Vec<Sandbox>| {
            sandboxes
                .into_iter()
                .map(|s| Box::new(move || s.wire().map(Some)) as Box<dyn FnOnce() -> _ + Send>)
        };
        let dels = |pods: Vec<Pod>| {
            pods.into_iter()
                .map(|p| Box::new(move || p.unwire().map(|()| None)) as Box<dyn FnOnce() -> _ + Send>)
        };
        let old: Vec<Pod> = all_at_once(adds(sandboxes("old")?).collect())?.into_iter().flatten().collect();
        invariant(node, &old)?;

        let both = adds(sandboxes("new")?).chain(dels(old));
        let pods: Vec<Pod> = all_at_once(both.collect())?.into_iter().flatten().collect();
        assert_eq!(pods.len(), HALF);
        invariant(node, &pods)?;
        ping(&pods[0].netns, pods[HALF - 1].address, 5, SECOND)?;

        all_at_once(dels(pods).collect())?;
        invariant(node, &[])
    })
}

#[test]
fn a_plugin_killed_at_any_moment_leaves_nothing_after_del() -> Result<()> {
    const KILLS: u64 = 150;
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let template = Sandbox::create(node, "killed")?;
        let mut random = Random::of_the_moment();
        // From before a call's first instruction to after its last.
        let mut moments = Moments::within(Duration::from_millis(20));
        let (mut killed, mut strikes) = (0, 0);
        while killed < KILLS {
            ensure!(strikes < KILLS * 20, "{killed} of {strikes} were killed before they ended");
            strikes += 1;
            let mut call = template.call.clone();
            call.container_id = format!("killed{strikes}");
            let child = call.spawn("ADD")?;
            let_pass(moments.next(&mut random));
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            let hit = finish(child)?.exit.is_none();
            moments.learn(hit);
            killed += u64::from(hit);
            call.del().with_context(|| format!("after strike {strikes}"))?;
            let veth = host_veth(&call)?.to_string();
            ensure!(!live_veths(node)?.contains(&veth), "{veth} is left after strike {strikes}");
            let left = query(&template.netns, "ip -json link show")?;
            ensure!(left.len() == 1, "strike {strikes} left {left:?} in the pod");
        }
        report::figure(format_args!(
            "{killed} of {strikes} were killed before they ended, the last within {:.1?}",
            moments.span()
        ));
        invariant(node, &[])
    })
}

#[test]
fn a_namespace_that_goes_without_del_frees_its_address() -> Result<()> {
    scenario(one_node().flag("--resync=1"), |cluster| {
        let node = &cluster.nodes[0];
        let pod = node.pod("lost")?;
        pod.netns.remove()?;
        invariant(node, &[])
    })
}

#[test]
fn without_the_agent_add_waits_and_del_leaves_a_tombstone() -> Result<()> {
    scenario(one_node(), |cluster| {
        let pod = cluster.nodes[0].pod("a")?;
        let next = Sandbox::create(&cluster.nodes[0], "n1-b")?;
        cluster.nodes[0].agent.kill()?;

        let (code, error) = next.call.run("ADD")?.error()?;
        assert_eq!(code, TRY_AGAIN_LATER, "{error}");
        assert!(error.to_string().contains("weftd"), "the text says what to do: {error}");
        let (code, error) = next.call.run("STATUS")?.error()?;
        assert_eq!(code, 50, "{error}");

        let start = Instant::now();
        pod.call.del()?;
        assert!(start.elapsed() < SECOND * 5, "DEL took {:?}", start.elapsed());
        assert_eq!(live_veths(&cluster.nodes[0])?, BTreeSet::new());
        let tombstones =
            || weft_shared::tombstone::list(&cluster.nodes[0].agent.run_dir().join("tombstones"));
        assert_eq!(tombstones()?.len(), 1);

        cluster.nodes[0].agent.restart(READY)?;
        let tombstones =
            || weft_shared::tombstone::list(&cluster.nodes[0].agent.run_dir().join("tombstones"));
        eventually("the tombstone to be buried", READY, || Ok(tombstones()?.is_empty()))?;
        invariant(&cluster.nodes[0], &[])?;
        let pod = next.wire()?;
        invariant(&cluster.nodes[0], &[pod])
    })
}

#[test]
fn an_independent_reader_understands_the_result() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        for version in ["0.4.0", "1.0.0"] {
            let mut sandbox = Sandbox::create(node, &format!("n1-{version}"))?;
            sandbox.call.config = netconf(version, &node.agent.cni_socket());
            // The reader insists on `dns`, which the specification makes optional.
            sandbox.call.config["dns"] = json!({ "nameservers": ["10.0.0.53"], "domain": "weft.test" });
            let pod = sandbox.wire()?;
            let reply: SuccessReply = serde_json::from_value(pod.result.clone())
                .with_context(|| format!("{version}: {}", pod.result))?;
            assert_eq!(reply.cni_version.to_string(), version);
            let ip = &reply.ips[0];
            assert_eq!((ip.address.ip(), ip.address.prefix()), (pod.address.into(), 24));
            let subnet = node.lease_key()?.v4;
            assert_eq!(ip.gateway, Some(subnet.gateway()));
            let interface = &reply.interfaces[ip.interface.context("index of the interface")?];
            assert_eq!((interface.name.as_str(), interface.sandbox.as_path()), ("eth0", pod.netns.path()));
            let host = reply.interfaces.iter().find(|i| i.name == pod.host_veth().expect("name").as_str());
            assert!(host.is_some_and(|i| i.sandbox.as_os_str().is_empty()), "{:?}", reply.interfaces);
            assert!(reply.routes.iter().any(|route| route.dst.prefix() == 0), "{:?}", reply.routes);
            assert_eq!(reply.dns.domain.as_deref(), Some("weft.test"));
            pod.delete()?;
        }
        Ok(())
    })
}

#[test]
fn a_full_subnet_says_so() -> Result<()> {
    // A /26 is cut into four /28: a gateway and thirteen pods each.
    scenario(Spec { network: "10.5.0.0/26".into(), subnet_len: 28, ..one_node() }, |cluster| {
        let node = &cluster.nodes[0];
        let mut pods = (0..13).map(|n| node.pod(&n.to_string())).collect::<Result<Vec<_>>>()?;
        let one_more = Sandbox::create(node, "one-more")?;
        let (code, error) = one_more.call.run("ADD")?.error()?;
        assert!(code >= 100, "{error}");
        let subnet = node.lease_key()?.v4.to_string();
        assert!(error.to_string().contains(&subnet), "names the subnet: {error}");
        let (code, error) = one_more.call.run("STATUS")?.error()?;
        assert_eq!(code, 50, "{error}");
        pods.pop().context("a pod")?.delete()?;
        pods.push(one_more.wire()?);
        invariant(node, &pods)
    })
}

/// The overlay's device, the underlay and the loopback: none is the pods' to take.
#[test]
fn a_bridge_of_the_nodes_own_is_refused() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let mut call = Sandbox::create(node, "n1-bad")?.call;
        for device in ["flannel.1", "eth0", "lo"] {
            call.config["bridge"] = json!(device);
            let (code, error) = call.run("ADD")?.error()?;
            let text = error.to_string();
            ensure!(code == 7 && text.contains("bridge") && text.contains(device), "{device}: {error}");
        }
        invariant(node, &[])
    })
}
