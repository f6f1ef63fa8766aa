//! This node as the rest of the agent and its readers see it: one place that knows everything, and answers from it.

use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use weft_shared::IfName;
use weft_shared::cni::Code;
use weft_shared::lease::Lease;
use weft_shared::netconf::{BackendConfig, NetworkConfig};
use weft_shared::protocol::Failure;

use crate::dataplane::Backend;
use crate::host::Host;
use crate::kernel::{KernelError, LinuxKernel, Monitor};
use crate::lease::{LeaseState, LeaseStore, Store, StoreHealth};
use crate::object::{Key, LinkKind};
use crate::pods::{DeviceFacts, Fabric, NotReady, PodNetwork, PodPorts};
use crate::reconcile::{Handle, Pending, Report};
use crate::status::{
    DataplaneStatus, LeaseStatus, NetworkStatus, PeerStatus, PendingObject, PodStatus, RefusedLease, Status,
    StoreStatus, UnderlayStatus,
};
use crate::underlay::Underlay;

/// A bridge that is not there after so long is a failure of the ADD that asked for it.
const BRIDGE_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub store: Arc<Store>,
    pub health: watch::Receiver<StoreHealth>,
    pub reconcile: Handle,
    /// Written by address management.
    pub ports: watch::Receiver<PodPorts>,
    /// `None`: switched off, or refused by the kernel.
    pub monitor: Option<Monitor>,
    host: Mutex<Host>,
    facts: Mutex<Facts>,
}

/// What the node is made of now, besides what others publish.
#[derive(Debug, Default)]
pub struct Facts {
    pub stage: Stage,
    pub peers: Vec<Lease>,
    pub refused: Vec<RefusedLease>,
}

/// How far bringing the node up has come.
#[derive(Debug)]
pub enum Stage {
    Waiting { what: String, config: Option<NetworkConfig> },
    Up(Box<Served>),
}

/// What is known from then on, when only the lease and the kernel are missing, or nothing.
#[derive(Debug, Clone)]
pub struct Served {
    pub config: NetworkConfig,
    pub underlay: Underlay,
    pub backend: Backend,
    pub lease: watch::Receiver<LeaseState>,
}

impl Default for Stage {
    fn default() -> Self {
        Self::Waiting { what: "the agent's start".into(), config: None }
    }
}

impl Stage {
    fn served(&self) -> Option<&Served> {
        match self {
            Self::Up(served) => Some(served),
            Self::Waiting { .. } => None,
        }
    }

    fn config(&self) -> Option<&NetworkConfig> {
        match self {
            Self::Up(served) => Some(&served.config),
            Self::Waiting { config, .. } => config.as_ref(),
        }
    }
}

impl Node {
    pub fn new(
        name: String,
        store: Arc<Store>,
        health: watch::Receiver<StoreHealth>,
        reconcile: Handle,
        ports: watch::Receiver<PodPorts>,
        monitor: Option<Monitor>,
    ) -> Self {
        let (host, facts) = (Mutex::new(Host::new()), Mutex::default());
        Self { name, store, health, reconcile, ports, monitor, host, facts }
    }

    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `what` stands in the way of going on.
    pub fn wait_for(&self, config: Option<NetworkConfig>, what: String) {
        self.facts().stage = Stage::Waiting { what, config };
    }

