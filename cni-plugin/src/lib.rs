//! The CNI executable: wires a container to the node's bridge with what the agent reserves for it.
//!
//! ```text
//! runtime --exec, env, stdin--> run --> command --> agent:  Reserve ... Commit
//!                                          |------> wiring: netns, netlink, sysctl
//!                                          `------> result or error on stdout
//! ```
//! Short-lived and synchronous. It allocates nothing, reads no side files but the resolv.conf that a list names, and keeps
//! no state: all of that is the agent's, so a plugin killed at any instruction leaves nothing that the agent cannot find.
//! Under the name `loopback` it is that plugin instead, and asks no agent.

mod agent;
mod command;
mod netlink;
mod netns;
mod stdin;
mod sys;
mod sysctl;
mod wiring;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use weft_shared::cni::{Call, ErrorObject, NetConf, SpecVersion, VersionReply};
use weft_shared::deadline;
use weft_shared::protocol::Failure;

use sys::Alarm;

/// Which plugin this is: what it is called decides, as with the applets of busybox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plugin {
    Weft,
    Loopback,
}

impl Plugin {
    fn named(program: &str) -> Self {
        match Path::new(program).file_name() {
            Some(name) if name == "loopback" => Self::Loopback,
            _ => Self::Weft,
        }
    }
}

/// Serves one invocation and returns the exit code: 0, or 1 with an error object on stdout. The process's surroundings
/// come in as parameters, so that a test can bring its own; the first of `args` is the program's name.
pub fn run(
    var: &dyn Fn(&str) -> Option<String>,
    args: &[String],
    stdin: &impl AsFd,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> u8 {
    let plugin = Plugin::named(args.first().map_or("", String::as_str));
    let call = match Call::parse(var) {
        Ok(Some(call)) => call,
        Ok(None) => return answer_a_person(plugin, args, stdout, stderr),
        Err(failure) => return report(SpecVersion::NEWEST, &failure, stdout),
    };
    if call == Call::Version {
        // VERSION neither needs nor reads a configuration.
        let done = serde_json::to_string(&VersionReply::default())
            .map_err(io::Error::from)
            .and_then(|text| writeln!(stdout, "{text}"));
        return u8::from(done.is_err());
    }
    let deadline = Instant::now() + span(&call);
    // Before anything that could hold it up: an ADD that is late must be dead, wherever it is.
    let _alarm = matches!(call, Call::Add { .. }).then(|| Alarm::arm(deadline::ADD_ALARM));
    let read = stdin::read(stdin.as_fd(), deadline);
    let conf = match read.map_err(|e| (SpecVersion::NEWEST, e)).and_then(|b| NetConf::parse(&b)) {
        Ok(conf) => conf,
        Err((version, failure)) => return report(version, &failure, stdout),
    };
    let served = match plugin {
        Plugin::Weft => serve(&call, &conf, deadline, var, stdout),
        Plugin::Loopback => serve_loopback(&call, &conf, var, stdout),
    };
    match served {
        Ok(()) => 0,
        Err(failure) => report(conf.version, &failure, stdout),
    }
}

fn serve(
    call: &Call,
    conf: &NetConf,
    deadline: Instant,
    var: &dyn Fn(&str) -> Option<String>,
    stdout: &mut dyn Write,
) -> Result<(), Failure> {
    match call {
        Call::Add { target, netns, args } => {
            command::add(conf, target, netns, args, own_netns_is_fine(var), deadline, stdout)
        }
        Call::Del { target, netns } => command::del(conf, target, netns.as_deref(), deadline),
        Call::Check { target, netns } => {
            command::check(conf, target, netns, own_netns_is_fine(var), deadline)
        }
        Call::Gc => command::gc(conf, deadline),
        Call::Status => command::status(conf, deadline),
        Call::Version => Ok(()),
    }
}

fn serve_loopback(
    call: &Call,
    conf: &NetConf,
    var: &dyn Fn(&str) -> Option<String>,
    stdout: &mut dyn Write,
) -> Result<(), Failure> {
    match call {
        Call::Add { netns, .. } => command::loopback::add(conf, netns, own_netns_is_fine(var), stdout),
        Call::Del { netns, .. } => {
            command::loopback::del(netns.as_deref());
            Ok(())
        }
        Call::Check { netns, .. } => command::loopback::check(conf, netns, own_netns_is_fine(var)),
        Call::Gc => command::loopback::nothing_to_do(conf, "GC"),
        Call::Status => command::loopback::nothing_to_do(conf, "STATUS"),
        Call::Version => Ok(()),
    }
}

fn own_netns_is_fine(var: &dyn Fn(&str) -> Option<String>) -> bool {
    var("CNI_NETNS_OVERRIDE").is_some_and(|v| v == "1" || v.eq_ignore_ascii_case("true"))
}

/// How long an invocation may take, from its start: the reading of its configuration is part of it.
fn span(call: &Call) -> Duration {
    match call {
        Call::Add { .. } => deadline::ADD,
        Call::Del { .. } | Call::Check { .. } => deadline::DEL_OR_CHECK,
        Call::Gc => deadline::GC,
        Call::Status | Call::Version => deadline::STATUS,
    }
}

/// The specification's overview says stderr; every runtime reads stdout.
fn report(version: SpecVersion, failure: &Failure, stdout: &mut dyn Write) -> u8 {
    if let Ok(text) = serde_json::to_string(&ErrorObject::new(version, failure)) {
        // Nobody is left to tell when this fails; the exit code still does.
        let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    }
    1
}

/// Without `CNI_COMMAND` it was a person.
fn answer_a_person(plugin: Plugin, args: &[String], stdout: &mut dyn Write, stderr: &mut dyn Write) -> u8 {
    let version = env!("CARGO_PKG_VERSION");
    let purpose = match plugin {
        Plugin::Weft => "a CNI plugin that wires containers to the pod network of weftd",
        Plugin::Loopback => "as CNI plugin loopback, which brings a container's lo up",
    };
    let done = if args.iter().skip(1).any(|arg| arg == "--version" || arg == "-V") {
        writeln!(stdout, "weft {version}")
    } else {
        let versions = SpecVersion::ALL.map(SpecVersion::as_str).join(", ");
        writeln!(
            stderr,
            "weft {version}: {purpose}.\n\
             It is started by a container runtime, with CNI_COMMAND and the other CNI variables set.\n\
             CNI spec versions: {versions}"
        )
    };
    u8::from(done.is_err())
}
