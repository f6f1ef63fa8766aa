//! Wires a container to the bridge: first a plan without side effects, then the steps, undone when one fails.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use nix::errno::Errno;
use weft_shared::cni::{Code, InterfaceConf};
use weft_shared::deadline;
use weft_shared::names::LINK_GROUP;
use weft_shared::protocol::{Attachment, Failure, Reservation};
use weft_shared::{IfName, Mac, Subnet};

use crate::netlink::{Address, Link, LinkEvents, Netlink, NetlinkError, PortOptions, Route, VethPair};
use crate::netns::Netns;
use crate::{sys, sysctl};

/// `IFALIASZ` (linux/if.h) less the terminating zero.
const MAX_ALIAS: usize = 255;

/// Everything that will be asked of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) host_name: IfName,
    pub(crate) container_name: IfName,
    pub(crate) container_mac: Option<Mac>,
    pub(crate) bridge: u32,
    pub(crate) mtu: u32,
    pub(crate) hairpin: bool,
    pub(crate) isolated: bool,
    pub(crate) alias: String,
    pub(crate) addresses: Vec<Address>,
    pub(crate) routes: Vec<Route>,
    pub(crate) detects_duplicates: bool,
}

impl Plan {
    pub(crate) fn new(
        attachment: &Attachment,
        conf: &InterfaceConf,
        reserved: &Reservation,
    ) -> Result<Self, Failure> {
        // Nobody would wait for the end of the detection, and an address is not to be used before.
        if conf.detects_duplicates && reserved.addresses.iter().any(|a| a.address.is_ipv6()) {
            let msg = "enabledad = true: expected false: IPv6 addresses come from the node's own pool";
            return Err(Failure::new(Code::UnsupportedField, msg));
        }
        Ok(Self {
            host_name: reserved.host_ifname.clone(),
            container_name: attachment.ifname.clone(),
            container_mac: conf.mac,
            bridge: reserved.bridge_ifindex,
            mtu: reserved.mtu,
            hairpin: conf.bridge.hairpin,
            isolated: conf.bridge.isolated,
            alias: alias(attachment),
            addresses: reserved.addresses.iter().map(|a| a.address).collect(),
            routes: routes(reserved, conf)?,
            detects_duplicates: conf.detects_duplicates,
        })
    }
}

/// The default route of each family that has an address, the overlay's networks, then what the configuration names.
fn routes(reserved: &Reservation, conf: &InterfaceConf) -> Result<Vec<Route>, Failure> {
    let gateway =
        |v4: bool| reserved.addresses.iter().map(|a| a.gateway).find(|gateway| gateway.is_ipv4() == v4);
    let mut routes: Vec<Route> = Vec::new();
    for v4 in [true, false] {
        let Some(gateway) = gateway(v4) else { continue };
        let any = if v4 { [0; 4].into() } else { [0; 16].into() };
        let own = Subnet::new(any, 0);
        // As with the reference, a default route with a gateway of its own stands in for ours.
        let others = conf.routes.iter().any(|r| r.gw.is_some() && Some(r.dst.into()) == own);
        let default = own.filter(|_| conf.is_default_gateway && !others);
        let overlay = reserved.overlay.iter().copied().filter(|dst| dst.is_ipv4() == v4);
        for dst in default.into_iter().chain(overlay) {
            let route = Route::new(dst, gateway);
            // The subnet itself is on-link: a node that is the whole overlay needs no second route to it.
            let on_link = reserved.addresses.iter().any(|a| Subnet::from(a.address) == dst);
            if !on_link && !routes.contains(&route) {
                routes.push(route);
            }
        }
    }
    for asked in &conf.routes {
        let Some(gateway) = gateway(asked.dst.is_ipv4()).map(|own| asked.gw.unwrap_or(own)) else {
            let msg = format!(
                "ipam.routes[].dst = \"{}\": expected a family in which the pod has an address",
                asked.dst
            );
            return Err(Failure::new(Code::BadConfiguration, msg));
        };
        let route = Route { form: asked.form, ..Route::new(asked.dst.into(), gateway) };
        if !routes.contains(&route) {
            routes.push(route);
        }
    }
    Ok(routes)
}

