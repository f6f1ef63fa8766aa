//! A run as an SVG picture: a row of panels per load, a panel per setting, a bar per configuration. Each panel has its
//! own scale; bars are medians from zero, whiskers quartiles.
//!
//! Colours follow the reader's light or dark mode (CSS `prefers-color-scheme`). The ground is drawn: who knows nothing of
//! modes shows dark letters on a light one, whatever the page's.

use std::fmt::Write as _;

use super::choice::{Configuration, Load, Setting};
use super::result::{Cell, Figure, Results};
use super::stats::Summary;
use super::surroundings::Surroundings;
use super::table::number;

const ROWS: [(&str, Load, Figure); 6] = [
    ("TCP, 1 stream, Gbit/s", Load::Tcp1, Figure::Gbps),
    ("TCP, 4 streams, Gbit/s", Load::Tcp4, Figure::Gbps),
    ("UDP, 1 flow of 64 bytes, thousand datagrams per second", Load::Udp1, Figure::Kpps),
    ("UDP, 64 flows of mixed sizes, thousand datagrams per second", Load::Udp64, Figure::Kpps),
    ("request/response, 1 connection, median in µs (less is better)", Load::Exchange1, Figure::P50),
    ("request/response, 16 connections, exchanges per second", Load::Exchange16, Figure::PerSecond),
];

pub(super) const LABELS: usize = 172;
pub(super) const PANEL: usize = 236;
const BAR: f64 = 128.0;
pub(super) const LINE: usize = 17;
pub(super) const HEAD: usize = 62;
pub(super) const ROW_HEAD: usize = 30;

