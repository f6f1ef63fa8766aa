//! Taking weft off a node: everything that weft made is found by its marks, listed, and removed; what somebody else made
//! stays and is named.
//!
//! ```text
//! survey: kernel, files, conflists -> Plan { things, stays, refusals }     looks only
//! carry_out: each thing in order, errors are collected, the rest goes on   twice is as good as once
//! ```
//! The order: first the conflist, so that no runtime begins an ADD; the lease; then the kernel from routes to devices;
//! the packet filter, which pods need to their end; settings; files. The file that says which lease and which VTEP were
//! ours is the last, so that a run that was cut off can be begun again.
//!
//! What is ours: routes by their protocol, rules by their comment and tables by their names, veths by link group and
//! name, bridges, VXLAN and TUN devices by link group. **A VXLAN device that was adopted goes as well**: it is the one that
//! bears our VTEP MAC. While no agent runs it would go on taking packets out of the tunnel into this host, with entries
//! that nobody keeps; and flanneld, if it is to come back, makes its own at every start. **A bridge that was adopted
//! stays**, with its addresses: it is the runtime's or another plugin's, and other containers may hang on it.

mod files;
mod running;
mod survey;

use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use weft_shared::IfName;
use weft_shared::lease::LeaseKey;

use crate::before::Before;
use crate::config::{Config, StoreConfig};
use crate::kernel::{Kernel, KernelError, LinuxKernel, OwnRoute};
use crate::lease::{EmbeddedStore, EtcdStore, LeaseStore, Released, Store};
use crate::object::{Object, Op};

pub use survey::survey;

const KEPT: &str = "kept for another run, since not everything is gone";

/// What an operator asks for beyond the list.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// Whose network configurations of weft's go; `None`: nobody's.
    pub cni_conf_dir: Option<PathBuf>,
    /// The answer is about a time when no agent runs any more. For a look alone: nothing may be carried out.
    pub as_if_stopped: bool,
    /// Also while pods are attached.
    pub force: bool,
    pub release_lease: bool,
    /// The embedded store's database too: it is the memory of every node that uses it.
    pub remove_store: bool,
}

/// What was found.
#[derive(Debug)]
pub struct Plan {
    /// In the order of removal.
    pub things: Vec<Thing>,
    /// What is left, and why.
    pub stays: Vec<String>,
    /// Why nothing may be removed now.
    pub refusals: Vec<String>,
    before: Before,
    kernel: LinuxKernel,
    /// Keep agents and plugins out for as long as the plan lives.
    _guards: running::Guards,
}

#[derive(Debug)]
pub enum Thing {
    Conflist(PathBuf),
    Lease {
        key: LeaseKey,
        public_ip: Ipv4Addr,
        store: Box<Store>,
    },
    Route(OwnRoute),
    /// In the packet filter: a table of ours, or our rules in somebody else's chain.
    Rules(Object),
    Veth {
        name: IfName,
        index: u32,
        pod: Option<String>,
    },
    Device {
        name: IfName,
        index: u32,
        kind: &'static str,
    },
    Sysctl {
        path: String,
        value: String,
    },
    SubnetFile(PathBuf),
    Store(PathBuf),
    /// Files of ours, and directories that go with them if nothing else is in them.
    Files {
        dir: PathBuf,
        files: Vec<PathBuf>,
        dirs: Vec<PathBuf>,
        last_word: bool,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("{path}: {error}")]
    File { path: PathBuf, error: io::Error },
    #[error("{0}")]
    Lease(String),
}

/// What a store calls its lease.
fn shown_lease(store: &Store, key: LeaseKey) -> String {
    match store.expires_leases() {
        true => format!("lease {key}"),
        false => format!("weft's annotations of the Node with podCIDR {}", key.v4),
    }
}

impl Thing {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Conflist(_) => "conflist",
            Self::Lease { .. } => "lease",
            Self::Route(_) => "route",
            Self::Rules(_) => "rules",
            Self::Veth { .. } => "veth",
            Self::Device { .. } => "device",
            Self::Sysctl { .. } => "sysctl",
            Self::SubnetFile(_) => "file",
            Self::Store(_) => "store",
            Self::Files { .. } => "files",
        }
    }
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conflist(path) | Self::SubnetFile(path) | Self::Store(path) => {
                write!(f, "{}", path.display())
            }
            Self::Lease { key, public_ip, store } => {
                let what = match store.expires_leases() {
                    true => key.to_string(),
                    false => shown_lease(store, *key),
                };
                write!(f, "{what} of {public_ip} in {}", store.location())
            }
            Self::Route(route) => route.fmt(f),
            Self::Rules(object) => object.key().fmt(f),
            Self::Veth { name, pod: Some(pod), .. } => write!(f, "{name} of pod {pod}"),
            Self::Veth { name, pod: None, .. } => name.fmt(f),
            Self::Device { name, kind, .. } => write!(f, "{name}, {kind}"),
            Self::Sysctl { path, value } => write!(f, "{} back to {value}", path.replace('/', ".")),
            Self::Files { dir, files, .. } => match files.len() {
                1 => write!(f, "{}: 1 file", dir.display()),
                count => write!(f, "{}: {count} files", dir.display()),
            },
        }
    }
}

