//! Address management: which attachment has which address, from Reserve until nothing of it is left.
//!
//! ADD is a transaction that the agent owns (ARCHITECTURE.md): what a plugin began and did not commit, this
//! module undoes, whoever died in between. `table` decides and does no I/O; `records` keeps it across the death of
//! the agent; `verbs` carries requests out; this file holds them together and does what nobody asks for: orphans,
//! dead attachments, tombstones. State changes under one short lock that is never held across an await.

mod boottime;
mod counters;
mod host_ports;
pub(crate) mod keep;
mod locks;
mod pool;
pub(crate) mod records;
mod request;
mod table;
mod tombstones;
mod verbs;

#[cfg(test)]
mod histories;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use weft_shared::IfName;
use weft_shared::deadline;
use weft_shared::names::{attachment_hash, host_ifname};
use weft_shared::protocol::{Attachment, Bandwidth, Limit};

pub use boottime::Boottime;
pub use records::RecordsError;
pub use table::ConnId;
pub use verbs::verb;

use self::counters::Counters;
use self::locks::NameLocks;
use self::records::{Continuity, Records};
use self::table::{Entry, Phase, Table};
use crate::pods::{Extras, Fabric, OldFlows, PodNeeds, SeenVeth, SeenVeths};
use crate::status::{AttachmentStatus, PodStatus};

/// Reads the time; the agent passes [`Boottime::now`].
pub type Clock = Box<dyn Fn() -> Boottime + Send + Sync>;

#[derive(Debug, Clone)]
pub struct Config {
    pub run_dir: PathBuf,
    /// See [`weft_shared::tombstone::dir_beside`].
    pub tombstones: PathBuf,
    pub boot_id: String,
    /// How long an ADD waits for the node to be ready, and then for an earlier ADD of the same attachment to be over.
    pub patience: Duration,
}

impl Config {
    /// The agent's own, for this boot.
    pub fn new(run_dir: &Path, socket: &Path) -> io::Result<Self> {
        Ok(Self {
            run_dir: run_dir.to_owned(),
            tombstones: weft_shared::tombstone::dir_beside(socket),
            boot_id: weft_shared::tombstone::boot_id()?,
            patience: Duration::from_secs(2),
        })
    }
}

/// What [`Ipam::open`] will publish at once, for whoever must know before: read only, whoever else has the records open.
pub fn recorded_needs(config: &Config, now: Boottime) -> PodNeeds {
    Table::new(records::peek(&config.run_dir, &config.boot_id), now).needs(None)
}

pub struct Ipam<F> {
    config: Config,
    clock: Clock,
    fabric: F,
    state: Mutex<State>,
    locks: NameLocks,
    needs: watch::Sender<PodNeeds>,
    seen: watch::Receiver<SeenVeths>,
    /// Some attachment went on to another phase.
    changed: watch::Sender<()>,
    /// Something is due before [`Ipam::run`] would look.
    wake: Notify,
    /// The tombstones' directory may have been made anew.
    moved: Notify,
    counters: Counters,
    next_conn: AtomicU64,
}

/// Changes together, on disk and in memory.
#[derive(Debug)]
struct State {
    table: Table,
    records: Records,
    /// As it is on disk.
    written: Continuity,
    /// Some record is in memory only, since a foreign hand deleted their directory.
    is_short: bool,
    /// Attachments that were freed because their veth was gone, until a DEL claims them or has had time to.
    unclaimed: BTreeMap<Attachment, Boottime>,
    /// What could not be undone when that was tried last, and why.
    stuck: BTreeMap<Attachment, String>,
}

/// An open connection: the transactions on it end with it. Dropped without [`Connection::closed`] it counts as left by
/// us, and its plugin as possibly alive.
pub struct Connection<F: Fabric> {
    ipam: Arc<Ipam<F>>,
    id: ConnId,
}

/// The longest time between two looks at what may be due; anything known to be due is looked at in time.
const IDLE: Duration = Duration::from_secs(30);
/// A plugin that has waited for the agent in vain deletes the veth itself, and tells or leaves word within this time.
const CLAIM: Duration = deadline::WIRING;
/// What could not be undone is tried again this much later.
const RETRY: Duration = Duration::from_secs(1);

