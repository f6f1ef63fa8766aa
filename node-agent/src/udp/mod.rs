//! The packet path of the udp backend: TUN device to UDP socket and back, on threads of its own.
//!
//! ```text
//! flannel0 --read--> egress:  parse, TTL, peer of the destination, segment --sendmmsg/UDP_SEGMENT--> peers
//! flannel0 <-write-- ingress: split, parse, source checks, coalesce      <--recvmmsg/UDP_GRO------- peers
//! ```
//! On the wire one IPv4 packet per datagram and nothing else (flannel pkg/backend/udp). Peers are read through a
//! lock-free snapshot that is replaced whole; nothing is locked, allocated or logged per packet, and every drop is
//! counted with its reason.
//!
//! Memory is taken at the start and does not grow: 0.6 MiB to read the device into, 4.2 MiB of receive buffers of which
//! only what datagrams fill is ever touched, 0.2 MiB for the rest; in the kernel at most what the socket's two buffers
//! hold (`socket`) and the device's queue.

mod again;
pub mod checksum;
pub mod coalesce;
pub mod counters;
mod egress;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod icmp;
mod inbox;
mod ingress;
mod interrupt;
pub mod layout;
mod link;
pub mod offload;
mod outbox;
mod pace;
pub mod packet;
pub mod peers;
#[cfg(any(test, fuzzing))]
pub mod reference;
pub mod segment;
mod socket;
mod threads;
mod told;
pub mod virtio;

use std::io::{self, PipeWriter};
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use arc_swap::ArcSwap;
use weft_shared::IfName;

pub use counters::{Counters, DropReason, Traffic};
pub use offload::{Offload, Offloads, Outcome, Outcomes};
pub use peers::{Local, Peer, PeerTable, SourcePolicy};

use counters::Direction;
use told::{Say, Told};

/// What the threads are started with; another value takes another [`Forwarder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub device: IfName,
    /// The underlay's address and the backend's port: packets arrive there and leave from it.
    pub listen: SocketAddrV4,
    /// What may be tried.
    pub offloads: Offloads,
}

/// The running threads. Dropping it stops them; the device stays.
#[derive(Debug)]
pub struct Forwarder {
    settings: Settings,
    shared: Arc<Shared>,
    /// The thread waits for its other end to hang up.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

/// What the packet path says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    /// Why nothing is forwarded at the moment: no device yet, the port is taken.
    pub problem: Option<String>,
    /// What became of each capability; one that has not been tried yet is absent.
    pub offloads: Outcomes,
    /// Why no ICMP errors are sent; everything else is forwarded.
    pub icmp_problem: Option<String>,
    pub counters: Counters,
}

/// Between the threads and whoever asks.
#[derive(Debug)]
struct Shared {
    stopped: AtomicBool,
    peers: ArcSwap<PeerTable>,
    egress: Direction,
    ingress: Direction,
    device_lost: AtomicU64,
    panics: AtomicU64,
    told: Mutex<Told>,
}

impl Forwarder {
    /// Never waits: the device may come later and may go at any time, the port may be taken. The threads try again
    /// until they have both, and [`State::problem`] says what is missing. They work in the network namespace of the
    /// calling thread.
    pub fn start(settings: Settings, peers: PeerTable) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(peers));
        let (hang_up, stop) = io::pipe()?;
        let thread = std::thread::Builder::new().name("udp".into()).spawn({
            let (shared, settings) = (Arc::clone(&shared), settings.clone());
            move || link::run(&shared, &settings, &hang_up)
        })?;
        Ok(Self { settings, shared, stop: Some(stop), thread: Some(thread) })
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// From the next batch on.
    pub fn set_peers(&self, peers: PeerTable) {
        self.shared.peers.store(Arc::new(peers));
    }

    pub fn state(&self) -> State {
        let Shared { egress, ingress, device_lost, panics, .. } = &*self.shared;
        let (icmp_sent, icmp_suppressed) = egress.icmp();
        let told = self.shared.told();
        State {
            problem: told.trouble.problem().cloned(),
            offloads: told.offloads.clone(),
            icmp_problem: told.icmp_problem.clone(),
            counters: Counters {
                sent: egress.traffic(),
                received: ingress.traffic(),
                dropped_sending: egress.dropped(),
                dropped_receiving: ingress.dropped(),
                icmp_sent,
                icmp_suppressed,
                device_lost: device_lost.load(Relaxed),
                panics: panics.load(Relaxed),
            },
        }
    }

    /// Ends the threads; nothing is counted any more when it returns.
    pub fn stop(mut self) -> Counters {
        self.end();
        self.state().counters
    }

    fn end(&mut self) {
        // Busy threads look at the one; who waits beside them wakes by the other.
        self.shared.stopped.store(true, Relaxed);
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn new(peers: PeerTable) -> Self {
        Self {
            stopped: AtomicBool::new(false),
            peers: ArcSwap::from_pointee(peers),
            egress: Direction::default(),
            ingress: Direction::default(),
            device_lost: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            told: Mutex::new(Told::not_started()),
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Relaxed)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says it in the log as well, once, and as a warning when it stays.
    fn tell_problem(&self, problem: &str) {
        let say = self.told().trouble.met(problem, Instant::now());
        match say {
            Say::Nothing => {}
            Say::Quietly => tracing::debug!(problem, "the udp backend does not forward yet"),
            Say::Warning => tracing::warn!(problem, "the udp backend does not forward"),
        }
    }

    fn tell_works(&self, settings: &Settings) {
        self.told().trouble.over(Instant::now());
        tracing::info!(device = %settings.device, listen = %settings.listen, "the udp backend forwards");
    }

    fn tell_outcome(&self, offload: Offload, outcome: Outcome) {
        let how = outcome.to_string();
        if self.told().outcome(offload, outcome) == Say::Quietly {
            tracing::info!(%offload, how, "done without: the kernel refuses it");
        }
    }

    /// `None`: they are sent.
    fn tell_icmp(&self, problem: Option<String>) {
        if let (Some(problem), true) = (problem.clone(), self.told().icmp(problem)) {
            tracing::warn!(problem, "the udp backend forwards, and sends no ICMP errors");
        }
    }
}

#[cfg(test)]
mod allocation_tests;
#[cfg(test)]
mod forwarder_tests;
