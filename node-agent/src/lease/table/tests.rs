use proptest::prelude::*;
use weft_shared::lease::LeaseAttrs;

use super::*;
use crate::lease::Departure;

fn config() -> NetworkConfig {
    NetworkConfig::parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("config")
}

fn dual_stack() -> NetworkConfig {
    let range = Range {
        network: "fd00::/48".parse().expect("network"),
        subnet_len: 64,
        any_len: false,
        min: "fd00:0:0:1::".parse().expect("min"),
        max: "fd00:0:0:ffff::".parse().expect("max"),
    };
    NetworkConfig { v6: Some(range), ..config() }
}

fn lease(key: &str, ip: &str, create_revision: u64) -> Lease {
    let attrs: LeaseAttrs =
        serde_json::from_str(&format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null}}"#)).expect(ip);
    Lease { key: key.parse().expect(key), attrs, create_revision }
}

fn snapshot(leases: &[Lease], malformed: &[Malformed]) -> LeaseUpdate {
    LeaseUpdate::Snapshot { leases: leases.to_vec(), malformed: malformed.to_vec() }
}

const GRACE: Duration = Duration::from_secs(600);

fn table_of(config: NetworkConfig) -> LeaseTable {
    LeaseTable::new(config, GRACE)
}

/// The same moment, whenever it is asked for.
fn now() -> Instant {
    static NOW: OnceLock<Instant> = OnceLock::new();
    *NOW.get_or_init(Instant::now)
}

fn removed(lease: &Lease) -> LeaseUpdate {
    LeaseUpdate::Remove { key: lease.key, how: Departure::ByHand }
}

fn peers(table: &LeaseTable) -> Vec<String> {
    table.peers().map(|lease| format!("{} {}", lease.key, lease.attrs.public_ip)).collect()
}

#[test]
fn updates_are_compared_by_value() {
    let mut table = table_of(config());
    let (a, b) = (lease("10.5.1.0-24", "192.0.2.1", 1), lease("10.5.2.0-24", "192.0.2.2", 2));
    assert!(!table.has_snapshot());
    assert!(table.apply(snapshot(&[], &[]), now()), "the first snapshot is news even when empty");
    assert!(table.has_snapshot());
    assert!(table.apply(snapshot(&[a.clone(), b.clone()], &[]), now()));
    assert!(!table.apply(snapshot(&[b.clone(), a.clone()], &[]), now()));
    assert!(!table.apply(LeaseUpdate::Upsert(a.clone()), now()));
    let moved = lease("10.5.1.0-24", "192.0.2.9", 1);
    assert!(table.apply(snapshot(&[moved, b], &[]), now()), "same keys, another public IP");
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.9", "10.5.2.0-24 192.0.2.2"]);
    assert!(table.apply(removed(&a), now()));
    assert!(!table.apply(removed(&a), now()));
    assert_eq!(peers(&table), ["10.5.2.0-24 192.0.2.2"]);
}

#[test]
fn the_own_lease_is_no_peer_and_nothing_takes_its_addresses() {
    let own = lease("10.5.1.0-24", "192.0.2.1", 5);
    let mut table = table_of(config());
    table.set_own(Some(&own));
    let elder = lease("10.5.1.0-24&fd00:0:0:7::-64", "192.0.2.3", 4);
    let twin = lease("10.5.8.0-24", "192.0.2.1", 6);
    table.apply(snapshot(&[own.clone(), elder, twin, lease("10.5.2.0-24", "192.0.2.2", 7)], &[]), now());
    assert_eq!(peers(&table), ["10.5.2.0-24 192.0.2.2"]);
    let reasons: Vec<_> = table.refused().into_iter().map(|r| format!("{}: {}", r.key, r.reason)).collect();
    assert_eq!(
        reasons,
        [
            "10.5.1.0-24: overlaps 10.5.1.0-24&fd00:0:0:7::-64, which is older: expected a subnet of its own",
            "10.5.1.0-24&fd00:0:0:7::-64: overlaps 10.5.1.0-24, this node's own: expected a subnet of its own",
            "10.5.8.0-24: PublicIP = 192.0.2.1: expected another node's address, this one is our own",
        ]
    );
    table.set_own(None);
    assert!(peers(&table).contains(&"10.5.8.0-24 192.0.2.1".into()));
}

