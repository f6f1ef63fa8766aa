//! What kernel settings were before weft first changed them.
//!
//! For this boot only: the next one begins with the host's own settings, and what weft found in this one says nothing
//! about them. So the file lies in the run directory, with the boot's id in it, and outlives the agent.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use weft_shared::replace::{Survive, replace_file};

const FILE: &str = "sysctls.json";

#[derive(Debug)]
pub struct Before {
    file: PathBuf,
    known: Known,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Known {
    boot_id: String,
    /// By path below `/proc/sys`.
    settings: BTreeMap<String, Setting>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// What was there before weft's first change.
    pub before: String,
    /// What weft has made of it.
    pub set: String,
}

impl Before {
    /// Another boot's file, and one that cannot be read, say nothing.
    pub fn load(run_dir: &Path, boot_id: &str) -> io::Result<Self> {
        let file = run_dir.join(FILE);
        let known = match fs::read(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            other => serde_json::from_slice::<Known>(&other?).ok(),
        };
        let known = known.filter(|known| known.boot_id == boot_id);
        let known = known.unwrap_or_else(|| Known { boot_id: boot_id.to_owned(), ..Known::default() });
        Ok(Self { file, known })
    }

    /// A setting is about to be changed from `old` to `new`. Only the first `old` counts: later ones are what a foreign
    /// hand made of weft's own.
    pub fn note(&mut self, path: &str, old: &str, new: &str) -> io::Result<()> {
        let known = self.known.settings.get(path).cloned();
        if known.as_ref().is_some_and(|setting| setting.set == new) {
            return Ok(());
        }
        let before = known.as_ref().map_or(old, |setting| &setting.before).to_owned();
        self.known.settings.insert(path.to_owned(), Setting { before, set: new.to_owned() });
        // What is not on disk is not known: the next attempt writes it.
        self.save().inspect_err(|_| match known {
            Some(known) => drop(self.known.settings.insert(path.to_owned(), known)),
            None => drop(self.known.settings.remove(path)),
        })
    }

    pub fn settings(&self) -> impl Iterator<Item = (&str, &Setting)> {
        self.known.settings.iter().map(|(path, setting)| (path.as_str(), setting))
    }

    /// The setting is as it was, or no longer ours to put back.
    pub fn forget(&mut self, path: &str) -> io::Result<()> {
        match self.known.settings.remove(path) {
            Some(_) => self.save(),
            None => Ok(()),
        }
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    fn save(&self) -> io::Result<()> {
        replace_file(&self.file, &serde_json::to_vec_pretty(&self.known)?, 0o600, Survive::Crash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::FakeKernel;
    use crate::kernel::{Kernel, Remembering};
    use crate::object::{Found, Object, Op};

    const FORWARD: &str = "net/ipv4/ip_forward";

    fn shown(before: &Before) -> Vec<(String, String, String)> {
        before.settings().map(|(p, s)| (p.to_owned(), s.before.clone(), s.set.clone())).collect()
    }

    fn set(kernel: &mut impl Kernel, old: &str, new: &str) {
        let object = |value: &str| Object::Sysctl { path: FORWARD.into(), value: value.into() };
        let found = Some(Found { object: object(old), ours: false, overruled: false });
        kernel.apply(&[Op::Set { object: object(new), found }]);
    }

    #[test]
    fn the_first_value_of_this_boot_is_kept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let before = Before::load(dir.path(), "boot-1").expect("load");
        let mut kernel = Remembering::new(FakeKernel::default(), before);
        set(&mut kernel, "0", "1");
        set(&mut kernel, "2", "1");
        drop(kernel);
        let mut again = Before::load(dir.path(), "boot-1").expect("load");
        assert_eq!(shown(&again), [(FORWARD.to_owned(), "0".to_owned(), "1".to_owned())]);
        again.note(FORWARD, "1", "3").expect("note");
        let wanted_now = [(FORWARD.to_owned(), "0".to_owned(), "3".to_owned())];
        assert_eq!(shown(&Before::load(dir.path(), "boot-1").expect("load")), wanted_now);
        again.forget(FORWARD).expect("forget");
        assert!(shown(&Before::load(dir.path(), "boot-1").expect("load")).is_empty());
    }

    #[test]
    fn what_could_not_be_written_is_written_at_the_next_attempt() {
        let dir = tempfile::tempdir().expect("tempdir");
        let run_dir = dir.path().join("run");
        let mut before = Before::load(&run_dir, "boot-1").expect("load");
        before.note(FORWARD, "0", "1").expect_err("no such directory");
        assert!(shown(&before).is_empty());
        fs::create_dir(&run_dir).expect("room");
        before.note(FORWARD, "0", "1").expect("note");
        let written = [(FORWARD.to_owned(), "0".to_owned(), "1".to_owned())];
        assert_eq!(shown(&Before::load(&run_dir, "boot-1").expect("load")), written);
    }

    #[test]
    fn another_boot_and_a_torn_file_say_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        Before::load(dir.path(), "boot-1").and_then(|mut b| b.note(FORWARD, "0", "1")).expect("note");
        assert!(shown(&Before::load(dir.path(), "boot-2").expect("load")).is_empty());
        fs::write(dir.path().join(FILE), "{").expect("write");
        assert!(shown(&Before::load(dir.path(), "boot-1").expect("load")).is_empty());
    }
}
