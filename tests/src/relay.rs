//! A socket between plugin and agent: every message passes when the test says so, or never.
//!
//! It lies in the agent's run directory, so that the plugin's tombstones are where the agent looks for them.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use weft_shared::protocol::{Reply, Request, read_frame, write_frame};

use crate::agent::Agent;
use crate::wait::until_ok;

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Relay {
    listener: UnixListener,
    path: PathBuf,
    agent: PathBuf,
}

/// One connection of a plugin's, and the one to the agent that stands for it. Dropped, both are closed, as the kernel
/// closes the plugin's when it dies.
#[derive(Debug)]
pub struct Conversation {
    plugin: UnixStream,
    agent: UnixStream,
}

impl Relay {
    pub fn before(agent: &Agent) -> Result<Self> {
        let path = agent.run_dir().join("relay.sock");
        let listener = UnixListener::bind(&path).with_context(|| format!("bind {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path, agent: agent.cni_socket() })
    }

    /// What a network configuration names as its `socket`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next plugin that connects. The agent must be there.
    pub fn accept(&self) -> Result<Conversation> {
        let (plugin, _) = until_ok("a plugin to connect", PATIENCE, || Ok(self.listener.accept()?))?;
        plugin.set_nonblocking(false)?;
        let agent = UnixStream::connect(&self.agent).context("the agent's socket")?;
        for stream in [&plugin, &agent] {
            stream.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(Conversation { plugin, agent })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Conversation {
    /// What the plugin says; the agent does not hear of it.
    pub fn hear(&mut self) -> Result<Request> {
        read_frame(&mut self.plugin).context("the plugin's request")
    }

    /// Asks the agent; the plugin does not hear of the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Reply> {
        write_frame(&mut self.agent, request)?;
        read_frame(&mut self.agent).context("the agent's reply")
    }

    pub fn answer(&mut self, reply: &Reply) -> Result<()> {
        write_frame(&mut self.plugin, reply).context("a reply to the plugin")
    }

    /// One request and its reply, unhindered.
    pub fn pass(&mut self) -> Result<Reply> {
        let request = self.hear()?;
        let reply = self.ask(&request)?;
        self.answer(&reply)?;
        Ok(reply)
    }

    /// Whether the plugin has hung up.
    pub fn is_left(&self) -> Result<bool> {
        self.plugin.set_nonblocking(true)?;
        let mut byte = [0];
        let read = io::Read::read(&mut &self.plugin, &mut byte);
        self.plugin.set_nonblocking(false)?;
        Ok(matches!(read, Ok(0)))
    }
}
