//! Against nf_tables itself, with nft and iptables as foreign hands and independent readers. Each test has a network
//! namespace of its own; root is needed, and a refusal is a failure.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::firewall::{self, Networks, PartKey, Settings};

fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own needs root");
        test();
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `sh -c` and returns what it prints.
fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).stdin(Stdio::null()).output().expect("sh");
    let (said, cried) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}: {cried}");
    said.into_owned()
}

fn networks() -> Networks {
    let net = |text: &str| text.parse().expect(text);
    Networks { overlay: vec![net("10.5.0.0/16")], local: vec![net("10.5.1.0/24")], ..Networks::default() }
}

fn settings() -> Settings {
    Settings {
        masquerade: true,
        never_masqueraded: vec!["172.16.0.0/12".parse().expect("net")],
        ..Settings::default()
    }
}

/// What is wanted and not there, or there and not wanted, as the reconciler finds it.
fn wrong(firewall: &mut Firewall, settings: &Settings) -> Vec<(PartKey, bool)> {
    wrong_for(firewall, settings, &networks())
}

fn wrong_for(firewall: &mut Firewall, settings: &Settings, networks: &Networks) -> Vec<(PartKey, bool)> {
    let seen = firewall.look(settings.legacy_period).expect("look");
    let desired = firewall::desired(settings, networks, &seen);
    let found: Vec<Part> = firewall::found(&seen).collect();
    let missing = desired.iter().filter(|part| !found.contains(part));
    let spare = found.iter().filter(|part| desired.iter().all(|wanted| wanted.key() != part.key()));
    missing.map(|part| (part.key(), true)).chain(spare.map(|part| (part.key(), false))).collect()
}

fn mend(firewall: &mut Firewall, settings: &Settings) {
    mend_for(firewall, settings, &networks());
    assert_eq!(wrong(firewall, settings), []);
}

fn mend_for(firewall: &mut Firewall, settings: &Settings, networks: &Networks) {
    let seen = firewall.look(settings.legacy_period).expect("look");
    let (desired, found) = (firewall::desired(settings, networks, &seen), firewall::found(&seen).collect());
    for (key, set) in wrong_for(firewall, settings, networks) {
        let parts: &Vec<Part> = if set { &desired } else { &found };
        let part = parts.iter().find(|part| part.key() == key).unwrap_or_else(|| panic!("{key}"));
        let done = if set { firewall.set(part, || Ok(BTreeSet::new())) } else { firewall.remove(part) };
        done.unwrap_or_else(|e| panic!("{key}: {e}"));
    }
}

#[test]
fn our_tables_are_made_whole_and_every_alteration_is_seen_and_mended() {
    in_namespace(|| {
        let (mut firewall, settings) = (Firewall::default(), settings());
        assert_eq!(wrong(&mut firewall, &settings).len(), 1);
        mend(&mut firewall, &settings);
        let listed = sh("nft -n -s list table ip flannel-ipv4");
        let rules: Vec<&str> =
            listed.lines().map(str::trim).filter(|l| l.contains("counter") || l.contains("hook")).collect();
        assert_eq!(
            rules,
            [
                "type filter hook forward priority 0; policy accept;",
                "ip saddr 10.5.0.0/16 counter accept",
                "ip daddr 10.5.0.0/16 counter accept",
                "type nat hook postrouting priority 100; policy accept;",
                "meta mark & 0x00004000 == 0x00004000 counter return",
                "ip saddr 10.5.1.0/24 ip daddr 10.5.0.0/16 counter return",
                "ip saddr 10.5.0.0/16 ip daddr 10.5.1.0/24 counter return",
                "ip saddr != 10.5.0.0/16 ip daddr 10.5.1.0/24 counter return",
                "ip saddr 10.5.0.0/16 ip daddr 172.16.0.0/12 counter return",
                "ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade fully-random",
                "ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 counter masquerade fully-random",
            ],
            "{listed}"
        );
        let second = "$(nft -a list chain ip flannel-ipv4 postrtg | sed -n 's/.*10.5.1.0.24 ip daddr.*handle //p' | head -1)";
        for hand in [
            "nft flush ruleset".to_owned(),
            "nft delete table ip flannel-ipv4".to_owned(),
            "nft flush chain ip flannel-ipv4 postrtg".to_owned(),
            "nft delete chain ip flannel-ipv4 forward".to_owned(),
            format!("nft delete rule ip flannel-ipv4 postrtg handle {second}"),
            format!(
                "nft replace rule ip flannel-ipv4 postrtg handle {second} ip saddr 10.5.2.0/24 ip daddr 10.5.0.0/16 counter return"
            ),
            "nft insert rule ip flannel-ipv4 postrtg masquerade".to_owned(),
            "nft add rule ip flannel-ipv4 forward drop".to_owned(),
            "nft add chain ip flannel-ipv4 spare".to_owned(),
            "nft chain ip flannel-ipv4 forward '{ policy drop; }'".to_owned(),
            "nft add table ip flannel-ipv4 '{ flags dormant; }'".to_owned(),
        ] {
            sh(&hand);
            assert_eq!(wrong(&mut firewall, &settings).len(), 1, "{hand}");
            mend(&mut firewall, &settings);
            assert_eq!(sh("nft -n -s list table ip flannel-ipv4"), listed, "{hand}");
        }
        // Nothing wanted: the table goes.
        mend(&mut firewall, &Settings { masquerade: false, forward: false, ..settings });
        assert_eq!(sh("nft list ruleset"), "");
    });
}

