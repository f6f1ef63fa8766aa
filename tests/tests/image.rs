//! scripts/image: the archive is what the image specification says, holds the programs and nothing else, the same for
//! the same commit, and Debian's containerd starts it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::bed::Bed;
use e2e::binaries::Binaries;
use e2e::cgroups::Cgroups;
use e2e::dist::{self, CHECKOUT};
use e2e::image::{BUSYBOX, oci_image};
use e2e::machine::Machine;
use e2e::wait::{SECOND, until_ok};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

const NAME: &str = concat!("localhost/weft:", env!("CARGO_PKG_VERSION"));
const CNI: &str = "--mount type=bind,src=/opt/cni/bin,dst=/host/bin,options=rbind:rw \
                   --mount type=bind,src=/etc/cni/net.d,dst=/host/conf,options=rbind:rw";

fn unpacked(archive: &Path, bed: &Bed, name: &str) -> Result<PathBuf> {
    let dir = bed.dir(name)?;
    let status = Command::new("tar").arg("-C").arg(&dir).arg("-xf").arg(archive).status()?;
    ensure!(status.success(), "{}", archive.display());
    Ok(dir)
}

fn json(path: &Path) -> Result<Value> {
    serde_json::from_slice(&fs::read(path)?).with_context(|| path.display().to_string())
}

/// The blob that a descriptor describes: of that size, under that digest.
fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
    let digest = digest.with_context(|| format!("a digest in {descriptor}"))?;
    let path = layout.join("blobs/sha256").join(digest);
    let content = fs::read(&path)?;
    let found: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(found == digest && descriptor["size"] == content.len(), "{descriptor}");
    Ok(path)
}

/// Paths of a tar, each with mode and owner.
fn listed(tar: &Path) -> Result<BTreeMap<String, String>> {
    let output = Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(tar).output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let what = format!("{} {}", words.next()?, words.next()?);
        Some((words.last()?.to_owned(), what))
    };
    text.lines().map(|text| line(text).with_context(|| text.to_owned())).collect()
}

#[test]
fn the_archive_is_an_image_layout_that_holds_the_programs_alone() -> Result<()> {
    is_sound(&dist::image()?, "amd64")
}

/// Whether its programs are of that architecture scripts/image has asked them; tests/install.rs starts them.
#[test]
fn so_is_the_other_architectures() -> Result<()> {
    is_sound(&dist::foreign_image()?, "arm64")
}

/// What an operator applies and reads names the image that this version makes.
#[test]
fn manifests_and_their_page_name_this_versions_image() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    for file in ["conf/kubernetes/weft.yaml", "conf/kubernetes/uninstall.yaml", "docs/kubernetes.md"] {
        let text = fs::read_to_string(Path::new(CHECKOUT).join(file))?;
        let mut named = 0;
        for prefix in ["/weft:", "weft-image-"] {
            for rest in text.split(prefix).skip(1) {
                let follows = rest.strip_prefix(version).and_then(|rest| rest.chars().next());
                let ends = follows.is_some_and(|c| c.is_whitespace() || ",`)-".contains(c));
                ensure!(
                    ends,
                    "{file}: {prefix}{}: expected version {version}",
                    rest.lines().next().unwrap_or("")
                );
                named += 1;
            }
        }
        ensure!(named >= 2, "{file} names the image {named} times");
    }
    Ok(())
}

fn is_sound(archive: &Path, architecture: &str) -> Result<()> {
    let bed = Bed::for_test()?;
    let layout = unpacked(archive, &bed, "layout")?;
    ensure!(json(&layout.join("oci-layout"))?["imageLayoutVersion"] == "1.0.0");
    let index = json(&layout.join("index.json"))?;
    let [entry] = &index["manifests"].as_array().context("manifests")?[..] else {
        anyhow::bail!("one manifest: {index}")
    };
    ensure!(entry["annotations"]["io.containerd.image.name"] == NAME, "{entry}");
    ensure!(
        entry["annotations"]["org.opencontainers.image.ref.name"] == env!("CARGO_PKG_VERSION"),
        "{entry}"
    );
    ensure!(entry["platform"]["architecture"] == architecture, "{entry}");
    let manifest = json(&blob(&layout, entry)?)?;
    let config_file = blob(&layout, &manifest["config"])?;
    let config = json(&config_file)?;
    ensure!(config["architecture"] == architecture && config["os"] == "linux", "{config}");
    ensure!(config["config"]["Entrypoint"] == serde_json::json!(["/usr/bin/weftd"]), "{config}");
    let layer = blob(&layout, &manifest["layers"][0])?;
    ensure!(config["rootfs"]["diff_ids"][0] == manifest["layers"][0]["digest"], "{config}");
    let expected: BTreeMap<String, String> = [
        ("usr/", "drwxr-xr-x 0/0"),
        ("usr/bin/", "drwxr-xr-x 0/0"),
        ("usr/bin/weft", "-rwxr-xr-x 0/0"),
        ("usr/bin/weftctl", "-rwxr-xr-x 0/0"),
        ("usr/bin/weftd", "-rwxr-xr-x 0/0"),
        ("usr/share/", "drwxr-xr-x 0/0"),
        ("usr/share/doc/", "drwxr-xr-x 0/0"),
        ("usr/share/doc/weft/", "drwxr-xr-x 0/0"),
        ("usr/share/doc/weft/LICENSE", "-rw-r--r-- 0/0"),
    ]
    .into_iter()
    .map(|(path, what)| (path.to_owned(), what.to_owned()))
    .collect();
    ensure!(listed(&layer)? == expected, "{:?}", listed(&layer)?);
    // For those who load what docker saves.
    let saved = &json(&layout.join("manifest.json"))?[0];
    ensure!(
        saved["RepoTags"][0] == NAME
            && layout.join(saved["Config"].as_str().unwrap_or_default()) == config_file
    );
    ensure!(layout.join(saved["Layers"][0].as_str().unwrap_or_default()) == layer, "{saved}");
    Ok(())
}

