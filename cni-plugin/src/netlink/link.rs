//! Links: the veth pair, the bridge port, and what is asked about either.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use weft_shared::{IfName, Mac};

use super::message::{Attributes, Batch, attribute, attributes, text, u32_at};
use super::uapi::*;
use super::{Netlink, NetlinkError, Outcome};

/// A link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) up: bool,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: Option<u32>,
    pub(crate) group: u32,
    pub(crate) master: Option<u32>,
    /// Index of a veth's other end, in the other end's namespace.
    pub(crate) peer: Option<u32>,
    pub(crate) kind: Option<String>,
    /// Nothing says that it cannot send (RFC 2863, `ifOperStatus`).
    pub(crate) operational: bool,
    /// What it is as a port of a bridge.
    pub(crate) port: Port,
}

/// All of it false for a link that is no port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Port {
    /// It passes frames.
    pub(crate) forwarding: bool,
    pub(crate) hairpin: bool,
    pub(crate) isolated: bool,
}

/// A veth pair to create: one end here, a port of a bridge, the other one directly in the container's namespace.
#[derive(Debug)]
pub(crate) struct VethPair<'a> {
    pub(crate) host_name: &'a IfName,
    pub(crate) group: u32,
    pub(crate) bridge: u32,
    pub(crate) mtu: u32,
    pub(crate) container_name: &'a IfName,
    pub(crate) container_mac: Option<Mac>,
    pub(crate) container_netns: BorrowedFd<'a>,
}

/// What a bridge port can only be told after it has become one.
#[derive(Debug)]
pub(crate) struct PortOptions<'a> {
    pub(crate) ifindex: u32,
    pub(crate) hairpin: bool,
    pub(crate) isolated: bool,
    pub(crate) alias: &'a str,
}

impl Netlink {
    /// Creates the pair, down, and looks its host end up, in one `sendmsg`. `EEXIST` when either name is taken.
    ///
    /// Two things here spare an ADD three of the kernel's grace periods, a tenth of a millisecond each on an idle machine and
    /// many times that on a busy one. One queue each: without that the kernel makes one for every processor and takes all but
    /// one back (drivers/net/veth.c `veth_init_queues`). And the host's end is down: one that is up without a carrier is
    /// deactivated by whoever looks at it (net/core/link_watch.c `linkwatch_sync_dev`).
    pub(crate) fn create_veth(&mut self, pair: &VethPair<'_>) -> Result<Link, NetlinkError> {
        let mut batch = self.batch();
        batch.push(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &ifinfomsg(0, 0), |a| {
            a.str(IFLA_IFNAME, pair.host_name.as_str())
                .u32(IFLA_NUM_TX_QUEUES, 1)
                .u32(IFLA_NUM_RX_QUEUES, 1)
                .u32(IFLA_GROUP, pair.group)
                .u32(IFLA_MTU, pair.mtu)
                .u32(IFLA_MASTER, pair.bridge)
                .nest(IFLA_LINKINFO, |a| {
                    a.bytes(IFLA_INFO_KIND, b"veth").nest(IFLA_INFO_DATA, |a| {
                        a.nest_after(VETH_INFO_PEER, &ifinfomsg(0, 0), |a| {
                            a.str(IFLA_IFNAME, pair.container_name.as_str())
                                .u32(IFLA_NUM_TX_QUEUES, 1)
                                .u32(IFLA_NUM_RX_QUEUES, 1)
                                .u32(IFLA_MTU, pair.mtu)
                                .u32(IFLA_NET_NS_FD, pair.container_netns.as_raw_fd() as u32);
                            if let Some(mac) = pair.container_mac {
                                a.bytes(IFLA_ADDRESS, &mac.0);
                            }
                        });
                    });
                });
        });
        push_get_link(&mut batch, 0, |a| {
            a.str(IFLA_IFNAME, pair.host_name.as_str());
        });
        let mut outcomes = self.transact(batch)?.into_iter();
        outcomes.next().unwrap_or(Err(NetlinkError::Garbled))?;
        let found = outcomes.next().unwrap_or(Err(NetlinkError::Garbled))?;
        found.first().and_then(|payload| parse_link(payload)).ok_or(NetlinkError::Garbled)
    }

    /// Brings a port up with its flags and alias, and keeps IPv6 off it, before it gets a carrier: a port needs no address,
    /// and its router solicitations and listener reports would reach every pod.
    pub(crate) fn set_port(&mut self, port: &PortOptions<'_>) -> Result<(), NetlinkError> {
        match self.apply(port_batch(self.batch(), port, true)) {
            // A kernel without IPv6 has nothing to be kept off.
            Err(e) if e.is(Errno::EAFNOSUPPORT) => self.apply(port_batch(self.batch(), port, false)),
            other => other,
        }
    }

    /// Writes a link's own address once more: with `arp_notify` and `ndisc_notify` set the kernel announces its
    /// addresses (net/ipv4/devinet.c `inetdev_event`, net/ipv6/ndisc.c `ndisc_netdev_event`, `NETDEV_CHANGEADDR`).
    pub(crate) fn announce(&mut self, ifindex: u32, mac: Mac) -> Result<(), NetlinkError> {
        let mut batch = self.batch();
        batch.push(RTM_NEWLINK, 0, &ifinfomsg(ifindex, 0), |a| {
            a.bytes(IFLA_ADDRESS, &mac.0);
        });
        self.apply(batch)
    }

