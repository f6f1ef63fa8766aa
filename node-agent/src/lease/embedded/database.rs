//! The file: its schema, and the few statements there are. SQLite's types end here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, TransactionBehavior, params};
use weft_shared::lease::{LeaseAttrs, LeaseKey};

use super::super::backoff::random;
use super::super::selection::{Entry, Stored};
use super::super::{Malformed, StoreError};

/// "weft", so that a database of something else is not taken for ours (`PRAGMA application_id`).
const APPLICATION: i64 = 0x7765_6674;
/// `PRAGMA user_version`.
const SCHEMA: i64 = 2;
/// How long a subnet that was freed is leased last.
const FREED_LATELY: Duration = Duration::from_secs(86_400);
/// For another agent to finish its transaction.
const BUSY: Duration = Duration::from_secs(4);

pub(super) struct Database {
    path: PathBuf,
    connection: Connection,
}

/// Everything in the file at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct World {
    /// Drawn when the file was made: another file has another.
    pub(super) identity: i64,
    pub(super) revision: u64,
    pub(super) entries: Vec<Entry>,
    pub(super) malformed: Vec<Malformed>,
    /// When each lease ends; a reservation does not.
    pub(super) ends: BTreeMap<LeaseKey, SystemTime>,
    pub(super) config: Option<String>,
    pub(super) next_expiry: Option<SystemTime>,
}

pub(super) fn location(path: &Path) -> String {
    format!("embedded store {}", path.display())
}

impl Database {
    /// Opens the file, making it and its directory if need be.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let unavailable = |reason: String| StoreError::Unavailable { location: location(path), reason };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            std::fs::create_dir_all(dir).map_err(|e| unavailable(format!("{}: {e}", dir.display())))?;
        }
        let connection = Connection::open(path).map_err(|e| error(path, &e))?;
        connection.busy_timeout(BUSY).map_err(|e| error(path, &e))?;
        let mut database = Self { path: path.to_owned(), connection };
        if database.versions()? == (0, 0) {
            database.create()?;
        }
        match database.versions()? {
            (APPLICATION, SCHEMA) => Ok(database),
            (APPLICATION, other) => Err(database.refused(format!(
                "user_version = {other}: expected {SCHEMA}; another version of weft made this file"
            ))),
            (other, _) => Err(database.refused(format!(
                "application_id = {other}: expected {APPLICATION}; this database belongs to another program"
            ))),
        }
    }

    /// Runs `work` in a transaction that holds the file's write lock from the start.
    pub(super) fn transaction<T>(
        self,
        work: impl FnOnce(&Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.batch("BEGIN IMMEDIATE")?;
        let result = work(&self);
        // Dropping the connection rolls back whatever was not committed.
        if result.is_ok() {
            self.batch("COMMIT")?;
        }
        result
    }

    pub(super) fn config(&self) -> Result<Option<String>, StoreError> {
        self.sql(|c| c.query_row("SELECT json FROM config WHERE id = 1", [], |row| row.get(0)).optional())
    }

    pub(super) fn put_config(&self, json: &str) -> Result<(), StoreError> {
        self.sql(|c| c.execute("INSERT OR REPLACE INTO config (id, json) VALUES (1, ?1)", [json]))?;
        self.next_revision().map(drop)
    }

    pub(super) fn world(&self) -> Result<World, StoreError> {
        self.batch("BEGIN")?;
        let (identity, revision) = self.sql(|c| {
            c.query_row("SELECT identity, revision FROM store", [], |row| {
                Ok((row.get(0)?, revision(row, 1)?))
            })
        })?;
        let rows = self.rows("SELECT * FROM leases ORDER BY key", [])?;
        let config = self.config()?;
        self.batch("COMMIT")?;
        let mut world = World {
            identity,
            revision,
            entries: Vec::new(),
            malformed: Vec::new(),
            ends: BTreeMap::new(),
            config,
            next_expiry: None,
        };
        for row in rows {
            let end = row.expires;
            world.next_expiry = match (world.next_expiry, row.expires) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            let (entry, malformed) = row.parse();
            world.ends.extend(entry.as_ref().filter(|e| e.well_spelt).map(|e| e.key).zip(end));
            world.entries.extend(entry);
            world.malformed.extend(malformed);
        }
        Ok(world)
    }

    pub(super) fn entries(&self) -> Result<Vec<Entry>, StoreError> {
        let rows = self.rows("SELECT * FROM leases ORDER BY key", [])?;
        Ok(rows.into_iter().filter_map(|row| row.parse().0).collect())
    }

    pub(super) fn entry(&self, key: &LeaseKey) -> Result<Option<Entry>, StoreError> {
        let rows = self.rows("SELECT * FROM leases WHERE key = ?1", [key.to_string()])?;
        Ok(rows.into_iter().find_map(|row| row.parse().0))
    }

    /// Writes a lease; returns (create revision, mod revision).
    pub(super) fn put(
        &self,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        expires: Option<SystemTime>,
    ) -> Result<(u64, u64), StoreError> {
        let value = serde_json::to_string(attrs).unwrap_or_else(|_| unreachable!("plain data"));
        let mod_revision = self.next_revision()?;
        let created = self.sql(|c| {
            c.query_row(
                "INSERT INTO leases (key, value, create_revision, mod_revision, expires_at)
                 VALUES (?1, ?2, ?3, ?3, ?4)
                 ON CONFLICT (key) DO UPDATE SET value = ?2, mod_revision = ?3, expires_at = ?4
                 RETURNING create_revision",
                params![key.to_string(), value, mod_revision as i64, expires.map(to_ms)],
                |row| revision(row, 0),
            )
        })?;
        Ok((created, mod_revision))
    }

    pub(super) fn delete(&self, key: &LeaseKey) -> Result<(), StoreError> {
        self.sql(|c| c.execute("DELETE FROM leases WHERE key = ?1", [key.to_string()]))?;
        self.next_revision().map(drop)
    }

    /// Removes what is past its time, notes of what was freed as well; whoever looks does it.
    pub(super) fn expire(&self, now: SystemTime) -> Result<(), StoreError> {
        let lately = now.checked_sub(FREED_LATELY).map_or(0, to_ms) / 1000;
        self.sql(|c| c.execute("DELETE FROM freed WHERE at < ?1", [lately]))?;
        match self.sql(|c| c.execute("DELETE FROM leases WHERE expires_at <= ?1", [to_ms(now)]))? {
            0 => Ok(()),
            _ => self.next_revision().map(drop),
        }
    }

    /// Subnets that were leased within the last day, some of which may be leased again.
    pub(super) fn freed_lately(&self) -> Result<Vec<LeaseKey>, StoreError> {
        let keys: Vec<String> = self.sql(|c| {
            c.prepare("SELECT key FROM freed ORDER BY key")?.query_map([], |row| row.get(0))?.collect()
        })?;
        Ok(keys.iter().filter_map(|key| key.parse().ok()).collect())
    }

    fn next_revision(&self) -> Result<u64, StoreError> {
        self.sql(|c| {
            c.query_row("UPDATE store SET revision = revision + 1 RETURNING revision", [], |row| {
                revision(row, 0)
            })
        })
    }

    fn rows(&self, sql: &str, params: impl rusqlite::Params) -> Result<Vec<LeaseRow>, StoreError> {
        self.sql(|c| c.prepare(sql)?.query_map(params, LeaseRow::read)?.collect())
    }

    fn versions(&self) -> Result<(i64, i64), StoreError> {
        let pragma = |name: &str| self.sql(|c| c.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0)));
        Ok((pragma("application_id")?, pragma("user_version")?))
    }

    /// Two agents that start together may both try: the second finds it done.
    fn create(&mut self) -> Result<(), StoreError> {
        let path = self.path.clone();
        let create = |connection: &mut Connection| -> rusqlite::Result<()> {
            connection.pragma_update(None, "journal_mode", "DELETE")?;
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let tables: i64 =
                transaction.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
            if tables == 0 {
                transaction.execute_batch(
                    "CREATE TABLE store (identity INTEGER NOT NULL, revision INTEGER NOT NULL);
                     CREATE TABLE config (id INTEGER PRIMARY KEY CHECK (id = 1), json TEXT NOT NULL);
                     CREATE TABLE leases (
                         key TEXT PRIMARY KEY,
                         value TEXT NOT NULL,
                         create_revision INTEGER NOT NULL DEFAULT 0,
                         mod_revision INTEGER NOT NULL DEFAULT 0,
                         expires_at INTEGER -- Unix milliseconds; NULL reserves the subnet for ever
                     );
                     CREATE TABLE freed (key TEXT PRIMARY KEY, at INTEGER NOT NULL); -- Unix seconds
                     CREATE TRIGGER freed AFTER DELETE ON leases BEGIN
                         INSERT OR REPLACE INTO freed VALUES (OLD.key, CAST(strftime('%s', 'now') AS INTEGER));
                     END;",
                )?;
                transaction
                    .execute("INSERT INTO store (identity, revision) VALUES (?1, 1)", [random() as i64])?;
                transaction.pragma_update(None, "application_id", APPLICATION)?;
                transaction.pragma_update(None, "user_version", SCHEMA)?;
            }
            transaction.commit()
        };
        create(&mut self.connection).map_err(|e| error(&path, &e))
    }

    fn batch(&self, sql: &str) -> Result<(), StoreError> {
        self.sql(|c| c.execute_batch(sql))
    }

    fn sql<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        work(&self.connection).map_err(|e| error(&self.path, &e))
    }

    fn refused(&self, reason: String) -> StoreError {
        StoreError::Refused { location: location(&self.path), reason }
    }
}

