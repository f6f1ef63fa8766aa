//! Ports of the host that lead to pods, in tables of weft's own: what the reference's portmap does with iptables
//! (plugins/meta/portmap), as one rule set that follows from the attachments there are and is replaced whole.
//!
//! A packet to a local address is translated before routing, a local process's in `output`. What comes from a pod of
//! this node or from the loopback is masqueraded as well, or the answer would go past the translation; the packet is
//! marked for that with the bit that portmap uses, since after the translation nobody can tell a host port's packet
//! from a Service's. The loopback needs `route_localnet` on the bridge, which would let pods send to the host's
//! 127.0.0.0/8 (CVE-2020-8558), and as if they were there: a chain before everything else drops both, wherever the
//! setting is on.
//!
//! The table is not flannel's: a flanneld that is rolled back to must not take the ports from pods that live on. Its
//! priority is behind everybody else's: whoever translates a port on purpose, portmap above all, goes before.
//!
//! A UDP flow keeps the translation it began with for as long as it has packets, so flows that do not go where their
//! port now leads are made to begin anew ([`Part::Flows`]), after the table says so. A table that nobody needs is
//! emptied, at once; empty it stays until that is done and things may be removed, which may be long after (a node that
//! has not heard from its store).

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use weft_shared::protocol::{PortMapping, Protocol};
use weft_shared::{IfName, Subnet};

use super::masquerade::{HOOK_POSTROUTING, base_chain};
use super::rule::{Side, came_by, dnat, is_address, is_local, marked, set_mark, to_port, within};
use super::{Chain, Expr, Family, Networks, Part, PartKey, Rule, Ruleset, TableId};

const TABLE: &str = "weft-hostports";
const PORTS_CHAIN: &str = "ports";

/// portmap's (`markMasqBit` 13).
const MARK: u32 = 1 << 13;

/// `NF_INET_PRE_ROUTING` and `NF_INET_LOCAL_OUT` of linux/netfilter.h.
const HOOK_PREROUTING: u32 = 0;
const HOOK_OUTPUT: u32 = 3;
/// `NF_IP_PRI_RAW`, and one behind `NF_IP_PRI_NAT_DST`, one before `NF_IP_PRI_NAT_SRC` (linux/netfilter_ipv4.h).
const PRIORITY_RAW: i32 = -300;
const PRIORITY_DSTNAT: i32 = -99;
const PRIORITY_SRCNAT: i32 = 99;

/// A port of the host and where it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    pub protocol: Protocol,
    /// `None`: every address of the pod's family.
    pub host_ip: Option<IpAddr>,
    pub port: u16,
    pub pod: SocketAddr,
}

/// A UDP flow, as conntrack has it: where its first packet went, and who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    pub to: SocketAddr,
    pub answers: SocketAddr,
}

impl Flow {
    /// Whether it does not go where its port leads; of a flow to a local address, and of ports that lead somewhere, or
    /// did before.
    pub fn is_astray(&self, wanted: &BTreeSet<HostPort>, former: &BTreeSet<HostPort>) -> bool {
        let takes = |port: &&HostPort| port.takes(Protocol::Udp, self.to);
        match wanted.iter().find(takes) {
            Some(port) => port.pod != self.answers,
            None => former.iter().filter(takes).any(|port| port.pod == self.answers),
        }
    }
}

/// What the rules follow from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostPorts {
    pub ports: BTreeSet<HostPort>,
    /// Bridges whose pods the host's loopback is to be kept from.
    pub guarded: BTreeSet<IfName>,
}

impl HostPort {
    /// What mappings mean for a pod of these addresses: its first of each family is what they lead to.
    pub fn of(mappings: &[PortMapping], addresses: &[IpAddr]) -> impl Iterator<Item = Self> {
        let first = |ipv4: bool| addresses.iter().copied().find(move |addr| addr.is_ipv4() == ipv4);
        let targets = [first(true), first(false)];
        mappings.iter().flat_map(move |mapping| {
            let of_family = targets.into_iter().flatten().filter(|pod| mapping.is_for(pod.is_ipv4()));
            of_family.map(|pod| Self {
                protocol: mapping.protocol,
                host_ip: mapping.host_ip.filter(|ip| !ip.is_unspecified()),
                port: mapping.host_port,
                pod: SocketAddr::new(pod, mapping.container_port),
            })
        })
    }

    /// Whether a packet to this local address and port is its.
    pub fn takes(&self, protocol: Protocol, to: SocketAddr) -> bool {
        let on_address = self.host_ip.is_none_or(|ip| ip == to.ip());
        let same = (self.protocol, self.port) == (protocol, to.port());
        same && on_address && self.pod.is_ipv4() == to.is_ipv4()
    }

    fn conditions(&self) -> Vec<Vec<Expr>> {
        let address = self.host_ip.map(|ip| is_address(Side::Destination, ip));
        address.into_iter().chain([to_port(self.protocol.number(), self.port)]).collect()
    }

    /// Whether a local process reaches it at 127.0.0.1 or another address of the loopback.
    pub fn is_on_loopback(&self) -> bool {
        self.pod.is_ipv4() && self.host_ip.is_none_or(|ip| ip.is_loopback())
    }

