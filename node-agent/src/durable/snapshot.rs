//! The cluster as the store told it last, on disk: a node that starts while its store is away programs from this.
//!
//! Written only when something has changed, at most every ten seconds, at once on a clean stop. It is a memory, not a
//! source: nothing is ever removed from the kernel on its word, and the store's first answer replaces it. A file that
//! is not of this network, this store or this format is set aside by name.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weft_shared::lease::{Lease, LeaseKey};
use weft_shared::netconf::NetworkConfig;
use weft_shared::replace::{Survive, replace_file};

use super::Durable;

/// Grows when an older agent could misread the file.
const FORMAT: u32 = 1;

/// How often there is work at most.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Between two writes.
    pub write: Duration,
    /// Between two looks at what there is to write.
    pub look: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { write: Duration::from_secs(10), look: Duration::from_secs(1) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Which store: endpoints come and go, what is asked for there does not.
    pub store: String,
    pub network: NetworkConfig,
    pub own: Option<OwnSubnet>,
    /// The leases that were in use.
    pub peers: Vec<Lease>,
}

/// The subnet that this node had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnSubnet {
    pub key: LeaseKey,
    pub public_ip: Ipv4Addr,
    /// Seconds since 1970; `None` for a reservation.
    pub expires: Option<u64>,
}

/// That a node runs on what was saved then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recalled {
    pub saved: SystemTime,
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    format: u32,
    saved: u64,
    #[serde(flatten)]
    snapshot: Snapshot,
}

/// All that must be readable in a file of any format.
#[derive(Deserialize)]
struct Header {
    format: u32,
}

impl Snapshot {
    /// The subnet to serve until the store answers. `durable` is written at once and this file seconds later: a lease
    /// that only the former knows is the newer one, and nothing is known of its end.
    pub fn own(&self, durable: &Durable) -> Option<OwnSubnet> {
        let own = self.own?;
        let Some((key, public_ip)) = durable.lease.zip(durable.public_ip) else { return Some(own) };
        Some(match key == own.key {
            true => OwnSubnet { public_ip, ..own },
            false if self.network.v4.network.covers(key.v4) => OwnSubnet { key, public_ip, expires: Some(0) },
            false => own,
        })
    }
}

impl Recalled {
    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.saved).unwrap_or_default()
    }
}

impl OwnSubnet {
    /// Why new pods may not have addresses out of it before the store confirms what was saved then.
    pub fn doubt(&self, saved: SystemTime, public_ip: Ipv4Addr, now: SystemTime) -> Option<String> {
        if now < saved {
            return Some("the clock stands before the time it was saved at".into());
        }
        if self.expires.is_some_and(|expires| expires <= seconds(now)) {
            return Some("its lease ran out while the store did not answer".into());
        }
        (public_ip != self.public_ip).then(|| {
            format!("it was leased with public IP {}, this node now has {public_ip}", self.public_ip)
        })
    }
}

#[derive(Debug, Clone)]
pub struct SnapshotFile(PathBuf);

impl SnapshotFile {
    pub fn in_dir(state_dir: &Path) -> Self {
        Self(state_dir.join("snapshot.json"))
    }

    /// What was saved and when. Whatever stands in the way is logged and costs no more than the memory.
    pub fn load(&self, store: &str) -> Option<(Snapshot, SystemTime)> {
        let text = match fs::read(&self.0) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    warn!(file = %self.0.display(), %error, "the saved snapshot cannot be read");
                }
                return None;
            }
        };
        let (suffix, why) = match serde_json::from_slice::<Header>(&text) {
            Ok(Header { format: FORMAT }) => match serde_json::from_slice::<Stored>(&text) {
                Ok(Stored { snapshot, saved, .. }) if snapshot.store == store => {
                    return Some((snapshot, UNIX_EPOCH + Duration::from_secs(saved)));
                }
                Ok(stored) => {
                    ("other-store", format!("it is of {}: expected {store}", stored.snapshot.store))
                }
                Err(error) => ("unreadable", error.to_string()),
            },
            Ok(Header { format }) => ("other-format", format!("format {format}: expected {FORMAT}")),
            Err(error) => ("unreadable", error.to_string()),
        };
        self.set_aside(suffix, &why);
        None
    }

    /// Renames the file, so that it is neither used nor lost.
    pub fn set_aside(&self, suffix: &str, why: &str) {
        let aside = self.0.with_extension(format!("json.{suffix}"));
        match fs::rename(&self.0, &aside) {
            Ok(()) => {
                warn!(file = %self.0.display(), kept_as = %aside.display(), why, "saved snapshot set aside")
            }
            Err(error) => {
                warn!(file = %self.0.display(), %error, why, "saved snapshot not used, nor set aside")
            }
        }
    }

    fn save(&self, snapshot: &Snapshot, now: SystemTime) -> io::Result<()> {
        if let Some(dir) = self.0.parent() {
            fs::create_dir_all(dir)?;
        }
        let stored = Stored { format: FORMAT, saved: seconds(now), snapshot: snapshot.clone() };
        replace_file(&self.0, &serde_json::to_vec(&stored)?, 0o600, Survive::PowerCut)
    }
}

