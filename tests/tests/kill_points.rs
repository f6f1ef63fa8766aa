//! `kill -9` of the plugin after each of its system calls in turn, and of the agent after those that it makes while it
//! serves a call. Wherever that was: the next ADD works, DEL leaves nothing, and what is handed out is what is attached.
//!
//! The plugin is struck at every call. The agent makes several hundred, and each strike costs its restart: every
//! `WEFT_KILL_STRIDE`-th is taken, the first one by the seed. `WEFT_SEED=N` takes the same ones again, a stride of 1 all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use e2e::books::{address_inside, invariant, live_veths};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::kernel::query;
use e2e::node::Node;
use e2e::plugin::{Outcome, finish};
use e2e::pod::{Sandbox, address_of, host_veth};
use e2e::random::Random;
use e2e::report;
use e2e::strike::{End, Place, Strike, held};
use e2e::wait::eventually;
use weft_shared::cni::Code;

/// They share the strikes: most of the time is the kernel's grace periods.
const NODES: u8 = 3;
/// A stride of the agent's calls that fits into a minute.
const USUAL_STRIDE: u64 = 7;
/// Well before a plugin's span is over, when the agent would mend by the clock what it has to know by itself.
const QUIET: Duration = Duration::from_secs(12);
/// More calls than any run makes: a loop that does not end by itself is a failure.
const TOO_MANY: u64 = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Del,
}

/// What comes after the strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Nothing: the books come right by themselves.
    Rest,
    /// The runtime tries an ADD at once.
    Add,
    /// The runtime gives up at once.
    Del,
}

const EACH: [Then; 3] = [Then::Rest, Then::Add, Then::Del];

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
        }
    }
}

/// A container of a name of its own, in a namespace that many have after one another.
fn container(template: &Sandbox, name: &str) -> Sandbox {
    let mut sandbox = template.clone();
    sandbox.call.container_id = name.to_owned();
    sandbox
}

/// Waits until the container is attached wholly or not at all, and so says everybody: its address, if it has one. No other
/// is attached. An address may be held beside that, for a plugin that a killed agent has not seen die.
fn whole_or_nothing(node: &Node, sandbox: &Sandbox) -> Result<Option<Ipv4Addr>> {
    let veth = host_veth(&sandbox.call)?.to_string();
    let mut found = None;
    eventually("addresses, veths and records to agree", QUIET, || {
        let (live, records) = (live_veths(node)?, node.status()?.pods.list);
        let mut attached = Vec::new();
        let mut held: BTreeSet<IpAddr> = BTreeSet::new();
        for record in &records {
            ensure!(
                record.addresses.iter().all(|a| held.insert(*a)),
                "an address in two records: {records:?}"
            );
            match record.state.as_str() {
                "committed" => attached.push((record.host_veth.to_string(), record.addresses.clone())),
                "aborted" => ensure!(!live.contains(record.host_veth.as_str()), "undone, and its veth lives"),
                state => bail!("{state} although all is quiet: {record:?}"),
            }
        }
        found = match attached.as_slice() {
            [] => None,
            [(name, addresses)] if *name == veth => match addresses.as_slice() {
                [IpAddr::V4(address)] => Some(*address),
                _ => bail!("{addresses:?} of {name}: expected one IPv4 address"),
            },
            _ => bail!("attached are {attached:?}, expected {veth} alone"),
        };
        let expected: BTreeSet<String> = found.iter().map(|_| veth.clone()).collect();
        ensure!(live == expected, "live veths {live:?}, records {records:?}");
        let inside = address_inside(&sandbox.netns)?;
        ensure!(inside == found, "the container has {inside:?}, its record {found:?}");
        Ok(true)
    })?;
    Ok(found)
}

/// ADD at once, which works; `may_stand`: or is told that the container is attached, which it then wholly is.
fn add_again(node: &Node, sandbox: &Sandbox, may_stand: bool) -> Result<()> {
    let outcome = sandbox.call.run("ADD")?;
    let told = match outcome.exit {
        Some(0) => Some(address_of(&outcome.result()?)?),
        _ => match outcome.error()? {
            (code, _) if code == Code::NameTaken as u64 && may_stand => None,
            (_, error) => bail!("ADD after it: {error}"),
        },
    };
    let attached = whole_or_nothing(node, sandbox).context("after the next ADD")?;
    match told {
        Some(_) => ensure!(attached == told, "told {told:?}, attached is {attached:?}"),
        None => ensure!(attached.is_some(), "told that it is attached, and it is not"),
    }
    Ok(())
}

/// DEL, after which nothing is left.
fn del(node: &Node, sandbox: &Sandbox) -> Result<()> {
    sandbox.call.del()?;
    let attached = whole_or_nothing(node, sandbox).context("after DEL")?;
    ensure!(attached.is_none(), "attached after DEL: {attached:?}");
    let left = query(&sandbox.netns, "ip -json link show")?;
    ensure!(left.len() == 1, "left in the container after DEL: {left:?}");
    Ok(())
}

