//! What this node is made of now: one value with one owner.
//!
//! Bring-up and upkeep write it ([`super::Node::update`]); what the reconciler is to bring about, what a pod gets and
//! what status says all follow from it and from the last report of the kernel. Nobody keeps a second copy but the lease
//! keeper, which has to know the configuration before the watch has told it, and the table, of what cannot change.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Instant, SystemTime};

use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::netconf::NetworkConfig;
use weft_shared::subnet_env::SubnetEnv;
use weft_shared::{Mac, Subnet};

use crate::dataplane::Backend;
use crate::durable::snapshot::{OwnSubnet, Recalled, Snapshot};
use crate::lease::{LeaseState, LeaseTable};
use crate::netconf::ConfigNotice;
use crate::pods::{NotReady, PodNetwork};
use crate::reconcile::{Inputs, NodeInputs, Report};
use crate::status::RefusedLease;
use crate::underlay::Underlay;

/// How far bringing the node up has come.
#[derive(Debug)]
pub enum Stage {
    Waiting { what: String, config: Option<NetworkConfig> },
    Up(Box<Serving>),
}

/// A node of which only the lease and the kernel are missing, or nothing.
#[derive(Debug, Clone)]
pub struct Serving {
    /// In force until the agent's end, but for what can change under it.
    pub config: NetworkConfig,
    /// What the store has in its place, when that cannot be applied.
    pub config_notice: Option<ConfigNotice>,
    /// As chosen last; index and MTU are those of the last look.
    pub underlay: Underlay,
    /// Why it cannot be used and no other can be chosen.
    pub underlay_problem: Option<String>,
    /// Why it is not the one that an operator wishes; it serves all the same.
    pub wish_problem: Option<String>,
    pub backend: Backend,
    pub vtep_mac: Mac,
    pub lease: LeaseState,
    pub peers: Vec<Lease>,
    /// Of the peers, those whose lease has expired, and until when they are used all the same.
    pub expired: BTreeMap<LeaseKey, Instant>,
    pub refused: Vec<RefusedLease>,
    /// The store has told everything since the agent's start: what nobody wants may be removed.
    pub has_snapshot: bool,
    /// Peers and configuration are from disk, since the store has not told them yet.
    pub recalled: Option<Recalled>,
    /// Nothing durable was found: a flanneld may have run here before.
    pub first_start: bool,
    /// What this agent has last written into subnet.env, or tried to: a disk that refuses does not stop the pods.
    pub told: Option<SubnetEnv>,
}

impl Default for Stage {
    fn default() -> Self {
        Self::Waiting { what: "the agent's start".into(), config: None }
    }
}

impl Stage {
    pub fn serving(&self) -> Option<&Serving> {
        match self {
            Self::Up(serving) => Some(serving),
            Self::Waiting { .. } => None,
        }
    }

    pub fn config(&self) -> Option<&NetworkConfig> {
        match self {
            Self::Up(serving) => Some(&serving.config),
            Self::Waiting { config, .. } => config.as_ref(),
        }
    }
}

impl Serving {
    /// Hands the reconciler what follows for it; true if anything is new. A node that has no subnet for the moment
    /// keeps in the kernel what it had.
    pub(super) fn fill(&self, inputs: &mut Inputs) -> bool {
        let mut changed = false;
        if let Some(lease) = self.lease.key() {
            let node = NodeInputs {
                config: self.config.clone(),
                backend: self.backend.clone(),
                vtep_mac: self.vtep_mac,
                lease,
                underlay: self.underlay.clone(),
                first_start: self.first_start,
            };
            if inputs.node.as_ref() != Some(&node) {
                inputs.node = Some(node);
                changed = true;
            }
        }
        if inputs.peers != self.peers || inputs.has_snapshot != self.has_snapshot {
            inputs.peers.clone_from(&self.peers);
            inputs.has_snapshot = self.has_snapshot;
            changed = true;
        }
        changed
    }

