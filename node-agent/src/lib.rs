//! The node agent: leases the node's subnet, keeps the kernel as the leases say, hands out pod addresses.
//!
//! ```text
//! store --LeaseUpdate--> LeaseTable --+
//! netlink monitor ------- dirty ------+--> reconcile: desired -> observe -> plan -> apply -> status
//! timer ------------------ resync ----+
//! plugin --socket--> server::cni --> ipam (records in /run) --> bridge and ports become desired state
//! ```
//! `lease::{table, allocator}`, `ipam::{pool, table}`, `dataplane` and `reconcile::plan` do no I/O; only `app` and
//! what it composes (`node`, `bringup`) see both sides.

mod alone;
pub mod app;
pub mod before;
pub mod bringup;
pub mod config;
pub mod ctl;
pub mod dataplane;
pub mod durable;
pub mod firewall;
pub mod host;
mod inotify;
pub mod ipam;
pub mod kernel;
pub mod lease;
pub mod leave;
pub mod log;
pub mod metrics;
pub mod netconf;
pub mod node;
pub mod notify;
pub mod object;
pub mod packet_path;
pub mod ping;
pub mod pods;
pub mod policies;
pub mod reconcile;
pub mod server;
pub mod status;
pub mod tun;
pub mod udp;
pub mod underlay;
pub mod upkeep;
