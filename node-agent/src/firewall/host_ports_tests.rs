use super::*;
use crate::firewall::Settings;

fn port(text: &str) -> HostPort {
    HostPort::parse(text).unwrap_or_else(|| panic!("{text}"))
}

fn networks(ports: &[&str]) -> Networks {
    let local = vec!["10.5.1.0/24".parse().expect("net"), "fd00:1::/64".parse().expect("net")];
    let guarded = (!ports.is_empty()).then(|| "cni0".parse().expect("name")).into_iter().collect();
    let host_ports = HostPorts { ports: ports.iter().map(|text| port(text)).collect(), guarded };
    Networks { local, host_ports, ..Networks::default() }
}

fn keys(parts: &[Part]) -> Vec<String> {
    parts.iter().map(|part| part.key().to_string()).collect()
}

/// Brings about what is wanted, as the reconciler does: what is there after it.
fn settle(networks: &Networks, seen: &mut Ruleset) -> Vec<String> {
    let settings = Settings { forward: false, ..Settings::default() };
    for _ in 0..4 {
        let wanted = super::super::desired(&settings, networks, seen);
        seen.own.retain(|part| wanted.iter().any(|w| w.key() == part.key()));
        for part in &wanted {
            match part {
                Part::Table { .. } if seen.own.contains(part) => {}
                Part::Table { .. } => {
                    seen.own.retain(|own| own.key() != part.key());
                    seen.own.push(part.clone());
                    seen.flows = None;
                }
                Part::Flows(ports) => seen.flows = Some(ports.clone()),
                other => panic!("{other:?}"),
            }
        }
        if !wanted.iter().any(|part| part.key() == PartKey::Flows) {
            seen.flows = None;
        }
    }
    keys(&super::super::found(seen).collect::<Vec<_>>())
}

#[test]
fn a_mapping_leads_to_the_first_address_of_each_family_it_is_for() {
    let mapping = |host_ip: &str| PortMapping {
        protocol: Protocol::Tcp,
        host_ip: (!host_ip.is_empty()).then(|| host_ip.parse().expect(host_ip)),
        host_port: 8080,
        container_port: 80,
    };
    let dual: Vec<IpAddr> =
        ["10.5.1.2", "10.5.1.3", "fd00:1::2"].iter().map(|ip| ip.parse().expect(ip)).collect();
    for (host_ip, addresses, expected) in [
        ("", &dual[..1], vec!["tcp *:8080 10.5.1.2:80"]),
        ("", &dual[..], vec!["tcp *:8080 10.5.1.2:80", "tcp *:8080 [fd00:1::2]:80"]),
        ("0.0.0.0", &dual, vec!["tcp *:8080 10.5.1.2:80"]),
        ("::", &dual, vec!["tcp *:8080 [fd00:1::2]:80"]),
        ("::", &dual[..2], vec![]),
        ("192.0.2.1", &dual, vec!["tcp 192.0.2.1:8080 10.5.1.2:80"]),
        ("2001:db8::1", &dual, vec!["tcp [2001:db8::1]:8080 [fd00:1::2]:80"]),
    ] {
        let shown: Vec<String> =
            HostPort::of(&[mapping(host_ip)], addresses).map(|port| port.to_string()).collect();
        assert_eq!(shown, expected, "{host_ip}");
        for text in &shown {
            assert_eq!(port(text).to_string(), *text);
        }
    }
    for nonsense in
        ["", "tcp", "tcp *:8080", "tcp 8080 10.5.1.2:80", "icmp *:1 10.5.1.2:80", "tcp *:0x 1.2.3.4:5"]
    {
        assert_eq!(HostPort::parse(nonsense), None, "{nonsense}");
    }
}

#[test]
fn a_table_for_each_family_that_pods_have_and_its_own_account_of_it() {
    let all = ["udp *:53 10.5.1.2:5353", "tcp 192.0.2.1:80 10.5.1.2:80", "tcp *:80 [fd00:1::2]:80"];
    let wanted = desired(&networks(&all), &Ruleset::default());
    assert_eq!(
        keys(&wanted),
        ["nftables table ip weft-hostports", "nftables table ip6 weft-hostports", "UDP flows to host ports"]
    );
    assert_eq!(wanted.iter().flat_map(led).collect::<BTreeSet<_>>(), all.map(port).into());
    let Part::Table { chains, .. } = &wanted[0] else { panic!("{wanted:?}") };
    let names: Vec<&str> = chains.iter().map(|chain| chain.name.as_str()).collect();
    assert_eq!(names, ["guard", "output", "ports", "postrouting", "prerouting"]);
    // Of a port on all addresses: from pods, from the loopback, and where it leads. On one: not from the loopback.
    assert_eq!(chains[2].rules.len(), 3 + 2);
    let Part::Table { chains, .. } = &wanted[1] else { panic!("{wanted:?}") };
    assert!(chains.iter().all(|chain| chain.name != "guard"), "IPv6 has no such way to the loopback");
    assert_eq!(wanted[2], Part::Flows([port(all[0])].into()));
}

