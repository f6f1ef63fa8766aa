//! Every option of weftd, once: the command line, the variables, the help and `conf/weftd.env` all follow this table.

use weft_shared::names;

/// One option.
#[derive(Debug)]
pub(super) struct Opt {
    pub name: &'static str,
    pub origin: Origin,
    pub shape: Shape,
    pub group: Group,
    /// Empty: none, or one that follows from another option, as the help says.
    pub default: &'static str,
    pub help: &'static str,
}

/// Whose name it is, and so how its variable begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Flannel,
    Weft,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Takes a value, shown in the help under this name; the last one given counts.
    Value(&'static str),
    /// Takes a value and may be given many times.
    List(&'static str),
    /// `--x`, or `--x=true|false`, as Go's flag package reads it.
    Switch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    Store,
    Etcd,
    Kubernetes,
    Lease,
    Underlay,
    Firewall,
    Udp,
    Agent,
    Log,
}

impl Origin {
    pub(super) const ALL: [Origin; 2] = [Origin::Flannel, Origin::Weft];

    pub(super) fn prefix(self) -> &'static str {
        match self {
            Origin::Flannel => "FLANNELD_",
            Origin::Weft => "WEFTD_",
        }
    }

    /// The variable behind an option: `FLANNELD_ETCD_ENDPOINTS`.
    pub(super) fn variable(self, option: &str) -> String {
        format!("{}{}", self.prefix(), option.to_uppercase().replace('-', "_"))
    }
}

impl Opt {
    pub(super) fn variable(&self) -> String {
        self.origin.variable(self.name)
    }
}

impl Group {
    pub(super) const ALL: [Group; 9] = [
        Group::Store,
        Group::Etcd,
        Group::Kubernetes,
        Group::Underlay,
        Group::Lease,
        Group::Firewall,
        Group::Udp,
        Group::Agent,
        Group::Log,
    ];

    pub(super) fn title(self) -> &'static str {
        match self {
            Group::Store => "Store (where network configuration and leases live)",
            Group::Etcd => "etcd (only with --store etcd)",
            Group::Kubernetes => "Kubernetes (only with --kube-subnet-mgr)",
            Group::Underlay => "Underlay (the interface whose address peers send to)",
            Group::Lease => "Subnet lease",
            Group::Firewall => "Masquerade and forwarding (always nftables, whatever EnableNFTables says)",
            Group::Udp => "udp backend",
            Group::Agent => "Agent",
            Group::Log => "Log",
        }
    }
}

const fn flannel(
    name: &'static str,
    group: Group,
    shape: Shape,
    default: &'static str,
    help: &'static str,
) -> Opt {
    Opt { name, origin: Origin::Flannel, shape, group, default, help }
}

const fn own(
    name: &'static str,
    group: Group,
    shape: Shape,
    default: &'static str,
    help: &'static str,
) -> Opt {
    Opt { name, origin: Origin::Weft, shape, group, default, help }
}

use Group::{Agent, Etcd, Firewall, Kubernetes, Lease, Log, Store, Udp, Underlay};
use Shape::{List, Switch, Value};

