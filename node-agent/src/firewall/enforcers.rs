//! Who enforces NetworkPolicies on this node, told by what it keeps there. weft enforces none, and a policy that nobody
//! enforces looks to its author like one that works.
//!
//! An enforcer beside flannel's kind of network is one of few, and each of them has a chain of a fixed name from its
//! start on, whether there are policies or not. That is evidence without any right with the API, and on this very node,
//! which is where a DaemonSet may be missing. What an enforcer that was removed has left behind looks the same, and one
//! that is not listed here goes unseen: hence `--network-policy-check=0`.

use std::collections::BTreeMap;

use weft_shared::IfName;

use super::legacy::LegacyFilter;
use super::{ChainId, Family, Ruleset};

/// Table, what the chain's name begins with, and whose it is. Of the family `ip` or `inet`, for pods have IPv4.
const CHAINS: [(&str, &str, &str); 7] = [
    // Calico's felix, alone or as Canal, in iptables mode and in nftables mode.
    ("filter", "cali-FORWARD", CALICO),
    ("calico", "", CALICO),
    // Also the one that is built into k3s and RKE2.
    ("filter", "KUBE-ROUTER-FORWARD", KUBE_ROUTER),
    ("kube-network-policies", "", "kube-network-policies"),
    ("kindnet-network-policies", "", "kindnet"),
    ("filter", "CILIUM_FORWARD", CILIUM),
    ("filter", "ANTREA-FORWARD", "Antrea"),
];
const CALICO: &str = "Calico";
const KUBE_ROUTER: &str = "kube-router";
const CILIUM: &str = "Cilium";
/// Cilium may be told to write no rules; this device it always has.
const CILIUM_DEVICE: &str = "cilium_host";

/// What one look has found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Enforcers {
    /// By name, each with what gave it away.
    pub found: BTreeMap<&'static str, String>,
    /// Why another one might be there and not have been seen.
    pub unseen: Option<String>,
}

pub fn of<'a>(seen: &Ruleset, devices: impl IntoIterator<Item = &'a IfName>) -> Enforcers {
    let mut found = seen.enforcers.clone();
    if let Some(table) = seen.legacy.table() {
        for name in table.chains.keys() {
            if let Some(whose) = of_chain(&ChainId::new(Family::Ip, "filter", name)) {
                found.entry(whose).or_insert_with(|| format!("iptables-legacy chain {name}"));
            }
        }
    }
    if devices.into_iter().any(|device| device.as_str() == CILIUM_DEVICE) {
        found.entry(CILIUM).or_insert_with(|| format!("device {CILIUM_DEVICE}"));
    }
    let unread = match &seen.legacy {
        LegacyFilter::Unreadable(why) => Some(why.clone()),
        LegacyFilter::Unused | LegacyFilter::Table(_) => None,
    };
    Enforcers { found, unseen: seen.unread.clone().or(unread) }
}

/// Whose chain of nftables that is.
pub fn of_chain(id: &ChainId) -> Option<&'static str> {
    let whose = |(table, chain, _): &&(&str, &str, &str)| {
        id.table.family != Family::Ip6 && id.table.name == *table && id.name.starts_with(chain)
    };
    CHAINS.iter().find(whose).map(|(_, _, whose)| *whose)
}

#[cfg(test)]
mod tests {
    use super::super::legacy::LegacyTable;
    use super::*;

    #[test]
    fn each_is_known_by_its_chain() {
        let of = |family, table: &str, chain: &str| of_chain(&ChainId::new(family, table, chain));
        for (family, table, chain, whose) in [
            (Family::Ip, "filter", "cali-FORWARD", "Calico"),
            (Family::Ip, "calico", "filter-cali-FORWARD", "Calico"),
            (Family::Ip, "filter", "KUBE-ROUTER-FORWARD", "kube-router"),
            (Family::Inet, "kube-network-policies", "postrouting", "kube-network-policies"),
            (Family::Inet, "kindnet-network-policies", "postrouting", "kindnet"),
            (Family::Ip, "filter", "CILIUM_FORWARD", "Cilium"),
            (Family::Ip, "filter", "ANTREA-FORWARD", "Antrea"),
        ] {
            assert_eq!(of(family, table, chain), Some(whose), "{table} {chain}");
        }
        for (family, table, chain) in [
            // kube-proxy, Docker and flanneld enforce none, and what is for IPv6 alone lets pods' packets pass.
            (Family::Ip, "filter", "KUBE-FORWARD"),
            (Family::Ip, "filter", "KUBE-PROXY-FIREWALL"),
            (Family::Ip, "filter", "DOCKER-USER"),
            (Family::Ip, "filter", "FLANNEL-FWD"),
            (Family::Ip, "kube-proxy", "filter-forward"),
            (Family::Ip, "nat", "cali-FORWARD"),
            (Family::Ip6, "filter", "cali-FORWARD"),
        ] {
            assert_eq!(of(family, table, chain), None, "{table} {chain}");
        }
    }

    #[test]
    fn one_look_knows_all_that_is_in_it_and_what_it_could_not_read() {
        let devices: Vec<IfName> =
            ["eth0", "cilium_host"].map(|name| name.parse().expect(name)).into_iter().collect();
        assert_eq!(of(&Ruleset::default(), &devices[..1]), Enforcers::default());
        let legacy = LegacyTable::parse(":FORWARD ACCEPT [0:0]\n:KUBE-ROUTER-FORWARD - [0:0]\n");
        let seen = Ruleset {
            enforcers: [("Calico", "nftables chain ip filter cali-FORWARD".to_owned())].into(),
            legacy: LegacyFilter::Table(legacy),
            ..Ruleset::default()
        };
        let all = of(&seen, &devices);
        let expected = [
            ("Calico", "nftables chain ip filter cali-FORWARD"),
            ("Cilium", "device cilium_host"),
            ("kube-router", "iptables-legacy chain KUBE-ROUTER-FORWARD"),
        ];
        let found: Vec<_> = all.found.iter().map(|(name, sign)| (*name, sign.as_str())).collect();
        assert_eq!((found.as_slice(), all.unseen), (&expected[..], None));

        let unreadable = Ruleset { legacy: LegacyFilter::Unreadable("why".into()), ..Ruleset::default() };
        assert_eq!(of(&unreadable, []).unseen.as_deref(), Some("why"));
        let unread = Ruleset { unread: Some("no answer".into()), ..Ruleset::default() };
        assert_eq!(of(&unread, []).unseen.as_deref(), Some("no answer"));
    }
}
