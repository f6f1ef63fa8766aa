//! A plugin under test: how it is called, what its configuration looks like, and which cases it cannot have by design.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use weft_shared::Subnet;

use crate::binaries::Binaries;

/// The release of the reference plugins that the page compares with; `scripts/test` and `scripts/conform` build it.
pub const REFERENCE: &str = "v1.9.1";
/// What `go install` has put beside the programs' folder.
const TOOLS: &str = "tools/cni-plugins";

#[derive(Debug, Clone)]
pub struct Subject {
    pub name: String,
    /// In words, for the page.
    pub is: String,
    pub kind: Kind,
    /// File name of the executable.
    pub program: String,
    /// `CNI_PATH`: where it is, and where what it calls or what is chained behind it is.
    pub path: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Addresses, host ports and limits are its agent's, which the stand starts.
    Weft,
    /// Configured as the reference `bridge`: addresses by `host-local`, host ports by `portmap`, limits by `bandwidth`.
    Bridge,
}

/// What cannot be asked of a kind, by group and case.
const LACKS: [(Kind, &str, &str, &str); 3] = [
    (Kind::Bridge, "status", "agent-hangs", "has no agent"),
    (Kind::Bridge, "options", "refused", "does what these options say"),
    (Kind::Bridge, "idempotency", "del-agent-hangs", "has no agent"),
];

impl Subject {
    /// The plugin of this workspace, with the reference plugins in reach to be chained.
    pub fn weft() -> Result<Self> {
        let binaries = Binaries::find()?;
        Ok(Self {
            name: "weft".into(),
            is: "`weft` with `weftd`, of this commit".into(),
            kind: Kind::Weft,
            program: "weft".into(),
            path: vec![binaries.dir, reference_dir()?],
        })
    }

    /// `bridge` of the reference plugins.
    pub fn reference() -> Result<Self> {
        Ok(Self {
            name: "bridge".into(),
            is: format!(
                "the reference `bridge` with `host-local`, chained `portmap` and `bandwidth` where host ports and limits are \
                 asked for, {REFERENCE}"
            ),
            kind: Kind::Bridge,
            program: "bridge".into(),
            path: vec![reference_dir()?],
        })
    }

    /// An executable by path. One called `weft` needs its `weftd` beside it; any other is configured as `bridge`, and
    /// `host-local` and whatever else it calls is looked for beside it, then among the reference plugins.
    pub fn at(name: &str, path: &Path) -> Result<Self> {
        let path = path.canonicalize().with_context(|| format!("--plugin {name}={}", path.display()))?;
        ensure!(path.is_file(), "--plugin {name}={}: expected an executable", path.display());
        let program = path.file_name().and_then(|n| n.to_str()).context("a file name")?.to_owned();
        let dir = path.parent().context("a directory")?.to_owned();
        let kind = if program == "weft" { Kind::Weft } else { Kind::Bridge };
        if kind == Kind::Weft && dir != Binaries::find()?.dir {
            bail!(
                "--plugin {name}={}: set WEFT_BIN_DIR to its directory, weftd comes from there",
                path.display()
            );
        }
        let is = format!("`{program}`, by path");
        Ok(Self { name: name.into(), is, kind, program, path: vec![dir, reference_dir()?] })
    }

    /// Why a case cannot be had, if so.
    pub fn lacks(&self, group: &str, case: &str) -> Option<&'static str> {
        let found = LACKS.iter().find(|(kind, g, c, _)| (*kind, *g, *c) == (self.kind, group, case));
        found.map(|(.., why)| *why)
    }

    /// The executable that a configuration's `type` names.
    pub fn executable(&self, kind: &str) -> Result<PathBuf> {
        let found = self.path.iter().map(|dir| dir.join(kind)).find(|path| path.is_file());
        found.with_context(|| format!("no plugin {kind} in {:?}", self.path))
    }

    pub fn cni_path(&self) -> String {
        let dirs: Vec<_> = self.path.iter().map(|dir| dir.display().to_string()).collect();
        dirs.join(":")
    }

    /// The plugin's configuration, as of kube-flannel's list: a gateway, a default route, hairpin.
    pub fn config(&self, version: &str, place: &Place) -> Value {
        let mut config = json!({
            "cniVersion": version, "name": place.network, "type": self.program,
            "bridge": "cni0", "isDefaultGateway": true, "hairpinMode": true,
            "capabilities": { "ips": true, "mac": true },
        });
        match self.kind {
            Kind::Weft => config["socket"] = json!(place.socket),
            Kind::Bridge => {
                config["ipam"] = json!({
                    "type": "host-local", "ranges": [[{ "subnet": place.subnet.to_string() }]],
                    "dataDir": place.data,
                });
            }
        }
        config
    }
}

/// What a configuration needs to know of the stand.
#[derive(Debug, Clone)]
pub struct Place {
    pub network: String,
    /// Addresses come out of it, `.1` is the gateway.
    pub subnet: Subnet,
    pub socket: PathBuf,
    /// For plugins that keep files.
    pub data: PathBuf,
}

/// Where they are.
pub fn reference_dir() -> Result<PathBuf> {
    let exe = env::current_exe()?;
    let found = exe.ancestors().map(|dir| dir.join(TOOLS)).find(|dir| dir.join("bridge").is_file());
    found.with_context(|| {
        format!("the reference plugins {REFERENCE} are not in target/{TOOLS}: `scripts/test core`, `scripts/conform` and `scripts/bench cni` build them")
    })
}
