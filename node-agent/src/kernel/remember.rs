//! A kernel that keeps in mind what settings were before weft changed them, so that they can be put back when weft
//! leaves the node. Everything else passes through.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tracing::warn;
use weft_shared::IfName;

use super::{Dump, Kernel, KernelError};
use crate::before::Before;
use crate::firewall::Ruleset;
use crate::object::{Object, Op};

#[derive(Debug)]
pub struct Remembering<K> {
    kernel: K,
    before: Before,
}

impl<K> Remembering<K> {
    pub fn new(kernel: K, before: Before) -> Self {
        Self { kernel, before }
    }
}

impl<K: Kernel> Kernel for Remembering<K> {
    fn dump(&mut self, device: Option<&IfName>) -> Result<Dump, KernelError> {
        self.kernel.dump(device)
    }

    fn sysctls(&mut self, paths: &[&str]) -> Result<BTreeMap<String, String>, KernelError> {
        self.kernel.sysctls(paths)
    }

    fn firewall(&mut self, legacy_period: Duration) -> Result<Ruleset, KernelError> {
        self.kernel.firewall(legacy_period)
    }

    fn shaping(&mut self, wanted: &[&Object]) -> Result<Vec<Object>, KernelError> {
        self.kernel.shaping(wanted)
    }

    fn on_link(&mut self, dev: &IfName, peers: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, KernelError> {
        self.kernel.on_link(dev, peers)
    }

    /// What is found is on disk before it is changed: an agent may die in between.
    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        for op in ops {
            if let Op::Set { object: Object::Sysctl { path, value }, found: Some(found) } = op
                && let Object::Sysctl { value: old, .. } = &found.object
                && let Err(error) = self.before.note(path, old, value)
            {
                // The node must work; only the way back is lost.
                warn!(path, old, %error, "cannot be remembered: uninstall will not put it back");
            }
        }
        self.kernel.apply(ops)
    }
}
