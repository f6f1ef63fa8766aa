//! The options of the reference `bridge` and of its `ipam` that users of flannel set in `delegate`; every other one is
//! refused by key and value, or honoured.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::conform::case::{Case, Checked, Group, expect, red};
use crate::conform::container::{Container, Refusal, refused};
use crate::conform::stand::Stand;
use crate::kernel::query;
use crate::traffic::echo::ping;
use crate::traffic::named::{Named, ask_tcp};
use crate::underlay::Underlay;
use crate::wait::{SECOND, eventually};

pub(super) const GROUP: Group = Group {
    name: "options",
    title: "Options of the reference bridge",
    cases: &[
        Case::run("bridge", "bridge: the container hangs on the bridge of that name", bridge).alone(),
        Case::run("bridge-exists", "a bridge that is there is used as it is", bridge_exists).alone(),
        Case::run(
            "bridge-is-none",
            "a device of that name that is no bridge fails the ADD, and stays",
            bridge_is_none,
        )
        .alone(),
        Case::run("bridge-mac", "the bridge's MAC stays the same while containers come and go", bridge_mac),
        Case::run("bridge-accept-ra", "no router advertisement configures the bridge", accept_ra),
        Case::run("forwarding", "the node forwards as soon as there is a gateway", forwarding).alone(),
        Case::run("isGateway", "isGateway: the bridge has the gateway's address", is_gateway),
        Case::run(
            "isDefaultGateway",
            "isDefaultGateway: a default route by the gateway, and none without",
            is_default_gateway,
        ),
        Case::run("hairpinMode", "hairpinMode: on and off at the bridge's port", hairpin),
        Case::run("mtu", "mtu: of both ends", mtu),
        Case::run(
            "portIsolation",
            "portIsolation: isolated containers reach the gateway, and not each other",
            isolation,
        ),
        Case::run("forceAddress", "forceAddress: another address on the bridge is removed", force_address)
            .alone(),
        Case::run(
            "no-forceAddress",
            "without forceAddress another address on the bridge is not removed",
            leave_address,
        )
        .alone(),
        Case::run("ipMasq", "ipMasq: what leaves the containers' network has the node's address", masquerade),
        Case::run("no-ipMasq", "without ipMasq it has the container's own", no_masquerade),
        Case::run(
            "ipMasq-inside",
            "ipMasq: what stays in the containers' network has the container's own",
            masquerade_inside,
        ),
        Case::run("ipMasq-del", "ipMasq: no rule is left after DEL", |stand| masquerade_goes(stand, false)),
        Case::run(
            "ipMasq-del-empty-netns",
            "ipMasq: no rule is left after a DEL with an empty CNI_NETNS",
            |stand| masquerade_goes(stand, true),
        ),
        Case::run("ipMasqBackend", "ipMasqBackend nftables: no rule in iptables", masquerade_backend),
        Case::run("enabledad", "enabledad: duplicate address detection of IPv6 is on, and off without", dad),
        Case::run("dns", "dns: in the result as it was given", dns),
        Case::run(
            "ipam-routes",
            "ipam.routes: in the container and in the result, by the gateway where none is given",
            routes,
        ),
        Case::run(
            "ipam-routes-default",
            "ipam.routes: a default route with a gateway stands in for the bridge's",
            routes_default,
        ),
        Case::run(
            "ipam-routes-1.1.0",
            "ipam.routes: priority and table are the route's in the kernel",
            route_attributes,
        ),
        Case::run(
            "ipam-resolvConf",
            "ipam.resolvConf: the file's servers and domains are in the result",
            resolv_conf,
        ),
        Case::refusals(
            "bad-values",
            "a value of the wrong kind is refused with code 7, by key and value",
            &[
                Refusal::new("mtu \"big\"", "ADD", 7)
                    .config(|c| c["mtu"] = json!("big"))
                    .naming(&["mtu", "big"]),
                Refusal::new("mtu -1", "ADD", 7).config(|c| c["mtu"] = json!(-1)).naming(&["mtu", "-1"]),
                Refusal::new("hairpinMode \"yes\"", "ADD", 7)
                    .config(|c| c["hairpinMode"] = json!("yes"))
                    .naming(&["hairpinMode", "yes"]),
                Refusal::new("bridge 7", "ADD", 7)
                    .config(|c| c["bridge"] = json!(7))
                    .naming(&["bridge", "7"]),
                Refusal::new("bridge \"a/b\"", "ADD", 7)
                    .config(|c| c["bridge"] = json!("a/b"))
                    .naming(&["bridge", "a/b"]),
                Refusal::new("ipMasq 1", "ADD", 7)
                    .config(|c| c["ipMasq"] = json!(1))
                    .naming(&["ipMasq", "1"]),
            ],
        ),
        Case::refusals(
            "refused",
            "what it does not do is refused with code 2, by key and value",
            &[
                Refusal::new("vlan 5", "ADD", 2).config(|c| c["vlan"] = json!(5)).naming(&["vlan", "5"]),
                Refusal::new("vlanTrunk", "ADD", 2)
                    .config(|c| c["vlanTrunk"] = json!([{ "id": 101 }]))
                    .naming(&["vlanTrunk", "101"]),
                Refusal::new("promiscMode", "ADD", 2)
                    .config(|c| c["promiscMode"] = json!(true))
                    .naming(&["promiscMode", "true"]),
                Refusal::new("macspoofchk", "ADD", 2)
                    .config(|c| c["macspoofchk"] = json!(true))
                    .naming(&["macspoofchk", "true"]),
                Refusal::new("disableContainerInterface", "ADD", 2)
                    .config(|c| c["disableContainerInterface"] = json!(true))
                    .naming(&["disableContainerInterface", "true"]),
                Refusal::new("isGateway false", "ADD", 2)
                    .config(|c| {
                        c["isDefaultGateway"] = json!(false);
                        c["isGateway"] = json!(false);
                    })
                    .naming(&["isGateway", "false"]),
                Refusal::new("ipMasqBackend iptables", "ADD", 2)
                    .config(|c| c["ipMasqBackend"] = json!("iptables"))
                    .naming(&["ipMasqBackend", "iptables"]),
                Refusal::new("ipam.type dhcp", "ADD", 2)
                    .config(|c| c["ipam"] = json!({ "type": "dhcp" }))
                    .naming(&["ipam.type", "dhcp"]),
                Refusal::new("ipam.subnet", "ADD", 2)
                    .config(|c| c["ipam"]["subnet"] = json!("10.9.0.0/24"))
                    .naming(&["ipam.subnet", "10.9.0.0/24"]),
                Refusal::new("ipam.ranges", "ADD", 2)
                    .config(|c| c["ipam"]["ranges"] = json!([[{ "subnet": "10.9.0.0/24" }]]))
                    .naming(&["ipam.ranges", "10.9.0.0/24"]),
                Refusal::new("ipam.dataDir", "ADD", 2)
                    .config(|c| c["ipam"]["dataDir"] = json!("/run/elsewhere"))
                    .naming(&["ipam.dataDir", "/run/elsewhere"]),
                Refusal::new("ipRanges", "ADD", 2)
                    .config(|c| c["runtimeConfig"]["ipRanges"] = json!([[{ "subnet": "10.9.0.0/24" }]]))
                    .naming(&["ipRanges", "10.9.0.0/24"]),
            ],
        ),
    ],
};

