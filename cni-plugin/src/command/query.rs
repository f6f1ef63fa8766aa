//! STATUS and GC: questions that the agent answers alone.

use std::time::{Duration, Instant};

use weft_shared::cni::{Code, NetConf, SpecVersion};
use weft_shared::protocol::{Failure, Request};

use crate::agent::Agent;

/// A node turns NotReady within seconds of a failed STATUS, so a restart of the agent is waited for; kubelet and
/// containerd hold a lock meanwhile, so not for long.
const STATUS_PATIENCE: Duration = Duration::from_millis(800);
const STATUS_TOTAL: Duration = Duration::from_millis(950);
const GC_PATIENCE: Duration = Duration::from_secs(3);
const GC_TOTAL: Duration = Duration::from_secs(20);

pub(crate) fn status(conf: &NetConf) -> Result<(), Failure> {
    conf.require(SpecVersion::WITH_GC_AND_STATUS, "STATUS")?;
    let deadline = Instant::now() + STATUS_TOTAL;
    let socket = conf.socket()?;
    Agent::connect(&socket, STATUS_PATIENCE, deadline)
        .and_then(|mut agent| agent.done(&Request::Status))
        .map_err(|e| e.into_failure(&socket, Code::NotAvailable))
}

pub(crate) fn gc(conf: &NetConf) -> Result<(), Failure> {
    conf.require(SpecVersion::WITH_GC_AND_STATUS, "GC")?;
    // A caller without a list knows nothing: what it does not name may well be alive.
    let Some(valid) = conf.valid_attachments()? else { return Ok(()) };
    let socket = conf.socket()?;
    Agent::connect(&socket, GC_PATIENCE, Instant::now() + GC_TOTAL)
        .and_then(|mut agent| agent.done(&Request::Gc { network: conf.name.as_str().to_owned(), valid }))
        .map_err(|e| e.into_failure(&socket, Code::TryAgainLater))
}
