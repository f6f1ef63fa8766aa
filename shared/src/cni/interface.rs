//! What the configuration asks of a container's interface: the keys of the reference `bridge` plugin that flannel's
//! users set, the requested addresses, and a refusal for every key that would silently not be honoured.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::args::{parse_ip, parse_mac};
use super::{CniArgs, Code, Dns, Failure, NetConf, Route, RouteForm, SpecVersion, bandwidth, port_mappings};
use crate::json::{Case, Keys};
use crate::names::DEFAULT_BRIDGE;
use crate::protocol::{Bandwidth, BridgeOptions, PortMapping};
use crate::{BadValue, IfName, Mac, Subnet};

const MAX_REQUESTED: usize = 16;
const MAX_ROUTES: usize = 4096;
/// What of the reference's `host-local` is not about which addresses there are.
const OF_IPAM: [&str; 3] = ["type", "routes", "resolvConf"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceConf {
    pub bridge: BridgeOptions,
    pub is_default_gateway: bool,
    pub dns: Dns,
    /// Addresses that must be assigned, all of them.
    pub requested: Vec<IpAddr>,
    pub mac: Option<Mac>,
    /// Ports of the host that lead here; no two of them would have the same packet.
    pub host_ports: Vec<PortMapping>,
    pub bandwidth: Bandwidth,
    /// Routes of the pod beside its default route and those to the overlay.
    pub routes: Vec<Route>,
    /// The file that says what `dns` is, should the configuration not say so itself.
    pub resolv_conf: Option<PathBuf>,
    /// IPv6 addresses are probed for before they are used (RFC 4862, section 5.4).
    pub detects_duplicates: bool,
}

impl InterfaceConf {
    pub fn parse(conf: &NetConf, args: &CniArgs) -> Result<Self, Failure> {
        let keys = conf.keys();
        refuse_unsupported(&keys)?;
        let runtime = keys.object("runtimeConfig", "an object")?;
        let own_args = keys.object("args", "an object")?.object("cni", "an object")?;
        let requested = requested_ips(&[&runtime, &own_args], &args.ips)?;
        one_per_family_before_0_3(conf, &requested)?;
        Ok(Self {
            bridge: BridgeOptions {
                name: bridge_name(&keys)?,
                hairpin: keys.bool("hairpinMode", true)?,
                isolated: keys.bool("portIsolation", false)?,
                mtu: mtu(&keys)?,
                force_address: keys.bool("forceAddress", false)?,
                masquerade: keys.bool("ipMasq", false)?,
            },
            is_default_gateway: keys.bool("isDefaultGateway", true)?,
            dns: dns(&keys)?,
            requested,
            mac: match (requested_mac(&runtime)?, requested_mac(&own_args)?) {
                (Some(mac), _) | (None, Some(mac)) => Some(mac),
                (None, None) => args.mac,
            },
            host_ports: port_mappings::parse(&runtime)?,
            bandwidth: bandwidth::parse(&runtime)?,
            routes: routes(&keys)?,
            resolv_conf: resolv_conf(&keys)?,
            detects_duplicates: keys.bool("enabledad", false)?,
        })
    }
}

/// Keys of the reference plugins with the values that change nothing here. Any other value is refused by name: a pod
/// that silently lacks its VLAN or its filter is worse than one that does not start.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), Failure> {
    for (key, expected) in [
        ("promiscMode", "false: the bridge is not put into promiscuous mode"),
        ("macspoofchk", "false: there is no MAC spoofing filter"),
        ("disableContainerInterface", "false: the interface is always brought up"),
    ] {
        if keys.bool(key, false)? {
            return Err(unsupported(keys.bad(key, expected)));
        }
    }
    if keys.integer::<u32>("vlan", "a VLAN number")?.is_some_and(|vlan| vlan != 0) {
        return Err(unsupported(keys.bad("vlan", "0: the bridge does not filter VLANs")));
    }
    if !keys.list("vlanTrunk", "a list")?.is_empty() {
        return Err(unsupported(keys.bad("vlanTrunk", "no trunks: the bridge does not filter VLANs")));
    }
    if !keys.bool("isGateway", true)? && !keys.bool("isDefaultGateway", true)? {
        return Err(unsupported(
            keys.bad("isGateway", "true: the bridge always carries the subnet's gateway"),
        ));
    }
    // flannel's plugin hands these on to `bridge`; here nothing is delegated.
    if keys.get("delegate").is_some() {
        let expected = "its keys (bridge, mtu, hairpinMode, isDefaultGateway) at the top level";
        return Err(unsupported(keys.bad("delegate", expected)));
    }
    let ipam = keys.object("ipam", "an object")?;
    if ipam.str("type", "\"weft\"")?.is_some_and(|kind| kind != "weft") {
        return Err(unsupported(
            ipam.bad("type", "\"weft\", or no ipam: addresses come from the node's lease"),
        ));
    }
    let backend = keys.str("ipMasqBackend", "\"nftables\"")?.filter(|backend| !backend.is_empty());
    if backend.is_some_and(|backend| backend != "nftables") {
        return Err(unsupported(keys.bad("ipMasqBackend", "\"nftables\", by which weftd masquerades")));
    }
    if let Some(key) = ipam.names().find(|key| !OF_IPAM.contains(key) && ipam.get(key).is_some()) {
        return Err(unsupported(ipam.bad(key, "no such key: addresses come from the node's lease")));
    }
    refuse_portmaps(keys)?;
    let runtime = keys.object("runtimeConfig", "an object")?;
    match runtime.get("ipRanges") {
        None => Ok(()),
        Some(Value::Array(list)) if list.is_empty() => Ok(()),
        Some(_) => Err(unsupported(runtime.bad("ipRanges", "none: addresses come from the node's lease"))),
    }
}

