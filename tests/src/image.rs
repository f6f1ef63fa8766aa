//! A container image of one static program, made here: no registry is asked.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::dist::CHECKOUT;

/// What docs/install.md and scenarios call it.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// The same image under the name that containerd 1.6 looks up for a pod's first container; without a command of its own
/// it sleeps.
pub const NAMES: [&str; 2] = [BUSYBOX, "registry.k8s.io/pause:3.6"];

/// `rootfs.tar` in `dir`: busybox (package busybox-static) under the names of what scenarios call.
pub fn root_fs(dir: &Path) -> Result<()> {
    let root = dir.join("rootfs");
    for name in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox (package busybox-static)")?;
    for name in ["sh", "sleep", "ping", "wget", "httpd", "cat", "ip", "sha256sum"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    tar(&root, &dir.join("rootfs.tar"))
}

/// `image.tar` in `dir` under those names, made as scripts/image makes weft's.
pub fn oci_image(dir: &Path, names: &[&str]) -> Result<()> {
    root_fs(dir)?;
    let output = Command::new(Path::new(CHECKOUT).join("scripts/lib/oci-archive"))
        .arg(dir.join("rootfs"))
        .arg(dir.join("image.tar"))
        .args(["amd64", r#"{"Env":["PATH=/bin"],"Cmd":["sleep","2147483647"]}"#])
        .args(names)
        .output()?;
    ensure!(output.status.success(), "oci-archive: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn tar(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("tar").arg("-C").arg(from).arg("-cf").arg(to).arg(".").status()?;
    ensure!(status.success(), "tar of {}", from.display());
    Ok(())
}
