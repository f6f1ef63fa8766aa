//! One pass: desired, observed, plan, apply, and a second look.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use tracing::{debug, info};
use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::names::LINK_GROUP;
use weft_shared::names::is_egress_ifname;
use weft_shared::{IfName, Subnet};

use super::observe::{Ownership, observe};
use super::plan::plan;
use super::pods::{self, WayToLoopback};
use super::restless::Restless;
use super::{Aborted, Inputs, NodeInputs, PeerReport, Pending, Report};
use crate::dataplane::{LocalNode, PeerPlan};
use crate::firewall::legacy::LegacyFilter;
use crate::firewall::{self, HostPorts, Networks, Part, PartKey, Ruleset, advice, enforcers, host_ports};
use crate::kernel::{Dump, Kernel, KernelError};
use crate::object::{Desired, Found, Key, Object, Observed, Obstacle, Op};
use crate::pods::{DeviceFacts, PodNeeds, SeenVeth};
use crate::underlay::Underlay;

/// Looks in one pass: a recreated device takes its entries with it, and those come back in the next.
const ROUNDS: usize = 4;
/// Lines in the log for what one pass did; the rest is counted.
const TOLD: usize = 20;

/// What the loop remembers between passes.
#[derive(Debug, Default)]
pub struct Memory {
    /// Operations that failed when they were last tried.
    failed: BTreeMap<Key, Failed>,
    /// Passes in a row that could not be made at all, and when the next may.
    aborted: u32,
    resume_at: Option<Instant>,
    /// Revision of the inputs that the failures belong to: with others, everything is tried again.
    revision: u64,
    /// Revision of the inputs that the last pass brought about completely.
    settled: Option<u64>,
    /// When iptables-legacy, which announces nothing, is to be looked at again.
    legacy_due: Option<Instant>,
    /// Routes of a flanneld that ran here before have been taken over.
    adopted: bool,
    /// What was on-link in the last pass: when that changes, what follows is no repair.
    on_link: BTreeSet<IpAddr>,
    /// What has been repaired again and again since the inputs last changed.
    restless: Restless,
    /// Our devices as they were last in place.
    known: BTreeMap<IfName, DeviceFacts>,
}

#[derive(Debug, Clone)]
struct Failed {
    error: KernelError,
    attempts: u32,
    retry_at: Instant,
}

impl Memory {
    /// When something that failed is due again.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.failed.values().map(|failed| failed.retry_at).chain(self.resume_at).chain(self.legacy_due).min()
    }

    /// What is not due yet. A failing operation is announced by the kernel as well, and those announcements must not
    /// make it a busy loop. What an obstacle stood before was not tried, and is as soon as it is out of the way.
    fn deferred(&self, now: Instant) -> BTreeMap<Key, KernelError> {
        let is_failure = |failed: &Failed| !matches!(failed.error, KernelError::Obstacle(_));
        let waiting = self.failed.iter().filter(|(_, failed)| now < failed.retry_at && is_failure(failed));
        waiting.map(|(key, failed)| (key.clone(), failed.error.clone())).collect()
    }
}

impl Memory {
    /// What is neither wanted nor there is forgotten: pods come and go with devices of their own.
    fn keep_in_mind(&mut self, report: &Report, desired: &Desired, dump: &Dump) {
        let there: BTreeSet<u32> = dump.links.values().map(|found| found.index).collect();
        self.known.extend(report.devices.iter().map(|(name, facts)| (name.clone(), *facts)));
        self.known.retain(|name, facts| {
            desired.get(&Key::Link(name.clone())).is_some() || there.contains(&facts.ifindex)
        });
    }
}

/// Doubles from a tenth of a second to ten.
fn backoff(attempts: u32) -> Duration {
    Duration::from_millis(100)
        .saturating_mul(1 << attempts.saturating_sub(1).min(10))
        .min(Duration::from_secs(10))
}

/// What a pass was about.
#[derive(Debug)]
pub(super) enum Outcome {
    Node(Box<Report>),
    /// The node is not known yet: nothing was touched but where host ports lead, for pods come and go meanwhile.
    HostPorts(Vec<Pending>),
}

