//! In a list with the stock plugins: what is behind finds the interface by our result, and may change what we made.

use std::net::Ipv4Addr;

use serde_json::json;

use super::capabilities::{at, bucketed, is_heard, mapping, no_rule_left};
use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{printed, refused};
use crate::conform::stand::Stand;
use crate::traffic::named::Named;

pub(super) const GROUP: Group = Group {
    name: "chaining",
    title: "Chaining",
    cases: &[
        Case::run(
            "portmap",
            "portmap behind it leads a port of the host to the container, until DEL",
            portmap,
        ),
        Case::run(
            "bandwidth",
            "bandwidth behind it finds the end on the node and limits it, until DEL",
            bandwidth,
        ),
        Case::run("tuning", "tuning behind it changes MAC, MTU and a setting; CHECK agrees", tuning),
        Case::run("all-at-once", "a list with all three is added, checked and deleted", all_at_once),
        Case::run("oldest-list", "the same as kube-flannel's list says it, in 0.3.1", oldest_list),
        Case::run(
            "earlier-plugin",
            "behind another plugin its result holds what that one has made, or it refuses the place with code 7",
            earlier_plugin,
        ),
    ],
};

fn portmap(stand: &Stand) -> Checked {
    let container = stand
        .container()?
        .chained("portmap", json!({ "runtimeConfig": { "portMappings": [mapping(9091)] } }));
    let result = container.add()?;
    let _server = Named::start(&container.netns, "web", Ipv4Addr::UNSPECIFIED, 80)?;
    let heard = is_heard(stand.outside(), at(stand, 9091));
    expect(heard, "the port of the host leads nowhere", &result)?;
    container.must_check(&result)?;
    container.del(Some(&result))?;
    no_rule_left(stand, 9091)
}

fn limits() -> serde_json::Value {
    json!({ "ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000 })
}

fn bandwidth(stand: &Stand) -> Checked {
    let container =
        stand.container()?.chained("bandwidth", json!({ "runtimeConfig": { "bandwidth": limits() } }));
    let result = container.add()?;
    bucketed(stand, &container, &result)?;
    container.must_check(&result)?;
    container.del(Some(&result))?;
    Ok(stand.wait_bare()?)
}

fn tuned(stand: &Stand) -> serde_json::Value {
    json!({
        "mac": "02:00:00:00:01:02", "mtu": 1400, "dataDir": stand.place.data,
        "sysctl": { "net.ipv4.conf.eth0.rp_filter": "2" },
    })
}

fn tuning(stand: &Stand) -> Checked {
    let container = stand.container()?.chained("tuning", tuned(stand));
    let result = container.add()?;
    let link = container.interface()?.unwrap_or_default();
    expect(
        link["mtu"] == 1400 && link["address"] == "02:00:00:00:01:02",
        "MAC or MTU is not tuning's",
        &link,
    )?;
    container.must_check(&result)?;
    container.del(Some(&result))?;
    container.must_be_bare("DEL")
}

fn all_at_once(stand: &Stand) -> Checked {
    let container = stand
        .container()?
        .chained("portmap", json!({ "runtimeConfig": { "portMappings": [mapping(9092)] } }))
        .chained("bandwidth", json!({ "runtimeConfig": { "bandwidth": limits() } }))
        .chained("tuning", tuned(stand));
    let result = container.add()?;
    container.must_check(&result)?;
    container.del(Some(&result))?;
    container.must_be_bare("DEL")?;
    Ok(stand.wait_bare()?)
}

fn oldest_list(stand: &Stand) -> Checked {
    let container = stand
        .container_of("0.3.1")?
        .chained("portmap", json!({ "runtimeConfig": { "portMappings": [mapping(9093)] } }));
    let result = container.add()?;
    expect(result["cniVersion"] == "0.3.1", "the result is of another version", &result)?;
    let _server = Named::start(&container.netns, "web", Ipv4Addr::UNSPECIFIED, 80)?;
    let heard = is_heard(stand.outside(), at(stand, 9093));
    expect(heard, "the port of the host leads nowhere", &result)?;
    // Before 0.4.0 a runtime has no previous result for DEL.
    container.del(None)?;
    container.must_be_bare("DEL")
}

fn earlier_plugin(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let earlier = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "net7", "sandbox": container.netns.path(), "mac": "02:00:00:00:00:07" }],
        "ips": [{ "interface": 0, "address": "192.0.2.7/24" }],
    });
    let outcome = container.call("ADD", Some(&earlier))?;
    if outcome.exit != Some(0) {
        let error = refused(&outcome, "ADD behind another plugin")?;
        expect(error.code == 7, format!("code {}, expected 7", error.code), &error.text)?;
        return container.must_be_bare("the refused ADD");
    }
    let result = printed(&outcome, "ADD")?;
    let kept =
        result["ips"].as_array().is_some_and(|ips| ips.iter().any(|ip| ip["address"] == "192.0.2.7/24"));
    expect(kept, "the result lacks what the plugin before has made", &result)?;
    container.del(Some(&result))
}
