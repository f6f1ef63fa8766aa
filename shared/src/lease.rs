//! A subnet lease as flannel keeps it: a key that is the subnet, a JSON value that says where its node is.
//!
//! Byte-exact with flannel (pkg/lease, pkg/subnet): a running flanneld reads what weft writes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Mac, Subnet};

/// A leased subnet, of one family or of two: `10.5.52.0-24`, or `10.5.52.0-24&fd00:12:13::-64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LeaseKey {
    pub v4: Subnet,
    pub v6: Option<Subnet>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("lease key {0:?} must look like 10.5.52.0-24 or 10.5.52.0-24&fd00:12:13::-64")]
pub struct BadLeaseKey(String);

impl LeaseKey {
    /// The leased subnets, IPv4 first.
    pub fn subnets(&self) -> impl Iterator<Item = Subnet> {
        [Some(self.v4), self.v6].into_iter().flatten()
    }

    /// Whether the two share any address, in either family.
    pub fn overlaps(&self, other: &LeaseKey) -> bool {
        self.v4.overlaps(other.v4) || self.v6.zip(other.v6).is_some_and(|(a, b)| a.overlaps(b))
    }
}

impl FromStr for LeaseKey {
    type Err = BadLeaseKey;

    /// Reads the last path component of a store key. flannel's limits: IPv4 length at most 31, IPv6 at most 127.
    fn from_str(text: &str) -> Result<Self, BadLeaseKey> {
        let bad = || BadLeaseKey(text.to_owned());
        let part = |part: &str, max: u8| {
            let (addr, len) = part.rsplit_once('-')?;
            let digits = !len.is_empty() && len.bytes().all(|b| b.is_ascii_digit());
            let len = len.parse().ok().filter(|len| digits && *len <= max)?;
            Subnet::new(addr.parse().ok()?, len)
        };
        let (v4, v6) = match text.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        let v4 = part(v4, 31).filter(Subnet::is_ipv4).ok_or_else(bad)?;
        let v6 = match v6 {
            Some(v6) => Some(part(v6, 127).filter(|s| !s.is_ipv4()).ok_or_else(bad)?),
            None => None,
        };
        Ok(Self { v4, v6 })
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.v4.addr(), self.v4.len())?;
        match self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.addr(), v6.len()),
            None => Ok(()),
        }
    }
}

impl TryFrom<String> for LeaseKey {
    type Error = BadLeaseKey;

    fn try_from(text: String) -> Result<Self, BadLeaseKey> {
        text.parse()
    }
}

impl From<LeaseKey> for String {
    fn from(key: LeaseKey) -> Self {
        key.to_string()
    }
}

/// The value of a lease. Field order and omissions are flannel's (`LeaseAttrs` in pkg/lease/lease.go).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseAttrs {
    /// `0.0.0.0` when the node has none.
    #[serde(rename = "PublicIP")]
    pub public_ip: Ipv4Addr,
    #[serde(rename = "PublicIPv6", default)]
    pub public_ipv6: Option<Ipv6Addr>,
    /// Empty for udp, as flannel has it (and for its alloc, which forwards nothing).
    #[serde(rename = "BackendType", default, skip_serializing_if = "String::is_empty")]
    pub backend_type: String,
    #[serde(rename = "BackendData", default, skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<Value>,
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "Option::is_none")]
    pub backend_v6_data: Option<Value>,
}

impl LeaseAttrs {
    /// The node's underlay address in the family of `subnet`.
    pub fn public_addr(&self, subnet: Subnet) -> Option<IpAddr> {
        if subnet.is_ipv4() {
            Some(self.public_ip).filter(|ip| !ip.is_unspecified()).map(IpAddr::V4)
        } else {
            self.public_ipv6.map(IpAddr::V6)
        }
    }

    /// The backend's name, as a network configuration has it.
    pub fn backend(&self) -> &str {
        if self.backend_type.is_empty() { "udp" } else { &self.backend_type }
    }

    /// `BackendData` of a VXLAN peer in the family of `subnet`.
    pub fn vxlan_data(&self, subnet: Subnet) -> Option<VxlanData> {
        let data = if subnet.is_ipv4() { &self.backend_data } else { &self.backend_v6_data };
        serde_json::from_value(data.clone()?).ok()
    }
}

/// `BackendData` of the vxlan backend: `{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanData {
    #[serde(rename = "VNI")]
    pub vni: u32,
    #[serde(rename = "VtepMAC")]
    pub vtep_mac: Mac,
}

/// A lease in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub key: LeaseKey,
    pub attrs: LeaseAttrs,
    /// The store's revision at which the key was made: of two overlapping leases the older one wins, on every node.
    pub create_revision: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip() {
        for text in ["10.5.52.0-24", "10.5.52.0-24&fd00:12:13::-64"] {
            assert_eq!(text.parse::<LeaseKey>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn keys_that_flannel_refuses() {
        for bad in [
            "10",
            "10.12.13.0",
            "10.12.13-24",
            "10.12.13.300-24",
            "10.12.13.0-24hi",
            "&2001::-56",
            "10.12.13.0-24&:12:13:-56",
            "10.12.13.0-24&20011::-56",
            "10.12.13.0-24&2001-56",
            "10.12.13.0-24&2001::",
            "10.12.13.0-24&2001::-56hi",
            "10.12.13.0-32",
            "10.12.13.0-24&2001::-128",
            "10.12.13.0-24&10.1.0.0-16",
            "fd00::-64",
            "10.12.13.0-+24",
            "",
        ] {
            assert!(bad.parse::<LeaseKey>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn values_are_flannels_bytes() {
        let vxlan = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
        let udp = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#;
        for text in [vxlan, udp] {
            let attrs: LeaseAttrs = serde_json::from_str(text).expect(text);
            assert_eq!(serde_json::to_string(&attrs).expect("encode"), text);
            assert_eq!(attrs.backend(), if text == udp { "udp" } else { "vxlan" });
        }
        let data = VxlanData { vni: 1, vtep_mac: "c6:d2:32:6f:8f:44".parse().expect("mac") };
        let attrs = LeaseAttrs {
            public_ip: "192.168.64.3".parse().expect("ip"),
            public_ipv6: None,
            backend_type: "vxlan".into(),
            backend_data: serde_json::to_value(data).ok(),
            backend_v6_data: None,
        };
        assert_eq!(serde_json::to_string(&attrs).expect("encode"), vxlan);
        assert_eq!(attrs.vxlan_data("10.0.0.0/24".parse().expect("subnet")), Some(data));
    }
}
