//! The state machine behind address management: attachments, their phases, and who holds which address. No I/O and no
//! clock; every method says what changed, and the caller makes it so on disk and in the kernel.
//!
//! ```text
//!           Reserve                 Commit
//!   (none) --------> Reserved ----------------> Committed
//!                       | DEL, connection closed   | DEL, GC, tombstone, veth gone
//!                       v                          v
//!                    Aborted: veth deleted; freed when its ADD can no longer wire and the veth was deleted once more
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use weft_shared::deadline;
use weft_shared::names::{attachment_hash, host_ifname};
use weft_shared::protocol::{Attachment, Commit, Reserve};
use weft_shared::{IfName, Mac, Subnet};

use super::boottime::Boottime;
use super::host_ports::PortTaken;
use super::pool::{Pool, PoolError};
use super::records::{BridgeUse, Continuity, Damaged, Held, Loaded, Record, Wired};
use crate::firewall::HostPort;
use crate::pods::{BridgeNeed, BridgePortNeed, PodNeeds, PodNetwork, SeenVeth, SeenVeths};
use crate::status::StrandedStatus;

/// One connection of the socket server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub(super) u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Reserved {
        conn: ConnId,
    },
    /// Only a look at the kernel numbered at least `seen_from` began after the commit.
    Committed {
        seen_from: u64,
    },
    /// To be undone, but not while its ADD's connection is open, and not before.
    Aborted {
        conn: Option<ConnId>,
        not_before: Boottime,
    },
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) record: Record,
    pub(super) phase: Phase,
    /// Of its host-side veth: a hash, which is not to be taken of every attachment whenever one of them changes.
    veth: IfName,
    /// The first look that shows whether an address that it has held for long enough is really nobody's.
    held_until_look: Option<u64>,
}

impl Entry {
    fn new(record: Record, phase: Phase) -> Self {
        let veth = host_ifname(&record.attachment);
        Self { record, phase, veth, held_until_look: None }
    }

    pub(super) fn is_committed(&self) -> bool {
        matches!(self.phase, Phase::Committed { .. })
    }
}

/// What stands in the way of an ADD.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing, or the remains of an ADD that is over: its veth must go first.
    Free,
    /// An aborted attachment whose address may be freed once the veth is gone.
    Undone,
    /// Another ADD's connection is open.
    InFlight,
    Attached {
        ifindex: u32,
    },
    /// Another attachment's veth has the same name.
    NameTaken(Attachment),
    /// An unreadable record, of which nobody knows what it was.
    Damaged,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CommitRefusal {
    #[error("nothing is reserved for it on this connection")]
    NotReserved,
    #[error("it was deleted while it was being added")]
    Aborted,
}

/// What a look at the kernel gives reason to doubt.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Suspects {
    /// Committed attachments whose veth was not seen, with its index.
    pub(super) attachments: Vec<(Attachment, u32)>,
    /// Unreadable records whose veth was not seen.
    pub(super) damaged: Vec<String>,
}

/// What was still in a look and is not a moment later was deleted in between.
const SETTLED: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Table {
    entries: BTreeMap<Attachment, Entry>,
    names: BTreeMap<IfName, Attachment>,
    damaged: BTreeMap<String, Damaged>,
    pools: BTreeMap<Subnet, Pool>,
    continuity: Continuity,
    /// The subnet that new pods get, once known.
    current: Option<Subnet>,
    open: BTreeSet<ConnId>,
    strays: BTreeMap<SeenVeth, Boottime>,
    /// The look that `strays` are out of.
    last_look: u64,
}

