//! What scripts/install and Debian's package leave alone: another installation of weft, configurations of an operator's,
//! and what he has decided about the unit; and that removal asks before it stops anything.

use anyhow::{Result, ensure};
use e2e::bed::Bed;
use e2e::dist::Dist;
use e2e::machine::Machine;
use e2e::underlay::{NodeNumber, Underlay};

const CONF_DIR: &str = "/etc/cni/net.d";
const CONFLIST: &str = "/etc/cni/net.d/10-weft.conflist";
const LEDGER: &str = "/usr/local/share/weft/installed";
const OTHER: &[u8] = br#"{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"bridge"}]}"#;
const MINE: &[u8] = br#"{"cniVersion":"1.0.0","name":"mine","plugins":[{"type":"weft"}]}"#;

/// One host on an underlay, with the tarball unpacked in `/root` and the package beside it.
fn with_host(body: impl FnOnce(&Machine, &str) -> Result<()>) -> Result<()> {
    let bed = Bed::for_test()?;
    let dist = Dist::native()?;
    let net = Underlay::create(&bed)?.attach(&bed, NodeNumber(1))?;
    let machine = Machine::start(&net.netns, &bed.dir("host")?, "host")?;
    machine.copy(&dist.tarball, "/root/weft.tar.gz")?;
    machine.copy(&dist.package, "/root/weft.deb")?;
    machine.sh("tar xzf weft.tar.gz")?;
    body(&machine, &format!("/root/{}", dist.name()))
}

fn contains(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(text.contains(part), "{part}: {text}");
    }
    Ok(())
}

#[test]
fn a_purge_of_the_removed_package_leaves_what_the_tarball_lives_on() -> Result<()> {
    with_host(|host, dir| {
        host.sh("dpkg -i weft.deb && dpkg -r weft")?;
        host.sh(&format!("{dir}/install && echo FLANNELD_IFACE=eth7 >>/etc/weft/weftd.env"))?;
        host.put("/var/lib/weft/node.json", b"the lease")?;
        host.put("/run/weft/pods/one", b"a pod")?;
        let text = host.sh("dpkg -P weft 2>&1")?;
        contains(&text, &["weft from a tarball", LEDGER, "/var/lib/weft"])?;
        for path in [
            "/var/lib/weft/node.json",
            "/run/weft/pods/one",
            "/etc/systemd/system/multi-user.target.wants/weftd.service",
            "/usr/lib/cni/weft",
            CONFLIST,
        ] {
            ensure!(host.exists(path), "{path}: {text}");
        }
        ensure!(host.read("/etc/weft/weftd.env")?.contains("eth7"), "{text}");
        ensure!(!host.exists("/var/lib/misc/weft.installed"), "the package's own list");
        Ok(())
    })
}

#[test]
fn tarball_and_package_refuse_each_other_by_name() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("{dir}/install"))?;
        let text = host.refused("dpkg -i weft.deb 2>&1")?;
        contains(
            &text,
            &["weft from a tarball", LEDGER, "Remove that first: the tarball's install --remove"],
        )?;
        ensure!(!host.exists("/usr/bin/weftd") && !host.exists("/usr/share/weft"), "{text}");

        // Side by side all the same: the package goes, and the tarball's weft stays whole but for the plugin, which both had.
        host.sh(&format!("mv {LEDGER} ledger; dpkg -i weft.deb 2>&1; mv ledger {LEDGER}"))?;
        let text = host.refused(&format!("{dir}/install"))?;
        contains(&text, &["Debian's package weft is installed", "dpkg --remove weft"])?;
        let text = host.refused(&format!("{dir}/install --remove"))?;
        contains(&text, &["Debian's package weft is installed beside this", "dpkg --remove weft"])?;
        let text = host.sh("dpkg -P weft 2>&1")?;
        contains(&text, &["weft from a tarball", "run its install again"])?;
        for path in
            ["/usr/local/bin/weftd", "/etc/systemd/system/weftd.service", "/etc/weft/weftd.env", CONFLIST]
        {
            ensure!(host.exists(path), "{path}: {text}");
        }
        ensure!(!host.exists("/usr/bin/weftd"), "{text}");
        let text = host.sh(&format!("{dir}/install"))?;
        contains(&text, &["installed  /usr/lib/cni/weft", "1 changes."])?;
        host.sh(&format!("{dir}/install --remove --purge"))?;

        host.sh("dpkg -i weft.deb")?;
        let text = host.refused(&format!("{dir}/install"))?;
        contains(&text, &["Debian's package weft is installed", "dpkg --remove weft"])?;
        ensure!(!host.exists("/usr/local/bin/weftd"), "{text}");
        Ok(())
    })
}