/// One run of the plugin, struck at its call number `nth`; `None` when it ended before.
fn struck_plugin(sandbox: &Sandbox, verb: Verb, nth: u64) -> Result<Option<Place>> {
    let child = sandbox.call.spawn_by(held(&sandbox.call.binary), verb.name())?;
    let end = Strike::at_held(&child, nth)?.end()?;
    let outcome = finish(child)?;
    match end {
        End::Struck(place) => {
            ensure!(outcome.exit.is_none(), "struck at {place}, and ended with {outcome:?}");
            Ok(Some(place))
        }
        End::Spared { .. } => {
            ensure!(outcome.exit == Some(0), "undisturbed it failed: {outcome:?}");
            Ok(None)
        }
    }
}

/// One strike at the plugin and all that follows; `None` when its run is over before the call of that number.
fn strike_plugin(node: &Node, sandbox: &Sandbox, verb: Verb, nth: u64, then: Then) -> Result<Option<Place>> {
    if verb == Verb::Del {
        sandbox.call.add()?;
    }
    let place =
        struck_plugin(sandbox, verb, nth).with_context(|| format!("{} at call {nth}", verb.name()))?;
    let Some(place) = place else {
        sandbox.call.del()?;
        return Ok(None);
    };
    let follow = || {
        match then {
            Then::Rest => drop(whole_or_nothing(node, sandbox)?),
            // What was committed, or not yet deleted, stands.
            Then::Add => add_again(node, sandbox, true)?,
            Then::Del => {}
        }
        del(node, sandbox)?;
        invariant(node, &[])
    };
    follow().with_context(|| format!("{} of the plugin killed after {place}, then {then:?}", verb.name()))?;
    Ok(Some(place))
}

/// One call of the plugin's, while the agent is struck at its call number `nth` since then and started again.
fn struck_agent(
    node: &mut Node,
    sandbox: &Sandbox,
    verb: Verb,
    nth: u64,
) -> Result<(Option<Place>, Outcome)> {
    let strike = Strike::at_running(node.agent.pid()?, nth)?;
    let leash = strike.leash();
    thread::scope(|scope| {
        let plugin = scope.spawn(move || {
            let outcome = sandbox.call.run(verb.name());
            leash.let_go()?;
            outcome
        });
        let end = strike.end()?;
        let place = match end {
            End::Struck(place) => {
                node.agent.reap(READY)?;
                node.agent.start()?;
                Some(place)
            }
            End::Spared { .. } => None,
        };
        let outcome = plugin.join().map_err(|_| anyhow!("the plugin's thread panicked"))??;
        node.agent.wait_ready(READY)?;
        Ok((place, outcome))
    })
}

/// One strike at the agent and all that follows; `None` when it had served before its call of that number.
fn strike_agent(
    node: &mut Node,
    sandbox: &Sandbox,
    verb: Verb,
    nth: u64,
    then: Then,
) -> Result<Option<Place>> {
    if verb == Verb::Del {
        sandbox.call.add()?;
    }
    let (place, outcome) =
        struck_agent(node, sandbox, verb, nth).with_context(|| format!("{} at call {nth}", verb.name()))?;
    let node = &*node;
    let follow = || {
        let attached = match verb {
            // It rides the restart out, or has taken back what it had made.
            Verb::Add => match outcome.exit {
                Some(0) => Some(address_of(&outcome.result()?)?),
                _ => match outcome.error()? {
                    (code, _) if code == Code::TryAgainLater as u64 => None,
                    (_, error) => bail!("ADD: {error}"),
                },
            },
            Verb::Del => {
                outcome.silent().context("DEL")?;
                None
            }
        };
        match then {
            Then::Rest => {
                let found = whole_or_nothing(node, sandbox)?;
                ensure!(found == attached, "told {attached:?}, attached is {found:?}");
            }
            Then::Add => add_again(node, sandbox, attached.is_some())?,
            Then::Del => {}
        }
        del(node, sandbox)
    };
    let killed =
        place.as_ref().map_or_else(|| "not killed".to_owned(), |place| format!("killed after {place}"));
    follow().with_context(|| format!("{} while the agent was {killed}, then {then:?}", verb.name()))?;
    Ok(place)
}

/// What has been struck: the names of the calls, by their number and by how often a name came up.
#[derive(Default)]
struct Tally {
    strikes: u64,
    last: u64,
    names: BTreeMap<String, u64>,
}

impl Tally {
    fn struck(&mut self, place: Place) {
        self.strikes += 1;
        self.last = self.last.max(place.call);
        *self.names.entry(place.name).or_default() += 1;
    }
}

