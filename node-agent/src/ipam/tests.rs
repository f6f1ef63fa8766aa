//! Transactions, crashes and time, against a kernel that is a map of names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use weft_shared::cni::{Code, NetworkName};
use weft_shared::deadline;
use weft_shared::names::{attachment_hash, host_ifname};
use weft_shared::protocol::{Attachment, BridgeOptions, Commit, Failure, Reservation, Reserve};
use weft_shared::tombstone::Tombstone;
use weft_shared::{IfName, Mac, Subnet};

use super::*;
use crate::pods::{DeviceFacts, NotReady, PodNetwork, SeenVeth};

pub(crate) const BOOT: &str = "7d8e9fa0-0000-4000-8000-000000000001";
const OTHER_BOOT: &str = "7d8e9fa0-0000-4000-8000-000000000002";

/// The kernel and the rest of the agent: what they were told, and faults on demand.
#[derive(Clone)]
pub(crate) struct TestFabric(Arc<Inner>);

struct Inner {
    world: Mutex<World>,
    /// `ensure_bridge` takes one permit each while this is set.
    gate: Mutex<Option<Arc<Semaphore>>>,
    ports: watch::Receiver<PodPorts>,
}

pub(crate) struct World {
    pub(crate) network: Result<PodNetwork, NotReady>,
    pub(crate) veths: BTreeMap<IfName, u32>,
    pub(crate) deleted: Vec<IfName>,
    pub(crate) delete_fails: bool,
    pub(crate) bridge_fails: bool,
    next_ifindex: u32,
}

impl TestFabric {
    fn new(ports: watch::Receiver<PodPorts>) -> Self {
        let network =
            PodNetwork { subnet: subnet("10.5.1.0/24"), overlay: vec![subnet("10.5.0.0/16")], mtu: 1450 };
        let world = World {
            network: Ok(network),
            veths: BTreeMap::new(),
            deleted: vec![],
            delete_fails: false,
            bridge_fails: false,
            next_ifindex: 10,
        };
        Self(Arc::new(Inner { world: Mutex::new(world), gate: Mutex::new(None), ports }))
    }

    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.0.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the plugin does between Reserve and Commit.
    pub(crate) fn wire(&self, name: &IfName) -> u32 {
        let mut world = self.world();
        world.next_ifindex += 1;
        let ifindex = world.next_ifindex;
        assert!(world.veths.insert(name.clone(), ifindex).is_none(), "EEXIST: {name}");
        ifindex
    }

    pub(crate) fn hold_bridge(&self) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        *self.0.gate.lock().expect("gate") = Some(gate.clone());
        gate
    }
}

impl Fabric for TestFabric {
    fn pod_network(&self) -> Result<PodNetwork, NotReady> {
        self.world().network.clone()
    }

    async fn ensure_bridge(&self, name: &IfName) -> Result<DeviceFacts, Failure> {
        // The seam's promise: the need is published before the call.
        let need = self.0.ports.borrow().bridges.get(name).cloned();
        let subnet = self.pod_network().expect("network").subnet;
        assert!(need.is_some_and(|need| need.subnets.contains(&subnet) && need.mtu == 1450));
        let gate = self.0.gate.lock().expect("gate").clone();
        match gate {
            Some(gate) => gate.acquire().await.expect("gate").forget(),
            None => tokio::task::yield_now().await,
        }
        if self.world().bridge_fails {
            return Err(Failure::new(Code::BadConfiguration, format!("{name} is not a bridge")));
        }
        Ok(DeviceFacts { ifindex: 5, mac: Mac([2, 0, 0, 0, 0, 5]) })
    }

    async fn delete_veth(&self, name: &IfName) -> Result<(), String> {
        tokio::task::yield_now().await;
        let mut world = self.world();
        if world.delete_fails {
            return Err("no answer from the kernel".into());
        }
        if world.veths.remove(name).is_some() {
            world.deleted.push(name.clone());
        }
        Ok(())
    }

    async fn link_exists(&self, ifindex: u32) -> Result<bool, String> {
        Ok(self.world().veths.values().any(|index| *index == ifindex))
    }
}

