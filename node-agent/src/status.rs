//! What the agent says of itself: one document for `/debug/state`, `weftctl status --json` and readiness.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use weft_shared::lease::LeaseKey;
use weft_shared::{IfName, Subnet};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: String,
    /// The first ADD can succeed.
    pub ready: bool,
    /// What readiness waits for; empty when ready.
    pub waiting_for: Vec<String>,
    pub store: StoreStatus,
    pub network: Option<NetworkStatus>,
    pub lease: Option<LeaseStatus>,
    pub underlay: Option<UnderlayStatus>,
    pub dataplane: Option<DataplaneStatus>,
    /// The forwarding threads of the udp backend; other backends have none.
    #[serde(default)]
    pub packet_path: Option<PacketPathStatus>,
    pub peers: Vec<PeerStatus>,
    /// Leases and entries of the store that are not used, each with the reason.
    pub refused: Vec<RefusedLease>,
    pub pods: PodStatus,
    pub host: HostStatus,
    /// Settings of the host that stand in packets' way and are not weft's to change.
    #[serde(default)]
    pub advice: Vec<HostAdvice>,
    /// Of a Kubernetes cluster, unless that is not to be looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_policies: Option<NetworkPolicyStatus>,
    /// Why nothing answers at `--admin-listen`; what it would serve is served by the admin socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_problem: Option<String>,
}