impl<F: Fabric> Ipam<F> {
    /// Takes over the records of this boot and publishes at once what they need of the kernel.
    pub fn open(
        config: Config,
        clock: Clock,
        fabric: F,
        needs: watch::Sender<PodNeeds>,
        seen: watch::Receiver<SeenVeths>,
    ) -> Result<Arc<Self>, RecordsError> {
        let (records, loaded) = Records::open(&config.run_dir, &config.boot_id)?;
        info!(attachments = loaded.records.len(), unreadable = loaded.damaged.len(), "records taken over");
        let written = loaded.continuity.clone();
        let table = Table::new(loaded, clock());
        let ipam = Self {
            config,
            clock,
            fabric,
            state: Mutex::new(State {
                table,
                records,
                written,
                is_short: false,
                unclaimed: BTreeMap::new(),
                stuck: BTreeMap::new(),
            }),
            locks: NameLocks::default(),
            needs,
            seen,
            changed: watch::Sender::new(()),
            wake: Notify::new(),
            moved: Notify::new(),
            counters: Counters::default(),
            next_conn: AtomicU64::new(0),
        };
        ipam.publish(&ipam.state());
        Ok(Arc::new(ipam))
    }

    pub fn connect(self: &Arc<Self>) -> Connection<F> {
        let id = ConnId(self.next_conn.fetch_add(1, Ordering::Relaxed));
        self.state().table.open_connection(id);
        Connection { ipam: self.clone(), id }
    }

