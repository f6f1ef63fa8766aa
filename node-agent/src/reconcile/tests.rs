//! When passes come.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::*;
use crate::firewall::Ruleset;
use crate::kernel::Dump;
use crate::kernel::fake::FakeKernel;
use crate::object::{Object, Op};

/// A pass that takes so long is followed by the longest rest.
const SLOW: Duration = MAX_REST;
const DEADLINE: Duration = Duration::from_secs(30);

struct SlowKernel(FakeKernel);

impl Kernel for SlowKernel {
    fn dump(&mut self, device: Option<&IfName>) -> Result<Dump, KernelError> {
        let begin = Instant::now();
        while begin.elapsed() < SLOW {
            thread::yield_now();
        }
        self.0.dump(device)
    }

    fn sysctls(&mut self, paths: &[&str]) -> Result<BTreeMap<String, String>, KernelError> {
        self.0.sysctls(paths)
    }

    fn firewall(&mut self, legacy_period: Duration) -> Result<Ruleset, KernelError> {
        self.0.firewall(legacy_period)
    }

    fn shaping(&mut self, wanted: &[&Object]) -> Result<Vec<Object>, KernelError> {
        self.0.shaping(wanted)
    }

    fn on_link(&mut self, dev: &IfName, peers: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, KernelError> {
        self.0.on_link(dev, peers)
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        self.0.apply(ops)
    }
}

#[tokio::test]
async fn passes_that_nobody_waits_for_come_after_a_rest() {
    let kernel = SlowKernel(FakeKernel::with_underlay("eth0"));
    let inputs = pass::tests::inputs(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#, &[]);
    let reconcile = Handle::start(kernel, inputs, 2 * DEADLINE).expect("a thread");
    let mut reports = reconcile.reports();
    let seen = |report: &Report| report.at.expect("the kernel was seen");
    // The first two make and find: whatever follows looks once.
    reconcile.pass().await;
    let mut last = reconcile.pass().await;
    for _ in 0..3 {
        (0..10).for_each(|_| reconcile.wake());
        let next = reports.wait_for(|report| report.passes > last.passes).await.expect("a report").clone();
        // The machine may have kept this thread from some of them.
        let passes = (next.passes - last.passes) as u32;
        let took = seen(&next) - seen(&last);
        assert!(took >= passes * (MAX_REST + SLOW), "{passes} in {took:?}");
        last = next;
    }
    let give_up = Instant::now() + DEADLINE;
    loop {
        let next = reconcile.pass().await;
        if seen(&next) - seen(&last) < MAX_REST + SLOW {
            break;
        }
        assert!(Instant::now() < give_up, "one that is waited for does not rest");
        last = next;
    }
    reconcile.stop();
}

#[test]
fn a_sweep_comes_more_rarely_only_among_more_than_a_thousand_peers() {
    let period = |peers| sweep_period(Duration::from_secs(10), peers).as_secs_f64();
    assert_eq!([0, 1, 999, 1000].map(period), [10.0; 4]);
    assert_eq!([1500, 5000].map(period), [15.0, 50.0]);
}
