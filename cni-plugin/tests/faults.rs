//! An agent that is away, hangs, refuses or hangs up; a plugin that is killed; names that are taken.

mod support;

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::double::{Behaviour, failure};
use support::{Namespace, Node, eventually, exists, host_veth};
use weft_shared::deadline;
use weft_shared::protocol::{Reply, Request, encode};
use weft_shared::tombstone::Tombstone;

/// What a busy machine adds to a deadline, less than lies between a DEL's and an ADD's.
const SLOWNESS: Duration = Duration::from_secs(3);

#[test]
fn without_an_agent_each_verb_says_what_the_runtime_can_act_on() {
    let (node, pod) = (Node::new(), Namespace::new());
    let socket = node.socket().display().to_string();
    let text = node.add("c1", &pod).refused(11);
    assert!(text.contains(&socket) && text.contains("systemctl status weftd"), "{text}");
    assert_eq!(pod.link_names(), [""; 0]);
    let conf = node.conf("1.1.0", json!({}));
    let text = node.call("STATUS", "", "", &conf).run().refused(50);
    assert!(text.contains(&socket) && text.contains("systemctl status weftd"), "{text}");
    let gc = node.conf("1.1.0", json!({"cni.dev/attachments": []}));
    node.call("GC", "", "", &gc).run().refused(11);
}

#[test]
fn an_add_rides_out_a_restart() {
    let (node, pod) = (Node::new(), Namespace::new());
    let child = node.call("ADD", "c1", &pod.path(), &node.conf("1.1.0", json!({}))).spawn();
    // The plugin has found nobody before the agent comes: its attempts show in its system calls, so look there.
    eventually("the plugin waits", || {
        let wait = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
        wait.contains("nanosleep")
    });
    let _agent = node.agent();
    support::Outcome::of(child.wait_with_output().expect("end")).ok();
}

#[test]
fn a_del_without_an_agent_deletes_the_veth_and_leaves_a_tombstone() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    node.add("c1", &pod).ok();
    let Request::Reserve(reserve) = agent.books().requests[0].clone() else { panic!("Reserve comes first") };
    drop(agent);
    for _ in 0..2 {
        assert_eq!(node.del("c1", &pod.path()).ok(), Value::Null);
        assert_eq!(node.ns.link_names(), ["cni0"]);
        let tombstones = node.tombstones();
        let [tombstone] = tombstones.as_slice() else { panic!("{tombstones:?}") };
        assert_eq!(tombstone.attachment, reserve.attachment);
        assert_eq!(tombstone.netns_cookie, reserve.netns_cookie);
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("boot id");
        assert_eq!(tombstone.boot_id, boot_id.trim());
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("clock");
        let age = Duration::from(now) - Duration::from_nanos(tombstone.boottime_ns);
        assert!(age < Duration::from_secs(60), "{age:?}");
    }
    node.del("c2", "/run/netns/wcni-none").ok();
    let unknown = node.tombstones().into_iter().find(|t| t.attachment.container_id.as_str() == "c2");
    assert_eq!(unknown.expect("a second tombstone").netns_cookie, None);
}

#[test]
fn a_del_before_the_agents_first_start_makes_a_directory_of_its_own() {
    let node = Node::new();
    let run = node.dir.path().join("run");
    let conf = json!({"cniVersion": "1.1.0", "name": "mesh", "socket": run.join("cni.sock")});
    node.call("DEL", "c1", "", &conf).run().ok();
    assert_eq!(fs::metadata(&run).expect("made").permissions().mode() & 0o7777, 0o700);
    assert!(exists(&run.join("tombstones")));
}

#[test]
fn a_del_waits_for_the_draining_agent_and_then_reaches_it() {
    let node = Node::new();
    let dir = weft_shared::tombstone::dir_beside(&node.socket());
    let file = weft_shared::tombstone::lock_file(&dir).expect("lock file");
    let draining = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).expect("lock");
    let child = node.call("DEL", "c1", "", &node.conf("1.1.0", json!({}))).spawn();
    eventually("the plugin waits for the lock", || {
        let wait = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
        wait.contains("nanosleep")
    });
    let agent = node.agent();
    drop(draining);
    support::Outcome::of(child.wait_with_output().expect("end")).ok();
    assert!(matches!(agent.last_request(), Request::Release { .. }));
    assert!(node.tombstones().is_empty());
}

#[test]
fn a_release_that_fails_becomes_a_tombstone() {
    let node = Node::new();
    let _agent =
        node.agent().behaving(Behaviour { refuse: Some(failure(999, "disk full")), ..Behaviour::default() });
    node.del("c1", "").ok();
    assert_eq!(node.tombstones().len(), 1);
}

