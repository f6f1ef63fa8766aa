//! The texts of weftctl: short, aligned, what is wrong first.
//!
//! Much of it comes from outside: whoever may write to the store or start a pod chooses keys, names and parts of reasons.
//! So nothing reaches the terminal but by [`printable`].

use std::fmt::Write as _;

use super::Versions;
use crate::ping::{Leg, PingReport};
use crate::status::{
    AttachmentStatus, DataplaneStatus, LeaseStatus, NetworkPolicyStatus, NetworkStatus, PacketPathStatus,
    Status, TrafficStatus,
};

/// As crictl and docker shorten a container ID.
const SHORT_ID: usize = 12;

/// One line's worth of text: what would end the line, steer the terminal or reorder what it shows is escaped as in
/// Rust's literals (`\n`, `\u{1b}`). Quotes and backslashes stay: reasons have them, and they forge nothing.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' | '\\' => shown.push(c),
            _ => shown.extend(c.escape_debug()),
        }
    }
    shown
}

pub(super) fn status(status: &Status) -> String {
    let mut page = Page::default();
    page.line("node", format!("{}, weftd {}", status.node, status.version));
    let pending = status.dataplane.as_ref().map_or(0, |dataplane| dataplane.pending.len());
    if status.ready && pending == 0 {
        page.line("state", "ready".to_owned());
    } else if status.ready {
        page.line("state", format!("ready, but not all is in place: {pending} PENDING"));
    } else {
        page.line("state", "NOT READY: pods cannot be added".to_owned());
        for awaited in &status.waiting_for {
            page.line("", format!("waiting for {awaited}"));
        }
    }
    store(&mut page, status);
    if let Some(network) = &status.network {
        page.line("network", describe_network(network));
        if let Some(notice) = &network.notice {
            page.line("", format!("CONFIGURATION {}: {}", notice.kind.to_uppercase(), notice.text));
        }
    }
    if let Some(lease) = &status.lease {
        self::lease(&mut page, lease);
    }
    if let Some(underlay) = &status.underlay {
        let by = if underlay.chosen_by.is_empty() {
            String::new()
        } else {
            format!(", by {}", underlay.chosen_by)
        };
        page.line("underlay", format!("{} {}, MTU {}{by}", underlay.iface, underlay.address, underlay.mtu));
        if let Some(problem) = &underlay.problem {
            page.line("", format!("BROKEN: {problem}"));
        }
        if let Some(notice) = &underlay.notice {
            page.line("", format!("STAYS AS IT IS: {notice}"));
        }
    }
    if let Some(dataplane) = &status.dataplane {
        self::dataplane(&mut page, dataplane);
    }
    if let Some(path) = &status.packet_path {
        packet_path(&mut page, path);
    }
    peer_summary(&mut page, status);
    let pods = &status.pods;
    let bridges: Vec<&str> = pods.bridges.iter().map(|b| b.as_str()).collect();
    let on = if bridges.is_empty() { String::new() } else { format!(" on {}", bridges.join(", ")) };
    let addresses = format!("{} of {} addresses used", pods.addresses_used, pods.addresses_total);
    let limited = pods.list.iter().filter(|attachment| !attachment.limits.is_empty()).count();
    let limited = if limited == 0 { String::new() } else { format!(", {limited} with a bandwidth limit") };
    page.line("pods", format!("{}{on}, {addresses}{limited}", pods.attachments));
    for stranded in &pods.stranded {
        let owner =
            stranded.owner.map_or("no longer this node's".to_owned(), |ip| format!("now held by {ip}"));
        page.line(
            "",
            format!(
                "{} in {}, {owner}: they talk on this node only; recreate them",
                stranded.pods, stranded.subnet
            ),
        );
    }
    if let Some(policies) = &status.network_policies {
        network_policies(&mut page, policies);
    }
    let host = &status.host;
    page.line(
        "host",
        format!(
            "{}, {}, Linux {}, up {}",
            host.hostname,
            host.distribution,
            host.kernel,
            span(host.host_uptime)
        ),
    );
    for advice in &status.advice {
        page.line("", format!("ADVICE {}", advice.problem));
        page.line("", format!("       to mend it: {}", advice.fix));
    }
    let memory = host.agent_memory as f64 / f64::from(1 << 20);
    page.line(
        "agent",
        format!("up {}, {memory:.1} MiB, {:.2} s of CPU", span(host.agent_uptime), host.agent_cpu),
    );
    if let Some(problem) = &status.port_problem {
        page.line("", format!("NO METRICS by TCP: {problem}"));
    }
    page.text
}

