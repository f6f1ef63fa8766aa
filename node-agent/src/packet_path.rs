//! The udp backend's forwarding threads as the agent keeps them: started, told of peers, replaced, stopped, by one owner.
//!
//! What they are told follows from the reconciler's inputs alone, so that the kernel and the packet path are made of the
//! same value. Two exceptions make a restart short. At the agent's start they run on what was saved on disk, before the
//! store has been asked and before the first pass over the kernel; and until the store's first list is in, they keep the
//! peers that they have.

mod table;

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weft_shared::netconf::BackendConfig;

use crate::node::Node;
use crate::reconcile::Inputs;
use crate::status::{DropCount, OffloadStatus, PacketPathStatus, TrafficStatus};
use crate::udp::{
    Counters, DropReason, Forwarder, Offload, Offloads, Outcome, PeerTable, Settings, State, Traffic,
};
use table::peer_table;

/// How often a packet path that has a problem is looked at: its threads try again by themselves and tell nobody.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub struct PacketPath {
    /// Of the agent's settings.
    offloads: Offloads,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    running: Option<Running>,
    /// Why it could not be started, and where it would have listened.
    refused: Option<(SocketAddrV4, String)>,
    /// What those before it have counted: totals are the agent's, whatever is replaced meanwhile.
    before: Counters,
}

#[derive(Debug)]
struct Running {
    forwarder: Forwarder,
    peers: PeerTable,
}

/// What a node wants of its packet path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Want {
    settings: Settings,
    peers: PeerTable,
    /// From the store, or what it said last. Before either has told, those that are in use stay.
    peers_known: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Other peers.
    Tell,
    /// Other threads.
    Start,
}

impl PacketPath {
    pub fn new(offloads: Offloads) -> Self {
        Self { offloads, kept: Mutex::default() }
    }

    /// Brings about what follows from these inputs; whether threads were started for it. While they say nothing of the
    /// node, whatever runs goes on.
    pub fn follow(&self, inputs: &Inputs) -> bool {
        let Some(node) = &inputs.node else { return false };
        match want(inputs, &self.offloads) {
            Some(want) => return self.keep(want),
            None if self.stop() => {
                info!(backend = node.config.backend.kind(), "the packet path is no longer wanted")
            }
            None => {}
        }
        false
    }

    /// Ends the threads; whether there were any. Device, address and routes stay.
    pub fn stop(&self) -> bool {
        let mut kept = self.lock();
        kept.refused = None;
        kept.end_running()
    }

    /// What stands in the way of packets, if this backend has a packet path.
    pub fn obstacle(&self, backend: &BackendConfig) -> Option<String> {
        if !matches!(backend, BackendConfig::Udp(_)) {
            return None;
        }
        let kept = self.lock();
        match (&kept.running, &kept.refused) {
            (Some(running), _) => running.forwarder.state().problem,
            (None, Some((_, why))) => Some(why.clone()),
            (None, None) => Some("not started yet".to_owned()),
        }
    }

    pub fn status(&self) -> Option<PacketPathStatus> {
        let kept = self.lock();
        let (listen, state) = match (&kept.running, &kept.refused) {
            (Some(running), _) => (running.forwarder.settings().listen, running.forwarder.state()),
            (None, Some((listen, why))) => {
                (*listen, State { problem: Some(why.clone()), ..State::default() })
            }
            (None, None) => return None,
        };
        Some(status(listen, &state, &sum(&kept.before, &state.counters)))
    }

    fn keep(&self, want: Want) -> bool {
        let mut kept = self.lock();
        let has = kept.running.as_ref().map(|running| (running.forwarder.settings(), &running.peers));
        match (want.step(has), &mut kept.running) {
            (Step::Start, _) => {}
            (Step::Tell, Some(running)) => {
                running.forwarder.set_peers(want.peers.clone());
                running.peers = want.peers;
                return false;
            }
            (Step::Tell | Step::Nothing, _) => return false,
        }
        // The port is to be free for the new one.
        kept.end_running();
        let listen = want.settings.listen;
        match Forwarder::start(want.settings, want.peers.clone()) {
            Ok(forwarder) => {
                info!(%listen, device = %forwarder.settings().device, "packet path started");
                kept.running = Some(Running { forwarder, peers: want.peers });
                kept.refused = None;
                true
            }
            Err(error) => {
                let why = format!("the forwarding threads cannot be started: {error}");
                if kept.refused.as_ref().is_none_or(|(_, known)| *known != why) {
                    warn!(%listen, %error, "the forwarding threads cannot be started; will be tried again");
                }
                kept.refused = Some((listen, why));
                false
            }
        }
    }

