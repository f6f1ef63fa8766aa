//! What a runtime asks for by `runtimeConfig` (CONVENTIONS.md) and by the deprecated `CNI_ARGS`: MAC, addresses, ports
//! of the host, bandwidth. Where the reference has a plugin of its own for one, that is chained.

use std::net::{Ipv4Addr, SocketAddrV4};

use serde_json::{Value, json};

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{Container, Refusal, refused};
use crate::conform::stand::Stand;
use crate::kernel::query;
use crate::netns::Netns;
use crate::traffic::named::{Named, ask_tcp, ask_udp};

pub(super) const GROUP: Group = Group {
    name: "capabilities",
    title: "Capabilities and CNI_ARGS",
    cases: &[
        Case::run("mac", "the MAC that is asked for is the interface's, and told", mac),
        Case::run(
            "mac-precedence",
            "runtimeConfig's MAC comes before args.cni's, that before CNI_ARGS'",
            mac_precedence,
        ),
        Case::run("bad-mac", "a MAC that is none is refused and named", bad_mac),
        Case::run(
            "ips",
            "the address that is asked for is the interface's, with and without a prefix length",
            ips,
        ),
        Case::run("args-cni-ips", "an address by args.cni.ips is given", args_cni_ips),
        Case::run("ip-taken", "an address that another container has is refused and named", ip_taken),
        Case::run("ip-outside", "an address of another network is refused and named", |stand| {
            ip_refused(stand, "192.0.2.7")
        }),
        Case::run("ip-gateway", "the gateway's address is refused and named", |stand| {
            ip_refused(stand, &stand.address(1)?)
        }),
        Case::run("ip-all-or-none", "of two addresses both are given, or none stays taken", all_or_none),
        Case::run(
            "port-tcp",
            "a TCP port of the host leads to the container from outside, until DEL",
            port_tcp,
        ),
        Case::run("port-udp", "a UDP port of the host leads to the container from outside", port_udp),
        Case::run(
            "port-node",
            "a port of the host leads to the container from the node, by its address and by 127.0.0.1",
            port_node,
        ),
        Case::run("port-hairpin", "a container reaches itself by a port of the host", port_hairpin),
        Case::run(
            "port-capitals",
            "mappings as containerd writes them, with capital letters, are understood",
            port_capitals,
        ),
        Case::run(
            "port-vanished",
            "DEL without a namespace and without a result ends the mapping",
            port_vanished,
        ),
        Case::run("bandwidth", "rates and bursts limit both directions, until DEL", bandwidth),
        Case::run("args-kubelet", "what kubelet sends in CNI_ARGS is accepted", args_kubelet),
        Case::run("args-ip", "an address by CNI_ARGS is given", args_ip),
        Case::run("args-mac", "a MAC by CNI_ARGS is given", args_mac),
        Case::refusals(
            "args-malformed",
            "CNI_ARGS that are no pairs are refused and named",
            &[
                Refusal::new("CNI_ARGS without =", "ADD", 4)
                    .by_any_code()
                    .env(&[("CNI_ARGS", Some("IgnoreUnknown"))])
                    .naming(&["IgnoreUnknown"]),
                Refusal::new("CNI_ARGS with two =", "ADD", 4)
                    .by_any_code()
                    .env(&[("CNI_ARGS", Some("IgnoreUnknown=1;IP=a=b"))])
                    .naming(&["IP"]),
                Refusal::new("CNI_ARGS with a bad address", "ADD", 4)
                    .by_any_code()
                    .env(&[("CNI_ARGS", Some("IgnoreUnknown=1;IP=10.1.2"))])
                    .naming(&["10.1.2"]),
            ],
        ),
    ],
};

pub(super) fn mapping(host_port: u16) -> Value {
    json!({ "hostPort": host_port, "containerPort": 80, "protocol": "tcp" })
}

const MACS: [&str; 3] = ["02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"];

