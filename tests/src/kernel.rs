//! What a node's kernel holds of the overlay, as iproute2 reports it: the scenarios compare two of these views.
//!
//! Only what must stay the same is in it. Left out: indexes (a device that was deleted comes back with another one),
//! timers, entries that the kernel makes by itself (link-local, multicast, dynamic neighbours).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::host::difference;
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
                    objects.insert(format!("address {} {}", text(&link["ifname"]), address_facts(address)));
                }
            }
        }
        let mut places = BTreeMap::<String, u32>::new();
        for mut route in query(netns, "ip -json -4 -N route show")? {
            // Of several routes to one subnet the first counts, so a place is a fact.
            let place = places.entry(text(&route["dst"]).to_owned()).and_modify(|n| *n += 1).or_insert(1);
            // Carrier: a fact of the wire.
            if let Some(flags) = route["flags"].as_array_mut() {
                flags.retain(|flag| flag != "linkdown");
            }
            objects.insert(format!("route {place} {route}"));
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
        for key in ["ipv4/ip_forward", "ipv4/conf/eth0/forwarding"] {
            objects.insert(format!("sysctl {key} = {}", netns.sysctl(key)?));
        }
        // Gone with their device, and no fact of their own then.
        for key in [
            "ipv4/conf/cni0/forwarding",
            "ipv4/conf/flannel.1/forwarding",
            "ipv4/conf/flannel0/forwarding",
            "ipv6/conf/flannel0/disable_ipv6",
        ] {
            if let Ok(value) = netns.sysctl(key) {
                objects.insert(format!("sysctl {key} = {value}"));
            }
        }
        Ok(Self { objects })
    }

    /// Whether there is any route, neighbour or forwarding entry of the subnet with that address.
    pub fn holds(&self, subnet: IpAddr) -> bool {
        let quoted = format!("\"{subnet}");
        self.objects.iter().any(|o| !o.starts_with("address") && o.contains(&quoted))
    }

    /// Objects of `self` that `other` lacks, then those that it has too much.
    pub fn difference(&self, other: &Self) -> String {
        difference(&self.objects, &other.objects)
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
    let has = |flag: &str| link["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == flag));
    let info = &link["linkinfo"];
    let (kind, data) = (&info["info_kind"], &info["info_data"]);
    // A bridge's data are mostly timers that run.
    let data = match kind.as_str() {
        Some("vxlan") => data.clone(),
        Some("tun") => json!({
            "type": data["type"], "multi_queue": data["multi_queue"], "persist": data["persist"],
            "user": data["user"],
        }),
        Some("bridge") => json!({ "stp_state": data["stp_state"], "ageing_time": data["ageing_time"] }),
        _ => Value::Null,
    };
    let port = &info["info_slave_data"];
    let flags = [
        "hairpin",
        "isolated",
        "learning",
        "flood",
        "guard",
        "root_block",
        "neigh_suppress",
        "locked",
        "bcast_flood",
        "mcast_flood",
        "proxy_arp",
        "proxy_arp_wifi",
        "vlan_tunnel",
    ];
    let flags: Vec<&str> = flags.into_iter().filter(|flag| port[flag] == true).collect();
    json!({
        "name": link["ifname"], "up": has("UP"), "arp": !has("NOARP"), "proto_down": link["proto_down"],
        "mtu": link["mtu"], "address": link["address"], "master": link["master"], "group": link["group"],
        "kind": kind, "data": data, "port": flags,
    })
}

fn address_facts(address: &Value) -> Value {
    let mut facts = address.clone();
    if let Some(facts) = facts.as_object_mut() {
        // A lifetime runs, and is a fact only as having an end.
        facts.retain(|key, _| !["valid_life_time", "preferred_life_time", "label"].contains(&key.as_str()));
        facts.insert("ends".into(), json!(address["valid_life_time"] != json!(u32::MAX)));
    }
    facts
}

fn is_link_local(address: &Value) -> bool {
    text(address).parse::<Ipv6Addr>().is_ok_and(|a| a.is_unicast_link_local())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
