//! The look at a node: what of weft is on it, what stays, what stands in the way. Nothing is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use weft_shared::lease::Lease;
use weft_shared::names::LINK_GROUP;
use weft_shared::subnet_env::previous_lease;
use weft_shared::tombstone::boot_id;
use weft_shared::{IfName, Mac};

use super::{LeaveError, Plan, Thing, Wishes, files, open_store, running, shown_lease};
use crate::before::Before;
use crate::config::{Config, StoreConfig};
use crate::durable::{Durable, DurableFile};
use crate::firewall;
use crate::firewall::legacy::LegacyFilter;
use crate::ipam::records;
use crate::kernel::{FoundAddr, FoundLink, Kernel, KernelError, LinuxKernel};
use crate::lease::{EmbeddedStore, LeaseStore};
use crate::object::{LinkKind, Object};

pub fn survey(config: &Config, wishes: &Wishes) -> Result<Plan, LeaveError> {
    let mut refusals = Vec::new();
    let guards = running::keep_out(config, wishes.as_if_stopped, &mut refusals);
    let at = |path: &Path| {
        let path = path.to_owned();
        move |error| LeaveError::File { path, error }
    };
    let durable = DurableFile::in_dir(&config.state_dir).peek();
    let boot = boot_id().map_err(at(Path::new("/proc/sys/kernel/random/boot_id")))?;
    let before = Before::load(&config.run_dir, &boot).map_err(at(&config.run_dir))?;
    let kernel = LinuxKernel::open()?.with_sysctls_in(&config.sysctl_dir);
    let (things, stays) = (Vec::new(), Vec::new());
    let mut survey = Survey { config, wishes, durable, kernel, things, stays, refusals };

    survey.conflists();
    survey.lease()?;
    let (links, addrs) = survey.kernel.links_and_addrs()?;
    survey.routes(&links)?;
    survey.rules()?;
    survey.devices(&links);
    survey.settings(&before)?;
    survey.subnet_file();
    survey.store(&addrs);
    survey.files(before.file());
    let Survey { kernel, things, stays, refusals, .. } = survey;
    Ok(Plan { things, stays, refusals, before, kernel, _guards: guards })
}

/// What is found, as it is found: the order in which it is looked at is the order of removal.
struct Survey<'a> {
    config: &'a Config,
    wishes: &'a Wishes,
    durable: Durable,
    kernel: LinuxKernel,
    things: Vec<Thing>,
    stays: Vec<String>,
    refusals: Vec<String>,
}

