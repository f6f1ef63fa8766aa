//! What keeps a node that has been brought up: the one writer of its state.
//!
//! Lease, peers, configuration and underlay change while the agent runs; each change goes into the state, and what
//! follows from it follows by itself. subnet.env and durable state come after the kernel is right, readiness after
//! subnet.env: by whatever way it is learnt, who learns that the node is ready finds the file as it should be.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep_until;
use tracing::{info, warn};
use weft_shared::lease::LeaseKey;
use weft_shared::subnet_env::SubnetEnv;

use crate::durable::{Durable, DurableFile};
use crate::kernel::Neighbours;
use crate::lease::{KeeperHandle, LeaseState, LeaseStore, LeaseTable, LeaseUpdate, StoredConfig};
use crate::netconf::{ConfigNotice, needs_restart};
use crate::node::{Node, Serving};
use crate::notify::notify;
use crate::reconcile::Report;
use crate::underlay::{Underlay, UnderlayChoice, find_underlay, fits};

#[derive(Debug)]
pub struct Upkeep {
    node: Arc<Node>,
    table: LeaseTable,
    keeper: KeeperHandle,
    wished: watch::Receiver<Wished>,
    /// When what is wished is tried again.
    wish_again: Option<Instant>,
    files: Files,
    durable: Durable,
    announced: bool,
    /// Counts the leases for which everything has been put in place.
    available: watch::Sender<u64>,
    /// The last of them, and when it was made.
    available_for: Option<(LeaseKey, u64)>,
}

/// How the underlay is to be found. Changes only while a store that was away at the start has not said what public IP an
/// operator wishes.
#[derive(Debug, Clone)]
pub struct Wished {
    pub choice: UnderlayChoice,
    /// Why the store cannot say it, where it is the operator who can mend that.
    pub problem: Option<String>,
}

/// An address may be added after it is wished.
const WISH_RETRY: Duration = Duration::from_secs(5);

/// Where the node leaves what others read, itself among them.
#[derive(Debug)]
pub struct Files {
    pub durable: DurableFile,
    pub subnet_env: PathBuf,
    /// What the latter says of masquerade.
    pub ip_masq: bool,
}

impl Files {
    pub async fn save(&self, durable: Durable) {
        let file = self.durable.clone();
        if let Err(error) = on_disk(move || file.save(&durable)).await {
            warn!(%error, "durable state cannot be written: a reboot may cost this node its subnet and its MAC");
        }
    }

    /// Unless it is what stands there already; whether anything was written.
    async fn save_subnet(&self, env: &SubnetEnv, written: bool) -> io::Result<bool> {
        let (file, env) = (self.subnet_env.clone(), env.clone());
        on_disk(move || {
            let due = !written || !file.exists();
            if due { env.write(&file).map(|()| true) } else { Ok(false) }
        })
        .await
    }
}

/// A slow disk holds up the one thread of everything else no longer than memory does.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.unwrap_or_else(|panic| Err(io::Error::other(panic)))
}

impl Upkeep {
    pub fn new(
        node: Arc<Node>,
        table: LeaseTable,
        keeper: KeeperHandle,
        wished: watch::Receiver<Wished>,
        files: Files,
        durable: Durable,
        available: watch::Sender<u64>,
    ) -> Self {
        let (announced, available_for, wish_again) = (false, None, None);
        Self { node, table, keeper, wished, wish_again, files, durable, announced, available, available_for }
    }

    /// Ends only with what feeds it.
    pub async fn run(mut self, mut updates: mpsc::Receiver<LeaseUpdate>) -> anyhow::Result<()> {
        let mut lease = self.keeper.state.clone();
        let mut reports = self.node.reconcile.reports();
        loop {
            tokio::select! {
                update = updates.recv() => {
                    let mut update = Some(update.context("the watch over leases ended")?);
                    let mut changed = false;
                    // Judging all leases costs as much for one change as for all that are waiting.
                    while let Some(next) = update {
                        changed |= self.take_in(next);
                        update = updates.try_recv().ok();
                    }
                    if changed {
                        self.peers_changed();
                    }
                }
                () = reached(self.table.next_end()) => {
                    if self.table.pass_time(Instant::now()) {
                        self.peers_changed();
                    }
                }
                changed = lease.changed() => {
                    changed.context("the lease keeper ended")?;
                    let state = lease.borrow_and_update().clone();
                    self.lease_changed(state).await;
                }
                Ok(()) = self.wished.changed() => self.meet_wish().await,
                () = reached(self.wish_again) => self.meet_wish().await,
                changed = reports.changed() => {
                    changed.context("the reconciler ended")?;
                    let report = reports.borrow_and_update().clone();
                    self.look_after_underlay(&report).await;
                    self.watch_neighbours(&report);
                }
            }
            // Also what changes nothing in the kernel can be the last that was missing: a lease that is confirmed.
            let report = reports.borrow().clone();
            self.tell(&report).await;
        }
    }