#[test]
fn a_del_is_over_in_time_although_the_agent_hangs_and_holds_the_lock() {
    let node = Node::new();
    let _agent = node.agent().behaving(Behaviour { mute: true, ..Behaviour::default() });
    let dir = weft_shared::tombstone::dir_beside(&node.socket());
    let file = weft_shared::tombstone::lock_file(&dir).expect("lock file");
    let _held = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).expect("lock");
    let start = Instant::now();
    node.del("c1", "").ok();
    let took = start.elapsed();
    assert!(took < deadline::DEL_OR_CHECK + SLOWNESS, "DEL took {took:?}");
    assert_eq!(node.tombstones().len(), 1);
}

#[test]
fn a_configuration_that_never_ends_is_given_up() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    let conf = node.conf("1.1.0", json!({}));
    let start = Instant::now();
    let held_open = |verb: &str| {
        let mut call = node.call(verb, "c1", &pod.path(), &conf);
        let mut child = call.command.spawn().expect("the plugin starts");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(call.stdin.as_bytes()).expect("written");
        (child, stdin)
    };
    let (add, _add_stdin) = held_open("ADD");
    let (del, _del_stdin) = held_open("DEL");
    for (child, span) in [(del, deadline::DEL_OR_CHECK), (add, deadline::ADD)] {
        let outcome = support::Outcome::of(child.wait_with_output().expect("end"));
        assert!(outcome.refused(5).contains("has not ended in time"));
        let took = start.elapsed();
        assert!((span..span + SLOWNESS).contains(&took), "{took:?}, expected {span:?}");
    }
    assert!(agent.books().requests.is_empty());
}

#[test]
fn a_mute_agent_is_given_up() {
    let node = Node::new();
    let _agent = node.agent().behaving(Behaviour { mute: true, ..Behaviour::default() });
    let start = Instant::now();
    let text = node.call("STATUS", "", "", &node.conf("1.1.0", json!({}))).run().refused(50);
    assert!(text.contains("did not answer in time"), "{text}");
    // Generous: it guards against waiting for ever, kubelet against more than a second.
    assert!(start.elapsed() < Duration::from_secs(5));
    node.del("c1", "").ok();
    assert_eq!(node.tombstones().len(), 1);
}

fn frame(json: &str) -> Vec<u8> {
    [&(json.len() as u32).to_be_bytes()[..], json.as_bytes()].concat()
}

