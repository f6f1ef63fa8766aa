//! What a Reserve may ask for, beyond what its types say. The peer is root, but a value that is wrong must be named here:
//! later it would be a log line or a kernel error.

use std::collections::BTreeSet;

use weft_shared::cni::Code;
use weft_shared::protocol::{Failure, Reserve};

use crate::pods::PodNetwork;

const MAX_TEXT: usize = 4096;
const MAX_REQUESTED: usize = 16;
/// Every IPv4 host must take datagrams of this size (RFC 791, section 3.2).
const MIN_MTU: u32 = 68;

pub(super) fn check_reserve(reserve: &Reserve) -> Result<(), Failure> {
    for (what, value) in [("netns", Some(&reserve.netns)), ("pod", reserve.pod.as_ref())] {
        if value.is_some_and(|value| value.len() > MAX_TEXT) {
            return Err(invalid(format!("{what}: expected at most {MAX_TEXT} bytes")));
        }
    }
    if reserve.requested.len() > MAX_REQUESTED {
        let count = reserve.requested.len();
        return Err(invalid(format!("{count} requested addresses: expected at most {MAX_REQUESTED}")));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = reserve.requested.iter().find(|address| !seen.insert(**address)) {
        return Err(invalid(format!("requested address {twice} is given twice")));
    }
    Ok(())
}

/// The MTU of the pod's interface.
pub(super) fn mtu(reserve: &Reserve, network: &PodNetwork) -> Result<u32, Failure> {
    match reserve.bridge.mtu {
        None => Ok(network.mtu),
        Some(mtu) if (MIN_MTU..=network.mtu).contains(&mtu) => Ok(mtu),
        Some(mtu) => Err(invalid(format!(
            "mtu = {mtu}: expected {MIN_MTU} to {}, the MTU of the overlay on this node",
            network.mtu
        ))),
    }
}

pub(super) fn invalid(details: String) -> Failure {
    Failure::new(Code::BadConfiguration, "invalid network configuration").with_details(details)
}
