//! Which interface carries the underlay, and which of its addresses: flannel's rules (main.go, pkg/ipmatch, pkg/ip).
//!
//! Pure but for `look`: that lists interfaces and looks routes up, here it is decided.

mod follow;
mod look;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::IpNetwork;
use regex::bytes::Regex;
use weft_shared::IfName;

use crate::object::AddrScope;

pub use follow::{fits, follow_underlay};
pub use look::find_underlay;

/// How the operator wants the underlay's interface to be found; all empty means by the default route.
#[derive(Debug, Clone, Default)]
pub struct UnderlayChoice {
    pub ifaces: Vec<IfaceSpec>,
    pub regexes: Vec<Regex>,
    pub can_reach: Option<Ipv4Addr>,
    pub public_ip: Option<Ipv4Addr>,
    pub public_ip_from: PublicIpFrom,
}

/// Who says what the public IP is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PublicIpFrom {
    #[default]
    Option,
    /// An operator, beside the Node.
    Node,
    /// The lease that this node had last.
    Lease,
}

impl fmt::Display for PublicIpFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Option => "--public-ip",
            Self::Node => "the Node's annotation node-public-ip",
            Self::Lease => "the lease",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IfaceSpec {
    Addr(Ipv4Addr),
    Name(IfName),
}

impl UnderlayChoice {
    /// Whether nothing says which interface, so that the public address or the default route decides.
    pub fn is_open(&self) -> bool {
        self.ifaces.is_empty() && self.regexes.is_empty() && self.can_reach.is_none()
    }
}

/// The node's interfaces and the routes that a choice may ask for.
#[derive(Debug, Clone, Default)]
pub struct HostNetwork {
    /// In any order.
    pub ifaces: Vec<HostIface>,
    /// Interface of the first default route in the main table, whatever its metric.
    pub default_route: Option<u32>,
    /// Where the kernel routes [`UnderlayChoice::can_reach`], if that is set and there is a route.
    pub reach: Option<ReachRoute>,
}

#[derive(Debug, Clone)]
pub struct HostIface {
    pub index: u32,
    pub name: IfName,
    pub mtu: u32,
    pub up: bool,
    /// Weft's own, or a bridge of its pods: no candidate worth naming, and there are as many as pods.
    pub of_weft: bool,
    /// In the kernel's order.
    pub addrs: Vec<HostAddr>,
}

/// An address as RTM_NEWADDR tells it (linux/if_addr.h).
#[derive(Debug, Clone, Copy)]
pub struct HostAddr {
    pub addr: IpNetwork,
    pub scope: AddrScope,
    /// IFA_F_DEPRECATED.
    pub deprecated: bool,
    /// Not IFA_F_PERMANENT: from DHCP or a router.
    pub dynamic: bool,
    /// IFA_F_TEMPORARY; in IPv4 this bit says secondary and is no reason to avoid an address.
    pub temporary: bool,
}

#[derive(Debug, Clone, Copy)]
pub struct ReachRoute {
    pub index: u32,
    /// The source that the kernel would take.
    pub source: Option<Ipv4Addr>,
}

/// The interface that carries packets between nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    pub iface: IfName,
    pub index: u32,
    pub addr: Ipv4Addr,
    pub mtu: u32,
    /// What peers send to.
    pub public_ip: Ipv4Addr,
    /// Which setting decided, for people: `--iface eth0`, `default route`.
    pub chosen_by: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoUnderlay {
    #[error("no interface for the underlay: {tried}; interfaces here: {here}")]
    NoMatch { tried: String, here: String },
    #[error(
        "no interface has the address {ip} of {from}; behind address translation also give --iface; \
         interfaces here: {here}"
    )]
    PublicIpNotLocal { ip: Ipv4Addr, from: PublicIpFrom, here: String },
    #[error(
        "no default route to choose the underlay's interface by; give --iface, --iface-regex or --iface-can-reach; \
         interfaces here: {here}"
    )]
    NoDefaultRoute { here: String },
    #[error("interface {iface} has no IPv4 address that peers could send to; it has: {has}")]
    NoAddress { iface: IfName, has: String },
    #[error(
        "interface {0} is the loopback, which no packet leaves the host by: expected the interface between the nodes \
         (--iface; --public-ip may be an address of another)"
    )]
    Loopback(IfName),
    #[error("interface {0} has an MTU of 0")]
    NoMtu(IfName),
}

