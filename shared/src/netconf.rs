//! The cluster's network configuration: the JSON that flannel keeps at `<prefix>/config` or in `net-conf.json`.
//!
//! Go's rules that users rely on hold here: keys match without regard to case, unknown keys are ignored. Everything
//! else is checked at once (pkg/subnet/config.go, `CheckNetworkConfig`) and refused by key, value and expectation.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::json::{Case, Keys, brief};
use crate::lease::LeaseKey;
use crate::names::{UDP_PORT, VXLAN_PORT};
use crate::{BadValue, IfName, Subnet};

/// A checked configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    pub v4: Range,
    pub v6: Option<Range>,
    pub backend: BackendConfig,
}

/// The overlay's network of one family and the part of it that is leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub network: Subnet,
    /// Prefix length of a leased subnet, in bits.
    pub subnet_len: u8,
    /// Subnets of any length: not weft leases them out but Kubernetes, whose nodes need not all have the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub any_len: bool,
    /// First and last leased subnet, both inclusive.
    pub min: IpAddr,
    pub max: IpAddr,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum BackendConfig {
    Vxlan(VxlanConfig),
    HostGw,
    Udp(UdpConfig),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanConfig {
    /// 24 bits (RFC 7348), of which the device's name leaves seven digits.
    pub vni: u32,
    pub port: u16,
    /// Underlay MTU in bytes to assume instead of the interface's; the overlay's is 50 less.
    pub mtu: Option<u32>,
    pub gbp: bool,
    pub learning: bool,
    /// Peers in the underlay's own segment get a plain route instead of the tunnel.
    #[serde(default)]
    pub direct_routing: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpConfig {
    /// Of every node: the destination of a datagram is the peer's address and the sender's own port.
    pub port: u16,
    /// weft's own key, and the next: flannel has none and ignores them. A packet whose inner source lies outside
    /// `Network` is refused as well.
    #[serde(default)]
    pub strict_source: bool,
    /// Datagrams may come from other addresses than the peers' own.
    #[serde(default)]
    pub peers_behind_nat: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("network configuration is not JSON: {0}")]
    Json(String),
    #[error("network configuration: {0}")]
    Value(#[from] BadValue),
    #[error("network configuration: {key} is missing: expected {expected}")]
    Missing { key: String, expected: String },
}

/// For people: the settings that are in force, by their keys.
impl fmt::Display for BackendConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        let flags = match self {
            Self::HostGw => Vec::new(),
            Self::Vxlan(vxlan) => {
                write!(f, ", VNI {}, port {}", vxlan.vni, vxlan.port)?;
                if let Some(mtu) = vxlan.mtu {
                    write!(f, ", MTU {mtu}")?;
                }
                let (gbp, learning) = ((vxlan.gbp, "GBP"), (vxlan.learning, "Learning"));
                vec![gbp, learning, (vxlan.direct_routing, "DirectRouting")]
            }
            Self::Udp(udp) => {
                write!(f, ", port {}", udp.port)?;
                vec![(udp.strict_source, "StrictSource"), (udp.peers_behind_nat, "PeersBehindNAT")]
            }
        };
        for (_, key) in flags.into_iter().filter(|(set, _)| *set) {
            write!(f, ", {key}")?;
        }
        Ok(())
    }
}

impl BackendConfig {
    /// As it stands in `Type`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Vxlan(_) => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp(_) => "udp",
        }
    }

    /// By which peers send to each other, if not by plain routes.
    pub fn udp_port(&self) -> Option<u16> {
        match self {
            Self::Vxlan(vxlan) => Some(vxlan.port),
            Self::HostGw => None,
            Self::Udp(udp) => Some(udp.port),
        }
    }
}

impl Range {
    /// Whether a subnet has the length that one of this range has.
    pub fn has_len(&self, len: u8) -> bool {
        if self.any_len { len >= self.network.len() } else { len == self.subnet_len }
    }

    /// Whether a leased subnet fits this range: right length, between the first and the last.
    pub fn admits(&self, subnet: Subnet) -> bool {
        if self.any_len {
            return self.network.covers(subnet);
        }
        subnet.len() == self.subnet_len && (self.min..=self.max).contains(&subnet.addr())
    }
}

