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
        Self { local, policy, network, peers, starts, owners, senders }
    }

    pub fn local(&self) -> &Local {
        &self.local
    }

    /// By subnet.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
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
        match self.owner(destination) {
            Owner::Local => Ok(()),
            Owner::Peer(_) | Owner::Nobody => Err(DropReason::NotOurs),
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