#[test]
fn what_was_recalled_and_is_not_in_the_first_snapshot_counts_as_expired() {
    let own = lease("10.5.1.0-24", "192.0.2.1", 0);
    let saved: Vec<Lease> =
        (2..=5).map(|n| lease(&format!("10.5.{n}.0-24"), &format!("192.0.2.{n}"), n)).collect();
    let mut table = table_of(config());
    table.recall(own, saved.clone());
    assert!(!table.has_snapshot(), "what was saved is not the store's word");
    assert_eq!(peers(&table).len(), 4);
    assert!(table.expired().is_empty() && table.next_end().is_none());
    // One has renewed, one's subnet and one's address are another's now, one has not come back yet.
    let (subnet_taken, ip_taken) =
        (lease("10.5.3.0-24", "192.0.2.30", 12), lease("10.5.40.0-24", "192.0.2.4", 13));
    let told = snapshot(&[lease("10.5.2.0-24", "192.0.2.2", 11), subnet_taken, ip_taken], &[]);
    assert!(table.apply(told.clone(), now()) && table.has_snapshot());
    let mut in_use = vec![
        "10.5.2.0-24 192.0.2.2",
        "10.5.3.0-24 192.0.2.30",
        "10.5.5.0-24 192.0.2.5",
        "10.5.40.0-24 192.0.2.4",
    ];
    assert_eq!(peers(&table), in_use);
    assert_eq!(table.expired(), &BTreeMap::from([(saved[3].key, now() + GRACE)]));
    assert!(!table.apply(told, now() + GRACE / 2), "a second snapshot gives no second grace");
    assert!(table.pass_time(now() + GRACE));
    in_use.remove(2);
    assert_eq!(peers(&table), in_use);
}

#[test]
fn the_recalled_own_lease_is_never_a_peer() {
    let own = lease("10.5.1.0-24", "192.0.2.1", 0);
    let mut table = table_of(config());
    table.recall(own.clone(), vec![own, lease("10.5.2.0-24", "192.0.2.2", 2)]);
    assert_eq!(peers(&table), ["10.5.2.0-24 192.0.2.2"], "although it was saved among them");
    // As the store has it: by another revision, and before the keeper has found it.
    let stored = lease("10.5.1.0-24", "192.0.2.1", 7);
    table.apply(snapshot(&[stored, lease("10.5.2.0-24", "192.0.2.2", 2)], &[]), now());
    assert_eq!(peers(&table), ["10.5.2.0-24 192.0.2.2"]);
    assert_eq!(table.refused(), []);
    table.apply(snapshot(&[], &[]), now());
    assert_eq!(peers(&table), ["10.5.2.0-24 192.0.2.2"], "it is not an expired peer either");
}

#[test]
fn of_two_leases_with_one_public_ip_the_elder_is_used_on_every_node() {
    let (elder, twin) = (lease("10.5.8.0-24", "192.0.2.1", 5), lease("10.5.1.0-24", "192.0.2.1", 6));
    let other = lease("10.5.2.0-24", "192.0.2.2", 7);
    let mut verdicts = Vec::new();
    for own in [None, Some(&elder), Some(&other)] {
        let mut table = table_of(config());
        table.set_own(own);
        table.apply(snapshot(&[elder.clone(), twin.clone(), other.clone()], &[]), now());
        assert!(!peers(&table).contains(&"10.5.1.0-24 192.0.2.1".to_owned()));
        verdicts.push(table.refused());
    }
    let reason = "PublicIP = 192.0.2.1: expected an address of its own, 10.5.8.0-24, which is older, has it";
    assert_eq!(verdicts[0], [RefusedLease { key: "10.5.1.0-24".into(), reason: reason.into() }]);
    assert!(verdicts.iter().all(|verdict| *verdict == verdicts[0]), "{verdicts:?}");
}

