//! The long form of `udp_integrity`: a gibibyte and a million datagrams.

use anyhow::{Result, ensure};
use e2e::cluster::{Backend, Spec, scenario};
use e2e::traffic::checked::checked;
use e2e::traffic::transfer::transfer;

#[test]
fn a_gibibyte_and_a_million_datagrams_arrive_as_they_were_sent() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Udp), |cluster| {
        let (near, far) = cluster.pod_pair()?;
        let moved = transfer(&near.netns, &far.netns, far.address, 1 << 30)?;
        ensure!(moved.sent == moved.received, "{moved:?}");
        checked(&near.netns, &far.netns, far.address, 1_000_000)?.is_whole()
    })
}
