use proptest::prelude::*;
use serde_json::json;

use super::*;

fn prefix() -> Prefix {
    Prefix::parse("flannel.alpha.coreos.com").expect("prefix")
}

fn of_another(node: &Node) -> Said {
    let by = Reading { prefix: &prefix(), network: "10.244.0.0/15".parse().ok() };
    read(node, by, false, None)
}

/// The older Node in this one's way.
fn elder<'w>(world: &'w World, node: &Node) -> Option<&'w str> {
    world.elder_of(&node.metadata.name, node.created(), &node.key().expect("a range")).map(|(name, _)| name)
}

/// A Node as kube-flannel leaves it.
fn node(name: &str, created: u64, cidr: &str, ip: &str) -> Node {
    node_of(
        name,
        created,
        cidr,
        json!({"public-ip": ip, "backend-type": "host-gw", "backend-data": "null", "kube-subnet-manager": "true"}),
    )
}

fn node_of(name: &str, created: u64, cidr: &str, annotations: serde_json::Value) -> Node {
    let annotations: serde_json::Map<_, _> = annotations
        .as_object()
        .expect("object")
        .iter()
        .map(|(k, v)| (format!("flannel.alpha.coreos.com/{k}"), v.clone()))
        .collect();
    serde_json::from_value(json!({
        "metadata": {
            "name": name,
            "uid": format!("{name}-{created}"),
            "creationTimestamp": format!("2026-01-01T00:{:02}:{:02}Z", created / 60, created % 60),
            "annotations": annotations,
        },
        "spec": {"podCIDR": cidr},
    }))
    .expect("node")
}

fn set(world: &mut World, node: &Node) -> Vec<String> {
    let said = of_another(node);
    brief(&world.set(node, said))
}

fn brief(updates: &[LeaseUpdate]) -> Vec<String> {
    let one = |update: &LeaseUpdate| match update {
        LeaseUpdate::Upsert(lease) => format!("{} at {}", lease.key, lease.attrs.public_ip),
        LeaseUpdate::Remove { key, how } => format!("{key} gone {how:?}"),
        LeaseUpdate::Malformed(entry) => format!("{}: {}", entry.key, entry.reason),
        LeaseUpdate::MalformedGone(key) => format!("{key} is well"),
        other => panic!("{other:?}"),
    };
    updates.iter().map(one).collect()
}

#[test]
fn a_node_comes_changes_and_goes() {
    let mut world = World::default();
    let first = node("a", 1, "10.244.1.0/24", "192.0.2.1");
    assert_eq!(set(&mut world, &first), ["10.244.1.0-24 at 192.0.2.1"]);
    assert!(set(&mut world, &first).is_empty(), "a heartbeat");
    assert_eq!(set(&mut world, &node("a", 1, "10.244.1.0/24", "192.0.2.7")), ["10.244.1.0-24 at 192.0.2.7"]);
    assert_eq!(
        set(&mut world, &node("a", 2, "10.244.9.0/24", "192.0.2.7")),
        ["10.244.1.0-24 gone ByHand", "10.244.9.0-24 at 192.0.2.7"],
        "joined anew with another range"
    );
    assert_eq!(brief(&world.remove("a")), ["10.244.9.0-24 gone ByHand"]);
    assert!(world.remove("a").is_empty());
    assert!(world.by_subnet.is_empty() && world.len() == 0);
}

#[test]
fn who_is_no_peer_is_none_without_a_word() {
    let mut world = World::default();
    for foreign in [json!({}), json!({"kube-subnet-manager": "false", "public-ip": "x"})] {
        assert!(set(&mut world, &node_of("a", 1, "10.244.1.0/24", foreign)).is_empty());
    }
    assert!(set(&mut world, &node_of("b", 1, "", json!({}))).is_empty(), "nor a range");
    // Of a peer that was taken out of service the subnet goes.
    set(&mut world, &node("a", 1, "10.244.1.0/24", "192.0.2.1"));
    let left = node_of("a", 1, "10.244.1.0/24", json!({"public-ip": "192.0.2.1"}));
    assert_eq!(set(&mut world, &left), ["10.244.1.0-24 gone ByHand"]);
}