pub(super) const OPTIONS: &[Opt] = &[
    own(
        "store",
        Store,
        Value("KIND"),
        "etcd",
        "etcd, or embedded[=FILE]: an SQLite file for the agents of one machine (FILE: store.db in --state-dir)",
    ),
    own(
        "net-config",
        Store,
        Value("FILE"),
        "",
        "network configuration (JSON) for an embedded store that has none yet",
    ),
    flannel(
        "etcd-endpoints",
        Etcd,
        Value("URLS"),
        "http://127.0.0.1:4001,http://127.0.0.1:2379",
        "comma-separated; any that answers will do",
    ),
    flannel("etcd-prefix", Etcd, Value("KEY"), "/coreos.com/network", "prefix of all keys"),
    flannel(
        "etcd-cafile",
        Etcd,
        Value("FILE"),
        "",
        "PEM file of the authority that signed the servers' certificates",
    ),
    flannel(
        "etcd-certfile",
        Etcd,
        Value("FILE"),
        "",
        "PEM file of the client certificate; needs --etcd-keyfile",
    ),
    flannel("etcd-keyfile", Etcd, Value("FILE"), "", "PEM file of the client certificate's key"),
    flannel("etcd-username", Etcd, Value("NAME"), "", "needs --etcd-password"),
    flannel(
        "etcd-password",
        Etcd,
        Value("TEXT"),
        "",
        "better given by its variable: a command line is visible to every user",
    ),
    flannel(
        "kube-subnet-mgr",
        Kubernetes,
        Switch,
        "false",
        "the store is the cluster: this Node's podCIDR is its subnet, annotations of Nodes are the leases. Which Node \
         this is, the variables NODE_NAME, or POD_NAME and POD_NAMESPACE, or --node-name say",
    ),
    flannel(
        "kubeconfig-file",
        Kubernetes,
        Value("FILE"),
        "",
        "how to reach the apiserver (default: the pod's service account, else KUBECONFIG or ~/.kube/config; with \
         --kube-api-url none)",
    ),
    flannel(
        "kube-api-url",
        Kubernetes,
        Value("URL"),
        "",
        "the apiserver, in place of the one that the kubeconfig names; without --kubeconfig-file it is spoken to without \
         credentials, also in a pod, as flanneld does",
    ),
    flannel(
        "kube-annotation-prefix",
        Kubernetes,
        Value("PREFIX"),
        "flannel.alpha.coreos.com",
        "what the names of annotations begin with",
    ),
    flannel(
        "net-config-path",
        Kubernetes,
        Value("FILE"),
        "/etc/kube-flannel/net-conf.json",
        "network configuration (JSON), as a ConfigMap is mounted there",
    ),
    flannel(
        "set-node-network-unavailable",
        Kubernetes,
        Switch,
        "true",
        "write the Node's condition NetworkUnavailable=False when everything is in place",
    ),
    own(
        "network-policy-check",
        Kubernetes,
        Value("DURATION"),
        "10m",
        "ask the apiserver this often whether there are NetworkPolicies, unless something on this node enforces them, \
         and say so; such as 10m, a number without a unit is seconds, 0 never",
    ),
    flannel(
        "iface",
        Underlay,
        List("NAME|IP"),
        "",
        "interface by name or address; repeated: the first that exists. Without any of these three: the interface \
         with --public-ip, else that of the default route",
    ),
    flannel(
        "iface-regex",
        Underlay,
        List("REGEX"),
        "",
        "first interface with a matching IPv4 address, else with a matching name; repeated: tried in order, after --iface",
    ),
    flannel(
        "iface-can-reach",
        Underlay,
        Value("IP"),
        "",
        "the interface that the kernel routes this address through; tried last",
    ),
    flannel(
        "public-ip",
        Underlay,
        Value("IP"),
        "",
        "address that peers send to, if it is not the interface's own",
    ),
    flannel(
        "subnet-file",
        Lease,
        Value("FILE"),
        names::SUBNET_FILE,
        "where the leased subnet is written for others",
    ),
    flannel(
        "subnet-lease-renew-margin",
        Lease,
        Value("MINUTES"),
        "60",
        "renew this long before the lease ends, 1 to 1439; unset, at most half of --lease-ttl",
    ),
    own(
        "lease-ttl",
        Lease,
        Value("DURATION"),
        "24h",
        "how long a lease lasts unless renewed, such as 24h or 90s; a number without a unit is seconds",
    ),
    own(
        "expired-peer-grace",
        Lease,
        Value("DURATION"),
        "10m",
        "how long a peer whose lease expired stays in use, unless another takes its subnet or address, such as 10m; a \
         number without a unit is seconds, 0 not at all",
    ),
    flannel(
        "ip-masq",
        Firewall,
        Switch,
        "false",
        "pods leave the overlay with the node's address; without it nothing outside can answer them unless it has \
         routes to the overlay",
    ),
    flannel(
        "ip-masq-fully-random-disable",
        Firewall,
        Switch,
        "false",
        "masquerade keeps source ports where it can, instead of drawing them at random",
    ),
    own(
        "ip-masq-exclude",
        Firewall,
        List("CIDRS"),
        "",
        "comma-separated destinations to which pods go with their own address; may be repeated",
    ),
    flannel(
        "iptables-forward-rules",
        Firewall,
        Switch,
        "true",
        "accept the overlay's packets in whatever chain of the forward hook would drop them",
    ),
    flannel(
        "iptables-resync",
        Firewall,
        Value("SECONDS"),
        "5",
        "look at iptables-legacy this often where it is in use, 1 to 3600; changes of nftables are announced",
    ),
    own(
        "udp-offload-off",
        Udp,
        List("NAMES"),
        "",
        "comma-separated offloads that are not even tried, of vnet-hdr, tun-tso, tun-uso, coalesce-tcp, coalesce-udp, \
         udp-segment, udp-gro and tun-nowait; may be repeated. What kernel or device refuse is left out by itself",
    ),
    own("node-name", Agent, Value("NAME"), "", "name in logs and status (default: the host's name)"),
    own(
        "resync",
        Agent,
        Value("SECONDS"),
        "10",
        "compare the kernel with what should be in it at least this often; among N thousand peers N times as rarely",
    ),
    own(
        "netlink-monitor",
        Agent,
        Switch,
        "true",
        "repair at once when the kernel reports a change; without it only every --resync, among N thousand peers N times that",
    ),
    own("run-dir", Agent, Value("DIR"), names::RUN_DIR, "state that ends with this boot"),
    own("state-dir", Agent, Value("DIR"), names::STATE_DIR, "state that survives a reboot"),
    own(
        "sysctl-dir",
        Agent,
        Value("DIR"),
        names::SYSCTL_DIR,
        "where kernel settings are written, if /proc/sys is read-only here: net below it is the host's /proc/sys/net",
    ),
    own("cni-socket", Agent, Value("FILE"), "", "where the CNI plugin asks (default: cni.sock in --run-dir)"),
    own("admin-socket", Agent, Value("FILE"), "", "where weftctl asks (default: admin.sock in --run-dir)"),
    own(
        "admin-listen",
        Agent,
        Value("IP:PORT"),
        names::ADMIN_LISTEN,
        "HTTP for /metrics, /healthz, /readyz and /debug/state; off for none",
    ),
    flannel("v", Log, Value("N"), "", "klog's verbosity: 0 to 3 is level info, 4 and 5 debug, from 6 trace"),
    own("log-level", Log, Value("LEVEL"), "info", "error, warn, info, debug or trace; not together with -v"),
    own("log-format", Log, Value("FORMAT"), "text", "text or json, on standard error"),
    flannel("version", Log, Switch, "false", "print the version and exit"),
];