    fn has_problem(&self) -> bool {
        let kept = self.lock();
        kept.refused.is_some()
            || kept.running.as_ref().is_some_and(|running| running.forwarder.state().problem.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Want {
    /// The least that is to be done about what runs.
    fn step(&self, running: Option<(&Settings, &PeerTable)>) -> Step {
        match running {
            Some((settings, _)) if *settings != self.settings => Step::Start,
            Some((_, peers)) if self.peers_known && *peers != self.peers => Step::Tell,
            Some(_) => Step::Nothing,
            None => Step::Start,
        }
    }
}

impl Kept {
    fn end_running(&mut self) -> bool {
        let Some(running) = self.running.take() else { return false };
        self.before = sum(&self.before, &running.forwarder.stop());
        true
    }
}

/// What follows from the inputs; `None`: this backend has no packet path, or the node is not known.
fn want(inputs: &Inputs, offloads: &Offloads) -> Option<Want> {
    let node = inputs.node.as_ref()?;
    let BackendConfig::Udp(udp) = &node.config.backend else { return None };
    let peers = peer_table(&node.config, node.lease, &inputs.pods, &inputs.peers)?;
    let settings = Settings {
        device: node.backend.plane().device()?.clone(),
        listen: SocketAddrV4::new(node.underlay.addr, udp.port),
        offloads: offloads.clone(),
    };
    Some(Want { settings, peers, peers_known: inputs.has_snapshot || !inputs.peers.is_empty() })
}

/// Follows the reconciler's inputs until told to stop. When a problem has gone, or threads run that a pass may have
/// missed, the reconciler looks again, and with its report the node may be ready.
pub async fn keep_packet_path(node: Arc<Node>, stop: CancellationToken) {
    let mut revisions = node.reconcile.revisions();
    let mut troubled = false;
    loop {
        revisions.mark_unchanged();
        let started = node.path.follow(&node.reconcile.inputs());
        let was_troubled = std::mem::replace(&mut troubled, node.path.has_problem());
        if (started || was_troubled) && !troubled {
            node.reconcile.wake();
        }
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() { return },
            () = sleep(LOOK), if troubled => {}
            () = stop.cancelled() => return,
        }
    }
}

fn status(listen: SocketAddrV4, state: &State, counters: &Counters) -> PacketPathStatus {
    let offload = |offload: Offload| {
        let (outcome, detail) = match state.offloads.get(&offload) {
            None => ("untried", None),
            Some(Outcome::InUse) => ("in-use", None),
            Some(Outcome::SwitchedOff) => ("switched-off", None),
            Some(Outcome::Refused(how)) => ("refused", Some(how.clone())),
        };
        OffloadStatus { name: offload.name().into(), outcome: outcome.into(), detail }
    };
    let dropped = [("sent", &counters.dropped_sending), ("received", &counters.dropped_receiving)];
    let dropped = dropped.into_iter().flat_map(|(direction, dropped)| {
        DropReason::ALL.into_iter().map(move |reason| DropCount {
            direction: direction.into(),
            reason: reason.name().into(),
            packets: dropped.get(&reason).copied().unwrap_or_default(),
        })
    });
    PacketPathStatus {
        listen: listen.into(),
        problem: state.problem.clone(),
        icmp_problem: state.icmp_problem.clone(),
        offloads: Offload::ALL.into_iter().map(offload).collect(),
        sent: traffic(counters.sent),
        received: traffic(counters.received),
        dropped: dropped.collect(),
        icmp_errors_sent: counters.icmp_sent,
        icmp_errors_suppressed: counters.icmp_suppressed,
        device_lost: counters.device_lost,
        panics: counters.panics,
    }
}

fn sum(one: &Counters, other: &Counters) -> Counters {
    let traffic = |one: Traffic, other: Traffic| Traffic {
        packets: one.packets + other.packets,
        bytes: one.bytes + other.bytes,
        calls: one.calls + other.calls,
    };
    let dropped = |one: &BTreeMap<DropReason, u64>, other: &BTreeMap<DropReason, u64>| {
        let mut sum = one.clone();
        other.iter().for_each(|(reason, count)| *sum.entry(*reason).or_default() += count);
        sum
    };
    Counters {
        sent: traffic(one.sent, other.sent),
        received: traffic(one.received, other.received),
        dropped_sending: dropped(&one.dropped_sending, &other.dropped_sending),
        dropped_receiving: dropped(&one.dropped_receiving, &other.dropped_receiving),
        icmp_sent: one.icmp_sent + other.icmp_sent,
        icmp_suppressed: one.icmp_suppressed + other.icmp_suppressed,
        device_lost: one.device_lost + other.device_lost,
        panics: one.panics + other.panics,
    }
}

fn traffic(Traffic { packets, bytes, calls }: Traffic) -> TrafficStatus {
    TrafficStatus { packets, bytes, calls }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use weft_shared::lease::Lease;
    use weft_shared::netconf::NetworkConfig;

    use super::*;
    use crate::dataplane::Backend;
    use crate::pods::{BridgeNeed, PodNeeds};
    use crate::reconcile::NodeInputs;
    use crate::udp::{Local, Peer, SourcePolicy};
    use crate::underlay::Underlay;

    fn inputs(backend: &str, peers: &[(&str, &str)]) -> Inputs {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#);
        let config = NetworkConfig::parse(&json).expect(&json);
        let node = NodeInputs {
            backend: Backend::new(&config, "02:00:00:00:00:01".parse().expect("mac")),
            config,
            lease: "10.5.1.0-24".parse().expect("key"),
            underlay: Underlay {
                iface: "eth0".parse().expect("name"),
                index: 2,
                addr: Ipv4Addr::new(192, 0, 2, 1),
                mtu: 1500,
                public_ip: Ipv4Addr::new(203, 0, 113, 1),
                chosen_by: "a test".into(),
            },
            vtep_mac: "02:00:00:00:00:01".parse().expect("mac"),
            first_start: false,
        };
        let peer = |(key, value): &(&str, &str)| Lease {
            key: key.parse().expect(key),
            attrs: serde_json::from_str(value).expect(value),
            create_revision: 1,
        };
        let peers = peers.iter().map(peer).collect();
        Inputs { node: Some(node), peers, ..Inputs::default() }
    }

    const UDP: &str = r#"{"Type":"udp"}"#;
    const PEER: (&str, &str) = ("10.5.2.0-24", r#"{"PublicIP":"192.0.2.2"}"#);

    fn wanted(inputs: &Inputs) -> Want {
        want(inputs, &Offloads::default()).expect("udp")
    }

    /// A pass that was made before may have found the node without them: it has to be told.
    #[test]
    fn whoever_follows_says_when_threads_were_started() {
        let thread = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare needs root");
            let path = PacketPath::new(Offloads::default());
            assert!(!path.follow(&Inputs::default()), "nothing is known of the node");
            assert!(path.follow(&inputs(UDP, &[])));
            assert!(!path.follow(&inputs(UDP, &[])), "they run");
            assert!(!path.follow(&inputs(UDP, &[PEER])), "they are told of the peer");
            assert!(
                path.follow(&inputs(r#"{"Type":"udp","Port":9000}"#, &[PEER])),
                "others, at another port"
            );
            assert!(!path.follow(&inputs(r#"{"Type":"host-gw"}"#, &[PEER])), "ended");
            assert!(!path.stop(), "none is left");
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn threads_listen_at_the_underlays_own_address_and_know_every_subnet_of_the_node() {
        let mut inputs = inputs(r#"{"Type":"udp","Port":9000,"StrictSource":true}"#, &[PEER]);
        let former = BridgeNeed { subnets: vec!["10.5.7.0/24".parse().expect("net")], mtu: 1472, mac: None };
        inputs.pods =
            PodNeeds { bridges: [("cni0".parse().expect("name"), former)].into(), ..PodNeeds::default() };
        let off = Offloads::default().without(Offload::UdpGro);
        let want = want(&inputs, &off).expect("udp");
        let settings = Settings {
            device: "flannel0".parse().expect("name"),
            listen: "192.0.2.1:9000".parse().expect("address"),
            offloads: off,
        };
        assert_eq!(want.settings, settings, "a public address may be nobody's here");
        let local = Local {
            network: "10.5.0.0/16".parse().expect("net"),
            subnets: ["10.5.1.0/24", "10.5.7.0/24"].map(|s| s.parse().expect(s)).into(),
            device_addr: Ipv4Addr::new(10, 5, 1, 0),
        };
        let policy = SourcePolicy { strict: true, behind_nat: false };
        let peer = Peer {
            subnet: "10.5.2.0/24".parse().expect("net"),
            addr: "192.0.2.2:9000".parse().expect("address"),
        };
        assert_eq!(want.peers, PeerTable::new(local, policy, [peer]), "the port is our own");
    }

    #[test]
    fn only_leases_without_a_type_are_peers() {
        let other = ("10.5.3.0-24", r#"{"PublicIP":"192.0.2.3","BackendType":"host-gw"}"#);
        assert_eq!(wanted(&inputs(UDP, &[PEER, other])).peers, wanted(&inputs(UDP, &[PEER])).peers);
        assert_ne!(wanted(&inputs(UDP, &[])).peers, wanted(&inputs(UDP, &[PEER])).peers);
    }

    #[test]
    fn threads_are_replaced_for_other_settings_alone() {
        let known = wanted(&inputs(UDP, &[PEER]));
        let runs = |want: &Want, step: Step| {
            assert_eq!(want.step(Some((&known.settings, &known.peers))), step);
        };
        assert_eq!(known.step(None), Step::Start);
        runs(&known, Step::Nothing);
        // Not asked yet: no peers, and nobody says that there are none.
        let mut before = inputs(UDP, &[]);
        runs(&wanted(&before), Step::Nothing);
        before.has_snapshot = true;
        runs(&wanted(&before), Step::Tell);
        runs(&wanted(&inputs(UDP, &[PEER, ("10.5.9.0-24", r#"{"PublicIP":"192.0.2.9"}"#)])), Step::Tell);
        runs(&wanted(&inputs(r#"{"Type":"udp","PeersBehindNAT":true}"#, &[PEER])), Step::Tell);
        runs(&wanted(&inputs(r#"{"Type":"udp","Port":9000}"#, &[PEER])), Step::Start);
        let mut moved = inputs(UDP, &[PEER]);
        if let Some(node) = &mut moved.node {
            node.underlay.addr = Ipv4Addr::new(192, 0, 2, 7);
        }
        runs(&wanted(&moved), Step::Start);
    }

    #[test]
    fn status_has_every_offload_and_every_reason_from_the_start() {
        let mut state = State::default();
        state.offloads.insert(Offload::TunUso, Outcome::Refused("Invalid argument".into()));
        state.icmp_problem = Some("no right".into());
        let mut counters = Counters::default();
        counters.dropped_receiving.insert(DropReason::UnknownPeer, 3);
        (counters.sent.packets, counters.panics) = (2, 1);
        let total = sum(&counters, &counters);
        let status = status("192.0.2.1:8285".parse().expect("address"), &state, &total);
        assert_eq!(status.offloads.len(), Offload::ALL.len());
        assert_eq!(
            (status.offloads[0].name.as_str(), status.offloads[0].outcome.as_str()),
            ("vnet-hdr", "untried")
        );
        assert_eq!(status.offloads[2].detail.as_deref(), Some("Invalid argument"));
        assert_eq!(status.dropped.len(), 2 * DropReason::ALL.len());
        let counted: Vec<_> = status.dropped.iter().filter(|d| d.packets > 0).collect();
        let unknown = DropCount { direction: "received".into(), reason: "unknown-peer".into(), packets: 6 };
        assert_eq!((counted, status.sent.packets, status.panics), (vec![&unknown], 4, 2));
        assert_eq!(status.icmp_problem.as_deref(), Some("no right"));
    }
}
