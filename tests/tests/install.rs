//! scripts/dist and scripts/install: what is packed starts on both architectures; a host without compiler and checkout
//! has weft after one command, twice is once, nothing of another network is touched unasked, and removal leaves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use e2e::bed::Bed;
use e2e::binaries::Binaries;
use e2e::dist::{CHECKOUT, Dist};
use e2e::machine::Machine;
use inotify::{EventMask, Inotify, WatchMask};

const CONF_DIR: &str = "/etc/cni/net.d";
const CONFLIST: &str = "/etc/cni/net.d/10-weft.conflist";
const OTHER: &str = r#"{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"bridge"}]}"#;

/// One host, with the tarball unpacked in `/root` and what the packages of this machine bring: Debian's containerd.
fn with_host(body: impl FnOnce(&Machine, &str) -> Result<()>) -> Result<()> {
    let bed = Bed::for_test()?;
    let dist = Dist::native()?;
    let machine = Machine::start(&bed.netns("host")?, &bed.dir("host")?, "host")?;
    machine.copy(&dist.tarball, "/root/weft.tar.gz")?;
    machine.copy(&dist.package, "/root/weft.deb")?;
    machine.sh("tar xzf weft.tar.gz")?;
    body(&machine, &format!("/root/{}", dist.name()))
}

/// Every path of the machine's that an installation could change, with what it is.
fn files(machine: &Machine) -> Result<BTreeMap<String, String>> {
    let found = machine.sh(
        "find /etc /opt /usr/local /usr/lib/cni /usr/lib/systemd /usr/bin /usr/sbin /usr/share/doc /usr/share/weft /run /var/lib \
         -path /run/machine-is-up -prune -o -path /run/systemctl -prune -o -path '/var/lib/dpkg' -prune -o \
         -path /var/lib/containerd -prune -o -printf '%p\\t%y %m %l %i %T@ %s\\n' 2>/dev/null || true",
    )?;
    // Not of weft's making: what systemctl and mount leave, and a directory that every Debian has and an image may lack.
    let ignored =
        |path: &str| path.starts_with("/run/systemd") || path == "/run/mount" || path == "/var/lib/misc";
    let line = |line: &str| {
        let (path, what) = line.split_once('\t').filter(|(path, _)| !ignored(path))?;
        // A directory's inode and time change with what comes and goes in it, and with its first change in an overlay.
        Some((path.to_owned(), if what.starts_with('d') { "d".to_owned() } else { what.to_owned() }))
    };
    Ok(found.lines().filter_map(line).collect())
}

fn difference(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> BTreeSet<String> {
    let all: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    all.into_iter().filter(|path| before.get(*path) != after.get(*path)).cloned().collect()
}

fn run(program: &Path, qemu: Option<&str>, args: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = match qemu {
        Some(qemu) => Command::new(qemu),
        None => Command::new(program),
    };
    if qemu.is_some() {
        command.arg(program);
    }
    let output =
        command.args(args).env_clear().env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
}

fn starts(dist: &Dist, qemu: Option<&str>) -> Result<()> {
    let bed = Bed::for_test()?;
    let unpacked = Command::new("tar").arg("xzf").arg(&dist.tarball).arg("-C").arg(bed.root()).status()?;
    ensure!(unpacked.success());
    let dir = bed.root().join(dist.name());
    let sums = Command::new("sha256sum").args(["--quiet", "-c", "SHA256SUMS"]).current_dir(&dir).status()?;
    ensure!(sums.success());
    let program = |name: &str| dir.join("bin").join(name);
    let (status, text) = run(&program("weft"), qemu, &[])?;
    ensure!(status == Some(0) && text.contains("\"supportedVersions\"") && text.contains("1.1.0"), "{text}");
    for name in ["weftd", "weftctl"] {
        let (status, text) = run(&program(name), qemu, &["--help"])?;
        ensure!(status == Some(0) && text.contains("Usage"), "{name}: {status:?} {text}");
        let (status, text) = run(&program(name), qemu, &["--version"])?;
        ensure!(status == Some(0) && text.contains(env!("CARGO_PKG_VERSION")), "{name}: {status:?} {text}");
    }
    let (status, text) = run(&program("weftd"), qemu, &["-subnet-lease-renew-margin", "0"])?;
    ensure!(status == Some(2) && text.contains("expected minutes from 1 to 1439"), "{status:?} {text}");
    for file in [
        "install",
        "docs/install.md",
        "conf/weftd.service",
        "conf/weftd.env",
        "conf/10-weft.conflist",
        "conf/kubernetes/weft.yaml",
        "conf/kubernetes/uninstall.yaml",
        "LICENSE",
    ] {
        ensure!(dir.join(file).is_file(), "{file} is not packed");
    }
    let dead = dead_links(&dir)?;
    ensure!(dead.is_empty(), "pages lead to what is not packed: {dead:?}");
    Ok(())
}

/// Relative links of every page below `dir` that lead nowhere.
fn dead_links(dir: &Path) -> Result<Vec<String>> {
    let mut dead = Vec::new();
    let mut pages = 0;
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            pages += 1;
            for after in fs::read_to_string(&path)?.split("](").skip(1) {
                let target = after.split([')', '#', ' ']).next().unwrap_or_default();
                let is_elsewhere = target.is_empty() || target.contains("://");
                if !is_elsewhere && !folder.join(target).exists() {
                    dead.push(format!("{}: {target}", path.display()));
                }
            }
        }
    }
    ensure!(pages > 4, "only {pages} pages are packed");
    Ok(dead)
}

