//! The CNI executable: wires a container to the node's bridge with what the agent reserves for it.
//!
//! ```text
//! runtime --exec, env, stdin--> run --> command --> agent:  Reserve ... Commit
//!                                          |------> wiring: netns, netlink, sysctl
//!                                          `------> result or error on stdout
//! ```
//! Short-lived and synchronous. It allocates nothing, reads no side files and keeps no state: all of that is the
//! agent's, so a plugin killed at any instruction leaves nothing that the agent cannot find.

mod agent;
mod command;
mod netlink;
mod netns;
mod sys;
mod sysctl;
mod wiring;

use std::io::{self, Read, Write};

use weft_shared::cni::{Call, Code, ErrorObject, NetConf, SpecVersion, VersionReply};
use weft_shared::protocol::Failure;

/// prevResult and a pod's annotations fit many times over.
const MAX_STDIN: u64 = 1 << 20;

/// Serves one invocation and returns the exit code: 0, or 1 with an error object on stdout. The process's surroundings
/// come in as parameters, so that a test can bring its own.
pub fn run(
    var: &dyn Fn(&str) -> Option<String>,
    args: &[String],
    stdin: &mut dyn Read,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> u8 {
    let call = match Call::parse(var) {
        Ok(Some(call)) => call,
        Ok(None) => return answer_a_person(args, stdout, stderr),
        Err(failure) => return report(SpecVersion::NEWEST, &failure, stdout),
    };
    if call == Call::Version {
        // VERSION neither needs nor reads a configuration.
        let done = serde_json::to_string(&VersionReply::default())
            .map_err(io::Error::from)
            .and_then(|text| writeln!(stdout, "{text}"));
        return u8::from(done.is_err());
    }
    let conf =
        match read_bounded(stdin).map_err(|e| (SpecVersion::NEWEST, e)).and_then(|b| NetConf::parse(&b)) {
            Ok(conf) => conf,
            Err((version, failure)) => return report(version, &failure, stdout),
        };
    match serve(&call, &conf, var, stdout) {
        Ok(()) => 0,
        Err(failure) => report(conf.version, &failure, stdout),
    }
}

fn serve(
    call: &Call,
    conf: &NetConf,
    var: &dyn Fn(&str) -> Option<String>,
    stdout: &mut dyn Write,
) -> Result<(), Failure> {
    let own_netns_is_fine =
        || var("CNI_NETNS_OVERRIDE").is_some_and(|v| v == "1" || v.eq_ignore_ascii_case("true"));
    match call {
        Call::Add { target, netns, args } => {
            command::add(conf, target, netns, args, own_netns_is_fine(), stdout)
        }
        Call::Del { target, netns } => command::del(conf, target, netns.as_deref()),
        Call::Check { target, netns } => command::check(conf, target, netns, own_netns_is_fine()),
        Call::Gc => command::gc(conf),
        Call::Status => command::status(conf),
        Call::Version => Ok(()),
    }
}

fn read_bounded(stdin: &mut dyn Read) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    stdin.take(MAX_STDIN + 1).read_to_end(&mut bytes).map_err(|e| {
        Failure::new(Code::Io, format!("cannot read the network configuration from stdin: {e}"))
    })?;
    if bytes.len() as u64 > MAX_STDIN {
        let msg = format!("the network configuration on stdin is longer than {MAX_STDIN} bytes");
        return Err(Failure::new(Code::Decode, msg));
    }
    Ok(bytes)
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
fn answer_a_person(args: &[String], stdout: &mut dyn Write, stderr: &mut dyn Write) -> u8 {
    let version = env!("CARGO_PKG_VERSION");
    let done = if args.iter().any(|arg| arg == "--version" || arg == "-V") {
        writeln!(stdout, "weft {version}")
    } else {
        let versions = SpecVersion::ALL.map(SpecVersion::as_str).join(", ");
        writeln!(
            stderr,
            "weft {version}: a CNI plugin that wires containers to the pod network of weftd.\n\
             It is started by a container runtime, with CNI_COMMAND and the other CNI variables set.\n\
             CNI spec versions: {versions}"
        )
    };
    u8::from(done.is_err())
}
