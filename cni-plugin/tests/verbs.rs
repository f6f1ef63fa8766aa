//! ADD, CHECK, DEL, STATUS, GC, VERSION as a runtime calls them, against the kernel's word.

mod support;

use std::fs::File;

use serde_json::{Value, json};
use support::double::{Behaviour, failure};
use support::{BRIDGE_MAC, Namespace, Node, eventually, host_veth, merge};
use weft_shared::protocol::Request;

const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// `dst via gateway` of the routes through a gateway.
fn routes(pod: &Namespace, family: &str) -> Vec<String> {
    let mut routes: Vec<_> = pod
        .ip_json(&[family, "route", "show"])
        .iter()
        .filter_map(|r| {
            Some(format!("{} via {} dev {}", r["dst"].as_str()?, r["gateway"].as_str()?, r["dev"].as_str()?))
        })
        .collect();
    routes.sort();
    routes
}

fn addresses(pod: &Namespace, ifname: &str) -> Vec<String> {
    let links = pod.ip_json(&["address", "show", "dev", ifname]);
    let infos = links.first().and_then(|l| l["addr_info"].as_array().cloned()).unwrap_or_default();
    infos.iter().map(|a| format!("{}/{}", a["local"].as_str().unwrap_or_default(), a["prefixlen"])).collect()
}

#[test]
fn add_wires_the_pod_check_agrees_and_del_leaves_nothing() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    let call = node.call("ADD", "c1", &pod.path(), &node.conf("1.1.0", json!({})));
    let result = call.env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web").run().ok();

    let host = node.ns.link(&host_veth("c1"));
    let eth0 = pod.link("eth0");
    assert_eq!(
        result,
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "cni0", "mac": BRIDGE_MAC, "sandbox": ""},
                {"name": host_veth("c1"), "mac": host["address"], "mtu": 1450, "sandbox": ""},
                {"name": "eth0", "mac": eth0["address"], "mtu": 1450, "sandbox": pod.path()},
            ],
            "ips": [{"interface": 2, "address": "10.77.0.10/24", "gateway": "10.77.0.1"}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.77.0.1"}, {"dst": "10.76.0.0/15", "gw": "10.77.0.1"}],
        })
    );
    assert_eq!(host["master"], "cni0");
    assert_eq!(host["mtu"], 1450);
    assert_eq!(host["ifalias"], "mesh/c1/eth0");
    assert_eq!(host["group"], weft_shared::names::LINK_GROUP.to_string());
    assert_eq!(host["inet6_addr_gen_mode"], "none");
    let port = &host["linkinfo"]["info_slave_data"];
    assert_eq!((&port["hairpin"], &port["isolated"]), (&json!(true), &json!(false)));
    assert_eq!(addresses(&node.ns, &host_veth("c1")), [""; 0], "a port needs no address");
    assert_eq!(eth0["mtu"], 1450);
    assert_eq!(addresses(&pod, "eth0"), ["10.77.0.10/24"]);
    assert_eq!(routes(&pod, "-4"), ["10.76.0.0/15 via 10.77.0.1 dev eth0", "default via 10.77.0.1 dev eth0"]);
    assert_eq!(pod.read("/proc/sys/net/ipv6/conf/eth0/disable_ipv6"), "1");
    assert!(pod.pings("10.77.0.1"));

    let requests = agent.books().requests.clone();
    let [Request::Reserve(reserve), Request::Commit(commit)] = requests.as_slice() else {
        panic!("{requests:?}")
    };
    assert_eq!(reserve.pod.as_deref(), Some("shop/web"));
    assert_eq!(reserve.netns, pod.path());
    assert!(reserve.netns_cookie.is_some_and(|cookie| cookie > 1), "1 is the initial namespace");
    assert_eq!(host["ifindex"], commit.host_ifindex);
    assert_eq!(eth0["address"], commit.container_mac.to_string());

    let chained = node.conf("1.1.0", json!({"prevResult": result}));
    assert_eq!(node.call("CHECK", "c1", &pod.path(), &chained).run().ok(), Value::Null);
    assert_eq!(node.call("DEL", "c1", &pod.path(), &chained).run().ok(), Value::Null);
    assert_eq!(node.ns.link_names(), ["cni0"]);
    assert_eq!(pod.link_names(), [""; 0]);
    assert!(agent.books().records.is_empty());
}

