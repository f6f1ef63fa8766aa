//! What the agent answers to: the plugin's socket.

pub mod cni;