fn store(page: &mut Page, status: &Status) {
    let store = &status.store;
    let state = if store.connected { "connected" } else { "NOT CONNECTED" };
    page.line("store", format!("{}: {state}", store.location));
    if let Some(problem) = &store.problem {
        page.line("", problem.clone());
    }
    if let Some(age) = store.recalled_age {
        page.line("", format!("network, lease and peers are FROM DISK, saved {} ago", span(age)));
    }
    if store.one_machine_only {
        page.line("", "ONE MACHINE ONLY: nodes on other machines cannot join an embedded store".to_owned());
    }
}

fn lease(page: &mut Page, lease: &LeaseStatus) {
    let subnets: Vec<String> = lease.key.subnets().map(|s| s.to_string()).collect();
    let end = match (lease.state.as_str(), lease.expires_in) {
        ("held" | "recalled", Some(seconds)) => format!(", expires in {}", span(seconds)),
        ("held" | "recalled", None) => ", does not expire".to_owned(),
        _ => String::new(),
    };
    page.line(
        "lease",
        format!("{} {}, public IP {}{end}", subnets.join(" + "), lease.state, lease.public_ip),
    );
    if let Some(problem) = &lease.problem {
        page.line("", problem.clone());
    }
}

fn dataplane(page: &mut Page, dataplane: &DataplaneStatus) {
    let device = dataplane.device.as_ref().map_or(String::new(), |d| format!("{d}, "));
    let monitor = if dataplane.monitor { "" } else { ", monitor off: only the sweep repairs" };
    page.line(
        "dataplane",
        format!(
            "{device}pod MTU {}, {} objects right, {} pending, {} repairs{monitor}",
            dataplane.mtu,
            dataplane.objects,
            dataplane.pending.len(),
            dataplane.repairs
        ),
    );
    for pending in &dataplane.pending {
        page.line(
            "",
            format!("PENDING {}: {} (tried {} times)", pending.object, pending.error, pending.attempts),
        );
    }
    if let Some(error) = &dataplane.last_error {
        page.line("", format!("last error: {error}"));
    }
}

fn packet_path(page: &mut Page, path: &PacketPathStatus) {
    let traffic = |name: &str, traffic: &TrafficStatus| {
        format!(
            "{} packets {name} ({:.1} MiB, {} system calls)",
            traffic.packets,
            traffic.bytes as f64 / f64::from(1 << 20),
            traffic.calls
        )
    };
    let (sent, received) = (traffic("sent", &path.sent), traffic("received", &path.received));
    page.line("path", format!("UDP {}, {sent}, {received}", path.listen));
    if let Some(problem) = &path.problem {
        page.line("", format!("BROKEN: {problem}"));
    }
    let in_use: Vec<&str> =
        path.offloads.iter().filter(|o| o.outcome == "in-use").map(|o| o.name.as_str()).collect();
    let in_use = if in_use.is_empty() { "none".to_owned() } else { in_use.join(", ") };
    page.line("", format!("offloads in use: {in_use}"));
    for offload in path.offloads.iter().filter(|o| o.outcome != "in-use") {
        let detail = offload.detail.as_ref().map_or(String::new(), |detail| format!(": {detail}"));
        page.line("", format!("offload {} {}{detail}", offload.name, offload.outcome));
    }
    for dropped in path.dropped.iter().filter(|dropped| dropped.packets > 0) {
        let way = if dropped.direction == "sent" { "to" } else { "from" };
        page.line("", format!("dropped {} {way} peers: {}", dropped.packets, dropped.reason));
    }
    if path.icmp_errors_sent + path.icmp_errors_suppressed > 0 {
        let (sent, held) = (path.icmp_errors_sent, path.icmp_errors_suppressed);
        page.line("", format!("ICMP errors: {sent} sent, {held} held back by the rate limit"));
    }
    if path.device_lost > 0 {
        page.line("", format!("the device went away {} times", path.device_lost));
    }
    if let Some(problem) = &path.icmp_problem {
        page.line("", format!("NO ICMP ERRORS are sent: {problem}"));
    }
    if path.panics > 0 {
        page.line("", format!("a BUG: its threads panicked and were started anew {} times", path.panics));
    }
}

