//! `ip monitor` and `bridge monitor` in a node: proof that nothing was touched, however briefly.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::cluster::READY;
use crate::netns::Netns;
use crate::wait::eventually;

/// What it prints in the end is closed off by an entry made for that.
#[derive(Debug)]
pub struct Monitor {
    tool: &'static str,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Monitor {
    /// The address of the last event that is waited for.
    const SENTINEL: &str = "02:00:5e:00:00:fe";

    pub fn start(netns: &Netns, tool: &'static str) -> Result<Self> {
        let mut command = Command::new(tool);
        let objects: &[&str] = if tool == "ip" { &["link", "address", "route", "neigh"] } else { &["fdb"] };
        command.arg("monitor").args(objects).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = netns.spawn(&mut command)?;
        let stdout = child.stdout.take().context("stdout of the monitor")?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        thread::spawn({
            let lines = Arc::clone(&lines);
            move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                }
            }
        });
        let monitor = Self { tool, child, lines };
        // It listens once it reports a change made for it.
        eventually(&format!("{tool} monitor to listen"), READY, || {
            monitor.mark(netns)?;
            Ok(monitor.seen() > 0)
        })?;
        Ok(monitor)
    }

    /// Everything that concerns the overlay since the start.
    pub fn events(mut self, netns: &Netns) -> Result<Vec<String>> {
        let marks = self.seen();
        self.mark(netns)?;
        eventually("the last event", READY, || Ok(self.seen() > marks))?;
        self.child.kill()?;
        self.child.wait()?;
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = |line: &&String| {
            ["flannel", "cni0", "veth"].iter().any(|device| line.contains(device)) && !is_dynamic(line)
        };
        Ok(lines.iter().filter(ours).cloned().collect())
    }

    fn seen(&self) -> usize {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| line.contains(Self::SENTINEL)).count()
    }

    /// An entry on the underlay's interface that is none of the agent's business, made and taken away.
    fn mark(&self, netns: &Netns) -> Result<()> {
        let change = |verb: &str| match self.tool {
            "ip" => {
                let words = if verb == "add" { "lladdr 02:00:5e:00:00:fe nud permanent" } else { "" };
                netns.ip(&format!("neighbor {verb} 192.168.77.254 {words} dev eth0"))
            }
            "bridge" => netns.bridge(&format!("fdb {verb} {} dev eth0", Self::SENTINEL)),
            other => bail!("no monitor {other}"),
        };
        change("add")?;
        change("del")?;
        Ok(())
    }
}

/// Neighbours that the kernel learns and ages, on the bridge towards the pods and among learned addresses; groups that a
/// device has spoken to (without resolution), which are forgotten a minute later; and the link-local address that the
/// kernel gives a device, seconds after it was made.
fn is_dynamic(line: &str) -> bool {
    if line.contains("fe80::") {
        return true;
    }
    ["REACHABLE", "STALE", "DELAY", "PROBE", "FAILED", "INCOMPLETE", "NOARP"]
        .iter()
        .any(|state| line.contains(state))
        || line.contains("master cni0") && !line.contains("permanent")
}
