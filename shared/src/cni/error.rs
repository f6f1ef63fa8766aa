//! Errors in the specification's terms. [`Failure`] travels over the socket too, so an agent's refusal reaches the
//! runtime as it was spoken.

use serde::{Deserialize, Serialize};

use super::SpecVersion;
use crate::BadValue;

/// Why a verb failed. Codes 1 to 99 are the specification's (SPEC.md, "Error"), from 100 they are ours; plugin and agent
/// draw from this one list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The configuration's `cniVersion` is none that is spoken here, or its result cannot be told in it.
    IncompatibleVersion = 1,
    /// The message holds key and value.
    UnsupportedField = 2,
    UnknownContainer = 3,
    /// An environment variable is missing or wrong; the message names it.
    BadEnvironment = 4,
    /// A file or stream failed: stdin, stdout, the agent's records.
    Io = 5,
    /// JSON of the runtime, or a request on the agent's socket, cannot be read.
    Decode = 6,
    /// A value of the network configuration or of a request is wrong.
    BadConfiguration = 7,
    /// Not in the specification; what the reference's skeleton answers.
    BadNetns = 8,
    /// Not now: no lease yet, the agent is away, or an earlier ADD of the same attachment is still being undone.
    TryAgainLater = 11,
    /// STATUS: an ADD would fail.
    NotAvailable = 50,
    /// STATUS: an ADD would fail, and pods that are wired may be cut off.
    NotAvailableAndDegraded = 51,
    /// ADD: the attachment exists and is alive, or an interface that is not ours to touch bears the name of one of its
    /// ends. Nothing was touched.
    NameTaken = 100,
    /// ADD: every address of the node's subnet is in use.
    PoolExhausted = 101,
    /// ADD: a requested address is in use.
    AddressInUse = 102,
    /// Plugin and agent speak different versions of their protocol.
    ProtocolMismatch = 103,
    /// CHECK: something is missing or changed, in the kernel or in the agent's records.
    NotAsAdded = 104,
    /// ADD: the kernel refused a step of the wiring.
    Wiring = 105,
    /// ADD, at Commit: nothing is reserved for the attachment on this connection.
    NotReserved = 106,
    /// The agent itself failed; its log says more.
    Internal = 107,
    /// ADD: another pod of the node has the port of the host that this one asks for.
    HostPortTaken = 108,
    /// The runtime is not the host's root, and nobody else is served.
    Rootless = 109,
}

/// An error in the terms of the CNI specification (SPEC.md, "Error"), ready to be printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}{}{details}", if details.is_empty() { "" } else { ": " })]
pub struct Failure {
    /// A [`Code`], or that of another version.
    pub code: u32,
    pub msg: String,
    #[serde(default)]
    pub details: String,
}

impl Failure {
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code: code as u32, msg: msg.into(), details: String::new() }
    }

    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    pub fn is(&self, code: Code) -> bool {
        self.code == code as u32
    }
}

impl From<BadValue> for Failure {
    fn from(bad: BadValue) -> Self {
        Self::new(Code::BadConfiguration, bad.to_string())
    }
}

/// What goes to stdout instead of a result.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorObject<'a> {
    cni_version: SpecVersion,
    code: u32,
    msg: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    details: &'a str,
}

impl<'a> ErrorObject<'a> {
    pub fn new(version: SpecVersion, failure: &'a Failure) -> Self {
        Self { cni_version: version, code: failure.code, msg: &failure.msg, details: &failure.details }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_is_the_specifications() {
        let failure = Failure::new(Code::TryAgainLater, "no lease yet").with_details("waiting for etcd");
        assert_eq!(
            serde_json::to_string(&ErrorObject::new(SpecVersion::V1_0_0, &failure)).expect("encode"),
            r#"{"cniVersion":"1.0.0","code":11,"msg":"no lease yet","details":"waiting for etcd"}"#
        );
        let brief = Failure::new(Code::Io, "stdin");
        assert_eq!(
            serde_json::to_string(&ErrorObject::new(SpecVersion::NEWEST, &brief)).expect("encode"),
            r#"{"cniVersion":"1.1.0","code":5,"msg":"stdin"}"#
        );
    }
}