#[test]
fn the_programs_of_this_architecture_start() -> Result<()> {
    starts(&Dist::native()?, None)
}

#[test]
fn the_programs_of_the_other_architecture_start() -> Result<()> {
    starts(&Dist::foreign()?, Some("qemu-aarch64-static"))
}

#[test]
fn the_same_programs_give_the_same_packages_and_wrong_ones_are_refused() -> Result<()> {
    let bed = Bed::for_test()?;
    let first = Dist::native()?;
    let second = Dist::pack("x86_64", &Binaries::find()?.dir, &bed.dir("again")?)?;
    for (a, b) in [(&first.tarball, &second.tarball), (&first.package, &second.package)] {
        ensure!(fs::read(a)? == fs::read(b)?, "{} and {} differ", a.display(), b.display());
        let sum = fs::read_to_string(format!("{}.sha256", b.display()))?;
        let name = b.file_name().context("a file")?.to_string_lossy().into_owned();
        ensure!(sum.trim_end().ends_with(&name) && sum.len() == 64 + 2 + name.len() + 1, "{sum}");
    }
    let wrong = Dist::pack("aarch64", &Binaries::find()?.dir, &bed.dir("wrong")?).map(|_| ());
    let error = format!("{:#}", wrong.expect_err("programs of another architecture"));
    ensure!(error.contains("is no program for aarch64"), "{error}");
    let dynamic = bed.dir("dynamic")?;
    for name in ["weft", "weftd", "weftctl"] {
        fs::copy("/bin/true", dynamic.join(name))?;
    }
    let error =
        format!("{:#}", Dist::pack("x86_64", &dynamic, &bed.dir("wrong")?).map(|_| ()).expect_err("dynamic"));
    ensure!(error.contains("is not static"), "{error}");
    for (args, expected) in [
        (&["--arch", "mips"][..], "--arch 'mips': expected x86_64 or aarch64"),
        (&["--profile=fast"], "--profile 'fast': expected release or dev"),
        (&["--arch"], "--arch needs a value"),
        (&["--nonsense"], "unknown argument '--nonsense'"),
    ] {
        let output = Command::new(Path::new(CHECKOUT).join("scripts/dist")).args(args).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && text.contains(expected), "{args:?}: {text}");
    }
    Ok(())
}

