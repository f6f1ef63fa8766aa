//! What of ours is in the kernel, found by its marks alone: for whoever takes weft off a node, without any idea of what
//! should be there.

use std::collections::BTreeMap;

use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol};
use nix::libc::{ENODEV, ENOENT, ESRCH};
use weft_shared::IfName;
use weft_shared::names::ROUTE_PROTOCOL;

use super::linux::LinuxKernel;
use super::socket::Request;
use super::{Errno, KernelError, encode};

/// A route that bears our protocol, as the kernel tells it.
#[derive(Debug, Clone)]
pub struct OwnRoute {
    text: String,
    message: RouteMessage,
}

impl std::fmt::Display for OwnRoute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl LinuxKernel {
    /// Every route with our protocol, whatever its family, table, metric and kind.
    pub fn own_routes(&mut self, names: &BTreeMap<u32, IfName>) -> Result<Vec<OwnRoute>, KernelError> {
        let messages = self.socket.dump(Message::GetRoute(RouteMessage::default()))?;
        let ours = messages.into_iter().filter_map(|message| match message {
            Message::NewRoute(route) if route.header.protocol == RouteProtocol::from(ROUTE_PROTOCOL) => {
                Some(OwnRoute { text: describe(&route, names), message: removable(route) })
            }
            _ => None,
        });
        Ok(ours.collect())
    }

    /// `ip route delete ...`; one that is gone is as good.
    pub fn remove_route(&mut self, route: &OwnRoute) -> Result<(), KernelError> {
        self.remove(Message::DelRoute(route.message.clone()))
    }

    /// `ip link delete dev ...`; one that is gone is as good.
    pub fn delete_link(&mut self, index: u32) -> Result<(), KernelError> {
        self.remove(Message::DelLink(encode::link_by_index(index)))
    }

    fn remove(&mut self, message: Message) -> Result<(), KernelError> {
        match self.socket.request(Request { message, flags: 0 }) {
            Err(KernelError::Refused(Errno(ENODEV | ENOENT | ESRCH))) => Ok(()),
            other => other,
        }
    }
}

/// The kernel tells more of a route than it takes back: states of the next hop, and the age of the entry.
fn removable(mut route: RouteMessage) -> RouteMessage {
    route.header.flags &= RouteFlags::Onlink;
    route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
    route
}

/// In the words of iproute2.
fn describe(route: &RouteMessage, names: &BTreeMap<u32, IfName>) -> String {
    let (mut dst, mut via, mut dev) = ("default".to_owned(), String::new(), String::new());
    let shown = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => ip.to_string(),
        RouteAddress::Inet6(ip) => ip.to_string(),
        other => format!("{other:?}"),
    };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                dst = format!("{}/{}", shown(address), route.header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => via = format!(" via {}", shown(address)),
            RouteAttribute::Oif(index) => {
                dev = format!(" dev {}", names.get(index).map_or(index.to_string(), ToString::to_string));
            }
            _ => {}
        }
    }
    format!("{dst}{via}{dev}")
}