    /// Whether peers may be different now.
    fn take_in(&mut self, update: LeaseUpdate) -> bool {
        self.keeper.observe(&update);
        if let LeaseUpdate::Config(stored) = &update {
            self.config_changed(stored);
        }
        self.table.apply(update, Instant::now())
    }

    async fn lease_changed(&mut self, state: LeaseState) {
        let held = state.held().map(|held| held.lease.clone());
        if let Some(own) = &held {
            self.table.set_own(Some(own));
        }
        self.node.update(|serving| serving.lease = state);
        let Some(own) = held else { return };
        self.peers_changed();
        let known = (Some(own.key), Some(own.attrs.public_ip));
        if (self.durable.lease, self.durable.public_ip) != known {
            (self.durable.lease, self.durable.public_ip) = known;
            self.files.save(self.durable).await;
        }
    }

    fn peers_changed(&self) {
        self.node.update(|serving| {
            serving.take_peers(&self.table);
            if serving.has_snapshot && serving.recalled.take().is_some() {
                info!(peers = serving.peers.len(), "the store has told: no longer on what was saved");
            }
        });
    }

    /// What can change under a running node is applied, anything else is said and nothing torn down.
    fn config_changed(&self, stored: &StoredConfig) {
        self.node.update(|serving| {
            let notice = match stored {
                StoredConfig::Valid(config) => match needs_restart(&serving.config, config) {
                    changes if changes.is_empty() => {
                        if serving.config != *config {
                            let (range, backend) = (&config.v4, &config.backend);
                            info!(first = %range.min, last = %range.max, %backend, "network configuration taken over");
                            serving.config.clone_from(config);
                        }
                        None
                    }
                    changes => Some(ConfigNotice::Differs(changes)),
                },
                StoredConfig::Invalid(error) => Some(ConfigNotice::Invalid(error.to_string())),
                StoredConfig::Missing => {
                    Some(ConfigNotice::Missing("the store has no network configuration".into()))
                }
            };
            if serving.config_notice != notice {
                match &notice {
                    Some(notice) => warn!(%notice, "network configuration"),
                    None => info!("the store's network configuration is the one in force"),
                }
            }
            serving.config_notice = notice;
        });
    }

    /// Keeps the underlay while it is there, and chooses anew when it is not: peers hear of it through the lease.
    async fn look_after_underlay(&self, report: &Report) {
        let Some((current, known_problem)) =
            self.node.serving(|serving| (serving.underlay.clone(), serving.underlay_problem.clone()))
        else {
            return;
        };
        if !report.underlay_lost {
            let seen = report.underlay.clone().filter(|seen| {
                (&seen.iface, seen.addr, seen.public_ip) == (&current.iface, current.addr, current.public_ip)
            });
            // An interface that was removed and is back has another index.
            if known_problem.is_some() || seen.as_ref().is_some_and(|seen| *seen != current) {
                self.node.update(|serving| {
                    serving.underlay_problem = None;
                    serving.underlay = seen.unwrap_or(current);
                });
            }
            return;
        }
        match self.choose_underlay(&current, true).await {
            Err(problem) if known_problem.as_ref() != Some(&problem) => {
                warn!(%problem, "the underlay is gone");
                self.node.update(|serving| serving.underlay_problem = Some(problem));
            }
            _ => {}
        }
    }

