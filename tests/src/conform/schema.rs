//! The shape of a result in each version of the specification: which keys there must be, which there may be, and of what
//! kind each value is (SPEC.md of the releases 0.1.0 to 1.1.0, "Result types").
//!
//! A table instead of JSON schemas: a schema's crate would weigh more than the four shapes that there are.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;
use weft_shared::Mac;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Text,
    Ip,
    /// An address with its prefix length.
    Cidr,
    /// A prefix without host bits.
    Prefix,
    Mac,
    /// "4" or "6".
    Family,
    Number,
    /// A place in `interfaces`.
    Index,
    Texts,
    Object(&'static [Field]),
    Objects(&'static [Field]),
}

#[derive(Debug, Clone, Copy)]
struct Field {
    key: &'static str,
    kind: Kind,
    required: bool,
}

const fn must(key: &'static str, kind: Kind) -> Field {
    Field { key, kind, required: true }
}

const fn may(key: &'static str, kind: Kind) -> Field {
    Field { key, kind, required: false }
}

const DNS: Field = may(
    "dns",
    Kind::Object(&[
        may("nameservers", Kind::Texts),
        may("domain", Kind::Text),
        may("search", Kind::Texts),
        may("options", Kind::Texts),
    ]),
);

/// One address for each family, its routes beside it.
const V0_1: &[Field] = &[must("cniVersion", Kind::Text), must("ip4", FAMILY), may("ip6", FAMILY), DNS];
const FAMILY: Kind = Kind::Object(&[must("ip", Kind::Cidr), may("gateway", Kind::Ip), may("routes", ROUTES)]);
const ROUTES: Kind = Kind::Objects(&[must("dst", Kind::Prefix), may("gw", Kind::Ip)]);

const INTERFACES: Kind =
    Kind::Objects(&[must("name", Kind::Text), may("mac", Kind::Mac), may("sandbox", Kind::Text)]);

/// Interfaces; each address with its family.
const V0_3: &[Field] = &[
    must("cniVersion", Kind::Text),
    must("interfaces", INTERFACES),
    must(
        "ips",
        Kind::Objects(&[
            must("version", Kind::Family),
            must("address", Kind::Cidr),
            must("interface", Kind::Index),
            may("gateway", Kind::Ip),
        ]),
    ),
    may("routes", ROUTES),
    DNS,
];

/// Without the family.
const V1_0: &[Field] = &[
    must("cniVersion", Kind::Text),
    must("interfaces", INTERFACES),
    must("ips", IPS),
    may("routes", ROUTES),
    DNS,
];
const IPS: Kind =
    Kind::Objects(&[must("address", Kind::Cidr), must("interface", Kind::Index), may("gateway", Kind::Ip)]);

/// With what interfaces and routes may be besides.
const V1_1: &[Field] = &[
    must("cniVersion", Kind::Text),
    must(
        "interfaces",
        Kind::Objects(&[
            must("name", Kind::Text),
            may("mac", Kind::Mac),
            may("mtu", Kind::Number),
            may("sandbox", Kind::Text),
            may("socketPath", Kind::Text),
            may("pciID", Kind::Text),
        ]),
    ),
    must("ips", IPS),
    may(
        "routes",
        Kind::Objects(&[
            must("dst", Kind::Prefix),
            may("gw", Kind::Ip),
            may("mtu", Kind::Number),
            may("advmss", Kind::Number),
            may("priority", Kind::Number),
            may("table", Kind::Number),
            may("scope", Kind::Number),
        ]),
    ),
    DNS,
];

/// The first fault of a result, in words that are the same at every run.
pub fn check(result: &Value, version: &str) -> Result<(), String> {
    let fields = match version {
        "0.1.0" | "0.2.0" => V0_1,
        "0.3.0" | "0.3.1" | "0.4.0" => V0_3,
        "1.0.0" => V1_0,
        _ => V1_1,
    };
    if result["cniVersion"] != version {
        return Err(format!("the result's cniVersion is not {version}"));
    }
    object(result, fields, "", result)
}

fn object(value: &Value, fields: &[Field], at: &str, whole: &Value) -> Result<(), String> {
    let Some(map) = value.as_object() else { return Err(format!("{at} is no object")) };
    if let Some(key) = map.keys().find(|key| !fields.iter().any(|field| field.key == *key)) {
        return Err(format!("the result has {at}{key}, which this version does not"));
    }
    fields.iter().try_for_each(|field| {
        let path = format!("{at}{}", field.key);
        match map.get(field.key) {
            None | Some(Value::Null) if field.required => Err(format!("the result lacks {path}")),
            None => Ok(()),
            Some(value) => fits(value, field.kind, &path, whole),
        }
    })
}

fn fits(value: &Value, kind: Kind, path: &str, whole: &Value) -> Result<(), String> {
    let text = value.as_str();
    let (is, expected) = match kind {
        Kind::Text => (text.is_some(), "a string"),
        Kind::Ip => (text.is_some_and(|t| t.parse::<IpAddr>().is_ok()), "an address"),
        Kind::Cidr => (cidr(text).is_some(), "an address with its prefix length"),
        Kind::Prefix => (cidr(text).is_some_and(|net| net.ip() == net.network()), "a prefix"),
        Kind::Mac => (text.is_some_and(|t| t.parse::<Mac>().is_ok()), "a MAC address"),
        Kind::Family => (matches!(text, Some("4" | "6")), "\"4\" or \"6\""),
        Kind::Number => (value.is_u64(), "a number"),
        Kind::Index => {
            let count = whole["interfaces"].as_array().map_or(0, Vec::len);
            (value.as_u64().is_some_and(|index| index < count as u64), "a place in interfaces")
        }
        Kind::Texts => {
            (value.as_array().is_some_and(|l| l.iter().all(Value::is_string)), "a list of strings")
        }
        Kind::Object(fields) => return object(value, fields, &format!("{path}."), whole),
        Kind::Objects(fields) => {
            let Some(list) = value.as_array() else { return Err(format!("{path} is no list")) };
            return list.iter().try_for_each(|value| object(value, fields, &format!("{path}[]."), whole));
        }
    };
    if is { Ok(()) } else { Err(format!("the result's {path} is not {expected}")) }
}

/// Without `/`, the crate takes an address for a whole prefix.
fn cidr(text: Option<&str>) -> Option<IpNetwork> {
    text.filter(|text| text.contains('/'))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn good() -> Value {
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1450, "sandbox": "/n" }],
            "ips": [{ "interface": 0, "address": "10.1.0.5/24", "gateway": "10.1.0.1" }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.0.1" }],
        })
    }

    #[test]
    fn each_fault_is_named() {
        assert_eq!(check(&good(), "1.1.0"), Ok(()));
        let fault = |change: fn(&mut Value), version: &str| {
            let mut result = good();
            change(&mut result);
            check(&result, version).expect_err("a fault")
        };
        assert_eq!(fault(|_| (), "1.0.0"), "the result's cniVersion is not 1.0.0");
        let in_1_0 = |r: &mut Value| r["cniVersion"] = json!("1.0.0");
        assert_eq!(fault(in_1_0, "1.0.0"), "the result has interfaces[].mtu, which this version does not");
        let in_0_4 = |r: &mut Value| {
            *r = json!({ "cniVersion": "0.4.0", "interfaces": [{ "name": "a" }], "ips": [{ "address": "10.1.0.5/24" }] });
        };
        assert_eq!(fault(in_0_4, "0.4.0"), "the result lacks ips[].version");
        assert_eq!(
            fault(|r| r["ips"][0]["interface"] = json!(1), "1.1.0"),
            "the result's ips[].interface is not a place in interfaces"
        );
        assert_eq!(
            fault(|r| r["ips"][0]["address"] = json!("10.1.0.5"), "1.1.0"),
            "the result's ips[].address is not an address with its prefix length"
        );
        assert_eq!(
            fault(|r| r["routes"][0]["dst"] = json!("10.1.0.5/24"), "1.1.0"),
            "the result's routes[].dst is not a prefix"
        );
        assert_eq!(fault(|r| r["routes"] = Value::Null, "1.1.0"), "routes is no list");
        assert_eq!(fault(|r| r["ips"] = Value::Null, "1.1.0"), "the result lacks ips");
        assert_eq!(
            fault(|r| r["interfaces"][0]["mac"] = json!("x"), "1.1.0"),
            "the result's interfaces[].mac is not a MAC address"
        );
    }
}