    /// Undoes what is due, follows the kernel and the tombstones, until told to stop.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut seen = self.seen.clone();
        let mut tombstones = tombstones::Watch::new(&self.config.tombstones);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Ok(()) = seen.changed() => {}
                () = self.wake.notified() => {}
                () = self.moved.notified() => tombstones.renew(),
                () = tombstones.changed() => {}
                () = tokio::time::sleep(self.until_due()) => tombstones.renew(),
            }
            self.drain_tombstones().await;
            self.tend().await;
        }
    }

    /// One round of what nobody asks for. Cheap when nothing is due.
    pub async fn tend(&self) {
        let now = (self.clock)();
        let seen = self.seen.borrow().clone();
        let (due, suspects, strays) = {
            let mut state = self.state();
            if let Ok(network) = self.fabric.pod_network() {
                state.table.set_network(&network);
            }
            // Or the next start would give a bridge its former MTU for a moment.
            if let Err(error) = state.keep_bridges(now) {
                warn!(%error, "subnet and MTU of the bridges are not recorded");
            }
            state.table.expire_held(now, seen.pass);
            let before = state.unclaimed.len();
            state.unclaimed.retain(|_, until| now < *until);
            let unclaimed = before - state.unclaimed.len();
            self.counters.dead_freed.add(unclaimed as u64);
            let suspects = state.table.observe(&seen, now);
            self.publish(&state);
            (state.table.due(now), suspects, state.table.strays_due(now))
        };
        for key in due {
            if let Err(error) = self.undo(&key).await {
                self.not_undone(&key, error);
            }
        }
        for (key, ifindex) in suspects.attachments {
            self.bury_if_dead(&key, ifindex).await;
        }
        for hash in suspects.damaged {
            self.bury_damaged(&hash).await;
        }
        for veth in strays {
            self.remove_stray(&veth).await;
        }
    }

    pub fn status(&self) -> PodStatus {
        let state = self.state();
        let (addresses_used, addresses_total) = state.table.usage();
        let list: Vec<_> = state.table.entries().map(|(key, entry)| attachment_status(key, entry)).collect();
        PodStatus {
            attachments: list.len(),
            addresses_used,
            addresses_total,
            bridges: self.needs(&state).bridges.into_keys().collect(),
            unknown: state.table.long_unknown(&self.seen.borrow(), (self.clock)()),
            stranded: state.table.stranded(),
            list,
            counters: self.counters.snapshot(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn needs(&self, state: &State) -> PodNeeds {
        state.table.needs(self.fabric.pod_network().ok().map(|network| network.mtu))
    }

    /// Tells the reconciler and whoever waits for an attachment. Called with the lock held, so that the last word is
    /// the last state.
    fn publish(&self, state: &State) {
        let needs = self.needs(state);
        self.needs.send_if_modified(|published| {
            let differs = *published != needs;
            *published = needs;
            differs
        });
        self.changed.send_replace(());
    }

    fn until_due(&self) -> Duration {
        let now = (self.clock)();
        let due = {
            let state = self.state();
            state.table.next_due().into_iter().chain(state.unclaimed.values().copied()).min()
        };
        match due {
            Some(due) if due > now => due.since(now).min(IDLE),
            Some(_) => RETRY,
            None => IDLE,
        }
    }

    /// Deletes the veth of an aborted or unknown attachment, and frees the address if nothing else keeps it. Harmless
    /// when a newer ADD stands there.
    async fn undo(&self, key: &Attachment) -> Result<(), String> {
        let guard = self.locks.lock(&host_ifname(key)).await;
        self.undo_locked(key, &guard).await
    }

    /// The guard is of this attachment's veth name.
    async fn undo_locked(&self, key: &Attachment, _guard: &locks::NameGuard<'_>) -> Result<(), String> {
        // Time and phase are taken before the deletion: only what was due then has had its last one.
        let (due, wired) = {
            let state = self.state();
            if !state.table.may_delete(key) {
                return Ok(());
            }
            let undone = state.table.get(key).and_then(|entry| entry.record.undone);
            let damaged = || state.table.damaged(&attachment_hash(key))?.host_ifindex;
            let wired = undone.or_else(damaged);
            // What is said to be deleted must not be attached again for the next agent.
            if wired.is_some()
                && let Some(entry) = state.table.get(key)
                && let Err(error) = state.records.write(&entry.record)
            {
                warn!(attachment = %key, %error, "record not rewritten");
            }
            (state.table.is_due(key, (self.clock)()), wired)
        };
        // The other end still has the address when somebody has renamed this one.
        self.fabric.delete_veths(&host_ifname(key), wired).await?;
        // The next pod that gets the address must not get this one's callers, nor leave by the node's address.
        if let Some(extras) = self.extras_to_undo(key) {
            self.fabric.ensure(extras).await?;
        }
        let hash = attachment_hash(key);
        let mut state = self.state();
        let damaged = state.table.remove_damaged(&hash);
        if due || damaged {
            // A file that stays behind blocks its address at the next start, until that finds the veth gone.
            if let Err(error) = state.remove_record(&hash, (self.clock)()) {
                warn!(attachment = %key, %error, "records not brought up to date");
            }
        }
        if due {
            state.table.remove(key);
            state.stuck.remove(key);
            debug!(attachment = %key, "freed");
        }
        self.publish(&state);
        Ok(())
    }

    /// It is tried again and again; the log hears of each reason once.
    fn not_undone(&self, key: &Attachment, error: String) {
        let mut state = self.state();
        if state.stuck.get(key) != Some(&error) {
            warn!(attachment = %key, %error, "not undone yet");
            // Of one that is not in the table nothing is tried again.
            if state.table.get(key).is_some() {
                state.stuck.insert(key.clone(), error);
            }
        }
    }

    /// What is asked for next follows from what is published.
    fn extras_to_undo(&self, key: &Attachment) -> Option<Extras> {
        let state = self.state();
        let record = &state.table.get(key)?.record;
        let host_ports = (!record.host_ports.is_empty()).then_some(OldFlows::MayLag);
        let extras = Extras { host_ports, masquerade: record.bridge.masquerade, forced: None };
        (extras != Extras::default()).then(|| {
            self.publish(&state);
            extras
        })
    }

    /// An attachment is dead when its veth is gone from the kernel; a look that missed it is only the reason to ask.
    async fn bury_if_dead(&self, key: &Attachment, ifindex: u32) {
        match self.fabric.link_exists(ifindex).await {
            Ok(true) => debug!(attachment = %key, ifindex, "veth without our mark or name"),
            Ok(false) => {
                let buried = {
                    let mut state = self.state();
                    // Meanwhile it may be another ADD's.
                    let same = state.table.get(key).is_some_and(|entry| {
                        entry.is_committed()
                            && entry.record.committed.is_some_and(|wired| wired.host_ifindex == ifindex)
                    });
                    let buried = same && state.table.abort(key, None);
                    if buried {
                        state.unclaimed.insert(key.clone(), (self.clock)().plus(CLAIM));
                    }
                    buried
                };
                if buried {
                    info!(attachment = %key, ifindex, "veth is gone, attachment freed");
                    if let Err(error) = self.undo(key).await {
                        self.not_undone(key, error);
                    }
                }
            }
            Err(error) => warn!(attachment = %key, ifindex, %error, "cannot tell whether its veth is alive"),
        }
    }

    /// Its veth was not seen with our marks; one that has lost them still has its index.
    async fn bury_damaged(&self, hash: &str) {
        let host_ifindex = self.state().table.damaged(hash).and_then(|damaged| damaged.host_ifindex);
        if let Some(ifindex) = host_ifindex {
            match self.fabric.link_exists(ifindex).await {
                Ok(false) => {}
                Ok(true) => {
                    return debug!(hash, ifindex, "an unreadable record's veth has lost name or mark");
                }
                Err(error) => return warn!(hash, ifindex, %error, "cannot tell whether its veth is alive"),
            }
        }
        let mut state = self.state();
        if state.table.remove_damaged(hash) {
            info!(hash, "veth of an unreadable record is gone, addresses freed");
            if let Err(error) = state.remove_record(hash, (self.clock)()) {
                warn!(hash, %error, "records not brought up to date");
            }
        }
    }

    async fn remove_stray(&self, veth: &SeenVeth) {
        let _guard = self.locks.lock(&veth.name).await;
        let owned = self.state().table.owns(&veth.name);
        if owned {
            self.state().table.forget_stray(veth);
            return;
        }
        match self.fabric.delete_by_index(veth.ifindex).await {
            Ok(()) => {
                warn!(veth = %veth.name, "deleted: our mark, no record; a pod that had it is cut off");
                self.counters.orphans_removed.inc();
                self.state().table.forget_stray(veth);
            }
            Err(error) => warn!(veth = %veth.name, %error, "veth without a record not deleted yet"),
        }
    }

    fn hang_up(&self, conn: ConnId, by_peer: bool) -> Vec<Attachment> {
        let mut state = self.state();
        let undone = state.table.hang_up(conn, by_peer);
        if !undone.is_empty() {
            self.publish(&state);
        }
        undone
    }
}

impl State {
    fn write_continuity(&mut self, now: Boottime) -> io::Result<()> {
        let continuity = self.table.continuity(now);
        self.records.write_continuity(&continuity)?;
        self.written = continuity;
        Ok(())
    }

    /// If what the bridges are has changed.
    fn keep_bridges(&mut self, now: Boottime) -> io::Result<()> {
        if *self.table.bridges() == self.written.bridges { Ok(()) } else { self.write_continuity(now) }
    }

    /// Where round robin stands must be known without this record.
    fn remove_record(&mut self, hash: &str, now: Boottime) -> io::Result<()> {
        let unknown = self.table.cursors() != self.written.cursors && self.write_continuity(now).is_err();
        self.records.remove(hash)?;
        // That has made room, where there was none.
        if unknown { self.write_continuity(now) } else { Ok(()) }
    }
}

impl<F: Fabric> Connection<F> {
    pub fn id(&self) -> ConnId {
        self.id
    }

    /// Whether an ADD has been begun on it and is neither committed nor undone.
    pub fn is_open(&self) -> bool {
        self.ipam.state().table.has_open(self.id)
    }

    /// The connection is over; `by_peer` when the other side closed it, which proves that it does no more.
    pub async fn closed(self, by_peer: bool) {
        for key in self.ipam.hang_up(self.id, by_peer) {
            self.ipam.counters.rolled_back.inc();
            info!(attachment = %key, by_peer, "connection closed before Commit, undoing");
            if let Err(error) = self.ipam.undo(&key).await {
                self.ipam.not_undone(&key, error);
            }
        }
        self.ipam.wake.notify_one();
    }
}

impl<F: Fabric> Drop for Connection<F> {
    fn drop(&mut self) {
        if !self.ipam.hang_up(self.id, false).is_empty() {
            self.ipam.wake.notify_one();
        }
    }
}

/// Why nothing can be added while these veths live; `None` when there are none.
pub fn addresses_unknown(veths: &[IfName]) -> Option<String> {
    let names: Vec<&str> = veths.iter().map(IfName::as_str).collect();
    (!names.is_empty()).then(|| {
        format!(
            "the end of {}: no record tells its pod's address (without any record it is deleted within {} s; with a \
             damaged one, delete the pod)",
            names.join(", "),
            deadline::WIRING.as_secs(),
        )
    })
}

fn attachment_status(key: &Attachment, entry: &Entry) -> AttachmentStatus {
    let state = match entry.phase {
        Phase::Reserved { .. } => "reserved",
        Phase::Committed { .. } => "committed",
        Phase::Aborted { .. } => "aborted",
    };
    AttachmentStatus {
        network: key.network.to_string(),
        container_id: key.container_id.to_string(),
        ifname: key.ifname.clone(),
        pod: entry.record.pod.clone(),
        addresses: entry.record.addresses.clone(),
        host_veth: host_ifname(key),
        bridge: entry.record.bridge.name.clone(),
        state: state.into(),
        host_ports: host_ports_status(entry),
        limits: limits_status(&entry.record.bandwidth),
    }
}

fn host_ports_status(entry: &Entry) -> Vec<String> {
    entry.record.host_ports.iter().map(|port| format!("{port} -> {}", port.container_port)).collect()
}

/// As the pod sees it.
fn limits_status(bandwidth: &Bandwidth) -> Vec<String> {
    let limit =
        |way: &str, limit: Option<Limit>| Some(format!("{way} {}", bits(limit?.rate.saturating_mul(8))));
    limit("in", bandwidth.ingress).into_iter().chain(limit("out", bandwidth.egress)).collect()
}

/// In the largest unit that needs no rounding.
fn bits(rate: u64) -> String {
    let units = [(1_000_000_000, "Gbit/s"), (1_000_000, "Mbit/s"), (1000, "kbit/s"), (1, "bit/s")];
    let (size, unit) = units.into_iter().find(|(size, _)| rate.is_multiple_of(*size)).unwrap_or((1, "bit/s"));
    format!("{} {unit}", rate / size)
}

impl<F> fmt::Debug for Ipam<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ipam")
            .field("config", &self.config)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl<F: Fabric> fmt::Debug for Connection<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").field(&self.id).finish()
    }
}
