//! ADD is a transaction that the agent owns: whoever dies at whatever point, both ends of the pair, the address and the
//! record come and go together. The real plugin and the real agent; where a message must be held up or lost, a relay
//! between them does it.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::books::{address_inside, invariant, live_veths, records};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::kernel::query;
use e2e::node::Node;
use e2e::plugin::finish;
use e2e::pod::{Pod, Sandbox, host_veth};
use e2e::relay::{Conversation, Relay};
use e2e::report;
use e2e::wait::{SECOND, eventually};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::names::LINK_GROUP;
use weft_shared::protocol::{Reply, Request};
use weft_shared::tombstone::{self, Tombstone};

fn one_node() -> Spec {
    Spec::embedded(1, Backend::Vxlan)
}

/// A container whose plugin talks through the relay.
fn relayed(node: &Node, relay: &Relay, name: &str) -> Result<Sandbox> {
    let mut sandbox = Sandbox::create(node, name)?;
    sandbox.call.config["socket"] = relay.path().to_string_lossy().into();
    Ok(sandbox)
}

/// An ADD whose Reserve the agent has answered, and whose plugin has not heard of it.
fn reserved(relay: &Relay, sandbox: &Sandbox) -> Result<(Child, Conversation, Reply)> {
    let plugin = sandbox.call.spawn("ADD")?;
    let mut conversation = relay.accept()?;
    let request = conversation.hear()?;
    ensure!(matches!(request, Request::Reserve(_)), "{request:?}");
    let reply = conversation.ask(&request)?;
    ensure!(matches!(reply, Reply::Reserved(_)), "{reply:?}");
    Ok((plugin, conversation, reply))
}

/// An ADD that has wired its container and whose Commit the agent has not heard.
fn wired(node: &Node, relay: &Relay, sandbox: &Sandbox) -> Result<(Child, Conversation, Request)> {
    let (plugin, mut conversation, reply) = reserved(relay, sandbox)?;
    conversation.answer(&reply)?;
    let commit = conversation.hear()?;
    ensure!(matches!(commit, Request::Commit(_)), "{commit:?}");
    let veth = host_veth(&sandbox.call)?.to_string();
    ensure!(live_veths(node)?.contains(&veth), "{veth} was not made before Commit");
    Ok((plugin, conversation, commit))
}

fn kill_plugin(mut plugin: Child) -> Result<()> {
    plugin.kill()?;
    ensure!(plugin.wait()?.signal() == Some(Signal::SIGKILL as i32), "it had ended before it was killed");
    Ok(())
}

fn refused(plugin: Child, code: Code) -> Result<String> {
    let (got, error) = finish(plugin)?.error()?;
    ensure!(got == code as u64, "code {got}, expected {}: {error}", code as u64);
    Ok(error.to_string())
}

/// Nothing of any attachment is left, neither on the node nor in this container; how long that took.
fn nothing_left(node: &Node, sandbox: &Sandbox) -> Result<Duration> {
    let start = Instant::now();
    invariant(node, &[])?;
    let took = start.elapsed();
    let left = query(&sandbox.netns, "ip -json link show")?;
    ensure!(left.len() == 1, "{left:?} is left in the pod");
    Ok(took)
}

fn told(what: &str, took: Duration) {
    report::took(format_args!("{what}: nothing left"), took);
}

fn used(node: &Node) -> Result<usize> {
    Ok(node.status()?.pods.addresses_used)
}

#[test]
fn an_add_that_is_cut_off_is_undone_wherever_that_was() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let relay = Relay::before(&node.agent)?;

        let sandbox = relayed(node, &relay, "killed-after-reserve")?;
        let (plugin, conversation, _) = reserved(&relay, &sandbox)?;
        assert_eq!(used(node)?, 1);
        kill_plugin(plugin)?;
        drop(conversation);
        told("plugin killed after Reserve", nothing_left(node, &sandbox)?);

        let sandbox = relayed(node, &relay, "killed-before-commit")?;
        let (plugin, conversation, _) = wired(node, &relay, &sandbox)?;
        kill_plugin(plugin)?;
        drop(conversation);
        told("plugin killed before Commit", nothing_left(node, &sandbox)?);

        let sandbox = relayed(node, &relay, "no-reservation")?;
        let (plugin, conversation, _) = reserved(&relay, &sandbox)?;
        drop(conversation);
        refused(plugin, Code::TryAgainLater)?;
        told("reply to Reserve lost", nothing_left(node, &sandbox)?);

        // The plugin deletes its veth itself: the runtime gets its answer when nothing is left.
        let sandbox = relayed(node, &relay, "eof-at-commit")?;
        let (plugin, conversation, _) = wired(node, &relay, &sandbox)?;
        drop(conversation);
        refused(plugin, Code::TryAgainLater)?;
        let veth = host_veth(&sandbox.call)?.to_string();
        assert!(!live_veths(node)?.contains(&veth), "{veth} is there although ADD has failed");
        told("connection closed at Commit", nothing_left(node, &sandbox)?);

        let sandbox = relayed(node, &relay, "no-answer-to-commit")?;
        let (plugin, mut conversation, commit) = wired(node, &relay, &sandbox)?;
        assert_eq!(conversation.ask(&commit)?, Reply::Done);
        drop(conversation);
        refused(plugin, Code::TryAgainLater)?;
        // The agent has it as attached: it finds out from the kernel.
        told("reply to Commit lost", nothing_left(node, &sandbox)?);
        assert_eq!(node.status()?.pods.counters.rolled_back, 4);
        // Its DEL has some time to come first.
        eventually("the last one to count as dead", SECOND * 60, || {
            Ok(node.status()?.pods.counters.dead_freed == 1)
        })?;
        Ok(())
    })
}