/// For people who look at `ip link`: `network/containerID/ifname`.
fn alias(attachment: &Attachment) -> String {
    let mut alias = format!("{}/{}/{}", attachment.network, attachment.container_id, attachment.ifname);
    let end = (0..=MAX_ALIAS.min(alias.len())).rev().find(|i| alias.is_char_boundary(*i)).unwrap_or(0);
    alias.truncate(end);
    alias
}

/// The container's namespace with a netlink socket inside.
pub(crate) struct Pod {
    netns: Netns,
    netlink: Netlink,
}

impl Pod {
    pub(crate) fn open(netns: Netns) -> io::Result<Self> {
        let netlink = netns.enter(Netlink::open)?;
        Ok(Self { netns, netlink })
    }

    pub(crate) fn cookie(&self) -> Option<u64> {
        sys::netns_cookie(self.netlink.as_fd())
    }

    pub(crate) fn netlink(&mut self) -> &mut Netlink {
        &mut self.netlink
    }
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wired {
    pub(crate) host_ifindex: u32,
    /// In the container's namespace.
    pub(crate) container_ifindex: u32,
    pub(crate) host_mac: Mac,
    pub(crate) container_mac: Mac,
}

/// Carries the plan out. On failure nothing of it is left.
pub(crate) fn wire(plan: &Plan, host: &mut Netlink, pod: &mut Pod) -> Result<Wired, Failure> {
    let created = create(plan, host, pod)?;
    configure(plan, &created, host, pod).inspect_err(|_| {
        undo(host, created.index);
    })
}

/// Deletes the pair by its host end; false when somebody has done so before. A failure is not reported: the agent deletes
/// what is left of an attachment that was not committed, and this is already the way out of another error.
pub(crate) fn undo(host: &mut Netlink, host_ifindex: u32) -> bool {
    host.delete_link(host_ifindex).unwrap_or(true)
}

fn create(plan: &Plan, host: &mut Netlink, pod: &mut Pod) -> Result<Link, Failure> {
    let created = host.create_veth(&VethPair {
        host_name: &plan.host_name,
        group: LINK_GROUP,
        bridge: plan.bridge,
        mtu: plan.mtu,
        container_name: &plan.container_name,
        container_mac: plan.container_mac,
        container_netns: pod.netns.as_fd(),
    });
    created.map_err(|e| match e.is(Errno::EEXIST) {
        true => taken(plan, pod),
        false => failed(&format!("create veth {}", plan.host_name), &e),
    })
}

/// Which of the two names was taken.
fn taken(plan: &Plan, pod: &mut Pod) -> Failure {
    let msg = match pod.netlink.link_by_name(&plan.container_name) {
        Ok(Some(_)) => {
            format!(
                "CNI_IFNAME = {:?}: the container already has an interface of this name",
                plan.container_name
            )
        }
        _ => format!("host interface {} exists and belongs to another attachment", plan.host_name),
    };
    Failure::new(Code::NameTaken, msg)
}

fn configure(plan: &Plan, created: &Link, host: &mut Netlink, pod: &mut Pod) -> Result<Wired, Failure> {
    let step = |what: &'static str| move |e: NetlinkError| failed(what, &e);
    let port = PortOptions {
        ifindex: created.index,
        hairpin: plan.hairpin,
        isolated: plan.isolated,
        alias: &plan.alias,
    };
    host.set_port(&port).map_err(step("set the bridge port's options"))?;
    let gone = || failed("look the interface up", &"it is gone");
    let index = created.peer.ok_or_else(gone)?;
    let ipv6 = plan.addresses.iter().any(|a| a.is_ipv6());
    pod.netns
        .enter(|| sysctl::prepare(&plan.container_name, ipv6, plan.detects_duplicates))
        .map_err(|e| failed("set the interface's sysctls", &e))?;
    let container = pod
        .netlink
        .configure(index, &plan.addresses, &plan.routes)
        .map_err(step("set the interface's addresses and routes"))?;
    let (Some(container_mac), Some(host_mac)) = (container.and_then(|link| link.mac), created.mac) else {
        return Err(gone());
    };
    // Neighbours that are told before would not hear it, and go on sending to the address's former owner for as long as half
    // a minute.
    await_forwarding(host, created.index, plan.bridge).map_err(step("wait for the bridge port"))?;
    Ok(Wired { host_ifindex: created.index, container_ifindex: index, host_mac, container_mac })
}

/// Tells the neighbours of the container's addresses.
///
/// The kernel announces, not a packet socket of ours: closing one waits for an RCU grace period (af_packet.c
/// `packet_release`), 8 to 30 ms measured, ten times the rest of the ADD.
pub(crate) fn announce(wired: &Wired, pod: &mut Pod) -> Result<(), Failure> {
    pod.netlink
        .announce(wired.container_ifindex, wired.container_mac)
        .map_err(|e| failed("announce the addresses", &e))
}

fn await_forwarding(host: &mut Netlink, port: u32, bridge: u32) -> Result<(), NetlinkError> {
    let deadline = Instant::now() + deadline::FORWARDING;
    if forwards(host, port, bridge)? {
        return Ok(());
    }
    let events = LinkEvents::subscribe()?;
    // Only now can no change slip between the look and the waiting.
    while !forwards(host, port, bridge)? && events.wait_for(&[port, bridge], deadline)? {}
    Ok(())
}

/// The host sends by the bridge itself. That has no carrier without a port, and is told of its first one's by a work queue
/// (net/core/link_watch.c): until then its queue drops what it gets, the first look for the pod's MAC above all, and the
/// second one comes a second later.
fn forwards(host: &mut Netlink, port: u32, bridge: u32) -> Result<bool, NetlinkError> {
    let [port, bridge] = host.links_by_index([port, bridge])?;
    // Not so the bridge, which the agent makes anew.
    let deleted = || NetlinkError::Refused { errno: Errno::ENODEV, text: "deleted meanwhile".into() };
    Ok(port.ok_or_else(deleted)?.port.forwarding && bridge.is_some_and(|link| link.operational))
}

fn failed(what: &str, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(Code::Wiring, format!("cannot {what}: {why}"))
}

#[cfg(test)]
mod tests {
    use weft_shared::protocol::{BridgeOptions, PodAddress};

