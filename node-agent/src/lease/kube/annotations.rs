//! A lease as annotations of a Node, byte for byte flannel's (pkg/subnet/kube/annotations.go, kube.go): a running
//! flanneld reads its peers, and at its start its own VTEP's MAC, out of what weft writes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use regex::bytes::Regex;
use serde_json::Value;
use weft_shared::Subnet;
use weft_shared::lease::LeaseAttrs;

use super::super::selection::brief;
use super::super::table::expected_of_public_ip;

pub(super) type Annotations = BTreeMap<String, String>;

/// What this node has written to its Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Published {
    pub attrs: LeaseAttrs,
    /// The annotation as it was written last: an operator's overwrite differs from the address.
    pub public_ip: Option<String>,
}

/// How the own Node's annotations stand to what was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    AsPublished,
    /// Nothing was touched, and yet `public-ip` is to be another: an operator has changed `public-ip-overwrite`.
    Overwritten,
    Altered,
}

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

    fn wrong(&self, name: &str, value: &str, expected: &str) -> String {
        format!("annotation {} = {:?}: expected {expected}", self.name(name), brief(value))
    }

    /// The value of a peer's lease; an error says which annotation is wrong, and what was expected. `network`: the range
    /// that is leased out, if it is known.
    pub(super) fn attrs(
        &self,
        annotations: &Annotations,
        subnet: Subnet,
        network: Option<Subnet>,
    ) -> Result<LeaseAttrs, String> {
        let wrong = |name: &str, value: &str, expected: &str| self.wrong(name, value, expected);
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
        match network.and_then(|network| expected_of_public_ip(attrs.public_ip, network)) {
            Some(expected) => Err(wrong("public-ip", public_ip, &expected)),
            None => Ok(attrs),
        }
    }

    /// What the own Node's annotations are to say. An operator's `public-ip-overwrite` decides what peers are told, if it
    /// is anything that they can be told.
    pub(super) fn wanted(&self, attrs: &LeaseAttrs, present: &Annotations) -> Result<Annotations, String> {
        let public_ip = self.address(present, "public-ip-overwrite")?.unwrap_or(attrs.public_ip);
        let data = attrs.backend_data.as_ref().map_or_else(|| "null".to_owned(), Value::to_string);
        let wanted = [
            ("backend-type", attrs.backend_type.clone()),
            ("backend-data", data),
            ("public-ip", public_ip.to_string()),
            ("kube-subnet-manager", "true".to_owned()),
        ];
        Ok(wanted.into_iter().map(|(name, value)| (self.name(name), value)).collect())
    }

    /// Whether the own Node says what was published, and if not, whose doing that is.
    pub(super) fn standing(&self, published: &Published, present: &Annotations) -> Standing {
        let Ok(wanted) = self.wanted(&published.attrs, present) else { return Standing::Overwritten };
        let mut differing = wanted.iter().filter(|(name, value)| present.get(*name) != Some(value));
        let public_ip = self.name("public-ip");
        match (differing.next(), differing.next()) {
            (None, _) => Standing::AsPublished,
            (Some((name, _)), None)
                if *name == public_ip
                    && published.public_ip.is_some()
                    && present.get(&public_ip) == published.public_ip.as_ref() =>
            {
                Standing::Overwritten
            }
            _ => Standing::Altered,
        }
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
        self.address(annotations, "node-public-ip")
    }

    fn address(&self, annotations: &Annotations, name: &str) -> Result<Option<Ipv4Addr>, String> {
        let Some(text) = self.get(annotations, name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.wrong(name, text, "an IPv4 address"))
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
        let wanted = prefix.wanted(&attrs, &Annotations::new()).expect("no overwrite");
        let expected = annotations(&[
            ("org.com/x-backend-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
            ("org.com/x-backend-type", "vxlan"),
            ("org.com/x-kube-subnet-manager", "true"),
            ("org.com/x-public-ip", "192.0.2.1"),
        ]);
        assert_eq!(wanted, expected);
        assert!(prefix.is_managed(&wanted));
        assert_eq!(prefix.attrs(&wanted, subnet(), None), Ok(attrs.clone()), "read back");
        assert_eq!(prefix.written().collect::<Vec<_>>().len(), wanted.len());
        assert!(prefix.written().all(|name| wanted.contains_key(&name)));

        // udp: an empty type, and data that is the word null.
        let udp: LeaseAttrs = serde_json::from_str(r#"{"PublicIP":"192.0.2.1"}"#).expect("attrs");
        let wanted = prefix.wanted(&udp, &Annotations::new()).expect("no overwrite");
        assert_eq!(wanted["org.com/x-backend-data"], "null");
        assert_eq!(wanted["org.com/x-backend-type"], "");
        assert_eq!(prefix.attrs(&wanted, subnet(), None), Ok(udp));
    }

    #[test]
    fn an_operators_address_is_what_peers_are_told() {
        let prefix = Prefix::parse("flannel.alpha.coreos.com").expect("prefix");
        let attrs: LeaseAttrs = serde_json::from_str(r#"{"PublicIP":"192.0.2.1"}"#).expect("attrs");
        for (overwrite, told) in [("", "192.0.2.1"), ("203.0.113.7", "203.0.113.7")] {
            let present = annotations(&[("flannel.alpha.coreos.com/public-ip-overwrite", overwrite)]);
            let wanted = prefix.wanted(&attrs, &present).expect("an address");
            assert_eq!(wanted["flannel.alpha.coreos.com/public-ip"], told);
            let mut all = present;
            all.extend(wanted);
            assert!(prefix.says_public_ip(&all, attrs.public_ip));
            assert_eq!(prefix.says_public_ip(&all, "192.0.2.9".parse().expect("ip")), !overwrite.is_empty());
        }
        for garbage in ["10.0.0.1:8472", "garbage;x", "fd00::1", " 10.0.0.1"] {
            let present = annotations(&[("flannel.alpha.coreos.com/public-ip-overwrite", garbage)]);
            let error = prefix.wanted(&attrs, &present).expect_err(garbage);
            let expected = format!(
                "annotation flannel.alpha.coreos.com/public-ip-overwrite = {garbage:?}: expected an IPv4 address"
            );
            assert_eq!(error, expected);
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
    fn an_operators_hand_is_told_from_anothers() {
        let prefix = Prefix::parse("org.com").expect("prefix");
        let attrs: LeaseAttrs = serde_json::from_str(r#"{"PublicIP":"192.0.2.1"}"#).expect("attrs");
        // What was written last, what stands there, what an operator wishes.
        for (written, present, overwrite, standing) in [
            ("192.0.2.1", "192.0.2.1", "", Standing::AsPublished),
            ("192.0.2.1", "192.0.2.1", "203.0.113.7", Standing::Overwritten),
            ("203.0.113.7", "203.0.113.7", "203.0.113.7", Standing::AsPublished),
            ("203.0.113.7", "203.0.113.7", "203.0.113.8", Standing::Overwritten),
            ("203.0.113.7", "203.0.113.7", "", Standing::Overwritten),
            ("203.0.113.7", "203.0.113.7", "nonsense", Standing::Overwritten),
            ("192.0.2.1", "192.0.2.99", "", Standing::Altered),
            ("203.0.113.7", "192.0.2.1", "203.0.113.7", Standing::Altered),
        ] {
            let mut all = prefix.wanted(&attrs, &Annotations::new()).expect("no overwrite");
            all.insert("org.com/public-ip".into(), present.into());
            all.insert("org.com/public-ip-overwrite".into(), overwrite.into());
            let published = Published { attrs: attrs.clone(), public_ip: Some(written.into()) };
            let case = format!("{written} {present} {overwrite}");
            assert_eq!(prefix.standing(&published, &all), standing, "{case}");
            // Beside anything else it is another hand's.
            if overwrite != "nonsense" {
                all.insert("org.com/backend-type".into(), "udp".into());
                assert_eq!(prefix.standing(&published, &all), Standing::Altered, "{case}");
            }
            let unwritten = Published { public_ip: None, ..published };
            all.remove("org.com/public-ip");
            all.remove("org.com/public-ip-overwrite");
            assert_eq!(prefix.standing(&unwritten, &all), Standing::Altered, "nothing was written: {case}");
        }
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
            prefix.attrs(&all, subnet(), "10.244.0.0/16".parse().ok()).expect_err("garbage")
        };
        for (error, expected) in [
            (
                read("not an address", "vxlan", "null"),
                r#"org.com/public-ip = "not an address": expected an IPv4"#,
            ),
            (read("", "host-gw", "null"), r#"org.com/public-ip = "": expected"#),
            (
                read("10.244.9.9", "host-gw", "null"),
                r#"org.com/public-ip = "10.244.9.9": expected an address of the underlay, not one inside Network 10.244.0.0/16"#,
            ),
            (
                read("127.0.0.1", "host-gw", "null"),
                r#"org.com/public-ip = "127.0.0.1": expected a unicast address, not a loopback one"#,
            ),
            (read("192.0.2.1", "host-gw", "{"), r#"org.com/backend-data = "{": expected JSON"#),
            (read("192.0.2.1", "vxlan", "null"), r#"org.com/backend-data = "null": expected {"VNI""#),
            (read("192.0.2.1", "vxlan", r#"{"VNI":1}"#), "VtepMAC"),
        ] {
            assert!(error.contains(expected), "{error}");
        }
    }
}
