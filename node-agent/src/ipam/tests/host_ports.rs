//! Ports of the host: whose they are from Reserve until nothing leads to the pod any more.

use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::names::host_ifname;
use weft_shared::protocol::{PortMapping, Protocol, Reserve};

use super::super::testing::{Node, key, reserve};

fn mapping(host_ip: Option<&str>, host_port: u16) -> PortMapping {
    let host_ip = host_ip.map(|ip| ip.parse().expect(ip));
    PortMapping { protocol: Protocol::Tcp, host_ip, host_port, container_port: 80 }
}

fn udp(host_port: u16) -> PortMapping {
    PortMapping { protocol: Protocol::Udp, ..mapping(None, host_port) }
}

fn with(id: &str, ports: Vec<PortMapping>) -> Reserve {
    Reserve { host_ports: ports, ..reserve(id) }
}

/// As the packet filter has them.
fn led(node: &Node) -> Vec<String> {
    node.fabric.world().host_ports.iter().map(ToString::to_string).collect()
}

async fn attach(node: &Node, id: &str, port: u16) {
    let (connection, _) = node.add_with(with(id, vec![mapping(None, port)])).await.expect("reserve");
    node.commit(&connection, id).await.expect("commit");
    connection.closed(true).await;
}

#[tokio::test]
async fn a_port_leads_before_the_plugin_is_told_and_no_more_when_a_del_is_answered() {
    let mut node = Node::new();
    let (connection, reservation) = node
        .add_with(with("a", vec![mapping(None, 8080), mapping(Some("192.0.2.1"), 8081)]))
        .await
        .expect("reserve");
    assert_eq!(reservation.host_ports.len(), 2);
    let both = ["tcp *:8080 10.5.1.2:80", "tcp 192.0.2.1:8081 10.5.1.2:80"];
    assert_eq!(led(&node), both);
    node.commit(&connection, "a").await.expect("commit");
    connection.closed(true).await;
    assert_eq!(node.ipam().status().list[0].host_ports, ["8080/tcp -> 80", "192.0.2.1:8081/tcp -> 80"]);
    // The next agent knows them from the record.
    node.restart();
    assert_eq!(node.needs.borrow().host_ports.iter().map(ToString::to_string).collect::<Vec<_>>(), both);
    node.ipam().release(&key("a")).await.expect("DEL");
    assert_eq!(led(&node), [""; 0]);
    node.assert_empty();
}

#[tokio::test]
async fn the_overlays_own_port_is_not_a_pods() {
    let node = Node::new();
    let refused = node.add_with(with("a", vec![udp(8472)])).await.expect_err("the peers' packets come there");
    assert!(refused.is(Code::BadConfiguration) && refused.details.contains("8472/udp"), "{refused:?}");
    node.add_with(with("a", vec![mapping(None, 8472)])).await.expect("TCP is another's");
}

#[tokio::test]
async fn an_address_is_kept_until_no_port_leads_to_it() {
    let node = Node::new();
    attach(&node, "a", 8080).await;
    node.fabric.world().host_ports_fail = true;
    let refused = node.ipam().release(&key("a")).await.expect_err("it still leads there");
    assert!(refused.is(Code::TryAgainLater) && refused.details.contains("no packet filter"), "{refused}");
    assert_eq!((node.ipam().status().addresses_used, node.fabric.world().veths.len()), (1, 0));
    assert_eq!(node.states()["a"], "aborted");
    node.fabric.world().host_ports_fail = false;
    node.ipam().tend().await;
    node.assert_empty();
    assert_eq!(led(&node), [""; 0]);
}

#[tokio::test]
async fn an_add_whose_ports_cannot_lead_to_it_leaves_nothing() {
    let node = Node::new();
    node.fabric.world().host_ports_fail = true;
    let refused = node.add_with(with("a", vec![mapping(None, 8080)])).await.expect_err("no filter");
    assert!(refused.is(Code::TryAgainLater) && refused.details.contains("no packet filter"), "{refused}");
    // Without ports nobody asks the packet filter.
    node.attach("b").await;
    node.fabric.world().host_ports_fail = false;
    node.ipam().tend().await;
    node.assert_consistent();
    assert_eq!(node.states().len(), 1);
    attach(&node, "c", 8080).await;
}

