//! What the agent believes of the cluster: every lease of the store, those that have lately expired, and which of them
//! can be used.
//!
//! Updates are applied by value, so a lease whose attributes changed while nobody watched is seen. Whether a lease is
//! usable is judged over all of them at once: the verdict depends on what is in the store, never on the order of
//! arrival. Judging is O(n log n), done when somebody asks after a change.
//!
//! A lease that expired says that its node lost the store, not that it lost its pods: the peer stays in use for a while,
//! unless somebody living has taken its subnet, its public IP or its VTEP MAC. A lease removed by hand goes at once. Time
//! is passed in; [`LeaseTable::next_end`] says when to look again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::netconf::{NetworkConfig, Range};
use weft_shared::{Mac, Subnet};

use super::selection::brief;
use super::{Departure, LeaseUpdate, Malformed};
use crate::status::RefusedLease;

#[derive(Debug)]
pub struct LeaseTable {
    config: NetworkConfig,
    own: Option<Lease>,
    leases: BTreeMap<LeaseKey, Lease>,
    /// How long an expired lease stays in use.
    grace: Duration,
    expired: BTreeMap<LeaseKey, Expired>,
    malformed: BTreeMap<String, String>,
    has_snapshot: bool,
    judged: OnceLock<Judged>,
}

#[derive(Debug)]
struct Expired {
    lease: Lease,
    until: Instant,
}

#[derive(Debug, Default)]
struct Judged {
    peers: Vec<Lease>,
    /// Of the peers, those that have expired.
    expired: BTreeMap<LeaseKey, Instant>,
    refused: Vec<RefusedLease>,
}

impl LeaseTable {
    pub fn new(config: NetworkConfig, grace: Duration) -> Self {
        Self {
            config,
            own: None,
            leases: BTreeMap::new(),
            grace,
            expired: BTreeMap::new(),
            malformed: BTreeMap::new(),
            has_snapshot: false,
            judged: OnceLock::new(),
        }
    }

    /// Takes up what was saved: no word of the store, but whoever is missing in its first one counts as expired.
    pub fn recall(&mut self, own: Lease, peers: Vec<Lease>) {
        self.leases = peers.into_iter().map(|lease| (lease.key, lease)).collect();
        self.judged = OnceLock::new();
        self.set_own(Some(&own));
    }

    /// Names the lease that this node holds, or had last: it is never a peer, and nothing that overlaps it is.
    pub fn set_own(&mut self, own: Option<&Lease>) {
        if self.own.as_ref() != own {
            self.own = own.cloned();
            self.judged = OnceLock::new();
            if let Some(own) = own {
                self.take_over(own);
            }
        }
    }

    /// Whether anything is different now.
    pub fn apply(&mut self, update: LeaseUpdate, now: Instant) -> bool {
        let changed = match update {
            LeaseUpdate::Snapshot { leases, malformed } => self.replace(leases, malformed, now),
            LeaseUpdate::Upsert(lease) => {
                let readable_again = self.malformed.remove(&lease.key.to_string()).is_some();
                let back = self.take_over(&lease);
                let former = self.leases.insert(lease.key, lease.clone());
                former.as_ref() != Some(&lease) || readable_again || back
            }
            LeaseUpdate::Remove { key, how } => {
                let malformed = self.malformed.remove(&key.to_string()).is_some();
                self.depart(key, how, now) || malformed
            }
            LeaseUpdate::Malformed(entry) => {
                let former = self.malformed.insert(entry.key, entry.reason.clone());
                former.as_ref() != Some(&entry.reason)
            }
            LeaseUpdate::MalformedGone(key) => self.malformed.remove(&key).is_some(),
            LeaseUpdate::Config(_) => false,
        };
        if changed {
            self.judged = OnceLock::new();
        }
        changed
    }

    /// Ends the grace of those whose time has come; whether there were any.
    pub fn pass_time(&mut self, now: Instant) -> bool {
        let before = self.expired.len();
        self.expired.retain(|_, expired| expired.until > now);
        let changed = self.expired.len() != before;
        if changed {
            self.judged = OnceLock::new();
        }
        changed
    }

    /// When an expired lease next goes out of use.
    pub fn next_end(&self) -> Option<Instant> {
        self.expired.values().map(|expired| expired.until).min()
    }

    /// The leases that are used although they have expired, and until when.
    pub fn expired(&self) -> &BTreeMap<LeaseKey, Instant> {
        &self.judged().expired
    }

    /// The usable leases of the other nodes, by key, expired ones among them. Without IPv6 in the network a lease's IPv6 half is left out.
    pub fn peers(&self) -> impl Iterator<Item = &Lease> {
        self.judged().peers.iter()
    }

    /// Leases and entries that are not used, each with the reason.
    pub fn refused(&self) -> Vec<RefusedLease> {
        self.judged().refused.clone()
    }