#[test]
fn the_same_programs_give_the_same_image_and_wrong_ones_none() -> Result<()> {
    let bed = Bed::for_test()?;
    let programs = Binaries::find()?.dir;
    let first = dist::pack_image("x86_64", &programs, &bed.dir("first")?)?;
    let second = dist::pack_image("x86_64", &programs, &bed.dir("second")?)?;
    ensure!(fs::read(&first)? == fs::read(&second)?, "two runs differ");
    let sum = fs::read_to_string(format!("{}.sha256", second.display()))?;
    let content: String =
        Sha256::digest(fs::read(&second)?).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(sum.split_whitespace().next() == Some(&content), "{sum}");
    let wrong = dist::pack_image("aarch64", &programs, &bed.dir("wrong")?).expect_err("another architecture");
    ensure!(format!("{wrong:#}").contains("is no program for aarch64"), "{wrong:#}");
    let output = Command::new(Path::new(CHECKOUT).join("scripts/image")).args(["--arch", "mips"]).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains("--arch 'mips': expected x86_64 or aarch64"), "{text}");
    Ok(())
}

/// One host, by containerd's own client: the programs start, and install-cni leaves what scripts/install leaves.
#[test]
fn containerd_starts_it_and_its_install_is_that_of_the_installer() -> Result<()> {
    let cgroups = Cgroups::of(["default/run"]);
    let bed = Bed::for_test()?;
    oci_image(&bed.dir("image")?, &[BUSYBOX])?;
    let machine = Machine::start(&bed.netns("host")?, &bed.dir("host")?, "host")?;
    machine.copy(&bed.root().join("image/image.tar"), "/root/image.tar")?;
    machine.copy(&dist::image()?, "/root/weft-image.tar")?;
    machine.copy(&dist::Dist::native()?.tarball, "/root/weft.tar.gz")?;
    machine.sh("systemctl start containerd")?;
    until_ok("containerd to serve", SECOND * 60, || machine.sh("ctr version"))?;
    machine.sh("ctr images import weft-image.tar")?;
    let imported = machine.sh("ctr images ls -q")?;
    ensure!(imported.contains(NAME), "{imported}");
    let run = |options: &str, command: &str| {
        machine.sh(&format!("ctr run --rm --net-host --read-only {options} {NAME} run {command}"))
    };
    for (program, version) in [("weftd", "weftd"), ("weftctl", "weftctl")] {
        let text = run("", &format!("/usr/bin/{program} --version"))?;
        ensure!(text == format!("{version} {}\n", env!("CARGO_PKG_VERSION")), "{text}");
    }

    machine.sh("mkdir -p /opt/cni/bin /etc/cni/net.d; chown 1001 /opt/cni/bin")?;
    let install = "/usr/bin/weftctl install-cni --bin-dir=/host/bin --conf-dir=/host/conf";
    let text = run(CNI, install)?;
    for line in [
        "installed  /host/bin/weft\n",
        "linked     /host/bin/loopback to weft\n",
        "installed  /host/conf/10-weft.conflist\n",
    ] {
        ensure!(text.contains(line), "{line:?}: {text}");
    }
    machine.sh("CNI_COMMAND=VERSION /opt/cni/bin/weft && CNI_COMMAND=VERSION /opt/cni/bin/loopback")?;
    // The installer finds everything as it would have put it.
    let text = machine
        .sh("tar xzf weft.tar.gz; weft-*/install --cni-bin-dir /opt/cni/bin --cni-conf-dir /etc/cni/net.d")?;
    for line in [
        "unchanged  /opt/cni/bin/weft\n",
        "unchanged  /opt/cni/bin/loopback\n",
        "unchanged  /etc/cni/net.d/10-weft.conflist\n",
    ] {
        ensure!(text.contains(line), "{line:?}: {text}");
    }
    let text = run(CNI, &format!("{install} --remove"))?;
    ensure!(text.lines().count() == 3, "{text}");
    let left = machine.sh("ls -A /opt/cni/bin /etc/cni/net.d")?;
    ensure!(left == "/etc/cni/net.d:\n\n/opt/cni/bin:\n", "{left}");
    drop((machine, cgroups));
    Ok(())
}
