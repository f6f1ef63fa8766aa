//! From nothing to a node that can be kept: configuration, underlay, VTEP MAC, then the lease keeper and the watch. Every
//! step waits for as long as it takes and says what for; none ends the process. What keeps the node one from then on
//! is [`crate::upkeep`].

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep;
use tracing::{info, warn};
use weft_shared::Mac;
use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::netconf::{BackendConfig, NetworkConfig};
use weft_shared::subnet_env::previous_lease;

use crate::config::{Config, StoreConfig};
use crate::dataplane::Backend;
use crate::durable::snapshot::{OwnSubnet, Recalled, Snapshot, SnapshotFile};
use crate::durable::{Durable, DurableFile};
use crate::kernel::{KernelError, LinuxKernel};
use crate::lease::backoff::Backoff;
use crate::lease::health::heard;
use crate::lease::{
    AcquireRequest, Keeper, LeaseStore, LeaseTable, Store, StoreError, StoreHealth, wait_for_config,
};
use crate::netconf::needs_restart;
use crate::node::{Node, Serving};
use crate::object::LinkKind;
use crate::pods::PodNeeds;
use crate::reconcile::{Inputs, NodeInputs};
use crate::underlay::{PublicIpFrom, Underlay, UnderlayChoice, find_underlay, fits};
use crate::upkeep::{Files, Upkeep, Wished};

/// From and to.
const WISH_RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Nobody waits for it.
const LATE_WISH_RETRY: Duration = Duration::from_secs(30);
const UNDERLAY_RETRY: Duration = Duration::from_secs(1);
/// Updates of the watch under way: a snapshot is one.
const UPDATES: usize = 1024;

/// Runs for as long as the agent does.
pub async fn bring_up(
    node: Arc<Node>,
    config: Arc<Config>,
    memory: Memory,
    health: watch::Sender<StoreHealth>,
) -> anyhow::Result<()> {
    let Memory { durable, saved } = memory;
    let first_start = durable.is_none();
    let mut durable = durable.unwrap_or_default();
    let start = start(&node, &config, saved, &health).await;
    let network = start.network.clone();
    let Chosen { choice, saved, told } = choice(&node, &config.underlay, start, &health).await;
    let underlay = wait_for_underlay(&node, &choice, &network).await;

    let vtep_mac = vtep_mac(&network, &underlay, durable.vtep_mac).await?;
    let file = DurableFile::in_dir(&config.state_dir);
    let files =
        Files { durable: file, subnet_env: config.subnet_file.clone(), ip_masq: config.firewall.masquerade };
    let recalled_key = saved.as_ref().map(|saved| saved.own.key);
    let previous = recalled_key.or(durable.lease).or_else(|| left_in(&config.subnet_file));
    durable.vtep_mac = Some(vtep_mac);
    files.save(durable).await;

    let backend = Backend::new(&network, vtep_mac);
    let want = AcquireRequest {
        config: network.clone(),
        attrs: backend.plane().lease_attrs(underlay.public_ip),
        previous,
        ttl: config.lease_ttl,
    };
    let (mut keeper, handle) = Keeper::new(node.store.clone(), want, config.renew_margin);
    let mut table = LeaseTable::new(network.clone(), config.expired_peer_grace);
    let mut recalled = None;
    if let Some(saved) = saved {
        keeper = keeper.recalling(saved.own, saved.at);
        saved.recall(&mut table, &backend);
        recalled = Some(Recalled { saved: saved.at });
    }
    let mut serving = Serving {
        config: network,
        config_notice: None,
        underlay,
        underlay_problem: None,
        wish_problem: None,
        backend,
        vtep_mac,
        lease: handle.state.borrow().clone(),
        peers: Vec::new(),
        expired: BTreeMap::new(),
        refused: Vec::new(),
        has_snapshot: false,
        recalled,
        first_start,
        told: None,
    };
    serving.take_peers(&table);
    node.serve(serving);
    let (sender, updates) = mpsc::channel(UPDATES);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { match keeper.run().await {} });
    let store = node.store.clone();
    tasks.spawn(async move { store.watch(sender, health).await });
    let (available, in_place) = watch::channel(0);
    tasks.spawn(tell_network(node.store.clone(), in_place));
    let (wishes, wished) = watch::channel(Wished { choice, problem: None });
    if !told {
        tasks.spawn(ask_wish(node.store.clone(), config.underlay.clone(), wishes));
    }
    let upkeep = Upkeep::new(node, table, handle, wished, files, durable, available);
    tokio::select! {
        ended = upkeep.run(updates) => ended,
        task = tasks.join_next() => anyhow::bail!("the lease keeper or the watch ended: {task:?}"),
    }
}