#[test]
fn bad_leases_are_refused_by_key_value_and_expectation() {
    let mut table = table_of(dual_stack());
    for (key, ip, reason) in [
        ("10.6.1.0-24", "192.0.2.1", "subnet = 10.6.1.0/24: expected one inside Network 10.5.0.0/16"),
        ("0.0.0.0-0", "192.0.2.1", "subnet = 0.0.0.0/0: expected one inside Network 10.5.0.0/16"),
        ("10.5.1.0-25", "192.0.2.1", "subnet = 10.5.1.0/25: expected length 24 (SubnetLen)"),
        (
            "10.5.1.0-24&fd01::-64",
            "192.0.2.1",
            "subnet = fd01::/64: expected one inside IPv6Network fd00::/48",
        ),
        ("10.5.1.0-24&fd00::-80", "192.0.2.1", "subnet = fd00::/80: expected length 64 (IPv6SubnetLen)"),
        ("10.5.1.0-24", "0.0.0.0", "PublicIP = 0.0.0.0: expected a unicast address, not one of 0.0.0.0/8"),
        ("10.5.1.0-24", "127.0.0.1", "PublicIP = 127.0.0.1: expected a unicast address, not a loopback one"),
        ("10.5.1.0-24", "224.0.0.1", "PublicIP = 224.0.0.1: expected a unicast address, not a multicast one"),
        (
            "10.5.1.0-24",
            "255.255.255.255",
            "PublicIP = 255.255.255.255: expected a unicast address, not the broadcast one",
        ),
        (
            "10.5.1.0-24",
            "10.5.1.9",
            "PublicIP = 10.5.1.9: expected an address of the underlay, not one inside Network 10.5.0.0/16",
        ),
        (
            "10.5.1.0-24",
            "10.5.200.9",
            "PublicIP = 10.5.200.9: expected an address of the underlay, not one inside Network 10.5.0.0/16",
        ),
    ] {
        table.apply(snapshot(&[lease(key, ip, 1), lease("10.5.9.0-24", "192.0.2.9", 2)], &[]), now());
        assert_eq!(table.refused(), [RefusedLease { key: key.into(), reason: reason.into() }]);
        assert_eq!(peers(&table), ["10.5.9.0-24 192.0.2.9"], "beside {key}");
    }
}

#[test]
fn a_lease_that_nobody_can_use_takes_no_addresses() {
    let mut table = table_of(config());
    table.apply(
        snapshot(
            &[lease("10.5.1.0-24&fd00::-64", "127.0.0.1", 1), lease("10.5.1.0-24", "192.0.2.1", 2)],
            &[],
        ),
        now(),
    );
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
}

#[test]
fn the_ipv6_half_counts_only_in_a_network_that_has_ipv6() {
    let update = snapshot(&[lease("10.5.1.0-24&fd00:0:0:3::-64", "192.0.2.1", 1)], &[]);
    let mut table = table_of(config());
    table.apply(update.clone(), now());
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
    let mut table = table_of(dual_stack());
    table.apply(update, now());
    assert_eq!(peers(&table), ["10.5.1.0-24&fd00:0:0:3::-64 192.0.2.1"]);
}

#[test]
fn an_unreadable_entry_is_named_and_empties_nothing() {
    let mut table = table_of(config());
    let bad = |key: &str| Malformed { key: key.into(), reason: "value is not JSON".into() };
    let a = lease("10.5.1.0-24", "192.0.2.1", 1);
    table.apply(snapshot(std::slice::from_ref(&a), &[]), now());
    assert!(table.apply(LeaseUpdate::Malformed(bad("10.5.1.0-24")), now()));
    assert!(table.apply(LeaseUpdate::Malformed(bad("nonsense")), now()));
    assert!(!table.apply(LeaseUpdate::Malformed(bad("nonsense")), now()));
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
    // A relist sees the same: what was known of the key stays.
    assert!(!table.apply(snapshot(&[], &[bad("10.5.1.0-24"), bad("nonsense")]), now()));
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
    assert_eq!(table.refused().len(), 2);
    assert!(table.apply(LeaseUpdate::MalformedGone("nonsense".into()), now()));
    assert!(table.apply(LeaseUpdate::Upsert(a), now()), "readable again");
    assert_eq!(table.refused(), []);
    table.apply(LeaseUpdate::Malformed(bad("10.5.1.0-24")), now());
    assert!(table.apply(removed(&lease("10.5.1.0-24", "192.0.2.1", 1)), now()));
    assert_eq!((peers(&table).len(), table.refused().len()), (0, 0));
}

fn expired(lease: &Lease) -> LeaseUpdate {
    LeaseUpdate::Remove { key: lease.key, how: Departure::Expired }
}

fn vxlan_lease(key: &str, ip: &str, mac: &str, create_revision: u64) -> Lease {
    let mut lease = lease(key, ip, create_revision);
    lease.attrs.backend_type = "vxlan".into();
    lease.attrs.backend_data = Some(serde_json::json!({"VNI": 1, "VtepMAC": mac}));
    lease
}

