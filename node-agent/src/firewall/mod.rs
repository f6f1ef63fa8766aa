//! What weft keeps in the host's packet filter, as values and pure functions: masquerade, host ports and what single pods
//! are masqueraded by in tables of its own, and accepts in whatever chain of the forward hook would drop pods' packets.
//!
//! An accept in one chain does not overrule a drop in another: a packet passes the hook only when every base chain on
//! it lets it through (net/netfilter/nf_tables_core.c). So accepts of our own table are worth nothing on a host whose
//! `FORWARD` has policy drop, and ours go into that very chain. They stand before what drops everything nobody spoke
//! for (the policy, or a last rule without a condition) and behind what somebody decided: a network policy, Docker's
//! isolation, an operator's rule keep their effect, as they do with flannel's rules, which are appended too.
//!
//! The tables for masquerade have flanneld's names, so that flanneld refills or removes them after a roll-back
//! (pkg/trafficmngr/nftables). How often the kernel is looked at costs nothing on a quiet host: see `kernel::nft`.

pub mod advice;
pub mod enforcers;
pub mod forward;
pub mod host_ports;
pub mod legacy;
pub mod masquerade;
pub mod pod_masquerade;
pub mod rule;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use weft_shared::Subnet;

use forward::HostChain;
pub use host_ports::{HostPort, HostPorts};
use legacy::LegacyFilter;
pub use rule::{Expr, Rule};

/// What the operator asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub masquerade: bool,
    /// Source ports out of the whole range, at random: two flows that begin at once do not take the same.
    pub fully_random: bool,
    /// Destinations to which pods go with their own address.
    pub never_masqueraded: Vec<Subnet>,
    pub forward: bool,
    /// iptables-legacy announces nothing: it is looked at this often.
    pub legacy_period: Duration,
}

impl Default for Settings {
    /// As flanneld without any flag (main.go).
    fn default() -> Self {
        Self {
            masquerade: false,
            fully_random: true,
            never_masqueraded: Vec::new(),
            forward: true,
            legacy_period: Duration::from_secs(5),
        }
    }
}

/// Whose packets the rules are about.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Networks {
    /// The overlay's, one of a family.
    pub overlay: Vec<Subnet>,
    /// Those whose pods live here: the leased subnet, and older ones with pods left.
    pub local: Vec<Subnet>,
    pub host_ports: HostPorts,
    /// Pods that leave the overlay with the node's address, whatever the others do.
    pub masqueraded: BTreeSet<IpAddr>,
}

impl Networks {
    pub fn families(&self) -> impl Iterator<Item = (Family, Subnet)> {
        self.overlay.iter().map(|network| (Family::of(*network), *network))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    Ip,
    Ip6,
    /// Both, in one table.
    Inet,
}

impl Family {
    pub const ALL: [Family; 3] = [Family::Ip, Family::Ip6, Family::Inet];

    pub fn of(subnet: Subnet) -> Self {
        if subnet.is_ipv4() { Self::Ip } else { Self::Ip6 }
    }

    /// `NFPROTO_*` of linux/netfilter.h.
    pub fn nfproto(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Ip6 => 10,
        }
    }

