//! A network interface name the kernel accepts (`dev_valid_name` in net/core/dev.c).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `IFNAMSIZ` less the terminating zero.
const MAX_LEN: usize = 15;

/// An interface name of 1 to 15 bytes without `/`, `:` or white space, and neither `.` nor `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfName(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("interface name {0:?} must be 1 to 15 bytes, not . or .., without '/', ':' or white space")]
pub struct BadIfName(String);

impl IfName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IfName {
    type Err = BadIfName;

    fn from_str(name: &str) -> Result<Self, BadIfName> {
        let valid = (1..=MAX_LEN).contains(&name.len())
            && name != "."
            && name != ".."
            && !name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
        if valid { Ok(Self(name.to_owned())) } else { Err(BadIfName(name.to_owned())) }
    }
}

impl TryFrom<String> for IfName {
    type Error = BadIfName;

    fn try_from(name: String) -> Result<Self, BadIfName> {
        name.parse()
    }
}

impl From<IfName> for String {
    fn from(name: IfName) -> Self {
        name.0
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_the_kernel_accepts() {
        for good in ["eth0", "flannel.1", "flannel-v6.1", "a", "fifteen-bytes-x"] {
            assert_eq!(good.parse::<IfName>().expect(good).as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-bytes-xx"] {
            assert!(bad.parse::<IfName>().is_err(), "{bad:?} was accepted");
        }
    }
}
