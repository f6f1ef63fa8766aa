//! What the plugin asks for, carried out. Order within a verb: disk before kernel before answer, so that whatever is
//! cut off in between leaves a record to be undone.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, info, warn};
use weft_shared::cni::{Code, NetworkName};
use weft_shared::deadline;
use weft_shared::names::host_ifname;
use weft_shared::protocol::{
    Attachment, Commit, Failure, PodAddress, PortMapping, Protocol, Reply, Request, Reservation, Reserve,
};

use super::locks::NameGuard;
use super::pool::PoolError;
use super::table::{CommitRefusal, ConnId, ReserveRefusal, Standing};
use super::{Ipam, addresses_unknown, request};
use crate::pods::{Extras, Fabric, NotReady, OldFlows, PodNetwork};

/// Readiness is put together from several places, none of which announces it.
const READY_EVERY: Duration = Duration::from_millis(10);

impl<F: Fabric> Ipam<F> {
    pub async fn handle(&self, conn: ConnId, request: Request) -> Reply {
        let verb = verb(&request);
        let done = match request {
            Request::Reserve(reserve) => self.reserve(conn, reserve).await.map(Reply::Reserved),
            Request::Commit(commit) => self.commit(conn, commit).await.map(|()| Reply::Done),
            Request::Release { attachment } => self.release(&attachment).await.map(|()| Reply::Done),
            Request::Check { attachment, addresses } => {
                self.check(&attachment, &addresses).map(|()| Reply::Done)
            }
            Request::Gc { network, valid } => self.gc(&network, &valid).await.map(|()| Reply::Done),
            Request::Status => self.can_add().await.map(|()| Reply::Done),
        };
        done.unwrap_or_else(|failure| {
            self.count_failure(verb, failure.code);
            match verb {
                // A runtime asks every few seconds.
                "status" => debug!(verb, %failure, "refused"),
                _ => info!(verb, %failure, "refused"),
            }
            Reply::Failed(failure)
        })
    }

    /// A request failed before it came here, or was given up.
    pub fn count_failure(&self, verb: &'static str, code: u32) {
        self.counters.failed(verb, code);
    }

    /// ADD, first half.
    pub async fn reserve(&self, conn: ConnId, reserve: Reserve) -> Result<Reservation, Failure> {
        request::check_reserve(&reserve)?;
        let network = self.ready_network(self.config.patience).await;
        let network = network.map_err(|e| try_again("no pod can be added yet", e.to_string()))?;
        let mtu = request::mtu(&reserve, &network)?;
        request::check_ports(&reserve, &network)?;
        request::check_bandwidth(&reserve, mtu)?;
        self.fabric.may_be_bridge(&reserve.bridge.name).await?;
        let key = &reserve.attachment;
        self.every_address_known(Some(key), self.config.patience)
            .await
            .map_err(|e| try_again("no pod can be added yet", e))?;
        self.bury_dead_holders(&reserve).await;
        let guard = self.claim(key).await?;
        let record = {
            let mut state = self.state();
            let record =
                state.table.reserve(conn, &reserve, &network, mtu, (self.clock)()).map_err(refused)?;
            let written = state.records.write(&record).and_then(|()| state.keep_bridges((self.clock)()));
            if written.is_err() {
                state.table.give_up(key);
            }
            // What cannot be undone of this one is news.
            state.stuck.remove(key);
            self.publish(&state);
            written.map(|()| record).map_err(unwritten)
        };
        let wired = match record {
            Ok(record) => self.offer(conn, &reserve, &network, mtu, &record.addresses).await,
            Err(failure) => Err(failure),
        };
        if wired.is_err() {
            // Whoever is told so wires nothing. After a DEL the entry waits for the connection's end.
            self.give_up(conn, key);
            if let Err(error) = self.undo_locked(key, &guard).await {
                warn!(attachment = %key, %error, "failed ADD not undone yet");
                self.wake.notify_one();
            }
        }
        wired
    }

    /// ADD, second half. A pod that is to be limited is so when its plugin is told, or there is none.
    pub async fn commit(&self, conn: ConnId, commit: Commit) -> Result<(), Failure> {
        let key = commit.attachment.clone();
        if self.record_commit(conn, commit)? {
            let unlimited = self.fabric.ensure_limits(&host_ifname(&key)).await.err();
            if let Some(error) = unlimited {
                if let Err(left) = self.release(&key).await {
                    warn!(attachment = %key, %left, "failed ADD not undone yet");
                    self.wake.notify_one();
                }
                return Err(try_again("the pod's bandwidth is not limited yet", error));
            }
        }
        self.counters.adds.inc();
        Ok(())
    }

