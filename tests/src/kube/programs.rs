//! Where Kubernetes' own programs are: scripts build them, from source and once, for they are in no distribution.

use std::env;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

/// What scripts/lib/setup.sh builds.
pub(super) const VERSION: &str = "v1.34.2";

#[derive(Debug, Clone)]
pub struct Programs {
    dir: PathBuf,
}

impl Programs {
    /// Where `WEFT_KUBERNETES_DIR` says, or where `need_kubernetes` of scripts/lib/setup.sh puts them.
    pub fn find() -> Result<Self> {
        let dir = match (env::var_os("WEFT_KUBERNETES_DIR"), env::var_os("WEFT_CACHE")) {
            (Some(dir), _) => PathBuf::from(dir),
            (None, Some(cache)) => PathBuf::from(cache).join("kubernetes").join(VERSION),
            (None, None) => {
                let home = PathBuf::from(env::var_os("HOME").context("HOME is not set")?);
                home.join(".cache/weft/kubernetes").join(VERSION)
            }
        };
        let programs = Self { dir };
        for name in [
            "kube-apiserver",
            "kube-controller-manager",
            "kube-scheduler",
            "kubelet",
            "kube-proxy",
            "kubectl",
        ] {
            ensure!(
                programs.path(name).is_file(),
                "{} is missing: `scripts/test kube` and `scripts/lab up --kubernetes` build it; WEFT_KUBERNETES_DIR names another place",
                programs.path(name).display()
            );
        }
        Ok(programs)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::CHECKOUT;

    #[test]
    fn the_version_is_the_one_that_scripts_build() {
        let setup = std::fs::read_to_string(format!("{CHECKOUT}/scripts/lib/setup.sh")).expect("setup.sh");
        assert!(setup.contains(&format!("\nKUBERNETES={VERSION}\n")), "KUBERNETES= in scripts/lib/setup.sh");
    }
}