/// Options of flannel's that this version has not, each with what to do instead, if there is anything.
/// [`is_off`] knows the values that ask for nothing.
pub(super) const NOT_YET: &[(&str, &str)] = &[
    ("public-ipv6", ""),
    ("healthz-ip", "use --admin-listen=ADDRESS:PORT, which answers /healthz and /readyz"),
    ("healthz-port", "use --admin-listen=ADDRESS:PORT, which answers /healthz and /readyz"),
    ("ip-blackhole-route", ""),
    ("vmodule", "use --log-level"),
    ("log_backtrace_at", ""),
];

/// Of [`NOT_YET`], the switches that may be off: weftd does nothing of the kind anyway.
const OFF_SWITCHES: &[&str] = &["ip-blackhole-route"];

/// The option of flannel's, absent here, of which `value` says that it is not wanted.
pub(super) fn is_off(name: &str, value: &str) -> Option<&'static str> {
    match name {
        "healthz-port" => Some("healthz-port").filter(|_| value == "0"),
        _ => OFF_SWITCHES.iter().find(|n| **n == name).copied().filter(|_| boolean(value) == Some(false)),
    }
}

/// As strconv.ParseBool.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

pub(super) fn find(name: &str) -> Option<&'static Opt> {
    OPTIONS.iter().find(|o| o.name == name)
}

/// Options that mean nothing to another store.
pub(super) fn only_for(group: Group) -> impl Iterator<Item = &'static Opt> {
    OPTIONS.iter().filter(move |o| o.group == group)
}
