//! VXLAN (RFC 7348) as flannel programs it: no multicast, no learning, one route, one neighbour and one forwarding
//! entry per peer (flannel pkg/backend/vxlan).
//!
//! A pod's packet to 10.5.2.9 meets the route `10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink`; the neighbour entry of
//! 10.5.2.0 gives the peer's VTEP MAC; the forwarding entry of that MAC gives the peer's public IP. Nothing is ever
//! resolved on the wire, so nothing has to answer.
//!
//! With `DirectRouting` a peer that the underlay reaches without a gateway is one route through its public address, as
//! host-gw has it, and nothing else. Both nodes decide for themselves: the device takes packets from the tunnel
//! whatever its own node sends by, so that while they differ nothing is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey, VxlanData};
use weft_shared::netconf::VxlanConfig;
use weft_shared::{IfName, Mac, Subnet};

use super::{Dataplane, LocalNode, Wanted, public_addr};
use crate::object::{
    AddrForm, AddrScope, Alterations, FdbPath, Link, LinkKind, LinkMac, Object, Route, Vxlan, VxlanTuning,
};

/// Outer IPv4 header 20, UDP 8, VXLAN 8, inner Ethernet 14.
const OVERHEAD: u32 = 50;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanPlane {
    config: VxlanConfig,
    device: IfName,
    /// Missing when the VNI is too long for the name.
    device_v6: Option<IfName>,
    vtep_mac: Mac,
}

impl VxlanPlane {
    pub fn new(config: VxlanConfig, vtep_mac: Mac) -> Self {
        let device_v6 = format!("flannel-v6.{}", config.vni).parse().ok();
        Self { device: config.device(), device_v6, config, vtep_mac }
    }

    /// The device as it must be on this node.
    fn link(&self, local: &LocalNode) -> Link {
        let vxlan = Vxlan {
            vni: self.config.vni,
            underlay: local.underlay.index,
            local: local.underlay.addr.into(),
            port: self.config.port,
            gbp: self.config.gbp,
            foreign_options: BTreeSet::new(),
            tuning: VxlanTuning::with_learning(self.config.learning),
        };
        Link {
            kind: LinkKind::Vxlan(vxlan),
            mac: LinkMac::Exactly(self.vtep_mac),
            mtu: self.pod_mtu(local.underlay.mtu),
            up: true,
            altered: Alterations::default(),
        }
    }

    /// One subnet of one peer: neighbour, forwarding entry, route.
    fn entries(&self, dev: &IfName, subnet: Subnet, vtep: Mac, public: IpAddr) -> Vec<Object> {
        let gateway = subnet.addr();
        vec![
            Object::Fdb { dev: dev.clone(), mac: vtep, dst: public, path: FdbPath::default() },
            Object::Neigh { dev: dev.clone(), ip: gateway, mac: vtep },
            Object::Route { dst: subnet, route: Route::via(gateway, dev, true) },
        ]
    }

    /// A MAC leads to one node only. Two nodes have the same when a state directory was copied.
    fn only_with_its_own_mac(
        &self,
        vteps: &mut BTreeMap<Mac, String>,
        peer: &Lease,
        entries: Vec<Object>,
    ) -> Result<Vec<Object>, String> {
        for entry in &entries {
            let Object::Fdb { mac, .. } = entry else { continue };
            let name = format!("{} ({})", peer.key, peer.attrs.public_ip);
            if let Some(other) = vteps.get(mac).filter(|other| **other != name) {
                return Err(format!(
                    "VtepMAC = {mac}: {other} has the same; was its --state-dir copied? Remove it on one of them and restart weftd"
                ));
            }
            vteps.insert(*mac, name);
        }
        Ok(entries)
    }

    fn peer_entries(&self, local: &LocalNode, peer: &Lease) -> Result<Vec<Object>, String> {
        let mut entries = Vec::new();
        for subnet in peer.key.subnets() {
            let dev = if subnet.is_ipv4() { Some(&self.device) } else { self.device_v6.as_ref() };
            let dev =
                dev.ok_or_else(|| format!("VNI {} leaves no name for an IPv6 device", self.config.vni))?;
            let key = if subnet.is_ipv4() { "BackendData" } else { "BackendV6Data" };
            let data = peer.attrs.vxlan_data(subnet).ok_or_else(|| {
                let example = r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#;
                format!("{key} for {subnet}: expected an object such as {example}")
            })?;
            if data.vni != self.config.vni {
                return Err(format!("{key}.VNI = {}: expected {}, this node's", data.vni, self.config.vni));
            }
            if !data.vtep_mac.is_unicast() {
                let mac = data.vtep_mac;
                return Err(format!("{key}.VtepMAC = {mac}: expected a unicast address"));
            }
            let public = public_addr(peer, subnet)?;
            if local.on_link.contains(&public) {
                let route = Route::via(public, &local.underlay.iface, false);
                entries.push(Object::Route { dst: subnet, route });
            } else {
                entries.extend(self.entries(dev, subnet, data.vtep_mac, public));
            }
        }
        Ok(entries)
    }
}

