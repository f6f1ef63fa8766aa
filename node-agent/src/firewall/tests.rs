//! What is wanted of a packet filter, given what others have in it.

use std::collections::BTreeMap;

use super::advice::{self, Leftover};
use super::forward::{Fate, Keeper};
use super::rule::{MARK, Side, Step, within};
use super::*;

fn net(text: &str) -> Subnet {
    text.parse().expect(text)
}

fn networks() -> Networks {
    Networks { overlay: vec![net("10.5.0.0/16")], local: vec![net("10.5.1.0/24")], ..Networks::default() }
}

fn masquerading() -> Settings {
    Settings { masquerade: true, ..Settings::default() }
}

fn chain(policy: ChainPolicy, rules: Vec<Rule>) -> HostChain {
    HostChain {
        id: ChainId::new(Family::Ip, "filter", "FORWARD"),
        policy,
        keeper: Keeper::Anybody,
        rules,
        called: BTreeMap::new(),
    }
}

fn always(verdict: Expr) -> Rule {
    Rule::new(vec![], verdict)
}

fn from(subnet: &str, verdict: Expr) -> Rule {
    Rule::new(vec![within(Side::Source, net(subnet), true)], verdict)
}

#[test]
fn flannels_table_in_any_number_of_local_subnets() {
    let mut networks = networks();
    networks.local.push(net("10.5.7.0/24"));
    let seen = Ruleset { fully_random: false, ..Ruleset::default() };
    let desired = desired(&masquerading(), &networks, &seen);
    let Part::Table { chains, .. } = desired.first().expect("a table") else {
        panic!("{desired:?}");
    };
    let names: Vec<&str> = chains.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["forward", "postrtg"]);
    assert_eq!(chains[1].rules.len(), 1 + 2 * 3 + 2);
    assert!(
        chains[1].rules.iter().all(|r| !r.exprs.contains(&Expr::Masquerade { fully_random: true })),
        "a kernel without random ports is not asked for them"
    );
}

#[test]
fn nothing_is_wanted_where_nothing_was_asked_for() {
    let off = Settings { forward: false, ..Settings::default() };
    let seen = Ruleset { forward: vec![chain(ChainPolicy::Drop, vec![])], ..Ruleset::default() };
    assert_eq!(desired(&off, &networks(), &seen), []);
}

#[test]
fn a_prefix_is_read_as_it_is_written() {
    for text in ["10.5.0.0/16", "10.5.16.0/20", "10.0.0.0/7", "10.5.1.3/32", "fd00:5::/64", "fd00:5::/61"] {
        for side in [Side::Source, Side::Destination] {
            let rule = Rule::new(vec![within(side, net(text), true)], Expr::Accept);
            assert_eq!(rule.prefix(side), Some(net(text)), "{text}");
            let other = if side == Side::Source { Side::Destination } else { Side::Source };
            assert_eq!(rule.prefix(other), None, "{text}");
            assert_eq!(Rule::new(vec![within(side, net(text), false)], Expr::Accept).prefix(side), None);
        }
    }
}

#[test]
fn what_a_chain_does_with_packets_nobody_speaks_of() {
    use ChainPolicy::{Accept, Drop};
    let to = |name: &str| always(Expr::Jump(name.into()));
    let goto = |name: &str| always(Expr::Goto(name.into()));
    let called: BTreeMap<String, Vec<Rule>> = [
        ("returns", vec![from("1.0.0.0/8", Expr::Drop), always(Expr::Return), always(Expr::Drop)]),
        ("drops", vec![from("1.0.0.0/8", Expr::Return), always(Expr::Reject)]),
        ("accepts", vec![always(Expr::Accept)]),
        ("loops", vec![to("loops"), always(Expr::Drop)]),
    ]
    .map(|(name, rules)| (name.to_owned(), rules))
    .into();
    for (policy, rules, fate) in [
        (Accept, vec![], Fate::Accepted),
        (Drop, vec![], Fate::Dropped(None)),
        (Drop, vec![from("10.0.0.0/8", Expr::Accept)], Fate::Dropped(None)),
        (Drop, vec![always(Expr::Accept)], Fate::Accepted),
        (Accept, vec![from("10.0.0.0/8", Expr::Drop)], Fate::Accepted),
        (Accept, vec![from("10.0.0.0/8", Expr::Accept), always(Expr::Drop)], Fate::Dropped(Some(1))),
        (Accept, vec![to("returns"), to("drops")], Fate::Dropped(Some(1))),
        (Drop, vec![to("returns"), to("accepts"), always(Expr::Drop)], Fate::Accepted),
        (Accept, vec![to("unknown"), always(Expr::Target("REJECT".into()))], Fate::Dropped(Some(1))),
        (Accept, vec![always(Expr::Target("LOG".into()))], Fate::Accepted),
        (Accept, vec![goto("returns"), always(Expr::Drop)], Fate::Accepted),
        (Drop, vec![goto("returns"), always(Expr::Accept)], Fate::Dropped(None)),
        (Accept, vec![to("loops")], Fate::Dropped(Some(0))),
    ] {
        let chain = HostChain { called: called.clone(), ..chain(policy, rules) };
        assert_eq!(chain.fate(Family::Ip), fate, "{chain:?}");
    }
    let v6_only = Rule::new(vec![rule::of_family(Family::Ip6)], Expr::Drop);
    assert_eq!((v6_only.step(Family::Ip), v6_only.step(Family::Ip6)), (Step::On, Step::Drop));
}

