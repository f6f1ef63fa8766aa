//! The store against a small apiserver, with its faults.

mod apiserver;
mod policies;

use std::time::SystemTime;

use axum::http::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

use self::apiserver::ApiServer;
use super::*;
use crate::lease::contract::{self, Fixture, Watching, acquire, attrs, want};
use crate::lease::{Keeper, KeeperHandle, LeaseState, StoredConfig};

contract::contract!(@ Cluster: watch_sends_a_snapshot_then_changes, watch_ends_with_its_receiver,);

const PREFIX: &str = "flannel.alpha.coreos.com";
const NET_CONF: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// An apiserver, a directory for the ConfigMap, and the Node `own`.
struct Cluster {
    api: ApiServer,
    dir: TempDir,
}

impl Cluster {
    fn config(&self) -> KubeConfig {
        KubeConfig {
            kubeconfig: Some("/admin.conf".into()),
            api_url: Some("http://apiserver".into()),
            prefix: Prefix::parse(PREFIX).expect("prefix"),
            net_config: self.net_config(),
            node: NodeIdentity::Name("own".into()),
            set_network_available: true,
            policy_check: None,
        }
    }

    fn net_config(&self) -> PathBuf {
        self.dir.path().join("net-conf.json")
    }

    fn store_of(&self, config: &KubeConfig) -> KubeStore {
        let store = KubeStore::over(config, Connection::with_client(config, self.api.client()));
        let retry = (Duration::from_millis(10), Duration::from_millis(100));
        KubeStore { times: watch::Times { retry, ..store.times.clone() }, ..store }
    }