/// LOOPBACK_IFINDEX (include/net/flow.h): the same in every network namespace, whatever its name.
const LOOPBACK: u32 = 1;

/// Decides. Candidates are tried in flannel's order and the first that yields an address wins.
pub fn choose_underlay(choice: &UnderlayChoice, host: &HostNetwork) -> Result<Underlay, NoUnderlay> {
    let finder = Finder::new(host);
    let found = match choice.public_ip {
        None if choice.is_open() => finder.by_default_route().and_then(outward)?,
        Some(ip) if choice.is_open() => finder.by_public_ip(ip, choice.public_ip_from).and_then(outward)?,
        _ => finder.by_choice(choice)?,
    };
    if found.iface.mtu == 0 {
        return Err(NoUnderlay::NoMtu(found.iface.name.clone()));
    }
    Ok(Underlay {
        iface: found.iface.name.clone(),
        index: found.iface.index,
        addr: found.addr,
        mtu: found.iface.mtu,
        public_ip: choice.public_ip.unwrap_or(found.addr),
        chosen_by: found.chosen_by,
    })
}

struct Found<'a> {
    iface: &'a HostIface,
    addr: Ipv4Addr,
    chosen_by: String,
}

struct Finder<'a> {
    host: &'a HostNetwork,
    /// By index: a regular expression takes the first that matches.
    ifaces: Vec<&'a HostIface>,
}

impl<'a> Finder<'a> {
    fn new(host: &'a HostNetwork) -> Self {
        let mut ifaces: Vec<_> = host.ifaces.iter().collect();
        ifaces.sort_by_key(|iface| iface.index);
        Self { host, ifaces }
    }

    fn by_default_route(&self) -> Result<Found<'a>, NoUnderlay> {
        let iface = self.host.default_route.and_then(|index| self.with_index(index));
        let iface = iface.ok_or_else(|| NoUnderlay::NoDefaultRoute { here: self.listing() })?;
        best(iface, "default route".to_owned())
    }

    fn by_public_ip(&self, ip: Ipv4Addr, from: PublicIpFrom) -> Result<Found<'a>, NoUnderlay> {
        self.with_addr(ip, format!("{from} {ip}")).ok_or_else(|| NoUnderlay::PublicIpNotLocal {
            ip,
            from,
            here: self.listing(),
        })
    }

    fn by_choice(&self, choice: &UnderlayChoice) -> Result<Found<'a>, NoUnderlay> {
        let mut tried = Vec::new();
        let outward = |found: Found<'a>| {
            let chosen_by = found.chosen_by.clone();
            outward(found).map_err(|why| format!("{chosen_by}: {why}"))
        };
        for spec in &choice.ifaces {
            match self.by_spec(spec).and_then(outward) {
                Ok(found) => return Ok(found),
                Err(why) => tried.push(why),
            }
        }
        for regex in &choice.regexes {
            match self.by_regex(regex).and_then(outward) {
                Ok(found) => return Ok(found),
                Err(why) => tried.push(why),
            }
        }
        if let Some(target) = choice.can_reach {
            match self.by_reach(target).and_then(outward) {
                Ok(found) => return Ok(found),
                Err(why) => tried.push(why),
            }
        }
        Err(NoUnderlay::NoMatch { tried: tried.join(", "), here: self.listing() })
    }

    fn by_spec(&self, spec: &IfaceSpec) -> Result<Found<'a>, String> {
        match spec {
            IfaceSpec::Addr(ip) => self
                .with_addr(*ip, format!("--iface {ip}"))
                .ok_or_else(|| format!("--iface {ip}: no such address")),
            IfaceSpec::Name(name) => {
                let iface = self.ifaces.iter().find(|iface| iface.name == *name);
                let iface = iface.ok_or_else(|| format!("--iface {name}: no such interface"))?;
                best(iface, format!("--iface {name}")).map_err(|e| format!("--iface {name}: {e}"))
            }
        }
    }

    fn by_regex(&self, regex: &Regex) -> Result<Found<'a>, String> {
        let chosen_by = format!("--iface-regex {regex}");
        let by_addr = self.ifaces.iter().filter(|iface| iface.index != LOOPBACK).find_map(|iface| {
            let addrs = preferred(iface).into_iter();
            let addr = addrs.into_iter().find(|ip| regex.is_match(ip.to_string().as_bytes()))?;
            Some(Found { iface, addr, chosen_by: chosen_by.clone() })
        });
        if let Some(found) = by_addr {
            return Ok(found);
        }
        let by_name = self.ifaces.iter().find(|iface| regex.is_match(iface.name.as_str().as_bytes()));
        let iface = by_name.ok_or_else(|| format!("{chosen_by}: matches neither an address nor a name"))?;
        best(iface, chosen_by.clone()).map_err(|e| format!("{chosen_by}: {e}"))
    }

    fn by_reach(&self, target: Ipv4Addr) -> Result<Found<'a>, String> {
        let chosen_by = format!("--iface-can-reach {target}");
        let route = self.host.reach.ok_or_else(|| format!("{chosen_by}: no route to it"))?;
        let iface =
            self.with_index(route.index).ok_or_else(|| format!("{chosen_by}: its interface is gone"))?;
        match route.source {
            Some(addr) => Ok(Found { iface, addr, chosen_by }),
            None => best(iface, chosen_by.clone()).map_err(|e| format!("{chosen_by}: {e}")),
        }
    }

    fn with_index(&self, index: u32) -> Option<&'a HostIface> {
        self.ifaces.iter().copied().find(|iface| iface.index == index)
    }

    fn with_addr(&self, ip: Ipv4Addr, chosen_by: String) -> Option<Found<'a>> {
        let owns = |iface: &&HostIface| iface.addrs.iter().any(|a| a.addr.ip() == IpAddr::V4(ip));
        let iface = self.ifaces.iter().copied().find(owns)?;
        Some(Found { iface, addr: ip, chosen_by })
    }

    fn listing(&self) -> String {
        let candidates = self.ifaces.iter().filter(|iface| !iface.of_weft);
        let lines: Vec<String> = candidates.map(|iface| Listed(iface).to_string()).collect();
        if lines.is_empty() { "none".to_owned() } else { lines.join(", ") }
    }
}