#[test]
fn every_version_gets_its_own_shape_and_its_own_verbs() {
    let node = Node::new();
    let _agent = node.agent();
    for (n, version) in VERSIONS.into_iter().enumerate() {
        let pod = Namespace::new();
        let id = format!("v{n}");
        let result = node.call("ADD", &id, &pod.path(), &node.conf(version, json!({}))).run().ok();
        assert_eq!(result["cniVersion"], version);
        let legacy = n < 2;
        assert_eq!(result["ip4"].is_object(), legacy, "{result}");
        assert_eq!(result["interfaces"].is_array(), !legacy, "{result}");
        let family = if (2..5).contains(&n) { json!("4") } else { Value::Null };
        assert_eq!(result["ips"][0]["version"], family, "{result}");
        assert_eq!(result["interfaces"][2]["mtu"].is_number(), version == "1.1.0", "{result}");
        assert_eq!(result["dns"].is_object(), n < 5, "{result}");

        let chained = node.conf(version, json!({"prevResult": result}));
        let check = node.call("CHECK", &id, &pod.path(), &chained).run();
        if n < 4 {
            drop(check.refused(1))
        } else {
            drop(check.ok())
        }
        let gc =
            node.conf(version, json!({"cni.dev/valid-attachments": [{"containerID": id, "ifname": "eth0"}]}));
        for (verb, conf) in [("STATUS", &chained), ("GC", &gc)] {
            let outcome = node.call(verb, &id, "", conf).run();
            if n < 6 { drop(outcome.refused(1)) } else { drop(outcome.ok()) }
        }
        node.call("DEL", &id, &pod.path(), &chained).run().ok();
        assert_eq!(pod.link_names(), [""; 0]);
    }
    assert_eq!(node.ns.link_names(), ["cni0"]);
}

#[test]
fn options_reach_the_kernel_and_the_agent() {
    let (node, pod) = (Node::new(), Namespace::new());
    let _agent = node.agent();
    let conf = node.conf(
        "1.0.0",
        json!({"hairpinMode": false, "portIsolation": true, "isDefaultGateway": false, "mtu": 1400,
               "dns": {"nameservers": ["10.96.0.10"], "search": ["cluster.local"]},
               "runtimeConfig": {"ips": ["10.77.0.50/24"], "mac": "02:00:00:00:00:50"}}),
    );
    let result = node.call("ADD", "c1", &pod.path(), &conf).run().ok();
    assert_eq!(result["dns"], json!({"nameservers": ["10.96.0.10"], "search": ["cluster.local"]}));
    let host = node.ns.link(&host_veth("c1"));
    let port = &host["linkinfo"]["info_slave_data"];
    assert_eq!((&port["hairpin"], &port["isolated"]), (&json!(false), &json!(true)));
    let eth0 = pod.link("eth0");
    assert_eq!((&eth0["mtu"], &host["mtu"]), (&json!(1400), &json!(1400)));
    assert_eq!(eth0["address"], "02:00:00:00:00:50");
    assert_eq!(addresses(&pod, "eth0"), ["10.77.0.50/24"]);
    assert_eq!(routes(&pod, "-4"), ["10.76.0.0/15 via 10.77.0.1 dev eth0"]);
}

#[test]
fn two_families() {
    let (node, pod) = (Node::new(), Namespace::new());
    let _agent = node.agent().behaving(Behaviour { dual_stack: true, ..Behaviour::default() });
    let result = node.add("c1", &pod).ok();
    assert_eq!(result["ips"][1], json!({"interface": 2, "address": "fd77::a/64", "gateway": "fd77::1"}));
    assert!(addresses(&pod, "eth0").contains(&"fd77::a/64".to_owned()));
    assert_eq!(routes(&pod, "-6"), ["default via fd77::1 dev eth0", "fd00::/8 via fd77::1 dev eth0"]);
    assert_eq!(pod.read("/proc/sys/net/ipv6/conf/eth0/accept_ra"), "0");
    assert!(pod.pings("10.77.0.1") && pod.pings("fd77::1"));
    let chained = node.conf("1.1.0", json!({"prevResult": result}));
    node.call("CHECK", "c1", &pod.path(), &chained).run().ok();
}

#[test]
fn a_second_interface_leaves_the_first_ones_routes_in_front() {
    let (node, pod) = (Node::new(), Namespace::new());
    let _agent = node.agent().behaving(Behaviour { dual_stack: true, ..Behaviour::default() });
    let conf = node.conf("1.1.0", json!({}));
    let mut results = Vec::new();
    for ifname in ["eth0", "eth1"] {
        results.push(node.call("ADD", "c1", &pod.path(), &conf).env("CNI_IFNAME", ifname).run().ok());
    }
    let best = pod.ip_json(&["route", "get", "192.0.2.1"]);
    assert_eq!(best[0]["dev"], "eth0");
    for (ifname, result) in ["eth0", "eth1"].into_iter().zip(results) {
        let chained = node.conf("1.1.0", json!({"prevResult": result}));
        let call = |verb| node.call(verb, "c1", &pod.path(), &chained).env("CNI_IFNAME", ifname).run();
        call("CHECK").ok();
        call("DEL").ok();
    }
    assert_eq!((node.ns.link_names(), pod.link_names()), (vec!["cni0".to_owned()], vec![]));
}

