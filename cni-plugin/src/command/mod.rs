//! The verbs, and what more than one of them says.

mod add;
mod check;
mod del;
pub(crate) mod loopback;
mod query;

pub(crate) use add::add;
pub(crate) use check::check;
pub(crate) use del::del;
pub(crate) use query::{gc, status};

use std::fmt::Display;
use std::io::Write;

use weft_shared::cni::Code;
use weft_shared::protocol::Failure;

/// A namespace that cannot be used, named as the runtime gave it.
fn bad_netns(path: &str, why: &dyn Display) -> Failure {
    Failure::new(Code::BadNetns, format!("CNI_NETNS = {path:?}: {why}"))
}

/// The result, to whom it is for.
fn print(result: &str, out: &mut dyn Write) -> Result<(), Failure> {
    writeln!(out, "{result}")
        .and_then(|()| out.flush())
        .map_err(|e| Failure::new(Code::Io, format!("cannot write the result to stdout: {e}")))
}
