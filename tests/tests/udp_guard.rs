//! What the udp backend lets in, and what it does not: datagrams written by hand, from peers and strangers. Each is
//! counted under its reason, and nothing that is dropped reaches a pod.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::foreign_peer::ForeignPeer;
use e2e::forge::{Forged, mend_header};
use e2e::netns::Netns;
use e2e::pod::Pod;
use e2e::traffic::checked::checked;
use e2e::traffic::echo::ping;
use e2e::traffic::transfer::transfer;
use e2e::underlay::NodeNumber;
use e2e::wait::{SECOND, eventually};
use weft_agent::status::DropCount;

const PORT: u16 = 8285;
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 99);
const POD_PORT: u16 = 7777;

/// One pod that listens, and those who send to its node.
struct Guard<'a> {
    cluster: &'a Cluster,
    pod: Pod,
    ear: UdpSocket,
    /// Of nodes 2 and 3, an address in each one's subnet.
    theirs: [Ipv4Addr; 2],
    stranger: Netns,
}

/// What becomes of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Delivered,
    Dropped(&'static str),
}
use Fate::{Delivered, Dropped};

impl<'a> Guard<'a> {
    fn set_up(cluster: &'a Cluster) -> Result<Self> {
        let pod = cluster.nodes[0].pod("a")?;
        let ear = pod.netns.enter(|| {
            let ear = UdpSocket::bind(SocketAddrV4::new(pod.address, POD_PORT))?;
            ear.set_read_timeout(Some(READY))?;
            Ok(ear)
        })?;
        let mut theirs = [Ipv4Addr::UNSPECIFIED; 2];
        for (address, node) in theirs.iter_mut().zip(&cluster.nodes[1..]) {
            let std::net::IpAddr::V4(subnet) = node.lease_key()?.v4.addr() else { anyhow::bail!("not IPv4") };
            *address = Ipv4Addr::from_bits(subnet.to_bits() + 77);
        }
        let stranger = cluster.underlay.attach_host(&cluster.bed, "stranger", STRANGER)?;
        Ok(Self { cluster, pod, ear, theirs, stranger })
    }

    fn peer(&self) -> &Netns {
        self.cluster.nodes[1].netns()
    }

    /// From `source` to the pod.
    fn packet(&self, source: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
        Forged::new(source, (self.pod.address, POD_PORT), payload).bytes()
    }

    fn send(&self, from: &Netns, datagrams: &[Vec<u8>]) -> Result<()> {
        let target = SocketAddrV4::new(self.cluster.nodes[0].net.address, PORT);
        let socket = from.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        for datagram in datagrams {
            socket.send_to(datagram, target)?;
        }
        Ok(())
    }

    fn hear(&self) -> Result<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let length = self.ear.recv(&mut buffer).context("nothing reached the pod")?;
        buffer.truncate(length);
        Ok(buffer)
    }

    fn counted(&self) -> Result<Vec<DropCount>> {
        Ok(self.cluster.nodes[0].packet_path()?.dropped)
    }

    /// Sends one datagram and holds its fate against what is expected. A good one behind it shows that there is
    /// nothing else to come.
    fn judge(&self, what: &str, from: &Netns, datagram: Vec<u8>, fate: Fate) -> Result<()> {
        let mut expected = self.counted()?;
        self.send(from, &[datagram])?;
        if let Dropped(reason) = fate {
            let count = expected.iter_mut().find(|d| d.direction == "received" && d.reason == reason);
            count.with_context(|| format!("no reason {reason}"))?.packets += 1;
            eventually(&format!("{what} to be counted as {reason}"), READY, || {
                let counted = self.counted()?;
                ensure!(counted == expected, "{:?}", difference(&expected, &counted));
                Ok(true)
            })?;
        } else {
            let heard = self.hear().with_context(|| what.to_owned())?;
            ensure!(heard == what.as_bytes(), "{what}: the pod heard {heard:02x?}");
        }
        let sentinel = format!("behind {what}");
        self.send(self.peer(), &[self.packet(self.theirs[0], sentinel.as_bytes())])?;
        let heard = self.hear().with_context(|| what.to_owned())?;
        ensure!(heard == sentinel.as_bytes(), "{what}: the pod heard {:?}", String::from_utf8_lossy(&heard));
        let counted = self.counted()?;
        ensure!(counted == expected, "{what}: {:?}", difference(&expected, &counted));
        Ok(())
    }

    fn dropped(&self) -> Result<u64> {
        Ok(self.counted()?.iter().map(|dropped| dropped.packets).sum())
    }

    /// Whether a datagram reaches the pod: it does, or is counted.
    fn reaches(&self, from: &Netns, datagram: Vec<u8>) -> Result<bool> {
        let before = self.dropped()?;
        self.send(from, &[datagram])?;
        self.ear.set_read_timeout(Some(Duration::from_millis(20)))?;
        let mut reached = false;
        let known = eventually("the fate of a probe", READY, || {
            reached = self.hear().is_ok();
            Ok(reached || self.dropped()? > before)
        });
        self.ear.set_read_timeout(Some(READY))?;
        known.map(|_| reached)
    }

    /// Another policy, under the running agents.
    fn policy(&self, keys: &str) -> Result<()> {
        let backend = format!(r#"{{"Type":"udp"{keys}}}"#);
        let config =
            format!(r#"{{"Network":"{}","SubnetLen":24,"Backend":{backend}}}"#, self.cluster.spec.network);
        self.cluster.etcd.as_ref().context("etcd")?.put_config(&config)
    }
}

fn difference<'a>(expected: &'a [DropCount], counted: &'a [DropCount]) -> Vec<(&'a DropCount, u64)> {
    let pairs = expected.iter().zip(counted).filter(|(expected, counted)| expected != counted);
    pairs.map(|(expected, counted)| (counted, expected.packets)).collect()
}