impl Dataplane for VxlanPlane {
    fn backend_type(&self) -> &'static str {
        "vxlan"
    }

    fn device(&self) -> Option<&IfName> {
        Some(&self.device)
    }

    fn lease_attrs(&self, public_ip: Ipv4Addr) -> LeaseAttrs {
        let data = VxlanData { vni: self.config.vni, vtep_mac: self.vtep_mac };
        LeaseAttrs {
            public_ip,
            public_ipv6: None,
            backend_type: self.backend_type().into(),
            backend_data: serde_json::to_value(data).ok(),
            backend_v6_data: None,
        }
    }

    fn pod_mtu(&self, underlay_mtu: u32) -> u32 {
        self.config.mtu.unwrap_or(underlay_mtu).saturating_sub(OVERHEAD)
    }

    /// Every node has its network address on the device.
    fn probe(&self, peer: &LeaseKey) -> IpAddr {
        peer.v4.addr()
    }

    fn asks_for_on_link(&self) -> bool {
        self.config.direct_routing
    }

    fn desired(&self, local: &LocalNode, peers: &[&Lease]) -> Wanted {
        let mut wanted = Wanted::default();
        let dev = &self.device;
        wanted.desired.insert(Object::Link { name: dev.clone(), link: self.link(local) });
        // Router advertisements on an overlay device would give it foreign addresses and routes.
        wanted
            .desired
            .insert(Object::Sysctl { path: format!("net/ipv6/conf/{dev}/accept_ra"), value: "0".into() });
        let addr = IpNetwork::from(local.lease.v4.addr());
        let form = AddrForm::default();
        wanted.desired.insert(Object::Addr { dev: dev.clone(), addr, scope: AddrScope::Global, form });
        let mut vteps = BTreeMap::from([(self.vtep_mac, "this node".to_owned())]);
        // Of two nodes with one MAC the older lease keeps it, on every node alike.
        let mut by_age: Vec<&Lease> = peers.to_vec();
        by_age.sort_by_key(|peer| (peer.create_revision, peer.key));
        for peer in by_age {
            match self
                .peer_entries(local, peer)
                .and_then(|entries| self.only_with_its_own_mac(&mut vteps, peer, entries))
            {
                Ok(entries) => wanted.serve(peer, entries),
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
    use crate::object::Key;
    use crate::underlay::Underlay;

    fn plane() -> VxlanPlane {
        let config =
            VxlanConfig { vni: 7, port: 8472, mtu: None, gbp: false, learning: false, direct_routing: true };
        VxlanPlane::new(config, "02:00:00:00:00:01".parse().expect("mac"))
    }

    fn backend() -> Backend {
        Backend::Vxlan(plane())
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

    #[test]
    fn a_peer_is_three_entries_and_a_dual_stack_peer_six() {
        let value = r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"vxlan",
            "BackendData":{"VNI":7,"VtepMAC":"02:00:00:00:00:02"},"BackendV6Data":{"VNI":7,"VtepMAC":"02:00:00:00:00:06"}}"#;
        let peers = [peer("10.5.2.0-24&fd00:5:2::-64", value)];
        let wanted = backend().desired(&local(), &peers);
        let keys: Vec<String> = wanted.peers[&peers[0].key].keys.iter().map(Key::to_string).collect();
        assert_eq!(
            keys,
            [
                "fdb 02:00:00:00:00:02 dev flannel.7",
                "neighbour 10.5.2.0 dev flannel.7",
                "route 10.5.2.0/24",
                "fdb 02:00:00:00:00:06 dev flannel-v6.7",
                "neighbour fd00:5:2:: dev flannel-v6.7",
                "route fd00:5:2::/64",
            ]
        );
        let v6 = Key::Fdb("flannel-v6.7".parse().expect("name"), "02:00:00:00:00:06".parse().expect("mac"));
        assert!(
            matches!(wanted.desired.get(&v6), Some(Object::Fdb { dst, .. }) if dst.to_string() == "2001:db8::2"),
            "the IPv6 device sends over the peer's IPv6 underlay"
        );
    }

    #[test]
    fn a_peer_that_cannot_be_served_is_named_with_the_reason() {
        for (value, reason) in [
            (
                r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"host-gw"}"#,
                "BackendType = \"host-gw\": expected \"vxlan\"",
            ),
            (
                r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan"}"#,
                "BackendData for 10.5.2.0/24: expected an object such as",
            ),
            (
                r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"x"}}"#,
                "BackendData for 10.5.2.0/24: expected an object such as",
            ),
            (
                r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}"#,
                "BackendData.VNI = 1: expected 7",
            ),
            (
                r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"ff:ff:ff:ff:ff:ff"}}"#,
                "BackendData.VtepMAC = ff:ff:ff:ff:ff:ff: expected a unicast address",
            ),
        ] {
            let peers = [peer("10.5.2.0-24", value)];
            let wanted = backend().desired(&local(), &peers);
            let problem = wanted.peers[&peers[0].key].problem.clone().unwrap_or_default();
            assert!(problem.contains(reason), "{value}: {problem}");
            assert_eq!(
                wanted.desired.objects().count(),
                3,
                "{value}: only the device, its sysctl and its address"
            );
        }
    }

    #[test]
    fn a_peer_on_link_is_one_route_and_another_goes_through_the_tunnel() {
        let value = |ip: &str| {
            format!(
                r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":7,"VtepMAC":"02:00:00:00:00:02"}}}}"#
            )
        };
        let peers = [peer("10.5.2.0-24", &value("192.0.2.2"))];
        let keys = |local: &LocalNode| {
            let wanted = backend().desired(local, &peers);
            wanted.peers[&peers[0].key].keys.iter().map(Key::to_string).collect::<Vec<_>>()
        };
        let far = LocalNode { on_link: ["192.0.2.9".parse().expect("ip")].into(), ..local() };
        assert_eq!(keys(&far).len(), 3);
        let near = LocalNode { on_link: ["192.0.2.2".parse().expect("ip")].into(), ..local() };
        assert_eq!(keys(&near), ["route 10.5.2.0/24"]);
        let wanted = backend().desired(&near, &peers);
        let Some(Object::Route { route, .. }) =
            wanted.desired.get(&Key::Route("10.5.2.0/24".parse().expect("net")))
        else {
            panic!("no route in {wanted:?}");
        };
        assert_eq!(*route, Route::via("192.0.2.2".parse().expect("ip"), &near.underlay.iface, false));
    }

    #[test]
    fn one_mac_leads_to_one_node() {
        let value = |n: u8, mac: &str| {
            format!(
                r#"{{"PublicIP":"192.0.2.{n}","BackendType":"vxlan","BackendData":{{"VNI":7,"VtepMAC":"{mac}"}}}}"#
            )
        };
        let older = peer("10.5.3.0-24", &value(3, "02:00:00:00:00:33"));
        let younger = Lease { create_revision: 2, ..peer("10.5.2.0-24", &value(2, "02:00:00:00:00:33")) };
        let like_ours = peer("10.5.4.0-24", &value(4, "02:00:00:00:00:01"));
        for peers in [
            [older.clone(), younger.clone(), like_ours.clone()],
            [younger.clone(), like_ours.clone(), older.clone()],
        ] {
            let wanted = backend().desired(&local(), &peers);
            let problem = |lease: &Lease| wanted.peers[&lease.key].problem.clone().unwrap_or_default();
            assert_eq!(problem(&older), "");
            assert!(
                problem(&younger).contains("10.5.3.0-24 (192.0.2.3) has the same"),
                "{}",
                problem(&younger)
            );
            assert!(problem(&like_ours).contains("this node has the same"), "{}", problem(&like_ours));
        }
    }

    #[test]
    fn the_device_is_flannels() {
        let wanted = plane().desired(&local(), &[]);
        let Some(Object::Link { link, .. }) =
            wanted.desired.get(&Key::Link("flannel.7".parse().expect("name")))
        else {
            panic!("no device in {wanted:?}");
        };
        assert_eq!((link.mtu, link.up), (1450, true));
        assert!(
            wanted
                .desired
                .get(&Key::Addr("flannel.7".parse().expect("name"), "10.5.1.0/32".parse().expect("net")))
                .is_some()
        );
        let published =
            serde_json::to_string(&plane().lease_attrs(Ipv4Addr::new(192, 0, 2, 1))).expect("json");
        assert_eq!(
            published,
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"02:00:00:00:00:01"}}"#
        );
    }
}
