//! The composition root: builds every part, connects them, and decides what ends the agent. Only here do the pure and
//! the effectful sides meet.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weft_shared::names::RUN_DIR;
use weft_shared::netconf::EXAMPLE;

use crate::alone;
use crate::before::Before;
use crate::bringup::{Memory, bring_up, snapshot_file};
use crate::config::{Config, StoreConfig};
use crate::durable::snapshot::{Pace, save_changes};
use crate::ipam::{self, Boottime, Ipam};
use crate::kernel::{LinuxKernel, Monitor, Remembering};
use crate::lease::{EmbeddedStore, EtcdStore, LeaseStore, Store, StoreError, StoreHealth};
use crate::metrics::Metrics;
use crate::node::{Node, NodeFabric};
use crate::packet_path::{PacketPath, keep_packet_path};
use crate::pods::{PodNeeds, SeenVeths};
#[cfg(feature = "kube")]
use crate::policies::{self, Asked};
use crate::reconcile::{Handle, Inputs};
use crate::server::admin::{Admin, AdminState};
use crate::server::cni::{Limits, Server};
use crate::status::Status;

/// What is still under way when the agent is told to stop has this long.
const DRAIN: Duration = Duration::from_secs(8);

/// Runs until `stop`; the kernel stays as it is, so that pods go on and the next agent finds everything.
pub async fn run(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    info!(version = env!("CARGO_PKG_VERSION"), node = %config.node_name, "weftd starts");
    // Before anything is made or written that another agent may be using.
    let place = alone::wait_for_place().await.context("the name that keeps a second weftd out")?;
    let _place = place
        .context("another weftd runs in this network namespace: stop it first (systemctl stop weftd)")?;
    let config = Arc::new(config);
    // Records and sockets in it are nobody else's business.
    DirBuilder::new().recursive(true).mode(0o700).create(&config.run_dir).with_context(|| {
        format!("--run-dir = {}: expected a directory, or a place to make one", config.run_dir.display())
    })?;
    // A kubelet makes it open to readers. Under another name it may be anybody's, such as /run.
    if config.run_dir == Path::new(RUN_DIR) && config.run_dir.symlink_metadata().is_ok_and(|m| m.is_dir()) {
        fs::set_permissions(&config.run_dir, Permissions::from_mode(0o700))
            .with_context(|| format!("--run-dir = {RUN_DIR}"))?;
    }
    // First of all: where packets are carried by threads of ours, nobody has carried them since the last agent's end.
    let memory = Memory::load(&config)?;
    let path = PacketPath::new(config.udp_offloads.clone());
    let ipam_config = ipam::Config::new(&config.run_dir, &config.cni_socket).context("this boot's id")?;
    if let Some(inputs) = memory.inputs(&config, || ipam::recorded_needs(&ipam_config, Boottime::now())).await
    {
        path.follow(&inputs);
    }
    let store = Arc::new(open_store(&config.store).await?);
    if store.one_machine_only() {
        warn!("the embedded store serves the agents of one machine only");
    }
    let kernel =
        LinuxKernel::open().context("a netlink socket cannot be opened")?.with_sysctls_in(&config.sysctl_dir);
    let before = weft_shared::tombstone::boot_id().and_then(|boot| Before::load(&config.run_dir, &boot));
    let before = before.with_context(|| format!("--run-dir = {}", config.run_dir.display()))?;
    let inputs = Inputs { firewall: config.firewall.clone(), ..Inputs::default() };
    let reconcile = Handle::start(Remembering::new(kernel, before), inputs, config.resync)
        .context("the reconcile thread")?;
    let monitor = config.netlink_monitor.then(|| start_monitor(&reconcile)).flatten();

    let (needs_sender, pod_needs) = watch::channel(PodNeeds::default());
    let (seen_sender, seen) = watch::channel(SeenVeths::default());
    let (health_sender, health) = watch::channel(StoreHealth::default());
    let name = config.node_name.clone();
    let node = Arc::new(Node::new(name, store, health, reconcile.clone(), pod_needs, monitor, path));

    let clock = Box::new(Boottime::now);
    let ipam = Ipam::open(ipam_config, clock, NodeFabric(node.clone()), needs_sender, seen)?;
    let admin = Admin::bind(config.admin_listen, &config.admin_socket).await?;
    let status_source = {
        let (node, ipam, port_problem) = (node.clone(), ipam.clone(), admin.port_problem());
        Arc::new(move || Status { port_problem: port_problem.borrow().clone(), ..node.status(ipam.status()) })
    };
    let server = Server::bind(&config.cni_socket, ipam.clone(), Limits::default()).await?;

    let mut tasks = JoinSet::new();
    let metrics = Arc::new(Metrics::new(status_source.clone()));
    let admin_state = AdminState { status: status_source, metrics };
    tasks.spawn(ended("admin", admin.serve(admin_state, stop.clone())));
    tasks.spawn(ended("cni socket", server.run(stop.clone())));
    let (keeper, stopped) = (ipam.clone(), stop.clone());
    tasks.spawn(ended("records", async move { keeper.keep_records(stopped).await }));
    tasks.spawn(ended("address management", ipam.run(stop.clone())));
    tasks.spawn(ended("what pods need", pass_on_pod_needs(node.clone(), stop.clone())));
    tasks.spawn(ended("seen veths", pass_on_seen(reconcile.clone(), seen_sender, stop.clone())));
    tasks.spawn(ended("packet path", keep_packet_path(node.clone(), stop.clone())));
    #[cfg(feature = "kube")]
    if let (Store::Kube(kube), StoreConfig::Kube(settings)) = (&*node.store, &config.store)
        && let Some(period) = settings.policy_check
    {
        node.set_network_policies(Asked::default());
        let task = policies::keep(kube.clone(), period, node.clone(), stop.clone());
        tasks.spawn(ended("network policies", task));
    }
    let (file, store) = snapshot_file(&config);
    let current = {
        let node = node.clone();
        move || node.serving(|serving| serving.snapshot(&store)).flatten()
    };
    tasks
        .spawn(ended("snapshot", save_changes(file, Pace::default(), current, node.changes(), stop.clone())));
    let fatal = {
        let (node, config, stop) = (node.clone(), config.clone(), stop.clone());
        async move {
            tokio::select! {
                result = bring_up(node, config, memory, health_sender) => result,
                () = stop.cancelled() => Ok(()),
            }
        }
    };
    let result = tokio::select! {
        result = fatal => result,
        Some(task) = tasks.join_next(), if !stop.is_cancelled() => match task {
            Ok(name) if !stop.is_cancelled() => Err(anyhow::anyhow!("{name} ended by itself")),
            Ok(_) => Ok(()),
            Err(panic) => Err(panic.into()),
        },
    };
    stop.cancel();
    let drained = tokio::time::timeout(DRAIN, async { while tasks.join_next().await.is_some() {} });
    if drained.await.is_err() {
        warn!(seconds = DRAIN.as_secs(), "stopping although not everything has ended");
    }
    reconcile.stop();
    node.path.stop();
    info!("weftd stops; devices, routes and addresses stay");
    result
}

