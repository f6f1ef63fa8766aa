//! How fast a pod may send and be sent to: the capability `bandwidth` (CONVENTIONS.md of the CNI specification), checked.

use serde::{Deserialize, Serialize};

/// Each direction as the pod sees it; absent: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Bandwidth {
    /// To the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Limit>,
    /// From the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Limit>,
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes at once.
    pub burst: u32,
}

impl Bandwidth {
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}