fn bridge(stand: &Stand) -> Checked {
    let container = stand.container()?.with("bridge", json!("br9"));
    let result = container.add()?;
    expect(container.host_end()?["master"] == "br9", "it hangs on another", &result)?;
    let listed = result["interfaces"].as_array().is_some_and(|l| l.iter().any(|i| i["name"] == "br9"));
    expect(listed, "the result names another", &result)?;
    container.del(Some(&result))
}

fn bridge_exists(stand: &Stand) -> Checked {
    stand.netns().ip("link add cni0 type bridge forward_delay 0")?;
    let before = stand.link(stand.netns(), "cni0")?.context("a bridge")?;
    let container = stand.container()?;
    let result = container.add()?;
    let after = stand.link(stand.netns(), "cni0")?.unwrap_or_default();
    expect(after["ifindex"] == before["ifindex"], "it was replaced", &after)?;
    expect(container.host_end()?["master"] == "cni0", "the container hangs on another", &result)?;
    container.del(Some(&result))
}

fn bridge_is_none(stand: &Stand) -> Checked {
    stand.netns().ip("link add cni0 type ifb")?;
    let container = stand.container()?;
    let error = refused(&container.call("ADD", None)?, "ADD")?;
    expect(error.text.contains("cni0"), "the error does not name it", &error.text)?;
    let kept = stand.link(stand.netns(), "cni0")?.unwrap_or_default();
    expect(kept["linkinfo"]["info_kind"] == "ifb", "the device is another, or gone", &kept)?;
    container.must_be_bare("the refused ADD")
}

