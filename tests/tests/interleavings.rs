//! A thousand random interleavings of ADD, DEL, killed plugins, killed and restarted agents, several containers at once
//! and several calls for one container. After each, when all is quiet: addresses handed out, live veths and the agent's
//! records are the same, and each container has what its calls were told.
//!
//! `WEFT_SEED=N cargo test -p e2e --test interleavings` takes the same steps again; when each strikes is the machine's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use e2e::books::{address_inside, invariant, live_veths};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::node::Node;
use e2e::plugin::{Outcome, finish};
use e2e::pod::{Pod, Sandbox, address_of, host_veth};
use e2e::random::{Moments, Random};
use e2e::report;
use e2e::wait::{eventually, let_pass};
use weft_shared::cni::Code;

const INTERLEAVINGS: u64 = 1000;
/// They share the work: most of a call's time is the kernel's grace periods.
const NODES: u8 = 4;
const CONTAINERS: u64 = 8;
/// An ADD takes about 7 ms, and steps of a round begin within so many microseconds.
const MOMENTS: u64 = 12_000;
/// Well before a plugin's span is over, when the agent would mend by the clock what it has to know by itself.
const QUIET: Duration = Duration::from_secs(12);

/// One call of a runtime, or the end of an agent, begun `at` microseconds after the round's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step {
    at: u64,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Add(usize),
    Del(usize),
    /// ADD, killed so many thousandths into the span that calls take here. The runtime sends a DEL when all is over, or
    /// tries again.
    KilledAdd(usize, u64),
    KilledDel(usize, u64),
    /// `kill -9`, and a new agent at once.
    KillAgent,
    /// SIGTERM, and a new agent when it has ended.
    RestartAgent,
}

impl What {
    fn container(self) -> Option<usize> {
        match self {
            Self::Add(c) | Self::Del(c) | Self::KilledAdd(c, _) | Self::KilledDel(c, _) => Some(c),
            Self::KillAgent | Self::RestartAgent => None,
        }
    }
}

fn round(random: &mut Random) -> Vec<Step> {
    let calls = 1 + random.below(4);
    let mut steps: Vec<Step> = (0..calls)
        .map(|_| {
            let container = random.below(CONTAINERS) as usize;
            let moment = random.below(1_000);
            let what = match random.below(10) {
                0..4 => What::Add(container),
                4..7 => What::Del(container),
                7..9 => What::KilledAdd(container, moment),
                _ => What::KilledDel(container, moment),
            };
            Step { at: random.below(MOMENTS), what }
        })
        .collect();
    match random.below(20) {
        0..2 => steps.push(Step { at: random.below(MOMENTS), what: What::KillAgent }),
        2 => steps.push(Step { at: random.below(MOMENTS), what: What::RestartAgent }),
        _ => {}
    }
    steps
}

struct World<'a> {
    node: &'a mut Node,
    containers: Vec<Sandbox>,
    /// What the runtime knows: the containers that are attached, by their number.
    attached: BTreeMap<usize, Ipv4Addr>,
    /// ADD was killed, and the agent before it saw that: until the plugin's span is over the next agent must believe
    /// it alive, and leaves what it made in place. A call for the container ends that.
    adrift: BTreeSet<usize>,
    /// When calls are killed.
    moments: Moments,
}