async fn ended<T>(name: &'static str, task: impl Future<Output = T>) -> &'static str {
    task.await;
    name
}

async fn open_store(config: &StoreConfig) -> anyhow::Result<Store> {
    match config {
        StoreConfig::Etcd(etcd) => Ok(Store::Etcd(EtcdStore::new(etcd)?)),
        StoreConfig::Embedded(embedded) => {
            let store = EmbeddedStore::new(&embedded.file);
            if let Some(file) = &embedded.net_config {
                put_config_if_missing(&store, file).await?;
            }
            Ok(Store::Embedded(store))
        }
        #[cfg(feature = "kube")]
        StoreConfig::Kube(kube) => Ok(Store::Kube(crate::lease::KubeStore::new(kube))),
    }
}

async fn put_config_if_missing(store: &EmbeddedStore, file: &Path) -> anyhow::Result<()> {
    let wrong = |expected: &str| format!("--net-config = {}: expected {expected}", file.display());
    let json = std::fs::read_to_string(file).with_context(|| wrong("a readable file"))?;
    match store.network_config().await {
        Err(StoreError::NoConfig { .. }) => {}
        Err(other) => return Err(other.into()),
        Ok(_) => return Ok(()),
    }
    match store.put_config(&json).await {
        Err(StoreError::BadConfig(error)) => {
            Err(error).with_context(|| wrong(&format!("a network configuration such as {EXAMPLE}")))
        }
        other => Ok(other?),
    }
}

/// Without announcements the sweep still repairs everything, later.
fn start_monitor(reconcile: &Handle) -> Option<Monitor> {
    let reconcile = reconcile.clone();
    match Monitor::start(Arc::new(move || reconcile.wake())) {
        Ok(monitor) => Some(monitor),
        Err(error) => {
            warn!(%error, "no netlink monitor: changes are found by the sweep alone");
            None
        }
    }
}

/// What pods need becomes desired state.
async fn pass_on_pod_needs(node: Arc<Node>, stop: CancellationToken) {
    let mut needs = node.pod_needs.clone();
    loop {
        node.pass_on_pod_needs();
        tokio::select! {
            changed = needs.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

/// What passes see of pods' veths goes to address management.
async fn pass_on_seen(reconcile: Handle, seen: watch::Sender<SeenVeths>, stop: CancellationToken) {
    let mut reports = reconcile.reports();
    loop {
        let veths = reports.borrow_and_update().veths.clone();
        seen.send_if_modified(|old| {
            let newer = veths.pass != old.pass;
            if newer {
                *old = veths;
            }
            newer
        });
        tokio::select! {
            changed = reports.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}