fn peer_summary(page: &mut Page, status: &Status) {
    let programmed = status.peers.iter().filter(|peer| peer.programmed).count();
    page.line("peers", format!("{programmed} of {} programmed", status.peers.len()));
    for peer in status.peers.iter().filter(|peer| !peer.programmed) {
        let problem = peer.problem.as_deref().unwrap_or("not programmed yet");
        page.line("", format!("{} via {}: {problem}", peer.key, peer.public_ip));
    }
    for (peer, left) in status.peers.iter().filter_map(|peer| Some((peer, peer.grace_left?))) {
        page.line("", format!("{} via {}: {}", peer.key, peer.public_ip, expired(left)));
    }
    for refused in &status.refused {
        page.line("", format!("REFUSED {}: {}", refused.key, refused.reason));
    }
}

/// Nothing where there is nothing to enforce.
fn network_policies(page: &mut Page, policies: &NetworkPolicyStatus) {
    let line = match (policies.warning(), &policies.problem) {
        (Some(warning), _) => format!("NOT ENFORCED: {warning}"),
        (None, Some(problem)) => format!("not known whether they are enforced: {problem}"),
        (None, None) if policies.enforcers.is_empty() => return,
        (None, None) => format!("enforced by {}", policies.enforcers.join(", ")),
    };
    page.line("policies", line);
}

fn describe_network(network: &NetworkStatus) -> String {
    let port = network.port.map_or(String::new(), |port| format!(", UDP port {port}"));
    let vni = network.vni.map_or(String::new(), |vni| format!(", VNI {vni}"));
    let subnets = match network.any_len {
        true => "in the Nodes' podCIDRs".to_owned(),
        false => format!("in /{} subnets", network.subnet_len),
    };
    format!("{} {subnets}, {}{vni}{port}", network.network, network.backend)
}

pub(super) fn peers(status: &Status) -> String {
    if status.peers.is_empty() && status.refused.is_empty() {
        return peers_unknown(status)
            .map_or_else(|| "no peers: no other node has a lease\n".to_owned(), |why| format!("{why}\n"));
    }
    let mut table = Table::new(["#", "SUBNET", "PUBLIC IP", "BACKEND", "STATE"]);
    for (index, peer) in status.peers.iter().enumerate() {
        let subnets: Vec<String> = peer.key.subnets().map(|s| s.to_string()).collect();
        let mut state = match (&peer.problem, peer.programmed) {
            (None, true) => "programmed".to_owned(),
            (None, false) => "NOT PROGRAMMED".to_owned(),
            (Some(problem), true) => format!("programmed: {problem}"),
            (Some(problem), false) => format!("NOT PROGRAMMED: {problem}"),
        };
        if let Some(left) = peer.grace_left {
            let _ = write!(state, "; {}", expired(left));
        }
        let (number, ip) = ((index + 1).to_string(), peer.public_ip.to_string());
        table.row([number, subnets.join(" + "), ip, peer.backend.clone(), state]);
    }
    for refused in &status.refused {
        let state = format!("REFUSED: {}", refused.reason);
        table.row(["-".to_owned(), refused.key.clone(), String::new(), String::new(), state]);
    }
    table.print()
}