    /// Everything but the pods, which address management adds.
    pub fn status(&self, pods: PodStatus) -> Status {
        let facts = self.facts();
        let report = self.reconcile.reports().borrow().clone();
        let health = self.health.borrow().clone();
        let network = self.pod_network_from(&facts, &report);
        let served = facts.stage.served();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.name.clone(),
            ready: network.is_ok(),
            waiting_for: network.err().map(|e| e.to_string()).into_iter().collect(),
            store: StoreStatus {
                kind: self.store.kind().into(),
                location: self.store.location(),
                connected: health.connected,
                problem: health.problem,
                one_machine_only: self.store.one_machine_only(),
                relists: health.relists,
            },
            network: facts.stage.config().map(network_status),
            lease: served.and_then(Served::lease_status),
            underlay: served.map(|Served { underlay: u, .. }| UnderlayStatus {
                iface: u.iface.clone(),
                address: u.addr.into(),
                mtu: report.underlay.as_ref().map_or(u.mtu, |now| now.mtu),
                chosen_by: u.chosen_by.clone(),
            }),
            dataplane: served.map(|served| DataplaneStatus {
                device: served.backend.plane().device().cloned(),
                mtu: served.pod_mtu(&report),
                objects: report.objects,
                pending: report.pending.iter().map(PendingObject::from).collect(),
                passes: report.passes,
                repairs: report.repairs,
                last_error: report.aborted.as_ref().map(ToString::to_string),
                last_pass_ago: report.at.map(|at| at.elapsed().as_secs_f64()),
                monitor: self.monitor.is_some(),
                monitor_overruns: self.monitor.as_ref().map_or(0, Monitor::overruns),
            }),
            peers: served.map(|s| s.peer_status(&facts.peers, &report)).unwrap_or_default(),
            refused: facts.refused.clone(),
            pods,
            host: self.host.lock().unwrap_or_else(PoisonError::into_inner).status(),
        }
    }

    fn pod_network_from(&self, facts: &Facts, report: &Report) -> Result<PodNetwork, NotReady> {
        let waiting = |what: &str| Err(NotReady::Waiting(what.into()));
        let served = match &facts.stage {
            Stage::Waiting { what, .. } => return waiting(what),
            Stage::Up(served) => served,
        };
        let lease = match served.lease.borrow().clone() {
            LeaseState::Held { lease, .. } => lease,
            LeaseState::Lost { key, owner: Some(owner), .. } => {
                return Err(NotReady::Degraded(format!("a new subnet: {key} is now held by {owner}")));
            }
            LeaseState::Lost { key, owner: None, .. } => {
                return waiting(&format!(
                    "the lease of {key}, which is gone from the store, to be taken again"
                ));
            }
            LeaseState::Acquiring { problem: Some(problem) } => {
                return waiting(&format!("a subnet lease: {problem}"));
            }
            LeaseState::Acquiring { problem: None } => return waiting("a subnet lease"),
        };
        if let Some(error) = report.blind() {
            return Err(NotReady::Degraded(format!("the kernel to be brought in order: {error}")));
        }
        if let Some(problem) = &report.underlay_problem {
            return Err(NotReady::Degraded(format!("the underlay: {problem}")));
        }
        if !report.usable {
            let first = report.pending.first().map(|p| format!("{}: {}", p.key, p.error));
            let what = first.unwrap_or_else(|| "the first pass".into());
            return waiting(&format!("the kernel to be brought in order: {what}"));
        }
        if !report.after_snapshot {
            let problem = self.health.borrow().problem.clone();
            let detail = problem.map(|p| format!(": {p}")).unwrap_or_default();
            return waiting(&format!("the first list of leases from the store{detail}"));
        }
        let overlay = vec![served.config.v4.network];
        Ok(PodNetwork { subnet: lease.lease.key.v4, overlay, mtu: served.pod_mtu(report) })
    }

    /// Hands the newest needs of pods to the reconciler, if it does not have them.
    pub fn pass_on_ports(&self) {
        let ports = self.ports.borrow().clone();
        self.reconcile.update_if(|inputs| {
            let changed = inputs.pods != ports;
            inputs.pods = ports;
            changed
        });
    }
}

impl Served {
    fn pod_mtu(&self, report: &Report) -> u32 {
        let underlay = report.underlay.as_ref().unwrap_or(&self.underlay);
        self.backend.plane().pod_mtu(underlay.mtu)
    }

    fn lease_status(&self) -> Option<LeaseStatus> {
        let state = self.lease.borrow().clone();
        let public_ip = IpAddr::from(self.underlay.public_ip);
        let (key, expires) = match &state {
            LeaseState::Held { lease, .. } => (lease.lease.key, lease.expires),
            LeaseState::Lost { key, .. } => (*key, None),
            LeaseState::Acquiring { .. } => return None,
        };
        let left = |at: SystemTime| at.duration_since(SystemTime::now()).unwrap_or_default().as_secs();
        Some(LeaseStatus {
            key,
            public_ip,
            state: state.name().into(),
            expires_in: expires.map(left),
            problem: state.problem().map(Into::into),
        })
    }

    fn peer_status(&self, peers: &[Lease], report: &Report) -> Vec<PeerStatus> {
        let status = |lease: &Lease| {
            let known = report.peers.get(&lease.key);
            let problem = known.and_then(|peer| peer.problem()).map(Into::into);
            PeerStatus {
                key: lease.key,
                public_ip: lease.attrs.public_ip.into(),
                backend: lease.attrs.backend_type.clone(),
                programmed: known.is_some() && problem.is_none(),
                problem,
                overlay_probe: self.backend.plane().probe(&lease.key),
            }
        };
        peers.iter().map(status).collect()
    }
}

impl From<&Pending> for PendingObject {
    fn from(pending: &Pending) -> Self {
        Self { object: pending.key.to_string(), error: pending.error.to_string(), attempts: pending.attempts }
    }
}

