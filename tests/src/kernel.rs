//! What a node's kernel holds of the overlay, as iproute2 reports it: the scenarios compare two of these views.
//!
//! Only what must stay the same is in it. Left out: indexes (a device that was deleted comes back with another one),
//! timers, entries that the kernel makes by itself (link-local, multicast, dynamic neighbours).

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::netns::Netns;

/// One line per object, so that a difference names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelView {
    pub objects: BTreeSet<String>,
}

impl KernelView {
    pub fn of(netns: &Netns) -> Result<Self> {
        let mut objects = BTreeSet::new();
        for link in query(netns, "ip -json -details link show")? {
            objects.insert(format!("link {}", link_facts(&link)));
        }
        for link in query(netns, "ip -json address show")? {
            for address in link["addr_info"].as_array().into_iter().flatten() {
                if !is_link_local(&address["local"]) {
                    objects.insert(format!(
                        "address {} {}/{} {}",
                        text(&link["ifname"]),
                        text(&address["local"]),
                        address["prefixlen"],
                        text(&address["scope"])
                    ));
                }
            }
        }
        for route in query(netns, "ip -json -4 -N route show")? {
            objects.insert(format!("route {route}"));
        }
        for neighbour in query(netns, "ip -json neighbor show nud permanent")? {
            objects.insert(format!("neighbour {neighbour}"));
        }
        for entry in query(netns, "bridge -json fdb show")? {
            // The kernel's own entries for ports and multicast have no destination.
            if entry.get("dst").is_some() {
                objects.insert(format!("fdb {entry}"));
            }
        }
        objects.insert(format!("sysctl ipv4/ip_forward = {}", netns.sysctl("ipv4/ip_forward")?));
        Ok(Self { objects })
    }

    /// Objects of `self` that `other` lacks, then those that it has too much.
    pub fn difference(&self, other: &Self) -> String {
        let missing = self.objects.difference(&other.objects).map(|o| format!("- {o}\n"));
        let added = other.objects.difference(&self.objects).map(|o| format!("+ {o}\n"));
        missing.chain(added).collect()
    }
}

/// Index of every link by name: unlike a view it tells a device from its successor.
pub fn indexes(netns: &Netns) -> Result<Vec<(String, u64)>> {
    let links = query(netns, "ip -json link show")?;
    Ok(links.iter().map(|l| (text(&l["ifname"]).to_owned(), l["ifindex"].as_u64().unwrap_or(0))).collect())
}

/// Rows of an iproute2 command with `-json`.
pub fn query(netns: &Netns, command: &str) -> Result<Vec<Value>> {
    let mut words = command.split_whitespace();
    let program = words.next().context("empty command")?;
    let printed = netns.run(std::process::Command::new(program).args(words))?;
    // iproute2 prints nothing at all, or an empty array, when there is nothing.
    if printed.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(&printed).with_context(|| format!("{command} printed {printed:?}"))
}

fn link_facts(link: &Value) -> Value {
    let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == "UP"));
    let info = &link["linkinfo"];
    let kind = &info["info_kind"];
    // A bridge's data are mostly timers that run.
    let data = if kind == "vxlan" { info["info_data"].clone() } else { Value::Null };
    let port = &info["info_slave_data"];
    json!({
        "name": link["ifname"], "up": up, "mtu": link["mtu"], "address": link["address"],
        "master": link["master"], "group": link["group"], "kind": kind, "data": data,
        "hairpin": port["hairpin"], "isolated": port["isolated"],
    })
}

fn is_link_local(address: &Value) -> bool {
    text(address).parse::<Ipv6Addr>().is_ok_and(|a| a.is_unicast_link_local())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
