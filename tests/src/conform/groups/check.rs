//! CHECK: is everything as ADD made it (SPEC.md section 2, "CHECK")? What is altered must be named, since an operator has
//! nothing but the message; what later plugins may change must not be held against the container.

use serde_json::json;

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::refused;
use crate::conform::stand::Stand;
use crate::conform::tamper::Hand;

pub(super) const GROUP: Group = Group {
    name: "check",
    title: "CHECK after a foreign hand",
    cases: &[
        Case::run("right-after-add", "it succeeds right after ADD, and again", right_after_add),
        Case::run("no-result", "it fails without a previous result", no_result),
        Case::run("never-added", "it fails for a container that was never added", never_added),
        Case::run("after-del", "it fails after DEL", after_del),
        Case::tamper(
            "address",
            "an address that is gone is named",
            Hand::Inside("address delete {address}/24 dev eth0"),
            &["{address}"],
        ),
        Case::tamper(
            "route",
            "a route that is gone is named",
            Hand::Inside("route delete default"),
            &["0.0.0.0", "default"],
        ),
        Case::tamper(
            "route-gateway",
            "a route by another gateway is named",
            Hand::Inside("route replace default via {address}"),
            &["0.0.0.0", "default"],
        ),
        Case::tamper(
            "mac",
            "another MAC is named",
            Hand::Inside("link set eth0 address 02:00:00:00:99:01"),
            &["mac"],
        ),
        Case::tamper(
            "mtu",
            "an MTU above the result's is named",
            Hand::Inside("link set eth0 mtu 9000"),
            &["mtu"],
        ),
        Case::tamper(
            "down",
            "an interface that is down is named",
            Hand::Inside("link set eth0 down"),
            &["eth0"],
        ),
        Case::tamper(
            "gone",
            "an interface that is gone is named",
            Hand::Inside("link delete eth0"),
            &["eth0"],
        ),
        Case::tamper(
            "master",
            "an end on the node that is not in the bridge is named",
            Hand::OnNode("link set {veth} nomaster"),
            &["{veth}", "cni0"],
        ),
        Case::tamper(
            "host-down",
            "an end on the node that is down is named",
            Hand::OnNode("link set {veth} down"),
            &["{veth}"],
        ),
        Case::tamper(
            "host-mtu",
            "an MTU of the end on the node above the result's is named",
            Hand::OnNode("link set {veth} mtu 9000"),
            &["mtu"],
        ),
        Case::tamper(
            "hairpin",
            "hairpin mode that was switched off is named",
            Hand::Bridge("link set dev {veth} hairpin off"),
            &["hairpin"],
        ),
        Case::tamper(
            "isolation",
            "a port that was isolated is named",
            Hand::Bridge("link set dev {veth} isolated on"),
            &["isolat"],
        ),
        Case::tamper(
            "bridge-down",
            "a bridge that is down is named",
            Hand::OnNode("link set cni0 down"),
            &["cni0"],
        ),
        Case::tamper(
            "bridge-address",
            "a gateway address that is gone from the bridge is named",
            Hand::OnNode("address flush dev cni0"),
            &["{gateway}"],
        ),
        Case::tamper(
            "sysctl",
            "forwarding that was switched off is named",
            Hand::Sysctl("ipv4/ip_forward", "0"),
            &["forward"],
        ),
        Case::tamper(
            "more-addresses",
            "an address more is no fault",
            Hand::Inside("address add 192.0.2.9/32 dev eth0"),
            &[],
        ),
        Case::tamper(
            "more-routes",
            "a route more is no fault",
            Hand::Inside("route add 192.0.2.0/24 via {gateway}"),
            &[],
        ),
        Case::tamper(
            "lower-mtu",
            "a lower MTU is no fault, tuning says nothing of it in the result",
            Hand::Inside("link set eth0 mtu 1280"),
            &[],
        ),
        Case::run(
            "more-interfaces",
            "interfaces that another plugin has added to the result are no fault",
            more_interfaces,
        ),
    ],
};

fn right_after_add(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    container.must_check(&result)?;
    container.must_check(&result)?;
    container.del(Some(&result))
}

fn no_result(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    refused(&container.call("CHECK", None)?, "CHECK without a previous result")?;
    container.del(Some(&result))
}

fn never_added(stand: &Stand) -> Checked {
    let (container, other) = (stand.container()?, stand.container()?);
    let result = container.add()?;
    refused(&other.call("CHECK", Some(&result))?, "CHECK of another container")?;
    container.del(Some(&result))
}

fn after_del(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    container.del(Some(&result))?;
    refused(&container.check(&result)?, "CHECK after DEL").map(drop)
}

fn more_interfaces(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    let mut more = result.clone();
    let list = more["interfaces"].as_array_mut();
    expect(list.is_some(), "interfaces is no list", &result)?;
    if let Some(list) = list {
        list.push(json!({ "name": "bwp0123456789", "mac": "02:00:00:00:00:77" }));
        list.push(json!({ "name": "net1", "mac": "02:00:00:00:00:78", "sandbox": "/nowhere" }));
    }
    container.must_check(&more)?;
    container.del(Some(&more))
}