struct LeaseRow {
    key: String,
    value: String,
    create_revision: u64,
    mod_revision: u64,
    expires: Option<SystemTime>,
}

impl LeaseRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let expires: Option<i64> = row.get("expires_at")?;
        Ok(Self {
            key: row.get("key")?,
            value: row.get("value")?,
            create_revision: revision(row, "create_revision")?,
            mod_revision: revision(row, "mod_revision")?,
            expires: expires.map(|ms| UNIX_EPOCH + Duration::from_millis(ms.try_into().unwrap_or(0))),
        })
    }

    fn parse(self) -> (Option<Entry>, Option<Malformed>) {
        let stored = Stored {
            name: &self.key,
            value: self.value.as_bytes(),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            lease_id: 0,
            reserved: self.expires.is_none(),
        };
        stored.parse()
    }
}

/// SQLite's integers are signed; ours never are negative.
fn revision(row: &Row<'_>, column: impl rusqlite::RowIndex) -> rusqlite::Result<u64> {
    Ok(row.get::<_, i64>(column)?.try_into().unwrap_or(0))
}

fn to_ms(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis().try_into().unwrap_or(i64::MAX))
}

/// Busy, full or unreadable heals by waiting; what is no database of ours does not.
fn error(path: &Path, error: &rusqlite::Error) -> StoreError {
    let location = location(path);
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => StoreError::Refused {
            location,
            reason: "it is not an SQLite database: expected a lease store of weft, or no file at all".into(),
        },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Unavailable {
            location,
            reason: format!("locked by another process for {} s", BUSY.as_secs()),
        },
        _ => StoreError::Unavailable { location, reason: error.to_string() },
    }
}
