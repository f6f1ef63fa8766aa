//! A network prefix with its host bits cleared, of either family.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// An address prefix whose host bits are zero: a lease's subnet, the overlay's network, a route's destination.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet(IpNetwork);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("subnet {0:?} must be an address and a prefix length such as 10.5.0.0/16")]
pub struct BadSubnet(String);

#[expect(clippy::len_without_is_empty, reason = "a prefix length, not a number of elements")]
impl Subnet {
    /// The subnet of length `len` that holds `addr`; `None` when `len` is longer than the family's address.
    pub fn new(addr: IpAddr, len: u8) -> Option<Self> {
        IpNetwork::new(addr, len).ok().map(Self::from)
    }

    /// The host route to one address.
    pub fn host(addr: IpAddr) -> Self {
        Self(IpNetwork::from(addr))
    }

    /// The first address, the network's own.
    pub fn addr(&self) -> IpAddr {
        self.0.network()
    }

    /// Prefix length in bits.
    pub fn len(&self) -> u8 {
        self.0.prefix()
    }

    pub fn is_ipv4(&self) -> bool {
        self.0.is_ipv4()
    }

    /// The last address, in IPv4 the broadcast address.
    pub fn last(&self) -> IpAddr {
        match self.0 {
            IpNetwork::V4(net) => net.broadcast().into(),
            IpNetwork::V6(net) => net.broadcast().into(),
        }
    }

    /// The address `n` places after the network's own, if it lies inside.
    pub fn nth(&self, n: u32) -> Option<IpAddr> {
        let addr = match self.addr() {
            IpAddr::V4(a) => u32::from(a).checked_add(n).map(|v| IpAddr::from(Ipv4Addr::from(v))),
            IpAddr::V6(a) => u128::from(a).checked_add(n.into()).map(|v| IpAddr::from(Ipv6Addr::from(v))),
        };
        addr.filter(|a| self.contains(*a))
    }

    /// The pods' gateway: the first address after the network's own.
    pub fn gateway(&self) -> IpAddr {
        self.nth(1).unwrap_or_else(|| self.addr())
    }

    /// `addr` with this subnet's prefix length.
    pub fn with_len(&self, addr: IpAddr) -> Option<IpNetwork> {
        IpNetwork::new(addr, self.len()).ok()
    }

    pub fn contains(&self, addr: IpAddr) -> bool {
        self.0.contains(addr)
    }

    /// Whether `other` lies wholly inside this subnet; a subnet covers itself.
    pub fn covers(&self, other: Subnet) -> bool {
        self.len() <= other.len() && self.contains(other.addr())
    }

    pub fn overlaps(&self, other: Subnet) -> bool {
        self.covers(other) || other.covers(*self)
    }
}

impl From<IpNetwork> for Subnet {
    /// Clears the host bits.
    fn from(net: IpNetwork) -> Self {
        match net {
            IpNetwork::V4(v4) => {
                Self(ipnetwork::Ipv4Network::new(v4.network(), v4.prefix()).map_or(net, Into::into))
            }
            IpNetwork::V6(v6) => {
                Self(ipnetwork::Ipv6Network::new(v6.network(), v6.prefix()).map_or(net, Into::into))
            }
        }
    }
}

impl From<Subnet> for IpNetwork {
    fn from(subnet: Subnet) -> Self {
        subnet.0
    }
}

impl FromStr for Subnet {
    type Err = BadSubnet;

    fn from_str(text: &str) -> Result<Self, BadSubnet> {
        let bad = || BadSubnet(text.to_owned());
        // IpNetwork also reads a bare address and a dotted mask; a subnet is written with its length.
        let (_, len) = text.split_once('/').ok_or_else(bad)?;
        if len.is_empty() || !len.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        text.parse::<IpNetwork>().map(Self::from).map_err(|_| bad())
    }
}

impl TryFrom<String> for Subnet {
    type Error = BadSubnet;

    fn try_from(text: String) -> Result<Self, BadSubnet> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr(), self.len())
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().expect(text)
    }

    #[test]
    fn host_bits_are_cleared() {
        assert_eq!(subnet("10.5.52.7/24").to_string(), "10.5.52.0/24");
        assert_eq!(subnet("fd00::9/64").to_string(), "fd00::/64");
        for bad in [
            "",
            "10.5.0.0",
            "10.5.0.0/",
            "10.5.0.0/33",
            "10.5.0/16",
            "10.5.0.0/255.255.0.0",
            "fd00::/129",
            "x/8",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn inside_and_beside() {
        let net = subnet("10.5.0.0/16");
        assert!(net.covers(subnet("10.5.3.0/24")));
        assert!(net.covers(net));
        assert!(!subnet("10.5.3.0/24").covers(net));
        assert!(net.overlaps(subnet("10.0.0.0/8")));
        assert!(!net.overlaps(subnet("10.6.0.0/16")));
        assert!(!net.covers(subnet("fd00::/64")));
        assert_eq!(subnet("10.5.3.0/24").gateway().to_string(), "10.5.3.1");
        assert_eq!(subnet("10.5.3.0/30").nth(4), None);
        assert_eq!(subnet("10.5.3.0/24").last().to_string(), "10.5.3.255");
    }
}