#[test]
fn an_agent_that_talks_nonsense_is_told_apart_and_nothing_is_left() {
    let (node, pod) = (Node::new(), Namespace::new());
    let socket = node.socket().display().to_string();
    let nothing_left = || {
        let links = (pod.link_names(), node.ns.link_names());
        assert_eq!(links, (vec![], vec!["cni0".to_owned()]));
    };
    for (id, said, code, part) in [
        ("http", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), 5, "over the limit"),
        ("text", frame("hello"), 5, "not a message of this protocol"),
        ("unknown", frame(r#"{"version":1,"body":{"Perhaps":{}}}"#), 5, "not a message of this protocol"),
        ("version", frame(r#"{"version":2,"body":{"Perhaps":{}}}"#), 103, "speaks protocol version 2"),
    ] {
        let agent = node.agent().behaving(Behaviour { says: Some(said.clone()), ..Behaviour::default() });
        let text = node.add(id, &pod).refused(code);
        assert!(text.contains(&socket) && text.contains(part), "{text}");
        nothing_left();
        let text = node.call("STATUS", "", "", &node.conf("1.1.0", json!({}))).run().refused(code);
        assert!(text.contains(part), "{text}");
        node.del(id, &pod.path()).ok();
        let heard = |t: &Tombstone| t.attachment.container_id.as_str() == id;
        assert!(node.tombstones().iter().any(heard), "nobody will tell the agent of {id}");
        drop(agent);

        // Once it has wired the plugin cannot know whether the agent has it as attached.
        let at_commit = Behaviour { says_at_commit: Some(said), spare_orphans: true, ..Behaviour::default() };
        let agent = node.agent().behaving(at_commit);
        let text = node.add(id, &pod).refused(11);
        assert!(text.contains(part), "{text}");
        nothing_left();
        eventually("the agent forgets", || agent.books().records.is_empty());
    }
    let done = encode(&Reply::Done).expect("a frame");
    let _agent = node.agent().behaving(Behaviour { says: Some(done), ..Behaviour::default() });
    let text = node.add("done", &pod).refused(5);
    assert!(text.contains("an answer to another question"), "{text}");
    nothing_left();
}

#[test]
fn an_add_is_over_in_time_although_the_agent_falls_silent() {
    let half = frame(r#"{"version":1,"body":"Done"}"#)[..10].to_vec();
    let mute = Behaviour { mute: true, ..Behaviour::default() };
    let midway = Behaviour { says: Some(half.clone()), ..Behaviour::default() };
    let at_commit = Behaviour { says_at_commit: Some(half), spare_orphans: true, ..Behaviour::default() };
    let nodes = [mute, midway, at_commit].map(|behaviour| {
        let (node, pod) = (Node::new(), Namespace::new());
        let agent = node.agent().behaving(behaviour);
        let start = Instant::now();
        let child = node.call("ADD", "c1", &pod.path(), &node.conf("1.1.0", json!({}))).spawn();
        (node, pod, agent, start, child)
    });
    for (node, pod, _agent, start, child) in nodes {
        let text = support::Outcome::of(child.wait_with_output().expect("end")).refused(11);
        assert!(text.contains("did not answer in time"), "{text}");
        let took = start.elapsed();
        assert!((deadline::ADD..deadline::ADD + SLOWNESS).contains(&took), "{took:?}");
        assert_eq!((pod.link_names(), node.ns.link_names()), (vec![], vec!["cni0".to_owned()]));
    }
}

#[test]
fn a_failed_commit_leaves_nothing() {
    // The double spares the veth, so that what is gone the plugin has deleted.
    let hang_up = Behaviour { close_at_commit: true, spare_orphans: true, ..Behaviour::default() };
    let refuse = Behaviour {
        spare_orphans: true,
        refuse_commit: Some(failure(104, "aborted by DEL")),
        ..Behaviour::default()
    };
    for (behaviour, part) in [(hang_up, "closed the connection"), (refuse, "aborted by DEL")] {
        let (node, pod) = (Node::new(), Namespace::new());
        let agent = node.agent().behaving(behaviour);
        let text = node.add("c1", &pod).refused(11);
        assert!(text.contains(part), "{text}");
        assert_eq!(pod.link_names(), [""; 0], "the plugin has deleted the veth before it exits");
        assert!(matches!(agent.last_request(), Request::Commit(_)));
        eventually("the agent forgets", || agent.books().records.is_empty());
    }
}

#[test]
fn a_refused_reservation_is_passed_on() {
    let (node, pod) = (Node::new(), Namespace::new());
    let _agent = node
        .agent()
        .behaving(Behaviour { refuse: Some(failure(101, "10.77.0.0/24 is full")), ..Behaviour::default() });
    assert!(node.add("c1", &pod).refused(101).contains("10.77.0.0/24 is full"));
    assert_eq!(pod.link_names(), [""; 0]);
}

#[test]
fn an_interface_that_exists_is_named_and_left_alone() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    pod.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "other"]);
    pod.ip(&["address", "add", "192.0.2.1/24", "dev", "eth0"]);
    let before = pod.ip_json(&["address", "show"]);
    let text = node.add("c1", &pod).refused(100);
    assert!(text.contains("CNI_IFNAME = eth0: the container already has"), "{text}");
    assert_eq!(pod.ip_json(&["address", "show"]), before);
    eventually("the agent forgets", || agent.books().records.is_empty());
    assert_eq!(node.ns.link_names(), ["cni0"]);
}

#[test]
fn a_second_add_leaves_the_first_alone() {
    let (node, pod) = (Node::new(), Namespace::new());
    let _agent = node.agent();
    node.add("c1", &pod).ok();
    // By index: a pair made anew would have another one.
    let seen = || (pod.ip_json(&["address", "show"]), node.ns.link(&host_veth("c1"))["ifindex"].clone());
    let before = seen();
    node.add("c1", &pod).refused(100);
    assert_eq!(seen(), before);
}

#[test]
fn a_host_interface_of_our_name_is_left_alone() {
    let (node, pod) = (Node::new(), Namespace::new());
    let _agent = node.agent().behaving(Behaviour { spare_orphans: true, ..Behaviour::default() });
    let veth = host_veth("c1");
    node.ns.ip(&["link", "add", &veth, "type", "veth", "peer", "name", "other"]);
    let before = node.ns.link(&veth)["ifindex"].clone();
    assert!(node.add("c1", &pod).refused(100).contains(&format!("host interface {veth} exists")));
    assert_eq!(node.ns.link(&veth)["ifindex"], before);
    assert_eq!(pod.link_names(), [""; 0]);
}

/// The host's first packet to the first pod of a bridge would be lost, and the next one comes a second later.
#[test]
fn an_add_waits_for_a_bridge_that_cannot_send_yet_and_goes_on_without() {
    let (node, pod) = (Node::new(), Namespace::new());
    let _agent = node.agent();
    node.ns.ip(&["link", "set", "cni0", "mode", "dormant"]);
    let start = Instant::now();
    node.add("c1", &pod).ok();
    assert!(start.elapsed() >= deadline::FORWARDING, "it has not waited: {:?}", start.elapsed());
    assert!(pod.pings("10.77.0.1"));
}

#[test]
fn a_bridge_that_is_none_leaves_nothing() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    node.ns.ip(&["link", "del", "cni0"]);
    let text = node.add("c1", &pod).refused(105);
    assert!(text.contains("cannot create veth"), "{text}");
    assert_eq!((node.ns.link_names(), pod.link_names()), (vec![], vec![]));
    eventually("the agent forgets", || agent.books().records.is_empty());
}