    /// Until then nothing may be removed on the table's word.
    pub fn has_snapshot(&self) -> bool {
        self.has_snapshot
    }

    fn depart(&mut self, key: LeaseKey, how: Departure, now: Instant) -> bool {
        match (self.leases.remove(&key), how) {
            (Some(lease), Departure::Expired) => {
                self.keep_for_a_while(lease, now);
                true
            }
            (lease, how) => {
                lease.is_some() | (how == Departure::ByHand && self.expired.remove(&key).is_some())
            }
        }
    }

    fn keep_for_a_while(&mut self, lease: Lease, now: Instant) {
        if !self.grace.is_zero() && self.fault(&lease).is_none() {
            self.expired.insert(lease.key, Expired { lease, until: now + self.grace });
        }
    }

    /// Expired leases give way to a living one, for good; whether any did.
    fn take_over(&mut self, living: &Lease) -> bool {
        if self.expired.is_empty() || self.fault(living).is_some() {
            return false;
        }
        let taken: BTreeSet<Claim> = claims(&self.in_our_families(living)).collect();
        let before = self.expired.len();
        self.expired.retain(|_, expired| !claims(&expired.lease).any(|claim| taken.contains(&claim)));
        self.expired.len() != before
    }

    fn replace(&mut self, leases: Vec<Lease>, malformed: Vec<Malformed>, now: Instant) -> bool {
        let mut leases: BTreeMap<_, _> = leases.into_iter().map(|lease| (lease.key, lease)).collect();
        // A key whose value became unreadable is there still: what was known of it stays.
        for entry in &malformed {
            let known = entry.key.parse().ok().and_then(|key: LeaseKey| self.leases.get(&key));
            if let Some(lease) = known {
                leases.entry(lease.key).or_insert_with(|| lease.clone());
            }
        }
        let malformed: BTreeMap<_, _> = malformed.into_iter().map(|m| (m.key, m.reason)).collect();
        let changed = !self.has_snapshot || self.leases != leases || self.malformed != malformed;
        self.has_snapshot = true;
        self.malformed = malformed;
        // Whoever removed what is missing was not seen: it counts as expired.
        for (key, lease) in std::mem::replace(&mut self.leases, leases) {
            if !self.leases.contains_key(&key) {
                self.keep_for_a_while(lease, now);
            }
        }
        let before = self.expired.len();
        if before > 0 {
            let living = self.leases.values().filter(|lease| self.fault(lease).is_none());
            let taken: BTreeSet<Claim> =
                living.flat_map(|lease| claims(&self.in_our_families(lease)).collect::<Vec<_>>()).collect();
            self.expired.retain(|_, expired| !claims(&expired.lease).any(|claim| taken.contains(&claim)));
        }
        changed || self.expired.len() != before
    }

    fn judged(&self) -> &Judged {
        self.judged.get_or_init(|| self.judge())
    }

    fn judge(&self) -> Judged {
        let mut judged = Judged::default();
        let mut sane = Vec::new();
        for (key, lease) in &self.leases {
            let lease = self.in_our_families(lease);
            match self.fault(&lease) {
                Some(reason) => judged.refuse(key, reason),
                None => sane.push((key, lease)),
            }
        }
        // Sane leases have the network's own length, so to overlap is to be equal in one family.
        sane.sort_by_key(|(key, lease)| (lease.create_revision, **key));
        let mut holders: BTreeMap<Claim, &LeaseKey> = BTreeMap::new();
        let mut claimed: BTreeSet<Claim> = BTreeSet::new();
        for (key, lease) in sane {
            // Those of a refused one as well: it lives, and an expired lease gives way to it.
            if !self.expired.is_empty() {
                claimed.extend(claims(&lease));
            }
            let taken = claims(&lease).find_map(|claim| claim.held_by(holders.get(&claim)?));
            if let Some(reason) = taken {
                judged.refuse(key, reason);
                continue;
            }
            holders.extend(claims(&lease).map(|claim| (claim, key)));
            match self.clash_with_own(&lease) {
                Some(Clash::Same) => {}
                Some(Clash::With(reason)) => judged.refuse(key, reason),
                None => judged.peers.push(lease),
            }
        }
        self.add_expired(&mut judged, claimed);
        judged.peers.sort_by_key(|lease| lease.key);
        let unreadable = self.malformed.iter().map(|(key, reason)| (key.clone(), reason.clone()));
        judged.refused.extend(unreadable.map(|(key, reason)| RefusedLease { key: brief(&key), reason }));
        judged.refused.sort_by(|a, b| (&a.key, &a.reason).cmp(&(&b.key, &b.reason)));
        judged
    }

