//! Packet filters of other people's, as they are found on hosts, and who a packet claims to come from.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::bed::Bed;
use crate::netns::Netns;
use crate::underlay::Underlay;
use crate::wait::SECOND;

/// What dockerd 20 to 27 puts into iptables for its default bridge.
pub const DOCKER_20: &str = "\
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
COMMIT
";

/// dockerd 28 has one jump of its own in `FORWARD`, and drops what is not published.
pub const DOCKER_28: &str = "\
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
";

/// `ufw enable` with its default of no routed traffic, as far as forwarding goes.
pub const UFW: &str = "\
*filter
:FORWARD DROP [0:0]
:ufw-before-logging-forward - [0:0]
:ufw-before-forward - [0:0]
:ufw-user-forward - [0:0]
:ufw-after-forward - [0:0]
:ufw-after-logging-forward - [0:0]
:ufw-reject-forward - [0:0]
:ufw-track-forward - [0:0]
-A FORWARD -j ufw-before-logging-forward
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
-A FORWARD -j ufw-after-logging-forward
-A FORWARD -j ufw-reject-forward
-A FORWARD -j ufw-track-forward
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 3 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-reject-forward -j REJECT --reject-with icmp-port-unreachable
COMMIT
";

/// Runs a shell script inside that must succeed.
pub fn sh(netns: &Netns, script: &str) -> Result<String> {
    netns.run(Command::new("sh").args(["-ec", script]))
}

/// The whole of nf_tables without counters, and iptables-legacy's filter table without its.
pub fn rules(netns: &Netns) -> Result<String> {
    let legacy = "iptables-legacy -w 5 -S";
    let in_use = "grep -q filter /proc/thread-self/net/ip_tables_names 2>/dev/null";
    sh(
        netns,
        &format!(
            "nft -s list ruleset | sed 's/counter packets.*bytes [0-9]*/counter/'; if {in_use}; then {legacy}; fi"
        ),
    )
}

/// A machine on the underlay that has nothing to do with the overlay.
pub fn external_host(bed: &Bed, underlay: &Underlay, addresses: &[Ipv4Addr]) -> Result<Netns> {
    let (first, more) = addresses.split_first().context("an address")?;
    let netns = bed.netns("external")?;
    underlay.connect(&netns, "external", "eth0", *first)?;
    for address in more {
        netns.ip(&format!("address add {address}/24 dev eth0"))?;
    }
    Ok(netns)
}

/// Whom a datagram that `from` sends to `address` claims to come from when it arrives in `to`. `source` is what the
/// sender binds to.
pub fn source_seen(
    from: &Netns,
    source: Ipv4Addr,
    to: &Netns,
    address: Ipv4Addr,
    port: u16,
) -> Result<IpAddr> {
    let receiver = to.enter(|| {
        let socket = UdpSocket::bind(SocketAddrV4::new(address, port))?;
        socket.set_read_timeout(Some(SECOND))?;
        Ok(socket)
    })?;
    let target = receiver.local_addr()?;
    let sender = from.enter(|| Ok(UdpSocket::bind(SocketAddrV4::new(source, 0))?))?;
    // The first datagrams may be lost while neighbours are found.
    for _ in 0..20 {
        sender.send_to(b"who am I", target)?;
        if let Ok((_, from)) = receiver.recv_from(&mut [0; 16]) {
            return Ok(from.ip());
        }
    }
    None.with_context(|| format!("nothing of {} arrives at {target} in {}", from.name(), to.name()))
}
