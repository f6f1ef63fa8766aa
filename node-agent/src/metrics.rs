//! Prometheus figures, read off the agent's [`Status`] at scrape time, so that they cannot disagree with `weftctl`.
//!
//! Names follow the OpenMetrics rules: base units, `_total` on counters only.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::status::{NetworkPolicyStatus, PacketPathStatus, PodStatus, Status, TrafficStatus};

/// What the agent says of itself now.
pub type StatusSource = Arc<dyn Fn() -> Status + Send + Sync>;

/// Refused entries that are named: a store full of garbage is not to fill its scraper.
const NAMED: usize = 50;

pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    pub fn new(status: StatusSource) -> Self {
        let mut registry = Registry::with_prefix("weft");
        registry.register_collector(Box::new(StatusCollector(status)));
        Self { registry }
    }

    /// The exposition, in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail, and no encoder of ours does.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

struct StatusCollector(StatusSource);

impl fmt::Debug for StatusCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StatusCollector")
    }
}

impl Collector for StatusCollector {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let status = (self.0)();
        let mut out = Exposition(encoder);
        let host = &status.host;
        out.put(
            "node",
            "The node and its agent",
            None,
            &Info::new(vec![
                ("node", status.node.clone()),
                ("version", status.version.clone()),
                ("kernel", host.kernel.clone()),
                ("distribution", host.distribution.clone()),
            ]),
        )?;
        out.gauge("ready", "1 when the first ADD can succeed", flag(status.ready))?;
        let kind = [([("kind", status.store.kind.clone())], 1)];
        out.gauges("store_kind", "1 at the kind of the lease store", &kind)?;
        out.gauge("store_connected", "1 when the lease store answers", flag(status.store.connected))?;
        let recalled = flag(status.store.recalled_age.is_some());
        out.gauge(
            "state_from_disk",
            "1 while network, lease and peers are what was saved on disk",
            recalled,
        )?;
        if let Some(age) = status.store.recalled_age {
            let help = "Time since that was saved on disk which stands in for the store's word";
            out.put("state_from_disk_age", help, Some(Unit::Seconds), &ConstGauge::new(age))?;
        }
        out.counter("store_relists", "Watches begun anew with a snapshot", status.store.relists)?;
        if let Some(lease) = &status.lease {
            out.gauge("lease_held", "1 when the node's subnet lease is held", flag(lease.state == "held"))?;
            if let Some(left) = lease.expires_in {
                let help = "Time until the node's subnet lease expires";
                out.put("lease_expiry", help, Some(Unit::Seconds), &ConstGauge::new(left))?;
            }
        }
        if let Some(network) = &status.network {
            let kind = network.notice.as_ref().map(|notice| notice.kind.as_str());
            let kinds = ["differs", "invalid", "missing"];
            let values: Vec<_> =
                kinds.iter().map(|k| ([("kind", (*k).to_owned())], flag(kind == Some(k)))).collect();
            let help = "1 while the store's network configuration is not the one in force";
            out.gauges("network_config_notice", help, &values)?;
        }
        if let Some(unenforced) = status.network_policies.as_ref().and_then(NetworkPolicyStatus::unenforced) {
            let help = "1 while NetworkPolicies exist and nothing known enforces them on this node";
            out.gauge("network_policies_unenforced", help, flag(unenforced))?;
        }
        if let Some(underlay) = &status.underlay {
            out.gauge(
                "underlay_usable",
                "1 when packets can leave by the underlay",
                flag(underlay.problem.is_none()),
            )?;
        }
        let programmed = status.peers.iter().filter(|peer| peer.programmed).count();
        out.gauge("peers", "Peers with a lease that is used", status.peers.len() as u64)?;
        out.gauge("peers_programmed", "Peers whose every object is in the kernel", programmed as u64)?;
        let expired = status.peers.iter().filter(|peer| peer.grace_left.is_some()).count();
        out.gauge("peers_expired", "Peers that are used although their lease has expired", expired as u64)?;
        out.gauge("leases_refused", "Entries of the store that are not used", status.refused.len() as u64)?;
        let named = status.refused.iter().map(|refused| refused.key.as_str()).collect::<BTreeSet<_>>();
        let named: Vec<_> = named.into_iter().take(NAMED).map(|key| ([("key", key.to_owned())], 1)).collect();
        out.gauges(
            "lease_refused",
            "1 at each entry of the store that is not used, as far as they are few",
            &named,
        )?;
        if let Some(dataplane) = &status.dataplane {
            let pending = dataplane.pending.len() as u64;
            out.gauge("objects", "Kernel objects that are as they should be", dataplane.objects as u64)?;
            out.gauge("objects_pending", "Kernel objects that are not as they should be", pending)?;
            out.counter(
                "reconcile_passes",
                "Comparisons of the kernel with the desired state",
                dataplane.passes,
            )?;
            let help = "Operations that mended something after the first complete pass";
            out.counter("reconcile_repairs", help, dataplane.repairs)?;
            if let Some(ago) = dataplane.last_pass_ago {
                let help = "Time since the last complete comparison";
                out.put("reconcile_last_pass_age", help, Some(Unit::Seconds), &ConstGauge::new(ago))?;
            }
            out.gauge(
                "netlink_monitor",
                "1 when changes are reported by the kernel",
                flag(dataplane.monitor),
            )?;
            let help = "Times the kernel dropped reports that were not read fast enough";
            out.counter("netlink_overruns", help, dataplane.monitor_overruns)?;
        }
        if let Some(path) = &status.packet_path {
            packet_path(&mut out, path)?;
        }
        pods(&mut out, &status.pods)?;
        let bytes = &ConstGauge::new(host.agent_memory);
        out.put("agent_resident_memory", "Resident memory of the agent", Some(Unit::Bytes), bytes)?;
        let seconds = &ConstCounter::new(host.agent_cpu);
        out.put("agent_cpu", "Processor time of the agent", Some(Unit::Seconds), seconds)?;
        let uptime = &ConstGauge::new(host.agent_uptime);
        out.put("agent_uptime", "Time since the agent's start", Some(Unit::Seconds), uptime)
    }
}

