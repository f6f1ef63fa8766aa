//! The udp backend as others meet it: on the wire, by a peer of another make, by traceroute.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use e2e::capture::{Capture, ifindex};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::foreign_peer::ForeignPeer;
use e2e::netns::Netns;
use e2e::packet::{Ethernet, Ipv4};
use e2e::traffic::checked::checked;
use e2e::traffic::echo::ping;
use e2e::traffic::transfer::transfer;
use e2e::underlay::NodeNumber;
use e2e::wait::{SECOND, eventually};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

const PORT: u16 = 8285;
const MIB: u64 = 1 << 20;

/// The sending kernel cuts what it would otherwise hand on whole, so that a capture sees what a wire would.
fn cut_before_the_wire(netns: &Netns) -> Result<()> {
    let features = ["tso", "off", "gso", "off", "tx-udp-segmentation", "off"];
    netns.run(Command::new("ethtool").args(["-K", "eth0"]).args(features))?;
    Ok(())
}

#[test]
fn every_datagram_of_a_busy_wire_is_exactly_one_packet() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        for node in &cluster.nodes {
            cut_before_the_wire(node.netns())?;
        }
        let capture = Capture::start(&cluster.underlay.netns)?;
        let moved = transfer(&near.netns, &far.netns, far.address, MIB)?;
        assert_eq!(moved.sent, moved.received);
        checked(&near.netns, &far.netns, far.address, 500)?.is_whole()?;

        let port = ifindex(&cluster.underlay.netns, &cluster.nodes[0].net.port)?;
        let (mut tcp, mut udp, mut fragments) = (0, 0, 0);
        for frame in capture.frames().iter().filter(|frame| frame.ifindex == port) {
            let Some(ethernet) = Ethernet::parse(&frame.bytes) else { continue };
            let Some(datagram) = ethernet.ipv4().filter(|ip| ip.destination == cluster.nodes[1].net.address)
            else {
                continue;
            };
            let Some(outer) = datagram.udp().filter(|outer| outer.destination == PORT) else { continue };
            let inner = Ipv4::alone(outer.payload);
            let inner = inner.with_context(|| {
                format!("{} bytes are no packet: {:02x?}", outer.payload.len(), outer.payload)
            })?;
            ensure!((inner.source, inner.destination) == (near.address, far.address), "{inner:?}");
            ensure!(outer.payload.len() <= 1472, "a packet of {} bytes", outer.payload.len());
            match inner.protocol {
                6 => tcp += 1,
                17 => udp += 1,
                _ => {}
            }
            fragments += usize::from(u16::from_be_bytes([outer.payload[6], outer.payload[7]]) & 0x3fff != 0);
        }
        // 1 MiB in segments of at most 1432 bytes, and more than one fragment of each large datagram.
        ensure!(
            tcp > 700 && udp > 500 && fragments > 10,
            "{tcp} of TCP, {udp} of UDP, {fragments} fragments"
        );
        Ok(())
    })
}

#[test]
fn a_peer_written_from_the_wire_description_talks_both_ways() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        let foreign = ForeignPeer::join(cluster, NodeNumber(7), "10.5.200.0/24", 0)?;
        for node in &cluster.nodes {
            node.wait_peers(2, READY)?;
        }
        for pod in [&near, &far] {
            ping(&pod.netns, foreign.address, 5, SECOND).context("to the foreign peer")?;
            ping(foreign.netns(), pod.address, 5, SECOND).context("from the foreign peer")?;
        }
        for (from, to, address) in
            [(&near.netns, foreign.netns(), foreign.address), (foreign.netns(), &near.netns, near.address)]
        {
            let what = format!("{} to {}", from.name(), to.name());
            checked(from, to, address, 2_000)?.is_whole().with_context(|| what.clone())?;
            let moved = transfer(from, to, address, 4 * MIB).with_context(|| what.clone())?;
            assert_eq!(moved.sent, moved.received, "{what}");
        }
        // From host to host, by the devices' own addresses.
        let device = foreign.subnet.addr();
        foreign.netns().ip(&format!("address add {device}/32 dev {}", ForeignPeer::DEVICE))?;
        eventually("weftctl to hear three answers in time", READY, || {
            let report = cluster.nodes[0].agent.ctl(&["ping", "10.5.200.0/24"])?;
            ensure!(report.contains(&format!("  overlay   {device}      3 of 3 answered")), "{report}");
            ensure!(report.ends_with("\n  ok\n"), "{report}");
            Ok(true)
        })?;
        Ok(())
    })
}

