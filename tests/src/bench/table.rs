//! A run as a page of Markdown: conditions, a table per setting, goals, and how to read it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use weft_agent::status::{DropCount, OffloadStatus, PacketPathStatus};

use super::choice::{Configuration, Load, Setting};
use super::goals::{GOALS, Wanted, verdict};
use super::result::{Cell, Figure, Results};
use super::stats::Summary;
use super::surroundings::Surroundings;

/// A column: its heading, and what stands in it.
type Column = (&'static str, Load, Figure);

const RATES: [Column; 4] = [
    ("TCP, 1 stream, Gbit/s", Load::Tcp1, Figure::Gbps),
    ("TCP, 4 streams, Gbit/s", Load::Tcp4, Figure::Gbps),
    ("UDP, 1 flow of 64 bytes, kpps", Load::Udp1, Figure::Kpps),
    ("UDP, 64 flows of mixed sizes, kpps", Load::Udp64, Figure::Kpps),
];

const COSTS: [Column; 8] = [
    ("1 connection: p50 µs", Load::Exchange1, Figure::P50),
    ("p99 µs", Load::Exchange1, Figure::P99),
    ("per second", Load::Exchange1, Figure::PerSecond),
    ("16 connections: p50 µs", Load::Exchange16, Figure::P50),
    ("p99 µs", Load::Exchange16, Figure::P99),
    ("per second", Load::Exchange16, Figure::PerSecond),
    ("CPU s per GB, TCP 1", Load::Tcp1, Figure::CpuPerGb),
    ("CPU s per GB, TCP 4", Load::Tcp4, Figure::CpuPerGb),
];

pub fn page(results: &Results) -> String {
    let mut page = String::from("# Dataplanes side by side\n\n");
    let selection = results.selection();
    let _ = writeln!(page, "{}\n", conditions(results));
    page += HOW_TO_READ;
    if !selection.settings.is_empty() {
        page += "\n![The same as a picture](dataplane.svg)\n";
    }
    for setting in selection.settings {
        let _ = write!(page, "\n## {}\n\n", capitalised(setting.title()));
        page += &table(results, setting, &RATES, true);
        page.push('\n');
        page += &table(results, setting, &COSTS, false);
    }
    page += "\n## Goals of the udp backend\n\n";
    page += &goals(results);
    if !results.packet_paths.is_empty() {
        page += "\n## What the packet path says of itself\n\n";
        for (configuration, path) in &results.packet_paths {
            let _ = writeln!(page, "- {}: {}", configuration.title(), packet_path(path));
        }
    }
    if !results.failures.is_empty() {
        page += "\n## What failed\n\n";
        results.failures.iter().for_each(|failure| {
            let _ = writeln!(page, "- {}", failure.replace('\n', " "));
        });
    }
    page += WHY_OTHERWISE;
    page
}

/// Few figures of much: medians and ratios to node-to-node, for whoever does not want to read the page.
pub fn summary(results: &Results) -> String {
    let columns = [
        ("TCP, 1 stream, Gbit/s", Setting::Full, Load::Tcp1, Figure::Gbps),
        ("the same, GRO only", Setting::Gro, Load::Tcp1, Figure::Gbps),
        ("UDP, 64 bytes, kpps", Setting::Full, Load::Udp1, Figure::Kpps),
        ("UDP, 64 flows, kpps", Setting::Full, Load::Udp64, Figure::Kpps),
        ("request/response, p50 µs", Setting::Full, Load::Exchange1, Figure::P50),
        ("CPU s per GB", Setting::Full, Load::Tcp1, Figure::CpuPerGb),
    ];
    let mut table = String::from("| one core |");
    columns.iter().for_each(|(heading, ..)| {
        let _ = write!(table, " {heading} |");
    });
    let _ = write!(table, " commonly quoted for flannel |\n|---|{}---|", "---:|".repeat(columns.len()));
    for configuration in results.selection().configurations {
        let _ = write!(table, "\n| {} |", configuration.title());
        for (_, setting, load, figure) in columns {
            let cell = Cell { setting, load, configuration };
            let median = results.summary(cell, figure).map(|summary| number(summary.median));
            let ratio = results.ratio(cell, Configuration::Node, figure);
            let ratio = ratio.filter(|_| configuration != Configuration::Node);
            let ratio = ratio.map(|ratio| format!(" ×{}", number(ratio.median))).unwrap_or_default();
            let _ = write!(table, " {}{ratio} |", median.unwrap_or_else(|| "-".to_owned()));
        }
        let _ = write!(table, " {} |", quoted(configuration));
    }
    table + "\n"
}

fn conditions(results: &Results) -> String {
    let c = &results.conditions;
    let how = format!(
        "{} rounds, windows of {} s after {} s of warm-up, configurations in turns",
        c.rounds, c.seconds, c.warm_up_seconds
    );
    where_and_when(&c.surroundings, &how)
}

pub(super) fn where_and_when(s: &Surroundings, how: &str) -> String {
    format!(
        "{}; Linux {}; weft {}; {}. {how}. Load average before: {:.2}; taken by the hypervisor: {:.1} %.",
        s.machine,
        s.kernel,
        s.commit,
        s.date,
        s.load_average_before,
        s.stolen * 100.0
    )
}

/// Columns that nobody measured are left out.
fn table(results: &Results, setting: Setting, columns: &[Column], with_quoted: bool) -> String {
    let selection = results.selection();
    let columns: Vec<_> = columns.iter().filter(|(_, load, _)| selection.loads.contains(load)).collect();
    let mut table = String::from("| |");
    columns.iter().for_each(|(heading, ..)| {
        let _ = write!(table, " {heading} |");
    });
    if columns.is_empty() {
        return String::new();
    }
    if with_quoted {
        table += " commonly quoted for flannel, of node to node |";
    }
    table += "\n|---|";
    table += &"---:|".repeat(columns.len());
    if with_quoted {
        table += "---|";
    }
    for configuration in selection.configurations {
        let _ = write!(table, "\n| {} |", configuration.title());
        for (_, load, figure) in &columns {
            let cell = Cell { setting, load: *load, configuration };
            let _ = write!(table, " {} |", value(results, cell, *figure));
        }
        if with_quoted {
            let _ = write!(table, " {} |", quoted(configuration));
        }
    }
    table + "\n"
}

fn quoted(configuration: Configuration) -> &'static str {
    match configuration {
        Configuration::Node => "1",
        Configuration::HostGw => "0.9",
        Configuration::Vxlan => "0.7 to 0.8",
        Configuration::Udp | Configuration::UdpPlain => "\"the worst\", no figure",
        Configuration::Naive => "flannel's udp works this way",
    }
}