fn packet_path(out: &mut Exposition<'_>, path: &PacketPathStatus) -> fmt::Result {
    let usable = flag(path.problem.is_none());
    out.gauge("packet_path_usable", "1 when the udp backend's threads have device and socket", usable)?;
    let directions = [("sent", path.sent), ("received", path.received)];
    let of = |figure: fn(&TrafficStatus) -> u64| {
        directions.map(|(direction, traffic)| ([("direction", direction.to_owned())], figure(&traffic)))
    };
    let help = "Packets to and from peers, one in each datagram";
    out.counters("packet_path_packets", help, &of(|traffic| traffic.packets))?;
    out.counters("packet_path_bytes", "Bytes of these packets", &of(|traffic| traffic.bytes))?;
    let help = "System calls on the udp backend's socket and device";
    out.counters("packet_path_calls", help, &of(|traffic| traffic.calls))?;
    let dropped: Vec<_> = path
        .dropped
        .iter()
        .map(|drop| ([("direction", drop.direction.clone()), ("reason", drop.reason.clone())], drop.packets))
        .collect();
    out.counters("packet_path_dropped", "Packets dropped by the udp backend, by reason", &dropped)?;
    let icmp = [("sent", path.icmp_errors_sent), ("suppressed", path.icmp_errors_suppressed)];
    let icmp = icmp.map(|(outcome, count)| ([("outcome", outcome.to_owned())], count));
    out.counters("packet_path_icmp_errors", "ICMP errors sent, and held back by the rate limit", &icmp)?;
    let help = "Times the udp backend's device went away under its threads";
    out.counter("packet_path_device_lost", help, path.device_lost)?;
    let help = "Times the udp backend's threads were started anew because one of them panicked";
    out.counter("packet_path_panics", help, path.panics)?;
    let outcomes = ["in-use", "switched-off", "refused"];
    let offloads: Vec<_> = path
        .offloads
        .iter()
        .flat_map(|offload| {
            outcomes.map(|outcome| {
                let labels = [("offload", offload.name.clone()), ("outcome", outcome.to_owned())];
                (labels, flag(offload.outcome == outcome))
            })
        })
        .collect();
    out.gauges("packet_path_offload", "1 at what became of each offload", &offloads)
}