/// The reference portmap's keys, should somebody declare its capability here and leave them.
fn refuse_portmaps(keys: &Keys<'_>) -> Result<(), Failure> {
    let chained = "such rules are portmap's: chain it behind weft and declare portMappings there";
    if !keys.bool("snat", true)? || keys.bool("masqAll", false)? {
        let (key, value) = if keys.bool("snat", true)? { ("masqAll", false) } else { ("snat", true) };
        return Err(unsupported(keys.bad(key, &format!("{value}: {chained}"))));
    }
    let given =
        |key: &&str| keys.get(key).is_some_and(|value| value.as_array().is_none_or(|l| !l.is_empty()));
    let others = ["conditionsV4", "conditionsV6", "markMasqBit", "externalSetMarkChain", "backend"];
    match others.iter().find(|key| given(key)) {
        Some(key) => Err(unsupported(keys.bad(key, &format!("none: {chained}")))),
        None => Ok(()),
    }
}

/// For a field that is well formed and asks for something that is not done.
fn unsupported(bad: BadValue) -> Failure {
    Failure::new(Code::UnsupportedField, bad.to_string())
}

fn bridge_name(keys: &Keys<'_>) -> Result<IfName, BadValue> {
    let expected = "an interface name of 1 to 15 bytes";
    let name = keys.str("bridge", expected)?.filter(|name| !name.is_empty()).unwrap_or(DEFAULT_BRIDGE);
    name.parse().map_err(|_| keys.bad("bridge", expected))
}

/// 0 means the default, as in the reference; the floor is IPv4's own (RFC 791).
fn mtu(keys: &Keys<'_>) -> Result<Option<u32>, BadValue> {
    let expected = "a number of bytes from 68 to 65535, not above the dataplane's MTU";
    match keys.integer::<u32>("mtu", expected)? {
        None | Some(0) => Ok(None),
        Some(mtu @ 68..=65535) => Ok(Some(mtu)),
        Some(_) => Err(keys.bad("mtu", expected)),
    }
}

fn dns(keys: &Keys<'_>) -> Result<Dns, BadValue> {
    let expected = "{\"nameservers\": […], \"domain\": …, \"search\": […], \"options\": […]}";
    match keys.get("dns") {
        None => Ok(Dns::default()),
        // serde also reads a struct from a list
        Some(value) if value.is_object() => Dns::from_value(value).map_err(|_| keys.bad("dns", expected)),
        Some(_) => Err(keys.bad("dns", expected)),
    }
}

/// `ipam.routes`, which flannel's plugin hands on too.
fn routes(keys: &Keys<'_>) -> Result<Vec<Route>, Failure> {
    let ipam = keys.object("ipam", "an object")?;
    let expected = "a list of {\"dst\": \"192.0.2.0/24\", \"gw\": \"10.1.2.1\"}";
    let items = ipam.objects("routes", Case::Exact, expected)?;
    if items.len() > MAX_ROUTES {
        let msg = format!("ipam.routes has {} routes: expected at most {MAX_ROUTES}", items.len());
        return Err(Failure::new(Code::BadConfiguration, msg));
    }
    items.iter().map(|item| route(item).map_err(Failure::from)).collect()
}

