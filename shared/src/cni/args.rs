//! `CNI_ARGS`: `K=V;K2=V2`. Deprecated by the specification, yet every Kubernetes runtime sends it, and podman puts
//! a requested address nowhere else.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::{Code, Failure};
use crate::Mac;

const MAX_LEN: usize = 64 << 10;

/// The arguments that mean something here. Unknown ones are ignored whether or not `IgnoreUnknown` says so: runtimes
/// add keys as they please, and none that we do not read could change what an ADD does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CniArgs {
    pub ips: Vec<IpAddr>,
    pub mac: Option<Mac>,
    /// `namespace/name`, or the name alone (podman).
    pub pod: Option<String>,
}

impl CniArgs {
    pub fn parse(text: &str) -> Result<Self, Failure> {
        if text.len() > MAX_LEN {
            return Err(bad(format!("CNI_ARGS has {} bytes: expected at most {MAX_LEN}", text.len())));
        }
        let mut args = Self::default();
        let (mut namespace, mut name) = (None, None);
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .filter(|(key, value)| !key.is_empty() && !value.contains('='))
                .ok_or_else(|| bad(format!("CNI_ARGS: {pair:?}: expected KEY=VALUE")))?;
            match key {
                "IP" if !value.is_empty() => {
                    // multus joins several by commas
                    args.ips = value
                        .split(',')
                        .map(|ip| {
                            parse_ip(ip).ok_or_else(|| {
                                bad(format!(
                                    "CNI_ARGS: IP = {ip:?}: expected an address such as 10.1.2.3 or 10.1.2.3/24"
                                ))
                            })
                        })
                        .collect::<Result<_, _>>()?;
                }
                "MAC" if !value.is_empty() => {
                    args.mac = Some(parse_mac(value).map_err(|e| bad(format!("CNI_ARGS: MAC: {e}")))?);
                }
                "K8S_POD_NAMESPACE" => namespace = Some(value),
                "K8S_POD_NAME" => name = Some(value),
                _ => {}
            }
        }
        args.pod = match (namespace.filter(|v| !v.is_empty()), name.filter(|v| !v.is_empty())) {
            (Some(namespace), Some(name)) => Some(format!("{namespace}/{name}")),
            (None, Some(name)) => Some(name.to_owned()),
            _ => None,
        };
        Ok(args)
    }
}

/// An address, with or without a prefix length: the length is the subnet's business.
pub(super) fn parse_ip(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    text.parse().ok().or_else(|| text.parse::<IpNetwork>().ok().map(|net| net.ip()))
}

/// A MAC that an interface can have.
pub(super) fn parse_mac(text: &str) -> Result<Mac, String> {
    let mac: Mac = text.parse().map_err(|e: crate::BadMac| e.to_string())?;
    if mac.is_unicast() { Ok(mac) } else { Err(format!("{text:?}: expected a unicast address")) }
}

fn bad(msg: String) -> Failure {
    Failure::new(Code::BadEnvironment, msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runtimes_send() {
        assert_eq!(CniArgs::parse(""), Ok(CniArgs::default()));
        let kubelet =
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=d";
        assert_eq!(CniArgs::parse(kubelet).expect("kubelet").pod.as_deref(), Some("a/b"));
        let podman = CniArgs::parse("IgnoreUnknown=1;K8S_POD_NAME=web;MAC=02:00:00:00:00:01;IP=10.1.2.3")
            .expect("podman");
        assert_eq!(podman.pod.as_deref(), Some("web"));
        assert_eq!(podman.ips, ["10.1.2.3".parse::<IpAddr>().expect("ip")]);
        assert_eq!(podman.mac.map(|m| m.to_string()).as_deref(), Some("02:00:00:00:00:01"));
        let multus = CniArgs::parse("IP=10.1.2.3/24,fd00::3").expect("multus");
        assert_eq!(multus.ips.len(), 2);
    }

    #[test]
    fn malformed_pairs_are_named() {
        for (text, part) in [
            ("IP", "\"IP\""),
            ("A=b=c", "A=b=c"),
            ("=x", "\"=x\""),
            ("IP=10.1.2", "10.1.2"),
            ("IP=10.1.2.3,", "IP = \"\""),
            ("MAC=zz", "zz"),
            ("MAC=ff:ff:ff:ff:ff:ff", "unicast"),
        ] {
            let failure = CniArgs::parse(text).expect_err(text);
            assert!(failure.is(Code::BadEnvironment) && failure.msg.contains(part), "{text}: {failure}");
        }
        assert!(CniArgs::parse(&"a=b;".repeat(20_000)).is_err());
    }
}
