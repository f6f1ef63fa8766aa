//! ADD and DEL as the plugin asks for them, in every order that it may.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::names::{attachment_hash, host_ifname};
use weft_shared::protocol::Reserve;

use super::super::testing::{Node, addr, address, key, network, reserve, subnet};
use crate::pods::NotReady;

#[tokio::test]
async fn an_add_and_its_del() {
    let node = Node::new();
    let (connection, reservation) = node.add("a").await.expect("reserve");
    assert_eq!(reservation.addresses[0].address.to_string(), "10.5.1.2/24");
    assert_eq!(reservation.addresses[0].gateway, addr("10.5.1.1"));
    assert_eq!((reservation.mtu, reservation.bridge_ifindex), (1450, 5));
    assert_eq!(reservation.host_ifname, host_ifname(&key("a")));
    assert_eq!(node.states()["a"], "reserved");
    assert!(connection.is_open());
    let ifindex = node.commit(&connection, "a").await.expect("commit");
    assert!(!connection.is_open());
    connection.closed(true).await;
    let needs = node.needs.borrow().clone();
    assert_eq!(needs.bridge_ports[&host_ifname(&key("a"))].ifindex, ifindex);
    node.assert_consistent();
    node.ipam().check(&key("a"), &[addr("10.5.1.2")]).expect("held");
    let wrong = node.ipam().check(&key("a"), &[addr("10.5.1.3")]).expect_err("not held");
    assert!(wrong.is(Code::NotAsAdded) && wrong.details.contains("not 10.5.1.3"), "{wrong}");
    for _ in 0..3 {
        node.ipam().release(&key("a")).await.expect("release");
        node.assert_empty();
    }
    assert!(node.ipam().check(&key("a"), &[]).expect_err("gone").is(Code::NotAsAdded));
    // The bridge stays wanted with the gateway that new pods get.
    assert_eq!(node.needs.borrow().bridges[&"cni0".parse().expect("name")].subnets, [subnet("10.5.1.0/24")]);
    let counters = node.ipam().status().counters;
    assert_eq!((counters.adds, counters.dels, counters.rolled_back), (1, 3, 0));
}

#[tokio::test]
async fn a_closed_connection_undoes_everything() {
    let node = Node::new();
    let (connection, reservation) = node.add("a").await.expect("reserve");
    node.fabric.wire(&reservation.host_ifname);
    connection.closed(true).await;
    node.assert_empty();
    // A connection that we leave proves nothing: the plugin may still be wiring.
    let (connection, reservation) = node.add("a").await.expect("reserve");
    drop(connection);
    node.ipam().tend().await;
    assert_eq!(node.states()["a"], "aborted");
    node.fabric.wire(&reservation.host_ifname);
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn what_cannot_be_undone_at_once_is_undone_later() {
    let node = Node::new();
    let (connection, reservation) = node.add("a").await.expect("reserve");
    node.fabric.wire(&reservation.host_ifname);
    node.fabric.world().delete_fails = true;
    connection.closed(true).await;
    assert_eq!(node.states()["a"], "aborted");
    let refused = node.ipam().release(&key("a")).await.expect_err("veth is there");
    assert!(refused.is(Code::TryAgainLater));
    node.fabric.world().delete_fails = false;
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn addresses_asked_for() {
    let node = Node::new();
    let with = |id: &str, requested: &[&str]| Reserve {
        requested: requested.iter().map(|text| addr(text)).collect(),
        ..reserve(id)
    };
    let (_a, reservation) = node.add_with(with("a", &["10.5.1.9"])).await.expect("free");
    assert_eq!(address(&reservation), addr("10.5.1.9"));
    for (requested, code, reason) in [
        (vec!["10.5.1.9"], Code::AddressInUse, "10.5.1.9 is already in use"),
        (vec!["10.5.1.1"], Code::BadConfiguration, "10.5.1.1 is the gateway"),
        (vec!["10.5.1.10", "10.5.2.10"], Code::BadConfiguration, "10.5.2.10 lies outside"),
        (vec!["10.5.1.10", "10.5.1.10"], Code::BadConfiguration, "10.5.1.10 is given twice"),
    ] {
        let failure = node.add_with(with("b", &requested)).await.expect_err(reason);
        assert!(failure.is(code) && failure.details.contains(reason), "{failure:?}");
    }
    assert_eq!(node.ipam().status().addresses_used, 1, "a refused ADD keeps nothing");
}

/// More than any machine makes of a moment.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn an_agent_that_is_about_to_be_ready_is_waited_for() {
    let mut node = Node::new();
    node.patience = PATIENCE;
    node.restart();
    let network = node.fabric.world().network.clone();
    node.fabric.world().network = Err(NotReady::Waiting("a lease".into()));
    let becomes_ready = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        node.fabric.world().network = network;
    };
    let (added, can_add, ()) = tokio::join!(node.add("a"), node.ipam().can_add(), becomes_ready);
    added.expect("ADD");
    can_add.expect("STATUS");
    // What does not pass by itself is told at once.
    node.fabric.world().network = Err(NotReady::Degraded("subnet taken by 192.0.2.7".into()));
    let told = timeout(PATIENCE / 2, node.add("b")).await.expect("not after all of the agent's patience");
    assert!(told.expect_err("degraded").is(Code::TryAgainLater));
}

