//! udp as flannel has it (pkg/backend/udp): one TUN device that takes the whole overlay. Who is where, the threads that carry
//! its packets know by a table ([`crate::packet_path`]): no kernel object belongs to one peer.
//!
//! A pod's packet to 10.5.2.9 meets the route `10.5.0.0/16 dev flannel0`, is read from the device, and goes as the
//! payload of one datagram to the peer's public IP and **this** node's port: none is published.
//!
//! The route's metric lets a flanneld start beside what is left here: it makes flannel1, with a route of metric 0.
//! The device has no IPv6, or the kernel's router solicitations and multicast reports would go into it.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::names::{ROUTE_PROTOCOL, UDP_DEVICE, UDP_ROUTE_METRIC};
use weft_shared::{IfName, Subnet};

use super::{Dataplane, LocalNode, Wanted, public_addr};
use crate::object::{
    AddrForm, AddrScope, Alterations, Key, Link, LinkKind, LinkMac, Object, Route, RouteForm, Tun,
};

/// Outer IPv4 header 20, UDP 8.
const OVERHEAD: u32 = 28;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpPlane {
    device: IfName,
    /// The overlay's.
    network: Subnet,
}

impl UdpPlane {
    pub fn new(network: Subnet) -> Self {
        let device = UDP_DEVICE.parse().unwrap_or_else(|_| unreachable!("a name of eight bytes"));
        Self { device, network }
    }

    /// What every peer is served by.
    fn objects(&self, local: &LocalNode) -> [Object; 4] {
        let dev = &self.device;
        let link = Link {
            kind: LinkKind::Tun(Tun::for_queues()),
            mac: LinkMac::None,
            mtu: self.pod_mtu(local.underlay.mtu),
            up: true,
            altered: Alterations::default(),
        };
        let route = Route {
            gateway: None,
            dev: Some(dev.clone()),
            onlink: false,
            protocol: ROUTE_PROTOCOL,
            source: None,
            form: RouteForm { metric: Some(UDP_ROUTE_METRIC), ..RouteForm::default() },
        };
        [
            Object::Link { name: dev.clone(), link },
            Object::Sysctl { path: format!("net/ipv6/conf/{dev}/disable_ipv6"), value: "1".into() },
            Object::Addr {
                dev: dev.clone(),
                addr: IpNetwork::from(local.lease.v4.addr()),
                scope: AddrScope::Global,
                form: AddrForm::default(),
            },
            Object::Route { dst: self.network, route },
        ]
    }
}

