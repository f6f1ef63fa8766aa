//! The cluster's Nodes as leases: what became of each, who has a subnet that two Nodes claim, and what a change of one
//! of them means to whoever has been told the rest. No I/O.
//!
//! A heartbeat changes nothing that is kept here, so it ends with a comparison. A change of a Node whose subnet nobody
//! else claims costs a look into two maps; only contested subnets are judged over all Nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use weft_shared::Subnet;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};

use super::super::{Departure, LeaseUpdate, Malformed};
use super::annotations::{Prefix, Published, Standing};
use super::node::Node;

/// In place of a backend's name, in the lease of the own Node when it does not say what was published: the keeper sees
/// that it is not what it wrote, and nobody else ever looks at this node's own.
const ALTERED: &str = "(altered by another hand)";

/// What a Node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// No agent looks after it.
    Nothing,
    Peer(Lease),
    /// `key`: its subnet, if that can be read.
    Garbage {
        key: Option<LeaseKey>,
        reason: String,
    },
}

#[derive(Debug, Default)]
pub(super) struct World {
    nodes: BTreeMap<Arc<str>, Entry>,
    by_subnet: BTreeMap<Place, BTreeSet<Arc<str>>>,
    /// Nodes whose subnet an older one has, which is named.
    shadowed: BTreeMap<Arc<str>, Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    uid: String,
    created: u64,
    lease: Option<Lease>,
    problem: Option<String>,
}

/// An IPv4 subnet in an order in which those inside another stand behind it.
type Place = (Ipv4Addr, u8);

/// What Nodes are read by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading<'a> {
    pub prefix: &'a Prefix,
    /// The range that is leased out, if it is known.
    pub network: Option<Subnet>,
}

/// Reads a Node; `published` is what this node's agent has written, if it is its own. Who is refused here has no range
/// in anybody's eyes, so that it takes none from another either.
pub(super) fn read(node: &Node, by: Reading<'_>, own: bool, published: Option<&Published>) -> Said {
    let Reading { prefix, network } = by;
    let annotations = node.annotations();
    let published = published.filter(|_| own);
    if !prefix.is_managed(annotations) && published.is_none() {
        return Said::Nothing;
    }
    let key = match node.key() {
        Ok(key) => key,
        // What is missing for the own lease, its keeper says.
        Err(_) if own => return Said::Nothing,
        Err(reason) => return Said::Garbage { key: None, reason },
    };
    if let Some(network) = network.filter(|network| !network.covers(key.v4)) {
        let reason = format!("podCIDR {}: expected a network inside Network {network}", key.v4);
        return if own { Said::Nothing } else { Said::Garbage { key: None, reason } };
    }
    let attrs = match published {
        Some(published) => match prefix.standing(published, annotations) {
            Standing::AsPublished => published.attrs.clone(),
            // No lease until the keeper, which is told so, has looked: nobody else has touched it.
            Standing::Overwritten => return Said::Nothing,
            Standing::Altered => {
                LeaseAttrs { backend_type: ALTERED.into(), backend_data: None, ..published.attrs.clone() }
            }
        },
        None => match prefix.attrs(annotations, key.v4, network) {
            Ok(attrs) => attrs,
            Err(reason) => return Said::Garbage { key: Some(key), reason },
        },
    };
    Said::Peer(Lease { key, attrs, create_revision: node.created() })
}

impl World {
    /// What changes when this Node says this. Whatever a Node said last holds while what it says cannot be read.
    pub(super) fn set(&mut self, node: &Node, said: Said) -> Vec<LeaseUpdate> {
        let (uid, created) = (node.metadata.uid.clone(), node.created());
        let known = self.nodes.get_key_value(node.metadata.name.as_str());
        let former = known.map(|(_, entry)| entry.clone());
        let (lease, problem) = match said {
            Said::Nothing => (None, None),
            Said::Peer(lease) => (Some(lease), None),
            Said::Garbage { key, reason } => {
                let last = former.as_ref().filter(|entry| entry.uid == uid).and_then(|e| e.lease.clone());
                (last.filter(|lease| Some(lease.key) == key), Some(reason))
            }
        };
        let entry = Entry { uid, created, lease, problem };
        if former.as_ref() == Some(&entry) {
            return Vec::new();
        }
        let name = known.map_or_else(|| node.metadata.name.as_str().into(), |(name, _)| name.clone());
        self.replace(&name, former, Some(entry))
    }

    /// What changes when this Node is gone.
    pub(super) fn remove(&mut self, name: &str) -> Vec<LeaseUpdate> {
        let Some((name, entry)) = self.nodes.get_key_value(name) else { return Vec::new() };
        let (name, former) = (name.clone(), entry.clone());
        self.replace(&name, Some(former), None)
    }