#[test]
fn an_add_that_was_committed_stays_until_its_del() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let relay = Relay::before(&node.agent)?;
        // Killed after Commit: nobody but the runtime knows that the result never arrived.
        let sandbox = relayed(node, &relay, "killed-after-commit")?;
        let (plugin, mut conversation, commit) = wired(node, &relay, &sandbox)?;
        assert_eq!(conversation.ask(&commit)?, Reply::Done);
        kill_plugin(plugin)?;
        drop(conversation);
        let address = address_inside(&sandbox.netns)?.context("wired")?;
        let mut call = sandbox.call.clone();
        call.config["socket"] = node.agent.cni_socket().to_string_lossy().into();
        let (code, error) = call.run("ADD")?.error()?;
        assert_eq!(code, Code::NameTaken as u64, "{error}");
        let record = &records(node)?[&call.container_id];
        assert_eq!(
            (record.state.as_str(), record.addresses.as_slice()),
            ("committed", [address.into()].as_slice())
        );
        call.del()?;
        nothing_left(node, &sandbox)?;

        // The result cannot be written, for its reader is gone: the plugin takes everything back before it ends.
        let sandbox = relayed(node, &relay, "stdout-closed")?;
        let mut plugin = sandbox.call.spawn("ADD")?;
        drop(plugin.stdout.take());
        let mut conversation = relay.accept()?;
        conversation.pass()?;
        conversation.pass()?;
        let mut taken_back = relay.accept()?;
        let request = taken_back.hear()?;
        assert!(matches!(request, Request::Release { .. }), "{request:?}");
        let reply = taken_back.ask(&request)?;
        taken_back.answer(&reply)?;
        assert_eq!(plugin.wait()?.code(), Some(1));
        told("stdout closed", nothing_left(node, &sandbox)?);
        Ok(())
    })
}

#[test]
fn a_del_during_an_add_wins_and_holds_the_address() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let relay = Relay::before(&node.agent)?;
        let sandbox = relayed(node, &relay, "both")?;
        let (plugin, mut conversation, commit) = wired(node, &relay, &sandbox)?;
        let address = address_inside(&sandbox.netns)?.context("wired")?.to_string();

        let mut del = sandbox.call.clone();
        del.config["socket"] = node.agent.cni_socket().to_string_lossy().into();
        del.del()?;
        assert_eq!(live_veths(node)?.len(), 0, "DEL has succeeded with the veth in place");
        assert_eq!(records(node)?["both"].state, "aborted");
        // The plugin lives and could wire again: until it is gone nobody else gets its address.
        let refused_address = Pod::create_at(node, "other", &address).expect_err("it is held");
        assert!(
            format!("{refused_address:#}").contains(&format!("\"code\":{}", Code::AddressInUse as u64)),
            "{refused_address:#}"
        );
        assert_eq!(used(node)?, 1);

        let Reply::Failed(failure) = conversation.ask(&commit)? else {
            bail!("Commit after DEL was accepted")
        };
        assert_eq!(failure.code, Code::TryAgainLater as u32, "{failure}");
        conversation.answer(&Reply::Failed(failure))?;
        let text = refused(plugin, Code::TryAgainLater)?;
        assert!(text.contains("deleted while it was being added"), "{text}");
        drop(conversation);
        told("DEL during ADD", nothing_left(node, &sandbox)?);
        let pod = Pod::create_at(node, "next", &address)?;
        invariant(node, &[pod])
    })
}

