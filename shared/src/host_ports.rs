//! Ports of the host that lead to a pod: the capability `portMappings` (CONVENTIONS.md of the CNI specification), checked.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What the reference's portmap knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// One port of the host, on one address of it or on all, and the pod's port behind it. Neither port is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortMapping {
    pub protocol: Protocol,
    /// `None`: every address of either family. An unspecified one: every address of its family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
}

impl Protocol {
    /// `IPPROTO_*`.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl PortMapping {
    /// Whether there is a packet that both would have.
    pub fn overlaps(&self, other: &Self) -> bool {
        let meet = match (self.host_ip, other.host_ip) {
            (None, _) | (_, None) => true,
            (Some(a), Some(b)) => {
                a.is_ipv4() == b.is_ipv4() && (a == b || a.is_unspecified() || b.is_unspecified())
            }
        };
        meet && (self.protocol, self.host_port) == (other.protocol, other.host_port)
    }

    /// Whether it says anything about addresses of this family.
    pub fn is_for(&self, ipv4: bool) -> bool {
        self.host_ip.is_none_or(|ip| ip.is_ipv4() == ipv4)
    }

    /// What all mappings of a pod have to be: what is wrong with the first that is not.
    pub fn check(all: &[Self]) -> Result<(), WrongMapping> {
        if all.len() > MAX_MAPPINGS {
            return Err(WrongMapping::TooMany);
        }
        for (at, mapping) in all.iter().enumerate() {
            if mapping.host_port == 0 {
                return Err(WrongMapping::NoHostPort { at });
            }
            if mapping.container_port == 0 {
                return Err(WrongMapping::NoContainerPort { at });
            }
            if all[..at].iter().any(|earlier| earlier.overlaps(mapping)) {
                return Err(WrongMapping::Twice { at });
            }
        }
        Ok(())
    }
}

const MAX_MAPPINGS: usize = 4096;

/// `at` is the place in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WrongMapping {
    #[error("expected at most {MAX_MAPPINGS}")]
    TooMany,
    #[error("expected a port from 1 to 65535")]
    NoHostPort { at: usize },
    #[error("expected a port from 1 to 65535")]
    NoContainerPort { at: usize },
    #[error("expected another port: it is in the list already")]
    Twice { at: usize },
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    /// In any case, as runtimes write it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = [Self::Tcp, Self::Udp, Self::Sctp];
        known.into_iter().find(|p| text.eq_ignore_ascii_case(&p.to_string())).ok_or(UnknownProtocol)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected tcp, udp or sctp")]
pub struct UnknownProtocol;

/// The host's side, as `8080/tcp` or `192.0.2.1:8080/tcp`.
impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(ip) => write!(f, "{}/{}", std::net::SocketAddr::new(ip, self.host_port), self.protocol),
            None => write!(f, "{}/{}", self.host_port, self.protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(protocol: &str, host_ip: &str, host_port: u16) -> PortMapping {
        let host_ip = (!host_ip.is_empty()).then(|| host_ip.parse().expect(host_ip));
        PortMapping { protocol: protocol.parse().expect(protocol), host_ip, host_port, container_port: 80 }
    }

    #[test]
    fn two_that_would_have_the_same_packet_overlap() {
        for (a, b, overlap) in [
            (("tcp", "", 80), ("TCP", "", 80), true),
            (("tcp", "", 80), ("udp", "", 80), false),
            (("tcp", "", 80), ("tcp", "", 81), false),
            (("tcp", "", 80), ("tcp", "192.0.2.1", 80), true),
            (("tcp", "", 80), ("tcp", "::1", 80), true),
            (("tcp", "192.0.2.1", 80), ("tcp", "192.0.2.2", 80), false),
            (("tcp", "0.0.0.0", 80), ("tcp", "192.0.2.2", 80), true),
            (("tcp", "0.0.0.0", 80), ("tcp", "::", 80), false),
            (("tcp", "::", 80), ("tcp", "2001:db8::1", 80), true),
        ] {
            let (a, b) = (mapping(a.0, a.1, a.2), mapping(b.0, b.1, b.2));
            assert_eq!((a.overlaps(&b), b.overlaps(&a)), (overlap, overlap), "{a} and {b}");
        }
        let all = [mapping("tcp", "", 80), mapping("udp", "", 80), mapping("tcp", "192.0.2.1", 80)];
        assert_eq!(PortMapping::check(&all), Err(WrongMapping::Twice { at: 2 }));
        assert_eq!(PortMapping::check(&all[..2]), Ok(()));
        assert_eq!(
            PortMapping::check(&[all[0], mapping("udp", "", 0)]),
            Err(WrongMapping::NoHostPort { at: 1 })
        );
        let none = PortMapping { container_port: 0, ..all[0] };
        assert_eq!(PortMapping::check(&[none]), Err(WrongMapping::NoContainerPort { at: 0 }));
        let many = |count: u16| (1..=count).map(|port| mapping("tcp", "", port)).collect::<Vec<_>>();
        assert_eq!(PortMapping::check(&many(4096)), Ok(()));
        assert_eq!(PortMapping::check(&many(4097)), Err(WrongMapping::TooMany));
    }

    #[test]
    fn a_mapping_is_shown_by_the_hosts_side() {
        assert_eq!(mapping("sctp", "", 80).to_string(), "80/sctp");
        assert_eq!(mapping("udp", "192.0.2.1", 80).to_string(), "192.0.2.1:80/udp");
        assert_eq!(mapping("tcp", "::1", 80).to_string(), "[::1]:80/tcp");
    }
}
