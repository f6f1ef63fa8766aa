//! What scripts/dist packs, of the programs under test: made once for each test process, or taken from where
//! `WEFT_DIST_DIR` says.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::binaries::Binaries;

/// The root of the checkout.
pub const CHECKOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The packages of one architecture.
#[derive(Debug, Clone)]
pub struct Dist {
    pub arch: &'static str,
    pub tarball: PathBuf,
    pub package: PathBuf,
}

impl Dist {
    /// This machine's, of the programs that every scenario runs.
    pub fn native() -> Result<Self> {
        static MADE: OnceLock<Result<Dist, String>> = OnceLock::new();
        once(&MADE, || match env::var_os("WEFT_DIST_DIR") {
            Some(dir) => Self::packed("x86_64", "amd64", Path::new(&dir)),
            None => Self::pack("x86_64", &Binaries::find()?.dir, &folder("native")?),
        })
    }

    /// The other architecture's, which `scripts/dist --arch aarch64 --profile dev` has built.
    pub fn foreign() -> Result<Self> {
        static MADE: OnceLock<Result<Dist, String>> = OnceLock::new();
        once(&MADE, || match env::var_os("WEFT_DIST_DIR") {
            Some(dir) => Self::packed("aarch64", "arm64", Path::new(&dir)),
            None => Self::pack("aarch64", &foreign_programs()?, &folder("foreign")?),
        })
    }

    /// Packages that lie in `dir` already.
    fn packed(arch: &'static str, debian: &str, dir: &Path) -> Result<Self> {
        let version = env!("CARGO_PKG_VERSION");
        let dist = Self {
            arch,
            tarball: dir.join(format!("weft-{version}-{arch}.tar.gz")),
            package: dir.join(format!("weft_{version}_{debian}.deb")),
        };
        for file in [&dist.tarball, &dist.package] {
            ensure!(file.is_file(), "WEFT_DIST_DIR: {} is missing, scripts/dist makes it", file.display());
        }
        Ok(dist)
    }

    /// Packs the programs that lie in `programs` into `out`.
    pub fn pack(arch: &'static str, programs: &Path, out: &Path) -> Result<Self> {
        let mut command = Command::new(Path::new(CHECKOUT).join("scripts/dist"));
        command.args(["--arch", arch, "--out"]).arg(out).env("WEFT_BIN_DIR", programs).stdin(Stdio::null());
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        }
        let named = |end: &str| {
            let line = text.lines().find_map(|line| Some(line.split_once(end)?.0.to_owned() + end));
            line.map(PathBuf::from).with_context(|| format!("no {end} in {text}"))
        };
        Ok(Self { arch, tarball: named(".tar.gz")?, package: named(".deb")? })
    }

    /// The folder that the tarball holds.
    pub fn name(&self) -> String {
        let name = self.tarball.file_name().unwrap_or_default().to_string_lossy();
        name.trim_end_matches(".tar.gz").to_owned()
    }
}

/// The image of this machine's architecture, of the programs that every scenario runs.
pub fn image() -> Result<PathBuf> {
    static MADE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    once(&MADE, || image_of("x86_64", "image", || Ok(Binaries::find()?.dir)))
}

/// The other architecture's.
pub fn foreign_image() -> Result<PathBuf> {
    static MADE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    once(&MADE, || image_of("aarch64", "foreign-image", foreign_programs))
}

fn image_of(arch: &str, kind: &str, programs: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
    let image = match env::var_os("WEFT_DIST_DIR") {
        Some(dir) => PathBuf::from(dir).join(image_name(arch)),
        None => pack_image(arch, &programs()?, &folder(kind)?)?,
    };
    ensure!(image.is_file(), "WEFT_DIST_DIR: {} is missing, scripts/image makes it", image.display());
    Ok(image)
}

fn foreign_programs() -> Result<PathBuf> {
    let built = Path::new(CHECKOUT).join("target/aarch64-unknown-linux-musl/debug");
    ensure!(
        built.join("weftd").exists(),
        "{} has no weftd: build it with `scripts/dist --arch aarch64 --profile dev`",
        built.display()
    );
    Ok(built)
}

/// Packs the programs that lie in `programs` as an image into `out`.
pub fn pack_image(arch: &str, programs: &Path, out: &Path) -> Result<PathBuf> {
    let mut command = Command::new(Path::new(CHECKOUT).join("scripts/image"));
    command.args(["--arch", arch, "--out"]).arg(out).env("WEFT_BIN_DIR", programs).stdin(Stdio::null());
    let output = command.output()?;
    let text = [output.stdout, output.stderr].concat();
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&text));
    Ok(out.join(image_name(arch)))
}

fn image_name(arch: &str) -> String {
    format!("weft-image-{}-{arch}.tar", env!("CARGO_PKG_VERSION"))
}

/// The test executable's own, in cargo's folder for such things; replaced by the next run.
fn folder(kind: &str) -> Result<PathBuf> {
    let exe = env::current_exe()?;
    let dir = exe.with_file_name(format!("{}.{kind}", exe.file_name().unwrap_or_default().to_string_lossy()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn once<T: Clone>(cell: &'static OnceLock<Result<T, String>>, make: impl FnOnce() -> Result<T>) -> Result<T> {
    cell.get_or_init(|| make().map_err(|error| format!("{error:#}"))).clone().map_err(|error| anyhow!(error))
}