/// With busybox's programs alone, and bash.
#[test]
fn names_with_blanks_are_names_also_where_there_is_only_busybox() -> Result<()> {
    with_host(|host, dir| {
        host.sh("mkdir /bb && busybox --install -s /bb && ln -s $(command -v bash systemctl python3) /bb")?;
        let busybox = |args: &str| format!("PATH=/bb:/nowhere {dir}/install {args}");
        host.put(&format!("{CONF_DIR}/05 the first.conflist"), OTHER)?;
        host.put(&format!("{CONF_DIR}/06 \\n.conf"), OTHER)?;
        host.put(&format!("{CONF_DIR}/20 later.json"), OTHER)?;
        let text = host.refused(&busybox(""))?;
        contains(&text, &["WITHHELD", "which would be 05 the first.conflist", "NOT complete"])?;
        ensure!(!host.exists(CONFLIST), "{text}");
        let text = host.sh(&busybox("--take-over"))?;
        for (name, there) in
            [("05 the first.conflist", false), ("06 \\n.conf", false), ("20 later.json", true)]
        {
            ensure!(host.exists(&format!("{CONF_DIR}/{name}")) == there, "{name}: {text}");
        }
        let text = host.sh(&busybox("--take-over"))?;
        ensure!(text.ends_with("Nothing to do.\n"), "{text}");
        host.sh(&busybox("--remove"))?;
        for name in ["05 the first.conflist", "06 \\n.conf", "20 later.json"] {
            ensure!(host.exists(&format!("{CONF_DIR}/{name}")), "{name}");
        }
        ensure!(!host.exists(CONFLIST) && !host.exists("/usr/local/bin/weftd"));
        // Nobody has edited it, so a newer one takes its place.
        let odd = "/etc/cni/a\\nb";
        host.sh(&busybox(&format!("--cni-conf-dir '{odd}'")))?;
        host.sh(&format!(
            "cp -r {dir} newer && cd newer && echo >>conf/10-weft.conflist && sed -i /conflist$/d SHA256SUMS && \
             sha256sum conf/10-weft.conflist >>SHA256SUMS"
        ))?;
        let text = host.sh(&format!("PATH=/bb:/nowhere newer/install --cni-conf-dir '{odd}'"))?;
        contains(&text, &[&format!("replaced   {odd}/10-weft.conflist")])?;

        host.sh(&format!("echo x >>{dir}/bin/weft"))?;
        let text = host.refused(&busybox(""))?;
        contains(&text, &["bin/weft: FAILED", "is not as it was packed"])?;
        ensure!(!text.contains("OK"), "{text}");
        Ok(())
    })
}

#[test]
fn a_configuration_folder_that_is_a_link_to_nowhere_is_refused_before_anything_is_installed() -> Result<()> {
    with_host(|host, dir| {
        host.sh("mkdir -p /etc/cni && rm -rf /etc/cni/net.d && ln -s /nowhere/net.d /etc/cni/net.d")?;
        let refused = host.sh(&format!("! {dir}/install 2>&1"))?;
        contains(&refused, &["/etc/cni/net.d is a link that leads nowhere (/nowhere/net.d)"])?;
        for path in ["/usr/local/bin/weftd", LEDGER, "/etc/weft"] {
            ensure!(!host.exists(path), "{path} is there: {refused}");
        }
        Ok(())
    })
}