#[test]
fn an_emptied_table_stays_until_flows_have_left_it() {
    let mut seen = Ruleset::default();
    let full = networks(&["udp *:53 10.5.1.2:53", "tcp *:80 10.5.1.2:80"]);
    let both = ["nftables table ip weft-hostports", "UDP flows to host ports"];
    assert_eq!(settle(&full, &mut seen), both);
    // Nothing leads anywhere any more.
    let none = networks(&[]);
    let wanted = desired(&none, &seen);
    assert_eq!(keys(&wanted), both);
    assert!(matches!(&wanted[0], Part::Table { chains, .. } if chains.is_empty()));
    assert_eq!(wanted[1], Part::Flows(BTreeSet::new()));
    // The table was emptied, the flows were not seen to.
    seen.own = vec![wanted[0].clone()];
    seen.flows = None;
    assert_eq!(keys(&desired(&none, &seen)), both);
    assert_eq!(settle(&none, &mut seen), [""; 0]);
    assert_eq!(desired(&none, &seen), []);
    // A new agent finds a full table, and nobody who wants it.
    settle(&full, &mut seen);
    seen.flows = None;
    assert_eq!(keys(&desired(&none, &seen)), both);
    assert_eq!(settle(&none, &mut seen), [""; 0]);
}

#[test]
fn a_bridge_that_is_open_to_the_loopback_is_guarded_without_any_port() {
    let mut seen = Ruleset::default();
    let mut networks = networks(&[]);
    networks.host_ports.guarded = ["cni0".parse().expect("name")].into();
    let (cni0, other) = ("cni0".parse().expect("name"), "cni1".parse().expect("name"));
    assert!(!guards(&seen, &cni0));
    for _ in 0..2 {
        let both = ["nftables table ip weft-hostports", "UDP flows to host ports"];
        assert_eq!(settle(&networks, &mut seen), both);
        assert!(guards(&seen, &cni0) && !guards(&seen, &other));
        assert!(seen.own.iter().all(|part| led(part).is_empty()));
    }
}

#[test]
fn flows_go_where_their_port_leads() {
    let set = |ports: &[&str]| ports.iter().map(|text| port(text)).collect::<BTreeSet<_>>();
    let flow = |to: &str, answers: &str| Flow {
        to: to.parse().expect(to),
        answers: answers.parse().expect(answers),
    };
    let (now, before) = (set(&["udp *:53 10.5.1.3:5353"]), set(&["udp *:53 10.5.1.2:5353"]));
    let none = BTreeSet::new();
    for (what, to, answers, wanted, former, astray) in [
        ("to the pod", "192.0.2.1:53", "10.5.1.3:5353", &now, &before, false),
        ("to the pod before it", "192.0.2.1:53", "10.5.1.2:5353", &now, &before, true),
        ("to the host itself", "192.0.2.1:53", "192.0.2.1:53", &now, &none, true),
        ("to another port", "192.0.2.1:54", "192.0.2.1:54", &now, &before, false),
        ("to a pod whose port it was", "192.0.2.1:53", "10.5.1.2:5353", &none, &before, true),
        ("to the host, whose port it is again", "192.0.2.1:53", "192.0.2.1:53", &none, &before, false),
        ("by somebody else's translation", "192.0.2.1:53", "10.5.1.9:53", &none, &before, false),
        ("of the other family", "[2001:db8::1]:53", "[2001:db8::1]:53", &now, &before, false),
    ] {
        assert_eq!(flow(to, answers).is_astray(wanted, former), astray, "{what}");
    }
    let on_one = set(&["udp 192.0.2.1:53 10.5.1.3:5353"]);
    assert!(!flow("192.0.2.2:53", "192.0.2.2:53").is_astray(&on_one, &none), "on another address");
}