    use super::*;

    fn attachment(id: &str) -> Attachment {
        Attachment {
            network: "weft".parse().expect("name"),
            container_id: id.parse().expect("ID"),
            ifname: "eth0".parse().expect("name"),
        }
    }

    fn reserved(addresses: &[(&str, &str)], overlay: &[&str]) -> Reservation {
        Reservation {
            addresses: addresses
                .iter()
                .map(|(address, gateway)| PodAddress {
                    address: address.parse().expect("address"),
                    gateway: gateway.parse().expect("gateway"),
                })
                .collect(),
            overlay: overlay.iter().map(|o| o.parse().expect("subnet")).collect(),
            mtu: 1450,
            bridge: "cni0".parse().expect("name"),
            bridge_ifindex: 9,
            bridge_mac: Mac([2, 0, 0, 0, 0, 1]),
            host_ifname: "vethabc".parse().expect("name"),
            host_ports: vec![],
            bandwidth: Default::default(),
            options: None,
        }
    }

    fn conf(is_default_gateway: bool) -> InterfaceConf {
        let bridge = BridgeOptions {
            name: "cni0".parse().expect("name"),
            hairpin: true,
            isolated: false,
            mtu: None,
            force_address: false,
            masquerade: false,
        };
        InterfaceConf {
            bridge,
            is_default_gateway,
            dns: Default::default(),
            requested: vec![],
            mac: None,
            host_ports: vec![],
            bandwidth: Default::default(),
            routes: vec![],
            resolv_conf: None,
            detects_duplicates: false,
        }
    }