/// An address of the host's may well be on the loopback, but by it no peer is reached.
fn outward(found: Found<'_>) -> Result<Found<'_>, NoUnderlay> {
    match found.iface.index {
        LOOPBACK => Err(NoUnderlay::Loopback(found.iface.name.clone())),
        _ => Ok(found),
    }
}

/// The interface with the best of its addresses.
fn best<'a>(iface: &'a HostIface, chosen_by: String) -> Result<Found<'a>, NoUnderlay> {
    let addr = preferred(iface).first().copied();
    let no_address = || NoUnderlay::NoAddress { iface: iface.name.clone(), has: Listed(iface).addresses() };
    Ok(Found { iface, addr: addr.ok_or_else(no_address)?, chosen_by })
}

/// Usable IPv4 addresses: global before link-local, permanent before dynamic, else in the kernel's order.
fn preferred(iface: &HostIface) -> Vec<Ipv4Addr> {
    let mut usable: Vec<(bool, bool, bool, Ipv4Addr)> = Vec::new();
    for HostAddr { addr, scope, deprecated, dynamic, temporary } in &iface.addrs {
        let IpAddr::V4(ip) = addr.ip() else { continue };
        let unicast = !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast());
        if unicast && !deprecated {
            usable.push((ip.is_link_local() || *scope != AddrScope::Global, *dynamic, *temporary, ip));
        }
    }
    usable.sort_by_key(|(local, dynamic, temporary, _)| (*local, *dynamic, *temporary));
    usable.into_iter().map(|(.., ip)| ip).collect()
}

/// `eth0 (192.168.1.2/24)`, for the operator who has to pick one.
struct Listed<'a>(&'a HostIface);