#[test]
fn one_command_installs_for_debians_containerd_and_the_second_changes_nothing() -> Result<()> {
    with_host(|host, dir| {
        let before = files(host)?;
        let text = host.sh(&format!("{dir}/install"))?;
        let changed = difference(&before, &files(host)?);
        let expected = [
            "/etc/cni/net.d/10-weft.conflist",
            "/etc/systemd/system/multi-user.target.wants/weftd.service",
            "/etc/systemd/system/weftd.service",
            "/etc/weft/weftd.env",
            "/usr/lib/cni/weft",
            "/usr/local/bin/weftctl",
            "/usr/local/bin/weftd",
            "/usr/local/share/doc/weft/install.md",
        ];
        for path in expected {
            ensure!(
                changed.contains(path) && text.contains(path.rsplit('/').next().unwrap_or(path)),
                "{path}: {text}"
            );
        }
        let own = |path: &&String| !expected.contains(&path.as_str());
        let rest: Vec<&String> = changed.iter().filter(own).collect();
        let folders =
            ["/etc/cni", CONF_DIR, "/etc/weft", "/usr/local/share/doc", "/usr/local/share/doc/weft"];
        let ledger = ["/usr/local/share/weft", "/usr/local/share/weft/installed"];
        let unexplained: Vec<_> =
            rest.iter().filter(|p| !folders.contains(&p.as_str()) && !ledger.contains(&p.as_str())).collect();
        ensure!(unexplained.is_empty(), "also changed: {unexplained:?}");
        ensure!(
            text.contains("containerd: plugins in /usr/lib/cni, configuration in /etc/cni/net.d"),
            "{text}"
        );
        host.sh("test $(stat -c %a /etc/weft/weftd.env) = 600 && weftctl --version && CNI_COMMAND=VERSION /usr/lib/cni/weft")?;

        let installed = files(host)?;
        let text = host.sh(&format!("{dir}/install"))?;
        ensure!(text.ends_with("Nothing to do.\n"), "{text}");
        ensure!(
            difference(&installed, &files(host)?).is_empty(),
            "{:?}",
            difference(&installed, &files(host)?)
        );

        // Settings are the operator's; programs are replaced.
        host.sh("echo FLANNELD_ETCD_ENDPOINTS=http://192.0.2.1:2379 >>/etc/weft/weftd.env; echo >/usr/local/bin/weftd")?;
        let text = host.sh(&format!("{dir}/install"))?;
        ensure!(
            text.contains("kept       /etc/weft/weftd.env")
                && text.contains("replaced   /usr/local/bin/weftd"),
            "{text}"
        );
        ensure!(host.read("/etc/weft/weftd.env")?.contains("192.0.2.1"));
        host.sh("weftd --version")?;

        let text = host.sh(&format!("{dir}/install --remove --purge"))?;
        ensure!(
            difference(&before, &files(host)?).iter().all(|path| [
                "/etc/cni",
                CONF_DIR,
                "/usr/local/share/doc"
            ]
            .contains(&path.as_str())),
            "{text}{:?}",
            difference(&before, &files(host)?)
        );
        let text = host.sh(&format!("{dir}/install --remove"))?;
        ensure!(text.starts_with("Nothing to do"), "{text}");
        Ok(())
    })
}

/// containerd reloads on a rename out of a name in the same folder, and ignores what is created or moved in.
#[test]
fn the_conflist_appears_at_once_and_as_containerd_notices_it() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("mkdir -p {CONF_DIR}"))?;
        let mut inotify = Inotify::init()?;
        inotify.watches().add(host.path(CONF_DIR), WatchMask::ALL_EVENTS)?;
        host.sh(&format!("{dir}/install"))?;
        let mut buffer = [0; 4096];
        let mut seen = Vec::new();
        for event in inotify.read_events(&mut buffer)? {
            seen.push((event.mask, event.name.unwrap_or_default().to_string_lossy().into_owned()));
        }
        let ours =
            |mask: EventMask| seen.iter().any(|(m, name)| m.contains(mask) && name == "10-weft.conflist");
        ensure!(
            ours(EventMask::MOVED_TO) && !ours(EventMask::MODIFY) && !ours(EventMask::CREATE),
            "{seen:?}"
        );
        let (_, temporary) =
            seen.iter().find(|(m, _)| m.contains(EventMask::MOVED_FROM)).context("no rename within")?;
        // Not a name that a runtime would load half written.
        ensure!([".conf", ".conflist", ".json"].iter().all(|end| !temporary.ends_with(end)), "{temporary}");
        Ok(())
    })
}

