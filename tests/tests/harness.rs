//! The harness proved on bare namespaces, without an agent: a scenario is worth what its measuring is worth.

use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use e2e::bed::{Bed, teardown};
use e2e::capture::{Capture, ifindex};
use e2e::cluster::READY;
use e2e::etcd::Etcd;
use e2e::kernel::KernelView;
use e2e::packet::Ethernet;
use e2e::traffic::datagrams::Stream;
use e2e::traffic::echo::ping;
use e2e::traffic::flows::Flows;
use e2e::traffic::measure::{round_trip, throughput};
use e2e::traffic::transfer::transfer;
use e2e::underlay::{NodeNet, NodeNumber, Underlay};
use e2e::wait::{SECOND, eventually};

fn two_nodes(bed: &Bed) -> Result<(Underlay, NodeNet, NodeNet)> {
    let underlay = Underlay::create(bed)?;
    let first = underlay.attach(bed, NodeNumber(1))?;
    let second = underlay.attach(bed, NodeNumber(2))?;
    Ok((underlay, first, second))
}

#[test]
fn nodes_reach_each_other_and_the_capture_sees_it() -> Result<()> {
    let bed = Bed::for_test()?;
    let (underlay, first, second) = two_nodes(&bed)?;
    let capture = Capture::start(&underlay.netns)?;
    ping(&first.netns, second.address, 5, SECOND)?;
    let port = ifindex(&underlay.netns, &first.port)?;
    let ttl = capture.wait_for("echo request of n1", READY, |frame| {
        let ip = Ethernet::parse(&frame.bytes)?.ipv4()?;
        (frame.ifindex == port && ip.source == first.address && ip.destination == second.address)
            .then_some(ip.ttl)
    })?;
    assert_eq!(ttl, 64);
    assert!(ping(&first.netns, "192.168.77.99".parse()?, 1, Duration::from_millis(200)).is_err());
    Ok(())
}

#[test]
fn what_is_lost_is_missing_and_what_arrives_is_not() -> Result<()> {
    let bed = Bed::for_test()?;
    let (underlay, first, second) = two_nodes(&bed)?;
    let to = second.address;
    let capture = Capture::start(&underlay.netns)?;
    let stream = Stream::start(&first.netns, &second.netns, to, 1000)?;
    eventually("some datagrams", READY, || Ok(capture.frames().len() > 200))?;
    let tally = stream.end()?;
    assert_eq!((tally.missing.len(), tally.duplicates), (0, 0), "{tally:?}");

    let stream = Stream::start(&first.netns, &second.netns, to, 1000)?;
    let before = capture.frames().len();
    eventually("the stream to run", READY, || Ok(capture.frames().len() > before + 100))?;
    underlay.netns.ip(&format!("link set {} down", second.port))?;
    let before = capture.frames().len();
    eventually("datagrams on the way to nowhere", READY, || Ok(capture.frames().len() > before + 50))?;
    underlay.netns.ip(&format!("link set {} up", second.port))?;
    let tally = stream.end()?;
    assert!(!tally.missing.is_empty(), "a link was down and nothing is missing: {tally:?}");
    Ok(())
}

#[test]
fn flows_and_transfers_carry_what_they_say() -> Result<()> {
    let bed = Bed::for_test()?;
    let (_underlay, first, second) = two_nodes(&bed)?;
    let to = second.address;
    let flows = Flows::open(&first.netns, &second.netns, to, 100)?;
    eventually("ten rounds", READY, || Ok(flows.rounds() >= 10))?;
    assert!(flows.end()? >= 10);
    let moved = transfer(&first.netns, &second.netns, to, 10 << 20)?;
    assert_eq!(moved.sent, moved.received);
    assert!(throughput(&first.netns, &second.netns, to, SECOND / 5)? > 0.0);
    assert!(!round_trip(&first.netns, &second.netns, to, 100)?.is_zero());
    Ok(())
}

#[test]
fn a_view_of_the_kernel_names_what_changed() -> Result<()> {
    let bed = Bed::for_test()?;
    let (_underlay, first, _second) = two_nodes(&bed)?;
    let before = KernelView::of(&first.netns)?;
    assert_eq!(before.difference(&KernelView::of(&first.netns)?), "");
    for (change, word) in [
        ("link set eth0 mtu 1400", "1400"),
        ("address add 10.1.1.1/32 dev eth0", r#""local":"10.1.1.1","prefixlen":32"#),
        ("route add 10.2.0.0/16 via 192.168.77.1", "10.2.0.0/16"),
        ("neighbor add 192.168.77.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent", "02:00:00:00:00:09"),
    ] {
        first.netns.ip(change)?;
        let difference = before.difference(&KernelView::of(&first.netns)?);
        assert!(difference.contains(word), "{change} is not in {difference:?}");
    }
    Ok(())
}

#[test]
fn a_bed_goes_with_its_processes_and_not_while_it_is_in_use() -> Result<()> {
    let mut bed = Bed::for_test()?;
    let netns = bed.netns("lonely")?;
    let mut child = netns.spawn(Command::new("sleep").arg("600").stdin(Stdio::null()))?;
    let root = bed.root().to_owned();
    assert!(teardown(&root).is_err(), "torn down under its maker");
    // A scenario's own, which leads nowhere: beds are torn down with all that lies in them.
    std::os::unix::fs::symlink("/nowhere", root.join("netns/stale"))?;
    bed.keep();
    drop(bed);
    assert!(root.exists());
    teardown(&root)?;
    assert!(!root.exists());
    eventually("the process to be killed", READY, || Ok(child.try_wait()?.is_some()))?;
    // Nothing left to tear down is no error.
    teardown(&root)
}

#[test]
fn etcd_keeps_what_it_was_given_through_a_kill() -> Result<()> {
    let bed = Bed::for_test()?;
    let (underlay, ..) = two_nodes(&bed)?;
    let mut etcd = Etcd::start(&underlay.netns, Underlay::GATEWAY, &bed.dir("etcd")?)?;
    etcd.ctl(&["put", "/coreos.com/network/subnets/10.5.1.0-24", "{}"])?;
    etcd.kill()?;
    let client = (Underlay::GATEWAY, 2379);
    assert!(underlay.netns.enter(|| Ok(TcpStream::connect(client)))?.is_err(), "a dead etcd answers");
    etcd.resume()?;
    assert_eq!(etcd.lease_keys().context("after the restart")?, ["10.5.1.0-24"]);
    Ok(())
}