fn has_mac(container: &Container<'_>, mac: &str) -> Checked {
    let result = container.add()?;
    let link = container.interface()?.unwrap_or_default();
    expect(link["address"] == mac, "the interface has another MAC", &link["address"])?;
    let told = result["interfaces"].as_array().is_some_and(|l| l.iter().any(|i| i["mac"] == mac));
    expect(told, "the result has another MAC", &result)?;
    container.del(Some(&result))
}

fn mac(stand: &Stand) -> Checked {
    has_mac(&stand.container()?.with_capability("mac", json!(MACS[0])), MACS[0])
}

fn mac_precedence(stand: &Stand) -> Checked {
    let args = format!("IgnoreUnknown=1;MAC={}", MACS[2]);
    let two = stand.container()?.with_args(&args).with("args", json!({ "cni": { "mac": MACS[1] } }));
    has_mac(&two, MACS[1])?;
    has_mac(&two.with_capability("mac", json!(MACS[0])), MACS[0])
}

fn bad_mac(stand: &Stand) -> Checked {
    let container = stand.container()?.with_capability("mac", json!("no-mac"));
    let error = refused(&container.call("ADD", None)?, "MAC no-mac")?;
    expect(error.text.contains("no-mac"), "the error does not name no-mac", &error.text)?;
    container.must_be_bare("the refused ADD")
}

fn has_address(container: &Container<'_>, address: &str) -> Checked {
    let result = container.add()?;
    let addresses = container.addresses()?;
    let given = addresses.iter().any(|a| a.split('/').next() == Some(address));
    expect(given, "the interface has another address", format!("{addresses:?}"))?;
    container.del(Some(&result))
}

fn ips(stand: &Stand) -> Checked {
    let address = stand.address(77)?;
    has_address(&stand.container()?.with_capability("ips", json!([address])), &address)?;
    let with_length = format!("{address}/{}", stand.subnet().len());
    has_address(&stand.container()?.with_capability("ips", json!([with_length])), &address)
}

fn args_cni_ips(stand: &Stand) -> Checked {
    let address = stand.address(78)?;
    has_address(&stand.container()?.with("args", json!({ "cni": { "ips": [address] } })), &address)
}

fn ip_taken(stand: &Stand) -> Checked {
    let address = stand.address(79)?;
    let first = stand.container()?.with_capability("ips", json!([address]));
    let result = first.add()?;
    ip_refused(stand, &address)?;
    first.must_check(&result)?;
    first.del(Some(&result))
}

fn ip_refused(stand: &Stand, address: &str) -> Checked {
    let container = stand.container()?.with_capability("ips", json!([address]));
    let error = refused(&container.call("ADD", None)?, "ADD with that address")?;
    expect(error.text.contains(address), "the error does not name the address", &error.text)?;
    container.must_be_bare("the refused ADD")
}

fn all_or_none(stand: &Stand) -> Checked {
    let (free, taken) = (stand.address(80)?, stand.address(81)?);
    let holder = stand.container()?.with_capability("ips", json!([taken]));
    let result = holder.add()?;
    let both = stand.container()?.with_capability("ips", json!([free, taken]));
    refused(&both.call("ADD", None)?, "ADD with a free and a taken address")?;
    both.must_be_bare("the refused ADD")?;
    has_address(&stand.container()?.with_capability("ips", json!([free])), &free)?;
    holder.del(Some(&result))
}

/// A container with a server behind a port of the host.
fn published<'s>(stand: &'s Stand, mapping: Value) -> Checked<(Container<'s>, Value, Named)> {
    let container = stand.container()?.with_capability_by("portmap", "portMappings", json!([mapping]));
    let result = container.add()?;
    let server = Named::start(&container.netns, "web", Ipv4Addr::UNSPECIFIED, 80)?;
    Ok((container, result, server))
}

pub(super) fn at(stand: &Stand, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(stand.node().net.address, port)
}

/// Whether a server hears us there; no answer at all is none.
pub(super) fn is_heard(from: &Netns, place: SocketAddrV4) -> bool {
    (0..3).any(|_| ask_tcp(from, place).is_ok_and(|answer| answer.is_some()))
}

