//! Who is where, and who may send what: one immutable value for the packet path.
//!
//! All subnets are cut into ranges that do not overlap, each with the longest prefix that covers it, so that a look-up
//! is one binary search whatever the prefix lengths are.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use weft_shared::Subnet;

use super::counters::DropReason;

/// A peer's subnet and where its datagrams go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub subnet: Subnet,
    pub addr: SocketAddrV4,
}

/// This node, as far as checks need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// The overlay's.
    pub network: Subnet,
    /// Leased to this node; more than one while pods of an earlier lease live.
    pub subnets: Vec<Subnet>,
    /// The TUN device's, the source of ICMP errors.
    pub device_addr: Ipv4Addr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourcePolicy {
    /// An inner source outside the overlay is refused too.
    pub strict: bool,
    /// Datagrams may come from any address; the inner source must then lie inside some peer's subnet.
    pub behind_nat: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTable {
    local: Local,
    policy: SourcePolicy,
    network: Span,
    ours: Vec<Span>,
    /// By subnet, each subnet once.
    peers: Vec<Peer>,
    /// Where each range begins, ascending; it ends where the next begins.
    starts: Vec<u32>,
    /// Whose the range of the same index is.
    owners: Vec<Owner>,
    /// The addresses that peers send from, ascending, each once.
    senders: Vec<Ipv4Addr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Nobody,
    /// This node.
    Local,
    /// By index.
    Peer(u32),
}

/// First and last address of a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    first: u32,
    last: u32,
}

impl PeerTable {
    /// Subnets of IPv6 have no place here and are left out; of two peers with one subnet the later counts.
    pub fn new(local: Local, policy: SourcePolicy, peers: impl IntoIterator<Item = Peer>) -> Self {
        let peers: BTreeMap<Subnet, Peer> =
            peers.into_iter().filter(|p| p.subnet.is_ipv4()).map(|p| (p.subnet, p)).collect();
        let peers: Vec<Peer> = peers.into_values().collect();
        let mut spans: Vec<(Span, Owner)> = Vec::with_capacity(peers.len() + local.subnets.len());
        // In front of a peer's of the same subnet, which must not take over what is ours.
        spans.extend(local.subnets.iter().filter_map(|s| Some((Span::of(*s)?, Owner::Local))));
        spans.extend(
            peers.iter().zip(0..).filter_map(|(p, index)| Some((Span::of(p.subnet)?, Owner::Peer(index)))),
        );
        let (starts, owners) = ranges(spans);
        let mut senders: Vec<Ipv4Addr> = peers.iter().map(|p| *p.addr.ip()).collect();
        senders.sort_unstable();
        senders.dedup();
        // A network that is not IPv4 has no address inside.
        let network = Span::of(local.network).unwrap_or(Span { first: 1, last: 0 });
        let ours = local.subnets.iter().filter_map(|s| Span::of(*s)).collect();
        Self { local, policy, network, ours, peers, starts, owners, senders }
    }

    pub fn local(&self) -> &Local {
        &self.local
    }

    /// Where a packet for `destination` goes: the peer with the longest prefix. Nobody's and our own go nowhere.
    #[inline]
    pub fn route(&self, destination: Ipv4Addr) -> Option<&Peer> {
        match self.owner(destination) {
            Owner::Peer(index) => self.peers.get(index as usize),
            Owner::Local | Owner::Nobody => None,
        }
    }

    /// Whether a packet that came from `outer` may go to this node's device.
    ///
    /// Of `outer` the address alone counts: a lease names no port, and whatever translates addresses on the way
    /// rewrites ports first.
    #[inline]
    pub fn admit(
        &self,
        outer: SocketAddrV4,
        source: Ipv4Addr,
        destination: Ipv4Addr,
    ) -> Result<(), DropReason> {
        let from = self.owner(source);
        // The one look-up that nearly every packet needs: the source's peer is the one that sent it.
        let sender = match from {
            Owner::Peer(index) => self.peers.get(index as usize).map(|p| p.addr.ip()),
            Owner::Local | Owner::Nobody => None,
        };
        if sender != Some(outer.ip()) {
            self.admit_other(outer, source, from)?;
        }
        // One or two: cheaper than a look-up.
        if self.ours.iter().any(|span| span.contains(destination)) {
            Ok(())
        } else {
            Err(DropReason::NotOurs)
        }
    }

