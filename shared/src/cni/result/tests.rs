use serde_json::json;

use super::*;

fn full() -> CniResult {
    let interface = |name: &str, mac: &str, sandbox: &str| Interface {
        name: name.into(),
        mac: mac.into(),
        mtu: Some(1450),
        sandbox: sandbox.into(),
    };
    let ip = |address: &str, gateway: &str| IpConfig {
        interface: Some(2),
        address: address.parse().expect("address"),
        gateway: Some(gateway.parse().expect("gateway")),
    };
    let route = |dst: &str, gw: &str| Route {
        dst: dst.parse().expect("dst"),
        gw: Some(gw.parse().expect("gw")),
        form: RouteForm::default(),
    };
    CniResult {
        interfaces: vec![
            interface("cni0", "02:00:00:00:00:01", ""),
            interface("vethabc", "02:00:00:00:00:02", ""),
            interface("eth0", "02:00:00:00:00:03", "/run/netns/x"),
        ],
        ips: vec![ip("10.1.0.5/24", "10.1.0.1"), ip("fd00::5/64", "fd00::1")],
        routes: vec![
            route("0.0.0.0/0", "10.1.0.1"),
            route("10.1.0.0/16", "10.1.0.1"),
            route("::/0", "fd00::1"),
        ],
        dns: Dns { nameservers: vec!["10.0.0.10".into()], ..Dns::default() },
    }
}

fn rendered(result: &CniResult, version: SpecVersion) -> Value {
    serde_json::from_str(&result.render(version).expect("render")).expect("JSON")
}