#[test]
fn another_network_is_left_alone_unless_asked_and_put_back_afterwards() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("mkdir -p {CONF_DIR}"))?;
        host.put(&format!("{CONF_DIR}/05-first.conflist"), OTHER.as_bytes())?;
        host.put(&format!("{CONF_DIR}/20-later.conf"), OTHER.as_bytes())?;
        let text = host.refused(&format!("{dir}/install"))?;
        ensure!(
            text.contains("WITHHELD")
                && text.contains("which would be 05-first.conflist")
                && text.contains("NOT complete"),
            "{text}"
        );
        ensure!(!host.exists(CONFLIST) && host.exists("/usr/local/bin/weftd"));
        host.sh(&format!("mv {CONF_DIR}/05-first.conflist {CONF_DIR}/06-first.weft-no"))?;
        let text = host.refused(&format!("{dir}/install"))?;
        ensure!(text.contains("which would be 10-weft.conflist"), "{text}");
        ensure!(!host.exists(CONFLIST), "it would have taken over");
        host.sh(&format!("mv {CONF_DIR}/06-first.weft-no {CONF_DIR}/05-first.conflist"))?;

        let text = host.sh(&format!("{dir}/install --take-over"))?;
        ensure!(text.contains("put away") && host.exists(CONFLIST), "{text}");
        ensure!(
            !host.exists("/etc/cni/net.d/05-first.conflist") && host.exists("/etc/cni/net.d/20-later.conf")
        );
        // Somebody brings it back: that is said, and not undone.
        host.put(&format!("{CONF_DIR}/01-newer.json"), OTHER.as_bytes())?;
        let text = host.sh(&format!("{dir}/install"))?;
        ensure!(
            text.contains("WARNING") && text.contains("01-newer.json comes before 10-weft.conflist"),
            "{text}"
        );
        let text = host.sh(&format!("{dir}/install --remove"))?;
        ensure!(host.read("/etc/cni/net.d/05-first.conflist")? == OTHER && !host.exists(CONFLIST), "{text}");
        ensure!(host.exists("/etc/weft/weftd.env") && text.contains("--purge"), "{text}");
        Ok(())
    })
}

#[test]
fn loopback_is_linked_where_none_is_and_only_that_link_goes() -> Result<()> {
    const LOOPBACK: &str = "/usr/lib/cni/loopback";
    with_host(|host, dir| {
        let (install, remove) = (format!("{dir}/install"), format!("{dir}/install --remove"));
        let linked = format!("linked     {LOOPBACK} to weft");
        host.sh(&format!("ln -sf /nowhere/loopback {LOOPBACK}"))?;
        let text = host.sh(&install)?;
        ensure!(text.contains(&format!("WARNING    {LOOPBACK} leads nowhere")), "{text}");
        ensure!(host.sh(&format!("readlink {LOOPBACK}"))? == "/nowhere/loopback\n");
        let text = host.sh(&format!("rm {LOOPBACK}; {install}"))?;
        ensure!(text.contains(&linked), "{text}");
        for name in ["weft", "loopback"] {
            let text = host.sh(&format!("CNI_COMMAND=VERSION /usr/lib/cni/{name}"))?;
            ensure!(text.contains("\"0.3.1\""), "{name}: {text}");
        }
        let installed = files(host)?;
        let text = host.sh(&install)?;
        ensure!(text.contains("Nothing to do.") && files(host)?[LOOPBACK] == installed[LOOPBACK], "{text}");

        // Another package has put its own in place of the link: it stays.
        let text = host.sh(&format!("rm {LOOPBACK}; echo later >{LOOPBACK}; {install}; {remove}"))?;
        ensure!(host.read(LOOPBACK)? == "later\n" && !host.exists("/usr/lib/cni/weft"), "{text}");
        let text = host.sh(&format!("rm {LOOPBACK}; {install}; {remove} --purge"))?;
        ensure!(text.contains(&linked) && !host.exists(LOOPBACK), "{text}");

        let text = host.sh("dpkg -i weft.deb 2>&1")?;
        ensure!(text.contains(&linked), "{text}");
        let text = host.sh("dpkg -r weft 2>&1")?;
        ensure!(!host.exists(LOOPBACK), "{text}");
        Ok(())
    })
}