    pub(crate) fn link_by_name(&mut self, name: &IfName) -> Result<Option<Link>, NetlinkError> {
        let mut batch = self.batch();
        push_get_link(&mut batch, 0, |a| {
            a.str(IFLA_IFNAME, name.as_str());
        });
        self.get_link(batch)
    }

    /// All in one `sendmsg`.
    pub(crate) fn links_by_index<const N: usize>(
        &mut self,
        indices: [u32; N],
    ) -> Result<[Option<Link>; N], NetlinkError> {
        let mut batch = self.batch();
        for ifindex in indices {
            push_get_link(&mut batch, ifindex, |_| {});
        }
        let mut links = [const { None }; N];
        for (link, outcome) in links.iter_mut().zip(self.transact(batch)?) {
            *link = found(outcome)?;
        }
        Ok(links)
    }

    /// Deletes a link; false when it is gone already.
    pub(crate) fn delete_link(&mut self, ifindex: u32) -> Result<bool, NetlinkError> {
        let mut batch = self.batch();
        batch.push(RTM_DELLINK, 0, &ifinfomsg(ifindex, 0), |_| {});
        match self.apply(batch) {
            Err(e) if e.is(Errno::ENODEV) => Ok(false),
            other => other.map(|()| true),
        }
    }

    pub(crate) fn set_up(&mut self, ifindex: u32) -> Result<(), NetlinkError> {
        let mut batch = self.batch();
        push_up(&mut batch, ifindex, |_| {});
        self.apply(batch)
    }

    pub(crate) fn set_down(&mut self, ifindex: u32) -> Result<(), NetlinkError> {
        let mut batch = self.batch();
        batch.push(RTM_NEWLINK, 0, &ifinfomsg_changing(ifindex, 0, IFF_UP), |_| {});
        self.apply(batch)
    }

    fn get_link(&mut self, batch: Batch) -> Result<Option<Link>, NetlinkError> {
        found(self.transact(batch)?.pop().unwrap_or(Err(NetlinkError::Garbled)))
    }
}

/// What became of a question for a link.
pub(super) fn found(outcome: Outcome) -> Result<Option<Link>, NetlinkError> {
    match outcome {
        Ok(payloads) => payloads.first().and_then(|p| parse_link(p)).map(Some).ok_or(NetlinkError::Garbled),
        Err(e) if e.is(Errno::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

fn port_batch(mut batch: Batch, port: &PortOptions<'_>, ipv6: bool) -> Batch {
    batch.push(RTM_NEWLINK, 0, &ifinfomsg(port.ifindex, IFF_UP), |a| {
        a.bytes(IFLA_IFALIAS, port.alias.as_bytes());
        if ipv6 {
            a.nest(IFLA_AF_SPEC, |a| {
                a.nest(u16::from(AF_INET6), |a| {
                    a.u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE);
                });
            });
        }
        a.nest(IFLA_LINKINFO, |a| {
            a.bytes(IFLA_INFO_SLAVE_KIND, b"bridge").nest(IFLA_INFO_SLAVE_DATA, |a| {
                a.u8(IFLA_BRPORT_MODE, port.hairpin.into()).u8(IFLA_BRPORT_ISOLATED, port.isolated.into());
            });
        });
    });
    batch
}

pub(super) fn push_get_link(batch: &mut Batch, ifindex: u32, which: impl FnOnce(&mut Attributes<'_>)) {
    batch.push(RTM_GETLINK, 0, &ifinfomsg(ifindex, 0), |a| {
        which(a);
        a.u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    });
}

/// Appends the message that brings a link up.
pub(super) fn push_up(batch: &mut Batch, ifindex: u32, attributes: impl FnOnce(&mut Attributes<'_>)) {
    batch.push(RTM_NEWLINK, 0, &ifinfomsg(ifindex, IFF_UP), attributes);
}

/// `struct ifinfomsg`; the flags given are the flags changed.
fn ifinfomsg(ifindex: u32, set_flags: u32) -> [u8; 16] {
    ifinfomsg_changing(ifindex, set_flags, set_flags)
}

fn ifinfomsg_changing(ifindex: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = AF_UNSPEC;
    bytes[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(payload, 4)?,
        up: u32_at(payload, 8)? & IFF_UP != 0,
        mac: None,
        mtu: None,
        group: 0,
        master: None,
        peer: None,
        kind: None,
        operational: true,
        port: Port::default(),
    };
    for (kind, value) in attributes(payload.get(16..)?) {
        match kind {
            IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
            IFLA_MTU => link.mtu = u32_at(value, 0),
            IFLA_GROUP => link.group = u32_at(value, 0)?,
            IFLA_MASTER => link.master = u32_at(value, 0),
            IFLA_OPERSTATE => link.operational = matches!(value, [IF_OPER_UNKNOWN | IF_OPER_UP]),
            IFLA_LINK => link.peer = u32_at(value, 0),
            IFLA_LINKINFO => {
                link.kind = attribute(value, IFLA_INFO_KIND).and_then(text);
                let port = attribute(value, IFLA_INFO_SLAVE_DATA).unwrap_or_default();
                link.port = Port {
                    forwarding: attribute(port, IFLA_BRPORT_STATE) == Some(&[BR_STATE_FORWARDING]),
                    hairpin: attribute(port, IFLA_BRPORT_MODE) == Some(&[1]),
                    isolated: attribute(port, IFLA_BRPORT_ISOLATED) == Some(&[1]),
                };
            }
            _ => {}
        }
    }
    Some(link)
}