fn guarded(body: impl FnOnce(&Guard<'_>) -> Result<()>) -> Result<()> {
    scenario(Spec::etcd(3, Backend::Udp), |cluster| body(&Guard::set_up(cluster)?))
}

#[test]
fn spoofed_sources_are_dropped_by_reason() -> Result<()> {
    guarded(|guard| {
        let [theirs, third] = guard.theirs;
        let (peer, stranger) = (guard.peer(), &guard.stranger);
        let own = Ipv4Addr::from_bits(guard.pod.address.to_bits() + 1);
        let unleased = Ipv4Addr::new(10, 5, 254, 9);
        let node = guard.cluster.nodes[1].net.address;
        for (what, from, source, fate) in [
            ("a peer's own", peer, theirs, Delivered),
            ("a stranger's, with a peer's inner source", stranger, theirs, Dropped("unknown-peer")),
            ("a stranger's, from outside the overlay", stranger, STRANGER, Dropped("unknown-peer")),
            ("another peer's inner source", peer, third, Dropped("source-refused")),
            ("an inner source of this node's", peer, own, Dropped("source-refused")),
            ("an inner source that nobody has", peer, unleased, Dropped("source-refused")),
            // With flannel's default of no masquerade a node answers a remote pod with its own address.
            ("an inner source outside the overlay", peer, node, Delivered),
            ("loopback as inner source", peer, Ipv4Addr::LOCALHOST, Dropped("source-refused")),
        ] {
            guard.judge(what, from, guard.packet(source, what.as_bytes()), fate)?;
        }
        let elsewhere = Forged::new(theirs, (third, POD_PORT), b"not for this node").bytes();
        guard.judge("not for this node", peer, elsewhere, Dropped("not-ours"))
    })
}

#[test]
fn policies_change_under_a_running_node() -> Result<()> {
    guarded(|guard| {
        let [theirs, third] = guard.theirs;
        let (peer, stranger) = (guard.peer(), &guard.stranger);
        let node = guard.cluster.nodes[1].net.address;
        let own = Ipv4Addr::from_bits(guard.pod.address.to_bits() + 1);
        let takes_over = |what: &str, keys: &str, from: &Netns, source: Ipv4Addr, delivered: bool| {
            guard.policy(keys)?;
            // The configuration comes by the watch; what is sent before may have either fate.
            eventually(&format!("{what} to be in force"), READY, || {
                Ok(guard.reaches(from, guard.packet(source, b"probe"))? == delivered)
            })
        };
        let judge = |cases: &[(&str, &Netns, Ipv4Addr, Fate)]| {
            cases.iter().try_for_each(|(what, from, source, fate)| {
                guard.judge(what, from, guard.packet(*source, what.as_bytes()), *fate)
            })
        };

        takes_over("StrictSource", r#","StrictSource":true"#, peer, node, false)?;
        judge(&[
            ("strict: a node's own address", peer, node, Dropped("source-refused")),
            ("strict: a peer's own", peer, theirs, Delivered),
            ("strict: a stranger", stranger, theirs, Dropped("unknown-peer")),
        ])?;
        takes_over("PeersBehindNAT", r#","PeersBehindNAT":true"#, stranger, theirs, true)?;
        judge(&[
            ("behind NAT: a peer's inner source from anywhere", stranger, third, Delivered),
            (
                "behind NAT: an inner source that nobody has",
                stranger,
                Ipv4Addr::new(10, 5, 254, 9),
                Dropped("source-refused"),
            ),
            (
                "behind NAT: an inner source outside the overlay",
                stranger,
                STRANGER,
                Dropped("source-refused"),
            ),
            ("behind NAT: an inner source of this node's", stranger, own, Dropped("source-refused")),
        ])?;
        takes_over("the default", "", stranger, theirs, false)?;
        judge(&[
            ("default again: a stranger", stranger, theirs, Dropped("unknown-peer")),
            ("default again: a node's own address", peer, node, Delivered),
        ])
    })
}

#[test]
fn malformed_datagrams_are_dropped_by_reason() -> Result<()> {
    guarded(|guard| {
        let (peer, source) = (guard.peer(), guard.theirs[0]);
        let good = guard.packet(source, &[7; 64]);
        let changed = |at: usize, byte: u8| {
            let mut packet = good.clone();
            packet[at] = byte;
            mend_header(&mut packet);
            packet
        };
        let mut bad_sum = good.clone();
        bad_sum[10] ^= 1;
        let mut total = good.clone();
        total[3] = total[3].wrapping_add(1);
        mend_header(&mut total);
        let longer = [&good[..], b"more"].concat();
        for (what, datagram, reason) in [
            ("an empty datagram", vec![], "short"),
            ("a single byte", good[..1].to_vec(), "short"),
            ("a byte less than a header", good[..19].to_vec(), "short"),
            ("version 6", changed(0, 0x65), "wrong-version"),
            ("version 0", changed(0, 0x05), "wrong-version"),
            ("a header of four words", changed(0, 0x44), "bad-header"),
            ("a wrong header checksum", bad_sum, "bad-header"),
            ("cut short", good[..good.len() - 1].to_vec(), "bad-total-length"),
            ("more behind the packet", longer, "bad-total-length"),
            ("a total length that is not the datagram's", total, "bad-total-length"),
        ] {
            guard.judge(what, peer, datagram, Dropped(reason))?;
        }
        // Larger than any interface here, and may be fragmented behind the overlay: whole, or not at all.
        let large = vec![b'x'; 60_000];
        let mut packet = guard.packet(source, &large);
        packet[6] = 0;
        mend_header(&mut packet);
        guard.send(peer, &[packet])?;
        ensure!(guard.hear()? == large, "a large packet did not come whole");
        Ok(())
    })
}

/// With every coalescing on: what is put together is vouched for, so nothing broken may be in it.
#[test]
fn a_corrupted_packet_is_never_delivered_as_good() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let pod = cluster.nodes[0].pod("a")?;
        let foreign = ForeignPeer::join(cluster, NodeNumber(7), "10.5.200.0/24", 20)?;
        cluster.nodes[0].wait_peers(2, READY)?;
        ping(&pod.netns, foreign.address, 5, SECOND)?;
        let bad_sums = || -> Result<u64> {
            let snmp = pod.netns.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/snmp")?))?;
            let mut rows = snmp.lines().filter(|line| line.starts_with("Udp: ")).map(str::split_whitespace);
            let (names, values) = (rows.next().context("names")?, rows.next().context("values")?);
            let mut pairs = names.zip(values);
            Ok(pairs.find(|(name, _)| *name == "InCsumErrors").context("InCsumErrors")?.1.parse()?)
        };
        let before = bad_sums()?;
        let got = checked(foreign.netns(), &pod.netns, pod.address, 4_000)?;
        ensure!(got.corrupt == 0 && got.duplicates == 0, "{got:?}");
        ensure!(got.missing > 50, "{got:?}: hardly anything was broken");
        ensure!(bad_sums()? > before, "the pod's kernel saw no wrong checksum: who dropped them?");
        let moved = transfer(foreign.netns(), &pod.netns, pod.address, 2 << 20)?;
        assert_eq!(moved.sent, moved.received, "TCP repairs what was broken");
        Ok(())
    })
}
