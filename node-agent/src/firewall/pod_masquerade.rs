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
use super::{Expr, Family, Networks, Part, PartKey, Rule, Settings, TableId};

const TABLE: &str = "weft-masquerade";

pub fn table_id(family: Family) -> TableId {
    TableId { family, name: TABLE.into() }
}

/// Whether this part of the packet filter is what pods are masqueraded by.
pub fn is_about(key: &PartKey) -> bool {
    matches!(key, PartKey::Table(id) if id.name == TABLE)
}

pub(super) fn desired(settings: &Settings, networks: &Networks, kernel_knows_random: bool) -> Vec<Part> {
    let families = [Family::Ip, Family::Ip6].into_iter();
    families.filter_map(|family| table(settings, networks, family, kernel_knows_random)).collect()
}

fn table(
    settings: &Settings,
    networks: &Networks,
    family: Family,
    kernel_knows_random: bool,
) -> Option<Part> {
    let of_family = |subnet: &Subnet| Family::of(*subnet) == family;
    let pods = networks.masqueraded.iter().copied().filter(|pod: &IpAddr| of_family(&Subnet::host(*pod)));
    let masquerade = Expr::Masquerade { fully_random: settings.fully_random && kernel_knows_random };
    let pods: Vec<Rule> =
        pods.map(|pod| Rule::new(vec![is_address(Side::Source, pod)], masquerade.clone())).collect();
    if pods.is_empty() {
        return None;
    }
    let never = networks.overlay.iter().chain(&settings.never_masqueraded).copied().filter(of_family);
    let stays = never.chain([multicast(family)]);
    let stays = stays.map(|to| Rule::new(vec![within(Side::Destination, to, true)], Expr::Return));
    let rules = stays.chain(pods).collect();
    let chain = base_chain("postrouting", "nat", HOOK_POSTROUTING, PRIORITY_SRCNAT, rules);
    Some(Part::table(table_id(family), vec![chain]))
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
        assert!(desired(&settings, &networks(&[]), true).is_empty());
        let parts = desired(&settings, &networks(&["10.5.1.7", "10.5.1.9"]), true);
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