impl Survey<'_> {
    fn conflists(&mut self) {
        let Some(dir) = &self.wishes.cni_conf_dir else { return };
        for (path, socket) in files::conflists(dir) {
            if socket == self.config.cni_socket {
                self.things.push(Thing::Conflist(path));
            } else {
                let (path, socket) = (path.display(), socket.display());
                self.stays.push(format!("{path}: type weft, but for the agent at {socket}"));
            }
        }
    }

    fn lease(&mut self) -> Result<(), LeaveError> {
        let (key, public_ip) = match (self.durable.lease, self.durable.public_ip) {
            (Some(key), Some(public_ip)) => (key, public_ip),
            _ if self.wishes.release_lease => {
                let dir = self.config.state_dir.display();
                self.stays.push(format!("a lease, if there is one: {dir} does not say which this node had"));
                return Ok(());
            }
            _ => return Ok(()),
        };
        let store = open_store(self.config)?;
        // To open it would make it.
        let is_there = match &self.config.store {
            StoreConfig::Embedded(embedded) => embedded.file.exists(),
            StoreConfig::Etcd(_) => true,
            #[cfg(feature = "kube")]
            StoreConfig::Kube(_) => true,
        };
        if self.wishes.release_lease && is_there {
            self.things.push(Thing::Lease { key, public_ip, store: Box::new(store) });
        } else if is_there {
            let (lease, location) = (shown_lease(&store, key), store.location());
            let fate = match store.expires_leases() {
                true => "it expires by itself; --release-lease gives it back now",
                false => "they do not expire; --release-lease removes them, and the range stays the Node's",
            };
            self.stays.push(format!("{lease} in {location}: {fate}"));
        }
        Ok(())
    }

    fn routes(&mut self, links: &BTreeMap<IfName, FoundLink>) -> Result<(), LeaveError> {
        let names: BTreeMap<u32, IfName> =
            links.iter().map(|(name, found)| (found.index, name.clone())).collect();
        let routes = self.kernel.own_routes(&names)?;
        self.things.extend(routes.into_iter().map(Thing::Route));
        Ok(())
    }

    /// Tables and accepts, whatever the settings say by now.
    fn rules(&mut self) -> Result<(), LeaveError> {
        let seen = match self.kernel.firewall(self.config.firewall.legacy_period) {
            // Where there is no packet filter nothing was put into it.
            Err(KernelError::NoNftables) => return Ok(()),
            other => other?,
        };
        if matches!(seen.legacy, LegacyFilter::Unreadable(_)) {
            self.stays.push(
                "iptables-legacy: it is in use and cannot be read (package iptables); rules of weft's may be in FORWARD"
                    .to_owned(),
            );
        }
        self.things.extend(firewall::found(&seen).map(|part| Thing::Rules(Object::Firewall(part))));
        Ok(())
    }

    /// Veths, then what they and the tunnel hang on.
    fn devices(&mut self, links: &BTreeMap<IfName, FoundLink>) {
        let mut owners = records::owners(&self.config.run_dir);
        let mut pods = Vec::new();
        let mut used_by_pods = BTreeSet::new();
        for (name, found) in links.iter().filter(|(name, found)| found.is_our_veth(name)) {
            let pod = owners.remove(name);
            pods.push(pod.clone().unwrap_or_else(|| name.to_string()));
            used_by_pods.extend(found.port.bridge.as_ref());
            self.things.push(Thing::Veth { name: name.clone(), index: found.index, pod });
        }
        let mut foreign_ports = Vec::new();
        for (name, found) in links {
            let made = found.group == LINK_GROUP;
            let kind = match &found.link.kind {
                LinkKind::Vxlan(_) if made || is_vtep(name, found, self.durable.vtep_mac) => "VXLAN device",
                LinkKind::Bridge if made => "bridge",
                LinkKind::Tun(_) if made => "TUN device",
                LinkKind::Ifb if made => "device that limits a pod",
                LinkKind::Bridge if used_by_pods.contains(name) => {
                    self.stays.push(format!("bridge {name}, with its addresses: it was there before weft"));
                    continue;
                }
                _ => continue,
            };
            let ports =
                links.iter().filter(|(port, p)| p.port.bridge.as_ref() == Some(name) && !p.is_our_veth(port));
            foreign_ports.extend(ports.map(|(port, _)| format!("{port} on {name}, which is not weft's")));
            self.things.push(Thing::Device { name: name.clone(), index: found.index, kind });
        }
        self.refuse_attached(["pod is", "pods are"], &pods, "Remove them");
        self.refuse_attached(["other port is", "other ports are"], &foreign_ports, "Take them off");
    }

    fn refuse_attached(&mut self, [one, many]: [&str; 2], attached: &[String], mend: &str) {
        if attached.is_empty() || self.wishes.force {
            return;
        }
        let (count, names) = (attached.len(), attached.join(", "));
        let are = if count == 1 { one } else { many };
        self.refusals.push(format!(
            "{count} {are} attached and would lose the network: {names}. {mend} first, or say --force"
        ));
    }

    /// Only what is still as weft made it is put back. What belongs to a device that goes, goes with it.
    fn settings(&mut self, before: &Before) -> Result<(), LeaveError> {
        let of_device = |thing: &Thing| match thing {
            Thing::Device { name, .. } | Thing::Veth { name, .. } => Some(format!("/conf/{name}/")),
            _ => None,
        };
        let leaving: Vec<String> = self.things.iter().filter_map(of_device).collect();
        // A setting of all devices, written, overwrites that of each.
        let mut all: Vec<_> = before.settings().collect();
        all.sort_by_key(|(path, _)| (path.contains("/conf/"), !path.contains("/conf/all/")));
        for (path, setting) in all {
            if leaving.iter().any(|device| path.contains(device)) {
                continue;
            }
            match self.kernel.sysctls(&[path])?.remove(path) {
                None => {}
                Some(now) if now == setting.before => {}
                Some(now) if now == setting.set => {
                    self.things.push(Thing::Sysctl { path: path.to_owned(), value: setting.before.clone() });
                }
                Some(now) => self.stays.push(format!(
                    "sysctl {} = {now}: somebody has changed it since weft set it to {} (before weft: {})",
                    path.replace('/', "."),
                    setting.set,
                    setting.before
                )),
            }
        }
        Ok(())
    }

    fn subnet_file(&mut self) {
        let path = &self.config.subnet_file;
        let Ok(text) = std::fs::read_to_string(path) else { return };
        let shown = path.display();
        match previous_lease(&text) {
            named if named.is_some() && named == self.durable.lease => {
                self.things.push(Thing::SubnetFile(path.clone()));
            }
            Some(named) => {
                self.stays.push(format!("{shown}: it names {named}, which was not this node's"));
            }
            None => self.stays.push(format!("{shown}: it names no subnet of weft's")),
        }
    }

    /// The embedded store is the memory of every node of this machine, configuration included: it goes at a word of
    /// its own, and never under another node's feet.
    fn store(&mut self, addrs: &[FoundAddr]) {
        let remove = self.wishes.remove_store;
        let StoreConfig::Embedded(embedded) = &self.config.store else {
            if remove {
                self.refusals
                    .push("--remove-store: the store is etcd, which is not this node's to remove".to_owned());
            }
            return;
        };
        let file = &embedded.file;
        let shown = file.display();
        if !file.exists() {
            return;
        }
        if !remove {
            self.stays.push(format!(
                "{shown}: network configuration and leases of all its nodes; --remove-store removes it"
            ));
            return;
        }
        // An earlier run has removed the file that says which was ours, if it gave no lease back.
        let said = [self.durable.public_ip, self.config.underlay.public_ip];
        let ours = own_addresses(said.into_iter().flatten(), addrs);
        match leases(&EmbeddedStore::new(file)).map(|leases| others(&leases, &ours)) {
            Ok(others) if others.is_empty() => self.things.push(Thing::Store(file.clone())),
            Ok(others) => self.refusals.push(format!(
                "--remove-store: {shown} holds leases of other nodes: {}. Take weft off those first, with --release-lease",
                others.join(", ")
            )),
            Err(error) => self.refusals.push(format!("--remove-store: {error}")),
        }
    }

    fn files(&mut self, before: &Path) {
        let spared = match &self.config.store {
            StoreConfig::Embedded(embedded) => vec![embedded.file.as_path()],
            StoreConfig::Etcd(_) => vec![],
            #[cfg(feature = "kube")]
            StoreConfig::Kube(_) => vec![],
        };
        let ours = [files::of_this_boot(self.config, before), files::of_every_boot(self.config)];
        for thing in ours.into_iter().flatten() {
            let foreign = files::foreign(&thing, &spared);
            self.stays.extend(foreign.iter().map(|path| format!("{}: not weft's", path.display())));
            self.things.push(thing);
        }
    }
}

