//! host-gw: the peer is the gateway of its subnet (flannel pkg/backend/hostgw). No encapsulation, full MTU, and
//! every peer must be on the same link, which is checked here for each of them.

use std::net::{IpAddr, Ipv4Addr};

use weft_shared::IfName;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};

use super::{Dataplane, LocalNode, Wanted, public_addr};
use crate::object::{Object, Route};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostGw;

impl HostGw {
    fn routes(&self, local: &LocalNode, peer: &Lease) -> Result<Vec<Object>, String> {
        let dev = &local.underlay.iface;
        let mut routes = Vec::new();
        for subnet in peer.key.subnets() {
            let gateway = public_addr(peer, subnet)?;
            if !local.on_link.contains(&gateway) {
                return Err(format!(
                    "{gateway} is not on-link on {dev}: host-gw needs every node in one Ethernet segment"
                ));
            }
            routes.push(Object::Route { dst: subnet, route: Route::via(gateway, dev, false) });
        }
        Ok(routes)
    }
}

impl Dataplane for HostGw {
    fn backend_type(&self) -> &'static str {
        "host-gw"
    }

    fn device(&self) -> Option<&IfName> {
        None
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
        underlay_mtu
    }

    /// The bridge's address; a node without pods has none yet.
    fn probe(&self, peer: &LeaseKey) -> IpAddr {
        peer.v4.gateway()
    }

    fn asks_for_on_link(&self) -> bool {
        true
    }

    fn desired(&self, local: &LocalNode, peers: &[&Lease]) -> Wanted {
        let mut wanted = Wanted::default();
        for peer in peers {
            match self.routes(local, peer) {
                Ok(routes) => wanted.serve(peer, routes),
                Err(problem) => wanted.refuse(peer, problem),
            }
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::Backend;
    use crate::underlay::Underlay;

    fn local(on_link: &[&str]) -> LocalNode {
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
            on_link: on_link.iter().map(|ip| ip.parse().expect("ip")).collect(),
        }
    }

    fn peer(key: &str, value: &str) -> Lease {
        let (key, attrs) = (key.parse().expect(key), serde_json::from_str(value).expect(value));
        Lease { key, attrs, create_revision: 1 }
    }

    #[test]
    fn an_on_link_peer_is_a_plain_route_and_another_is_refused_until_it_is() {
        let peers =
            [peer("10.5.2.0-24", r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"host-gw"}"#)];
        let refused = Backend::HostGw(HostGw).desired(&local(&[]), &peers);
        assert!(refused.desired.objects().count() == 0);
        let problem = refused.peers[&peers[0].key].problem.clone().unwrap_or_default();
        assert!(problem.contains("192.0.2.2 is not on-link on eth0"), "{problem}");

        let served = Backend::HostGw(HostGw).desired(&local(&["192.0.2.2"]), &peers);
        let objects: Vec<_> = served.desired.objects().map(|(_, o)| o.clone()).collect();
        let route = Route::via("192.0.2.2".parse().expect("ip"), &"eth0".parse().expect("name"), false);
        assert_eq!(objects, [Object::Route { dst: "10.5.2.0/24".parse().expect("net"), route }]);
        assert_eq!(served.peers[&peers[0].key].problem, None);
    }

    #[test]
    fn nobody_has_the_broadcast_address() {
        let value = r#"{"PublicIP":"192.0.2.255","PublicIPv6":null,"BackendType":"host-gw"}"#;
        let peers = [peer("10.5.2.0-24", value)];
        let refused = Backend::HostGw(HostGw).desired(&local(&["192.0.2.255"]), &peers);
        assert_eq!(refused.desired.objects().count(), 0);
        let problem = "PublicIP = 192.0.2.255: expected a node's address, not eth0's broadcast one";
        assert_eq!(refused.peers[&peers[0].key].problem.as_deref(), Some(problem));
    }

    #[test]
    fn a_dual_stack_peer_is_two_routes() {
        let value = r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"host-gw"}"#;
        let peers = [peer("10.5.2.0-24&fd00:5:2::-64", value)];
        let wanted = Backend::HostGw(HostGw).desired(&local(&["192.0.2.2", "2001:db8::2"]), &peers);
        assert_eq!(wanted.peers[&peers[0].key].keys.len(), 2);
    }

    #[test]
    fn the_published_value_has_no_data() {
        let published =
            serde_json::to_string(&HostGw.lease_attrs(Ipv4Addr::new(192, 0, 2, 1))).expect("json");
        assert_eq!(published, r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#);
    }
}
