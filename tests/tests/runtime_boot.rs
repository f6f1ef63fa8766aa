//! A node boots as a kubelet boots it: as many pods as it may have, all at once, before there is an agent; what fails is
//! tried again under a new name, for ever. The agent comes meanwhile, is killed, and comes back.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};

use anyhow::{Context as _, Result, anyhow};
use e2e::books::{invariant, records};
use e2e::cluster::{Backend, READY, Spec, scenario_prepared};
use e2e::node::Node;
use e2e::pod::{Pod, Sandbox};
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, eventually, until_ok};

/// A kubelet's own limit.
const PODS: usize = 110;
/// They come before there has ever been an agent; the others while it is dead.
const EARLY: usize = 60;
/// So many are wired when it is killed.
const UNDER_WAY: usize = 20;

/// One pod of the boot: whatever an attempt has come to, it is deleted before the next one, which has a name of its own.
fn boot(mut sandbox: Sandbox, begun: &AtomicUsize) -> Result<Pod> {
    let name = sandbox.call.container_id.clone();
    let mut attempt = 0;
    begun.fetch_add(1, Ordering::Relaxed);
    until_ok(&format!("{name} to be wired"), SECOND * 120, || {
        attempt += 1;
        sandbox.call.container_id = format!("{name}.{attempt}");
        sandbox.clone().wire().inspect_err(|_| {
            // It succeeds with an agent and without.
            sandbox.call.del().expect("DEL after a failed ADD");
        })
    })
}

type Booting<'scope> = Vec<ScopedJoinHandle<'scope, Result<Pod>>>;

fn begin<'scope>(
    scope: &'scope Scope<'scope, '_>,
    sandboxes: impl IntoIterator<Item = Sandbox>,
    begun: &'scope AtomicUsize,
) -> Booting<'scope> {
    sandboxes.into_iter().map(|sandbox| scope.spawn(move || boot(sandbox, begun))).collect()
}

fn joined(booting: Booting<'_>) -> Result<Vec<Pod>> {
    booting.into_iter().map(|pod| pod.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
}

fn wait_begun(begun: &AtomicUsize, count: usize) -> Result<()> {
    let what = format!("{count} pods to be asked for");
    eventually(&what, READY, || Ok(begun.load(Ordering::Relaxed) == count)).map(drop)
}

fn sandboxes(node: &Node) -> Result<Vec<Sandbox>> {
    (0..PODS).map(|n| Sandbox::create(node, &format!("pod{n}"))).collect()
}

#[test]
fn a_hundred_and_ten_pods_at_boot_while_the_agent_comes_and_goes() -> Result<()> {
    scenario_prepared(Spec::etcd(1, Backend::Vxlan), |cluster| {
        cluster.put_config()?;
        let node = &mut cluster.nodes[0];
        let mut early = sandboxes(node)?;
        let late = early.split_off(EARLY);
        let begun = AtomicUsize::new(0);
        let pods = thread::scope(|scope| -> Result<Vec<Pod>> {
            let early = begin(scope, early, &begun);
            wait_begun(&begun, EARLY)?;
            node.agent.start()?;
            eventually("the first pods", READY, || {
                let wired = records(node)?.into_values().filter(|record| record.state == "committed");
                Ok(wired.count() >= UNDER_WAY)
            })?;
            node.agent.kill()?;
            let late = begin(scope, late, &begun);
            wait_begun(&begun, PODS)?;
            node.agent.restart(READY)?;
            let mut pods = joined(early)?;
            pods.extend(joined(late)?);
            Ok(pods)
        })?;
        invariant(node, &pods)?;
        let (first, last) = (pods.first().context("pods")?, pods.last().context("pods")?);
        ping(&first.netns, last.address, 5, SECOND)?;

        // The way down: half of the DELs find no agent.
        let (with, without) = pods.split_at(PODS / 2);
        let delete = |pods: &[Pod]| {
            thread::scope(|scope| {
                let ending: Vec<_> = pods.iter().map(|pod| scope.spawn(|| pod.unwire())).collect();
                ending.into_iter().try_for_each(|del| del.join().map_err(|_| anyhow!("a thread panicked"))?)
            })
        };
        delete(with)?;
        node.agent.kill()?;
        delete(without)?;
        node.agent.restart(READY)?;
        invariant(node, &[])
    })
}