#[test]
fn every_version_has_its_own_shape() {
    let routes4 = json!([{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}, {"dst": "10.1.0.0/16", "gw": "10.1.0.1"}]);
    let legacy = json!({
        "ip4": {"ip": "10.1.0.5/24", "gateway": "10.1.0.1", "routes": routes4},
        "ip6": {"ip": "fd00::5/64", "gateway": "fd00::1", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
        "dns": {"nameservers": ["10.0.0.10"]},
    });
    let current = json!({
        "interfaces": [
            {"name": "cni0", "mac": "02:00:00:00:00:01", "mtu": 1450, "sandbox": ""},
            {"name": "vethabc", "mac": "02:00:00:00:00:02", "mtu": 1450, "sandbox": ""},
            {"name": "eth0", "mac": "02:00:00:00:00:03", "mtu": 1450, "sandbox": "/run/netns/x"},
        ],
        "ips": [
            {"interface": 2, "address": "10.1.0.5/24", "gateway": "10.1.0.1"},
            {"interface": 2, "address": "fd00::5/64", "gateway": "fd00::1"},
        ],
        "routes": [
            {"dst": "0.0.0.0/0", "gw": "10.1.0.1"},
            {"dst": "10.1.0.0/16", "gw": "10.1.0.1"},
            {"dst": "::/0", "gw": "fd00::1"},
        ],
        "dns": {"nameservers": ["10.0.0.10"]},
    });
    for version in SpecVersion::ALL {
        let mut expected = if version < SpecVersion::V0_3_0 { legacy.clone() } else { current.clone() };
        expected["cniVersion"] = json!(version.as_str());
        if version >= SpecVersion::V0_3_0 && version < SpecVersion::V1_0_0 {
            expected["ips"][0]["version"] = json!("4");
            expected["ips"][1]["version"] = json!("6");
        }
        if version >= SpecVersion::V0_3_0 && version < SpecVersion::V1_1_0 {
            for interface in expected["interfaces"].as_array_mut().expect("list") {
                interface.as_object_mut().expect("object").remove("mtu");
            }
        }
        assert_eq!(rendered(&full(), version), expected, "{version}");
    }
}

#[test]
fn an_empty_dns_is_printed_for_old_readers_only() {
    let result = CniResult { dns: Dns::default(), ..full() };
    for version in SpecVersion::ALL {
        let expected = (version < SpecVersion::V1_0_0).then(|| json!({}));
        assert_eq!(rendered(&result, version).get("dns"), expected.as_ref(), "{version}");
    }
}

#[test]
fn only_the_first_address_of_a_family_fits_the_oldest_shape() {
    let mut result = full();
    result
        .ips
        .insert(1, IpConfig { address: "10.1.0.6/24".parse().expect("address"), ..result.ips[0].clone() });
    assert_eq!(rendered(&result, SpecVersion::V0_2_0)["ip4"]["ip"], "10.1.0.5/24");
    let none = CniResult::default();
    let failure = none.render(SpecVersion::V0_1_0).expect_err("no address");
    assert!(failure.is(Code::IncompatibleVersion));
    assert!(none.render(SpecVersion::V1_0_0).is_ok());
}

#[test]
fn a_result_of_any_version_is_read_back() {
    for version in SpecVersion::ALL {
        let mut value = rendered(&full(), version);
        let read = CniResult::parse(&value, SpecVersion::NEWEST).expect("own text");
        let mut expected = full();
        if version < SpecVersion::V0_3_0 {
            expected.interfaces.clear();
            expected.ips.iter_mut().for_each(|ip| ip.interface = None);
        } else if version < SpecVersion::V1_1_0 {
            expected.interfaces.iter_mut().for_each(|i| i.mtu = None);
        }
        assert_eq!(read, expected, "{version}");
        value.as_object_mut().expect("object").remove("cniVersion");
        assert_eq!(CniResult::parse(&value, version).expect("version of the configuration"), expected);
    }
}

#[test]
fn go_nulls_and_foreign_fields_are_tolerated_and_nonsense_is_not() {
    let sparse = json!({"cniVersion": "1.1.0", "interfaces": null, "ips": null, "dns": {}, "routes":
        [{"dst": "0.0.0.0/0", "gw": "10.0.0.1", "mtu": 1400, "table": 0, "scope": 0}]});
    let read = CniResult::parse(&sparse, SpecVersion::V0_1_0).expect("sparse");
    assert_eq!((read.interfaces.len(), read.ips.len(), read.routes.len()), (0, 0, 1));
    for bad in [
        json!("x"),
        json!([]),
        json!({"cniVersion": "7"}),
        json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/24", "interface": 0}]}),
        json!({"cniVersion": "1.0.0", "ips": [{"address": "x"}]}),
        json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/24", "interface": -1}]}),
        json!({"cniVersion": "0.2.0", "ip4": {"ip": "x"}}),
    ] {
        let failure = CniResult::parse(&bad, SpecVersion::V1_0_0).expect_err("nonsense");
        assert!(failure.is(Code::Decode) && failure.msg.starts_with("prevResult"), "{bad}: {failure}");
    }
}

#[test]
fn a_routes_form_is_told_from_1_1_0_on() {
    let form = RouteForm { priority: Some(77), table: Some(0), ..RouteForm::default() };
    let route = Route { dst: "192.0.2.0/24".parse().expect("dst"), gw: None, form };
    let result = CniResult { routes: vec![route], ..CniResult::default() };
    let printed = |version: SpecVersion| result.render(version).expect("render");
    assert!(
        printed(SpecVersion::V1_1_0).contains(r#""routes":[{"dst":"192.0.2.0/24","priority":77,"table":0}]"#)
    );
    assert!(printed(SpecVersion::V1_0_0).contains(r#""routes":[{"dst":"192.0.2.0/24"}]"#));
}

#[test]
fn a_resolv_conf_is_read_line_by_line() {
    let text = "# nameserver 10.0.0.1\n; x\n\n  nameserver 10.0.0.53\nnameserver fd00::53 # two\ndomain a.test\nsearch b.test\n\
                search c.test d.test\noptions ndots:5\noptions edns0 rotate\nsortlist 10.0.0.0\nnameserver\n";
    let dns = Dns::from_resolv_conf(text);
    assert_eq!(dns.nameservers, ["10.0.0.53", "fd00::53"]);
    assert_eq!((dns.domain.as_str(), dns.search.join(" ")), ("a.test", "c.test d.test".to_owned()));
    assert_eq!(dns.options, ["ndots:5", "edns0", "rotate"]);
    assert!(Dns::from_resolv_conf("").is_empty());
}
