//! What every store promises, as one suite: [`contract!`] makes a test of each case for a [`Fixture`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use weft_shared::lease::{Lease, LeaseAttrs, LeaseKey};
use weft_shared::netconf::NetworkConfig;

use super::{
    AcquireRequest, Departure, LeaseStore, LeaseUpdate, OwnedLease, Released, StoreError, StoreHealth,
    StoredConfig,
};

/// Longest wait for anything that must happen.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
pub(super) const DAY: Duration = Duration::from_secs(86_400);

/// A store of its own for one test, and a way to change it behind the store's back.
pub(super) trait Fixture: Sized + Send + Sync {
    type Store: LeaseStore + Clone;

    fn new() -> impl Future<Output = Self> + Send;
    fn store(&self) -> Self::Store;
    /// Writes the network configuration, whatever it is.
    fn put_config(&self, json: &str) -> impl Future<Output = ()> + Send;
    /// Writes an entry as an operator or another program would; without `ttl` it never expires.
    fn put(&self, key: &str, value: &str, ttl: Option<Duration>) -> impl Future<Output = ()> + Send;
    fn delete(&self, key: &str) -> impl Future<Output = ()> + Send;
    /// The value of an entry, and whether it will expire.
    fn get(&self, key: &str) -> impl Future<Output = Option<(String, bool)>> + Send;
}

macro_rules! contract {
    ($fixture:ty) => {
        $crate::lease::contract::contract!(@ $fixture:
            configuration, takes_a_subnet_in_range_and_keeps_it, previous_subnet, own_lease_that_no_longer_fits,
            contenders_never_overlap, renewal, renewal_never_overwrites_another_owner,
            another_value_under_the_same_key, reservation, giving_back,
            watch_sends_a_snapshot_then_changes, watch_sees_a_lease_expire, watch_survives_malformed_entries,
            watch_ends_with_its_receiver, watch_tells_a_removal_by_hand_from_an_expiry,
            watch_tells_of_the_configuration, a_subnet_freed_lately_is_taken_last,
        );
    };
    (@ $fixture:ty: $($case:ident,)*) => {
        $(
            #[tokio::test]
            async fn $case() {
                let fixture = <$fixture as $crate::lease::contract::Fixture>::new().await;
                $crate::lease::contract::$case(&fixture).await;
            }
        )*
    };
}
pub(super) use contract;

pub(super) fn config(json: &str) -> NetworkConfig {
    NetworkConfig::parse(json).expect(json)
}

pub(super) fn small_pool() -> NetworkConfig {
    // 15 subnets: the first is left out, as flannel does.
    config(r#"{"Network":"10.5.0.0/24","SubnetLen":28,"Backend":{"Type":"host-gw"}}"#)
}

pub(super) fn attrs(ip: &str) -> LeaseAttrs {
    serde_json::from_str(&value(ip)).expect(ip)
}

pub(super) fn value(ip: &str) -> String {
    format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"host-gw"}}"#)
}

pub(super) fn want(config: &NetworkConfig, ip: &str, previous: Option<&str>) -> AcquireRequest {
    AcquireRequest {
        config: config.clone(),
        attrs: attrs(ip),
        previous: previous.map(|key| key.parse().expect(key)),
        ttl: DAY,
    }
}

pub(super) async fn acquire(store: &impl LeaseStore, want: &AcquireRequest) -> OwnedLease {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match store.acquire(want).await {
            // A server that many tests keep busy may be late with an answer.
            Err(StoreError::Unavailable { .. }) if Instant::now() < deadline => {}
            acquired => return acquired.unwrap_or_else(|e| panic!("acquire: {e}")),
        }
    }
}

/// A running watch, and the world as its updates tell it.
pub(super) struct Watching {
    updates: mpsc::Receiver<LeaseUpdate>,
    pub(super) health: watch::Receiver<StoreHealth>,
    task: JoinHandle<()>,
    pub(super) world: BTreeMap<String, String>,
    pub(super) malformed: BTreeSet<String>,
    pub(super) snapshots: usize,
    /// How leases departed, in order, when that was said.
    pub(super) departed: Vec<(String, Departure)>,
    pub(super) config: Option<StoredConfig>,
}

