//! What must survive a reboot: the subnet this node had and the MAC of its VTEP, so that it comes back as the same node.
//!
//! One small file, replaced at once. Losing it costs a new MAC and perhaps a new subnet, nothing else; an unreadable
//! one is set aside by name and reported. What the store last said lies beside it ([`snapshot`]).

pub mod snapshot;

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;
use weft_shared::Mac;
use weft_shared::lease::LeaseKey;
use weft_shared::replace::{Survive, replace_file};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Durable {
    pub lease: Option<LeaseKey>,
    pub vtep_mac: Option<Mac>,
    /// The lease's: whoever gives the lease back needs it to prove that it is ours.
    #[serde(default)]
    pub public_ip: Option<Ipv4Addr>,
}

#[derive(Debug, Clone)]
pub struct DurableFile(PathBuf);

impl DurableFile {
    pub fn in_dir(state_dir: &Path) -> Self {
        Self(state_dir.join("node.json"))
    }

    /// `None`: weft has never run here.
    pub fn load(&self) -> io::Result<Option<Durable>> {
        let text = match fs::read_to_string(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        match serde_json::from_str(&text) {
            Ok(durable) => Ok(Some(durable)),
            Err(error) => {
                let aside = self.0.with_extension("json.unreadable");
                warn!(file = %self.0.display(), %error, kept_as = %aside.display(), "durable state is unreadable; starting without it");
                fs::rename(&self.0, aside)?;
                Ok(Some(Durable::default()))
            }
        }
    }

    /// What is on disk, without anything being set aside: nothing, if it cannot be read.
    pub fn peek(&self) -> Durable {
        fs::read(&self.0).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default()
    }

    pub fn save(&self, durable: &Durable) -> io::Result<()> {
        if let Some(dir) = self.0.parent() {
            fs::create_dir_all(dir)?;
        }
        replace_file(&self.0, &serde_json::to_vec_pretty(durable)?, 0o644, Survive::PowerCut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_comes_back_and_nonsense_is_set_aside() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = DurableFile::in_dir(&dir.path().join("weft"));
        assert_eq!(file.load().expect("load"), None);
        let durable = Durable {
            lease: "10.5.1.0-24".parse().ok(),
            vtep_mac: "02:00:00:00:00:01".parse().ok(),
            public_ip: "192.0.2.1".parse().ok(),
        };
        file.save(&durable).expect("save");
        assert_eq!(file.load().expect("load"), Some(durable));
        fs::write(dir.path().join("weft/node.json"), "{").expect("write");
        assert_eq!(file.load().expect("load"), Some(Durable::default()));
        assert!(dir.path().join("weft/node.json.unreadable").exists());
    }
}
