//! Traffic between namespaces, with plain sockets: what it carries is counted, so that a loss cannot go unseen.

pub mod checked;
pub mod datagrams;
pub mod echo;
pub mod flows;
pub mod measure;
pub mod named;
pub mod transfer;
