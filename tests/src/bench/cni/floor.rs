//! The floor program: what the kernel's work for a pod costs when one process does nothing else.
//!
//! Started as a plugin is. It makes the veth pair, the bridge port, the address and the default route with the messages
//! that weft uses, in as few system calls. Left out is what else an ADD owes a pod and a node: its address is given, not
//! leased; nothing is written down, no agent asked, no sysctl set, no JSON read; nobody waits for the port to forward and no
//! neighbour is told. No plugin can be as fast, so it is a measure of the machine.

use std::env;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, bail};
use nix::libc;
use nix::sched::{CloneFlags, setns};

use super::netlink::{Message, NESTED, Netlink, attributes, text, u32_at};

/// Its executable, beside the bench's own: a small one, since starting a large one takes longer than the work.
pub const PROGRAM: &str = "floor";

/// linux/if_link.h
const IFLA_BRPORT_MODE: u16 = 4;
/// linux/veth.h
const VETH_INFO_PEER: u16 = 1;
const UP: u32 = libc::IFF_UP as u32;

/// What a call must know and no allocator tells: in `CNI_ARGS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub host_name: String,
    pub bridge: u32,
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Ipv4Addr,
}

impl Given {
    pub fn to_args(&self) -> String {
        let Self { host_name, bridge, address, prefix, gateway } = self;
        format!("{host_name};{bridge};{address};{prefix};{gateway}")
    }

    fn from_args(args: &str) -> Option<Self> {
        let mut words = args.split(';');
        let given = Self {
            host_name: words.next()?.to_owned(),
            bridge: words.next()?.parse().ok()?,
            address: words.next()?.parse().ok()?,
            prefix: words.next()?.parse().ok()?,
            gateway: words.next()?.parse().ok()?,
        };
        words.next().is_none().then_some(given)
    }
}

/// In the process that was started for it.
pub fn main() -> Result<()> {
    let variable = |name: &str| env::var(name).with_context(|| name.to_owned());
    let args = variable("CNI_ARGS")?;
    let given = Given::from_args(&args).with_context(|| format!("CNI_ARGS {args:?}"))?;
    match variable("CNI_COMMAND")?.as_str() {
        "ADD" => add(&given, &variable("CNI_NETNS")?, &variable("CNI_IFNAME")?),
        "DEL" => {
            let link = Message::new(libc::RTM_DELLINK, 0, &link(0, 0));
            Netlink::open()?.ask(vec![link.with(libc::IFLA_IFNAME, &text(&given.host_name))]).map(drop)
        }
        other => bail!("CNI_COMMAND {other:?}: expected ADD or DEL"),
    }
}

fn add(given: &Given, netns: &str, ifname: &str) -> Result<()> {
    let netns = File::open(netns).with_context(|| netns.to_owned())?;
    let mut host = Netlink::open()?;
    setns(&netns, CloneFlags::CLONE_NEWNET).context("setns")?;
    let mut pod = Netlink::open()?;
    let (host_name, pod_name) = (text(&given.host_name), text(ifname));
    let peer_netns = netns.as_raw_fd().to_ne_bytes();
    let one = 1_u32.to_ne_bytes();
    let queues = [(libc::IFLA_NUM_TX_QUEUES, one.as_slice()), (libc::IFLA_NUM_RX_QUEUES, &one)];
    let names = [(libc::IFLA_IFNAME, pod_name.as_slice()), (libc::IFLA_NET_NS_FD, &peer_netns)];
    let peer = attributes(&link(0, 0), &[names, queues].concat());
    let data = attributes(&[], &[(VETH_INFO_PEER | NESTED, &peer)]);
    let mode = attributes(&[], &[(IFLA_BRPORT_MODE, &[1])]);
    let veth = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &link(0, 0))
        .with(libc::IFLA_IFNAME, &host_name)
        .with(libc::IFLA_NUM_TX_QUEUES, &one)
        .with(libc::IFLA_NUM_RX_QUEUES, &one)
        .with(libc::IFLA_MASTER, &given.bridge.to_ne_bytes())
        .nest(
            libc::IFLA_LINKINFO,
            &[(libc::IFLA_INFO_KIND, b"veth"), (libc::IFLA_INFO_DATA | NESTED, &data)],
        );
    let port = Message::new(libc::RTM_NEWLINK, 0, &link(0, UP)).with(libc::IFLA_IFNAME, &host_name).nest(
        libc::IFLA_LINKINFO,
        &[(libc::IFLA_INFO_SLAVE_KIND, b"bridge"), (libc::IFLA_INFO_SLAVE_DATA | NESTED, &mode)],
    );
    host.ask(vec![veth, port]).context("veth pair and bridge port")?;

    let asked = Message::new(libc::RTM_GETLINK, 0, &link(0, 0)).with(libc::IFLA_IFNAME, &pod_name);
    let found = pod.ask(vec![asked]).context("the pod's interface")?;
    let index = u32_at(found.first().context("no answer")?, 4);
    let own = given.address.octets();
    let address = [&[libc::AF_INET as u8, given.prefix, 0, 0], index.to_ne_bytes().as_slice()].concat();
    let route = [libc::AF_INET as u8, 0, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, 0, libc::RTN_UNICAST];
    let route = [route.as_slice(), &[0; 4]].concat();
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    pod.ask(vec![
        Message::new(libc::RTM_NEWADDR, create, &address)
            .with(libc::IFA_LOCAL, &own)
            .with(libc::IFA_ADDRESS, &own),
        Message::new(libc::RTM_NEWLINK, 0, &link(index, UP)),
        Message::new(libc::RTM_NEWROUTE, create, &route)
            .with(libc::RTA_GATEWAY, &given.gateway.octets())
            .with(libc::RTA_OIF, &index.to_ne_bytes()),
    ])
    .context("address and route")
    .map(drop)
}

/// `struct ifinfomsg`; the flags given are the flags changed.
fn link(index: u32, flags: u32) -> Vec<u8> {
    let parts = [0, index, flags, flags].map(u32::to_ne_bytes);
    parts.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_read_back() {
        let given = Given {
            host_name: "floor7".into(),
            bridge: 5,
            address: Ipv4Addr::new(10, 5, 32, 9),
            prefix: 20,
            gateway: Ipv4Addr::new(10, 5, 32, 1),
        };
        let args = given.to_args();
        assert_eq!(Given::from_args(&args), Some(given));
        assert_eq!(Given::from_args(&(args.clone() + ";")), None);
        assert_eq!(Given::from_args(&args.replace("20", "300")), None);
    }
}
