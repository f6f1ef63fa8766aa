//! A container image of one static program, made here: no registry is asked.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

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

/// `image.tar` in `dir` under those names, as `ctr images import` reads it: image-spec, "OCI Image Layout".
pub fn oci_image(dir: &Path, names: &[&str]) -> Result<()> {
    root_fs(dir)?;
    let layout = dir.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let blob = |kind: &str, content: &[u8]| -> Result<Value> {
        let digest: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(blobs.join(&digest), content)?;
        let media_type = format!("application/vnd.oci.image.{kind}");
        Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() }))
    };
    let layer = blob("layer.v1.tar", &fs::read(dir.join("rootfs.tar"))?)?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"], "Cmd": ["sleep", "2147483647"] },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob("config.v1+json", config.to_string().as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer],
    });
    let manifest = blob("manifest.v1+json", manifest.to_string().as_bytes())?;
    let named = |name: &&str| {
        let mut named = manifest.clone();
        named["annotations"] = json!({ "io.containerd.image.name": name });
        named
    };
    let manifests: Vec<Value> = names.iter().map(named).collect();
    fs::write(layout.join("index.json"), json!({ "schemaVersion": 2, "manifests": manifests }).to_string())?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    tar(&layout, &dir.join("image.tar"))
}

fn tar(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("tar").arg("-C").arg(from).arg("-cf").arg(to).arg(".").status()?;
    ensure!(status.success(), "tar of {}", from.display());
    Ok(())
}