impl NetworkConfig {
    /// The overlay's, one of a family.
    pub fn networks(&self) -> impl Iterator<Item = Subnet> {
        [Some(self.v4), self.v6].into_iter().flatten().map(|range| range.network)
    }

    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        Self::parse_with(json, Range::parse_v4)
    }

    /// Where Kubernetes gives the subnets out, flannel reads none of what says how to: `SubnetLen`, `SubnetMin` and
    /// `SubnetMax` are whatever they are.
    pub fn parse_for_nodes(json: &str) -> Result<Self, ConfigError> {
        Self::parse_with(json, Range::parse_v4_of_nodes)
    }

    fn parse_with(
        json: &str,
        range: impl FnOnce(&Keys<'_>) -> Result<Range, ConfigError>,
    ) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(json).map_err(|e| ConfigError::Json(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(ConfigError::Json(format!(
                "expected an object such as {EXAMPLE}, got {}",
                brief(&value.to_string())
            )));
        };
        let keys = Keys::top(&map, Case::Ignored);
        if !keys.bool("EnableIPv4", true)? {
            return Err(keys.bad("EnableIPv4", "true: this version of weft leases IPv4 subnets only").into());
        }
        if keys.bool("EnableIPv6", false)? {
            return Err(keys
                .bad("EnableIPv6", "false: this version of weft leases IPv4 subnets only")
                .into());
        }
        // Either value is accepted and has no effect: it chooses between flannel's iptables and nftables, and weft's
        // firewall is always nftables.
        keys.bool("EnableNFTables", false)?;
        Ok(Self { v4: range(&keys)?, v6: None, backend: BackendConfig::parse(&keys)? })
    }

    /// Whether a lease is one that this configuration would hand out.
    pub fn admits(&self, key: &LeaseKey) -> bool {
        self.v4.admits(key.v4)
            && match (self.v6, key.v6) {
                (None, None) => true,
                (Some(range), Some(subnet)) => range.admits(subnet),
                _ => false,
            }
    }
}

/// Shown wherever a configuration is expected and none is there.
pub const EXAMPLE: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

impl Range {
    fn parse_v4_of_nodes(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        let network = Self::parse_network(keys)?;
        let subnet_len = network.len().max(24);
        Ok(Self { network, subnet_len, any_len: true, min: network.addr(), max: network.last() })
    }

    fn parse_network(keys: &Keys<'_>) -> Result<Subnet, ConfigError> {
        const NETWORK: &str = "an IPv4 network such as 10.5.0.0/16";
        let network = keys.str("Network", NETWORK)?.ok_or_else(|| missing(keys, "Network", NETWORK))?;
        let network = network
            .parse::<Subnet>()
            .ok()
            .filter(|n| n.is_ipv4() && n.len() > 0)
            .ok_or_else(|| keys.bad("Network", NETWORK))?;
        if not_for_hosts().any(|special| special.overlaps(network)) {
            return Err(keys.bad("Network", "a unicast network such as 10.5.0.0/16").into());
        }
        Ok(network)
    }

    fn parse_v4(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        let network = Self::parse_network(keys)?;
        let subnet_len = match keys.integer::<u64>("SubnetLen", "a whole number")?.filter(|len| *len != 0) {
            Some(len) if len > 30 => {
                return Err(keys.bad("SubnetLen", "a prefix length of at most 30").into());
            }
            Some(len) if len < u64::from(network.len()) + 2 => {
                let expected =
                    format!("at least {}: Network must hold at least four subnets", network.len() + 2);
                return Err(keys.bad("SubnetLen", &expected).into());
            }
            Some(len) => len as u8,
            None if network.len() > 28 => {
                return Err(keys.bad("Network", "a network of /28 or larger").into());
            }
            None if network.len() <= 22 => 24,
            None => network.len() + 2,
        };
        let size = 1_u32 << (32 - subnet_len);
        let bound = |key: &str, default: Option<IpAddr>| {
            let Some(text) = keys.str(key, "an IPv4 address")? else {
                return default.ok_or_else(|| keys.bad("Network", "a network of at least four subnets"));
            };
            let addr = text.parse::<IpAddr>().ok().filter(IpAddr::is_ipv4);
            let addr = addr.ok_or_else(|| keys.bad(key, "an IPv4 address"))?;
            if !network.contains(addr) {
                return Err(keys.bad(key, &format!("an address inside Network {network}")));
            }
            if Subnet::new(addr, subnet_len).map(|s| s.addr()) != Some(addr) {
                return Err(keys.bad(key, &format!("an address on a /{subnet_len} boundary (SubnetLen)")));
            }
            Ok(addr)
        };
        let min = bound("SubnetMin", network.nth(size))?;
        let last = Subnet::new(network.last(), subnet_len).map(|s| s.addr());
        let max = bound("SubnetMax", last)?;
        if min > max {
            return Err(keys.bad("SubnetMin", &format!("an address not above SubnetMax {max}")).into());
        }
        Ok(Self { network, subnet_len, any_len: false, min, max })
    }
}