/// The tunnel's end that this node's peers have known, whoever made the device.
fn is_vtep(name: &IfName, found: &FoundLink, vtep_mac: Option<Mac>) -> bool {
    name.as_str().starts_with("flannel") && Some(found.link.mac.value()) == vtep_mac
}

fn leases(store: &EmbeddedStore) -> Result<Vec<Lease>, LeaveError> {
    let failed = |e: &dyn std::fmt::Display| LeaveError::Lease(e.to_string());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| failed(&e))?;
    runtime.block_on(store.leases()).map_err(|e| failed(&e))
}

/// What this node's public address may be: what is said of it, and what its interfaces have. Every network namespace
/// has the loopback's.
fn own_addresses(said: impl Iterator<Item = Ipv4Addr>, addrs: &[FoundAddr]) -> BTreeSet<Ipv4Addr> {
    let of_host = addrs.iter().filter_map(|found| match found.addr.ip() {
        IpAddr::V4(ip) => Some(ip).filter(|ip| !ip.is_loopback()),
        IpAddr::V6(_) => None,
    });
    of_host.chain(said).collect()
}

fn others(leases: &[Lease], ours: &BTreeSet<Ipv4Addr>) -> Vec<String> {
    let foreign = leases.iter().filter(|lease| !ours.contains(&lease.attrs.public_ip));
    foreign.map(|lease| format!("{} of {}", lease.key, lease.attrs.public_ip)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::object::{AddrForm, AddrScope};

    #[test]
    fn a_lease_of_an_address_of_this_host_is_no_other_nodes() {
        let addr = |text: &str| FoundAddr {
            dev: "eth0".parse().expect("name"),
            addr: text.parse().expect(text),
            scope: AddrScope::Global,
            form: AddrForm::default(),
            deprecated: false,
            temporary: false,
        };
        let lease = |key: &str, public_ip: &str| Lease {
            key: key.parse().expect(key),
            attrs: serde_json::from_value(json!({"PublicIP": public_ip})).expect("attributes"),
            create_revision: 1,
        };
        let leases = [
            lease("10.5.1.0-24", "192.0.2.1"),
            lease("10.5.2.0-24", "203.0.113.5"),
            lease("10.5.3.0-24", "192.0.2.3"),
            lease("10.5.4.0-24", "127.0.0.1"),
        ];
        let addrs = ["127.0.0.1/8", "2001:db8::1/64", "192.0.2.1/24"].map(addr);
        let others = |said: Option<&str>| {
            let said = said.map(|ip| ip.parse().expect(ip));
            others(&leases, &own_addresses(said.into_iter(), &addrs))
        };
        let foreign = ["10.5.3.0-24 of 192.0.2.3", "10.5.4.0-24 of 127.0.0.1"];
        assert_eq!(others(Some("203.0.113.5")), foreign, "behind address translation");
        assert_eq!(others(None), [&["10.5.2.0-24 of 203.0.113.5"][..], &foreign].concat());
    }
}