    /// A source whose peer is not the one that sent it, or that is no peer's.
    fn admit_other(&self, outer: SocketAddrV4, source: Ipv4Addr, from: Owner) -> Result<(), DropReason> {
        let known = self.senders.binary_search(outer.ip()).is_ok();
        if !known && !self.policy.behind_nat {
            return Err(DropReason::UnknownPeer);
        }
        let admitted = match from {
            Owner::Local => false,
            // Another peer's, which only a peer behind NAT can be.
            Owner::Peer(_) => self.policy.behind_nat,
            Owner::Nobody => {
                known && !self.policy.strict && !self.network.contains(source) && can_be_a_source(source)
            }
        };
        if admitted { Ok(()) } else { Err(DropReason::SourceRefused) }
    }

    #[inline]
    fn owner(&self, addr: Ipv4Addr) -> Owner {
        let after = self.starts.partition_point(|start| *start <= addr.to_bits());
        after.checked_sub(1).map_or(Owner::Nobody, |at| self.owners[at])
    }
}

/// Not this network, loopback (which reaches local services where `route_localnet` is set), multicast or broadcast
/// (RFC 1122 3.2.1.3).
pub(super) fn can_be_a_source(addr: Ipv4Addr) -> bool {
    addr.octets()[0] != 0 && !addr.is_loopback() && !addr.is_multicast() && !addr.is_broadcast()
}

impl Span {
    fn of(subnet: Subnet) -> Option<Self> {
        match (subnet.addr(), subnet.last()) {
            (IpAddr::V4(first), IpAddr::V4(last)) => {
                Some(Self { first: first.to_bits(), last: last.to_bits() })
            }
            _ => None,
        }
    }

    fn contains(self, addr: Ipv4Addr) -> bool {
        (self.first..=self.last).contains(&addr.to_bits())
    }
}

