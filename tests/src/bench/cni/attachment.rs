//! One pod's attachment by one plugin or a chain of them, called as a runtime does and timed from exec to exit.
//!
//! Everything is ready before the clock runs: the configuration lies in the pipe, what comes back is read afterwards. None
//! of it is near the 64 KiB that a pipe takes.

use std::env;
use std::io::{self, Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::launch::{self, Peak};
use super::reap::reap;
use crate::plugin::Call;

#[derive(Debug, Clone)]
pub(super) struct Attachment {
    /// Called in this order for ADD, each with the result of the one before, and in the reverse order for DEL.
    pub(super) chain: Vec<Call>,
    /// Whether an ADD gives a result: the floor program's does not.
    answers: bool,
    result: Option<Value>,
}

/// What a verb took, all of the chain's calls together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Took {
    pub(super) from: Instant,
    pub(super) to: Instant,
    /// From exec to exit, without what was between two calls.
    pub(super) time: Duration,
    pub(super) cpu: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
}

impl Attachment {
    pub(super) fn new(chain: Vec<Call>, answers: bool) -> Self {
        Self { chain, answers, result: None }
    }

    /// In the network namespace of the calling thread, which is the node's.
    pub(super) fn run(&mut self, verb: Verb) -> Result<Took> {
        let mut took: Option<Took> = None;
        self.each(verb, |call, name| {
            let (one, answer) = timed(call, name)?;
            took = Some(match took {
                None => one,
                Some(all) => Took { to: one.to, time: all.time + one.time, cpu: all.cpu + one.cpu, ..all },
            });
            Ok(answer)
        })?;
        took.context("a chain of nothing")
    }

    /// The peak of each program's memory.
    pub(super) fn peaks(&mut self, verb: Verb) -> Result<Vec<(String, Peak)>> {
        let mut peaks = Vec::new();
        self.each(verb, |call, name| {
            let (peak, answer) = launched(call, name)?;
            let program = call.binary.file_name().unwrap_or_default().to_string_lossy().into_owned();
            peaks.push((program, peak));
            Ok(answer)
        })?;
        Ok(peaks)
    }

    /// Hands each call to `f` with the result that it is to know, and keeps the last result.
    fn each(&mut self, verb: Verb, mut f: impl FnMut(&Call, &str) -> Result<String>) -> Result<()> {
        let mut chain: Vec<Call> = self.chain.clone();
        let name = match verb {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
        };
        if verb == Verb::Del {
            chain.reverse();
        }
        for (place, call) in chain.iter_mut().enumerate() {
            if verb == Verb::Del || place > 0 {
                let result = self.result.clone();
                result.into_iter().for_each(|result| call.config["prevResult"] = result);
            }
            let answer = f(call, name)
                .with_context(|| format!("{name} of {} by {}", call.container_id, call.binary.display()))?;
            if verb == Verb::Add && self.answers {
                let result = serde_json::from_str(&answer).with_context(|| format!("answer {answer:?}"))?;
                self.result = Some(result);
            }
        }
        Ok(())
    }
}

fn timed(call: &Call, verb: &str) -> Result<(Took, String)> {
    let mut command = call.command(verb);
    let (mut complaint, stderr) = io::pipe()?;
    command.stderr(stderr);
    let mut stdout = connect(&mut command, call)?;
    let from = Instant::now();
    let end = reap(command.spawn()?)?;
    let to = Instant::now();
    // It holds our copies of the pipes' other ends.
    drop(command);
    let (mut answer, mut said) = (String::new(), String::new());
    stdout.read_to_string(&mut answer)?;
    complaint.read_to_string(&mut said)?;
    ensure!(end.status.success(), "{}: {} {}", end.status, answer.trim(), said.trim());
    Ok((Took { from, to, time: to - from, cpu: end.cpu }, answer))
}

fn launched(call: &Call, verb: &str) -> Result<(Peak, String)> {
    let mut command = Command::new(env::current_exe()?);
    command.arg(launch::COMMAND).arg(&call.binary).env_clear();
    command.envs(call.command(verb).get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut stdout = connect(&mut command, call)?;
    let output = command.stderr(Stdio::piped()).spawn()?.wait_with_output()?;
    drop(command);
    let mut answer = String::new();
    stdout.read_to_string(&mut answer)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {} {}", output.status, said.trim(), answer.trim());
    Ok((serde_json::from_str(&said).with_context(|| format!("the launcher said {said:?}"))?, answer))
}

/// Its configuration on stdin; where its answer comes out.
fn connect(command: &mut Command, call: &Call) -> Result<io::PipeReader> {
    let (stdin, mut config) = io::pipe()?;
    config.write_all(call.config.to_string().as_bytes())?;
    let (answer, stdout) = io::pipe()?;
    command.stdin(stdin).stdout(stdout);
    Ok(answer)
}
