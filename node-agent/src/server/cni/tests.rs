//! The server over real sockets, as plugins, strangers and other agents meet it.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use weft_shared::Mac;
use weft_shared::cni::Code;
use weft_shared::deadline;
use weft_shared::names::host_ifname;
use weft_shared::protocol::{
    Commit, Failure, MAX_FRAME, Reply, Request, Reservation, decode, encode, frame_len,
};

use super::*;
use crate::ipam::testing::{BOOT, Node, key, reserve};
use crate::pods::NotReady;
use crate::status::FailureCount;

const DEADLINE: Duration = Duration::from_secs(30);

struct Agent {
    node: Arc<Node>,
    socket: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Agent {
    async fn start(limits: Limits) -> Self {
        let node = Arc::new(Node::new());
        let socket = node.run_dir().join("cni.sock");
        let server = Server::bind(&socket, node.ipam().clone(), limits).await.expect("bind");
        let stop = CancellationToken::new();
        let task = tokio::spawn(server.run(stop.clone()));
        Self { node, socket, stop, task }
    }

    async fn plugin(&self) -> Plugin {
        Plugin(UnixStream::connect(&self.socket).await.expect("connect"))
    }

    async fn ask(&self, request: Request) -> Reply {
        self.plugin().await.ask(&request).await
    }

    async fn ended(self) {
        self.stop.cancel();
        timeout(DEADLINE, self.task).await.expect("ends").expect("no panic");
    }
}

struct Plugin(UnixStream);

impl Plugin {
    async fn ask(&mut self, request: &Request) -> Reply {
        self.0.write_all(&encode(request).expect("encode")).await.expect("write");
        self.hear().await.expect("a reply")
    }

    /// `None` when the agent has closed the connection.
    async fn hear(&mut self) -> Option<Reply> {
        let frame = async {
            let mut header = [0; 4];
            self.0.read_exact(&mut header).await.ok()?;
            let mut json = vec![0; frame_len(header).expect("length")];
            self.0.read_exact(&mut json).await.ok()?;
            Some(decode(&json).expect("a reply"))
        };
        timeout(DEADLINE, frame).await.expect("in time")
    }

    async fn reserve(&mut self, id: &str) -> Reservation {
        match self.ask(&Request::Reserve(reserve(id))).await {
            Reply::Reserved(reservation) => reservation,
            other => panic!("{other:?}"),
        }
    }

