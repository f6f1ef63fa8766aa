//! NetworkPolicies, which weft does not enforce: whether there are any, and the one Event which says that nobody does.
//! Neither has a say in whether the store answers: a right that is missing here is nothing to the leases.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;

use super::super::StoreError;
use super::KubeStore;

/// The Event's name: two of one name there cannot be, whoever writes first. It lasts for as long as the apiserver keeps
/// Events (an hour, unless told otherwise).
const EVENT: &str = "weft-network-policies";
/// Where Events of Nodes belong, which are in no namespace.
pub(super) const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
pub(super) const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";

/// One page of a list of which nothing is read but how long it is.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Counted {
    /// Written as null where there are none.
    items: Option<Vec<IgnoredAny>>,
    metadata: Rest,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Rest {
    remaining_item_count: Option<u64>,
}

/// How many there are in the cluster: one of them is asked for, by its metadata, and the apiserver counts the others.
pub(super) async fn count(store: &KubeStore) -> Result<u64, StoreError> {
    let page: Counted = store.connection.first_of(POLICIES).await?.unwrap_or_default();
    Ok(page.items.map_or(0, |items| items.len() as u64) + page.metadata.remaining_item_count.unwrap_or(0))
}

/// Says so for the whole cluster; nothing to do where another node has.
pub(super) async fn tell(store: &KubeStore, note: &str) -> Result<(), StoreError> {
    let node = store.node_name().await?;
    let event = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": EVENT, "namespace": "default"},
        "eventTime": MicroTime(Timestamp::now()),
        "type": "Warning",
        "reason": "NetworkPoliciesNotEnforced",
        "action": "CheckNetworkPolicies",
        "note": note,
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": node},
        "reportingController": "weftd",
        "reportingInstance": node,
    });
    store.connection.create(EVENTS, &event).await
}
