//! nf_tables by its own netlink messages: no `nft` program is needed, nothing is spawned, and a look that finds the
//! same generation as the last one lists nothing at all. When there is something to list it is our tables, the base
//! chains of the forward hook and what those lead to without a condition: thousands of rules of kube-proxy's or
//! Docker's are not read, only the names of their chains are (uapi: linux/netfilter/nf_tables.h).

mod expr;
mod flows;
mod monitor;
mod socket;
mod uapi;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use tracing::warn;
use weft_shared::Subnet;
use weft_shared::protocol::Protocol;

use self::socket::{CHANGE, NftSocket};
use self::uapi::*;
use self::wire::{Message, Received};
use super::iptables::Legacy;
use super::{Errno, KernelError};
use crate::firewall::advice::{FLANNELS_CHAIN, Leftover};
use crate::firewall::enforcers;
use crate::firewall::forward::{HostChain, Keeper, place};
use crate::firewall::legacy::LegacyFilter;
use crate::firewall::masquerade::{self, HOOK_FORWARD};
use crate::firewall::rule::{Side, Step};
use crate::firewall::{
    Chain, ChainId, ChainPolicy, Expr, Family, Hook, HostPort, Part, Rule, Ruleset, TableId, host_ports,
    pod_masquerade,
};

pub(super) use monitor::{Commit, listen};

/// Looks until one is not overtaken by a commit.
const TRIES: u32 = 10;
const COMMENT: &str = "kept by weft";

/// Of a chain that the kernel listed.
#[derive(Debug, Clone)]
struct ListedChain {
    id: ChainId,
    hook: Option<Hook>,
}

#[derive(Debug, Clone)]
struct ListedRule {
    chain: ChainId,
    handle: u64,
    rule: Rule,
}

#[derive(Debug, Clone, Copy)]
struct TableFlags {
    owned: bool,
    dormant: bool,
}

/// The packet filter of one network namespace.
#[derive(Debug, Default)]
pub(super) struct Firewall {
    /// Opened with the first look, in the namespace of the thread that looks.
    socket: Option<NftSocket>,
    seen: Option<(u32, Ruleset)>,
    legacy: Legacy,
    /// What UDP flows to host ports have been made to follow.
    flows: Option<BTreeSet<HostPort>>,
    /// Every host port that has led somewhere since.
    led: BTreeSet<HostPort>,
    /// The kernel has refused `masquerade fully-random`.
    no_random: bool,
    /// Looks that had to list something.
    listed: u64,
}

impl Firewall {
    pub(super) fn look(&mut self, legacy_period: Duration) -> Result<Ruleset, KernelError> {
        let mut seen = self.nftables()?;
        let look = self.legacy.look(legacy_period);
        seen.legacy_until = (look.filter != LegacyFilter::Unused).then_some(look.good_until);
        seen.legacy = look.filter;
        seen.left.extend(look.left);
        seen.fully_random = !self.no_random;
        seen.flows.clone_from(&self.flows);
        Ok(seen)
    }

    fn nftables(&mut self) -> Result<Ruleset, KernelError> {
        for _ in 0..TRIES {
            let socket = self.socket()?;
            let generation = socket.generation()?;
            if let Some((seen, ruleset)) = &self.seen
                && *seen == generation
            {
                return Ok(ruleset.clone());
            }
            self.listed += 1;
            let socket = self.socket()?;
            if let Some(ruleset) = list(socket)?
                && socket.generation()? == generation
            {
                self.led.extend(ruleset.own.iter().flat_map(host_ports::led));
                self.seen = Some((generation, ruleset.clone()));
                return Ok(ruleset);
            }
        }
        Err(KernelError::Interrupted(TRIES))
    }

    /// `local`: the addresses of this host, should they matter.
    pub(super) fn set(
        &mut self,
        part: &Part,
        local: impl FnOnce() -> Result<BTreeSet<IpAddr>, KernelError>,
    ) -> Result<(), KernelError> {
        match part {
            Part::Table { id, chains } => self.replace_table(id, chains),
            Part::Accepts { chain, rules, .. } => self.put_rules(chain, rules),
            Part::Legacy { rules, .. } => self.legacy.put(rules),
            Part::Flows(ports) => self.settle_flows(ports, local),
        }
    }

