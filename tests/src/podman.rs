//! Debian's podman on a machine, with its CNI backend. It is installed there alone: its package brings a network
//! configuration, and other tests' machines see what this one has.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::dist::CHECKOUT;
use crate::fleet::Host;

pub const IMAGE: &str = "localhost/busybox";
/// What containers(5) are told: the plugins, and, for a test machine that is itself a container, no limit that would have to
/// be raised. The rest is as the package has it.
const SETTINGS: &str = r#"
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/usr/lib/cni"]
"#;

impl Host {
    /// podman with an image; weft's list comes before the one that podman's package brings.
    pub fn podman(&self) -> Result<()> {
        self.cgroups.add("libpod_parent/*".to_owned());
        for package in packages()? {
            let name = package.file_name().context("a file")?.to_string_lossy().into_owned();
            self.machine.copy(&package, &format!("/root/{name}"))?;
        }
        // An overlay cannot be the upper layer of another.
        self.machine
            .sh("mkdir -p /var/lib/containers; mount -t tmpfs none /var/lib/containers; dpkg -i ./*.deb")?;
        self.machine.put("/etc/containers/containers.conf", SETTINGS.as_bytes())?;
        self.machine.sh(&format!("podman import rootfs.tar {IMAGE}")).map(drop)
    }
}

/// As scripts/test has fetched them.
fn packages() -> Result<Vec<PathBuf>> {
    let dir = Path::new(CHECKOUT).join("target/podman");
    let entries =
        fs::read_dir(&dir).with_context(|| format!("{}: scripts/test runtimes fetches it", dir.display()))?;
    let files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(files.into_iter().filter(|file| file.extension().is_some_and(|end| end == "deb")).collect())
}
