//! STATUS and GC: questions that the agent answers alone.

use std::time::Instant;

use weft_shared::cni::{Code, NetConf, SpecVersion};
use weft_shared::deadline;
use weft_shared::protocol::{Failure, Request};

use crate::agent::Agent;

pub(crate) fn status(conf: &NetConf, deadline: Instant) -> Result<(), Failure> {
    conf.require(SpecVersion::WITH_GC_AND_STATUS, "STATUS")?;
    let socket = conf.socket()?;
    Agent::connect(&socket, deadline::STATUS_CONNECT, deadline)
        .and_then(|mut agent| agent.done(&Request::Status))
        .map_err(|e| e.into_failure(&socket, Code::NotAvailable))
}

pub(crate) fn gc(conf: &NetConf, deadline: Instant) -> Result<(), Failure> {
    conf.require(SpecVersion::WITH_GC_AND_STATUS, "GC")?;
    // A caller without a list knows nothing: what it does not name may well be alive.
    let Some(valid) = conf.valid_attachments()? else { return Ok(()) };
    let socket = conf.socket()?;
    Agent::connect(&socket, deadline::GC_CONNECT, deadline)
        .and_then(|mut agent| agent.done(&Request::Gc { network: conf.name.clone(), valid }))
        .map_err(|e| e.into_failure(&socket, Code::TryAgainLater))
}
