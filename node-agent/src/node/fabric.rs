//! What address management asks of the node: the answers come from state and reports, the deeds go through the
//! reconciler or a netlink socket of their own.

use std::sync::Arc;

use tokio::task::spawn_blocking;
use weft_shared::IfName;
use weft_shared::cni::Code;
use weft_shared::deadline::IN_KERNEL;
use weft_shared::protocol::Failure;

use super::Node;
use crate::firewall::{PartKey, host_ports, pod_masquerade};
use crate::kernel::{KernelError, LinuxKernel};
use crate::object::{Key, LinkKind};
use crate::pods::{DeviceFacts, Extras, Fabric, NotReady, OldFlows, PodNetwork};
use crate::reconcile::{Handle, Report, is_limit_of};

/// What address management asks of the node.
#[derive(Debug, Clone)]
pub struct NodeFabric(pub Arc<Node>);

impl Fabric for NodeFabric {
    fn pod_network(&self) -> Result<PodNetwork, NotReady> {
        let reports = self.0.reconcile.reports();
        self.0.pod_network(&self.0.stage(), &reports.borrow())
    }

    async fn may_be_bridge(&self, name: &IfName) -> Result<(), Failure> {
        let refuse = |expected: String| {
            let details = format!("bridge = \"{name}\": expected {expected}");
            Err(Failure::new(Code::BadConfiguration, "invalid network configuration").with_details(details))
        };
        if let Some(used) = self.0.pod_needs.borrow().bridges.keys().find(|used| *used != name) {
            return refuse(format!("\"{used}\", which this node's pods use since boot"));
        }
        // Every ADD but a node's first finds it so.
        if self.0.reconcile.reports().borrow().gateways.contains_key(name) {
            return Ok(());
        }
        let reserved = self.0.serving(|serving| {
            serving.underlay.iface == *name || serving.backend.plane().device() == Some(name)
        });
        if reserved == Some(true) || name.as_str() == "lo" || name.as_str().starts_with("flannel") {
            return refuse("a bridge of the pods' own, such as cni0".into());
        }
        let asked = name.clone();
        match in_kernel(move |kernel| kernel.kind_of(&asked)).await {
            Ok(None | Some(LinkKind::Bridge)) => Ok(()),
            Ok(Some(kind)) => refuse(format!("a bridge or a free name; it is a {kind}")),
            Err(error) => {
                Err(Failure::new(Code::TryAgainLater, "the kernel does not answer").with_details(error))
            }
        }
    }

    async fn ensure_bridge(&self, name: &IfName) -> Result<DeviceFacts, Failure> {
        self.0.pass_on_pod_needs();
        let need = self.0.pod_needs.borrow().bridges.get(name).map(|n| n.subnets.clone()).unwrap_or_default();
        let in_place = |report: &Report| {
            let carried = report.gateways.get(name);
            let complete = need.iter().all(|subnet| carried.is_some_and(|c| c.contains(subnet)));
            report.devices.get(name).copied().filter(|_| complete)
        };
        let known = in_place(&self.0.reconcile.reports().borrow());
        if let Some(facts) = known {
            return Ok(facts);
        }
        // A pass that was aborted says nothing about the bridge: many pods are coming and going.
        let conclusive = async {
            loop {
                let report = self.0.reconcile.pass().await;
                if report.aborted.is_none() || in_place(&report).is_some() {
                    return report;
                }
            }
        };
        let (facts, why) = match tokio::time::timeout(IN_KERNEL, conclusive).await {
            Ok(report) => (in_place(&report), trouble(&report, name)),
            Err(_) => (None, silence()),
        };
        facts.ok_or_else(|| {
            Failure::new(Code::TryAgainLater, format!("bridge {name} is not in place yet")).with_details(why)
        })
    }

    async fn delete_veth(&self, name: &IfName) -> Result<(), String> {
        let name = name.clone();
        in_kernel(move |kernel| kernel.delete_veth(&name).map(|_| ())).await
    }

    async fn delete_by_index(&self, ifindex: u32) -> Result<(), String> {
        in_kernel(move |kernel| kernel.delete_veth_of(ifindex)).await
    }

    /// In one go: a DEL waits for each change of thread.
    async fn delete_veths(&self, name: &IfName, wired: Option<u32>) -> Result<(), String> {
        let name = name.clone();
        in_kernel(move |kernel| kernel.delete_veths(&name, wired)).await
    }