/// What became of a thing.
#[derive(Debug)]
pub enum Fate {
    Removed,
    /// Not by this run: [`Plan::stays`] says why.
    Kept,
    Failed(LeaveError),
}

impl Plan {
    /// Removes everything that is listed, whatever fails. What could not be given back is not forgotten: the last word
    /// is kept for another run, and so is what a setting was before.
    pub fn carry_out(&mut self) -> Vec<(Thing, Fate)> {
        let mut done: Vec<(Thing, Fate)> = Vec::new();
        for mut thing in std::mem::take(&mut self.things) {
            let failed = |of: fn(&Thing) -> bool| {
                done.iter().any(|(thing, fate)| matches!(fate, Fate::Failed(_)) && of(thing))
            };
            let kept = match &mut thing {
                Thing::Files { last_word: true, .. } => failed(|_| true),
                Thing::Files { files, .. } if failed(|thing| matches!(thing, Thing::Sysctl { .. })) => {
                    let before = self.before.file();
                    files.retain(|file| file != before);
                    self.stays.push(format!("{}: {KEPT}", before.display()));
                    false
                }
                _ => false,
            };
            let fate = if kept {
                self.stays.push(format!("{thing}: {KEPT}"));
                Fate::Kept
            } else {
                self.remove(&thing).unwrap_or_else(Fate::Failed)
            };
            done.push((thing, fate));
        }
        done
    }

    fn remove(&mut self, thing: &Thing) -> Result<Fate, LeaveError> {
        match thing {
            Thing::Conflist(path) | Thing::SubnetFile(path) | Thing::Store(path) => remove_file(path)?,
            Thing::Lease { key, public_ip, store } => return self.release(key, *public_ip, store),
            Thing::Route(route) => self.kernel.remove_route(route)?,
            Thing::Rules(object) => self.apply(Op::Remove(object.clone()))?,
            Thing::Veth { index, .. } | Thing::Device { index, .. } => self.kernel.delete_link(*index)?,
            Thing::Sysctl { path, value } => {
                let object = Object::Sysctl { path: path.clone(), value: value.clone() };
                self.apply(Op::Set { object, found: None })?;
                let file = self.before.file().to_owned();
                self.before.forget(path).map_err(|error| LeaveError::File { path: file, error })?;
            }
            Thing::Files { files, dirs, .. } => {
                let removed: Vec<_> = files.iter().map(|file| remove_file(file)).collect();
                // One that is not empty holds what is not ours, and is named among what stays.
                dirs.iter().for_each(|dir| drop(fs::remove_dir(dir)));
                removed.into_iter().collect::<Result<(), _>>()?;
            }
        }
        Ok(Fate::Removed)
    }

    fn apply(&mut self, op: Op) -> Result<(), KernelError> {
        self.kernel.apply(&[op]).into_iter().collect()
    }

    fn release(&mut self, key: &LeaseKey, public_ip: Ipv4Addr, store: &Store) -> Result<Fate, LeaveError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| LeaveError::Lease(e.to_string()))?;
        let released = runtime.block_on(store.release(key, public_ip));
        let lease = shown_lease(store, *key);
        let stays = match released.map_err(|e| LeaveError::Lease(e.to_string()))? {
            Released::Done => return Ok(Fate::Removed),
            Released::Gone => format!("{lease}: gone from the store already"),
            Released::Reserved => format!("lease {key}: a reservation of the operator's"),
            Released::Foreign { owner } => format!("{lease}: {owner}'s by now, not {public_ip}'s"),
        };
        self.stays.push(stays);
        Ok(Fate::Kept)
    }
}

fn remove_file(path: &std::path::Path) -> Result<(), LeaveError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(LeaveError::File { path: path.to_owned(), error })
        }
        _ => Ok(()),
    }
}

/// The store that the settings name, without anything being made in it.
fn open_store(config: &Config) -> Result<Store, LeaveError> {
    match &config.store {
        StoreConfig::Etcd(etcd) => {
            let store = EtcdStore::new(etcd).map_err(|e| LeaveError::Lease(e.to_string()))?;
            Ok(Store::Etcd(store))
        }
        StoreConfig::Embedded(embedded) => Ok(Store::Embedded(EmbeddedStore::new(&embedded.file))),
        #[cfg(feature = "kube")]
        StoreConfig::Kube(kube) => Ok(Store::Kube(crate::lease::KubeStore::new(kube))),
    }
}