#[test]
fn the_runtimes_folders_are_found() -> Result<()> {
    with_host(|host, dir| {
        // A stock containerd: what it does not set, it knows by itself.
        host.put("/etc/containerd/config.toml", b"version = 2\n")?;
        let text = host.sh(&format!("{dir}/install"))?;
        ensure!(
            text.contains("containerd: plugins in /opt/cni/bin, configuration in /etc/cni/net.d"),
            "{text}"
        );
        ensure!(host.exists("/opt/cni/bin/weft") && host.exists(CONFLIST), "{text}");
        host.sh(&format!("{dir}/install --remove --purge && rm -r /opt/cni /etc/cni && rm /usr/bin/containerd /etc/containerd/config.toml"))?;

        let text = host.sh(&format!("{dir}/install"))?;
        ensure!(text.contains("no container runtime found") && host.exists("/opt/cni/bin/weft"), "{text}");
        host.sh(&format!("{dir}/install --remove --purge"))?;
        host.sh("mv /run/systemd/system /run/systemd/away")?;
        let text = host.sh(&format!("{dir}/install"))?;
        ensure!(text.contains("systemd does not run here: start /usr/local/bin/weftd"), "{text}");
        host.sh(&format!("mv /run/systemd/away /run/systemd/system; {dir}/install --remove --purge"))?;

        host.sh("mkdir -p /usr/libexec/cni /srv/k3s/bin")?;
        host.put("/etc/crio/crio.conf", b"[crio]\nx = 1\n[crio.network]\n# plugin_dirs = [\n# \"/no\",\n# ]\nnetwork_dir = \"/etc/cni/of-crio/\"\n")?;
        host.put("/etc/crio/crio.conf.d/10.conf", b"[crio.network]\nplugin_dirs = [\n  \"/nowhere/\",\n  \"/usr/libexec/cni/\",\n]\n[crio.metrics]\n")?;
        host.put(
            "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
            b"version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\n  bin_dirs = ['/srv/k3s/bin', \"/other\"]\n  conf_dir = '/srv/k3s/net.d'\n[plugins.x]\n  conf_dir = \"/no\"\n",
        )?;
        let text = host.sh(&format!("{dir}/install"))?;
        ensure!(
            text.contains("crio: plugins in /usr/libexec/cni, configuration in /etc/cni/of-crio"),
            "{text}"
        );
        ensure!(text.contains("k3s: plugins in /srv/k3s/bin, configuration in /srv/k3s/net.d"), "{text}");
        ensure!(text.contains("--flannel-backend=none"), "{text}");
        for path in [
            "/usr/libexec/cni/weft",
            "/srv/k3s/bin/weft",
            "/etc/cni/of-crio/10-weft.conflist",
            "/srv/k3s/net.d/10-weft.conflist",
        ] {
            ensure!(host.exists(path), "{path}: {text}");
        }
        let text =
            host.sh(&format!("{dir}/install --cni-bin-dir /usr/lib/cni --cni-conf-dir=/etc/cni/named"))?;
        ensure!(host.exists("/etc/cni/named/10-weft.conflist"), "{text}");
        Ok(())
    })
}

