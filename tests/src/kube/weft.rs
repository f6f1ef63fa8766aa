//! weft as a user installs it in a cluster: the image that scripts/image makes, the manifest by `kubectl apply`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Kube, KubeNode, RunningPod};
use crate::binaries::Binaries;
use crate::cluster::Backend;
use crate::dist::CHECKOUT;

pub const NAMESPACE: &str = "kube-weft";
pub const DAEMON_SET: &str = "daemonset/weft";
pub const LABEL: &str = "app=weft";
/// Of the agent on every node, which it shares with its pod.
pub const SOCKET: &str = "/run/weft/admin.sock";
const MANIFEST: &str = "conf/kubernetes/weft.yaml";
const VXLAN: &str = r#""Type": "vxlan""#;

#[derive(Debug)]
pub struct Weft {
    images: Vec<PathBuf>,
    manifest: String,
}

impl Weft {
    /// Packs the image of these programs into `dir`. The manifest is changed in the backend's name alone.
    pub fn prepare(binaries: &Binaries, dir: &Path, backend: Backend) -> Result<Self> {
        let mut command = Command::new(format!("{CHECKOUT}/scripts/image"));
        command.arg("--out").arg(dir).env("WEFT_BIN_DIR", &binaries.dir);
        // The folder is of whoever runs this.
        command.env_remove("SUDO_USER").stdin(Stdio::null());
        let output = command.output().context("scripts/image")?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
        }
        let archives = fs::read_dir(dir)?.map(|entry| Ok(entry?.path()));
        let mut images: Vec<PathBuf> = archives.collect::<Result<_>>()?;
        images.retain(|path| path.extension().is_some_and(|end| end == "tar"));
        ensure!(images.len() == 1, "scripts/image made {images:?}");
        let manifest = fs::read_to_string(format!("{CHECKOUT}/{MANIFEST}"))?;
        ensure!(manifest.matches(VXLAN).count() == 1, "{MANIFEST} says {VXLAN} once");
        let manifest = manifest.replace(VXLAN, &format!(r#""Type": "{}""#, backend.kind()));
        Ok(Self { images, manifest })
    }

    /// What every node has to have.
    pub fn images(&self) -> &[PathBuf] {
        &self.images
    }

    /// Returns when the agent runs on every node, and every node is Ready.
    pub fn install(&self, kube: &Kube) -> Result<()> {
        kube.apply(&self.manifest)?;
        kube.wait_nodes_ready()?;
        agents(kube).map(drop)
    }
}

/// The pods of the DaemonSet, one on every node and ready.
pub fn agents(kube: &Kube) -> Result<Vec<RunningPod>> {
    kube.wait_pods(NAMESPACE, LABEL, kube.nodes.len())
}

pub fn agent_on(kube: &Kube, node: &str) -> Result<RunningPod> {
    let pods = agents(kube)?;
    pods.into_iter().find(|pod| pod.node == node).with_context(|| format!("no agent on {node}"))
}

/// What weftctl says of the agent on a node.
pub fn ctl(node: &KubeNode, args: &[&str]) -> Result<String> {
    ctl_at(&Binaries::find()?, &node.machine.path(SOCKET), args)
}

pub fn ctl_at(binaries: &Binaries, socket: &Path, args: &[&str]) -> Result<String> {
    let mut command = Command::new(binaries.ctl());
    let output = command.arg("--socket").arg(socket).args(args).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How many pods the agent has on record.
pub fn addresses(node: &KubeNode) -> Result<usize> {
    let pods: serde_json::Value = serde_json::from_str(&ctl(node, &["pods", "--json"])?)?;
    Ok(pods.as_array().context("a list of pods")?.len())
}
