//! From nothing to a node that serves pods, and what keeps it one: configuration, underlay, VTEP MAC, lease, first
//! pass, subnet.env, READY. Every step waits for as long as it takes and says what for; none ends the process.

use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep;
use tracing::{info, warn};
use weft_shared::Mac;
use weft_shared::lease::LeaseKey;
use weft_shared::netconf::{BackendConfig, NetworkConfig, VxlanConfig};
use weft_shared::subnet_env::{SubnetEnv, previous_lease};

use crate::config::Config;
use crate::dataplane::Backend;
use crate::durable::{Durable, DurableFile};
use crate::kernel::{FoundAddr, KernelError, LinuxKernel, Neighbours};
use crate::lease::{
    AcquireRequest, Keeper, KeeperHandle, LeaseState, LeaseStore, LeaseTable, LeaseUpdate, StoreError,
    StoreHealth, wait_for_config,
};
use crate::node::{Node, Served, Stage};
use crate::notify::notify;
use crate::object::LinkKind;
use crate::reconcile::{NodeInputs, Report};
use crate::underlay::{
    HostAddr, HostIface, HostNetwork, ReachRoute, Underlay, UnderlayChoice, choose_underlay,
};

const UNDERLAY_RETRY: Duration = Duration::from_secs(1);
/// Updates of the watch under way: a snapshot is one.
const UPDATES: usize = 1024;

/// Runs for as long as the agent does.
pub async fn bring_up(
    node: Arc<Node>,
    config: Arc<Config>,
    health: watch::Sender<StoreHealth>,
) -> anyhow::Result<()> {
    let store = node.store.location();
    node.wait_for(None, format!("the network configuration from {store}"));
    let network = wait_for_config(&*node.store, |problem| {
        if let Some(problem) = problem {
            node.wait_for(None, format!("the network configuration: {problem}"));
        }
        // A store that says no answers.
        let silence =
            problem.filter(|p| matches!(p, StoreError::Unavailable { .. })).map(ToString::to_string);
        health.send_modify(|health| {
            health.connected = silence.is_none();
            health.problem = silence;
        });
    })
    .await;

    let mut told = String::new();
    let underlay = loop {
        let found = find_underlay(config.underlay.clone()).await;
        match found.and_then(|underlay| fits(&network, &underlay).map(|()| underlay)) {
            Ok(underlay) => break underlay,
            Err(problem) => {
                let problem = problem.to_string();
                node.wait_for(Some(network.clone()), problem.clone());
                if told != problem {
                    warn!(%problem, "no underlay yet");
                    told = problem;
                }
                sleep(UNDERLAY_RETRY).await;
            }
        }
    };
    info!(iface = %underlay.iface, address = %underlay.addr, public_ip = %underlay.public_ip, mtu = underlay.mtu,
        chosen_by = %underlay.chosen_by, "underlay");

    let file = DurableFile::in_dir(&config.state_dir);
    let durable = file.load().with_context(|| format!("durable state in {}", config.state_dir.display()))?;
    let first_start = durable.is_none();
    let mut durable = durable.unwrap_or_default();
    let vtep_mac = vtep_mac(&network, &underlay, durable.vtep_mac).await?;
    durable.vtep_mac = Some(vtep_mac);
    save(&file, &durable);

    let backend = Backend::new(&network, vtep_mac);
    let previous = durable.lease.or_else(|| left_in(&config.subnet_file));
    let want = AcquireRequest {
        config: network.clone(),
        attrs: backend.plane().lease_attrs(underlay.public_ip),
        previous,
        ttl: config.lease_ttl,
    };
    let (keeper, handle) = Keeper::new(node.store.clone(), want, config.renew_margin);
    node.facts().stage = Stage::Up(Box::new(Served {
        config: network.clone(),
        underlay: underlay.clone(),
        backend: backend.clone(),
        lease: handle.state.clone(),
    }));
    let (sender, updates) = mpsc::channel(UPDATES);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { match keeper.run().await {} });
    let store = node.store.clone();
    tasks.spawn(async move { store.watch(sender, health).await });
    let upkeep = Upkeep {
        table: LeaseTable::new(network.clone()),
        node: node.clone(),
        network,
        backend,
        underlay,
        subnet_file: config.subnet_file.clone(),
        file,
        durable,
        first_start,
        written: None,
        announced: false,
    };
    tokio::select! {
        ended = upkeep.run(handle, updates) => ended,
        task = tasks.join_next() => anyhow::bail!("the lease keeper or the watch ended: {task:?}"),
    }
}

