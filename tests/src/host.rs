//! What of the host the lab must leave as it was: a list of facts, compared before and after.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::netns::Netns;

/// Kernel parameters that move by themselves.
const RESTLESS_SYSCTLS: [&str; 12] = [
    "/proc/sys/fs/aio-nr",
    "/proc/sys/fs/dentry-state",
    "/proc/sys/fs/file-nr",
    "/proc/sys/fs/inode-nr",
    "/proc/sys/fs/inode-state",
    "/proc/sys/fs/quota",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/kernel/perf_event_max_sample_rate",
    "/proc/sys/kernel/pty/nr",
    "/proc/sys/kernel/random",
    "/proc/sys/net/netfilter/nf_conntrack_count",
    "/proc/sys/vm/stat_refresh",
];
/// Where the lab, or what it starts, could leave something.
const DIRECTORIES: [&str; 3] = ["/run", "/var/lib", "/etc"];
/// Test processes have beds of their own there.
const NOT_THE_LABS: [&str; 2] = ["/run/weft-e2e", "/run/user"];

/// One line per fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSnapshot {
    facts: BTreeSet<String>,
}

impl HostSnapshot {
    pub fn take() -> Result<Self> {
        let mut facts = BTreeSet::new();
        network_facts(&mut facts)?;
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // Mount ids are numbers of the moment.
            let words: Vec<&str> = line.split_whitespace().skip(2).collect();
            // proc(5): device, root, mount point.
            let of_others = words.get(2).is_some_and(|point| is_of_others(Path::new(point)));
            if !of_others {
                facts.insert(format!("mount: {}", words.join(" ")));
            }
        }
        sysctl_facts(Path::new("/proc/sys"), &mut facts)?;
        for directory in DIRECTORIES {
            walk(Path::new(directory), &mut |path, metadata| {
                if !is_of_others(path) {
                    facts.insert(file_fact(path, metadata));
                }
            })?;
        }
        Ok(Self { facts })
    }

    /// The same of a node: its namespace, and what lies in a directory, but the files that the harness keeps there.
    pub fn of_node(netns: &Netns, directory: &Path, except: &[&str]) -> Result<Self> {
        let mut facts = BTreeSet::new();
        netns.enter(|| {
            network_facts(&mut facts)?;
            // Only here does the reader's namespace decide.
            sysctl_facts(Path::new("/proc/sys/net"), &mut facts)
        })?;
        walk(directory, &mut |path, metadata| {
            if !except.iter().any(|name| path.ends_with(name)) {
                facts.insert(file_fact(path, metadata));
            }
        })?;
        Ok(Self { facts })
    }

    /// Facts that went and facts that came; empty when the host is as it was.
    pub fn difference(&self, after: &Self) -> String {
        difference(&self.facts, &after.facts)
    }
}

fn is_of_others(path: &Path) -> bool {
    NOT_THE_LABS.iter().any(|other| path.starts_with(other))
}

/// Facts that went and facts that came, a line each.
pub fn difference(before: &BTreeSet<String>, after: &BTreeSet<String>) -> String {
    let gone = before.difference(after).map(|fact| format!("- {fact}\n"));
    let came = after.difference(before).map(|fact| format!("+ {fact}\n"));
    gone.chain(came).collect()
}

/// Processes whose environment holds `mark`: a process inherits it from whoever starts it, wherever it moves.
pub fn marked_processes(mark: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // Unreadable: gone meanwhile, a kernel thread, or no process at all.
        let Ok(environment) = fs::read(path.join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
            let command = fs::read(path.join("cmdline")).unwrap_or_default();
            found.push(format!(
                "{} {}",
                path.display(),
                String::from_utf8_lossy(&command).replace('\0', " ")
            ));
        }
    }
    Ok(found)
}

/// Of the namespace of the calling thread.
fn network_facts(facts: &mut BTreeSet<String>) -> Result<()> {
    for command in [
        "ip -o -details link show",
        "ip route show table all",
        "ip -6 route show table all",
        "ip neighbor show nud permanent",
        "bridge fdb show",
        "ip rule show",
        "ip -6 rule show",
        "nft --stateless list ruleset",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
    ] {
        let mut chain = String::new();
        for line in run(command)?.lines().filter(|line| !line.starts_with('#')) {
            // Lines of a ruleset mean little without their table and chain.
            if !line.starts_with(['\t', ' ', '}']) {
                chain = stable(line);
            }
            facts.insert(format!("{command}: {chain} {}", stable(line)));
        }
    }
    for line in run("ip -o address show")?.lines() {
        facts.insert(format!("address: {}", stable(line.split(" valid_lft").next().unwrap_or(line))));
    }
    Ok(())
}

/// A fact per kernel parameter, as the calling thread's namespace has it.
pub fn sysctl_facts(below: &Path, facts: &mut BTreeSet<String>) -> Result<()> {
    walk(below, &mut |path, metadata| {
        if metadata.is_file() && !RESTLESS_SYSCTLS.iter().any(|restless| path.starts_with(restless)) {
            // Some can be written only.
            let value = fs::read_to_string(path).unwrap_or_default();
            facts.insert(format!("sysctl: {} = {}", path.display(), value.trim()));
        }
    })
}

fn file_fact(path: &Path, metadata: &fs::Metadata) -> String {
    let kind = metadata.file_type();
    let content = if kind.is_file() {
        format!("{} bytes of {}", metadata.len(), metadata.mtime())
    } else if kind.is_symlink() {
        format!("link to {}", fs::read_link(path).unwrap_or_default().display())
    } else if kind.is_socket() {
        "socket".to_owned()
    } else {
        // A directory's time changes with what comes and goes in it.
        String::new()
    };
    format!("file: {} {:o} {}:{} {content}", path.display(), metadata.mode(), metadata.uid(), metadata.gid())
}

/// Lifetimes and a bridge's timers run; an address is tentative for a moment.
fn stable(line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        if word == "expires" || word.ends_with("_timer") {
            words.next();
        } else if word != "tentative" && !is_counter(word) {
            kept.push(word);
        }
    }
    kept.join(" ")
}

/// Packets and bytes, as iptables-save prints them.
fn is_counter(word: &str) -> bool {
    let inner = word.strip_prefix('[').and_then(|word| word.strip_suffix(']'));
    inner.is_some_and(|inner| inner.contains(':') && inner.bytes().all(|b| b.is_ascii_digit() || b == b':'))
}

fn walk(directory: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata)) -> Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            return Ok(());
        }
        Err(e) => return Err(e).with_context(|| directory.display().to_string()),
    };
    for entry in entries {
        let path = entry?.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        visit(&path, &metadata);
        if metadata.is_dir() {
            walk(&path, visit)?;
        }
    }
    Ok(())
}

fn run(command: &str) -> Result<String> {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().context("empty command")?).args(words).output();
    let output = output.with_context(|| format!("run {command}"))?;
    if !output.status.success() {
        bail!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
