//! Settings of an interface under `/proc/sys/net`. They are those of the calling thread's network namespace: that is what
//! the paths mean to it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use weft_shared::IfName;

/// Settles IPv6: switched off without an IPv6 address, so that no router advertisement gives the container one behind the
/// cluster's back. Detection of duplicates is asked for in case that somebody switches it on.
pub(crate) fn prepare(ifname: &IfName, ipv6: bool, detects_duplicates: bool) -> io::Result<()> {
    if detects_duplicates {
        for name in ["enhanced_dad", "accept_dad"] {
            match set("ipv6", ifname, name, "1") {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
    }
    if !ipv6 {
        return match set("ipv6", ifname, "disable_ipv6", "1") {
            // The kernel has no IPv6 at all.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
    }
    for (name, value) in [
        ("accept_ra", "0"),
        ("accept_dad", "0"),
        ("keep_addr_on_down", "1"),
        ("ndisc_notify", "1"),
        ("disable_ipv6", "0"),
    ] {
        set("ipv6", ifname, name, value)?;
    }
    Ok(())
}

/// Whether the node carries what comes in by this interface; `None` when the kernel does not say.
pub(crate) fn forwards_ipv4(ifname: &IfName) -> Option<bool> {
    let value = fs::read_to_string(path("ipv4", ifname, "forwarding")).ok()?;
    Some(value.trim() != "0")
}

fn set(family: &str, ifname: &IfName, name: &str, value: &str) -> io::Result<()> {
    let path = path(family, ifname, name);
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{} = {value}: {e}", path.display()));
    OpenOptions::new().write(true).open(&path).and_then(|mut f| f.write_all(value.as_bytes())).map_err(named)
}

fn path(family: &str, ifname: &IfName, name: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(family).join("conf").join(ifname.as_str()).join(name)
}