    pub(super) fn snapshot(&self) -> LeaseUpdate {
        let malformed = self.nodes.keys().filter_map(|name| self.malformed(name)).collect();
        LeaseUpdate::Snapshot { leases: self.leases().cloned().collect(), malformed }
    }

    /// The leases of `self` whose subnets are nobody's in `now`: whoever saw the Nodes go knows that it was on purpose.
    pub(super) fn departed(&self, now: &World) -> Vec<LeaseUpdate> {
        let left: BTreeSet<LeaseKey> = now.leases().map(|lease| lease.key).collect();
        let gone = self.leases().map(|lease| lease.key).filter(|key| !left.contains(key));
        gone.map(|key| LeaseUpdate::Remove { key, how: Departure::ByHand }).collect()
    }

    #[cfg(test)]
    pub(super) fn anew<'a>(former: &World, nodes: impl IntoIterator<Item = (&'a Node, Said)>) -> Self {
        let mut world = Self::default();
        for (node, said) in nodes {
            world.add(former, node, said);
        }
        world
    }

    /// Takes up a Node of a fresh list, keeping of `former` what garbage is read as.
    pub(super) fn add(&mut self, former: &World, node: &Node, said: Said) {
        if let (Said::Garbage { key: Some(key), .. }, Some(last)) =
            (&said, former.nodes.get(node.metadata.name.as_str()))
            && let Some(lease) = last.lease.as_ref().filter(|l| l.key == *key)
            && last.uid == node.metadata.uid
        {
            self.set(node, Said::Peer(lease.clone()));
        }
        self.set(node, said);
    }

    /// Whether any of `other`'s Nodes is the very same object: two clusters have none in common.
    pub(super) fn shares_a_node_with(&self, other: &World) -> bool {
        self.nodes.iter().any(|(name, entry)| other.nodes.get(name).is_some_and(|o| o.uid == entry.uid))
    }

    /// The older Node that has a subnet which is, or would be, the Node `name`'s, with its lease.
    pub(super) fn elder_of(&self, name: &str, created: u64, key: &LeaseKey) -> Option<(&str, &Lease)> {
        let claimants = overlapping(&self.by_subnet, place(key)).flatten();
        let holders = claimants.filter(|holder| !self.shadowed.contains_key(*holder)).filter_map(|holder| {
            let entry = self.nodes.get(holder)?;
            Some((entry.created, &**holder, entry.lease.as_ref()?))
        });
        let elders = holders.filter(|(made, holder, _)| (*made, *holder) < (created, name));
        elders.min_by_key(|(made, holder, _)| (*made, *holder)).map(|(_, holder, lease)| (holder, lease))
    }

    pub(super) fn is_known(&self, name: &str, uid: &str) -> bool {
        self.nodes.get(name).is_some_and(|entry| entry.uid == uid)
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Those in use.
    fn leases(&self) -> impl Iterator<Item = &Lease> {
        let held = self.nodes.iter().filter(|(name, _)| !self.shadowed.contains_key(*name));
        held.filter_map(|(_, entry)| entry.lease.as_ref())
    }

    fn malformed(&self, name: &str) -> Option<Malformed> {
        let problem = self.nodes.get(name)?.problem.clone();
        let shadow = || {
            let (elder, lease) = (self.shadowed.get(name)?, self.nodes.get(name)?.lease.as_ref()?);
            Some(format!(
                "podCIDR {} overlaps that of {}, which is older: expected a range of its own",
                lease.key.v4,
                key_of(elder)
            ))
        };
        problem.or_else(shadow).map(|reason| Malformed { key: key_of(name), reason })
    }

    fn replace(&mut self, name: &Arc<str>, former: Option<Entry>, entry: Option<Entry>) -> Vec<LeaseUpdate> {
        let (old, new) =
            (former.and_then(|entry| entry.lease), entry.as_ref().and_then(|entry| entry.lease.clone()));
        let contested =
            [&old, &new].into_iter().flatten().any(|lease| self.is_contested(name, place(&lease.key)));
        let said_before = self.malformed(name);
        let before = contested.then(|| self.holders());
        self.put(name, old.as_ref(), entry);
        let mut updates = Vec::new();
        match before {
            None => {
                if let Some(old) = old.as_ref().filter(|old| new.as_ref().is_none_or(|n| n.key != old.key)) {
                    updates.push(LeaseUpdate::Remove { key: old.key, how: Departure::ByHand });
                }
                updates.extend(new.filter(|new| old.as_ref() != Some(new)).map(LeaseUpdate::Upsert));
                updates.extend(told(name, said_before, self.malformed(name)));
            }
            Some((holders, mut said)) => {
                said.insert(name.clone(), said_before);
                self.judge();
                let (now, _) = self.holders();
                let gone = holders.keys().filter(|key| !now.contains_key(key));
                updates.extend(gone.map(|key| LeaseUpdate::Remove { key: *key, how: Departure::ByHand }));
                for (key, holder) in &now {
                    let lease = self.nodes.get(holder).and_then(|entry| entry.lease.clone());
                    let is_new = holders.get(key) != Some(holder) || (holder == name && lease != old);
                    updates.extend(lease.filter(|_| is_new).map(LeaseUpdate::Upsert));
                }
                said.extend(
                    self.shadowed
                        .keys()
                        .filter(|n| !said.contains_key(*n))
                        .cloned()
                        .map(|n| (n, None))
                        .collect::<Vec<_>>(),
                );
                for (name, before) in said {
                    updates.extend(told(&name, before, self.malformed(&name)));
                }
            }
        }
        updates
    }

    fn put(&mut self, name: &Arc<str>, old: Option<&Lease>, entry: Option<Entry>) {
        if let Some(old) = old
            && let Some(claimants) = self.by_subnet.get_mut(&place(&old.key))
        {
            claimants.remove(name);
            if claimants.is_empty() {
                self.by_subnet.remove(&place(&old.key));
            }
        }
        match entry {
            Some(entry) => {
                if let Some(lease) = &entry.lease {
                    self.by_subnet.entry(place(&lease.key)).or_default().insert(name.clone());
                }
                self.nodes.insert(name.clone(), entry);
            }
            None => drop(self.nodes.remove(name)),
        }
    }

    fn is_contested(&self, name: &Arc<str>, place: Place) -> bool {
        overlapping(&self.by_subnet, place).any(|claimants| claimants.iter().any(|other| other != name))
    }

    /// Who has which subnet, and what has been said of those who have not.
    #[expect(clippy::type_complexity, reason = "two halves of one answer")]
    fn holders(&self) -> (BTreeMap<LeaseKey, Arc<str>>, BTreeMap<Arc<str>, Option<Malformed>>) {
        let held = self.nodes.iter().filter(|(name, _)| !self.shadowed.contains_key(*name));
        let holders = held.filter_map(|(name, entry)| Some((entry.lease.as_ref()?.key, name.clone())));
        let said = self.shadowed.keys().map(|name| (name.clone(), self.malformed(name)));
        (holders.collect(), said.collect())
    }

    /// The older wins; of two that were made in one second, the one whose name comes first.
    fn judge(&mut self) {
        let mut claims: Vec<(u64, &Arc<str>, Place)> = self
            .nodes
            .iter()
            .filter_map(|(name, entry)| Some((entry.created, name, place(&entry.lease.as_ref()?.key))))
            .collect();
        claims.sort();
        let mut taken: BTreeMap<Place, Arc<str>> = BTreeMap::new();
        let mut shadowed = BTreeMap::new();
        for (_, name, place) in claims {
            let elder = overlapping(&taken, place).next().cloned();
            match elder {
                Some(elder) => drop(shadowed.insert(name.clone(), elder)),
                None => drop(taken.insert(place, name.clone())),
            }
        }
        self.shadowed = shadowed;
    }
}