    /// Those whose place nobody living has taken; among themselves, the elder first.
    fn add_expired(&self, judged: &mut Judged, mut claimed: BTreeSet<Claim>) {
        claimed.extend(self.own.iter().flat_map(claims));
        let mut expired: Vec<&Expired> = self.expired.values().collect();
        expired.sort_by_key(|expired| (expired.lease.create_revision, expired.lease.key));
        for Expired { lease, until } in expired {
            let lease = self.in_our_families(lease);
            if !claims(&lease).any(|claim| claimed.contains(&claim)) {
                claimed.extend(claims(&lease));
                judged.expired.insert(lease.key, *until);
                judged.peers.push(lease);
            }
        }
    }

    fn in_our_families(&self, lease: &Lease) -> Lease {
        let v6 = lease.key.v6.filter(|_| self.config.v6.is_some());
        Lease { key: LeaseKey { v6, ..lease.key }, ..lease.clone() }
    }

    /// What is wrong with a lease in every node's eyes.
    fn fault(&self, lease: &Lease) -> Option<String> {
        misplaced(lease.key.v4, &self.config.v4, "Network", "SubnetLen")
            .or_else(|| {
                let (subnet, range) = lease.key.v6.zip(self.config.v6)?;
                misplaced(subnet, &range, "IPv6Network", "IPv6SubnetLen")
            })
            .or_else(|| bad_public_ip(lease.attrs.public_ip, self.config.v4.network))
    }

    /// What is wrong with a lease in this node's eyes alone.
    fn clash_with_own(&self, lease: &Lease) -> Option<Clash> {
        let own = self.own.as_ref().map(|own| self.in_our_families(own))?;
        let (ip, own_ip) = (lease.attrs.public_ip, own.attrs.public_ip);
        if lease.key == own.key && ip == own_ip {
            Some(Clash::Same)
        } else if lease.key.overlaps(&own.key) {
            Some(Clash::With(format!("overlaps {}, this node's own: expected a subnet of its own", own.key)))
        } else if ip == own_ip {
            Some(Clash::With(format!(
                "PublicIP = {ip}: expected another node's address, this one is our own"
            )))
        } else {
            None
        }
    }
}

/// What only one node can have. Sane leases have the network's own length, so that subnets overlap when they are equal.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    Subnet(Subnet),
    PublicIp(Ipv4Addr),
    Vtep(Mac),
}

impl Claim {
    /// Why a lease is not used that claims what an older one has.
    fn held_by(&self, elder: &LeaseKey) -> Option<String> {
        match self {
            Self::Subnet(_) => {
                Some(format!("overlaps {elder}, which is older: expected a subnet of its own"))
            }
            Self::PublicIp(ip) => Some(format!(
                "PublicIP = {ip}: expected an address of its own, {elder}, which is older, has it"
            )),
            // Harmless to a peer that is reached without the tunnel, so that the dataplane tells.
            Self::Vtep(_) => None,
        }
    }
}

fn claims(lease: &Lease) -> impl Iterator<Item = Claim> {
    let vtep = lease.attrs.vxlan_data(lease.key.v4).map(|data| Claim::Vtep(data.vtep_mac));
    let (key, public_ip) = (lease.key, Claim::PublicIp(lease.attrs.public_ip));
    key.subnets().collect::<Vec<_>>().into_iter().map(Claim::Subnet).chain([public_ip]).chain(vtep)
}

enum Clash {
    Same,
    With(String),
}

impl Judged {
    fn refuse(&mut self, key: &LeaseKey, reason: String) {
        self.refused.push(RefusedLease { key: key.to_string(), reason });
    }
}

fn misplaced(subnet: Subnet, range: &Range, network_key: &str, len_key: &str) -> Option<String> {
    if !range.network.covers(subnet) {
        Some(format!("subnet = {subnet}: expected one inside {network_key} {}", range.network))
    } else if !range.has_len(subnet.len()) {
        Some(format!("subnet = {subnet}: expected length {} ({len_key})", range.subnet_len))
    } else {
        None
    }
}

fn bad_public_ip(ip: Ipv4Addr, network: Subnet) -> Option<String> {
    expected_of_public_ip(ip, network).map(|expected| format!("PublicIP = {ip}: expected {expected}"))
}

/// What a public IP that no node can use should be instead. Link-local addresses are let pass: flannel falls back to
/// them when an interface has no other.
pub(super) fn expected_of_public_ip(ip: Ipv4Addr, network: Subnet) -> Option<String> {
    if network.contains(ip.into()) {
        return Some(format!("an address of the underlay, not one inside Network {network}"));
    }
    let what = if ip.octets()[0] == 0 {
        "a unicast address, not one of 0.0.0.0/8"
    } else if ip.is_loopback() {
        "a unicast address, not a loopback one"
    } else if ip.is_multicast() {
        "a unicast address, not a multicast one"
    } else if ip.is_broadcast() {
        "a unicast address, not the broadcast one"
    } else {
        return None;
    };
    Some(what.to_owned())
}

#[cfg(test)]
mod tests;
