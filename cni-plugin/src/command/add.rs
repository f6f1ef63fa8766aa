//! ADD: a transaction that the agent owns. Reserve, wire, Commit on one connection; when it closes early, for whatever
//! reason, the agent undoes everything, and the alarm makes sure that no plugin wires after its reservation has lapsed.

use std::fs::OpenOptions;
use std::io::{Read as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::libc;
use weft_shared::cni::{
    CniArgs, CniResult, Code, Dns, Interface, InterfaceConf, IpConfig, NetConf, Route, Target,
};
use weft_shared::deadline;
use weft_shared::protocol::{Attachment, Commit, Failure, Request, Reservation, Reserve};

use super::{bad_netns, print};
use crate::agent::Agent;
use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::wiring::{self, Plan, Pod, Wired};

pub(crate) fn add(
    conf: &NetConf,
    target: &Target,
    netns_path: &str,
    args: &str,
    own_netns_is_fine: bool,
    deadline: Instant,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    if conf.has_prev_result() {
        let msg = "prevResult is set: weft makes the interface, so expected it first in the list of plugins";
        return Err(Failure::new(Code::BadConfiguration, msg));
    }
    let args = CniArgs::parse(args)?;
    let mut interface = InterfaceConf::parse(conf, &args)?;
    if let Some(path) = interface.resolv_conf.as_ref().filter(|_| interface.dns.is_empty()) {
        interface.dns = read_resolv_conf(path)?;
    }
    let socket = conf.socket()?;
    let netns = Netns::open(netns_path, own_netns_is_fine).map_err(|e| bad_netns(netns_path, &e))?;
    let mut pod = Pod::open(netns).map_err(|e| bad_netns(netns_path, &e))?;

    let attachment = conf.attachment(target);
    let unavailable = |e: crate::agent::AgentError| e.into_failure(&socket, Code::TryAgainLater);
    let mut agent = Agent::connect(&socket, deadline::ADD_CONNECT, deadline).map_err(unavailable)?;
    agent
        .reserve(Reserve {
            attachment: attachment.clone(),
            netns: netns_path.to_owned(),
            netns_cookie: pod.cookie(),
            requested: interface.requested.clone(),
            bridge: interface.bridge.clone(),
            pod: args.pod,
            host_ports: interface.host_ports.clone(),
            bandwidth: interface.bandwidth,
        })
        .map_err(unavailable)?;
    let mut host = Netlink::open().map_err(|e| Failure::new(Code::Wiring, format!("netlink socket: {e}")))?;
    let reserved = agent.reserved().map_err(unavailable)?;
    let unheard =
        interface.bridge.needs_newer_agent() && reserved.options.as_ref() != Some(&interface.bridge);
    if unheard || (&reserved.host_ports, reserved.bandwidth) != (&interface.host_ports, interface.bandwidth) {
        let msg = "this weftd does not know of host ports, of bandwidth, of ipMasq or of forceAddress: expected one of the \
                   plugin's version, upgrade it";
        return Err(Failure::new(Code::ProtocolMismatch, msg));
    }

    let plan = Plan::new(&attachment, &interface, &reserved)?;
    let wired = wiring::wire(&plan, &mut host, &mut pod)?;
    let commit = Commit {
        attachment: attachment.clone(),
        host_ifindex: wired.host_ifindex,
        host_mac: wired.host_mac,
        container_mac: wired.container_mac,
    };
    // The neighbours are told while the agent writes down.
    let told = agent.commit(commit).map(|()| wiring::announce(&wired, &mut pod));
    let committed = told.and_then(|announced| agent.committed().map(|()| announced));
    let announced = committed.map_err(|e| {
        wiring::undo(&mut host, wired.host_ifindex);
        Failure { code: Code::TryAgainLater as u32, ..unavailable(e) }
    })?;
    let result = result(&interface, &plan, &reserved, &wired, netns_path);
    let printed = announced.and_then(|()| result.render(conf.version)).and_then(|text| print(&text, out));
    printed.inspect_err(|_| {
        // Whoever has deleted it has told the agent, and what that holds by now is another ADD's.
        if wiring::undo(&mut host, wired.host_ifindex) {
            take_back(&socket, attachment);
        }
    })
}

/// A few lines, as long as it is one.
const MAX_RESOLV_CONF: u64 = 64 << 10;

fn read_resolv_conf(path: &Path) -> Result<Dns, Failure> {
    let mut text = String::new();
    // A FIFO in its place must not hold the runtime up.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.and_then(|file| file.take(MAX_RESOLV_CONF).read_to_string(&mut text)).map_err(|e| {
        Failure::new(Code::Io, format!("ipam.resolvConf = {path:?}: expected a file that can be read: {e}"))
    })?;
    Ok(Dns::from_resolv_conf(&text))
}

fn result(
    interface: &InterfaceConf,
    plan: &Plan,
    reserved: &Reservation,
    wired: &Wired,
    sandbox: &str,
) -> CniResult {
    let link = |name: &weft_shared::IfName, mac: weft_shared::Mac, sandbox: &str| Interface {
        name: name.to_string(),
        mac: mac.to_string(),
        mtu: Some(plan.mtu),
        sandbox: sandbox.to_owned(),
    };
    // A list may give its pods less than the bridge's MTU, which the agent keeps.
    let bridge = Interface { mtu: None, ..link(&reserved.bridge, reserved.bridge_mac, "") };
    let interfaces = vec![
        bridge,
        link(&plan.host_name, wired.host_mac, ""),
        link(&plan.container_name, wired.container_mac, sandbox),
    ];
    let container = interfaces.len() - 1;
    let ip = |a: &weft_shared::protocol::PodAddress| IpConfig {
        interface: Some(container),
        address: a.address,
        gateway: Some(a.gateway),
    };
    CniResult {
        ips: reserved.addresses.iter().map(ip).collect(),
        routes: plan
            .routes
            .iter()
            .map(|route| Route { dst: route.dst.into(), gw: Some(route.gateway), form: route.form })
            .collect(),
        interfaces,
        dns: interface.dns.clone(),
    }
}

/// The runtime is not told of the container's interface, so nobody will ever delete it. On a connection of its own:
/// the transaction's is done.
fn take_back(socket: &Path, attachment: Attachment) {
    let deadline = Instant::now() + deadline::TAKE_BACK;
    // Should this fail too, the agent finds the host's end of the pair gone.
    let _ = Agent::connect(socket, Duration::ZERO, deadline)
        .and_then(|mut agent| agent.done(&Request::Release { attachment }));
}