#[test]
fn neighbours_learn_of_a_new_owner_of_an_address_at_once() {
    let (node, witness, first, second) = (Node::new(), Namespace::new(), Namespace::new(), Namespace::new());
    let _agent = node.agent().behaving(Behaviour { dual_stack: true, ..Behaviour::default() });
    node.add("witness", &witness).ok();
    let conf = node.conf("1.1.0", json!({"runtimeConfig": {"ips": ["10.77.0.99", "fd77::99"]}}));
    node.call("ADD", "first", &first.path(), &conf).run().ok();
    assert!(witness.pings("10.77.0.99") && witness.pings("fd77::99"));
    node.del("first", &first.path()).ok();
    let result = node.call("ADD", "second", &second.path(), &conf).run().ok();
    // Nobody has sent a packet since: only an announcement can have told the witness.
    for address in ["10.77.0.99", "fd77::99"] {
        eventually("the neighbour entry names the new owner", || {
            let entries = witness.ip_json(&["neigh", "show", address]);
            entries.first().is_some_and(|n| n["lladdr"] == result["interfaces"][2]["mac"])
        });
    }
}

#[test]
fn check_names_what_is_not_as_added() {
    let foreign_hands: [(&[&str], &str); 7] = [
        (&["address", "del", "10.77.0.50/24", "dev", "eth0"], "10.77.0.50/24"),
        (&["route", "del", "10.76.0.0/15"], "10.76.0.0/15"),
        (&["route", "del", "default"], "0.0.0.0/0"),
        (&["link", "set", "eth0", "address", "02:00:00:00:00:77"], "02:00:00:00:00:77"),
        (&["link", "set", "eth0", "mtu", "9000"], "MTU 9000: expected at most 1450"),
        (&["link", "set", "eth0", "down"], "down"),
        (&["link", "set", "eth0", "name", "eth7"], "gone"),
    ];
    let node = Node::new();
    let _agent = node.agent();
    for (n, (args, part)) in foreign_hands.into_iter().enumerate() {
        let (id, pod) = (format!("c{n}"), Namespace::new());
        let conf = node.conf("1.1.0", json!({"runtimeConfig": {"ips": ["10.77.0.50"]}}));
        let result = node.call("ADD", &id, &pod.path(), &conf).run().ok();
        let chained = node.conf("1.1.0", json!({"prevResult": result}));
        let check = || node.call("CHECK", &id, &pod.path(), &chained).run();
        check().ok();
        if args[2] == "eth0" && args[3] == "name" {
            pod.ip(&["link", "set", "eth0", "down"]);
        }
        pod.ip(args);
        let text = check().refused(104);
        assert!(text.contains(part), "{args:?}: {text}");
        node.del(&id, &pod.path()).ok();
    }
}

#[test]
fn check_looks_at_the_host_side_and_into_the_books() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    let result = node.add("c1", &pod).ok();
    let chained = node.conf("1.1.0", json!({"prevResult": result}));
    let check = |conf: &Value| node.call("CHECK", "c1", &pod.path(), conf).run();
    let veth = host_veth("c1");
    node.ns.ip(&["link", "set", &veth, "nomaster"]);
    assert!(check(&chained).refused(104).contains("not a port of bridge cni0"));
    node.ns.ip(&["link", "set", &veth, "master", "cni0"]);
    assert!(check(&chained).refused(104).contains("hairpin mode"), "a new port has none");
    node.ns.ip(&["link", "set", &veth, "type", "bridge_slave", "hairpin", "on"]);
    node.ns.ip(&["link", "set", &veth, "mtu", "1460"]);
    assert!(check(&chained).refused(104).contains("MTU 1460"));
    node.ns.ip(&["link", "set", &veth, "mtu", "1450"]);
    node.ns.write("/proc/sys/net/ipv4/conf/cni0/forwarding", "0");
    assert!(check(&chained).refused(104).contains("net.ipv4.conf.cni0.forwarding"));
    node.ns.write("/proc/sys/net/ipv4/conf/cni0/forwarding", "1");
    node.ns.ip(&["link", "set", &veth, "down"]);
    assert!(check(&chained).refused(104).contains("down"));
    node.ns.ip(&["link", "set", &veth, "up"]);
    // Bringing a port down cost the pod nothing of its own.
    check(&chained).ok();
    // tuning has changed the MAC and says so in the result that it passes on.
    pod.ip(&["link", "set", "eth0", "address", "02:00:00:00:00:77"]);
    let mut tuned = result.clone();
    tuned["interfaces"][2]["mac"] = json!("02:00:00:00:00:77");
    // The MTU it has lowered without saying so.
    pod.ip(&["link", "set", "eth0", "mtu", "1300"]);
    check(&node.conf("1.1.0", json!({"prevResult": tuned}))).ok();
    assert!(check(&chained).refused(104).contains("MAC"));
    agent.books().records.clear();
    check(&node.conf("1.1.0", json!({"prevResult": tuned}))).refused(104);
    check(&node.conf("1.1.0", json!({}))).refused(7);
    check(&node.conf("1.1.0", json!({"prevResult": 5}))).refused(6);
}

