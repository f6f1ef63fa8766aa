use super::*;

fn run(args: &[&str], variables: &[(&str, &str)]) -> Result<Config, UsageError> {
    let args = args.iter().map(|a| (*a).to_owned());
    let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    match read(args, variables, "node-a")? {
        Invocation::Run(config) => Ok(*config),
        Invocation::Print(text) => panic!("printed {text}"),
    }
}

fn config(args: &[&str], variables: &[(&str, &str)]) -> Config {
    run(args, variables).unwrap_or_else(|e| panic!("{args:?} {variables:?}: {e}"))
}

fn etcd(config: &Config) -> &EtcdConfig {
    match &config.store {
        StoreConfig::Etcd(etcd) => etcd,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_any_setting_it_is_flanneld() {
    let config = config(&[], &[]);
    assert_eq!(
        etcd(&config),
        &EtcdConfig {
            endpoints: vec!["http://127.0.0.1:4001".into(), "http://127.0.0.1:2379".into()],
            prefix: "/coreos.com/network".into(),
            ca_file: None,
            client_cert: None,
            login: None,
        }
    );
    assert_eq!(config.subnet_file, Path::new("/run/flannel/subnet.env"));
    assert_eq!(config.lease_ttl, Duration::from_secs(86400));
    assert_eq!(config.expired_peer_grace, Duration::from_secs(600));
    assert_eq!(config.renew_margin, Duration::from_secs(3600));
    assert_eq!(config.resync, Duration::from_secs(10));
    assert!(config.netlink_monitor && config.underlay.is_open());
    assert_eq!(config.cni_socket, Path::new("/run/weft/cni.sock"));
    assert_eq!(config.admin_socket, Path::new("/run/weft/admin.sock"));
    assert_eq!(config.admin_listen.map(|a| a.to_string()).as_deref(), Some("127.0.0.1:9474"));
    assert_eq!((config.node_name.as_str(), config.log_level), ("node-a", Level::INFO));
}

#[test]
fn gos_flag_syntax() {
    for args in [
        &["-etcd-prefix=/a", "-iface=eth0", "-iface", "10.0.0.1"][..],
        &["--etcd-prefix", "/x", "--iface", "eth0", "--iface=10.0.0.1", "--etcd-prefix", "//a/"],
    ] {
        let config = config(args, &[]);
        assert_eq!(etcd(&config).prefix, "/a");
        assert_eq!(
            config.underlay.ifaces,
            [IfaceSpec::Name("eth0".parse().expect("name")), IfaceSpec::Addr(Ipv4Addr::new(10, 0, 0, 1))]
        );
    }
    // A value may look like a flag, and an equals sign may be in it.
    let config = config(&["--node-name", "-x=y", "--store=embedded=/tmp/a=b.db"], &[]);
    assert_eq!(config.node_name, "-x=y");
    assert!(matches!(&config.store, StoreConfig::Embedded(e) if e.file == Path::new("/tmp/a=b.db")));
    for (value, expected) in
        [("1", true), ("T", true), ("TRUE", true), ("0", false), ("f", false), ("False", false)]
    {
        assert_eq!(self::config(&[&format!("--netlink-monitor={value}")], &[]).netlink_monitor, expected);
    }
}

#[test]
fn variables_fill_what_the_command_line_leaves_out() {
    let variables = [
        ("FLANNELD_ETCD_ENDPOINTS", "https://a:2379, b:2379"),
        ("FLANNELD_IFACE", "eth0"),
        ("FLANNELD_PUBLIC_IP", ""),
        ("FLANNELD_ETCD_PREFIX", "/from/env"),
        ("WEFTD_RESYNC", "2"),
        ("WEFTD_RUN_DIR", "/run/other"),
        ("PATH", "/bin"),
        ("WEFTD_SERVICE_HOST", "10.96.0.9"),
        ("FLANNELD_PORT_8472_UDP_ADDR", "10.96.0.9"),
    ];
    let config = config(&["--etcd-prefix=/line", "--iface=eth1", "--iface=eth2"], &variables);
    assert_eq!(etcd(&config).endpoints, ["https://a:2379", "http://b:2379"]);
    assert_eq!(etcd(&config).prefix, "/line");
    let names: Vec<String> = config.underlay.ifaces.iter().map(|i| format!("{i:?}")).collect();
    assert_eq!(names, ["Name(eth1)", "Name(eth2)"]);
    assert_eq!(config.underlay.public_ip, None);
    assert_eq!(config.resync, Duration::from_secs(2));
    assert_eq!(config.cni_socket, Path::new("/run/other/cni.sock"));
    // One entry, never split.
    let error = run(&[], &[("FLANNELD_IFACE", "eth0,/eth1")]).expect_err("one name");
    assert_eq!(
        error.to_string(),
        "FLANNELD_IFACE = \"eth0,/eth1\": expected an interface's name or IPv4 address"
    );
    // An empty value on the command line hides the variable and means the default.
    assert_eq!(etcd(&self::config(&["--etcd-prefix="], &variables)).prefix, "/coreos.com/network");
}

#[test]
fn offloads_are_all_tried_but_those_switched_off() {
    let allowed = |config: Config| Offload::ALL.into_iter().filter(move |o| config.udp_offloads.allows(*o));
    assert_eq!(allowed(config(&[], &[])).count(), Offload::ALL.len());
    let args = ["--udp-offload-off=tun-tso, udp-gro", "--udp-offload-off", "vnet-hdr"];
    let left: Vec<_> = allowed(config(&args, &[])).map(Offload::name).collect();
    assert_eq!(left, ["tun-uso", "coalesce-tcp", "coalesce-udp", "udp-segment", "tun-nowait"]);
    let by_variable = config(&[], &[("WEFTD_UDP_OFFLOAD_OFF", "coalesce-tcp")]);
    assert!(!by_variable.udp_offloads.allows(Offload::CoalesceTcp));
    // The help and the refusal both list them all.
    let help = help::text();
    for offload in Offload::ALL {
        assert!(help.contains(offload.name()), "{offload} is not in the help");
    }
}

#[test]
fn refusals_name_setting_value_and_expectation() {
    for (args, variables, expected) in [
        (&["--resync=x"][..], &[][..], "--resync = \"x\": expected seconds, from 0.1 to 3600"),
        (&["--resync=0"], &[], "--resync = \"0\": expected"),
        (&[], &[("WEFTD_RESYNC", "x")], "WEFTD_RESYNC = \"x\": expected"),
        (
            &["-subnet-lease-renew-margin", "1440"],
            &[],
            "--subnet-lease-renew-margin = \"1440\": expected minutes from 1 to 1439",
        ),
        (&["--subnet-lease-renew-margin=0"], &[], "expected minutes from 1 to 1439"),
        (
            &["--subnet-lease-renew-margin=60", "--lease-ttl=1h"],
            &[],
            "which must be less than --lease-ttl (3600 s)",
        ),
        (
            &["--udp-offload-off=tso"],
            &[],
            "--udp-offload-off = \"tso\": expected comma-separated names of vnet-hdr, tun-tso, tun-uso, coalesce-tcp, \
             coalesce-udp, udp-segment, udp-gro, tun-nowait",
        ),
        (
            &[],
            &[("WEFTD_UDP_OFFLOAD_OFF", "udp-gro,,tun-tso")],
            "WEFTD_UDP_OFFLOAD_OFF = \"udp-gro,,tun-tso\": expected comma-separated names of vnet-hdr",
        ),
        (&["--lease-ttl=1s"], &[], "--lease-ttl = \"1s\": expected a duration of 2s or more"),
        (
            &["--expired-peer-grace=8d"],
            &[],
            "--expired-peer-grace = \"8d\": expected a duration from 0 to 168h such as 10m",
        ),
        (&[], &[("WEFTD_EXPIRED_PEER_GRACE", "169h")], "WEFTD_EXPIRED_PEER_GRACE = \"169h\": expected"),
        (&["--public-ip=fd00::1"], &[], "--public-ip = \"fd00::1\": expected an IPv4 address"),
        (
            &["--public-ip=127.0.0.1"],
            &[],
            "--public-ip = \"127.0.0.1\": expected an IPv4 address of a host, not loopback, multicast, broadcast or of \
             0.0.0.0/8",
        ),
        (&[], &[("FLANNELD_PUBLIC_IP", "127.9.9.9")], "FLANNELD_PUBLIC_IP = \"127.9.9.9\": expected"),
        (&["--public-ip=0.1.2.3"], &[], "--public-ip = \"0.1.2.3\": expected"),
        (&["--public-ip=224.0.0.9"], &[], "--public-ip = \"224.0.0.9\": expected"),
        (&["--public-ip=255.255.255.255"], &[], "--public-ip = \"255.255.255.255\": expected"),
        (&["--iface-can-reach=0.0.0.0"], &[], "--iface-can-reach"),
        (&["--iface=fd00::1"], &[], "--iface = \"fd00::1\": expected"),
        (&["--iface-regex=eth("], &[], "--iface-regex = \"eth(\": expected a regular expression"),
        (
            &["--etcd-endpoints=ftp://a:1"],
            &[],
            "--etcd-endpoints = \"ftp://a:1\": expected comma-separated URLs",
        ),
        (&["--etcd-endpoints=http://a"], &[], "--etcd-endpoints"),
        (&["--etcd-endpoints=http://me:pw@a:2379"], &[], "without user"),
        (&["--etcd-endpoints=http://a:1,"], &[], "--etcd-endpoints"),
        (&["--etcd-prefix=/a/../b"], &[], "--etcd-prefix"),
        (&["--etcd-certfile=/c"], &[], "--etcd-certfile: --etcd-keyfile must be given as well"),
        (
            &[],
            &[("FLANNELD_ETCD_PASSWORD", "pw")],
            "FLANNELD_ETCD_PASSWORD: --etcd-username must be given as well",
        ),
        (
            &["--etcd-endpoints=http://a:1,b:1"],
            &[("FLANNELD_ETCD_CAFILE", "/ca")],
            "--etcd-endpoints = \"http://a:1,b:1\": expected https:// URLs, since FLANNELD_ETCD_CAFILE is given",
        ),
        (
            &["--etcd-cafile=/ca"],
            &[],
            "--etcd-endpoints = \"http://127.0.0.1:4001,http://127.0.0.1:2379\": expected https://",
        ),
        (&["--store=redis"], &[], "--store = \"redis\": expected etcd, embedded or embedded=FILE"),
        (&["--store=embedded=rel.db"], &[], "--store = \"embedded=rel.db\""),
        (
            &["--store=embedded"],
            &[("FLANNELD_ETCD_PREFIX", "/a")],
            "FLANNELD_ETCD_PREFIX: only for --store etcd",
        ),
        (&["--net-config=/f"], &[], "--net-config: only for --store embedded"),
        (&["--netlink-monitor=maybe"], &[], "--netlink-monitor = \"maybe\": expected true or false"),
        (&["--admin-listen=:9474"], &[], "--admin-listen = \":9474\": expected an address and port"),
        (&["--log-format=xml"], &[], "--log-format"),
        (&["-v=loud"], &[], "-v = \"loud\": expected a whole number"),
        (&["-v=4", "--log-level=info"], &[], "--log-level: -v (FLANNELD_V) says the same"),
        (&["--run-dir=run"], &[], "--run-dir = \"run\": expected an absolute path"),
        (&["--node-name=a b"], &[], "--node-name"),
        (&["--iface"], &[], "--iface needs a value: expected NAME|IP"),
        (&["eth0"], &[], "unexpected argument \"eth0\""),
        (
            &["--netlink-monitor", "false"],
            &[],
            "unexpected argument \"false\": weftd takes options only, and a switch's value is written --x=false",
        ),
        (&["--"], &[], "unexpected argument \"--\""),
        (&["---iface=a"], &[], "unexpected argument"),
        (&["--iface-regx=a"], &[], "--iface-regx is no setting of weftd; did you mean --iface-regex?"),
        (&["--etcd_endpoints=a"], &[], "did you mean --etcd-endpoints?"),
        (&["--frobnicate"], &[], "--frobnicate is no setting of weftd"),
        (
            &[],
            &[("FLANNELD_ETCD_ENDPOINT", "a")],
            "FLANNELD_ETCD_ENDPOINT is no setting of weftd; did you mean FLANNELD_ETCD_ENDPOINTS?",
        ),
        (&[], &[("WEFTD_IFACE", "a")], "WEFTD_IFACE is no setting of weftd; did you mean FLANNELD_IFACE?"),
        (
            &["--ip-blackhole-route"],
            &[],
            "--ip-blackhole-route is a setting of flannel's that this version of weftd does not have",
        ),
        (&["--kube-api-url=https://10.0.0.1:6443"], &[], "--kube-api-url: only with --kube-subnet-mgr"),
        (&["--net-config-path=/x"], &[], "--net-config-path: only with --kube-subnet-mgr"),
        (&["--set-node-network-unavailable=x"], &[], "\"x\": expected true or false"),
        (&["--ip-masq=maybe"], &[], "--ip-masq = \"maybe\": expected true or false"),
        (
            &["--ip-masq", "--ip-masq-exclude=10.0.0.0/8,x"],
            &[],
            "--ip-masq-exclude = \"10.0.0.0/8,x\": expected comma-separated IPv4 networks",
        ),
        (&["--ip-masq-exclude=10.0.0.0/8"], &[], "--ip-masq-exclude: only with --ip-masq"),
        (&["--iptables-resync=0"], &[], "--iptables-resync = \"0\": expected whole seconds from 1 to 3600"),
        (&["--healthz-port=1"], &[], "does not have; use --admin-listen=ADDRESS:PORT"),
        (&[], &[("FLANNELD_PUBLIC_IPV6", "fd00::1")], "FLANNELD_PUBLIC_IPV6 is a setting of flannel's"),
        (&[], &[("FLANNELD_LOG_BACKTRACE_AT", "x:1")], "FLANNELD_LOG_BACKTRACE_AT is a setting of flannel's"),
    ] {
        let error = run(args, variables).expect_err(&format!("{args:?} {variables:?}")).to_string();
        assert!(
            error.contains(expected),
            "{args:?} {variables:?}\n  gave     {error}\n  expected {expected}"
        );
    }
    assert!(
        run(&[], &[("FLANNELD_IP_BLACKHOLE_ROUTE", ""), ("FLANNELD_NO_SUCH", "")]).is_ok(),
        "empty is unset"
    );
}

#[test]
fn what_weftd_has_not_may_be_off() {
    let switches = ["ip-blackhole-route"];
    let refused = |args: &[&str], variables: &[(&str, &str)]| {
        let error = run(args, variables).expect_err(&format!("{args:?} {variables:?}"));
        assert!(matches!(error, UsageError::NotYet { .. }), "{error}");
    };
    for name in switches {
        let variable = options::Origin::Flannel.variable(name);
        for off in ["0", "f", "F", "false", "FALSE", "False"] {
            config(&[&format!("--{name}={off}")], &[]);
            config(&[], &[(&variable, off)]);
        }
        for on in ["true", "1", "no", "off"] {
            refused(&[&format!("-{name}={on}")], &[]);
            refused(&[], &[(&variable, on)]);
        }
        refused(&[&format!("--{name}")], &[]);
        refused(&[&format!("--{name}=")], &[]);
        refused(&[&format!("--{name}=false"), &format!("--{name}")], &[]);
        // As everywhere, the command line wins.
        config(&[&format!("--{name}=false")], &[(&variable, "true")]);
    }
    config(&["--healthz-port=0", "--resync=2"], &[]);
    assert_eq!(config(&["-healthz-port", "0", "--resync=2"], &[]).resync, Duration::from_secs(2));
    config(&[], &[("FLANNELD_HEALTHZ_PORT", "0")]);
    refused(&["--healthz-port"], &[]);
    refused(&["--healthz-port", "8080"], &[]);
    refused(&["--healthz-port=false"], &[]);
    refused(&["--healthz-ip=0"], &[]);
    refused(&["--vmodule=false"], &[]);
    refused(&[], &[("WEFTD_IP_BLACKHOLE_ROUTE", "false")]);
}

#[cfg(feature = "kube")]
#[test]
fn with_kube_subnet_mgr_the_cluster_is_the_store() {
    use crate::lease::kube::{NodeIdentity, Prefix};

    let kube = |args: &[&str], variables: &[(&str, &str)]| {
        let args = [&["--kube-subnet-mgr"], args].concat();
        match config(&args, variables).store {
            StoreConfig::Kube(kube) => *kube,
            other => panic!("{other:?}"),
        }
    };
    // As kube-flannel's manifest starts it.
    let by_manifest = kube(
        &["--ip-masq"],
        &[
            ("POD_NAME", "kube-flannel-ds-x"),
            ("POD_NAMESPACE", "kube-flannel"),
            ("EVENT_QUEUE_DEPTH", "5000"),
            ("CONT_WHEN_CACHE_NOT_READY", "false"),
        ],
    );
    assert_eq!(
        by_manifest,
        KubeConfig {
            kubeconfig: None,
            api_url: None,
            prefix: Prefix::parse("flannel.alpha.coreos.com").expect("prefix"),
            net_config: "/etc/kube-flannel/net-conf.json".into(),
            node: NodeIdentity::OfPod { namespace: "kube-flannel".into(), name: "kube-flannel-ds-x".into() },
            set_network_available: true,
            policy_check: Some(Duration::from_secs(600)),
        }
    );
    let pod = [("NODE_NAME", "worker-1"), ("POD_NAME", "p"), ("POD_NAMESPACE", "n")];
    let args = [
        "--kubeconfig-file=/etc/k",
        "--kube-api-url",
        "https://10.0.0.1:6443/",
        "--kube-annotation-prefix=org.com/x",
        "--net-config-path=/n.json",
        "--set-node-network-unavailable=false",
    ];
    let all = kube(&args, &pod);
    assert_eq!(all.node, NodeIdentity::Name("worker-1".into()), "NODE_NAME wins over the pod");
    assert_eq!(all.kubeconfig.as_deref(), Some(Path::new("/etc/k")));
    assert_eq!(all.api_url.as_deref(), Some("https://10.0.0.1:6443"));
    assert_eq!(Some(all.prefix), Prefix::parse("org.com/x"));
    assert!(!all.set_network_available && all.net_config == Path::new("/n.json"));
    for (given, period) in [("0", None), ("1h", Some(Duration::from_secs(3600)))] {
        assert_eq!(kube(&["--network-policy-check", given], &pod).policy_check, period, "{given}");
    }
    assert_eq!(kube(&["--node-name=w2"], &pod).node, NodeIdentity::Name("w2".into()));
    assert_eq!(config(&["--kube-subnet-mgr"], &pod).node_name, "worker-1");
    let by_variable = [("FLANNELD_KUBE_SUBNET_MGR", "true"), ("NODE_NAME", "w")];
    assert!(matches!(config(&[], &by_variable).store, StoreConfig::Kube(_)));
    assert!(matches!(config(&["--kube-subnet-mgr=false"], &by_variable).store, StoreConfig::Etcd(_)));

    for (arg, expected) in [
        (
            "--kube-annotation-prefix=org/a/b",
            "expected a prefix in the format fqdn/[0-9a-z-_]*, with at most a single slash",
        ),
        (
            "--kube-api-url=10.0.0.1:6443",
            "--kube-api-url = \"10.0.0.1:6443\": expected a URL such as https://10.0.0.1:6443",
        ),
        ("--kube-api-url=https://me@10.0.0.1", "expected a URL"),
        ("--net-config-path=net.json", "expected an absolute path"),
        ("--network-policy-check=10ms", "expected 0, or a duration from 1s to 168h such as 10m"),
        ("--network-policy-check=off", "--network-policy-check = \"off\": expected 0, or a duration"),
        ("--etcd-prefix=/x", "--etcd-prefix: means nothing with --kube-subnet-mgr"),
        ("--store=embedded", "--store: means nothing with --kube-subnet-mgr"),
        ("--lease-ttl=1h", "--lease-ttl: means nothing with --kube-subnet-mgr"),
    ] {
        let error = run(&["--kube-subnet-mgr", arg], &pod).expect_err(arg).to_string();
        assert!(error.contains(expected), "{arg}: {error}");
    }
    for variables in [&[][..], &[("POD_NAME", "p")], &[("NODE_NAME", "")]] {
        let error = run(&["--kube-subnet-mgr"], variables).expect_err("no Node").to_string();
        assert!(error.starts_with("--kube-subnet-mgr: which Node is this?"), "{error}");
    }
    let error = run(&["--kube-subnet-mgr"], &[("NODE_NAME", "a b")]).expect_err("no name").to_string();
    assert_eq!(error, "NODE_NAME = \"a b\": expected a Node's name");
}

#[cfg(not(feature = "kube"))]
#[test]
fn without_its_feature_the_kubernetes_store_is_refused() {
    let error = run(&["--kube-subnet-mgr"], &[("NODE_NAME", "a")]).expect_err("no such store").to_string();
    assert!(
        error.starts_with("--kube-subnet-mgr: this weftd was built without the cargo feature kube"),
        "{error}"
    );
}

#[test]
fn masquerade_and_forwarding_are_flannels() {
    let of = |args: &[&str]| config(args, &[]).firewall;
    let off = of(&[]);
    assert_eq!(off, crate::firewall::Settings::default());
    assert!(!off.masquerade && off.fully_random && off.forward);
    assert_eq!(off.legacy_period, Duration::from_secs(5));
    let on = of(&[
        "-ip-masq",
        "--ip-masq-fully-random-disable",
        "--iptables-forward-rules=false",
        "--iptables-resync=30",
        "--ip-masq-exclude=172.16.0.0/12, 192.168.0.0/16",
        "--ip-masq-exclude=10.9.0.0/16",
    ]);
    let never: Vec<String> = on.never_masqueraded.iter().map(ToString::to_string).collect();
    assert_eq!(never, ["172.16.0.0/12", "192.168.0.0/16", "10.9.0.0/16"]);
    assert!(on.masquerade && !on.fully_random && !on.forward);
    assert_eq!(on.legacy_period, Duration::from_secs(30));
    let by_variable = config(&[], &[("FLANNELD_IP_MASQ", "true"), ("WEFTD_IP_MASQ_EXCLUDE", "10.9.0.0/16")]);
    assert_eq!(by_variable.firewall.never_masqueraded.len(), 1);
}

#[test]
fn times_and_levels() {
    assert_eq!(config(&["--lease-ttl=10s"], &[]).renew_margin, Duration::from_secs(5));
    assert_eq!(config(&["--subnet-lease-renew-margin=1439"], &[]).renew_margin, Duration::from_secs(86_340));
    assert_eq!(config(&["--lease-ttl=1h30m"], &[]).lease_ttl, Duration::from_secs(5400));
    assert_eq!(config(&["--expired-peer-grace=0"], &[]).expired_peer_grace, Duration::ZERO);
    assert_eq!(config(&["--resync=500ms"], &[]).resync, Duration::from_millis(500));
    assert_eq!(config(&["--resync=0.5"], &[]).resync, Duration::from_millis(500));
    for (v, level) in [("0", Level::INFO), ("2", Level::INFO), ("4", Level::DEBUG), ("10", Level::TRACE)] {
        assert_eq!(config(&["-v", v], &[]).log_level, level);
    }
    assert!(config(&["--admin-listen=off"], &[]).admin_listen.is_none());
}

#[test]
fn no_password_in_a_log() {
    let config = config(&["--etcd-username=me"], &[("FLANNELD_ETCD_PASSWORD", "hunter2")]);
    assert_eq!(etcd(&config).login.as_ref().map(|l| l.password.0.as_str()), Some("hunter2"));
    assert!(!format!("{config:?}").contains("hunter2"));
    let bare = self::config(&["--etcd-cafile=/ca", "--etcd-endpoints=a:2379"], &[]);
    assert_eq!(etcd(&bare).endpoints, ["https://a:2379"]);
}

#[test]
fn help_and_version_come_before_any_refusal() {
    let print = |args: &[&str]| match read(
        args.iter().map(|a| (*a).to_owned()),
        [("FLANNELD_IP_BLACKHOLE_ROUTE".into(), "true".into())],
        "n",
    ) {
        Ok(Invocation::Print(text)) => text,
        other => panic!("{other:?}"),
    };
    assert_eq!(print(&["-version"]), format!("weftd {}\n", env!("CARGO_PKG_VERSION")));
    let help = print(&["--iface=x", "-h"]);
    for opt in options::OPTIONS {
        assert!(help.contains(&format!("[{}]", opt.variable())), "{} is not in the help", opt.name);
    }
    assert!(help.lines().all(|line| line.len() <= 120), "{help}");
}

/// Every option stands in `conf/weftd.env`, commented out, with its default as value; set is masquerade alone, as in
/// what flannel ships.
#[test]
fn the_shipped_environment_file_is_complete_and_true() {
    let text = include_str!("../../../conf/weftd.env");
    let mut lines = Vec::new();
    let set: Vec<&str> = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    assert_eq!(set, ["FLANNELD_IP_MASQ=true"]);
    for line in text.lines() {
        let Some(bare) = line.strip_prefix('#') else { continue };
        if options::Origin::ALL.iter().any(|origin| bare.starts_with(origin.prefix())) {
            lines.push(bare.split_once('=').expect(line));
        }
    }
    for opt in options::OPTIONS.iter().filter(|o| !matches!(o.name, "version" | "ip-masq")) {
        let line = lines.iter().find(|(name, _)| *name == opt.variable());
        assert_eq!(line.map(|(_, value)| *value), Some(opt.default), "{}", opt.variable());
    }
    // Uncommented as it stands, it changes nothing.
    assert_eq!(format!("{:?}", config(&[], &lines)), format!("{:?}", config(&[], &[])));
}

#[test]
fn the_shipped_network_configuration_is_valid() {
    let text = include_str!("../../../conf/net-conf.json");
    let config = weft_shared::netconf::NetworkConfig::parse(text).expect("valid");
    assert_eq!((config.v4.network.to_string().as_str(), config.backend.kind()), ("10.5.0.0/16", "vxlan"));
}

#[test]
fn the_shipped_conflist_names_the_plugin() {
    let text = include_str!("../../../conf/10-weft.conflist");
    let list: serde_json::Value = serde_json::from_str(text).expect("JSON");
    let types: Vec<_> =
        list["plugins"].as_array().expect("plugins").iter().map(|p| p["type"].as_str()).collect();
    assert_eq!(types, [Some("weft")]);
    assert_eq!((list["name"].as_str(), list["cniVersion"].as_str()), (Some("weft"), Some("1.0.0")));
    for capability in ["ips", "portMappings", "bandwidth"] {
        assert_eq!(list["plugins"][0]["capabilities"][capability], true, "{capability}");
    }
}