impl Status {
    /// What somebody should know of a node that serves all the same.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = Vec::new();
        if let Some(age) = self.store.recalled_age {
            notices.push(format!("network, lease and peers are from disk, saved {age} s ago"));
        }
        notices.extend(self.port_problem.clone());
        notices.extend(self.network.iter().filter_map(|n| n.notice.as_ref()).map(|n| n.text.clone()));
        let underlay = self.underlay.as_ref().and_then(|underlay| underlay.notice.as_ref());
        notices.extend(underlay.map(|notice| format!("the underlay stays as it is: {notice}")));
        notices.extend(self.network_policies.as_ref().and_then(NetworkPolicyStatus::warning));
        for StrandedStatus { subnet, pods, .. } in &self.pods.stranded {
            notices.push(format!("{pods} pods live in {subnet}, which this node has no more"));
        }
        notices
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// `etcd`, `kubernetes` or `embedded`.
    pub kind: String,
    pub location: String,
    pub connected: bool,
    pub problem: Option<String>,
    /// An embedded store serves the agents of one machine only.
    pub one_machine_only: bool,
    /// Since start: how often the watch had to begin anew with a snapshot.
    pub relists: u64,
    /// Seconds since that was saved on disk which stands in for the store's word; absent once the store has told.
    #[serde(default)]
    pub recalled_age: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkStatus {
    pub network: Subnet,
    pub subnet_len: u8,
    /// Subnets are the Nodes' podCIDRs, of whatever length.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub any_len: bool,
    /// First and last subnet that is leased.
    #[serde(default)]
    pub subnet_min: Option<IpAddr>,
    #[serde(default)]
    pub subnet_max: Option<IpAddr>,
    /// `vxlan`, `host-gw` or `udp`.
    pub backend: String,
    /// UDP port of the tunnel, if the backend has one.
    pub port: Option<u16>,
    pub vni: Option<u32>,
    /// What the store has instead, if that cannot be applied.
    #[serde(default)]
    pub notice: Option<ConfigNoticeStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigNoticeStatus {
    /// `differs`, `invalid` or `missing`.
    pub kind: String,
    pub text: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeaseStatus {
    pub key: LeaseKey,
    pub public_ip: IpAddr,
    /// `held`, `recalled` (from disk, not confirmed by the store), `acquiring` or `lost`.
    pub state: String,
    /// Seconds, 0 for one that was lost; absent for a reservation, which does not expire.
    pub expires_in: Option<u64>,
    pub problem: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UnderlayStatus {
    pub iface: IfName,
    pub address: IpAddr,
    pub mtu: u32,
    /// Which setting decided: `--iface eth0`, `default route`.
    #[serde(default)]
    pub chosen_by: String,
    /// Why nothing can leave by it.
    #[serde(default)]
    pub problem: Option<String>,
    /// Why it is not the one that an operator wishes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DataplaneStatus {
    /// The overlay's device, if the backend has one.
    pub device: Option<IfName>,
    /// MTU of pods.
    pub mtu: u32,
    /// Objects that should be in the kernel, and are.
    pub objects: usize,
    /// Objects that should be and are not, or should not and are.
    pub pending: Vec<PendingObject>,
    /// Passes since start, and operations that mended something after the first complete pass.
    pub passes: u64,
    pub repairs: u64,
    pub last_error: Option<String>,
    /// Seconds since the last complete pass.
    pub last_pass_ago: Option<f64>,
    /// Netlink events are being received; without them only the sweep repairs.
    pub monitor: bool,
    /// Since start: how often the kernel dropped events because they were not read fast enough.
    #[serde(default)]
    pub monitor_overruns: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PendingObject {
    pub object: String,
    pub error: String,
    pub attempts: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketPathStatus {
    /// Where datagrams arrive and leave from.
    pub listen: SocketAddr,
    /// Why nothing is forwarded at the moment.
    pub problem: Option<String>,
    /// Every one of them.
    pub offloads: Vec<OffloadStatus>,
    /// From this node's device to peers, and from peers to the device, since the agent's start.
    pub sent: TrafficStatus,
    pub received: TrafficStatus,
    /// Packets, for every direction and reason.
    pub dropped: Vec<DropCount>,
    /// ICMP errors answered to senders on this node, and those that the rate limit held back.
    pub icmp_errors_sent: u64,
    pub icmp_errors_suppressed: u64,
    /// How often the device went away under the threads.
    pub device_lost: u64,
    /// Why no ICMP errors are sent, although packets are forwarded.
    #[serde(default)]
    pub icmp_problem: Option<String>,
    /// How often a thread panicked and they were started anew: a bug.
    #[serde(default)]
    pub panics: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadStatus {
    /// As `--udp-offload-off` names it.
    pub name: String,
    /// `in-use`, `switched-off`, `refused`, or `untried` before the device and the socket are there.
    pub outcome: String,
    /// How it was refused.
    pub detail: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TrafficStatus {
    /// As peers see them: one in each datagram.
    pub packets: u64,
    /// Of the packets that datagrams carry.
    pub bytes: u64,
    /// System calls.
    pub calls: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropCount {
    /// `sent` or `received`, as the packet would have been.
    pub direction: String,
    pub reason: String,
    pub packets: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostAdvice {
    pub problem: String,
    /// The command, or the setting, that mends it.
    pub fix: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPolicyStatus {
    pub state: NetworkPolicyState,
    /// In the whole cluster; absent where nobody had to ask, or nobody has answered.
    pub count: Option<u64>,
    /// What enforces them on this node, each with what gave it away.
    pub enforcers: Vec<String>,
    /// Why it is unknown.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkPolicyState {
    /// Something on this node enforces whatever there is.
    Enforced,
    /// There is nothing to enforce.
    None,
    Unenforced,
    Unknown,
}

impl NetworkPolicyStatus {
    /// `None`: it cannot be told.
    pub fn unenforced(&self) -> Option<bool> {
        match self.state {
            NetworkPolicyState::Unenforced => Some(true),
            NetworkPolicyState::Enforced | NetworkPolicyState::None => Some(false),
            NetworkPolicyState::Unknown => None,
        }
    }

    /// If they have no effect.
    pub fn warning(&self) -> Option<String> {
        let count = self.count.filter(|_| self.state == NetworkPolicyState::Unenforced)?;
        let (are, them) =
            if count == 1 { ("NetworkPolicy exists", "it") } else { ("NetworkPolicies exist", "them") };
        Some(format!("{count} {are}, and nothing that weft knows enforces {them} on this node"))
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub key: LeaseKey,
    pub public_ip: IpAddr,
    pub backend: String,
    /// Every object of this peer is in the kernel.
    pub programmed: bool,
    /// Why not, or why the dataplane cannot serve it.
    pub problem: Option<String>,
    /// Seconds until its objects go, when its lease has expired.
    #[serde(default)]
    pub grace_left: Option<u64>,
    /// The address that answers an overlay ping.
    pub overlay_probe: IpAddr,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusedLease {
    pub key: String,
    pub reason: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PodStatus {
    pub attachments: usize,
    pub addresses_used: usize,
    pub addresses_total: usize,
    pub bridges: Vec<IfName>,
    /// Living veths of whose addresses no record can be read. No pod can be added meanwhile.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<IfName>,
    /// Pods that still live in a subnet which this node has no more.
    #[serde(default)]
    pub stranded: Vec<StrandedStatus>,
    #[serde(default)]
    pub list: Vec<AttachmentStatus>,
    #[serde(default)]
    pub counters: PodCounters,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrandedStatus {
    pub subnet: Subnet,
    pub pods: usize,
    /// The node that has it now, if any.
    pub owner: Option<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentStatus {
    pub network: String,
    pub container_id: String,
    pub ifname: IfName,
    /// `namespace/name`, when the runtime said so.
    pub pod: Option<String>,
    pub addresses: Vec<IpAddr>,
    pub host_veth: IfName,
    pub bridge: IfName,
    /// `reserved`, `committed` or `aborted`.
    pub state: String,
    /// Ports of the host that lead to it, such as `8080/tcp -> 80`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<String>,
    /// What it may receive and send at most, such as `in 8 Mbit/s`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
}

/// What address management has done since the agent's start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PodCounters {
    /// ADDs that were committed.
    pub adds: u64,
    /// DELs that were answered, and attachments that GC removed.
    pub dels: u64,
    /// ADDs that were undone because their connection closed before Commit.
    pub rolled_back: u64,
    /// DELs that were left for the agent while it was away.
    pub tombstones_drained: u64,
    /// Host-side veths with our mark and no record that were deleted.
    pub orphans_removed: u64,
    /// Attachments that lost their veth without a DEL.
    pub dead_freed: u64,
    pub failures: Vec<FailureCount>,
}

/// Requests of one verb that failed with one code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureCount {
    pub verb: String,
    /// See [`weft_shared::cni::Code`].
    pub code: u32,
    pub count: u64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostStatus {
    pub hostname: String,
    pub kernel: String,
    pub distribution: String,
    /// Seconds.
    pub host_uptime: u64,
    pub agent_uptime: u64,
    /// Bytes.
    pub agent_memory: u64,
    /// Seconds of processor time since the agent's start.
    pub agent_cpu: f64,
}

/// Documents that the tests of status' readers share.
#[cfg(test)]
pub(crate) mod sample {
    use super::*;

    /// A node in service, with one peer that is not programmed and one lease refused.
    pub(crate) fn ready() -> Status {
        let peer = |key: &str, public_ip: &str, problem: Option<&str>| PeerStatus {
            key: key.parse().expect(key),
            public_ip: public_ip.parse().expect(public_ip),
            backend: "vxlan".into(),
            programmed: problem.is_none(),
            problem: problem.map(Into::into),
            grace_left: problem.is_none().then_some(575),
            overlay_probe: key.split('-').next().and_then(|addr| addr.parse().ok()).expect(key),
        };
        let attachment = |container_id: &str, pod: Option<&str>, address: &str, veth: &str, state: &str| {
            AttachmentStatus {
                network: "weft".into(),
                container_id: container_id.into(),
                ifname: "eth0".parse().expect("name"),
                pod: pod.map(Into::into),
                addresses: vec![address.parse().expect(address)],
                host_veth: veth.parse().expect(veth),
                bridge: "cni0".parse().expect("name"),
                state: state.into(),
                host_ports: match pod {
                    Some(_) => vec!["8080/tcp -> 80".into(), "53/udp -> 5353".into()],
                    None => vec![],
                },
                limits: pod.map(|_| "in 8 Mbit/s".to_owned()).into_iter().collect(),
            }
        };
        Status {
            version: "0.1.0".into(),
            node: "node-a".into(),
            ready: true,
            waiting_for: vec![],
            store: StoreStatus {
                kind: "etcd".into(),
                location: "etcd at http://10.0.0.1:2379, prefix /coreos.com/network".into(),
                connected: true,
                problem: None,
                one_machine_only: false,
                relists: 2,
                recalled_age: None,
            },
            network: Some(NetworkStatus {
                network: "10.5.0.0/16".parse().expect("network"),
                subnet_len: 24,
                any_len: false,
                subnet_min: "10.5.1.0".parse().ok(),
                subnet_max: "10.5.255.0".parse().ok(),
                backend: "vxlan".into(),
                port: Some(8472),
                vni: Some(1),
                notice: None,
            }),
            lease: Some(LeaseStatus {
                key: "10.5.1.0-24".parse().expect("key"),
                public_ip: "192.168.9.1".parse().expect("ip"),
                state: "held".into(),
                expires_in: Some(82_800),
                problem: None,
            }),
            underlay: Some(UnderlayStatus {
                iface: "eth0".parse().expect("name"),
                address: "192.168.9.1".parse().expect("ip"),
                mtu: 1500,
                chosen_by: "default route".into(),
                problem: None,
                notice: None,
            }),
            dataplane: Some(DataplaneStatus {
                device: Some("flannel.1".parse().expect("name")),
                mtu: 1450,
                objects: 9,
                pending: vec![PendingObject {
                    object: "route 10.5.3.0/24".into(),
                    error: "no such device".into(),
                    attempts: 4,
                }],
                passes: 41,
                repairs: 3,
                last_error: None,
                last_pass_ago: Some(1.5),
                monitor: true,
                monitor_overruns: 1,
            }),
            packet_path: None,
            peers: vec![
                peer("10.5.2.0-24", "192.168.9.2", None),
                peer("10.5.3.0-24", "192.168.9.3", Some("no such device")),
            ],
            refused: vec![RefusedLease {
                key: "10.9.1.0-24".into(),
                reason: "outside Network 10.5.0.0/16".into(),
            }],
            pods: PodStatus {
                attachments: 2,
                addresses_used: 2,
                addresses_total: 253,
                bridges: vec!["cni0".parse().expect("name")],
                unknown: vec![],
                stranded: vec![],
                list: vec![
                    attachment(
                        "0f3a9c51d27e4b68",
                        Some("shop/web-0"),
                        "10.5.1.2",
                        "vethab2cd3ef4gh",
                        "committed",
                    ),
                    attachment("7be2104f9d3c8a55", None, "10.5.1.3", "vethij5kl6mn7op", "reserved"),
                ],
                counters: PodCounters {
                    adds: 7,
                    dels: 6,
                    rolled_back: 5,
                    tombstones_drained: 4,
                    orphans_removed: 3,
                    dead_freed: 2,
                    failures: vec![
                        FailureCount { verb: "check".into(), code: 104, count: 1 },
                        FailureCount { verb: "reserve".into(), code: 11, count: 8 },
                    ],
                },
            },
            host: HostStatus {
                hostname: "node-a".into(),
                kernel: "6.18.0".into(),
                distribution: "Debian GNU/Linux 12".into(),
                host_uptime: 90_061,
                agent_uptime: 7_325,
                agent_memory: 9_437_184,
                agent_cpu: 12.25,
            },
            network_policies: None,
            port_problem: None,
            advice: vec![HostAdvice {
                problem:
                    "nftables chain inet firewalld filter_FORWARD drops forwarded packets of 10.5.0.0/16"
                        .into(),
                fix: "firewall-cmd --permanent --zone=trusted --add-source=10.5.0.0/16".into(),
            }],
        }
    }

    /// A node of the udp backend that has carried and dropped something.
    pub(crate) fn udp() -> Status {
        let mut status = ready();
        if let Some(network) = &mut status.network {
            (network.backend, network.port, network.vni) = ("udp".into(), Some(8285), None);
        }
        if let Some(dataplane) = &mut status.dataplane {
            dataplane.device = "flannel0".parse().ok();
        }
        for peer in &mut status.peers {
            peer.backend = "udp".into();
        }
        let offload = |name: &str, outcome: &str, detail: Option<&str>| OffloadStatus {
            name: name.into(),
            outcome: outcome.into(),
            detail: detail.map(Into::into),
        };
        let dropped = |direction: &str, reason: &str, packets| DropCount {
            direction: direction.into(),
            reason: reason.into(),
            packets,
        };
        status.packet_path = Some(PacketPathStatus {
            listen: "192.168.9.1:8285".parse().expect("address"),
            problem: None,
            offloads: vec![
                offload("tun-tso", "in-use", None),
                offload("tun-uso", "refused", Some("Invalid argument (os error 22)")),
                offload("udp-gro", "switched-off", None),
            ],
            sent: TrafficStatus { packets: 4400, bytes: 6_476_800, calls: 120 },
            received: TrafficStatus { packets: 2200, bytes: 114_400, calls: 300 },
            dropped: vec![
                dropped("sent", "no-route", 3),
                dropped("received", "unknown-peer", 5),
                dropped("received", "short", 0),
            ],
            icmp_errors_sent: 2,
            icmp_errors_suppressed: 1,
            device_lost: 1,
            icmp_problem: Some("no right".into()),
            panics: 2,
        });
        status
    }

    /// A node that serves although not everything is as it was meant.
    pub(crate) fn with_notices() -> Status {
        let mut status = ready();
        status.store.recalled_age = Some(90);
        let text = "the last good one stays in force: network configuration: Network = 7";
        let notice = ConfigNoticeStatus { kind: "invalid".into(), text: text.into() };
        if let Some(network) = &mut status.network {
            network.notice = Some(notice);
        }
        if let Some(underlay) = &mut status.underlay {
            underlay.problem = Some("eth0 is down".into());
            underlay.notice = Some("no such address".into());
        }
        status.network_policies = Some(NetworkPolicyStatus {
            state: NetworkPolicyState::Unenforced,
            count: Some(3),
            enforcers: vec![],
            problem: None,
        });
        let (subnet, owner) = ("10.5.9.0/24".parse().expect("subnet"), "192.168.9.7".parse().ok());
        status.pods.stranded = vec![StrandedStatus { subnet, pods: 3, owner }];
        status
    }

    /// A node whose store does not answer.
    pub(crate) fn waiting() -> Status {
        let problem = "http://127.0.0.1:2379 does not answer: connection refused (--etcd-endpoints)";
        let mut status = ready();
        status.ready = false;
        status.waiting_for = vec![format!("the store: {problem}")];
        status.store.connected = false;
        status.store.problem = Some(problem.into());
        (status.network, status.lease, status.dataplane) = (None, None, None);
        status.peers.clear();
        status.refused.clear();
        status.pods = PodStatus::default();
        status
    }
}
