//! A node for tests: the real agent's address management, against a kernel that is a map of names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::{Semaphore, watch};
use weft_shared::cni::{Code, NetworkName};
use weft_shared::names::host_ifname;
use weft_shared::protocol::{Attachment, Bandwidth, BridgeOptions, Commit, Failure, Reservation, Reserve};
use weft_shared::tombstone::Tombstone;
use weft_shared::{IfName, Mac, Subnet};

use super::*;
use crate::firewall::HostPort;
use crate::pods::{DeviceFacts, NotReady, OldFlows, PodNetwork, SeenVeth};

pub(crate) const BOOT: &str = "7d8e9fa0-0000-4000-8000-000000000001";
pub(super) const OTHER_BOOT: &str = "7d8e9fa0-0000-4000-8000-000000000002";

/// The kernel and the rest of the agent: what they were told, and faults on demand.
#[derive(Clone)]
pub(crate) struct TestFabric(Arc<Inner>);

struct Inner {
    world: Mutex<World>,
    /// `ensure_bridge` takes one permit each while this is set.
    gate: Mutex<Option<Arc<Semaphore>>>,
    needs: watch::Receiver<PodNeeds>,
}

pub(crate) struct World {
    pub(crate) network: Result<PodNetwork, NotReady>,
    pub(crate) veths: BTreeMap<IfName, u32>,
    pub(crate) deleted: Vec<IfName>,
    /// How often the kernel was told to delete veths, whether there were any or not.
    pub(crate) deletions: usize,
    pub(crate) delete_fails: bool,
    /// Veths without name and mark, by index.
    pub(crate) unmarked: BTreeSet<u32>,
    pub(crate) bridge_fails: bool,
    /// As the packet filter has them.
    pub(crate) host_ports: BTreeSet<HostPort>,
    pub(crate) host_ports_fail: bool,
    pub(crate) flows_lag: bool,
    pub(crate) masqueraded: BTreeSet<IpAddr>,
    pub(crate) forced: BTreeSet<IfName>,
    pub(crate) options_fail: bool,
    /// As they were asked for.
    pub(crate) limits: BTreeMap<IfName, Bandwidth>,
    pub(crate) limits_fail: bool,
    next_ifindex: u32,
}