    /// Whether the attachment has limits.
    fn record_commit(&self, conn: ConnId, commit: Commit) -> Result<bool, Failure> {
        if commit.host_ifindex == 0 {
            return Err(request::invalid(
                "host_ifindex = 0: expected the index of the host-side veth".into(),
            ));
        }
        let mut state = self.state();
        let record = state.table.committable(conn, &commit).map_err(|refusal| {
            let code = match refusal {
                CommitRefusal::NotReserved => Code::NotReserved,
                CommitRefusal::Aborted => Code::TryAgainLater,
            };
            failure(code, "ADD cannot be completed", format!("{}: {refusal}", shown(&commit.attachment)))
        })?;
        state.records.write(&record).map_err(unwritten)?;
        info!(attachment = %commit.attachment, addresses = %listed(&record.addresses), ifindex = commit.host_ifindex, "added");
        let (last_look, is_limited) = (self.seen.borrow().pass, !record.bandwidth.is_unlimited());
        state.table.commit(record, last_look);
        self.publish(&state);
        Ok(is_limited)
    }

    /// DEL. Done when nothing is left, also when there never was anything.
    pub async fn release(&self, key: &Attachment) -> Result<(), Failure> {
        let known = {
            let mut state = self.state();
            let known = state.table.abort(key, None);
            state.unclaimed.remove(key);
            self.publish(&state);
            known
        };
        self.undo(key).await.map_err(|error| try_again("DEL is not complete", error))?;
        if known {
            info!(attachment = %key, "deleted");
        }
        self.counters.dels.inc();
        Ok(())
    }

    /// CHECK.
    pub fn check(&self, key: &Attachment, addresses: &[IpAddr]) -> Result<(), Failure> {
        let not_held =
            |details: String| Err(failure(Code::NotAsAdded, "the agent holds no such attachment", details));
        let state = self.state();
        let Some(entry) = state.table.get(key).filter(|e| e.is_committed()) else {
            return not_held(shown(key));
        };
        let held = &entry.record.addresses;
        match addresses.iter().find(|address| !held.contains(address)) {
            Some(address) => not_held(format!("{} has {held:?}, not {address}", shown(key))),
            None => Ok(()),
        }
    }

