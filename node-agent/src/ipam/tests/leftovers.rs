//! What nobody asks for: garbage collection, dead attachments, veths without a record, a subnet that changed.

use std::fs;
use std::io;
use std::sync::{Arc, Mutex};

use weft_shared::IfName;
use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::names::{attachment_hash, host_ifname};
use weft_shared::protocol::Reserve;

use super::super::CLAIM;
use super::super::testing::{BOOT, Node, STEP, addr, address, key, network, reserve, subnet};
use crate::pods::NotReady;
use crate::status::StrandedStatus;

#[tokio::test]
async fn gc_spares_what_is_valid_foreign_or_under_way() {
    let node = Node::new();
    node.attach("a").await;
    node.attach("b").await;
    let mut foreign = reserve("a");
    foreign.attachment.network = "other".parse().expect("name");
    let (foreign, _) = node.add_with(foreign).await.expect("reserve");
    let (flying, _) = node.add("c").await.expect("reserve");
    node.ipam().gc(&network(), &[key("a")]).await.expect("gc");
    let left: Vec<_> = node.ipam().status().list.into_iter().map(|a| (a.network, a.container_id)).collect();
    let left: Vec<_> = left.iter().map(|(n, c)| (n.as_str(), c.as_str())).collect();
    assert_eq!(left, [("other", "a"), ("weft", "a"), ("weft", "c")]);
    // An empty list means that none is valid.
    node.ipam().gc(&network(), &[]).await.expect("gc");
    assert_eq!(node.states().keys().collect::<Vec<_>>(), ["a", "c"]);
    foreign.closed(true).await;
    flying.closed(true).await;
    node.assert_empty();
}

#[tokio::test]
async fn gc_goes_on_after_an_error_and_names_it() {
    let node = Node::new();
    node.attach("a").await;
    node.attach("b").await;
    node.fabric.world().delete_fails = true;
    let failure = node.ipam().gc(&network(), &[]).await.expect_err("kernel");
    assert!(failure.details.contains("container a") && failure.details.contains("container b"), "{failure}");
    node.fabric.world().delete_fails = false;
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn an_attachment_is_dead_when_its_veth_is_gone_from_a_later_look() {
    let node = Node::new();
    node.attach("a").await;
    let veth = host_ifname(&key("a"));
    node.look().await;
    // The look that was under way at Commit may have missed it: even with the veth gone it proves nothing.
    let (connection, _) = node.add("b").await.expect("reserve");
    node.commit(&connection, "b").await.expect("commit");
    connection.closed(true).await;
    let gone = node.fabric.world().veths.remove(&host_ifname(&key("b")));
    assert!(gone.is_some());
    node.look().await;
    assert_eq!(node.states()["b"], "committed");
    node.look().await;
    assert_eq!(node.states().keys().collect::<Vec<_>>(), ["a"]);
    // Renamed or without our mark is not dead.
    let ifindex = node.fabric.world().veths.remove(&veth).expect("veth");
    node.fabric.world().veths.insert("renamed".parse().expect("name"), ifindex);
    node.look().await;
    assert_eq!(node.states()["a"], "committed");
    // Another veth of the same name is not it.
    node.fabric.world().veths.clear();
    node.fabric.wire(&veth);
    node.look().await;
    node.assert_empty();
    node.pass_time(CLAIM);
    node.ipam().tend().await;
    assert_eq!(node.ipam().status().counters.dead_freed, 2);
}

#[tokio::test]
async fn an_address_is_held_while_its_renamed_veth_is_there() {
    let mut node = Node::new();
    node.attach("a").await;
    let ifindex = node.fabric.world().veths.remove(&host_ifname(&key("a"))).expect("veth");
    node.fabric.world().veths.insert("renamed".parse().expect("name"), ifindex);
    // Somebody has taken its mark as well.
    node.fabric.world().unmarked.insert(ifindex);
    node.ipam().release(&key("a")).await.expect_err("it carries the address");
    assert_eq!(node.states()["a"], "aborted");
    // The next agent knows as much, and that it is no attachment any more.
    node.restart();
    assert_eq!(node.states()["a"], "aborted");
    node.ipam().release(&key("a")).await.expect_err("it carries the address still");
    node.fabric.world().unmarked.clear();
    node.ipam().release(&key("a")).await.expect("by its index");
    node.assert_empty();
}

#[tokio::test]
async fn a_veth_that_its_del_deleted_first_is_no_dead_attachment() {
    let node = Node::new();
    for id in ["a", "b", "c"] {
        node.attach(id).await;
    }
    node.look().await;
    node.fabric.world().veths.clear();
    node.look().await;
    node.assert_empty();
    // The plugin of one tells the agent behind the veth's end, that of another finds none and leaves a tombstone.
    node.ipam().release(&key("a")).await.expect("DEL");
    node.bury(&key("b"), BOOT);
    node.ipam().drain_tombstones().await;
    node.pass_time(CLAIM - STEP);
    node.ipam().tend().await;
    assert_eq!(node.ipam().status().counters.dead_freed, 0, "a DEL may still come");
    node.pass_time(STEP);
    node.ipam().tend().await;
    assert_eq!(node.ipam().status().counters.dead_freed, 1, "nobody claimed it");
    node.ipam().release(&key("c")).await.expect("DEL");
    assert_eq!(node.ipam().status().counters.dead_freed, 1);
}

/// What is logged while it lives, by this thread.
struct Logged {
    text: Arc<Mutex<Vec<u8>>>,
    _here: tracing::subscriber::DefaultGuard,
}

impl Logged {
    fn begin() -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let writer = text.clone();
        let lines = tracing_subscriber::fmt().with_ansi(false).with_writer(move || Lines(writer.clone()));
        Self { text, _here: tracing::subscriber::set_default(lines.finish()) }
    }

    fn lines(&self, part: &str) -> Vec<String> {
        let text = String::from_utf8(self.text.lock().expect("lines").clone()).expect("UTF-8");
        text.lines().filter(|line| line.contains(part)).map(str::to_owned).collect()
    }
}

struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("lines").extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_cannot_be_undone_is_said_once_for_each_reason() {
    let logged = Logged::begin();
    let node = Node::new();
    node.attach("a").await;
    let name = host_ifname(&key("a"));
    let ifindex = node.fabric.world().veths.remove(&name).expect("veth");
    node.fabric.world().veths.insert("renamed".parse().expect("name"), ifindex);
    node.fabric.world().unmarked.insert(ifindex);
    node.ipam().release(&key("a")).await.expect_err("it carries the address");
    let tend = async |times| {
        for _ in 0..times {
            node.look().await;
        }
    };
    tend(4).await;
    let said = logged.lines("not undone yet");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("attachment=weft/a/eth0 error=it has lost its mark"), "{said:?}");
    node.fabric.world().delete_fails = true;
    tend(4).await;
    assert_eq!(logged.lines("not undone yet").len(), 2, "another reason");
    node.fabric.world().delete_fails = false;
    node.fabric.world().unmarked.clear();
    node.look().await;
    node.assert_empty();
}

#[tokio::test]
async fn what_cannot_be_undone_of_a_repeated_add_is_said_again() {
    let logged = Logged::begin();
    let node = Node::new();
    for round in 1..=2 {
        node.fabric.world().delete_fails = false;
        // Whose plugin may still be alive: the next ADD of the same name takes its place.
        let (connection, _) = node.add("a").await.expect("reserved");
        node.fabric.world().delete_fails = true;
        connection.closed(false).await;
        assert_eq!(logged.lines("not undone yet").len(), round);
    }
}

#[tokio::test]
async fn a_veth_without_a_record_goes_after_a_while() {
    let node = Node::new();
    node.fabric.wire(&host_ifname(&key("ghost")));
    node.look().await;
    node.pass_time(deadline::WIRING - STEP);
    node.look().await;
    assert_eq!(node.fabric.world().veths.len(), 1);
    // Seen in between by an ADD: that one clears it and makes its own.
    node.attach("ghost").await;
    node.pass_time(STEP);
    node.look().await;
    node.assert_consistent();
    node.fabric.wire(&host_ifname(&key("other")));
    node.look().await;
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    node.assert_consistent();
    assert_eq!(node.ipam().status().counters.orphans_removed, 1);
}

#[tokio::test]
async fn nothing_is_added_while_the_address_behind_a_veth_is_unknown() {
    for emptied in [false, true] {
        let mut node = Node::new();
        node.attach("a").await;
        let record = node.run_dir().join(format!("attachments/{}.json", attachment_hash(&key("a"))));
        fs::remove_file(&record).expect("there");
        if emptied {
            fs::write(&record, "").expect("written");
        }
        node.restart();
        // Its address would be the next to be given.
        let refused = node.add("b").await.expect_err("an address that may be in use");
        let named = host_ifname(&key("a"));
        assert!(refused.is(Code::TryAgainLater) && refused.details.contains(named.as_str()), "{refused:?}");
        assert!(node.ipam().can_add().await.expect_err("no ADD can succeed").is(Code::NotAvailable));
        node.look().await;
        node.pass_time(STEP);
        assert_eq!(node.ipam().status().unknown, [named]);
        // A veth deleted since the look does not count.
        node.fabric.world().veths.clear();
        node.attach("b").await;
        node.look().await;
        node.assert_consistent();
        assert!(node.ipam().status().unknown.is_empty());
    }
}

