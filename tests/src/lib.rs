//! The lab, the bench and the end-to-end tests' harness: namespaces as nodes, the real agent, the real plugin, real stores.
//!
//! ```text
//! Bed (a directory below /run; everything in it goes with it)
//!  +- Underlay: a bridge in a namespace, the store's home
//!  +- Node n1, n2, ...: a namespace, a weftd, a directory for its files
//!  |   +- Pod: a namespace that the plugin wired to the node
//!  +- Fleet: Host host1, host2, ...: a machine with a root of its own, weft installed on it, a runtime that calls it
//!  +- Capture, Stream, Flows: what is looked at and what is carried while a scenario runs
//! ```
//! Nothing is made in the host's own network namespace. Root is needed; missing root or tools is a failure.

pub mod agent;
pub mod bed;
pub mod bench;
pub mod binaries;
pub mod books;
pub mod capture;
pub mod cgroups;
pub mod cluster;
pub mod conform;
pub mod containerd;
pub mod dist;
pub mod etcd;
pub mod firewall;
pub mod fleet;
pub mod foreign_peer;
pub mod forge;
pub mod host;
pub mod image;
pub mod kernel;
pub mod kube;
pub mod lab;
pub mod machine;
pub mod monitor;
pub mod netns;
pub mod node;
pub mod packet;
pub mod page;
pub mod plugin;
pub mod pod;
pub mod podman;
pub mod promise;
pub mod random;
pub mod relay;
pub mod report;
pub mod strike;
pub mod tangle;
pub mod traffic;
pub mod underlay;
pub mod vm;
pub mod wait;
