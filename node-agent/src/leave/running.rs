//! Who must not be there while weft is taken off: an agent, a plugin in the middle of a DEL, flanneld.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use weft_shared::tombstone::{dir_beside, lock_path};

use crate::alone::{Place, take_place};
use crate::config::Config;
use crate::ipam::records;

/// Held, they keep agents and plugins out.
#[derive(Debug, Default)]
pub(super) struct Guards {
    _agent: Option<Place>,
    _locks: Vec<File>,
}

/// Takes what keeps others out; who is there already is a refusal.
pub(super) fn keep_out(config: &Config, as_if_stopped: bool, refusals: &mut Vec<String>) -> Guards {
    let mut guards = Guards::default();
    match take_place() {
        Ok(Some(place)) => guards._agent = Some(place),
        Err(error) => refusals.push(format!("whether weftd runs here cannot be told: {error}")),
        Ok(None) if as_if_stopped => {}
        Ok(None) => refusals.push(
            "weftd runs in this network namespace and would put everything back: stop it first, for good \
             (systemctl disable --now weftd)"
                .to_owned(),
        ),
    }
    let locks = [
        (records::lock_in(&config.run_dir), "another weftd keeps its records there: stop it first"),
        (lock_path(&dir_beside(&config.cni_socket)), "a plugin is just leaving word of a DEL: try again"),
    ];
    for (path, why) in locks {
        let Ok(lock) = File::options().write(true).open(&path) else { continue };
        match lock.try_lock() {
            Ok(()) => guards._locks.push(lock),
            // Held by the agent that is named already.
            Err(TryLockError::WouldBlock) if guards._agent.is_none() => {}
            Err(TryLockError::WouldBlock) => refusals.push(format!("{}: {why}", path.display())),
            Err(TryLockError::Error(error)) => refusals.push(format!("{}: {error}", path.display())),
        }
    }
    if flanneld_runs() {
        refusals.push(
            "flanneld runs in this network namespace: flannel.*, its routes and tables are its by now. Going back to \
             flannel needs no uninstall; stop flanneld first if this node is to have neither"
                .to_owned(),
        );
    }
    guards
}

fn flanneld_runs() -> bool {
    let namespace = |dir: &Path| fs::metadata(dir.join("ns/net")).map(|m| (m.dev(), m.ino())).ok();
    let Some(own) = namespace(Path::new("/proc/self")) else { return false };
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    processes.flatten().map(|process| process.path()).any(|process| {
        fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.trim_end() == "flanneld")
            && namespace(&process) == Some(own)
    })
}
