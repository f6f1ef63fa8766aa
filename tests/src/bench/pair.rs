//! Two nodes for one configuration, joined by a veth pair: every configuration has its own, and all stand during the
//! whole run, so that measurements can take turns.
//!
//! No bridge between them as the lab's underlay has: each hop there would cost every configuration alike and make the
//! differences smaller than they are.

use std::fs;
use std::net::SocketAddrV4;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::unistd::Pid;
use serde_json::{Value, json};
use weft_agent::status::PacketPathStatus;
use weft_agent::udp::Offload;

use super::choice::{Configuration, Setting};
use super::cpu::{Cores, pin};
use super::interrupt::Interrupt;
use super::load::Place;
use super::naive::Naive;
use super::offload;
use super::program::{Part, Program, Role};
use crate::bed::Bed;
use crate::binaries::Binaries;
use crate::cluster::READY;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::{Pod, Sandbox};
use crate::traffic::echo::ping;
use crate::underlay::{NodeNet, NodeNumber};

pub(super) const UNDERLAY: &str = "eth0";
const NETWORK: &str = "10.5.0.0/16";
/// flannel's for the udp backend: 28 bytes of IPv4 and UDP header.
const TUNNEL_MTU: usize = 1500 - 28;
const TUNNEL: &str = "flannel0";
const UDP_PORT: u16 = 8285;
const PATIENCE: Duration = Duration::from_secs(5);

/// Fields drop in order: programs end before the bed that holds their namespaces.
#[derive(Debug)]
pub struct Pair {
    pub configuration: Configuration,
    pub places: [Place; 2],
    forwarders: Vec<Program>,
    nodes: Vec<Node>,
    underlay: [Netns; 2],
}

impl Pair {
    /// Ready to carry traffic, which was tried.
    pub fn start(
        bed: &Bed,
        binaries: &Binaries,
        configuration: Configuration,
        cores: &Cores,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let nets = connect(bed, configuration)?;
        let underlay = nets.clone().map(|net| net.netns);
        let places = nets.clone().map(|net| Place { netns: net.netns, address: net.address });
        let mut pair = Self { configuration, places, forwarders: Vec::new(), nodes: Vec::new(), underlay };
        match configuration {
            Configuration::Node => {}
            Configuration::Naive => pair.start_naive(bed, binaries, nets, cores, interrupt)?,
            _ => pair.start_agents(bed, binaries, nets)?,
        }
        pair.answers().with_context(|| pair.explain())?;
        Ok(pair)
    }

    /// Sets the underlay's interfaces, and on which cores this pair's own processes run. A pair that carries nothing any
    /// more is an error here already: each of its measurements would wait in vain.
    pub fn set(&self, setting: Setting, cores: &[usize]) -> Result<()> {
        for netns in &self.underlay {
            offload::set(netns, UNDERLAY, setting)?;
        }
        for pid in self.processes()? {
            pin(pid, cores)?;
        }
        self.answers()
    }

    fn answers(&self) -> Result<()> {
        let [near, far] = &self.places;
        ping(&near.netns, far.address, 5, Duration::from_secs(1)).map(drop)
    }

    /// What the agents say, when one of them may have something to do with a failure.
    pub fn explain(&self) -> String {
        self.nodes.iter().map(|node| node.agent.explain()).collect()
    }

    /// What the packet path of the sending node's agent says of itself; other dataplanes have none.
    pub fn packet_path(&self) -> Result<Option<PacketPathStatus>> {
        let Some(sender) = self.nodes.first() else { return Ok(None) };
        Ok(sender.status()?.packet_path)
    }

    fn processes(&self) -> Result<Vec<Pid>> {
        let agents = self.nodes.iter().map(|node| node.agent.pid());
        agents.chain(self.forwarders.iter().map(|program| Ok(program.pid()))).collect()
    }