/// What a start without the store could not ask: passed on once it is answered.
async fn ask_wish(store: Arc<Store>, given: UnderlayChoice, wishes: watch::Sender<Wished>) {
    let mut backoff = Backoff::new(WISH_RETRY.0, LATE_WISH_RETRY);
    let wish = loop {
        match store.public_ip_wish().await {
            Ok(wish) => break wish,
            // The watch says what is wrong.
            Err(StoreError::Unavailable { .. } | StoreError::Refused { .. }) => {}
            Err(error) => {
                wishes.send_modify(|wished| wished.problem = Some(error.to_string()));
            }
        }
        sleep(backoff.wait()).await;
    };
    let choice = with_wish(&given, wish, PublicIpFrom::Node);
    wishes.send_replace(Wished { choice, problem: None });
    // The channel's other end lives as long as the node is kept.
    std::future::pending().await
}

fn with_wish(given: &UnderlayChoice, wish: Option<Ipv4Addr>, from: PublicIpFrom) -> UnderlayChoice {
    match wish {
        Some(ip) => UnderlayChoice { public_ip: Some(ip), public_ip_from: from, ..given.clone() },
        None => given.clone(),
    }
}

/// Passes on that everything is in place, until the store has it; again for every lease that is taken.
async fn tell_network(store: Arc<Store>, mut in_place: watch::Receiver<u64>) {
    let mut told = None;
    while in_place.changed().await.is_ok() {
        let mut backoff = Backoff::new(WISH_RETRY.0, WISH_RETRY.1);
        while let Err(error) = store.network_available().await {
            let text = error.to_string();
            if told.as_ref() != Some(&text) {
                warn!(%error, "the cluster cannot be told yet that this node has its network");
                told = Some(text);
            }
            sleep(backoff.wait()).await;
        }
        told = None;
    }
    // The watch channel's other end lives as long as the node is kept.
    std::future::pending().await
}

/// The file that holds what the store told last, and what store that is.
pub fn snapshot_file(config: &Config) -> (SnapshotFile, String) {
    let store = match &config.store {
        StoreConfig::Etcd(etcd) => format!("etcd, prefix {}", etcd.prefix),
        StoreConfig::Embedded(embedded) => format!("embedded store {}", embedded.file.display()),
        #[cfg(feature = "kube")]
        StoreConfig::Kube(kube) => format!("Kubernetes, {:?}, annotations {:?}", kube.node, kube.prefix),
    };
    (SnapshotFile::in_dir(&config.state_dir), store)
}

/// What the node knows of itself before it has asked anybody.
#[derive(Debug)]
pub struct Memory {
    /// `None`: weft has never run here.
    durable: Option<Durable>,
    saved: Option<Saved>,
}

#[derive(Debug)]
struct Saved {
    snapshot: Snapshot,
    own: OwnSubnet,
    at: SystemTime,
}

impl Memory {
    pub fn load(config: &Config) -> anyhow::Result<Self> {
        let durable = DurableFile::in_dir(&config.state_dir).load();
        let durable = durable.with_context(|| format!("durable state in {}", config.state_dir.display()))?;
        let (file, identity) = snapshot_file(config);
        let saved = file.load(&identity).and_then(|(snapshot, at)| {
            let own = snapshot.own(&durable.unwrap_or_default())?;
            Some(Saved { snapshot, own, at })
        });
        Ok(Self { durable, saved })
    }