    fn planned(reserved: &Reservation, default: bool) -> Vec<String> {
        planned_with(reserved, &conf(default))
    }

    fn planned_with(reserved: &Reservation, conf: &InterfaceConf) -> Vec<String> {
        let plan = Plan::new(&attachment("c"), conf, reserved).expect("plan");
        plan.routes.iter().map(|r| format!("{} via {}", r.dst, r.gateway)).collect()
    }

    #[test]
    fn routes_go_through_the_gateway_of_their_family() {
        let v4 = reserved(&[("10.1.2.5/24", "10.1.2.1")], &["10.1.0.0/16", "fd00::/48"]);
        assert_eq!(planned(&v4, true), ["0.0.0.0/0 via 10.1.2.1", "10.1.0.0/16 via 10.1.2.1"]);
        assert_eq!(planned(&v4, false), ["10.1.0.0/16 via 10.1.2.1"]);
        let dual = reserved(
            &[
                ("10.1.2.5/24", "10.1.2.1"),
                ("10.1.2.6/24", "10.1.2.1"),
                ("fd00:0:0:2::5/64", "fd00:0:0:2::1"),
            ],
            &["fd00::/48", "10.1.0.0/16"],
        );
        assert_eq!(
            planned(&dual, true),
            [
                "0.0.0.0/0 via 10.1.2.1",
                "10.1.0.0/16 via 10.1.2.1",
                "::/0 via fd00:0:0:2::1",
                "fd00::/48 via fd00:0:0:2::1"
            ]
        );
        let whole = reserved(&[("10.1.2.5/24", "10.1.2.1")], &["10.1.2.0/24"]);
        assert!(planned(&whole, false).is_empty(), "the connected route serves");
    }

    #[test]
    fn routes_of_the_configuration_come_last_and_may_replace_the_default() {
        let v4 = reserved(&[("10.1.2.5/24", "10.1.2.1")], &["10.1.0.0/16"]);
        let route = |dst: &str, gw: Option<&str>| weft_shared::cni::Route {
            dst: dst.parse().expect("dst"),
            gw: gw.map(|gw| gw.parse().expect("gw")),
            form: Default::default(),
        };
        let with = |routes: Vec<_>| InterfaceConf { routes, ..conf(true) };
        let beside =
            with(vec![route("192.0.2.0/24", None), route("0.0.0.0/0", None), route("192.0.2.0/24", None)]);
        assert_eq!(
            planned_with(&v4, &beside),
            ["0.0.0.0/0 via 10.1.2.1", "10.1.0.0/16 via 10.1.2.1", "192.0.2.0/24 via 10.1.2.1"]
        );
        let instead = with(vec![route("0.0.0.0/0", Some("10.1.2.9"))]);
        assert_eq!(planned_with(&v4, &instead), ["10.1.0.0/16 via 10.1.2.1", "0.0.0.0/0 via 10.1.2.9"]);
        let stranger = with(vec![route("fd00::/48", Some("fd00::1"))]);
        let refused = Plan::new(&attachment("c"), &stranger, &v4).expect_err("no IPv6 here");
        assert!(refused.is(Code::BadConfiguration) && refused.msg.contains("fd00::/48"), "{refused}");
    }

    #[test]
    fn duplicates_are_not_looked_for_where_nobody_would_wait() {
        let probing = InterfaceConf { detects_duplicates: true, ..conf(true) };
        let plan =
            |addresses: &[(&str, &str)]| Plan::new(&attachment("c"), &probing, &reserved(addresses, &[]));
        assert!(plan(&[("10.1.2.5/24", "10.1.2.1")]).expect("IPv4").detects_duplicates);
        assert!(plan(&[("fd00::5/64", "fd00::1")]).expect_err("IPv6").is(Code::UnsupportedField));
    }

    #[test]
    fn an_alias_fits_the_kernel() {
        assert_eq!(alias(&attachment("c1")), "weft/c1/eth0");
        let long = alias(&attachment(&"a".repeat(255)));
        assert_eq!((long.len(), long.starts_with("weft/aaa")), (255, true));
    }
}