    pub(super) fn remove(&mut self, part: &Part) -> Result<(), KernelError> {
        match part {
            Part::Table { id, .. } => {
                let message = delete_table(id);
                match self.socket()?.commit(vec![message], None) {
                    Err(KernelError::Refused(Errno(nix::libc::ENOENT))) => Ok(()),
                    other => other,
                }
            }
            Part::Accepts { chain, .. } => self.put_rules(chain, &[]),
            Part::Legacy { .. } => self.legacy.put(&[]),
            Part::Flows(_) => {
                self.flows = None;
                self.led.clear();
                Ok(())
            }
        }
    }

    /// Flows that began by other rules than those that are there now begin anew.
    fn settle_flows(
        &mut self,
        ports: &BTreeSet<HostPort>,
        local: impl FnOnce() -> Result<BTreeSet<IpAddr>, KernelError>,
    ) -> Result<(), KernelError> {
        let led = self.led.clone();
        let has = |family: Family| {
            let mut all = ports.iter().chain(&led).filter(|port| port.protocol == Protocol::Udp);
            all.any(|port| Family::of(Subnet::host(port.pod.ip())) == family)
        };
        let families: Vec<Family> = [Family::Ip, Family::Ip6].into_iter().filter(|f| has(*f)).collect();
        if !families.is_empty() {
            let local = local()?;
            let is_local = |ip: IpAddr| ip.is_loopback() || local.contains(&ip);
            let socket = self.socket()?;
            for family in families {
                let mut flows = flows::list(socket, family)?;
                flows.retain(|listed| listed.flow.is_astray(ports, &led) && is_local(listed.flow.to.ip()));
                for astray in &flows {
                    flows::delete(socket, astray)?;
                }
            }
        }
        self.flows = Some(ports.clone());
        self.led.clone_from(ports);
        Ok(())
    }

    /// The old table goes and the new one comes in one commit: no packet meets neither. Connections keep their
    /// translation, which is conntrack's.
    fn replace_table(&mut self, id: &TableId, chains: &[Chain]) -> Result<(), KernelError> {
        if *id == host_ports::table_id(id.family) {
            // Flows may have begun by whatever was there, or by nothing.
            self.flows = None;
        }
        let socket = self.socket()?;
        let all_of_it = commit_what_is_known(chains, |chains| socket.commit(whole_table(id, chains), None))?;
        if !all_of_it {
            warn!("this kernel has no masquerade with random ports; source ports are kept where they can be");
            self.no_random = true;
        }
        Ok(())
    }

    /// Makes `rules` the only ones of ours in a chain of somebody else's, before what drops. The chain is read anew,
    /// and the commit is refused if it has changed since.
    fn put_rules(&mut self, id: &ChainId, rules: &[Rule]) -> Result<(), KernelError> {
        let mut refused = KernelError::Interrupted(TRIES);
        for _ in 0..TRIES {
            let socket = self.socket()?;
            let generation = socket.generation()?;
            let Some(ruleset) = list(socket)? else { continue };
            let Some(chain) = ruleset.forward.iter().find(|chain| chain.id == *id) else {
                return if rules.is_empty() { Ok(()) } else { Err(KernelError::Contested) };
            };
            let Some(listed) = rules_of(socket, &id.table, Some(&id.name))? else { continue };
            let messages = edit(chain, &listed, rules);
            if messages.is_empty() {
                return Ok(());
            }
            match socket.commit(messages, Some(generation)) {
                Err(error @ KernelError::Refused(Errno(nix::libc::ERESTART | nix::libc::ENOENT))) => {
                    refused = error
                }
                other => return other,
            }
        }
        Err(refused)
    }

    fn socket(&mut self) -> Result<&mut NftSocket, KernelError> {
        if self.socket.is_none() {
            self.socket = Some(NftSocket::open()?);
        }
        self.socket.as_mut().ok_or_else(|| KernelError::Socket("not open".into()))
    }
}