const COLOURS: &str = "\
.node { fill: #8c959f } .host-gw { fill: #2da44e } .vxlan { fill: #0969da }
.udp { fill: #bc4c00 } .udp-plain { fill: #e9a26b } .naive { fill: #a475f9 }";
const DARK_COLOURS: &str = "\
.node { fill: #656c76 } .host-gw { fill: #238636 } .vxlan { fill: #1f6feb }
.udp { fill: #db6d28 } .udp-plain { fill: #9b5a2c } .naive { fill: #8957e5 }";

/// With the colours of the bars by class, on light and on dark ground.
pub(super) fn style(colours: &str, dark_colours: &str) -> String {
    format!(
        "\
<style>
.ground {{ fill: #ffffff }}
text {{ font: 12px 'DejaVu Sans', Verdana, sans-serif; fill: #1f2328 }}
.title {{ font-size: 15px; font-weight: bold }}
.row {{ font-weight: bold }}
.faint {{ fill: #59636e; font-size: 11px }}
.line {{ stroke: #d1d9e0; stroke-width: 1 }}
.whisker {{ stroke: #1f2328; stroke-width: 1.2 }}
{colours}
@media (prefers-color-scheme: dark) {{
.ground {{ fill: #0d1117 }}
text {{ fill: #f0f6fc }} .faint {{ fill: #9198a1 }} .line {{ stroke: #3d444d }} .whisker {{ stroke: #f0f6fc }}
{dark_colours}
}}
</style>
"
    )
}

pub fn svg(results: &Results) -> String {
    let selection = results.selection();
    let rows: Vec<_> = ROWS.iter().filter(|(_, load, _)| selection.loads.contains(load)).collect();
    let row_height = ROW_HEAD + LINE * selection.configurations.len() + 12;
    let width = LABELS + PANEL * selection.settings.len().max(2);
    let height = HEAD + row_height * rows.len() + 44;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"Throughput and latency of weft's dataplanes side by side\">\n{}",
        style(COLOURS, DARK_COLOURS)
    );
    let _ = writeln!(svg, "<rect class=\"ground\" width=\"{width}\" height=\"{height}\" rx=\"6\"/>");
    text(&mut svg, 8, 22, "title", "weft's dataplanes side by side");
    for (column, setting) in selection.settings.iter().enumerate() {
        let x = LABELS + PANEL * column;
        let (cores, underlay) = setting.title().split_once(", ").unwrap_or((setting.title(), ""));
        text(&mut svg, x, 40, "faint", cores);
        text(&mut svg, x, 54, "faint", underlay);
    }
    for (index, (title, load, figure)) in rows.into_iter().enumerate() {
        let top = HEAD + row_height * index;
        let _ = writeln!(svg, "<path class=\"line\" d=\"M8 {top}H{}\"/>", width - 8);
        text(&mut svg, 8, top + 19, "row", title);
        for (line, configuration) in selection.configurations.iter().enumerate() {
            let y = top + ROW_HEAD + LINE * line;
            text(&mut svg, 8, y + 12, "", label(*configuration));
            for (column, setting) in selection.settings.iter().enumerate() {
                let cell = Cell { setting: *setting, load: *load, configuration: *configuration };
                let largest = largest(results, *setting, *load, *figure);
                let ratio = (*configuration != Configuration::Node)
                    .then(|| results.ratio(cell, Configuration::Node, *figure))
                    .flatten()
                    .map(|ratio| ratio.median);
                let bar = Bar {
                    class: configuration.name(),
                    value: results.summary(cell, *figure),
                    ratio,
                    largest,
                    at: (LABELS + PANEL * column, y),
                };
                bar.draw(&mut svg);
            }
        }
    }
    let rounds = results.conditions.rounds;
    let what = format!("medians of {rounds} rounds, whiskers: quartiles, ×: ratio to node to node");
    close(svg, height, &results.conditions.surroundings, &what)
}

/// The last lines: where and when, and what is shown.
pub(super) fn close(mut svg: String, height: usize, s: &Surroundings, what: &str) -> String {
    let whose = format!("{}, Linux {}, weft {}, {}", s.machine, s.kernel, s.commit, s.date);
    text(&mut svg, 8, height - 24, "faint", &whose);
    text(&mut svg, 8, height - 9, "faint", what);
    svg + "</svg>\n"
}

/// Shorter than its title, which would not fit.
fn label(configuration: Configuration) -> &'static str {
    match configuration {
        Configuration::Naive => "one packet per call",
        other => other.title(),
    }
}

fn largest(results: &Results, setting: Setting, load: Load, figure: Figure) -> f64 {
    let values = Configuration::ALL
        .iter()
        .filter_map(|c| results.summary(Cell { setting, load, configuration: *c }, figure))
        .map(|summary| summary.q3.max(summary.median));
    values.fold(0.0, f64::max)
}

/// A value with its whisker, figures behind it.
#[derive(Debug)]
pub(super) struct Bar<'a> {
    pub(super) class: &'a str,
    pub(super) value: Option<Summary>,
    pub(super) ratio: Option<f64>,
    /// What is as long as a bar can be.
    pub(super) largest: f64,
    pub(super) at: (usize, usize),
}

impl Bar<'_> {
    pub(super) fn draw(&self, svg: &mut String) {
        let (x, y) = self.at;
        let Some(Summary { median, q1, q3, .. }) = self.value else {
            return text(svg, x, y + 12, "faint", "not measured");
        };
        let at = |value: f64| if self.largest > 0.0 { value / self.largest * BAR } else { 0.0 };
        let _ = writeln!(
            svg,
            "<rect class=\"{}\" x=\"{x}\" y=\"{}\" width=\"{:.1}\" height=\"{}\"/>",
            self.class,
            y + 2,
            at(median).max(1.0),
            LINE - 5
        );
        let (from, to, middle) =
            (x as f64 + at(q1), x as f64 + at(q3), y as f64 + 2.0 + (LINE - 5) as f64 / 2.0);
        let _ = writeln!(svg, "<path class=\"whisker\" d=\"M{from:.1} {middle:.1}H{to:.1}\"/>");
        let ratio = self.ratio.map(|ratio| format!(" ×{}", two_digits(ratio))).unwrap_or_default();
        let figures = format!("{}{ratio}", number(median));
        text(svg, x + at(median.max(q3)) as usize + 6, y + 12, "", &figures);
    }
}

fn two_digits(ratio: f64) -> String {
    if ratio >= 0.1 { format!("{ratio:.2}") } else { format!("{ratio:.3}") }
}

pub(super) fn text(svg: &mut String, x: usize, y: usize, class: &str, text: &str) {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    let _ = writeln!(svg, "<text{class} x=\"{x}\" y=\"{y}\">{}</text>", escaped(text));
}

/// XML 1.0 section 2.4.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::{cell, conditions, sample};
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values_and_what_is_missing_is_said() {
        let mut results = Results::new(conditions());
        for (configuration, gbps) in [(Configuration::Node, 40.0), (Configuration::Udp, 10.0)] {
            results.add(cell(Setting::Full, Load::Tcp1, configuration), 0, sample(&[(Figure::Gbps, gbps)]));
        }
        results.add(cell(Setting::Gro, Load::Tcp1, Configuration::Udp), 0, sample(&[(Figure::Gbps, 5.0)]));
        let svg = svg(&results);
        assert!(svg.contains("class=\"node\" x=\"172\" y=\"94\" width=\"128.0\""), "{svg}");
        assert!(svg.contains("class=\"udp\" x=\"172\" y=\"111\" width=\"32.0\""), "{svg}");
        assert!(svg.contains(">10.0 ×0.25</text>"), "{svg}");
        assert_eq!(svg.matches("not measured").count(), 1, "node to node with GRO: {svg}");
        assert!(svg.contains("2 cores of a &lt;test&gt; machine"), "{svg}");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("UDP, 1 flow"), "a load that was not measured has no row");
    }
}
