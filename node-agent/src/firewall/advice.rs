//! What stands in the way of pods' packets and is not weft's to change: named, each with the command that mends it.

use std::collections::BTreeMap;

use weft_shared::Subnet;

use super::forward::Keeper;
use super::{Family, Networks, Ruleset, Settings};

/// Whether bridged packets pass the host's packet filter; absent without the module br_netfilter.
pub const BRIDGE_CALLS: &str = "net/bridge/bridge-nf-call-iptables";

/// Where a flanneld in iptables mode has its masquerade rules (pkg/trafficmngr/iptables).
pub const FLANNELS_CHAIN: &str = "FLANNEL-POSTRTG";

/// Settings that [`of`] wants to know, by their path below `/proc/sys`.
pub const SYSCTLS: [&str; 1] = [BRIDGE_CALLS];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice {
    pub problem: String,
    pub fix: String,
}

/// The masquerade rules of a flanneld that ran here in iptables mode and removed nothing when it ended.
///
/// They may stay while they mean what ours mean: the first of two NAT chains that has a say decides a connection, so
/// nothing is translated twice, and a flanneld that comes back finds its own. Flushing them would take the chain from
/// under a flanneld that is rolled back meanwhile. But a rule set of another subnet masquerades between pods, and any
/// of them masquerades where weft was told not to; then they are named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    pub legacy: bool,
    /// Source and destination of the rules that leave the overlay's own traffic alone.
    pub spared: Vec<(Subnet, Subnet)>,
}

pub fn of(
    settings: &Settings,
    networks: &Networks,
    seen: &Ruleset,
    sysctls: &BTreeMap<String, String>,
) -> Vec<Advice> {
    let mut advice = closed_chains(settings, networks, seen);
    advice.extend(seen.left.iter().map(|left| leftover(settings, networks, left)));
    if seen.kube_proxy && sysctls.get(BRIDGE_CALLS).is_none_or(|value| value == "0") {
        let problem = "bridged packets pass kube-proxy by (net.bridge.bridge-nf-call-iptables is not 1): a Service \
                       whose pod is on the same node as its client does not answer";
        let fix = "modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1";
        advice.push(Advice { problem: problem.into(), fix: fix.into() });
    }
    advice
}

fn closed_chains(settings: &Settings, networks: &Networks, seen: &Ruleset) -> Vec<Advice> {
    let mut advice = Vec::new();
    let closed = seen.forward.iter().filter(|chain| chain.keeper != Keeper::Anybody || !settings.forward);
    for chain in closed {
        for (_, network) in chain.drops(networks) {
            let id = &chain.id;
            let fix = match chain.keeper {
                _ if chain.speaks_for(network) => continue,
                Keeper::Firewalld => format!(
                    "firewall-cmd --permanent --zone=trusted --add-source={network} && firewall-cmd --reload"
                ),
                Keeper::Process => format!("let the program that owns table {} accept {network}", id.table),
                Keeper::Anybody => "--iptables-forward-rules=true, or accept rules of your own".to_owned(),
            };
            let problem = format!("nftables chain {id} drops forwarded packets of {network}");
            advice.push(Advice { problem, fix });
        }
    }
    advice
}

fn leftover(settings: &Settings, networks: &Networks, left: &Leftover) -> Advice {
    let overlays = || networks.overlay.iter().filter(|network| Family::of(**network) == Family::Ip);
    let locals = || networks.local.iter().filter(|network| Family::of(**network) == Family::Ip);
    let same = overlays().all(|c| locals().all(|p| left.spared.contains(&(*p, *c))));
    let harm = if !settings.masquerade {
        ": pods are masqueraded although --ip-masq is off"
    } else if !same {
        " for another subnet: packets between pods may be masqueraded"
    } else if !settings.never_masqueraded.is_empty() {
        ": destinations of --ip-masq-exclude are masqueraded by it"
    } else {
        " and does no harm"
    };
    let iptables = if left.legacy { "iptables-legacy" } else { "iptables" };
    let problem =
        format!("chain {FLANNELS_CHAIN} of a former flanneld is still there ({iptables} -t nat){harm}");
    let jump = format!("-D POSTROUTING -m comment --comment \"flanneld masq\" -j {FLANNELS_CHAIN}");
    let fix = format!(
        "{iptables} -t nat {jump}; {iptables} -t nat -F {FLANNELS_CHAIN}; {iptables} -t nat -X {FLANNELS_CHAIN}"
    );
    Advice { problem, fix }
}
