//! Calls the CNI executable as a runtime does: environment, configuration on stdin, result on stdout (SPEC.md,
//! "Section 2: Execution Protocol").

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::netns::Netns;

pub const NETWORK: &str = "weft";
pub const IFNAME: &str = "eth0";

/// One invocation. Everything a runtime may vary is a field.
#[derive(Debug, Clone)]
pub struct Call {
    pub binary: PathBuf,
    /// The runtime's own namespace: the node.
    pub node: Netns,
    pub container_id: String,
    /// `CNI_NETNS`; `None` leaves the variable out, an empty path sets it empty.
    pub netns: Option<PathBuf>,
    pub ifname: String,
    pub args: Option<String>,
    pub config: Value,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// `None` when a signal ended it.
    pub exit: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A network configuration for the agent behind `socket`.
pub fn netconf(version: &str, socket: &Path) -> Value {
    json!({ "cniVersion": version, "name": NETWORK, "type": "weft", "socket": socket })
}

impl Call {
    pub fn run(&self, verb: &str) -> Result<Outcome> {
        let child = self.spawn(verb)?;
        finish(child)
    }

    /// Starts it and hands it its configuration.
    pub fn spawn(&self, verb: &str) -> Result<Child> {
        self.spawn_by(Command::new(&self.binary), verb)
    }

    /// The same by a command that starts the plugin.
    pub fn spawn_by(&self, mut command: Command, verb: &str) -> Result<Child> {
        self.fill(&mut command, verb);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.node.spawn(&mut command)?;
        let mut stdin = child.stdin.take().context("stdin of the plugin")?;
        // A plugin that ends before it has read everything is judged by its answer, not by the pipe.
        let _ = stdin.write_all(self.config.to_string().as_bytes());
        Ok(child)
    }

    /// Without its standard streams.
    pub fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.binary);
        self.fill(&mut command, verb);
        command
    }

    fn fill(&self, command: &mut Command, verb: &str) {
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", &self.container_id);
        command
            .env("CNI_IFNAME", &self.ifname)
            .env("CNI_PATH", self.binary.parent().unwrap_or(Path::new("/")));
        if let Some(netns) = &self.netns {
            command.env("CNI_NETNS", netns);
        }
        if let Some(args) = &self.args {
            command.env("CNI_ARGS", args);
        }
    }

    /// ADD that must succeed.
    pub fn add(&self) -> Result<Value> {
        self.run("ADD")?.result().with_context(|| format!("ADD of {}", self.container_id))
    }

    /// DEL that must succeed, and print nothing.
    pub fn del(&self) -> Result<()> {
        self.run("DEL")?.silent().with_context(|| format!("DEL of {}", self.container_id))
    }
}

pub fn finish(child: Child) -> Result<Outcome> {
    let output = child.wait_with_output()?;
    Ok(Outcome {
        exit: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

impl Outcome {
    /// The result of a verb that must succeed with one.
    pub fn result(&self) -> Result<Value> {
        if self.exit != Some(0) {
            bail!("exit {:?}, stdout {}, stderr {}", self.exit, self.stdout.trim(), self.stderr.trim());
        }
        serde_json::from_str(&self.stdout).with_context(|| format!("stdout {:?}", self.stdout))
    }

    /// A verb that must succeed and says nothing on stdout.
    pub fn silent(&self) -> Result<()> {
        if self.exit != Some(0) || !self.stdout.is_empty() {
            bail!("exit {:?}, stdout {:?}, stderr {:?}", self.exit, self.stdout, self.stderr);
        }
        Ok(())
    }

    /// The error object of a verb that must fail, and its code.
    pub fn error(&self) -> Result<(u64, Value)> {
        let error: Value = serde_json::from_str(&self.stdout).with_context(|| {
            format!("exit {:?}, stdout {:?}, stderr {:?}", self.exit, self.stdout, self.stderr)
        })?;
        match error["code"].as_u64() {
            Some(code) if self.exit.is_some_and(|exit| exit != 0) => Ok((code, error)),
            _ => bail!("exit {:?} with {error}: expected a failure with a code", self.exit),
        }
    }
}