#[test]
fn a_quiet_ruleset_is_not_listed_again_however_long_it_is() {
    in_namespace(|| {
        let (mut firewall, settings) = (Firewall::default(), settings());
        let rules: String = (0..5000)
            .map(|n| format!("add rule ip nat KUBE-SVC ip daddr 10.96.{}.{} return\n", n / 250, n % 250))
            .collect();
        let script =
            format!("add table ip nat\nadd chain ip nat KUBE-SERVICES\nadd chain ip nat KUBE-SVC\n{rules}");
        let file = format!("/tmp/weft-nft-{}", std::process::id());
        std::fs::write(&file, script).expect("write");
        sh(&format!("nft -f {file}; rm {file}"));
        mend(&mut firewall, &settings);
        assert!(firewall.look(settings.legacy_period).expect("look").kube_proxy);
        let listed = firewall.listed;
        for _ in 0..100 {
            assert_eq!(wrong(&mut firewall, &settings), []);
        }
        assert_eq!(firewall.listed, listed, "a look at an unchanged ruleset listed something");
        sh("nft add table ip another");
        assert_eq!(wrong(&mut firewall, &settings), []);
        assert_eq!(firewall.listed, listed + 1);
    });
}

/// A foreign chain, where in it ours belong (rules of others before ours), and what iptables says of it.
#[test]
fn accepts_stand_in_the_chain_that_drops_behind_decisions_and_before_the_catch_all() {
    for (hand, chain, before) in [
        ("iptables-nft -P FORWARD DROP", "ip filter FORWARD", 0),
        (
            "iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -s 10.5.9.0/24 -j DROP",
            "ip filter FORWARD",
            1,
        ),
        (
            "iptables-nft -A FORWARD -m conntrack --ctstate INVALID -j DROP; iptables-nft -A FORWARD -j REJECT; iptables-nft -A FORWARD -s 1.2.3.4 -j ACCEPT",
            "ip filter FORWARD",
            1,
        ),
        (
            "iptables-nft -N TAIL; iptables-nft -A TAIL -m comment --comment 'all the rest' -j DROP; iptables-nft -A FORWARD -i lo -j ACCEPT; iptables-nft -A FORWARD -j TAIL",
            "ip filter FORWARD",
            1,
        ),
        (
            "nft add table inet f; nft 'add chain inet f onward { type filter hook forward priority 10; policy drop; }'; nft add rule inet f onward ct state invalid drop",
            "inet f onward",
            1,
        ),
        (
            "nft add table inet f; nft 'add chain inet f onward { type filter hook forward priority 0; }'; nft add rule inet f onward iif lo accept; nft add rule inet f onward meta nfproto ipv4 counter log prefix '\"no \"' drop",
            "inet f onward",
            1,
        ),
        (
            "nft add table ip f; nft 'add chain ip f onward { type filter hook forward priority 0; }'; nft 'add rule ip f onward reject with icmp type admin-prohibited'",
            "ip f onward",
            0,
        ),
    ] {
        in_namespace(move || {
            let (mut firewall, settings) = (Firewall::default(), settings());
            mend(&mut firewall, &settings);
            sh(hand);
            let (key, _) = wrong(&mut firewall, &settings).pop().expect(hand);
            assert_eq!(key.to_string(), format!("accept rules in nftables chain {chain}"), "{hand}");
            let place = |what: &str| {
                let listed = sh(&format!("nft -s list chain {chain}"));
                let rules: Vec<String> =
                    listed.lines().skip(3).map(str::to_owned).filter(|l| l.starts_with("\t\t")).collect();
                let ours: Vec<usize> = rules
                    .iter()
                    .enumerate()
                    .filter(|(_, r)| r.contains("weft forward"))
                    .map(|(n, _)| n)
                    .collect();
                assert_eq!(ours, [before, before + 1], "{hand}, {what}: {listed}");
            };
            mend(&mut firewall, &settings);
            place("first");
            // Ours are to be the only ones, and none behind what drops.
            sh(&format!("nft add rule {chain} ip daddr 10.5.0.0/16 accept comment '\"weft forward\"'"));
            assert_eq!(wrong(&mut firewall, &settings).len(), 1, "{hand}: a third");
            mend(&mut firewall, &settings);
            place("one too many");
            let handle =
                format!("$(nft -a list chain {chain} | sed -n 's/.*weft forward.*handle //p' | head -1)");
            sh(&format!("nft delete rule {chain} handle {handle}"));
            mend(&mut firewall, &settings);
            place("one deleted");
            sh(&format!(
                "nft replace rule {chain} handle {handle} ip saddr 10.6.0.0/16 accept comment '\"weft forward\"'"
            ));
            mend(&mut firewall, &settings);
            place("one altered");
            sh(&format!("nft insert rule {chain} drop"));
            assert_eq!(wrong(&mut firewall, &settings).len(), 1, "{hand}: a catch-all before ours");
            mend(&mut firewall, &settings);
            let moved = sh(&format!("nft -s list chain {chain}"));
            assert!(moved.find("weft forward") < moved.find("\t\tdrop"), "{moved}");
            sh(&format!(
                "nft delete rule {chain} handle $(nft -a list chain {chain} | sed -n 's/^\t\tdrop # handle //p')"
            ));
            mend(&mut firewall, &settings);
            place("the catch-all gone again");
            if chain == "ip filter FORWARD" {
                let saved = sh("iptables-nft -S FORWARD");
                assert_eq!(
                    saved.matches("-m comment --comment \"weft forward\" -j ACCEPT").count(),
                    2,
                    "{saved}"
                );
                // What iptables-nft writes back is still ours.
                sh(
                    "iptables-nft-save > /tmp/weft-save-$$; iptables-nft-restore /tmp/weft-save-$$; rm /tmp/weft-save-$$",
                );
                assert_eq!(wrong(&mut firewall, &settings), [], "{}", sh("iptables-nft-save"));
            }
            // Nothing of ours is left where it is not wanted.
            mend(&mut firewall, &Settings { masquerade: false, forward: false, ..settings });
            assert!(!sh("nft list ruleset").contains("weft"));
        });
    }
}

