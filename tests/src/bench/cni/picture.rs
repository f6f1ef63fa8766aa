//! A run as an SVG picture: a row of panels per figure, a panel per kind of pod, a bar per plugin. Each panel has its own
//! scale; bars are medians from zero, whiskers quartiles.

use std::fmt::Write as _;

use super::choice::{HostPorts, Load, Plugin};
use super::result::{Cell, Figure, Results};
use crate::bench::picture::{Bar, HEAD, LABELS, LINE, PANEL, ROW_HEAD, close, style, text};

const ROWS: [(&str, Load, Figure); 8] = [
    ("ADD alone, median in ms (less is better)", Load::Alone, Figure::AddP50),
    ("DEL alone, median in ms", Load::Alone, Figure::DelP50),
    ("CPU of a pod alone, ADD to DEL, ms", Load::Alone, Figure::Cpu),
    ("10 ADDs at once, ms until all have ended", Load::Ten, Figure::AddWall),
    ("50 ADDs at once, ms until all have ended", Load::Fifty, Figure::AddWall),
    ("100 ADDs at once, ms until all have ended", Load::Hundred, Figure::AddWall),
    ("100 DELs at once, ms until all have ended", Load::Hundred, Figure::DelWall),
    ("100 DELs at once, ms until nothing is left", Load::Hundred, Figure::Gone),
];
const COLOURS: &str = ".floor { fill: #8c959f } .weft { fill: #bc4c00 } .reference { fill: #0969da }";
const DARK_COLOURS: &str = ".floor { fill: #656c76 } .weft { fill: #db6d28 } .reference { fill: #1f6feb }";

pub fn svg(results: &Results) -> String {
    let selection = results.selection();
    let rows: Vec<_> = ROWS.iter().filter(|(_, load, _)| selection.loads.contains(load)).collect();
    let row_height = ROW_HEAD + LINE * selection.plugins.len() + 12;
    let width = LABELS + PANEL * 2;
    let height = HEAD + row_height * rows.len() + 44;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"Time and processor cost of CNI plugins side by side\">\n{}",
        style(COLOURS, DARK_COLOURS)
    );
    let _ = writeln!(svg, "<rect class=\"ground\" width=\"{width}\" height=\"{height}\" rx=\"6\"/>");
    text(&mut svg, 8, 22, "title", "CNI plugins side by side");
    for (column, host_ports) in selection.host_ports.iter().enumerate() {
        text(&mut svg, LABELS + PANEL * column, 54, "faint", host_ports.title());
    }
    for (index, (title, load, figure)) in rows.into_iter().enumerate() {
        let top = HEAD + row_height * index;
        let _ = writeln!(svg, "<path class=\"line\" d=\"M8 {top}H{}\"/>", width - 8);
        text(&mut svg, 8, top + 19, "row", title);
        for (line, plugin) in selection.plugins.iter().enumerate() {
            let y = top + ROW_HEAD + LINE * line;
            text(&mut svg, 8, y + 12, "", label(*plugin));
            for (column, host_ports) in selection.host_ports.iter().enumerate() {
                let cell = Cell { host_ports: *host_ports, load: *load, plugin: *plugin };
                let at = (LABELS + PANEL * column, y);
                if plugin.can(*host_ports) {
                    draw(&mut svg, results, cell, *figure, at);
                } else {
                    text(&mut svg, at.0, at.1 + 12, "faint", "maps no ports");
                }
            }
        }
    }
    let rounds = results.conditions.rounds;
    let what = format!("medians of {rounds} rounds, whiskers: quartiles, ×: ratio to the reference");
    close(svg, height, &results.conditions.surroundings, &what)
}

fn draw(svg: &mut String, results: &Results, cell: Cell, figure: Figure, at: (usize, usize)) {
    let summaries = Plugin::ALL.iter().filter_map(|p| results.summary(Cell { plugin: *p, ..cell }, figure));
    let largest = summaries.map(|summary| summary.q3.max(summary.median)).fold(0.0, f64::max);
    let ratio = results.ratio(cell, Plugin::Reference, figure).filter(|_| cell.plugin != Plugin::Reference);
    let bar = Bar {
        class: cell.plugin.name(),
        value: results.summary(cell, figure),
        ratio: ratio.map(|ratio| ratio.median),
        largest,
        at,
    };
    bar.draw(svg);
}

/// Whatever it maps.
fn label(plugin: Plugin) -> &'static str {
    match plugin {
        Plugin::Reference => "reference plugins",
        other => other.title(HostPorts::None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::{cell, results, sample};
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values_and_what_is_missing_is_said() {
        let mut results = results(1);
        results.add(cell(Plugin::Reference, Load::Alone), 0, sample(&[8.0]));
        results.add(cell(Plugin::Weft, Load::Alone), 0, sample(&[2.0]));
        let port = Cell { host_ports: HostPorts::One, ..cell(Plugin::Weft, Load::Alone) };
        results.add(port, 0, sample(&[4.0]));
        let svg = svg(&results);
        assert!(svg.contains("class=\"weft\" x=\"172\" y=\"94\" width=\"32.0\""), "{svg}");
        assert!(svg.contains("class=\"reference\" x=\"172\" y=\"111\" width=\"128.0\""), "{svg}");
        assert!(svg.contains(">2.00 ×0.25</text>"), "{svg}");
        assert_eq!(svg.matches("not measured").count(), 3, "the reference with a port: {svg}");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("at once"), "a load that was not measured has no row");
    }
}
