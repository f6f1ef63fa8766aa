//! iptables-legacy by its own programs: the format of its table is the kernel's private matter, and they hold the lock
//! that keeps two writers apart. Nothing is started where the table is not in use.

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_shared::Subnet;

use super::KernelError;
use crate::firewall::advice::{FLANNELS_CHAIN, Leftover};
use crate::firewall::legacy::{LegacyFilter, LegacyTable};

/// Tables in use in the network namespace of the reader, one a line.
const IN_USE: &str = "/proc/thread-self/net/ip_tables_names";
const PACKAGE: &str = "iptables-legacy is in use here, but its program is not installed (package iptables)";
/// The caller keeps the whole node: it does not wait for a program that hangs.
const DEADLINE: Duration = Duration::from_secs(5);
/// Of the caller's time, a look that fails takes no more than one part in so many.
const SHARE: u32 = 10;

#[derive(Debug, Clone)]
pub(super) struct Look {
    pub(super) filter: LegacyFilter,
    pub(super) left: Option<Leftover>,
    pub(super) good_until: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Legacy {
    /// The tables that were in use, and the last look: also one that failed, for a program that fails is not started
    /// anew for every announcement.
    seen: Option<(String, Look)>,
}

impl Legacy {
    /// A look that is younger than `period` is good enough.
    pub(super) fn look(&mut self, period: Duration) -> Look {
        // Kernels without iptables-legacy have no such file.
        let in_use = fs::read_to_string(IN_USE).unwrap_or_default();
        self.look_at(in_use, period, save)
    }

    fn look_at(
        &mut self,
        in_use: String,
        period: Duration,
        mut save: impl FnMut(&str) -> Result<String, KernelError>,
    ) -> Look {
        let begun = Instant::now();
        if let Some((_, look)) =
            self.seen.as_ref().filter(|(then, l)| *then == in_use && begun < l.good_until)
        {
            return look.clone();
        }
        let mut saved =
            |table: &str| in_use.lines().any(|line| line == table).then(|| save(table)).transpose();
        let filter = match saved("filter") {
            Ok(None) => LegacyFilter::Unused,
            Ok(Some(text)) => LegacyFilter::Table(LegacyTable::parse(&text)),
            Err(error) => LegacyFilter::Unreadable(error.to_string()),
        };
        let left = saved("nat");
        let failed = left.is_err() || matches!(filter, LegacyFilter::Unreadable(_));
        let good_for = if failed { period.max(begun.elapsed() * SHARE) } else { period };
        // No pod waits for what can be told of the other table.
        let left = left.ok().flatten().and_then(|text| leftover(&text));
        let look = Look { filter, left, good_until: Instant::now() + good_for };
        self.seen = Some((in_use, look.clone()));
        look
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
    let output = run("save", &[], &["-t", table], "")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits a moment for the lock that keeps two writers apart; whoever holds it longer is met again at the next attempt.
fn restore(edit: &str) -> Result<(), KernelError> {
    run("restore", &["-w", "1"], &["--noflush"], edit).map(drop)
}

/// `iptables-legacy-save` and `-restore`; on systems that have no other, they are called `iptables-save` and
/// `-restore`, and may be too old (before 1.6.2) to know what those of the newer name know.
fn run(verb: &str, newer_args: &[&str], args: &[&str], input: &str) -> Result<Output, KernelError> {
    let (legacy, only) = (format!("iptables-legacy-{verb}"), format!("iptables-{verb}"));
    match run_if_there(&legacy, &[newer_args, args].concat(), input, DEADLINE)? {
        Some(output) => Ok(output),
        None if speaks_nftables(&only) => Err(KernelError::Iptables(PACKAGE.into())),
        None => {
            let output = run_if_there(&only, args, input, DEADLINE)?;
            output.ok_or_else(|| KernelError::Iptables(PACKAGE.into()))
        }
    }
}

/// `None`: there is no such program.
fn run_if_there(
    program: &str,
    args: &[&str],
    input: &str,
    deadline: Duration,
) -> Result<Option<Output>, KernelError> {
    let failed = |text: String| KernelError::Iptables(format!("{program}: {text}"));
    let started = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| failed(e.to_string()))?,
    };
    let (pid, input) = (Pid::from_raw(child.id().cast_signed()), input.to_owned());
    let (sender, ended) = mpsc::channel();
    // On a thread of its own: a program that hangs inside the kernel does not even end when it is killed.
    thread::spawn(move || {
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        // Nobody listens any more when it took too long.
        let _ = sender.send((written, child.wait_with_output()));
    });
    let Ok((written, output)) = ended.recv_timeout(deadline) else {
        // It has not been waited for, so the number is still its own.
        let _ = kill(pid, Signal::SIGKILL);
        return Err(failed(format!("does not end within {deadline:?}")));
    };
    let output = output.map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {}", output.status, said.trim())));
    }
    written.map_err(|e| failed(e.to_string()))?;
    Ok(Some(output))
}

