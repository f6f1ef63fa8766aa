//! The attachments on disk: one JSON file each in `<run_dir>/attachments`, on tmpfs, written beside and renamed.
//!
//! A record must survive the death of the agent at any instruction, and nothing more: no pod's network namespace
//! survives a reboot, so there is no fsync, and a directory of another boot is wiped. A file that cannot be read still
//! stands for a pod that may be alive: what addresses it names stay blocked until its veth is gone ([`Damaged`]).

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use weft_shared::names::{attachment_hash, host_ifname, host_ifname_of_hash};
use weft_shared::protocol::{Attachment, Bandwidth, BridgeOptions, PortMapping};
use weft_shared::replace::{Survive, is_leftover, replace_file};
use weft_shared::{IfName, Mac, Subnet};

use super::boottime::Boottime;
use crate::pods::SeenVeth;

/// What the agent has promised to one attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    // The addresses come first: they are what a torn file must still tell.
    pub(super) addresses: Vec<IpAddr>,
    /// The addresses are those that were asked for, and not round robin's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) requested: bool,
    /// Addresses of an ADD that this one replaced and whose plugin may not be dead yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) held: Vec<Held>,
    /// The leased subnet the addresses are out of.
    pub(super) subnet: Subnet,
    pub(super) attachment: Attachment,
    pub(super) reserved_at: Boottime,
    /// `None` while the plugin wires.
    pub(super) committed: Option<Wired>,
    /// Index of the veth of an attachment that is being undone: its address is not free while that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) undone: Option<u32>,
    pub(super) bridge: BridgeOptions,
    pub(super) mtu: u32,
    pub(super) netns: String,
    pub(super) netns_cookie: Option<u64>,
    pub(super) pod: Option<String>,
    #[serde(default, rename = "ports", skip_serializing_if = "Vec::is_empty")]
    pub(super) host_ports: Vec<PortMapping>,
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub(super) bandwidth: Bandwidth,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) address: IpAddr,
    pub(super) until: Boottime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wired {
    pub(super) host_ifindex: u32,
    pub(super) host_mac: Mac,
    pub(super) container_mac: Mac,
}

/// A record that cannot be read, and what can still be said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Damaged {
    pub(super) host_ifname: IfName,
    /// Of its veth, whatever that is called by now.
    pub(super) host_ifindex: Option<u32>,
    pub(super) addresses: Vec<IpAddr>,
}

impl Damaged {
    pub(super) fn is_of(&self, veth: &SeenVeth) -> bool {
        veth.name == self.host_ifname || Some(veth.ifindex) == self.host_ifindex
    }
}

/// What must outlive single attachments: where round robin stood at that time, and which bridges Reserve has named.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Continuity {
    /// Older agents did not say.
    #[serde(default)]
    pub(super) at: Option<Boottime>,
    pub(super) cursors: BTreeMap<Subnet, IpAddr>,
    pub(super) bridges: BTreeMap<IfName, BridgeUse>,
}

/// The subnet and the MTU that new pods on a bridge got last, and its MAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BridgeUse {
    pub(super) subnet: Subnet,
    pub(super) mtu: u32,
    #[serde(default)]
    pub(super) mac: Option<Mac>,
}

/// Everything that an earlier agent of this boot left.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) records: Vec<Record>,
    /// By attachment hash.
    pub(super) damaged: BTreeMap<String, Damaged>,
    pub(super) continuity: Continuity,
}

#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    #[error("another weftd keeps its records in {0}: give each agent its own --run-dir")]
    InUse(PathBuf),
    #[error("records in {path}: {error}")]
    Io { path: PathBuf, error: io::Error },
}

/// The directory, held by this process alone.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
    boot_id: String,
    /// The kernel releases it with the process, however that dies.
    lock: File,
}

/// In the run directory.
const DIR: &str = "attachments";
const LOCK: &str = "lock";
const BOOT_ID: &str = "boot_id";
const CONTINUITY: &str = "continuity";
const HASH_CHARS: usize = 52;
/// A killed agent keeps its lock until the kernel has taken it apart.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Where the records of the agent with this run directory lie.
pub(crate) fn dir_in(run_dir: &Path) -> PathBuf {
    run_dir.join(DIR)
}

