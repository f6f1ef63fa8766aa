//! The one loop that makes the kernel as it should be.
//!
//! Level-triggered: whatever happens only says "look again". A pass takes the latest inputs, computes what should be,
//! looks at what is, plans the difference, applies it and looks once more. What fails stays pending and is tried again
//! with backoff. The loop has a thread of its own, since netlink calls block; everybody else talks to [`Handle`].

pub mod observe;
pub mod plan;

mod pass;
mod pods;
mod restless;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::warn;
use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::netconf::NetworkConfig;
use weft_shared::{IfName, Mac, Subnet};

use crate::dataplane::Backend;
use crate::firewall::{self, advice::Advice, enforcers::Enforcers};
use crate::kernel::{Kernel, KernelError};
use crate::object::Key;
use crate::pods::{DeviceFacts, PodNeeds, SeenVeths};
use crate::underlay::Underlay;

pub use pass::Memory;
use pass::Outcome;
pub(crate) use pods::is_limit_of;

/// Announcements come in bursts: this long after the first a pass begins, unless somebody waits for it.
const SETTLE: Duration = Duration::from_millis(5);
/// While pods come and go, every one of them is announced, and a look at all of them again and again would take the
/// processor and the kernel's RTNL lock from the next one's ADD. So a pass that only announcements ask for comes after a
/// rest this many times as long as the last pass, and no longer than [`MAX_REST`].
const REST: u32 = 4;
const MAX_REST: Duration = Duration::from_millis(100);
/// A sweep reads three objects of every peer. With more peers than this it comes that much more rarely, so that it never
/// takes more of a processor than among so many. What the kernel announces is repaired at once all the same; without its
/// announcements (`--netlink-monitor=false`, or a monitor that ended) repair takes that much longer.
const SWEPT_PEERS: usize = 1000;
/// A node that has not seen its kernel for so long says so.
const BLIND: Duration = Duration::from_secs(10);

/// Everything a pass depends on, besides the kernel. Replaced by whoever knows better, read whole by the next pass.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// `None` until configuration, underlay and lease are known: nothing is touched before.
    pub node: Option<NodeInputs>,
    pub peers: Vec<Lease>,
    /// The first full snapshot is in: what nobody wants may now be removed.
    pub has_snapshot: bool,
    pub pods: PodNeeds,
    /// `pods` is what the records say. Before they are read nobody knows whether there are any.
    pub pods_recorded: bool,
    pub firewall: firewall::Settings,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInputs {
    pub config: NetworkConfig,
    pub backend: Backend,
    /// Which a VXLAN device bears that an earlier backend of this node left.
    pub vtep_mac: Mac,
    pub lease: LeaseKey,
    /// As chosen last; index and MTU are looked up anew in every pass.
    pub underlay: Underlay,
    /// Nothing durable was found: a flanneld may have run here before.
    pub first_start: bool,
}

/// What became of the last pass.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub passes: u64,
    /// The latest request that this pass answers ([`Handle::pass`]).
    generation: u64,
    /// When the kernel was last seen.
    pub at: Option<Instant>,
    /// Why the last pass could not be made; everything else here is then of the last one that was.
    pub aborted: Option<Aborted>,
    /// Objects that should be in the kernel, and are.
    pub objects: usize,
    pub pending: Vec<Pending>,
    /// Things found wrong that nobody had asked to change.
    pub repairs: u64,
    /// Own device, address and settings are in place: pods can be served.
    pub usable: bool,
    /// The usable pass knew every peer.
    pub after_snapshot: bool,
    pub peers: BTreeMap<LeaseKey, PeerReport>,
    /// Every device of ours that is as it should be.
    pub devices: BTreeMap<IfName, DeviceFacts>,
    pub veths: SeenVeths,
    pub underlay: Option<Underlay>,
    /// Why nothing can leave by it.
    pub underlay_problem: Option<String>,
    /// Its interface or its address is gone: another may have to be chosen.
    pub underlay_lost: bool,
    /// What stands in packets' way and is not ours to change.
    pub advice: Vec<Advice>,
    /// Who enforces NetworkPolicies here.
    pub enforcers: Enforcers,
    /// Gateways that each bridge carries.
    pub gateways: BTreeMap<IfName, Vec<Subnet>>,
}

impl Report {
    /// This look, counted on from the last report.
    fn after(self, last: &Report) -> Self {
        let veths = SeenVeths { pass: last.veths.pass + 1, ..self.veths };
        let (passes, repairs) = (last.passes + 1, last.repairs + self.repairs);
        Self { passes, repairs, veths, at: Some(Instant::now()), ..self }
    }

    /// What keeps the node from serving, if passes cannot be made: after a while only, for looks fail for a moment
    /// while many pods come and go.
    pub fn blind(&self) -> Option<&Aborted> {
        let patient = self.at.is_some_and(|at| at.elapsed() < BLIND);
        self.aborted.as_ref().filter(|_| !patient)
    }
}

/// Why a pass could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Aborted {
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// An object that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub key: Key,
    pub error: KernelError,
    /// Passes that have tried.
    pub attempts: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerReport {
    /// Why the dataplane has no use for it.
    pub refused: Option<String>,
    /// What of it is not in the kernel.
    pub missing: Option<String>,
}

impl PeerReport {
    pub fn problem(&self) -> Option<&str> {
        self.refused.as_deref().or(self.missing.as_deref())
    }
}

/// The loop, from outside.
#[derive(Debug, Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    reports: watch::Receiver<Report>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Grows with every change of the inputs.
    revision: watch::Sender<u64>,
    woken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    inputs: Inputs,
    requested: u64,
    dirty: bool,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the loop once, however often it is told before it looks.
    fn look_again(&self, state: &mut State) {
        if !mem::replace(&mut state.dirty, true) {
            self.woken.notify_one();
        }
    }
}

