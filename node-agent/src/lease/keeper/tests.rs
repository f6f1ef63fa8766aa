use std::time::Instant;

use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;
use crate::lease::contract::{DAY, PATIENCE, config, small_pool, value, want};
use crate::lease::{Departure, EmbeddedStore, StoreHealth};

/// A keeper over a store of its own, with the watch forwarded to it as the agent does.
struct Node {
    dir: Arc<TempDir>,
    handle: KeeperHandle,
    /// What the keeper was shown last.
    shown: watch::Receiver<Option<LeaseUpdate>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Node {
    fn store() -> (TempDir, EmbeddedStore) {
        let dir = tempfile::tempdir().expect("directory");
        let store = EmbeddedStore::new(dir.path().join("leases.db"));
        (dir, store)
    }

    fn start(ttl: Duration, margin: Duration) -> Self {
        let (dir, store) = Self::store();
        let request = AcquireRequest { ttl, ..want(&small_pool(), "192.0.2.1", None) };
        Self::start_on(dir, store, request, margin)
    }

    fn start_on(
        dir: impl Into<Arc<TempDir>>,
        store: EmbeddedStore,
        request: AcquireRequest,
        margin: Duration,
    ) -> Self {
        let dir = dir.into();
        let (keeper, handle) = Keeper::new(Arc::new(store.clone()), request, margin);
        let (sender, mut updates) = tokio::sync::mpsc::channel(8);
        let (health, _) = watch::channel(StoreHealth::default());
        let (watched, observer) = (store.clone(), handle.clone());
        let (show, shown) = watch::channel(None);
        let tasks = vec![
            tokio::spawn(async move { match keeper.run().await {} }),
            tokio::spawn(async move { watched.watch(sender, health).await }),
            tokio::spawn(async move {
                while let Some(update) = updates.recv().await {
                    observer.observe(&update);
                    show.send_replace(Some(update));
                }
            }),
        ];
        Self { dir, handle, shown, tasks }
    }

    async fn until(&mut self, what: &str, done: impl FnMut(&LeaseState) -> bool) -> LeaseState {
        let waited = timeout(PATIENCE, self.handle.state.wait_for(done)).await;
        waited.unwrap_or_else(|_| panic!("never {what}")).expect("keeper runs").clone()
    }

    async fn until_held(&mut self) -> OwnedLease {
        self.until("held", |state| state.held().is_some()).await.held().cloned().expect("held")
    }

    /// Held, and the watch has told of it: what happens to the key from now on will be seen.
    async fn until_shown(&mut self) -> OwnedLease {
        let held = self.until_held().await;
        let told = |update: &Option<LeaseUpdate>| match update {
            Some(LeaseUpdate::Snapshot { leases, .. }) => leases.contains(&held.lease),
            Some(LeaseUpdate::Upsert(lease)) => *lease == held.lease,
            _ => false,
        };
        timeout(PATIENCE, self.shown.wait_for(told)).await.expect("shown").expect("watch runs");
        self.until_held().await
    }

    fn sql(&self, sql: &str, key: &LeaseKey, value: &str) {
        let connection = rusqlite::Connection::open(self.dir.path().join("leases.db")).expect("open");
        connection.busy_timeout(PATIENCE).expect("timeout");
        assert_eq!(connection.execute(sql, [&key.to_string(), value]).expect(sql), 1);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

#[tokio::test]
async fn a_short_lease_is_renewed_over_and_over() {
    let mut node = Node::start(Duration::from_secs(3), Duration::from_secs(3600));
    let first = node.until_held().await;
    let beyond = first.expires.expect("expires") + Duration::from_secs(3);
    let mut renewals = 0;
    let mut last = first.clone();
    while last.expires.expect("expires") < beyond {
        let state =
            node.until("renewed", |s| s.held().is_none_or(|h| h.mod_revision > last.mod_revision)).await;
        last = state.held().cloned().expect("never lost");
        assert_eq!(last.lease, first.lease);
        renewals += 1;
    }
    // A margin longer than the lease means a third of it: each renewal gains two thirds, never all the time at once.
    assert!((2..10).contains(&renewals), "{renewals} renewals");
}

#[tokio::test]
async fn it_renews_as_long_before_the_end_as_the_margin_says() {
    // By the margin after a moment; without it by a third, after more than anybody waits here.
    let ttl = PATIENCE * 3;
    let mut node = Node::start(ttl, ttl - Duration::from_millis(300));
    let first = node.until_held().await;
    node.until("renewed", |s| s.held().is_some_and(|h| h.mod_revision > first.mod_revision)).await;
}

#[tokio::test]
async fn a_removed_key_is_made_again_at_once() {
    let mut node = Node::start(DAY, Duration::from_secs(60));
    let first = node.until_shown().await;
    node.sql("DELETE FROM leases WHERE key = ?1 AND ?2 = ''", &first.lease.key, "");
    let again = node
        .until("taken again", |s| s.held().is_some_and(|h| h.mod_revision > first.mod_revision))
        .await
        .held()
        .cloned()
        .expect("held");
    assert_eq!(again.lease.key, first.lease.key);
    assert!(again.lease.create_revision > first.lease.create_revision);
}

#[tokio::test]
async fn a_subnet_taken_by_another_is_left_to_it() {
    let mut node = Node::start(DAY, Duration::from_secs(60));
    let first = node.until_shown().await;
    // Watch channels keep the latest only, so the passing state is recorded as it goes by.
    let mut states = node.handle.state.clone();
    states.mark_unchanged();
    let recorder = tokio::spawn(async move {
        let mut seen = Vec::new();
        while states.changed().await.is_ok() {
            let state = states.borrow_and_update().clone();
            let held = state.held().is_some();
            seen.push(state);
            if held {
                break;
            }
        }
        seen
    });
    node.sql("UPDATE leases SET value = ?2 WHERE key = ?1", &first.lease.key, &value("192.0.2.9"));
    let seen = timeout(PATIENCE, recorder).await.expect("in time").expect("no panic");
    let lost = LeaseState::Lost { key: first.lease.key, owner: Some("192.0.2.9".into()), problem: None };
    assert_eq!(seen.first(), Some(&lost));
    let new = seen.last().and_then(LeaseState::held).expect("a new lease");
    assert!(!new.lease.key.overlaps(&first.lease.key));
}

fn published(ip: &str) -> LeaseAttrs {
    serde_json::from_str(&value(ip)).expect(ip)
}

#[tokio::test]
async fn a_new_public_ip_is_written_at_once_under_the_same_subnet() {
    let mut node = Node::start(DAY, Duration::from_secs(60));
    let first = node.until_shown().await;
    node.handle.publish(published("192.0.2.5"));
    let state =
        node.until("rewritten", |s| s.held().is_none_or(|h| h.lease.attrs.public_ip.octets()[3] == 5)).await;
    let held = state.held().cloned().expect("never lost");
    assert_eq!(held.lease, Lease { attrs: published("192.0.2.5"), ..first.lease.clone() });
    // Somebody has written our lease since we saw it last: it is ours by the address before.
    let mut foreign = published("192.0.2.5");
    foreign.backend_data = Some(serde_json::json!({"VNI": 9}));
    let foreign = serde_json::to_string(&foreign).expect("json");
    node.sql(
        "UPDATE leases SET value = ?2, mod_revision = mod_revision + 1 WHERE key = ?1",
        &first.lease.key,
        &foreign,
    );
    node.handle.publish(published("192.0.2.6"));
    let state = node
        .until("rewritten again", |s| s.held().is_none_or(|h| h.lease.attrs.public_ip.octets()[3] == 6))
        .await;
    assert_eq!(state.held().map(|held| held.lease.key), Some(first.lease.key));
}

#[tokio::test]
async fn a_new_public_ip_overwrites_no_other_owner() {
    let mut node = Node::start(DAY, Duration::from_secs(60));
    let first = node.until_shown().await;
    node.sql("UPDATE leases SET value = ?2 WHERE key = ?1", &first.lease.key, &value("192.0.2.9"));
    node.handle.publish(published("192.0.2.5"));
    let state =
        node.until("another subnet", |s| s.held().is_some_and(|h| h.lease.key != first.lease.key)).await;
    assert_eq!(state.held().map(|h| h.lease.attrs.public_ip), Some(published("192.0.2.5").public_ip));
    let connection = rusqlite::Connection::open(node.dir.path().join("leases.db")).expect("open");
    let theirs: String = connection
        .query_row("SELECT value FROM leases WHERE key = ?1", [first.lease.key.to_string()], |row| row.get(0))
        .expect("their lease");
    assert!(theirs.contains("192.0.2.9"), "{theirs}");
}

#[tokio::test]
async fn what_is_recalled_stands_until_the_store_confirms_it() {
    let (dir, store) = Node::store();
    let file = dir.path().join("leases.db");
    std::fs::create_dir(&file).expect("a directory in its place");
    let own = OwnSubnet {
        key: "10.5.0.48-28".parse().expect("key"),
        public_ip: "192.0.2.1".parse().expect("ip"),
        expires: None,
    };
    let request = want(&small_pool(), "192.0.2.1", Some("10.5.0.48-28"));
    let (keeper, handle) = Keeper::new(Arc::new(store), request, Duration::from_secs(60));
    let keeper = keeper.recalling(own, SystemTime::UNIX_EPOCH);
    let mut state = handle.state.clone();
    let task = tokio::spawn(async move { match keeper.run().await {} });
    let waited = timeout(PATIENCE, state.wait_for(|s| s.problem().is_some())).await;
    let recalled = waited.expect("in trouble").expect("runs").clone();
    assert_eq!((recalled.name(), recalled.key()), ("recalled", Some(own.key)));
    std::fs::remove_dir(&file).expect("the store is back");
    let waited = timeout(PATIENCE, state.wait_for(|s| s.held().is_some())).await;
    assert_eq!(waited.expect("held").expect("runs").key(), Some(own.key));
    task.abort();
}

#[tokio::test]
async fn no_subnet_is_taken_of_another_network_and_the_range_of_the_moment_counts() {
    let (dir, store) = Node::store();
    store
        .put_config(r#"{"Network":"10.6.0.0/24","SubnetLen":28,"Backend":{"Type":"host-gw"}}"#)
        .await
        .expect("put");
    let mut node =
        Node::start_on(dir, store.clone(), want(&small_pool(), "192.0.2.1", None), Duration::from_secs(60));
    let state = node.until("refused", |state| state.problem().is_some()).await;
    let problem = state.problem().expect("problem");
    assert!(
        state.held().is_none() && problem.contains("Network = 10.6.0.0/24, in force: 10.5.0.0/24"),
        "{problem}"
    );
    let narrow = r#"{"Network":"10.5.0.0/24","SubnetLen":28,"SubnetMin":"10.5.0.192","SubnetMax":"10.5.0.192","Backend":{"Type":"host-gw"}}"#;
    store.put_config(narrow).await.expect("put");
    assert_eq!(node.until_held().await.lease.key.to_string(), "10.5.0.192-28");
}

#[tokio::test]
async fn two_nodes_with_one_public_ip_take_turns_ever_more_slowly() {
    let (dir, store) = Node::store();
    let dir = Arc::new(dir);
    let node = |mac: &str| {
        let mut request = want(&small_pool(), "192.0.2.1", None);
        request.attrs.backend_data = Some(serde_json::json!({"VtepMAC": mac}));
        Node::start_on(dir.clone(), store.clone(), request, Duration::from_secs(60))
    };
    let mut a = node("06:00:00:00:00:0a");
    let first = a.until_shown().await;
    let start = Instant::now();
    let mut b = node("06:00:00:00:00:0b");
    let mut revision = b.until_held().await.mod_revision;
    // a, b, a and b again: they wait half a second or more, and twice that the second time.
    for turn in 0..4 {
        let node = if turn % 2 == 0 { &mut a } else { &mut b };
        let back = node.until("taken back", |s| s.held().is_some_and(|h| h.mod_revision > revision)).await;
        let problem = back.problem().expect("it is said what is wrong");
        assert!(problem.starts_with("another node publishes this node's public IP 192.0.2.1 "), "{problem}");
        let held = back.held().expect("held");
        assert_eq!(held.lease.key, first.lease.key);
        assert_eq!(held.mod_revision, revision + 1, "nobody wrote in between");
        revision = held.mod_revision;
    }
    assert!(start.elapsed() >= Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(b.handle.state.borrow().problem().is_some() && a.handle.state.borrow().problem().is_some());
}

#[tokio::test]
async fn what_is_wrong_is_published_until_it_is_right() {
    let (dir, store) = Node::store();
    let tiny = config(r#"{"Network":"10.5.0.0/28","SubnetLen":30,"Backend":{"Type":"host-gw"}}"#);
    let mut others = Vec::new();
    for n in 2..=4 {
        others.push(store.acquire(&want(&tiny, &format!("192.0.2.{n}"), None)).await.expect("room"));
    }
    let mut node = Node::start_on(dir, store, want(&tiny, "192.0.2.1", None), Duration::from_secs(60));
    let state = node.until("exhausted", |state| state.problem().is_some()).await;
    assert_eq!(state.name(), "acquiring");
    assert!(state.problem().expect("problem").contains("no free subnet between 10.5.0.4 and 10.5.0.12"));
    node.sql("DELETE FROM leases WHERE key = ?1 AND ?2 = ''", &others[1].lease.key, "");
    assert_eq!(node.until_held().await.lease.key, others[1].lease.key);
    assert_eq!(node.handle.state.borrow().problem(), None);
}

#[tokio::test]
async fn a_store_that_goes_away_costs_the_lease_only_when_it_has_expired() {
    let mut node = Node::start(Duration::from_secs(5), Duration::from_millis(4500));
    let first = node.until_held().await;
    let (file, aside) = (node.dir.path().join("leases.db"), node.dir.path().join("aside"));
    std::fs::rename(&file, &aside).expect("aside");
    std::fs::create_dir(&file).expect("a directory in its place");
    let state = node.until("in trouble", |state| state.problem().is_some()).await;
    assert_eq!(state.held().map(|held| held.lease.key), Some(first.lease.key), "it still runs");
    let state = node.until("lost", |state| state.held().is_none()).await;
    match &state {
        LeaseState::Lost { key, owner: None, problem: Some(problem) } if *key == first.lease.key => {
            assert!(problem.contains("embedded store"), "{problem}");
        }
        other => panic!("{other:?}"),
    }
    assert!(SystemTime::now() >= first.expires.expect("expires"));
    std::fs::remove_dir(&file).expect("remove");
    std::fs::rename(&aside, &file).expect("back");
    assert_eq!(node.until_held().await.lease.key, first.lease.key);
}

#[tokio::test]
async fn the_configuration_is_waited_for() {
    let (_dir, store) = Node::store();
    let (problem, mut problems) = watch::channel(Some(String::new()));
    let waiting = tokio::spawn({
        let store = store.clone();
        async move {
            wait_for_config(&store, |error| {
                problem.send_replace(error.map(ToString::to_string));
            })
            .await
        }
    });
    let told = |p: &Option<String>| p.as_ref().is_some_and(|p| p.contains("no network configuration"));
    timeout(PATIENCE, problems.wait_for(told)).await.expect("told").expect("waits");
    let json = r#"{"Network":"10.5.0.0/24","SubnetLen":28,"Backend":{"Type":"host-gw"}}"#;
    store.put_config(json).await.expect("good");
    let found = timeout(PATIENCE, waiting).await.expect("found").expect("no panic");
    assert_eq!(found, small_pool());
    assert_eq!(*problems.borrow(), None);
}

#[test]
fn what_an_update_says_of_our_key() {
    let lease = |key: &str, ip: &str| Lease {
        key: key.parse().expect(key),
        attrs: serde_json::from_str(&value(ip)).expect(ip),
        create_revision: 7,
    };
    let own = lease("10.5.0.16-28", "192.0.2.1");
    let other = lease("10.5.0.32-28", "192.0.2.2");
    let snapshot =
        |leases: &[Lease]| LeaseUpdate::Snapshot { leases: leases.to_vec(), malformed: Vec::new() };
    let mut rewritten = own.clone();
    rewritten.attrs.backend_data = Some(serde_json::json!({"VNI": 1}));
    for (update, says) in [
        (LeaseUpdate::Upsert(own.clone()), Some(OwnKey::Ours)),
        (LeaseUpdate::Upsert(other.clone()), None),
        (LeaseUpdate::Remove { key: other.key, how: Departure::ByHand }, None),
        (snapshot(&[own.clone(), other.clone()]), Some(OwnKey::Ours)),
        (LeaseUpdate::Upsert(rewritten.clone()), Some(OwnKey::Rewritten)),
        (snapshot(&[other.clone(), rewritten]), Some(OwnKey::Rewritten)),
        (LeaseUpdate::Upsert(lease("10.5.0.16-28", "192.0.2.9")), Some(OwnKey::Lost)),
        (LeaseUpdate::Remove { key: own.key, how: Departure::Expired }, Some(OwnKey::Lost)),
        (snapshot(&[other]), Some(OwnKey::Lost)),
    ] {
        assert_eq!(own_key(&own, &own.attrs, &update), says, "{update:?}");
    }
}