fn speaks_nftables(program: &str) -> bool {
    match run_if_there(program, &["--version"], "", DEADLINE) {
        Ok(Some(version)) => String::from_utf8_lossy(&version.stdout).contains("nf_tables"),
        _ => false,
    }
}

/// flanneld's rules that leave the overlay's own traffic alone: `-s P -d C ... -j RETURN`.
fn leftover(saved: &str) -> Option<Leftover> {
    let table = LegacyTable::parse(saved);
    let rules = table.chains.get(FLANNELS_CHAIN)?;
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
        assert!(matches!(run_if_there("iptables-of-nobody-save", &[], "", DEADLINE), Ok(None)));
        let edit = "*filter\n-A NOWHERE -j DROP\nCOMMIT\n";
        let refused = run_if_there("iptables-legacy-restore", &["-w", "1", "--noflush"], edit, DEADLINE);
        let Err(KernelError::Iptables(text)) = refused else { panic!("{refused:?}") };
        assert!(
            text.starts_with("iptables-legacy-restore: exit status") && text.contains("line 2"),
            "{text}"
        );
        assert!(speaks_nftables("iptables-nft-save") && !speaks_nftables("iptables-legacy-save"));
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let begun = Instant::now();
        let hung = run_if_there("sleep", &["1000"], "", Duration::from_millis(20));
        let text = "sleep: does not end within 20ms".to_owned();
        assert!(matches!(hung, Err(KernelError::Iptables(said)) if said == text));
        assert!(begun.elapsed() < DEADLINE);
    }

    #[test]
    fn a_failure_is_remembered_as_a_look_is() {
        let (mut legacy, mut started) = (Legacy::default(), 0);
        let unreadable = LegacyFilter::Unreadable("fails".into());
        let (often, rarely) = (Duration::ZERO, Duration::from_secs(3600));
        let mut look = |in_use: &str, period, saved: Result<&str, &str>| {
            let look = legacy.look_at(in_use.into(), period, |_| {
                started += 1;
                saved.map(ToOwned::to_owned).map_err(|text| KernelError::Iptables(text.into()))
            });
            (look.filter, started)
        };
        assert_eq!(look("", rarely, Ok("")), (LegacyFilter::Unused, 0));
        assert_eq!(look("filter\n", rarely, Err("fails")), (unreadable.clone(), 1));
        assert_eq!(look("filter\n", rarely, Ok("")), (unreadable, 1), "not started again");
        let table = LegacyFilter::Table(LegacyTable::default());
        assert_eq!(look("filter\nnat\n", rarely, Ok("")), (table.clone(), 3), "another table is in use");
        assert_eq!(look("filter\nnat\n", rarely, Err("fails")), (table, 3));
        assert_eq!(look("nat\n", often, Err("fails")), (LegacyFilter::Unused, 4));
        assert_eq!(look("filter\n", often, Ok("")).1, 5);
        assert_eq!(look("filter\n", often, Ok("")).1, 6);
    }

    #[test]
    fn a_failure_is_good_for_ten_times_as_long_as_it_took() {
        let (mut legacy, begun) = (Legacy::default(), Instant::now());
        let hung = || run_if_there("sleep", &["1000"], "", Duration::from_millis(20)).map(|_| String::new());
        let look = legacy.look_at("filter\n".into(), Duration::ZERO, |_| hung());
        assert!(look.good_until >= begun + Duration::from_millis(220));
        let look = legacy.look_at("nat\n".into(), Duration::from_secs(5), |_| Ok(String::new()));
        assert!(look.good_until >= begun + Duration::from_secs(5));
    }
}
