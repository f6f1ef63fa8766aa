//! This node as the rest of the agent and its readers see it: one place that knows everything, and answers from it.
//!
//! ```text
//! bring-up, upkeep --update--> state --fill--> the reconciler's inputs
//!                                |                   |
//!                                +---- status, pod network <---- its reports
//! ```

pub mod state;

mod fabric;
mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;
use weft_shared::netconf::NetworkConfig;

use crate::host::Host;
use crate::kernel::Monitor;
use crate::lease::{Store, StoreHealth};
use crate::packet_path::PacketPath;
use crate::pods::{NotReady, PodNeeds, PodNetwork};
use crate::policies::{Asked, judge};
use crate::reconcile::{Handle, Report};
use crate::status::NetworkPolicyStatus;

pub use fabric::NodeFabric;
pub use state::{Serving, Stage};

#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub store: Arc<Store>,
    pub health: watch::Receiver<StoreHealth>,
    pub reconcile: Handle,
    /// Written by address management.
    pub pod_needs: watch::Receiver<PodNeeds>,
    /// `None`: switched off, or refused by the kernel.
    pub monitor: Option<Monitor>,
    /// Of the udp backend.
    pub path: PacketPath,
    host: Mutex<Host>,
    /// `None`: nobody asks.
    network_policies: Mutex<Option<Asked>>,
    stage: Mutex<Stage>,
    changes: watch::Sender<()>,
}

impl Node {
    pub fn new(
        name: String,
        store: Arc<Store>,
        health: watch::Receiver<StoreHealth>,
        reconcile: Handle,
        pod_needs: watch::Receiver<PodNeeds>,
        monitor: Option<Monitor>,
        path: PacketPath,
    ) -> Self {
        let (host, network_policies) = (Mutex::new(Host::new()), Mutex::default());
        let (stage, changes) = (Mutex::default(), watch::Sender::new(()));
        Self {
            name,
            store,
            health,
            reconcile,
            pod_needs,
            monitor,
            path,
            host,
            network_policies,
            stage,
            changes,
        }
    }

    /// `what` stands in the way of going on.
    pub fn wait_for(&self, config: Option<NetworkConfig>, what: String) {
        *self.stage() = Stage::Waiting { what, config };
    }

    /// Nothing but the lease and the kernel stands in the way any more.
    pub fn serve(&self, serving: Serving) {
        let mut stage = self.stage();
        self.reconcile.update_if(|inputs| serving.fill(inputs));
        *stage = Stage::Up(Box::new(serving));
        self.changes.send_replace(());
    }

    /// Changes what the node is made of, and with it what the reconciler has to bring about.
    pub fn update(&self, change: impl FnOnce(&mut Serving)) {
        if let Stage::Up(serving) = &mut *self.stage() {
            change(serving);
            self.reconcile.update_if(|inputs| serving.fill(inputs));
            self.changes.send_replace(());
        }
    }

    /// Fires after every change.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Reads something off the serving node.
    pub fn serving<T>(&self, read: impl FnOnce(&Serving) -> T) -> Option<T> {
        self.stage().serving().map(read)
    }

    /// Hands the newest needs of pods to the reconciler, if it does not have them.
    pub fn pass_on_pod_needs(&self) {
        let needs = self.pod_needs.borrow().clone();
        self.reconcile.update_if(|inputs| {
            let changed = inputs.pods != needs || !inputs.pods_recorded;
            (inputs.pods, inputs.pods_recorded) = (needs, true);
            changed
        });
    }

    /// What the apiserver has said of NetworkPolicies; whether that is news.
    pub fn set_network_policies(&self, asked: Asked) -> bool {
        let mut known = self.network_policies.lock().unwrap_or_else(PoisonError::into_inner);
        known.replace(asked.clone()) != Some(asked)
    }

    /// What that means on this node; `None` where nobody asks.
    pub fn network_policies(&self) -> Option<NetworkPolicyStatus> {
        let asked = self.network_policies.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let reports = self.reconcile.reports();
        let report = reports.borrow();
        Some(judge(&asked, report.at.is_some().then_some(&report.enforcers)))
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pod_network(&self, stage: &Stage, report: &Report) -> Result<PodNetwork, NotReady> {
        match stage {
            Stage::Waiting { what, .. } => Err(NotReady::Waiting(what.clone())),
            Stage::Up(serving) => {
                let health = self.health.borrow();
                let path = self.path.obstacle(&serving.config.backend);
                serving.pod_network(report, health.problem.as_deref(), path.as_deref(), SystemTime::now())
            }
        }
    }
}