/// A container that is gone answers nobody, wherever its port leads: the rules tell.
pub(super) fn no_rule_left(stand: &Stand, port: u16) -> Checked {
    let rules = stand.packet_filter()?;
    expect(!rules.contains(&port.to_string()), "a rule is left after DEL", rules)
}

fn port_tcp(stand: &Stand) -> Checked {
    let (container, result, _server) = published(stand, mapping(9080))?;
    expect(is_heard(stand.outside(), at(stand, 9080)), "it leads nowhere", &result)?;
    container.must_check(&result)?;
    container.del(Some(&result))?;
    no_rule_left(stand, 9080)
}

fn port_udp(stand: &Stand) -> Checked {
    let mapping = json!({ "hostPort": 9081, "containerPort": 80, "protocol": "udp" });
    let (container, result, _server) = published(stand, mapping)?;
    let heard =
        (0..5).any(|_| ask_udp(stand.outside(), at(stand, 9081)).is_ok_and(|answer| answer.is_some()));
    expect(heard, "it leads nowhere", &result)?;
    container.del(Some(&result))
}

fn port_node(stand: &Stand) -> Checked {
    let (container, result, _server) = published(stand, mapping(9082))?;
    for address in [stand.node().net.address, Ipv4Addr::LOCALHOST] {
        let heard = is_heard(stand.netns(), SocketAddrV4::new(address, 9082));
        expect(heard, "it leads nowhere", format!("{address}: {result}"))?;
    }
    container.del(Some(&result))
}

fn port_hairpin(stand: &Stand) -> Checked {
    let (container, result, _server) = published(stand, mapping(9083))?;
    let heard = is_heard(&container.netns, at(stand, 9083));
    expect(heard, "it leads nowhere", &result)?;
    container.del(Some(&result))
}

fn port_capitals(stand: &Stand) -> Checked {
    let mapping = json!({ "HostPort": 9084, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "" });
    let (container, result, _server) = published(stand, mapping)?;
    expect(is_heard(stand.outside(), at(stand, 9084)), "it leads nowhere", &result)?;
    container.del(Some(&result))
}

fn port_vanished(stand: &Stand) -> Checked {
    let (mut container, _, server) = published(stand, mapping(9085))?;
    drop(server);
    container.netns.remove()?;
    container.netns_var = None;
    // The stock plugin knows its mappings by the runtime's configuration alone.
    container.del(None)?;
    stand.wait_bare()?;
    no_rule_left(stand, 9085)
}

/// Both directions have a token bucket.
pub(super) fn bucketed(stand: &Stand, container: &Container<'_>, result: &Value) -> Checked {
    let name = container.host_end()?["ifname"].as_str().unwrap_or_default().to_owned();
    let buckets: Vec<Value> =
        query(stand.netns(), "tc -json qdisc show")?.into_iter().filter(|q| q["kind"] == "tbf").collect();
    let on_veth = buckets.iter().any(|q| q["dev"] == name.as_str());
    expect(on_veth, "what goes to the container is not limited", result)?;
    expect(buckets.len() == 2, "what the container sends is not limited", format!("{buckets:?}"))
}

fn bandwidth(stand: &Stand) -> Checked {
    let limits = json!({
        "ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000,
    });
    let container = stand.container()?.with_capability_by("bandwidth", "bandwidth", limits);
    let result = container.add()?;
    bucketed(stand, &container, &result)?;
    container.must_check(&result)?;
    container.del(Some(&result))?;
    Ok(stand.wait_bare()?)
}

fn args_kubelet(stand: &Stand) -> Checked {
    let container = stand.container()?.with_args(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u",
    );
    let result = container.add()?;
    container.must_check(&result)?;
    container.del(Some(&result))
}

fn args_ip(stand: &Stand) -> Checked {
    let address = stand.address(82)?;
    has_address(
        &stand.container()?.with_args(&format!("IgnoreUnknown=1;IP={address};K8S_POD_NAME=web")),
        &address,
    )
}

fn args_mac(stand: &Stand) -> Checked {
    has_mac(&stand.container()?.with_args(&format!("IgnoreUnknown=1;MAC={}", MACS[2])), MACS[2])
}