#[test]
fn configurations_that_somebody_else_wrote_or_edited_stay() -> Result<()> {
    with_host(|host, dir| {
        let mine = format!("{CONF_DIR}/00 mine.conflist");
        host.put(&mine, MINE)?;
        let text = host.sh(&format!("{dir}/install"))?;
        contains(&text, &["00 mine.conflist calls weft already"])?;
        let text = host.sh(&format!("{dir}/install --remove"))?;
        contains(&text, &["left       /etc/cni/net.d/00 mine.conflist: it calls weft"])?;
        ensure!(host.read(&mine)?.as_bytes() == MINE, "{text}");

        host.sh(&format!("rm '{}'; {dir}/install; sed -i s/1450/1400/ {CONFLIST}; echo >>{CONFLIST}", mine))?;
        let text = host.sh(&format!("{dir}/install --remove --purge"))?;
        contains(&text, &["kept       /etc/cni/net.d/10-weft.conflist (not as shipped)"])?;
        ensure!(host.exists(CONFLIST) && !host.exists("/etc/weft"), "{text}");
        host.sh(&format!("rm {CONFLIST}; {dir}/install"))?;
        host.put(&mine, MINE)?;
        let text = host.sh(&format!("{dir}/install --remove --purge"))?;
        contains(
            &text,
            &["removed    /etc/cni/net.d/10-weft.conflist", "left       /etc/cni/net.d/00 mine"],
        )?;
        ensure!(host.exists(&mine) && !host.exists(CONFLIST), "{text}");
        Ok(())
    })
}

/// The settings go at a word of their own, also at a later one.
#[test]
fn settings_that_were_kept_can_be_purged_later() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("{dir}/install && {dir}/install --remove"))?;
        ensure!(host.exists("/etc/weft/weftd.env") && !host.exists("/usr/local/bin/weftd"));
        host.sh("dpkg -i weft.deb && dpkg -r weft")?;
        host.sh(&format!("{dir}/install --remove --purge"))?;
        ensure!(!host.exists("/etc/weft") && !host.exists("/usr/local/share/weft"));
        Ok(())
    })
}