impl Table {
    /// Takes over what an earlier agent left. Its uncommitted reservations are orphans: no connection will ever commit
    /// them, but their plugins may still be wiring.
    pub(super) fn new(loaded: Loaded, now: Boottime) -> Self {
        let mut table = Self { continuity: loaded.continuity, damaged: loaded.damaged, ..Self::default() };
        // Round robin has gone on since, as far as these records show, and no further: before one is removed, where it
        // stands is written down.
        let is_later = |at| move |record: &&Record| record.reserved_at >= at && !record.requested;
        let mut later: Vec<_> =
            table.continuity.at.iter().flat_map(|at| loaded.records.iter().filter(is_later(*at))).collect();
        later.sort_by_key(|record| record.reserved_at);
        for record in later {
            table.continuity.cursors.extend(record.addresses.iter().map(|address| (record.subnet, *address)));
        }
        for mut record in loaded.records {
            let phase = match record.committed {
                Some(_) => Phase::Committed { seen_from: 1 },
                None => {
                    // A time of reservation in the future is none of this boot's.
                    record.reserved_at = record.reserved_at.min(now);
                    // One that was wired has no plugin any more.
                    let wiring = record.undone.map_or_else(|| wiring_over(&record), |_| Boottime::default());
                    let not_before = wiring.max(held_until(&record));
                    Phase::Aborted { conn: None, not_before }
                }
            };
            table.insert(Entry::new(record, phase));
        }
        table
    }

    pub(super) fn open_connection(&mut self, conn: ConnId) {
        self.open.insert(conn);
    }

    /// Notes what new pods get. A bridge leaves the gateway of an earlier subnet with that subnet's last pod.
    pub(super) fn set_network(&mut self, network: &PodNetwork) {
        self.current = Some(network.subnet);
        self.pool(network.subnet);
        for used in self.continuity.bridges.values_mut() {
            *used = BridgeUse { subnet: network.subnet, mtu: network.mtu, ..*used };
        }
    }

    pub(super) fn standing(&self, key: &Attachment, now: Boottime) -> Standing {
        if let Some(other) = self.names.get(&host_ifname(key)).filter(|other| *other != key) {
            return Standing::NameTaken(other.clone());
        }
        match self.entries.get(key).map(|entry| (entry.phase, entry.record.committed)) {
            None if self.damaged.contains_key(&attachment_hash(key)) => Standing::Damaged,
            None => Standing::Free,
            Some((Phase::Reserved { .. } | Phase::Aborted { conn: Some(_), .. }, _)) => Standing::InFlight,
            Some((Phase::Aborted { conn: None, not_before }, _)) if now >= not_before => Standing::Undone,
            Some((Phase::Aborted { .. }, _)) => Standing::Free,
            Some((Phase::Committed { .. }, wired)) => {
                Standing::Attached { ifindex: wired.map_or(0, |w| w.host_ifindex) }
            }
        }
    }

    /// Picks the addresses. An orphan of the same key gives way, its addresses stay blocked for as long as it would
    /// have blocked them, except to this very attachment.
    pub(super) fn reserve(
        &mut self,
        conn: ConnId,
        request: &Reserve,
        network: &PodNetwork,
        mtu: u32,
        now: Boottime,
    ) -> Result<Record, ReserveRefusal> {
        if !self.open.contains(&conn) {
            return Err(ReserveRefusal::Closed);
        }
        self.free_of_others(request)?;
        self.set_network(network);
        let held = self.entries.get(&request.attachment).map(|old| held_after(old, now)).unwrap_or_default();
        let addresses = self.pick(network.subnet, &request.requested, &held)?;
        let record = Record {
            addresses,
            requested: !request.requested.is_empty(),
            held,
            subnet: network.subnet,
            attachment: request.attachment.clone(),
            reserved_at: now,
            committed: None,
            undone: None,
            bridge: request.bridge.clone(),
            mtu,
            netns: request.netns.clone(),
            netns_cookie: request.netns_cookie,
            pod: request.pod.clone(),
            host_ports: request.host_ports.clone(),
            bandwidth: request.bandwidth,
        };
        let replaced = self.insert(Entry::new(record.clone(), Phase::Reserved { conn }));
        if let Some(Entry { record: old, .. }) = replaced {
            self.free(old.addresses.into_iter().chain(old.held.into_iter().map(|held| held.address)));
        }
        Ok(record)
    }

    /// Whether the reservation still stands, after whatever took time.
    pub(super) fn is_reserved(&self, conn: ConnId, key: &Attachment) -> bool {
        self.entries.get(key).is_some_and(|entry| entry.phase == Phase::Reserved { conn })
    }

