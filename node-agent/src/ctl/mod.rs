//! weftctl: what it asks the agent, how it prints the answer, with which status it exits.
//!
//! Synchronous and small: one request over the admin socket, one text. It works with the store down, for everything it
//! shows is what the agent knows.

mod client;
mod conflist;
mod docker_opts;
mod install_cni;
mod render;
#[cfg(test)]
mod tests;
mod uninstall;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde::Serialize;
use weft_shared::names::ADMIN_SOCKET;

pub use client::ClientError;

use crate::ping::PingReport;
use crate::status::Status;

/// The agent answers from memory.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);
/// Silent peers are waited for.
const PING_DEADLINE: Duration = Duration::from_secs(600);

/// Says where weftd's admin socket is, for whoever has another than the usual one.
const SOCKET_VARIABLE: &str = "WEFT_SOCKET";
const SOCKET_HELP: &str =
    "weftd's --admin-socket; without it the variable WEFT_SOCKET says where, else it is /run/weft/admin.sock";

/// See and test the pod network of this node. Asks weftd over its admin socket.
///
/// Exit status: 0 all is well, 1 not ready, something pending, not reachable or weftd does not answer, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "weftctl", version, disable_help_subcommand = true)]
pub struct Cli {
    #[arg(long, value_name = "FILE", global = true, help = SOCKET_HELP)]
    socket: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// The node at a glance: readiness, store, lease, dataplane, pods
    Status,
    /// Every other node with a lease, and whether this node has a path to it
    Peers,
    /// Every attachment of this node, with its address, interface, veth and bridge
    ///
    /// States: reserved (being added), committed (wired), aborted (being undone).
    Pods,
    /// Ping a peer beside the overlay and through it, and name the broken leg
    Ping {
        /// all, a number as in peers, a public IP, a leased subnet, or an address inside one
        peer: String,
        /// Probes on each leg, 1 to 100
        #[arg(long, short, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
        count: u32,
    },
    /// Take weft off this node: devices, routes, tables, state and conflist. Needs no weftd, and refuses while one runs
    ///
    /// What weft found here when it came stays or is put back; the programs stay. Reads the settings that weftd had:
    /// /etc/weft/weftd.env or --env-file, the variables that are set, and the options after `--`.
    Uninstall(uninstall::Uninstall),
    /// Write dockerd's options for the leased subnet, as flannel's mk-docker-opts.sh does
    ///
    /// Variables DOCKER_OPT_* that are set are taken along, and so is what the combined variable holds already. Unlike
    /// the script it fails, and writes nothing, as long as there is no lease.
    DockerOpts(docker_opts::DockerOpts),
    /// Put plugin, loopback and network configuration into a runtime's folders, as the image's init container does
    ///
    /// Each appears at once, under its final name; what is right already is not touched. A network configuration of
    /// somebody else's that the runtime would prefer is named, and stays.
    InstallCni(install_cni::InstallCni),
    /// The versions of weftctl and of the agent
    Version,
}

/// What is printed, and whether all is well.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    text: String,
    well: bool,
}

#[derive(Serialize)]
struct Versions<'a> {
    weftctl: &'a str,
    weftd: Option<&'a str>,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Verb::Uninstall(uninstall) = &cli.verb {
        return uninstall.run(cli.json, cli.socket.as_deref());
    }
    if let Verb::DockerOpts(opts) = &cli.verb {
        return opts.run(cli.json, cli.socket.as_deref());
    }
    if let Verb::InstallCni(install) = &cli.verb {
        return install.run(cli.json, cli.socket.as_deref());
    }
    match cli.answer(&cli.socket(std::env::var_os(SOCKET_VARIABLE))) {
        Ok(answer) => {
            write_out(&answer.text);
            if answer.well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            write_err(&format!("weftctl: {error}"));
            ExitCode::from(error.exit_status())
        }
    }
}

fn write_out(text: &str) {
    // A reader that has seen enough (`weftctl peers | head`) is no error.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn write_err(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl Cli {
    /// An empty variable is none.
    fn socket(&self, variable: Option<OsString>) -> PathBuf {
        let variable = variable.filter(|path| !path.is_empty()).map(PathBuf::from);
        self.socket.clone().or(variable).unwrap_or_else(|| ADMIN_SOCKET.into())
    }

    fn answer(&self, socket: &Path) -> Result<Answer, ClientError> {
        match &self.verb {
            Verb::Status => {
                let status = status(socket)?;
                let in_place = status.dataplane.as_ref().is_none_or(|dataplane| dataplane.pending.is_empty());
                Ok(Answer { well: status.ready && in_place, text: self.print(&status, render::status) })
            }
            Verb::Peers => {
                let status = status(socket)?;
                let known = render::peers_unknown(&status).is_none();
                let well = known && status.peers.iter().all(|peer| peer.programmed);
                let text = if self.json { json(&status.peers) } else { render::peers(&status) };
                Ok(Answer { well, text })
            }
            Verb::Pods => {
                let pods = status(socket)?.pods.list;
                Ok(Answer { well: true, text: self.print(&pods, |p| render::pods(p)) })
            }
            Verb::Ping { peer, count } => {
                let path = format!("/ping?peer={}&count={count}", client::escape(peer));
                let reports: Vec<PingReport> = client::request(socket, "POST", &path, PING_DEADLINE)
                    .map_err(|error| explain(error, socket))?;
                let well = reports.iter().all(|report| report.reachable);
                Ok(Answer { well, text: self.print(&reports, |r| render::ping(r)) })
            }
            Verb::Uninstall(_) | Verb::DockerOpts(_) | Verb::InstallCni(_) => {
                unreachable!("asks no agent: see main")
            }
            Verb::Version => {
                // The own version is worth printing without an agent.
                let agent = status(socket).ok().map(|status| status.version);
                let versions = Versions { weftctl: env!("CARGO_PKG_VERSION"), weftd: agent.as_deref() };
                Ok(Answer { well: true, text: self.print(&versions, render::versions) })
            }
        }
    }

    fn print<T: Serialize>(&self, value: &T, text: impl Fn(&T) -> String) -> String {
        if self.json { json(value) } else { text(value) }
    }
}

/// A peer that is not found may be one that the agent could not hear of yet.
fn explain(refused: ClientError, socket: &Path) -> ClientError {
    let unknown = || status(socket).ok().as_ref().and_then(render::peers_unknown);
    match refused {
        ClientError::Refused(said) => match unknown() {
            Some(why) => ClientError::NotKnown(why),
            None => ClientError::Refused(said),
        },
        other => other,
    }
}

fn status(socket: &Path) -> Result<Status, ClientError> {
    client::request(socket, "GET", "/debug/state", STATUS_DEADLINE)
}

fn json(value: &impl Serialize) -> String {
    // Maps with keys that are no strings are the one thing that fails here, and none is printed.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}