impl Watching {
    pub(super) fn start(store: impl LeaseStore + Clone) -> Self {
        let (sender, updates) = mpsc::channel(8);
        let (health, health_receiver) = watch::channel(StoreHealth::default());
        let task = tokio::spawn(async move { store.watch(sender, health).await });
        Self {
            updates,
            health: health_receiver,
            task,
            world: BTreeMap::new(),
            malformed: BTreeSet::new(),
            snapshots: 0,
            departed: Vec::new(),
            config: None,
        }
    }

    /// Applies updates until `done`; fails with what is known when that takes too long.
    pub(super) async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            match timeout(left, self.updates.recv()).await {
                Ok(Some(update)) => self.apply(update),
                Ok(None) => panic!("the watch ended, waiting for {what}"),
                Err(_) => panic!(
                    "never saw {what}: {:?}, malformed {:?}, {} snapshots, {:?}",
                    self.world,
                    self.malformed,
                    self.snapshots,
                    *self.health.borrow()
                ),
            }
        }
    }

    pub(super) async fn until_health(&mut self, what: &str, done: impl FnMut(&StoreHealth) -> bool) {
        let waited = timeout(PATIENCE, self.health.wait_for(done)).await;
        waited.unwrap_or_else(|_| panic!("health never was {what}")).expect("watch runs");
    }

    pub(super) fn ips(&self) -> Vec<(&str, &str)> {
        self.world.iter().map(|(key, ip)| (key.as_str(), ip.as_str())).collect()
    }

    fn apply(&mut self, update: LeaseUpdate) {
        match update {
            LeaseUpdate::Snapshot { leases, malformed } => {
                self.snapshots += 1;
                self.world = leases
                    .into_iter()
                    .map(|lease| (lease.key.to_string(), lease.attrs.public_ip.to_string()))
                    .collect();
                self.malformed = malformed.into_iter().map(|entry| entry.key).collect();
            }
            LeaseUpdate::Upsert(lease) => {
                self.malformed.remove(&lease.key.to_string());
                self.world.insert(lease.key.to_string(), lease.attrs.public_ip.to_string());
            }
            LeaseUpdate::Remove { key, how } => {
                self.malformed.remove(&key.to_string());
                self.world.remove(&key.to_string());
                self.departed.push((key.to_string(), how));
            }
            LeaseUpdate::Malformed(entry) => {
                self.malformed.insert(entry.key);
            }
            LeaseUpdate::MalformedGone(key) => {
                self.malformed.remove(&key);
            }
            LeaseUpdate::Config(config) => self.config = Some(config),
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) async fn configuration(fixture: &impl Fixture) {
    let store = fixture.store();
    match store.network_config().await {
        Err(StoreError::NoConfig { command, .. }) => assert!(command.contains("Network"), "{command}"),
        other => panic!("expected no configuration, got {other:?}"),
    }
    fixture.put_config(r#"{"Network":"10.5.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#).await;
    match store.network_config().await {
        Err(StoreError::BadConfig(error)) => {
            assert!(error.to_string().contains("SubnetLen = 31: expected"), "{error}");
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
    let json = r#"{"network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
    fixture.put_config(json).await;
    assert_eq!(store.network_config().await, Ok(config(json)));
}

pub(super) async fn takes_a_subnet_in_range_and_keeps_it(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let before = SystemTime::now();
    let first = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    assert!(config.admits(&first.lease.key));
    let expires = first.expires.expect("a lease expires");
    assert!((before + DAY - Duration::from_secs(2)..=SystemTime::now() + DAY).contains(&expires));
    let stored = fixture.get(&first.lease.key.to_string()).await;
    assert_eq!(stored, Some((value("192.0.2.1"), true)));

    // By public IP alone, whatever was held before, and with new attributes.
    let mut again = want(&config, "192.0.2.1", Some("10.5.0.240-28"));
    again.attrs.backend_type = "vxlan".into();
    let second = acquire(&store, &again).await;
    assert_eq!(second.lease.key, first.lease.key);
    assert_eq!(second.lease.create_revision, first.lease.create_revision);
    assert!(second.mod_revision > first.mod_revision);
    let stored = fixture.get(&first.lease.key.to_string()).await.expect("there").0;
    assert!(stored.contains("vxlan"), "{stored}");

    let other = acquire(&store, &want(&config, "192.0.2.2", None)).await;
    assert!(!other.lease.key.overlaps(&first.lease.key));
}

pub(super) async fn previous_subnet(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let key = async |ip: &str, previous: &str| {
        acquire(&store, &want(&config, ip, Some(previous))).await.lease.key.to_string()
    };
    assert_eq!(key("192.0.2.1", "10.5.0.160-28").await, "10.5.0.160-28");
    assert_ne!(key("192.0.2.2", "10.5.0.160-28").await, "10.5.0.160-28", "taken");
    for not_of_this_network in ["10.6.0.160-28", "10.5.0.128-27"] {
        let ip = format!("192.0.2.{}", not_of_this_network.len());
        let got = key(&ip, not_of_this_network).await;
        assert!(config.admits(&got.parse().expect("key")), "{got}");
    }
}

pub(super) async fn own_lease_that_no_longer_fits(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    fixture.put("10.9.1.0-24", &value("192.0.2.1"), Some(DAY)).await;
    let got = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    assert!(config.admits(&got.lease.key));
    assert_eq!(fixture.get("10.9.1.0-24").await, None);
}

pub(super) async fn contenders_never_overlap<F: Fixture>(fixture: &F) {
    let config = small_pool();
    let mut contenders = JoinSet::new();
    for n in 1..=20 {
        let (store, want) = (fixture.store(), want(&config, &format!("192.0.2.{n}"), None));
        contenders.spawn(async move {
            let deadline = Instant::now() + 4 * PATIENCE;
            loop {
                match store.acquire(&want).await {
                    Err(StoreError::Contended(_)) if Instant::now() < deadline => {}
                    other => return other,
                }
            }
        });
    }
    let (mut keys, mut exhausted): (Vec<LeaseKey>, _) = (Vec::new(), 0);
    while let Some(result) = contenders.join_next().await {
        match result.expect("no panic") {
            Ok(owned) => keys.push(owned.lease.key),
            Err(StoreError::Exhausted { min, max, len: 28 }) => {
                assert_eq!((min.as_str(), max.as_str()), ("10.5.0.16", "10.5.0.240"));
                exhausted += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((keys.len(), exhausted), (15, 5));
    for (n, key) in keys.iter().enumerate() {
        assert!(config.admits(key));
        assert!(!keys[n + 1..].iter().any(|other| other.overlaps(key)), "{key} twice");
    }
}

pub(super) async fn renewal(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let mut request = want(&config, "192.0.2.1", Some("10.5.0.16-28"));
    request.ttl = Duration::from_secs(4);
    let held = acquire(&store, &request).await;
    let renewed = store.renew(&held, DAY).await.expect("ours");
    assert_eq!(renewed.lease, held.lease);
    assert!(renewed.mod_revision > held.mod_revision);
    assert!(renewed.expires > held.expires.map(|expires| expires + DAY / 2));
    // A renewal by an earlier run of this agent has moved the revision: still ours.
    let again = store.renew(&held, DAY).await.expect("ours still");
    assert!(again.mod_revision > renewed.mod_revision);
    // It outlasts a witness that ends later than it would have.
    fixture.put("10.5.0.240-28", &value("192.0.2.9"), Some(Duration::from_secs(6))).await;
    let mut watching = Watching::start(store.clone());
    watching.until("both", |w| w.world.len() == 2).await;
    watching.until("the end of the witness", |w| w.world.len() == 1).await;
    assert_eq!(watching.ips(), [("10.5.0.16-28", "192.0.2.1")]);
}

pub(super) async fn renewal_never_overwrites_another_owner(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let held = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    let key = held.lease.key.to_string();
    for (stored, owner) in
        [(value("192.0.2.9"), "192.0.2.9"), ("nonsense".into(), "an entry that is no lease")]
    {
        fixture.put(&key, &stored, Some(DAY)).await;
        let lost = StoreError::Lost { key: held.lease.key, owner: Some(owner.into()) };
        assert_eq!(store.renew(&held, DAY).await, Err(lost));
        assert_eq!(fixture.get(&key).await.map(|(value, _)| value), Some(stored));
    }
    fixture.delete(&key).await;
    let gone = StoreError::Lost { key: held.lease.key, owner: None };
    assert_eq!(store.renew(&held, DAY).await, Err(gone));
    assert_eq!(fixture.get(&key).await, None);
}

pub(super) async fn another_value_under_the_same_key(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let held = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    let key = held.lease.key.to_string();
    let moved = store.rewrite(&held, &attrs("192.0.2.5"), DAY).await.expect("rewritten");
    assert_eq!(moved.lease, Lease { attrs: attrs("192.0.2.5"), ..held.lease.clone() });
    assert_eq!(fixture.get(&key).await, Some((value("192.0.2.5"), true)));
    // The answer was lost, and it is asked again; then somebody writes our own lease.
    let moved = store.rewrite(&held, &attrs("192.0.2.5"), DAY).await.expect("by the new value");
    fixture.put(&key, r#"{"PublicIP":"192.0.2.5"}"#, Some(DAY)).await;
    let moved = store.rewrite(&moved, &attrs("192.0.2.6"), DAY).await.expect("by the value that was held");
    assert_eq!(store.renew(&moved, DAY).await.map(|renewed| renewed.lease), Ok(moved.lease.clone()));
    // Another node's is left to it.
    fixture.put(&key, &value("192.0.2.9"), Some(DAY)).await;
    let lost = StoreError::Lost { key: held.lease.key, owner: Some("192.0.2.9".into()) };
    assert_eq!(store.rewrite(&moved, &attrs("192.0.2.7"), DAY).await, Err(lost));
    assert_eq!(fixture.get(&key).await, Some((value("192.0.2.9"), true)));

    fixture.put("10.5.0.64-28", r#"{"PublicIP":"192.0.2.1"}"#, None).await;
    let reserved = acquire(&store, &want(&config, "192.0.2.1", Some("10.5.0.64-28"))).await;
    assert_eq!(reserved.expires, None);
    let moved = store.rewrite(&reserved, &attrs("192.0.2.5"), DAY).await.expect("a reservation too");
    assert_eq!(fixture.get("10.5.0.64-28").await, Some((value("192.0.2.5"), false)), "and it stays one");
    assert_eq!(moved.expires, None);
}

pub(super) async fn reservation(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let key = "10.5.0.64-28";
    fixture.put(key, r#"{"PublicIP":"192.0.2.1"}"#, None).await;
    let request = want(&config, "192.0.2.1", Some("10.5.0.80-28"));
    let held = acquire(&store, &request).await;
    assert_eq!((held.lease.key.to_string().as_str(), held.expires), (key, None));
    assert_eq!(fixture.get(key).await, Some((value("192.0.2.1"), false)));
    assert_eq!(acquire(&store, &request).await, held, "right already: not written again");
    assert_eq!(store.renew(&held, DAY).await, Ok(held.clone()), "nor by a renewal");
    assert_eq!(fixture.get(key).await, Some((value("192.0.2.1"), false)));

    // For whoever held the subnet before; nobody else gets it.
    fixture.put("10.5.0.96-28", r#"{"PublicIP":"0.0.0.0"}"#, None).await;
    let other = acquire(&store, &want(&config, "192.0.2.2", None)).await;
    assert!(!["10.5.0.64-28", "10.5.0.96-28"].contains(&other.lease.key.to_string().as_str()));
    let held = acquire(&store, &want(&config, "192.0.2.3", Some("10.5.0.96-28"))).await;
    assert_eq!((held.lease.key.to_string().as_str(), held.expires), ("10.5.0.96-28", None));

    fixture.delete("10.5.0.96-28").await;
    let gone = StoreError::Lost { key: held.lease.key, owner: None };
    assert_eq!(store.renew(&held, DAY).await, Err(gone));
}

pub(super) async fn giving_back(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let mut watching = Watching::start(fixture.store());
    let held = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    let key = held.lease.key;
    let ours = "192.0.2.1".parse().expect("address");
    let theirs = "192.0.2.2".parse().expect("address");
    watching.until("the lease", |w| !w.world.is_empty()).await;
    let foreign = Ok(Released::Foreign { owner: "192.0.2.1".into() });
    assert_eq!(store.release(&key, theirs).await, foreign);
    // Whatever was renewed since.
    store.renew(&held, DAY).await.expect("renewed");
    assert_eq!(store.release(&key, ours).await, Ok(Released::Done));
    assert_eq!(fixture.get(&key.to_string()).await, None);
    watching.until("the others to hear of it", |w| w.world.is_empty()).await;
    assert_eq!(watching.departed, [(key.to_string(), Departure::ByHand)], "on purpose, not by expiry");
    assert_eq!(store.release(&key, ours).await, Ok(Released::Gone));
    fixture.put(&key.to_string(), &value("192.0.2.1"), None).await;
    assert_eq!(store.release(&key, ours).await, Ok(Released::Reserved));
    assert!(fixture.get(&key.to_string()).await.is_some());
    fixture.put(&key.to_string(), "no lease", Some(DAY)).await;
    assert!(matches!(store.release(&key, ours).await, Ok(Released::Foreign { .. })));
}

pub(super) async fn watch_sends_a_snapshot_then_changes(fixture: &impl Fixture) {
    fixture.put("10.5.0.16-28", &value("192.0.2.1"), Some(DAY)).await;
    let mut watching = Watching::start(fixture.store());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    assert_eq!(watching.ips(), [("10.5.0.16-28", "192.0.2.1")]);
    watching.until_health("connected", |health| health.connected).await;

    fixture.put("10.5.0.32-28", &value("192.0.2.2"), Some(DAY)).await;
    watching.until("a new lease", |w| w.world.len() == 2).await;
    fixture.put("10.5.0.16-28", &value("192.0.2.7"), Some(DAY)).await;
    watching.until("new attributes", |w| w.ips()[0] == ("10.5.0.16-28", "192.0.2.7")).await;
    fixture.delete("10.5.0.32-28").await;
    watching.until("a removal", |w| w.world.len() == 1).await;
    assert_eq!(watching.snapshots, 1);

    let mut late = Watching::start(fixture.store());
    late.until("the late watcher's snapshot", |w| w.snapshots == 1).await;
    assert_eq!(late.ips(), [("10.5.0.16-28", "192.0.2.7")]);
}

pub(super) async fn watch_sees_a_lease_expire(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    let mut watching = Watching::start(store.clone());
    let mut request = want(&config, "192.0.2.1", None);
    request.ttl = Duration::from_secs(3);
    acquire(&store, &request).await;
    watching.until("the lease", |w| w.world.len() == 1).await;
    watching.until("its end", |w| w.world.is_empty()).await;
    assert_eq!(watching.snapshots, 1);
}

pub(super) async fn watch_survives_malformed_entries(fixture: &impl Fixture) {
    fixture.put("10.5.0.16-28", &value("192.0.2.1"), Some(DAY)).await;
    fixture.put("no-lease", "whatever", None).await;
    let mut watching = Watching::start(fixture.store());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    assert_eq!(watching.ips(), [("10.5.0.16-28", "192.0.2.1")]);
    assert_eq!(watching.malformed, BTreeSet::from(["no-lease".to_owned()]));

    fixture.put("10.5.0.17-28", &value("192.0.2.2"), Some(DAY)).await;
    fixture.put("10.5.0.16-28", "[]", Some(DAY)).await;
    fixture.put("10.5.0.48-28", &value("192.0.2.3"), Some(DAY)).await;
    watching.until("the entry after the malformed ones", |w| w.world.len() == 2).await;
    assert_eq!(watching.ips(), [("10.5.0.16-28", "192.0.2.1"), ("10.5.0.48-28", "192.0.2.3")]);
    watching.until("both malformed ones", |w| w.malformed.len() == 3).await;
    fixture.delete("no-lease").await;
    fixture.delete("10.5.0.16-28").await;
    watching.until("their removal", |w| w.malformed.len() == 1 && w.world.len() == 1).await;
    assert_eq!(watching.snapshots, 1);

    // Nobody is given a subnet that something hangs on, readable or not.
    fixture.put("10.5.0.64-28", "[]", None).await;
    let got = acquire(&fixture.store(), &want(&small_pool(), "192.0.2.9", Some("10.5.0.64-28"))).await;
    assert_ne!(got.lease.key.to_string(), "10.5.0.64-28");
}

pub(super) async fn watch_ends_with_its_receiver(fixture: &impl Fixture) {
    let mut watching = Watching::start(fixture.store());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    watching.updates.close();
    let ended = timeout(PATIENCE, &mut watching.task).await;
    ended.expect("the watch outlived its receiver").expect("no panic");
}

pub(super) async fn watch_tells_a_removal_by_hand_from_an_expiry(fixture: &impl Fixture) {
    fixture.put("10.5.0.16-28", &value("192.0.2.1"), Some(DAY)).await;
    fixture.put("10.5.0.32-28", &value("192.0.2.2"), Some(Duration::from_secs(4))).await;
    fixture.put("10.5.0.48-28", &value("192.0.2.3"), None).await;
    let mut watching = Watching::start(fixture.store());
    watching.until("the snapshot", |w| w.world.len() == 3).await;
    fixture.delete("10.5.0.16-28").await;
    fixture.delete("10.5.0.48-28").await;
    watching.until("all gone", |w| w.world.is_empty()).await;
    watching.departed.sort_by(|a, b| a.0.cmp(&b.0));
    let expected = [
        ("10.5.0.16-28", Departure::ByHand),
        ("10.5.0.32-28", Departure::Expired),
        ("10.5.0.48-28", Departure::ByHand),
    ];
    assert_eq!(watching.departed, expected.map(|(key, how)| (key.to_owned(), how)));
    assert_eq!(watching.snapshots, 1);
}

pub(super) async fn watch_tells_of_the_configuration(fixture: &impl Fixture) {
    let mut watching = Watching::start(fixture.store());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    assert_eq!(watching.config, Some(StoredConfig::Missing), "said before the snapshot");
    for (json, valid) in [
        (r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#, true),
        (r#"{"Network":"10.5.0.0/16","SubnetLen":31,"Backend":{"Type":"host-gw"}}"#, false),
        (r#"{"Network":"10.6.0.0/16","Backend":{"Type":"host-gw"}}"#, true),
    ] {
        let expected = match NetworkConfig::parse(json) {
            Ok(config) => StoredConfig::Valid(config),
            Err(error) => StoredConfig::Invalid(error),
        };
        assert_eq!(matches!(expected, StoredConfig::Valid(_)), valid, "{json}");
        fixture.put_config(json).await;
        watching.until(json, |w| w.config.as_ref() == Some(&expected)).await;
    }
    assert_eq!(watching.snapshots, 1);
    let mut late = Watching::start(fixture.store());
    late.until("the late watcher's snapshot", |w| w.snapshots == 1).await;
    assert_eq!(late.config, watching.config);
}

pub(super) async fn a_subnet_freed_lately_is_taken_last(fixture: &impl Fixture) {
    let (store, config) = (fixture.store(), small_pool());
    // A first node, so that a file is one that this version looks after.
    acquire(&store, &want(&config, "192.0.2.200", Some("10.5.0.240-28"))).await;
    fixture.put("10.5.0.32-28", &value("192.0.2.201"), Some(DAY)).await;
    for _ in 0..20 {
        fixture.put("10.5.0.224-28", &value("192.0.2.202"), Some(DAY)).await;
    }
    fixture.delete("10.5.0.32-28").await;
    for n in 1..=12 {
        let got = acquire(&store, &want(&config, &format!("192.0.2.{n}"), None)).await;
        assert_ne!(got.lease.key.to_string(), "10.5.0.32-28", "while others were free");
    }
    let last = acquire(&store, &want(&config, "192.0.2.13", None)).await;
    assert_eq!(last.lease.key.to_string(), "10.5.0.32-28", "before there is none");
    // Whoever had it before gets it back, however lately that was.
    fixture.delete("10.5.0.32-28").await;
    fixture.delete("10.5.0.224-28").await;
    let back = acquire(&store, &want(&config, "192.0.2.14", Some("10.5.0.32-28"))).await;
    assert_eq!(back.lease.key.to_string(), "10.5.0.32-28");
}
