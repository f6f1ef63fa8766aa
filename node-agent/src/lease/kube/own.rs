//! The own Node: its range is our subnet, its annotations are our lease. Nothing here expires, and what is right
//! already is not written again.

use std::net::Ipv4Addr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::core::params::Patch;
use serde_json::{Value, json};
use tracing::info;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};

use super::super::{AcquireRequest, OwnedLease, Released, StoreError};
use super::node::Node;
use super::world::key_of;
use super::{KubeStore, LeaseStore as _};

pub(super) async fn acquire(store: &KubeStore, want: &AcquireRequest) -> Result<OwnedLease, StoreError> {
    // Before anything is written: the watch may see it before its answer is here.
    store.shared.publish(&want.attrs);
    let node = own_node(store).await?;
    let name = &node.metadata.name;
    let unfit = |reason| StoreError::NodeUnfit { node: name.clone(), reason };
    let key = node.key().map_err(unfit)?;
    let network = want.config.v4.network;
    store.shared.lease_out_of(network);
    if !network.covers(key.v4) {
        return Err(unfit(format!(
            "subnet {network:?} specified in the flannel net config doesn't contain {:?} PodCIDR of the {name:?} node",
            key.v4.to_string(),
            network = network.to_string(),
        )));
    }
    // Whoever takes a range must know who has it: the first list may still be on its way.
    let patience = store.times.known;
    let elder = store.shared.elder_before(&node, key, network, patience).await;
    let elder = elder.ok_or_else(|| StoreError::Unavailable {
        location: store.location(),
        reason: format!(
            "no list of the Nodes within {patience:?}, without which an older one with podCIDR {} would not be known",
            key.v4
        ),
    })?;
    if let Some(owner) = elder {
        return Err(StoreError::Lost { key, owner: Some(key_of(&owner)) });
    }
    publish(store, &node, key, &want.attrs).await
}

/// Makes the annotations say what is held, if they do not.
pub(super) async fn renew(
    store: &KubeStore,
    held: &OwnedLease,
    attrs: &LeaseAttrs,
) -> Result<OwnedLease, StoreError> {
    let key = held.lease.key;
    let name = store.node_name().await?;
    let Some(node) = store.connection.node(name).await? else {
        store.shared.held.send_replace(false);
        return Err(StoreError::Lost { key, owner: None });
    };
    let owner = store.shared.elder().map(|elder| key_of(&elder));
    if owner.is_some() || node.key() != Ok(key) {
        store.shared.held.send_replace(false);
        return Err(StoreError::Lost { key, owner });
    }
    store.shared.publish(attrs);
    publish(store, &node, key, attrs).await
}

pub(super) async fn release(
    store: &KubeStore,
    key: &LeaseKey,
    public_ip: Ipv4Addr,
) -> Result<Released, StoreError> {
    let name = store.node_name().await?;
    let Some(node) = store.connection.node(name).await? else { return Ok(Released::Gone) };
    let (prefix, annotations) = (&store.prefix, node.annotations());
    if node.key().as_ref() != Ok(key) || !prefix.is_managed(annotations) {
        return Ok(Released::Gone);
    }
    if !prefix.says_public_ip(annotations, public_ip) {
        let owner = prefix.public_ip(annotations).unwrap_or("nobody").to_owned();
        return Ok(Released::Foreign { owner });
    }
    let gone: serde_json::Map<_, _> = prefix.written().map(|name| (name, Value::Null)).collect();
    let patch = Patch::Merge(json!({"metadata": {"annotations": gone}}));
    Ok(match store.connection.patch_status(name, &patch).await? {
        Some(_) => Released::Done,
        None => Released::Gone,
    })
}

/// Says that pods on this Node can be reached, which some clouds and kubeadm's taints wait for.
pub(super) async fn network_available(store: &KubeStore) -> Result<(), StoreError> {
    let name = store.node_name().await?;
    let node = store.connection.whole_node(name).await?.ok_or_else(|| missing(name))?;
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    let is_ours = |c: &Value| {
        (c["type"].as_str(), c["status"].as_str(), c["reason"].as_str())
            == (Some("NetworkUnavailable"), Some("False"), Some("FlannelIsUp"))
    };
    if conditions.is_some_and(|conditions| conditions.iter().any(is_ours)) {
        return Ok(());
    }
    let now = Time(Timestamp::now());
    // Strategic: merged by type, so that the other conditions stay. Reason and message are what tools look for.
    let patch = Patch::Strategic(json!({"status": {"conditions": [{
        "type": "NetworkUnavailable",
        "status": "False",
        "reason": "FlannelIsUp",
        "message": "Flannel is running on this node",
        "lastTransitionTime": now,
        "lastHeartbeatTime": now,
    }]}}));
    store.connection.patch_status(name, &patch).await?.ok_or_else(|| missing(name))?;
    info!(node = %name, "condition NetworkUnavailable=False written");
    Ok(())
}

pub(super) async fn public_ip_wish(store: &KubeStore) -> Result<Option<Ipv4Addr>, StoreError> {
    let node = own_node(store).await?;
    let name = node.metadata.name.clone();
    let wish = store.prefix.node_public_ip(node.annotations());
    wish.map_err(|reason| StoreError::NodeUnfit { node: name, reason })
}

async fn own_node(store: &KubeStore) -> Result<Node, StoreError> {
    let name = store.node_name().await?;
    store.connection.node(name).await?.ok_or_else(|| missing(name))
}

fn missing(name: &str) -> StoreError {
    let reason =
        "there is no such Node: expected the name that kubelet registers, from NODE_NAME or --node-name";
    StoreError::NodeUnfit { node: name.to_owned(), reason: reason.to_owned() }
}

/// One patch of what differs, which touches nothing else.
async fn publish(
    store: &KubeStore,
    node: &Node,
    key: LeaseKey,
    attrs: &LeaseAttrs,
) -> Result<OwnedLease, StoreError> {
    let present = node.annotations();
    let wanted = store.prefix.wanted(attrs, present);
    let mut wanted =
        wanted.map_err(|reason| StoreError::NodeUnfit { node: node.metadata.name.clone(), reason })?;
    // Before anything is written, as above.
    store.shared.publish_ip(store.prefix.public_ip(&wanted));
    wanted.retain(|name, value| present.get(name) != Some(value));
    let version = if wanted.is_empty() {
        node.metadata.resource_version.clone()
    } else {
        let name = &node.metadata.name;
        info!(node = %name, annotations = wanted.len(), "writing the Node's annotations");
        let patch = Patch::Merge(json!({"metadata": {"annotations": wanted}}));
        let patched = store.connection.patch_status(name, &patch).await?.ok_or_else(|| missing(name))?;
        patched.metadata.resource_version
    };
    store.shared.held.send_replace(true);
    let lease = Lease { key, attrs: attrs.clone(), create_revision: node.created() };
    Ok(OwnedLease { lease, mod_revision: version.parse().unwrap_or(0), lease_id: 0, expires: None })
}
