//! A run as a page of Markdown: conditions, how to read it, a table per kind of pod, goals.

use std::fmt::Write as _;

use super::attachment::Verb;
use super::choice::{HostPorts, Load, Plugin};
use super::goals::{GOALS, verdict};
use super::result::{Cell, Figure, Results};
use crate::bench::table::{number, spread, where_and_when};

/// A column: its heading, and where its figures come from.
type Column = (&'static str, Source);

#[derive(Debug, Clone, Copy)]
enum Source {
    Rounds(Figure),
    /// p99.
    Tail(Verb),
}

const COLUMNS: [Column; 8] = [
    ("ADD p50 ms", Source::Rounds(Figure::AddP50)),
    ("ADD p99 ms", Source::Tail(Verb::Add)),
    ("all ADDs ms", Source::Rounds(Figure::AddWall)),
    ("DEL p50 ms", Source::Rounds(Figure::DelP50)),
    ("DEL p99 ms", Source::Tail(Verb::Del)),
    ("all DELs ms", Source::Rounds(Figure::DelWall)),
    ("DELs until nothing is left ms", Source::Rounds(Figure::Gone)),
    ("CPU ms of a pod", Source::Rounds(Figure::Cpu)),
];

pub fn page(results: &Results) -> String {
    let mut page = String::from("# CNI plugins side by side\n\n");
    let c = &results.conditions;
    let how = format!(
        "{} rounds, {} pods one after the other in each, plugins in turns; reference plugins {}",
        c.rounds, c.pods, c.reference
    );
    let _ = writeln!(page, "{}\n", where_and_when(&c.surroundings, &how));
    page += HOW_TO_READ;
    page += "\n![The same as a picture](cni.svg)\n";
    for host_ports in results.selection().host_ports {
        let _ = write!(page, "\n## Pods {}\n\n{}", host_ports.title(), table(results, host_ports));
    }
    page += "\n## Goals\n\n";
    page += &goals(results);
    page += "\n## Executables\n\n";
    page += &executables(results);
    if !results.failures.is_empty() {
        page += "\n## What failed\n\n";
        results.failures.iter().for_each(|failure| {
            let _ = writeln!(page, "- {}", failure.replace('\n', " "));
        });
    }
    page
}

/// Few figures of much, with the machine named: medians and ratios to the reference chain.
pub fn summary(results: &Results) -> String {
    let columns = [
        ("ADD, p50 ms", HostPorts::None, Load::Alone, Figure::AddP50),
        ("DEL, p50 ms", HostPorts::None, Load::Alone, Figure::DelP50),
        ("100 ADDs at once, ms in all", HostPorts::None, Load::Hundred, Figure::AddWall),
        ("100 DELs at once, ms in all", HostPorts::None, Load::Hundred, Figure::DelWall),
        ("CPU ms of a pod", HostPorts::None, Load::Alone, Figure::Cpu),
        ("with a port mapping: ADD, p50 ms", HostPorts::One, Load::Alone, Figure::AddP50),
        ("DEL, p50 ms", HostPorts::One, Load::Alone, Figure::DelP50),
    ];
    let mut table = String::from("| |");
    columns.iter().for_each(|(heading, ..)| {
        let _ = write!(table, " {heading} |");
    });
    let _ = write!(table, "\n|---|{}", "---:|".repeat(columns.len()));
    for plugin in results.selection().plugins {
        let _ = write!(table, "\n| {} |", plugin.title(HostPorts::None));
        for (_, host_ports, load, figure) in columns {
            let cell = Cell { host_ports, load, plugin };
            let median = results.summary(cell, figure).map(|summary| number(summary.median));
            let ratio = results.ratio(cell, Plugin::Reference, figure);
            let ratio = ratio.filter(|_| plugin != Plugin::Reference);
            let ratio = ratio.map(|ratio| format!(" ×{}", number(ratio.median))).unwrap_or_default();
            let _ = write!(table, " {}{ratio} |", median.unwrap_or_else(|| "-".to_owned()));
        }
    }
    let s = &results.conditions.surroundings;
    let _ = write!(table, "\n\nOn {}, Linux {}, {}.\n", s.machine, s.kernel, s.date);
    table
}

fn table(results: &Results, host_ports: HostPorts) -> String {
    let mut table = String::from("| | |");
    COLUMNS.iter().for_each(|(heading, _)| {
        let _ = write!(table, " {heading} |");
    });
    let _ = write!(table, "\n|---|---|{}", "---:|".repeat(COLUMNS.len()));
    let selection = results.selection();
    for load in &selection.loads {
        for plugin in selection.plugins.iter().filter(|plugin| plugin.can(host_ports)) {
            let cell = Cell { host_ports, load: *load, plugin: *plugin };
            let _ = write!(table, "\n| {} | {} |", load.title(), plugin.title(host_ports));
            for (_, source) in COLUMNS {
                let _ = write!(table, " {} |", value(results, cell, source));
            }
        }
    }
    table + "\n"
}

/// Median over the rounds, quartiles, ratio to the reference; or the tail of all calls.
fn value(results: &Results, cell: Cell, source: Source) -> String {
    let figure = match source {
        // One after the other they take what they take; the harness's own time is in it.
        Source::Rounds(Figure::AddWall | Figure::DelWall | Figure::Gone) if cell.load == Load::Alone => {
            return String::new();
        }
        Source::Rounds(figure) => figure,
        Source::Tail(verb) => {
            return results.of_all_calls(cell, verb, 0.99).map_or_else(|| "-".into(), number);
        }
    };
    let Some(summary) = results.summary(cell, figure) else { return "-".into() };
    let (median, quartiles) = spread(summary);
    let mut text = format!("**{median}** {quartiles}");
    if cell.plugin != Plugin::Reference
        && let Some(ratio) = results.ratio(cell, Plugin::Reference, figure)
    {
        let _ = write!(text, " ×{}", number(ratio.median));
    }
    if summary.n < results.conditions.rounds {
        let _ = write!(text, " n={}", summary.n);
    }
    text
}

fn goals(results: &Results) -> String {
    let mut text = String::from("| | of | wanted | measured | |\n|---|---|---:|---:|---|\n");
    for goal in &GOALS {
        let (measured, outcome) = match verdict(goal, results) {
            None => ("-".to_owned(), "not measured"),
            Some((measured, true)) => (number(measured), "met"),
            Some((measured, false)) => (number(measured), "**missed**"),
        };
        let (what, to, wanted) = (goal.what, goal.to, number(goal.at_most));
        let _ = writeln!(text, "| {what} | {to} | ≤ {wanted} | {measured} | {outcome} |");
    }
    text
}

fn executables(results: &Results) -> String {
    let mut text = String::from("| | size, MiB | peak memory, MiB |\n|---|---:|---:|\n");
    for (name, executable) in &results.executables {
        let peak = executable.peak.map_or_else(
            || "-".to_owned(),
            |peak| {
                let bound = if peak.is_bound() { "≤ " } else { "" };
                format!("{bound}{}", number(peak.kib as f64 / 1024.0))
            },
        );
        let size = number(executable.bytes as f64 / 1024.0 / 1024.0);
        let _ = writeln!(text, "| {name} | {size} | {peak} |");
    }
    text
}

const HOW_TO_READ: &str = "\
Each cell: **median** over the rounds (first to third quartile) ×ratio to the reference chain. A ratio is the median of the
ratios of each round, so a machine that is slower for a while does not bend it. p99 is of all calls of all rounds.

- Times are from exec to exit: what a runtime waits for. Those of a chain's calls are added.
- *floor program*: one process that makes veth pair, bridge port, address and default route by the same netlink messages and
  does nothing else: no lease of an address, no agent, no file, no JSON, no announcement. Part of the benchmark only.
- *weft*: the plugin with weftd, as it runs anywhere, on a store of its own.
- What weftd and host-local write down for a pod lies in memory (tmpfs), as `/run` does on any host. host-local's default is
  a directory on a disk, where it would be slower.
- *bridge + host-local*: the reference plugins, which flannel's own plugin calls: stock flannel starts one more process for
  each verb. Behind them `portmap`, where pods publish a port; where they do not, it is not called.
- Alone: one call after the other, ADD for each pod and then DEL. At once: a thread for each call starts it at the same
  moment; \"all\" is from the first exec to the last exit. \"Until nothing is left\": from the first exec until the node has no
  interface of these pods, whoever takes it away.
- CPU: user and kernel mode from ADD to DEL, of the plugin with all that it starts and of the agent. What the kernel does in
  threads of its own belongs to nobody and is missing everywhere.
- Each plugin has a node of its own, a network namespace with a bridge on which one pod stays; pods' namespaces are made
  before and used again. IPv4 only, `isDefaultGateway` and `hairpinMode` on, no masquerade.
- Peak memory is the highest resident set, pages of the executable included; of a plugin and of what it calls, the highest.
";

#[cfg(test)]
mod tests {
    use super::super::launch::Peak;
    use super::super::result::Executable;
    use super::super::result::tests::{cell, results, sample};
    use super::*;

    #[test]
    fn a_row_has_medians_ratios_tails_and_missing_rounds() {
        let mut results = results(2);
        results.add(cell(Plugin::Weft, Load::Ten), 0, sample(&[1.0, 2.0, 3.0]));
        results.add(cell(Plugin::Reference, Load::Ten), 0, sample(&[8.0]));
        results.add(cell(Plugin::Reference, Load::Ten), 1, sample(&[8.0]));
        results.add(cell(Plugin::Weft, Load::Alone), 0, sample(&[1.0]));
        let page = page(&results);
        let row = "| 10 at once | weft | **2.00** (2.00 - 2.00) ×0.250 n=1 | 2.98 | **6.00** (6.00 - 6.00) ×0.750 n=1 \
                   | **4.00** (4.00 - 4.00) ×0.250 n=1 | 5.96 | **12.0** (12.0 - 12.0) ×0.750 n=1 \
                   | **50.0** (50.0 - 50.0) ×1.00 n=1 | **2.25** (2.25 - 2.25) ×1.00 n=1 |";
        assert!(page.contains(row), "{page}");
        assert!(page.contains("| 10 at once | bridge + host-local | **8.00** (8.00 - 8.00) |"), "{page}");
        let alone = "| alone | weft | **1.00** (1.00 - 1.00) n=1 | 1.00 |  | **2.00** (2.00 - 2.00) n=1 | 2.00 |  |  |";
        assert!(page.contains(alone), "a wall time of calls in a row says nothing: {page}");
        assert!(!page.contains("port mapping each") && !page.contains("What failed"), "{page}");
    }

    #[test]
    fn a_summary_has_a_row_for_each_plugin_and_names_the_machine() {
        let mut results = results(1);
        results.add(cell(Plugin::Weft, Load::Alone), 0, sample(&[1.0]));
        results.add(cell(Plugin::Reference, Load::Alone), 0, sample(&[8.0]));
        results.add(cell(Plugin::Reference, Load::Hundred), 0, sample(&[9.0]));
        let summary = summary(&results);
        for line in [
            "| weft | 1.00 ×0.125 | 2.00 ×0.125 | - | - | 2.25 ×1.00 | - | - |\n",
            "| bridge + host-local | 8.00 | 16.0 | 9.00 | 18.0 | 2.25 | - | - |\n",
            &format!("On {}, Linux", results.conditions.surroundings.machine),
        ] {
            assert!(summary.contains(line), "{line}: {summary}");
        }
    }

    #[test]
    fn goals_and_executables_say_what_they_found() {
        let mut results = results(1);
        results.add(cell(Plugin::Weft, Load::Alone), 0, sample(&[3.0]));
        results.add(cell(Plugin::Floor, Load::Alone), 0, sample(&[1.0]));
        let executable = |kib| Executable { bytes: 3 << 19, peak: Some(Peak { kib, launcher_kib: 1024 }) };
        results.executables.insert("weft".into(), executable(2048));
        results.executables.insert("bridge".into(), executable(1024));
        results.executables.insert("host-local".into(), Executable { peak: None, ..executable(0) });
        results.failures.push("round 2: nothing\nheard".into());
        let page = page(&results);
        for line in [
            "| ADD alone, p50 | the floor program's | ≤ 1.50 | 3.00 | **missed** |",
            "| ADD alone, p99 | its own p50 | ≤ 4.00 | 1.00 | met |",
            "| ADD alone, p50 | that of bridge + host-local | ≤ 0.200 | - | not measured |",
            "| weft | 1.50 | 2.00 |",
            "| bridge | 1.50 | ≤ 1.00 |",
            "| host-local | 1.50 | - |",
            "- round 2: nothing heard",
        ] {
            assert!(page.contains(line), "{line}: {page}");
        }
    }
}