    /// GC: goes on after an error and names all of them at the end.
    pub async fn gc(&self, network: &NetworkName, valid: &[Attachment]) -> Result<(), Failure> {
        let stale: Vec<Attachment> = {
            let state = self.state();
            let committed = state.table.entries().filter(|(_, e)| e.is_committed());
            committed
                .map(|(key, _)| key)
                .filter(|k| k.network == *network && !valid.contains(k))
                .cloned()
                .collect()
        };
        let mut errors = Vec::new();
        for key in &stale {
            match self.release(key).await {
                Ok(()) => info!(attachment = %key, "not among the runtime's attachments, removed"),
                Err(failure) => errors.push(format!("{}: {failure}", shown(key))),
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(try_again("GC is not complete", errors.join("; "))) }
    }

    /// STATUS: would an ADD succeed now?
    pub async fn can_add(&self) -> Result<(), Failure> {
        let unavailable = |code, details| failure(code, "no pod can be added now", details);
        let network = self.ready_network(self.config.patience.min(deadline::STATUS_READY)).await;
        let network = network.map_err(|reason| match reason {
            NotReady::Waiting(_) => unavailable(Code::NotAvailable, reason.to_string()),
            NotReady::Degraded(_) => unavailable(Code::NotAvailableAndDegraded, reason.to_string()),
        })?;
        let recorded = self.every_address_known(None, Duration::ZERO).await;
        recorded.map_err(|strays| unavailable(Code::NotAvailable, strays))?;
        let mut state = self.state();
        state.table.set_network(&network);
        // As an ADD would: a full or read-only run directory shows in nothing else.
        let written = state.write_continuity((self.clock)());
        written.map_err(|e| {
            unavailable(Code::NotAvailable, format!("the agent cannot write its records: {e}"))
        })?;
        match state.table.usage() {
            (used, total) if used < total => Ok(()),
            (_, total) => {
                let full = PoolError::Exhausted { subnet: network.subnet, capacity: total as u32 };
                Err(unavailable(Code::NotAvailable, full.to_string()))
            }
        }
    }

    /// An agent that has just started listens before it has its lease again: no runtime tries a failed ADD again by
    /// itself, and a node is NotReady after one failed STATUS.
    async fn ready_network(&self, patience: Duration) -> Result<PodNetwork, NotReady> {
        let give_up = Instant::now() + patience;
        loop {
            match self.fabric.pod_network() {
                Err(NotReady::Waiting(_)) if Instant::now() < give_up => sleep(READY_EVERY).await,
                other => return other,
            }
        }
    }

    /// Records can be lost (`/run` emptied by a foreign hand) while pods live. Their veths go in the sweep; until then
    /// nobody knows their addresses, and any address that is handed out may be one of them. `added` is about to replace
    /// its own.
    async fn every_address_known(
        &self,
        added: Option<&Attachment>,
        patience: Duration,
    ) -> Result<(), String> {
        let mut looks = self.seen.clone();
        let _ = timeout(patience, looks.wait_for(|seen| seen.pass > 0)).await;
        let seen = looks.borrow().clone();
        if seen.pass == 0 {
            return Err("waiting for the first look at the kernel".into());
        }
        let replaced = added.map(host_ifname);
        let unknown = self.state().table.unknown(&seen).into_iter();
        let mut living = Vec::new();
        for veth in unknown.filter(|veth| replaced.as_ref() != Some(&veth.name)) {
            // Most belonged to a pod that was deleted after the look.
            if self.fabric.link_exists(veth.ifindex).await? {
                living.push(veth.name);
            }
        }
        addresses_unknown(&living).map_or(Ok(()), Err)
    }

    /// The bridge made real, and everything the plugin needs to wire.
    async fn offer(
        &self,
        conn: ConnId,
        reserve: &Reserve,
        network: &PodNetwork,
        mtu: u32,
        addresses: &[IpAddr],
    ) -> Result<Reservation, Failure> {
        let bridge = self.fabric.ensure_bridge(&reserve.bridge.name).await?;
        {
            let mut state = self.state();
            if !state.table.is_reserved(conn, &reserve.attachment) {
                return Err(try_again(
                    "ADD was interrupted",
                    format!("{} was deleted while it was being added", shown(&reserve.attachment)),
                ));
            }
            let differs = state.table.keep_bridge(&reserve.bridge.name, bridge.mac, network);
            state.keep_bridges((self.clock)()).map_err(unwritten)?;
            if differs {
                self.publish(&state);
            }
        }
        let is_udp = |port: &PortMapping| port.protocol == Protocol::Udp;
        let old_flows =
            if reserve.host_ports.iter().any(is_udp) { OldFlows::MustFollow } else { OldFlows::MayLag };
        let extras = Extras {
            host_ports: (!reserve.host_ports.is_empty()).then_some(old_flows),
            masquerade: reserve.bridge.masquerade,
            forced: reserve.bridge.force_address.then(|| reserve.bridge.name.clone()),
        };
        if extras != Extras::default() {
            let lacks = |error| try_again("host ports, ipMasq or forceAddress are not in place yet", error);
            self.fabric.ensure(extras).await.map_err(lacks)?;
        }
        let subnet = network.subnet;
        let addresses = addresses.iter().filter_map(|address| {
            Some(PodAddress { address: subnet.with_len(*address)?, gateway: subnet.gateway() })
        });
        Ok(Reservation {
            addresses: addresses.collect(),
            overlay: network.overlay.clone(),
            mtu,
            bridge: reserve.bridge.name.clone(),
            bridge_ifindex: bridge.ifindex,
            bridge_mac: bridge.mac,
            host_ifname: host_ifname(&reserve.attachment),
            host_ports: reserve.host_ports.clone(),
            bandwidth: reserve.bandwidth,
            options: Some(reserve.bridge.clone()),
        })
    }

    /// A pod that nobody has deleted and that is gone does not keep its ports from the one that takes its place. No
    /// name is locked here: two that wait for each other's would wait for ever.
    async fn bury_dead_holders(&self, reserve: &Reserve) {
        let holders = self.state().table.committed_holders(reserve);
        for (key, ifindex) in holders {
            self.bury_if_dead(&key, ifindex).await;
        }
    }

    fn give_up(&self, conn: ConnId, key: &Attachment) {
        let mut state = self.state();
        if state.table.is_reserved(conn, key) {
            state.table.give_up(key);
            self.publish(&state);
        }
    }

    /// Waits until nothing of an earlier ADD stands in the way, and clears what such a one left behind. The guard keeps
    /// it so until the reservation is recorded and answered.
    async fn claim(&self, key: &Attachment) -> Result<NameGuard<'_>, Failure> {
        let patience = Instant::now() + self.config.patience;
        let name = host_ifname(key);
        let unsettled = |error| try_again("an earlier ADD cannot be undone yet", error);
        loop {
            // Subscribed before looking: no change can be missed.
            let mut changed = self.changed.subscribe();
            let guard = self.locks.lock(&name).await;
            self.consume_tombstone(key, &guard).await.map_err(unsettled)?;
            let standing = self.state().table.standing(key, (self.clock)());
            match standing {
                Standing::Free => {
                    let entry = self.state().table.get(key).map(|entry| entry.record.undone);
                    // Without a record nobody has made a veth of this name since the last look, and asking costs an ADD
                    // two changes of thread.
                    if entry.is_some() || self.seen.borrow().veths.iter().any(|veth| veth.name == name) {
                        self.fabric.delete_veths(&name, entry.flatten()).await.map_err(unsettled)?;
                    }
                    return Ok(guard);
                }
                Standing::Undone => self.undo_locked(key, &guard).await.map_err(unsettled)?,
                Standing::InFlight => {
                    drop(guard);
                    if timeout_at(patience, changed.changed()).await.is_err() {
                        let details = format!("another ADD of {} has not ended", shown(key));
                        return Err(try_again("ADD is under way", details));
                    }
                }
                Standing::Attached { ifindex } => {
                    if self.fabric.link_exists(ifindex).await.map_err(unsettled)? {
                        let details = format!("{} by veth {name}, index {ifindex}", shown(key));
                        return Err(failure(Code::NameTaken, "already attached", details));
                    }
                    self.state().table.abort(key, None);
                    self.counters.dead_freed.inc();
                    self.undo_locked(key, &guard).await.map_err(unsettled)?;
                }
                Standing::NameTaken(other) => {
                    let details =
                        format!("{} needs veth {name}, which is that of {}", shown(key), shown(&other));
                    return Err(failure(Code::NameTaken, "veth name is taken", details));
                }
                Standing::Damaged => {
                    let details =
                        format!("{}: its record cannot be read; delete it first (veth {name})", shown(key));
                    return Err(failure(Code::NameTaken, "already attached", details));
                }
            }
        }
    }
}

