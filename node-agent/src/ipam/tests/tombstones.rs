//! The DELs of a time without an agent.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::super::testing::{BOOT, Node, OTHER_BOOT, STEP, addr, address, key};

#[tokio::test]
async fn tombstones_bury_what_was_there_before() {
    let mut node = Node::new();
    node.attach("old").await;
    node.pass_time(STEP);
    node.bury(&key("old"), BOOT);
    node.bury(&key("unknown"), BOOT);
    let mut later = key("new");
    node.bury(&later, BOOT);
    later.container_id = "foreign".parse().expect("ID");
    node.attach("foreign").await;
    node.pass_time(STEP);
    node.bury(&later, OTHER_BOOT);
    fs::write(node.tombstones().join("torn.json"), "{").expect("write");
    // An ADD of the same key consumes its tombstone.
    node.attach("new").await;
    assert_eq!(node.tombstone_files(), 4);
    // One that is older than the reservation is void.
    let written = node.now.load(Ordering::Relaxed);
    node.now.store(written - STEP.as_nanos() as u64 * 2, Ordering::Relaxed);
    node.bury(&key("new"), BOOT);
    node.now.store(written, Ordering::Relaxed);
    node.restart();
    node.ipam().drain_tombstones().await;
    assert_eq!(node.tombstone_files(), 0);
    assert_eq!(node.states().keys().collect::<Vec<_>>(), ["foreign", "new"]);
    node.assert_consistent();
}

#[tokio::test]
async fn an_add_over_a_tombstone_of_its_committed_predecessor() {
    let node = Node::new();
    node.attach("a").await;
    node.pass_time(STEP);
    node.bury(&key("a"), BOOT);
    let second = node.attach("a").await;
    assert_eq!(address(&second), addr("10.5.1.3"));
    assert_eq!(node.tombstone_files(), 0);
    node.ipam().drain_tombstones().await;
    node.assert_consistent();
}

#[tokio::test]
async fn a_tombstone_that_cannot_be_applied_stays() {
    let node = Node::new();
    node.attach("a").await;
    node.pass_time(STEP);
    node.bury(&key("a"), BOOT);
    node.fabric.world().delete_fails = true;
    node.ipam().drain_tombstones().await;
    assert_eq!(node.tombstone_files(), 1);
    node.fabric.world().delete_fails = false;
    node.ipam().drain_tombstones().await;
    assert_eq!(node.tombstone_files(), 0);
    node.assert_empty();
}

#[tokio::test]
async fn tombstones_are_noticed() {
    let node = Node::new();
    node.attach("a").await;
    node.pass_time(STEP);
    let stop = CancellationToken::new();
    let task = tokio::spawn(node.ipam().clone().run(stop.clone()));
    // Whether inotify is ready before the first one is written or not: the second is written for certain after it.
    for id in ["a", "b"] {
        node.bury(&key(id), BOOT);
        let drained = async {
            while node.tombstone_files() > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(30), drained).await.expect("noticed");
    }
    node.assert_empty();
    stop.cancel();
    task.await.expect("ends");
}
