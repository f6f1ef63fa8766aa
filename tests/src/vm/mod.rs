//! A machine of its own kernel: Debian's, under QEMU without KVM, with systemd as its first process.
//!
//! Its root is an overlay: this machine's file system by virtiofs below (nothing of it can be written), a disk image
//! above, which lasts from boot to boot. No network: what is tested here is the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::dist::CHECKOUT;
use crate::wait::{SECOND, eventually, until_ok};

/// What the first process needs before there is a root.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_blk", "virtiofs", "overlay", "ext4"];
/// Units that a test has no use for; those of the machine that the tests run on come with its root file system.
const MASKED: [&str; 8] = [
    "e2scrub_reap.service",
    "console-getty.service",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-logind.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "man-db.timer",
];
/// Where the guest finds what it was given.
const GUEST_DIR: &str = "opt/weft-vm";
const GUEST_UNIT: &str = "[Unit]\nAfter=multi-user.target\n[Service]\nExecStart=/opt/weft-vm/guest.sh\n";

#[derive(Debug)]
pub struct Vm {
    dir: PathBuf,
    /// Where Debian's linux-image package was unpacked: `boot` and `lib/modules`.
    kernel: PathBuf,
    version: String,
}

impl Vm {
    /// A new disk, on which `files` lie where the guest's script does; that runs at the end of each boot.
    pub fn create(dir: &Path, files: &[(&str, &[u8])]) -> Result<Self> {
        let kernel = Path::new(CHECKOUT).canonicalize()?.join("target/vm/kernel");
        let modules = kernel.join("lib/modules");
        let mut versions = fs::read_dir(&modules)
            .with_context(|| format!("{}: scripts/test long unpacks a kernel there", modules.display()))?;
        let version =
            versions.next().context("a kernel's modules")??.file_name().to_string_lossy().into_owned();
        let vm = Self { dir: dir.to_owned(), kernel, version };
        vm.make_disk(files)?;
        vm.make_initrd()?;
        Ok(vm)
    }

    fn make_disk(&self, files: &[(&str, &[u8])]) -> Result<()> {
        let content = self.dir.join("disk");
        let upper = content.join("upper");
        let (guest, units) = (upper.join(GUEST_DIR), upper.join("etc/systemd/system"));
        for dir in [&guest, &units.join("multi-user.target.wants"), &content.join("work")] {
            fs::create_dir_all(dir)?;
        }
        fs::write(guest.join("guest.sh"), include_bytes!("guest.sh"))?;
        run(Command::new("chmod").arg("755").arg(guest.join("guest.sh")))?;
        for (name, bytes) in files {
            fs::write(guest.join(name), bytes)?;
        }
        fs::write(units.join("weft-vm.service"), GUEST_UNIT)?;
        let link = |to: &str, from: PathBuf| std::os::unix::fs::symlink(to, from);
        link("../weft-vm.service", units.join("multi-user.target.wants/weft-vm.service"))?;
        for unit in MASKED {
            link("/dev/null", units.join(unit))?;
        }
        run(Command::new("truncate").args(["-s", "2G"]).arg(self.dir.join("disk.img")))?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&content).arg(self.dir.join("disk.img")))
    }

    fn make_initrd(&self) -> Result<()> {
        let root = self.dir.join("initrd");
        let modules = format!("lib/modules/{}", self.version);
        fs::create_dir_all(root.join("bin"))?;
        fs::create_dir_all(root.join(&modules))?;
        fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox (package busybox-static)")?;
        fs::write(root.join("init"), include_bytes!("init.sh"))?;
        run(Command::new("chmod").arg("755").arg(root.join("init")))?;
        run(Command::new("depmod").arg("-b").arg(&self.kernel).arg(&self.version))?;
        for module in MODULES {
            let mut command = Command::new("modprobe");
            command.arg("-d").arg(&self.kernel).args(["-S", &self.version, "--show-depends", module]);
            let output = command.output().context("modprobe (package kmod)")?;
            ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                let Some(file) = line.strip_prefix("insmod ") else { continue };
                let file = Path::new(file.trim());
                let target = root.join(file.strip_prefix(&self.kernel)?);
                fs::create_dir_all(target.parent().context("a folder")?)?;
                fs::copy(file, target)?;
            }
        }
        for file in ["modules.order", "modules.builtin"] {
            fs::copy(self.kernel.join(&modules).join(file), root.join(&modules).join(file))?;
        }
        run(Command::new("depmod").arg("-b").arg(&root).arg(&self.version))?;
        let archive = format!("cd '{}' && find . | cpio -o -H newc --quiet >../initrd.img", root.display());
        run(Command::new("sh").args(["-c", &archive]))
    }

    /// From power-on to power-off; what its console says. Takes seconds to minutes: every instruction is emulated.
    pub fn boot(&self, limit: Duration) -> Result<String> {
        let (socket, console) = (self.dir.join("virtiofs.sock"), self.dir.join("console"));
        let _ = fs::remove_file(&socket);
        let _ = fs::remove_file(&console);
        // virtiofsd keeps a descriptor for each file that the guest knows, and would raise the limit further than it may.
        let mut virtiofsd = Command::new("sh");
        virtiofsd.args(["-c", r#"ulimit -n "$(ulimit -Hn)" && exec "$0" "$@""#, "/usr/lib/qemu/virtiofsd"]);
        virtiofsd.arg(format!("--socket-path={}", socket.display())).arg("--rlimit-nofile=0");
        virtiofsd.args([
            "-o",
            "source=/",
            "-o",
            "cache=auto",
            "-o",
            "no_readdirplus",
            "-o",
            "sandbox=chroot",
        ]);
        virtiofsd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let _share = Running(virtiofsd.spawn().context("virtiofsd (package qemu-system-common)")?);
        eventually("virtiofsd to listen", SECOND * 60, || Ok(socket.exists()))?;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "qemu64", "-smp", "2", "-m", "1024"]);
        // virtiofs works by memory that both see.
        qemu.args(["-M", "q35,memory-backend=mem"]);
        qemu.args(["-object", "memory-backend-memfd,id=mem,size=1024M,share=on"]);
        qemu.arg("-chardev").arg(format!("socket,id=share,path={}", socket.display()));
        qemu.args(["-device", "vhost-user-fs-pci,chardev=share,tag=share"]);
        qemu.arg("-drive").arg(format!("file={},if=virtio,format=raw", self.dir.join("disk.img").display()));
        qemu.arg("-kernel").arg(self.kernel.join(format!("boot/vmlinuz-{}", self.version)));
        qemu.arg("-initrd").arg(self.dir.join("initrd.img"));
        qemu.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 systemd.unit=multi-user.target systemd.show_status=false weft.modules={}",
            self.kernel.join("lib/modules").display()
        ));
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.args(["-nic", "none", "-display", "none", "-monitor", "none", "-no-reboot"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::null());
        let mut machine = Running(qemu.spawn().context("qemu-system-x86_64 (package qemu-system-x86)")?);
        let said = || String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
        until_ok("the machine to power off", limit, || machine.0.try_wait()?.context("it still runs"))
            .with_context(said)?;
        Ok(said())
    }
}

/// Ends with whoever started it.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{:?}", command.get_program()))?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr))
}