/// weftd with a store of its own: nothing else is needed for it to run.
fn start(host: &Machine) -> Result<()> {
    host.put("/etc/net-conf.json", br#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
    host.sh("printf 'WEFTD_STORE=embedded\\nWEFTD_NET_CONFIG=/etc/net-conf.json\\n' >>/etc/weft/weftd.env")?;
    host.sh("systemctl start weftd").map(drop)
}

fn pid(host: &Machine) -> Result<String> {
    host.read("/run/systemctl/weftd")
}

#[test]
fn the_package_restarts_what_has_changed_and_nothing_else() -> Result<()> {
    const LINK: &str = "/etc/systemd/system/multi-user.target.wants/weftd.service";
    with_host(|host, _| {
        // Another build, whose weftd is another file.
        host.sh(
            "dpkg-deb -R weft.deb other && echo >>other/usr/bin/weftd && sed -i '/usr.bin.weftd$/d' other/DEBIAN/md5sums && \
             dpkg-deb -Znone -b other other.deb",
        )?;
        host.sh("dpkg -i weft.deb 2>&1")?;
        start(host)?;
        let first = pid(host)?;
        let text = host.sh("dpkg -i weft.deb 2>&1")?;
        ensure!(text.contains("Nothing to do.") && pid(host)? == first, "{text}");
        let text = host.sh("dpkg -i other.deb 2>&1")?;
        ensure!(text.contains("restarted  weftd.service") && pid(host)? != first, "{text}");

        // What an operator has decided.
        host.sh("systemctl disable weftd; rm /etc/weft/weftd.env")?;
        let second = pid(host)?;
        let text = host.sh("dpkg -i other.deb 2>&1")?;
        contains(&text, &["somebody has disabled it", "somebody has removed it", "Nothing to do."])?;
        ensure!(!host.exists(LINK) && !host.exists("/etc/weft/weftd.env") && pid(host)? == second, "{text}");
        host.sh("systemctl mask weftd")?;
        let text = host.sh("dpkg -i weft.deb 2>&1")?;
        contains(&text, &["somebody has masked it", "is masked and runs"])?;
        ensure!(pid(host)? == second, "{text}");
        host.sh("systemctl stop weftd")?;
        let text = host.sh("dpkg -i other.deb 2>&1")?;
        ensure!(text.contains("somebody has masked it") && !host.exists(LINK), "{text}");
        // It is the operator's own also when weft goes and comes back.
        host.sh("rm /etc/systemd/system/weftd.service; dpkg -r weft 2>&1")?;
        let text = host.sh("dpkg -i weft.deb 2>&1")?;
        ensure!(text.contains("somebody has disabled it") && !host.exists(LINK), "{text}");
        host.sh("dpkg -P weft && dpkg -i weft.deb")?;
        ensure!(host.exists(LINK), "a purge forgets");
        Ok(())
    })
}

#[test]
fn a_masked_unit_stays_masked_under_the_tarball_too() -> Result<()> {
    with_host(|host, dir| {
        host.sh("systemctl mask weftd")?;
        let text = host.sh(&format!("{dir}/install"))?;
        contains(&text, &["somebody has masked it"])?;
        ensure!(host.sh("readlink /etc/systemd/system/weftd.service")?.trim() == "/dev/null", "{text}");
        host.sh(&format!("{dir}/install --remove"))?;
        ensure!(host.exists("/etc/systemd/system/weftd.service"), "the operator's mask");
        Ok(())
    })
}

#[test]
fn removal_asks_before_it_stops_weftd() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("{dir}/install"))?;
        start(host)?;
        let plugin = |verb: &str| {
            format!(
                "CNI_COMMAND={verb} CNI_CONTAINERID=one CNI_NETNS=/run/netns/one CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni \
                 /usr/lib/cni/weft <<<'{{\"cniVersion\":\"1.0.0\",\"name\":\"weft\",\"type\":\"weft\"}}'"
            )
        };
        host.sh(&format!("ip netns add one; {}", plugin("ADD")))?;
        let running = pid(host)?;
        let text = host.refused(&format!("{dir}/install --remove"))?;
        contains(&text, &["1 pod is attached", "nothing was stopped or removed"])?;
        ensure!(pid(host)? == running && host.exists(CONFLIST), "{text}");
        host.sh("weftctl status && systemctl is-enabled weftd")?;
        let text = host.refused(&format!("{dir}/install --remove -- --nonsense"))?;
        contains(&text, &["--nonsense", "nothing was stopped or removed"])?;
        ensure!(pid(host)? == running, "{text}");
        host.sh(&plugin("DEL"))?;
        let text = host.sh(&format!("{dir}/install --remove --purge"))?;
        contains(&text, &["stopped    weftd.service"])?;
        ensure!(!host.exists(CONFLIST) && !host.exists("/usr/local/bin/weftd"), "{text}");
        Ok(())
    })
}

/// A shell function that makes another tarball's folder: `newer DIR FILE` copies and adds a line to a file.
fn newer(dir: &str) -> String {
    format!(
        "newer() {{ cp -r {dir} $1; cd $1; echo '#' >>$2; sed -i \"\\\\# $2\\$#d\" SHA256SUMS; sha256sum $2 >>SHA256SUMS; cd ..; }};"
    )
}