    /// What the reconciler would be told if the store said again what it said last: enough for the packet path of the
    /// udp backend to go on at once. Nothing for other backends, whose packets the kernel carries meanwhile.
    ///
    /// `pods` are those of the records: also what is left of an earlier lease's is to be carried.
    pub async fn inputs(&self, config: &Config, pods: impl FnOnce() -> PodNeeds) -> Option<Inputs> {
        let saved = self.saved.as_ref()?;
        let network = &saved.snapshot.network;
        let BackendConfig::Udp(_) = &network.backend else { return None };
        // Whatever is wrong with the underlay is said by those who wait for it.
        let underlay = find_underlay(config.underlay.clone(), None).await.ok()?;
        fits(network, &underlay).ok()?;
        // No device of this backend bears it.
        let vtep_mac = Mac::local_unicast([0; 6]);
        let backend = Backend::new(network, vtep_mac);
        let mut table = LeaseTable::new(network.clone(), config.expired_peer_grace);
        saved.recall(&mut table, &backend);
        let peers = table.peers().cloned().collect();
        let node = NodeInputs {
            config: network.clone(),
            backend,
            vtep_mac,
            lease: saved.own.key,
            underlay,
            first_start: false,
        };
        Some(Inputs { node: Some(node), peers, pods: pods(), ..Inputs::default() })
    }
}

impl Saved {
    fn recall(&self, table: &mut LeaseTable, backend: &Backend) {
        let attrs = backend.plane().lease_attrs(self.own.public_ip);
        let own = Lease { key: self.own.key, attrs, create_revision: 0 };
        table.recall(own, self.snapshot.peers.clone());
    }
}

/// What bringing up begins with.
struct Start {
    network: NetworkConfig,
    /// What fits it of what was told last.
    saved: Option<Saved>,
    /// The store has told it just now; or whoever keeps it where the store does not.
    told: bool,
}

/// The network configuration from the store; where that gives none and this node has been here before, the one it had.
async fn start(
    node: &Node,
    config: &Config,
    saved: Option<Saved>,
    health: &watch::Sender<StoreHealth>,
) -> Start {
    node.wait_for(None, format!("the network configuration from {}", node.store.location()));
    let refused = Notify::new();
    let from_store = wait_for_config(&*node.store, |problem| {
        if let Some(problem) = problem {
            node.wait_for(None, format!("the network configuration: {problem}"));
            refused.notify_one();
        }
        heard(health, &*node.store, problem);
    });
    let Some(saved) = saved else {
        return Start { network: from_store.await, saved: None, told: true };
    };
    let network = tokio::select! {
        biased;
        network = from_store => network,
        () = refused.notified() => {
            let age = Recalled { saved: saved.at }.age(SystemTime::now()).as_secs();
            warn!(saved_seconds_ago = age, own = %saved.own.key, peers = saved.snapshot.peers.len(),
                "the store gives no configuration: going on with what it said last");
            return Start { network: saved.snapshot.network.clone(), saved: Some(saved), told: false };
        }
    };
    let changes = needs_restart(&saved.snapshot.network, &network);
    if changes.is_empty() {
        return Start { network, saved: Some(saved), told: true };
    }
    snapshot_file(config).0.set_aside("other-network", &changes.join("; "));
    Start { network, saved: None, told: true }
}

/// How the underlay is to be found.
struct Chosen {
    choice: UnderlayChoice,
    /// What was saved, if the store has not told.
    saved: Option<Saved>,
    /// The store has said what public IP an operator wishes.
    told: bool,
}

