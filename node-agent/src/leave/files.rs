//! Which files are weft's: by name, one by one. A directory of the settings may hold more than ours (`--run-dir=/run`),
//! so nothing is ever removed for where it lies alone.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use weft_shared::names::CNI_SOCKET;
use weft_shared::replace::is_leftover;
use weft_shared::tombstone::{self, dir_beside};

use super::Thing;
use crate::config::Config;
use crate::ipam::records;
use crate::server::socket::unfinished;

/// Directory entries, none if there is no directory.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e))
}

/// Records, tombstones, sockets, remembered settings.
pub(super) fn of_this_boot(config: &Config, before: &Path) -> Option<Thing> {
    let (records, tombstones) = (records::dir_in(&config.run_dir), dir_beside(&config.cni_socket));
    let in_records = entries(&records).into_iter().filter(|path| records::is_ours(path));
    let in_tombstones = entries(&tombstones).into_iter().filter(|path| tombstone::is_ours(path));
    let sockets = [&config.cni_socket, &config.admin_socket];
    let sockets = sockets.into_iter().flat_map(|socket| [socket.clone(), unfinished(socket)]);
    let single = sockets.chain([before.to_owned()]).filter(|path| path.symlink_metadata().is_ok());
    let files: Vec<PathBuf> = in_records.chain(in_tombstones).chain(single).collect();
    let dirs = existing([records, tombstones, config.run_dir.clone()]);
    some_files(&config.run_dir, files, dirs, false)
}

/// In the state directory; the one that names lease and VTEP comes last.
const STATE_FILES: [&str; 2] = ["snapshot", "node"];

/// What outlives a reboot, but the embedded store: each file, what was set aside of it (`node.json.unreadable`), and
/// what a writer that was cut short has left.
pub(super) fn of_every_boot(config: &Config) -> Option<Thing> {
    let all = entries(&config.state_dir);
    let of = |stem: &str| {
        let (file, aside) = (format!("{stem}.json"), format!("{stem}.json."));
        let left = |path: &PathBuf| is_leftover(path) && path.file_stem().is_some_and(|found| found == stem);
        let named = move |path: &PathBuf| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            name == file || name.starts_with(&aside)
        };
        all.iter().filter(|path| left(path) || named(path)).cloned().collect::<Vec<_>>()
    };
    let files = STATE_FILES.into_iter().flat_map(of).collect();
    some_files(&config.state_dir, files, existing([config.state_dir.clone()]), true)
}

fn existing<const N: usize>(dirs: [PathBuf; N]) -> Vec<PathBuf> {
    dirs.into_iter().filter(|dir| dir.is_dir()).collect()
}

/// An empty directory alone is ours only if nothing stands in it.
fn some_files(dir: &Path, files: Vec<PathBuf>, dirs: Vec<PathBuf>, last_word: bool) -> Option<Thing> {
    let only_empty = files.is_empty() && (dirs.is_empty() || !entries(dir).is_empty());
    (!only_empty).then(|| Thing::Files { dir: dir.to_owned(), files, dirs, last_word })
}

/// What lies in directories of ours and is not ours.
pub(super) fn foreign(thing: &Thing, spared: &[&Path]) -> Vec<PathBuf> {
    let Thing::Files { files, dirs, .. } = thing else { return Vec::new() };
    let all = dirs.iter().flat_map(|dir| entries(dir));
    all.filter(|path| !files.contains(path) && !dirs.contains(path) && !spared.contains(&path.as_path()))
        .collect()
}

/// Network configurations that call weft, each with the socket of the agent that it cannot be used without.
pub(super) fn conflists(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    let names = |path: &PathBuf| has_extension(path, &["conf", "conflist", "json"]);
    let files = entries(dir).into_iter().filter(names);
    files.filter_map(|path| socket_in(&path).map(|socket| (path, socket))).collect()
}

fn socket_in(path: &Path) -> Option<PathBuf> {
    let json: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let plugins = match json["plugins"].as_array() {
        Some(plugins) => plugins.clone(),
        None => vec![json],
    };
    let weft = plugins.iter().find(|plugin| plugin["type"] == "weft")?;
    Some(weft["socket"].as_str().unwrap_or(CNI_SOCKET).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conflists_of_weft_with_their_agents() {
        let dir = tempfile::tempdir().expect("tempdir");
        for (name, json) in [
            ("10-weft.conflist", r#"{"name":"weft","plugins":[{"type":"weft"},{"type":"portmap"}]}"#),
            ("20-one.conf", r#"{"name":"one","type":"weft"}"#),
            ("30-other-agent.conflist", r#"{"plugins":[{"type":"weft","socket":"/run/other/cni.sock"}]}"#),
            ("40-flannel.conflist", r#"{"plugins":[{"type":"flannel"}]}"#),
            ("50-torn.conflist", "{"),
            ("60-weft.conflist.bak", r#"{"plugins":[{"type":"weft"}]}"#),
        ] {
            fs::write(dir.path().join(name), json).expect("write");
        }
        let found = conflists(dir.path());
        let expected = [
            ("10-weft.conflist", CNI_SOCKET),
            ("20-one.conf", CNI_SOCKET),
            ("30-other-agent.conflist", "/run/other/cni.sock"),
        ];
        assert_eq!(found, expected.map(|(name, socket)| (dir.path().join(name), socket.into())));
        assert!(conflists(&dir.path().join("none")).is_empty());
    }
}