#[test]
fn only_chains_that_drop_and_may_be_written_get_accepts() {
    let mut seen = Ruleset { forward: vec![chain(ChainPolicy::Accept, vec![])], ..Ruleset::default() };
    let accepts = |seen: &Ruleset| {
        let desired = desired(&Settings::default(), &networks(), seen);
        desired.iter().filter(|part| matches!(part, Part::Accepts { .. })).count()
    };
    assert_eq!(accepts(&seen), 0);
    seen.forward[0].policy = ChainPolicy::Drop;
    assert_eq!(accepts(&seen), 1);
    for keeper in [Keeper::Firewalld, Keeper::Process] {
        seen.forward[0].keeper = keeper;
        assert_eq!(accepts(&seen), 0, "{keeper:?}");
    }
    seen.forward[0].keeper = Keeper::Anybody;
    // Packets of IPv4 do not come by a table of IPv6.
    seen.forward[0].id.table.family = Family::Ip6;
    assert_eq!(accepts(&seen), 0);
}

#[test]
fn ours_behind_a_catch_all_or_before_a_decision_are_out_of_place() {
    let ours = || from("10.5.0.0/16", Expr::Accept).with_comment(MARK);
    let in_place = |rules| match forward::found(&chain(ChainPolicy::Accept, rules)) {
        Some(Part::Accepts { in_place, .. }) => Some(in_place),
        _ => None,
    };
    assert_eq!(in_place(vec![always(Expr::Drop)]), None);
    assert_eq!(in_place(vec![ours(), always(Expr::Drop)]), Some(true));
    assert_eq!(in_place(vec![always(Expr::Drop), ours()]), Some(false));
    assert_eq!(in_place(vec![ours(), always(Expr::Drop), ours()]), Some(false));
    assert_eq!(in_place(vec![from("10.5.9.0/24", Expr::Drop), ours()]), Some(true));
    assert_eq!(in_place(vec![ours(), from("10.5.9.0/24", Expr::Drop)]), Some(false), "a decision made later");
    assert_eq!(in_place(vec![ours(), from("10.5.9.0/24", Expr::Drop), ours()]), Some(false));
}

#[test]
fn closed_chains_are_named_with_the_command_until_somebody_lets_the_network_through() {
    let mut firewalld =
        chain(ChainPolicy::Accept, vec![always(Expr::Jump("zones".into())), always(Expr::Reject)]);
    firewalld.id = ChainId::new(Family::Inet, "firewalld", "filter_FORWARD");
    firewalld.keeper = Keeper::Firewalld;
    let mut seen = Ruleset { forward: vec![firewalld], ..Ruleset::default() };
    let told =
        |seen: &Ruleset, settings: &Settings| advice::of(settings, &networks(), seen, &BTreeMap::new());
    let advice = told(&seen, &Settings::default());
    assert_eq!(advice.len(), 1);
    assert_eq!(
        advice[0].problem,
        "nftables chain inet firewalld filter_FORWARD drops forwarded packets of 10.5.0.0/16"
    );
    assert!(advice[0].fix.contains("firewall-cmd --permanent --zone=trusted --add-source=10.5.0.0/16"));
    let zone = Rule::new(vec![within(Side::Source, net("10.5.0.0/16"), true)], Expr::Goto("trusted".into()));
    seen.forward[0].called.insert("zones".into(), vec![zone]);
    assert_eq!(told(&seen, &Settings::default()), []);

    let mut open = Ruleset { forward: vec![chain(ChainPolicy::Drop, vec![])], ..Ruleset::default() };
    assert_eq!(told(&open, &Settings::default()), [], "weft writes there itself");
    let off = Settings { forward: false, ..Settings::default() };
    assert!(told(&open, &off)[0].fix.contains("--iptables-forward-rules=true"));
    open.forward[0].keeper = Keeper::Process;
    assert!(told(&open, &Settings::default())[0].fix.contains("the program that owns table ip filter"));
}