#[test]
fn an_expired_peer_stays_for_a_while_and_one_removed_by_hand_does_not() {
    let mut table = table_of(config());
    let (a, b) = (lease("10.5.1.0-24", "192.0.2.1", 1), lease("10.5.2.0-24", "192.0.2.2", 2));
    table.apply(snapshot(&[a.clone(), b.clone()], &[]), now());
    assert_eq!((table.next_end(), table.expired().len()), (None, 0));
    assert!(table.apply(expired(&a), now()));
    assert!(table.apply(removed(&b), now()));
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
    assert_eq!(table.expired(), &BTreeMap::from([(a.key, now() + GRACE)]));
    assert_eq!(table.next_end(), Some(now() + GRACE));

    assert!(!table.pass_time(now() + GRACE - Duration::from_secs(1)));
    assert_eq!(peers(&table).len(), 1);
    assert!(table.pass_time(now() + GRACE));
    assert_eq!((peers(&table).len(), table.next_end()), (0, None));
}

#[test]
fn an_expired_peer_that_comes_back_is_a_peer_as_before() {
    let mut table = table_of(config());
    let a = lease("10.5.1.0-24", "192.0.2.1", 1);
    for back in [LeaseUpdate::Upsert(a.clone()), snapshot(std::slice::from_ref(&a), &[])] {
        table.apply(snapshot(std::slice::from_ref(&a), &[]), now());
        table.apply(expired(&a), now());
        assert_eq!(table.expired().len(), 1);
        assert!(table.apply(back, now()), "news: it is alive");
        assert_eq!((peers(&table).len(), table.expired().len(), table.next_end()), (1, 0, None));
        assert!(!table.pass_time(now() + GRACE));
    }
}

#[test]
fn what_is_missing_from_a_relist_counts_as_expired_unless_a_hand_was_seen() {
    let mut table = table_of(config());
    let (a, b) = (lease("10.5.1.0-24", "192.0.2.1", 1), lease("10.5.2.0-24", "192.0.2.2", 2));
    table.apply(snapshot(&[a.clone(), b.clone()], &[]), now());
    table.apply(removed(&b), now());
    assert!(table.apply(snapshot(&[], &[]), now()), "a store begun anew");
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
    // Removed by hand after all.
    assert!(table.apply(removed(&a), now()));
    assert!(!table.apply(removed(&a), now()));
    assert_eq!(peers(&table).len(), 0);
}

#[test]
fn an_expired_peer_gives_way_for_good_to_whoever_takes_its_place() {
    let mac = "06:00:00:00:00:01";
    let gone = vxlan_lease("10.5.1.0-24", "192.0.2.1", mac, 1);
    for heir in [
        vxlan_lease("10.5.1.0-24", "192.0.2.9", "06:00:00:00:00:09", 2),
        vxlan_lease("10.5.9.0-24", "192.0.2.1", "06:00:00:00:00:09", 2),
        vxlan_lease("10.5.9.0-24", "192.0.2.9", mac, 2),
    ] {
        for update in [LeaseUpdate::Upsert(heir.clone()), snapshot(std::slice::from_ref(&heir), &[])] {
            let mut table = table_of(config());
            table.apply(snapshot(std::slice::from_ref(&gone), &[]), now());
            table.apply(expired(&gone), now());
            table.apply(update, now());
            let name = format!("{} {}", heir.key, heir.attrs.public_ip);
            assert_eq!(peers(&table), [name.as_str()]);
            table.apply(removed(&heir), now());
            assert_eq!(peers(&table).len(), 0, "{name} has taken over, it does not come back");
        }
        // Or this node itself.
        let mut table = table_of(config());
        table.apply(snapshot(std::slice::from_ref(&gone), &[]), now());
        table.apply(expired(&gone), now());
        table.set_own(Some(&heir));
        assert_eq!(peers(&table).len(), 0);
        table.set_own(None);
        assert_eq!(peers(&table).len(), 0, "for good");
    }
    // Nobody can use this one, so it takes nothing.
    let mut table = table_of(config());
    table.apply(snapshot(std::slice::from_ref(&gone), &[]), now());
    table.apply(expired(&gone), now());
    table.apply(LeaseUpdate::Upsert(lease("10.5.1.0-25", "192.0.2.1", 2)), now());
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
}