#[test]
fn a_chain_that_drops_no_more_loses_our_rules() {
    in_namespace(|| {
        let (mut firewall, settings) = (Firewall::default(), settings());
        sh("iptables-nft -P FORWARD DROP");
        mend(&mut firewall, &settings);
        assert_eq!(sh("iptables-nft -S FORWARD").lines().count(), 3);
        sh("iptables-nft -P FORWARD ACCEPT");
        assert!(matches!(&wrong(&mut firewall, &settings)[..], [(PartKey::Accepts(_), false)]));
        mend(&mut firewall, &settings);
        assert_eq!(sh("iptables-nft -S FORWARD"), "-P FORWARD ACCEPT\n");
    });
}

#[test]
fn iptables_legacy_is_mended_by_its_own_programs_and_only_where_it_is_in_use() {
    in_namespace(|| {
        let settings = Settings { legacy_period: std::time::Duration::ZERO, ..settings() };
        let mut firewall = Firewall::default();
        mend(&mut firewall, &settings);
        assert_eq!(firewall.look(settings.legacy_period).expect("look").legacy, LegacyFilter::Unused);
        let legacy = |rule: &str| sh(&format!("iptables-legacy -w {rule}"));
        legacy("-P FORWARD DROP");
        legacy("-N TAIL");
        legacy("-A TAIL -j REJECT");
        legacy("-A FORWARD -s 10.5.9.0/24 -j DROP");
        legacy("-A FORWARD -j TAIL");
        mend(&mut firewall, &settings);
        let ours = "-A FORWARD -s 10.5.0.0/16 -m comment --comment \"weft forward\" -j ACCEPT\n\
                    -A FORWARD -d 10.5.0.0/16 -m comment --comment \"weft forward\" -j ACCEPT\n";
        let right = format!("-P FORWARD DROP\n-A FORWARD -s 10.5.9.0/24 -j DROP\n{ours}-A FORWARD -j TAIL\n");
        assert_eq!(legacy("-S FORWARD"), right);
        for hand in [
            "-D FORWARD 2",
            "-I FORWARD -j DROP",
            "-R FORWARD 2 -s 10.6.0.0/16 -m comment --comment \"weft forward\" -j ACCEPT",
        ] {
            legacy(hand);
            assert_eq!(wrong(&mut firewall, &settings).len(), 1, "{hand}");
            mend(&mut firewall, &settings);
            if hand.starts_with("-I") {
                assert_eq!(
                    legacy("-S FORWARD").lines().nth(1),
                    Some("-A FORWARD -s 10.5.0.0/16 -m comment --comment \"weft forward\" -j ACCEPT")
                );
                legacy("-D FORWARD -j DROP");
                legacy("-F FORWARD");
                legacy("-A FORWARD -s 10.5.9.0/24 -j DROP");
                legacy("-A FORWARD -j TAIL");
                mend(&mut firewall, &settings);
            }
            assert_eq!(legacy("-S FORWARD"), right, "{hand}");
        }
        legacy("-F FORWARD");
        legacy("-P FORWARD ACCEPT");
        mend(&mut firewall, &settings);
        assert_eq!(legacy("-S FORWARD"), "-P FORWARD ACCEPT\n");
    });
}