/// Median, quartiles, ratio to node-to-node, and what was lost.
fn value(results: &Results, cell: Cell, figure: Figure) -> String {
    let Some(summary) = results.summary(cell, figure) else { return "-".into() };
    let (median, quartiles) = spread(summary);
    let mut text = format!("**{median}** {quartiles}");
    if cell.configuration != Configuration::Node
        && let Some(ratio) = results.ratio(cell, Configuration::Node, figure)
    {
        let _ = write!(text, " ×{}", number(ratio.median));
    }
    if let Some(loss) = results.summary(cell, Figure::Loss) {
        let _ = write!(text, ", {:.0} % lost", loss.median * 100.0);
    }
    if summary.n < results.conditions.rounds {
        let _ = write!(text, " n={}", summary.n);
    }
    text
}

/// Median and quartiles.
pub(super) fn spread(of: Summary) -> (String, String) {
    (number(of.median), format!("({} - {})", number(of.q1), number(of.q3)))
}

/// Three significant digits.
pub fn number(value: f64) -> String {
    let digits = if value.abs() < 1e-12 { 0 } else { 2 - value.abs().log10().floor() as i32 };
    if digits < 0 {
        let unit = 10_f64.powi(-digits);
        return format!("{:.0}", (value / unit).round() * unit);
    }
    format!("{value:.0$}", digits as usize)
}