/// With the public IP that an operator has written beside this node, in place of the option's. A store that keeps its
/// configuration elsewhere is asked here for the first time: a node that goes on without it keeps the address that it was
/// leased with, if that is still one it can have, until it is told.
async fn choice(
    node: &Node,
    given: &UnderlayChoice,
    start: Start,
    health: &watch::Sender<StoreHealth>,
) -> Chosen {
    let Start { network, saved, told } = start;
    let mut backoff = Backoff::new(WISH_RETRY.0, WISH_RETRY.1);
    loop {
        let error = match node.store.public_ip_wish().await {
            Ok(wish) => {
                let choice = with_wish(given, wish, PublicIpFrom::Node);
                return Chosen { choice, saved: saved.filter(|_| !told), told: true };
            }
            Err(error) => error,
        };
        heard(health, &*node.store, Some(&error));
        let away = matches!(error, StoreError::Unavailable { .. } | StoreError::Refused { .. });
        if let Some(saved) = saved.as_ref().filter(|_| away) {
            warn!(%error, own = %saved.own.key, peers = saved.snapshot.peers.len(),
                "the store does not answer: going on with what it said last");
            break;
        }
        node.wait_for(Some(network.clone()), format!("this node's entry in the store: {error}"));
        sleep(backoff.wait()).await;
    }
    let leased = saved.as_ref().map(|saved| saved.own.public_ip);
    let leased = with_wish(given, leased, PublicIpFrom::Lease);
    let usable = find_underlay(leased.clone(), None).await.is_ok();
    Chosen { choice: if usable { leased } else { given.clone() }, saved, told: false }
}

async fn wait_for_underlay(node: &Node, choice: &UnderlayChoice, network: &NetworkConfig) -> Underlay {
    let mut told = String::new();
    loop {
        let found = find_underlay(choice.clone(), None).await.map_err(|e| format!("{e:#}"));
        match found.and_then(|underlay| fits(network, &underlay).map(|()| underlay)) {
            Ok(underlay) => {
                info!(iface = %underlay.iface, address = %underlay.addr, public_ip = %underlay.public_ip,
                    mtu = underlay.mtu, chosen_by = %underlay.chosen_by, "underlay");
                return underlay;
            }
            Err(problem) => {
                node.wait_for(Some(network.clone()), problem.clone());
                if told != problem {
                    warn!(%problem, "no underlay yet");
                    told = problem;
                }
                sleep(UNDERLAY_RETRY).await;
            }
        }
    }
}

fn left_in(subnet_file: &Path) -> Option<LeaseKey> {
    previous_lease(&std::fs::read_to_string(subnet_file).ok()?)
}

/// The MAC that peers have in their tables: that of a device which can be taken over as it is, else the one this node
/// always had, else a new one.
async fn vtep_mac(network: &NetworkConfig, underlay: &Underlay, durable: Option<Mac>) -> anyhow::Result<Mac> {
    let (network, underlay) = (network.clone(), underlay.clone());
    let adopted = spawn_blocking(move || adoptable_mac(&network, &underlay)).await??;
    match adopted.or(durable) {
        Some(mac) => Ok(mac),
        None => {
            let mut bytes = [0; 6];
            std::fs::File::open("/dev/urandom")?
                .read_exact(&mut bytes)
                .context("random bytes for the VTEP MAC")?;
            Ok(Mac::local_unicast(bytes))
        }
    }
}

fn adoptable_mac(network: &NetworkConfig, underlay: &Underlay) -> Result<Option<Mac>, KernelError> {
    let BackendConfig::Vxlan(wanted) = &network.backend else {
        return Ok(None);
    };
    let (links, _) = LinuxKernel::open()?.links_and_addrs()?;
    let found = links.get(&wanted.device()).map(|found| &found.link);
    Ok(found.and_then(|link| match &link.kind {
        LinkKind::Vxlan(have) => {
            let same = (have.vni, have.port) == (wanted.vni, wanted.port)
                && have.underlay == underlay.index
                && have.local == IpAddr::from(underlay.addr);
            same.then(|| link.mac.value())
        }
        _ => None,
    }))
}