#[tokio::test]
async fn bad_values_are_named() {
    let node = Node::new();
    let mtu = |mtu| {
        let mut reserve = reserve("a");
        reserve.bridge.mtu = Some(mtu);
        reserve
    };
    let (_connection, reservation) = node.add_with(mtu(1400)).await.expect("lower is welcome");
    assert_eq!(reservation.mtu, 1400);
    for (bad, reason) in [
        (mtu(1451), "mtu = 1451: expected 68 to 1450"),
        (mtu(67), "mtu = 67"),
        (Reserve { netns: "x".repeat(5000), ..reserve("b") }, "netns"),
        (Reserve { requested: vec![addr("10.5.1.9"); 17], ..reserve("b") }, "17 requested addresses"),
    ] {
        let failure = node.add_with(bad).await.expect_err(reason);
        assert!(failure.is(Code::BadConfiguration) && failure.details.contains(reason), "{failure:?}");
    }
}

#[tokio::test]
async fn a_full_subnet_and_no_subnet() {
    let node = Node::new();
    if let Ok(network) = &mut node.fabric.world().network {
        network.subnet = subnet("10.5.1.0/30");
    }
    node.ipam().can_add().await.expect("one free");
    node.attach("a").await;
    let full = node.add("b").await.expect_err("full");
    assert!(full.is(Code::PoolExhausted) && full.details.contains("all 1 pod addresses"), "{full:?}");
    assert!(node.ipam().can_add().await.expect_err("full").is(Code::NotAvailable));
    node.fabric.world().network = Err(NotReady::Waiting("waiting for a lease".into()));
    let early = node.add("b").await.expect_err("no lease");
    assert!(early.is(Code::TryAgainLater) && early.details.contains("waiting for a lease"), "{early:?}");
    assert!(node.ipam().can_add().await.expect_err("no lease").is(Code::NotAvailable));
    node.fabric.world().network = Err(NotReady::Degraded("subnet taken by 192.0.2.7".into()));
    assert!(node.add("b").await.expect_err("taken").is(Code::TryAgainLater));
    assert!(node.ipam().can_add().await.expect_err("taken").is(Code::NotAvailableAndDegraded));
    node.ipam().release(&key("a")).await.expect("a DEL needs no lease");
    assert_eq!(node.states().len(), 0);
}

#[tokio::test]
async fn a_bridge_that_cannot_be_made_leaves_nothing() {
    let node = Node::new();
    node.fabric.world().bridge_fails = true;
    let failure = node.add("a").await.expect_err("no bridge");
    assert!(failure.is(Code::BadConfiguration), "{failure:?}");
    node.assert_empty();
    assert!(node.needs.borrow().bridges.is_empty(), "nor is it wanted");
}

#[tokio::test]
async fn a_second_add_of_a_live_attachment_touches_nothing() {
    let node = Node::new();
    node.attach("a").await;
    let failure = node.add("a").await.expect_err("attached");
    assert!(failure.is(Code::NameTaken) && failure.msg.contains("already attached"), "{failure:?}");
    node.assert_consistent();
    assert_eq!(node.states()["a"], "committed");
    // Gone with its namespace, not yet noticed: the runtime uses the id again.
    node.fabric.world().veths.clear();
    assert_eq!(address(&node.attach("a").await), addr("10.5.1.3"));
    node.assert_consistent();
}

#[tokio::test]
async fn a_repeated_add_waits_for_the_dead_one() {
    let node = Node::new();
    let (first, reservation) = node.add("a").await.expect("reserve");
    node.fabric.wire(&reservation.host_ifname);
    let impatient = node.add("a").await.expect_err("the first is alive");
    assert!(
        impatient.is(Code::TryAgainLater) && impatient.details.contains("has not ended"),
        "{impatient:?}"
    );
    let (second, ()) = tokio::join!(node.add("a"), async {
        tokio::task::yield_now().await;
        first.closed(true).await;
    });
    let (second, _) = second.expect("the first is gone");
    node.commit(&second, "a").await.expect("its veth is gone as well");
    second.closed(true).await;
    node.assert_consistent();
}

