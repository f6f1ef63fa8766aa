//! Pods that are to leave the overlay with the node's address although the node does not do so for all of them: what the
//! reference `bridge` does for `ipMasq` (plugins/pkg/ip/ipmasq_linux.go), as one rule set that follows from the
//! attachments there are.
//!
//! The reference masquerades what goes to the pods of other nodes as well; here the whole overlay is inside, as it is for
//! `--ip-masq`. The table is not flannel's: a flanneld that is rolled back to would take it from pods that live on.

use std::net::IpAddr;

use weft_shared::Subnet;

use super::masquerade::{HOOK_POSTROUTING, PRIORITY_SRCNAT, base_chain, multicast};
use super::rule::{Side, is_address, within};
use super::{Expr, Family, Networks, Part, PartKey, Rule, Ruleset, Settings, TableId};

const TABLE: &str = "weft-masquerade";

pub fn table_id(family: Family) -> TableId {
    TableId { family, name: TABLE.into() }
}

/// Whether this part of the packet filter is what pods are masqueraded by.
pub fn is_about(key: &PartKey) -> bool {
    matches!(key, PartKey::Table(id) if id.name == TABLE)
}

pub(super) fn desired(settings: &Settings, networks: &Networks, seen: &Ruleset) -> Vec<Part> {
    let families = [Family::Ip, Family::Ip6].into_iter();
    families.filter_map(|family| table(settings, networks, family, seen)).collect()
}

fn table(settings: &Settings, networks: &Networks, family: Family, seen: &Ruleset) -> Option<Part> {
    let id = table_id(family);
    let of_family = |subnet: &Subnet| Family::of(*subnet) == family;
    let pods = networks.masqueraded.iter().copied().filter(|pod: &IpAddr| of_family(&Subnet::host(*pod)));
    let masquerade = Expr::Masquerade { fully_random: settings.fully_random && seen.fully_random };
    let pods: Vec<Rule> =
        pods.map(|pod| Rule::new(vec![is_address(Side::Source, pod)], masquerade.clone())).collect();
    if pods.is_empty() {
        // A full one is emptied before it is removed: that may have to wait, and the address is another pod's by then.
        let is_full = |part: &Part| matches!(part, Part::Table { id: found, chains } if *found == id && !chains.is_empty());
        return seen.own.iter().any(is_full).then(|| Part::table(id, Vec::new()));
    }
    let never = networks.overlay.iter().chain(&settings.never_masqueraded).copied().filter(of_family);
    let stays = never.chain([multicast(family)]);
    let stays = stays.map(|to| Rule::new(vec![within(Side::Destination, to, true)], Expr::Return));
    let rules = stays.chain(pods).collect();
    let chain = base_chain("postrouting", "nat", HOOK_POSTROUTING, PRIORITY_SRCNAT, rules);
    Some(Part::table(id, vec![chain]))
}

#[cfg(test)]
mod tests {
    use super::super::Chain;
    use super::*;

    fn networks(pods: &[&str]) -> Networks {
        Networks {
            overlay: vec!["10.5.0.0/16".parse().expect("net")],
            masqueraded: pods.iter().map(|pod| pod.parse().expect("address")).collect(),
            ..Networks::default()
        }
    }

    #[test]
    fn only_the_pods_that_ask_for_it_and_only_out_of_the_overlay() {
        let settings =
            Settings { never_masqueraded: vec!["192.0.2.0/24".parse().expect("net")], ..Settings::default() };
        let mut seen = Ruleset::default();
        assert!(desired(&settings, &networks(&[]), &seen).is_empty());
        let parts = desired(&settings, &networks(&["10.5.1.7", "10.5.1.9"]), &seen);
        seen.own = parts.clone();
        let emptied = desired(&settings, &networks(&[]), &seen);
        assert_eq!(emptied, [Part::table(table_id(Family::Ip), vec![])], "removal may have to wait");
        seen.own = emptied;
        assert!(desired(&settings, &networks(&[]), &seen).is_empty());
        let [Part::Table { id, chains }] = parts.as_slice() else { panic!("{parts:?}") };
        assert_eq!(id.to_string(), "ip weft-masquerade");
        let [Chain { rules, hook: Some(hook), .. }] = chains.as_slice() else { panic!("{chains:?}") };
        assert_eq!((hook.kind.as_str(), hook.number), ("nat", HOOK_POSTROUTING));
        let to = |net: &str| {
            Rule::new(vec![within(Side::Destination, net.parse().expect("net"), true)], Expr::Return)
        };
        let from = |pod: &str| {
            let random = Expr::Masquerade { fully_random: true };
            Rule::new(vec![is_address(Side::Source, pod.parse().expect("address"))], random)
        };
        let expected =
            [to("10.5.0.0/16"), to("192.0.2.0/24"), to("224.0.0.0/4"), from("10.5.1.7"), from("10.5.1.9")];
        assert_eq!(rules.as_slice(), expected);
        assert!(is_about(&parts[0].key()));
    }
}
