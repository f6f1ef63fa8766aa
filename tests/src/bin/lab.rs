//! `lab`: what `scripts/lab` starts once the programs are built.

use std::ffi::OsString;
use std::process::exit;

use anyhow::Result;
use clap::{Parser, Subcommand};
use e2e::cluster::{Backend, StoreKind};
use e2e::lab;

/// A weft cluster in network namespaces of this machine, to look at and to try things on.
#[derive(Debug, Parser)]
#[command(name = "scripts/lab")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start nodes and pods, and show that every pod reaches every other
    Up {
        /// How many nodes, 1 to 20
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
        nodes: u8,
        #[arg(long, value_enum, default_value = "vxlan")]
        backend: Backend,
        /// embedded unless it is named
        #[arg(long, value_enum, conflicts_with = "kubernetes")]
        store: Option<StoreKind>,
        /// A Kubernetes cluster, with weft installed by its manifest
        #[arg(long)]
        kubernetes: bool,
    },
    /// What every agent says of itself
    Status,
    /// Every node pings every other, underlay and overlay apart, then every pod every other
    Ping,
    /// Run a command in a node (n1) or in a pod (n1-a); `weftctl status` there asks its agent ($WEFT_SOCKET)
    Exec {
        target: String,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// kubectl, on a lab that is a Kubernetes cluster
    Kubectl {
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Throughput and latency of each backend beside node-to-node, in a lab of its own
    Bench {
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
        rounds: u8,
        /// Length of each throughput measurement
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
        seconds: u64,
    },
    /// Remove everything, also what an interrupted `up` left
    Down,
}

fn main() {
    if let Err(error) = run(Arguments::parse().command) {
        lab::out::complain(format!("lab: {error:#}"));
        exit(1);
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Up { nodes, backend, store, kubernetes } => lab::up(nodes, backend, store, kubernetes),
        Command::Kubectl { args } => exit(lab::exit_code(lab::kubectl(&args)?)),
        Command::Status => lab::status(),
        Command::Ping => lab::ping(),
        Command::Exec { target, command } => exit(lab::exit_code(lab::exec(&target, &command)?)),
        Command::Bench { rounds, seconds } => lab::bench::run(rounds.into(), seconds),
        Command::Down => lab::down(),
    }
}