/// Held by the agent for as long as it lives.
pub(crate) fn lock_in(run_dir: &Path) -> PathBuf {
    dir_in(run_dir).join(LOCK)
}

/// Whether a file of that directory is one that an agent has written.
pub(crate) fn is_ours(path: &Path) -> bool {
    is_of_attachments(path) || path.ends_with(LOCK) || path.ends_with(BOOT_ID)
}

/// What goes with its boot.
fn is_of_attachments(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "json" || e == "damaged") || is_leftover(path)
}

/// Whom each veth of the records belongs to, for people; asked by one who is not the agent.
pub(crate) fn owners(run_dir: &Path) -> BTreeMap<IfName, String> {
    let of_record = |entry: fs::DirEntry| {
        let Record { attachment, pod, .. } = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
        Some((host_ifname(&attachment), pod.unwrap_or_else(|| attachment.container_id.to_string())))
    };
    fs::read_dir(dir_in(run_dir)).into_iter().flatten().flatten().filter_map(of_record).collect()
}

/// What [`Records::open`] would give, as far as it can be read; takes nothing over and mends nothing.
pub(super) fn peek(run_dir: &Path, boot_id: &str) -> Loaded {
    let dir = dir_in(run_dir);
    let mut loaded = Loaded::default();
    if fs::read_to_string(dir.join(BOOT_ID)).is_ok_and(|found| found != boot_id && is_boot_id(&found)) {
        return loaded;
    }
    for path in fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let Some(stem) = path.file_stem().and_then(|s| s.to_str()) else { continue };
        if is_leftover(&path) || path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let content = fs::read(&path).unwrap_or_default();
        if stem == CONTINUITY {
            loaded.continuity = serde_json::from_slice(&content).unwrap_or_default();
        } else if is_hash(stem) {
            let record = serde_json::from_slice::<Record>(&content).ok();
            loaded.records.extend(record.filter(|record| attachment_hash(&record.attachment) == stem));
        }
    }
    loaded
}

/// Makes the directory if need be, and locks it.
fn take(dir: &Path, patience: Duration) -> Result<File, RecordsError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |error| RecordsError::Io { path, error }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(at(dir))?;
    let lock = dir.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock);
    let file = file.map_err(at(&lock))?;
    match lock_within(&file, patience) {
        Err(TryLockError::WouldBlock) => Err(RecordsError::InUse(dir.to_owned())),
        Err(TryLockError::Error(error)) => Err(at(&lock)(error)),
        Ok(()) => Ok(file),
    }
}

#[expect(clippy::disallowed_methods, reason = "a lock announces nothing; this is before anything is served")]
fn lock_within(file: &File, patience: Duration) -> Result<(), TryLockError> {
    let end = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < end => sleep(Duration::from_millis(20)),
            other => return other,
        }
    }
}

impl Records {
    pub(super) fn open(run_dir: &Path, boot_id: &str) -> Result<(Self, Loaded), RecordsError> {
        let dir = dir_in(run_dir);
        let lock = take(&dir, LOCK_PATIENCE)?;
        let records = Self { dir, boot_id: boot_id.to_owned(), lock };
        let loaded = records.enter_boot().and_then(|()| records.load());
        let loaded = loaded.map_err(|error| RecordsError::Io { path: records.dir.clone(), error })?;
        Ok((records, loaded))
    }

    /// Whether the directory is the one that was taken: a lock that is held proves nothing of one that was deleted.
    pub(super) fn is_there(&self) -> bool {
        let identity = |meta: io::Result<fs::Metadata>| meta.map(|meta| (meta.dev(), meta.ino())).ok();
        let found = identity(fs::symlink_metadata(self.dir.join(LOCK)));
        found.is_some() && found == identity(self.lock.metadata())
    }

    /// A foreign hand took the directory away: takes one anew, in which nothing is.
    pub(super) fn take_anew(&mut self) -> Result<(), RecordsError> {
        self.lock = take(&self.dir, Duration::ZERO)?;
        self.enter_boot().map_err(|error| RecordsError::Io { path: self.dir.clone(), error })
    }

