//! `weftctl uninstall`: the settings of the agent that was here, the list, and what became of it. The work is
//! [`crate::leave`]'s.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use nix::unistd::Uid;
use serde::Serialize;

use super::render::printable;
use crate::config::{Config, Invocation, UsageError, own_variables, read};
use crate::leave::{Fate, LeaveError, Thing, Wishes, survey};

/// Where conf/weftd.env says that it is to lie.
const ENV_FILE: &str = "/etc/weft/weftd.env";
const CNI_CONF_DIR: &str = "/etc/cni/net.d";

#[derive(Debug, Args)]
pub(super) struct Uninstall {
    /// Show what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: whether it could be removed once weftd has been stopped
    #[arg(long, requires = "dry_run")]
    as_if_stopped: bool,
    /// Also while pods are attached: they lose the network
    #[arg(long)]
    force: bool,
    /// Give this node's lease back at once, without which it expires by itself; of a Kubernetes Node: remove weft's
    /// annotations, without which they stay
    #[arg(long)]
    release_lease: bool,
    /// Also remove an embedded store: the network configuration and the leases of all its nodes
    #[arg(long)]
    remove_store: bool,
    /// weftd's settings, as systemd reads them; variables that are set here win [default: /etc/weft/weftd.env, if it is there]
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// Where the runtime's network configurations lie [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Leave those that call weft to whoever installed them
    #[arg(long, conflicts_with = "cni_conf_dir")]
    keep_conflists: bool,
    /// Options that weftd was started with, such as --run-dir=DIR
    #[arg(last = true, value_name = "WEFTD OPTIONS")]
    options: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Settings(#[from] UsageError),
    #[error("only root may take weft off a node (try sudo weftctl uninstall)")]
    NotRoot,
    #[error("the node could not be looked at: {0}")]
    Look(#[from] LeaveError),
}

#[derive(Debug)]
struct Answer {
    things: Vec<(Line, State)>,
    stays: Vec<String>,
    refused: Vec<String>,
    /// Whether it was tried.
    removed: bool,
    dry_run: bool,
}

#[derive(Debug, Clone, Serialize)]
struct Line {
    kind: &'static str,
    what: String,
}

#[derive(Debug)]
enum State {
    Listed,
    Removed,
    Kept,
    Failed(String),
}

/// As it is printed with --json.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    removes: Vec<&'a Line>,
    stays: &'a [String],
    refused: &'a [String],
    failed: Vec<Failed<'a>>,
    removed: bool,
}

#[derive(Debug, Serialize)]
struct Failed<'a> {
    #[serde(flatten)]
    line: &'a Line,
    error: &'a str,
}

impl Uninstall {
    pub(super) fn run(&self, json: bool, socket: Option<&Path>) -> ExitCode {
        match refuse_socket(socket).and_then(|()| self.answer()) {
            Ok(answer) => {
                let text = if json { super::json(&answer.shown()) } else { answer.text() };
                super::write_out(&text);
                if answer.is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
            }
            Err(wrong) => {
                super::write_err(&format!("weftctl uninstall: {wrong}"));
                ExitCode::from(if wrong.is_usage() { 2 } else { 1 })
            }
        }
    }

    fn answer(&self) -> Result<Answer, Wrong> {
        let config = self.config()?;
        if !Uid::effective().is_root() {
            return Err(Wrong::NotRoot);
        }
        let wishes = Wishes {
            cni_conf_dir: self.conf_dir()?,
            as_if_stopped: self.as_if_stopped,
            force: self.force,
            release_lease: self.release_lease,
            remove_store: self.remove_store,
        };
        let mut plan = survey(&config, &wishes)?;
        let removed = plan.refusals.is_empty() && !self.dry_run;
        let things = if removed {
            plan.carry_out().into_iter().map(|(thing, fate)| (line(&thing), fate.into())).collect()
        } else {
            plan.things.iter().map(|thing| (line(thing), State::Listed)).collect()
        };
        let (stays, refused) = (plan.stays.clone(), plan.refusals.clone());
        Ok(Answer { things, stays, refused, removed, dry_run: self.dry_run })
    }