fn network_status(config: &NetworkConfig) -> NetworkStatus {
    let (port, vni) = match &config.backend {
        BackendConfig::Vxlan(vxlan) => (Some(vxlan.port), Some(vxlan.vni)),
        BackendConfig::HostGw => (None, None),
    };
    NetworkStatus {
        network: config.v4.network,
        subnet_len: config.v4.subnet_len,
        backend: config.backend.kind().into(),
        port,
        vni,
    }
}

/// What address management asks of the node.
#[derive(Debug, Clone)]
pub struct NodeFabric(pub Arc<Node>);

impl Fabric for NodeFabric {
    fn pod_network(&self) -> Result<PodNetwork, NotReady> {
        let facts = self.0.facts();
        let report = self.0.reconcile.reports().borrow().clone();
        self.0.pod_network_from(&facts, &report)
    }

    async fn may_be_bridge(&self, name: &IfName) -> Result<(), Failure> {
        let refuse = |expected: String| {
            let details = format!("bridge = \"{name}\": expected {expected}");
            Err(Failure::new(Code::BadConfiguration, "invalid network configuration").with_details(details))
        };
        if let Some(used) = self.0.ports.borrow().bridges.keys().find(|used| *used != name) {
            return refuse(format!("\"{used}\", which this node's pods use since boot"));
        }
        let reserved = self.0.facts().stage.served().is_some_and(|served| {
            served.underlay.iface == *name || served.backend.plane().device() == Some(name)
        });
        if reserved || name.as_str() == "lo" || name.as_str().starts_with("flannel") {
            return refuse("a bridge of the pods' own, such as cni0".into());
        }
        let asked = name.clone();
        match in_kernel(move |kernel| kernel.kind_of(&asked)).await {
            Ok(None | Some(LinkKind::Bridge)) => Ok(()),
            Ok(Some(kind)) => refuse(format!("a bridge or a free name; it is a {kind}")),
            Err(error) => {
                Err(Failure::new(Code::TryAgainLater, "the kernel does not answer").with_details(error))
            }
        }
    }

    async fn ensure_bridge(&self, name: &IfName) -> Result<DeviceFacts, Failure> {
        self.0.pass_on_ports();
        let need = self.0.ports.borrow().bridges.get(name).map(|n| n.subnets.clone()).unwrap_or_default();
        let in_place = |report: &Report| {
            let carried = report.gateways.get(name);
            let complete = need.iter().all(|subnet| carried.is_some_and(|c| c.contains(subnet)));
            report.devices.get(name).copied().filter(|_| complete)
        };
        let known = in_place(&self.0.reconcile.reports().borrow());
        if let Some(facts) = known {
            return Ok(facts);
        }
        // A pass that was aborted says nothing about the bridge: many pods are coming and going.
        let conclusive = async {
            loop {
                let report = self.0.reconcile.pass().await;
                if report.aborted.is_none() || in_place(&report).is_some() {
                    return report;
                }
            }
        };
        let (facts, why) = match tokio::time::timeout(BRIDGE_DEADLINE, conclusive).await {
            Ok(report) => (in_place(&report), trouble(&report, name)),
            Err(_) => (None, format!("the kernel did not answer in {} s", BRIDGE_DEADLINE.as_secs())),
        };
        facts.ok_or_else(|| {
            Failure::new(Code::TryAgainLater, format!("bridge {name} is not in place yet")).with_details(why)
        })
    }

    async fn delete_veth(&self, name: &IfName) -> Result<(), String> {
        let name = name.clone();
        in_kernel(move |kernel| kernel.delete_veth(&name).map(|_| ())).await
    }

    fn link_exists(&self, ifindex: u32) -> impl Future<Output = Result<bool, String>> + Send {
        in_kernel(move |kernel| kernel.link_exists(ifindex))
    }
}

/// What a report has against a bridge.
fn trouble(report: &Report, bridge: &IfName) -> String {
    let is_about = |key: &Key| matches!(key, Key::Link(dev) | Key::Addr(dev, _) if dev == bridge);
    let about = report.pending.iter().find(|p| is_about(&p.key));
    let pending = about.map(|p| format!("{}: {}", p.key, p.error));
    pending
        .or_else(|| report.aborted.as_ref().map(ToString::to_string))
        .unwrap_or_else(|| "the pass did not get to it".into())
}

/// A blocking call on a socket of its own: deleting a link waits for the kernel's grace periods.
async fn in_kernel<T: Send + 'static>(
    call: impl FnOnce(&mut LinuxKernel) -> Result<T, KernelError> + Send + 'static,
) -> Result<T, String> {
    match spawn_blocking(move || call(&mut LinuxKernel::open()?)).await {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(panic.to_string()),
    }
}
