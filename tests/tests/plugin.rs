//! The plugin and the agent's records under everything that runtimes do to them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use cni_plugin::reply::SuccessReply;
use e2e::books::{invariant, live_veths};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::kernel::query;
use e2e::plugin::{finish, netconf};
use e2e::pod::{Pod, Sandbox, host_veth, vanished};
use e2e::random::{Moments, Random};
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually, let_pass};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

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
fn del_succeeds_whenever_nothing_is_left() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let repeated = node.pod("repeated")?;
        let mut call = repeated.call.clone();
        call.config["prevResult"] = repeated.result.clone();
        call.del()?;
        call.del().context("the second time, with the previous result")?;
        repeated.call.del().context("the third time, without")?;
        invariant(node, &[])?;

        let never = Sandbox::create(node, "never-added")?;
        never.call.del().context("never added")?;

        for (name, netns) in [("empty", Some(PathBuf::new())), ("unset", None)] {
            let pod = node.pod(name)?;
            let mut call = pod.call.clone();
            call.netns = netns;
            call.del().with_context(|| format!("CNI_NETNS {name}"))?;
            invariant(node, &[]).with_context(|| format!("CNI_NETNS {name}"))?;
            let left = query(&pod.netns, "ip -json link show")?;
            ensure!(left.len() == 1, "{left:?} is left in the pod");
        }

        let pod = node.pod("vanished")?;
        pod.netns.remove()?;
        pod.call.del().context("the namespace is gone")?;
        invariant(node, &[])?;

        let sandbox = Sandbox::create(node, "elsewhere")?;
        let mut call = sandbox.clone().wire()?.call;
        call.netns = Some(vanished(&sandbox));
        call.del().context("nothing was ever there")?;
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
fn every_version_gets_its_own_shape() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let mut sandbox = Sandbox::create(node, &format!("n1-{version}"))?;
            sandbox.call.config = netconf(version, &node.agent.cni_socket());
            let result = sandbox.call.add()?;
            assert_eq!(result["cniVersion"], version);
            if version < "0.3.0" {
                assert!(result["ip4"]["ip"].is_string() && result.get("ips").is_none(), "{result}");
            } else {
                let tagged = result["ips"][0]["version"] == "4";
                assert_eq!(tagged, version < "1.0.0", "{version}: {result}");
                assert_eq!(result["interfaces"].as_array().map(Vec::len), Some(3), "{version}: {result}");
            }
            let sandboxed = result.to_string().contains("mtu");
            assert!(!sandboxed || version == "1.1.0", "{version}: {result}");
            sandbox.call.del()?;
        }
        invariant(node, &[])
    })
}

#[test]
fn a_second_add_fails_and_the_first_stays() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let first = node.pod("a")?;
        let beside = node.pod("b")?;
        let (code, error) = first.call.run("ADD")?.error()?;
        assert!(code > 0, "{error}");
        ping(&beside.netns, first.address, 5, SECOND)?;
        invariant(node, &[first, beside])
    })
}

#[test]
fn check_sees_what_is_broken() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let pod = node.pod("a")?;
        let mut call = pod.call.clone();
        call.config["prevResult"] = pod.result.clone();
        call.run("CHECK")?.silent()?;
        pod.netns.ip(&format!("address delete {}/24 dev eth0", pod.address))?;
        let (_, error) = call.run("CHECK")?.error()?;
        assert!(error.to_string().contains(&pod.address.to_string()), "{error}");
        Ok(())
    })
}

#[test]
fn gc_takes_what_is_not_valid() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let (kept, stale) = (node.pod("kept")?, node.pod("stale")?);
        let mut call = kept.call.clone();
        call.netns = None;
        call.config["cni.dev/valid-attachments"] = json!([{ "containerID": kept.name, "ifname": "eth0" }]);
        call.run("GC")?.silent()?;
        ensure!(!live_veths(node)?.contains(stale.host_veth()?.as_str()), "the stale veth is left");
        invariant(node, &[kept])
    })
}

#[test]
fn requested_addresses_are_given_once() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let subnet = node.lease_key()?.v4;
        let wanted = subnet.nth(77).context("inside")?.to_string();
        let first = Pod::create_at(node, "first", &wanted)?;
        assert_eq!(first.address.to_string(), wanted);
        let refused = Pod::create_at(node, "second", &wanted).expect_err("the same address twice");
        assert!(format!("{refused:#}").contains(&wanted), "{refused:#}");
        let mut by_args = Sandbox::create(node, "third")?;
        let other = subnet.nth(78).context("inside")?.to_string();
        by_args.call.args = Some(format!("IgnoreUnknown=1;IP={other};K8S_POD_NAME=x"));
        let by_args = by_args.wire()?;
        assert_eq!(by_args.address.to_string(), other);
        invariant(node, &[first, by_args])
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

#[test]
fn bad_input_names_key_value_and_expectation() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let sandbox = Sandbox::create(node, "n1-bad")?;
        let refuse = |key: &str, value: Value, code: u64| -> Result<()> {
            let mut call = sandbox.call.clone();
            call.config[key] = value.clone();
            let (got, error) = call.run("ADD")?.error().with_context(|| format!("{key} = {value}"))?;
            let text = error.to_string();
            let shown = value.as_str().map_or(value.to_string(), str::to_owned);
            if got != code || !text.contains(key) || !text.contains(&shown) {
                bail!("{key} = {value}: code {got}, expected {code}, and {text} must name both");
            }
            Ok(())
        };
        refuse("mtu", json!("big"), 7)?;
        refuse("bridge", json!("a/b"), 7)?;
        // The overlay's device, the underlay and the loopback: none is the pods' to take.
        for device in ["flannel.1", "eth0", "lo"] {
            refuse("bridge", json!(device), 7)?;
        }
        refuse("cniVersion", json!("9.9.9"), 1)?;
        let mut call = sandbox.call.clone();
        call.config = json!("no object");
        assert!(call.run("ADD")?.error()?.0 >= 6);
        call = sandbox.call.clone();
        call.ifname = "sixteen-bytes-xx".into();
        assert_eq!(call.run("ADD")?.error()?.0, 4);
        let mut host = sandbox.call.clone();
        host.netns = Some(node.netns().path().to_owned());
        assert!(host.run("ADD")?.error().is_ok(), "the node's own namespace was accepted");
        invariant(node, &[])
    })
}
