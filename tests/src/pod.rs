//! A pod: a network namespace that the real plugin has wired to its node.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, bail};
use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use weft_shared::IfName;
use weft_shared::names::host_ifname;
use weft_shared::protocol::Attachment;

use crate::netns::Netns;
use crate::node::Node;
use crate::plugin::{Call, IFNAME, NETWORK, netconf};

/// The version that libcni speaks today.
const VERSION: &str = "1.1.0";

/// A namespace that waits for its ADD, or has had it.
#[derive(Debug, Clone)]
pub struct Sandbox {
    pub netns: Netns,
    pub call: Call,
}

#[derive(Debug, Clone)]
pub struct Pod {
    pub name: String,
    pub netns: Netns,
    pub address: Ipv4Addr,
    pub result: Value,
    pub call: Call,
}

impl Sandbox {
    /// A fresh namespace on `node` for a container of that name.
    pub fn create(node: &Node, name: &str) -> Result<Self> {
        let netns = Netns::create(&node.pod_netns_path(name))?;
        let call = Call {
            binary: node.binaries.plugin(),
            node: node.net.netns.clone(),
            container_id: name.to_owned(),
            netns: Some(netns.path().to_owned()),
            ifname: IFNAME.to_owned(),
            args: None,
            config: netconf(VERSION, &node.agent.cni_socket()),
        };
        Ok(Self { netns, call })
    }

    /// ADD.
    pub fn wire(self) -> Result<Pod> {
        let result = self.call.add()?;
        let address = address_of(&result)?;
        Ok(Pod { name: self.call.container_id.clone(), netns: self.netns, address, result, call: self.call })
    }
}

impl Pod {
    pub fn create(node: &Node, name: &str) -> Result<Self> {
        Sandbox::create(node, name)?.wire()
    }

    /// A pod that asks for its address, as a runtime does for a container with a fixed one.
    pub fn create_at(node: &Node, name: &str, address: &str) -> Result<Self> {
        let mut sandbox = Sandbox::create(node, name)?;
        sandbox.call.config["capabilities"] = json!({ "ips": true });
        sandbox.call.config["runtimeConfig"] = json!({ "ips": [address] });
        sandbox.wire()
    }

    /// DEL with the previous result, as libcni sends it. The namespace stays, so that nothing but the DEL cleans up.
    pub fn unwire(&self) -> Result<()> {
        let mut call = self.call.clone();
        call.config["prevResult"] = self.result.clone();
        call.del()
    }

    /// DEL, then the end of the namespace.
    pub fn delete(self) -> Result<()> {
        self.unwire()?;
        self.netns.remove()
    }

    pub fn host_veth(&self) -> Result<IfName> {
        host_veth(&self.call)
    }
}

/// The name that the host-side veth of a call's attachment has by agreement.
pub fn host_veth(call: &Call) -> Result<IfName> {
    let attachment = Attachment {
        network: NETWORK.parse()?,
        container_id: call.container_id.parse()?,
        ifname: call.ifname.parse()?,
    };
    Ok(host_ifname(&attachment))
}

/// The address of the first entry of `ips`.
pub fn address_of(result: &Value) -> Result<Ipv4Addr> {
    let text = result["ips"][0]["address"].as_str().with_context(|| format!("no address in {result}"))?;
    match text.parse::<IpNetwork>().with_context(|| format!("address {text:?}"))?.ip() {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(address) => bail!("the first address is {address}: expected IPv4"),
    }
}
