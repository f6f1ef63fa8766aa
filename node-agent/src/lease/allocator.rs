//! Chooses a free subnet, as flannel does: at random among the first hundred, so that nodes that start together
//! seldom choose the same one. Pure; cost depends on the leases taken, not on the size of the network.
//!
//! Subnets that were freed lately come last: peers, pods and the world's caches may still believe in their former node.
//! Which those are, each store says as well as it can: the embedded one writes down what is freed and knows it to the
//! day; etcd has no clock and only as much of its past as was not compacted (`etcd::history`).

use weft_shared::Subnet;
use weft_shared::lease::LeaseKey;
use weft_shared::netconf::{NetworkConfig, Range};

use super::StoreError;

/// Free subnets looked at before one is drawn (flannel: `subnetsPerAllocation`).
const CANDIDATES: u128 = 100;

/// A key that `config` admits and that overlaps none of `taken`, whatever their lengths; one that overlaps none of
/// `freed` either, if there is one.
pub fn allocate<'a>(
    config: &NetworkConfig,
    taken: impl IntoIterator<Item = &'a LeaseKey> + Clone,
    freed: &[LeaseKey],
    random: u64,
) -> Result<LeaseKey, StoreError> {
    let free = |range: &Range, random: u64| {
        let subnets = || taken.clone().into_iter().flat_map(LeaseKey::subnets);
        let lately = freed.iter().flat_map(LeaseKey::subnets);
        let rested = choose(range, subnets().chain(lately), random);
        rested.or_else(|| choose(range, subnets(), random)).ok_or_else(|| StoreError::Exhausted {
            min: range.min.to_string(),
            max: range.max.to_string(),
            len: range.subnet_len,
        })
    };
    let v4 = free(&config.v4, random)?;
    let v6 = config.v6.map(|range| free(&range, random.rotate_left(32))).transpose()?;
    Ok(LeaseKey { v4, v6 })
}

/// A subnet of `range` that overlaps none of `taken`; `None` when there is none.
pub fn choose(range: &Range, taken: impl Iterator<Item = Subnet>, random: u64) -> Option<Subnet> {
    let slots = Slots::of(range);
    let mut busy: Vec<(u128, u128)> = taken.filter_map(|subnet| slots.covered_by(subnet)).collect();
    busy.sort_unstable();

    // Gaps between the busy slots, together holding at most CANDIDATES free ones.
    let mut gaps = Vec::new();
    let (mut next, mut found) = (0, 0);
    for (first, last) in busy.into_iter().chain([(slots.count, slots.count)]) {
        if first > next {
            let len = (first - next).min(CANDIDATES - found);
            gaps.push((next, len));
            found += len;
        }
        if found == CANDIDATES {
            break;
        }
        next = next.max(last + 1);
    }

    let mut nth = u128::from(random).checked_rem(found)?;
    for (first, len) in gaps {
        if nth < len {
            return slots.subnet(first + nth);
        }
        nth -= len;
    }
    None
}

/// The leasable subnets of a range, counted from its first.
struct Slots {
    range: Range,
    min: u128,
    /// log2 of a subnet's size.
    shift: u32,
    count: u128,
}

impl Slots {
    fn of(range: &Range) -> Self {
        let bits = if range.network.is_ipv4() { 32 } else { 128 };
        let shift = bits - u32::from(range.subnet_len);
        let (min, max) = (number(range.min), number(range.max));
        Self { range: *range, min, shift, count: ((max - min) >> shift) + 1 }
    }

    /// First and last slot that share an address with `subnet`; the last may lie beyond the range.
    fn covered_by(&self, subnet: Subnet) -> Option<(u128, u128)> {
        if subnet.is_ipv4() != self.range.network.is_ipv4() {
            return None;
        }
        let (first, last) = (number(subnet.addr()), number(subnet.last()));
        let first = first.saturating_sub(self.min) >> self.shift;
        let last = last.checked_sub(self.min)? >> self.shift;
        (first < self.count).then_some((first, last))
    }

    fn subnet(&self, slot: u128) -> Option<Subnet> {
        let addr = self.min + (slot << self.shift);
        let addr = if self.range.network.is_ipv4() {
            std::net::Ipv4Addr::from(u32::try_from(addr).ok()?).into()
        } else {
            std::net::Ipv6Addr::from(addr).into()
        };
        Subnet::new(addr, self.range.subnet_len)
    }
}