pub(super) fn pass(
    kernel: &mut impl Kernel,
    memory: &mut Memory,
    inputs: &Inputs,
    revision: u64,
    now: Instant,
) -> Result<Outcome, Aborted> {
    if memory.revision != revision {
        memory.failed.clear();
        memory.restless.clear();
        memory.revision = revision;
    }
    let outcome = match &inputs.node {
        Some(node) => look_and_mend(kernel, memory, inputs, node, revision, now)
            .map(|report| Outcome::Node(Box::new(report))),
        None => keep_host_ports(kernel, memory, inputs, revision, now).map(Outcome::HostPorts),
    };
    match outcome {
        Ok(outcome) => {
            (memory.aborted, memory.resume_at) = (0, None);
            Ok(outcome)
        }
        Err(aborted) => {
            memory.aborted += 1;
            memory.resume_at = Some(now + backoff(memory.aborted));
            memory.settled = None;
            Err(aborted)
        }
    }
}

fn look_and_mend(
    kernel: &mut impl Kernel,
    memory: &mut Memory,
    inputs: &Inputs,
    node: &NodeInputs,
    revision: u64,
    now: Instant,
) -> Result<Report, Aborted> {
    let mut settled = memory.settled == Some(revision);
    let mut report = Report::default();
    let mut failed = memory.deferred(now);
    let mut told = 0;
    memory.restless.settle(now);
    for round in 0..ROUNDS {
        let dump = kernel.dump(node.backend.plane().device())?;
        let local = local_node(kernel, node, inputs, &dump)?;
        if let Some(local) = &local {
            settled &= memory.on_link == local.on_link;
            memory.on_link.clone_from(&local.on_link);
        }
        let (peers, over_our_pods) = apart_from_pods(inputs);
        // Without an underlay pods keep their bridge, and nothing is taken away.
        let mut wanted = local.as_ref().map(|local| node.backend.desired(local, &peers)).unwrap_or_default();
        wanted.peers.extend(over_our_pods);
        let mut desired = pods::desired(&inputs.pods, node.underlay.public_ip, &dump);
        desired.extend(wanted.desired);
        desired.extend(forwarding(node, inputs));
        let way = pods::way_to_loopback(&inputs.pods, &dump, kernel)?;
        let networks = firewall_networks(node, inputs, &way);
        let (firewall, unseen) = look_at_firewall(kernel, inputs, &networks);
        for (key, error) in &unseen {
            failed.entry(key.clone()).or_insert_with(|| error.clone());
        }
        for part in firewall::desired(&inputs.firewall, &networks, &firewall) {
            desired.insert(Object::Firewall(part));
        }
        desired.extend(pods::loopback(&inputs.pods, &way, &firewall));
        let mut paths = desired.sysctl_paths();
        paths.extend(advice::SYSCTLS);
        let sysctls = kernel.sysctls(&paths)?;
        let ownership = ownership(node, inputs, memory);
        let mut observed = observe(&dump, &sysctls, &desired, &ownership);
        observed.objects.extend(firewall::found(&firewall).map(|part| {
            let object = Object::Firewall(part);
            (object.key(), Found { object, ours: true, overruled: false })
        }));
        let limits = kernel.shaping(&desired.limits())?;
        observed.objects.extend(
            limits.into_iter().map(|object| (object.key(), Found { object, ours: false, overruled: false })),
        );
        observed.renamed.retain(|name, _| !failed.contains_key(&Key::Name(name.clone())));
        let ops = plan(&desired, &observed, inputs.has_snapshot && local.is_some());
        let still_wrong = ops.iter().map(Op::key).chain(unseen.into_keys());
        let still_wrong: BTreeSet<Key> = still_wrong.chain(observed.obstacles.keys().cloned()).collect();
        // What failed a moment ago fails again: a later pass tries it.
        let ops: Vec<Op> = ops.into_iter().filter(|op| !failed.contains_key(&op.key())).collect();
        if ops.is_empty() || round == ROUNDS - 1 {
            let contested = memory.restless.contested();
            failed.retain(|key, _| still_wrong.contains(key));
            failed.extend(observed.obstacles.into_iter().map(|(key, obstacle)| (key, obstacle.into())));
            for key in ops.iter().map(Op::key).chain(contested) {
                failed.entry(key).or_insert(KernelError::Contested);
            }
            memory.legacy_due = firewall.legacy_until;
            report.enforcers = enforcers::of(&firewall, dump.links.keys());
            report.advice = advice::of(&inputs.firewall, &networks, &firewall, &sysctls);
            finish(&mut report, &dump, &desired, &wanted.peers, &failed, &inputs.pods);
            // What somebody else keeps changing, and is right at the moment, does not keep pods from being served.
            report.usable = !still_wrong.iter().any(|key| {
                let matters = match key {
                    Key::Sysctl(path) => !pods::is_of_loopback(path),
                    Key::Link(name) => !is_egress_ifname(name.as_str()),
                    key => matches!(key, Key::Addr(..)),
                };
                matters && failed.contains_key(key)
            });
            look_at_underlay(&mut report, &dump, node, local);
            memory.keep_in_mind(&report, &desired, &dump);
            break;
        }
        for (op, result) in ops.iter().zip(kernel.apply(&ops)) {
            match result {
                Ok(()) => {
                    let news = memory.restless.repaired(&op.key(), now) && told < TOLD;
                    told += 1;
                    report.repairs += u64::from(settled);
                    log(op, settled, news);
                }
                Err(error) => {
                    failed.insert(op.key(), error);
                }
            }
        }
    }
    if let Some(more) = told.checked_sub(TOLD).filter(|more| *more > 0) {
        info!(more, "further objects were set, repaired or removed in this pass");
    }
    remember(memory, failed, &mut report, revision, now);
    memory.adopted |= inputs.has_snapshot;
    report.after_snapshot = inputs.has_snapshot;
    Ok(report)
}

