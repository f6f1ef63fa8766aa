//! An Ethernet address, printed as the field does: six lower-case octets joined by colons.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("MAC address {0:?} must be six octets such as 0a:58:0a:01:02:03")]
pub struct BadMac(String);

impl Mac {
    /// Makes any six bytes a locally administered unicast address (IEEE 802, bits 1 and 0 of the first octet).
    pub fn local_unicast(mut bytes: [u8; 6]) -> Self {
        bytes[0] = (bytes[0] & 0xfe) | 0x02;
        Self(bytes)
    }

    /// Whether a station can own it: neither a group address nor all zero.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut octets = text.split(':');
        for byte in &mut bytes {
            let octet = octets.next().filter(|o| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(octet.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        if octets.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = BadMac;

    fn try_from(text: String) -> Result<Self, BadMac> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_and_print() {
        let mac: Mac = "C6:d2:32:6f:8f:44".parse().expect("valid");
        assert_eq!(mac.to_string(), "c6:d2:32:6f:8f:44");
        for bad in [
            "",
            "c6:d2:32:6f:8f",
            "c6:d2:32:6f:8f:44:55",
            "c6d2326f8f44",
            "c6:d2:32:6f:8f:4g",
            "+6:d2:32:6f:8f:44",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn local_unicast_sets_and_clears_the_right_bits() {
        assert_eq!(Mac::local_unicast([0xff; 6]).0[0], 0xfe);
        assert_eq!(Mac::local_unicast([0; 6]).0[0], 0x02);
        assert!(Mac::local_unicast([1; 6]).is_unicast());
        assert!(!Mac([0x01, 0, 0, 0, 0, 1]).is_unicast());
        assert!(!Mac([0; 6]).is_unicast());
    }
}