fn number(addr: std::net::IpAddr) -> u128 {
    match addr {
        std::net::IpAddr::V4(v4) => u32::from(v4).into(),
        std::net::IpAddr::V6(v6) => v6.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).expect(json)
    }

    fn range(network: &str, len: u8, min: &str, max: &str) -> Range {
        let addr = |text: &str| text.parse().expect(text);
        Range {
            network: network.parse().expect(network),
            subnet_len: len,
            any_len: false,
            min: addr(min),
            max: addr(max),
        }
    }

    #[test]
    fn draws_among_the_first_hundred() {
        let config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let drawn = |random| allocate(&config, &[], &[], random).expect("free").to_string();
        assert_eq!(drawn(0), "10.5.1.0-24");
        assert_eq!(drawn(99), "10.5.100.0-24");
        assert_eq!(drawn(100), "10.5.1.0-24");
    }

    #[test]
    fn both_families_of_a_dual_stack_network() {
        let mut config = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        config.v6 = Some(range("fd00::/48", 64, "fd00:0:0:1::", "fd00:0:0:ffff::"));
        let taken = ["10.5.1.0-24&fd00:0:0:1::-64".parse().expect("key")];
        assert_eq!(
            allocate(&config, &taken, &[], 0).expect("free").to_string(),
            "10.5.2.0-24&fd00:0:0:2::-64"
        );
    }

    #[test]
    fn what_was_freed_lately_comes_last() {
        let config = config(r#"{"Network":"10.5.0.0/24","SubnetLen":26,"Backend":{"Type":"host-gw"}}"#);
        let key = |text: &str| text.parse::<LeaseKey>().expect(text);
        let (taken, freed) = ([key("10.5.0.64-26")], [key("10.5.0.128-26")]);
        for random in 0..100 {
            let drawn = |taken: &[LeaseKey]| allocate(&config, taken, &freed, random).map(|k| k.to_string());
            assert_eq!(drawn(&taken).expect("rested"), "10.5.0.192-26");
            let both = [taken[0], key("10.5.0.192-26")];
            assert_eq!(drawn(&both).expect("the last one"), "10.5.0.128-26");
            assert!(drawn(&[both[0], both[1], freed[0]]).is_err(), "taken again");
        }
    }

    #[test]
    fn a_large_network_costs_no_walk() {
        // Half of it taken, by one lease: whoever walks the slots never comes to the other half.
        let range = range("fd00::/8", 128, "fd00::1", "fdff::");
        let half = "fd00::/9".parse().expect("subnet");
        let looked_at = std::cell::Cell::new(0);
        let taken = std::iter::repeat_n(half, 5000).inspect(|_| looked_at.set(looked_at.get() + 1));
        assert_eq!(choose(&range, taken, 7).expect("free").to_string(), "fd80::7/128");
        assert_eq!(looked_at.get(), 5000, "every lease once");
    }

    fn subnets_of(range: &Range) -> Vec<Subnet> {
        let (min, max) = (number(range.min) as u32, number(range.max) as u32);
        (min..=max)
            .step_by(1 << (32 - range.subnet_len))
            .filter_map(|a| Subnet::new(std::net::Ipv4Addr::from(a).into(), range.subnet_len))
            .collect()
    }

    proptest! {
        /// Against the plain definition, on a network small enough to list.
        #[test]
        fn free_in_range_and_aligned_or_none_is_free(
            len in 20_u8..=26,
            bounds in (0_u32..64, 0_u32..64),
            taken in prop::collection::vec((0_u32..(1 << 14), 18_u8..=30), 0..40),
            random: u64,
        ) {
            let size = 1_u32 << (32 - len);
            let slot = |n: u32| std::net::Ipv4Addr::from(0x0a05_0000 + (n * size) % (1 << 13)).into();
            let (a, b): (std::net::IpAddr, std::net::IpAddr) = (slot(bounds.0), slot(bounds.1));
            let range = Range {
                network: "10.5.0.0/16".parse().expect("network"),
                subnet_len: len,
                any_len: false,
                min: a.min(b),
                max: a.max(b),
            };
            let taken: Vec<Subnet> = taken
                .into_iter()
                .filter_map(|(n, len)| Subnet::new(std::net::Ipv4Addr::from(0x0a05_0000 + n).into(), len))
                .collect();
            let free: Vec<Subnet> = subnets_of(&range)
                .into_iter()
                .filter(|s| !taken.iter().any(|t| t.overlaps(*s)))
                .collect();
            match choose(&range, taken.iter().copied(), random) {
                None => prop_assert!(free.is_empty(), "missed {free:?}"),
                Some(subnet) => {
                    prop_assert!(range.admits(subnet));
                    let hundred = &free[..free.len().min(CANDIDATES as usize)];
                    prop_assert!(hundred.contains(&subnet), "{subnet} is not among {hundred:?}");
                }
            }
        }
    }
}