fn pods(out: &mut Exposition<'_>, pods: &PodStatus) -> fmt::Result {
    out.gauge("pod_attachments", "Pods attached to this node", pods.attachments as u64)?;
    out.gauge("pod_addresses_used", "Addresses of the leased subnet in use", pods.addresses_used as u64)?;
    out.gauge("pod_addresses", "Addresses of the leased subnet", pods.addresses_total as u64)?;
    let stranded = pods.stranded.iter().map(|stranded| stranded.pods as u64).sum();
    out.gauge("pods_stranded", "Pods in a subnet that this node has no more", stranded)?;
    let counted = &pods.counters;
    out.counter("cni_adds", "ADDs that were committed", counted.adds)?;
    out.counter("cni_dels", "DELs that were answered, and attachments that GC removed", counted.dels)?;
    let failures: Vec<_> = counted
        .failures
        .iter()
        .map(|f| ([("verb", f.verb.clone()), ("code", f.code.to_string())], f.count))
        .collect();
    out.counters("cni_failures", "Requests of the CNI plugin that failed, by CNI error code", &failures)?;
    out.counter("cni_rollbacks", "ADDs undone because their plugin went away", counted.rolled_back)?;
    let help = "DELs that were left for the agent while it was away";
    out.counter("cni_tombstones", help, counted.tombstones_drained)?;
    out.counter("orphan_veths", "Veths without a record that were deleted", counted.orphans_removed)?;
    out.counter("dead_attachments", "Attachments that lost their veth without a DEL", counted.dead_freed)
}

struct Exposition<'a>(DescriptorEncoder<'a>);