impl TestFabric {
    fn new(needs: watch::Receiver<PodNeeds>) -> Self {
        let network = PodNetwork {
            subnet: subnet("10.5.1.0/24"),
            overlay: vec![subnet("10.5.0.0/16")],
            mtu: 1450,
            tunnel_port: Some(8472),
        };
        let world = World {
            network: Ok(network),
            veths: BTreeMap::new(),
            deleted: vec![],
            deletions: 0,
            delete_fails: false,
            unmarked: BTreeSet::new(),
            bridge_fails: false,
            host_ports: BTreeSet::new(),
            host_ports_fail: false,
            flows_lag: false,
            masqueraded: BTreeSet::new(),
            forced: BTreeSet::new(),
            options_fail: false,
            limits: BTreeMap::new(),
            limits_fail: false,
            next_ifindex: 10,
        };
        Self(Arc::new(Inner { world: Mutex::new(world), gate: Mutex::new(None), needs }))
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

    async fn may_be_bridge(&self, _: &IfName) -> Result<(), Failure> {
        Ok(())
    }

    async fn ensure_bridge(&self, name: &IfName) -> Result<DeviceFacts, Failure> {
        // The seam's promise: the need is published before the call.
        let need = self.0.needs.borrow().bridges.get(name).cloned();
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
        world.deletions += 1;
        if world.delete_fails {
            return Err("no answer from the kernel".into());
        }
        if world.veths.remove(name).is_some() {
            world.deleted.push(name.clone());
        }
        Ok(())
    }

    async fn delete_by_index(&self, ifindex: u32) -> Result<(), String> {
        tokio::task::yield_now().await;
        let mut world = self.world();
        if world.unmarked.contains(&ifindex) {
            return Err("it has lost its mark".into());
        }
        if let Some(name) = world.veths.iter().find(|(_, index)| **index == ifindex).map(|(n, _)| n.clone()) {
            world.veths.remove(&name);
            world.deleted.push(name);
        }
        Ok(())
    }

    async fn ensure(&self, extras: Extras) -> Result<(), String> {
        tokio::task::yield_now().await;
        let published = self.0.needs.borrow().clone();
        let mut world = self.world();
        if extras.host_ports.is_some() && world.host_ports_fail {
            return Err("no packet filter".into());
        }
        if (extras.masquerade || extras.forced.is_some()) && world.options_fail {
            return Err("no packet filter".into());
        }
        world.host_ports = published.host_ports;
        (world.masqueraded, world.forced) = (published.masqueraded, published.forced);
        match extras.host_ports {
            Some(OldFlows::MustFollow) if world.flows_lag => Err("no connection tracking by netlink".into()),
            _ => Ok(()),
        }
    }

    async fn ensure_limits(&self, veth: &IfName) -> Result<(), String> {
        let published = self.0.needs.borrow().bridge_ports.get(veth).map(|port| port.limits);
        let mut world = self.world();
        if world.limits_fail {
            return Err("no token bucket".into());
        }
        world.limits.extend(published.map(|limits| (veth.clone(), limits)));
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
    pub(super) needs: watch::Sender<PodNeeds>,
    seen: watch::Sender<SeenVeths>,
    pub(super) now: Arc<AtomicU64>,
    pub(super) patience: Duration,
    agent: Option<Arc<Ipam<TestFabric>>>,
}

impl Node {
    pub(crate) fn new() -> Self {
        let needs = watch::Sender::new(PodNeeds::default());
        let fabric = TestFabric::new(needs.subscribe());
        let mut node = Self {
            dir: tempfile::tempdir().expect("tempdir"),
            fabric,
            needs,
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

    pub(super) fn restart_in(&mut self, boot_id: &str) {
        if let Some(old) = self.agent.take() {
            // Nothing of a killed process runs on, not even a destructor: only the kernel lets its lock go.
            let freeze = fs::read_dir(self.dir.path().join("attachments")).expect("dir").count();
            drop(Arc::into_inner(old).expect("the old agent is still referenced"));
            let left = fs::read_dir(self.dir.path().join("attachments")).expect("dir").count();
            assert_eq!(freeze, left);
        }
        self.needs.send_replace(PodNeeds::default());
        self.seen.send_replace(SeenVeths::default());
        let config = Config {
            run_dir: self.dir.path().to_owned(),
            tombstones: self.tombstones(),
            boot_id: boot_id.into(),
            patience: self.patience,
        };
        fs::create_dir_all(self.tombstones()).expect("tombstones");
        let deadline = Instant::now() + Duration::from_secs(30);
        self.agent = Some(loop {
            match self.open(config.clone()) {
                // Between fork and exec, a child of another test has the old agent's lock as well.
                Err(RecordsError::InUse(_)) if Instant::now() < deadline => std::thread::yield_now(),
                opened => break opened.expect("open"),
            }
        });
        // No ADD before it.
        self.seen.send_replace(self.look_at_kernel(1));
    }

    fn open(&self, config: Config) -> Result<Arc<Ipam<TestFabric>>, RecordsError> {
        let now = self.now.clone();
        let clock = Box::new(move || Boottime::from_nanos(now.load(Ordering::Relaxed)));
        Ipam::open(config, clock, self.fabric.clone(), self.needs.clone(), self.seen.subscribe())
    }

    pub(super) fn tombstones(&self) -> std::path::PathBuf {
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
        self.seen.send_modify(|seen| *seen = self.look_at_kernel(seen.pass + 1));
        self.ipam().tend().await;
    }

    fn look_at_kernel(&self, pass: u64) -> SeenVeths {
        let veths = self.fabric.world().veths.clone();
        SeenVeths {
            pass,
            veths: veths.into_iter().map(|(name, ifindex)| SeenVeth { name, ifindex }).collect(),
        }
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

    pub(super) async fn add_with(
        &self,
        reserve: Reserve,
    ) -> Result<(Connection<TestFabric>, Reservation), Failure> {
        let connection = self.ipam().connect();
        let reservation = self.ipam().reserve(connection.id(), reserve).await?;
        Ok((connection, reservation))
    }

    /// A whole ADD.
    pub(crate) async fn attach(&self, id: &str) -> Reservation {
        let (connection, reservation) = self.add(id).await.expect("reserve");
        self.commit(&connection, id).await.expect("commit");
        connection.closed(true).await;
        reservation
    }

    pub(super) async fn commit(&self, connection: &Connection<TestFabric>, id: &str) -> Result<u32, Failure> {
        let host_ifindex = self.fabric.wire(&host_ifname(&key(id)));
        let commit = Commit {
            attachment: key(id),
            host_ifindex,
            host_mac: Mac([2, 0, 0, 0, 0, 1]),
            container_mac: Mac([2, 0, 0, 0, 0, 2]),
        };
        self.ipam().commit(connection.id(), commit).await.map(|()| host_ifindex)
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
        let ports: BTreeSet<IfName> = self.needs.borrow().bridge_ports.keys().cloned().collect();
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
            force_address: false,
            masquerade: false,
        },
        pod: Some(format!("default/{id}")),
        host_ports: vec![],
        bandwidth: Default::default(),
    }
}

pub(super) fn subnet(text: &str) -> Subnet {
    text.parse().expect(text)
}

pub(super) fn addr(text: &str) -> IpAddr {
    text.parse().expect(text)
}

pub(super) fn address(reservation: &Reservation) -> IpAddr {
    reservation.addresses[0].address.ip()
}

pub(super) const STEP: Duration = Duration::from_secs(1);