/// Keeps inputs, subnet.env and durable state in step with lease, peers and passes.
struct Upkeep {
    node: Arc<Node>,
    table: LeaseTable,
    network: NetworkConfig,
    backend: Backend,
    underlay: Underlay,
    subnet_file: PathBuf,
    file: DurableFile,
    durable: Durable,
    first_start: bool,
    written: Option<SubnetEnv>,
    announced: bool,
}

impl Upkeep {
    async fn run(
        mut self,
        handle: KeeperHandle,
        mut updates: mpsc::Receiver<LeaseUpdate>,
    ) -> anyhow::Result<()> {
        let mut lease = handle.state.clone();
        let mut reports = self.node.reconcile.reports();
        loop {
            tokio::select! {
                update = updates.recv() => {
                    let mut update = Some(update.context("the watch over leases ended")?);
                    let mut changed = false;
                    // Judging all leases costs as much for one change as for all that are waiting.
                    while let Some(next) = update {
                        handle.observe(&next);
                        changed |= self.table.apply(next);
                        update = updates.try_recv().ok();
                    }
                    if changed {
                        self.pass_on_peers();
                    }
                }
                changed = lease.changed() => {
                    changed.context("the lease keeper ended")?;
                    let state = lease.borrow_and_update().clone();
                    self.lease_changed(&state);
                }
                changed = reports.changed() => {
                    changed.context("the reconciler ended")?;
                    let report = reports.borrow_and_update().clone();
                    self.report_changed(&report, &handle.state.borrow().clone());
                }
            }
        }
    }

    fn lease_changed(&mut self, state: &LeaseState) {
        let Some(held) = state.held() else { return };
        self.table.set_own(Some(&held.lease));
        self.pass_on_peers();
        let inputs = NodeInputs {
            config: self.network.clone(),
            backend: self.backend.clone(),
            lease: held.lease.key,
            underlay: self.underlay.clone(),
            first_start: self.first_start,
        };
        self.node.reconcile.update_if(|all| {
            let changed = all.node.as_ref().is_none_or(|node| node.lease != inputs.lease);
            all.node = Some(inputs);
            changed
        });
        if self.durable.lease != Some(held.lease.key) {
            self.durable.lease = Some(held.lease.key);
            save(&self.file, &self.durable);
        }
    }

    fn pass_on_peers(&self) {
        let peers: Vec<_> = self.table.peers().cloned().collect();
        let has_snapshot = self.table.has_snapshot();
        {
            let mut facts = self.node.facts();
            facts.peers.clone_from(&peers);
            facts.refused = self.table.refused();
        }
        self.node.reconcile.update_if(|inputs| {
            let changed = inputs.peers != peers || inputs.has_snapshot != has_snapshot;
            inputs.peers = peers;
            inputs.has_snapshot = has_snapshot;
            changed
        });
    }

    /// subnet.env after the kernel is right, READY after subnet.env.
    fn report_changed(&mut self, report: &Report, lease: &LeaseState) {
        if let Some(monitor) = &self.node.monitor {
            monitor.watch(self.neighbours(report));
        }
        let (Some(held), Some(underlay)) = (lease.held(), &report.underlay) else { return };
        if !(report.usable && report.after_snapshot) {
            return;
        }
        let env = SubnetEnv {
            network: self.network.v4.network,
            subnet: held.lease.key.v4,
            ipv6: None,
            mtu: self.backend.plane().pod_mtu(underlay.mtu),
            ip_masq: false,
        };
        if self.written.as_ref() != Some(&env) || !self.subnet_file.exists() {
            let file = self.subnet_file.display();
            if let Err(error) = env.write(&self.subnet_file) {
                // The next pass comes with the next sweep, and tries again.
                warn!(%file, %error, "subnet file cannot be written");
                return;
            }
            info!(%file, subnet = %env.subnet, mtu = env.mtu, "subnet file written");
            self.written = Some(env);
        }
        if !std::mem::replace(&mut self.announced, true) {
            info!("ready: pods can be added");
            if let Err(error) = notify(std::env::var_os("NOTIFY_SOCKET").as_deref(), "READY=1") {
                warn!(%error, "the service manager could not be told");
            }
        }
    }

