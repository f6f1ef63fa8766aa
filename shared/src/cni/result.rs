//! The result of ADD, printed in the shape of the version that was asked for, and read back as `prevResult` from any.
//!
//! 0.1.0 and 0.2.0 know one address per family and no interfaces; 0.3.0 to 0.4.0 mark each address with its family;
//! 1.0.0 does not; 1.1.0 adds MTU and the routes' attributes.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Code, Failure, SpecVersion};

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CniResult {
    pub interfaces: Vec<Interface>,
    pub ips: Vec<IpConfig>,
    pub routes: Vec<Route>,
    pub dns: Dns,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    /// As written: other plugins' interfaces may have addresses of another length.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The namespace's path as the runtime gave it; empty on the host. Always written: some readers insist on it.
    #[serde(default)]
    pub sandbox: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct IpConfig {
    /// Index into `interfaces`.
    #[serde(default)]
    pub interface: Option<usize>,
    pub address: IpNetwork,
    #[serde(default)]
    pub gateway: Option<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub dst: IpNetwork,
    /// Without one the gateway of the family's address holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    #[serde(flatten)]
    pub form: RouteForm,
}

/// What a route may be besides; told from 1.1.0 on. A `table` or `scope` of 0 is one, an absent one is the kernel's
/// default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteForm {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// What a resolv.conf(5) says. Of `domain` and `search` the file's last word counts, of servers and options each.
    pub fn from_resolv_conf(text: &str) -> Self {
        let mut dns = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => dns.nameservers.extend(words.next()),
                Some("domain") => dns.domain = words.next().unwrap_or_default(),
                Some("search") => dns.search = words.collect(),
                Some("options") => dns.options.extend(words),
                _ => {}
            }
        }
        dns
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn from_value(value: &Value) -> Result<Self, serde_json::Error> {
        Self::deserialize(value)
    }
}

impl CniResult {
    /// The JSON text in `version`'s shape.
    pub fn render(&self, version: SpecVersion) -> Result<String, Failure> {
        let text = if version < SpecVersion::V0_3_0 {
            serde_json::to_string(&legacy::Shape::of(self, version)?)
        } else {
            serde_json::to_string(&Shape::of(self, version))
        };
        text.map_err(|e| Failure::new(Code::Io, format!("cannot encode the result: {e}")))
    }

    /// Reads a `prevResult`, whose own `cniVersion` decides; without one the configuration's does.
    pub fn parse(value: &Value, configured: SpecVersion) -> Result<Self, Failure> {
        let bad =
            |e: &dyn std::fmt::Display| Failure::new(Code::Decode, format!("prevResult cannot be read: {e}"));
        let version = match value.get("cniVersion").and_then(Value::as_str) {
            None | Some("") => configured,
            Some(text) => text.parse().map_err(|e: super::version::UnknownVersion| bad(&e))?,
        };
        let result = if version < SpecVersion::V0_3_0 {
            legacy::Shape::deserialize(value).map(legacy::Shape::into_result)
        } else {
            Received::deserialize(value).map(Received::into_result)
        }
        .map_err(|e| bad(&e))?;
        match result.ips.iter().filter_map(|ip| ip.interface).find(|i| *i >= result.interfaces.len()) {
            Some(index) => Err(bad(&format!(
                "ips[].interface = {index}: expected less than the {} interfaces",
                result.interfaces.len()
            ))),
            None => Ok(result),
        }
    }
}

/// From 0.3.0 on.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shape<'a> {
    cni_version: SpecVersion,
    interfaces: Vec<Interface>,
    ips: Vec<PrintedIp>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    routes: Vec<Route>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns: Option<&'a Dns>,
}

#[derive(Serialize)]
struct PrintedIp {
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<usize>,
    address: IpNetwork,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
}

impl<'a> Shape<'a> {
    fn of(result: &'a CniResult, version: SpecVersion) -> Self {
        let interface =
            |i: &Interface| Interface { mtu: i.mtu.filter(|_| version >= SpecVersion::V1_1_0), ..i.clone() };
        let ip = |ip: &IpConfig| PrintedIp {
            version: (version < SpecVersion::V1_0_0).then_some(if ip.address.is_ipv4() { "4" } else { "6" }),
            interface: ip.interface,
            address: ip.address,
            gateway: ip.gateway,
        };
        Self {
            cni_version: version,
            interfaces: result.interfaces.iter().map(interface).collect(),
            ips: result.ips.iter().map(ip).collect(),
            routes: routes(&result.routes, version),
            // Older readers expect the object even when it is empty.
            dns: Some(&result.dns).filter(|dns| version < SpecVersion::V1_0_0 || !dns.is_empty()),
        }
    }
}

fn routes(routes: &[Route], version: SpecVersion) -> Vec<Route> {
    let form = |form: RouteForm| if version >= SpecVersion::V1_1_0 { form } else { RouteForm::default() };
    routes.iter().map(|route| Route { form: form(route.form), ..route.clone() }).collect()
}

/// A `prevResult` from 0.3.0 on: Go writes an absent list as `null`.
#[derive(Deserialize)]
struct Received {
    interfaces: Option<Vec<Interface>>,
    ips: Option<Vec<IpConfig>>,
    routes: Option<Vec<Route>>,
    dns: Option<Dns>,
}

impl Received {
    fn into_result(self) -> CniResult {
        CniResult {
            interfaces: self.interfaces.unwrap_or_default(),
            ips: self.ips.unwrap_or_default(),
            routes: self.routes.unwrap_or_default(),
            dns: self.dns.unwrap_or_default(),
        }
    }
}

/// 0.1.0 and 0.2.0.
mod legacy {
    use super::*;

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(super) struct Shape {
        #[serde(skip_deserializing)]
        cni_version: Option<SpecVersion>,
        #[serde(skip_serializing_if = "Option::is_none")]
        ip4: Option<Family>,
        #[serde(skip_serializing_if = "Option::is_none")]
        ip6: Option<Family>,
        dns: Option<Dns>,
    }

    #[derive(Serialize, Deserialize)]
    struct Family {
        ip: IpNetwork,
        #[serde(skip_serializing_if = "Option::is_none")]
        gateway: Option<IpAddr>,
        #[serde(skip_serializing_if = "Option::is_none")]
        routes: Option<Vec<Route>>,
    }

    impl Shape {
        pub(super) fn of(result: &CniResult, version: SpecVersion) -> Result<Self, Failure> {
            let family = |v4: bool| {
                let ip = result.ips.iter().find(|ip| ip.address.is_ipv4() == v4)?;
                let mut routes = super::routes(&result.routes, version);
                routes.retain(|route| route.dst.is_ipv4() == v4);
                Some(Family {
                    ip: ip.address,
                    gateway: ip.gateway,
                    routes: Some(routes).filter(|r| !r.is_empty()),
                })
            };
            let (ip4, ip6) = (family(true), family(false));
            if ip4.is_none() && ip6.is_none() {
                let msg = format!("a result without an address has no form in spec version {version}");
                return Err(Failure::new(Code::IncompatibleVersion, msg));
            }
            Ok(Self { cni_version: Some(version), ip4, ip6, dns: Some(result.dns.clone()) })
        }

        pub(super) fn into_result(self) -> CniResult {
            let mut result = CniResult { dns: self.dns.unwrap_or_default(), ..CniResult::default() };
            for family in [self.ip4, self.ip6].into_iter().flatten() {
                result.ips.push(IpConfig { interface: None, address: family.ip, gateway: family.gateway });
                result.routes.extend(family.routes.unwrap_or_default());
            }
            result
        }
    }
}

#[cfg(test)]
mod tests;