impl Listed<'_> {
    fn addresses(&self) -> String {
        let addrs: Vec<String> = self.0.addrs.iter().map(|a| a.addr.to_string()).collect();
        if addrs.is_empty() { "no address".to_owned() } else { addrs.join(" ") }
    }
}

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let down = if self.0.up { "" } else { ", down" };
        write!(f, "{} ({}{down})", self.0.name, self.addresses())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regex(text: &str) -> Option<Regex> {
        Regex::new(text).ok()
    }

    fn addr(text: &str) -> HostAddr {
        HostAddr {
            addr: text.parse().expect(text),
            scope: AddrScope::Global,
            deprecated: false,
            dynamic: false,
            temporary: false,
        }
    }

    fn iface(index: u32, name: &str, addrs: &[&str]) -> HostIface {
        let addrs = addrs.iter().map(|a| addr(a)).collect();
        HostIface { index, name: name.parse().expect(name), mtu: 1500, up: true, of_weft: false, addrs }
    }

    /// Listed out of order on purpose.
    fn host() -> HostNetwork {
        HostNetwork {
            ifaces: vec![
                iface(4, "eth1", &["192.168.9.7/24", "fd00::7/64"]),
                iface(1, "lo", &["127.0.0.1/8", "::1/128"]),
                iface(3, "dummy0", &["172.16.30.5/24", "172.16.31.5/24", "10.7.0.1/16", "2001:db8::5/64"]),
                iface(2, "eth0", &["169.254.3.3/16", "10.0.0.2/24"]),
                iface(5, "empty0", &["fd01::1/64"]),
            ],
            default_route: Some(2),
            reach: Some(ReachRoute { index: 4, source: Some(Ipv4Addr::new(192, 168, 9, 7)) }),
        }
    }

    fn choice(
        ifaces: &[&str],
        regexes: &[&str],
        can_reach: Option<&str>,
        public_ip: Option<&str>,
    ) -> UnderlayChoice {
        let spec = |text: &&str| match text.parse() {
            Ok(ip) => IfaceSpec::Addr(ip),
            Err(_) => IfaceSpec::Name(text.parse().expect("name")),
        };
        UnderlayChoice {
            ifaces: ifaces.iter().map(spec).collect(),
            regexes: regexes.iter().map(|r| regex(r).expect(r)).collect(),
            can_reach: can_reach.map(|ip| ip.parse().expect(ip)),
            public_ip: public_ip.map(|ip| ip.parse().expect(ip)),
            public_ip_from: PublicIpFrom::Option,
        }
    }

    #[test]
    fn the_first_match_in_flannels_order_wins() {
        /// `--iface`, `--iface-regex`, `--iface-can-reach`, `--public-ip`, and what comes out.
        type Case = (
            &'static [&'static str],
            &'static [&'static str],
            Option<&'static str>,
            Option<&'static str>,
            &'static str,
        );
        let cases: &[Case] = &[
            (&[], &[], None, None, "eth0 10.0.0.2 10.0.0.2 default route"),
            (&[], &[], None, Some("172.16.31.5"), "dummy0 172.16.31.5 172.16.31.5 --public-ip 172.16.31.5"),
            (&["dummy0"], &[], None, None, "dummy0 172.16.30.5 172.16.30.5 --iface dummy0"),
            (&["dummy0"], &[], None, Some("203.0.113.9"), "dummy0 172.16.30.5 203.0.113.9 --iface dummy0"),
            (&["10.7.0.1"], &[], None, None, "dummy0 10.7.0.1 10.7.0.1 --iface 10.7.0.1"),
            (
                &["nope", "9.9.9.9", "empty0", "eth1"],
                &["eth0"],
                None,
                None,
                "eth1 192.168.9.7 192.168.9.7 --iface eth1",
            ),
            (&[], &[r"172\.16\.31"], None, None, r"dummy0 172.16.31.5 172.16.31.5 --iface-regex 172\.16\.31"),
            // Unanchored; an address of a later interface beats a name of an earlier one.
            (&[], &["y0|168.9"], None, None, "eth1 192.168.9.7 192.168.9.7 --iface-regex y0|168.9"),
            (
                &[],
                &["^ETH1$", "(?i)^ETH1$"],
                None,
                None,
                "eth1 192.168.9.7 192.168.9.7 --iface-regex (?i)^ETH1$",
            ),
            (
                &["nope"],
                &["nope"],
                Some("8.8.8.8"),
                None,
                "eth1 192.168.9.7 192.168.9.7 --iface-can-reach 8.8.8.8",
            ),
            (&[], &["th"], Some("8.8.8.8"), None, "eth0 10.0.0.2 10.0.0.2 --iface-regex th"),
        ];
        for (ifaces, regexes, reach, public, expected) in cases {
            let found = choose_underlay(&choice(ifaces, regexes, *reach, *public), &host()).expect(expected);
            let text = format!("{} {} {} {}", found.iface, found.addr, found.public_ip, found.chosen_by);
            assert_eq!(text, *expected);
            assert_eq!(found.mtu, 1500);
        }
    }

    #[test]
    fn of_many_addresses_the_most_lasting_one() {
        let pick = |change: &dyn Fn(&mut Vec<HostAddr>)| {
            let mut eth = iface(2, "eth0", &["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24"]);
            change(&mut eth.addrs);
            let host = HostNetwork { ifaces: vec![eth], default_route: Some(2), reach: None };
            choose_underlay(&UnderlayChoice::default(), &host).expect("an address").addr.octets()[3]
        };
        assert_eq!(pick(&|_| {}), 1);
        assert_eq!(pick(&|a| a[0].dynamic = true), 2);
        assert_eq!(pick(&|a| a[0].temporary = true), 2);
        assert_eq!(pick(&|a| a[0].deprecated = true), 2);
        assert_eq!(pick(&|a| a[0].scope = AddrScope::Link), 2);
        // Scope counts before lifetime.
        assert_eq!(
            pick(&|a| {
                a[0].scope = AddrScope::Link;
                a[1].dynamic = true;
                a[2].dynamic = true;
            }),
            2
        );
    }

    #[test]
    fn the_loopback_carries_no_underlay() {
        let mut host = host();
        host.ifaces[1].addrs.push(addr("10.99.0.1/32"));
        host.reach = Some(ReachRoute { index: 1, source: Some(Ipv4Addr::new(10, 99, 0, 1)) });
        for refused in [
            choice(&["lo"], &[], None, None),
            choice(&["127.0.0.1"], &[], None, None),
            choice(&["10.99.0.1"], &[], None, None),
            choice(&[], &["^lo$"], None, None),
            choice(&[], &["^10.99"], None, None),
            choice(&[], &[], Some("10.99.0.1"), None),
            choice(&[], &[], None, Some("10.99.0.1")),
        ] {
            let error = choose_underlay(&refused, &host).expect_err("the loopback").to_string();
            assert!(error.contains("is the loopback") || error.contains("matches neither"), "{error}");
        }
        // The next of the list is tried, and the address may be the public one of another interface.
        for (wanted, expected) in [
            (choice(&["lo", "eth0"], &[], None, None), "eth0 10.0.0.2"),
            (choice(&[], &["^10"], None, None), "eth0 10.0.0.2"),
            (choice(&["eth0"], &[], None, Some("10.99.0.1")), "eth0 10.99.0.1"),
        ] {
            let found = choose_underlay(&wanted, &host).expect(expected);
            assert_eq!(format!("{} {}", found.iface, found.public_ip), expected);
        }
    }

    #[test]
    fn what_is_wefts_own_is_not_listed() {
        let mut host = host();
        host.default_route = None;
        host.ifaces.push(HostIface { of_weft: true, ..iface(9, "cni0", &["10.5.1.1/24"]) });
        let error = choose_underlay(&UnderlayChoice::default(), &host).expect_err("no route").to_string();
        assert!(error.contains("eth1 (192.168.9.7/24 ") && !error.contains("cni0"), "{error}");
    }

    #[test]
    fn a_failure_lists_what_is_there() {
        let error = |choice: &UnderlayChoice, host: &HostNetwork| {
            choose_underlay(choice, host).expect_err("no interface fits").to_string()
        };
        let none = error(&choice(&["nope", "empty0"], &["zz"], None, None), &host());
        for part in [
            "--iface nope: no such interface",
            "--iface empty0: interface empty0 has no IPv4 address",
            "--iface-regex zz: matches neither",
            "eth0 (169.254.3.3/16 10.0.0.2/24)",
            "empty0 (fd01::1/64)",
        ] {
            assert!(none.contains(part), "{part:?} is not in {none:?}");
        }
        let nat = error(&choice(&[], &[], None, Some("203.0.113.9")), &host());
        assert!(
            nat.contains("203.0.113.9 of --public-ip; behind address translation also give --iface"),
            "{nat}"
        );
        let annotated = UnderlayChoice {
            public_ip_from: PublicIpFrom::Node,
            ..choice(&[], &[], None, Some("203.0.113.9"))
        };
        let wish = error(&annotated, &host());
        assert!(wish.contains("203.0.113.9 of the Node's annotation node-public-ip; behind"), "{wish}");
        let mut lone = host();
        lone.default_route = None;
        lone.reach = None;
        lone.ifaces[0].up = false;
        assert!(error(&UnderlayChoice::default(), &lone).contains("no default route"));
        let unreachable = error(&choice(&[], &[], Some("8.8.8.8"), None), &lone);
        assert!(unreachable.contains("--iface-can-reach 8.8.8.8: no route"), "{unreachable}");
        assert!(unreachable.contains("eth1 (192.168.9.7/24 fd00::7/64, down)"), "{unreachable}");
        lone.ifaces[3].mtu = 0;
        assert!(error(&choice(&["eth0"], &[], None, None), &lone).contains("MTU of 0"));
    }
}
