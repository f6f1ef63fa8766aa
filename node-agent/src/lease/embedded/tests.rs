use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::lease::contract::{self, Fixture, Watching, small_pool, value, want};

contract::contract!(Temporary);

/// A store in a directory of its own; the test changes it through a plain SQLite connection.
struct Temporary {
    dir: TempDir,
}

impl Temporary {
    fn path(&self) -> PathBuf {
        self.dir.path().join("leases.db")
    }

    fn sql(&self, sql: &str, params: impl rusqlite::Params) -> usize {
        Database::open(&self.path()).expect("schema");
        let connection = rusqlite::Connection::open(self.path()).expect("open");
        connection.busy_timeout(contract::PATIENCE).expect("timeout");
        connection.execute(sql, params).expect(sql)
    }
}

impl Fixture for Temporary {
    type Store = EmbeddedStore;

    async fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("directory") }
    }

    /// No sweep: what is noticed is noticed by inotify.
    fn store(&self) -> EmbeddedStore {
        EmbeddedStore::new(self.path()).with_sweep(Duration::from_secs(3600))
    }

    async fn put_config(&self, json: &str) {
        self.sql("INSERT OR REPLACE INTO config (id, json) VALUES (1, ?1)", [json]);
    }

    async fn put(&self, key: &str, value: &str, ttl: Option<Duration>) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        let expires = ttl.map(|ttl| (now + ttl).as_millis() as i64);
        self.sql(
            "INSERT INTO leases (key, value, expires_at) VALUES (?1, ?2, ?3)
             ON CONFLICT (key) DO UPDATE SET value = ?2, expires_at = ?3",
            rusqlite::params![key, value, expires],
        );
    }

    async fn delete(&self, key: &str) {
        assert_eq!(self.sql("DELETE FROM leases WHERE key = ?1", [key]), 1);
    }

    async fn get(&self, key: &str) -> Option<(String, bool)> {
        let connection = rusqlite::Connection::open(self.path()).expect("open");
        let row = connection.query_row("SELECT value, expires_at FROM leases WHERE key = ?1", [key], |row| {
            Ok((row.get(0)?, row.get::<_, Option<i64>>(1)?.is_some()))
        });
        rusqlite::OptionalExtension::optional(row).expect("query")
    }
}

#[tokio::test]
async fn a_change_is_noticed_without_a_sweep() {
    let fixture = Temporary::new().await;
    let mut watching = Watching::start(fixture.store());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    let network = contract::config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#);
    // Each before the next: one notice must not depend on another.
    for n in 1..=20 {
        let other = EmbeddedStore::new(fixture.path());
        let held = contract::acquire(&other, &want(&network, &format!("192.0.2.{n}"), None)).await;
        let key = held.lease.key.to_string();
        watching.until("the lease", |w| w.world.contains_key(&key)).await;
    }
    assert_eq!(watching.snapshots, 1, "no sweep");
}

#[tokio::test]
async fn the_sweep_stands_behind_inotify() {
    let fixture = Temporary::new().await;
    let mut watching = Watching::start(fixture.store().with_sweep(Duration::from_millis(200)));
    watching.until("the third snapshot", |w| w.snapshots == 3).await;
    assert_eq!(watching.health.borrow().relists, 0, "nothing was wrong");
}

#[tokio::test]
async fn a_file_that_takes_the_place_of_another_is_followed() {
    let fixture = Temporary::new().await;
    let mut watching = Watching::start(fixture.store());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    let other = Temporary::new().await;
    other.put("10.5.0.16-28", &value("192.0.2.1"), None).await;
    std::fs::rename(other.path(), fixture.path()).expect("rename");
    watching.until("the other file", |w| w.world.len() == 1).await;
    assert_eq!(watching.snapshots, 2, "another file is another history");
    watching.until_health("relisted", |health| health.relists == 1).await;
    // The bell hangs on the new file: without a sweep, nothing else tells.
    fixture.put("10.5.0.32-28", &value("192.0.2.2"), None).await;
    watching.until("a change of it", |w| w.world.len() == 2).await;
}

#[tokio::test]
async fn a_file_that_is_no_store_is_refused_and_left_alone() {
    let fixture = Temporary::new().await;
    let text = "my dear diary, this is certainly no database but longer than a header of one hundred bytes, is it not?";
    std::fs::write(fixture.path(), text).expect("write");
    let refusal = async |store: &EmbeddedStore| match store.network_config().await {
        Err(StoreError::Refused { reason, .. }) => reason,
        other => panic!("expected a refusal, got {other:?}"),
    };
    let reason = refusal(&fixture.store()).await;
    assert!(reason.contains("not an SQLite database: expected a lease store"), "{reason}");
    assert_eq!(std::fs::read_to_string(fixture.path()).expect("read"), text);

    let pragma = |path: &Path, sql: &str| {
        rusqlite::Connection::open(path).expect("open").execute_batch(sql).expect(sql);
    };
    std::fs::remove_file(fixture.path()).expect("remove");
    pragma(&fixture.path(), "PRAGMA application_id = 7; CREATE TABLE theirs (x)");
    let reason = refusal(&fixture.store()).await;
    assert!(reason.contains("application_id = 7: expected"), "{reason}");

    std::fs::remove_file(fixture.path()).expect("remove");
    fixture.put_config("{}").await;
    pragma(&fixture.path(), "PRAGMA user_version = 3");
    let reason = refusal(&fixture.store()).await;
    assert!(reason.contains("user_version = 3: expected 2"), "{reason}");
}

#[tokio::test]
async fn a_database_without_any_mark_that_holds_tables_is_not_ours() {
    let fixture = Temporary::new().await;
    rusqlite::Connection::open(fixture.path())
        .and_then(|c| c.execute_batch("CREATE TABLE theirs (x)"))
        .expect("their table");
    match fixture.store().network_config().await {
        Err(StoreError::Refused { reason, .. }) => assert!(reason.contains("another program"), "{reason}"),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn only_a_good_configuration_is_written() {
    let fixture = Temporary::new().await;
    let store = fixture.store();
    let error = store.put_config("{}").await.expect_err("no Network");
    assert!(error.to_string().contains("Network is missing"), "{error}");
    let json = r#"{"Network":"10.5.0.0/24","SubnetLen":28,"Backend":{"Type":"host-gw"}}"#;
    store.put_config(json).await.expect("good");
    assert_eq!(store.network_config().await, Ok(small_pool()));
}

#[tokio::test]
async fn a_missing_configuration_is_answered_with_the_option_that_writes_one() {
    let fixture = Temporary::new().await;
    let error = fixture.store().network_config().await.expect_err("no configuration");
    let path = fixture.path();
    assert_eq!(
        error.to_string(),
        format!(
            "no network configuration at {}; write one with: weftd --net-config FILE, where FILE holds {EXAMPLE}",
            path.display()
        )
    );
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_waited_for() {
    let fixture = Temporary::new().await;
    std::fs::create_dir(fixture.path()).expect("a directory in its place");
    let mut watching = Watching::start(fixture.store());
    watching.until_health("away", |health| health.problem.is_some()).await;
    std::fs::remove_dir(fixture.path()).expect("remove");
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    watching.until_health("connected", |health| health.connected && health.problem.is_none()).await;
}
