//! As much of an apiserver as the store speaks to: Nodes with versions, pages, a watch with a history, faults.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::super::policies::{EVENTS, POLICIES};

#[derive(Debug, Clone, Default)]
pub(super) struct ApiServer(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<World>,
    /// Counts up with every change.
    bell: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct World {
    version: u64,
    nodes: BTreeMap<String, Value>,
    history: VecDeque<(u64, &'static str, Value)>,
    /// Versions up to here are kept no more.
    compacted: u64,
    /// Watches begun before are to end.
    epoch: u64,
    /// In place of an answer.
    fault: Option<(StatusCode, &'static str)>,
    /// Names of NetworkPolicies.
    policies: Vec<String>,
    /// By name.
    events: BTreeMap<String, Value>,
    /// NetworkPolicies and Events are none of the agent's business.
    rights_withheld: bool,
    requests: Vec<String>,
    patches: Vec<(String, Value)>,
}

impl ApiServer {
    pub(super) fn client(&self) -> kube::Client {
        let routes = Router::new()
            .route("/api/v1/nodes", get(list_or_watch))
            .route("/api/v1/nodes/{name}", get(one))
            .route("/api/v1/nodes/{name}/status", axum::routing::patch(patch))
            .route("/api/v1/namespaces/{namespace}/pods/{name}", get(pod))
            .route(POLICIES, get(policies))
            .route(EVENTS, axum::routing::post(event))
            .with_state(self.clone());
        kube::Client::new(routes, "default")
    }

    fn with<T>(&self, work: impl FnOnce(&mut World) -> T) -> T {
        let done = work(&mut self.0.state.lock().expect("state"));
        self.0.bell.send_modify(|n| *n += 1);
        done
    }

    /// Makes a Node, or changes it as a merge patch does.
    pub(super) fn apply(&self, name: &str, change: Value) {
        self.with(|world| world.apply(name, &change));
    }

    pub(super) fn delete(&self, name: &str) {
        self.with(|world| {
            let mut node = world.nodes.remove(name).expect(name);
            world.version += 1;
            node["metadata"]["resourceVersion"] = world.version.to_string().into();
            world.history.push_back((world.version, "DELETED", node));
        });
    }

    pub(super) fn node(&self, name: &str) -> Value {
        self.with(|world| world.nodes[name].clone())
    }

    pub(super) fn fail(&self, fault: Option<(StatusCode, &'static str)>) {
        self.with(|world| {
            world.fault = fault;
            world.epoch += 1;
        });
    }

    /// Ends every watch, as a restart does.
    pub(super) fn drop_watches(&self) {
        self.with(|world| world.epoch += 1);
    }

    pub(super) fn compact(&self) {
        self.with(|world| {
            world.compacted = world.version;
            world.history.clear();
        });
    }

    /// Another store is behind it from now on, with these Nodes at this version; watches go on.
    pub(super) fn replace(&self, version: u64, nodes: impl IntoIterator<Item = Value>) {
        self.with(|world| {
            world.nodes = nodes
                .into_iter()
                .map(|n| (n["metadata"]["name"].as_str().expect("name").to_owned(), n))
                .collect();
            world.version = version;
            world.history.clear();
        });
    }

    pub(super) fn set_policies(&self, names: &[&str]) {
        self.with(|world| world.policies = names.iter().map(|name| (*name).to_owned()).collect());
    }

    pub(super) fn events(&self) -> Vec<Value> {
        self.with(|world| world.events.values().cloned().collect())
    }

    pub(super) fn withhold_rights(&self) {
        self.with(|world| world.rights_withheld = true);
    }

    fn begin_beside_nodes(&self, request: String) -> Result<(), Box<Response>> {
        self.begin(request)?;
        match self.with(|world| world.rights_withheld) {
            true => Err(Box::new(failure(StatusCode::FORBIDDEN, "Forbidden"))),
            false => Ok(()),
        }
    }

    pub(super) fn bookmark(&self) {
        self.with(|world| {
            let version = world.version;
            world.history.push_back((version, "BOOKMARK", json!({"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string()}})));
        });
    }

    /// What was asked since the last time: method and path with query.
    pub(super) fn requests(&self) -> Vec<String> {
        self.with(|world| std::mem::take(&mut world.requests))
    }

    /// Content type and body.
    pub(super) fn patches(&self) -> Vec<(String, Value)> {
        self.with(|world| std::mem::take(&mut world.patches))
    }

    fn begin(&self, request: String) -> Result<(), Box<Response>> {
        self.with(|world| {
            world.requests.push(request);
            match world.fault {
                Some((code, reason)) => Err(Box::new(failure(code, reason))),
                None => Ok(()),
            }
        })
    }
}

impl World {
    fn apply(&mut self, name: &str, change: &Value) {
        self.version += 1;
        let kind = if self.nodes.contains_key(name) { "MODIFIED" } else { "ADDED" };
        let fresh = json!({"metadata": {
            "name": name, "uid": format!("uid-{}", self.version), "creationTimestamp": "2026-01-01T00:00:00Z",
        }});
        let node = self.nodes.entry(name.to_owned()).or_insert(fresh);
        merge(node, change);
        node["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.history.push_back((self.version, kind, node.clone()));
    }
}

/// RFC 7396; a list of conditions by type, as a strategic merge patch.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.as_object_mut().expect("object").remove(key)),
            Value::Array(new) if key == "conditions" => {
                let old = target[key].as_array().cloned().unwrap_or_default();
                let kept = old.into_iter().filter(|c| new.iter().all(|n| n["type"] != c["type"]));
                target[key] = kept.chain(new.iter().cloned()).collect();
            }
            value => merge(&mut target[key], value),
        }
    }
}

fn failure(code: StatusCode, reason: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
        "reason": reason, "message": format!("said no: {reason}")});
    (code, [(header::CONTENT_TYPE, "application/json")], status.to_string()).into_response()
}

fn answer(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

async fn one(State(api): State<ApiServer>, Path(name): Path<String>) -> Response {
    if let Err(fault) = api.begin(format!("GET {name}")) {
        return *fault;
    }
    let node = api.with(|world| world.nodes.get(&name).cloned());
    node.map_or_else(|| failure(StatusCode::NOT_FOUND, "NotFound"), |node| answer(&node))
}

async fn pod(State(api): State<ApiServer>, Path((namespace, name)): Path<(String, String)>) -> Response {
    if let Err(fault) = api.begin(format!("GET pod {namespace}/{name}")) {
        return *fault;
    }
    match name.strip_prefix("on-") {
        Some(node) => answer(&json!({"metadata": {"name": name}, "spec": {"nodeName": node}})),
        None => failure(StatusCode::NOT_FOUND, "NotFound"),
    }
}

async fn policies(
    State(api): State<ApiServer>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    let accepted = headers[header::ACCEPT].to_str().expect("text");
    let of = if accepted.contains("as=PartialObjectMetadataList") { "metadata of " } else { "" };
    if let Err(fault) = api.begin_beside_nodes(format!("LIST {of}policies {query:?}")) {
        return *fault;
    }
    let limit: usize = query.get("limit").map_or(usize::MAX, |limit| limit.parse().expect("limit"));
    api.with(|world| {
        let items: Vec<_> =
            world.policies.iter().take(limit).map(|name| json!({"metadata": {"name": name}})).collect();
        let mut metadata = json!({"resourceVersion": world.version.to_string()});
        let rest = world.policies.len() - items.len();
        if rest > 0 {
            metadata["remainingItemCount"] = rest.into();
            metadata["continue"] = "more".into();
        }
        // Not a list, as the real one has it.
        let items = if items.is_empty() { Value::Null } else { items.into() };
        answer(&json!({"kind": "PartialObjectMetadataList", "metadata": metadata, "items": items}))
    })
}

async fn event(State(api): State<ApiServer>, body: Bytes) -> Response {
    let event: Value = serde_json::from_slice(&body).expect("an Event");
    let name = event["metadata"]["name"].as_str().expect("name").to_owned();
    if let Err(fault) = api.begin_beside_nodes(format!("POST event {name}")) {
        return *fault;
    }
    api.with(|world| match world.events.contains_key(&name) {
        true => failure(StatusCode::CONFLICT, "AlreadyExists"),
        false => {
            world.events.insert(name, event.clone());
            answer(&event)
        }
    })
}

async fn patch(
    State(api): State<ApiServer>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if let Err(fault) = api.begin(format!("PATCH {name}/status")) {
        return *fault;
    }
    let change: Value = serde_json::from_slice(&body).expect("a patch");
    let kind = headers[header::CONTENT_TYPE].to_str().expect("text").to_owned();
    if !api.with(|world| world.nodes.contains_key(&name)) {
        return failure(StatusCode::NOT_FOUND, "NotFound");
    }
    api.with(|world| world.patches.push((kind, change.clone())));
    api.apply(&name, change);
    answer(&api.node(&name))
}

async fn list_or_watch(
    State(api): State<ApiServer>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let is_watch = query.get("watch").is_some_and(|v| v == "true");
    if let Err(fault) = api.begin(format!("{} {query:?}", if is_watch { "WATCH" } else { "LIST" })) {
        return *fault;
    }
    if is_watch { watch_nodes(&api, &query) } else { list(&api, &query) }
}

fn list(api: &ApiServer, query: &BTreeMap<String, String>) -> Response {
    let limit: usize = query.get("limit").map_or(usize::MAX, |limit| limit.parse().expect("limit"));
    let after = query.get("continue").cloned().unwrap_or_default();
    api.with(|world| {
        if let Some(version) = after.split('@').nth(1)
            && version.parse::<u64>().expect("version") < world.compacted
        {
            return failure(StatusCode::GONE, "Expired");
        }
        let from = after.split('@').next().unwrap_or_default();
        let mut rest = world.nodes.iter().filter(|(name, _)| name.as_str() > from);
        let page: Vec<_> = rest.by_ref().take(limit).collect();
        let more = page.last().filter(|_| rest.next().is_some());
        let token = more.map(|(name, _)| format!("{name}@{}", world.version)).unwrap_or_default();
        let items: Vec<_> = page.iter().map(|(_, node)| (*node).clone()).collect();
        let metadata = json!({"resourceVersion": world.version.to_string(), "continue": token});
        answer(&json!({"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": items}))
    })
}

fn watch_nodes(api: &ApiServer, query: &BTreeMap<String, String>) -> Response {
    let from: u64 = query["resourceVersion"].parse().expect("version");
    assert_eq!(query.get("allowWatchBookmarks").map(String::as_str), Some("true"));
    let (epoch, compacted) = api.with(|world| (world.epoch, world.compacted));
    if from < compacted {
        let status = json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"});
        let line = format!("{}\n", json!({"type": "ERROR", "object": status}));
        return ([(header::CONTENT_TYPE, "application/json")], line).into_response();
    }
    let (api, bell) = (api.clone(), api.0.bell.subscribe());
    let stream =
        futures_util::stream::unfold((api, bell, from, 0), move |(api, mut bell, from, sent)| async move {
            loop {
                bell.borrow_and_update();
                let found = {
                    let world = api.0.state.lock().expect("state");
                    if world.epoch != epoch {
                        return None;
                    }
                    let sent = if sent > world.history.len() { 0 } else { sent };
                    let new: Vec<_> = world
                        .history
                        .iter()
                        .skip(sent)
                        .filter(|(version, kind, _)| *version > from || *kind == "BOOKMARK")
                        .map(|(_, kind, object)| format!("{}\n", json!({"type": kind, "object": object})))
                        .collect();
                    (world.history.len(), new)
                };
                if !found.1.is_empty() {
                    return Some((
                        Ok::<_, Infallible>(Bytes::from(found.1.concat())),
                        (api, bell, from, found.0),
                    ));
                }
                if bell.changed().await.is_err() {
                    return None;
                }
            }
        });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(stream)).into_response()
}