/// A node: what stays when the agent dies, and the agent that runs now.
pub(crate) struct Node {
    dir: TempDir,
    pub(crate) fabric: TestFabric,
    ports: watch::Sender<PodPorts>,
    seen: watch::Sender<SeenVeths>,
    now: Arc<AtomicU64>,
    pub(super) patience: Duration,
    agent: Option<Arc<Ipam<TestFabric>>>,
}

impl Node {
    pub(crate) fn new() -> Self {
        let ports = watch::Sender::new(PodPorts::default());
        let fabric = TestFabric::new(ports.subscribe());
        let mut node = Self {
            dir: tempfile::tempdir().expect("tempdir"),
            fabric,
            ports,
            seen: watch::Sender::new(SeenVeths::default()),
            now: Arc::new(AtomicU64::new(Duration::from_secs(1000).as_nanos() as u64)),
            patience: Duration::from_millis(100),
            agent: None,
        };
        node.restart();
        node
    }

    pub(crate) fn run_dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn ipam(&self) -> &Arc<Ipam<TestFabric>> {
        self.agent.as_ref().expect("agent")
    }

    /// `kill -9`, then another agent. Connections of the old one must be dropped (or leaked) by then.
    pub(super) fn restart(&mut self) {
        self.restart_in(BOOT);
    }

    fn restart_in(&mut self, boot_id: &str) {
        if let Some(old) = self.agent.take() {
            // Nothing of a killed process runs on, not even a destructor: only the kernel lets its lock go.
            let freeze = fs::read_dir(self.dir.path().join("attachments")).expect("dir").count();
            drop(Arc::into_inner(old).expect("the old agent is still referenced"));
            let left = fs::read_dir(self.dir.path().join("attachments")).expect("dir").count();
            assert_eq!(freeze, left);
        }
        self.ports.send_replace(PodPorts::default());
        self.seen.send_replace(SeenVeths::default());
        fs::create_dir_all(self.tombstones()).expect("tombstones");
        // Another test's child has a copy of the old agent's lock between its fork(2) and its execve(2).
        let patience = Instant::now() + Duration::from_secs(10);
        let opened = loop {
            match self.open(boot_id) {
                Err(RecordsError::InUse(_)) if Instant::now() < patience => std::thread::yield_now(),
                opened => break opened,
            }
        };
        self.agent = Some(opened.expect("open"));
    }

    fn open(&self, boot_id: &str) -> Result<Arc<Ipam<TestFabric>>, RecordsError> {
        let config = Config {
            run_dir: self.dir.path().to_owned(),
            tombstones: self.tombstones(),
            boot_id: boot_id.into(),
            patience: self.patience,
        };
        let now = self.now.clone();
        let clock = Box::new(move || Boottime::from_nanos(now.load(Ordering::Relaxed)));
        Ipam::open(config, clock, self.fabric.clone(), self.ports.clone(), self.seen.subscribe())
    }

    fn tombstones(&self) -> std::path::PathBuf {
        self.dir.path().join("tombstones")
    }

    pub(crate) fn pass_time(&self, span: Duration) {
        self.now.fetch_add(span.as_nanos() as u64, Ordering::Relaxed);
    }

    pub(super) fn clock(&self) -> Boottime {
        Boottime::from_nanos(self.now.load(Ordering::Relaxed))
    }

    /// The reconciler looks at the kernel and publishes.
    pub(super) async fn look(&self) {
        let veths = self.fabric.world().veths.clone();
        let veths = veths.into_iter().map(|(name, ifindex)| SeenVeth { name, ifindex }).collect();
        self.seen.send_modify(|seen| *seen = SeenVeths { pass: seen.pass + 1, veths });
        self.ipam().tend().await;
    }

    pub(crate) fn bury(&self, key: &Attachment, boot_id: &str) {
        let tombstone = Tombstone {
            attachment: key.clone(),
            boot_id: boot_id.into(),
            boottime_ns: self.now.load(Ordering::Relaxed),
            netns_cookie: None,
        };
        tombstone.write(&self.tombstones()).expect("tombstone");
    }