#[test]
fn a_step_that_fails_midway_is_undone() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent().behaving(Behaviour { spare_orphans: true, ..Behaviour::default() });
    // No address on the pod's interface can make this gateway reachable.
    let conf = node.conf("1.1.0", json!({"runtimeConfig": {"ips": ["10.88.0.5"]}}));
    let text = node.call("ADD", "c1", &pod.path(), &conf).run().refused(105);
    assert!(text.contains("addresses and routes") && text.contains("invalid gateway"), "{text}");
    assert_eq!(pod.link_names(), [""; 0]);
    eventually("the agent forgets", || agent.books().records.is_empty());
}

#[test]
fn a_result_that_cannot_be_delivered_is_taken_back() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let call = node.call("ADD", "c1", &pod.path(), &node.conf("1.1.0", json!({}))).stdout(full);
    assert_eq!(call.run().code, Some(1));
    assert!(matches!(agent.last_request(), Request::Release { .. }));
    assert!(agent.books().records.is_empty());
    assert_eq!((node.ns.link_names(), pod.link_names()), (vec!["cni0".to_owned()], vec![]));
}

#[test]
fn a_directory_that_others_can_write_is_not_trusted() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent();
    fs::set_permissions(node.dir.path(), Permissions::from_mode(0o777)).expect("chmod");
    assert!(node.add("c1", &pod).refused(5).contains("others cannot write"));
    fs::set_permissions(node.dir.path(), Permissions::from_mode(0o700)).expect("chmod");
    let link = node.dir.path().join("link");
    std::os::unix::fs::symlink(node.dir.path(), &link).expect("symlink");
    let conf = json!({"cniVersion": "1.1.0", "name": "mesh", "socket": link.join("cni.sock")});
    assert!(node.call("ADD", "c1", &pod.path(), &conf).run().refused(5).contains("symbolic link"));
    assert!(agent.books().requests.is_empty());
}

#[test]
fn a_listener_of_another_user_is_not_trusted() {
    let (node, pod) = (Node::new(), Namespace::new());
    let socket = node.socket();
    fs::set_permissions(node.dir.path(), Permissions::from_mode(0o711)).expect("chmod");
    // The listener's credentials are those of listen(2), so it has to be a process of that user.
    let inside = node.dir.path().join("theirs");
    fs::create_dir(&inside).expect("directory");
    nix::unistd::chown(&inside, Some(65534.into()), Some(65534.into())).expect("chown");
    let theirs = inside.join("cni.sock");
    let script = "import socket,sys,os\ns=socket.socket(socket.AF_UNIX)\nos.setuid(65534)\ns.bind(sys.argv[1])\ns.listen()\ns.accept()[0].recv(1)";
    let mut listener =
        std::process::Command::new("python3").args(["-c", script]).arg(&theirs).spawn().expect("python3");
    eventually("it listens", || exists(&theirs));
    fs::rename(&theirs, &socket).expect("rename");
    let text = node.add("c1", &pod).refused(5);
    assert!(text.contains("uid 65534"), "{text}");
    let _ = listener.kill();
    let _ = listener.wait();
}