/// Saves what `current` gives, whenever `changes` says that it may be another, until told to stop.
pub async fn save_changes(
    file: SnapshotFile,
    pace: Pace,
    current: impl Fn() -> Option<Snapshot>,
    mut changes: watch::Receiver<()>,
    stop: CancellationToken,
) {
    let mut saved = None;
    let mut failing = false;
    let mut last_round = false;
    loop {
        let snapshot = current().map(Arc::new).filter(|snapshot| saved.as_ref() != Some(snapshot));
        let writing = snapshot.is_some();
        if let Some(snapshot) = snapshot {
            let (writer, content) = (file.clone(), snapshot.clone());
            let written = match spawn_blocking(move || writer.save(&content, SystemTime::now())).await {
                Ok(written) => written,
                Err(panic) => Err(io::Error::other(panic)),
            };
            match written {
                Ok(()) => {
                    saved = Some(snapshot);
                    if std::mem::take(&mut failing) {
                        info!(file = %file.0.display(), "the snapshot is saved again");
                    }
                }
                Err(error) if !std::mem::replace(&mut failing, true) => {
                    warn!(file = %file.0.display(), %error, "snapshot not saved: a start without a store will not have it")
                }
                Err(_) => {}
            }
        }
        if last_round {
            return;
        }
        let rest = sleep(if writing { pace.write } else { pace.look });
        tokio::select! {
            () = async { rest.await; if !failing { let _ = changes.changed().await; } } => {}
            () = stop.cancelled() => last_round = true,
        }
    }
}

pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: &str = "etcd, prefix /coreos.com/network";

    fn snapshot(peers: &[&str]) -> Snapshot {
        let lease = |key: &&str| {
            Lease {
            key: key.parse().expect(key),
            attrs: serde_json::from_str(
                r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#,
            )
            .expect("attrs"),
            create_revision: 9,
        }
        };
        Snapshot {
            store: STORE.into(),
            network: NetworkConfig::parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#)
                .expect("valid"),
            own: Some(OwnSubnet {
                key: "10.5.1.0-24".parse().expect("key"),
                public_ip: "192.0.2.1".parse().expect("ip"),
                expires: Some(4711),
            }),
            peers: peers.iter().map(lease).collect(),
        }
    }

    #[test]
    fn what_is_saved_comes_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = SnapshotFile::in_dir(&dir.path().join("weft"));
        assert_eq!(file.load(STORE), None);
        let now = UNIX_EPOCH + Duration::from_secs(4000);
        file.save(&snapshot(&["10.5.2.0-24"]), now).expect("save");
        assert_eq!(file.load(STORE), Some((snapshot(&["10.5.2.0-24"]), now)));
        assert_eq!(Recalled { saved: now }.age(now + Duration::from_secs(9)), Duration::from_secs(9));
        assert_eq!(Recalled { saved: now }.age(UNIX_EPOCH), Duration::ZERO, "the clock went back");
    }

    #[test]
    fn of_two_memories_of_the_own_lease_the_one_written_at_once_wins() {
        let own = |lease: Option<&str>, public_ip: Option<&str>| {
            let durable = Durable {
                lease: lease.map(|key| key.parse().expect(key)),
                public_ip: public_ip.map(|ip| ip.parse().expect(ip)),
                vtep_mac: None,
            };
            let own = snapshot(&[]).own(&durable).expect("a subnet");
            (own.key.to_string(), own.public_ip.to_string(), own.expires)
        };
        let saved = ("10.5.1.0-24".to_owned(), "192.0.2.1".to_owned(), Some(4711));
        assert_eq!(own(Some("10.5.1.0-24"), Some("192.0.2.1")), saved);
        assert_eq!(own(None, None), saved);
        let rewritten = ("10.5.1.0-24".to_owned(), "192.0.2.7".to_owned(), Some(4711));
        assert_eq!(own(Some("10.5.1.0-24"), Some("192.0.2.7")), rewritten);
        assert_eq!(own(Some("10.6.9.0-24"), Some("192.0.2.1")), saved, "of another network");
        let newer = ("10.5.9.0-24".to_owned(), "192.0.2.7".to_owned(), Some(0));
        assert_eq!(own(Some("10.5.9.0-24"), Some("192.0.2.7")), newer, "its end is not known");
        let none = Snapshot { own: None, ..snapshot(&[]) };
        assert_eq!(none.own(&Durable::default()), None);
    }

    #[test]
    fn what_is_not_of_this_store_or_format_or_is_damaged_is_set_aside_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = SnapshotFile::in_dir(dir.path());
        file.save(&snapshot(&[]), SystemTime::now()).expect("save");
        let good = fs::read_to_string(&file.0).expect("read");
        for (content, suffix) in [
            (good.replace("/coreos.com/network", "/elsewhere"), "other-store"),
            (good.replace(r#""format":1"#, r#""format":2"#), "other-format"),
            (r#"{"format":2,"of":"another time"}"#.into(), "other-format"),
            (good.replace("10.5.1.0-24", "10.5.1.0"), "unreadable"),
            (good[..good.len() / 2].to_owned(), "unreadable"),
            (String::new(), "unreadable"),
        ] {
            fs::write(&file.0, &content).expect("write");
            assert_eq!(file.load(STORE), None, "{content}");
            let aside = dir.path().join(format!("snapshot.json.{suffix}"));
            assert_eq!(fs::read_to_string(&aside).expect(suffix), content);
            assert!(!file.0.exists());
        }
    }

    /// What is to be saved, and the task that does.
    struct Saving {
        current: Arc<std::sync::Mutex<Option<Snapshot>>>,
        looks: Arc<std::sync::atomic::AtomicUsize>,
        changes: watch::Sender<()>,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    impl Saving {
        fn start(file: SnapshotFile, pace: Duration) -> Self {
            let current = Arc::new(std::sync::Mutex::new(Some(snapshot(&[]))));
            let (changes, stop) = (watch::Sender::new(()), CancellationToken::new());
            let looks = Arc::new(std::sync::atomic::AtomicUsize::new(0));
            let (read, looked) = (current.clone(), looks.clone());
            let read = move || {
                looked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                read.lock().expect("lock").clone()
            };
            let pace = Pace { write: pace, look: Duration::ZERO };
            let task = tokio::spawn(save_changes(file, pace, read, changes.subscribe(), stop.clone()));
            Self { current, looks, changes, stop, task }
        }

        fn change(&self, peers: &[&str]) {
            *self.current.lock().expect("lock") = Some(snapshot(peers));
            self.changes.send_replace(());
        }

        async fn end(self) {
            self.stop.cancel();
            tokio::time::timeout(Duration::from_secs(30), self.task).await.expect("ends").expect("no panic");
        }
    }

    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(tokio::time::Instant::now() < deadline, "never {what}");
            tokio::task::yield_now().await;
        }
    }

    fn saved_peers(file: &SnapshotFile) -> Option<usize> {
        file.0.exists().then(|| file.load(STORE))?.map(|(snapshot, _)| snapshot.peers.len())
    }

    #[tokio::test]
    async fn a_change_is_saved_at_once_and_the_next_after_a_while_or_at_a_stop() {
        const PACE: Duration = Duration::from_millis(300);
        let dir = tempfile::tempdir().expect("tempdir");
        let file = SnapshotFile::in_dir(dir.path());
        let before_the_first = tokio::time::Instant::now();
        let saving = Saving::start(file.clone(), PACE);
        until("saved", || saved_peers(&file) == Some(0)).await;
        saving.change(&["10.5.2.0-24"]);
        until("saved again", || saved_peers(&file) == Some(1)).await;
        assert!(before_the_first.elapsed() >= PACE, "{:?}", before_the_first.elapsed());
        saving.change(&["10.5.2.0-24", "10.5.3.0-24"]);
        saving.end().await;
        assert_eq!(saved_peers(&file), Some(2), "nothing is lost by a clean stop");
    }

    #[tokio::test]
    async fn a_disk_that_takes_nothing_is_tried_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = SnapshotFile::in_dir(dir.path());
        fs::create_dir(&file.0).expect("a directory in its place");
        let saving = Saving::start(file.clone(), Duration::from_millis(5));
        until("tried again", || saving.looks.load(std::sync::atomic::Ordering::Relaxed) > 2).await;
        fs::remove_dir(&file.0).expect("room again");
        until("saved", || saved_peers(&file) == Some(0)).await;
        saving.end().await;
    }
}
