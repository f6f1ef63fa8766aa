//! Names and types that the plugin, the agent and the tests agree on.
//!
//! Raw input (JSON of a store, of a runtime, of the socket) becomes a checked type here, once; everything behind
//! this border works on types that cannot hold a bad value. No sockets, no netlink, no runtime.
#![forbid(unsafe_code)]

pub mod cni;
pub mod deadline;
pub mod lease;
pub mod names;
pub mod netconf;
pub mod protocol;
pub mod replace;
pub mod subnet_env;
pub mod tombstone;

mod bandwidth;
mod host_ports;
mod ifname;
mod json;
mod mac;
mod subnet;

pub use ifname::{BadIfName, IfName};
pub use json::BadValue;
pub use mac::{BadMac, Mac};
pub use subnet::{BadSubnet, Subnet};
