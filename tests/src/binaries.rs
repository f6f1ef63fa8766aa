//! Where the programs under test are: beside the test executable, or where `WEFT_BIN_DIR` says.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    pub dir: PathBuf,
}

impl Binaries {
    /// Cargo puts a test executable into `<profile>/deps` and the programs into `<profile>`.
    pub fn find() -> Result<Self> {
        let dir = match env::var_os("WEFT_BIN_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => {
                let exe = env::current_exe().context("where this executable is")?;
                let dir = exe.parent().context("directory of this executable")?;
                if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() }
            }
        };
        let dir = dir.canonicalize().with_context(|| format!("directory {}", dir.display()))?;
        for name in ["weftd", "weftctl", "weft"] {
            if !dir.join(name).is_file() {
                bail!(
                    "{} is missing: build it with `cargo build -p weft-agent -p weft-cni --bins`, \
                     or set WEFT_BIN_DIR to the directory that holds weftd, weftctl and weft",
                    dir.join(name).display()
                );
            }
        }
        Ok(Self { dir })
    }

    pub fn agent(&self) -> PathBuf {
        self.dir.join("weftd")
    }

    pub fn ctl(&self) -> PathBuf {
        self.dir.join("weftctl")
    }

    pub fn plugin(&self) -> PathBuf {
        self.dir.join("weft")
    }
}

/// Fails, naming the package, unless every tool can be started.
pub fn require_tools(tools: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<String> = tools
        .iter()
        .filter(|(tool, _)| Command::new(tool).arg("--help").output().is_err())
        .map(|(tool, package)| format!("{tool} (package {package})"))
        .collect();
    if missing.is_empty() { Ok(()) } else { bail!("missing tools: {}", missing.join(", ")) }
}
