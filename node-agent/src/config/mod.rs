//! The command line of weftd and what it comes to: a checked [`Config`].
//!
//! Names, syntax and variables are flanneld's (main.go), and weft's own settings stand beside them. A unit file of
//! flanneld's therefore starts weftd unchanged if it gives none of the options that this version lacks
//! (`options::NOT_YET`): those are refused by name, unless they are off (`--ip-blackhole-route=false`), which is what
//! weftd does. Unlike flanneld's, a wrong option exits with status 2 and none is ignored.

mod help;
#[cfg(feature = "kube")]
mod kube;
mod options;
mod settings;
#[cfg(test)]
mod tests;
mod values;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::firewall;
use crate::lease::EtcdConfig;
#[cfg(feature = "kube")]
use crate::lease::KubeConfig;
use crate::lease::etcd::{ClientCert, Login, Secret};
use crate::udp::{Offload, Offloads};
use crate::underlay::{IfaceSpec, PublicIpFrom, UnderlayChoice};
use tracing::Level;
use weft_shared::Subnet;
use weft_shared::names::MAX_SOCKET_PATH;

pub use settings::Source;

use options::{Group, Shape};
use settings::Settings;
use values::{absolute, clean_key, duration, endpoint, network, node_name, offload, regex, socket_path};

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    Run(Box<Config>),
    /// Print this on standard output and exit with status 0.
    Print(String),
}

#[derive(Debug, Clone)]
pub struct Config {
    pub node_name: String,
    pub store: StoreConfig,
    pub underlay: UnderlayChoice,
    pub subnet_file: PathBuf,
    pub lease_ttl: Duration,
    /// Always shorter than `lease_ttl`.
    pub renew_margin: Duration,
    /// How long a peer is used whose lease has expired.
    pub expired_peer_grace: Duration,
    /// Period of the sweep over the kernel.
    pub resync: Duration,
    pub netlink_monitor: bool,
    pub firewall: firewall::Settings,
    /// What the udp backend's packet path may leave to the kernel.
    pub udp_offloads: Offloads,
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
    /// Kernel settings are written below it.
    pub sysctl_dir: PathBuf,
    pub cni_socket: PathBuf,
    pub admin_socket: PathBuf,
    pub admin_listen: Option<SocketAddr>,
    pub log_format: LogFormat,
    pub log_level: Level,
}

#[derive(Debug, Clone)]
pub enum StoreConfig {
    Etcd(EtcdConfig),
    Embedded(EmbeddedConfig),
    #[cfg(feature = "kube")]
    Kube(Box<KubeConfig>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedConfig {
    pub file: PathBuf,
    /// Network configuration to put into the store if it has none.
    pub net_config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// A command line or variable that weftd does not take; exit status 2.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    #[error("{given} = {value:?}: expected {expected}")]
    Value { given: Source, value: String, expected: String },
    #[error("{given} needs a value: expected {expected}")]
    NoValue { given: Source, expected: &'static str },
    #[error(
        "{given} is a setting of flannel's that this version of weftd does not have{}{instead}",
        if instead.is_empty() { "" } else { "; " }
    )]
    NotYet { given: Source, instead: &'static str },
    #[error(
        "{given} is no setting of weftd{}",
        suggestion.as_ref().map_or(String::new(), |s| format!("; did you mean {s}?"))
    )]
    Unknown { given: Source, suggestion: Option<Source> },
    #[error("unexpected argument {0:?}: weftd takes options only, and a switch's value is written --x=false")]
    Argument(String),
    /// A value that is right alone and wrong beside another.
    #[error("{given}: {why}")]
    Clash { given: Source, why: String },
    #[error("{0} is not UTF-8 text")]
    NotText(String),
}

/// Reads the command line and the variables of this process.
pub fn from_process() -> Result<Invocation, UsageError> {
    let not_text = |what: std::ffi::OsString| UsageError::NotText(what.to_string_lossy().into_owned());
    let args: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|arg| arg.into_string().map_err(not_text))
        .collect::<Result<_, _>>()?;
    read(args, own_variables()?, &crate::host::hostname())
}

/// The variables of this process that are weft's and flannel's.
pub fn own_variables() -> Result<Vec<(String, String)>, UsageError> {
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os() {
        // Other programs' variables may hold anything.
        let Ok(name) = name.into_string() else { continue };
        let of_pod = settings::OF_POD.contains(&name.as_str());
        if of_pod || options::Origin::ALL.iter().any(|origin| name.starts_with(origin.prefix())) {
            let value = value.into_string().map_err(|_| UsageError::NotText(name.clone()))?;
            variables.push((name, value));
        }
    }
    Ok(variables)
}

