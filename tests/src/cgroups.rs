//! runc makes cgroups in the hierarchies of the machine that tests run on; of containers that are killed with their host
//! they stay.

use std::path::PathBuf;
use std::process::Command;

const ROOT: &str = "/sys/fs/cgroup";

/// Cgroups of a test's own, in every hierarchy, by where they lie in it: gone when the test ends.
#[derive(Debug)]
pub struct Cgroups(Vec<String>);

impl Cgroups {
    /// Such as `default/name`, with what lies below each.
    pub fn own(paths: impl IntoIterator<Item = String>) -> Self {
        Self(paths.into_iter().collect())
    }

    /// What is there of them now, deepest first.
    fn left(&self) -> Vec<PathBuf> {
        let mut find = Command::new("find");
        find.args([ROOT, "-depth", "-type", "d", "("]);
        for (n, path) in self.0.iter().enumerate() {
            find.args(if n == 0 { &[][..] } else { &["-o"] });
            find.args(["-path", &format!("{ROOT}/*/{path}"), "-o", "-path", &format!("{ROOT}/*/{path}/*")]);
        }
        let found = find.arg(")").output().map(|output| output.stdout).unwrap_or_default();
        String::from_utf8_lossy(&found).lines().map(PathBuf::from).collect()
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for path in self.left() {
            // One that lives cannot be removed.
            let _ = std::fs::remove_dir(path);
        }
    }
}