#[test]
fn garbage_leaves_what_was_known() {
    let mut world = World::default();
    set(&mut world, &node("a", 1, "10.244.1.0/24", "192.0.2.1"));
    let garbage = node("a", 1, "10.244.1.0/24", "nonsense");
    let said = set(&mut world, &garbage);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("node/a: annotation flannel.alpha.coreos.com/public-ip = \"nonsense\""));
    assert!(set(&mut world, &garbage).is_empty(), "said once");
    // Also over a list that begins anew, but not in another Node of that name.
    let anew = |garbage: &Node| {
        let said = of_another(garbage);
        let LeaseUpdate::Snapshot { leases, malformed } = World::anew(&world, [(garbage, said)]).snapshot()
        else {
            panic!("no snapshot")
        };
        (leases.len(), malformed.len())
    };
    assert_eq!(anew(&garbage), (1, 1));
    assert_eq!(anew(&node("a", 2, "10.244.1.0/24", "nonsense")), (0, 1));
    let well = set(&mut world, &node("a", 1, "10.244.1.0/24", "192.0.2.1"));
    assert_eq!(well, ["node/a is well"]);
    let no_range = set(&mut world, &node("a", 1, "", "192.0.2.1"));
    assert_eq!(no_range[0], "10.244.1.0-24 gone ByHand");
    assert!(no_range[1].contains("pod cidr not assigned"), "{no_range:?}");
    assert_eq!(brief(&world.remove("a")), ["node/a is well"]);
}

#[test]
fn of_two_nodes_with_one_range_the_older_has_it() {
    let mut world = World::default();
    let young = node("young", 9, "10.244.1.0/24", "192.0.2.9");
    set(&mut world, &young);
    let said = set(&mut world, &node("old", 1, "10.244.1.0/24", "192.0.2.1"));
    assert_eq!(
        said,
        [
            "10.244.1.0-24 at 192.0.2.1",
            "node/young: podCIDR 10.244.1.0/24 overlaps that of node/old, which is older: expected a range of its own"
        ]
    );
    let old = node("old", 1, "10.244.1.0/24", "192.0.2.1");
    assert_eq!((elder(&world, &young), elder(&world, &old)), (Some("old"), None));
    // Also before it is in the world itself; of those that are in its way the oldest that has its range.
    for (name, created, cidr, expected) in [
        ("new", 10, "10.244.1.0/25", Some("old")),
        ("new", 10, "10.244.0.0/16", Some("old")),
        ("zzz", 1, "10.244.1.0/24", Some("old")),
        ("aaa", 1, "10.244.1.0/24", None),
        ("new", 10, "10.244.2.0/24", None),
    ] {
        assert_eq!(elder(&world, &node(name, created, cidr, "192.0.2.3")), expected, "{name} {cidr}");
    }
    assert_eq!(brief(&world.remove("old")), ["10.244.1.0-24 at 192.0.2.9", "node/young is well"]);
    assert_eq!(elder(&world, &young), None);
    // A wider one shadows what is inside it, and what it overlapped comes back when it goes.
    let wide = set(&mut world, &node("wide", 2, "10.244.0.0/16", "192.0.2.2"));
    assert_eq!(wide[..2], ["10.244.1.0-24 gone ByHand", "10.244.0.0-16 at 192.0.2.2"]);
    let back = set(&mut world, &node("wide", 2, "10.245.0.0/16", "192.0.2.2"));
    assert_eq!(
        back,
        [
            "10.244.0.0-16 gone ByHand",
            "10.244.1.0-24 at 192.0.2.9",
            "10.245.0.0-16 at 192.0.2.2",
            "node/young is well"
        ]
    );
}

