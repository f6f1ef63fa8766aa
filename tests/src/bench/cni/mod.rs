//! The bench of the CNI plugin: weft beside the reference plugins and beside a floor program, in one run.
//!
//! ```text
//! Stand (a node with an agent, or without) per plugin, all standing from beginning to end
//! round 1..n:  kind of pod:  calls at once:  plugin, plugin, plugin   <- in turns; ADD for each pod, then DEL
//! Results -> JSON (every call) -> page with tables and goals, picture
//! ```
//! What fails is noted and costs its own cell; results are written after every round.

mod attachment;
pub mod choice;
pub mod floor;
pub mod goals;
pub mod launch;
mod netlink;
pub mod picture;
mod reap;
pub mod result;
mod stand;
pub mod table;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use self::choice::{HostPorts, Load, Plugin, Selection};
use self::result::{Cell, Conditions, Results};
use self::stand::Stand;
use super::interrupt::Interrupt;
use super::surroundings::{Surroundings, TheftWatch};
use super::{ROOT, progress};
use crate::bed::{Bed, teardown};
use crate::binaries::{Binaries, require_tools};
use crate::conform::subject::{REFERENCE, reference_dir};
use crate::lab::out::say;
use crate::netns::Netns;

pub use self::attachment::Verb;

#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pub rounds: usize,
    /// How many are called one after the other, in a round.
    pub pods: usize,
    pub selection: Selection,
    pub out: PathBuf,
}

/// Measures, and leaves `cni.json`, `cni.md` and `cni.svg` in the directory asked for.
pub fn run(options: &Options, interrupt: &Interrupt) -> Result<()> {
    require_tools(&[("ip", "iproute2")])?;
    if options.selection.cells().any(|(host_ports, ..)| host_ports == HostPorts::One) {
        require_tools(&[("iptables", "iptables")])?;
    }
    reference_dir()?;
    let floor = std::env::current_exe()?.with_file_name(floor::PROGRAM);
    ensure!(floor.is_file(), "{} is missing: it is built with the bench", floor.display());
    let binaries = Binaries::find()?;
    fs::create_dir_all(&options.out).with_context(|| format!("make {}", options.out.display()))?;
    teardown(Path::new(ROOT))?;
    let bed = Bed::create(Path::new(ROOT))?;
    let mut results = Results::new(Conditions {
        surroundings: Surroundings::now()?,
        rounds: options.rounds,
        pods: options.pods,
        reference: REFERENCE.to_owned(),
    });
    let stands = start(&bed, &binaries, options, &mut results, interrupt)?;
    let pods = options.selection.loads.iter().map(|load| pods_of(*load, options)).max().unwrap_or_default();
    let pods = (0..pods).map(|place| bed.netns(&format!("pod-{place}"))).collect::<Result<Vec<_>>>()?;
    let measured = measure(&stands, &pods, options, &mut results, interrupt);
    save(&results, &options.out)?;
    say(format!("\n{}", table::page(&results)));
    say(format!("Written to {}: cni.json, cni.md, cni.svg", options.out.display()));
    measured?;
    ensure!(results.failures.is_empty(), "{} failures, see above", results.failures.len());
    Ok(())
}

/// Page and picture anew from an earlier run's figures.
pub fn render(results: &Results, out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    save(results, out)?;
    say(table::page(results));
    Ok(())
}

fn start(
    bed: &Bed,
    binaries: &Binaries,
    options: &Options,
    results: &mut Results,
    interrupt: &Interrupt,
) -> Result<Vec<Stand>> {
    let mut stands = Vec::new();
    for plugin in &options.selection.plugins {
        say(format!("Starting {} ...", plugin.name()));
        match Stand::start(bed, binaries, *plugin) {
            Ok(stand) => stands.push(stand),
            Err(error) => note(results, format!("{} did not start: {error:#}", plugin.name())),
        }
        interrupt.check()?;
    }
    ensure!(!stands.is_empty(), "nothing started");
    Ok(stands)
}

fn measure(
    stands: &[Stand],
    pods: &[Netns],
    options: &Options,
    results: &mut Results,
    interrupt: &Interrupt,
) -> Result<()> {
    weigh(stands, pods, options, results);
    let watch = TheftWatch::start()?;
    for round in 0..options.rounds {
        let mut stands: Vec<&Stand> = stands.iter().collect();
        // No plugin always follows the same other.
        let first = round % stands.len().max(1);
        stands.rotate_left(first);
        for host_ports in &options.selection.host_ports {
            for load in &options.selection.loads {
                for stand in stands.iter().filter(|stand| stand.plugin.can(*host_ports)) {
                    interrupt.check()?;
                    let cell = Cell { host_ports: *host_ports, load: *load, plugin: stand.plugin };
                    match stand.measure(*host_ports, *load, &pods[..pods_of(*load, options)]) {
                        Ok(sample) => results.add(cell, round, sample),
                        Err(error) => {
                            let what = format!("round {}: {}", round + 1, stand.plugin.name());
                            let how = format!("{}, pods {}", load.title(), host_ports.title());
                            note(results, format!("{what}, {how}: {error:#}"));
                            say(stand.explain());
                        }
                    }
                }
            }
        }
        results.conditions.surroundings.stolen = watch.share()?;
        save(results, &options.out)?;
        say(progress(round, options.rounds, watch.elapsed()));
    }
    Ok(())
}

/// What the executables weigh, with a port if one is to be mapped: then all of a chain is called.
fn weigh(stands: &[Stand], pods: &[Netns], options: &Options, results: &mut Results) {
    let Some(pod) = pods.first() else { return };
    let of_all = options.selection.host_ports.last().copied().unwrap_or(HostPorts::None);
    for stand in stands.iter().filter(|stand| stand.plugin != Plugin::Floor) {
        match stand.executables(of_all, pod) {
            Ok(executables) => results.executables.extend(executables),
            Err(error) => note(results, format!("memory of {}: {error:#}", stand.plugin.name())),
        }
    }
}

fn pods_of(load: Load, options: &Options) -> usize {
    if load == Load::Alone { options.pods } else { load.at_once() }
}

fn note(results: &mut Results, failure: String) {
    say(format!("FAILED: {failure}"));
    results.failures.push(failure);
}

fn save(results: &Results, out: &Path) -> Result<()> {
    let files = [
        ("cni.json", results.to_json()?),
        ("cni.md", table::page(results)),
        ("cni.svg", picture::svg(results)),
    ];
    for (name, content) in files {
        let path = out.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