    pub(crate) fn tombstone_files(&self) -> usize {
        weft_shared::tombstone::list(&self.tombstones()).expect("list").len()
    }

    pub(super) async fn add(&self, id: &str) -> Result<(Connection<TestFabric>, Reservation), Failure> {
        self.add_with(reserve(id)).await
    }

    async fn add_with(&self, reserve: Reserve) -> Result<(Connection<TestFabric>, Reservation), Failure> {
        let connection = self.ipam().connect();
        let reservation = self.ipam().reserve(connection.id(), reserve).await?;
        Ok((connection, reservation))
    }

    /// A whole ADD.
    pub(crate) async fn attach(&self, id: &str) -> Reservation {
        let (connection, reservation) = self.add(id).await.expect("reserve");
        self.commit(&connection, id).expect("commit");
        connection.closed(true).await;
        reservation
    }

    fn commit(&self, connection: &Connection<TestFabric>, id: &str) -> Result<u32, Failure> {
        let host_ifindex = self.fabric.wire(&host_ifname(&key(id)));
        let commit = Commit {
            attachment: key(id),
            host_ifindex,
            host_mac: Mac([2, 0, 0, 0, 0, 1]),
            container_mac: Mac([2, 0, 0, 0, 0, 2]),
        };
        self.ipam().commit(connection.id(), commit).map(|()| host_ifindex)
    }

    pub(crate) fn states(&self) -> BTreeMap<String, String> {
        let attachments = self.ipam().status().list.into_iter();
        attachments.map(|a| (a.container_id, a.state)).collect()
    }

    fn record_files(&self) -> usize {
        let files = fs::read_dir(self.dir.path().join("attachments")).expect("dir");
        let names = files.map(|f| f.expect("entry").file_name().into_string().expect("name"));
        names.filter(|name| name.ends_with(".json") && name.len() > 50).count()
    }

    /// Addresses handed out, live veths and records agree, in memory and on disk.
    pub(crate) fn assert_consistent(&self) {
        let attachments = self.ipam().status().list;
        let addresses: BTreeSet<IpAddr> = attachments.iter().flat_map(|a| a.addresses.clone()).collect();
        assert_eq!(addresses.len(), attachments.len(), "an address twice");
        assert_eq!(self.ipam().status().addresses_used, addresses.len());
        let veths: BTreeSet<IfName> = self.fabric.world().veths.keys().cloned().collect();
        let recorded: BTreeSet<IfName> = attachments.iter().map(|a| a.host_veth.clone()).collect();
        assert_eq!(veths, recorded);
        assert_eq!(self.record_files(), attachments.len());
        let ports: BTreeSet<IfName> = self.ports.borrow().ports.keys().cloned().collect();
        assert_eq!(ports, recorded);
    }

    pub(crate) fn assert_empty(&self) {
        self.assert_consistent();
        assert_eq!(self.states(), BTreeMap::new());
        assert_eq!(self.ipam().status().addresses_used, 0);
    }
}

pub(crate) fn network() -> NetworkName {
    "weft".parse().expect("name")
}

pub(crate) fn key(id: &str) -> Attachment {
    Attachment {
        network: network(),
        container_id: id.parse().expect("ID"),
        ifname: "eth0".parse().expect("name"),
    }
}

pub(crate) fn reserve(id: &str) -> Reserve {
    Reserve {
        attachment: key(id),
        netns: format!("/run/netns/{id}"),
        netns_cookie: Some(7),
        requested: vec![],
        bridge: BridgeOptions {
            name: "cni0".parse().expect("name"),
            hairpin: true,
            isolated: false,
            mtu: None,
        },
        pod: Some(format!("default/{id}")),
    }
}

pub(super) fn subnet(text: &str) -> Subnet {
    text.parse().expect(text)
}

fn addr(text: &str) -> IpAddr {
    text.parse().expect(text)
}

pub(super) fn address(reservation: &Reservation) -> IpAddr {
    reservation.addresses[0].address.ip()
}