impl Dataplane for UdpPlane {
    /// flannel publishes none.
    fn backend_type(&self) -> &'static str {
        ""
    }

    fn device(&self) -> Option<&IfName> {
        Some(&self.device)
    }

    fn lease_attrs(&self, public_ip: Ipv4Addr) -> LeaseAttrs {
        LeaseAttrs {
            public_ip,
            public_ipv6: None,
            backend_type: self.backend_type().into(),
            backend_data: None,
            backend_v6_data: None,
        }
    }

    fn pod_mtu(&self, underlay_mtu: u32) -> u32 {
        underlay_mtu.saturating_sub(OVERHEAD)
    }

    /// Every node has its network address on the device.
    fn probe(&self, peer: &LeaseKey) -> IpAddr {
        peer.v4.addr()
    }

    fn asks_for_on_link(&self) -> bool {
        false
    }

    fn desired(&self, local: &LocalNode, peers: &[&Lease]) -> Wanted {
        let mut wanted = Wanted::default();
        let objects = self.objects(local);
        // A setting that cannot be made keeps no packet back.
        let carriers: Vec<Key> =
            objects.iter().map(Object::key).filter(|key| !matches!(key, Key::Sysctl(_))).collect();
        objects.into_iter().for_each(|object| wanted.desired.insert(object));
        for peer in peers {
            match public_addr(peer, peer.key.v4) {
                Ok(_) => wanted.peers.entry(peer.key).or_default().keys.clone_from(&carriers),
                Err(problem) => wanted.refuse(peer, problem),
            }
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use weft_shared::netconf::NetworkConfig;

    use super::*;
    use crate::dataplane::Backend;
    use crate::underlay::Underlay;

    const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":9000}}"#;

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).expect(json)
    }

    fn local() -> LocalNode {
        LocalNode {
            lease: "10.5.1.0-24".parse().expect("key"),
            underlay: Underlay {
                iface: "eth0".parse().expect("name"),
                index: 3,
                addr: Ipv4Addr::new(192, 0, 2, 1),
                mtu: 1500,
                public_ip: Ipv4Addr::new(192, 0, 2, 1),
                chosen_by: "a test".into(),
            },
            broadcast: Some(Ipv4Addr::new(192, 0, 2, 255)),
            on_link: Default::default(),
        }
    }

    fn peer(key: &str, value: &str) -> Lease {
        let (key, attrs) = (key.parse().expect(key), serde_json::from_str(value).expect(value));
        Lease { key, attrs, create_revision: 1 }
    }

    fn backend() -> Backend {
        Backend::new(&config(CONFIG), "02:00:00:00:00:01".parse().expect("mac"))
    }

    #[test]
    fn the_device_the_address_and_the_one_route_are_flannels_but_for_the_metric() {
        let wanted = backend().desired(&local(), &[]);
        let keys: Vec<String> = wanted.desired.objects().map(|(key, _)| key.to_string()).collect();
        assert_eq!(
            keys,
            [
                "link flannel0",
                "sysctl net.ipv6.conf.flannel0.disable_ipv6",
                "address 10.5.1.0/32 dev flannel0",
                "route 10.5.0.0/16",
            ]
        );
        let objects: Vec<&Object> = wanted.desired.objects().map(|(_, object)| object).collect();
        assert!(matches!(objects[0], Object::Link { link, .. } if (link.mtu, link.up) == (1472, true)));
        assert!(matches!(objects[3], Object::Route { route, .. }
            if route.form.metric == Some(4096) && route.gateway.is_none() && route.protocol == 87));
        let published = backend().plane().lease_attrs(Ipv4Addr::new(192, 0, 2, 1));
        let published = serde_json::to_string(&published).expect("json");
        assert_eq!(published, r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#);
        assert_eq!(backend().plane().pod_mtu(1500), 1472);
        assert_eq!(backend().plane().probe(&"10.5.2.0-24".parse().expect("key")).to_string(), "10.5.2.0");
    }

    #[test]
    fn a_peer_of_no_backend_is_served_by_what_is_there_and_any_other_is_refused() {
        let peers = [
            peer("10.5.2.0-24", r#"{"PublicIP":"192.0.2.2","PublicIPv6":null}"#),
            peer("10.5.3.0-24", r#"{"PublicIP":"192.0.2.3","BackendType":"vxlan"}"#),
            peer("10.5.4.0-24", r#"{"PublicIP":"192.0.2.4","BackendType":"udp"}"#),
            peer("10.5.5.0-24", r#"{"PublicIP":"0.0.0.0"}"#),
            peer("10.5.6.0-24", r#"{"PublicIP":"192.0.2.255"}"#),
        ];
        let wanted = backend().desired(&local(), &peers);
        assert_eq!(wanted.desired.objects().count(), 4, "nothing in the kernel is one peer's");
        let plan = |lease: &Lease| &wanted.peers[&lease.key];
        let keys: Vec<String> = plan(&peers[0]).keys.iter().map(Key::to_string).collect();
        assert_eq!(keys, ["link flannel0", "address 10.5.1.0/32 dev flannel0", "route 10.5.0.0/16"]);
        assert_eq!(plan(&peers[0]).problem, None);
        for (lease, reason) in [
            (&peers[1], r#"BackendType = "vxlan": expected none, which is udp, this node's"#),
            (&peers[2], r#"BackendType = "udp": expected none, which is udp, this node's"#),
            (&peers[3], "PublicIP is missing: expected the address that leads to 10.5.5.0/24"),
            (&peers[4], "PublicIP = 192.0.2.255: expected a node's address, not eth0's broadcast one"),
        ] {
            assert_eq!(plan(lease).problem.as_deref(), Some(reason));
        }
    }

    #[test]
    fn a_node_of_another_backend_refuses_a_udp_peer() {
        let vxlan = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let backend = Backend::new(&vxlan, "02:00:00:00:00:01".parse().expect("mac"));
        let peers = [peer("10.5.2.0-24", r#"{"PublicIP":"192.0.2.2"}"#)];
        let wanted = backend.desired(&local(), &peers);
        let problem = wanted.peers[&peers[0].key].problem.as_deref();
        assert_eq!(problem, Some(r#"BackendType = "": expected "vxlan", this node's"#));
    }
}