    /// One that was named must be there.
    fn conf_dir(&self) -> Result<Option<PathBuf>, Wrong> {
        match &self.cni_conf_dir {
            Some(dir) if !dir.is_dir() => {
                Err(Wrong::Usage(format!("--cni-conf-dir = {}: expected a directory", dir.display())))
            }
            Some(dir) => Ok(Some(dir.clone())),
            None => Ok((!self.keep_conflists).then(|| CNI_CONF_DIR.into())),
        }
    }

    /// As the agent had them: options, then variables, then the file that systemd gives it.
    fn config(&self) -> Result<Config, Wrong> {
        let file = match &self.env_file {
            Some(file) => Some(file.as_path()),
            None => Some(Path::new(ENV_FILE)).filter(|file| file.exists()),
        };
        let mut variables = match file {
            Some(file) => {
                let text = std::fs::read_to_string(file);
                let text = text.map_err(|e| Wrong::Usage(format!("--env-file = {}: {e}", file.display())))?;
                environment(&text).map_err(|why| Wrong::Usage(format!("{}: {why}", file.display())))?
            }
            None => Vec::new(),
        };
        let set = own_variables()?;
        variables.retain(|(name, _)| !set.iter().any(|(other, _)| other == name));
        variables.extend(set);
        match read(self.options.iter().cloned(), variables, &crate::host::hostname())? {
            Invocation::Run(config) => Ok(*config),
            Invocation::Print(_) => Err(Wrong::Usage(
                "--help and --version are no settings: after -- expected options that weftd was started with"
                    .into(),
            )),
        }
    }
}

impl Wrong {
    fn is_usage(&self) -> bool {
        matches!(self, Self::Usage(_) | Self::Settings(_))
    }
}

/// An option of the other commands that means nothing here.
fn refuse_socket(socket: Option<&Path>) -> Result<(), Wrong> {
    match socket {
        Some(_) => Err(Wrong::Usage(
            "--socket: uninstall asks no weftd; where its sockets lie is said after --, with --run-dir or --admin-socket"
                .to_owned(),
        )),
        None => Ok(()),
    }
}

fn line(thing: &Thing) -> Line {
    Line { kind: thing.kind(), what: thing.to_string() }
}

impl From<Fate> for State {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Removed => Self::Removed,
            Fate::Kept => Self::Kept,
            Fate::Failed(error) => Self::Failed(error.to_string()),
        }
    }
}

impl Answer {
    fn is_well(&self) -> bool {
        self.refused.is_empty() && self.failed().next().is_none()
    }

    fn failed(&self) -> impl Iterator<Item = Failed<'_>> {
        self.things.iter().filter_map(|(line, state)| match state {
            State::Failed(error) => Some(Failed { line, error }),
            _ => None,
        })
    }

    fn shown(&self) -> Shown<'_> {
        Shown {
            removes: self.things.iter().map(|(line, _)| line).collect(),
            stays: &self.stays,
            refused: &self.refused,
            failed: self.failed().collect(),
            removed: self.removed,
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut say = |line: String| text.push_str(&(printable(&line) + "\n"));
        for refused in &self.refused {
            say(format!("REFUSED  {refused}"));
        }
        for (Line { kind, what }, state) in &self.things {
            match state {
                State::Listed => say(format!("removes  {kind:<9} {what}")),
                State::Removed => say(format!("removed  {kind:<9} {what}")),
                State::Failed(error) => say(format!("FAILED   {kind:<9} {what}: {error}")),
                // It is among what stays.
                State::Kept => {}
            }
        }
        for stays in &self.stays {
            say(format!("stays    {stays}"));
        }
        let left = self.things.iter().filter(|(_, state)| !matches!(state, State::Removed)).count();
        say(match (self.things.len(), left) {
            _ if !self.refused.is_empty() => "nothing was removed".to_owned(),
            (0, _) => "nothing of weft is left to remove".to_owned(),
            _ if self.dry_run => "a dry run: nothing was removed".to_owned(),
            (all, 0) => format!("all {all} removed; the programs are left to whoever installed them"),
            (all, left) => format!("{left} of {all} are left: mend what is wrong and run it again"),
        });
        text
    }
}