    /// Without a device there are none to watch; before it exists, any might be on it.
    fn neighbours(&self, report: &Report) -> Neighbours {
        match self.backend.plane().device() {
            None => Neighbours::None,
            Some(device) => report.devices.get(device).map_or(Neighbours::All, |d| Neighbours::Of(d.ifindex)),
        }
    }
}

fn save(file: &DurableFile, durable: &Durable) {
    if let Err(error) = file.save(durable) {
        warn!(%error, "durable state cannot be written: a reboot may cost this node its subnet and its MAC");
    }
}

fn left_in(subnet_file: &Path) -> Option<LeaseKey> {
    previous_lease(&std::fs::read_to_string(subnet_file).ok()?)
}

/// What the kernel knows, handed to the choice.
async fn find_underlay(choice: UnderlayChoice) -> anyhow::Result<Underlay> {
    spawn_blocking(move || {
        let host = host_network(&mut LinuxKernel::open()?, choice.can_reach.map(IpAddr::from))?;
        Ok(choose_underlay(&choice, &host)?)
    })
    .await?
}

/// Whether the overlay can stand on this underlay.
fn fits(network: &NetworkConfig, underlay: &Underlay) -> anyhow::Result<()> {
    let (overlay, iface, addr, mtu) = (network.v4.network, &underlay.iface, underlay.addr, underlay.mtu);
    anyhow::ensure!(
        !overlay.contains(addr.into()),
        "underlay {iface} has {addr}, which lies in the overlay's Network {overlay}: expected an interface of the \
         network between the nodes (--iface), or another Network"
    );
    if let BackendConfig::Vxlan(VxlanConfig { mtu: Some(wanted), .. }) = &network.backend {
        anyhow::ensure!(*wanted <= mtu, "Backend.MTU = {wanted}: expected at most {mtu}, the MTU of {iface}");
    }
    Ok(())
}

fn host_network(kernel: &mut LinuxKernel, reach: Option<IpAddr>) -> Result<HostNetwork, KernelError> {
    let (links, addrs) = kernel.links_and_addrs()?;
    let host_addr = |found: &FoundAddr| HostAddr {
        addr: found.addr,
        scope: found.scope,
        deprecated: found.deprecated,
        dynamic: found.dynamic,
        temporary: found.temporary,
    };
    let ifaces = links.iter().map(|(name, found)| HostIface {
        index: found.index,
        name: name.clone(),
        mtu: found.link.mtu,
        up: found.link.up,
        addrs: addrs.iter().filter(|a| a.dev == *name).map(host_addr).collect(),
    });
    let reach = match reach {
        Some(ip) => kernel.route_to(ip)?.map(|(index, source)| ReachRoute {
            index,
            source: source.and_then(|ip| match ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            }),
        }),
        None => None,
    };
    Ok(HostNetwork { ifaces: ifaces.collect(), default_route: kernel.default_route()?, reach })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_that_cannot_stand_on_its_underlay_is_refused() {
        let underlay = |addr: &str| Underlay {
            iface: "eth0".parse().expect("name"),
            index: 3,
            addr: addr.parse().expect(addr),
            mtu: 1500,
            public_ip: addr.parse().expect(addr),
            chosen_by: "a test".into(),
        };
        let config = |mtu: &str| {
            let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"{mtu}}}}}"#);
            NetworkConfig::parse(&json).expect("valid")
        };
        assert!(fits(&config(""), &underlay("192.0.2.1")).is_ok());
        assert!(fits(&config(r#","MTU":1500"#), &underlay("192.0.2.1")).is_ok());
        for (mtu, addr, expected) in [
            ("", "10.5.3.1", "eth0 has 10.5.3.1, which lies in the overlay's Network 10.5.0.0/16"),
            (r#","MTU":1501"#, "192.0.2.1", "Backend.MTU = 1501: expected at most 1500, the MTU of eth0"),
        ] {
            let error = fits(&config(mtu), &underlay(addr)).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