    async fn ensure(&self, extras: Extras) -> Result<(), String> {
        self.0.pass_on_pod_needs();
        let report = settle(&self.0.reconcile, |key| is_of(key, &extras)).await?;
        // Host ports alone are kept on a node that is not known yet.
        let is_kept = report.at.is_some() || (!extras.masquerade && extras.forced.is_none());
        is_kept.then_some(()).ok_or_else(not_looked_at)
    }

    async fn ensure_limits(&self, veth: &IfName) -> Result<(), String> {
        self.0.pass_on_pod_needs();
        let report = settle(&self.0.reconcile, |key| is_limit_of(veth, key)).await?;
        report.at.map(drop).ok_or_else(not_looked_at)
    }

    async fn link_exists(&self, ifindex: u32) -> Result<bool, String> {
        in_kernel(move |kernel| kernel.link_exists(ifindex)).await
    }
}

/// Brings about what pods need now; fails for what `matters` alone.
async fn settle(reconcile: &Handle, matters: impl Fn(&Key) -> bool) -> Result<Report, String> {
    let conclusive = async {
        loop {
            let report = reconcile.pass().await;
            if report.aborted.is_none() {
                return report;
            }
        }
    };
    let report = tokio::time::timeout(IN_KERNEL, conclusive).await;
    let report = report.map_err(|_| silence())?;
    let wrong = report.pending.iter().find(|pending| matters(&pending.key));
    match wrong.map(|pending| format!("{}: {}", pending.key, pending.error)) {
        Some(wrong) => Err(wrong),
        None => Ok(report),
    }
}

/// Whether host ports are not as they must be without this.
fn is_of_host_ports(key: &Key, old_flows: OldFlows) -> bool {
    match key {
        Key::Firewall(PartKey::Flows) => old_flows == OldFlows::MustFollow,
        Key::Firewall(part) => host_ports::is_about(part),
        _ => false,
    }
}

fn is_of(key: &Key, extras: &Extras) -> bool {
    match key {
        Key::Firewall(part) if pod_masquerade::is_about(part) => extras.masquerade,
        Key::Firewall(_) => extras.host_ports.is_some_and(|old_flows| is_of_host_ports(key, old_flows)),
        Key::Addr(dev, _) => Some(dev) == extras.forced.as_ref(),
        _ => false,
    }
}

fn not_looked_at() -> String {
    "the node's kernel is not looked at before it has a lease".into()
}

fn silence() -> String {
    format!("the kernel did not answer in {} s", IN_KERNEL.as_secs())
}

/// What a report has against a bridge.
fn trouble(report: &Report, bridge: &IfName) -> String {
    let is_about = |key: &Key| matches!(key, Key::Link(dev) | Key::Addr(dev, _) if dev == bridge);
    let about = report.pending.iter().find(|p| is_about(&p.key));
    let pending = about.map(|p| format!("{}: {}", p.key, p.error));
    pending
        .or_else(|| report.aborted.as_ref().map(ToString::to_string))
        .unwrap_or_else(|| "the pass did not get to it".into())
}

/// A blocking call on a socket of its own: deleting a link waits for the kernel's grace periods.
async fn in_kernel<T: Send + 'static>(
    call: impl FnOnce(&mut LinuxKernel) -> Result<T, KernelError> + Send + 'static,
) -> Result<T, String> {
    match spawn_blocking(move || call(&mut LinuxKernel::open()?)).await {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(panic.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::firewall::HostPort;
    use crate::kernel::fake::FakeKernel;
    use crate::reconcile::Inputs;
    use weft_shared::protocol::{PortMapping, Protocol};

    /// On a node without a lease, where pods may be deleted as well.
    #[tokio::test]
    async fn flows_that_lag_are_waited_for_by_whom_they_concern() {
        let mut kernel = FakeKernel::with_underlay("eth0");
        kernel.refused.insert(Key::Firewall(PartKey::Flows), KernelError::NoConntrack);
        let mut inputs = Inputs { pods_recorded: true, ..Inputs::default() };
        let mapping =
            PortMapping { protocol: Protocol::Udp, host_ip: None, host_port: 53, container_port: 53 };
        inputs.pods.host_ports = HostPort::of(&[mapping], &["10.5.1.2".parse().expect("ip")]).collect();
        let reconcile = Handle::start(kernel, inputs, Duration::from_secs(60)).expect("a thread");
        let lags = settle(&reconcile, |key| is_of_host_ports(key, OldFlows::MustFollow)).await;
        assert!(lags.expect_err("lags").starts_with("UDP flows to host ports: "));
        let report = settle(&reconcile, |key| is_of_host_ports(key, OldFlows::MayLag)).await;
        assert!(report.expect("the table is there").at.is_none(), "the rest is not looked at");
        reconcile.stop();
    }
}