/// As kubectl names it; no lease's key looks like that.
pub(super) fn key_of(node: &str) -> String {
    format!("node/{node}")
}

fn told(name: &str, before: Option<Malformed>, now: Option<Malformed>) -> Option<LeaseUpdate> {
    match now {
        Some(now) if before.as_ref() != Some(&now) => Some(LeaseUpdate::Malformed(now)),
        Some(_) => None,
        None => before.map(|_| LeaseUpdate::MalformedGone(key_of(name))),
    }
}

fn place(key: &LeaseKey) -> Place {
    match key.v4.addr() {
        IpAddr::V4(addr) => (addr, key.v4.len()),
        IpAddr::V6(_) => unreachable!("a lease key's first half is IPv4"),
    }
}

/// What stands in the map for subnets around, equal to or inside this one.
fn overlapping<T>(map: &BTreeMap<Place, T>, (addr, len): Place) -> impl Iterator<Item = &T> {
    let subnet = move |len| Subnet::new(addr.into(), len);
    let around = (0..len).filter_map(move |len| match subnet(len)?.addr() {
        IpAddr::V4(addr) => map.get(&(addr, len)),
        IpAddr::V6(_) => None,
    });
    let last = match subnet(len).map(|s| s.last()) {
        Some(IpAddr::V4(last)) => last,
        _ => addr,
    };
    let inside = map.range((addr, len)..=(last, 32)).map(|(_, found)| found);
    around.chain(inside)
}

#[cfg(test)]
mod tests;