#[test]
fn a_refused_lease_that_expires_takes_nothing_from_the_living() {
    let mut table = table_of(config());
    let elder = lease("10.5.1.0-24&fd00:0:0:1::-64", "192.0.2.1", 1);
    let younger = lease("10.5.1.0-24&fd00:0:0:2::-64", "192.0.2.2", 2);
    table.apply(snapshot(&[elder.clone(), younger.clone()], &[]), now());
    table.apply(expired(&younger), now());
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.1"]);
    table.apply(LeaseUpdate::Upsert(younger), now());
    table.apply(expired(&elder), now());
    assert_eq!(peers(&table), ["10.5.1.0-24 192.0.2.2"], "the living one has its turn");
}

#[test]
fn the_own_lease_is_no_peer_when_it_has_expired() {
    let own = lease("10.5.1.0-24", "192.0.2.1", 5);
    let mut table = table_of(config());
    table.set_own(Some(&own));
    table.apply(snapshot(std::slice::from_ref(&own), &[]), now());
    table.apply(expired(&own), now());
    assert_eq!(peers(&table).len(), 0);
    let moved = lease("10.5.2.0-24", "192.0.2.1", 6);
    table.set_own(Some(&moved));
    assert_eq!(peers(&table).len(), 0);
}

#[test]
fn without_grace_an_expired_peer_goes_at_once() {
    let mut table = LeaseTable::new(config(), Duration::ZERO);
    let a = lease("10.5.1.0-24", "192.0.2.1", 1);
    table.apply(snapshot(std::slice::from_ref(&a), &[]), now());
    assert!(table.apply(expired(&a), now()));
    assert_eq!((peers(&table).len(), table.next_end()), (0, None));
    table.apply(snapshot(std::slice::from_ref(&a), &[]), now());
    table.apply(snapshot(&[], &[]), now());
    assert_eq!(peers(&table).len(), 0);
}

fn any_lease() -> impl Strategy<Value = Lease> {
    let v6 = prop_oneof![Just(None), (1_u8..4).prop_map(Some)];
    (1_u8..5, v6, prop_oneof![Just(127_u8), Just(192)], 1_u8..6, 0_u64..6).prop_map(
        |(v4, v6, net, host, revision)| {
            let v6 = v6.map(|n| format!("&fd00:0:0:{n}::-64")).unwrap_or_default();
            lease(&format!("10.5.{v4}.0-24{v6}"), &format!("{net}.0.2.{host}"), revision)
        },
    )
}

proptest! {
    /// Every order of arrival, and a snapshot, give the same peers and the same refusals; no two peers overlap; and
    /// of two that do the elder is the one in use.
    #[test]
    fn the_verdict_does_not_depend_on_the_order_of_arrival(
        leases in prop::collection::btree_map(any::<u8>(), any_lease(), 0..12),
        own in prop::option::of(any_lease()),
        dual in any::<bool>(),
    ) {
        // A store holds a key once; the map's keys serve as a random order of arrival.
        let arrivals: BTreeMap<LeaseKey, (u8, Lease)> =
            leases.into_iter().map(|(at, lease)| (lease.key, (at, lease))).collect();
        let mut shuffled: Vec<_> = arrivals.values().cloned().collect();
        shuffled.sort_by_key(|(at, _)| *at);
        let sorted: Vec<Lease> = arrivals.values().map(|(_, lease)| lease.clone()).collect();
        let config = if dual { dual_stack() } else { config() };

        let mut by_snapshot = table_of(config.clone());
        by_snapshot.set_own(own.as_ref());
        by_snapshot.apply(snapshot(&sorted, &[]), now());
        let mut by_events = table_of(config);
        by_events.apply(snapshot(&[], &[]), now());
        for (_, lease) in shuffled {
            by_events.apply(LeaseUpdate::Upsert(lease), now());
            by_events.peers().count();
        }
        by_events.set_own(own.as_ref());

        let peers: Vec<&Lease> = by_snapshot.peers().collect();
        prop_assert_eq!(&peers, &by_events.peers().collect::<Vec<_>>());
        prop_assert_eq!(by_snapshot.refused(), by_events.refused());
        for (n, peer) in peers.iter().enumerate() {
            let own = own.as_ref().map(|own| by_snapshot.in_our_families(own).key);
            prop_assert!(!own.is_some_and(|own| own.overlaps(&peer.key)));
            prop_assert!(!peers[n + 1..].iter().any(|other| other.key.overlaps(&peer.key)));
        }
    }
}
