//! `/run/flannel/subnet.env`: how flannel tells plugins and docker what was leased. Same text, same order.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ipnetwork::IpNetwork;

use crate::Subnet;
use crate::lease::LeaseKey;
use crate::replace::{Survive, replace_file};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    pub network: Subnet,
    pub subnet: Subnet,
    pub ipv6: Option<(Subnet, Subnet)>,
    pub mtu: u32,
    pub ip_masq: bool,
}

impl SubnetEnv {
    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut family = |prefix: &str, network: Subnet, subnet: Subnet| {
            let _ = writeln!(text, "FLANNEL_{prefix}NETWORK={network}");
            let _ = writeln!(text, "FLANNEL_{prefix}SUBNET={}/{}", subnet.gateway(), subnet.len());
        };
        family("", self.network, self.subnet);
        if let Some((network, subnet)) = self.ipv6 {
            family("IPV6_", network, subnet);
        }
        let _ = write!(text, "FLANNEL_MTU={}\nFLANNEL_IPMASQ={}\n", self.mtu, self.ip_masq);
        text
    }

    /// Replaces the file at once; directory mode 0755, file mode 0644 whatever the umask, as flannel does.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(dir) = path.parent().filter(|d| !d.is_dir()) {
            fs::create_dir_all(dir)?;
            fs::set_permissions(dir, Permissions::from_mode(0o755))?;
        }
        replace_file(path, self.render().as_bytes(), 0o644, Survive::Crash)
    }
}

/// The subnet that an earlier run left in the file, masked. Anything unreadable, invalid or ambiguous is no subnet.
pub fn previous_lease(text: &str) -> Option<LeaseKey> {
    let only = |key: &str| {
        let mut values = text.lines().filter_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
        let list = values.next_back()?.trim().trim_matches(['"', '\'']);
        let mut valid = list.split(',').filter_map(|cidr| cidr.trim().parse::<Subnet>().ok());
        valid.next().filter(|_| valid.next().is_none())
    };
    let v4 = only("FLANNEL_SUBNET").filter(|s| matches!(IpNetwork::from(*s), IpNetwork::V4(_)))?;
    Some(LeaseKey { v4, v6: only("FLANNEL_IPV6_SUBNET").filter(|s| !s.is_ipv4()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_flannels() {
        let env = SubnetEnv {
            network: "10.42.0.0/16".parse().expect("v4"),
            subnet: "10.42.7.0/24".parse().expect("v4"),
            ipv6: Some((
                "2001:cafe:42::/56".parse().expect("v6"),
                "2001:cafe:42:7::/64".parse().expect("v6"),
            )),
            mtu: 1450,
            ip_masq: true,
        };
        assert_eq!(
            env.render(),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n\
             FLANNEL_IPV6_SUBNET=2001:cafe:42:7::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        let previous = previous_lease(&env.render()).expect("own text is readable");
        assert_eq!(previous.to_string(), "10.42.7.0-24&2001:cafe:42:7::-64");
    }

    #[test]
    fn doubtful_text_names_no_subnet() {
        assert_eq!(
            previous_lease("FLANNEL_SUBNET=10.1.2.1/24\n").map(|k| k.to_string()).as_deref(),
            Some("10.1.2.0-24")
        );
        assert_eq!(
            previous_lease("FLANNEL_SUBNET=nonsense,10.1.2.1/24").map(|k| k.to_string()).as_deref(),
            Some("10.1.2.0-24")
        );
        for doubtful in [
            "",
            "FLANNEL_SUBNET",
            "FLANNEL_SUBNET=",
            "FLANNEL_SUBNET=10.1.2.1/24,10.1.3.1/24",
            "FLANNEL_SUBNET=fd00::1/64",
        ] {
            assert_eq!(previous_lease(doubtful), None, "{doubtful:?}");
        }
    }
}