/// Commits `chains`, without random source ports where the kernel refuses those; `Ok(false)` says that it did.
fn commit_what_is_known(
    chains: &[Chain],
    mut commit: impl FnMut(&[Chain]) -> Result<(), KernelError>,
) -> Result<bool, KernelError> {
    let plain = without_random(chains);
    match commit(chains) {
        Err(KernelError::Refused(Errno(nix::libc::EINVAL | nix::libc::EOPNOTSUPP))) if plain != *chains => {
            commit(&plain).map(|()| false)
        }
        other => other.map(|()| true),
    }
}

fn without_random(chains: &[Chain]) -> Vec<Chain> {
    let mut chains = chains.to_vec();
    for expr in chains.iter_mut().flat_map(|c| &mut c.rules).flat_map(|r| &mut r.exprs) {
        if let Expr::Masquerade { fully_random } = expr {
            *fully_random = false;
        }
    }
    chains
}

/// Making it first keeps the removal from failing where there is none.
fn whole_table(id: &TableId, chains: &[Chain]) -> Vec<Message> {
    let table = || {
        Message::new(NEW_TABLE, CHANGE | NLM_F_CREATE, id.family.nfproto(), 0)
            .text(table::NAME, &id.name)
            .attribute(table::USERDATA, &expr::comment(COMMENT))
    };
    let mut messages = vec![table(), delete_table(id), table()];
    for chain in chains {
        let mut message = Message::new(NEW_CHAIN, CHANGE | NLM_F_CREATE, id.family.nfproto(), 0)
            .text(chain::TABLE, &id.name)
            .text(chain::NAME, &chain.name);
        if let Some(hook) = &chain.hook {
            let place = wire::Attributes::default()
                .number(chain::HOOK_NUMBER, hook.number)
                .number(chain::HOOK_PRIORITY, hook.priority as u32);
            let policy = match hook.policy {
                ChainPolicy::Accept => ACCEPT,
                ChainPolicy::Drop => DROP,
            };
            message = message
                .nested(chain::HOOK, &place)
                .number(chain::POLICY, policy as u32)
                .text(chain::TYPE, &hook.kind);
        }
        messages.push(message);
    }
    // A rule may lead to any chain.
    for chain in chains {
        let chain_id = ChainId { table: id.clone(), name: chain.name.clone() };
        messages.extend(chain.rules.iter().map(|rule| new_rule(&chain_id, rule, None)));
    }
    messages
}

fn delete_table(id: &TableId) -> Message {
    Message::new(DEL_TABLE, CHANGE, id.family.nfproto(), 0).text(table::NAME, &id.name)
}

/// At the end, or before the rule of that handle.
fn new_rule(chain: &ChainId, rule: &Rule, before: Option<u64>) -> Message {
    let flags = CHANGE | NLM_F_CREATE | if before.is_none() { NLM_F_APPEND } else { 0 };
    let mut message = Message::new(NEW_RULE, flags, chain.table.family.nfproto(), 0)
        .text(rule::TABLE, &chain.table.name)
        .text(rule::CHAIN, &chain.name)
        .nested(rule::EXPRESSIONS, &expr::encode(&rule.exprs));
    if let Some(handle) = before {
        message = message.long(rule::POSITION, handle);
    }
    if let Some(comment) = &rule.comment {
        message = message.attribute(rule::USERDATA, &expr::comment(comment));
    }
    message
}

/// `listed` is the chain as it stands, in the order of `chain.rules`.
fn edit(chain: &HostChain, listed: &[ListedRule], rules: &[Rule]) -> Vec<Message> {
    let (ours, others): (Vec<_>, Vec<_>) = listed.iter().partition(|l| l.rule.is_marked());
    let mut without = chain.clone();
    without.rules.retain(|rule| !rule.is_marked());
    let before = place(&without).and_then(|at| others.get(at)).map(|rule| rule.handle);
    let deletions = ours.iter().map(|rule| {
        Message::new(DEL_RULE, CHANGE, chain.id.table.family.nfproto(), 0)
            .text(rule::TABLE, &chain.id.table.name)
            .text(rule::CHAIN, &chain.id.name)
            .long(rule::HANDLE, rule.handle)
    });
    deletions.chain(rules.iter().map(|rule| new_rule(&chain.id, rule, before))).collect()
}