#[tokio::test]
async fn a_del_during_an_add_wins() {
    let node = Node::new();
    let (connection, reservation) = node.add("a").await.expect("reserve");
    node.ipam().release(&key("a")).await.expect("DEL");
    assert_eq!(node.states()["a"], "aborted");
    assert_eq!(node.ipam().status().addresses_used, 1, "the plugin may still wire");
    // It does, and learns at Commit.
    let refused = node.commit(&connection, "a").await.expect_err("deleted");
    assert!(refused.is(Code::TryAgainLater) && refused.details.contains("deleted"), "{refused:?}");
    assert!(node.fabric.world().veths.contains_key(&reservation.host_ifname));
    connection.closed(true).await;
    node.assert_empty();
    assert_eq!(node.ipam().status().counters.failures, [], "counted where requests are handled");
}

#[tokio::test]
async fn a_del_while_the_bridge_is_made() {
    let node = Node::new();
    let gate = node.fabric.hold_bridge();
    let connection = node.ipam().connect();
    let (add, del) = tokio::join!(node.ipam().reserve(connection.id(), reserve("a")), async {
        while node.states().is_empty() {
            tokio::task::yield_now().await;
        }
        let attachment = key("a");
        let del = node.ipam().release(&attachment);
        tokio::pin!(del);
        // It is marked at once and waits for the ADD.
        assert!(timeout(Duration::from_millis(1), &mut del).await.is_err());
        assert_eq!(node.states()["a"], "aborted");
        gate.add_permits(1);
        del.await
    });
    del.expect("DEL");
    assert!(add.expect_err("deleted").is(Code::TryAgainLater));
    connection.closed(true).await;
    node.assert_empty();
}

#[tokio::test]
async fn only_the_reserving_connection_commits() {
    let node = Node::new();
    let (connection, reservation) = node.add("a").await.expect("reserve");
    let other = node.ipam().connect();
    assert!(node.commit(&other, "a").await.expect_err("another's").is(Code::NotReserved));
    assert!(node.commit(&other, "b").await.expect_err("nobody's").is(Code::NotReserved));
    other.closed(true).await;
    assert_eq!(node.states()["a"], "reserved");
    node.fabric.world().veths.remove(&reservation.host_ifname);
    node.commit(&connection, "a").await.expect("its own");
    // And an ADD whose peer is gone reserves nothing any more.
    let gone = node.ipam().connect();
    let id = gone.id();
    gone.closed(true).await;
    assert!(node.ipam().reserve(id, reserve("c")).await.expect_err("closed").is(Code::TryAgainLater));
}

#[tokio::test]
async fn a_record_that_cannot_be_written_fails_the_add() {
    let node = Node::new();
    // A directory in the temporary file's place: even root cannot write it.
    let temporary = format!("{}.tmp{}", attachment_hash(&key("a")), std::process::id());
    let temporary = node.run_dir().join("attachments").join(temporary);
    fs::create_dir(&temporary).expect("dir");
    assert!(node.add("a").await.expect_err("disk").is(Code::Io));
    node.assert_empty();
    fs::remove_dir(&temporary).expect("dir");
    let (connection, reservation) = node.add("a").await.expect("reserve");
    fs::create_dir(&temporary).expect("dir");
    assert!(node.commit(&connection, "a").await.expect_err("disk").is(Code::Io));
    assert_eq!(node.states()["a"], "reserved");
    node.fabric.world().veths.remove(&reservation.host_ifname);
    connection.closed(true).await;
    node.assert_empty();
}

#[tokio::test]
async fn two_hundred_at_once() {
    let node = Arc::new(Node::new());
    let adds: Vec<_> = (0..200)
        .map(|i| {
            let node = node.clone();
            tokio::spawn(async move {
                let id = format!("c{i}");
                let (connection, reservation) = node.add(&id).await.expect("reserve");
                tokio::task::yield_now().await;
                if i % 3 == 0 {
                    node.fabric.wire(&reservation.host_ifname);
                } else {
                    node.commit(&connection, &id).await.expect("commit");
                }
                connection.closed(true).await;
                if i % 3 == 1 {
                    node.ipam().release(&key(&id)).await.expect("release");
                }
            })
        })
        .collect();
    for add in adds {
        add.await.expect("no panic");
    }
    node.assert_consistent();
    assert_eq!(node.states().len(), 66);
    node.ipam().gc(&network(), &[]).await.expect("gc");
    node.assert_empty();
}