/// What is left to do of a node that is not known yet: its pods' host ports follow from records, and a DEL takes one
/// away. What else is in the packet filter, and settings, wait.
fn keep_host_ports(
    kernel: &mut impl Kernel,
    memory: &mut Memory,
    inputs: &Inputs,
    revision: u64,
    now: Instant,
) -> Result<Vec<Pending>, Aborted> {
    if !inputs.pods_recorded {
        return Ok(Vec::new());
    }
    let mut failed = memory.deferred(now);
    let is_about = |key: &Key| matches!(key, Key::Firewall(part) if host_ports::is_about(part));
    for round in 0..ROUNDS {
        let way = pods::way_to_loopback(&inputs.pods, &kernel.dump(None)?, kernel)?;
        let networks = networks_of_pods(inputs.pods.subnets().collect(), inputs, &way);
        let (seen, mut unseen) = look_at_firewall(kernel, inputs, &networks);
        unseen.retain(|key, _| is_about(key));
        let mut desired = Desired::default();
        host_ports::desired(&networks, &seen)
            .into_iter()
            .for_each(|part| desired.insert(Object::Firewall(part)));
        let found = firewall::found(&seen).map(Object::Firewall).filter(|object| is_about(&object.key()));
        let found = found.map(|object| (object.key(), Found { object, ours: true, overruled: false }));
        let observed = Observed { objects: found.collect(), ..Observed::default() };
        failed.extend(unseen.iter().map(|(key, error)| (key.clone(), error.clone())));
        let ops = plan(&desired, &observed, false);
        failed.retain(|key, _| unseen.contains_key(key) || ops.iter().any(|op| op.key() == *key));
        let ops: Vec<Op> = ops.into_iter().filter(|op| !failed.contains_key(&op.key())).collect();
        if ops.is_empty() || round == ROUNDS - 1 {
            failed.extend(ops.iter().map(|op| (op.key(), KernelError::Contested)));
            break;
        }
        for (op, result) in ops.iter().zip(kernel.apply(&ops)) {
            match result {
                Ok(()) => log(op, false, false),
                Err(error) => drop(failed.insert(op.key(), error)),
            }
        }
    }
    let mut report = Report::default();
    remember(memory, failed, &mut report, revision, now);
    memory.settled = None;
    Ok(report.pending)
}

/// Peers to serve, and those whose subnet pods of this node still live in: after another node has taken it, a route
/// there would cut them off from their own node.
fn apart_from_pods(inputs: &Inputs) -> (Vec<Lease>, Vec<(LeaseKey, PeerPlan)>) {
    let ours: Vec<Subnet> = inputs.pods.subnets().collect();
    let over = |lease: &Lease| lease.key.subnets().any(|theirs| ours.iter().any(|own| own.overlaps(theirs)));
    let (over, apart): (Vec<Lease>, Vec<Lease>) = inputs.peers.iter().cloned().partition(over);
    let problem = "pods of this node still have addresses in its subnet: recreate them";
    let refuse = |lease: Lease| (lease.key, PeerPlan { keys: vec![], problem: Some(problem.into()) });
    (apart, over.into_iter().map(refuse).collect())
}

