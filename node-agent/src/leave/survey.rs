//! The look at a node: what of weft is on it, what stays, what stands in the way. Nothing is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;

use weft_shared::lease::LeaseKey;
use weft_shared::names::VETH_GROUP;
use weft_shared::subnet_env::previous_lease;
use weft_shared::tombstone::boot_id;
use weft_shared::{IfName, Mac};

use super::{LeaveError, Plan, Thing, Wishes, files, open_store, running};
use crate::before::Before;
use crate::config::{Config, StoreConfig};
use crate::durable::{Durable, DurableFile};
use crate::firewall;
use crate::firewall::legacy::LegacyFilter;
use crate::kernel::{FoundLink, Kernel, KernelError, LinuxKernel};
use crate::lease::{EmbeddedStore, LeaseStore};
use crate::object::{LinkKind, Object};

pub fn survey(config: &Config, wishes: &Wishes) -> Result<Plan, LeaveError> {
    let mut refusals = Vec::new();
    let guards = running::keep_out(config, &mut refusals);
    let at = |path: &Path| {
        let path = path.to_owned();
        move |error| LeaveError::File { path, error }
    };
    let durable = DurableFile::in_dir(&config.state_dir).peek();
    let boot = boot_id().map_err(at(Path::new("/proc/sys/kernel/random/boot_id")))?;
    let before = Before::load(&config.run_dir, &boot).map_err(at(&config.run_dir))?;
    let mut kernel = LinuxKernel::open()?;
    let (mut things, mut stays) = (Vec::new(), Vec::new());

    let conflists = files::conflists(&wishes.cni_conf_dir, &config.cni_socket);
    things.extend(conflists.into_iter().map(Thing::Conflist));
    lease(config, wishes, &durable, &mut things, &mut stays)?;

    let (links, _) = kernel.links_and_addrs()?;
    let names: BTreeMap<u32, IfName> =
        links.iter().map(|(name, found)| (found.index, name.clone())).collect();
    things.extend(kernel.own_routes(&names)?.into_iter().map(Thing::Route));
    rules(config, &mut kernel, &mut things, &mut stays)?;
    let pods = devices(config, &links, durable.vtep_mac, &mut things, &mut stays);
    if !pods.is_empty() && !wishes.force {
        refusals.push(format!(
            "{} attached and would lose the network: {}. Remove them first, or say --force",
            if pods.len() == 1 { "1 pod is".to_owned() } else { format!("{} pods are", pods.len()) },
            pods.join(", ")
        ));
    }
    settings(&before, &mut kernel, &mut things, &mut stays)?;
    subnet_file(config, durable.lease, &mut things, &mut stays);
    store(config, wishes, durable.public_ip, &mut things, &mut stays, &mut refusals);
    let ours = [files::of_this_boot(config, before.file()), files::of_every_boot(config)];
    let spared = match &config.store {
        StoreConfig::Embedded(embedded) => vec![embedded.file.as_path()],
        StoreConfig::Etcd(_) => vec![],
    };
    for thing in ours.into_iter().flatten() {
        let foreign = files::foreign(&thing, &spared);
        stays.extend(foreign.iter().map(|path| format!("{}: not weft's", path.display())));
        things.push(thing);
    }
    Ok(Plan { things, stays, refusals, before, kernel, _guards: guards })
}

fn lease(
    config: &Config,
    wishes: &Wishes,
    durable: &Durable,
    things: &mut Vec<Thing>,
    stays: &mut Vec<String>,
) -> Result<(), LeaveError> {
    let (key, public_ip) = match (durable.lease, durable.public_ip) {
        (Some(key), Some(public_ip)) => (key, public_ip),
        _ if wishes.release_lease => {
            let dir = config.state_dir.display();
            stays.push(format!("a lease, if there is one: {dir} does not say which this node had"));
            return Ok(());
        }
        _ => return Ok(()),
    };
    let store = open_store(config)?;
    // To open it would make it.
    let is_there = match &config.store {
        StoreConfig::Embedded(embedded) => embedded.file.exists(),
        StoreConfig::Etcd(_) => true,
    };
    if wishes.release_lease && is_there {
        things.push(Thing::Lease { key, public_ip, store: Box::new(store) });
    } else if is_there {
        let location = store.location();
        stays.push(format!(
            "lease {key} in {location}: it expires by itself; --release-lease gives it back now"
        ));
    }
    Ok(())
}

/// Tables and accepts, whatever the settings say by now.
fn rules(
    config: &Config,
    kernel: &mut LinuxKernel,
    things: &mut Vec<Thing>,
    stays: &mut Vec<String>,
) -> Result<(), LeaveError> {
    let seen = match kernel.firewall(config.firewall.legacy_period) {
        // Where there is no packet filter nothing was put into it.
        Err(KernelError::NoNftables) => return Ok(()),
        other => other?,
    };
    if matches!(seen.legacy, LegacyFilter::Unreadable(_)) {
        stays.push(
            "iptables-legacy: it is in use and cannot be read (package iptables); rules of weft's may be in FORWARD"
                .to_owned(),
        );
    }
    things.extend(firewall::found(&seen).map(|part| Thing::Rules(Object::Firewall(part))));
    Ok(())
}

