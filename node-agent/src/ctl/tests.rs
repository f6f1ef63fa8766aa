//! Against an agent's admin server on a real socket.

use std::path::Path;
use std::sync::Arc;

use clap::error::ErrorKind;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::metrics::Metrics;
use crate::ping::Leg;
use crate::server::admin::{Admin, AdminState};
use crate::status::{NetworkPolicyState, NetworkPolicyStatus, sample};

/// The agent of `status`, served on another thread for as long as `body` runs.
fn with_agent(status: fn() -> Status, body: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().expect("tempdir");
    let socket = dir.path().join("admin.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let admin = runtime.block_on(Admin::bind(None, &socket)).expect("bind");
    let state = AdminState { status: Arc::new(status), metrics: Arc::new(Metrics::new(Arc::new(status))) };
    let stop = CancellationToken::new();
    let stop_with_scope = stop.clone().drop_guard();
    std::thread::scope(|scope| {
        scope.spawn(|| runtime.block_on(admin.serve(state, stop)));
        let _stop = stop_with_scope;
        body(&socket);
    });
}

fn ask(socket: &Path, args: &[&str]) -> Result<Answer, ClientError> {
    let socket = socket.to_str().expect("UTF-8");
    let args = ["weftctl", "--socket", socket].into_iter().chain(args.iter().copied());
    let cli = Cli::try_parse_from(args).expect("usage");
    cli.answer(&cli.socket(Some("/nonexistent/by-variable.sock".into())))
}

#[test]
fn status_of_a_node_in_service() {
    with_agent(sample::ready, |socket| {
        let answer = ask(socket, &["status"]).expect("answer");
        assert!(!answer.well, "an object is pending");
        assert_eq!(
            answer.text,
            "node       node-a, weftd 0.1.0
state      ready, but not all is in place: 1 PENDING
store      etcd at http://10.0.0.1:2379, prefix /coreos.com/network: connected
network    10.5.0.0/16 in /24 subnets, vxlan, VNI 1, UDP port 8472
lease      10.5.1.0/24 held, public IP 192.168.9.1, expires in 23 h
underlay   eth0 192.168.9.1, MTU 1500, by default route
dataplane  flannel.1, pod MTU 1450, 9 objects right, 1 pending, 3 repairs
           PENDING route 10.5.3.0/24: no such device (tried 4 times)
peers      1 of 2 programmed
           10.5.3.0-24 via 192.168.9.3: no such device
           10.5.2.0-24 via 192.168.9.2: expired, 9 min 35 s left
           REFUSED 10.9.1.0-24: outside Network 10.5.0.0/16
pods       2 on cni0, 2 of 253 addresses used, 1 with a bandwidth limit
host       node-a, Debian GNU/Linux 12, Linux 6.18.0, up 1 d 1 h
           ADVICE nftables chain inet firewalld filter_FORWARD drops forwarded packets of 10.5.0.0/16
                  to mend it: firewall-cmd --permanent --zone=trusted --add-source=10.5.0.0/16
agent      up 2 h 2 min, 9.0 MiB, 12.25 s of CPU
"
        );
    });
}

#[test]
fn status_with_everything_in_place_and_no_metrics_port() {
    let status = || {
        let mut status = sample::ready();
        status.dataplane.as_mut().expect("in service").pending.clear();
        status.port_problem = Some("--admin-listen = 127.0.0.1:9474: cannot listen there: in use".into());
        status
    };
    with_agent(status, |socket| {
        let answer = ask(socket, &["status"]).expect("answer");
        assert!(answer.well, "pods need no metrics");
        assert!(answer.text.contains("\nstate      ready\n"), "{}", answer.text);
        let named =
            "           NO METRICS by TCP: --admin-listen = 127.0.0.1:9474: cannot listen there: in use\n";
        assert!(answer.text.ends_with(named), "{}", answer.text);
    });
}

#[test]
fn status_of_a_node_that_waits() {
    with_agent(sample::waiting, |socket| {
        let answer = ask(socket, &["status"]).expect("answer");
        assert!(!answer.well);
        assert!(
            answer.text.starts_with(
                "node       node-a, weftd 0.1.0
state      NOT READY: pods cannot be added
           waiting for the store: http://127.0.0.1:2379 does not answer: connection refused (--etcd-endpoints)
store      etcd at http://10.0.0.1:2379, prefix /coreos.com/network: NOT CONNECTED
"
            ),
            "{}",
            answer.text
        );
    });
}

#[test]
fn status_of_a_packet_path() {
    with_agent(sample::udp, |socket| {
        let text = ask(socket, &["status"]).expect("answer").text;
        let expected = "
dataplane  flannel0, pod MTU 1450, 9 objects right, 1 pending, 3 repairs
           PENDING route 10.5.3.0/24: no such device (tried 4 times)
path       UDP 192.168.9.1:8285, 4400 packets sent (6.2 MiB, 120 system calls), 2200 packets received (0.1 MiB, 300 system calls)
           offloads in use: tun-tso
           offload tun-uso refused: Invalid argument (os error 22)
           offload udp-gro switched-off
           dropped 3 to peers: no-route
           dropped 5 from peers: unknown-peer
           ICMP errors: 2 sent, 1 held back by the rate limit
           the device went away 1 times
           NO ICMP ERRORS are sent: no right
           a BUG: its threads panicked and were started anew 2 times
peers      1 of 2 programmed
";
        assert!(text.contains(expected), "{text}");
    });
}

#[test]
fn status_says_what_is_not_as_it_was_meant() {
    with_agent(sample::with_notices, |socket| {
        let text = ask(socket, &["status"]).expect("answer").text;
        for line in [
            "           network, lease and peers are FROM DISK, saved 1 min 30 s ago",
            "           CONFIGURATION INVALID: the last good one stays in force: network configuration: Network = 7",
            "           BROKEN: eth0 is down",
            "           STAYS AS IT IS: no such address",
            "           3 in 10.5.9.0/24, now held by 192.168.9.7: they talk on this node only; recreate them",
            "policies   NOT ENFORCED: 3 NetworkPolicies exist, and nothing that weft knows enforces them on this node",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
        }
    });
}

#[test]
fn status_says_of_network_policies_what_is_known() {
    let line = |state, count, enforcers: &[&str], problem: Option<&str>| {
        let mut status = sample::ready();
        status.network_policies = Some(NetworkPolicyStatus {
            state,
            count,
            enforcers: enforcers.iter().map(|name| (*name).to_owned()).collect(),
            problem: problem.map(Into::into),
        });
        let page = render::status(&status);
        page.lines().find(|line| line.starts_with("policies")).unwrap_or_default().to_owned()
    };
    assert_eq!(
        line(NetworkPolicyState::Unenforced, Some(1), &[], None),
        "policies   NOT ENFORCED: 1 NetworkPolicy exists, and nothing that weft knows enforces it on this node"
    );
    assert_eq!(
        line(NetworkPolicyState::Enforced, None, &["A (x)", "B (y)"], None),
        "policies   enforced by A (x), B (y)"
    );
    assert_eq!(
        line(NetworkPolicyState::Unknown, None, &[], Some("why")),
        "policies   not known whether they are enforced: why"
    );
    assert_eq!(line(NetworkPolicyState::None, Some(0), &[], None), "", "nothing to say");
}

fn embedded() -> Status {
    let mut status = sample::ready();
    status.store.one_machine_only = true;
    status.peers.clear();
    status.refused.clear();
    status
}

#[test]
fn an_embedded_store_says_what_it_is() {
    with_agent(embedded, |socket| {
        let text = ask(socket, &["status"]).expect("answer").text;
        assert!(
            text.contains("\n           ONE MACHINE ONLY: nodes on other machines cannot join"),
            "{text}"
        );
        assert_eq!(ask(socket, &["peers"]).expect("answer").text, "no peers: no other node has a lease\n");
        let error = ask(socket, &["ping", "all"]).expect_err("alone");
        assert_eq!(
            (error.to_string().as_str(), error.exit_status()),
            ("no peer yet: no other node has a lease in use", 2)
        );
    });
}

#[test]
fn peers_are_a_table() {
    with_agent(sample::ready, |socket| {
        let answer = ask(socket, &["peers"]).expect("answer");
        assert!(!answer.well, "one is not programmed");
        assert_eq!(
            answer.text,
            "#  SUBNET       PUBLIC IP    BACKEND  STATE
1  10.5.2.0/24  192.168.9.2  vxlan    programmed; expired, 9 min 35 s left
2  10.5.3.0/24  192.168.9.3  vxlan    NOT PROGRAMMED: no such device
-  10.9.1.0-24                        REFUSED: outside Network 10.5.0.0/16
"
        );
    });
}

#[test]
fn pods_are_a_table() {
    with_agent(sample::ready, |socket| {
        let answer = ask(socket, &["pods"]).expect("answer");
        assert!(answer.well);
        assert_eq!(
            answer.text,
            "POD           ADDRESS   INTERFACE  VETH             BRIDGE  STATE      HOST PORTS                      LIMITS
shop/web-0    10.5.1.2  eth0       vethab2cd3ef4gh  cni0    committed  8080/tcp -> 80, 53/udp -> 5353  in 8 Mbit/s
7be2104f9d3c  10.5.1.3  eth0       vethij5kl6mn7op  cni0    reserved
"
        );
    });
    with_agent(sample::waiting, |socket| {
        let text = ask(socket, &["pods"]).expect("answer").text;
        assert_eq!(text, "no pods: nothing is attached to this node\n");
    });
}

#[test]
fn json_is_the_agents_own() {
    with_agent(sample::ready, |socket| {
        let status: Status =
            serde_json::from_str(&ask(socket, &["status", "--json"]).expect("answer").text).expect("JSON");
        assert_eq!(status.peers, sample::ready().peers);
        let peers = ask(socket, &["--json", "peers"]).expect("answer").text;
        assert_eq!(
            serde_json::from_str::<Vec<crate::status::PeerStatus>>(&peers).expect("JSON"),
            status.peers
        );
        let pods = ask(socket, &["pods", "--json"]).expect("answer").text;
        assert_eq!(
            serde_json::from_str::<Vec<crate::status::AttachmentStatus>>(&pods).expect("JSON"),
            sample::ready().pods.list
        );
        assert_eq!(status.pods.counters, sample::ready().pods.counters);
        let version = ask(socket, &["version", "--json"]).expect("answer").text;
        assert!(version.contains("\"weftd\": \"0.1.0\""), "{version}");
    });
}

#[test]
fn ping_names_what_it_cannot_find() {
    with_agent(sample::ready, |socket| {
        let error = ask(socket, &["ping", "no de&b"]).expect_err("no such peer");
        assert!(
            error.to_string().starts_with("no peer \"no de&b\": expected all, a number from 1 to 2"),
            "{error}"
        );
        assert_eq!(error.exit_status(), 2);
    });
}

#[test]
fn peers_are_not_known_before_the_store_has_answered() {
    let expected = "not known until the store answers: http://127.0.0.1:2379 does not answer: connection refused \
                    (--etcd-endpoints)";
    with_agent(sample::waiting, |socket| {
        let peers = Answer { text: format!("{expected}\n"), well: false };
        assert_eq!(ask(socket, &["peers"]).expect("answer"), peers);
        for wanted in ["all", "10.5.2.0"] {
            let error = ask(socket, &["ping", wanted]).expect_err("not known");
            assert_eq!((error.to_string().as_str(), error.exit_status()), (expected, 1));
        }
    });
    // Those that were known before it went away still are.
    let away = || {
        let mut status = sample::ready();
        status.store.connected = false;
        status
    };
    with_agent(away, |socket| {
        assert!(ask(socket, &["peers"]).expect("answer").text.contains("10.5.2.0/24"));
        assert_eq!(ask(socket, &["ping", "no-such"]).expect_err("no such peer").exit_status(), 2);
    });
}

#[test]
fn ping_shows_both_legs() {
    let leg = |target: &str, received: u32| Leg {
        target: target.parse().expect(target),
        sent: 3,
        received,
        rtt_min: (received > 0).then_some(0.118),
        rtt_avg: (received > 0).then_some(0.25),
        rtt_max: (received > 0).then_some(1.5),
        problem: None,
    };
    let report = PingReport {
        peer: "10.5.2.0-24".parse().expect("key"),
        public_ip: "192.168.9.2".parse().expect("ip"),
        underlay: leg("192.168.9.2", 3),
        overlay: leg("10.5.2.0", 0),
        reachable: false,
        verdict: "overlay broken".into(),
    };
    assert_eq!(
        render::ping(std::slice::from_ref(&report)),
        "10.5.2.0-24 (192.168.9.2)
  underlay  192.168.9.2     3 of 3 answered, RTT 0.12/0.25/1.50 ms (min/avg/max)
  overlay   10.5.2.0        0 of 3 answered
  overlay broken
"
    );
    let both = render::ping(&[report.clone(), PingReport { reachable: true, ..report }]);
    assert!(both.ends_with("\n1 of 2 peers reachable through the overlay\n"), "{both}");
}

#[test]
fn without_an_agent_it_says_where_and_what_to_do() {
    let socket = Path::new("/nonexistent/admin.sock");
    let error = ask(socket, &["status"]).expect_err("no agent");
    assert_eq!(error.exit_status(), 1);
    for part in ["does not answer at /nonexistent/admin.sock", "Is it running", "--socket FILE"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let version = ask(socket, &["version"]).expect("needs no agent");
    assert!(version.well && version.text.ends_with("weftd   does not answer\n"), "{version:?}");
}

#[test]
fn the_socket_by_option_then_variable_then_default() {
    let socket = |args: &[&str], variable: Option<&str>| {
        let args = ["weftctl"].iter().chain(args).chain(&["status"]);
        Cli::try_parse_from(args).expect("usage").socket(variable.map(Into::into))
    };
    assert_eq!(socket(&["--socket=/a"], Some("/b")), Path::new("/a"));
    assert_eq!(socket(&[], Some("/b")), Path::new("/b"));
    for unset in [None, Some("")] {
        assert_eq!(socket(&[], unset), Path::new(ADMIN_SOCKET));
    }
    assert!(SOCKET_HELP.contains(SOCKET_VARIABLE) && SOCKET_HELP.contains(ADMIN_SOCKET));
}

#[test]
fn wrong_usage_is_refused() {
    for (args, kind) in [
        (&["weftctl"][..], ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        (&["weftctl", "frob"], ErrorKind::InvalidSubcommand),
        (&["weftctl", "ping"], ErrorKind::MissingRequiredArgument),
        (&["weftctl", "ping", "all", "--count=0"], ErrorKind::ValueValidation),
    ] {
        let error = Cli::try_parse_from(args).expect_err("refused");
        assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{args:?}");
    }
}

#[test]
fn spans_and_escapes() {
    for (seconds, text) in
        [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3_725, "1 h 2 min"), (90_000, "1 d 1 h"), (86_460, "1 d")]
    {
        assert_eq!(render::span(seconds), text);
    }
    assert_eq!(client::escape("10.5.2.0/24&x"), "10.5.2.0%2F24%26x");
}

#[test]
fn only_a_lease_that_the_node_has_is_said_to_end_or_not_to() {
    let said = |state: &str, expires_in| {
        let mut status = sample::ready();
        let lease = status.lease.as_mut().expect("a lease");
        (lease.state, lease.expires_in) = (state.into(), expires_in);
        let page = render::status(&status);
        page.lines().find(|line| line.starts_with("lease")).expect("a line").to_owned()
    };
    assert!(said("held", None).ends_with("held, public IP 192.168.9.1, does not expire"));
    assert!(said("recalled", Some(40)).ends_with("recalled, public IP 192.168.9.1, expires in 40 s"));
    for expires_in in [None, Some(0)] {
        assert!(said("lost", expires_in).ends_with("lost, public IP 192.168.9.1"));
    }
}

#[test]
fn what_comes_from_outside_forges_no_line_and_steers_no_terminal() {
    const FORGED: &str = "zz\nstate      ready\r\u{1b}[31m\u{9b}2J\u{202e}\u{7f}";
    const SHOWN: &str = r"zz\nstate      ready\r\u{1b}[31m\u{9b}2J\u{202e}\u{7f}";
    let mut status = sample::ready();
    let lines = |text: &str| text.lines().count();
    let (page, table) = (lines(&render::status(&status)), lines(&render::peers(&status)));
    let pods = lines(&render::pods(&status.pods.list));
    for refused in &mut status.refused {
        (refused.key, refused.reason) = (FORGED.into(), FORGED.into());
    }
    for peer in &mut status.peers {
        (peer.backend, peer.problem) = (FORGED.into(), Some(FORGED.into()));
    }
    for pod in &mut status.pods.list {
        (pod.pod, pod.state) = (Some(FORGED.into()), FORGED.into());
    }
    for (text, before) in [
        (render::status(&status), page),
        (render::peers(&status), table),
        (render::pods(&status.pods.list), pods),
    ] {
        assert_eq!(lines(&text), before, "{text}");
        let steering = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(text.contains(SHOWN) && !text.contains(steering), "{text:?}");
    }
    status.store.connected = false;
    status.store.problem = Some(FORGED.into());
    (status.peers, status.refused) = (Vec::new(), Vec::new());
    assert_eq!(render::peers(&status), format!("not known until the store answers: {SHOWN}\n"));
    assert_eq!(render::printable(r#"Größe "a\b" 'c'"#), r#"Größe "a\b" 'c'"#);
}