    /// What is wished late: as a start would have chosen, but what peers have already moves nothing.
    async fn meet_wish(&mut self) {
        self.wish_again = None;
        let Some((current, known_problem)) =
            self.node.serving(|serving| (serving.underlay.clone(), serving.wish_problem.clone()))
        else {
            return;
        };
        let Wished { choice, mut problem } = self.wished.borrow_and_update().clone();
        let is_met = choice.public_ip.unwrap_or(current.addr) == current.public_ip;
        if problem.is_none() && !is_met {
            problem = self.choose_underlay(&current, false).await.err();
            self.wish_again = problem.is_some().then(|| Instant::now() + WISH_RETRY);
        }
        if problem != known_problem {
            if let Some(problem) = &problem {
                warn!(%problem, "the underlay stays as it is");
            }
            self.node.update(|serving| serving.wish_problem = problem);
        }
    }

    /// `keep` it, should it be there all the same. Changes nothing if none can be had.
    async fn choose_underlay(&self, current: &Underlay, keep: bool) -> Result<(), String> {
        let choice = self.wished.borrow().choice.clone();
        let found = find_underlay(choice, keep.then(|| current.clone())).await;
        let new = found.map_err(|e| format!("{e:#}"))?;
        self.node.serving(|serving| fits(&serving.config, &new)).unwrap_or(Ok(()))?;
        let of = |u: &Underlay| (u.iface.clone(), u.addr, u.public_ip);
        if of(&new) != of(current) {
            info!(iface = %new.iface, address = %new.addr, public_ip = %new.public_ip, mtu = new.mtu,
                chosen_by = %new.chosen_by, "underlay changed");
        }
        if new.addr != current.addr {
            self.node.store.reconnect();
        }
        self.node.update(|serving| {
            self.keeper.publish(serving.backend.plane().lease_attrs(new.public_ip));
            serving.underlay = new;
            serving.underlay_problem = None;
        });
        // It may be as it was before the pass that missed it.
        self.node.reconcile.wake();
        Ok(())
    }

    fn watch_neighbours(&self, report: &Report) {
        let Some(monitor) = &self.node.monitor else { return };
        let device = self.node.serving(|serving| serving.backend.plane().device().cloned()).flatten();
        // Without a device there are none to watch; before it exists, any might be on it.
        monitor.watch(match device {
            None => Neighbours::None,
            Some(device) => {
                report.devices.get(&device).map_or(Neighbours::All, |d| Neighbours::Of(d.ifindex))
            }
        });
    }

    /// subnet.env after the kernel is right, readiness after subnet.env.
    async fn tell(&mut self, report: &Report) {
        let env = self.node.serving(|serving| {
            let carried = self.node.path.obstacle(&serving.config.backend).is_none();
            subnet_env(serving, report, self.files.ip_masq).filter(|_| carried)
        });
        let Some(env) = env.flatten() else { return };
        let told = self.node.serving(|serving| serving.told.as_ref() == Some(&env)) == Some(true);
        let file = self.files.subnet_env.display();
        let saved = self.files.save_subnet(&env, told).await;
        match &saved {
            Ok(false) => {}
            Ok(true) => {
                info!(%file, subnet = %env.subnet, mtu = env.mtu, "subnet file written");
            }
            // The next pass comes with the next sweep, and tries again.
            Err(error) => warn!(%file, %error, "subnet file cannot be written"),
        }
        if saved.is_ok() && !told {
            self.node.update(|serving| serving.told = Some(env));
        }
        // What has been told of the network went with whatever an earlier lease belonged to.
        let held = self.keeper.state.borrow().held().map(|held| (held.lease.key, held.lease.create_revision));
        if saved.is_ok() && held.is_some() && self.available_for != held {
            self.available_for = held;
            self.available.send_modify(|leases| *leases += 1);
        }
        if saved.is_ok() && !std::mem::replace(&mut self.announced, true) {
            info!("ready: pods can be added");
            if let Err(error) = notify(std::env::var_os("NOTIFY_SOCKET").as_deref(), "READY=1") {
                warn!(%error, "the service manager could not be told");
            }
        }
    }
}

/// Never, when there is no such moment.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// What flannel's plugin and docker are told; nothing while no pod could be added.
fn subnet_env(serving: &Serving, report: &Report, ip_masq: bool) -> Option<SubnetEnv> {
    let in_place = report.usable && serving.peers_in_place(report) && report.underlay.is_some();
    let key = serving.key_for_pods(SystemTime::now()).ok().filter(|_| in_place)?;
    Some(SubnetEnv {
        network: serving.config.v4.network,
        subnet: key.v4,
        ipv6: None,
        mtu: serving.pod_mtu(report),
        ip_masq,
    })
}
