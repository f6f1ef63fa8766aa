//! Debian's containerd on a machine, with the config.toml of its package: not a byte of it is changed. What a test
//! machine cannot give is kept from runc instead, behind containerd's back.

use anyhow::{Result, ensure};

use crate::machine::Machine;
use crate::wait::{SECOND, until_ok};

const CONFIG: &str = "/etc/containerd/config.toml";

/// CRI gives every sandbox `oom_score_adj` -998, which only a holder of CAP_SYS_RESOURCE may set (proc(5)), and a
/// test machine that is itself a container has none. CRI's own switch for that place, `restrict_oom_score_adj`, would be
/// a change of config.toml; so the number is taken out of the bundle between containerd's shim and runc.
const RUNC: &str = r#"#!/bin/sh
previous=
for word in "$@"; do
    [ "$previous" != --bundle ] || sed -i 's/"oomScoreAdj":-[0-9]*/"oomScoreAdj":0/' "$word/config.json"
    previous=$word
done
exec /usr/sbin/runc "$@"
"#;

/// Starts it and gives it the images, for CRI and for `ctr`.
pub fn start(machine: &Machine) -> Result<()> {
    machine.put("/usr/local/sbin/runc", RUNC.as_bytes())?;
    machine.sh("chmod 755 /usr/local/sbin/runc")?;
    // As dpkg has recorded it, where the package is installed as a package.
    let checked = machine.sh(&format!("cd / && dpkg-query -W -f='${{Conffiles}}' containerd | grep -F '{CONFIG}' | awk '{{ print $2 \"  \" $1 }}' | md5sum -c"))?;
    ensure!(checked.contains(&format!("{CONFIG}: OK")), "{CONFIG} is not the package's: {checked}");
    machine.sh("systemctl start containerd")?;
    until_ok("containerd to serve", SECOND * 30, || machine.sh("ctr version"))?;
    for namespace in ["k8s.io", "default"] {
        machine.sh(&format!("ctr --namespace {namespace} images import image.tar"))?;
    }
    Ok(())
}
