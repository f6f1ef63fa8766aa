//! Names, paths, ports and marks that plugin, agent and operator agree on.
//!
//! Devices and ports are flannel's, so that a node can be handed over in either direction.

use std::net::Ipv4Addr;

use sha2::{Digest, Sha256};

use crate::protocol::Attachment;
use crate::{IfName, Mac};

/// The longest path of a unix socket: `sun_path` of unix(7) holds 108 bytes, the terminating zero included.
pub const MAX_SOCKET_PATH: usize = 107;
pub const CNI_SOCKET: &str = "/run/weft/cni.sock";
pub const ADMIN_SOCKET: &str = "/run/weft/admin.sock";
pub const ADMIN_LISTEN: &str = "127.0.0.1:9474";
/// Tied to this boot: address records, tombstones, sockets.
pub const RUN_DIR: &str = "/run/weft";
/// Survives a reboot: own lease, VTEP MACs, the embedded store.
pub const STATE_DIR: &str = "/var/lib/weft";
/// Kernel settings, where a container does not have them read-only.
pub const SYSCTL_DIR: &str = "/proc/sys";
pub const SUBNET_FILE: &str = "/run/flannel/subnet.env";

pub const DEFAULT_BRIDGE: &str = "cni0";
/// IANA's VXLAN port is 4789; the kernel and flannel default to this one.
pub const VXLAN_PORT: u16 = 8472;
pub const UDP_PORT: u16 = 8285;
/// The TUN device of the udp backend: flanneld takes the first free number behind `flannel`.
pub const UDP_DEVICE: &str = "flannel0";
/// Of the udp backend's one route: a flanneld that starts beside a device that was left over makes a device and a route
/// of metric 0 of its own, tolerates any that is there, and gets the packets.
pub const UDP_ROUTE_METRIC: u32 = 4096;

/// `rtm_protocol` of the routes that weft makes (linux/rtnetlink.h leaves numbers above 4 to routing daemons;
/// 87 is in nobody's `rt_protos`).
pub const ROUTE_PROTOCOL: u8 = 87;
/// Link group (`IFLA_GROUP`) of every link that weft makes, from the very message that creates it: "weft" in ASCII. A
/// veth is ours by group and name; a bridge or VXLAN device without the group was adopted.
pub const LINK_GROUP: u32 = 0x7765_6674;

const VETH_PREFIX: &str = "veth";
const EGRESS_PREFIX: &str = "wifb";
const VETH_HASH_CHARS: usize = 11;

/// The host-side veth of an attachment: `veth` and 11 base32 characters of a SHA-256, so that a crashed ADD's orphan
/// can be found without any record.
pub fn host_ifname(attachment: &Attachment) -> IfName {
    host_ifname_of_hash(&attachment_hash(attachment)).unwrap_or_else(|| unreachable!("15 bytes of [a-z2-7]"))
}

/// The same, when only the [`attachment_hash`] is known; `None` for a text that is none.
pub fn host_ifname_of_hash(hash: &str) -> Option<IfName> {
    let name = format!("{VETH_PREFIX}{}", hash.get(..VETH_HASH_CHARS)?);
    name.parse().ok().filter(|_| is_host_ifname(&name))
}

/// Whether a link's name has the form that [`host_ifname`] gives. Ownership also needs [`LINK_GROUP`].
pub fn is_host_ifname(name: &str) -> bool {
    name.strip_prefix(VETH_PREFIX).is_some_and(|hash| {
        hash.len() == VETH_HASH_CHARS && hash.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'))
    })
}

/// The device through which an attachment's own packets pass when they are limited, by its host-side veth's name.
pub fn egress_ifname(host_ifname: &IfName) -> Option<IfName> {
    let hash = host_ifname.as_str().strip_prefix(VETH_PREFIX)?;
    format!("{EGRESS_PREFIX}{hash}").parse().ok()
}

/// Whether a link's name has the form that [`egress_ifname`] gives. Ownership also needs [`LINK_GROUP`].
pub fn is_egress_ifname(name: &str) -> bool {
    name.strip_prefix(EGRESS_PREFIX).is_some_and(|hash| is_host_ifname(&format!("{VETH_PREFIX}{hash}")))
}

/// A file-name-safe key of an attachment: 52 base32 characters (RFC 4648, lower case, no padding) of the SHA-256 over
/// network, container ID and interface name, separated by zero bytes that none of them can hold.
pub fn attachment_hash(attachment: &Attachment) -> String {
    let mut hasher = Sha256::new();
    for part in [attachment.network.as_str(), attachment.container_id.as_str()] {
        hasher.update(part.as_bytes());
        hasher.update([0]);
    }
    hasher.update(attachment.ifname.as_str().as_bytes());
    base32(&hasher.finalize())
}

/// The MAC of a bridge that the node with this public IP makes: always the same, so that pods find their gateway again
/// when the bridge had to be made anew, and never that of the lowest port.
pub fn bridge_mac(node: Ipv4Addr, bridge: &IfName) -> Mac {
    let digest = Sha256::new().chain_update(node.octets()).chain_update(bridge.as_str()).finalize();
    Mac::local_unicast([digest[0], digest[1], digest[2], digest[3], digest[4], digest[5]])
}

fn base32(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut text = String::new();
    let (mut bits, mut count) = (0_u32, 0);
    for byte in bytes {
        bits = (bits << 8) | u32::from(*byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(ALPHABET[(bits >> count) as usize & 31] as char);
        }
        bits &= (1 << count) - 1;
    }
    if count > 0 {
        text.push(ALPHABET[(bits << (5 - count)) as usize & 31] as char);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base32_test_vectors() {
        // RFC 4648 section 10, without padding.
        for (input, output) in
            [("", ""), ("f", "my"), ("fo", "mzxq"), ("foo", "mzxw6"), ("foobar", "mzxw6ytboi")]
        {
            assert_eq!(base32(input.as_bytes()), output);
        }
    }

    #[test]
    fn veth_names_are_stable_and_differ_by_every_part() {
        let key = |network: &str, id: &str, ifname: &str| Attachment {
            network: network.parse().expect("name"),
            container_id: id.parse().expect("ID"),
            ifname: ifname.parse().expect("ifname"),
        };
        let base = host_ifname(&key("weft", "c1", "eth0"));
        assert_eq!(base, host_ifname(&key("weft", "c1", "eth0")));
        assert!(is_host_ifname(base.as_str()) && base.as_str().len() == 15, "{base}");
        for other in [key("wef", "tc1", "eth0"), key("weft", "c2", "eth0"), key("weft", "c1", "eth1")] {
            assert_ne!(base, host_ifname(&other));
        }
        assert!(!is_host_ifname("veth12345678"));
        let egress = egress_ifname(&base).expect("15 bytes");
        assert!(is_egress_ifname(egress.as_str()) && !is_host_ifname(egress.as_str()), "{egress}");
        assert!(!is_egress_ifname("wifb0") && !is_egress_ifname(base.as_str()));
    }
}