fn bridge_mac(stand: &Stand) -> Checked {
    let first = stand.container()?;
    first.add()?;
    let mac = |stand: &Stand| -> Result<Value> {
        Ok(stand.link(stand.netns(), "cni0")?.unwrap_or_default()["address"].clone())
    };
    let before = mac(stand)?;
    for number in 0..3 {
        // Lower than any other: a bridge without a MAC of its own takes the lowest.
        let low = format!("02:00:00:00:00:0{number}");
        let container = stand.container()?.with_capability("mac", json!(low));
        container.add()?;
        let veth = container.host_end()?["ifname"].as_str().unwrap_or_default().to_owned();
        stand.netns().ip(&format!("link set {veth} address {low}"))?;
        expect(mac(stand)? == before, "it is another with a port more", before.clone())?;
        container.del(None)?;
        expect(mac(stand)? == before, "it is another with a port less", before.clone())?;
    }
    first.del(None)
}

fn accept_ra(stand: &Stand) -> Checked {
    let container = stand.container()?;
    container.add()?;
    let value = stand.netns().sysctl("ipv6/conf/cni0/accept_ra")?;
    let off = stand.netns().sysctl("ipv6/conf/cni0/disable_ipv6")?;
    expect(value == "0" || off == "1", "accept_ra is on", value)?;
    container.del(None)
}

fn forwarding(stand: &Stand) -> Checked {
    let container = stand.container()?;
    container.add()?;
    let value = stand.netns().sysctl("ipv4/conf/cni0/forwarding")?;
    expect(value == "1", "it does not", value)?;
    container.del(None)
}

fn is_gateway(stand: &Stand) -> Checked {
    let container = stand.container()?.with("isGateway", json!(true)).with("isDefaultGateway", json!(false));
    let result = container.add()?;
    let gateway = stand.subnet().gateway();
    let held = stand.netns().ip("-4 address show dev cni0")?;
    expect(held.contains(&format!("{gateway}/{}", stand.subnet().len())), "it does not", held)?;
    expect(result["ips"][0]["gateway"] == gateway.to_string(), "the result names another", &result)?;
    container.del(Some(&result))
}

fn is_default_gateway(stand: &Stand) -> Checked {
    for wanted in [true, false] {
        let container =
            stand.container()?.with("isDefaultGateway", json!(wanted)).with("isGateway", json!(true));
        let result = container.add()?;
        let held = container.netns.ip("route show default")?;
        let has = held.contains(&format!("via {}", stand.subnet().gateway()));
        expect(has == wanted, format!("isDefaultGateway {wanted}: a default route: {has}"), held)?;
        container.del(Some(&result))?;
    }
    Ok(())
}

fn hairpin(stand: &Stand) -> Checked {
    for wanted in [true, false] {
        let container = stand.container()?.with("hairpinMode", json!(wanted));
        let result = container.add()?;
        let port = container.host_end()?;
        let has = port["linkinfo"]["info_slave_data"]["hairpin"] == true;
        expect(has == wanted, format!("hairpinMode {wanted}: the port's is {has}"), port)?;
        container.must_check(&result)?;
        container.del(Some(&result))?;
    }
    Ok(())
}

fn mtu(stand: &Stand) -> Checked {
    let container = stand.container()?.with("mtu", json!(1280));
    let result = container.add()?;
    for link in [container.interface()?.unwrap_or_default(), container.host_end()?] {
        expect(link["mtu"] == 1280, "an end has another", &link)?;
    }
    container.must_check(&result)?;
    container.del(Some(&result))
}

fn isolation(stand: &Stand) -> Checked {
    let isolated = || stand.container().map(|new| new.with("portIsolation", json!(true)));
    let (one, two) = (isolated()?, isolated()?);
    let result = one.add()?;
    two.add()?;
    expect(
        one.host_end()?["linkinfo"]["info_slave_data"]["isolated"] == true,
        "the port is not isolated",
        &result,
    )?;
    let gateway: Ipv4Addr = stand.address(1)?.parse().context("an address")?;
    ping(&one.netns, gateway, 10, SECOND)
        .map_err(|e| red("the gateway does not answer", format!("{e:#}")))?;
    let other: Ipv4Addr =
        two.addresses()?[0].split('/').next().unwrap_or_default().parse().context("an address")?;
    expect(ping(&one.netns, other, 2, SECOND).is_err(), "they reach each other", &result)?;
    one.must_check(&result)?;
    one.del(Some(&result))?;
    two.del(None)
}

const OTHER: &str = "192.0.2.1/24";

/// A bridge that carries another address already.
fn addressed_bridge(stand: &Stand) -> Result<()> {
    stand.netns().ip("link add cni0 type bridge forward_delay 0")?;
    stand.netns().ip("link set cni0 up")?;
    stand.netns().ip(&format!("address add {OTHER} dev cni0")).map(drop)
}

