//! Our own tables: who leaves the overlay leaves with the node's address.
//!
//! The rules mean what flannel's iptables rules mean (pkg/trafficmngr/iptables), not what its nftables rules do: there
//! the fourth rule is another one, so that a host's traffic to a remote pod is not masqueraded, and kube-proxy's mark
//! is compared without its mask.

use weft_shared::Subnet;

use super::rule::{Side, marked, within};
use super::{Chain, ChainPolicy, Expr, Family, Hook, Networks, Part, Rule, Settings, TableId};

const POSTROUTING_CHAIN: &str = "postrtg";
const FORWARD_CHAIN: &str = "forward";

/// kube-proxy masquerades what it has marked so (`--iptables-masquerade-bit` 14). The mark may survive encapsulation.
const KUBE_MARK: u32 = 0x4000;

/// `NF_INET_FORWARD` and `NF_INET_POST_ROUTING` of linux/netfilter.h.
pub const HOOK_FORWARD: u32 = 2;
pub(super) const HOOK_POSTROUTING: u32 = 4;
/// `NF_IP_PRI_FILTER` and `NF_IP_PRI_NAT_SRC` of linux/netfilter_ipv4.h.
const PRIORITY_FILTER: i32 = 0;
pub(super) const PRIORITY_SRCNAT: i32 = 100;

/// flanneld's names for its tables.
pub fn table_id(family: Family) -> TableId {
    let name = if family == Family::Ip6 { "flannel-ipv6" } else { "flannel-ipv4" };
    TableId { family, name: name.into() }
}

pub(super) fn table(
    settings: &Settings,
    networks: &Networks,
    family: Family,
    overlay: Subnet,
    kernel_knows_random: bool,
) -> Option<Part> {
    let mut chains = Vec::new();
    if settings.forward {
        let rules = [Side::Source, Side::Destination]
            .map(|side| Rule::new(vec![within(side, overlay, true)], Expr::Accept));
        chains.push(base_chain(FORWARD_CHAIN, "filter", HOOK_FORWARD, PRIORITY_FILTER, rules.into()));
    }
    if settings.masquerade {
        let random = settings.fully_random && kernel_knows_random;
        let rules = masquerade(settings, networks, family, overlay, random);
        chains.push(base_chain(POSTROUTING_CHAIN, "nat", HOOK_POSTROUTING, PRIORITY_SRCNAT, rules));
    }
    (!chains.is_empty()).then(|| Part::table(table_id(family), chains))
}

pub(super) fn base_chain(name: &str, kind: &str, number: u32, priority: i32, rules: Vec<Rule>) -> Chain {
    let hook = Hook { kind: kind.into(), number, priority, policy: ChainPolicy::Accept };
    Chain { name: name.into(), hook: Some(hook), rules }
}

fn masquerade(
    settings: &Settings,
    networks: &Networks,
    family: Family,
    overlay: Subnet,
    fully_random: bool,
) -> Vec<Rule> {
    use Side::{Destination, Source};
    let masquerade = Expr::Masquerade { fully_random };
    let of_family = |subnet: &&Subnet| Family::of(**subnet) == family;
    let from = |subnet, inside| within(Source, subnet, inside);
    let to = |subnet, inside| within(Destination, subnet, inside);
    let mut rules = vec![Rule::new(vec![marked(KUBE_MARK)], Expr::Return)];
    for local in networks.local.iter().filter(of_family) {
        rules.push(Rule::new(vec![from(*local, true), to(overlay, true)], Expr::Return));
        rules.push(Rule::new(vec![from(overlay, true), to(*local, true)], Expr::Return));
        rules.push(Rule::new(vec![from(overlay, false), to(*local, true)], Expr::Return));
    }
    for never in settings.never_masqueraded.iter().filter(of_family) {
        rules.push(Rule::new(vec![from(overlay, true), to(*never, true)], Expr::Return));
    }
    rules.push(Rule::new(vec![from(overlay, true), to(multicast(family), false)], masquerade.clone()));
    rules.push(Rule::new(vec![from(overlay, false), to(overlay, true)], masquerade));
    rules
}

pub(super) fn multicast(family: Family) -> Subnet {
    let (addr, len): (std::net::IpAddr, u8) = match family {
        Family::Ip6 => (std::net::Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8),
        _ => (std::net::Ipv4Addr::new(224, 0, 0, 0).into(), 4),
    };
    Subnet::new(addr, len).unwrap_or_else(|| unreachable!("shorter than the address"))
}