#[test]
fn what_cannot_be_installed_changes_nothing() -> Result<()> {
    with_host(|host, dir| {
        let before = files(host)?;
        let refused = |script: &str, expected: &str| {
            let text = host.refused(script)?;
            ensure!(text.contains(expected), "{script}: {text}");
            let changed = difference(&before, &files(host)?);
            ensure!(changed.is_empty(), "{script} changed {changed:?}");
            Ok(())
        };
        host.sh(&format!("cp -r {dir} damaged && echo x >>damaged/bin/weft; cp -r {dir} other && cd other && echo riscv64 >ARCH && sed -i '/  ARCH$/d' SHA256SUMS && sha256sum ARCH >>SHA256SUMS"))?;
        refused("damaged/install", "is not as it was packed")?;
        refused("other/install", "this tarball is for riscv64, this host is x86_64")?;
        refused("rm damaged/SHA256SUMS; damaged/install", "SHA256SUMS is missing")?;
        refused(
            &format!("{dir}/install --cni-bin-dir opt"),
            "--cni-bin-dir = 'opt': expected an absolute path",
        )?;
        refused(
            &format!("{dir}/install --cni-conf-dir /etc/hostname/x"),
            "/etc/hostname is in the way, expected a folder",
        )?;
        refused(
            &format!(
                "mkdir /tmp/ro; mount -t tmpfs -o ro none /tmp/ro; {dir}/install --cni-bin-dir /tmp/ro/bin"
            ),
            "read-only",
        )?;
        refused(&format!("{dir}/install --cni-bin-dir"), "--cni-bin-dir needs a value")?;
        refused(&format!("{dir}/install --takeover"), "unknown argument '--takeover'")?;
        refused(&format!("{dir}/install --purge"), "--purge goes with --remove")?;
        refused(&format!("{dir}/install --remove --take-over"), "means nothing with --remove")?;
        refused(
            &format!(
                "setpriv --reuid 65534 --clear-groups bash -c '{dir}/install' || cp -r {dir} /tmp/w && chmod -R a+rX /tmp/w && setpriv --reuid 65534 --clear-groups /tmp/w/install"
            ),
            "root is needed",
        )?;
        Ok(())
    })
}

#[test]
fn the_unit_is_what_systemd_understands_and_what_was_promised() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("{dir}/install"))?;
        let text = host.sh("systemd-analyze verify /etc/systemd/system/weftd.service 2>&1")?;
        ensure!(text.is_empty(), "{text}");
        let unit = host.read("/etc/systemd/system/weftd.service")?;
        let lines: BTreeSet<&str> = unit.lines().collect();
        for promised in [
            "Type=notify",
            "TimeoutStartSec=infinity",
            "Restart=always",
            "RestartSec=0",
            "StartLimitIntervalSec=0",
            "RuntimeDirectory=weft",
            "RuntimeDirectoryPreserve=yes",
            "RuntimeDirectoryMode=0700",
            "StateDirectory=weft",
            "EnvironmentFile=-/etc/weft/weftd.env",
            "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW",
            "NoNewPrivileges=yes",
            "DefaultDependencies=no",
        ] {
            ensure!(lines.contains(promised), "{promised} is missing");
        }
        Ok(())
    })
}

#[test]
fn a_debian_package_installs_the_same_and_purge_leaves_nothing() -> Result<()> {
    with_host(|host, _| {
        let before = files(host)?;
        let text = host.sh("dpkg -i weft.deb 2>&1")?;
        for path in [
            "/usr/bin/weftd",
            "/usr/bin/weftctl",
            "/usr/lib/cni/weft",
            "/lib/systemd/system/weftd.service",
            "/etc/weft/weftd.env",
            CONFLIST,
        ] {
            ensure!(host.exists(path), "{path}: {text}");
        }
        ensure!(host.sh("systemd-analyze verify weftd.service 2>&1")?.is_empty());
        // Of what is in it, and not of the file system on which it was packed.
        let listed =
            "dpkg-deb -c weft.deb | awk '{ kib += /^-/ ? int(($3 + 1023) / 1024) : 1 } END { print kib }'";
        ensure!(host.sh("dpkg-deb -f weft.deb Installed-Size")? == host.sh(listed)?, "Installed-Size");
        let installed = files(host)?;
        let text = host.sh("dpkg -i weft.deb 2>&1")?;
        ensure!(text.contains("Nothing to do."), "{text}");
        let again = difference(&installed, &files(host)?);
        ensure!(!again.contains(CONFLIST) && !again.contains("/etc/weft/weftd.env"), "{again:?}");

        host.sh("echo FLANNELD_IFACE=eth7 >>/etc/weft/weftd.env")?;
        host.sh("dpkg -r weft 2>&1")?;
        ensure!(host.read("/etc/weft/weftd.env")?.contains("eth7"), "removal is no purge");
        ensure!(
            !host.exists(CONFLIST) && !host.exists("/usr/lib/cni/weft") && !host.exists("/usr/bin/weftd")
        );
        host.sh("dpkg -P weft 2>&1")?;
        let left: Vec<String> = difference(&before, &files(host)?)
            .into_iter()
            .filter(|path| !["/etc/cni", CONF_DIR].contains(&path.as_str()))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}