fn route(item: &Keys<'_>) -> Result<Route, BadValue> {
    let expected = "a prefix such as 192.0.2.0/24";
    let dst = item.str("dst", expected)?.filter(|text| text.contains('/'));
    let dst: IpNetwork = dst.and_then(|text| text.parse().ok()).ok_or_else(|| item.bad("dst", expected))?;
    let expected = "an address of the destination's family";
    let gw = match item.str("gw", expected)?.filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => {
            let gw = text.parse::<IpAddr>().ok().filter(|gw| gw.is_ipv4() == dst.is_ipv4());
            Some(gw.ok_or_else(|| item.bad("gw", expected))?)
        }
    };
    let number = |key: &str| item.integer::<u32>(key, "a number up to 4294967295");
    let form = RouteForm {
        mtu: number("mtu")?.filter(|mtu| *mtu != 0),
        advmss: number("advmss")?.filter(|mss| *mss != 0),
        priority: number("priority")?.filter(|priority| *priority != 0),
        table: number("table")?,
        scope: item.integer::<u8>("scope", "a number up to 255")?,
    };
    Ok(Route { dst: Subnet::from(dst).into(), gw, form })
}

fn resolv_conf(keys: &Keys<'_>) -> Result<Option<PathBuf>, BadValue> {
    let ipam = keys.object("ipam", "an object")?;
    let expected = "the absolute path of a resolv.conf";
    match ipam.str("resolvConf", expected)?.filter(|path| !path.is_empty()) {
        None => Ok(None),
        Some(path) if path.starts_with('/') => Ok(Some(path.into())),
        Some(_) => Err(ipam.bad("resolvConf", expected)),
    }
}

