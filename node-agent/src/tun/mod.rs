//! TUN devices (drivers/net/tun.c, Documentation/networking/tuntap.rst): made to stay, and attached to by queues.
//!
//! A device without `TUNSETPERSIST` goes with the process that made it, addresses and routes with it: that is what a
//! restart of flanneld costs. Here the reconciler makes the device once, with [`create`], and whoever forwards attaches
//! a [`Queue`] to it; between two agents it merely has no carrier. To remove it is RTM_DELLINK's business, like any
//! other link's: an attached queue then answers `EBADFD`, a read that waits on it
//! `EFAULT`.
//!
//! Of the flags only `IFF_MULTI_QUEUE` is the device's for life. `IFF_VNET_HDR` and the offloads are those of the first
//! queue attached and are taken over in silence by the next, so that they can change with every agent, and so that
//! each attachment reads back what it got.

mod sys;

pub use sys::{AttachError, Features, Queue, VNET_HDR_LEN, create};

#[cfg(test)]
mod tests;