/// Everything that concerns us; `None` when it changed meanwhile.
fn list(socket: &mut NftSocket) -> Result<Option<Ruleset>, KernelError> {
    let mut ruleset = Ruleset::default();
    for family in Family::ALL {
        let number = family.nfproto();
        let (Some(tables), Some(chains)) = (
            socket.dump(GET_TABLE, number, |m| m, table_flags)?,
            socket.dump(GET_CHAIN, number, |m| m, listed_chain)?,
        ) else {
            return Ok(None);
        };
        let tables: BTreeMap<String, TableFlags> = tables.into_iter().collect();
        let names =
            [masquerade::table_id, host_ports::table_id, pod_masquerade::table_id].map(|id| id(family));
        let own: Vec<TableId> = names.into_iter().filter(|_| family != Family::Inet).collect();
        for id in own.iter().filter(|id| tables.contains_key(&id.name)) {
            let Some(part) = own_table(socket, id, &chains, tables[&id.name].dormant)? else {
                return Ok(None);
            };
            ruleset.own.push(part);
        }
        for ListedChain { id, .. } in &chains {
            let awake = tables.get(&id.table.name).is_none_or(|flags| !flags.dormant);
            if let Some(whose) = enforcers::of_chain(id).filter(|_| awake) {
                ruleset.enforcers.entry(whose).or_insert_with(|| format!("nftables chain {id}"));
            }
        }
        for chain in &chains {
            let Some(hook) = &chain.hook else { continue };
            let flags = tables.get(&chain.id.table.name);
            let forwards = hook.number == HOOK_FORWARD && hook.kind == "filter";
            let ours = own.contains(&chain.id.table);
            if !forwards || ours || flags.is_some_and(|f| f.dormant) {
                continue;
            }
            let Some(host) = host_chain(socket, chain, hook.policy, flags)? else { return Ok(None) };
            ruleset.forward.push(host);
        }
        ruleset.kube_proxy |= tables.contains_key("kube-proxy")
            || chains.iter().any(|chain| chain.id == ChainId::new(family, "nat", "KUBE-SERVICES"));
        let left = ChainId::new(Family::Ip, "nat", FLANNELS_CHAIN);
        if chains.iter().any(|chain| chain.id == left) {
            let Some(rules) = rules_of(socket, &left.table, Some(&left.name))? else { return Ok(None) };
            let spared = |l: &ListedRule| l.rule.prefix(Side::Source).zip(l.rule.prefix(Side::Destination));
            ruleset.left.push(Leftover { legacy: false, spared: rules.iter().filter_map(spared).collect() });
        }
    }
    Ok(Some(ruleset))
}

/// A table of ours that sleeps is as good as none: it is shown without its chains.
fn own_table(
    socket: &mut NftSocket,
    id: &TableId,
    chains: &[ListedChain],
    dormant: bool,
) -> Result<Option<Part>, KernelError> {
    let Some(rules) = rules_of(socket, id, None)? else { return Ok(None) };
    let own = chains.iter().filter(|chain| chain.id.table == *id && !dormant).map(|chain| {
        let of_this = rules.iter().filter(|rule| rule.chain == chain.id);
        let rules = of_this.map(|l| l.rule.clone()).collect();
        Chain { name: chain.id.name.clone(), hook: chain.hook.clone(), rules }
    });
    Ok(Some(Part::table(id.clone(), own.collect())))
}