    /// Whose packets go where, by the store's word or, before it, by what was recalled.
    pub fn take_peers(&mut self, table: &LeaseTable) {
        self.peers = table.peers().cloned().collect();
        self.expired.clone_from(table.expired());
        self.refused = table.refused();
        self.has_snapshot = table.has_snapshot();
    }

    /// The MTU of pods on the underlay as it was seen last.
    pub fn pod_mtu(&self, report: &Report) -> u32 {
        let underlay = report.underlay.as_ref().unwrap_or(&self.underlay);
        self.backend.plane().pod_mtu(underlay.mtu)
    }

    /// What a pod that is added now gets, or why none can be. `store_problem`: why the store does not answer;
    /// `path_problem`: what stands in the way of the packet path, if there is one.
    pub fn pod_network(
        &self,
        report: &Report,
        store_problem: Option<&str>,
        path_problem: Option<&str>,
        now: SystemTime,
    ) -> Result<PodNetwork, NotReady> {
        let key = self.key_for_pods(now)?;
        if let Some(error) = report.blind() {
            return Err(NotReady::Degraded(format!("the kernel to be brought in order: {error}")));
        }
        if let Some(problem) = self.underlay_problem.as_ref().or(report.underlay_problem.as_ref()) {
            return Err(NotReady::Degraded(format!("the underlay: {problem}")));
        }
        if !report.usable {
            let first = report.pending.first().map(|p| format!("{}: {}", p.key, p.error));
            let what = first.unwrap_or_else(|| "the first pass".into());
            return Err(NotReady::Waiting(format!("the kernel to be brought in order: {what}")));
        }
        if let Some(problem) = path_problem {
            return Err(NotReady::Degraded(format!("the packet path: {problem}")));
        }
        if !self.peers_in_place(report) {
            let detail = store_problem.map(|p| format!(": {p}")).unwrap_or_default();
            return Err(NotReady::Waiting(format!("the first list of leases from the store{detail}")));
        }
        let overlay: Vec<Subnet> = vec![self.config.v4.network];
        let tunnel_port = self.config.backend.udp_port();
        Ok(PodNetwork { subnet: key.v4, overlay, mtu: self.pod_mtu(report), tunnel_port })
    }

    /// Others read subnet.env when they hear that the node is ready, so it is not before the file says what pods get.
    /// Our own plugin does not, and waits for [`Self::pod_network`] alone.
    pub(super) fn has_told(&self, network: &PodNetwork) -> Result<(), NotReady> {
        let told =
            self.told.as_ref().is_some_and(|env| (env.subnet, env.mtu) == (network.subnet, network.mtu));
        if told { Ok(()) } else { Err(NotReady::Waiting("the subnet file to be written".into())) }
    }

    /// What is worth keeping for a start without the store; `None` until the store itself has told.
    pub fn snapshot(&self, store: &str) -> Option<Snapshot> {
        // The pods of one that was lost are still to be served, and no new ones.
        let own = self.lease.key().map(|key| OwnSubnet {
            key,
            public_ip: self.leased_ip(),
            expires: self.lease.expires(),
        });
        self.has_snapshot.then(|| Snapshot {
            store: store.to_owned(),
            network: self.config.clone(),
            own,
            peers: self.peers.clone(),
        })
    }

    /// What peers are told: a change of the underlay's comes to them with the next write of the lease.
    pub(super) fn leased_ip(&self) -> Ipv4Addr {
        self.lease.public_ip().unwrap_or(self.underlay.public_ip)
    }

    /// Whether the last pass knew every peer that is known, from the store or from disk.
    pub fn peers_in_place(&self, report: &Report) -> bool {
        report.after_snapshot || self.recalled.is_some()
    }