impl World<'_> {
    /// Everything at its moment; returns what each call came back with.
    fn play(&mut self, steps: &[Step]) -> Result<Vec<(What, Outcome)>> {
        let start = Instant::now();
        let calls = steps.iter().filter(|step| step.what.container().is_some());
        let moments = self.moments.clone();
        let outcomes: Vec<(What, Outcome)> = thread::scope(|scope| {
            let running: Vec<_> = calls
                .map(|step| {
                    let container = step.what.container().unwrap_or_default();
                    let (step, call, moments) = (*step, &self.containers[container].call, &moments);
                    scope.spawn(move || {
                        let_pass(Duration::from_micros(step.at));
                        let outcome = match step.what {
                            What::Add(_) => call.run("ADD"),
                            What::Del(_) => call.run("DEL"),
                            What::KilledAdd(_, at) => killed(call.spawn("ADD")?, moments.at(at)),
                            What::KilledDel(_, at) => killed(call.spawn("DEL")?, moments.at(at)),
                            What::KillAgent | What::RestartAgent => bail!("no call"),
                        };
                        Ok((step.what, outcome?))
                    })
                })
                .collect();
            for step in steps.iter().filter(|step| step.what.container().is_none()) {
                let_pass(Duration::from_micros(step.at).saturating_sub(start.elapsed()));
                match step.what {
                    What::KillAgent => self.node.agent.kill()?,
                    _ => drop(self.node.agent.stop()?),
                }
                self.node.agent.start()?;
            }
            running
                .into_iter()
                .map(|call| call.join().map_err(|_| anyhow!("a call panicked"))?)
                .collect::<Result<_>>()
        })?;
        for (what, outcome) in &outcomes {
            if matches!(what, What::KilledAdd(..) | What::KilledDel(..)) {
                self.moments.learn(outcome.exit.is_none());
            }
        }
        Ok(outcomes)
    }

    /// What the runtime does after killed calls, and what it then knows. A container with several calls at once has
    /// either all or nothing: the books say which, and must agree.
    fn settle(&mut self, outcomes: &[(What, Outcome)], agent_went: bool, random: &mut Random) -> Result<()> {
        self.node.agent.wait_ready(READY)?;
        let touched: BTreeSet<usize> = outcomes.iter().filter_map(|(what, _)| what.container()).collect();
        let mut open = BTreeSet::new();
        for container in touched {
            self.adrift.remove(&container);
            let mine: Vec<_> =
                outcomes.iter().filter(|(what, _)| what.container() == Some(container)).collect();
            for (what, outcome) in &mine {
                match what {
                    What::Del(_) => outcome.silent().with_context(|| format!("{what:?}"))?,
                    What::Add(_) if outcome.exit != Some(0) => {
                        let (code, error) = outcome.error()?;
                        let contested = mine.len() > 1;
                        let fits = match code {
                            // Attached already, or by the other call.
                            code if code == Code::NameTaken as u64 => {
                                self.attached.contains_key(&container) || contested
                            }
                            // The agent is away, or went in the middle; the other call is under way, or was a DEL.
                            code if code == Code::TryAgainLater as u64 => agent_went || contested,
                            // A DEL took the veth away under its hands.
                            code => code == Code::Wiring as u64 && contested,
                        };
                        ensure!(fits, "{what:?}: {error}");
                    }
                    _ => {}
                }
            }
            let was_killed =
                mine.iter().any(|(what, _)| matches!(what, What::KilledAdd(..) | What::KilledDel(..)));
            let call = &self.containers[container].call;
            match mine.as_slice() {
                [(What::Add(_), outcome)] => {
                    if outcome.exit == Some(0) {
                        let address = address_of(&outcome.result()?)?;
                        ensure!(
                            self.attached.insert(container, address).is_none(),
                            "container {container} was added twice"
                        );
                    }
                }
                [(What::Del(_), _)] => drop(self.attached.remove(&container)),
                // The runtime gives up on a container whose call it has killed, or leaves it as it is for a while.
                _ if was_killed && random.below(3) > 0 => {
                    call.del()?;
                    self.attached.remove(&container);
                }
                _ => {
                    let killed = mine.iter().any(|(what, _)| matches!(what, What::KilledAdd(..)));
                    if killed && agent_went {
                        self.adrift.insert(container);
                    }
                    open.insert(container);
                }
            }
        }
        self.agree(&open)
    }

    /// The invariant. What is `open` may be there or not, but wholly.
    fn agree(&mut self, open: &BTreeSet<usize>) -> Result<()> {
        let veths: Vec<String> = self
            .containers
            .iter()
            .map(|sandbox| Ok(host_veth(&sandbox.call)?.to_string()))
            .collect::<Result<_>>()?;
        let mut found = BTreeMap::new();
        eventually("addresses, veths and records to agree", QUIET, || {
            found.clear();
            let (mut live, status) = (live_veths(self.node)?, self.node.status()?.pods);
            let mut held = BTreeSet::new();
            for record in &status.list {
                ensure!(
                    record.addresses.iter().all(|a| held.insert(*a)),
                    "an address in two records: {:?}",
                    status.list
                );
                let container = veths.iter().position(|veth| *veth == record.host_veth.as_str());
                let container = container.with_context(|| format!("a record of nobody's: {record:?}"))?;
                match record.state.as_str() {
                    "committed" => drop(found.insert(container, record.addresses.clone())),
                    // The span of a plugin that a killed agent has not seen die.
                    "aborted" if self.adrift.contains(&container) => drop(live.remove(&veths[container])),
                    "aborted" => {
                        ensure!(!live.contains(&veths[container]), "undone, and its veth lives: {record:?}")
                    }
                    state => bail!("{state} although all is quiet: {record:?}"),
                }
            }
            let of_records: BTreeSet<String> = found.keys().map(|c| veths[*c].clone()).collect();
            ensure!(live == of_records, "live veths {live:?}, records {of_records:?}");
            for container in 0..self.containers.len() {
                let told = self.attached.get(&container).map(|address| vec![IpAddr::from(*address)]);
                let recorded = found.get(&container);
                ensure!(
                    open.contains(&container) || told.as_ref() == recorded,
                    "container {container} was told {told:?}, the record says {recorded:?}"
                );
            }
            Ok(true)
        })?;
        for container in open {
            let inside = address_inside(&self.containers[*container].netns)?;
            let recorded = found.get(container).and_then(|addresses| match addresses.as_slice() {
                [IpAddr::V4(address)] => Some(*address),
                _ => None,
            });
            let matches = inside == recorded || recorded.is_none() && self.adrift.contains(container);
            ensure!(matches, "container {container} has {inside:?}, the record says {recorded:?}");
            match recorded {
                Some(address) => drop(self.attached.insert(*container, address)),
                None => drop(self.attached.remove(container)),
            }
        }
        Ok(())
    }

    fn pods(&self) -> Vec<Pod> {
        let pod = |(container, address): (&usize, &Ipv4Addr)| {
            let Sandbox { netns, call } = self.containers[*container].clone();
            Pod {
                name: call.container_id.clone(),
                netns,
                address: *address,
                result: serde_json::Value::Null,
                call,
            }
        };
        self.attached.iter().map(pod).collect()
    }
}