/// A node carries its pods' packets between interfaces. The setting of the whole node gives every interface its own
/// (net/ipv4/devinet.c, `inet_forward_change`), which can be taken away from each of them again.
fn forwarding(node: &NodeInputs, inputs: &Inputs) -> Desired {
    let devices = node.backend.plane().device().into_iter().chain(inputs.pods.bridges.keys());
    let devices = devices.chain([&node.underlay.iface]);
    let per_device = devices.map(|dev| format!("net/ipv4/conf/{dev}/forwarding"));
    let mut desired = Desired::default();
    for path in ["net/ipv4/ip_forward".to_owned()].into_iter().chain(per_device) {
        desired.insert(Object::Sysctl { path, value: "1".into() });
    }
    desired
}

fn firewall_networks(node: &NodeInputs, inputs: &Inputs, way: &WayToLoopback) -> Networks {
    let local = node.lease.subnets().chain(inputs.pods.subnets()).collect();
    let overlay = node.config.networks().collect();
    Networks { overlay, ..networks_of_pods(local, inputs, way) }
}

fn networks_of_pods(mut local: Vec<Subnet>, inputs: &Inputs, way: &WayToLoopback) -> Networks {
    local.sort_unstable();
    local.dedup();
    let host_ports = HostPorts { ports: inputs.pods.host_ports.clone(), guarded: way.open.clone() };
    let masqueraded = inputs.pods.masqueraded.clone();
    Networks { overlay: Vec::new(), local, host_ports, masqueraded }
}

/// A packet filter that cannot be looked at leaves the rest of the node to be kept: what should be in it, or might have
/// to be, is pending.
fn look_at_firewall(
    kernel: &mut impl Kernel,
    inputs: &Inputs,
    networks: &Networks,
) -> (Ruleset, BTreeMap<Key, KernelError>) {
    match kernel.firewall(inputs.firewall.legacy_period) {
        Ok(seen) => {
            let unseen = match &seen.legacy {
                LegacyFilter::Unreadable(why) if inputs.firewall.forward => {
                    [(Key::Firewall(PartKey::Legacy), KernelError::Iptables(why.clone()))].into()
                }
                _ => BTreeMap::new(),
            };
            (seen, unseen)
        }
        Err(error) => {
            let nothing = Ruleset { unread: Some(error.to_string()), ..Ruleset::default() };
            let mut keys: BTreeSet<PartKey> =
                firewall::desired(&inputs.firewall, networks, &nothing).iter().map(Part::key).collect();
            // A table that is to be emptied is not wanted by anybody, and may be there all the same.
            if error != KernelError::NoNftables {
                keys.extend(firewall::tables_of_pods().map(PartKey::Table));
            }
            (nothing, keys.into_iter().map(|key| (Key::Firewall(key), error.clone())).collect())
        }
    }
}

fn ownership(node: &NodeInputs, inputs: &Inputs, memory: &Memory) -> Ownership {
    let devices = memory.known.iter().map(|(name, facts)| (name.clone(), facts.ifindex));
    let ports = inputs.pods.bridge_ports.iter().map(|(veth, port)| (veth.clone(), port.ifindex));
    let (range, own) = (node.config.v4, node.lease.v4.len());
    Ownership {
        networks: node.config.networks().collect(),
        subnet_len: if range.any_len { own } else { range.subnet_len },
        underlay: node.underlay.iface.clone(),
        device: node.backend.plane().device().cloned(),
        vtep_mac: node.vtep_mac,
        bridges: inputs.pods.bridges.keys().cloned().collect(),
        forced: inputs.pods.forced.clone(),
        adopt_flannels: node.first_start && !memory.adopted,
        indices: ports.chain(devices).collect(),
    }
}

/// This node with the underlay as it is now; `None` while that has no interface.
fn local_node(
    kernel: &mut impl Kernel,
    node: &NodeInputs,
    inputs: &Inputs,
    dump: &Dump,
) -> Result<Option<LocalNode>, Aborted> {
    let iface = &node.underlay.iface;
    let Some(found) = dump.links.get(iface) else {
        return Ok(None);
    };
    let underlay = Underlay { index: found.index, mtu: found.link.mtu, ..node.underlay.clone() };
    let on_link = if node.backend.plane().asks_for_on_link() {
        let peers = inputs.peers.iter().flat_map(|p| p.key.subnets().filter_map(|s| p.attrs.public_addr(s)));
        kernel.on_link(iface, &peers.collect::<BTreeSet<IpAddr>>())?
    } else {
        BTreeSet::new()
    };
    let broadcast = broadcast(&underlay, dump);
    Ok(Some(LocalNode { lease: node.lease, underlay, broadcast, on_link }))
}