fn host_chain(
    socket: &mut NftSocket,
    chain: &ListedChain,
    policy: ChainPolicy,
    flags: Option<&TableFlags>,
) -> Result<Option<HostChain>, KernelError> {
    let id = chain.id.clone();
    let keeper = match flags {
        _ if id.table.name == "firewalld" => Keeper::Firewalld,
        Some(flags) if flags.owned => Keeper::Process,
        _ => Keeper::Anybody,
    };
    let Some(rules) = rules_of(socket, &id.table, Some(&id.name))? else { return Ok(None) };
    let rules: Vec<Rule> = rules.into_iter().map(|l| l.rule).collect();
    let mut called = BTreeMap::new();
    let mut pending = leads_to(&rules, id.table.family);
    while let Some(name) = pending.pop() {
        if called.contains_key(&name) {
            continue;
        }
        let Some(rules) = rules_of(socket, &id.table, Some(&name))? else { return Ok(None) };
        let rules: Vec<Rule> = rules.into_iter().map(|l| l.rule).collect();
        pending.extend(leads_to(&rules, id.table.family));
        called.insert(name, rules);
    }
    Ok(Some(HostChain { id, policy, keeper, rules, called }))
}

/// Chains that are called without a condition.
fn leads_to(rules: &[Rule], family: Family) -> Vec<String> {
    let families = [family, Family::Ip, Family::Ip6];
    let steps = families.into_iter().flat_map(|family| rules.iter().map(move |rule| rule.step(family)));
    steps
        .filter_map(|step| match step {
            Step::Jump(name) | Step::Goto(name) => Some(name),
            _ => None,
        })
        .collect()
}

fn rules_of(
    socket: &mut NftSocket,
    table: &TableId,
    chain: Option<&str>,
) -> Result<Option<Vec<ListedRule>>, KernelError> {
    let filter = |message: Message| {
        let message = message.text(rule::TABLE, &table.name);
        match chain {
            Some(chain) => message.text(rule::CHAIN, chain),
            None => message,
        }
    };
    let rules = socket.dump(GET_RULE, table.family.nfproto(), filter, listed_rule)?;
    // Kernels that do not know the filter list everything.
    Ok(rules.map(|mut rules| {
        rules.retain(|rule| rule.chain.table == *table && chain.is_none_or(|name| rule.chain.name == name));
        rules
    }))
}

fn table_flags(message: &Received<'_>) -> Option<(String, TableFlags)> {
    let attributes = message.attributes();
    let flags = attributes.number(table::FLAGS).unwrap_or(0);
    let flags = TableFlags { owned: flags & FLAG_OWNER != 0, dormant: flags & FLAG_DORMANT != 0 };
    Some((attributes.text(table::NAME)?.to_owned(), flags))
}

fn listed_chain(message: &Received<'_>) -> Option<ListedChain> {
    let attributes = message.attributes();
    let family = family_of(message.family())?;
    let id = ChainId::new(family, attributes.text(chain::TABLE)?, attributes.text(chain::NAME)?);
    let hook = attributes.nested(chain::HOOK).and_then(|hook| {
        let policy = match attributes.number(chain::POLICY)? as i32 {
            DROP => ChainPolicy::Drop,
            _ => ChainPolicy::Accept,
        };
        Some(Hook {
            kind: attributes.text(chain::TYPE)?.to_owned(),
            number: hook.number(chain::HOOK_NUMBER)?,
            priority: hook.number(chain::HOOK_PRIORITY)? as i32,
            policy,
        })
    });
    Some(ListedChain { id, hook })
}

fn listed_rule(message: &Received<'_>) -> Option<ListedRule> {
    let attributes = message.attributes();
    let family = family_of(message.family())?;
    let chain = ChainId::new(family, attributes.text(rule::TABLE)?, attributes.text(rule::CHAIN)?);
    let expressions = attributes.nested(rule::EXPRESSIONS).unwrap_or(wire::Parsed(&[]));
    let rule = expr::decode(expressions, attributes.get(rule::USERDATA));
    Some(ListedRule { chain, handle: attributes.long(rule::HANDLE)?, rule })
}

fn family_of(number: u8) -> Option<Family> {
    Family::ALL.into_iter().find(|family| family.nfproto() == number)
}