/// As podman calls it for a user: root of a namespace of its own, in which root's directory is nobody's or is not there.
#[test]
fn a_rootless_runtime_is_refused_in_one_sentence() {
    const SCRIPT: &str =
        "mount -t tmpfs none /run && ip netns add pod && \"$0\"; code=$?; ls -A /run >&2; exit $code";
    let node = Node::new();
    let agent = node.agent();
    let dir = tempfile::TempDir::new().expect("temporary directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("chmod");
    let program = dir.path().join("weft");
    fs::copy(env!("CARGO_BIN_EXE_weft"), &program).expect("copy");
    let call = |verb: &str, conf: &Value| {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "unshare"]);
        command.args(["--user", "--map-root-user", "--net", "--mount", "sh", "-c", SCRIPT]).arg(&program);
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "c1").env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", "/run/netns/pod").env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut output =
            support::Call { command, stdin: conf.to_string() }.spawn().wait_with_output().expect("end");
        let left = String::from_utf8(std::mem::take(&mut output.stderr)).expect("text");
        assert_eq!(left, "netns\n", "in the user's /run after {verb}");
        support::Outcome::of(output)
    };
    let absent = json!({"cniVersion": "1.1.0", "name": "mesh"});
    for (conf, found) in [(node.conf("1.1.0", json!({})), "owned by uid 65534"), (absent, "No such file")] {
        for (verb, code) in [("ADD", 109), ("STATUS", 50)] {
            let text = call(verb, &conf).refused(code);
            let sentence = "weft serves runtimes of the host's root: this one runs rootless, expected one that root has started ";
            assert!(text.starts_with(sentence) && text.contains(found), "{text}");
        }
        assert_eq!(call("DEL", &conf).ok(), Value::Null);
    }
    assert!(agent.books().requests.is_empty());
    assert!(node.tombstones().is_empty());
}

#[test]
fn killed_at_any_moment_nothing_is_left_after_del() {
    let node = Node::new();
    let agent = node.agent();
    let usual = usual_add(&node);
    let (mut cut_short, mut n) = (0, 0_u32);
    // Later and later, over twice the time of an ADD, and on until one has ended by itself: they may take longer now.
    while n < 60 || cut_short == n {
        assert!(n < 600, "the moments must straddle an ADD: all of {n} were cut short");
        let (pod, id) = (Namespace::new(), format!("k{n}"));
        let mut child = node.call("ADD", &id, &pod.path(), &node.conf("1.1.0", json!({}))).spawn();
        #[expect(clippy::disallowed_methods, reason = "the moment is under test: it sweeps over an ADD")]
        std::thread::sleep(usual * n / 30);
        let _ = child.kill();
        let killed = !child.wait().expect("end").success();
        cut_short += u32::from(killed);
        if killed && n % 2 == 0 {
            // The runtime may also simply try again with the same ID.
            eventually("a repeated ADD goes through or finds itself done", || {
                let outcome = node.add(&id, &pod);
                outcome.code == Some(0) || outcome.json["code"] == 100
            });
        }
        node.del(&id, &pod.path()).ok();
        eventually("nothing is left", || {
            pod.link_names().is_empty()
                && !node.ns.link_names().contains(&host_veth(&id))
                && agent.books().records.is_empty()
        });
        n += 1;
    }
    assert!(cut_short > 0, "the moments must straddle an ADD: none of {n} was cut short");
}

/// The median time of an ADD on this machine as busy as it is now.
fn usual_add(node: &Node) -> Duration {
    let mut times: Vec<_> = (0..5)
        .map(|n| {
            let (pod, id) = (Namespace::new(), format!("usual{n}"));
            let call = node.call("ADD", &id, &pod.path(), &node.conf("1.1.0", json!({})));
            let start = Instant::now();
            call.run().ok();
            let time = start.elapsed();
            node.del(&id, &pod.path()).ok();
            time
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

#[test]
fn an_agent_that_does_not_know_what_is_asked_is_found_out_and_nothing_is_wired() {
    let (node, pod) = (Node::new(), Namespace::new());
    let agent = node.agent().behaving(Behaviour { is_old: true, ..Behaviour::default() });
    for asked in [
        json!({"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80}]}}),
        json!({"runtimeConfig": {"bandwidth": {"ingressRate": 8000, "ingressBurst": 80000}}}),
        json!({"ipMasq": true}),
        json!({"forceAddress": true}),
    ] {
        let conf = node.conf("1.1.0", asked);
        let text = node.call("ADD", "c1", &pod.path(), &conf).run().refused(103);
        assert!(
            text.contains("does not know of host ports, of bandwidth, of ipMasq or of forceAddress"),
            "{text}"
        );
        assert_eq!(pod.link_names(), [""; 0]);
    }
    eventually("the agent forgets", || agent.books().records.is_empty());
    node.add("c1", &pod).ok();
}
