//! weft under a systemd that is the first process of a machine: the package, the unit's promises, five minutes without
//! etcd, a reboot, purge; the tarball's install. What is asked for stands in tests/src/vm/guest.sh.

use std::fs;

use anyhow::{Result, ensure};
use e2e::bed::Bed;
use e2e::dist::Dist;
use e2e::report;
use e2e::vm::Vm;
use e2e::wait::SECOND;

const WITHOUT_ETCD: &[u8] = b"away=300\n";

#[test]
fn under_systemd_nothing_is_lost_and_nothing_waits() -> Result<()> {
    let bed = Bed::for_test()?;
    let package = fs::read(Dist::native()?.package)?;
    let vm = Vm::create(&bed.dir("vm")?, &[("weft.deb", &package), ("settings", WITHOUT_ETCD)])?;
    stage(&vm, 1)?;
    stage(&vm, 2)
}

#[test]
fn the_tarballs_install_asks_systemd_and_leaves_nothing() -> Result<()> {
    let bed = Bed::for_test()?;
    let tarball = fs::read(Dist::native()?.tarball)?;
    let files: [(&str, &[u8]); 3] = [("weft.tar.gz", &tarball), ("settings", WITHOUT_ETCD), ("stage", b"3")];
    stage(&Vm::create(&bed.dir("vm")?, &files)?, 3)
}

fn stage(vm: &Vm, number: u8) -> Result<()> {
    let console = vm.boot(SECOND * 900)?;
    for line in console.lines().filter(|line| line.starts_with("ok ")) {
        report::figure(line.trim_end());
    }
    ensure!(console.contains(&format!("VM stage {number}: passed")), "{console}");
    Ok(())
}
