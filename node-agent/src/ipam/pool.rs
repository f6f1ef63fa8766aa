//! Round robin over one leased subnet.
//!
//! An address that was just freed is the last to come back: neighbours keep a stale ARP entry for it for a while.
//! The network's own address, the gateway (`.1`) and IPv4's broadcast address are never handed out. No I/O here: the
//! caller persists [`Pool::last`]. Taking an address costs one walk over the run of used ones behind the cursor.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use weft_shared::Subnet;

/// The first place after the network's own address and the gateway.
const FIRST: u32 = 2;

#[derive(Debug, Clone)]
pub(super) struct Pool {
    subnet: Subnet,
    /// Places are counted from the network's own address. The last place that can be handed out:
    max: u32,
    last: u32,
    used: BTreeSet<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PoolError {
    #[error("all {capacity} pod addresses of this node's subnet {subnet} are in use")]
    Exhausted { subnet: Subnet, capacity: u32 },
    #[error("requested address {address} is already in use")]
    Taken { address: IpAddr },
    #[error("requested address {address} lies outside this node's subnet {subnet}")]
    Outside { address: IpAddr, subnet: Subnet },
    #[error("requested address {address} is the {role} of this node's subnet {subnet}")]
    NotForPods { address: IpAddr, subnet: Subnet, role: &'static str },
}

impl Pool {
    /// `last` is where an earlier pool of this subnet stopped; one that lies elsewhere is no cursor.
    pub(super) fn new(subnet: Subnet, last: Option<IpAddr>) -> Self {
        let max = last_place(subnet);
        let last = last.and_then(|addr| place(subnet, addr)).filter(|place| (FIRST..=max).contains(place));
        Self { subnet, max, last: last.unwrap_or(FIRST - 1), used: BTreeSet::new() }
    }

    /// The next free address after the last one handed out.
    pub(super) fn take(&mut self) -> Result<IpAddr, PoolError> {
        let free = self
            .first_gap(self.last.saturating_add(1).max(FIRST)..=self.max)
            .or_else(|| self.first_gap(FIRST..=self.last.min(self.max)));
        let exhausted = PoolError::Exhausted { subnet: self.subnet, capacity: self.capacity() };
        let place = free.ok_or(exhausted)?;
        let address = self.subnet.nth(place).ok_or(exhausted)?;
        self.used.insert(place);
        self.last = place;
        Ok(address)
    }

    /// This very address. The cursor stays: it marks what round robin gave.
    pub(super) fn take_exact(&mut self, address: IpAddr) -> Result<(), PoolError> {
        let place = self.admit(address)?;
        if self.used.insert(place) { Ok(()) } else { Err(PoolError::Taken { address }) }
    }

    /// Whether a pod may have this address at all, taken or not.
    pub(super) fn check(&self, address: IpAddr) -> Result<(), PoolError> {
        self.admit(address).map(drop)
    }

    /// Blocks an address that a record or another pool holds. Any address is welcome: one that is not of this pool is
    /// not in danger here.
    pub(super) fn block(&mut self, address: IpAddr) {
        if let Ok(place) = self.admit(address) {
            self.used.insert(place);
        }
    }

    pub(super) fn free(&mut self, address: IpAddr) {
        if let Some(place) = place(self.subnet, address) {
            self.used.remove(&place);
        }
    }

    /// The address that [`Pool::take`] gave last.
    pub(super) fn last(&self) -> Option<IpAddr> {
        if self.last < FIRST { None } else { self.subnet.nth(self.last) }
    }

    pub(super) fn used(&self) -> usize {
        self.used.len()
    }

    /// How many pods can have an address at once.
    pub(super) fn capacity(&self) -> u32 {
        (self.max + 1).saturating_sub(FIRST)
    }

    fn admit(&self, address: IpAddr) -> Result<u32, PoolError> {
        let subnet = self.subnet;
        let place = place(subnet, address).ok_or(PoolError::Outside { address, subnet })?;
        let role = match place {
            0 => "network address",
            1 => "gateway",
            n if n > self.max => "broadcast address",
            _ => return Ok(place),
        };
        Err(PoolError::NotForPods { address, subnet, role })
    }

    fn first_gap(&self, range: RangeInclusive<u32>) -> Option<u32> {
        if range.is_empty() {
            return None;
        }
        let mut candidate = *range.start();
        for used in self.used.range(range.clone()) {
            if *used != candidate {
                break;
            }
            candidate = candidate.checked_add(1)?;
        }
        range.contains(&candidate).then_some(candidate)
    }
}

fn place(subnet: Subnet, address: IpAddr) -> Option<u32> {
    if !subnet.contains(address) {
        return None;
    }
    match (subnet.addr(), address) {
        (IpAddr::V4(base), IpAddr::V4(addr)) => Some(u32::from(addr) - u32::from(base)),
        (IpAddr::V6(base), IpAddr::V6(addr)) => u32::try_from(u128::from(addr) - u128::from(base)).ok(),
        _ => None,
    }
}

/// 0 where the subnet has no room for a pod. IPv6 has no broadcast address, and more places than anyone counts.
fn last_place(subnet: Subnet) -> u32 {
    if subnet.is_ipv4() {
        let size = 1_u64 << (32 - subnet.len());
        size.saturating_sub(2) as u32
    } else {
        1_u128
            .checked_shl(128 - u32::from(subnet.len()))
            .map_or(u32::MAX - 1, |size| u32::try_from(size - 1).unwrap_or(u32::MAX).min(u32::MAX - 1))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn addr(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    fn pool(text: &str) -> Pool {
        Pool::new(text.parse().expect(text), None)
    }

    #[test]
    fn round_robin_comes_back_late_to_what_was_freed() {
        let mut pool = pool("10.5.1.0/29");
        assert_eq!(pool.capacity(), 5);
        assert_eq!(pool.take(), Ok(addr("10.5.1.2")));
        assert_eq!(pool.take(), Ok(addr("10.5.1.3")));
        pool.free(addr("10.5.1.2"));
        for expected in ["10.5.1.4", "10.5.1.5", "10.5.1.6", "10.5.1.2"] {
            assert_eq!(pool.take(), Ok(addr(expected)));
        }
        let error = pool.take().expect_err("full").to_string();
        assert_eq!(error, "all 5 pod addresses of this node's subnet 10.5.1.0/29 are in use");
        pool.free(addr("10.5.1.4"));
        assert_eq!(pool.take(), Ok(addr("10.5.1.4")));
    }

    #[test]
    fn a_new_pool_goes_on_where_the_old_one_stopped() {
        let mut old = pool("10.5.1.0/24");
        assert_eq!(old.last(), None);
        old.take().expect("free");
        old.take().expect("free");
        let mut new = Pool::new("10.5.1.0/24".parse().expect("subnet"), old.last());
        assert_eq!(new.take(), Ok(addr("10.5.1.4")));
        let mut elsewhere = Pool::new("10.5.2.0/24".parse().expect("subnet"), old.last());
        assert_eq!(elsewhere.take(), Ok(addr("10.5.2.2")));
    }

    #[test]
    fn requested_addresses_are_refused_by_name_and_reason() {
        let mut pool = pool("10.5.1.0/24");
        assert_eq!(pool.take_exact(addr("10.5.1.2")), Ok(()));
        for (address, reason) in [
            ("10.5.1.2", "10.5.1.2 is already in use"),
            ("10.5.2.2", "10.5.2.2 lies outside this node's subnet 10.5.1.0/24"),
            ("fd00::2", "fd00::2 lies outside"),
            ("10.5.1.0", "10.5.1.0 is the network address of"),
            ("10.5.1.1", "10.5.1.1 is the gateway of"),
            ("10.5.1.255", "10.5.1.255 is the broadcast address of"),
        ] {
            let error = pool.take_exact(addr(address)).expect_err(address).to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(pool.take(), Ok(addr("10.5.1.3")), "a taken address is passed over");
        assert_eq!(pool.used(), 2);
    }

    #[test]
    fn subnets_at_the_edge() {
        for (subnet, capacity) in [
            ("10.5.1.0/30", 1),
            ("10.5.1.0/31", 0),
            ("10.5.1.0/32", 0),
            ("0.0.0.0/0", u32::MAX - 2),
            ("fd00::/126", 2),
            ("fd00::/128", 0),
            ("fd00::/64", u32::MAX - 2),
            ("::/0", u32::MAX - 2),
        ] {
            let mut pool = pool(subnet);
            assert_eq!(pool.capacity(), capacity, "{subnet}");
            assert_eq!(pool.take().is_ok(), capacity > 0, "{subnet}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take,
        Exact(u8),
        Free(u8),
        Reopen,
    }

    proptest! {
        /// Against a list that is walked one by one.
        #[test]
        fn agrees_with_the_naive_model(
            len in 26_u8..=31,
            steps in prop::collection::vec(
                prop_oneof![
                    4 => Just(Step::Take),
                    2 => (0_u8..70).prop_map(Step::Exact),
                    3 => (0_u8..70).prop_map(Step::Free),
                    1 => Just(Step::Reopen),
                ],
                0..200,
            ),
        ) {
            let subnet = Subnet::new(addr("10.5.1.64"), len).expect("subnet");
            let size = 1_u32 << (32 - len);
            let hosts: Vec<IpAddr> = (2..size.saturating_sub(1)).filter_map(|n| subnet.nth(n)).collect();
            let nth = |n: u8| IpAddr::from(std::net::Ipv4Addr::from(0x0a05_0140 + u32::from(n)));
            let mut pool = Pool::new(subnet, None);
            let mut used = BTreeSet::new();
            let mut cursor = 0;
            for step in steps {
                match step {
                    Step::Take => {
                        let free = (0..hosts.len())
                            .map(|i| (cursor + i) % hosts.len())
                            .find(|i| !used.contains(&hosts[*i]));
                        prop_assert_eq!(pool.take().ok(), free.map(|i| hosts[i]));
                        if let Some(i) = free {
                            used.insert(hosts[i]);
                            cursor = i + 1;
                        }
                    }
                    Step::Exact(n) => {
                        let fits = hosts.contains(&nth(n)) && !used.contains(&nth(n));
                        prop_assert_eq!(pool.take_exact(nth(n)).is_ok(), fits);
                        if fits {
                            used.insert(nth(n));
                        }
                    }
                    Step::Free(n) => {
                        pool.free(nth(n));
                        used.remove(&nth(n));
                    }
                    Step::Reopen => {
                        pool = Pool::new(subnet, pool.last());
                        used.iter().for_each(|address| pool.block(*address));
                    }
                }
                prop_assert_eq!(pool.used(), used.len());
            }
        }
    }
}
