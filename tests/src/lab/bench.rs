//! Throughput and latency of pods on two nodes beside the same between the nodes themselves, in turns in one run: a
//! ratio says more than a figure of a busy machine.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::BENCH_ROOT;
use super::out::say;
use crate::bed::Bed;
use crate::cluster::{Backend, Cluster, Spec};
use crate::netns::Netns;
use crate::traffic::measure::{round_trip, throughput};

const ROUND_TRIPS: usize = 2000;

#[derive(Debug, Clone, Copy)]
struct Sample {
    bits_per_second: f64,
    round_trip: Duration,
}

/// Measures each backend in a lab of two nodes of its own and prints a table.
pub fn run(rounds: usize, seconds: u64) -> Result<()> {
    say(format!(
        "One TCP stream for {seconds} s and {ROUND_TRIPS} UDP round trips; nodes and pods in turns, {rounds} rounds, medians.\n"
    ));
    say(format!(
        "{:<8} {:>12} {:>12} {:>7}   {:>11} {:>11} {:>7}",
        "backend", "node Gbit/s", "pod Gbit/s", "ratio", "node RTT us", "pod RTT us", "ratio"
    ));
    for backend in [Backend::Vxlan, Backend::HostGw, Backend::Udp] {
        let cluster = Cluster::start(Bed::create(Path::new(BENCH_ROOT))?, Spec::embedded(2, backend))?;
        let (near, far) = cluster.pod_pair()?;
        let (first, second) = (&cluster.nodes[0], &cluster.nodes[1]);
        let (mut nodes, mut pods) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            nodes.push(sample(first.netns(), second.netns(), second.net.address, seconds)?);
            pods.push(sample(&near.netns, &far.netns, far.address, seconds)?);
        }
        let (node, pod) = (median(&nodes)?, median(&pods)?);
        say(format!(
            "{:<8} {:>12.2} {:>12.2} {:>7.2}   {:>11.1} {:>11.1} {:>7.2}",
            backend.kind(),
            node.bits_per_second / 1e9,
            pod.bits_per_second / 1e9,
            pod.bits_per_second / node.bits_per_second,
            node.round_trip.as_secs_f64() * 1e6,
            pod.round_trip.as_secs_f64() * 1e6,
            pod.round_trip.as_secs_f64() / node.round_trip.as_secs_f64(),
        ));
    }
    Ok(())
}

fn sample(from: &Netns, to: &Netns, address: Ipv4Addr, seconds: u64) -> Result<Sample> {
    Ok(Sample {
        bits_per_second: throughput(from, to, address, Duration::from_secs(seconds))?,
        round_trip: round_trip(from, to, address, ROUND_TRIPS)?,
    })
}

/// Of each figure by itself.
fn median(samples: &[Sample]) -> Result<Sample> {
    let mut rates: Vec<f64> = samples.iter().map(|s| s.bits_per_second).collect();
    let mut trips: Vec<Duration> = samples.iter().map(|s| s.round_trip).collect();
    rates.sort_by(f64::total_cmp);
    trips.sort();
    let middle = samples.len() / 2;
    Ok(Sample {
        bits_per_second: *rates.get(middle).context("no rounds")?,
        round_trip: *trips.get(middle).context("no rounds")?,
    })
}