    /// weftd on both nodes, on a store that they share.
    fn start_agents(&mut self, bed: &Bed, binaries: &Binaries, nets: [NodeNet; 2]) -> Result<()> {
        let backend = match self.configuration {
            Configuration::HostGw => json!({ "Type": "host-gw" }),
            Configuration::Vxlan => json!({ "Type": "vxlan" }),
            _ => json!({ "Type": "udp" }),
        };
        let config = json!({ "Network": NETWORK, "SubnetLen": 24, "Backend": backend });
        let store = bed.root().join(format!("{}.db", self.configuration));
        for (number, net) in (1..).zip(nets) {
            let mut node = Node::new(bed.root(), NodeNumber(number), net, binaries)?;
            node.agent.flags = agent_flags(&node, &store, &config)?;
            if self.configuration == Configuration::UdpPlain {
                node.agent
                    .flags
                    .push(format!("--udp-offload-off={}", Offload::ALL.map(Offload::name).join(",")));
            }
            node.agent.start()?;
            self.nodes.push(node);
        }
        for node in &mut self.nodes {
            node.agent.wait_ready(READY)?;
        }
        for (node, place) in self.nodes.iter().zip(&mut self.places) {
            node.wait_peers(1, READY).with_context(|| node.agent.explain())?;
            *place = place_of(&node.pod("a")?);
        }
        if self.configuration == Configuration::UdpPlain {
            let path = self.packet_path()?.context("no packet path in the agent's status")?;
            let on: Vec<_> =
                path.offloads.iter().filter(|offload| offload.outcome != "switched-off").collect();
            ensure!(path.offloads.len() == Offload::ALL.len() && on.is_empty(), "not switched off: {on:?}");
        }
        Ok(())
    }

    /// Pods wired as elsewhere, by an agent of each node that knows of no other; the way between them is the bench's.
    fn start_naive(
        &mut self,
        bed: &Bed,
        binaries: &Binaries,
        nets: [NodeNet; 2],
        cores: &Cores,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let addresses = nets.clone().map(|net| net.address);
        for (index, net) in nets.into_iter().enumerate() {
            let own = format!("10.5.{}.0", index + 1);
            let config = json!({
                "Network": NETWORK, "SubnetLen": 24, "SubnetMin": own, "SubnetMax": own,
                "Backend": { "Type": "host-gw" },
            });
            let mut node = Node::new(bed.root(), NodeNumber(index as u8 + 1), net, binaries)?;
            let store = bed.root().join(format!("{}.db", node.name()));
            node.agent.flags = agent_flags(&node, &store, &config)?;
            node.agent.start()?;
            node.agent.wait_ready(READY)?;
            let other = 1 - index;
            let naive = Naive {
                device: TUNNEL.to_owned(),
                listen: SocketAddrV4::new(addresses[index], UDP_PORT),
                mtu: TUNNEL_MTU,
                peers: vec![(
                    format!("10.5.{}.0/24", other + 1).parse()?,
                    SocketAddrV4::new(addresses[other], UDP_PORT),
                )],
            };
            let part = Part { cores: cores.both(), role: Role::Naive(naive) };
            let mut program = Program::start(node.netns(), &part)?;
            program.ready(PATIENCE, interrupt)?;
            node.netns().ip(&format!("address add {own}/32 dev {TUNNEL}"))?;
            node.netns().ip(&format!("link set {TUNNEL} mtu {TUNNEL_MTU} up"))?;
            node.netns().ip(&format!("route add {NETWORK} dev {TUNNEL} metric 4096"))?;
            let mut sandbox = Sandbox::create(&node, &format!("{}-a", node.name()))?;
            sandbox.call.config["mtu"] = json!(TUNNEL_MTU);
            self.places[index] = place_of(&sandbox.wire()?);
            self.forwarders.push(program);
            self.nodes.push(node);
        }
        Ok(())
    }
}

/// Both nodes' namespaces with the interface between them.
fn connect(bed: &Bed, configuration: Configuration) -> Result<[NodeNet; 2]> {
    let net = |number: u8| -> Result<NodeNet> {
        let name = format!("{configuration}-{number}");
        let netns = bed.netns(&name)?;
        // Receive packet steering would take work off the core that everything is measured on.
        netns.set_sysctl("core/rps_default_mask", "0")?;
        Ok(NodeNet { port: UNDERLAY.to_owned(), name, netns, address: NodeNumber(number).address() })
    };
    let nets = [net(1)?, net(2)?];
    let [first, second] = &nets;
    first.netns.ip(&format!(
        "link add {UNDERLAY} type veth peer name {UNDERLAY} netns {}",
        second.netns.path().display()
    ))?;
    for NodeNet { netns, address, .. } in &nets {
        netns.ip(&format!("address add {address}/24 dev {UNDERLAY}"))?;
        netns.ip(&format!("link set {UNDERLAY} up"))?;
    }
    Ok(nets)
}

pub(super) fn agent_flags(node: &Node, store: &Path, config: &Value) -> Result<Vec<String>> {
    let file = node.agent.dir().join("net-conf.json");
    fs::write(&file, config.to_string())?;
    Ok(vec![
        format!("--store=embedded={}", store.display()),
        format!("--net-config={}", file.display()),
        format!("--iface={UNDERLAY}"),
    ])
}

fn place_of(pod: &Pod) -> Place {
    Place { netns: pod.netns.clone(), address: pod.address }
}