/// Reads a command line without the program's name, and variables, of which only weft's and flannel's count.
pub fn read(
    args: impl IntoIterator<Item = String>,
    variables: impl IntoIterator<Item = (String, String)>,
    hostname: &str,
) -> Result<Invocation, UsageError> {
    let Some(mut settings) = Settings::from_args(args)? else {
        return Ok(Invocation::Print(help::text()));
    };
    // As flanneld: the version is printed whatever the variables hold.
    if settings.switch("version")? {
        return Ok(Invocation::Print(format!("weftd {}\n", env!("CARGO_PKG_VERSION"))));
    }
    settings.add_variables(variables)?;
    if settings.switch("version")? {
        return Ok(Invocation::Print(format!("weftd {}\n", env!("CARGO_PKG_VERSION"))));
    }
    Config::from_settings(&settings, hostname).map(|config| Invocation::Run(Box::new(config)))
}

impl Config {
    fn from_settings(settings: &Settings, hostname: &str) -> Result<Self, UsageError> {
        let run_dir = settings.required("run-dir", "an absolute path", absolute)?;
        let state_dir = settings.required("state-dir", "an absolute path", absolute)?;
        let socket = |name: &str, file: &str| {
            let expected = format!("an absolute path of at most {MAX_SOCKET_PATH} bytes");
            let given = settings.parse(name, &expected, socket_path)?;
            Ok::<_, UsageError>(given.unwrap_or_else(|| run_dir.join(file)))
        };
        let (lease_ttl, renew_margin) = lease_times(settings)?;
        Ok(Self {
            node_name: settings
                .parse("node-name", "1 to 253 characters without white space", node_name)?
                .unwrap_or_else(|| settings.of_pod("NODE_NAME").unwrap_or(hostname).to_owned()),
            store: StoreConfig::from_settings(settings, &state_dir)?,
            underlay: underlay_choice(settings)?,
            subnet_file: settings.required("subnet-file", "an absolute path", absolute)?,
            lease_ttl,
            renew_margin,
            expired_peer_grace: settings.required(
                "expired-peer-grace",
                "a duration from 0 to 168h such as 10m",
                |text| duration(text).filter(|d| *d <= Duration::from_secs(7 * 86_400)),
            )?,
            resync: settings.required("resync", "seconds, from 0.1 to 3600", |text| {
                duration(text)
                    .filter(|d| (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(d))
            })?,
            netlink_monitor: settings.switch("netlink-monitor")?,
            firewall: firewall_settings(settings)?,
            udp_offloads: udp_offloads(settings)?,
            sysctl_dir: settings.required("sysctl-dir", "an absolute path", absolute)?,
            cni_socket: socket("cni-socket", "cni.sock")?,
            admin_socket: socket("admin-socket", "admin.sock")?,
            admin_listen: settings.required(
                "admin-listen",
                "an address and port such as 127.0.0.1:9474, or off",
                |text| if text == "off" { Some(None) } else { text.parse().ok().map(Some) },
            )?,
            log_format: settings.required("log-format", "text or json", |text| match text {
                "text" => Some(LogFormat::Text),
                "json" => Some(LogFormat::Json),
                _ => None,
            })?,
            log_level: log_level(settings)?,
            run_dir,
            state_dir,
        })
    }
}

impl StoreConfig {
    fn from_settings(settings: &Settings, state_dir: &Path) -> Result<Self, UsageError> {
        if settings.switch("kube-subnet-mgr")? {
            return kubernetes(settings);
        }
        if let Some(given) = options::only_for(Group::Kubernetes)
            .filter(|opt| opt.shape != Shape::Switch)
            .find_map(|opt| settings.departure(opt))
        {
            return Err(clash(given, "only with --kube-subnet-mgr"));
        }
        settings.switch("set-node-network-unavailable")?;
        let expected = "etcd, embedded or embedded=FILE with an absolute path";
        let embedded = settings.required("store", expected, |text| match text.split_once('=') {
            None if text == "etcd" => Some(None),
            None if text == "embedded" => Some(Some(state_dir.join("store.db"))),
            Some(("embedded", file)) => absolute(file).map(Some),
            _ => None,
        })?;
        let Some(file) = embedded else {
            return match settings.source("net-config") {
                None => etcd_config(settings).map(Self::Etcd),
                Some(given) => Err(clash(given, "only for --store embedded; etcd's is written with etcdctl")),
            };
        };
        if let Some(given) = options::only_for(Group::Etcd).find_map(|opt| settings.source(opt.name)) {
            return Err(clash(given, "only for --store etcd, but the store is embedded"));
        }
        let net_config = settings.text("net-config").map(PathBuf::from);
        Ok(Self::Embedded(EmbeddedConfig { file, net_config }))
    }
}

/// Whatever says something of another store, or of leases that expire, is a mistake.
#[cfg(feature = "kube")]
fn kubernetes(settings: &Settings) -> Result<StoreConfig, UsageError> {
    let own = ["store", "net-config", "lease-ttl", "subnet-lease-renew-margin"]
        .into_iter()
        .filter_map(options::find);
    let others = options::only_for(Group::Etcd).chain(own);
    if let Some(given) = others.into_iter().find_map(|opt| settings.departure(opt)) {
        return Err(clash(
            given,
            "means nothing with --kube-subnet-mgr: the store is the cluster, whose subnets do not expire",
        ));
    }
    kube::config(settings).map(|config| StoreConfig::Kube(Box::new(config)))
}

#[cfg(not(feature = "kube"))]
fn kubernetes(settings: &Settings) -> Result<StoreConfig, UsageError> {
    let given = settings.source("kube-subnet-mgr").cloned();
    let given = given.unwrap_or_else(|| Source::Flag("kube-subnet-mgr".to_owned()));
    Err(clash(&given, "this weftd was built without the cargo feature kube, which is the Kubernetes store"))
}

fn etcd_config(settings: &Settings) -> Result<EtcdConfig, UsageError> {
    let ca_file = settings.text("etcd-cafile").map(PathBuf::from);
    let client_cert = pair(settings, "etcd-certfile", "etcd-keyfile")?
        .map(|(cert, key)| ClientCert { cert_file: cert.into(), key_file: key.into() });
    let login = pair(settings, "etcd-username", "etcd-password")?
        .map(|(username, password)| Login { username: username.into(), password: Secret(password.into()) });
    // An endpoint without a scheme is spoken to as the other settings suggest; one with the wrong scheme would send a
    // password, or the leases, in the clear.
    let tls = ["etcd-cafile", "etcd-certfile"].into_iter().find_map(|name| settings.source(name));
    let scheme = if tls.is_some() { "https" } else { "http" };
    let endpoints: Vec<String> = settings.required(
        "etcd-endpoints",
        "comma-separated URLs such as http://10.0.0.1:2379, without user or path",
        |list| list.split(',').map(|url| endpoint(url.trim(), scheme)).collect(),
    )?;
    let plain = endpoints.iter().any(|url| url.starts_with("http://"));
    if let (Some(tls), true) = (tls, plain) {
        return Err(settings.bad("etcd-endpoints", &format!("https:// URLs, since {tls} is given")));
    }
    Ok(EtcdConfig {
        endpoints,
        prefix: settings.required("etcd-prefix", "a key such as /coreos.com/network", clean_key)?,
        ca_file,
        client_cert,
        login,
    })
}

fn underlay_choice(settings: &Settings) -> Result<UnderlayChoice, UsageError> {
    let ip = |name| {
        let expected = "an IPv4 address of a host, not loopback, multicast, broadcast or of 0.0.0.0/8";
        settings.parse(name, expected, |text| {
            let none = |ip: &Ipv4Addr| ip.is_loopback() || ip.is_multicast() || ip.is_broadcast();
            text.parse::<Ipv4Addr>().ok().filter(|ip| !none(ip) && ip.octets()[0] != 0)
        })
    };
    Ok(UnderlayChoice {
        ifaces: settings.list("iface", "an interface's name or IPv4 address", |text| {
            let addr = text.parse().ok().map(IfaceSpec::Addr);
            addr.or_else(|| text.parse().ok().map(IfaceSpec::Name))
        })?,
        regexes: settings.list("iface-regex", "a regular expression (RE2)", regex)?,
        can_reach: ip("iface-can-reach")?,
        public_ip: ip("public-ip")?,
        public_ip_from: PublicIpFrom::Option,
    })
}

/// Time to live and renewal margin. flannel's margin has a lower bound of a minute, which a short-lived lease of a
/// test cluster cannot afford: the default margin gives way.
fn lease_times(settings: &Settings) -> Result<(Duration, Duration), UsageError> {
    let shortest = Duration::from_secs(2);
    let ttl = settings.required("lease-ttl", "a duration of 2s or more such as 24h", |text| {
        duration(text).filter(|d| *d >= shortest)
    })?;
    let name = "subnet-lease-renew-margin";
    let minutes = settings.required(name, "minutes from 1 to 1439", |text| {
        text.parse::<u64>().ok().filter(|m| (1..=1439).contains(m))
    })?;
    let margin = Duration::from_secs(minutes * 60);
    match settings.source(name) {
        Some(given) if margin >= ttl => Err(clash(
            given,
            &format!("{minutes} minutes, which must be less than --lease-ttl ({} s)", ttl.as_secs()),
        )),
        Some(_) => Ok((ttl, margin)),
        None => Ok((ttl, margin.min(ttl / 2))),
    }
}

fn firewall_settings(settings: &Settings) -> Result<firewall::Settings, UsageError> {
    let never = settings.list(
        "ip-masq-exclude",
        "comma-separated IPv4 networks such as 172.16.0.0/12,192.168.0.0/16",
        |list| list.split(',').map(|net| network(net.trim())).collect::<Option<Vec<Subnet>>>(),
    )?;
    let masquerade = settings.switch("ip-masq")?;
    if let Some(given) = settings.source("ip-masq-exclude").filter(|_| !masquerade) {
        return Err(clash(given, "only with --ip-masq: without it no packet is masqueraded"));
    }
    Ok(firewall::Settings {
        masquerade,
        fully_random: !settings.switch("ip-masq-fully-random-disable")?,
        never_masqueraded: never.concat(),
        forward: settings.switch("iptables-forward-rules")?,
        legacy_period: settings.required("iptables-resync", "whole seconds from 1 to 3600", |text| {
            text.parse().ok().filter(|s| (1..=3600).contains(s)).map(Duration::from_secs)
        })?,
    })
}

fn udp_offloads(settings: &Settings) -> Result<Offloads, UsageError> {
    let names = Offload::ALL.map(Offload::name).join(", ");
    let off = settings.list("udp-offload-off", &format!("comma-separated names of {names}"), |list| {
        list.split(',').map(|name| offload(name.trim())).collect::<Option<Vec<Offload>>>()
    })?;
    Ok(off.concat().into_iter().fold(Offloads::default(), Offloads::without))
}

/// klog's verbosity counts upwards without end; its users run 2 by default, 4 to debug and more to trace.
fn log_level(settings: &Settings) -> Result<Level, UsageError> {
    let verbosity = settings.parse("v", "a whole number", |text| text.parse::<u8>().ok())?;
    let level = settings.required("log-level", "error, warn, info, debug or trace", |text| match text {
        "error" => Some(Level::ERROR),
        "warn" => Some(Level::WARN),
        "info" => Some(Level::INFO),
        "debug" => Some(Level::DEBUG),
        "trace" => Some(Level::TRACE),
        _ => None,
    })?;
    match (verbosity, settings.source("log-level")) {
        (None, _) => Ok(level),
        (Some(_), Some(given)) => Err(clash(given, "-v (FLANNELD_V) says the same; give one of them")),
        (Some(0..=3), None) => Ok(Level::INFO),
        (Some(4..=5), None) => Ok(Level::DEBUG),
        (Some(_), None) => Ok(Level::TRACE),
    }
}

/// The values of two options of which neither means anything without the other.
fn pair<'a>(
    settings: &'a Settings,
    first: &str,
    second: &str,
) -> Result<Option<(&'a str, &'a str)>, UsageError> {
    let (lonely, missing) = match (settings.text(first), settings.text(second)) {
        (Some(a), Some(b)) => return Ok(Some((a, b))),
        (None, None) => return Ok(None),
        (Some(_), None) => (first, second),
        (None, Some(_)) => (second, first),
    };
    let given = settings.source(lonely).cloned().unwrap_or_else(|| Source::Flag(lonely.to_owned()));
    Err(clash(&given, &format!("--{missing} must be given as well")))
}

fn clash(given: &Source, why: &str) -> UsageError {
    UsageError::Clash { given: given.clone(), why: why.to_owned() }
}