#[test]
fn five_nodes_reach_each_other_and_weftctl_says_so() -> Result<()> {
    scenario(Spec::etcd(5, Backend::Udp), |cluster| {
        let pods = cluster.nodes.iter().map(|node| node.pod("a")).collect::<Result<Vec<_>>>()?;
        for from in &pods {
            for to in pods.iter().filter(|to| to.name != from.name) {
                ping(&from.netns, to.address, 5, SECOND)
                    .with_context(|| format!("{} to {}", from.name, to.name))?;
            }
        }
        for node in &cluster.nodes {
            eventually("weftctl to hear of all in time", READY, || {
                let report = node.agent.ctl(&["ping", "all"])?;
                let reached = report.contains("4 of 4 peers reachable through the overlay");
                ensure!(reached, "{}: {report}", node.name());
                Ok(true)
            })?;
        }
        let status = cluster.nodes[0].agent.ctl(&["status"])?;
        let listen = format!("\npath       UDP {}:{PORT}, ", cluster.nodes[0].net.address);
        ensure!(status.contains(&listen) && status.contains("offloads in use: "), "{status}");
        for direction in ["sent", "received"] {
            let name = format!("weft_packet_path_packets_total{{direction=\"{direction}\"}}");
            ensure!(cluster.nodes[0].agent.metric(&name)? >= 20.0, "{name}");
        }
        Ok(())
    })
}

/// An ICMP error as a raw socket of the pod's sees it: source, type, code, length.
type Error = (Ipv4Addr, u8, u8, usize);

struct IcmpEar(Socket);

impl IcmpEar {
    fn open(netns: &Netns) -> Result<Self> {
        let socket = netns.enter(|| Ok(Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?))?;
        socket.set_read_timeout(Some(READY))?;
        Ok(Self(socket))
    }

    /// The next one, if any comes.
    fn next(&self) -> Option<Error> {
        let mut buffer = [0; 2048];
        let length = std::io::Read::read(&mut &self.0, &mut buffer).ok()?;
        let packet = Ipv4::parse(&buffer[..length])?;
        Some((packet.source, packet.payload[0], packet.payload[1], packet.payload.len()))
    }
}

fn send_with_ttl(from: &Netns, to: Ipv4Addr, ttl: i32) -> Result<()> {
    from.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        setsockopt(&socket, sockopt::Ipv4Ttl, &ttl)?;
        socket.send_to(b"trace", SocketAddrV4::new(to, 33434))?;
        Ok(())
    })
}

fn device_address(cluster: &Cluster, node: usize) -> Result<Ipv4Addr> {
    match cluster.nodes[node].lease_key()?.v4.addr() {
        std::net::IpAddr::V4(address) => Ok(address),
        other => anyhow::bail!("{other}"),
    }
}

#[test]
fn what_cannot_go_on_is_answered_as_by_any_router() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        let device = device_address(cluster, 0)?;
        let ear = IcmpEar::open(&near.netns)?;

        // The node is the first hop, the overlay the second, the peer the third, and then comes the pod.
        send_with_ttl(&near.netns, far.address, 2)?;
        assert_eq!(ear.next(), Some((device, 11, 0, 8 + 28)), "time exceeded in transit");
        let counted = |reason: &str, expected: u64| {
            eventually(reason, READY, || {
                let dropped = cluster.nodes[0].dropped("sent", reason)?;
                ensure!(dropped == expected, "{reason}: {dropped}, expected {expected}");
                Ok(true)
            })
        };
        counted("ttl-exceeded", 1)?;
        send_with_ttl(&near.netns, far.address, 3)?;
        let (source, kind, code, _) = ear.next().context("from the peer node itself")?;
        assert_eq!((source, kind, code), (device_address(cluster, 1)?, 11, 0));
        send_with_ttl(&near.netns, far.address, 4)?;
        assert_eq!(ear.next().map(|(source, kind, code, _)| (source, kind, code)), Some((far.address, 3, 3)));

        // Nobody's subnet.
        let nobody = Ipv4Addr::new(10, 5, 254, 9);
        send_with_ttl(&near.netns, nobody, 64)?;
        assert_eq!(ear.next(), Some((device, 3, 0, 8 + 28)), "net unreachable");
        counted("no-route", 1)?;
        let said = ping(&near.netns, nobody, 1, SECOND);
        ensure!(said.is_err(), "nobody answered");
        counted("no-route", 2)?;

        // A storm is answered by a few.
        const STORM: u64 = 2_000;
        const AT_ONCE: f64 = 50.0;
        const PER_SECOND: f64 = 1_000.0;
        let node = &cluster.nodes[0];
        // All of it has room in the device's queue and is read at once, however busy the machine is.
        node.netns().ip(&format!("link set flannel0 txqueuelen {}", 2 * STORM))?;
        let (before, unroutable) = (node.packet_path()?, node.dropped("sent", "no-route")?);
        let socket = near.netns.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        let start = node.agent.while_stopped(|| {
            for _ in 0..STORM {
                socket.send_to(b"storm", SocketAddrV4::new(nobody, 9))?;
            }
            Ok(Instant::now())
        })?;
        eventually("the storm to be counted", READY, || {
            Ok(node.dropped("sent", "no-route")? == unroutable + STORM)
        })?;
        let allowed = AT_ONCE + PER_SECOND * start.elapsed().as_secs_f64();
        let after = node.packet_path()?;
        let answered = after.icmp_errors_sent - before.icmp_errors_sent;
        let held = after.icmp_errors_suppressed - before.icmp_errors_suppressed;
        assert_eq!(answered + held, STORM, "{answered} answered, {held} held back");
        ensure!(held > 0 && answered as f64 <= allowed, "{answered} answered, {allowed:.0} allowed");
        Ok(())
    })
}
