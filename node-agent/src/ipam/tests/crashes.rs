//! The agent dies, the host reboots, a record is torn: what the next agent makes of what is left.

use std::fs;
use std::time::Duration;

use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::names::{attachment_hash, host_ifname};
use weft_shared::protocol::Reserve;

use super::super::testing::{Node, OTHER_BOOT, STEP, addr, address, key, reserve};

#[tokio::test]
async fn a_crash_at_every_step() {
    // After Reserve: the plugin may wire until its alarm.
    let mut node = Node::new();
    let (connection, reservation) = node.add("a").await.expect("reserve");
    drop(connection);
    node.restart();
    assert_eq!((node.states()["a"].as_str(), node.ipam().status().addresses_used), ("aborted", 1));
    node.fabric.wire(&reservation.host_ifname);
    node.pass_time(deadline::WIRING - STEP);
    node.look().await;
    assert_eq!((node.states().len(), node.fabric.world().veths.len()), (1, 1));
    // Dead again: the span counts from Reserve, not from the start.
    node.restart();
    node.pass_time(STEP);
    node.ipam().tend().await;
    node.assert_empty();

    // After Commit: nothing happens, and round robin goes on.
    let second = node.attach("b").await;
    assert_eq!(address(&second), addr("10.5.1.3"));
    node.restart();
    node.look().await;
    node.assert_consistent();
    assert_eq!(node.needs.borrow().bridges[&"cni0".parse().expect("name")].mtu, 1450);
    node.ipam().release(&key("b")).await.expect("DEL");

    // After DEL: the address is not the next one again.
    node.restart();
    node.assert_empty();
    assert_eq!(address(&node.attach("c").await), addr("10.5.1.4"));

    // Before DEL took the record away: the veth is gone, the next look frees it.
    node.fabric.world().veths.clear();
    node.restart();
    assert_eq!(node.states().len(), 1);
    node.look().await;
    node.assert_empty();

    // Long after Reserve: due at once.
    let (connection, reservation) = node.add("d").await.expect("reserve");
    drop(connection);
    node.fabric.wire(&reservation.host_ifname);
    node.pass_time(Duration::from_secs(3600));
    node.restart();
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn an_address_that_was_asked_for_moves_no_cursor() {
    let mut node = Node::new();
    for id in ["a", "b", "c"] {
        node.attach(id).await;
    }
    node.ipam().release(&key("b")).await.expect("DEL");
    let asked = Reserve { requested: vec![addr("10.5.1.2")], ..reserve("d") };
    node.ipam().release(&key("a")).await.expect("DEL");
    let (connection, _) = node.add_with(asked).await.expect("free");
    drop(connection);
    node.restart();
    assert_eq!(address(&node.attach("e").await), addr("10.5.1.5"), "not .3, which was freed a moment ago");
}

#[tokio::test]
async fn a_reboot_clears_all() {
    let mut node = Node::new();
    node.attach("a").await;
    node.fabric.world().veths.clear();
    node.restart_in(OTHER_BOOT);
    node.assert_empty();
    assert_eq!(address(&node.attach("b").await), addr("10.5.1.2"));
}

#[tokio::test]
async fn a_repeated_add_after_a_crash_goes_on() {
    let mut node = Node::new();
    let (connection, first) = node.add("a").await.expect("reserve");
    drop(connection);
    node.fabric.wire(&first.host_ifname);
    node.restart();
    let second = node.attach("a").await;
    assert_ne!(address(&first), address(&second), "the old plugin may still use it");
    let other = Reserve { requested: vec![address(&first)], ..reserve("b") };
    assert!(node.add_with(other).await.expect_err("held").is(Code::AddressInUse));
    // Held across another crash, and beyond a DEL, until the old plugin is certainly over.
    node.restart();
    assert_eq!(node.ipam().status().addresses_used, 2);
    node.ipam().release(&key("a")).await.expect("DEL");
    assert_eq!((node.ipam().status().addresses_used, node.fabric.world().veths.len()), (2, 0));
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn what_was_deleted_is_not_attached_again_after_a_crash() {
    let mut node = Node::new();
    let (connection, _) = node.add("a").await.expect("reserve");
    drop(connection);
    node.restart();
    node.attach("a").await;
    // What the orphan holds keeps the record for a while.
    node.ipam().release(&key("a")).await.expect("DEL");
    node.restart();
    assert_eq!(node.states()["a"], "aborted");
    node.fabric.wire(&host_ifname(&key("a")));
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn a_repeated_add_may_have_its_own_address_again() {
    let mut node = Node::new();
    let wanted = Reserve { requested: vec![addr("10.5.1.9")], ..reserve("a") };
    let (connection, _) = node.add_with(wanted.clone()).await.expect("reserve");
    drop(connection);
    node.restart();
    let (connection, again) = node.add_with(wanted).await.expect("its own");
    assert_eq!(address(&again), addr("10.5.1.9"));
    node.commit(&connection, "a").await.expect("commit");
    connection.closed(true).await;
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    // The span of the orphan is over; the address is the pod's.
    node.assert_consistent();
    assert_eq!(node.ipam().status().addresses_used, 1);
}

#[tokio::test]
async fn a_del_of_an_orphan_holds_the_address() {
    let mut node = Node::new();
    let (connection, reservation) = node.add("a").await.expect("reserve");
    drop(connection);
    node.restart();
    node.ipam().release(&key("a")).await.expect("DEL");
    assert_eq!(node.ipam().status().addresses_used, 1);
    node.fabric.wire(&reservation.host_ifname);
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn an_unreadable_record_blocks_its_addresses_while_its_veth_lives() {
    let mut node = Node::new();
    let reservation = node.attach("a").await;
    let file = node.run_dir().join("attachments").join(format!("{}.json", attachment_hash(&key("a"))));
    let json = fs::read(&file).expect("record");
    fs::write(&file, &json[..json.len() / 2]).expect("tear");
    for _ in 0..2 {
        node.restart();
        node.look().await;
        node.pass_time(deadline::WIRING);
        node.look().await;
        assert_eq!(node.fabric.world().veths.len(), 1, "a live pod's veth");
        let same = Reserve { requested: vec![address(&reservation)], ..reserve("b") };
        assert!(node.add_with(same).await.expect_err("blocked").is(Code::AddressInUse));
        assert!(node.add("a").await.expect_err("alive").is(Code::NameTaken));
    }
    node.ipam().release(&key("a")).await.expect("DEL");
    node.assert_empty();
    // The same, with the pod gone.
    node.attach("a").await;
    fs::write(&file, "").expect("tear");
    node.restart();
    node.fabric.world().veths.clear();
    node.look().await;
    node.attach("a").await;
    node.restart();
    node.assert_consistent();
}