#[test]
fn a_foreign_veth_of_our_name_is_left_alone() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &cluster.nodes[0];
        let sandbox = Sandbox::create(node, "taken")?;
        let name = host_veth(&sandbox.call)?;
        node.netns().ip(&format!("link add {name} type veth peer name theirs"))?;
        node.netns().ip(&format!("address add 203.0.113.1/24 dev {name}"))?;
        let seen = || query(node.netns(), &format!("ip -json -details address show dev {name}"));
        let before = seen()?;
        let (code, error) = sandbox.call.run("ADD")?.error()?;
        assert_eq!(code, Code::NameTaken as u64, "{error}");
        assert!(error.to_string().contains(name.as_str()), "{error}");
        sandbox.call.del()?;
        assert_eq!(seen()?, before);
        assert_eq!(used(node)?, 0);
        Ok(())
    })
}

#[test]
fn a_reservation_outlives_the_agent_for_as_long_as_its_plugin_can_wire() -> Result<()> {
    const LATE: Duration = Duration::from_secs(20);
    scenario(one_node(), |cluster| {
        let relay = Relay::before(&cluster.nodes[0].agent)?;
        let node = &mut cluster.nodes[0];
        let bystander = node.pod("bystander")?;
        // A veth that nobody has a record of: with our mark, and one of the same form without.
        let (stray, foreign) = ("vethaaaaaaaaaaa", "vethbbbbbbbbbbb");
        node.netns().ip(&format!("link add {foreign} type veth peer name foreign"))?;

        // One is stopped before it wires, one has wired and waits at Commit.
        let slow = relayed(node, &relay, "slow")?;
        let reserved_at = Instant::now();
        let (mut slow_plugin, mut slow_conversation, reply) = reserved(&relay, &slow)?;
        let Reply::Reserved(reservation) = &reply else { bail!("{reply:?}") };
        let address = reservation.addresses[0].address.ip().to_string();
        let slow_pid = Pid::from_raw(slow_plugin.id() as i32);
        kill(slow_pid, Signal::SIGSTOP)?;
        slow_conversation.answer(&reply)?;
        let waiting = relayed(node, &relay, "waiting")?;
        let (waiting_plugin, waiting_conversation, _) = wired(node, &relay, &waiting)?;
        let waiting_veth = host_veth(&waiting.call)?.to_string();

        node.agent.kill()?;
        node.agent.restart(READY)?;
        assert!(
            live_veths(node)?.contains(&waiting_veth),
            "its plugin still lives, and would have failed anyway"
        );
        drop(waiting_conversation);
        refused(waiting_plugin, Code::TryAgainLater)?;
        assert!(!live_veths(node)?.contains(&waiting_veth), "EOF at Commit: the plugin deletes its veth");
        let states =
            || -> Result<Vec<String>> { Ok(records(node)?.values().map(|r| r.state.clone()).collect()) };
        assert_eq!(states()?, ["committed", "aborted", "aborted"]);

        // Neither address is anybody's, but the same containers may go on at once.
        let taken = Pod::create_at(node, "thief", &address).expect_err("it is held");
        assert!(format!("{taken:#}").contains(&address), "{taken:#}");
        let mut again = waiting.clone();
        again.call.config["socket"] = node.agent.cni_socket().to_string_lossy().into();
        let again = again.wire()?;
        // While that one lives nobody can be given an address.
        let stray_since = Instant::now();
        node.netns().ip(&format!("link add {stray} group {LINK_GROUP} type veth peer name stray"))?;
        assert_eq!(live_veths(node)?.len(), 4);

        // What the plugin can no longer do, the clock settles.
        let freed = eventually("the reservation to lapse", deadline::WIRING + LATE, || Ok(used(node)? == 2))
            .map(|_| reserved_at.elapsed())?;
        assert!(freed >= deadline::WIRING, "freed after {freed:?}: its plugin could still have wired");
        report::took("reservation of a killed agent: freed after Reserve", freed);
        let gone = eventually("the stray veth to go", LATE * 2, || Ok(!live_veths(node)?.contains(stray)))
            .map(|_| stray_since.elapsed())?;
        assert!(gone >= deadline::WIRING, "gone after {gone:?}: it might have been an ADD's");
        report::took("veth without a record: deleted", gone);
        assert!(live_veths(node)?.contains(foreign));
        node.netns().ip(&format!("link delete {foreign}"))?;

        // The stopped plugin has its reply, and must not use it.
        kill(slow_pid, Signal::SIGCONT)?;
        assert_eq!(slow_plugin.wait()?.signal(), Some(Signal::SIGALRM as i32), "it went on after its time");
        let thief = Pod::create_at(node, "owner", &address)?;
        invariant(node, &[bystander, again, thief])
    })
}

fn tombstones(node: &Node) -> Result<usize> {
    Ok(tombstone::list(&node.agent.run_dir().join("tombstones"))?.len())
}

