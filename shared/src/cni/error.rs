//! Errors in the specification's terms. [`Failure`] travels over the socket too, so an agent's refusal reaches the
//! runtime as it was spoken.

use serde::Serialize;

use super::SpecVersion;
use crate::protocol::Failure;

/// Codes 1 to 99 are the specification's, from 100 they are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    IncompatibleVersion = 1,
    /// The message holds key and value.
    UnsupportedField = 2,
    UnknownContainer = 3,
    BadEnvironment = 4,
    Io = 5,
    Decode = 6,
    BadConfiguration = 7,
    /// Not in the specification; what the reference's skeleton answers.
    BadNetns = 8,
    TryAgainLater = 11,
    NotAvailable = 50,
    /// No new pods, and the existing ones have trouble.
    NotAvailableAndDegraded = 51,
    /// An interface that is not ours to touch bears the name.
    NameTaken = 100,
    PoolExhausted = 101,
    AddressInUse = 102,
    ProtocolMismatch = 103,
    /// CHECK found something missing or changed.
    NotAsAdded = 104,
    /// The kernel refused a step of the wiring.
    Wiring = 105,
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