/// The last address of a network (RFC 919), unless there is no room for one (RFC 3021).
fn broadcast(underlay: &Underlay, dump: &Dump) -> Option<Ipv4Addr> {
    dump.addrs.iter().filter(|found| found.dev == underlay.iface).find_map(|found| match found.addr {
        IpNetwork::V4(net) if net.ip() == underlay.addr && net.prefix() < 31 => Some(net.broadcast()),
        _ => None,
    })
}

/// What is no news to an operator is left to those who debug.
fn log(op: &Op, is_repair: bool, is_news: bool) {
    let object = op.key();
    match op {
        Op::Set { .. } if is_repair && is_news => info!(%object, "repaired"),
        Op::Remove(_) if is_news => info!(%object, "removed what nothing wants"),
        Op::Set { .. } => debug!(%object, is_repair, "set"),
        Op::Remove(_) => debug!(%object, is_repair, "removed"),
    }
}

fn finish(
    report: &mut Report,
    dump: &Dump,
    desired: &Desired,
    peers: &BTreeMap<LeaseKey, PeerPlan>,
    failed: &BTreeMap<Key, KernelError>,
    pods: &PodNeeds,
) {
    report.objects = desired.objects().filter(|(key, _)| !failed.contains_key(key)).count();
    for (key, plan) in peers {
        let missing = plan.keys.iter().find_map(|key| failed.get(key).map(|error| format!("{key}: {error}")));
        report.peers.insert(*key, PeerReport { refused: plan.problem.clone(), missing });
    }
    for (key, object) in desired.objects() {
        match (key, object) {
            (Key::Link(name), _) => {
                if let Some(found) = dump.links.get(name)
                    && object.satisfied_by(&Object::Link { name: name.clone(), link: found.link.clone() })
                {
                    report.devices.insert(
                        name.clone(),
                        DeviceFacts { ifindex: found.index, mac: found.link.mac.value() },
                    );
                }
            }
            (Key::Addr(dev, addr), _) if pods.bridges.contains_key(dev) && !failed.contains_key(key) => {
                report.gateways.entry(dev.clone()).or_default().push((*addr).into());
            }
            _ => {}
        }
    }
    let ours = dump.links.iter().filter(|(_, link)| link.is_veth() && link.group == LINK_GROUP);
    report.veths.veths = ours.map(|(name, l)| SeenVeth { name: name.clone(), ifindex: l.index }).collect();
}

/// Whether packets can leave by the underlay as it was chosen.
fn look_at_underlay(report: &mut Report, dump: &Dump, node: &NodeInputs, local: Option<LocalNode>) {
    let (iface, addr) = (&node.underlay.iface, node.underlay.addr);
    let has_address = dump.addrs.iter().any(|a| a.dev == *iface && a.addr.ip() == IpAddr::from(addr));
    report.underlay_problem = match dump.links.get(iface) {
        None => Some(format!("interface {iface} is gone")),
        Some(found) if !found.link.up => Some(format!("{iface} is down")),
        Some(_) => (!has_address).then(|| format!("{addr} is no longer on {iface}")),
    };
    report.underlay_lost = local.is_none() || !has_address;
    report.usable &= local.is_some();
    report.underlay = local.map(|local| local.underlay);
}

fn remember(
    memory: &mut Memory,
    failed: BTreeMap<Key, KernelError>,
    report: &mut Report,
    revision: u64,
    now: Instant,
) {
    let before = std::mem::take(&mut memory.failed);
    for (key, error) in failed {
        let known = before.get(&key);
        let failure = match known {
            Some(waiting) if now < waiting.retry_at => Failed { error, ..waiting.clone() },
            _ => {
                let attempts = known.map_or(0, |failed| failed.attempts) + 1;
                Failed { error, attempts, retry_at: now + backoff(attempts) }
            }
        };
        let Failed { error, attempts, .. } = failure.clone();
        report.pending.push(Pending { key: key.clone(), error, attempts });
        memory.failed.insert(key, failure);
    }
    // A route that is in place and gets no packets is complete as far as we go.
    let is_complete = |failed: &Failed| matches!(failed.error, KernelError::Obstacle(Obstacle::Overruled(_)));
    memory.settled = memory.failed.values().all(is_complete).then_some(revision);
}

#[cfg(test)]
#[path = "pass_tests.rs"]
pub(super) mod tests;
