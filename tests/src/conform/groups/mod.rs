//! The cases, by what they are about.

mod addresses;
mod capabilities;
mod chaining;
mod check;
mod gc;
mod idempotency;
mod options;
mod protocol;
mod results;
mod status;
mod streams;
mod version;

use super::case::Group;

pub const GROUPS: &[Group] = &[
    protocol::GROUP,
    version::GROUP,
    results::GROUP,
    streams::GROUP,
    idempotency::GROUP,
    check::GROUP,
    gc::GROUP,
    status::GROUP,
    chaining::GROUP,
    capabilities::GROUP,
    addresses::GROUP,
    options::GROUP,
];