/// Strikes on all nodes at once, `stride` calls apart from `first` on, until on each a run was over before.
fn strike_all(
    nodes: &mut [Node],
    first: u64,
    stride: u64,
    strike: impl Fn(&mut Node, &Sandbox, u64, Then) -> Result<Option<Place>> + Sync,
) -> Result<Tally> {
    let count = nodes.len() as u64;
    // One failure is told, and the others need not find out what it broke.
    let failed = AtomicBool::new(false);
    let work = |node: &mut Node, share: u64| {
        let template = Sandbox::create(node, &format!("{}-struck", node.name()))?;
        let mut tally = Tally::default();
        let mut nth = first + share * stride;
        loop {
            ensure!(nth < TOO_MANY, "no run has ended before its call number {nth}");
            for then in EACH {
                let sandbox = container(&template, &format!("{}-{nth}-{then:?}", node.name()));
                match strike(node, &sandbox, nth, then) {
                    Ok(Some(place)) => tally.struck(place),
                    Ok(None) => return Ok(tally),
                    Err(error) => {
                        failed.store(true, Ordering::Relaxed);
                        return Err(error);
                    }
                }
                if failed.load(Ordering::Relaxed) {
                    return Ok(tally);
                }
            }
            nth += count * stride;
        }
    };
    let tallies: Vec<Tally> = thread::scope(|scope| {
        let working: Vec<_> =
            nodes.iter_mut().zip(0..).map(|(node, share)| scope.spawn(move || work(node, share))).collect();
        let ended =
            working.into_iter().map(|node| node.join().map_err(|_| anyhow!("a node's thread panicked"))?);
        ended.collect::<Result<_>>()
    })?;
    let mut sum = Tally::default();
    for tally in tallies {
        sum.strikes += tally.strikes;
        sum.last = sum.last.max(tally.last);
        tally.names.into_iter().for_each(|(name, count)| *sum.names.entry(name).or_default() += count);
    }
    Ok(sum)
}

fn plugin_killed_everywhere(verb: Verb, at_least: &[&str]) -> Result<()> {
    scenario(Spec::embedded(NODES, Backend::Vxlan), |cluster| {
        let start = Instant::now();
        let tally = strike_all(&mut cluster.nodes, 1, 1, |node, sandbox, nth, then| {
            strike_plugin(node, sandbox, verb, nth, then)
        })?;
        report::took(
            format_args!("{}: {} strikes at {} calls of the plugin", verb.name(), tally.strikes, tally.last),
            start.elapsed(),
        );
        report::figure(format_args!("{:?}", tally.names));
        for name in at_least {
            ensure!(tally.names.contains_key(*name), "never struck at {name}: {:?}", tally.names);
        }
        for node in &cluster.nodes {
            invariant(node, &[])?;
        }
        Ok(())
    })
}

fn stride() -> Result<u64> {
    match std::env::var("WEFT_KILL_STRIDE") {
        Ok(text) => match text.parse() {
            Ok(stride) if stride > 0 => Ok(stride),
            _ => bail!("WEFT_KILL_STRIDE = {text:?}: expected a number, 1 for every call"),
        },
        Err(_) => Ok(USUAL_STRIDE),
    }
}

fn agent_killed_everywhere(verb: Verb) -> Result<()> {
    let (seed, stride) = (Random::seed_of_the_moment(), stride()?);
    let first = 1 + Random::seeded(seed).below(stride);
    report::figure(format_args!("replay with WEFT_SEED={seed}"));
    scenario(Spec::embedded(NODES, Backend::Vxlan), |cluster| {
        let start = Instant::now();
        let tally = strike_all(&mut cluster.nodes, first, stride, |node, sandbox, nth, then| {
            strike_agent(node, sandbox, verb, nth, then)
        });
        let tally = tally.with_context(|| format!("WEFT_SEED={seed}"))?;
        report::took(
            format_args!("{}: {} strikes at {} calls of the agent", verb.name(), tally.strikes, tally.last),
            start.elapsed(),
        );
        report::figure(format_args!("{:?}", tally.names));
        ensure!(tally.last > 50, "the agent served {} within {} calls", verb.name(), tally.last);
        // What a killed agent had promised comes back by itself.
        for node in &cluster.nodes {
            invariant(node, &[])?;
        }
        Ok(())
    })
}

#[test]
fn an_add_killed_after_any_system_call() -> Result<()> {
    plugin_killed_everywhere(Verb::Add, &["connect", "setns", "sendto", "write"])
}

#[test]
fn a_del_killed_after_any_system_call() -> Result<()> {
    plugin_killed_everywhere(Verb::Del, &["connect", "write", "read"])
}

#[test]
fn an_agent_killed_while_it_serves_an_add() -> Result<()> {
    agent_killed_everywhere(Verb::Add)
}

#[test]
fn an_agent_killed_while_it_serves_a_del() -> Result<()> {
    agent_killed_everywhere(Verb::Del)
}
