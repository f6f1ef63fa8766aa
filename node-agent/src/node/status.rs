//! Status: everything that is known of the node, in one document.

use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::{Instant, SystemTime};

use weft_shared::netconf::{BackendConfig, NetworkConfig};

use super::{Node, Serving};
use crate::durable::snapshot::seconds;
use crate::firewall::advice::Advice;
use crate::ipam::addresses_unknown;
use crate::kernel::Monitor;
use crate::lease::LeaseStore;
use crate::reconcile::{Pending, Report};
use crate::status::{
    ConfigNoticeStatus, DataplaneStatus, HostAdvice, LeaseStatus, NetworkStatus, PeerStatus, PendingObject,
    PodStatus, Status, StoreStatus, UnderlayStatus,
};

impl Node {
    /// `pods` comes from address management.
    pub fn status(&self, mut pods: PodStatus) -> Status {
        let stage = self.stage();
        let report = self.reconcile.reports().borrow().clone();
        let health = self.health.borrow().clone();
        let serving = stage.serving();
        let ready = self
            .pod_network(&stage, &report)
            .and_then(|network| serving.map_or(Ok(()), |serving| serving.has_told(&network)))
            .map_err(|reason| reason.to_string())
            .and_then(|()| addresses_unknown(&pods.unknown).map_or(Ok(()), Err));
        let now = SystemTime::now();
        if let Some(serving) = serving {
            serving.name_owners(&mut pods);
        }
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.name.clone(),
            ready: ready.is_ok(),
            waiting_for: ready.err().into_iter().collect(),
            store: StoreStatus {
                kind: self.store.kind().into(),
                location: self.store.location(),
                connected: health.connected,
                problem: health.problem,
                one_machine_only: self.store.one_machine_only(),
                relists: health.relists,
                recalled_age: serving.and_then(|s| s.recalled).map(|r| r.age(now).as_secs()),
            },
            network: stage.config().map(|config| network_status(config, serving)),
            lease: serving.and_then(|serving| serving.lease_status(now)),
            underlay: serving.map(|serving| serving.underlay_status(&report)),
            dataplane: serving.map(|serving| DataplaneStatus {
                device: serving.backend.plane().device().cloned(),
                mtu: serving.pod_mtu(&report),
                objects: report.objects,
                pending: report.pending.iter().map(PendingObject::from).collect(),
                passes: report.passes,
                repairs: report.repairs,
                last_error: report.aborted.as_ref().map(ToString::to_string),
                last_pass_ago: report.at.map(|at| at.elapsed().as_secs_f64()),
                monitor: self.monitor.as_ref().is_some_and(Monitor::is_whole),
                monitor_overruns: self.monitor.as_ref().map_or(0, Monitor::overruns),
            }),
            packet_path: self.path.status(),
            peers: serving.map(|serving| serving.peer_status(&report)).unwrap_or_default(),
            refused: serving.map(|serving| serving.refused.clone()).unwrap_or_default(),
            pods,
            network_policies: self.network_policies(),
            port_problem: None,
            advice: report.advice.iter().map(HostAdvice::from).collect(),
            host: self.host.lock().unwrap_or_else(PoisonError::into_inner).status(),
        }
    }
}

impl Serving {
    pub(super) fn lease_status(&self, now: SystemTime) -> Option<LeaseStatus> {
        Some(LeaseStatus {
            key: self.lease.key()?,
            public_ip: IpAddr::from(self.leased_ip()),
            state: self.lease.name().into(),
            expires_in: self.lease.expires().map(|at| at.saturating_sub(seconds(now))),
            problem: self.lease.problem().map(Into::into),
        })
    }

    fn underlay_status(&self, report: &Report) -> UnderlayStatus {
        let problem = self.underlay_problem.as_ref().or(report.underlay_problem.as_ref());
        UnderlayStatus {
            iface: self.underlay.iface.clone(),
            address: self.underlay.addr.into(),
            mtu: report.underlay.as_ref().map_or(self.underlay.mtu, |now| now.mtu),
            chosen_by: self.underlay.chosen_by.clone(),
            problem: problem.cloned(),
            notice: self.wish_problem.clone(),
        }
    }

    fn peer_status(&self, report: &Report) -> Vec<PeerStatus> {
        let left = |until: Instant| until.saturating_duration_since(Instant::now()).as_secs();
        let status = |lease: &weft_shared::lease::Lease| {
            let known = report.peers.get(&lease.key);
            let problem = known.and_then(|peer| peer.problem()).map(Into::into);
            PeerStatus {
                key: lease.key,
                public_ip: lease.attrs.public_ip.into(),
                backend: lease.attrs.backend().to_owned(),
                programmed: known.is_some() && problem.is_none(),
                problem,
                grace_left: self.expired.get(&lease.key).map(|until| left(*until)),
                overlay_probe: self.backend.plane().probe(&lease.key),
            }
        };
        self.peers.iter().map(status).collect()
    }

    /// Who has the subnets that pods of this node are left in.
    fn name_owners(&self, pods: &mut PodStatus) {
        for stranded in &mut pods.stranded {
            let owner =
                self.peers.iter().find(|lease| lease.key.subnets().any(|s| s.overlaps(stranded.subnet)));
            stranded.owner = owner.map(|lease| lease.attrs.public_ip.into());
        }
    }
}

impl From<&Advice> for HostAdvice {
    fn from(advice: &Advice) -> Self {
        Self { problem: advice.problem.clone(), fix: advice.fix.clone() }
    }
}

impl From<&Pending> for PendingObject {
    fn from(pending: &Pending) -> Self {
        Self { object: pending.key.to_string(), error: pending.error.to_string(), attempts: pending.attempts }
    }
}

fn network_status(config: &NetworkConfig, serving: Option<&Serving>) -> NetworkStatus {
    let vni = match &config.backend {
        BackendConfig::Vxlan(vxlan) => Some(vxlan.vni),
        BackendConfig::HostGw | BackendConfig::Udp(_) => None,
    };
    let port = config.backend.udp_port();
    let notice = serving.and_then(|serving| serving.config_notice.as_ref());
    NetworkStatus {
        network: config.v4.network,
        subnet_len: config.v4.subnet_len,
        any_len: config.v4.any_len,
        subnet_min: Some(config.v4.min),
        subnet_max: Some(config.v4.max),
        backend: config.backend.kind().into(),
        port,
        vni,
        notice: notice.map(|n| ConfigNoticeStatus { kind: n.kind().into(), text: n.to_string() }),
    }
}