    /// The file holds the record whole, or what it held before.
    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        self.replace(&attachment_hash(&record.attachment), &serde_json::to_vec(record)?)
    }

    /// What is left of an unreadable record, to be read as that was.
    pub(super) fn write_damaged(&self, hash: &str, damaged: &Damaged) -> io::Result<()> {
        let left =
            serde_json::json!({ "addresses": damaged.addresses, "host_ifindex": damaged.host_ifindex });
        replace_file(&self.path(hash, "damaged"), left.to_string().as_bytes(), 0o600, Survive::Crash)
    }

    /// Both the record and the unreadable one of this hash; neither need be there.
    pub(super) fn remove(&self, hash: &str) -> io::Result<()> {
        for extension in ["json", "damaged"] {
            match fs::remove_file(self.path(hash, extension)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn write_continuity(&self, continuity: &Continuity) -> io::Result<()> {
        self.replace(CONTINUITY, &serde_json::to_vec(continuity)?)
    }

    fn path(&self, stem: &str, extension: &str) -> PathBuf {
        self.dir.join(stem).with_extension(extension)
    }

    fn replace(&self, stem: &str, content: &[u8]) -> io::Result<()> {
        replace_file(&self.path(stem, "json"), content, 0o600, Survive::Crash)
    }

    /// Wipes what another boot left. The marker is written last, so that a wipe cut short begins anew.
    fn enter_boot(&self) -> io::Result<()> {
        let marker = self.dir.join(BOOT_ID);
        let found = match fs::read_to_string(&marker) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            other => Some(other?),
        };
        match found.as_deref() {
            Some(found) if found == self.boot_id => return Ok(()),
            // Anything but a boot id says nothing about the records; they are kept and looked at.
            Some(found) if !is_boot_id(found) => {
                warn!(path = %marker.display(), "unreadable boot id replaced")
            }
            None => {}
            Some(_) => {
                let mut wiped = 0;
                for entry in fs::read_dir(&self.dir)? {
                    let path = entry?.path();
                    if is_of_attachments(&path) {
                        fs::remove_file(path)?;
                        wiped += 1;
                    }
                }
                info!(files = wiped, "records of another boot removed");
            }
        }
        replace_file(&marker, self.boot_id.as_bytes(), 0o600, Survive::Crash)
    }

    fn load(&self) -> io::Result<Loaded> {
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let (Some(stem), Some(extension)) =
                (path.file_stem().and_then(|s| s.to_str()), path.extension().and_then(|e| e.to_str()))
            else {
                continue;
            };
            match extension {
                _ if is_leftover(&path) => fs::remove_file(&path)?,
                "json" if stem == CONTINUITY => match serde_json::from_slice(&fs::read(&path)?) {
                    Ok(continuity) => loaded.continuity = continuity,
                    Err(error) => warn!(path = %path.display(), %error, "unreadable, begun anew"),
                },
                "json" if is_hash(stem) => {
                    let content = fs::read(&path)?;
                    match serde_json::from_slice::<Record>(&content) {
                        Ok(record) if attachment_hash(&record.attachment) == stem => {
                            loaded.records.push(record)
                        }
                        Ok(_) => {
                            self.set_aside(&mut loaded, stem, &content, "it is named for another attachment")?
                        }
                        Err(error) => self.set_aside(&mut loaded, stem, &content, &error.to_string())?,
                    }
                }
                "damaged" if is_hash(stem) => {
                    let content = fs::read(&path)?;
                    self.note_damaged(&mut loaded, stem, &content);
                }
                _ => warn!(path = %path.display(), "not a file of this directory, left alone"),
            }
        }
        loaded.records.sort_by(|a, b| a.attachment.cmp(&b.attachment));
        Ok(loaded)
    }

    fn set_aside(&self, loaded: &mut Loaded, hash: &str, content: &[u8], reason: &str) -> io::Result<()> {
        let aside = self.path(hash, "damaged");
        fs::rename(self.path(hash, "json"), &aside)?;
        warn!(path = %aside.display(), reason, "unreadable record set aside");
        self.note_damaged(loaded, hash, content);
        Ok(())
    }

    fn note_damaged(&self, loaded: &mut Loaded, hash: &str, content: &[u8]) {
        let Some(host_ifname) = host_ifname_of_hash(hash) else { return };
        let addresses = salvage(content);
        if addresses.is_empty() {
            warn!(veth = %host_ifname, "no address is left in an unreadable record: none is given while its veth lives");
        } else {
            warn!(veth = %host_ifname, addresses = %super::verbs::listed(&addresses), "addresses of an unreadable record stay blocked while its veth lives");
        }
        loaded.damaged.insert(
            hash.to_owned(),
            Damaged { host_ifname, host_ifindex: salvage_ifindex(content), addresses },
        );
    }
}

