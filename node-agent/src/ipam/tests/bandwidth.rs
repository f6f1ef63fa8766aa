//! Limits of an attachment: in place when its ADD is answered, or there is no attachment.

use weft_shared::cni::Code;
use weft_shared::names::host_ifname;
use weft_shared::protocol::{Bandwidth, Limit, Reserve};

use super::super::testing::{Node, key, reserve};

fn limited(id: &str, rate: u64, burst: u32) -> Reserve {
    let egress = Some(Limit { rate, burst });
    Reserve { bandwidth: Bandwidth { ingress: None, egress }, ..reserve(id) }
}

#[tokio::test]
async fn limits_are_in_place_when_the_plugin_is_told_and_outlive_the_agent() {
    let mut node = Node::new();
    let asked = limited("a", 1000, 3000);
    let (connection, reservation) = node.add_with(asked.clone()).await.expect("reserve");
    assert_eq!(reservation.bandwidth, asked.bandwidth);
    let veth = host_ifname(&key("a"));
    assert!(node.fabric.world().limits.is_empty(), "there is no veth yet");
    node.commit(&connection, "a").await.expect("commit");
    connection.closed(true).await;
    assert_eq!(node.fabric.world().limits[&veth], asked.bandwidth);
    assert_eq!(node.ipam().status().list[0].limits, ["out 8 kbit/s"]);
    // Nobody asks for those of a pod without any.
    node.fabric.world().limits_fail = true;
    node.attach("b").await;
    node.restart();
    assert_eq!(node.needs.borrow().bridge_ports[&veth].limits, asked.bandwidth);
    node.ipam().release(&key("a")).await.expect("DEL");
    assert!(!node.needs.borrow().bridge_ports.contains_key(&veth));
}

#[tokio::test]
async fn a_pod_that_cannot_be_limited_is_none() {
    let node = Node::new();
    node.fabric.world().limits_fail = true;
    let (connection, _) = node.add_with(limited("a", 1000, 3000)).await.expect("reserve");
    let refused = node.commit(&connection, "a").await.expect_err("no limit");
    assert!(refused.is(Code::TryAgainLater) && refused.details.contains("no token bucket"), "{refused}");
    connection.closed(true).await;
    node.assert_empty();
    assert_eq!(node.ipam().status().counters.adds, 0);
}

#[tokio::test]
async fn a_bucket_without_room_for_one_packet_is_refused() {
    let node = Node::new();
    for (rate, burst, part) in [
        (1000, 1463, "egressBurst = 11704: expected at least 11712 bits, one packet"),
        (0, 3000, "egressRate = 0: expected at least 8 bits a second"),
    ] {
        let refused = node.add_with(limited("a", rate, burst)).await.expect_err(part);
        assert!(refused.is(Code::BadConfiguration) && refused.details.contains(part), "{refused:?}");
    }
    node.add_with(limited("a", 1, 1464)).await.expect("room for one");
}
