//! Random histories of plugins, crashes and time: the one promise is that no two live veths ever share an address,
//! and that no address of a live veth is free to be handed out.
//!
//! `WEFT_MODEL_OPS=1000000` is the long form; `WEFT_SEED=N` begins with the histories that a failure has named.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant, UNIX_EPOCH};

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use weft_shared::Mac;
use weft_shared::deadline;
use weft_shared::names::host_ifname;
use weft_shared::protocol::Commit;

use super::testing::{BOOT, Node, TestFabric, address, key, network, subnet};
use super::{Boottime, Connection};

#[derive(Debug, Clone)]
enum Step {
    Reserve(u8),
    /// Makes the veth and stops there.
    Wire(u8),
    Commit(u8),
    /// The plugin is killed.
    Kill(u8),
    /// The agent leaves the connection while the plugin lives on.
    Leave(u8),
    Release(u8),
    Tombstone(u8),
    /// A pod's namespace goes away without a DEL.
    Vanish(u8),
    Gc,
    Look,
    Wait(u8),
    CrashAgent,
    DeletionFails(bool),
}

/// A plugin that has got its addresses.
struct Plugin {
    id: String,
    /// Gone when the agent or the connection is.
    connection: Option<Connection<TestFabric>>,
    address: IpAddr,
    reserved_at: Boottime,
}

struct History {
    node: Node,
    plugins: Vec<Plugin>,
    /// The address behind every veth that was ever made, by index.
    wired: BTreeMap<u32, IpAddr>,
}

impl History {
    async fn take(&mut self, step: Step) {
        let id = |n: u8| format!("c{}", n % 4);
        match step {
            Step::Reserve(n) => {
                if let Ok((connection, reservation)) = self.node.add(&id(n)).await {
                    let address = address(&reservation);
                    let (connection, reserved_at) = (Some(connection), self.node.clock());
                    self.plugins.push(Plugin { id: id(n), connection, address, reserved_at });
                }
            }
            Step::Wire(n) => {
                if let Some(i) = self.pick(n) {
                    self.wire(i);
                }
            }
            Step::Commit(n) => {
                let Some(i) = self.pick(n) else { return };
                let made = self.wire(i);
                let plugin = self.plugins.remove(i);
                let (Some(host_ifindex), Some(connection)) = (made, plugin.connection) else { return };
                let commit = Commit {
                    attachment: key(&plugin.id),
                    host_ifindex,
                    host_mac: Mac([2, 0, 0, 0, 0, 1]),
                    container_mac: Mac([2, 0, 0, 0, 0, 2]),
                };
                if self.node.ipam().commit(connection.id(), commit).await.is_err() {
                    self.node.fabric.world().veths.retain(|_, index| *index != host_ifindex);
                }
                connection.closed(true).await;
            }
            Step::Kill(n) => {
                let Some(i) = self.pick(n) else { return };
                if let Some(connection) = self.plugins.remove(i).connection {
                    connection.closed(true).await;
                }
            }
            Step::Leave(n) => {
                let Some(i) = self.pick(n) else { return };
                if let Some(connection) = self.plugins[i].connection.take() {
                    connection.closed(false).await;
                }
            }
            Step::Release(n) => {
                let _ = self.node.ipam().release(&key(&id(n))).await;
            }
            Step::Tombstone(n) => {
                self.node.bury(&key(&id(n)), BOOT);
                self.node.ipam().drain_tombstones().await;
            }
            Step::Vanish(n) => {
                self.node.fabric.world().veths.remove(&host_ifname(&key(&id(n))));
            }
            Step::Gc => {
                let _ = self.node.ipam().gc(&network(), &[key("c0")]).await;
            }
            Step::Look => self.node.look().await,
            Step::Wait(seconds) => {
                self.node.pass_time(Duration::from_secs(u64::from(seconds % 8)));
                self.node.ipam().tend().await;
            }
            Step::CrashAgent => {
                self.plugins.iter_mut().for_each(|plugin| plugin.connection = None);
                self.node.restart();
            }
            Step::DeletionFails(fails) => self.node.fabric.world().delete_fails = fails,
        }
    }

    /// One of the plugins whose alarm has not ended them.
    fn pick(&mut self, n: u8) -> Option<usize> {
        let now = self.node.clock();
        self.plugins.retain(|plugin| {
            plugin.connection.is_some() || now.since(plugin.reserved_at) < deadline::ADD_ALARM
        });
        (!self.plugins.is_empty()).then(|| usize::from(n) % self.plugins.len())
    }