fn killed(mut plugin: std::process::Child, after: Duration) -> Result<Outcome> {
    let_pass(after);
    let _ = plugin.kill();
    finish(plugin)
}

/// What a node's share came to.
#[derive(Default)]
struct Tally {
    calls: usize,
    killed: usize,
    agents: usize,
}

/// One node's share of the interleavings, from a seed of its own.
fn work(node: &mut Node, seed: u64) -> Result<Tally> {
    let containers = (0..CONTAINERS)
        .map(|n| Sandbox::create(node, &format!("{}-{n}", node.name())))
        .collect::<Result<_>>()?;
    let moments = Moments::within(Duration::from_micros(MOMENTS));
    let mut world = World { node, containers, attached: BTreeMap::new(), adrift: BTreeSet::new(), moments };
    let mut random = Random::seeded(seed);
    let mut tally = Tally::default();
    for number in 0..INTERLEAVINGS / u64::from(NODES) {
        let steps = round(&mut random);
        let context = || format!("seed {seed} of the node, interleaving {number}: {steps:?}");
        let outcomes = world.play(&steps).with_context(context)?;
        let agent_went = outcomes.len() < steps.len();
        world.settle(&outcomes, agent_went, &mut random).with_context(context)?;
        tally.calls += outcomes.len();
        tally.agents += usize::from(agent_went);
        tally.killed += outcomes.iter().filter(|(_, outcome)| outcome.exit.is_none()).count();
    }
    // Addresses that killed agents had promised come back by themselves.
    invariant(world.node, &world.pods())?;
    for sandbox in &world.containers {
        sandbox.call.del()?;
    }
    invariant(world.node, &[])?;
    Ok(tally)
}

#[test]
fn a_thousand_random_interleavings_keep_the_books_straight() -> Result<()> {
    let seed = Random::seed_of_the_moment();
    report::figure(format_args!("replay with WEFT_SEED={seed}"));
    scenario(Spec::embedded(NODES, Backend::Vxlan), |cluster| {
        let start = Instant::now();
        let tallies = thread::scope(|scope| {
            let nodes = cluster.nodes.iter_mut().enumerate();
            let working: Vec<_> =
                nodes.map(|(n, node)| scope.spawn(move || work(node, seed.wrapping_add(n as u64)))).collect();
            let ended = working
                .into_iter()
                .map(|node| node.join().map_err(|_| anyhow!("a node's thread panicked"))?);
            ended.collect::<Result<Vec<Tally>>>()
        });
        let tallies = tallies.with_context(|| format!("WEFT_SEED={seed}"))?;
        let sum = |part: fn(&Tally) -> usize| tallies.iter().map(part).sum::<usize>();
        let (calls, killed, agents) = (sum(|t| t.calls), sum(|t| t.killed), sum(|t| t.agents));
        report::took(
            format_args!(
                "{INTERLEAVINGS} interleavings: {calls} calls, {killed} of them killed, {agents} ends of an agent"
            ),
            start.elapsed(),
        );
        ensure!(killed > 100 && agents > 50, "too little was cut off: {killed} calls, {agents} agents");
        Ok(())
    })
}