/// Cuts prefixes, which are nested or disjoint, into ranges with the innermost one's owner. Of two equal prefixes the
/// first in the list counts.
fn ranges(mut spans: Vec<(Span, Owner)>) -> (Vec<u32>, Vec<Owner>) {
    // Outer before inner; of equal ones the first comes last, hence counts as the innermost.
    spans.reverse();
    spans.sort_by_key(|(span, _)| (span.first, std::cmp::Reverse(span.last)));
    let mut cuts: BTreeMap<u32, Owner> = BTreeMap::new();
    let mut open: Vec<(Span, Owner)> = Vec::new();
    let close_until = |open: &mut Vec<(Span, Owner)>, cuts: &mut BTreeMap<u32, Owner>, until: Option<u32>| {
        while let Some((span, _)) = open.pop_if(|(span, _)| until.is_none_or(|until| span.last < until)) {
            // Behind it the one that it lay in goes on.
            if let Some(next) = span.last.checked_add(1) {
                cuts.insert(next, open.last().map_or(Owner::Nobody, |(_, owner)| *owner));
            }
        }
    };
    for (span, owner) in spans {
        close_until(&mut open, &mut cuts, Some(span.first));
        cuts.insert(span.first, owner);
        open.push((span, owner));
    }
    close_until(&mut open, &mut cuts, None);
    cuts.into_iter().unzip()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().expect(text)
    }

    fn addr(text: &str) -> Ipv4Addr {
        text.parse().expect(text)
    }

    fn peer(text: &str, at: &str) -> Peer {
        Peer { subnet: subnet(text), addr: SocketAddrV4::new(addr(at), 8285) }
    }

    fn local() -> Local {
        Local {
            network: subnet("10.5.0.0/16"),
            subnets: vec![subnet("10.5.1.0/24"), subnet("10.5.11.0/24")],
            device_addr: addr("10.5.1.0"),
        }
    }

    fn table(policy: SourcePolicy) -> PeerTable {
        let peers = [
            peer("10.5.2.0/24", "192.168.0.2"),
            peer("10.5.22.0/24", "192.168.0.2"),
            peer("10.5.3.0/24", "192.168.0.3"),
            // Inside that of another, and one without any overlay.
            peer("10.5.3.64/26", "192.168.0.4"),
            peer("172.30.0.0/16", "192.168.0.5"),
            peer("fd00::/64", "192.168.0.6"),
        ];
        PeerTable::new(local(), policy, peers)
    }

    #[test]
    fn the_longest_prefix_counts() {
        let table = table(SourcePolicy::default());
        for (to, at) in [
            ("10.5.2.0", Some("192.168.0.2")),
            ("10.5.2.255", Some("192.168.0.2")),
            ("10.5.22.9", Some("192.168.0.2")),
            ("10.5.3.63", Some("192.168.0.3")),
            ("10.5.3.64", Some("192.168.0.4")),
            ("10.5.3.127", Some("192.168.0.4")),
            ("10.5.3.128", Some("192.168.0.3")),
            ("172.30.255.255", Some("192.168.0.5")),
            ("172.31.0.0", None),
            ("10.5.4.0", None),
            ("10.5.1.9", None),
            ("10.5.255.255", None),
            ("0.0.0.0", None),
            ("255.255.255.255", None),
        ] {
            assert_eq!(table.route(addr(to)).map(|p| *p.addr.ip()), at.map(addr), "to {to}");
        }
        assert_eq!(table.peers.len(), 5, "IPv6 has no place here");
    }

    #[test]
    fn of_two_with_one_subnet_the_later_counts_and_what_is_ours_is_nobodys() {
        let peers = [
            peer("10.5.2.0/24", "192.168.0.2"),
            peer("10.5.2.0/24", "192.168.0.3"),
            peer("10.5.1.0/24", "192.168.0.4"),
        ];
        let table = PeerTable::new(local(), SourcePolicy::default(), peers);
        assert_eq!(table.route(addr("10.5.2.1")).map(|p| *p.addr.ip()), Some(addr("192.168.0.3")));
        assert_eq!(table.route(addr("10.5.1.1")), None);
        // What has no range has no owner either.
        let everything = PeerTable::new(local(), SourcePolicy::default(), [peer("0.0.0.0/0", "192.168.0.9")]);
        for to in ["0.0.0.0", "255.255.255.255", "10.5.2.0", "10.5.0.255"] {
            assert!(everything.route(addr(to)).is_some(), "to {to}");
        }
        assert_eq!(everything.route(addr("10.5.11.255")), None);
    }

    #[test]
    fn who_may_send_what() {
        use DropReason::{NotOurs, SourceRefused, UnknownPeer};
        let (default, strict) = (SourcePolicy::default(), SourcePolicy { strict: true, behind_nat: false });
        let nat = SourcePolicy { strict: false, behind_nat: true };
        let strict_nat = SourcePolicy { strict: true, behind_nat: true };
        let ok = [Ok(()); 4];
        let all = |reason| [Err(reason); 4];
        // In the order default, strict, behind NAT, both.
        for (what, outer, source, destination, wanted) in [
            ("a peer's pod", "192.168.0.2", "10.5.2.9", "10.5.1.9", ok),
            ("to the device itself", "192.168.0.2", "10.5.2.9", "10.5.1.0", ok),
            ("its second lease, ours too", "192.168.0.2", "10.5.22.9", "10.5.11.9", ok),
            ("outside the overlay, yet leased", "192.168.0.5", "172.30.1.1", "10.5.1.9", ok),
            (
                "the node's own address",
                "192.168.0.2",
                "192.168.0.2",
                "10.5.1.9",
                [Ok(()), Err(SourceRefused), Ok(()), Err(SourceRefused)],
            ),
            (
                "another peer's pod",
                "192.168.0.2",
                "10.5.3.9",
                "10.5.1.9",
                [Err(SourceRefused), Err(SourceRefused), Ok(()), Ok(())],
            ),
            (
                "a pod inside its subnet that is another's",
                "192.168.0.3",
                "10.5.3.64",
                "10.5.1.9",
                [Err(SourceRefused), Err(SourceRefused), Ok(()), Ok(())],
            ),
            ("our own pod", "192.168.0.2", "10.5.1.7", "10.5.1.9", all(SourceRefused)),
            ("our own other pod", "192.168.0.2", "10.5.11.7", "10.5.1.9", all(SourceRefused)),
            ("nobody's pod", "192.168.0.2", "10.5.9.9", "10.5.1.9", all(SourceRefused)),
            ("loopback", "192.168.0.2", "127.0.0.1", "10.5.1.9", all(SourceRefused)),
            ("multicast", "192.168.0.2", "224.0.0.1", "10.5.1.9", all(SourceRefused)),
            ("broadcast", "192.168.0.2", "255.255.255.255", "10.5.1.9", all(SourceRefused)),
            ("this host", "192.168.0.2", "0.0.0.0", "10.5.1.9", all(SourceRefused)),
            ("for another node", "192.168.0.2", "10.5.2.9", "10.5.3.9", all(NotOurs)),
            ("for nobody", "192.168.0.2", "10.5.2.9", "10.5.9.9", all(NotOurs)),
            ("for the Internet", "192.168.0.2", "10.5.2.9", "1.1.1.1", all(NotOurs)),
            (
                "a stranger",
                "192.168.0.77",
                "10.5.2.9",
                "10.5.1.9",
                [Err(UnknownPeer), Err(UnknownPeer), Ok(()), Ok(())],
            ),
            (
                "a stranger with an address of its own",
                "192.168.0.77",
                "192.168.0.77",
                "10.5.1.9",
                [Err(UnknownPeer), Err(UnknownPeer), Err(SourceRefused), Err(SourceRefused)],
            ),
            (
                "a stranger as our own pod",
                "192.168.0.77",
                "10.5.1.7",
                "10.5.1.9",
                [Err(UnknownPeer), Err(UnknownPeer), Err(SourceRefused), Err(SourceRefused)],
            ),
            (
                "a stranger as nobody's pod",
                "192.168.0.77",
                "10.5.9.9",
                "10.5.1.9",
                [Err(UnknownPeer), Err(UnknownPeer), Err(SourceRefused), Err(SourceRefused)],
            ),
            (
                "a stranger for another node",
                "192.168.0.77",
                "10.5.2.9",
                "10.5.3.9",
                [Err(UnknownPeer), Err(UnknownPeer), Err(NotOurs), Err(NotOurs)],
            ),
        ] {
            for (policy, wanted) in [default, strict, nat, strict_nat].into_iter().zip(wanted) {
                // Whatever port it comes from.
                for port in [8285, 40000] {
                    let outer = SocketAddrV4::new(addr(outer), port);
                    let admitted = table(policy).admit(outer, addr(source), addr(destination));
                    assert_eq!(admitted, wanted, "{what}, {policy:?}");
                }
            }
        }
    }

    /// The last of the longest that cover it, as the later of two counts.
    fn by_going_through(peers: &[Peer], addr: Ipv4Addr) -> Option<&Peer> {
        peers.iter().filter(|p| p.subnet.contains(addr.into())).max_by_key(|p| p.subnet.len())
    }

    #[test]
    fn thousands_of_peers_with_prefixes_of_many_lengths() {
        const PEERS: u32 = 5_000;
        // Spread over 10.0.0.0/8 by a multiplier, lengths 16 to 30: many lie within others.
        let spread = |n: u32| Ipv4Addr::from_bits(10 << 24 | n.wrapping_mul(0x9e37_79b1) >> 8);
        let peers: Vec<Peer> = (0..PEERS)
            .filter_map(|n| {
                let subnet = Subnet::new(spread(n).into(), 16 + (n % 15) as u8)?;
                Some(Peer { subnet, addr: SocketAddrV4::new(Ipv4Addr::from_bits(n + 1), 8285) })
            })
            .collect();
        assert_eq!(peers.len(), PEERS as usize);
        let none = Local { subnets: Vec::new(), ..local() };
        let table = PeerTable::new(none, SourcePolicy::default(), peers.clone());
        assert!(table.peers.len() > 4_000, "{} peers", table.peers.len());
        let ends = peers.iter().step_by(7).flat_map(|peer| {
            let Span { first, last } = Span::of(peer.subnet).expect("IPv4");
            [first.wrapping_sub(1), first, last, last.wrapping_add(1)]
        });
        for bits in ends {
            let addr = Ipv4Addr::from_bits(bits);
            assert_eq!(table.route(addr), by_going_through(&peers, addr), "{addr}");
        }
    }

    proptest! {
        #[test]
        fn a_look_up_gives_what_going_through_all_of_them_gives(
            peers in prop::collection::vec((0u32..64, 0u8..=32), 0..60),
            asked in prop::collection::vec(0u32..64, 30),
        ) {
            // Few addresses at the ends of the range, so that prefixes nest and meet.
            let place = |n: u32| Ipv4Addr::from_bits(n.wrapping_sub(32));
            let peers: Vec<Peer> = peers
                .into_iter()
                .zip(1u32..)
                .filter_map(|((n, len), index)| {
                    let subnet = Subnet::new(place(n).into(), len)?;
                    Some(Peer { subnet, addr: SocketAddrV4::new(Ipv4Addr::from_bits(index), 8285) })
                })
                .collect();
            let none = Local { subnets: Vec::new(), ..local() };
            let table = PeerTable::new(none, SourcePolicy::default(), peers.clone());
            for n in asked {
                prop_assert_eq!(table.route(place(n)), by_going_through(&peers, place(n)));
            }
        }
    }
}
