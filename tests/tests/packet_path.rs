//! The packet path that the dataplane's name promises, as a capture on the underlay sees it.

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use e2e::bed::Bed;
use e2e::capture::{Capture, Frame, ifindex};
use e2e::cluster::{Backend, Cluster, READY, Spec};
use e2e::forge::checksum;
use e2e::kernel::query;
use e2e::packet::{Ethernet, Ipv4};
use e2e::pod::Pod;
use e2e::traffic::echo::ping;
use e2e::wait::SECOND;
use weft_shared::Mac;

const FIRST: Ipv4Addr = Ipv4Addr::new(100, 96, 1, 2);
const SECOND_POD: Ipv4Addr = Ipv4Addr::new(100, 96, 2, 3);
const ICMP: u8 = 1;

/// Two nodes on etcd that lease 100.96.1.0/24 and 100.96.2.0/24, each a subnet that an earlier run is said to have
/// left in its subnet.env; a pod on each at the addresses above.
fn leased(backend: Backend) -> Result<(Cluster, Pod, Pod)> {
    let spec = Spec { network: "100.96.0.0/16".into(), ..Spec::etcd(2, backend) };
    let mut cluster = Cluster::prepare(Bed::for_test()?, spec)?;
    cluster.put_config()?;
    for node in &mut cluster.nodes {
        let previous = format!(
            "FLANNEL_NETWORK=100.96.0.0/16\nFLANNEL_SUBNET=100.96.{}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
            node.number.0
        );
        fs::write(node.agent.subnet_file(), previous)?;
    }
    cluster.start_agents()?;
    let mut keys = cluster.etcd()?.lease_keys()?;
    keys.sort();
    assert_eq!(keys, ["100.96.1.0-24", "100.96.2.0-24"]);
    let first = Pod::create_at(&cluster.nodes[0], "n1-a", &FIRST.to_string())?;
    let second = Pod::create_at(&cluster.nodes[1], "n2-a", &SECOND_POD.to_string())?;
    assert_eq!((first.address, second.address), (FIRST, SECOND_POD));
    Ok((cluster, first, second))
}

/// The first frame that leaves node 1 and holds an echo request from pod to pod, `read` out of its layers.
fn request<T>(
    cluster: &Cluster,
    capture: &Capture,
    read: impl Fn(&Ethernet<'_>, &Ipv4<'_>) -> Option<T>,
) -> Result<T> {
    let port = ifindex(&cluster.underlay.netns, &cluster.nodes[0].net.port)?;
    capture.wait_for("pod to pod, leaving n1", READY, |frame: &Frame| {
        let ethernet = Ethernet::parse(&frame.bytes).filter(|_| frame.ifindex == port)?;
        let ip = ethernet.ipv4()?;
        read(&ethernet, &ip)
    })
}

fn mac_of(cluster: &Cluster, node: usize, device: &str) -> Result<Mac> {
    let links = query(cluster.nodes[node].netns(), &format!("ip -json link show {device}"))?;
    Ok(links[0]["address"].as_str().context("no MAC")?.parse()?)
}

fn is_request(ip: &Ipv4<'_>) -> bool {
    ip.source == FIRST
        && ip.destination == SECOND_POD
        && ip.protocol == ICMP
        && ip.payload.first() == Some(&8)
}

#[test]
fn vxlan_carries_the_packet_to_the_peers_vtep() -> Result<()> {
    let (cluster, first, _second) = leased(Backend::Vxlan)?;
    let capture = Capture::start(&cluster.underlay.netns)?;
    ping(&first.netns, SECOND_POD, 5, SECOND)?;
    let (outer, port, vni, destination) = request(&cluster, &capture, |_, outer| {
        let udp = outer.udp()?;
        let vxlan = udp.vxlan()?;
        is_request(&vxlan.inner.ipv4()?).then_some((
            (outer.source, outer.destination),
            udp.destination,
            vxlan.vni,
            vxlan.inner.destination,
        ))
    })?;
    assert_eq!(outer, (cluster.nodes[0].net.address, cluster.nodes[1].net.address), "outer addresses");
    assert_eq!((port, vni), (8472, 1), "UDP port and VNI");
    assert_eq!(destination, mac_of(&cluster, 1, "flannel.1")?, "inner destination is the peer's VTEP");
    Ok(())
}

#[test]
fn udp_carries_the_bare_packet_in_a_datagram_and_nothing_else() -> Result<()> {
    let (cluster, first, _second) = leased(Backend::Udp)?;
    let capture = Capture::start(&cluster.underlay.netns)?;
    ping(&first.netns, SECOND_POD, 5, SECOND)?;
    let (outer, ports, ttl, header) = request(&cluster, &capture, |_, outer| {
        let udp = outer.udp()?;
        let inner = Ipv4::alone(udp.payload)?;
        is_request(&inner).then(|| {
            let header = udp.payload[..20].to_vec();
            ((outer.source, outer.destination), (udp.source, udp.destination), inner.ttl, header)
        })
    })?;
    assert_eq!(outer, (cluster.nodes[0].net.address, cluster.nodes[1].net.address), "outer addresses");
    assert_eq!(ports, (8285, 8285), "UDP ports");
    assert_eq!(ttl, 62, "one for the node's own forwarding, one for the overlay's hop");
    assert_eq!(checksum(&header), 0, "the header's checksum follows the TTL");
    Ok(())
}

#[test]
fn host_gw_routes_the_bare_packet_to_the_peer_node() -> Result<()> {
    let (cluster, first, _second) = leased(Backend::HostGw)?;
    let capture = Capture::start(&cluster.underlay.netns)?;
    ping(&first.netns, SECOND_POD, 5, SECOND)?;
    let destination =
        request(&cluster, &capture, |ethernet, ip| is_request(ip).then_some(ethernet.destination))?;
    assert_eq!(destination, mac_of(&cluster, 1, "eth0")?, "destination is the peer node's interface");
    Ok(())
}

#[test]
fn packets_between_pods_of_one_node_never_reach_the_underlay() -> Result<()> {
    for backend in [Backend::Vxlan, Backend::HostGw] {
        let (cluster, first, far) = leased(backend)?;
        let beside = cluster.nodes[0].pod("b")?;
        let capture = Capture::start(&cluster.underlay.netns)?;
        ping(&first.netns, beside.address, 5, SECOND)?;
        // The sentinel: what went before it has been captured, if it ever was there.
        ping(&first.netns, far.address, 5, SECOND)?;
        let holds =
            |frame: &Frame, address: Ipv4Addr| frame.bytes.windows(4).any(|bytes| bytes == address.octets());
        capture.wait_for("the packet to the other node", READY, |f| holds(f, far.address).then_some(()))?;
        let leaked = capture.frames().iter().filter(|f| holds(f, beside.address)).count();
        assert_eq!(leaked, 0, "{} frames of {} with the neighbour's address", leaked, backend.kind());
    }
    Ok(())
}

#[test]
fn the_lease_file_says_what_flannels_says() -> Result<()> {
    let (cluster, ..) = leased(Backend::Vxlan)?;
    assert_eq!(
        fs::read_to_string(cluster.nodes[0].agent.subnet_file())?,
        "FLANNEL_NETWORK=100.96.0.0/16\nFLANNEL_SUBNET=100.96.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    );
    Ok(())
}