#[test]
fn rules_that_a_flanneld_left_are_seen_in_both_packet_filters() {
    for (program, legacy) in [("iptables-nft", false), ("iptables-legacy", true)] {
        in_namespace(move || {
            sh(&format!(
                "{program} -t nat -N FLANNEL-POSTRTG
                 {program} -t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG
                 {program} -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment 'flanneld masq' -j RETURN
                 {program} -t nat -A FLANNEL-POSTRTG -s 10.5.1.0/24 -d 10.5.0.0/16 -m comment --comment 'flanneld masq' -j RETURN
                 {program} -t nat -A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.1.0/24 -m comment --comment 'flanneld masq' -j RETURN
                 {program} -t nat -A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment 'flanneld masq' -j MASQUERADE --random-fully"
            ));
            let seen = Firewall::default().look(settings().legacy_period).expect("look");
            let pair = ("10.5.1.0/24".parse().expect("net"), "10.5.0.0/16".parse().expect("net"));
            assert_eq!(seen.left, [Leftover { legacy, spared: vec![pair] }]);
        });
    }
}

#[test]
fn a_change_between_look_and_commit_is_not_written_over() {
    in_namespace(|| {
        sh("iptables-nft -P FORWARD DROP");
        let mut socket = NftSocket::open().expect("socket");
        let generation = socket.generation().expect("generation");
        sh("iptables-nft -A FORWARD -s 1.2.3.4 -j DROP");
        let chain = ChainId::new(Family::Ip, "filter", "FORWARD");
        let rule = Rule::new(vec![], Expr::Accept);
        let refused = socket.commit(vec![new_rule(&chain, &rule, None)], Some(generation));
        assert_eq!(refused, Err(KernelError::Refused(Errno(nix::libc::ERESTART))));
        assert!(!sh("iptables-nft -S FORWARD").contains("-j ACCEPT"));
    });
}