    /// The record as it will be when committed; [`Table::commit`] makes it so.
    pub(super) fn committable(&self, conn: ConnId, commit: &Commit) -> Result<Record, CommitRefusal> {
        let entry = self.entries.get(&commit.attachment).ok_or(CommitRefusal::NotReserved)?;
        match entry.phase {
            Phase::Reserved { conn: owner } if owner == conn => {}
            Phase::Aborted { conn: Some(owner), .. } if owner == conn => return Err(CommitRefusal::Aborted),
            _ => return Err(CommitRefusal::NotReserved),
        }
        let wired = Wired {
            host_ifindex: commit.host_ifindex,
            host_mac: commit.host_mac,
            container_mac: commit.container_mac,
        };
        Ok(Record { committed: Some(wired), ..entry.record.clone() })
    }

    /// `last_look` is the number of the last look at the kernel that was published.
    pub(super) fn commit(&mut self, record: Record, last_look: u64) {
        // The look after the last one may have begun already.
        let phase = Phase::Committed { seen_from: last_look + 2 };
        self.entries.insert(record.attachment.clone(), Entry::new(record, phase));
    }

    /// Starts to undo an attachment, unless it was reserved at or after `since`. True when there is one to undo.
    pub(super) fn abort(&mut self, key: &Attachment, since: Option<Boottime>) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return false };
        if since.is_some_and(|since| entry.record.reserved_at >= since) {
            return false;
        }
        let not_before = held_until(&entry.record);
        entry.phase = match entry.phase {
            Phase::Reserved { conn } => Phase::Aborted { conn: Some(conn), not_before },
            Phase::Committed { .. } => {
                // On disk, if it must stay there for a while, it is no attachment any more.
                entry.record.undone = entry.record.committed.take().map(|wired| wired.host_ifindex);
                Phase::Aborted { conn: None, not_before }
            }
            aborted @ Phase::Aborted { .. } => aborted,
        };
        true
    }

    /// The ADD was told that it failed, so it will not wire.
    pub(super) fn give_up(&mut self, key: &Attachment) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.phase = Phase::Aborted { conn: None, not_before: held_until(&entry.record) };
        }
    }

    /// A connection is over. A peer that closed it is dead or done; one that we left may still be wiring.
    pub(super) fn hang_up(&mut self, conn: ConnId, by_peer: bool) -> Vec<Attachment> {
        self.open.remove(&conn);
        let mut undone = Vec::new();
        for (key, Entry { record, phase, .. }) in &mut self.entries {
            let over = if by_peer { Boottime::default() } else { wiring_over(record) };
            match *phase {
                Phase::Reserved { conn: owner } | Phase::Aborted { conn: Some(owner), .. }
                    if owner == conn =>
                {
                    *phase = Phase::Aborted { conn: None, not_before: over.max(held_until(record)) };
                    undone.push(key.clone());
                }
                _ => {}
            }
        }
        undone
    }

    /// Whether the veth of this name may be deleted on behalf of `key`: nothing newer or foreign stands behind it.
    pub(super) fn may_delete(&self, key: &Attachment) -> bool {
        match self.names.get(&host_ifname(key)) {
            Some(owner) if owner != key => false,
            _ => self.entries.get(key).is_none_or(|entry| matches!(entry.phase, Phase::Aborted { .. })),
        }
    }

    /// Whether nothing but the veth, gone by now, kept the address.
    pub(super) fn is_due(&self, key: &Attachment, now: Boottime) -> bool {
        self.standing(key, now) == Standing::Undone
    }

    /// Attachments to be undone now.
    pub(super) fn due(&self, now: Boottime) -> Vec<Attachment> {
        self.entries.keys().filter(|key| self.is_due(key, now)).cloned().collect()
    }

    pub(super) fn remove(&mut self, key: &Attachment) {
        let Some(entry) = self.entries.remove(key) else { return };
        self.names.remove(&entry.veth);
        let held = entry.record.held.iter().map(|held| held.address);
        self.free(entry.record.addresses.iter().copied().chain(held));
    }

    pub(super) fn damaged(&self, hash: &str) -> Option<&Damaged> {
        self.damaged.get(hash)
    }

    pub(super) fn all_damaged(&self) -> impl Iterator<Item = (&String, &Damaged)> {
        self.damaged.iter()
    }

    pub(super) fn remove_damaged(&mut self, hash: &str) -> bool {
        let Some(damaged) = self.damaged.remove(hash) else { return false };
        self.free(damaged.addresses.into_iter());
        true
    }

    /// Notes whose orphans can no longer wire. What such a one held is free once a look from then on has found the committed
    /// veth: had that gone before, the orphan may have made one of its name, and the address is in use. Of an attachment that
    /// is not committed it goes with the entry, after the veth.
    pub(super) fn expire_held(&mut self, now: Boottime, last_look: u64) {
        for entry in self.entries.values_mut().filter(|entry| entry.is_committed()) {
            if entry.held_until_look.is_none() && entry.record.held.iter().any(|held| held.until <= now) {
                // The look after the last one may have begun already.
                entry.held_until_look = Some(last_look + 2);
            }
        }
    }

    /// Judges a look at the kernel.
    pub(super) fn observe(&mut self, seen: &SeenVeths, now: Boottime) -> Suspects {
        let mut suspects = Suspects::default();
        let present: BTreeSet<&SeenVeth> = seen.veths.iter().collect();
        let mut free = Vec::new();
        for (key, entry) in &mut self.entries {
            let Phase::Committed { seen_from } = entry.phase else { continue };
            let ifindex = entry.record.committed.map_or(0, |wired| wired.host_ifindex);
            let veth = SeenVeth { name: entry.veth.clone(), ifindex };
            if !present.contains(&veth) {
                if seen.pass >= seen_from {
                    suspects.attachments.push((key.clone(), ifindex));
                }
            } else if entry.held_until_look.take_if(|look| seen.pass >= *look).is_some() {
                let expired = entry.record.held.extract_if(.., |held| held.until <= now);
                free.extend(expired.map(|held| held.address));
            }
        }
        self.free(free.into_iter());
        if seen.pass == 0 {
            return suspects;
        }
        for (hash, damaged) in &self.damaged {
            if !present.iter().any(|veth| damaged.is_of(veth)) {
                suspects.damaged.push(hash.clone());
            }
        }
        if seen.pass == self.last_look {
            return suspects;
        }
        self.last_look = seen.pass;
        let mut strays = BTreeMap::new();
        let known = self.known_indices();
        for veth in seen.veths.iter().filter(|veth| !self.owns(&veth.name) && !known.contains(&veth.ifindex))
        {
            strays.insert(veth.clone(), self.strays.get(veth).copied().unwrap_or(now));
        }
        self.strays = strays;
        suspects
    }

    /// Veths with our mark that carry addresses unknown to us: those without a record, and those whose record is so
    /// damaged that not even an address is left in it.
    pub(super) fn unknown(&self, seen: &SeenVeths) -> Vec<SeenVeth> {
        let known = self.known_indices();
        let is_unknown = |veth: &&SeenVeth| {
            let damaged = self.damaged.values().find(|damaged| damaged.is_of(veth));
            let is_known = self.names.contains_key(&veth.name) || known.contains(&veth.ifindex);
            damaged.map_or(!is_known, |damaged| damaged.addresses.is_empty())
        };
        seen.veths.iter().filter(is_unknown).cloned().collect()
    }

    /// Those that are no pod's that was deleted since the look.
    pub(super) fn long_unknown(&self, seen: &SeenVeths, now: Boottime) -> Vec<IfName> {
        let is_fresh = |veth: &SeenVeth| self.strays.get(veth).is_some_and(|first| now < first.plus(SETTLED));
        let unknown = self.unknown(seen).into_iter();
        unknown.filter(|veth| !is_fresh(veth)).map(|veth| veth.name).collect()
    }

    /// Veths with our mark that nobody has claimed for as long as an ADD can last.
    pub(super) fn strays_due(&self, now: Boottime) -> Vec<SeenVeth> {
        let old = self.strays.iter().filter(|(_, first)| now >= first.plus(deadline::WIRING));
        old.map(|(veth, _)| veth.clone()).collect()
    }

    pub(super) fn forget_stray(&mut self, veth: &SeenVeth) {
        self.strays.remove(veth);
    }

    /// Of the veths that records speak of, also of those that are to be deleted.
    fn known_indices(&self) -> BTreeSet<u32> {
        let wired =
            |entry: &Entry| entry.record.committed.map(|wired| wired.host_ifindex).or(entry.record.undone);
        let damaged = self.damaged.values().filter_map(|damaged| damaged.host_ifindex);
        self.entries.values().filter_map(wired).chain(damaged).collect()
    }

    /// Whether a record stands behind a veth of this name.
    pub(super) fn owns(&self, name: &IfName) -> bool {
        self.names.contains_key(name) || self.damaged.values().any(|d| d.host_ifname == *name)
    }

    /// The next moment at which time alone changes something.
    pub(super) fn next_due(&self) -> Option<Boottime> {
        let undo = self.entries.values().filter_map(|entry| match entry.phase {
            Phase::Aborted { conn: None, not_before } => Some(not_before),
            _ => None,
        });
        // From then on a look is waited for.
        let committed = self.entries.values().filter(|e| e.is_committed() && e.held_until_look.is_none());
        let held = committed.flat_map(|entry| entry.record.held.iter().map(|held| held.until));
        let strays = self.strays.values().map(|first| first.plus(deadline::WIRING));
        undo.chain(held).chain(strays).min()
    }

    /// A bridge that was made real stays wanted, with the MAC that its pods know.
    pub(super) fn keep_bridge(&mut self, name: &IfName, mac: Mac, network: &PodNetwork) -> bool {
        let used = BridgeUse { subnet: network.subnet, mtu: network.mtu, mac: Some(mac) };
        self.continuity.bridges.insert(name.clone(), used) != Some(used)
    }

    pub(super) fn bridges(&self) -> &BTreeMap<IfName, BridgeUse> {
        &self.continuity.bridges
    }

    /// What the kernel must hold for the attachments there are.
    pub(super) fn needs(&self, network_mtu: Option<u32>) -> PodNeeds {
        let mut needs = PodNeeds::default();
        for (name, used) in &self.continuity.bridges {
            let need = BridgeNeed { subnets: vec![used.subnet], mtu: used.mtu, mac: used.mac };
            needs.bridges.insert(name.clone(), need);
        }
        for Entry { record, phase, veth, .. } in self.entries.values() {
            if matches!(phase, Phase::Aborted { .. }) {
                continue;
            }
            let mtu = network_mtu.unwrap_or(record.mtu);
            let unused = || BridgeNeed { subnets: vec![], mtu, mac: None };
            let need = needs.bridges.entry(record.bridge.name.clone()).or_insert_with(unused);
            if !need.subnets.contains(&record.subnet) {
                need.subnets.push(record.subnet);
            }
            needs.host_ports.extend(HostPort::of(&record.host_ports, &record.addresses));
            if record.bridge.masquerade {
                needs.masqueraded.extend(&record.addresses);
            }
            if record.bridge.force_address {
                needs.forced.insert(record.bridge.name.clone());
            }
            if let Some(wired) = record.committed {
                let (options, mtu) = (record.bridge.clone(), record.mtu);
                let (ifindex, limits) = (wired.host_ifindex, record.bandwidth);
                needs.bridge_ports.insert(veth.clone(), BridgePortNeed { ifindex, options, mtu, limits });
            }
        }
        needs
    }

    /// What is to be remembered beside the records.
    pub(super) fn continuity(&self, at: Boottime) -> Continuity {
        Continuity { at: Some(at), cursors: self.cursors(), bridges: self.continuity.bridges.clone() }
    }

    /// The address that was given last, out of each subnet.
    pub(super) fn cursors(&self) -> BTreeMap<Subnet, IpAddr> {
        let mut cursors = self.continuity.cursors.clone();
        cursors.extend(self.pools.iter().filter_map(|(subnet, pool)| Some((*subnet, pool.last()?))));
        cursors
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&Attachment, &Entry)> {
        self.entries.iter()
    }

    /// Whether a transaction is under way on this connection.
    pub(super) fn has_open(&self, conn: ConnId) -> bool {
        self.entries.values().any(|entry| match entry.phase {
            Phase::Reserved { conn: owner } | Phase::Aborted { conn: Some(owner), .. } => owner == conn,
            _ => false,
        })
    }

    pub(super) fn get(&self, key: &Attachment) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// Attachments in subnets that new pods do not get, by subnet.
    pub(super) fn stranded(&self) -> Vec<StrandedStatus> {
        let mut pods: BTreeMap<Subnet, usize> = BTreeMap::new();
        let elsewhere = self.entries.values().map(|entry| entry.record.subnet);
        for subnet in elsewhere.filter(|subnet| self.current.is_some_and(|current| current != *subnet)) {
            *pods.entry(subnet).or_default() += 1;
        }
        let status = |(subnet, pods)| StrandedStatus { subnet, pods, owner: None };
        pods.into_iter().map(status).collect()
    }

    /// Used and total addresses of the subnet that new pods get; of all records while there is none.
    pub(super) fn usage(&self) -> (usize, usize) {
        match self.current.and_then(|subnet| self.pools.get(&subnet)) {
            Some(pool) => (pool.used(), pool.capacity() as usize),
            None => (self.blocked().collect::<BTreeSet<_>>().len(), 0),
        }
    }

    fn pick(
        &mut self,
        subnet: Subnet,
        requested: &[IpAddr],
        held: &[Held],
    ) -> Result<Vec<IpAddr>, PoolError> {
        let pool = self.pool(subnet);
        if requested.is_empty() {
            return Ok(vec![pool.take()?]);
        }
        let mut taken: Vec<IpAddr> = Vec::new();
        for address in requested {
            let own = held.iter().any(|held| held.address == *address);
            match if own { pool.check(*address) } else { pool.take_exact(*address) } {
                Ok(()) => taken.push(*address),
                Err(error) => {
                    self.free(taken.into_iter());
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// The pool of a subnet; a new one knows every address that is promised already, under whatever subnet.
    fn pool(&mut self, subnet: Subnet) -> &mut Pool {
        if !self.pools.contains_key(&subnet) {
            let mut pool = Pool::new(subnet, self.continuity.cursors.get(&subnet).copied());
            self.blocked().for_each(|address| pool.block(address));
            self.pools.insert(subnet, pool);
        }
        self.pools.entry(subnet).or_insert_with(|| unreachable!("inserted above"))
    }

    /// Every address that nobody else may have.
    pub(super) fn blocked(&self) -> impl Iterator<Item = IpAddr> {
        let records = self.entries.values().map(|entry| &entry.record);
        let records =
            records.flat_map(|r| r.addresses.iter().copied().chain(r.held.iter().map(|h| h.address)));
        records.chain(self.damaged.values().flat_map(|damaged| damaged.addresses.iter().copied()))
    }

    /// Frees addresses that nobody else holds: an address may be in two records after a foreign hand's edit, or in an
    /// ADD's and its predecessor's.
    fn free(&mut self, addresses: impl Iterator<Item = IpAddr>) {
        for address in addresses {
            if !self.blocked().any(|other| other == address) {
                self.pools.values_mut().for_each(|pool| pool.free(address));
            }
        }
    }

    fn insert(&mut self, entry: Entry) -> Option<Entry> {
        for pool in self.pools.values_mut() {
            entry.record.addresses.iter().for_each(|address| pool.block(*address));
        }
        let key = entry.record.attachment.clone();
        self.names.insert(entry.veth.clone(), key.clone());
        self.entries.insert(key, entry)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReserveRefusal {
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error("the connection of this ADD is closed")]
    Closed,
    #[error(transparent)]
    PortTaken(#[from] PortTaken),
}

fn wiring_over(record: &Record) -> Boottime {
    record.reserved_at.plus(deadline::WIRING)
}

fn held_until(record: &Record) -> Boottime {
    record.held.iter().map(|held| held.until).max().unwrap_or_default()
}

/// What remains blocked when another ADD of the same key replaces this entry.
fn held_after(old: &Entry, now: Boottime) -> Vec<Held> {
    let mut held = old.record.held.clone();
    if let Phase::Aborted { not_before: until, .. } = old.phase {
        held.extend(old.record.addresses.iter().map(|address| Held { address: *address, until }));
    }
    held.retain(|held| held.until > now);
    held
}