#[test]
fn the_own_node_is_ours_while_it_says_what_was_published() {
    let published: LeaseAttrs =
        serde_json::from_str(r#"{"PublicIP":"10.0.0.1","BackendType":"host-gw"}"#).expect("attrs");
    let written = |ip: &str| Published { attrs: published.clone(), public_ip: Some(ip.to_owned()) };
    let said = |node: &Node, ip: &str| {
        let by = Reading { prefix: &prefix(), network: "10.244.0.0/16".parse().ok() };
        read(node, by, true, Some(&written(ip)))
    };
    let read = |node: &Node| match said(node, "203.0.113.7") {
        Said::Peer(lease) => lease.attrs,
        other => panic!("{other:?}"),
    };
    assert_eq!(read(&node("own", 1, "10.244.1.0/24", "10.0.0.1")), published);
    let mut overwritten = json!({"public-ip": "203.0.113.7", "public-ip-overwrite": "203.0.113.7",
        "backend-type": "host-gw", "backend-data": "null", "kube-subnet-manager": "true"});
    assert_eq!(
        read(&node_of("own", 1, "10.244.1.0/24", overwritten.clone())),
        published,
        "an operator's wish"
    );
    overwritten["public-ip"] = "10.0.0.1".into();
    let wished = node_of("own", 1, "10.244.1.0/24", overwritten.clone());
    assert_eq!(
        said(&wished, "10.0.0.1"),
        Said::Nothing,
        "to be looked at, and nobody's doing but an operator's"
    );
    assert_eq!(
        said(&node("own", 1, "10.9.1.0/24", "10.0.0.1"), "10.0.0.1"),
        Said::Nothing,
        "the keeper says why"
    );
    // Each of these has our public IP, so that the keeper waits before it writes again.
    for altered in [
        overwritten,
        json!({"public-ip": "192.0.2.9", "backend-type": "host-gw", "backend-data": "null", "kube-subnet-manager": "true"}),
        json!({"public-ip": "10.0.0.1", "backend-type": "host-gw", "backend-data": "null"}),
        json!({}),
    ] {
        let attrs = read(&node_of("own", 1, "10.244.1.0/24", altered.clone()));
        assert_eq!((attrs.public_ip, attrs == published), (published.public_ip, false), "{altered}");
    }
}

#[test]
fn nodes_that_went_unseen_went_by_hand() {
    let said = of_another;
    let (a, b) = (node("a", 1, "10.244.1.0/24", "192.0.2.1"), node("b", 1, "10.244.2.0/24", "192.0.2.2"));
    let before = World::anew(&World::default(), [(&a, said(&a)), (&b, said(&b))]);
    let now = World::anew(&before, [(&b, said(&b))]);
    assert_eq!(brief(&before.departed(&now)), ["10.244.1.0-24 gone ByHand"]);
    assert!(now.shares_a_node_with(&before));
    let other = node("b", 2, "10.244.2.0/24", "192.0.2.2");
    assert!(!World::anew(&before, [(&other, said(&other))]).shares_a_node_with(&before), "another cluster's");
}

/// Whom everybody refuses takes no range from anybody, however old it is.
#[test]
fn who_is_refused_is_in_nobodys_way() {
    let mut world = World::default();
    let well = node("well", 9, "10.244.1.0/24", "192.0.2.9");
    set(&mut world, &well);
    for (refused, reason) in [
        (
            node("wide", 1, "10.0.0.0/8", "192.0.2.1"),
            "node/wide: podCIDR 10.0.0.0/8: expected a network inside Network 10.244.0.0/15",
        ),
        (
            node("inside", 1, "10.244.1.0/24", "10.244.1.1"),
            "node/inside: annotation flannel.alpha.coreos.com/public-ip = \"10.244.1.1\": expected an address of the \
             underlay, not one inside Network 10.244.0.0/15",
        ),
        (
            node("loop", 1, "10.244.1.0/24", "127.0.0.1"),
            "node/loop: annotation flannel.alpha.coreos.com/public-ip = \"127.0.0.1\": expected a unicast address, not a \
             loopback one",
        ),
    ] {
        assert_eq!(set(&mut world, &refused), [reason]);
        assert_eq!(elder(&world, &well), None, "{reason}");
    }
    let LeaseUpdate::Snapshot { leases, .. } = world.snapshot() else { panic!("no snapshot") };
    assert_eq!(leases.iter().map(|lease| lease.key.to_string()).collect::<Vec<_>>(), ["10.244.1.0-24"]);
    // One that was well is left in use by what it said last, until its range is another.
    let moved = set(&mut world, &node("well", 9, "10.9.1.0/24", "192.0.2.9"));
    assert_eq!(moved[0], "10.244.1.0-24 gone ByHand");
    assert!(moved[1].contains("inside Network"), "{moved:?}");
}

proptest! {
    /// Whatever happens in whatever order: who followed the updates knows what a list of the end says.
    #[test]
    fn updates_add_up_to_the_snapshot(
        steps in prop::collection::vec((0_usize..5, 0_u64..3, 0_u8..6, 22_u8..26, 0_u8..6), 1..40)
    ) {
        let mut world = World::default();
        let mut told: (BTreeMap<LeaseKey, Lease>, BTreeMap<String, String>) = Default::default();
        for (name, created, third, len, what) in steps {
            let name = format!("n{name}");
            let cidr = format!("10.244.{third}.0/{len}");
            let updates = match what {
                0 => world.remove(&name),
                1 => {
                    let node = node(&name, created, &cidr, "nonsense");
                    world.set(&node, of_another(&node))
                }
                what => {
                    let node = node(&name, created, &cidr, &format!("192.0.2.{what}"));
                    world.set(&node, of_another(&node))
                }
            };
            for update in updates {
                match update {
                    LeaseUpdate::Upsert(lease) => drop(told.0.insert(lease.key, lease)),
                    LeaseUpdate::Remove { key, .. } => prop_assert!(told.0.remove(&key).is_some()),
                    LeaseUpdate::Malformed(entry) => drop(told.1.insert(entry.key, entry.reason)),
                    LeaseUpdate::MalformedGone(key) => prop_assert!(told.1.remove(&key).is_some()),
                    other => panic!("{other:?}"),
                }
            }
            let LeaseUpdate::Snapshot { leases, malformed } = world.snapshot() else { panic!() };
            let leases: BTreeMap<_, _> = leases.into_iter().map(|lease| (lease.key, lease)).collect();
            let malformed: BTreeMap<_, _> = malformed.into_iter().map(|m| (m.key, m.reason)).collect();
            prop_assert_eq!(&told, &(leases.clone(), malformed));
            for (n, a) in leases.keys().enumerate() {
                prop_assert!(leases.keys().skip(n + 1).all(|b| !a.overlaps(b)));
            }
        }
    }
}