impl Handle {
    /// Starts the loop; `resync` is the longest time between two passes, but among very many peers.
    pub fn start(
        kernel: impl Kernel + Send + 'static,
        inputs: Inputs,
        resync: Duration,
    ) -> std::io::Result<Self> {
        let (publish, reports) = watch::channel(Report::default());
        let state = Mutex::new(State { inputs, ..State::default() });
        let shared = Arc::new(Shared { state, ..Shared::default() });
        let handle = Self { shared: shared.clone(), reports };
        thread::Builder::new()
            .name("reconcile".into())
            .spawn(move || run(kernel, &shared, &publish, resync))?;
        Ok(handle)
    }

    /// Changes the inputs and, if `change` says that anything did, asks for a pass.
    pub fn update_if(&self, change: impl FnOnce(&mut Inputs) -> bool) {
        let mut state = self.shared.lock();
        if change(&mut state.inputs) {
            self.shared.revision.send_modify(|revision| *revision += 1);
            self.shared.look_again(&mut state);
        }
    }

    /// As the next pass will find them.
    pub fn inputs(&self) -> Inputs {
        self.shared.lock().inputs.clone()
    }

    /// Fires after every change of the inputs.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.shared.revision.subscribe()
    }

    /// Something may have changed in the kernel.
    pub fn wake(&self) {
        self.shared.look_again(&mut self.shared.lock());
    }

    /// Waits for a pass that begins after this call, and returns its report.
    pub async fn pass(&self) -> Report {
        let wanted = {
            let mut state = self.shared.lock();
            state.requested += 1;
            state.dirty = true;
            state.requested
        };
        self.shared.woken.notify_one();
        let mut reports = self.reports.clone();
        match reports.wait_for(|report| report.generation >= wanted).await {
            Ok(report) => report.clone(),
            Err(_) => Report::default(),
        }
    }

    pub fn reports(&self) -> watch::Receiver<Report> {
        self.reports.clone()
    }

    /// Ends the loop after the pass under way. The kernel stays as it is.
    pub fn stop(&self) {
        self.shared.lock().stop = true;
        self.shared.woken.notify_one();
    }
}

fn run(mut kernel: impl Kernel, shared: &Shared, publish: &watch::Sender<Report>, resync: Duration) {
    let mut memory = Memory::default();
    let mut due = Instant::now();
    let mut rested = due;
    let mut answered = 0;
    loop {
        let (inputs, revision, generation) = {
            let mut state = shared.lock();
            while !state.dirty && !state.stop {
                let left = due.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = shared.woken.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            let begin = rested.max(Instant::now() + SETTLE);
            while state.requested == answered && !state.stop {
                let left = begin.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = shared.woken.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            if state.stop {
                return;
            }
            state.dirty = false;
            (state.inputs.clone(), *shared.revision.borrow(), state.requested)
        };
        let begun = Instant::now();
        let last = publish.borrow().clone();
        let mut report = match pass::pass(&mut kernel, &mut memory, &inputs, revision, Instant::now()) {
            Ok(Outcome::Node(look)) => look.after(&last),
            // The rest was not looked at, which is not the same as seeing that nothing is there: the last look stands.
            Ok(Outcome::HostPorts(pending)) => Report { pending, aborted: None, ..last.clone() },
            Err(aborted) => Report { aborted: Some(aborted), ..last.clone() },
        };
        report.generation = generation;
        answered = generation;
        rested = Instant::now() + (begun.elapsed() * REST).min(MAX_REST);
        complain(&last, &report);
        // Who saw nothing looks again as soon as ever.
        let peers = if report.aborted.is_some() { 0 } else { inputs.peers.len() };
        due = next_pass(&memory, sweep_period(resync, peers));
        publish.send_replace(report);
    }
}

fn sweep_period(resync: Duration, peers: usize) -> Duration {
    resync.mul_f64((peers as f64 / SWEPT_PEERS as f64).max(1.0))
}

/// The sweep, or sooner when something that failed is due.
fn next_pass(memory: &Memory, period: Duration) -> Instant {
    // A tenth of jitter, from the only thing that differs between nodes and passes: the clock.
    let jitter =
        f64::from(std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.subsec_micros() % 1000)) / 10_000.0;
    let sweep = Instant::now() + period.mul_f64(1.0 - jitter);
    memory.retry_at().map_or(sweep, |retry| retry.min(sweep))
}

/// Says a trouble once, when it has come twice: a device that goes while it is being looked at is no trouble.
fn complain(last: &Report, report: &Report) {
    if let Some(error) = report.aborted.as_ref().filter(|_| last.aborted != report.aborted) {
        warn!(%error, "the kernel could not be looked at; will be tried again");
    }
    if let Some(problem) =
        report.underlay_problem.as_ref().filter(|_| last.underlay_problem != report.underlay_problem)
    {
        warn!(%problem, "the underlay is broken");
    }
    for pending in &report.pending {
        let news = !last.pending.iter().any(|p| p.key == pending.key && p.attempts == pending.attempts);
        if pending.attempts == 2 && news {
            warn!(object = %pending.key, error = %pending.error, "kernel object is not as it should be; will be tried again");
        }
    }
    for (key, peer) in &report.peers {
        if let Some(problem) = peer.refused.as_ref().filter(|_| last.peers.get(key) != Some(peer)) {
            warn!(peer = %key, %problem, "peer cannot be served");
        }
    }
}