/// The union of the places where addresses can be asked for.
fn requested_ips(places: &[&Keys<'_>], first: &[IpAddr]) -> Result<Vec<IpAddr>, Failure> {
    let expected = "an address such as 10.1.2.3 or 10.1.2.3/24";
    let mut ips: Vec<IpAddr> = Vec::new();
    let mut add = |ip| {
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    };
    first.iter().copied().for_each(&mut add);
    for keys in places {
        for item in keys.list("ips", "a list of addresses")? {
            add(item.as_str().and_then(parse_ip).ok_or_else(|| keys.bad_part("ips", item, expected))?);
        }
    }
    if ips.len() > MAX_REQUESTED {
        let msg = format!("{} requested addresses: expected at most {MAX_REQUESTED}", ips.len());
        return Err(Failure::new(Code::BadConfiguration, msg));
    }
    Ok(ips)
}

/// The oldest result shape has room for no more.
fn one_per_family_before_0_3(conf: &NetConf, requested: &[IpAddr]) -> Result<(), Failure> {
    let v4 = requested.iter().filter(|ip| ip.is_ipv4()).count();
    if conf.version >= SpecVersion::V0_3_0 || (v4 <= 1 && requested.len() - v4 <= 1) {
        return Ok(());
    }
    let msg = format!(
        "{} requested addresses: cniVersion {} does not support more than 1 address per family",
        requested.len(),
        conf.version
    );
    Err(Failure::new(Code::BadConfiguration, msg))
}

fn requested_mac(keys: &Keys<'_>) -> Result<Option<Mac>, BadValue> {
    let expected = "a unicast MAC address such as 0a:58:0a:01:02:03";
    match keys.str("mac", expected)? {
        None | Some("") => Ok(None),
        Some(text) => parse_mac(text).map(Some).map_err(|_| keys.bad("mac", expected)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(extra: &str, args: &str) -> Result<InterfaceConf, Failure> {
        let json = format!(r#"{{"name":"n","cniVersion":"1.1.0","type":"weft"{extra}}}"#);
        let conf = NetConf::parse(json.as_bytes()).map_err(|(_, e)| e)?;
        InterfaceConf::parse(&conf, &CniArgs::parse(args)?)
    }

    #[test]
    fn defaults_are_flannels_conflist() {
        let conf = with("", "").expect("bare");
        assert_eq!(conf.bridge.name.as_str(), "cni0");
        assert!(conf.bridge.hairpin && !conf.bridge.isolated && conf.is_default_gateway);
        assert_eq!((conf.bridge.mtu, conf.mac, conf.requested.len()), (None, None, 0));
        let flannel = with(r#","hairpinMode":true,"isDefaultGateway":true"#, "").expect("flannel's delegate");
        assert_eq!(flannel, conf);
    }

    #[test]
    fn each_key_is_honoured() {
        let conf = with(
            r#","bridge":"br9","hairpinMode":false,"isDefaultGateway":false,"portIsolation":true,"mtu":1400,
               "dns":{"nameservers":["10.0.0.10"],"search":["a.b"]},"unknown":{"x":[1]},"cni.dev/x":1"#,
            "",
        )
        .expect("good");
        assert_eq!(conf.bridge.name.as_str(), "br9");
        assert!(!conf.bridge.hairpin && conf.bridge.isolated && !conf.is_default_gateway);
        assert_eq!(conf.bridge.mtu, Some(1400));
        assert_eq!(conf.dns.nameservers, ["10.0.0.10"]);
    }

    #[test]
    fn options_of_the_reference() {
        let conf = with(
            r#","forceAddress":true,"ipMasq":true,"ipMasqBackend":"nftables","enabledad":true,
               "ipam":{"type":"weft","resolvConf":"/etc/resolv.conf","routes":[{"dst":"192.0.2.7/24"},
               {"dst":"fd00::/48","gw":"fd00::1","priority":7,"table":0,"scope":0,"mtu":1400,"advmss":0}]}"#,
            "",
        )
        .expect("good");
        assert!(conf.bridge.force_address && conf.bridge.masquerade && conf.detects_duplicates);
        assert_eq!(conf.resolv_conf.as_deref(), Some(std::path::Path::new("/etc/resolv.conf")));
        assert_eq!((conf.routes[0].dst.to_string(), conf.routes[0].gw), ("192.0.2.0/24".to_owned(), None));
        let form =
            RouteForm { mtu: Some(1400), priority: Some(7), table: Some(0), scope: Some(0), advmss: None };
        assert_eq!(conf.routes[1].form, form);
        let bare = with("", "").expect("bare");
        assert!(!bare.bridge.needs_newer_agent() && !bare.detects_duplicates && bare.routes.is_empty());
    }

    #[test]
    fn requested_addresses_unite_and_macs_have_precedence() {
        let both = r#","runtimeConfig":{"ips":["10.1.0.5/24","10.1.0.6"],"mac":"02:00:00:00:00:01"},
                      "args":{"cni":{"ips":["10.1.0.6","fd00::7"],"mac":"02:00:00:00:00:02"}}"#;
        let conf = with(both, "IP=10.1.0.4;MAC=02:00:00:00:00:03").expect("good");
        let ips: Vec<_> = conf.requested.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.1.0.4", "10.1.0.5", "10.1.0.6", "fd00::7"]);
        let mac = |extra, args| with(extra, args).expect("good").mac.map(|m| m.0[5]);
        assert_eq!(mac(both, "MAC=02:00:00:00:00:03"), Some(1));
        assert_eq!(mac(r#","args":{"cni":{"mac":"02:00:00:00:00:02"}}"#, "MAC=02:00:00:00:00:03"), Some(2));
        assert_eq!(mac(r#","runtimeConfig":{"mac":""}"#, "MAC=02:00:00:00:00:03"), Some(3));
    }

    #[test]
    fn the_oldest_versions_have_one_address_per_family() {
        for version in SpecVersion::ALL {
            let with = |ips: &str| {
                let json =
                    format!(r#"{{"name":"n","cniVersion":"{version}","runtimeConfig":{{"ips":{ips}}}}}"#);
                let conf = NetConf::parse(json.as_bytes()).expect("conf");
                InterfaceConf::parse(&conf, &CniArgs::default())
            };
            assert!(with(r#"["10.1.0.5","fd00::5"]"#).is_ok());
            let two = with(r#"["10.1.0.5","10.1.0.6"]"#);
            assert_eq!(two.is_ok(), version >= SpecVersion::V0_3_0, "{version}");
            assert!(two.err().is_none_or(|e| e.is(Code::BadConfiguration)));
        }
    }

    #[test]
    fn what_would_not_be_honoured_is_refused_by_key_and_value() {
        for (extra, part) in [
            (r#""vlan":5"#, "vlan = 5"),
            (r#""vlanTrunk":[{"id":5}]"#, "vlanTrunk = [{\"id\":5}]"),
            (r#""promiscMode":true"#, "promiscMode = true"),
            (r#""macspoofchk":true"#, "macspoofchk = true"),
            (r#""ipMasqBackend":"iptables""#, "ipMasqBackend = \"iptables\": expected \"nftables\""),
            (r#""disableContainerInterface":true"#, "disableContainerInterface = true"),
            (r#""isGateway":false,"isDefaultGateway":false"#, "isGateway = false"),
            (
                r#""delegate":{"hairpinMode":true,"isDefaultGateway":true}"#,
                "delegate = {\"hairpinMode\":true,\"isDefaultGateway\":true}: expected its keys",
            ),
            (r#""ipam":{"type":"host-local"}"#, "ipam.type = \"host-local\""),
            (r#""ipam":{"type":"weft","subnet":"10.0.0.0/24"}"#, "ipam.subnet = \"10.0.0.0/24\""),
            (r#""ipam":{"routes":[],"dataDir":"/run/x"}"#, "ipam.dataDir = \"/run/x\""),
            (r#""runtimeConfig":{"ipRanges":[[{"subnet":"10.0.0.0/24"}]]}"#, "runtimeConfig.ipRanges"),
            (r#""snat":false"#, "snat = false: expected true: such rules"),
            (r#""masqAll":true"#, "masqAll = true: expected false"),
            (r#""conditionsV4":["!","-d","192.0.2.0/24"]"#, "conditionsV4 = [\"!\""),
            (r#""backend":"iptables""#, "backend = \"iptables\": expected none"),
            (r#""markMasqBit":5"#, "markMasqBit = 5"),
        ] {
            let failure = with(&format!(",{extra}"), "").expect_err(extra);
            assert!(failure.is(Code::UnsupportedField) && failure.msg.contains(part), "{extra}: {failure:?}");
            assert!(failure.msg.contains(": expected "), "{failure}");
        }
        let defaults = r#","vlan":0,"vlanTrunk":[],"preserveDefaultVlan":true,"promiscMode":false,"ipMasq":false,"isGateway":true,
            "ipam":{"type":"weft"},"enabledad":null,"snat":true,"masqAll":false,"conditionsV6":[],"runtimeConfig":{"portMappings":[],"bandwidth":{},"dns":{}}"#;
        assert!(with(defaults, "").is_ok());
        assert!(with(r#","ipam":{}"#, "").is_ok());
    }

    #[test]
    fn bad_values_are_named_with_what_was_expected() {
        for (extra, part) in [
            (r#""bridge":"a/b""#, "bridge = \"a/b\""),
            (r#""bridge":7"#, "bridge = 7"),
            (r#""hairpinMode":"yes""#, "hairpinMode = \"yes\""),
            (r#""mtu":67"#, "mtu = 67"),
            (r#""mtu":-1"#, "mtu = -1"),
            (r#""mtu":70000"#, "mtu = 70000"),
            (r#""mtu":"1400""#, "mtu = \"1400\""),
            (r#""dns":[]"#, "dns = []"),
            (r#""dns":{"search":"a"}"#, "dns = "),
            (r#""ipam":[]"#, "ipam = []"),
            (r#""vlan":"x""#, "vlan = \"x\""),
            (r#""forceAddress":1"#, "forceAddress = 1"),
            (r#""ipMasqBackend":5"#, "ipMasqBackend = 5"),
            (r#""ipam":{"routes":{}}"#, "ipam.routes = {}: expected a list of"),
            (
                r#""ipam":{"routes":[{"dst":"192.0.2.1"}]}"#,
                "ipam.routes[0].dst = \"192.0.2.1\": expected a prefix",
            ),
            (r#""ipam":{"routes":[{"gw":"10.1.2.1"}]}"#, "ipam.routes[0].dst = null: expected a prefix"),
            (
                r#""ipam":{"routes":[{"dst":"0.0.0.0/0","gw":"fd00::1"}]}"#,
                "ipam.routes[0].gw = \"fd00::1\": expected an",
            ),
            (r#""ipam":{"routes":[{"dst":"0.0.0.0/0","table":-1}]}"#, "ipam.routes[0].table = -1"),
            (
                r#""ipam":{"resolvConf":"resolv.conf"}"#,
                "ipam.resolvConf = \"resolv.conf\": expected the absolute",
            ),
            (r#""runtimeConfig":{"ips":["x"]}"#, "runtimeConfig.ips = \"x\""),
            (r#""args":{"cni":{"ips":["x"]}}"#, "args.cni.ips = \"x\""),
            (r#""runtimeConfig":{"ips":"10.0.0.1"}"#, "runtimeConfig.ips = \"10.0.0.1\""),
            (r#""runtimeConfig":{"mac":"ff:ff:ff:ff:ff:ff"}"#, "runtimeConfig.mac"),
            (
                r#""runtimeConfig":{"portMappings":[{"hostPort":"x"}]}"#,
                "runtimeConfig.portMappings[0].hostPort",
            ),
            (r#""args":{"cni":{"mac":"x"}}"#, "args.cni.mac = \"x\""),
        ] {
            let failure = with(&format!(",{extra}"), "").expect_err(extra);
            assert!(failure.is(Code::BadConfiguration) && failure.msg.contains(part), "{extra}: {failure:?}");
            assert!(failure.msg.contains(": expected "), "{failure}");
        }
        let many: Vec<_> = (0..17).map(|n| format!("\"10.0.0.{n}\"")).collect();
        assert!(with(&format!(r#","runtimeConfig":{{"ips":[{}]}}"#, many.join(",")), "").is_err());
    }
}
