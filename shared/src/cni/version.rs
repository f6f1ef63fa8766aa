//! The released versions of the CNI specification.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A version whose configurations are understood and whose result shape can be printed. Older is smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpecVersion {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CNI spec version {0:?} is not one of {all}", all = SpecVersion::ALL.map(SpecVersion::as_str).join(", "))]
pub struct UnknownVersion(String);

impl SpecVersion {
    pub const ALL: [Self; 7] =
        [Self::V0_1_0, Self::V0_2_0, Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub const NEWEST: Self = Self::V1_1_0;
    /// What a configuration without `cniVersion` means.
    pub const UNSTATED: Self = Self::V0_1_0;
    /// First version with CHECK.
    pub const WITH_CHECK: Self = Self::V0_4_0;
    /// First version with GC and STATUS.
    pub const WITH_GC_AND_STATUS: Self = Self::V1_1_0;

    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

impl FromStr for SpecVersion {
    type Err = UnknownVersion;

    /// Exact membership, as libcni: `1.0` is no version.
    fn from_str(text: &str) -> Result<Self, UnknownVersion> {
        Self::ALL.into_iter().find(|v| v.as_str() == text).ok_or_else(|| UnknownVersion(text.to_owned()))
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for SpecVersion {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// What VERSION prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionReply {
    cni_version: SpecVersion,
    supported_versions: [SpecVersion; 7],
}

impl Default for VersionReply {
    fn default() -> Self {
        Self { cni_version: SpecVersion::NEWEST, supported_versions: SpecVersion::ALL }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_match_exactly() {
        for version in SpecVersion::ALL {
            assert_eq!(version.as_str().parse(), Ok(version));
        }
        for bad in ["", "1", "1.0", "0.4", "v1.0.0", "1.0.0 ", "1.2.0", "0.5.0"] {
            assert!(bad.parse::<SpecVersion>().is_err(), "{bad:?} was accepted");
        }
        assert!(SpecVersion::ALL.is_sorted());
    }

    #[test]
    fn version_reply() {
        assert_eq!(
            serde_json::to_string(&VersionReply::default()).expect("encode"),
            r#"{"cniVersion":"1.1.0","supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#
        );
    }
}