#[test]
fn an_upgrade_that_was_cut_off_restarts_weftd_the_next_time() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("{dir}/install; {} newer one bin/weftd; newer two conf/weftd.service", newer(dir)))?;
        host.put(
            "/root/bad/systemctl",
            b"#!/bin/sh\n[ $1 != $BAD ] && exec /usr/local/sbin/systemctl \"$@\"\n",
        )?;
        host.sh("chmod 755 bad/systemctl")?;
        start(host)?;
        let mut running = pid(host)?;
        let mut restarted = |script: &str, due: bool| {
            let text = host.sh(script)?;
            let was = std::mem::replace(&mut running, pid(host)?);
            ensure!((was != running) == due && text.contains("restarted  weftd.service") == due, "{text}");
            ensure!(due || text.ends_with("Nothing to do.\n"), "{text}");
            Ok(())
        };
        for (verb, newer) in [("daemon-reload", "one"), ("restart", "two")] {
            let before = pid(host)?;
            let text = host.refused(&format!("BAD={verb} PATH=/root/bad:$PATH {newer}/install"))?;
            ensure!(text.contains("replaced") && pid(host)? == before, "{verb}: {text}");
            restarted(&format!("{newer}/install"), true)?;
            restarted(&format!("{newer}/install"), false)?;
        }
        // What is recorded says nothing of what runs.
        host.sh(&format!(
            "cp one/bin/weftd new && mv new /usr/local/bin/weftd && sum=$(sha256sum \
             </usr/local/bin/weftd) && sed -i \"s|.*  /usr/local/bin/weftd$|${{sum%-}}/usr/local/bin/weftd|\" {LEDGER}; \
             cp two/conf/weftd.service one/conf; cd one; sed -i /weftd.service$/d SHA256SUMS; sha256sum conf/weftd.service >>SHA256SUMS"
        ))?;
        restarted("one/install", true)
    })
}

#[test]
fn removal_asks_about_pods_also_without_the_installed_weftctl() -> Result<()> {
    with_host(|host, dir| {
        host.sh(&format!("{dir}/install; rm /usr/local/bin/weftctl; cp -r {dir} asks; cp -r {dir} none; rm none/bin/weftctl"))?;
        host.put("/root/asks/bin/weftctl", b"#!/bin/sh\necho a pod is attached\nexit 1\n")?;
        let text = host.refused("asks/install --remove")?;
        contains(&text, &["a pod is attached", "nothing was stopped or removed"])?;
        let text = host.refused("none/install --remove")?;
        contains(&text, &["/usr/local/bin/weftctl is missing", "nothing was stopped or removed"])?;
        ensure!(host.exists("/usr/local/bin/weftd") && host.exists(CONFLIST), "{text}");
        host.sh(&format!("{dir}/install --remove"))?;
        ensure!(!host.exists("/usr/local/bin/weftd") && !host.exists(CONFLIST));
        // Nothing is left of which anybody had to be asked.
        host.sh("none/install --remove --purge; dpkg -i weft.deb; mv /usr/bin/weftctl away")?;
        let text = host.refused("dpkg -r weft 2>&1")?;
        contains(&text, &["/usr/bin/weftctl is missing", "Install Debian's package again"])?;
        ensure!(host.exists("/usr/bin/weftd") && host.exists(CONFLIST), "{text}");
        Ok(())
    })
}

/// His own may be written over several lines.
#[test]
fn a_network_before_an_operators_own_configuration_is_named_and_taken_over_from() -> Result<()> {
    with_host(|host, dir| {
        let (mine, first) = (format!("{CONF_DIR}/05-mine.conflist"), format!("{CONF_DIR}/00-other.conf"));
        host.put(
            &mine,
            b"{\"cniVersion\":\"1.0.0\",\"name\":\"mine\",\"plugins\":[{\"type\":\n\t\"weft\"}]}",
        )?;
        host.put(&first, OTHER)?;
        host.put(&format!("{CONF_DIR}/06-later.conf"), OTHER)?;
        let text = host.sh(&format!("{dir}/install"))?;
        contains(
            &text,
            &[
                "05-mine.conflist calls weft already",
                "WARNING    /etc/cni/net.d/00-other.conf comes before 05-mine.conflist",
            ],
        )?;
        ensure!(!text.contains("06-later") && host.exists(&first) && !host.exists(CONFLIST), "{text}");
        let text = host.sh(&format!("{dir}/install --take-over"))?;
        contains(&text, &["put away   /etc/cni/net.d/00-other.conf", "1 changes."])?;
        ensure!(!host.exists(&first) && host.exists(&mine) && !host.exists(CONFLIST), "{text}");
        let text = host.sh(&format!("{dir}/install --remove"))?;
        ensure!(host.read(&first)?.as_bytes() == OTHER && host.exists(&mine), "{text}");
        Ok(())
    })
}

