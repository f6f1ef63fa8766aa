//! `bench`: what `scripts/bench` starts once the programs are built.

use std::path::PathBuf;
use std::process::exit;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use e2e::bench::choice::Selection;
use e2e::bench::cni::{self, launch};
use e2e::bench::interrupt::Interrupt;
use e2e::bench::program::Part;
use e2e::bench::{self, Options};
use e2e::lab::out::complain;

/// Measures weft beside the alternatives on this machine.
#[derive(Debug, Parser)]
#[command(name = "scripts/bench")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Throughput, latency and processor cost of each dataplane
    ///
    /// Configurations take turns within each round. Everything with the defaults takes about 20 minutes, with --quick
    /// about 4; the machine should do nothing else meanwhile.
    Dataplane(Dataplane),
    /// Time from exec to exit, processor cost and memory of the CNI plugin
    ///
    /// weft, the reference plugins and a floor program take turns within each round. Everything with the defaults takes
    /// about 10 minutes, with --quick about 2; the machine should do nothing else meanwhile.
    Cni(Cni),
    /// Page and picture anew from the dataplane.json or cni.json of an earlier run
    Render {
        from: PathBuf,
        /// Where to
        #[arg(long, default_value = "target/bench")]
        out: PathBuf,
        /// A document that shows the summary, between its marks
        #[arg(long)]
        readme: Option<PathBuf>,
    },
    /// One process of a measurement, started by the bench itself
    #[command(hide = true)]
    Part { part: String },
}

#[derive(Debug, Args)]
struct Dataplane {
    /// How often each measurement is taken [default: 9, with --quick 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How long each measurement takes, after a warm-up of 0.4 times that [default: 0.5, with --quick 0.3]
    #[arg(long, value_parser = seconds)]
    seconds: Option<f64>,
    /// Fewer and shorter measurements, for development
    #[arg(long)]
    quick: bool,
    /// Only these, by name: configurations (node, host-gw, vxlan, udp, udp-plain, naive), settings (full, no-seg, gro:
    /// the underlay's offload, on one core; two-cores), loads (tcp-1, tcp-4, udp-1, udp-64, rr-1, rr-16). A kind of which
    /// none is named stays whole
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Where dataplane.json, dataplane.md, dataplane.svg and summary.md go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct Cni {
    /// How often each measurement is taken [default: 20, with --quick 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How many pods are wired one after the other in each round [default: 10, with --quick 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pods: Option<u32>,
    /// Fewer measurements, for development
    #[arg(long)]
    quick: bool,
    /// Only these, by name: plugins (floor, weft, reference), calls at once (alone, 10, 50, 100), kinds of pod (no-port,
    /// port). A kind of which none is named stays whole
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Where cni.json, cni.md and cni.svg go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

fn main() {
    if let Err(error) = started_as_part().unwrap_or_else(|| run(Arguments::parse().command)) {
        complain(format!("bench: {error:#}"));
        exit(1);
    }
}

/// What is measured itself: knowing the command line would take it longer than its work.
fn started_as_part() -> Option<Result<()>> {
    let mut words = std::env::args().skip(1);
    match words.next()?.as_str() {
        launch::COMMAND => Some(launch::main(&words.next()?, words)),
        _ => None,
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Cni(cni) => cni::run(&cni.options()?, &Interrupt::watch()?),
        Command::Dataplane(dataplane) => {
            let options = dataplane.options()?;
            bench::run(&options, &Interrupt::watch()?)
        }
        Command::Render { from, out, readme } => bench::render(&from, &out, readme.as_deref()),
        Command::Part { part } => serde_json::from_str::<Part>(&part).context("part")?.play(),
    }
}

impl Dataplane {
    fn options(self) -> Result<Options> {
        let (rounds, seconds) = if self.quick { (3, 0.3) } else { (9, 0.5) };
        Ok(Options {
            rounds: self.rounds.unwrap_or(rounds) as usize,
            window: Duration::from_secs_f64(self.seconds.unwrap_or(seconds)),
            selection: Selection::of(self.only.iter().map(String::as_str))?,
            out: self.out,
        })
    }
}

impl Cni {
    fn options(self) -> Result<cni::Options> {
        let (rounds, pods) = if self.quick { (3, 5) } else { (20, 10) };
        Ok(cni::Options {
            rounds: self.rounds.unwrap_or(rounds) as usize,
            pods: self.pods.unwrap_or(pods) as usize,
            selection: cni::choice::Selection::of(self.only.iter().map(String::as_str))?,
            out: self.out,
        })
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=10.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds from 0.1 to 10".to_owned()),
    }
}
