//! A traffic program as a process of its own in a pod: started from this executable, pinned, heard line by line.
//!
//! Processes and not threads, because pods are: a switch from client to server costs what it costs there.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddrV4;
use std::os::fd::AsFd as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::cpu::pin_self;
use super::interrupt::Interrupt;
use super::load::{exchange, tcp, udp};
use super::naive::Naive;
use super::result::Sample;
use crate::netns::Netns;

/// The hidden command of this executable that runs a part.
pub const COMMAND: &str = "part";
/// A run that was asked to end hears of it this soon.
const GLANCE: Duration = Duration::from_millis(200);
/// A source whose sink has gone silently ends by itself.
pub const LONGEST: Duration = Duration::from_secs(60);

/// What a process does, and on which cores.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Part {
    pub cores: Vec<usize>,
    pub role: Role,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Role {
    TcpSink(tcp::Sink),
    TcpSource(tcp::Source),
    UdpSink(udp::Sink),
    UdpSource(udp::Source),
    ExchangeServer(exchange::Server),
    ExchangeClient(exchange::Client),
    Naive(Naive),
}

/// What it says on stdout, one value a line.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    Ready,
    Listening(SocketAddrV4),
    Measured(Sample),
}

/// Ends with this value.
#[derive(Debug)]
pub struct Program {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Part {
    /// In the process that was started for it.
    pub fn play(self) -> Result<()> {
        pin_self(&self.cores)?;
        match self.role {
            Role::TcpSink(sink) => sink.run(&self.cores),
            Role::TcpSource(source) => source.run(),
            Role::UdpSink(sink) => sink.run(&self.cores),
            Role::UdpSource(source) => source.run(),
            Role::ExchangeServer(server) => server.run(),
            Role::ExchangeClient(client) => client.run(&self.cores),
            Role::Naive(naive) => naive.run(|| say(&Said::Ready)),
        }
    }
}

pub fn say(what: &Said) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, what)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

impl Program {
    pub fn start(netns: &Netns, part: &Part) -> Result<Self> {
        let executable = std::env::current_exe().context("where this executable is")?;
        let mut command = Command::new(executable);
        command.arg(COMMAND).arg(serde_json::to_string(part)?);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = netns.spawn(&mut command)?;
        let stdout = child.stdout.take().context("stdout of a part")?;
        Ok(Self { child, stdout: BufReader::new(stdout) })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn listening(&mut self, deadline: Duration, interrupt: &Interrupt) -> Result<SocketAddrV4> {
        match self.hear(deadline, interrupt)? {
            Said::Listening(at) => Ok(at),
            other => bail!("expected an address to listen on, heard {other:?}"),
        }
    }

    pub fn ready(&mut self, deadline: Duration, interrupt: &Interrupt) -> Result<()> {
        match self.hear(deadline, interrupt)? {
            Said::Ready => Ok(()),
            other => bail!("expected to hear of readiness, heard {other:?}"),
        }
    }

    pub fn measured(&mut self, deadline: Duration, interrupt: &Interrupt) -> Result<Sample> {
        match self.hear(deadline, interrupt)? {
            Said::Measured(sample) => Ok(sample),
            other => bail!("expected figures, heard {other:?}"),
        }
    }

    /// Ends it, and tells what it complained of.
    pub fn complaint(&mut self) -> String {
        self.end();
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        text.trim().to_owned()
    }

    fn hear(&mut self, deadline: Duration, interrupt: &Interrupt) -> Result<Said> {
        let end = Instant::now() + deadline;
        loop {
            interrupt.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("nothing heard for {deadline:?}; {}", self.complaint());
            }
            if is_readable(&self.stdout, left.min(GLANCE))? {
                break;
            }
        }
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            bail!("ended without an answer: {}", self.complaint());
        }
        serde_json::from_str(&line).with_context(|| format!("heard {line:?}"))
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

/// Lines come one at a time and are read at once, so none waits in the buffer.
fn is_readable(stdout: &BufReader<ChildStdout>, timeout: Duration) -> Result<bool> {
    if !stdout.buffer().is_empty() {
        return Ok(true);
    }
    let mut waits = [PollFd::new(stdout.get_ref().as_fd(), PollFlags::POLLIN)];
    match poll(&mut waits, PollTimeout::try_from(timeout.max(Duration::from_millis(1)))?) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::Error::EINTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