impl Exposition<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.put(name, help, None, &ConstGauge::new(value))
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.put(name, help, None, &ConstCounter::new(value))
    }

    /// One counter with a value for each set of labels.
    fn counters(&mut self, name: &str, help: &str, values: &[(impl EncodeLabelSet, u64)]) -> fmt::Result {
        let help = &format!("{help}.");
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in values {
            ConstCounter::new(*value).encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }

    /// One gauge with a value for each set of labels.
    fn gauges(&mut self, name: &str, help: &str, values: &[(impl EncodeLabelSet, u64)]) -> fmt::Result {
        let help = &format!("{help}.");
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            ConstGauge::new(*value).encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn put(&mut self, name: &str, help: &str, unit: Option<Unit>, metric: &impl EncodeMetric) -> fmt::Result {
        // The full stop is what a Registry writes behind the help of its own metrics.
        let help = &format!("{help}.");
        metric.encode(self.0.encode_descriptor(name, help, unit.as_ref(), metric.metric_type())?)
    }
}

fn flag(yes: bool) -> u64 {
    u64::from(yes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::sample;

    #[test]
    fn the_exposition_says_what_the_status_says() {
        let text = Metrics::new(Arc::new(sample::ready)).render();
        for line in [
            "# HELP weft_node The node and its agent.",
            "weft_node_info{node=\"node-a\",version=\"0.1.0\",kernel=\"6.18.0\",distribution=\"Debian GNU/Linux 12\"} 1",
            "weft_ready 1",
            "weft_store_connected 1",
            "weft_store_relists_total 2",
            "weft_state_from_disk 0",
            "weft_network_config_notice{kind=\"differs\"} 0",
            "weft_underlay_usable 1",
            "weft_pods_stranded 0",
            "weft_lease_held 1",
            "# UNIT weft_lease_expiry_seconds seconds",
            "weft_lease_expiry_seconds 82800",
            "weft_peers 2",
            "weft_peers_programmed 1",
            "weft_peers_expired 1",
            "weft_leases_refused 1",
            "weft_lease_refused{key=\"10.9.1.0-24\"} 1",
            "weft_store_kind{kind=\"etcd\"} 1",
            "weft_objects 9",
            "weft_objects_pending 1",
            "weft_reconcile_passes_total 41",
            "weft_reconcile_repairs_total 3",
            "weft_reconcile_last_pass_age_seconds 1.5",
            "weft_netlink_monitor 1",
            "weft_netlink_overruns_total 1",
            "weft_pod_attachments 2",
            "weft_pod_addresses_used 2",
            "weft_pod_addresses 253",
            "weft_cni_adds_total 7",
            "weft_cni_dels_total 6",
            "# TYPE weft_cni_failures counter",
            "weft_cni_failures_total{verb=\"check\",code=\"104\"} 1",
            "weft_cni_failures_total{verb=\"reserve\",code=\"11\"} 8",
            "weft_cni_rollbacks_total 5",
            "weft_cni_tombstones_total 4",
            "weft_orphan_veths_total 3",
            "weft_dead_attachments_total 2",
            "weft_agent_resident_memory_bytes 9437184",
            "weft_agent_cpu_seconds_total 12.25",
            "weft_agent_uptime_seconds 7325",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
        }
    }

    #[test]
    fn the_packet_path_tells_what_it_carried_and_dropped() {
        let text = Metrics::new(Arc::new(sample::udp)).render();
        for line in [
            "weft_packet_path_usable 1",
            "weft_packet_path_packets_total{direction=\"sent\"} 4400",
            "weft_packet_path_packets_total{direction=\"received\"} 2200",
            "weft_packet_path_bytes_total{direction=\"sent\"} 6476800",
            "weft_packet_path_calls_total{direction=\"received\"} 300",
            "# TYPE weft_packet_path_dropped counter",
            "weft_packet_path_dropped_total{direction=\"sent\",reason=\"no-route\"} 3",
            "weft_packet_path_dropped_total{direction=\"received\",reason=\"unknown-peer\"} 5",
            "weft_packet_path_dropped_total{direction=\"received\",reason=\"short\"} 0",
            "weft_packet_path_icmp_errors_total{outcome=\"sent\"} 2",
            "weft_packet_path_icmp_errors_total{outcome=\"suppressed\"} 1",
            "weft_packet_path_device_lost_total 1",
            "weft_packet_path_panics_total 2",
            "weft_packet_path_offload{offload=\"tun-tso\",outcome=\"in-use\"} 1",
            "weft_packet_path_offload{offload=\"tun-tso\",outcome=\"refused\"} 0",
            "weft_packet_path_offload{offload=\"tun-uso\",outcome=\"refused\"} 1",
            "weft_packet_path_offload{offload=\"udp-gro\",outcome=\"switched-off\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
        }
        let other = Metrics::new(Arc::new(sample::ready)).render();
        assert!(!other.contains("packet_path"), "another backend has none:\n{other}");
    }

    #[test]
    fn what_stands_in_for_the_store_is_told() {
        let text = Metrics::new(Arc::new(sample::with_notices)).render();
        for line in [
            "weft_state_from_disk 1",
            "weft_state_from_disk_age_seconds 90",
            "weft_network_config_notice{kind=\"invalid\"} 1",
            "weft_network_config_notice{kind=\"differs\"} 0",
            "weft_network_policies_unenforced 1",
            "weft_underlay_usable 0",
            "weft_pods_stranded 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_shown() {
        let text = Metrics::new(Arc::new(sample::waiting)).render();
        for absent in ["lease_expiry", "objects", "reconcile", "netlink", "network_policies"] {
            assert!(!text.contains(absent), "{absent} in\n{text}");
        }
        assert!(text.contains("weft_ready 0\n") && text.contains("weft_store_connected 0\n"), "{text}");
    }
}