/// Every quoted string that is an IP address: the pod's, and those of the host that its ports are on, which no pod gets.
fn salvage(content: &[u8]) -> Vec<IpAddr> {
    let text = String::from_utf8_lossy(content);
    let mut found: Vec<IpAddr> = text.split('"').filter_map(|part| part.parse().ok()).collect();
    found.sort();
    found.dedup();
    found
}

fn salvage_ifindex(content: &[u8]) -> Option<u32> {
    let text = String::from_utf8_lossy(content);
    let (_, after) = text.split_once("\"host_ifindex\":")?;
    // Without what follows it may be cut off.
    after.split_once(|c: char| !c.is_ascii_digit())?.0.parse().ok()
}

fn is_hash(stem: &str) -> bool {
    stem.len() == HASH_CHARS && host_ifname_of_hash(stem).is_some()
}

fn is_boot_id(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "7d8e9fa0-0000-4000-8000-000000000001";
    const OTHER_BOOT: &str = "7d8e9fa0-0000-4000-8000-000000000002";

    fn record(id: &str, address: &str) -> Record {
        Record {
            addresses: vec![address.parse().expect("address")],
            requested: false,
            held: vec![],
            subnet: "10.5.1.0/24".parse().expect("subnet"),
            attachment: Attachment {
                network: "weft".parse().expect("name"),
                container_id: id.parse().expect("ID"),
                ifname: "eth0".parse().expect("ifname"),
            },
            reserved_at: Boottime::from_nanos(7),
            committed: None,
            undone: None,
            bridge: BridgeOptions {
                name: "cni0".parse().expect("ifname"),
                hairpin: true,
                isolated: false,
                mtu: None,
                force_address: false,
                masquerade: false,
            },
            mtu: 1450,
            netns: "/run/netns/10.5.1.77".into(),
            netns_cookie: Some(4),
            pod: None,
            host_ports: vec![],
            bandwidth: Bandwidth::default(),
        }
    }

    fn open(dir: &Path, boot: &str) -> (Records, Loaded) {
        Records::open(dir, boot).expect("open")
    }

    #[test]
    fn records_outlive_the_agent_but_not_the_boot() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (records, loaded) = open(dir.path(), BOOT);
        assert!(loaded.records.is_empty());
        records.write(&record("a", "10.5.1.2")).expect("write");
        records.write(&record("b", "10.5.1.3")).expect("write");
        let cursor = "10.5.1.3".parse().expect("address");
        let mut continuity = Continuity::default();
        continuity.cursors.insert("10.5.1.0/24".parse().expect("subnet"), cursor);
        records.write_continuity(&continuity).expect("write");
        // A write that was cut off.
        let cut = records.path(&"a".repeat(HASH_CHARS), "tmp4711");
        fs::write(&cut, "{").expect("write");
        drop(records);

        let (records, loaded) = open(dir.path(), BOOT);
        assert!(!cut.exists());
        assert_eq!(loaded.records, [record("a", "10.5.1.2"), record("b", "10.5.1.3")]);
        assert_eq!(loaded.continuity, continuity);
        assert!(loaded.damaged.is_empty());
        records.remove(&attachment_hash(&record("a", "10.5.1.2").attachment)).expect("remove");
        records.remove(&attachment_hash(&record("a", "10.5.1.2").attachment)).expect("again");
        drop(records);
        assert_eq!(open(dir.path(), BOOT).1.records, [record("b", "10.5.1.3")]);

        let (_, loaded) = open(dir.path(), OTHER_BOOT);
        assert!(loaded.records.is_empty() && loaded.continuity == Continuity::default());
        assert!(open(dir.path(), BOOT).1.records.is_empty());
    }

    #[test]
    fn a_peek_sees_what_will_be_opened_and_leaves_all_as_it_is() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(peek(dir.path(), BOOT).records, [], "no directory yet");
        // Held by another all the while, as by an agent that is about to end.
        let (records, _) = open(dir.path(), BOOT);
        let of_former = Record { subnet: "10.5.7.0/24".parse().expect("subnet"), ..record("b", "10.5.7.2") };
        let both = [record("a", "10.5.1.2"), of_former];
        both.iter().for_each(|record| records.write(record).expect("write"));
        let used = BridgeUse { subnet: both[0].subnet, mtu: 1472, mac: None };
        let bridges = BTreeMap::from([(both[0].bridge.name.clone(), used)]);
        let continuity = Continuity { bridges, ..Continuity::default() };
        records.write_continuity(&continuity).expect("write");
        let damaged = records.path(&attachment_hash(&record("c", "10.5.1.3").attachment), "json");
        fs::write(&damaged, "{").expect("write");

        let mut seen = peek(dir.path(), BOOT);
        seen.records.sort_by(|a, b| a.attachment.cmp(&b.attachment));
        assert_eq!((seen.records.as_slice(), seen.continuity), (&both[..], continuity));
        assert!(damaged.exists(), "to be set aside by who takes over");
        let other = peek(dir.path(), OTHER_BOOT);
        assert_eq!((other.records.len(), other.continuity), (0, Continuity::default()));
        assert_eq!(peek(dir.path(), BOOT).records.len(), 2, "nothing is wiped");
    }

    #[test]
    fn a_lost_boot_id_forgets_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (records, _) = open(dir.path(), BOOT);
        records.write(&record("a", "10.5.1.2")).expect("write");
        drop(records);
        for broken in ["", "garbage"] {
            fs::write(dir.path().join("attachments/boot_id"), broken).expect("write");
            assert_eq!(open(dir.path(), BOOT).1.records.len(), 1, "{broken:?}");
        }
        fs::remove_file(dir.path().join("attachments/boot_id")).expect("remove");
        assert_eq!(open(dir.path(), BOOT).1.records.len(), 1);
    }

    #[test]
    fn a_torn_record_keeps_its_addresses() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (records, _) = open(dir.path(), BOOT);
        let torn = record("a", "10.5.1.2");
        let hash = attachment_hash(&torn.attachment);
        let json = serde_json::to_vec(&torn).expect("json");
        fs::write(records.path(&hash, "json"), &json[..60]).expect("write");
        let foreign = attachment_hash(&record("c", "10.5.1.4").attachment);
        fs::write(
            records.path(&foreign, "json"),
            serde_json::to_vec(&record("b", "10.5.1.3")).expect("json"),
        )
        .expect("write");
        drop(records);
        // Set aside once, and remembered at every later start.
        for _ in 0..2 {
            let (_, loaded) = open(dir.path(), BOOT);
            assert!(loaded.records.is_empty());
            let addresses: Vec<_> = loaded.damaged.values().flat_map(|d| &d.addresses).collect();
            assert_eq!(loaded.damaged.len(), 2);
            assert!(addresses.contains(&&torn.addresses[0]), "{addresses:?}");
            let name = weft_shared::names::host_ifname(&torn.attachment);
            assert_eq!(loaded.damaged[&hash].host_ifname, name);
        }
        let (records, _) = open(dir.path(), BOOT);
        records.remove(&hash).expect("remove");
        drop(records);
        assert_eq!(open(dir.path(), BOOT).1.damaged.len(), 1);
    }

    #[test]
    fn two_agents_do_not_share_a_directory() {
        let dir = tempfile::tempdir().expect("tempdir");
        let first = open(dir.path(), BOOT);
        let error = Records::open(dir.path(), BOOT).expect_err("second").to_string();
        assert!(error.contains("another weftd"), "{error}");
        drop(first);
        open(dir.path(), BOOT);
    }
}