#[test]
fn what_a_flanneld_left_is_judged_by_what_it_does() {
    let left = |p: &str| Ruleset {
        left: vec![Leftover { legacy: false, spared: vec![(net(p), net("10.5.0.0/16"))] }],
        ..Ruleset::default()
    };
    let told = |seen: &Ruleset, settings: &Settings| {
        let mut advice = advice::of(settings, &networks(), seen, &BTreeMap::new());
        assert!(advice[0].fix.starts_with("iptables -t nat -D POSTROUTING"));
        advice.remove(0).problem
    };
    assert!(told(&left("10.5.1.0/24"), &masquerading()).ends_with("and does no harm"));
    assert!(told(&left("10.5.8.0/24"), &masquerading()).contains("for another subnet"));
    assert!(told(&left("10.5.1.0/24"), &Settings::default()).contains("although --ip-masq is off"));
    let excluding = Settings { never_masqueraded: vec![net("10.9.0.0/16")], ..masquerading() };
    assert!(told(&left("10.5.1.0/24"), &excluding).contains("--ip-masq-exclude"));
}

#[test]
fn kube_proxy_without_bridge_netfilter_is_named() {
    let seen = Ruleset { kube_proxy: true, ..Ruleset::default() };
    let told = |value: Option<&str>| {
        let sysctls = value.map(|v| (advice::BRIDGE_CALLS.to_owned(), v.to_owned())).into_iter().collect();
        advice::of(&Settings::default(), &networks(), &seen, &sysctls).len()
    };
    assert_eq!((told(Some("1")), told(Some("0")), told(None)), (0, 1, 1));
}

#[test]
fn iptables_legacys_table_is_read_and_edited() {
    let saved = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [3:252]\n:OUTPUT ACCEPT [0:0]\n:DOCKER-USER - [0:0]\n\
                 -A FORWARD -j DOCKER-USER\n-A FORWARD -i lo -j ACCEPT\n-A DOCKER-USER -j RETURN\nCOMMIT\n";
    let table = legacy::LegacyTable::parse(saved);
    let seen = Ruleset { legacy: LegacyFilter::Table(table.clone()), ..Ruleset::default() };
    let parts: Vec<Part> = legacy::desired(&networks(), &seen).into_iter().collect();
    let [Part::Legacy { rules, in_place: true }] = &parts[..] else { panic!("{parts:?}") };
    assert_eq!(
        table.edit(rules).as_deref(),
        Some(
            "*filter\n-A FORWARD -s 10.5.0.0/16 -m comment --comment \"weft forward\" -j ACCEPT\n\
             -A FORWARD -d 10.5.0.0/16 -m comment --comment \"weft forward\" -j ACCEPT\nCOMMIT\n"
        )
    );
    assert_eq!(table.edit(&[]), None);
    let closed = saved.replace("COMMIT", "-A FORWARD -m comment --comment \"the rest\" -j DROP\nCOMMIT");
    let edit = legacy::LegacyTable::parse(&closed).edit(rules).expect("an edit");
    assert!(edit.contains("-I FORWARD 3 -s 10.5.0.0/16") && edit.contains("-I FORWARD 4 -d"), "{edit}");
    let open = legacy::LegacyTable::parse(&saved.replace("FORWARD DROP", "FORWARD ACCEPT"));
    let seen = Ruleset { legacy: LegacyFilter::Table(open), ..Ruleset::default() };
    assert_eq!(legacy::desired(&networks(), &seen), None);
    let unreadable = Ruleset { legacy: LegacyFilter::Unreadable("why".into()), ..Ruleset::default() };
    assert_eq!(legacy::desired(&networks(), &unreadable), None);
}