/// Veths, then what they and the tunnel hang on. Returns the pods, and what else hangs on a bridge that goes.
fn devices(
    config: &Config,
    links: &BTreeMap<IfName, FoundLink>,
    vtep_mac: Option<Mac>,
    things: &mut Vec<Thing>,
    stays: &mut Vec<String>,
) -> Vec<String> {
    let mut pods = Vec::new();
    let mut owners = files::pods(&config.run_dir);
    let veths = links.iter().filter(|(name, found)| found.is_our_veth(name));
    for (name, found) in veths {
        let pod = owners.remove(name);
        pods.push(pod.clone().unwrap_or_else(|| name.to_string()));
        things.push(Thing::Veth { name: name.clone(), index: found.index, pod });
    }
    let used_by_pods: BTreeSet<&IfName> = links
        .iter()
        .filter(|(name, found)| found.is_our_veth(name))
        .filter_map(|(_, found)| found.port.bridge.as_ref())
        .collect();
    for (name, found) in links {
        let made = found.group == VETH_GROUP;
        let kind = match &found.link.kind {
            LinkKind::Vxlan(_) if made || is_vtep(name, found, vtep_mac) => "VXLAN device",
            LinkKind::Bridge if made => "bridge",
            LinkKind::Bridge if used_by_pods.contains(name) => {
                stays.push(format!("bridge {name}, with its addresses: it was there before weft"));
                continue;
            }
            _ => continue,
        };
        let ports =
            links.iter().filter(|(port, p)| p.port.bridge.as_ref() == Some(name) && !p.is_our_veth(port));
        pods.extend(ports.map(|(port, _)| format!("{port} on {name}, which is not weft's")));
        things.push(Thing::Device { name: name.clone(), index: found.index, kind });
    }
    pods
}

/// The tunnel's end that this node's peers have known, whoever made the device.
fn is_vtep(name: &IfName, found: &FoundLink, vtep_mac: Option<Mac>) -> bool {
    name.as_str().starts_with("flannel") && Some(found.link.mac.value()) == vtep_mac
}

/// Only what is still as weft made it is put back. What belongs to a device that goes, goes with it.
fn settings(
    before: &Before,
    kernel: &mut LinuxKernel,
    things: &mut Vec<Thing>,
    stays: &mut Vec<String>,
) -> Result<(), LeaveError> {
    let leaving: Vec<String> = things
        .iter()
        .filter_map(|thing| match thing {
            Thing::Device { name, .. } | Thing::Veth { name, .. } => Some(format!("/conf/{name}/")),
            _ => None,
        })
        .collect();
    // A setting of all devices, written, overwrites that of each.
    let mut all: Vec<_> = before.settings().collect();
    all.sort_by_key(|(path, _)| (path.contains("/conf/"), !path.contains("/conf/all/")));
    for (path, setting) in all {
        if leaving.iter().any(|device| path.contains(device)) {
            continue;
        }
        match kernel.sysctls(&[path])?.remove(path) {
            None => {}
            Some(now) if now == setting.before => {}
            Some(now) if now == setting.set => {
                things.push(Thing::Sysctl { path: path.to_owned(), value: setting.before.clone() });
            }
            Some(now) => stays.push(format!(
                "sysctl {} = {now}: somebody has changed it since weft set it to {} (before weft: {})",
                path.replace('/', "."),
                setting.set,
                setting.before
            )),
        }
    }
    Ok(())
}

fn subnet_file(config: &Config, lease: Option<LeaseKey>, things: &mut Vec<Thing>, stays: &mut Vec<String>) {
    let path = &config.subnet_file;
    let Ok(text) = std::fs::read_to_string(path) else { return };
    match previous_lease(&text) {
        named if named.is_some() && named == lease => things.push(Thing::SubnetFile(path.clone())),
        Some(named) => stays.push(format!("{}: it names {named}, which was not this node's", path.display())),
        None => stays.push(format!("{}: it names no subnet of weft's", path.display())),
    }
}

/// The embedded store is the memory of every node of this machine, configuration included: it goes at a word of its
/// own, and never under another node's feet.
fn store(
    config: &Config,
    wishes: &Wishes,
    public_ip: Option<Ipv4Addr>,
    things: &mut Vec<Thing>,
    stays: &mut Vec<String>,
    refusals: &mut Vec<String>,
) {
    let StoreConfig::Embedded(embedded) = &config.store else {
        if wishes.remove_store {
            refusals.push("--remove-store: the store is etcd, which is not this node's to remove".to_owned());
        }
        return;
    };
    let file = &embedded.file;
    if !file.exists() {
        return;
    }
    if !wishes.remove_store {
        let shown = file.display();
        stays.push(format!(
            "{shown}: network configuration and leases of all its nodes; --remove-store removes it"
        ));
        return;
    }
    match others(&EmbeddedStore::new(file), public_ip) {
        Ok(others) if others.is_empty() => things.push(Thing::Store(file.clone())),
        Ok(others) => refusals.push(format!(
            "--remove-store: {} holds leases of other nodes: {}. Take weft off those first, with --release-lease",
            file.display(),
            others.join(", ")
        )),
        Err(error) => refusals.push(format!("--remove-store: {error}")),
    }
}

fn others(store: &EmbeddedStore, public_ip: Option<Ipv4Addr>) -> Result<Vec<String>, LeaveError> {
    let failed = |e: &dyn std::fmt::Display| LeaveError::Lease(e.to_string());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| failed(&e))?;
    let leases = runtime.block_on(store.leases()).map_err(|e| failed(&e))?;
    let foreign = leases.iter().filter(|lease| Some(lease.attrs.public_ip) != public_ip);
    Ok(foreign.map(|lease| format!("{} of {}", lease.key, lease.attrs.public_ip)).collect())
}