    /// `None` when the name exists: the plugin fails there.
    fn wire(&mut self, i: usize) -> Option<u32> {
        let Plugin { id, address, .. } = &self.plugins[i];
        let name = host_ifname(&key(id));
        if self.node.fabric.world().veths.contains_key(&name) {
            return None;
        }
        let ifindex = self.node.fabric.wire(&name);
        self.wired.insert(ifindex, *address);
        Some(ifindex)
    }

    fn check(&self) {
        let veths: Vec<u32> = self.node.fabric.world().veths.values().copied().collect();
        let live: Vec<IpAddr> = veths.iter().map(|ifindex| self.wired[ifindex]).collect();
        let distinct: BTreeSet<&IpAddr> = live.iter().collect();
        assert_eq!(distinct.len(), live.len(), "two live veths share an address: {live:?}");
        let state = self.node.ipam().state();
        let blocked: BTreeSet<IpAddr> = state.table.blocked().collect();
        assert!(live.iter().all(|address| blocked.contains(address)), "{live:?} live, {blocked:?} blocked");
    }

    /// Whatever happened, nothing is left in the end.
    async fn end(mut self) {
        self.node.fabric.world().delete_fails = false;
        for plugin in self.plugins.drain(..) {
            if let Some(connection) = plugin.connection {
                connection.closed(true).await;
            }
        }
        self.node.look().await;
        self.node.pass_time(deadline::WIRING);
        self.node.look().await;
        self.node.ipam().gc(&network(), &[]).await.expect("gc");
        self.node.assert_empty();
    }
}

fn step() -> impl Strategy<Value = Step> {
    let n = || 0_u8..8;
    prop_oneof![
        6 => n().prop_map(Step::Reserve),
        3 => n().prop_map(Step::Wire),
        4 => n().prop_map(Step::Commit),
        2 => n().prop_map(Step::Kill),
        1 => n().prop_map(Step::Leave),
        3 => n().prop_map(Step::Release),
        2 => n().prop_map(Step::Tombstone),
        1 => n().prop_map(Step::Vanish),
        1 => Just(Step::Gc),
        3 => Just(Step::Look),
        3 => n().prop_map(Step::Wait),
        2 => Just(Step::CrashAgent),
        1 => any::<bool>().prop_map(Step::DeletionFails),
    ]
}

/// How many operations a run takes, unless `WEFT_MODEL_OPS` says so.
const USUAL_OPS: u64 = 10_000;
/// Histories that one seed gives. A failing seed is told, and `WEFT_SEED` begins with its histories.
const PER_SEED: u32 = 20;

/// A number out of the environment; what is none must not pass for none given.
fn given(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} = {text:?}: expected a number")))
}

fn live_through(steps: Vec<Step>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let mut node = Node::new();
        node.patience = Duration::ZERO;
        node.restart();
        // Small enough that round robin comes round.
        if let Ok(network) = &mut node.fabric.world().network {
            network.subnet = subnet("10.5.1.0/29");
        }
        let mut history = History { node, plugins: vec![], wired: BTreeMap::new() };
        for step in steps {
            history.take(step).await;
            history.check();
        }
        history.end().await;
    });
}

#[test]
fn no_address_twice_and_nothing_left() {
    let wanted = given("WEFT_MODEL_OPS").unwrap_or(USUAL_OPS);
    let now = || UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64);
    let mut seed = given("WEFT_SEED").unwrap_or_else(now);
    let (start, taken) = (Instant::now(), Cell::new(0_u64));
    while taken.get() < wanted {
        let config = ProptestConfig {
            failure_persistence: None,
            rng_seed: RngSeed::Fixed(seed),
            ..ProptestConfig::with_cases(PER_SEED)
        };
        let done = TestRunner::new(config).run(&prop::collection::vec(step(), 1..60), |steps| {
            taken.set(taken.get() + steps.len() as u64);
            live_through(steps);
            Ok(())
        });
        if let Err(failure) = done {
            panic!("WEFT_SEED={seed}, after {} operations: {failure}", taken.get());
        }
        seed = seed.wrapping_add(1);
    }
    eprintln!("{} random operations without a divergence: {:.1?}", taken.get(), start.elapsed());
}
