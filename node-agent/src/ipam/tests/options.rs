//! What a network configuration asks of the node for one attachment: masquerade, a bridge to itself.

use weft_shared::cni::Code;
use weft_shared::protocol::{BridgeOptions, Reserve};

use super::super::testing::{Node, key, reserve};

fn masqueraded(id: &str) -> Reserve {
    let reserve = reserve(id);
    Reserve { bridge: BridgeOptions { masquerade: true, ..reserve.bridge.clone() }, ..reserve }
}

fn forcing(id: &str) -> Reserve {
    let reserve = reserve(id);
    Reserve { bridge: BridgeOptions { force_address: true, ..reserve.bridge.clone() }, ..reserve }
}

async fn attach(node: &Node, id: &str, reserve: Reserve) {
    let options = reserve.bridge.clone();
    let (connection, reservation) = node.add_with(reserve).await.expect("reserve");
    assert_eq!(reservation.options, Some(options), "the plugin is told what was understood");
    node.commit(&connection, id).await.expect("commit");
    connection.closed(true).await;
}

/// As the packet filter has them.
fn in_place(node: &Node) -> Vec<String> {
    node.fabric.world().masqueraded.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn a_pod_is_masqueraded_before_its_plugin_is_told_and_no_more_when_a_del_is_answered() {
    let mut node = Node::new();
    node.attach("plain").await;
    attach(&node, "a", masqueraded("a")).await;
    assert_eq!(in_place(&node), ["10.5.1.3"]);
    node.restart();
    assert_eq!(node.needs.borrow().masqueraded.len(), 1, "the next agent knows it from the record");
    // Whoever gets the address next is not to be masqueraded.
    node.fabric.world().options_fail = true;
    let refused = node.ipam().release(&key("a")).await.expect_err("the rule is there");
    assert!(refused.is(Code::TryAgainLater) && refused.details.contains("no packet filter"), "{refused}");
    assert_eq!(node.ipam().status().addresses_used, 2);
    node.fabric.world().options_fail = false;
    node.ipam().release(&key("a")).await.expect("DEL");
    assert_eq!(in_place(&node), [""; 0]);
    node.ipam().release(&key("plain")).await.expect("DEL");
    node.assert_empty();
}

#[tokio::test]
async fn an_add_whose_options_cannot_be_had_leaves_nothing() {
    let node = Node::new();
    node.fabric.world().options_fail = true;
    for reserve in [masqueraded("a"), forcing("b")] {
        let refused = node.add_with(reserve).await.map(drop).expect_err("no packet filter");
        assert!(refused.is(Code::TryAgainLater) && refused.msg.contains("forceAddress"), "{refused}");
    }
    node.fabric.world().options_fail = false;
    node.ipam().tend().await;
    node.assert_empty();
}

#[tokio::test]
async fn a_bridge_is_to_itself_while_a_pod_asks_for_it() {
    let node = Node::new();
    attach(&node, "a", forcing("a")).await;
    assert_eq!(node.fabric.world().forced.len(), 1);
    node.attach("b").await;
    assert_eq!(node.needs.borrow().forced.len(), 1);
    node.ipam().release(&key("a")).await.expect("DEL");
    assert!(node.needs.borrow().forced.is_empty(), "nobody asks any more");
}
