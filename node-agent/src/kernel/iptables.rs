//! iptables-legacy by its own programs: the format of its table is the kernel's private matter, and they hold the lock
//! that keeps two writers apart. Nothing is started where the table is not in use.

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use weft_shared::Subnet;

use super::KernelError;
use crate::firewall::advice::Leftover;
use crate::firewall::legacy::LegacyTable;

/// Tables in use in the network namespace of the reader, one a line.
const IN_USE: &str = "/proc/thread-self/net/ip_tables_names";
const PACKAGE: &str = "iptables-legacy is in use here, but its program is not installed (package iptables)";

#[derive(Debug, Default)]
pub(super) struct Legacy {
    seen: Option<(Instant, Option<LegacyTable>, Option<Leftover>)>,
}

impl Legacy {
    /// A look that is younger than `period` is good enough.
    pub(super) fn look(
        &mut self,
        period: Duration,
    ) -> Result<(Option<LegacyTable>, Option<Leftover>), KernelError> {
        // Kernels without iptables-legacy have no such file.
        let in_use = fs::read_to_string(IN_USE).unwrap_or_default();
        let uses = |table: &str| in_use.lines().any(|line| line == table);
        match &self.seen {
            Some((at, table, left)) if at.elapsed() < period && table.is_some() == uses("filter") => {
                return Ok((table.clone(), left.clone()));
            }
            _ => {}
        }
        let saved = |table: &str| uses(table).then(|| save(table)).transpose();
        let table = saved("filter")?.map(|text| LegacyTable::parse(&text));
        let left = saved("nat")?.and_then(|text| leftover(&text));
        self.seen = Some((Instant::now(), table.clone(), left.clone()));
        Ok((table, left))
    }

    pub(super) fn put(&mut self, rules: &[String]) -> Result<(), KernelError> {
        self.seen = None;
        match LegacyTable::parse(&save("filter")?).edit(rules) {
            Some(edit) => restore(&edit),
            None => Ok(()),
        }
    }
}

fn save(table: &str) -> Result<String, KernelError> {
    let output = run("save", &["-t", table], "")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn restore(edit: &str) -> Result<(), KernelError> {
    run("restore", &["--noflush"], edit).map(drop)
}

/// `iptables-legacy-save` and `-restore`; on systems that have no other, they are called `iptables-save` and
/// `-restore`.
fn run(verb: &str, args: &[&str], input: &str) -> Result<Output, KernelError> {
    let (legacy, only) = (format!("iptables-legacy-{verb}"), format!("iptables-{verb}"));
    match run_if_there(&legacy, args, input)? {
        Some(output) => Ok(output),
        None if speaks_nftables(&only) => Err(KernelError::Iptables(PACKAGE.into())),
        None => {
            let output = run_if_there(&only, args, input)?;
            output.ok_or_else(|| KernelError::Iptables(PACKAGE.into()))
        }
    }
}

/// `None`: there is no such program.
fn run_if_there(program: &str, args: &[&str], input: &str) -> Result<Option<Output>, KernelError> {
    let failed = |text: String| KernelError::Iptables(text);
    let started = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| failed(format!("{program}: {e}")))?,
    };
    let written = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(|e| failed(format!("{program}: {e}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{program}: {}: {}", output.status, said.trim())));
    }
    if let Some(Err(error)) = written {
        return Err(failed(format!("{program}: {error}")));
    }
    Ok(Some(output))
}

fn speaks_nftables(program: &str) -> bool {
    let version = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("nf_tables"))
}

/// flanneld's rules that leave the overlay's own traffic alone: `-s P -d C ... -j RETURN`.
fn leftover(saved: &str) -> Option<Leftover> {
    let table = LegacyTable::parse(saved);
    let rules = table.chains.get("FLANNEL-POSTRTG")?;
    let pair = |rule: &String| {
        let mut words = rule.split_whitespace();
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("-s"), Some(from), Some("-d"), Some(to)) if rule.ends_with("-j RETURN") => {
                Some((from.parse::<Subnet>().ok()?, to.parse::<Subnet>().ok()?))
            }
            _ => None,
        }
    };
    Some(Leftover { legacy: true, spared: rules.iter().filter_map(pair).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_is_told_from_one_that_fails() {
        assert!(matches!(run_if_there("iptables-of-nobody-save", &[], ""), Ok(None)));
        let refused =
            run_if_there("iptables-legacy-restore", &["--noflush"], "*filter\n-A NOWHERE -j DROP\nCOMMIT\n");
        let Err(KernelError::Iptables(text)) = refused else { panic!("{refused:?}") };
        assert!(
            text.starts_with("iptables-legacy-restore: exit status") && text.contains("line 2"),
            "{text}"
        );
        assert!(speaks_nftables("iptables-nft-save") && !speaks_nftables("iptables-legacy-save"));
    }
}
