//! The node agent: leases the node's subnet, keeps the kernel as the leases say, hands out pod addresses.
//!
//! ```text
//! store --LeaseUpdate--> LeaseTable --+
//! netlink monitor ------- dirty ------+--> reconcile: desired -> observe -> plan -> apply -> status
//! timer ------------------ resync ----+
//! plugin --socket--> server::cni --> ipam (records in /run) --> bridge and ports become desired state
//! ```
//! `lease::{table, allocator}`, `ipam::pool`, `dataplane` and `reconcile::plan` do no I/O; only `app` sees both sides.

pub mod ipam;
pub mod lease;
pub mod pods;
pub mod server;
pub mod status;
