//! A lease as annotations of a Node, byte for byte flannel's (pkg/subnet/kube/annotations.go, kube.go): a running
//! flanneld reads its peers, and at its start its own VTEP's MAC, out of what weft writes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use regex::bytes::Regex;
use serde_json::Value;
use weft_shared::Subnet;
use weft_shared::lease::LeaseAttrs;

use super::super::selection::brief;

pub(super) type Annotations = BTreeMap<String, String>;

/// What our annotations' names begin with, ready for a name to follow: it ends in `/` or `-`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// What [`Prefix::parse`] takes.
    pub const EXPECTED: &str = "a prefix in the format fqdn/[0-9a-z-_]*, with at most a single slash, such as \
                                flannel.alpha.coreos.com or example.com/flannel";

    /// As flannel's `newAnnotations` normalises it.
    pub fn parse(text: &str) -> Option<Self> {
        if text.matches('/').count() > 1 {
            return None;
        }
        let mut prefix = text.to_owned();
        if !prefix.contains('/') {
            prefix.push('/');
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        // flannel's expression is not anchored at its beginning; what it would let pass there is no annotation's name.
        let format = Regex::new(r"^(?-u)(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?$").ok()?;
        format.is_match(prefix.as_bytes()).then_some(Self(prefix))
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }

    fn get<'a>(&self, annotations: &'a Annotations, name: &str) -> Option<&'a str> {
        annotations.get(&self.name(name)).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Whether an agent looks after this Node: whatever it has else, another one is no peer.
    pub(super) fn is_managed(&self, annotations: &Annotations) -> bool {
        self.get(annotations, "kube-subnet-manager") == Some("true")
    }

    /// The value of a peer's lease; an error says which annotation is wrong, and what was expected.
    pub(super) fn attrs(&self, annotations: &Annotations, subnet: Subnet) -> Result<LeaseAttrs, String> {
        let wrong = |name: &str, value: &str, expected: &str| {
            format!("annotation {} = {:?}: expected {expected}", self.name(name), brief(value))
        };
        let public_ip = self.get(annotations, "public-ip").unwrap_or_default();
        let data = self.get(annotations, "backend-data").unwrap_or("null");
        let json: Value =
            serde_json::from_str(data).map_err(|_| wrong("backend-data", data, "JSON, or null"))?;
        let attrs = LeaseAttrs {
            public_ip: public_ip.parse().map_err(|_| wrong("public-ip", public_ip, "an IPv4 address"))?,
            public_ipv6: None,
            backend_type: self.get(annotations, "backend-type").unwrap_or_default().to_owned(),
            backend_data: Some(json).filter(|json| !json.is_null()),
            backend_v6_data: None,
        };
        if attrs.backend_type == "vxlan" && attrs.vxlan_data(subnet).is_none() {
            let expected = r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"} or the like"#;
            return Err(wrong("backend-data", data, expected));
        }
        Ok(attrs)
    }

    /// What the own Node's annotations are to say. An operator's `public-ip-overwrite` decides what peers are told.
    pub(super) fn wanted(&self, attrs: &LeaseAttrs, present: &Annotations) -> Annotations {
        let public_ip = self.get(present, "public-ip-overwrite").map(str::to_owned);
        let data = attrs.backend_data.as_ref().map_or_else(|| "null".to_owned(), Value::to_string);
        [
            ("backend-type", attrs.backend_type.clone()),
            ("backend-data", data),
            ("public-ip", public_ip.unwrap_or_else(|| attrs.public_ip.to_string())),
            ("kube-subnet-manager", "true".to_owned()),
        ]
        .into_iter()
        .map(|(name, value)| (self.name(name), value))
        .collect()
    }

    /// What peers are told is the address of the node that publishes `public_ip`.
    pub(super) fn says_public_ip(&self, annotations: &Annotations, public_ip: Ipv4Addr) -> bool {
        let said = self.get(annotations, "public-ip");
        said == Some(public_ip.to_string().as_str())
            || said.is_some() && said == self.get(annotations, "public-ip-overwrite")
    }

    pub(super) fn public_ip<'a>(&self, annotations: &'a Annotations) -> Option<&'a str> {
        self.get(annotations, "public-ip")
    }

    /// Acts as `--public-ip`, and wins over it.
    pub(super) fn node_public_ip(&self, annotations: &Annotations) -> Result<Option<Ipv4Addr>, String> {
        let Some(text) = self.get(annotations, "node-public-ip") else { return Ok(None) };
        text.parse().map(Some).map_err(|_| {
            format!("annotation {} = {text:?}: expected an IPv4 address", self.name("node-public-ip"))
        })
    }

    /// Every annotation that an agent writes.
    pub(super) fn written(&self) -> impl Iterator<Item = String> + '_ {
        ["backend-type", "backend-data", "public-ip", "kube-subnet-manager"].map(|n| self.name(n)).into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet() -> Subnet {
        "10.244.1.0/24".parse().expect("subnet")
    }

    fn annotations(of: &[(&str, &str)]) -> Annotations {
        of.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn prefixes_are_normalised_as_flannel_does() {
        for (text, normal) in [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
            ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/"),
            ("org.com/prefix", "org.com/prefix-"),
            ("org.com/prefix-", "org.com/prefix-"),
            ("org.com/pre_fix-2", "org.com/pre_fix-2-"),
        ] {
            assert_eq!(Prefix::parse(text), Some(Prefix(normal.to_owned())), "{text}");
        }
        for bad in ["", "org", "org/x", "org.com/a/b", "Org.com", "org.com/Prefix", "org..com", "a b.org.com"]
        {
            assert_eq!(Prefix::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn values_are_flannels_bytes() {
        let prefix = Prefix::parse("org.com/x").expect("prefix");
        let attrs: LeaseAttrs = serde_json::from_str(
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}}"#,
        )
        .expect("attrs");
        let wanted = prefix.wanted(&attrs, &Annotations::new());
        let expected = annotations(&[
            ("org.com/x-backend-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
            ("org.com/x-backend-type", "vxlan"),
            ("org.com/x-kube-subnet-manager", "true"),
            ("org.com/x-public-ip", "192.0.2.1"),
        ]);
        assert_eq!(wanted, expected);
        assert!(prefix.is_managed(&wanted));
        assert_eq!(prefix.attrs(&wanted, subnet()), Ok(attrs.clone()), "read back");
        assert_eq!(prefix.written().collect::<Vec<_>>().len(), wanted.len());
        assert!(prefix.written().all(|name| wanted.contains_key(&name)));

        // udp: an empty type, and data that is the word null.
        let udp: LeaseAttrs = serde_json::from_str(r#"{"PublicIP":"192.0.2.1"}"#).expect("attrs");
        let wanted = prefix.wanted(&udp, &Annotations::new());
        assert_eq!(wanted["org.com/x-backend-data"], "null");
        assert_eq!(wanted["org.com/x-backend-type"], "");
        assert_eq!(prefix.attrs(&wanted, subnet()), Ok(udp));
    }

    #[test]
    fn an_operators_address_is_what_peers_are_told() {
        let prefix = Prefix::parse("flannel.alpha.coreos.com").expect("prefix");
        let attrs: LeaseAttrs = serde_json::from_str(r#"{"PublicIP":"192.0.2.1"}"#).expect("attrs");
        for (overwrite, told) in [("", "192.0.2.1"), ("203.0.113.7", "203.0.113.7")] {
            let present = annotations(&[("flannel.alpha.coreos.com/public-ip-overwrite", overwrite)]);
            let wanted = prefix.wanted(&attrs, &present);
            assert_eq!(wanted["flannel.alpha.coreos.com/public-ip"], told);
            let mut all = present;
            all.extend(wanted);
            assert!(prefix.says_public_ip(&all, attrs.public_ip));
            assert_eq!(prefix.says_public_ip(&all, "192.0.2.9".parse().expect("ip")), !overwrite.is_empty());
        }
        let node_ip = |value: &str| {
            prefix.node_public_ip(&annotations(&[("flannel.alpha.coreos.com/node-public-ip", value)]))
        };
        assert_eq!(node_ip(""), Ok(None));
        assert_eq!(node_ip("203.0.113.7"), Ok("203.0.113.7".parse().ok()));
        let error = node_ip("fd00::1").expect_err("IPv6");
        assert_eq!(
            error,
            "annotation flannel.alpha.coreos.com/node-public-ip = \"fd00::1\": expected an IPv4 address"
        );
    }

    #[test]
    fn garbage_is_named_by_annotation_and_value() {
        let prefix = Prefix::parse("org.com").expect("prefix");
        let read = |ip: &str, kind: &str, data: &str| {
            let all = annotations(&[
                ("org.com/public-ip", ip),
                ("org.com/backend-type", kind),
                ("org.com/backend-data", data),
            ]);
            prefix.attrs(&all, subnet()).expect_err("garbage")
        };
        for (error, expected) in [
            (
                read("not an address", "vxlan", "null"),
                r#"org.com/public-ip = "not an address": expected an IPv4"#,
            ),
            (read("", "host-gw", "null"), r#"org.com/public-ip = "": expected"#),
            (read("192.0.2.1", "host-gw", "{"), r#"org.com/backend-data = "{": expected JSON"#),
            (read("192.0.2.1", "vxlan", "null"), r#"org.com/backend-data = "null": expected {"VNI""#),
            (read("192.0.2.1", "vxlan", r#"{"VNI":1}"#), "VtepMAC"),
        ] {
            assert!(error.contains(expected), "{error}");
        }
    }
}
