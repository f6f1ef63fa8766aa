//! NetworkPolicies: a look costs one object's metadata, and the Event is one.

use axum::http::StatusCode;
use serde_json::json;

use super::super::KubeStore;
use super::{Cluster, acquire, request};
use crate::lease::StoreError;
use crate::lease::contract::Fixture as _;

#[tokio::test]
async fn they_are_counted_by_one_of_them() {
    let cluster = Cluster::new().await;
    let store = cluster.store();
    for (names, count) in [(&[][..], 0), (&["a"], 1), (&["a", "b", "c"], 3)] {
        cluster.api.set_policies(names);
        assert_eq!(store.network_policies().await, Ok(count));
        assert_eq!(cluster.api.requests(), [r#"LIST metadata of policies {"limit": "1"}"#]);
    }
}

#[tokio::test]
async fn of_all_nodes_that_tell_one_is_heard() {
    let cluster = Cluster::new().await;
    let store_of = |name: &str| -> KubeStore {
        let node = super::NodeIdentity::Name(name.into());
        cluster.store_of(&super::KubeConfig { node, ..cluster.config() })
    };
    for (node, note) in [("own", "first"), ("other", "second"), ("own", "third")] {
        assert_eq!(store_of(node).tell_of_network_policies(note).await, Ok(()), "{note}");
    }
    let events = cluster.api.events();
    let [event] = &events[..] else { panic!("{events:?}") };
    let said = |field: &str| event[field].as_str().unwrap_or_default();
    assert_eq!(
        (said("note"), said("type"), said("reason")),
        ("first", "Warning", "NetworkPoliciesNotEnforced")
    );
    assert_eq!(event["metadata"], json!({"name": "weft-network-policies", "namespace": "default"}));
    assert_eq!(event["regarding"], json!({"apiVersion": "v1", "kind": "Node", "name": "own"}));
}

#[tokio::test]
async fn a_right_that_is_missing_is_named_and_no_leases_business() {
    let cluster = Cluster::new().await;
    let (store, _watch) = cluster.watched(&cluster.config());
    cluster.own(Some("10.5.7.0/24"));
    cluster.api.withhold_rights();
    for refused in [store.network_policies().await.map(drop), store.tell_of_network_policies("x").await] {
        match refused {
            Err(StoreError::Refused { reason, .. }) => assert!(reason.contains("Forbidden"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(acquire(&store, &request()).await.lease.key.to_string(), "10.5.7.0-24");
    cluster.api.fail(Some((StatusCode::SERVICE_UNAVAILABLE, "Stopping")));
    assert!(matches!(store.network_policies().await, Err(StoreError::Unavailable { .. })));
}