#[tokio::test]
async fn flows_that_cannot_be_made_to_follow_keep_no_address_and_no_port_but_udps() {
    let node = Node::new();
    let (connection, _) = node.add_with(with("a", vec![udp(53)])).await.expect("reserve");
    node.commit(&connection, "a").await.expect("commit");
    connection.closed(true).await;
    node.fabric.world().flows_lag = true;
    node.ipam().release(&key("a")).await.expect("DEL");
    node.assert_empty();
    let refused = node.add_with(with("b", vec![mapping(None, 80), udp(53)])).await.expect_err("lags");
    assert!(refused.is(Code::TryAgainLater) && refused.details.contains("connection tracking"), "{refused}");
    node.ipam().tend().await;
    node.assert_empty();
    attach(&node, "c", 8080).await;
    assert_eq!(led(&node).len(), 1);
}

#[tokio::test]
async fn a_port_is_one_attachments_and_a_refusal_names_both() {
    let node = Node::new();
    attach(&node, "a", 8080).await;
    for ports in [vec![mapping(None, 8080)], vec![mapping(None, 1), mapping(Some("192.0.2.1"), 8080)]] {
        let refused = node.add_with(with("b", ports)).await.expect_err("taken");
        assert!(refused.is(Code::HostPortTaken), "{refused}");
        for part in ["pod default/b, container b asks for port", "pod default/a, container a has 8080/tcp"] {
            assert!(refused.details.contains(part), "{part}: {refused}");
        }
    }
    assert_eq!(node.states().len(), 1, "a refused ADD keeps nothing");
    // One that is reserved has it as well, one that is being undone does not.
    let (connection, _) = node.add_with(with("c", vec![mapping(None, 9090)])).await.expect("free");
    node.add_with(with("d", vec![mapping(None, 9090)])).await.expect_err("reserved");
    drop(connection);
    let (connection, _) = node.add_with(with("d", vec![mapping(None, 9090)])).await.expect("given up");
    node.commit(&connection, "d").await.expect("commit");
    connection.closed(true).await;
    assert_eq!(led(&node), ["tcp *:8080 10.5.1.2:80", "tcp *:9090 10.5.1.4:80"]);
    node.pass_time(deadline::WIRING);
    node.ipam().tend().await;
    node.assert_consistent();
    // A pod that is gone without a DEL keeps its port from nobody.
    node.fabric.world().veths.remove(&host_ifname(&key("a")));
    attach(&node, "e", 8080).await;
    assert_eq!(node.states().len(), 2);
}

#[tokio::test]
async fn what_no_pod_here_can_have_is_named() {
    let node = Node::new();
    for (ports, part) in [
        (
            vec![mapping(None, 80), mapping(Some("0.0.0.0"), 80)],
            "port of the host = 0.0.0.0:80/tcp to 80: expected another port",
        ),
        (vec![mapping(None, 0)], "0/tcp to 80: expected a port from 1"),
        (vec![mapping(Some("2001:db8::1"), 80)], "hostIP of port [2001:db8::1]:80/tcp: expected an IPv4"),
        ((1..=4097).map(|port| mapping(None, port)).collect(), "4097 ports"),
    ] {
        let refused = node.add_with(with("a", ports)).await.expect_err(part);
        assert!(refused.is(Code::BadConfiguration) && refused.details.contains(part), "{refused:?}");
    }
    let (_connection, reservation) =
        node.add_with(with("a", vec![mapping(Some("::"), 80)])).await.expect("all of IPv6");
    assert_eq!(
        (reservation.host_ports.len(), led(&node).len()),
        (1, 0),
        "a pod without IPv6 has nothing there"
    );
}
