//! The bench of the dataplanes: weft's own beside node-to-node traffic and beside the alternative, in one run.
//!
//! ```text
//! Pair (two namespaces, a veth between them) per configuration, all standing from beginning to end
//! round 1..n:  setting of underlay and cores:  load:  configuration, configuration, ...   <- in turns
//! Results -> JSON (every sample) -> page with tables and goals, picture
//! ```
//! Taking turns within seconds is what makes ratios worth something on a machine that others use as well. What fails is
//! noted and costs its own cell; results are written after every round.

pub mod choice;
pub mod cni;
pub mod cpu;
pub mod goals;
pub mod interrupt;
pub mod load;
pub mod naive;
pub mod offload;
pub mod pair;
pub mod picture;
pub mod program;
pub mod result;
pub mod stats;
pub mod surroundings;
mod sys;
pub mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::bed::{Bed, teardown};
use crate::binaries::{Binaries, require_tools};
use crate::lab::out::say;
use choice::{Selection, Setting};
use cpu::Cores;
use interrupt::Interrupt;
use load::Timing;
use pair::Pair;
use result::{Cell, Conditions, Results};
use surroundings::{Surroundings, TheftWatch};

const ROOT: &str = "/run/weft-bench";

/// Between these a document has the summary of a run.
#[derive(Debug, Clone, Copy)]
struct Marks {
    begin: &'static str,
    end: &'static str,
}

const DATAPLANES: Marks = Marks {
    begin: "<!-- summary of docs/benchmarks: begin -->",
    end: "<!-- summary of docs/benchmarks: end -->",
};
const PLUGINS: Marks = Marks {
    begin: "<!-- summary of docs/benchmarks/cni: begin -->",
    end: "<!-- summary of docs/benchmarks/cni: end -->",
};

#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pub rounds: usize,
    pub window: Duration,
    pub selection: Selection,
    pub out: PathBuf,
}

impl Options {
    fn timing(&self) -> Timing {
        Timing { warm_up: self.window.mul_f64(0.4), window: self.window }
    }
}

/// Measures, and leaves `dataplane.json`, `dataplane.md`, `dataplane.svg` and `summary.md` in the directory asked for.
pub fn run(options: &Options, interrupt: &Interrupt) -> Result<()> {
    let cores = Cores::available()?;
    if options.selection.settings.contains(&Setting::TwoCores) && !cores.has_two() {
        bail!("this process may use one core only: leave out {} (--only)", Setting::TwoCores);
    }
    require_tools(&[("ip", "iproute2"), ("ethtool", "ethtool")])?;
    let binaries = Binaries::find()?;
    fs::create_dir_all(&options.out).with_context(|| format!("make {}", options.out.display()))?;
    teardown(Path::new(ROOT))?;
    let bed = Bed::create(Path::new(ROOT))?;
    let mut results = Results::new(conditions(options)?);
    let pairs = start_pairs(&bed, &binaries, options, &cores, &mut results, interrupt)?;
    let measured = measure(&pairs, options, &cores, &mut results, interrupt);
    save(&results, &options.out)?;
    say(format!("\n{}", table::page(&results)));
    say(format!(
        "Written to {}: dataplane.json, dataplane.md, dataplane.svg, summary.md",
        options.out.display()
    ));
    measured?;
    ensure!(results.failures.is_empty(), "{} failures, see above", results.failures.len());
    Ok(())
}

/// Page and picture anew from an earlier run's figures, and the summary into the document that shows it.
pub fn render(from: &Path, out: &Path, readme: Option<&Path>) -> Result<()> {
    let text = fs::read_to_string(from).with_context(|| format!("read {}", from.display()))?;
    if cni::result::is_ours(&text) {
        let results = cni::result::Results::load(from)?;
        summarise(readme, PLUGINS, &cni::table::summary(&results))?;
        return cni::render(&results, out);
    }
    let results = Results::load(from)?;
    summarise(readme, DATAPLANES, &table::summary(&results))?;
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    save(&results, out)?;
    say(table::page(&results));
    Ok(())
}

/// Puts a summary in its place in a document, if there is to be one.
fn summarise(document: Option<&Path>, marks: Marks, summary: &str) -> Result<()> {
    let Some(path) = document else { return Ok(()) };
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let text = with_summary(&text, marks, summary).with_context(|| path.display().to_string())?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// The document with what stands between the marks replaced.
fn with_summary(document: &str, marks: Marks, summary: &str) -> Result<String> {
    let Marks { begin, end } = marks;
    let (before, rest) = document.split_once(begin).with_context(|| format!("no line {begin:?}"))?;
    let (_, after) = rest.split_once(end).with_context(|| format!("no line {end:?} after {begin:?}"))?;
    Ok(format!("{before}{begin}\n{summary}{end}{after}"))
}

fn start_pairs(
    bed: &Bed,
    binaries: &Binaries,
    options: &Options,
    cores: &Cores,
    results: &mut Results,
    interrupt: &Interrupt,
) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for configuration in &options.selection.configurations {
        say(format!("Starting {} ({configuration}) ...", configuration.title()));
        match Pair::start(bed, binaries, *configuration, cores, interrupt) {
            Ok(pair) => pairs.push(pair),
            Err(error) => {
                interrupt.check()?;
                note(results, format!("{configuration} did not start: {error:#}"));
            }
        }
        interrupt.check()?;
    }
    ensure!(!pairs.is_empty(), "no configuration started");
    Ok(pairs)
}

