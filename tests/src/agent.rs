//! One weftd in a node's namespace: started, killed, stopped, asked.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_agent::status::Status;

use crate::binaries::Binaries;
use crate::netns::Netns;
use crate::wait::{eventually, until_ok};

/// Before the command line, in the log.
const START_MARK: &str = "--- start: ";
const STATUS_DEADLINE: Duration = Duration::from_secs(30);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
const LOG_TAIL_LINES: usize = 40;

/// The agent of one node. Its files lie in the node's directory, so a stopped one starts again as itself.
#[derive(Debug)]
pub struct Agent {
    binaries: Binaries,
    netns: Netns,
    dir: PathBuf,
    /// What the harness always says: where files lie, who the node is.
    fixed: Vec<String>,
    /// The store, and what a test adds. Read at every start.
    pub flags: Vec<String>,
    /// A command that starts the agent whose command line it is given, as `unshare --mount` does.
    pub launcher: Vec<String>,
    /// `NOTIFY_SOCKET`, as systemd sets it for a service of type notify (sd_notify(3)).
    pub notify_socket: Option<PathBuf>,
    child: Option<Child>,
}

impl Agent {
    pub fn new(binaries: &Binaries, netns: &Netns, dir: &Path, node_name: &str) -> Self {
        let at = |flag: &str, file: &str| format!("--{flag}={}", dir.join(file).display());
        let fixed = vec![
            at("run-dir", "run"),
            at("state-dir", "state"),
            at("subnet-file", "subnet.env"),
            format!("--node-name={node_name}"),
        ];
        Self {
            binaries: binaries.clone(),
            netns: netns.clone(),
            dir: dir.to_owned(),
            fixed,
            flags: Vec::new(),
            launcher: Vec::new(),
            notify_socket: None,
            child: None,
        }
    }

    /// Starts the process, without waiting for anything.
    pub fn start(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("the agent of {} runs already", self.netns.name());
        }
        let mut log = File::options().create(true).append(true).open(self.log_path())?;
        writeln!(log, "{START_MARK}weftd {} {}", self.fixed.join(" "), self.flags.join(" "))?;
        // A session of its own: it outlives the terminal of `lab up`.
        let mut command = Command::new("setsid");
        command.args(&self.launcher).arg(self.binaries.agent()).args(&self.fixed).args(&self.flags);
        if let Some(socket) = &self.notify_socket {
            command.env("NOTIFY_SOCKET", socket);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(self.netns.spawn(&mut command)?);
        Ok(())
    }

    /// Waits until the agent calls itself ready: the first ADD can succeed.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let waited = eventually("the agent to be ready", deadline, || {
            let status = self.status()?;
            if !status.ready {
                bail!("agent waits for {:?}", status.waiting_for);
            }
            Ok(true)
        });
        waited.map(drop).with_context(|| self.explain())
    }

    /// Asked without weftctl: scenarios look many times.
    pub fn status(&self) -> Result<Status> {
        let json = self.get("/debug/state")?;
        serde_json::from_str(&json).with_context(|| format!("the agent answered {json:?}"))
    }

    /// The body of what the admin server answers.
    fn get(&self, path: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.admin_socket()).context("the agent's admin socket")?;
        stream.set_read_timeout(Some(STATUS_DEADLINE))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: weftd\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        body.with_context(|| format!("the agent answered {answer:?}"))
    }

    /// What `weftctl` prints, whatever its exit status; no output at all is an error.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(self.binaries.ctl());
        command.arg("--socket").arg(self.admin_socket()).args(args);
        let output = self.netns.output(&mut command)?;
        if output.stdout.is_empty() {
            bail!("weftctl {args:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The value of a figure of `/metrics`, by its name with labels.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let text = self.get("/metrics")?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.with_context(|| format!("no {name} in {text}"))?.parse().context(name.to_owned())
    }

    /// Whether somebody listens at its admin socket; asked of an agent that another process started.
    pub fn is_listening(&self) -> bool {
        UnixStream::connect(self.admin_socket()).is_ok()
    }

    /// The command line of its first start, for one who has not the flags.
    pub fn command_line(&self) -> Option<String> {
        let log = self.log();
        Some(log.lines().next()?.strip_prefix(START_MARK)?.trim_end().to_owned())
    }

    /// Everything that it is started with.
    pub fn options(&self) -> Vec<String> {
        self.fixed.iter().chain(&self.flags).cloned().collect()
    }

    /// The directory that its files lie in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn cni_socket(&self) -> PathBuf {
        self.dir.join("run/cni.sock")
    }

    pub fn admin_socket(&self) -> PathBuf {
        self.dir.join("run/admin.sock")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn subnet_file(&self) -> PathBuf {
        self.dir.join("subnet.env")
    }

    pub fn log_path(&self) -> PathBuf {
        self.dir.join("weftd.log")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn pid(&self) -> Result<Pid> {
        let child = self.child.as_ref().with_context(|| format!("{} has no agent", self.netns.name()))?;
        Ok(Pid::from_raw(child.id() as i32))
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.pid()?, signal)?)
    }

    /// SIGSTOP, and until every thread of it stands still. SIGCONT lets it go on.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        let tasks = format!("/proc/{}/task", self.pid()?);
        eventually("every thread to be stopped", STOP_DEADLINE, || {
            for task in fs::read_dir(&tasks)? {
                let stat = fs::read_to_string(task?.path().join("stat"))?;
                // proc(5): the state follows the name, which ends with the last parenthesis.
                if !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T')) {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(())
    }

    /// Does something under the eyes of nobody: every thread stands still meanwhile, and goes on whatever comes of it.
    pub fn while_stopped<T>(&self, hand: impl FnOnce() -> Result<T>) -> Result<T> {
        while_stopped(&[self], hand)
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.reap(STOP_DEADLINE).map(drop)
    }

    /// SIGTERM, and its end within the deadline.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.reap(STOP_DEADLINE).with_context(|| self.explain())
    }

    /// Waits for the process to end by itself.
    pub fn reap(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let mut child = self.child.take().context("no agent to wait for")?;
        let ended = until_ok("the agent to end", deadline, || child.try_wait()?.context("it still runs"));
        if ended.is_err() {
            self.child = Some(child);
        }
        ended
    }

    pub fn restart(&mut self, deadline: Duration) -> Result<()> {
        self.start()?;
        self.wait_ready(deadline)
    }

    /// Leaves it running when this value goes.
    pub fn detach(&mut self) {
        self.child = None;
    }

    /// The end of its log, for a failure's context.
    pub fn explain(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
        format!("weftd on {}, end of log:\n  {}\n", self.netns.name(), tail.join("\n  "))
    }
}

/// [`Agent::while_stopped`] for several at once.
pub fn while_stopped<T>(agents: &[&Agent], hand: impl FnOnce() -> Result<T>) -> Result<T> {
    let stopped = agents.iter().try_for_each(|agent| agent.pause());
    let done = stopped.and_then(|()| hand());
    // All of them, also the ones behind one that cannot be told.
    let told: Vec<Result<()>> = agents.iter().map(|agent| agent.signal(Signal::SIGCONT)).collect();
    let done = done?;
    told.into_iter().collect::<Result<()>>()?;
    Ok(done)
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
