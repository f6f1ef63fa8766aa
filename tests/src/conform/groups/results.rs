//! The result of ADD in every version of the specification, against its schema, and against what the kernel has.

use serde_json::{Value, json};

use super::version::RELEASED;
use crate::conform::case::{Case, Checked, Group, expect, red};
use crate::conform::container::Container;
use crate::conform::schema;
use crate::conform::stand::Stand;

pub(super) const GROUP: Group = Group {
    name: "results",
    title: "Results by version of the specification",
    cases: &[
        Case::run("0.1.0", "ADD, DEL and a result of this version's schema", |stand| shape(stand, "0.1.0")),
        Case::run("0.2.0", "ADD, DEL and a result of this version's schema", |stand| shape(stand, "0.2.0")),
        Case::run("0.3.0", "ADD, DEL and a result of this version's schema", |stand| shape(stand, "0.3.0")),
        Case::run("0.3.1", "ADD, DEL and a result of this version's schema", |stand| shape(stand, "0.3.1")),
        Case::run("0.4.0", "ADD, CHECK, DEL and a result of this version's schema", |stand| {
            shape(stand, "0.4.0")
        }),
        Case::run("1.0.0", "ADD, CHECK, DEL and a result of this version's schema", |stand| {
            shape(stand, "1.0.0")
        }),
        Case::run("1.1.0", "ADD, CHECK, DEL and a result of this version's schema", |stand| {
            shape(stand, "1.1.0")
        }),
        Case::run("unstated", "a configuration without a version gets a result of 0.1.0", unstated),
        Case::run("true", "the result tells the kernel's addresses, MACs, MTU and routes", tells_the_truth),
        Case::run(
            "sandbox",
            "sandbox is CNI_NETNS as it was given; an interface of the node has none",
            sandbox,
        ),
        Case::run(
            "address-index",
            "every address names the container's interface, by its place in the list",
            address_index,
        ),
        Case::run(
            "prev-result-versions",
            "DEL understands a result of any version, also of one without cniVersion",
            earlier_results,
        ),
    ],
};

fn shape(stand: &Stand, version: &str) -> Checked {
    let container = stand.container_of(version)?;
    let result = container.add()?;
    schema::check(&result, version).map_err(|fault| red(fault, &result))?;
    if version >= "0.4.0" {
        container.must_check(&result)?;
    }
    container.del(Some(&result).filter(|_| version >= "0.4.0"))?;
    container.must_be_bare("DEL")
}

fn unstated(stand: &Stand) -> Checked {
    for absent in [false, true] {
        let mut container = stand.container_of("")?;
        if absent && let Some(config) = container.config().as_object_mut() {
            config.remove("cniVersion");
        }
        let result = container.add()?;
        schema::check(&result, "0.1.0").map_err(|fault| red(fault, &result))?;
        container.del(None)?;
    }
    Ok(())
}

/// The entry of the container's interface.
fn own<'r>(result: &'r Value, container: &Container<'_>) -> Checked<&'r Value> {
    let found = result["interfaces"].as_array().into_iter().flatten();
    let mut found = found.filter(|i| i["name"] == container.ifname.as_str() && i["sandbox"] != "");
    found.next().ok_or_else(|| red("interfaces lacks the container's", result))
}

fn tells_the_truth(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    let inside = container.interface()?.unwrap_or_default();
    let entry = own(&result, &container)?;
    expect(entry["mac"] == inside["address"], "the container's MAC is another", &result)?;
    expect(
        entry["mtu"].is_null() || entry["mtu"] == inside["mtu"],
        "the container's MTU is another",
        &result,
    )?;
    let told: Vec<_> =
        result["ips"].as_array().into_iter().flatten().map(|ip| ip["address"].clone()).collect();
    let has: Vec<_> = container.addresses()?.into_iter().map(Value::from).collect();
    expect(told == has, "the addresses are others", &result)?;
    let host = container.host_end()?;
    let listed = result["interfaces"].as_array().into_iter().flatten().any(|i| {
        i["name"] == host["ifname"]
            && i["mac"] == host["address"]
            && (i["sandbox"] == "" || i["sandbox"].is_null())
    });
    expect(listed, "the pair's end on the node is not listed by its name and MAC", &result)?;
    let bridge = stand.link(stand.netns(), "cni0")?.unwrap_or_default();
    let listed = result["interfaces"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|i| i["name"] == "cni0" && i["mac"] == bridge["address"]);
    expect(listed, "the bridge is not listed by its name and MAC", &result)?;
    for route in result["routes"].as_array().into_iter().flatten() {
        let dst = route["dst"].as_str().unwrap_or_default();
        let held = container.netns.ip(&format!("route show exact {dst}"))?;
        expect(!held.trim().is_empty(), format!("the container has no route to {dst}"), &result)?;
    }
    let default = container.netns.ip("route show default")?;
    let told = result["routes"].as_array().into_iter().flatten().any(|r| r["dst"] == "0.0.0.0/0");
    expect(told && !default.trim().is_empty(), "the default route is missing, or not told", &result)?;
    container.del(Some(&result))
}

fn sandbox(stand: &Stand) -> Checked {
    let mut container = stand.container()?;
    // A runtime's path may well take a detour.
    let path = container.netns.path();
    let detour = path.parent().map(|dir| dir.join("../netns").join(container.netns.name()));
    container.netns_var = detour.clone();
    let result = container.add()?;
    let told = own(&result, &container)?["sandbox"].as_str().map(std::path::PathBuf::from);
    expect(told == detour, "sandbox is another path than CNI_NETNS", &result)?;
    container.del(Some(&result))
}

fn address_index(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    for ip in result["ips"].as_array().into_iter().flatten() {
        let index = ip["interface"].as_u64().map(|index| index as usize);
        let entry = index.map(|index| &result["interfaces"][index]);
        let is_own = entry.is_some_and(|e| e["name"] == container.ifname.as_str());
        expect(is_own, "an address is of another interface, or of none", &result)?;
    }
    // containerd knows interfaces by name alone.
    let names = result["interfaces"].as_array().into_iter().flatten().filter(|i| i["name"] == "eth0").count();
    expect(names == 1, "the container's name is in the list twice", &result)?;
    container.del(Some(&result))
}

fn earlier_results(stand: &Stand) -> Checked {
    for version in RELEASED {
        let container = stand.container_of(version)?;
        let mut result = container.add()?;
        container.del(Some(&result))?;
        container.must_be_bare("DEL")?;
        let again = stand.container_of(version)?;
        again.add()?;
        if let Some(result) = result.as_object_mut() {
            result.remove("cniVersion");
        }
        again.del(Some(&result))?;
        again.must_be_bare("DEL")?;
    }
    let stranger = stand.container()?;
    stranger.add()?;
    stranger.del(Some(&json!({ "cniVersion": "1.1.0", "ips": [] })))?;
    stranger.must_be_bare("DEL with another's result")
}
