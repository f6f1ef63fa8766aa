//! Who is where, and who may send what, from the network's configuration, the pods that live here and the peers' leases.

use std::net::{IpAddr, SocketAddrV4};

use weft_shared::Subnet;
use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::netconf::{BackendConfig, NetworkConfig};

use crate::dataplane::public_addr;
use crate::pods::PodNeeds;
use crate::udp::{Local, Peer, PeerTable, SourcePolicy};

/// What the packet path is to know; `None`: the network's backend has none. `lease` is this node's, `pods` those that
/// live here: also in a subnet of an earlier lease, whose packets still come here and go out from here.
///
/// Of `peers` those are in it that [`Dataplane::desired`](crate::dataplane::Dataplane::desired) serves, but for one with the underlay's broadcast address: only
/// the kernel's addresses tell that one, and nothing can be sent to it.
pub(super) fn peer_table(
    config: &NetworkConfig,
    lease: LeaseKey,
    pods: &PodNeeds,
    peers: &[Lease],
) -> Option<PeerTable> {
    let BackendConfig::Udp(udp) = &config.backend else { return None };
    let mut subnets: Vec<Subnet> = pods.subnets().filter(Subnet::is_ipv4).chain([lease.v4]).collect();
    subnets.sort_unstable();
    subnets.dedup();
    let apart = |peer: &&Lease| !subnets.iter().any(|own| own.overlaps(peer.key.v4));
    let of_udp = peers.iter().filter(|peer| peer.attrs.backend_type.is_empty()).filter(apart);
    let peers: Vec<Peer> = of_udp
        .filter_map(|peer| match public_addr(peer, peer.key.v4) {
            Ok(IpAddr::V4(ip)) => Some(Peer { subnet: peer.key.v4, addr: SocketAddrV4::new(ip, udp.port) }),
            _ => None,
        })
        .collect();
    let IpAddr::V4(device_addr) = lease.v4.addr() else { return None };
    let policy = SourcePolicy { strict: udp.strict_source, behind_nat: udp.peers_behind_nat };
    Some(PeerTable::new(Local { network: config.v4.network, subnets, device_addr }, policy, peers))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::pods::BridgeNeed;

    const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":9000}}"#;

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).expect(json)
    }

    fn peer(key: &str, value: &str) -> Lease {
        let (key, attrs) = (key.parse().expect(key), serde_json::from_str(value).expect(value));
        Lease { key, attrs, create_revision: 1 }
    }

    #[test]
    fn the_table_holds_who_is_served_at_our_own_port_and_whatever_is_ours() {
        let net = |text: &str| text.parse::<Subnet>().expect(text);
        let mut pods = PodNeeds::default();
        let need = BridgeNeed { subnets: vec![net("10.5.9.0/24"), net("10.5.1.0/24")], mtu: 1472, mac: None };
        pods.bridges.insert("cni0".parse().expect("name"), need);
        let peers = [
            peer("10.5.2.0-24", r#"{"PublicIP":"192.0.2.2"}"#),
            peer("10.5.3.0-24", r#"{"PublicIP":"192.0.2.3","BackendType":"vxlan"}"#),
            peer("10.5.5.0-24", r#"{"PublicIP":"0.0.0.0"}"#),
            // It has taken a subnet in which pods of this node still live.
            peer("10.5.9.0-24", r#"{"PublicIP":"192.0.2.9"}"#),
        ];
        let lease = "10.5.1.0-24".parse().expect("key");
        let own = Local {
            network: net("10.5.0.0/16"),
            subnets: vec![net("10.5.1.0/24"), net("10.5.9.0/24")],
            device_addr: Ipv4Addr::new(10, 5, 1, 0),
        };
        let served = Peer { subnet: net("10.5.2.0/24"), addr: "192.0.2.2:9000".parse().expect("address") };
        assert_eq!(
            peer_table(&config(CONFIG), lease, &pods, &peers),
            Some(PeerTable::new(own.clone(), SourcePolicy::default(), [served]))
        );
        let wary = config(
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":9000,"StrictSource":true,"PeersBehindNAT":true}}"#,
        );
        let policy = SourcePolicy { strict: true, behind_nat: true };
        assert_eq!(peer_table(&wary, lease, &pods, &peers), Some(PeerTable::new(own, policy, [served])));
        let vxlan = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        assert_eq!(peer_table(&vxlan, lease, &pods, &peers), None);
    }
}
