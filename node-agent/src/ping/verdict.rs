//! What two legs say together: which one is broken, and what most likely has to be done.

use crate::status::{NetworkStatus, PeerStatus};

use super::{Leg, PingReport};

pub(super) fn report(
    peer: &PeerStatus,
    network: Option<&NetworkStatus>,
    underlay: Leg,
    overlay: Leg,
) -> PingReport {
    let reachable = overlay.answers();
    let verdict = match (underlay.answers(), reachable) {
        (true, true) => lossy(&underlay, &overlay),
        (false, true) => format!(
            "ok through the overlay; {} itself does not answer ICMP (filtered there, or on the way)",
            peer.public_ip
        ),
        (true, false) => overlay_broken(peer, network, &overlay),
        (false, false) => format!(
            "underlay broken: {} does not answer{}: is the node up, and is there a route to it? The overlay cannot work \
             without it",
            peer.public_ip,
            said(&underlay)
        ),
    };
    PingReport { peer: peer.key, public_ip: peer.public_ip, underlay, overlay, reachable, verdict }
}

fn lossy(underlay: &Leg, overlay: &Leg) -> String {
    let lost = |leg: &Leg| leg.sent - leg.received;
    match (lost(underlay), lost(overlay)) {
        (0, 0) => "ok".to_owned(),
        (0, n) => format!("overlay loses packets: {n} of {}, the underlay none", overlay.sent),
        (n, _) => format!("underlay loses packets: {n} of {}", underlay.sent),
    }
}

fn overlay_broken(peer: &PeerStatus, network: Option<&NetworkStatus>, overlay: &Leg) -> String {
    let head =
        format!("overlay broken: {} answers, {} does not{}", peer.public_ip, overlay.target, said(overlay));
    if !peer.programmed {
        let problem = peer.problem.as_deref().unwrap_or("not programmed yet");
        return format!("{head}: this node has no complete path to it: {problem}");
    }
    match (peer.backend.as_str(), network) {
        ("vxlan", Some(NetworkStatus { port: Some(port), vni: Some(vni), .. })) => format!(
            "{head}: UDP port {port} (VXLAN, VNI {vni}) must be open between the nodes in both directions (firewall, \
             security group), and weftd or flanneld must run there"
        ),
        ("udp", Some(NetworkStatus { port: Some(port), .. })) => format!(
            "{head}: UDP port {port} (flannel's udp backend) must be open between the nodes in both directions \
             (firewall, security group), weftd or flanneld must run there, and datagrams must arrive from the address \
             that the lease says, unless PeersBehindNAT is set"
        ),
        ("host-gw", _) => format!(
            "{head}: the network between the nodes must forward packets with pod addresses (same layer 2 segment, no \
             source/destination check), both hosts must forward, and a node without pods has no bridge yet and does not \
             answer"
        ),
        _ => head,
    }
}

/// What the kernel reported, if it did.
fn said(leg: &Leg) -> String {
    leg.problem.as_ref().map_or(String::new(), |problem| format!(" ({problem})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::sample;

    fn leg(target: &str, received: u32, problem: Option<&str>) -> Leg {
        let rtt = (received > 0).then_some(0.5);
        let problem = problem.map(Into::into);
        Leg {
            target: target.parse().expect(target),
            sent: 3,
            received,
            rtt_min: rtt,
            rtt_avg: rtt,
            rtt_max: rtt,
            problem,
        }
    }

    #[test]
    fn the_broken_leg_is_named() {
        let status = sample::ready();
        let cases: &[(u32, u32, bool, &str, &[&str])] = &[
            (3, 3, true, "vxlan", &["ok"]),
            (3, 2, true, "vxlan", &["overlay loses packets: 1 of 3, the underlay none"]),
            (2, 2, true, "vxlan", &["underlay loses packets: 1 of 3"]),
            (0, 3, true, "vxlan", &["ok through the overlay; 192.168.9.2 itself does not answer"]),
            (
                3,
                0,
                false,
                "vxlan",
                &[
                    "overlay broken: 192.168.9.2 answers, 10.5.2.0 does not",
                    "UDP port 8472 (VXLAN, VNI 1) must be open",
                ],
            ),
            (
                1,
                0,
                false,
                "host-gw",
                &[
                    "overlay broken",
                    "forward packets with pod addresses",
                    "a node without pods has no bridge yet",
                ],
            ),
            (0, 0, false, "vxlan", &["underlay broken: 192.168.9.2 does not answer (no route)"]),
        ];
        for (under, over, reachable, backend, parts) in cases {
            let mut peer = status.peers[0].clone();
            peer.backend = (*backend).into();
            let underlay = leg("192.168.9.2", *under, (*under == 0).then_some("no route"));
            let report = report(&peer, status.network.as_ref(), underlay, leg("10.5.2.0", *over, None));
            assert_eq!(report.reachable, *reachable, "{}", report.verdict);
            for part in *parts {
                assert!(report.verdict.contains(part), "{part:?} is not in {:?}", report.verdict);
            }
        }
    }

    #[test]
    fn a_silent_datagram_tunnel_has_a_port_to_open() {
        let status = sample::udp();
        let (under, over) = (leg("192.168.9.2", 3, None), leg("10.5.2.0", 0, None));
        let report = report(&status.peers[0], status.network.as_ref(), under, over);
        assert!(
            report.verdict.contains("UDP port 8285 (flannel's udp backend) must be open"),
            "{}",
            report.verdict
        );
    }

    #[test]
    fn our_own_fault_comes_before_the_firewall() {
        let status = sample::ready();
        let under = leg("192.168.9.3", 3, None);
        let report = report(&status.peers[1], status.network.as_ref(), under, leg("10.5.3.0", 0, None));
        assert!(report.verdict.ends_with("no complete path to it: no such device"), "{}", report.verdict);
    }
}