    /// A Node as flannel leaves it.
    fn peer(&self, name: &str, cidr: &str, ip: &str) {
        self.api.apply(name, json!({
            "metadata": {"annotations": annotations(&[
                ("backend-data", "null"), ("backend-type", "host-gw"), ("public-ip", ip), ("kube-subnet-manager", "true"),
            ])},
            "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        }));
    }

    fn own(&self, cidr: Option<&str>) {
        self.api.apply("own", json!({"spec": {"podCIDR": cidr}}));
    }

    /// A store whose watch runs, as an agent's does.
    fn watched(&self, config: &KubeConfig) -> (KubeStore, JoinSet<()>) {
        let store = self.store_of(config);
        let (sender, mut updates) = mpsc::channel(8);
        let mut tasks = JoinSet::new();
        let watched = store.clone();
        tasks.spawn(async move { watched.watch(sender, latest::Sender::new(StoreHealth::default())).await });
        tasks.spawn(async move { while updates.recv().await.is_some() {} });
        (store, tasks)
    }

    /// An older Node than those that are made without a time.
    fn elder(&self, name: &str, cidr: &str, ip: &str) {
        self.api.apply(name, json!({"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"}}));
        self.peer(name, cidr, ip);
    }

    fn annotation(&self, name: &str) -> Value {
        self.api.node("own")["metadata"]["annotations"][format!("{PREFIX}/{name}")].clone()
    }

    async fn until_annotation(&self, name: &str, value: &str) {
        let written = async {
            while self.annotation(name) != value {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(contract::PATIENCE, written).await;
        waited.unwrap_or_else(|_| panic!("{name} is {} and never was {value}", self.annotation(name)));
    }

    fn watching(&self) -> Watching {
        Watching::start(self.store())
    }
}

fn annotations(of: &[(&str, &str)]) -> Value {
    of.iter()
        .map(|(name, value)| (format!("{PREFIX}/{name}"), Value::from(*value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn request() -> AcquireRequest {
    want(&NetworkConfig::parse_for_nodes(NET_CONF).expect("valid"), "192.0.2.1", None)
}

impl Fixture for Cluster {
    type Store = KubeStore;

    async fn new() -> Self {
        let cluster = Self { api: ApiServer::default(), dir: tempfile::tempdir().expect("directory") };
        cluster.own(None);
        cluster
    }

    fn store(&self) -> KubeStore {
        self.store_of(&self.config())
    }

    async fn put_config(&self, json: &str) {
        std::fs::write(self.net_config(), json).expect("write");
    }

    async fn put(&self, key: &str, value: &str, _ttl: Option<Duration>) {
        let (name, cidr) = (format!("n{key}"), key.replace('-', "/"));
        let attrs: LeaseAttrs = serde_json::from_str(value).expect(value);
        self.peer(&name, &cidr, &attrs.public_ip.to_string());
    }

    async fn delete(&self, key: &str) {
        self.api.delete(&format!("n{key}"));
    }

    async fn get(&self, _key: &str) -> Option<(String, bool)> {
        None
    }
}

#[tokio::test]
async fn a_lease_is_one_patch_of_what_differs() {
    let cluster = Cluster::new().await;
    let (store, _watch) = cluster.watched(&cluster.config());
    cluster.own(Some("10.5.7.0/24"));
    cluster
        .api
        .apply("own", json!({"metadata": {"annotations": {"theirs": "1"}}, "status": {"images": [1]}}));
    let mut request = request();
    request.attrs.backend_type = "vxlan".into();
    request.attrs.backend_data = Some(json!({"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}));
    let held = acquire(&store, &request).await;
    assert_eq!((held.lease.key.to_string().as_str(), held.expires), ("10.5.7.0-24", None));
    assert_eq!(held.lease.create_revision, 1_767_225_600, "when the Node was made");
    let written = annotations(&[
        ("backend-data", r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#),
        ("backend-type", "vxlan"),
        ("kube-subnet-manager", "true"),
        ("public-ip", "192.0.2.1"),
    ]);
    let kind = "application/merge-patch+json".to_owned();
    assert_eq!(cluster.api.patches(), [(kind.clone(), json!({"metadata": {"annotations": written}}))]);
    let node = cluster.api.node("own");
    assert_eq!(
        (&node["metadata"]["annotations"]["theirs"], &node["status"]["images"]),
        (&json!("1"), &json!([1]))
    );

    // Right already: neither by another start nor by a renewal.
    assert_eq!(acquire(&store, &request).await.lease, held.lease);
    assert_eq!(store.renew(&held, contract::DAY).await.map(|h| h.lease), Ok(held.lease.clone()));
    assert_eq!(cluster.api.patches(), []);
    // Only what differs; an operator's overwrite is what peers are told, and not what is held.
    let overwrite = annotations(&[("public-ip-overwrite", "203.0.113.7"), ("backend-type", "udp")]);
    cluster.api.apply("own", json!({"metadata": {"annotations": overwrite}}));
    let renewed = store.renew(&held, contract::DAY).await.expect("ours");
    assert_eq!(renewed.lease, held.lease);
    let differs = annotations(&[("public-ip", "203.0.113.7"), ("backend-type", "vxlan")]);
    assert_eq!(cluster.api.patches(), [(kind, json!({"metadata": {"annotations": differs}}))]);
    let moved = store.rewrite(&held, &attrs("192.0.2.5"), contract::DAY).await.expect("ours");
    assert_eq!(moved.lease.attrs, attrs("192.0.2.5"));
    assert_eq!(
        cluster.api.node("own")["metadata"]["annotations"][format!("{PREFIX}/public-ip")],
        "203.0.113.7"
    );
}

#[tokio::test]
async fn what_the_cluster_has_not_done_is_said_by_name() {
    let cluster = Cluster::new().await;
    let store = cluster.store();
    let refusal = async || store.acquire(&request()).await.expect_err("no lease").to_string();
    let no_range = refusal().await;
    assert!(no_range.starts_with("node \"own\" pod cidr not assigned"), "{no_range}");
    assert!(no_range.contains("kube-controller-manager with --allocate-node-cidrs=true"), "{no_range}");
    cluster.own(Some("10.9.7.0/24"));
    assert_eq!(
        refusal().await,
        r#"subnet "10.5.0.0/16" specified in the flannel net config doesn't contain "10.9.7.0/24" PodCIDR of the "own" node"#
    );
    cluster.api.delete("own");
    assert!(refusal().await.contains("no such Node: expected the name that kubelet registers"));
    cluster.api.fail(Some((StatusCode::FORBIDDEN, "Forbidden")));
    match store.acquire(&request()).await {
        Err(StoreError::Refused { reason, .. }) => assert_eq!(reason, "said no: Forbidden"),
        other => panic!("{other:?}"),
    }
    let bare = KubeConfig { kubeconfig: None, ..cluster.config() };
    for (code, reason) in [(StatusCode::FORBIDDEN, "Forbidden"), (StatusCode::UNAUTHORIZED, "Unauthorized")] {
        cluster.api.fail(Some((code, reason)));
        let refused = cluster.store_of(&bare).acquire(&request()).await.expect_err(reason).to_string();
        let cause =
            format!("said no: {reason}; --kube-api-url without --kubeconfig-file speaks without credentials");
        assert!(refused.contains(&cause), "{refused}");
    }
    cluster.api.fail(Some((StatusCode::SERVICE_UNAVAILABLE, "Booting")));
    assert!(matches!(store.acquire(&request()).await, Err(StoreError::Unavailable { .. })));
    assert_eq!(cluster.api.patches(), []);
}

#[tokio::test]
async fn ranges_need_not_have_the_length_of_the_configuration() {
    let cluster = Cluster::new().await;
    cluster
        .put_config(
            r#"{"Network":"10.5.0.0/16","SubnetLen":20,"SubnetMin":"x","Backend":{"Type":"host-gw"}}"#,
        )
        .await;
    let config = cluster.store().network_config().await.expect("flannel reads no SubnetLen here");
    cluster.own(Some("10.5.7.64/26"));
    let (store, _watch) = cluster.watched(&cluster.config());
    let held = acquire(&store, &AcquireRequest { config: config.clone(), ..request() }).await;
    cluster.peer("b", "10.5.32.0/20", "192.0.2.2");
    let mut table = crate::lease::LeaseTable::new(config, Duration::ZERO);
    table.set_own(Some(&held.lease));
    let (sender, mut updates) = mpsc::channel(8);
    let store = cluster.store();
    store.shared.publish(&held.lease.attrs);
    let task =
        tokio::spawn(async move { store.watch(sender, latest::Sender::new(StoreHealth::default())).await });
    while !table.has_snapshot() {
        table.apply(updates.recv().await.expect("an update"), std::time::Instant::now());
    }
    assert_eq!(table.peers().map(|l| l.key.to_string()).collect::<Vec<_>>(), ["10.5.32.0-20"]);
    assert_eq!(table.refused(), []);
    task.abort();
}

#[tokio::test]
async fn a_lease_is_lost_with_its_node_or_its_range() {
    let cluster = Cluster::new().await;
    let (store, _watch) = cluster.watched(&cluster.config());
    cluster.own(Some("10.5.7.0/24"));
    let held = acquire(&store, &request()).await;
    let lost = Err(StoreError::Lost { key: held.lease.key, owner: None });
    cluster.own(Some("10.5.8.0/24"));
    assert_eq!(store.renew(&held, contract::DAY).await, lost);
    cluster.api.delete("own");
    assert_eq!(store.renew(&held, contract::DAY).await, lost);
}

#[tokio::test]
async fn giving_back_takes_our_annotations_alone() {
    let cluster = Cluster::new().await;
    let (store, _watch) = cluster.watched(&cluster.config());
    let (ours, theirs) = ("192.0.2.1".parse().expect("ip"), "192.0.2.2".parse().expect("ip"));
    let key = "10.5.7.0-24".parse().expect("key");
    assert_eq!(store.release(&key, ours).await, Ok(Released::Gone), "never taken");
    cluster.own(Some("10.5.7.0/24"));
    cluster
        .api
        .apply("own", json!({"metadata": {"annotations": annotations(&[("node-public-ip", "192.0.2.1")])}}));
    acquire(&store, &request()).await;
    assert_eq!(store.release(&key, theirs).await, Ok(Released::Foreign { owner: "192.0.2.1".into() }));
    assert_eq!(store.release(&"10.5.8.0-24".parse().expect("key"), ours).await, Ok(Released::Gone));
    assert_eq!(store.release(&key, ours).await, Ok(Released::Done));
    let left = cluster.api.node("own")["metadata"]["annotations"].clone();
    assert_eq!(left, annotations(&[("node-public-ip", "192.0.2.1")]));
    assert_eq!(store.release(&key, ours).await, Ok(Released::Gone));
}

#[tokio::test]
async fn the_condition_is_written_once_and_touches_no_other() {
    let cluster = Cluster::new().await;
    let ready = json!({"type": "Ready", "status": "True"});
    cluster.api.apply("own", json!({"status": {"conditions": [ready]}}));
    let store = cluster.store();
    for _ in 0..2 {
        store.network_available().await.expect("written");
    }
    let patches = cluster.api.patches();
    assert_eq!(patches.len(), 1, "{patches:?}");
    assert_eq!(patches[0].0, "application/strategic-merge-patch+json");
    let conditions = cluster.api.node("own")["status"]["conditions"].clone();
    assert_eq!(conditions[0], ready);
    let written = &conditions[1];
    for (key, value) in [
        ("type", "NetworkUnavailable"),
        ("status", "False"),
        ("reason", "FlannelIsUp"),
        ("message", "Flannel is running on this node"),
    ] {
        assert_eq!(written[key], value);
    }
    for key in ["lastTransitionTime", "lastHeartbeatTime"] {
        let time: k8s_openapi::apimachinery::pkg::apis::meta::v1::Time =
            serde_json::from_value(written[key].clone()).expect("a time");
        assert!((SystemTime::from(time.0)).elapsed().expect("past") < Duration::from_secs(3600));
    }
    // A cloud's own word is replaced, unless nothing is to be written.
    cluster
        .api
        .apply("own", json!({"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True"}]}}));
    let silent = cluster.store_of(&KubeConfig { set_network_available: false, ..cluster.config() });
    silent.network_available().await.expect("nothing to do");
    assert_eq!(cluster.api.patches(), []);
    store.network_available().await.expect("written");
    assert_eq!(cluster.api.node("own")["status"]["conditions"][1]["status"], "False");
}

#[tokio::test]
async fn the_node_is_found_by_the_pod() {
    let cluster = Cluster::new().await;
    cluster.own(Some("10.5.7.0/24"));
    let of_pod = |name: &str| {
        let node = NodeIdentity::OfPod { namespace: "kube-flannel".into(), name: name.into() };
        cluster.watched(&KubeConfig { node, ..cluster.config() })
    };
    let (store, _watch) = of_pod("on-own");
    for _ in 0..2 {
        assert_eq!(acquire(&store, &request()).await.lease.key.to_string(), "10.5.7.0-24");
    }
    let asked = cluster.api.requests();
    assert_eq!(asked.iter().filter(|r| *r == "GET pod kube-flannel/on-own").count(), 1, "{asked:?}");
    let error = of_pod("nowhere").0.acquire(&request()).await.expect_err("no pod").to_string();
    assert!(error.contains("pod kube-flannel/nowhere is not there or on no Node"), "{error}");
}

#[tokio::test]
async fn an_operators_wish_is_read_from_the_node() {
    let cluster = Cluster::new().await;
    let store = cluster.store();
    assert_eq!(store.public_ip_wish().await, Ok(None));
    let wish = |ip: &str| json!({"metadata": {"annotations": annotations(&[("node-public-ip", ip)])}});
    cluster.api.apply("own", wish("203.0.113.7"));
    assert_eq!(store.public_ip_wish().await, Ok("203.0.113.7".parse().ok()));
    cluster.api.apply("own", wish("x"));
    let error = store.public_ip_wish().await.expect_err("no address").to_string();
    assert!(error.contains("node-public-ip = \"x\": expected an IPv4 address"), "{error}");
}

#[tokio::test]
async fn a_heartbeat_is_no_news_and_asks_nothing() {
    let cluster = Cluster::new().await;
    cluster.peer("b", "10.5.2.0/24", "192.0.2.2");
    let (sender, mut updates) = mpsc::channel(8);
    let store = cluster.store();
    let task =
        tokio::spawn(async move { store.watch(sender, latest::Sender::new(StoreHealth::default())).await });
    let mut heard = Vec::new();
    while !heard.iter().any(|u| matches!(u, LeaseUpdate::Snapshot { .. })) {
        heard.push(updates.recv().await.expect("an update"));
    }
    while !cluster.api.requests().iter().any(|r| r.starts_with("WATCH")) {
        tokio::task::yield_now().await;
    }
    for n in 0..50 {
        cluster
            .api
            .apply("b", json!({"status": {"heartbeat": n}, "metadata": {"labels": {"x": n.to_string()}}}));
    }
    cluster.peer("c", "10.5.3.0/24", "192.0.2.3");
    loop {
        match updates.recv().await.expect("an update") {
            LeaseUpdate::Config(_) => {}
            LeaseUpdate::Upsert(lease) if lease.key.to_string() == "10.5.3.0-24" => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(cluster.api.requests(), Vec::<String>::new());
    assert_eq!(cluster.api.patches(), []);
    task.abort();
}

#[tokio::test]
async fn large_clusters_are_listed_in_pages() {
    let cluster = Cluster::new().await;
    for n in 0..1200 {
        cluster.peer(&format!("n{n:04}"), &format!("10.{}.{}.0/24", 16 + n / 256, n % 256), "192.0.2.2");
    }
    let mut watching = cluster.watching();
    watching.until("everybody", |w| w.world.len() == 1200).await;
    let lists: Vec<_> = cluster.api.requests().into_iter().filter(|r| r.starts_with("LIST")).collect();
    assert_eq!(lists.len(), 3, "{lists:?}");
    assert!(lists.iter().all(|list| list.contains(r#""limit": "500""#)), "{lists:?}");
}

#[tokio::test]
async fn nodes_that_are_no_peers_are_named_and_leave_the_others() {
    let cluster = Cluster::new().await;
    cluster.peer("b", "10.5.2.0/24", "192.0.2.2");
    cluster.peer("c", "10.5.3.0/24", "192.0.2.3");
    cluster.peer("garbage", "10.5.4.0/24", "nonsense");
    cluster.api.apply("plain", json!({"spec": {"podCIDR": "10.5.9.0/24"}}));
    let mut watching = cluster.watching();
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    let two = [("10.5.2.0-24", "192.0.2.2"), ("10.5.3.0-24", "192.0.2.3")];
    assert_eq!(watching.ips(), two);
    assert_eq!(watching.malformed.iter().collect::<Vec<_>>(), ["node/garbage"]);

    // Garbage where there was sense: known by what it said last.
    cluster.api.apply("b", json!({"metadata": {"annotations": annotations(&[("backend-data", "{")])}}));
    cluster
        .api
        .apply("late", json!({"metadata": {"annotations": annotations(&[("kube-subnet-manager", "true")])}}));
    watching.until("two more by name", |w| w.malformed.len() == 3).await;
    assert_eq!(watching.ips(), two);
    cluster.api.apply("b", json!({"metadata": {"annotations": annotations(&[("backend-data", "null")])}}));
    cluster.peer("late", "10.5.5.0/24", "192.0.2.5");
    cluster.api.delete("garbage");
    watching.until("all well", |w| w.malformed.is_empty() && w.world.len() == 3).await;
    // Deleted and joined again with another range, and one that takes it.
    cluster.api.delete("c");
    cluster.peer("c", "10.5.33.0/24", "192.0.2.3");
    cluster.peer("d", "10.5.3.0/24", "192.0.2.4");
    watching.until("the new ranges", |w| w.world.len() == 4).await;
    assert_eq!(watching.world["10.5.33.0-24"], "192.0.2.3");
    assert_eq!(watching.world["10.5.3.0-24"], "192.0.2.4");
    assert_eq!(watching.snapshots, 1);
}

#[tokio::test]
async fn a_watch_that_cannot_go_on_begins_anew_and_removes_nothing_before() {
    let cluster = Cluster::new().await;
    cluster.peer("b", "10.5.2.0/24", "192.0.2.2");
    cluster.peer("c", "10.5.3.0/24", "192.0.2.3");
    let mut watching = cluster.watching();
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    // The apiserver is away, and history is compacted meanwhile.
    cluster.api.fail(Some((StatusCode::SERVICE_UNAVAILABLE, "Stopping")));
    watching
        .until_health("away", |health| health.problem.as_ref().is_some_and(|p| p.contains("Stopping")))
        .await;
    cluster.api.delete("b");
    cluster.peer("d", "10.5.4.0/24", "192.0.2.4");
    cluster.api.compact();
    assert_eq!(watching.ips().len(), 2, "nothing is said while it is away");
    cluster.api.fail(None);
    watching.until("the world as it is", |w| w.snapshots == 2).await;
    assert_eq!(watching.ips(), [("10.5.3.0-24", "192.0.2.3"), ("10.5.4.0-24", "192.0.2.4")]);
    assert_eq!(watching.departed, [("10.5.2.0-24".to_owned(), crate::lease::Departure::ByHand)]);
    watching.until_health("back", |health| health.connected && health.problem.is_none()).await;
    // Refused.
    cluster.api.fail(Some((StatusCode::UNAUTHORIZED, "Unauthorized")));
    watching
        .until_health("refused", |h| h.problem.as_ref().is_some_and(|p| p.contains("Unauthorized")))
        .await;
}

#[tokio::test]
async fn a_version_that_is_kept_no_more_and_an_end_of_file_are_lists() {
    let cluster = Cluster::new().await;
    cluster.peer("b", "10.5.2.0/24", "192.0.2.2");
    let mut watching = cluster.watching();
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    cluster.api.drop_watches();
    watching.until("another", |w| w.snapshots == 2).await;
    watching.until_health("counted", |health| health.relists >= 1).await;
    cluster.peer("c", "10.5.3.0/24", "192.0.2.3");
    watching.until("a change after it", |w| w.world.len() == 2).await;
}

#[tokio::test]
async fn another_store_behind_the_apiserver_is_noticed() {
    let cluster = Cluster::new().await;
    cluster.peer("b", "10.5.2.0/24", "192.0.2.2");
    cluster.peer("c", "10.5.3.0/24", "192.0.2.3");
    let saved = ["own", "b"].map(|name| cluster.api.node(name));
    let quiet = Duration::from_millis(100);
    let by_bookmark = cluster.store();
    let by_asking =
        KubeStore { times: watch::Times { quiet, ..by_bookmark.times.clone() }, ..cluster.store() };
    let mut first = Watching::start(by_bookmark);
    let mut second = Watching::start(by_asking);
    for watching in [&mut first, &mut second] {
        watching.until("the snapshot", |w| w.snapshots == 1).await;
    }
    // An older copy, without c: whoever is missing went nobody knows how.
    cluster.api.replace(2, saved);
    second.until("its world, by asking", |w| w.snapshots >= 2).await;
    cluster.api.bookmark();
    first.until("its world, by a bookmark", |w| w.snapshots >= 2).await;
    for watching in [first, second] {
        assert_eq!(watching.ips(), [("10.5.2.0-24", "192.0.2.2")]);
        assert_eq!(watching.departed, [], "left to the snapshot");
    }
}

#[tokio::test]
async fn a_silent_watch_is_given_up() {
    let cluster = Cluster::new().await;
    let times = watch::Times {
        quiet: Duration::from_millis(20),
        silent: Duration::from_millis(60),
        ..cluster.store().times
    };
    let mut watching = Watching::start(KubeStore { times, ..cluster.store() });
    watching.until("another list", |w| w.snapshots >= 2).await;
    let mut healed = Watching::start(KubeStore {
        times: watch::Times { relist: Duration::from_millis(50), ..cluster.store().times },
        ..cluster.store()
    });
    healed.until("a list now and then, with nothing wrong", |w| w.snapshots >= 3).await;
    assert_eq!(healed.health.borrow().relists, 0);
}

#[tokio::test]
async fn the_configuration_is_the_file_and_a_moved_link_is_a_change() {
    let cluster = Cluster::new().await;
    let store = cluster.store();
    match store.network_config().await {
        Err(StoreError::NoConfig { key, command }) => {
            assert!(key.ends_with("net-conf.json (is --net-config-path right?)"), "{key}");
            assert!(command.contains("ConfigMap"), "{command}");
        }
        other => panic!("{other:?}"),
    }
    let mut watching = Watching::start(store.clone());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    assert_eq!(watching.config, Some(StoredConfig::Missing));
    // As kubelet does it: a file through ..data, a link that is moved.
    let dir = cluster.dir.path();
    let config = |network: &str| format!(r#"{{"Network":"{network}","Backend":{{"Type":"host-gw"}}}}"#);
    for (round, network) in ["10.5.0.0/16", "10.6.0.0/16", "nonsense"].into_iter().enumerate() {
        let version = dir.join(format!("..{round}"));
        std::fs::create_dir(&version).expect("directory");
        std::fs::write(version.join("net-conf.json"), config(network)).expect("write");
        std::os::unix::fs::symlink(&version, dir.join("..tmp")).expect("link");
        std::fs::rename(dir.join("..tmp"), dir.join("..data")).expect("moved");
        if round == 0 {
            std::os::unix::fs::symlink("..data/net-conf.json", cluster.net_config()).expect("link");
        }
        let expected = match NetworkConfig::parse_for_nodes(&config(network)) {
            Ok(config) => StoredConfig::Valid(config),
            Err(error) => StoredConfig::Invalid(error),
        };
        watching.until(network, |w| w.config.as_ref() == Some(&expected)).await;
    }
    assert!(matches!(store.network_config().await, Err(StoreError::BadConfig(_))));
    assert_eq!(watching.snapshots, 1);
}

/// Nobody takes a range without having seen who has it.
#[tokio::test]
async fn a_range_is_taken_once_the_nodes_are_known() {
    let cluster = Cluster::new().await;
    cluster.own(Some("10.5.7.0/24"));
    cluster.elder("elder", "10.5.0.0/20", "192.0.2.50");
    // Older still and outside Network: refused, and in nobody's way.
    cluster.api.apply("wide", json!({"metadata": {"creationTimestamp": "2019-01-01T00:00:00Z"}}));
    cluster.peer("wide", "10.0.0.0/8", "192.0.2.51");
    let store = cluster.store();
    let acquiring = tokio::spawn({
        let store = store.clone();
        async move { store.acquire(&request()).await }
    });
    while !cluster.api.requests().contains(&"GET own".to_owned()) {
        tokio::task::yield_now().await;
    }
    let mut watching = Watching::start(store.clone());
    watching.until("the snapshot", |w| w.snapshots >= 1).await;
    let key = "10.5.7.0-24".parse().expect("key");
    let lost = |owner: &str| Err(StoreError::Lost { key, owner: Some(owner.into()) });
    assert_eq!(acquiring.await.expect("no panic"), lost("node/elder"));
    assert_eq!(cluster.api.patches(), []);
    assert!(watching.malformed.contains("node/wide"), "{:?}", watching.malformed);
    cluster.api.delete("elder");
    watching.until("it to go", |w| w.world.is_empty()).await;
    assert_eq!(acquire(&store, &request()).await.lease.key, key);
    // Of a range that comes later the same is known as soon as it is there.
    cluster.elder("elder", "10.5.8.0/24", "192.0.2.50");
    cluster.own(Some("10.5.8.0/24"));
    let key = "10.5.8.0-24".parse().expect("key");
    let again = tokio::spawn({
        let store = store.clone();
        async move { store.acquire(&request()).await }
    });
    watching.until("the new one", |w| w.world.contains_key("10.5.8.0-24")).await;
    assert_eq!(
        again.await.expect("no panic"),
        Err(StoreError::Lost { key, owner: Some("node/elder".into()) })
    );
}

#[tokio::test]
async fn without_a_list_of_the_nodes_no_range_is_taken() {
    let cluster = Cluster::new().await;
    cluster.own(Some("10.5.7.0/24"));
    let store = cluster.store();
    let times = watch::Times { known: Duration::from_millis(50), ..store.times.clone() };
    match (KubeStore { times, ..store }).acquire(&request()).await {
        Err(StoreError::Unavailable { reason, .. }) => assert_eq!(
            reason,
            "no list of the Nodes within 50ms, without which an older one with podCIDR 10.5.7.0/24 would not be known"
        ),
        other => panic!("{other:?}"),
    }
    assert_eq!(cluster.api.patches(), []);
}

/// A keeper over this store, and the watch that is not shown to it yet.
struct Keeping {
    handle: KeeperHandle,
    updates: Option<mpsc::Receiver<LeaseUpdate>>,
    tasks: JoinSet<()>,
}

impl Keeping {
    async fn start(cluster: &Cluster) -> Self {
        cluster.put_config(NET_CONF).await;
        cluster.own(Some("10.5.7.0/24"));
        let store = Arc::new(cluster.store());
        let (keeper, handle) = Keeper::new(store.clone(), request(), Duration::from_secs(60));
        let (sender, updates) = mpsc::channel(8);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { match keeper.run().await {} });
        tasks.spawn(async move { store.watch(sender, latest::Sender::new(StoreHealth::default())).await });
        let mut keeping = Self { handle, updates: Some(updates), tasks };
        // The list is from before the lease: shown to the keeper, it would make it look, and put right unsaid what
        // another hand has just done.
        keeping
            .pass_over("its own lease", |u| matches!(u, LeaseUpdate::Upsert(l) if l.attrs == request().attrs))
            .await;
        keeping.until("held", |s| s.held().is_some()).await;
        keeping
    }

    /// Keeps from the keeper what comes until this comes, and that too.
    async fn pass_over(&mut self, what: &str, last: impl Fn(&LeaseUpdate) -> bool) {
        let updates = self.updates.as_mut().expect("not shown yet");
        let waited = tokio::time::timeout(contract::PATIENCE, async {
            while !last(&updates.recv().await.expect("the watch")) {}
        });
        waited.await.unwrap_or_else(|_| panic!("never {what}"));
    }

    fn observe(&mut self) {
        let (handle, mut updates) = (self.handle.clone(), self.updates.take().expect("not shown yet"));
        self.tasks.spawn(async move {
            while let Some(update) = updates.recv().await {
                handle.observe(&update);
            }
        });
    }

    async fn until(&self, what: &str, done: impl FnMut(&LeaseState) -> bool) -> LeaseState {
        let mut state = self.handle.state.clone();
        let waited = tokio::time::timeout(contract::PATIENCE, state.wait_for(done)).await;
        waited
            .unwrap_or_else(|_| panic!("never {what}: {:?}", *self.handle.state.borrow()))
            .expect("keeper")
            .clone()
    }
}

/// The keeper over this store: a foreign hand on our annotations, an older Node with our range, a Node that goes.
#[tokio::test]
async fn the_keeper_keeps_what_the_node_says() {
    let cluster = Cluster::new().await;
    let mut keeping = Keeping::start(&cluster).await;
    keeping.observe();
    cluster.api.patches();
    // Another hand: written back, after a moment, and said.
    cluster
        .api
        .apply("own", json!({"metadata": {"annotations": annotations(&[("public-ip", "192.0.2.99")])}}));
    let state = keeping.until("named", |s| s.problem().is_some()).await;
    assert!(state.problem().is_some_and(|p| p.contains("under this Node's name")), "{state:?}");
    cluster.until_annotation("public-ip", "192.0.2.1").await;
    assert_eq!(cluster.api.patches().len(), 1);
    // An older Node has the range: it is the owner, until it goes.
    cluster.elder("elder", "10.5.7.0/24", "192.0.2.50");
    let lost = keeping.until("lost", |s| matches!(s, LeaseState::Lost { owner: Some(_), .. })).await;
    assert!(
        matches!(&lost, LeaseState::Lost { owner: Some(owner), .. } if owner == "node/elder"),
        "{lost:?}"
    );
    cluster.api.delete("elder");
    keeping.until("held again", |s| s.held().is_some()).await;
    // The Node goes and comes with another range.
    cluster.api.delete("own");
    keeping.until("lost with the Node", |s| matches!(s, LeaseState::Lost { owner: None, .. })).await;
    cluster.own(Some("10.5.8.0/24"));
    let moved = |s: &LeaseState| s.held().is_some_and(|h| h.lease.key.to_string() == "10.5.8.0-24");
    keeping.until("the new range", moved).await;
}

/// What was told in the moment between the store's yes and the keeper's having it is told again.
#[tokio::test]
async fn a_keeper_that_has_not_heard_of_an_elder_hears_again() {
    for cidr in ["10.5.7.0/24", "10.5.0.0/20"] {
        let cluster = Cluster::new().await;
        let mut keeping = Keeping::start(&cluster).await;
        cluster.elder("elder", cidr, "192.0.2.50");
        keeping
            .pass_over("shadowed", |u| matches!(u, LeaseUpdate::Malformed(m) if m.key == "node/own"))
            .await;
        keeping.observe();
        let lost = keeping.until("lost", |s| matches!(s, LeaseState::Lost { .. })).await;
        assert!(
            matches!(&lost, LeaseState::Lost { owner: Some(owner), .. } if owner == "node/elder"),
            "{lost:?}"
        );
    }
}

/// An operator's address is taken up without anybody being blamed; what is none is refused by name.
#[tokio::test]
async fn an_operators_overwrite_is_no_intruder() {
    let cluster = Cluster::new().await;
    let mut keeping = Keeping::start(&cluster).await;
    keeping.observe();
    let overwrite = |value: Value| {
        cluster.api.apply(
            "own",
            json!({"metadata": {"annotations": {format!("{PREFIX}/public-ip-overwrite"): value}}}),
        );
    };
    for (wish, told) in [
        (json!("203.0.113.7"), "203.0.113.7"),
        (json!("203.0.113.8"), "203.0.113.8"),
        (Value::Null, "192.0.2.1"),
        (json!("203.0.113.9"), "203.0.113.9"),
    ] {
        overwrite(wish);
        cluster.until_annotation("public-ip", told).await;
        let state = keeping.until("held", |s| s.held().is_some()).await;
        assert_eq!(state.problem(), None, "{told}");
    }
    for garbage in ["10.0.0.1:8472", "garbage;x", "fd00::1"] {
        cluster.api.patches();
        overwrite(json!(garbage));
        let expected =
            format!("annotation {PREFIX}/public-ip-overwrite = {garbage:?}: expected an IPv4 address");
        let state = keeping.until(&expected, |s| s.problem() == Some(&*expected)).await;
        assert!(state.held().is_some(), "{state:?}");
        assert_eq!((cluster.annotation("public-ip"), cluster.api.patches()), (json!("203.0.113.9"), vec![]));
    }
    // Nor does a start take a lease by it.
    let (fresh, _watch) = cluster.watched(&cluster.config());
    let error = fresh.acquire(&request()).await.expect_err("garbage").to_string();
    assert!(error.contains("public-ip-overwrite = \"fd00::1\": expected an IPv4 address"), "{error}");
    assert_eq!(cluster.api.patches(), []);
    overwrite(json!("203.0.113.10"));
    cluster.until_annotation("public-ip", "203.0.113.10").await;
    keeping.until("well", |s| s.held().is_some() && s.problem().is_none()).await;
}