/// As logs show them.
pub(super) fn listed(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}

/// As metrics and logs call it.
pub fn verb(request: &Request) -> &'static str {
    match request {
        Request::Reserve(_) => "reserve",
        Request::Commit(_) => "commit",
        Request::Release { .. } => "release",
        Request::Check { .. } => "check",
        Request::Gc { .. } => "gc",
        Request::Status => "status",
    }
}

fn failure(code: Code, msg: &str, details: String) -> Failure {
    Failure::new(code, msg).with_details(details)
}

fn try_again(msg: &str, details: String) -> Failure {
    failure(Code::TryAgainLater, msg, details)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape of map_err")]
fn unwritten(error: io::Error) -> Failure {
    failure(Code::Io, "the agent cannot write its records", error.to_string())
}

fn refused(refusal: ReserveRefusal) -> Failure {
    match refusal {
        ReserveRefusal::Closed => try_again("ADD was interrupted", refusal.to_string()),
        ReserveRefusal::PortTaken(_) => {
            failure(Code::HostPortTaken, "a port of the host is taken", refusal.to_string())
        }
        ReserveRefusal::Pool(error) => {
            let code = match error {
                PoolError::Exhausted { .. } => Code::PoolExhausted,
                PoolError::Taken { .. } => Code::AddressInUse,
                PoolError::Outside { .. } | PoolError::NotForPods { .. } => Code::BadConfiguration,
            };
            failure(code, "no address for the pod", error.to_string())
        }
    }
}

fn shown(key: &Attachment) -> String {
    format!("interface {} of container {} in network {}", key.ifname, key.container_id, key.network)
}
