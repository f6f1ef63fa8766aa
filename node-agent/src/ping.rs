//! Two pings to a peer, one beside the overlay and one through it, and what the difference says.
//!
//! ICMP echo (RFC 792) over a connected raw socket: the kernel hands over the target's packets only, and reports an
//! unreachable target at once instead of as silence.

mod probe;
mod verdict;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use weft_shared::Subnet;
use weft_shared::lease::LeaseKey;

use crate::status::{PeerStatus, Status};

/// Legs probed at the same time; each holds a thread while its target is silent.
const CONCURRENCY: usize = 64;

#[derive(Debug, Clone, Copy)]
pub struct Probes {
    pub count: u32,
    /// For each answer.
    pub timeout: Duration,
}

impl Default for Probes {
    fn default() -> Self {
        Self { count: 3, timeout: Duration::from_secs(1) }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingReport {
    pub peer: LeaseKey,
    pub public_ip: IpAddr,
    /// To the peer's public address, beside the overlay.
    pub underlay: Leg,
    /// To the peer's address in the overlay.
    pub overlay: Leg,
    /// Pods of the two nodes can talk.
    pub reachable: bool,
    pub verdict: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Leg {
    pub target: IpAddr,
    pub sent: u32,
    pub received: u32,
    /// Milliseconds, over the answers; absent when there is none.
    pub rtt_min: Option<f64>,
    pub rtt_avg: Option<f64>,
    pub rtt_max: Option<f64>,
    /// What the kernel said instead of an answer.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoSuchPeer {
    #[error("no peer yet: no other node has a lease in use")]
    Alone,
    #[error(
        "no peer {wanted:?}: expected all, a number from 1 to {count} (as in weftctl peers), a public address, a leased \
         subnet or an address inside one"
    )]
    Unknown { wanted: String, count: usize },
}

/// The peers an operator means: `all`, a number in the list, a public IP, a subnet or lease key, or an address in it.
pub fn select<'a>(status: &'a Status, wanted: &str) -> Result<Vec<&'a PeerStatus>, NoSuchPeer> {
    if status.peers.is_empty() {
        return Err(NoSuchPeer::Alone);
    }
    if wanted == "all" {
        return Ok(status.peers.iter().collect());
    }
    let unknown = || NoSuchPeer::Unknown { wanted: wanted.to_owned(), count: status.peers.len() };
    if let Ok(number) = wanted.parse::<usize>() {
        let peer = number.checked_sub(1).and_then(|index| status.peers.get(index));
        return peer.map(|peer| vec![peer]).ok_or_else(unknown);
    }
    let means = |peer: &&PeerStatus| {
        let by_addr = |ip: IpAddr| peer.public_ip == ip || peer.key.subnets().any(|s| s.contains(ip));
        let by_subnet = |subnet: Subnet| peer.key.subnets().any(|s| s == subnet);
        wanted.parse().is_ok_and(by_addr)
            || wanted.parse().is_ok_and(by_subnet)
            || peer.key.to_string() == wanted
    };
    status.peers.iter().find(means).map(|peer| vec![peer]).ok_or_else(unknown)
}

/// Probes both legs to every peer that `wanted` means; reports in the peers' order.
pub async fn ping(status: &Status, wanted: &str, probes: Probes) -> Result<Vec<PingReport>, NoSuchPeer> {
    let peers = select(status, wanted)?;
    let slots = Arc::new(Semaphore::new(CONCURRENCY));
    let mut legs = JoinSet::new();
    for (index, peer) in peers.iter().enumerate() {
        let source = overlay_source(status, peer);
        for (through, target, source) in [(false, peer.public_ip, None), (true, peer.overlay_probe, source)] {
            let slots = Arc::clone(&slots);
            legs.spawn(async move {
                let _slot = slots.acquire().await;
                let leg = tokio::task::spawn_blocking(move || probe::run(target, source, probes)).await;
                ((index, through), leg.unwrap_or_else(|e| Leg::failed(target, format!("probe died: {e}"))))
            });
        }
    }
    let mut done: Vec<_> = legs.join_all().await;
    done.sort_by_key(|(place, _)| *place);
    let mut legs = done.into_iter().map(|(_, leg)| leg);
    let report = |peer: &&PeerStatus| {
        let (underlay, overlay) = (legs.next()?, legs.next()?);
        Some(verdict::report(peer, status.network.as_ref(), underlay, overlay))
    };
    Ok(peers.iter().map_while(report).collect())
}

/// A tunnel's device lends its own overlay address. Without one the kernel would take the underlay's, and the answer
/// would come back beside the overlay: the pods' gateway must be the source.
fn overlay_source(status: &Status, peer: &PeerStatus) -> Option<Ipv4Addr> {
    let lease = status.lease.as_ref().filter(|_| peer.backend == "host-gw")?;
    match lease.key.v4.gateway() {
        IpAddr::V4(gateway) => Some(gateway),
        IpAddr::V6(_) => None,
    }
}

impl Leg {
    fn failed(target: IpAddr, problem: String) -> Self {
        Self {
            target,
            sent: 0,
            received: 0,
            rtt_min: None,
            rtt_avg: None,
            rtt_max: None,
            problem: Some(problem),
        }
    }

    pub fn answers(&self) -> bool {
        self.received > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::sample;

    #[test]
    fn peers_by_every_name_they_have() {
        let status = sample::ready();
        for wanted in ["1", "192.168.9.2", "10.5.2.0/24", "10.5.2.0-24", "10.5.2.77"] {
            let found = select(&status, wanted).expect(wanted);
            assert_eq!(found, [&status.peers[0]], "{wanted}");
        }
        assert_eq!(select(&status, "all").expect("all").len(), 2);
        for wanted in ["", "0", "3", "192.168.9.9", "10.5.2.0/25", "node-b"] {
            let error = select(&status, wanted).expect_err(wanted).to_string();
            assert!(error.contains("a number from 1 to 2"), "{error}");
        }
        assert_eq!(select(&sample::waiting(), "all"), Err(NoSuchPeer::Alone));
    }

    #[test]
    fn through_host_gw_the_gateway_asks() {
        let mut status = sample::ready();
        assert_eq!(overlay_source(&status, &status.peers[0]), None);
        status.peers[0].backend = "host-gw".into();
        assert_eq!(overlay_source(&status, &status.peers[0]), Some(Ipv4Addr::new(10, 5, 1, 1)));
    }
}