/// The assignments of a systemd EnvironmentFile (systemd.exec(5)): one a line, comments begin with # or ;, a value may
/// be quoted, a backslash at the end goes on in the next line.
fn environment(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut variables = Vec::new();
    let joined = text.replace("\\\n", "");
    for line in joined.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        let assignment = line.split_once('=').filter(|(name, _)| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        });
        let (name, value) = assignment
            .ok_or_else(|| format!("{line:?}: expected NAME=VALUE, or a comment that begins with #"))?;
        variables.push((name.to_owned(), unquoted(value.trim()).to_owned()));
    }
    Ok(variables)
}

fn unquoted(value: &str) -> &str {
    let within = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    within('"').or_else(|| within('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    #[test]
    fn what_is_refused_is_said_first() {
        let line = Line { kind: "link", what: "cni0".into() };
        let refused = vec!["weftd runs: stop it first".to_owned()];
        let things = vec![(line, State::Listed)];
        let answer = Answer { things, stays: vec!["a file".into()], refused, removed: false, dry_run: false };
        let text = answer.text();
        let first = text.lines().next().unwrap_or_default();
        assert_eq!(first, "REFUSED  weftd runs: stop it first", "{text}");
        assert!(text.ends_with("nothing was removed\n"), "{text}");
    }

    fn parsed(args: &[&str]) -> Uninstall {
        let cli = Cli::try_parse_from(["weftctl", "uninstall"].iter().chain(args)).expect("usage");
        match cli.verb {
            Verb::Uninstall(uninstall) => uninstall,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn settings_come_from_options_and_from_the_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("weftd.env");
        std::fs::write(
            &file,
            "# weftd\nWEFTD_RUN_DIR=/run/of-file\nWEFTD_STATE_DIR=\"/var/of-file\"\nPATH=/bin\n",
        )
        .expect("write");
        let file = file.to_str().expect("UTF-8");
        let config =
            parsed(&["--env-file", file, "--", "--run-dir=/run/of-options"]).config().expect("settings");
        assert_eq!(config.run_dir, Path::new("/run/of-options"));
        assert_eq!(config.cni_socket, Path::new("/run/of-options/cni.sock"));
        assert_eq!(config.state_dir, Path::new("/var/of-file"));
    }

    #[test]
    fn wrong_settings_are_usage() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("weftd.env");
        let wrong = |content: &str, options: &[&str]| {
            std::fs::write(&file, content).expect("write");
            let file = file.to_str().expect("UTF-8");
            let error = parsed(&[&["--env-file", file, "--"], options].concat()).config().expect_err("wrong");
            assert!(error.is_usage(), "exit status 2");
            error.to_string()
        };
        assert!(wrong("export WEFTD_RUN_DIR=/x", &[]).contains("expected NAME=VALUE"));
        assert!(
            wrong("WEFTD_RUN_DIR=relative", &[])
                .contains("WEFTD_RUN_DIR = \"relative\": expected an absolute path")
        );
        assert!(wrong("", &["--run-dri=/x"]).contains("did you mean --run-dir?"));
        assert!(wrong("", &["--help"]).contains("no settings"));
        let missing =
            parsed(&["--env-file", "/nowhere/weftd.env"]).config().expect_err("missing").to_string();
        assert!(missing.contains("--env-file = /nowhere/weftd.env: No such file"), "{missing}");
        let missing = parsed(&["--cni-conf-dir=/nowhere"]).conf_dir().expect_err("missing").to_string();
        assert!(missing.contains("--cni-conf-dir = /nowhere: expected a directory"), "{missing}");
        assert!(refuse_socket(Some(Path::new("/run/x.sock"))).expect_err("meaningless").is_usage());
        for wrong in
            [&["--releaselease"][..], &["--as-if-stopped"], &["--keep-conflists", "--cni-conf-dir=/etc"]]
        {
            assert!(Cli::try_parse_from(["weftctl", "uninstall"].iter().chain(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_environment_file_is_read_as_systemd_reads_it() {
        let text = "\n; comment\n  A = 1\n";
        assert!(environment(text).is_err(), "systemd knows no blank before the equals sign");
        let text = "A=1\nB='two words'\n  C=\"a=b\"\nD=\nE=x\\\ny\n";
        let read: Vec<String> = environment(text)
            .expect("good")
            .into_iter()
            .map(|(name, value)| format!("{name}:{value}"))
            .collect();
        assert_eq!(read, ["A:1", "B:two words", "C:a=b", "D:", "E:xy"]);
    }
}