/// Waits until the plugin sleeps between two attempts.
fn asleep(plugin: &Child) -> Result<()> {
    let wchan = format!("/proc/{}/wchan", plugin.id());
    // It wakes up in between, and may do so just when it is looked at.
    eventually("the plugin to wait", READY, || {
        Ok((0..100).any(|_| std::fs::read_to_string(&wchan).is_ok_and(|state| state.contains("nanosleep"))))
    })?;
    Ok(())
}

#[test]
fn a_del_without_an_agent_is_done_whenever_the_next_one_comes() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &mut cluster.nodes[0];
        let dir = node.agent.run_dir().join("tombstones");
        // Before: the DEL waits for the lock, the agent drains, listens, and is there at the second attempt.
        // Between: the tombstone is written while the agent waits for the lock, which it needs to listen.
        for agent_waits in [false, true] {
            for round in 0..3 {
                let pod = node.pod(&format!("{agent_waits}-{round}"))?;
                node.agent.kill()?;
                let lock = if agent_waits { FlockArg::LockShared } else { FlockArg::LockExclusive };
                let held = Flock::lock(tombstone::lock_file(&dir)?, lock).map_err(|(_, e)| e)?;
                let plugin = if agent_waits {
                    node.agent.start()?;
                    pod.call.del()?;
                    assert_eq!(tombstones(node)?, 1);
                    None
                } else {
                    let plugin = pod.call.spawn("DEL")?;
                    asleep(&plugin)?;
                    node.agent.start()?;
                    Some(plugin)
                };
                drop(held);
                if let Some(plugin) = plugin {
                    finish(plugin)?.silent()?;
                }
                node.agent.wait_ready(READY)?;
                invariant(node, &[])?;
                assert_eq!(tombstones(node)?, 0);
                if agent_waits {
                    // By its word, and not because the veth was missed later.
                    let counters = node.status()?.pods.counters;
                    assert_eq!((counters.tombstones_drained, counters.dead_freed), (1, 0));
                }
            }
        }
        // After: nobody was there for a long time; the pod's own namespace went as well.
        let (dead, kept) = (node.pod("after")?, node.pod("kept")?);
        node.agent.kill()?;
        dead.call.del()?;
        dead.call.del().context("repeated")?;
        assert_eq!(tombstones(node)?, 1);
        node.agent.restart(READY)?;
        let counters = node.status()?.pods.counters;
        assert_eq!((counters.tombstones_drained, counters.dead_freed), (1, 0));
        invariant(node, &[kept])
    })
}

#[test]
fn a_tombstone_buries_only_what_is_older() -> Result<()> {
    scenario(one_node(), |cluster| {
        let node = &mut cluster.nodes[0];
        let dir = node.agent.run_dir().join("tombstones");
        let pod = node.pod("a")?;
        // An ID is used again while its DEL lies there: the ADD goes through, the tombstone is used up.
        node.agent.kill()?;
        pod.call.del()?;
        let written = tombstone::list(&dir)?.pop().and_then(|(_, written)| written).context("a tombstone")?;
        let add = pod.call.spawn("ADD")?;
        asleep(&add)?;
        node.agent.start()?;
        finish(add)?.result()?;
        node.agent.wait_ready(READY)?;
        assert_eq!(tombstones(node)?, 0);
        let address = address_inside(&pod.netns)?.context("wired again")?;
        let second = Pod { address, ..pod };
        invariant(node, std::slice::from_ref(&second))?;

        // The same tombstone once more, as if its plugin had been late: it is of the time before, and void.
        written.write(&dir)?;
        eventually("the late tombstone to be looked at", READY, || Ok(tombstones(node)? == 0))?;
        invariant(node, std::slice::from_ref(&second))?;
        node.agent.kill()?;
        written.write(&dir)?;
        node.agent.restart(READY)?;
        assert_eq!(tombstones(node)?, 0);
        invariant(node, std::slice::from_ref(&second))?;

        // DEL that cannot reach the agent, then ADD of the same ID, again and again, with the agent running all the time.
        let mut lost = second.call.clone();
        lost.config["socket"] = node.agent.run_dir().join("nobody.sock").to_string_lossy().into();
        let mut last = second.clone();
        for round in 0..10 {
            lost.del()?;
            let result = last.call.add().with_context(|| format!("round {round}"))?;
            last.address = e2e::pod::address_of(&result)?;
            invariant(node, std::slice::from_ref(&last)).with_context(|| format!("round {round}"))?;
        }

        // One of another boot speaks of pods that no reboot has left.
        let other_boot = Tombstone { boot_id: "0".repeat(36), boottime_ns: u64::MAX, ..written };
        other_boot.write(&dir)?;
        eventually("the tombstone of another boot to be removed", READY, || Ok(tombstones(node)? == 0))?;
        invariant(node, &[last])
    })
}
