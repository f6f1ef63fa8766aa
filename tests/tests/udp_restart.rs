//! The udp backend's agent dies and comes back: the device, its address and its route stay, and its threads carry on as
//! soon as they are there again, whether the store answers or not. docs/faults.md has the figures that this prints.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Backend, Cluster, READY, Spec, scenario};
use e2e::etcd::PREFIX;
use e2e::kernel::{KernelView, indexes};
use e2e::monitor::Monitor;
use e2e::random::Random;
use e2e::report;
use e2e::traffic::datagrams::Stream;
use e2e::traffic::echo::ping;
use e2e::traffic::flows::Flows;
use e2e::wait::{SECOND, eventually, let_pass};

const KILLS: usize = 20;
/// Further ones, each while the agent before it may still be starting.
const EARLY_KILLS: usize = 5;
const FLOWS: usize = 20;
const DATAGRAMS_PER_SECOND: u32 = 1000;
/// What a restart may cost at most. Figures are far below; this is what is promised.
const PROMISED: Duration = SECOND;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Store {
    Up,
    Down,
}

/// Each peer is in what the other's agent has saved: without it nothing could be forwarded before the store has told.
fn wait_saved(cluster: &Cluster) -> Result<()> {
    for (node, peer) in [(0, 1), (1, 0)] {
        let peer = cluster.nodes[peer].lease_key()?.to_string();
        let file = cluster.nodes[node].agent.state_dir().join("snapshot.json");
        eventually("the peer to be saved on disk", READY, || {
            Ok(std::fs::read_to_string(&file)?.contains(&peer))
        })?;
    }
    Ok(())
}

fn median_and_most(mut times: Vec<Duration>) -> Option<(Duration, Duration)> {
    times.sort_unstable();
    Some((*times.get(times.len() / 2)?, *times.last()?))
}

fn killed_under_load(store: Store) -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        wait_saved(cluster)?;
        let what = match store {
            Store::Up => "store up",
            Store::Down => {
                cluster.etcd()?.kill()?;
                "store down"
            }
        };
        let before = (KernelView::of(cluster.nodes[0].netns())?, indexes(cluster.nodes[0].netns())?);
        let monitor = Monitor::start(cluster.nodes[0].netns(), "ip")?;
        let there = Stream::start(&near.netns, &far.netns, far.address, DATAGRAMS_PER_SECOND)?;
        let back = Stream::start(&far.netns, &near.netns, near.address, DATAGRAMS_PER_SECOND)?;
        let flows = Flows::open(&near.netns, &far.netns, far.address, FLOWS)?;
        let mut random = Random::of_the_moment();
        let (mut ends, mut starts) = (Vec::new(), Vec::new());
        let agent = &mut cluster.nodes[0].agent;
        for _ in 0..KILLS {
            let_pass(Duration::from_millis(200 + random.below(200)));
            let killed = Instant::now();
            agent.kill()?;
            ends.push(killed.elapsed());
            starts.push(Instant::now());
            agent.start()?;
        }
        let_pass(Duration::from_millis(300));
        for _ in 0..EARLY_KILLS {
            // From the first instruction of a start on.
            let_pass(Duration::from_millis(random.below(60)));
            agent.kill()?;
            agent.start()?;
        }
        eventually("the last agent to forward", READY, || {
            let status = cluster.nodes[0].status()?;
            let path = status.packet_path.context("packet path")?;
            ensure!(path.problem.is_none() && path.sent.packets > 0 && path.received.packets > 0, "{path:?}");
            ensure!(status.ready, "{:?}", status.waiting_for);
            Ok(true)
        })?;
        let rounds = flows.rounds();
        eventually("every flow to carry on", READY, || Ok(flows.rounds() > rounds + 2))?;
        flows.end().context("a flow did not live")?;

        let (end, end_at_most) = median_and_most(ends).context("no kills")?;
        report::figure(format_args!("{what}: killed to gone {end:.0?} median, {end_at_most:.0?} at most"));
        back.stop();
        for (direction, tally) in [("sending", there.end()?), ("receiving", back.end()?)] {
            let gaps = starts.iter().filter_map(|start| {
                tally.silence(*start).map(|(gap, end)| (gap, end.duration_since(*start)))
            });
            let (longest, first): (Vec<Duration>, Vec<Duration>) = gaps.unzip();
            let (usual, longest) = median_and_most(longest).context("nothing arrived")?;
            let (first, first_at_most) = median_and_most(first).context("nothing arrived")?;
            report::figure(format_args!(
                "{what}, {direction}, {KILLS} kills: gap {usual:.0?} median, {longest:.0?} at most; start to first packet \
                 {first:.0?} median, {first_at_most:.0?} at most; {} of {} lost",
                tally.missing.len(),
                tally.sent,
            ));
            // Of twenty kills half: a single one may fall into a time in which the machine does something else.
            ensure!(usual < PROMISED && first < PROMISED, "{direction}: {usual:?}, {first:?}");
            ensure!(tally.duplicates == 0, "{direction}: {} came twice", tally.duplicates);
        }
        let events = monitor.events(cluster.nodes[0].netns())?;
        // Entries that the kernel makes for a device without addresses of its own layer go with the carrier.
        let gone: Vec<&String> =
            events.iter().filter(|line| line.starts_with("Deleted") && !line.contains("NOARP")).collect();
        ensure!(gone.is_empty(), "deleted meanwhile: {gone:?}");
        let node = &cluster.nodes[0];
        assert_eq!(before.0.difference(&KernelView::of(node.netns())?), "");
        assert_eq!(before.1, indexes(node.netns())?, "a device was made anew");
        Ok(())
    })
}

#[test]
fn twenty_kills_under_load() -> Result<()> {
    killed_under_load(Store::Up)
}

#[test]
fn twenty_kills_under_load_without_a_store() -> Result<()> {
    killed_under_load(Store::Down)
}

#[test]
fn another_port_after_a_restart_takes_other_threads_not_another_process() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        wait_saved(cluster)?;
        for node in &mut cluster.nodes {
            node.agent.kill()?;
        }
        let config = cluster.etcd()?.ctl(&["get", "--print-value-only", &format!("{PREFIX}/config")])?;
        let mut config: serde_json::Value = serde_json::from_str(&config)?;
        config["Backend"]["Port"] = 9285.into();
        cluster.etcd()?.put_config(&config.to_string())?;
        for node in &mut cluster.nodes {
            node.agent.start()?;
        }
        cluster.wait_converged()?;
        ping(&near.netns, far.address, 5, SECOND)?;
        for node in &cluster.nodes {
            let path = node.packet_path()?;
            assert_eq!(path.listen.to_string(), format!("{}:9285", node.net.address));
            let starts = node.agent.log().matches("packet path started").count();
            assert_eq!(starts, 3, "first start, from disk, with the store's port: {}", node.agent.explain());
        }
        // What another one says under a running agent waits for the next start.
        config["Backend"]["Port"] = 9286.into();
        cluster.etcd()?.put_config(&config.to_string())?;
        eventually("the change to be named", READY, || {
            let notices = cluster.nodes[0].status()?.notices().concat();
            Ok(notices.contains("needs restart of weftd: Backend.Port = 9286, in force: 9285"))
        })?;
        ping(&near.netns, far.address, 5, SECOND)?;
        Ok(())
    })
}