const STEP: Duration = Duration::from_secs(1);

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
    let ifindex = node.commit(&connection, "a").expect("commit");
    assert!(!connection.is_open());
    connection.closed(true).await;
    let ports = node.ports.borrow().clone();
    assert_eq!(ports.ports[&host_ifname(&key("a"))].ifindex, ifindex);
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
    assert_eq!(node.ports.borrow().bridges[&"cni0".parse().expect("name")].subnets, [subnet("10.5.1.0/24")]);
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
    node.ipam().can_add().expect("one free");
    node.attach("a").await;
    let full = node.add("b").await.expect_err("full");
    assert!(full.is(Code::PoolExhausted) && full.details.contains("all 1 pod addresses"), "{full:?}");
    assert!(node.ipam().can_add().expect_err("full").is(Code::NotAvailable));
    node.fabric.world().network = Err(NotReady::Waiting("waiting for a lease".into()));
    let early = node.add("b").await.expect_err("no lease");
    assert!(early.is(Code::TryAgainLater) && early.details.contains("waiting for a lease"), "{early:?}");
    assert!(node.ipam().can_add().expect_err("no lease").is(Code::NotAvailable));
    node.fabric.world().network = Err(NotReady::Degraded("subnet taken by 192.0.2.7".into()));
    assert!(node.add("b").await.expect_err("taken").is(Code::TryAgainLater));
    assert!(node.ipam().can_add().expect_err("taken").is(Code::NotAvailableAndDegraded));
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
    assert!(node.ports.borrow().bridges.is_empty(), "nor is it wanted");
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
    node.commit(&second, "a").expect("its veth is gone as well");
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
    let refused = node.commit(&connection, "a").expect_err("deleted");
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
    assert!(node.commit(&other, "a").expect_err("another's").is(Code::NotReserved));
    assert!(node.commit(&other, "b").expect_err("nobody's").is(Code::NotReserved));
    other.closed(true).await;
    assert_eq!(node.states()["a"], "reserved");
    node.fabric.world().veths.remove(&reservation.host_ifname);
    node.commit(&connection, "a").expect("its own");
    // And an ADD whose peer is gone reserves nothing any more.
    let gone = node.ipam().connect();
    let id = gone.id();
    gone.closed(true).await;
    assert!(node.ipam().reserve(id, reserve("c")).await.expect_err("closed").is(Code::TryAgainLater));
}

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
    assert_eq!(node.ports.borrow().bridges[&"cni0".parse().expect("name")].mtu, 1450);
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
    node.commit(&connection, "a").expect("commit");
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
        timeout(Duration::from_secs(5), drained).await.expect("noticed");
    }
    node.assert_empty();
    stop.cancel();
    task.await.expect("ends");
}

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
    node.commit(&connection, "b").expect("commit");
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
    assert_eq!(node.ipam().status().counters.dead_freed, 2);
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
async fn a_del_of_an_unknown_key_deletes_its_veth() {
    let node = Node::new();
    node.fabric.wire(&host_ifname(&key("ghost")));
    node.ipam().release(&key("ghost")).await.expect("DEL");
    node.assert_empty();
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
        let subnets = node.ports.borrow().bridges[&bridge].subnets.clone();
        assert_eq!(subnets, [subnet("10.5.9.0/24"), subnet("10.5.1.0/24")]);
        node.ipam().check(&key("a"), &[addr("10.5.1.2")]).expect("held");
        node.restart();
    }
    node.ipam().release(&key("a")).await.expect("DEL");
    assert_eq!(node.ports.borrow().bridges[&bridge].subnets, [subnet("10.5.9.0/24")]);
    // Changed without any ADD: the next round notices.
    if let Ok(network) = &mut node.fabric.world().network {
        network.subnet = subnet("10.5.3.0/24");
    }
    node.ipam().tend().await;
    assert_eq!(node.ports.borrow().bridges[&bridge].subnets, [subnet("10.5.3.0/24"), subnet("10.5.9.0/24")]);
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
    assert!(node.commit(&connection, "a").expect_err("disk").is(Code::Io));
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
                    node.commit(&connection, &id).expect("commit");
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