    async fn commit(&mut self, node: &Node, id: &str) -> Reply {
        let commit = Commit {
            attachment: key(id),
            host_ifindex: node.fabric.wire(&host_ifname(&key(id))),
            host_mac: Mac([2, 0, 0, 0, 0, 1]),
            container_mac: Mac([2, 0, 0, 0, 0, 2]),
        };
        self.ask(&Request::Commit(commit)).await
    }
}

fn failed(reply: Option<Reply>) -> Failure {
    match reply {
        Some(Reply::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

async fn until(condition: impl Fn() -> bool) {
    let waited = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, waited).await.expect("in time");
}

fn release(id: &str) -> Request {
    Request::Release { attachment: key(id) }
}

fn quick() -> Limits {
    Limits { idle: Duration::from_millis(60), ..Limits::default() }
}

#[tokio::test]
async fn every_verb() {
    let agent = Agent::start(Limits::default()).await;
    assert_eq!(agent.ask(Request::Status).await, Reply::Done);
    let mut add = agent.plugin().await;
    let reservation = add.reserve("a").await;
    assert_eq!(reservation.host_ifname, host_ifname(&key("a")));
    assert_eq!(add.commit(&agent.node, "a").await, Reply::Done);
    drop(add);
    agent.node.assert_consistent();
    let check =
        Request::Check { attachment: key("a"), addresses: vec![reservation.addresses[0].address.ip()] };
    assert_eq!(agent.ask(check).await, Reply::Done);
    let gc = Request::Gc { network: "weft".parse().expect("name"), valid: vec![key("a")] };
    assert_eq!(agent.ask(gc).await, Reply::Done);
    assert_eq!(agent.node.states().len(), 1);
    assert_eq!(agent.ask(release("a")).await, Reply::Done);
    agent.node.assert_empty();
    agent.node.fabric.world().network = Err(NotReady::Degraded("subnet taken by 192.0.2.7".into()));
    let status = failed(Some(agent.ask(Request::Status).await));
    assert!(
        status.is(Code::NotAvailableAndDegraded) && status.details == "subnet taken by 192.0.2.7",
        "{status:?}"
    );
    let add = failed(Some(agent.ask(Request::Reserve(reserve("b"))).await));
    assert!(add.is(Code::TryAgainLater));
    let failures = agent.node.ipam().status().counters.failures;
    let count = |verb: &str, code: Code| FailureCount { verb: verb.into(), code: code as u32, count: 1 };
    assert_eq!(
        failures,
        [count("reserve", Code::TryAgainLater), count("status", Code::NotAvailableAndDegraded)]
    );
    agent.ended().await;
}

#[tokio::test]
async fn an_add_that_closes_before_commit_is_undone() {
    let agent = Agent::start(Limits::default()).await;
    let mut add = agent.plugin().await;
    let reservation = add.reserve("a").await;
    agent.node.fabric.wire(&reservation.host_ifname);
    drop(add);
    until(|| agent.node.states().is_empty()).await;
    agent.node.assert_empty();
    agent.ended().await;
}

#[tokio::test]
async fn a_peer_that_dies_during_reserve_is_noticed() {
    let agent = Agent::start(Limits { reserve: 6 * DEADLINE, ..Limits::default() }).await;
    let gate = agent.node.fabric.hold_bridge();
    let mut add = agent.plugin().await;
    add.0.write_all(&encode(&Request::Reserve(reserve("a"))).expect("encode")).await.expect("write");
    until(|| agent.node.states().get("a").is_some_and(|state| state == "reserved")).await;
    drop(add);
    until(|| agent.node.states().get("a").is_some_and(|state| state == "aborted")).await;
    gate.add_permits(1);
    until(|| agent.node.states().is_empty()).await;
    agent.node.assert_empty();
    agent.ended().await;
}

#[tokio::test]
async fn what_takes_too_long_is_answered_and_settled() {
    let agent = Agent::start(Limits { reserve: Duration::from_millis(50), ..Limits::default() }).await;
    let gate = agent.node.fabric.hold_bridge();
    let mut add = agent.plugin().await;
    let late = failed(Some(add.ask(&Request::Reserve(reserve("a"))).await));
    assert!(late.is(Code::TryAgainLater) && late.details.contains("reserve not done"), "{late:?}");
    gate.add_permits(1);
    drop(add);
    until(|| agent.node.states().is_empty()).await;
    agent.node.assert_empty();
    agent.ended().await;
}

#[tokio::test]
async fn two_hundred_plugins_at_once() {
    let agent = Arc::new(Agent::start(Limits::default()).await);
    let plugins: Vec<_> = (0..200)
        .map(|i| {
            let agent = agent.clone();
            tokio::spawn(async move {
                let id = format!("c{i}");
                let mut add = agent.plugin().await;
                let reservation = add.reserve(&id).await;
                if i % 4 == 0 {
                    agent.node.fabric.wire(&reservation.host_ifname);
                    return;
                }
                assert_eq!(add.commit(&agent.node, &id).await, Reply::Done);
                if i % 4 == 1 {
                    assert_eq!(agent.ask(release(&id)).await, Reply::Done);
                }
            })
        })
        .collect();
    for plugin in plugins {
        plugin.await.expect("no panic");
    }
    until(|| agent.node.states().len() == 100).await;
    agent.node.assert_consistent();
    Arc::into_inner(agent).expect("the last").ended().await;
}

#[tokio::test]
async fn strangers_hurt_nobody() {
    let agent = Agent::start(Limits::default()).await;
    let framed = |json: &[u8]| [&(json.len() as u32).to_be_bytes(), json].concat();
    for (bytes, code, reason) in [
        (
            framed(br#"{"version":2,"body":{"op":"status"}}"#),
            Code::ProtocolMismatch,
            "plugin speaks protocol version 2",
        ),
        (framed(b"GET / HTTP/1.1"), Code::Decode, "not a message"),
        (framed(br#"{"version":1,"body":{"op":"dance"}}"#), Code::Decode, "dance"),
        (((MAX_FRAME + 1) as u32).to_be_bytes().to_vec(), Code::Decode, "over the limit"),
    ] {
        let mut stranger = agent.plugin().await;
        stranger.0.write_all(&bytes).await.expect("write");
        let failure = failed(stranger.hear().await);
        assert!(failure.is(code) && failure.details.contains(reason), "{failure:?}");
        assert_eq!(stranger.hear().await, None, "and closed");
    }
    // One that begins and goes away, and many that say nothing at all.
    let mut cut = agent.plugin().await;
    cut.0.write_all(&[0, 0, 1, 0, b'{']).await.expect("write");
    drop(cut);
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(agent.plugin().await);
    }
    assert_eq!(agent.ask(Request::Status).await, Reply::Done);
    agent.ended().await;
}

#[tokio::test]
async fn the_slow_are_left() {
    let agent = Agent::start(quick()).await;
    let mut silent = agent.plugin().await;
    assert_eq!(silent.hear().await, None);
    let mut dripping = agent.plugin().await;
    dripping.0.write_all(&[0, 0, 1, 0, b'{']).await.expect("write");
    assert_eq!(dripping.hear().await, None);
    agent.ended().await;
}

#[tokio::test]
async fn a_plugin_that_never_commits_is_left_and_its_address_held() {
    let agent = Agent::start(Limits { wiring: Duration::from_millis(60), ..Limits::default() }).await;
    let mut add = agent.plugin().await;
    add.reserve("a").await;
    assert_eq!(add.hear().await, None);
    until(|| agent.node.states()["a"] == "aborted").await;
    agent.node.pass_time(deadline::WIRING);
    agent.node.ipam().tend().await;
    agent.node.assert_empty();
    agent.ended().await;
}

#[tokio::test]
async fn connections_are_counted() {
    let agent = Agent::start(Limits { connections: 2, ..Limits::default() }).await;
    let (first, second) = (agent.plugin().await, agent.plugin().await);
    let refused = failed(agent.plugin().await.hear().await);
    assert!(refused.is(Code::TryAgainLater) && refused.details.contains("2 connections"), "{refused:?}");
    drop((first, second));
    let served = async { while agent.plugin().await.hear_status().await.is_none() {} };
    timeout(DEADLINE, served).await.expect("in time");
    agent.ended().await;
}

impl Plugin {
    /// `None` when refused.
    async fn hear_status(&mut self) -> Option<Reply> {
        self.0.write_all(&encode(&Request::Status).ok()?).await.ok()?;
        self.hear().await.filter(|reply| *reply == Reply::Done)
    }
}

#[tokio::test]
async fn only_the_owner_may_speak() {
    let node = Node::new();
    let dir = node.run_dir().join("theirs");
    fs::create_dir(&dir).expect("dir");
    chown(&dir, Some(4242), None).expect("chown");
    let limits = Limits { uid: 4242, ..Limits::default() };
    let socket = dir.join("cni.sock");
    let server = Server::bind(&socket, node.ipam().clone(), limits).await.expect("bind");
    let stop = CancellationToken::new();
    let task = tokio::spawn(server.run(stop.clone()));
    // To this server root is the stranger.
    let mut root = Plugin(UnixStream::connect(&socket).await.expect("connect"));
    let refused = failed(root.hear().await);
    assert!(
        refused.is(Code::BadConfiguration) && refused.details.contains("uid 0, expected 4242"),
        "{refused:?}"
    );
    assert_eq!(root.hear().await, None);
    stop.cancel();
    task.await.expect("ends");
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("there").mode() & 0o7777
}

async fn refused(socket: &Path, node: &Node) -> String {
    let bound = Server::bind(socket, node.ipam().clone(), Limits::default()).await;
    bound.map(drop).expect_err("refused").to_string()
}

#[tokio::test]
async fn the_directory_is_ours_alone() {
    let node = Node::new();
    let open = node.run_dir().join("open");
    fs::create_dir(&open).expect("dir");
    fs::set_permissions(&open, Permissions::from_mode(0o755)).expect("chmod");
    for (dir, left_at) in [(open.clone(), 0o755), (node.run_dir().join("new"), 0o700)] {
        let socket = dir.join("cni.sock");
        let server = Server::bind(&socket, node.ipam().clone(), Limits::default()).await.expect("bind");
        assert_eq!((mode(&dir), mode(&socket)), (left_at, 0o600));
        assert_eq!(fs::read_dir(&dir).expect("dir").count(), 1, "nothing beside the socket");
        drop(server);
    }
    let link = node.run_dir().join("link");
    symlink(&open, &link).expect("symlink");
    let error = refused(&link.join("cni.sock"), &node).await;
    assert!(error.contains("a symbolic link: expected a directory"), "{error}");
    fs::set_permissions(&open, Permissions::from_mode(0o775)).expect("chmod");
    let error = refused(&open.join("cni.sock"), &node).await;
    assert!(error.contains("open to others, mode 775"), "{error}");
    chown(&open, Some(4242), None).expect("chown");
    let error = refused(&open.join("cni.sock"), &node).await;
    assert!(error.contains("owned by uid 4242"), "{error}");
    let file = node.run_dir().join("file");
    fs::write(&file, "").expect("file");
    let error = refused(&file.join("cni.sock"), &node).await;
    assert!(error.contains("file"), "{error}");
}

#[tokio::test]
async fn one_agent_per_socket() {
    let agent = Agent::start(Limits::default()).await;
    let error = refused(&agent.socket, &agent.node).await;
    assert!(error.contains("another weftd"), "{error}");
    assert_eq!(agent.ask(Request::Status).await, Reply::Done, "the first is unharmed");

    // A dead agent's socket is replaced, anything else is not.
    let stale = agent.node.run_dir().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("bind"));
    assert!(stale.exists());
    Server::bind(&stale, agent.node.ipam().clone(), Limits::default()).await.expect("replaced");
    let file = agent.node.run_dir().join("precious.sock");
    fs::write(&file, "precious").expect("file");
    let error = refused(&file, &agent.node).await;
    assert!(error.contains("there and no socket"), "{error}");
    assert_eq!(fs::read(&file).expect("file"), b"precious");
    let long = agent.node.run_dir().join("x".repeat(120));
    assert!(refused(&long, &agent.node).await.contains(&"x".repeat(120)));
    agent.ended().await;
}

#[tokio::test]
async fn tombstones_are_drained_before_anyone_is_heard() {
    let node = Node::new();
    node.attach("a").await;
    node.pass_time(Duration::from_secs(1));
    let dir = node.run_dir().join("tombstones");
    let plugin = weft_shared::tombstone::lock_file(&dir).expect("lock");
    plugin.lock_shared().expect("a DEL that found no agent");
    let socket = node.run_dir().join("cni.sock");
    let bound = Server::bind(&socket, node.ipam().clone(), Limits::default());
    tokio::pin!(bound);
    assert!(timeout(Duration::from_millis(50), &mut bound).await.is_err(), "waits for the DEL");
    assert!(!socket.exists());
    node.bury(&key("a"), BOOT);
    fs::write(dir.join("torn.tmp77"), "{").expect("write");
    plugin.unlock().expect("unlock");
    let server = bound.await.expect("bind");
    assert_eq!(node.tombstone_files(), 0);
    assert_eq!(fs::read_dir(&dir).expect("dir").count(), 1, "the lock alone");
    node.assert_empty();
    drop(server);
}

#[tokio::test]
async fn a_stop_lets_open_adds_end() {
    let agent = Agent::start(Limits::default()).await;
    let mut add = agent.plugin().await;
    add.reserve("a").await;
    let mut idle = agent.plugin().await;
    agent.stop.cancel();
    assert_eq!(idle.hear().await, None);
    until(|| !agent.socket.exists()).await;
    assert_eq!(add.commit(&agent.node, "a").await, Reply::Done);
    timeout(DEADLINE, agent.task).await.expect("ends").expect("no panic");
    agent.node.assert_consistent();
}

#[tokio::test]
async fn a_stop_waits_for_work_that_nobody_waits_for() {
    let short = Duration::from_millis(50);
    let mut agent = Agent::start(Limits { request: short, drain: DEADLINE, ..Limits::default() }).await;
    let gate = agent.node.fabric.hold_bridge();
    let ipam = agent.node.ipam().clone();
    let add = tokio::spawn(async move {
        let connection = ipam.connect();
        assert!(
            ipam.reserve(connection.id(), reserve("a")).await.expect_err("deleted").is(Code::TryAgainLater)
        );
        connection.closed(true).await;
    });
    until(|| !agent.node.states().is_empty()).await;
    // A DEL has to wait for the ADD, the plugin does not.
    let mut del = agent.plugin().await;
    let late = failed(Some(del.ask(&release("a")).await));
    assert!(late.details.contains("not done in"), "{late:?}");
    agent.stop.cancel();
    assert_eq!(del.hear().await, None);
    assert!(timeout(short, &mut agent.task).await.is_err(), "waits for the DEL");
    gate.add_permits(1);
    timeout(DEADLINE, agent.task).await.expect("ends").expect("no panic");
    add.await.expect("no panic");
    agent.node.assert_empty();
}

#[tokio::test]
async fn a_stop_does_not_wait_for_ever() {
    let agent = Agent::start(Limits { drain: Duration::from_millis(50), ..Limits::default() }).await;
    let mut add = agent.plugin().await;
    add.reserve("a").await;
    // The socket of a successor is not ours to remove.
    fs::remove_file(&agent.socket).expect("remove");
    let successor = std::os::unix::net::UnixListener::bind(&agent.socket).expect("bind");
    agent.stop.cancel();
    timeout(DEADLINE, agent.task).await.expect("ends").expect("no panic");
    assert!(agent.socket.exists());
    drop(successor);
    assert_eq!(agent.node.states()["a"], "aborted");
}