    /// From a rule's comment, as it is written there.
    fn parse(comment: &str) -> Option<Self> {
        let mut words = comment.split(' ');
        let (protocol, host, pod) = (words.next()?, words.next()?, words.next()?);
        let (host_ip, port) = match host.strip_prefix("*:") {
            Some(port) => (None, port.parse().ok()?),
            None => host.parse::<SocketAddr>().ok().map(|host| (Some(host.ip()), host.port()))?,
        };
        Some(Self { protocol: protocol.parse().ok()?, host_ip, port, pod: pod.parse().ok()? })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(ip) => write!(f, "{} {} {}", self.protocol, SocketAddr::new(ip, self.port), self.pod),
            None => write!(f, "{} *:{} {}", self.protocol, self.port, self.pod),
        }
    }
}

pub fn table_id(family: Family) -> TableId {
    TableId { family, name: TABLE.into() }
}

/// Whether this part of the packet filter is what host ports are made of.
pub fn is_about(key: &PartKey) -> bool {
    match key {
        PartKey::Table(id) => id.name == TABLE,
        PartKey::Flows => true,
        PartKey::Accepts(_) | PartKey::Legacy => false,
    }
}

/// Whether the loopback of this namespace is kept from the pods of a bridge.
pub fn guards(seen: &Ruleset, bridge: &IfName) -> bool {
    let rules = guard(bridge);
    let chains = seen.own.iter().filter_map(|part| match part {
        Part::Table { id, chains } if *id == table_id(Family::Ip) => Some(chains),
        _ => None,
    });
    chains.flatten().any(|chain| chain.hook.is_some() && rules.iter().all(|rule| chain.rules.contains(rule)))
}

/// The ports that a table leads to pods, by its rules' own account.
pub fn led(part: &Part) -> BTreeSet<HostPort> {
    match part {
        Part::Table { id, chains } if id.name == TABLE => {
            let comments = chains.iter().flat_map(|c| &c.rules).filter_map(|rule| rule.comment.as_deref());
            comments.filter_map(HostPort::parse).collect()
        }
        _ => BTreeSet::new(),
    }
}

pub fn desired(networks: &Networks, seen: &Ruleset) -> Vec<Part> {
    let HostPorts { ports, guarded } = &networks.host_ports;
    let flows: BTreeSet<HostPort> = ports.iter().filter(|p| p.protocol == Protocol::Udp).copied().collect();
    let mut parts = Vec::new();
    for family in [Family::Ip, Family::Ip6] {
        let chains = chains(networks, family, ports, guarded);
        let id = table_id(family);
        let there = seen.own.iter().find_map(|part| match part {
            Part::Table { id: found, chains } if *found == id => Some(chains),
            _ => None,
        });
        // A full one is emptied before it is removed: that may have to wait.
        let has_work = |chains: &Vec<Chain>| !chains.is_empty() || seen.flows.as_ref() != Some(&flows);
        if !chains.is_empty() || there.is_some_and(has_work) {
            parts.push(Part::table(id, chains));
        }
    }
    let led = seen.own.iter().any(|part| is_about(&part.key()));
    if led || !flows.is_empty() || seen.flows.as_ref().is_some_and(|settled| !settled.is_empty()) {
        parts.push(Part::Flows(flows));
    }
    parts
}

fn chains(
    networks: &Networks,
    family: Family,
    ports: &BTreeSet<HostPort>,
    guarded: &BTreeSet<IfName>,
) -> Vec<Chain> {
    let mut chains = Vec::new();
    if family == Family::Ip && !guarded.is_empty() {
        let rules = guarded.iter().flat_map(guard).collect();
        chains.push(base_chain("guard", "filter", HOOK_PREROUTING, PRIORITY_RAW, rules));
    }
    let of_family = |ip: IpAddr| Family::of(Subnet::host(ip)) == family;
    let mut leading: Vec<Rule> = Vec::new();
    for port in ports.iter().filter(|port| of_family(port.pod.ip())) {
        let near = networks.local.iter().copied().filter(|local| Family::of(*local) == family);
        let sources = near.chain(port.is_on_loopback().then(loopback));
        leading.extend(sources.map(|source| {
            let from = within(Side::Source, source, true);
            Rule::doing([vec![from], port.conditions()].concat(), set_mark(MARK))
        }));
        leading.push(Rule::doing(port.conditions(), dnat(port.pod)).with_comment(&port.to_string()));
    }
    if !leading.is_empty() {
        let lead = || vec![Rule::new(vec![is_local()], Expr::Jump(PORTS_CHAIN.into()))];
        let masquerade = Rule::new(vec![marked(MARK)], Expr::Masquerade { fully_random: false });
        chains.extend([
            base_chain("prerouting", "nat", HOOK_PREROUTING, PRIORITY_DSTNAT, lead()),
            base_chain("output", "nat", HOOK_OUTPUT, PRIORITY_DSTNAT, lead()),
            base_chain("postrouting", "nat", HOOK_POSTROUTING, PRIORITY_SRCNAT, vec![masquerade]),
            Chain { name: PORTS_CHAIN.into(), hook: None, rules: leading },
        ]);
    }
    chains
}

/// Nothing to a loopback address, and nothing from one: the setting lets both pass.
fn guard(bridge: &IfName) -> [Rule; 2] {
    [Side::Destination, Side::Source]
        .map(|side| Rule::new(vec![came_by(bridge), within(side, loopback(), true)], Expr::Drop))
}

fn loopback() -> Subnet {
    Subnet::new(Ipv4Addr::new(127, 0, 0, 0).into(), 8)
        .unwrap_or_else(|| unreachable!("shorter than the address"))
}

#[cfg(test)]
#[path = "host_ports_tests.rs"]
mod tests;