    /// Whether packets of `other` come by chains of this family.
    pub fn sees(self, other: Family) -> bool {
        self == other || self == Self::Inet
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableId {
    pub family: Family,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChainId {
    pub table: TableId,
    pub name: String,
}

impl ChainId {
    pub fn new(family: Family, table: &str, name: &str) -> Self {
        Self { table: TableId { family, name: table.into() }, name: name.into() }
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.table, self.name)
    }
}

/// Where a base chain hangs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// `filter` or `nat`.
    pub kind: String,
    /// `enum nf_inet_hooks`.
    pub number: u32,
    pub priority: i32,
    pub policy: ChainPolicy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainPolicy {
    Accept,
    Drop,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub name: String,
    pub hook: Option<Hook>,
    pub rules: Vec<Rule>,
}

/// One thing that weft keeps in the packet filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A table of ours with everything in it.
    Table { id: TableId, chains: Vec<Chain> },
    /// Our rules in a chain of somebody else's; `in_place` when they stand before what drops.
    Accepts { chain: ChainId, rules: Vec<Rule>, in_place: bool },
    /// The same by iptables-legacy, which is another packet filter: rules in the words of `iptables-save`.
    Legacy { rules: Vec<String>, in_place: bool },
    /// The kernel's UDP flows to host ports, which are to go where these lead.
    Flows(BTreeSet<HostPort>),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PartKey {
    Table(TableId),
    Accepts(ChainId),
    Legacy,
    /// After the tables: a flow that begins anew takes the way that these say.
    Flows,
}

impl Part {
    /// Its chains in one order, whoever lists them.
    pub fn table(id: TableId, mut chains: Vec<Chain>) -> Self {
        chains.sort_by(|a, b| a.name.cmp(&b.name));
        Self::Table { id, chains }
    }

    pub fn key(&self) -> PartKey {
        match self {
            Self::Table { id, .. } => PartKey::Table(id.clone()),
            Self::Accepts { chain, .. } => PartKey::Accepts(chain.clone()),
            Self::Legacy { .. } => PartKey::Legacy,
            Self::Flows(_) => PartKey::Flows,
        }
    }
}

impl fmt::Display for PartKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(id) => write!(f, "nftables table {id}"),
            Self::Accepts(chain) => write!(f, "accept rules in nftables chain {chain}"),
            Self::Legacy => write!(f, "accept rules in iptables-legacy FORWARD"),
            Self::Flows => write!(f, "UDP flows to host ports"),
        }
    }
}

/// One look at the packet filter, as far as it concerns us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    /// Tables with our names.
    pub own: Vec<Part>,
    /// Chains of others on the forward hook, in the families asked for.
    pub forward: Vec<HostChain>,
    pub legacy: LegacyFilter,
    /// Until when that is good enough; `None` where iptables-legacy is not in use.
    pub legacy_until: Option<Instant>,
    /// The kernel knows `masquerade fully-random`, as far as it has been asked.
    pub fully_random: bool,
    /// kube-proxy's rules are here.
    pub kube_proxy: bool,
    /// What a flanneld in iptables mode has left behind.
    pub left: Vec<advice::Leftover>,
    /// Who enforces NetworkPolicies by nftables, each with the chain that gave it away.
    pub enforcers: BTreeMap<&'static str, String>,
    /// Why nothing can be told of it.
    pub unread: Option<String>,
    /// What UDP flows to host ports follow; `None` while nobody has seen to it.
    pub flows: Option<BTreeSet<HostPort>>,
}

impl Default for Ruleset {
    fn default() -> Self {
        Self {
            own: Vec::new(),
            forward: Vec::new(),
            legacy: LegacyFilter::Unused,
            legacy_until: None,
            fully_random: true,
            kube_proxy: false,
            left: Vec::new(),
            enforcers: BTreeMap::new(),
            unread: None,
            flows: None,
        }
    }
}

/// What should be there, given what others have there.
pub fn desired(settings: &Settings, networks: &Networks, seen: &Ruleset) -> Vec<Part> {
    let tables = networks.families().filter_map(|(family, network)| {
        masquerade::table(settings, networks, family, network, seen.fully_random)
    });
    let mut desired: Vec<Part> = tables.collect();
    if settings.forward {
        desired.extend(forward::desired(networks, seen));
        desired.extend(legacy::desired(networks, seen));
    }
    desired.extend(host_ports::desired(networks, seen));
    desired.extend(pod_masquerade::desired(settings, networks, seen));
    desired
}

/// Tables that follow from pods: one that nobody wants may still have to be emptied.
pub fn tables_of_pods() -> impl Iterator<Item = TableId> {
    let families = [Family::Ip, Family::Ip6].into_iter();
    families.flat_map(|family| [host_ports::table_id(family), pod_masquerade::table_id(family)])
}

/// What of ours is there, whether it is wanted or not.
pub fn found(seen: &Ruleset) -> impl Iterator<Item = Part> {
    let tables = seen.own.iter().cloned();
    let accepts = seen.forward.iter().filter_map(forward::found);
    let legacy = seen.legacy.table().and_then(legacy::found);
    let flows = seen.flows.iter().cloned().map(Part::Flows);
    tables.chain(accepts).chain(legacy).chain(flows)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