    /// The subnet that new pods may have an address out of.
    pub fn key_for_pods(&self, now: SystemTime) -> Result<LeaseKey, NotReady> {
        let waiting = |what: String| Err(NotReady::Waiting(what));
        match &self.lease {
            LeaseState::Held { lease, .. } => Ok(lease.lease.key),
            LeaseState::Recalled { own, saved, .. } => {
                match own.doubt(*saved, self.underlay.public_ip, now) {
                    None => Ok(own.key),
                    Some(doubt) => waiting(format!("the store to confirm {}: {doubt}", own.key)),
                }
            }
            LeaseState::Lost { key, owner: Some(owner), .. } => {
                Err(NotReady::Degraded(format!("a new subnet: {key} is now held by {owner}")))
            }
            LeaseState::Lost { key, owner: None, .. } => {
                waiting(format!("the lease of {key}, which is gone from the store, to be taken again"))
            }
            LeaseState::Acquiring { problem: Some(problem) } => waiting(format!("a subnet lease: {problem}")),
            LeaseState::Acquiring { problem: None } => waiting("a subnet lease".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::lease::OwnedLease;

    const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn serving(lease: LeaseState) -> Serving {
        let config = NetworkConfig::parse(CONFIG).expect("valid");
        Serving {
            backend: Backend::new(&config, "02:00:00:00:00:01".parse().expect("mac")),
            config,
            config_notice: None,
            underlay: Underlay {
                iface: "eth0".parse().expect("name"),
                index: 2,
                addr: "192.0.2.1".parse().expect("ip"),
                mtu: 1500,
                public_ip: "192.0.2.1".parse().expect("ip"),
                chosen_by: "a test".into(),
            },
            underlay_problem: None,
            wish_problem: None,
            vtep_mac: "02:00:00:00:00:01".parse().expect("mac"),
            lease,
            peers: vec![],
            expired: BTreeMap::new(),
            refused: vec![],
            has_snapshot: false,
            recalled: None,
            first_start: false,
            told: None,
        }
    }

    fn recalled(expires: Option<u64>, public_ip: &str) -> LeaseState {
        let own = OwnSubnet {
            key: "10.5.1.0-24".parse().expect("key"),
            public_ip: public_ip.parse().expect("ip"),
            expires,
        };
        LeaseState::Recalled { own, saved: at(1000), problem: None }
    }

    fn held() -> LeaseState {
        let attrs = serde_json::from_str(r#"{"PublicIP":"192.0.2.1"}"#).expect("attrs");
        let lease = Lease { key: "10.5.1.0-24".parse().expect("key"), attrs, create_revision: 4 };
        LeaseState::Held {
            lease: OwnedLease { lease, mod_revision: 4, lease_id: 7, expires: None },
            problem: None,
        }
    }

    #[test]
    fn pods_get_addresses_out_of_a_subnet_that_is_beyond_doubt() {
        let now = at(2000);
        let refusal = |lease| serving(lease).key_for_pods(now).map(|_| ()).map_err(|e| e.to_string());
        assert_eq!(refusal(held()), Ok(()));
        assert_eq!(refusal(recalled(Some(2001), "192.0.2.1")), Ok(()));
        assert_eq!(refusal(recalled(None, "192.0.2.1")), Ok(()), "a reservation does not expire");
        for (lease, expected) in [
            (recalled(Some(2000), "192.0.2.1"), "10.5.1.0-24: its lease ran out"),
            (recalled(Some(2001), "192.0.2.9"), "192.0.2.9"),
            (
                LeaseState::Lost {
                    key: "10.5.1.0-24".parse().expect("key"),
                    owner: Some("192.0.2.7".into()),
                    problem: None,
                },
                "10.5.1.0-24 is now held by 192.0.2.7",
            ),
        ] {
            let error = refusal(lease).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
        // A clock that stands before the writing of the file cannot tell.
        let early = serving(recalled(Some(2001), "192.0.2.1")).key_for_pods(at(500)).expect_err("clock");
        assert!(early.to_string().contains("clock"), "{early}");
    }

    #[test]
    fn what_is_saved_and_shown_is_what_was_leased() {
        let said = |lease: LeaseState, underlay: &str| {
            let mut serving = serving(lease);
            serving.has_snapshot = true;
            serving.underlay.public_ip = underlay.parse().expect(underlay);
            let own = serving.snapshot("a store").expect("told").own.expect("a subnet");
            let shown = serving.lease_status(at(2000)).expect("a lease");
            assert_eq!(shown.public_ip.to_string(), own.public_ip.to_string());
            (own.public_ip.to_string(), own.expires, shown.expires_in)
        };
        // The address of the underlay has changed, and the store does not know yet.
        assert_eq!(said(held(), "192.0.2.9"), ("192.0.2.1".into(), None, None));
        let leased = recalled(Some(2001), "192.0.2.1");
        assert_eq!(said(leased, "192.0.2.9"), ("192.0.2.1".into(), Some(2001), Some(1)));
        let key = "10.5.1.0-24".parse().expect("key");
        let lost = LeaseState::Lost { key, owner: None, problem: None };
        assert_eq!(said(lost, "192.0.2.1"), ("192.0.2.1".into(), Some(0), Some(0)));
    }

    #[test]
    fn what_is_known_from_disk_serves_without_the_stores_list() {
        let mut report = Report::default();
        report.usable = true;
        let mut serving = serving(recalled(Some(2001), "192.0.2.1"));
        let now = at(1500);
        let refused = serving.pod_network(&report, Some("no answer"), None, now).expect_err("no peers yet");
        assert!(refused.to_string().ends_with("from the store: no answer"), "{refused}");
        serving.recalled = Some(Recalled { saved: at(1000) });
        let network = serving.pod_network(&report, Some("no answer"), None, now).expect("served");
        assert_eq!((network.subnet.to_string(), network.mtu), ("10.5.1.0/24".into(), 1450));
        let refused = serving
            .pod_network(&report, None, Some("UDP 192.0.2.1:8285: Address in use"), now)
            .expect_err("no path");
        assert_eq!(refused, NotReady::Degraded("the packet path: UDP 192.0.2.1:8285: Address in use".into()));
        serving.underlay_problem = Some("gone".into());
        let refused = serving.pod_network(&report, None, None, now).expect_err("no underlay");
        assert!(matches!(refused, NotReady::Degraded(_)), "{refused}");
    }

    #[test]
    fn a_node_is_ready_when_subnet_env_says_what_pods_get() {
        let mut serving = serving(held());
        let subnet = "10.5.1.0/24".parse().expect("net");
        let network = PodNetwork { subnet, overlay: vec![], mtu: 1450, tunnel_port: None };
        let refused = serving.has_told(&network).expect_err("not written by this agent");
        assert_eq!(refused, NotReady::Waiting("the subnet file to be written".into()));
        let env = SubnetEnv {
            network: serving.config.v4.network,
            subnet: network.subnet,
            ipv6: None,
            mtu: 1450,
            ip_masq: false,
        };
        serving.told = Some(env.clone());
        assert_eq!(serving.has_told(&network), Ok(()));
        for other in [
            SubnetEnv { mtu: 1400, ..env.clone() },
            SubnetEnv { subnet: "10.5.2.0/24".parse().expect("net"), ..env },
        ] {
            serving.told = Some(other);
            assert!(serving.has_told(&network).is_err(), "{:?}", serving.told);
        }
    }

    #[test]
    fn the_reconciler_hears_of_what_is_new_and_keeps_what_it_had() {
        let mut inputs = Inputs::default();
        let mut serving = serving(LeaseState::Acquiring { problem: None });
        assert!(!serving.fill(&mut inputs) && inputs.node.is_none());
        serving.lease = held();
        assert!(serving.fill(&mut inputs) && inputs.node.is_some());
        assert!(!serving.fill(&mut inputs), "nothing is new");
        serving.lease = LeaseState::Lost {
            key: "10.5.1.0-24".parse().expect("key"),
            owner: Some("192.0.2.7".into()),
            problem: None,
        };
        assert!(!serving.fill(&mut inputs), "a lost subnet is served until there is another");
        serving.underlay.addr = "192.0.2.5".parse().expect("ip");
        assert!(serving.fill(&mut inputs));
        assert_eq!(inputs.node.as_ref().map(|n| n.underlay.addr), Some(serving.underlay.addr));
    }
}