fn measure(
    pairs: &[Pair],
    options: &Options,
    cores: &Cores,
    results: &mut Results,
    interrupt: &Interrupt,
) -> Result<()> {
    let watch = TheftWatch::start()?;
    for round in 0..options.rounds {
        for setting in &options.selection.settings {
            let on = if setting.is_pinned() { cores.last() } else { cores.both() };
            let mut pairs = set(pairs, *setting, &on, round, results);
            // No configuration always follows the same other.
            let first = round % pairs.len().max(1);
            pairs.rotate_left(first);
            for load in &options.selection.loads {
                for pair in &pairs {
                    let cell = Cell { setting: *setting, load: *load, configuration: pair.configuration };
                    let measured = load::measure(*load, &pair.places, options.timing(), &on, interrupt);
                    interrupt.check()?;
                    match measured {
                        Ok(sample) => results.add(cell, round, sample),
                        Err(error) => {
                            let what =
                                format!("round {}: {load} of {} in {setting}", round + 1, pair.configuration);
                            note(results, format!("{what}: {error:#}"));
                        }
                    }
                }
            }
        }
        for pair in pairs {
            match pair.packet_path() {
                Ok(path) => results.packet_paths.extend(path.map(|path| (pair.configuration, path))),
                Err(error) => {
                    note(results, format!("round {}: {}: {error:#}", round + 1, pair.configuration))
                }
            }
        }
        results.conditions.surroundings.stolen = watch.share()?;
        save(results, &options.out)?;
        say(progress(round, options.rounds, watch.elapsed()));
    }
    Ok(())
}

/// After a round, counted from 0.
fn progress(round: usize, rounds: usize, elapsed: Duration) -> String {
    let left = elapsed / (round + 1) as u32 * (rounds - round - 1) as u32;
    let (elapsed, left) = (elapsed.as_secs(), left.as_secs());
    format!("Round {} of {rounds} after {elapsed} s, about {left} s to go.", round + 1)
}

/// Those that could be set; what a pair cannot be set to must not be measured as if it were.
fn set<'a>(
    pairs: &'a [Pair],
    setting: Setting,
    on: &[usize],
    round: usize,
    results: &mut Results,
) -> Vec<&'a Pair> {
    let mut ready = Vec::new();
    for pair in pairs {
        match pair.set(setting, on) {
            Ok(()) => ready.push(pair),
            Err(error) => {
                let what = format!("round {}: {} left out in {setting}", round + 1, pair.configuration);
                note(results, format!("{what}: {error:#}"));
                say(pair.explain());
            }
        }
    }
    ready
}

fn note(results: &mut Results, failure: String) {
    say(format!("FAILED: {failure}"));
    results.failures.push(failure);
}

fn save(results: &Results, out: &Path) -> Result<()> {
    let files = [
        ("dataplane.json", results.to_json()?),
        ("dataplane.md", table::page(results)),
        ("dataplane.svg", picture::svg(results)),
        ("summary.md", table::summary(results)),
    ];
    for (name, content) in files {
        let path = out.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn conditions(options: &Options) -> Result<Conditions> {
    Ok(Conditions {
        surroundings: Surroundings::now()?,
        rounds: options.rounds,
        seconds: options.window.as_secs_f64(),
        warm_up_seconds: options.timing().warm_up.as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_takes_the_place_of_the_one_before_and_of_no_other() -> Result<()> {
        let marked = |marks: Marks, summary: &str| format!("{}\n{summary}{}\n", marks.begin, marks.end);
        let (dataplanes, plugins) = (marked(DATAPLANES, "| old |\n"), marked(PLUGINS, "| old |\n"));
        let document = format!("# weft\n{dataplanes}{plugins}more\n");
        let once = with_summary(&document, PLUGINS, "| new |\n")?;
        assert_eq!(once, format!("# weft\n{dataplanes}{}more\n", marked(PLUGINS, "| new |\n")));
        assert_eq!(with_summary(&once, PLUGINS, "| new |\n")?, once);
        for broken in ["# weft\n", &format!("{}\n{}\n", PLUGINS.end, PLUGINS.begin), &dataplanes] {
            let error = with_summary(broken, PLUGINS, "").expect_err("a mark is missing").to_string();
            assert!(error.contains("no line"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn the_warm_up_follows_from_the_window() -> Result<()> {
        let options = Options {
            rounds: 3,
            window: Duration::from_millis(500),
            selection: Selection::everything(),
            out: PathBuf::from("."),
        };
        let conditions = conditions(&options)?;
        assert!((conditions.warm_up_seconds - 0.2).abs() < 1e-9);
        Ok(())
    }
}
