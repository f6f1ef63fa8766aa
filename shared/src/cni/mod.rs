//! The CNI specification's types: environment, network configuration, result, error, for every version of the spec.
//!
//! Raw input becomes a checked type here. Nothing in here reads the process's environment, its stdin or the kernel:
//! everything is passed in, so every rule has a table test.
//! <https://www.cni.dev/docs/spec/>; older shapes are told from SPEC.md at the tags `spec-v0.1.0` to `spec-v1.1.0`.

mod args;
mod bandwidth;
mod config;
mod env;
mod error;
mod identifier;
mod interface;
mod port_mappings;
mod result;
mod version;

pub use args::CniArgs;
pub use config::NetConf;
pub use env::{Call, Target};
pub use error::{Code, ErrorObject, Failure};
pub use identifier::{BadIdentifier, ContainerId, NetworkName};
pub use interface::InterfaceConf;
pub use result::{CniResult, Dns, Interface, IpConfig, Route, RouteForm};
pub use version::{SpecVersion, VersionReply};