fn force_address(stand: &Stand) -> Checked {
    addressed_bridge(stand)?;
    let container = stand.container()?.with("forceAddress", json!(true));
    let result = container.add()?;
    let addresses = || stand.netns().ip("-4 address show dev cni0");
    // An agent that has just started removes nothing before it has heard its store.
    let gone = eventually("the other address to go", SECOND * 10, || Ok(!addresses()?.contains(OTHER)));
    let held = addresses()?;
    expect(gone.is_ok(), "the other address is left", &held)?;
    expect(held.contains(&stand.subnet().gateway().to_string()), "the gateway's address is missing", &held)?;
    container.del(Some(&result))
}

fn leave_address(stand: &Stand) -> Checked {
    addressed_bridge(stand)?;
    let container = stand.container()?;
    // The reference refuses the ADD then.
    container.call("ADD", None)?;
    let held = stand.netns().ip("-4 address show dev cni0")?;
    expect(held.contains(OTHER), "it was", &held)?;
    container.del(None)
}

/// The address by which a host outside the containers' network knows a container.
fn seen_outside(stand: &Stand, container: &Container<'_>) -> Checked<IpAddr> {
    let _server = Named::start(stand.outside(), "outside", Underlay::GATEWAY, 8099)?;
    let node = stand.node().net.address;
    stand.outside().ip(&format!("route replace {} via {node}", stand.subnet()))?;
    let answer = ask_tcp(&container.netns, SocketAddrV4::new(Underlay::GATEWAY, 8099)).ok().flatten();
    Ok(answer.ok_or_else(|| red("nobody outside hears the container", ""))?.client)
}

fn own_address(container: &Container<'_>) -> Result<Ipv4Addr> {
    let addresses = container.addresses()?;
    let address = addresses.first().and_then(|a| a.split('/').next()).context("an address")?;
    Ok(address.parse()?)
}

fn masquerading<'s>(stand: &'s Stand) -> Checked<Container<'s>> {
    let container = stand.container()?.with("ipMasq", json!(true));
    container.add()?;
    Ok(container)
}

fn masquerade(stand: &Stand) -> Checked {
    let container = masquerading(stand)?;
    let client = seen_outside(stand, &container)?;
    expect(client == stand.node().net.address, "it has another", client)?;
    container.del(None)
}

fn no_masquerade(stand: &Stand) -> Checked {
    let container = stand.container()?.with("ipMasq", json!(false));
    container.add()?;
    let client = seen_outside(stand, &container)?;
    expect(client == own_address(&container)?, "it has another", client)?;
    container.del(None)
}

fn masquerade_inside(stand: &Stand) -> Checked {
    let (container, other) = (masquerading(stand)?, masquerading(stand)?);
    let address = own_address(&other)?;
    let _server = Named::start(&other.netns, "inside", Ipv4Addr::UNSPECIFIED, 8098)?;
    let answer = ask_tcp(&container.netns, SocketAddrV4::new(address, 8098)).ok().flatten();
    let answer = answer.ok_or_else(|| red("the containers do not reach each other", ""))?;
    expect(answer.client == own_address(&container)?, "it has another", answer.client)?;
    container.del(None)?;
    other.del(None)
}

fn masquerade_goes(stand: &Stand, by_empty_netns: bool) -> Checked {
    let mut container = masquerading(stand)?;
    let address = own_address(&container)?.to_string();
    expect(stand.packet_filter()?.contains(&address), "there is no rule", "")?;
    if by_empty_netns {
        container.netns_var = Some(std::path::PathBuf::new());
    }
    container.del(None)?;
    let left = stand.packet_filter()?;
    expect(!left.contains(&address), "a rule is left", left)
}

fn masquerade_backend(stand: &Stand) -> Checked {
    let container = stand.container()?.with("ipMasq", json!(true)).with("ipMasqBackend", json!("nftables"));
    container.add()?;
    let client = seen_outside(stand, &container)?;
    expect(client == stand.node().net.address, "it is not masqueraded", client)?;
    let address = own_address(&container)?.to_string();
    let iptables = stand.iptables()?;
    expect(!iptables.contains(&address), "there is a rule in iptables", iptables)?;
    container.del(None)
}