/// This network, loopback, link-local, multicast, reserved (RFC 6890): the kernel neither routes nor assigns most of
/// them, and a pod with such an address would be reached by nobody.
fn not_for_hosts() -> impl Iterator<Item = Subnet> {
    [([0, 0, 0, 0], 8), ([127, 0, 0, 0], 8), ([169, 254, 0, 0], 16), ([224, 0, 0, 0], 4), ([240, 0, 0, 0], 4)]
        .into_iter()
        .filter_map(|(addr, len)| Subnet::new(addr.into(), len))
}

impl BackendConfig {
    fn parse(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        const TYPES: &str = "\"vxlan\", \"host-gw\" or \"udp\", the backends of this version of weft";
        // flannel's documents say vxlan, its code (pkg/subnet/config.go, `parseBackendType`) does this.
        if keys.get("Backend").is_none() {
            return Ok(Self::Udp(UdpConfig::default()));
        }
        let keys = keys.object("Backend", "an object such as {\"Type\":\"vxlan\"}")?;
        let kind = keys.str("Type", TYPES)?.ok_or_else(|| missing(&keys, "Type", TYPES))?;
        match kind.to_lowercase().as_str() {
            "vxlan" => Ok(Self::Vxlan(VxlanConfig::parse(&keys)?)),
            "host-gw" => Ok(Self::HostGw),
            "udp" => Ok(Self::Udp(UdpConfig::parse(&keys)?)),
            _ => Err(keys.bad("Type", TYPES).into()),
        }
    }
}

impl VxlanConfig {
    /// The largest VNI whose device name fits into 15 bytes.
    const MAX_VNI: u32 = 9_999_999;

    /// flannel's name for the device.
    pub fn device(&self) -> IfName {
        format!("flannel.{}", self.vni).parse().unwrap_or_else(|_| unreachable!("a VNI of at most 7 digits"))
    }

    fn parse(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            vni: bounded(keys, "VNI", 1..=Self::MAX_VNI)?.unwrap_or(1),
            // flannel's 0 means the kernel's default.
            port: port(keys)?.unwrap_or(VXLAN_PORT),
            mtu: bounded(keys, "MTU", 0..=65535)?.filter(|m| *m != 0),
            gbp: keys.bool("GBP", false)?,
            learning: keys.bool("Learning", false)?,
            direct_routing: keys.bool("DirectRouting", false)?,
        })
    }
}

impl Default for UdpConfig {
    fn default() -> Self {
        Self { port: UDP_PORT, strict_source: false, peers_behind_nat: false }
    }
}

impl UdpConfig {
    fn parse(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            port: port(keys)?.unwrap_or(UDP_PORT),
            strict_source: keys.bool("StrictSource", false)?,
            peers_behind_nat: keys.bool("PeersBehindNAT", false)?,
        })
    }
}

/// 0 is no port: the backend's default.
fn port(keys: &Keys<'_>) -> Result<Option<u16>, BadValue> {
    Ok(bounded(keys, "Port", 0..=65535)?.filter(|port| *port != 0).map(|port| port as u16))
}

fn bounded(keys: &Keys<'_>, key: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, BadValue> {
    let expected = format!("a whole number from {} to {}", range.start(), range.end());
    match keys.integer(key, &expected)? {
        Some(n) if !range.contains(&n) => Err(keys.bad(key, &expected)),
        other => Ok(other),
    }
}