fn expired(left: u64) -> String {
    format!("expired, {} left", span(left))
}

/// Why nothing can be said of peers, if that is so: those once known stay known while the store is away.
pub(super) fn peers_unknown(status: &Status) -> Option<String> {
    let silent = status.peers.is_empty() && status.refused.is_empty() && !status.store.connected;
    silent.then(|| {
        let problem = status.store.problem.as_deref().unwrap_or("no answer yet");
        format!("not known until the store answers: {}", printable(problem))
    })
}

pub(super) fn pods(list: &[AttachmentStatus]) -> String {
    if list.is_empty() {
        return "no pods: nothing is attached to this node\n".to_owned();
    }
    let mut table =
        Table::new(["POD", "ADDRESS", "INTERFACE", "VETH", "BRIDGE", "STATE", "HOST PORTS", "LIMITS"]);
    for attachment in list {
        let short = || attachment.container_id.chars().take(SHORT_ID).collect();
        let addresses: Vec<String> = attachment.addresses.iter().map(|a| a.to_string()).collect();
        table.row([
            attachment.pod.clone().unwrap_or_else(short),
            addresses.join(", "),
            attachment.ifname.to_string(),
            attachment.host_veth.to_string(),
            attachment.bridge.to_string(),
            attachment.state.clone(),
            attachment.host_ports.join(", "),
            attachment.limits.join(", "),
        ]);
    }
    table.print()
}

pub(super) fn ping(reports: &[PingReport]) -> String {
    let mut text = String::new();
    for report in reports {
        let _ = writeln!(text, "{} ({})", report.peer, report.public_ip);
        for (name, leg) in [("underlay", &report.underlay), ("overlay", &report.overlay)] {
            let _ = writeln!(text, "  {name:<9} {}", describe_leg(leg));
        }
        let _ = writeln!(text, "  {}", printable(&report.verdict));
    }
    if let [_, _, ..] = reports {
        let reachable = reports.iter().filter(|report| report.reachable).count();
        let _ = writeln!(text, "{reachable} of {} peers reachable through the overlay", reports.len());
    }
    text
}

fn describe_leg(leg: &Leg) -> String {
    let mut text = format!("{:<15} {} of {} answered", leg.target.to_string(), leg.received, leg.sent);
    if let (Some(min), Some(avg), Some(max)) = (leg.rtt_min, leg.rtt_avg, leg.rtt_max) {
        let _ = write!(text, ", RTT {min:.2}/{avg:.2}/{max:.2} ms (min/avg/max)");
    }
    if let Some(problem) = &leg.problem {
        let _ = write!(text, ", {}", printable(problem));
    }
    text
}

pub(super) fn versions(versions: &Versions<'_>) -> String {
    let weftd = printable(versions.weftd.unwrap_or("does not answer"));
    format!("weftctl {}\nweftd   {weftd}\n", versions.weftctl)
}

/// `1 d 4 h`, `2 h 3 min`, `40 s`: the two largest units.
pub(super) fn span(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let first = units.iter().position(|(size, _)| seconds >= *size).unwrap_or(units.len() - 1);
    let (size, name) = units[first];
    let mut text = format!("{} {name}", seconds / size);
    if let Some((next, name)) = units.get(first + 1).filter(|(next, _)| seconds % size >= *next) {
        let _ = write!(text, " {} {name}", seconds % size / next);
    }
    text
}

/// Lines with a name in a column of its own.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, name: &str, value: String) {
        let _ = writeln!(self.text, "{name:<10} {}", printable(&value));
    }
}

/// Columns as wide as their widest cell.
struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    fn new(head: [&str; N]) -> Self {
        Self { rows: vec![head.map(str::to_owned)] }
    }

    fn row(&mut self, row: [String; N]) {
        self.rows.push(row.map(|cell| printable(&cell)));
    }

    fn print(&self) -> String {
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; N] = std::array::from_fn(width);
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        }
        text
    }
}