fn goals(results: &Results) -> String {
    let mut text = String::from("| | setting | to | wanted | measured | |\n|---|---|---|---:|---:|---|\n");
    for goal in &GOALS {
        let wanted = match goal.wanted {
            Wanted::AtLeast(ratio) => format!("≥ {ratio}"),
            Wanted::NoWorse => "≤ 1".to_owned(),
        };
        let (measured, outcome) = match verdict(goal, results) {
            None => ("-".to_owned(), "not measured"),
            Some((ratio, is_met)) => {
                let (median, quartiles) = spread(ratio);
                (format!("{median} {quartiles}"), if is_met { "met" } else { "**missed**" })
            }
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {wanted} | {measured} | {outcome} |",
            goal.what,
            goal.setting.title(),
            goal.to.title(),
        );
    }
    text
}

/// On the sending node, over the whole run.
fn packet_path(path: &PacketPathStatus) -> String {
    let mut by_outcome: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for OffloadStatus { name, outcome, detail } in &path.offloads {
        let why = detail.as_ref().map(|detail| format!(" ({detail})")).unwrap_or_default();
        by_outcome.entry(format!("{outcome}{why}")).or_default().push(name);
    }
    let mut parts: Vec<String> =
        by_outcome.iter().map(|(outcome, names)| format!("{outcome} {}", names.join(", "))).collect();
    for (what, traffic) in [("sent", &path.sent), ("received", &path.received)] {
        let per_call = traffic.packets as f64 / traffic.calls.max(1) as f64;
        parts.push(format!("{} packets {what}, {} in a system call", traffic.packets, number(per_call)));
    }
    for DropCount { direction, reason, packets } in path.dropped.iter().filter(|drop| drop.packets > 0) {
        parts.push(format!("{packets} {direction} packets dropped: {reason}"));
    }
    parts.join("; ")
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

const HOW_TO_READ: &str = "\
Each cell: **median** (first to third quartile) ×ratio to node-to-node traffic. A ratio is the median of the ratios of each
round, so a machine that is slower for a while does not bend it. kpps: thousand datagrams delivered per second. UDP is sent
faster than anything carries it, so what is lost says only how far the sender was ahead. CPU: busy time of the cores in
question, softirq included, per gigabyte of payload (`/proc/stat`, steps of 10 ms).

- *node to node*: between the nodes' own addresses, no pod, no bridge. What follows goes from pod to pod through `cni0`.
- *host-gw*, *vxlan*, *udp*: weftd, as it runs anywhere, on a store of its own; no masquerade, no other firewall rule.
- *udp, offloads off*: the same with every `--udp-offload-off`.
- *one packet per system call*: a forwarder that works as flannel's udp backend does, part of the benchmark only. Same
  device, addresses and routes.
- One core: clients, servers, agents and softirq share a single core, so throughput is the inverse of what a packet costs.
- Full offload: veth as it is, super-packets pass whole. Without segmentation offload: TSO, GSO, UDP segmentation and GRO
  off on the underlay. GRO only: the same with GRO on, nearest to a plain network card. Checksum offload is on in all.
- Clients and servers are processes in the pods. The receiving side, or the one that waits for responses, measures over a
  window of its own after a warm-up. A request and its response are 64 bytes each, over TCP.
- TCP uses cubic. 64 flows: datagrams of 64, 128, 256, 400, 576, 800, 1100 and 1400 bytes, one flow after the other; half
  of the flows keep their size, the others change it with each datagram.
";

const WHY_OTHERWISE: &str = "
## Why these ratios are not the ones commonly quoted

Quoted for flannel are a loss of about 10 % with host-gw and of 20 to 30 % with VXLAN, and that udp is the worst. Such
figures come from two machines and a network card, where the card is full before the processors are: the overlay's work
then hides in idle time, and with several streams little of it remains visible (a public series of 2024 on 40 Gbit/s has
flannel's VXLAN at 0.64 of bare metal with one TCP stream and at 0.98 with eight). Here both nodes are network namespaces
of one kernel that share the cores, and there is no card: a veth pair hands a packet over for almost nothing, which makes
node-to-node traffic very fast, and everything that a pod's packet passes on top - a veth pair and a bridge on each node,
then the tunnel - shows in full. So host-gw loses more here than on a wire, and so does VXLAN; where the underlay must
segment in software, VXLAN can even pass host-gw, because its device merges packets again (GRO) after taking the header
off. These are ratios of processor cost, not of what a wire would carry.
";

#[cfg(test)]
mod tests {
    use super::super::result::tests::{cell, conditions, packet_path as packet_path_of_the_test, sample};
    use super::*;

    #[test]
    fn numbers_have_three_significant_digits() {
        let wanted = [
            (0.0, "0"),
            (0.017_36, "0.0174"),
            (0.5, "0.500"),
            (9.294, "9.29"),
            (38.19, "38.2"),
            (171.5, "172"),
            (65_240.0, "65200"),
        ];
        for (value, text) in wanted {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_cell_tells_median_quartiles_ratio_loss_and_missing_rounds() {
        let mut results = Results::new(conditions());
        let udp = cell(Setting::Full, Load::Udp1, Configuration::Udp);
        let node = Cell { configuration: Configuration::Node, ..udp };
        for (round, kpps) in [(0, 100.0), (1, 120.0)] {
            results.add(udp, round, sample(&[(Figure::Kpps, kpps), (Figure::Loss, 0.25)]));
            results.add(node, round, sample(&[(Figure::Kpps, 200.0), (Figure::Loss, 0.0)]));
        }
        assert_eq!(value(&results, udp, Figure::Kpps), "**110** (105 - 115) ×0.550, 25 % lost n=2");
        assert_eq!(value(&results, node, Figure::Kpps), "**200** (200 - 200), 0 % lost n=2");
        let page = page(&results);
        let row = "| udp | **110** (105 - 115) ×0.550, 25 % lost n=2 | \"the worst\", no figure |";
        assert!(page.contains(row), "{page}");
        assert!(page.contains("## One core, underlay with full offload") && !page.contains("two cores,"));
        let missed = "| small packets, one flow | one core, underlay with full offload | node to node | ≥ 0.85 | 0.550 (0.525 - 0.575) | **missed** |";
        assert!(page.contains(missed), "{page}");
        assert!(page.contains("| ≥ 12 | - | not measured |"), "{page}");
    }

    #[test]
    fn the_summary_has_medians_and_ratios_of_what_was_measured() {
        let mut results = Results::new(conditions());
        for (configuration, gbps) in [(Configuration::Node, 40.0), (Configuration::Vxlan, 20.0)] {
            results.add(cell(Setting::Full, Load::Tcp1, configuration), 0, sample(&[(Figure::Gbps, gbps)]));
        }
        let summary = summary(&results);
        assert!(summary.contains("| node to node | 40.0 | - | - | - | - | - | 1 |"), "{summary}");
        assert!(summary.contains("| vxlan | 20.0 ×0.500 | - | - | - | - | - | 0.7 to 0.8 |"), "{summary}");
    }

    #[test]
    fn what_failed_is_told() {
        let mut results = Results::new(conditions());
        assert!(!page(&results).contains("What failed"));
        results.failures.push("round 2: udp in full: nothing\nheard".into());
        results.packet_paths.insert(Configuration::Udp, packet_path_of_the_test());
        let path = "- udp: in-use tun-tso, udp-gro; refused (EINVAL) tun-uso; 4000 packets sent, 40.0 in a system call; \
                    300 packets received, 1.50 in a system call; 7 sent packets dropped: send-failed\n";
        assert!(page(&results).contains(path), "{}", page(&results));
        assert!(page(&results).contains("- round 2: udp in full: nothing heard\n"));
    }
}