fn dad(stand: &Stand) -> Checked {
    for wanted in [true, false] {
        let container = stand.container()?.with("enabledad", json!(wanted));
        container.add()?;
        let value = container.netns.sysctl("ipv6/conf/eth0/accept_dad")?;
        // Without IPv6 there is nothing to detect.
        let off = value == "0" || container.netns.sysctl("ipv6/conf/eth0/disable_ipv6")? == "1";
        let enhanced = container.netns.sysctl("ipv6/conf/eth0/enhanced_dad")?;
        let is = if wanted { value == "1" && enhanced == "1" } else { off };
        expect(is, format!("enabledad {wanted}: accept_dad is {value}, enhanced_dad {enhanced}"), "")?;
        container.del(None)?;
    }
    Ok(())
}

fn dns(stand: &Stand) -> Checked {
    let given = json!({ "nameservers": ["10.0.0.53"], "domain": "weft.test", "search": ["weft.test"], "options": ["ndots:5"] });
    let container = stand.container()?.with("dns", given.clone());
    let result = container.add()?;
    expect(result["dns"] == given, "it is another", &result)?;
    container.del(Some(&result))
}

fn with_routes<'s>(stand: &'s Stand, routes: Value) -> Checked<Container<'s>> {
    let mut container = stand.container()?;
    container.config()["ipam"]["routes"] = routes;
    Ok(container)
}

fn routes(stand: &Stand) -> Checked {
    let (gateway, other) = (stand.address(1)?, stand.address(50)?);
    let container =
        with_routes(stand, json!([{ "dst": "192.0.2.0/24" }, { "dst": "198.51.100.0/24", "gw": other }]))?;
    let result = container.add()?;
    for (dst, by) in [("192.0.2.0/24", &gateway), ("198.51.100.0/24", &other), ("default", &gateway)] {
        let held = container.netns.ip(&format!("route show exact {dst}"))?;
        expect(
            held.contains(&format!("via {by}")),
            format!("no route to {dst}, or by another gateway"),
            held,
        )?;
    }
    for dst in ["192.0.2.0/24", "198.51.100.0/24"] {
        let told = result["routes"].as_array().is_some_and(|l| l.iter().any(|r| r["dst"] == dst));
        expect(told, format!("the result does not have {dst}"), &result)?;
    }
    container.must_check(&result)?;
    container.netns.ip("route delete 198.51.100.0/24")?;
    let error = refused(&container.check(&result)?, "CHECK without a route of ipam.routes")?;
    expect(error.text.contains("198.51.100.0"), "CHECK does not name the route that is gone", &error.text)?;
    container.del(Some(&result))
}

fn routes_default(stand: &Stand) -> Checked {
    let other = stand.address(50)?;
    let container = with_routes(stand, json!([{ "dst": "0.0.0.0/0", "gw": other }]))?;
    let result = container.add()?;
    let held = container.netns.ip("route show default")?;
    expect(held.lines().count() == 1 && held.contains(&format!("via {other}")), "it does not", held)?;
    container.must_check(&result)?;
    container.del(Some(&result))
}

fn route_attributes(stand: &Stand) -> Checked {
    let container = with_routes(
        stand,
        json!([{ "dst": "192.0.2.0/24", "priority": 77 }, { "dst": "198.51.100.0/24", "table": 1007 }]),
    )?;
    let result = container.add()?;
    let main = container.netns.ip("route show exact 192.0.2.0/24")?;
    expect(main.contains("metric 77"), "the priority is another", main)?;
    let table = query(&container.netns, "ip -json route show table 1007")?;
    expect(
        table.iter().any(|row| row["dst"] == "198.51.100.0/24"),
        "the table does not have the route",
        &result,
    )?;
    let told = |dst: &str, key: &str, value: u64| {
        let routes = result["routes"].as_array();
        routes.is_some_and(|l| l.iter().any(|r| r["dst"] == dst && r[key] == value))
    };
    expect(told("192.0.2.0/24", "priority", 77), "the result does not have the priority", &result)?;
    expect(told("198.51.100.0/24", "table", 1007), "the result does not have the table", &result)?;
    container.must_check(&result)?;
    container.del(Some(&result))
}

fn resolv_conf(stand: &Stand) -> Checked {
    let file = stand.place.data.join("resolv.conf");
    let text = "# a comment\nnameserver 10.0.0.53\nnameserver 10.0.0.54\ndomain weft.test\nsearch a.test b.test\noptions ndots:5 edns0\n";
    fs::write(&file, text)?;
    let mut container = stand.container()?;
    container.config()["ipam"]["resolvConf"] = json!(file);
    let result = container.add()?;
    let expected = json!({
        "nameservers": ["10.0.0.53", "10.0.0.54"], "domain": "weft.test", "search": ["a.test", "b.test"],
        "options": ["ndots:5", "edns0"],
    });
    expect(result["dns"] == expected, "dns is another", &result)?;
    container.del(Some(&result))
}