#[test]
fn who_enforces_network_policies_is_seen_for_as_long_as_its_chain_is_there() {
    in_namespace(|| {
        let (mut firewall, period) = (Firewall::default(), settings().legacy_period);
        let mut seen = || {
            let look = firewall.look(period).expect("look");
            look.enforcers.into_iter().map(|(name, sign)| format!("{name}: {sign}")).collect::<Vec<_>>()
        };
        sh("iptables-nft -N KUBE-FORWARD; iptables-nft -N FLANNEL-FWD; ip6tables-nft -N cali-FORWARD");
        assert_eq!(seen(), Vec::<String>::new());
        sh("iptables-nft -N cali-FORWARD; iptables-nft -A FORWARD -j cali-FORWARD");
        sh("nft add table inet kube-network-policies");
        let calico = "Calico: nftables chain ip filter cali-FORWARD";
        assert_eq!(seen(), [calico], "a table alone enforces nothing");
        sh(
            "nft add chain inet kube-network-policies postrouting '{ type filter hook postrouting priority 95; }'",
        );
        let theirs = "kube-network-policies: nftables chain inet kube-network-policies postrouting";
        assert_eq!(seen(), [calico, theirs]);
        sh("nft add table inet kube-network-policies '{ flags dormant; }'");
        assert_eq!(seen(), [calico], "a table that sleeps enforces nothing");
        sh("nft delete table inet kube-network-policies; iptables-nft -F; iptables-nft -X cali-FORWARD");
        assert_eq!(seen(), Vec::<String>::new());
    });
}

#[test]
fn random_ports_are_given_up_when_the_kernel_refuses_them_and_only_then() {
    let table = |fully_random| {
        let seen = Ruleset { fully_random, ..Ruleset::default() };
        let desired = firewall::desired(&settings(), &networks(), &seen);
        match desired.first() {
            Some(Part::Table { chains, .. }) => chains.clone(),
            other => panic!("{other:?}"),
        }
    };
    let (random, plain) = (table(true), table(false));
    let refuse = |errno: i32| {
        let plain = plain.clone();
        move |chains: &[Chain]| match *chains == plain {
            true => Ok(()),
            false => Err(KernelError::Refused(Errno(errno))),
        }
    };
    assert_ne!(random, plain);
    assert_eq!(commit_what_is_known(&random, |_| Ok(())), Ok(true));
    assert_eq!(commit_what_is_known(&random, refuse(nix::libc::EINVAL)), Ok(false));
    assert_eq!(commit_what_is_known(&random, refuse(nix::libc::EOPNOTSUPP)), Ok(false));
    let busy = KernelError::Refused(Errno(nix::libc::EBUSY));
    assert_eq!(commit_what_is_known(&random, refuse(nix::libc::EBUSY)), Err(busy));
    // Refused for another reason: there is nothing to give up.
    let never = KernelError::Refused(Errno(nix::libc::EINVAL));
    assert_eq!(commit_what_is_known(&plain, |_| Err(never.clone())), Err(never.clone()));
}