#[test]
fn del_succeeds_whatever_is_left() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    let fifo = node.dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).expect("fifo");
    let plain = node.dir.path().join("plain");
    File::create(&plain).expect("file");
    for netns in [
        pod.path(),
        String::new(),
        "/run/netns/wcni-none".into(),
        fifo.display().to_string(),
        plain.display().to_string(),
    ] {
        node.add("c1", &pod).ok();
        for _ in 0..3 {
            node.del("c1", &netns).ok();
            assert_eq!(node.ns.link_names(), ["cni0"]);
            assert!(agent.books().records.is_empty());
        }
    }
    for extra in [
        json!({"prevResult": {"cniVersion": "9", "ips": 5}}),
        json!({"mtu": "x", "vlan": 7, "bridge": 5, "ipam": {"type": "dhcp"}}),
        json!({"prevResult": null}),
    ] {
        node.add("c1", &pod).ok();
        node.call("DEL", "c1", &pod.path(), &node.conf("0.4.0", extra)).run().ok();
        assert_eq!(node.ns.link_names(), ["cni0"]);
    }
    // The namespace went first, and took the pair with it.
    let gone = Namespace::new();
    node.add("c2", &gone).ok();
    let path = gone.path();
    drop(gone);
    node.del("c2", &path).ok();
    assert!(agent.books().records.is_empty());
    node.call("DEL", "c1", "", &json!({})).stdin("{").run().refused(6);
    node.call("DEL", "-", "", &node.conf("1.1.0", json!({}))).run().refused(4);
}

#[test]
fn del_spares_a_foreign_interface_of_our_name() {
    let node = Node::new();
    node.ns.ip(&["link", "add", &host_veth("c1"), "type", "veth", "peer", "name", "other"]);
    node.del("c1", "").ok();
    assert!(node.ns.link_names().contains(&host_veth("c1")));
}

#[test]
fn status_passes_the_agents_word_on() {
    let node = Node::new();
    let agent = node.agent();
    let conf = node.conf("1.1.0", json!({}));
    let status = || node.call("STATUS", "", "", &conf).without("CNI_CONTAINERID").run();
    assert_eq!(status().ok(), Value::Null);
    assert_eq!(agent.last_request(), Request::Status);
    for code in [50, 51] {
        agent.books().behaviour.refuse = Some(failure(code, "no lease yet"));
        assert!(status().refused(code).contains("no lease yet"));
    }
}

#[test]
fn gc_spares_what_is_named_and_does_nothing_when_nothing_is_said() {
    let node = Node::new();
    let agent = node.agent();
    let pods: Vec<_> = (0..3).map(|_| Namespace::new()).collect();
    let gc = |extra: Value| node.call("GC", "", "", &node.conf("1.1.0", extra)).run();
    for (n, pod) in pods.iter().enumerate() {
        node.add(&format!("c{n}"), pod).ok();
    }
    gc(json!({})).ok();
    assert_eq!(node.ns.link_names().len(), 4, "an absent list says nothing");
    gc(json!({"cni.dev/valid-attachments": 5})).refused(7);
    let mut both = json!({"cni.dev/attachments": []});
    merge(
        &mut both,
        json!({"cni.dev/valid-attachments": [{"containerID": "c0", "ifname": "eth0"}, {"containerID": "c1", "ifname": "eth0"}]}),
    );
    gc(both).ok();
    assert_eq!(node.ns.link_names().len(), 3);
    gc(json!({"cni.dev/attachments": [{"containerID": "c0", "ifname": "eth0"}]})).ok();
    assert_eq!(node.ns.link_names().len(), 2);
    gc(json!({"cni.dev/valid-attachments": null})).ok();
    assert_eq!(node.ns.link_names(), ["cni0"]);
    assert!(agent.books().records.is_empty());
}