#[tokio::test]
async fn without_room_for_records_no_add_is_promised() {
    let node = Node::new();
    node.ipam().can_add().await.expect("room");
    fs::remove_dir_all(node.run_dir().join("attachments")).expect("there");
    let refused = node.ipam().can_add().await.expect_err("nowhere to write");
    assert!(
        refused.is(Code::NotAvailable) && refused.details.contains("cannot write its records"),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_del_of_an_unknown_key_deletes_its_veth() {
    let node = Node::new();
    node.fabric.wire(&host_ifname(&key("ghost")));
    node.ipam().release(&key("ghost")).await.expect("DEL");
    node.assert_empty();
}

#[tokio::test]
async fn an_add_clears_its_way_only_where_a_veth_may_be() {
    let node = Node::new();
    node.attach("a").await;
    assert_eq!(node.fabric.world().deletions, 0, "nobody can have made one");
    // Nobody's, and seen.
    node.fabric.wire(&host_ifname(&key("b")));
    node.look().await;
    node.attach("b").await;
    assert_eq!(node.fabric.world().deleted, [host_ifname(&key("b"))]);
    // An earlier plugin's that may still be at it, not seen yet.
    let (connection, reservation) = node.add("c").await.expect("reserve");
    connection.closed(false).await;
    node.fabric.wire(&reservation.host_ifname);
    node.attach("c").await;
    assert_eq!(node.fabric.world().deleted, [host_ifname(&key("b")), host_ifname(&key("c"))]);
}

#[tokio::test]
async fn an_orphan_that_takes_a_vanished_veths_name_keeps_its_address() {
    let node = Node::new();
    let veth = host_ifname(&key("a"));
    let (connection, orphan) = node.add("a").await.expect("reserve");
    connection.closed(false).await;
    node.attach("a").await;
    node.fabric.world().veths.clear();
    node.fabric.wire(&veth);
    // It can wire no more, and has.
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    let asked = Reserve { requested: vec![address(&orphan)], ..reserve("b") };
    assert!(node.add_with(asked.clone()).await.expect_err("it lives").is(Code::AddressInUse));
    // The looks tell, and both go.
    node.look().await;
    node.look().await;
    assert!(!node.states().contains_key("a") && !node.fabric.world().veths.contains_key(&veth));
    node.add_with(asked).await.expect("free");
}

#[tokio::test]
async fn what_an_orphan_held_is_free_once_a_look_has_found_the_veth_that_is_not_its() {
    let node = Node::new();
    let (connection, orphan) = node.add("a").await.expect("reserve");
    connection.closed(false).await;
    node.attach("a").await;
    node.pass_time(deadline::WIRING);
    let asked = || Reserve { requested: vec![address(&orphan)], ..reserve("b") };
    for _ in 0..2 {
        node.ipam().tend().await;
        assert!(node.add_with(asked()).await.expect_err("not seen yet").is(Code::AddressInUse));
        node.look().await;
    }
    node.add_with(asked()).await.expect("free");
}

#[tokio::test]
async fn pods_of_an_old_subnet_keep_their_addresses_and_gateway() {
    let mut node = Node::new();
    node.attach("a").await;
    if let Ok(network) = &mut node.fabric.world().network {
        network.subnet = subnet("10.5.9.0/24");
    }
    assert_eq!(address(&node.attach("b").await), addr("10.5.9.2"));
    let bridge: IfName = "cni0".parse().expect("name");
    for _ in 0..2 {
        let subnets = node.needs.borrow().bridges[&bridge].subnets.clone();
        assert_eq!(subnets, [subnet("10.5.9.0/24"), subnet("10.5.1.0/24")]);
        node.ipam().check(&key("a"), &[addr("10.5.1.2")]).expect("held");
        node.restart();
    }
    assert_eq!(node.ipam().status().stranded, [], "not known before the node is");
    node.ipam().tend().await;
    let stranded = StrandedStatus { subnet: subnet("10.5.1.0/24"), pods: 1, owner: None };
    assert_eq!(node.ipam().status().stranded, [stranded]);
    node.ipam().release(&key("a")).await.expect("DEL");
    assert_eq!(node.ipam().status().stranded, []);
    assert_eq!(node.needs.borrow().bridges[&bridge].subnets, [subnet("10.5.9.0/24")]);
    // Changed without any ADD: the next round notices.
    if let Ok(network) = &mut node.fabric.world().network {
        network.subnet = subnet("10.5.3.0/24");
    }
    node.ipam().tend().await;
    assert_eq!(node.needs.borrow().bridges[&bridge].subnets, [subnet("10.5.3.0/24"), subnet("10.5.9.0/24")]);
}

#[tokio::test]
async fn a_bridge_is_remembered_as_it_was_last() {
    let mut node = Node::new();
    node.attach("a").await;
    let bridge: IfName = "cni0".parse().expect("name");
    let remembered = |node: &Node| {
        let needs = node.needs.borrow();
        (needs.bridges[&bridge].mtu, needs.bridges[&bridge].mac.expect("told").to_string())
    };
    // The MAC that its pods know, whoever gave it.
    assert_eq!(remembered(&node), (1450, "02:00:00:00:00:05".into()));
    for mtu in [1350, 1400] {
        if let Ok(network) = &mut node.fabric.world().network {
            network.mtu = mtu;
        }
        node.ipam().tend().await;
        assert_eq!(remembered(&node).0, mtu);
    }
    // The next agent asks for it before it knows the network: a wrong MTU would be set and unset.
    node.fabric.world().network = Err(NotReady::Waiting("the store".into()));
    node.restart();
    assert_eq!(remembered(&node), (1400, "02:00:00:00:00:05".into()));
}