#[test]
fn nothing_of_ours_is_left_anywhere_when_we_leave_and_nothing_of_others_is_taken() {
    in_namespace(|| {
        let settings = Settings { legacy_period: Duration::ZERO, ..settings() };
        let all = "nft -s list ruleset; iptables-legacy -w 5 -S; iptables-legacy -w 5 -t nat -S";
        sh("iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -i lo -j ACCEPT
            iptables-legacy -w 5 -P FORWARD DROP; iptables-legacy -w 5 -A FORWARD -i lo -j ACCEPT
            iptables-legacy -w 5 -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
            nft add table inet host
            nft 'add chain inet host onward { type filter hook forward priority 5; policy drop; }'
            nft add rule inet host onward tcp dport 22 accept comment '\"mine\"'");
        let before = sh(all);
        mend(&mut Firewall::default(), &settings);
        assert_eq!(sh(all).matches("weft forward").count(), 6);
        // Another process, which knows nothing of what the first did.
        let mut leaving = Firewall::default();
        let ours = |leaving: &mut Firewall| -> Vec<Part> {
            let seen = leaving.look(settings.legacy_period).expect("look");
            firewall::found(&seen).collect()
        };
        let parts = ours(&mut leaving);
        let names: Vec<String> = parts.iter().map(|part| part.key().to_string()).collect();
        assert_eq!(
            names,
            [
                "nftables table ip flannel-ipv4",
                "accept rules in nftables chain ip filter FORWARD",
                "accept rules in nftables chain inet host onward",
                "accept rules in iptables-legacy FORWARD",
            ]
        );
        for part in &parts {
            leaving.remove(part).expect("removal");
        }
        assert_eq!(sh(all), before);
        assert_eq!(ours(&mut leaving), []);
        for part in &parts {
            leaving.remove(part).expect("what is gone is no failure");
        }
    });
}

/// Host ports of both families and all protocols, made and unmade by the reconciler's steps.
#[test]
fn host_ports_are_what_nft_would_have_made_and_leave_nothing() {
    in_namespace(|| {
        let (mut firewall, settings) = (Firewall::default(), Settings { forward: false, ..settings() });
        let settings = Settings { masquerade: false, ..settings };
        let port = |protocol, host_ip: Option<&str>, port, pod: &str| HostPort {
            protocol,
            host_ip: host_ip.map(|ip| ip.parse().expect(ip)),
            port,
            pod: pod.parse().expect(pod),
        };
        let mut networks = networks();
        networks.host_ports.ports = [
            port(Protocol::Tcp, None, 8080, "10.5.1.2:80"),
            port(Protocol::Udp, Some("192.0.2.1"), 53, "10.5.1.2:5353"),
            port(Protocol::Sctp, Some("127.0.0.1"), 9, "10.5.1.2:9"),
            port(Protocol::Tcp, None, 8080, "[fd00:1::2]:80"),
        ]
        .into();
        networks.host_ports.guarded = ["cni0".parse().expect("name")].into();
        let settle = |firewall: &mut Firewall, networks: &Networks| {
            for _ in 0..4 {
                mend_for(firewall, &settings, networks);
            }
            assert_eq!(wrong_for(firewall, &settings, networks), []);
        };
        settle(&mut firewall, &networks);
        let listed = sh("nft -n -s list ruleset");
        let rules: Vec<&str> = listed
            .lines()
            .map(str::trim)
            .filter(|l| l.contains("counter") || l.contains("hook") || l.starts_with("table"))
            .collect();
        let mark = "counter meta mark set meta mark | 0x00002000";
        let at = |rule: &str| format!("{rule} {mark}");
        assert_eq!(
            rules,
            [
                "table ip weft-hostports {",
                "type filter hook prerouting priority -300; policy accept;",
                r#"iifname "cni0" ip daddr 127.0.0.0/8 counter drop"#,
                r#"iifname "cni0" ip saddr 127.0.0.0/8 counter drop"#,
                "type nat hook output priority -99; policy accept;",
                "fib daddr type 2 counter jump ports",
                &at("ip saddr 10.5.1.0/24 tcp dport 8080"),
                &at("ip saddr 127.0.0.0/8 tcp dport 8080"),
                r#"tcp dport 8080 counter dnat to 10.5.1.2:80 comment "tcp *:8080 10.5.1.2:80""#,
                &at("ip saddr 10.5.1.0/24 ip daddr 192.0.2.1 udp dport 53"),
                r#"ip daddr 192.0.2.1 udp dport 53 counter dnat to 10.5.1.2:5353 comment "udp 192.0.2.1:53 10.5.1.2:5353""#,
                &at("ip saddr 10.5.1.0/24 ip daddr 127.0.0.1 sctp dport 9"),
                &at("ip saddr 127.0.0.0/8 ip daddr 127.0.0.1 sctp dport 9"),
                r#"ip daddr 127.0.0.1 sctp dport 9 counter dnat to 10.5.1.2:9 comment "sctp 127.0.0.1:9 10.5.1.2:9""#,
                "type nat hook postrouting priority 99; policy accept;",
                "meta mark & 0x00002000 == 0x00002000 counter masquerade",
                "type nat hook prerouting priority -99; policy accept;",
                "fib daddr type 2 counter jump ports",
                "table ip6 weft-hostports {",
                "type nat hook output priority -99; policy accept;",
                "fib daddr type 2 counter jump ports",
                r#"tcp dport 8080 counter dnat to [fd00:1::2]:80 comment "tcp *:8080 [fd00:1::2]:80""#,
                "type nat hook postrouting priority 99; policy accept;",
                "meta mark & 0x00002000 == 0x00002000 counter masquerade",
                "type nat hook prerouting priority -99; policy accept;",
                "fib daddr type 2 counter jump ports",
            ],
            "{listed}"
        );
        for hand in [
            "nft flush ruleset",
            "nft flush chain ip weft-hostports ports",
            "nft insert rule ip weft-hostports ports tcp dport 8080 dnat to 10.5.1.9:80",
            "nft add rule ip6 weft-hostports ports accept",
            "nft delete rule ip weft-hostports guard handle $(nft -a list chain ip weft-hostports guard | sed -n 's/.*daddr.*drop.*handle //p')",
        ] {
            sh(hand);
            assert_ne!(wrong_for(&mut firewall, &settings, &networks), [], "{hand}");
            settle(&mut firewall, &networks);
            // In whatever order they were made.
            let tables =
                sh("nft -n -s list table ip weft-hostports; nft -n -s list table ip6 weft-hostports");
            assert_eq!(tables, listed, "{hand}");
        }
        // Another agent finds it right, but for the flows that nobody has told it of.
        let mut another = Firewall::default();
        assert_eq!(wrong_for(&mut another, &settings, &networks), [(PartKey::Flows, true)]);
        networks.host_ports = Default::default();
        settle(&mut another, &networks);
        assert_eq!(sh("nft list ruleset"), "");
        assert_eq!(another.flows, None);
    });
}

/// As many as one pod may publish.
#[test]
fn four_thousand_host_ports_are_one_commit() {
    in_namespace(|| {
        let mut firewall = Firewall::default();
        let settings = Settings { forward: false, masquerade: false, ..settings() };
        let mut networks = networks();
        networks.host_ports.ports = (1..=4096)
            .map(|port| HostPort {
                protocol: Protocol::Tcp,
                host_ip: None,
                port,
                pod: ([10, 5, 1, 2], port).into(),
            })
            .collect();
        for _ in 0..4 {
            mend_for(&mut firewall, &settings, &networks);
        }
        assert_eq!(wrong_for(&mut firewall, &settings, &networks), []);
        assert_eq!(sh("nft list ruleset").matches("dnat to").count(), 4096);
    });
}

/// Flows as the kernel has them, not as a rule makes them: what of them goes is for the rules to say.
#[test]
fn flows_astray_begin_anew_and_no_others() {
    in_namespace(|| {
        sh(
            "ip link set lo up; ip address add 192.0.2.1/32 dev lo; ip address add 2001:db8::1/128 dev lo nodad",
        );
        let wanted = HostPort {
            protocol: Protocol::Udp,
            host_ip: None,
            port: 53,
            pod: "10.5.1.3:5353".parse().expect("address"),
        };
        let wanted_v6 = HostPort { pod: "[fd00:1::3]:5353".parse().expect("address"), ..wanted };
        // Without a NAT hook nothing is tracked.
        sh(
            "nft add table inet track; nft 'add chain inet track out { type filter hook output priority 0; }'; nft add rule inet track out ct state new counter",
        );
        let mut senders = Vec::new();
        for (to, from) in [
            ("192.0.2.1:53", "192.0.2.1:0"),
            ("192.0.2.1:54", "192.0.2.1:0"),
            ("[2001:db8::1]:53", "[2001:db8::1]:0"),
        ] {
            senders.push((std::net::UdpSocket::bind(from).expect(from), to));
        }
        let mut firewall = Firewall::default();
        let seen = |firewall: &mut Firewall| {
            let mut all = Vec::new();
            for family in [Family::Ip, Family::Ip6] {
                let listed = flows::list(firewall.socket().expect("socket"), family).expect("flows");
                all.extend(listed.iter().map(|listed| listed.flow.to.to_string()));
            }
            all.sort();
            all
        };
        // A dump of the kernel's one table may miss an entry while other namespaces change it.
        let begin = std::time::Instant::now();
        let mut listed = Vec::new();
        while listed.len() < senders.len() && begin.elapsed().as_secs() < 30 {
            for (socket, to) in &senders {
                socket.send_to(b"x", to).unwrap_or_else(|e| panic!("{to}: {e}"));
            }
            listed = seen(&mut firewall);
        }
        assert_eq!(listed, ["192.0.2.1:53", "192.0.2.1:54", "[2001:db8::1]:53"]);
        drop(senders);
        let set = |firewall: &mut Firewall, ports: &[HostPort], local: &[&str]| {
            let local = local.iter().map(|ip| ip.parse().expect(ip)).collect();
            firewall.set(&Part::Flows(ports.iter().copied().collect()), || Ok(local)).expect("set");
        };
        set(&mut firewall, &[wanted, wanted_v6], &[]);
        assert_eq!(seen(&mut firewall).len(), 3, "to somebody else's addresses");
        set(&mut firewall, &[wanted, wanted_v6], &["192.0.2.1", "2001:db8::1"]);
        assert_eq!(seen(&mut firewall), ["192.0.2.1:54"]);
    });
}