fn missing(keys: &Keys<'_>, key: &str, expected: &str) -> ConfigError {
    ConfigError::Missing { key: keys.path_of(key), expected: expected.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap_or_else(|e| panic!("{json}: {e}"))
    }

    #[test]
    fn defaults_are_flannels() {
        let config = parse(r#"{"network":"10.3.9.9/16","BACKEND":{"tYPE":"VXLAN"},"Unknown":7}"#);
        assert_eq!(config.v4.network.to_string(), "10.3.0.0/16");
        assert_eq!(
            (config.v4.subnet_len, config.v4.min.to_string(), config.v4.max.to_string()),
            (24, "10.3.1.0".into(), "10.3.255.0".into())
        );
        let vxlan =
            VxlanConfig { vni: 1, port: 8472, mtu: None, gbp: false, learning: false, direct_routing: false };
        assert_eq!(config.backend, BackendConfig::Vxlan(vxlan));
        assert!(config.admits(&"10.3.255.0-24".parse().expect("key")));
        for outside in ["10.3.0.0-24", "10.4.1.0-24", "10.3.1.0-25", "10.3.1.0-24&fd00::-64"] {
            assert!(!config.admits(&outside.parse().expect("key")), "{outside}");
        }
        assert_eq!(parse(r#"{"Network":"10.3.0.0/28","Backend":{"Type":"host-gw"}}"#).v4.subnet_len, 30);
    }

    #[test]
    fn udp_is_also_what_an_absent_backend_means() {
        let udp = |backend: &str| match parse(&format!(r#"{{"Network":"10.3.0.0/16"{backend}}}"#)).backend {
            BackendConfig::Udp(udp) => (udp.port, udp.strict_source, udp.peers_behind_nat),
            other => panic!("{backend}: {other:?}"),
        };
        assert_eq!(udp(""), (8285, false, false));
        assert_eq!(udp(r#","Backend":{"Type":"UDP","Port":0,"Unknown":[]}"#), (8285, false, false));
        assert_eq!(
            udp(r#","Backend":{"Type":"udp","port":9000,"STRICTSOURCE":true,"PeersBehindNat":true}"#),
            (9000, true, true)
        );
    }

    #[test]
    fn refusals_name_key_value_and_expectation() {
        let vxlan = |rest: &str| format!(r#"{{"Network":"10.3.0.0/16",{rest}"Backend":{{"Type":"vxlan"}}}}"#);
        let network = |network: &str| format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#);
        let backend = |backend: &str| format!(r#"{{"Network":"10.3.0.0/16","Backend":{backend}}}"#);
        for (json, expected) in [
            ("nonsense".to_owned(), "not JSON"),
            ("[]".into(), "expected an object"),
            (r#"{"Backend":{"Type":"vxlan"}}"#.into(), "Network is missing"),
            (
                r#"{"Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#.into(),
                r#"Network = "fd00::/48": expected an IPv4 network"#,
            ),
            (
                network("127.5.0.0/16"),
                r#"Network = "127.5.0.0/16": expected a unicast network such as 10.5.0.0/16"#,
            ),
            (network("169.254.0.0/16"), "expected a unicast network"),
            (network("224.0.0.0/8"), "expected a unicast network"),
            (network("255.255.0.0/16"), "expected a unicast network"),
            (network("0.5.0.0/16"), "expected a unicast network"),
            (network("126.0.0.0/7"), "expected a unicast network"),
            (
                r#"{"Network":null,"Backend":{"Type":"vxlan"}}"#.into(),
                "Network is missing: expected an IPv4 network",
            ),
            (r#"{"Network":"10.3.0.0/29","Backend":{"Type":"vxlan"}}"#.into(), "/28 or larger"),
            (vxlan(r#""SubnetLen":17,"#), "SubnetLen = 17: expected at least 18"),
            (vxlan(r#""SubnetLen":31,"#), "SubnetLen = 31: expected a prefix length of at most 30"),
            (vxlan(r#""SubnetLen":"24","#), r#"SubnetLen = "24": expected a whole number"#),
            (
                vxlan(r#""SubnetMin":"10.4.0.0","#),
                r#"SubnetMin = "10.4.0.0": expected an address inside Network 10.3.0.0/16"#,
            ),
            (
                vxlan(r#""SubnetMax":"10.3.7.1","#),
                "SubnetMax = \"10.3.7.1\": expected an address on a /24 boundary",
            ),
            (vxlan(r#""SubnetMin":"10.3.9.0","SubnetMax":"10.3.7.0","#), "not above SubnetMax 10.3.7.0"),
            (vxlan(r#""EnableIPv6":true,"#), "EnableIPv6 = true"),
            (vxlan(r#""EnableIPv4":1,"#), "EnableIPv4 = 1: expected true or false"),
            (backend("7"), "Backend = 7: expected an object"),
            (backend("{}"), "Backend.Type is missing"),
            (backend(r#"{"Type":"gre"}"#), r#"Backend.Type = "gre": expected "vxlan", "host-gw" or "udp""#),
            (
                backend(r#"{"Type":"vxlan","VNI":16777216}"#),
                "Backend.VNI = 16777216: expected a whole number from 1 to 9999999",
            ),
            (backend(r#"{"Type":"vxlan","Port":70000}"#), "Backend.Port = 70000"),
            (
                backend(r#"{"Type":"vxlan","Learning":"yes"}"#),
                "Backend.Learning = \"yes\": expected true or false",
            ),
            (
                backend(r#"{"Type":"vxlan","DirectRouting":"on-link"}"#),
                "Backend.DirectRouting = \"on-link\": expected true or false",
            ),
            (
                backend(r#"{"Type":"udp","Port":-1}"#),
                "Backend.Port = -1: expected a whole number from 0 to 65535",
            ),
            (
                backend(r#"{"Type":"udp","StrictSource":1}"#),
                "Backend.StrictSource = 1: expected true or false",
            ),
            (
                backend(r#"{"Type":"udp","peersbehindnat":"yes"}"#),
                "Backend.PeersBehindNAT = \"yes\": expected true or false",
            ),
        ] {
            let error = NetworkConfig::parse(&json).expect_err(&json).to_string();
            assert!(error.contains(expected), "{json}\n  gave     {error}\n  expected {expected}");
        }
    }
}
