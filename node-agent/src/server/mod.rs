//! What the agent answers: HTTP for operators, the socket for the CNI plugin.

pub mod admin;
pub mod cni;
pub(crate) mod socket;

pub use socket::SocketError;