#[test]
fn what_was_put_away_first_comes_back_and_nothing_is_lost() -> Result<()> {
    with_host(|host, dir| {
        let path = format!("{CONF_DIR}/05 first.conflist");
        let other = |name: &str| String::from_utf8_lossy(OTHER).replace("\"other\"", &format!("\"{name}\""));
        for (name, saved) in [("a", ""), ("b", ".2"), ("c", ".3"), ("a", ""), ("b", ".2")] {
            host.put(&path, other(name).as_bytes())?;
            let text = host.sh(&format!("{dir}/install --take-over"))?;
            contains(&text, &[&format!("(now 05 first.conflist.weft-saved{saved};")])?;
            ensure!(host.read(&format!("{path}.weft-saved{saved}"))? == other(name), "{name}: {text}");
        }
        let text = host.sh(&format!("{dir}/install --remove"))?;
        contains(&text, &["kept       /etc/cni/net.d/05 first.conflist.weft-saved.2: "])?;
        for (suffix, name) in [("", "a"), (".weft-saved.2", "b"), (".weft-saved.3", "c")] {
            ensure!(host.read(&format!("{path}{suffix}"))? == other(name), "{suffix}: {text}");
        }
        // Left over from then, it is in nobody's way: what is there now comes back.
        host.sh(&format!("mv '{path}' '{path}.weft-saved'"))?;
        host.put(&path, other("d").as_bytes())?;
        host.sh(&format!("{dir}/install --take-over && {dir}/install --remove"))?;
        ensure!(host.read(&path)? == other("d") && host.read(&format!("{path}.weft-saved"))? == other("a"));
        Ok(())
    })
}

#[test]
fn a_mask_outlives_removal_and_no_link_to_a_unit_is_left() -> Result<()> {
    const UNIT: &str = "/etc/systemd/system/weftd.service";
    const LINK: &str = "/etc/systemd/system/multi-user.target.wants/weftd.service";
    with_host(|host, dir| {
        host.sh(&format!("{dir}/install"))?;
        ensure!(host.exists(LINK), "enabled");
        host.sh(&format!("ln -sfn /dev/null {UNIT}; {dir}/install"))?;
        for purge in ["", "--purge"] {
            let text = host.sh(&format!("{dir}/install --remove {purge}"))?;
            ensure!(host.sh(&format!("readlink {UNIT}"))? == "/dev/null\n" && !host.exists(LINK), "{text}");
            let text = host.sh(&format!("{dir}/install"))?;
            ensure!(text.contains("somebody has masked it") && !host.exists(LINK), "{text}");
            if purge.is_empty() {
                // Its end is no word for a start at boot.
                let text = host.sh(&format!("rm {UNIT}; {dir}/install"))?;
                ensure!(text.contains("somebody has disabled it") && !host.exists(LINK), "{text}");
                host.sh(&format!("ln -sfn /dev/null {UNIT}"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn what_is_withheld_is_told_by_the_exit_status_but_does_not_fail_dpkg() -> Result<()> {
    with_host(|host, dir| {
        let status = |script: &str| -> Result<Option<i32>> { Ok(host.output(script)?.status.code()) };
        host.put(&format!("{CONF_DIR}/05-other.conf"), OTHER)?;
        ensure!(status(&format!("{dir}/install"))? == Some(3) && host.exists("/usr/local/bin/weftd"));
        ensure!(status(&format!("{dir}/install --take-over"))? == Some(0) && host.exists(CONFLIST));
        ensure!(status(&format!("{dir}/install --remove --purge"))? == Some(0) && !host.exists(CONFLIST));
        let text = host.sh("dpkg -i weft.deb 2>&1")?;
        contains(&text, &["WITHHELD", "NOT complete"])?;
        ensure!(host.sh("dpkg-query -W -f '${Status}' weft")? == "install ok installed", "{text}");
        ensure!(status("/usr/share/weft/install")? == Some(3) && !host.exists(CONFLIST));
        // Everything else that fails in it fails dpkg.
        host.sh("mv /etc/cni /cni; echo >/etc/cni")?;
        let text = host.refused("dpkg -i weft.deb 2>&1")?;
        contains(&text, &["/etc/cni is in the way, expected a folder"])
    })
}
