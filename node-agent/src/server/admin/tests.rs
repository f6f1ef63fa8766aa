//! Real sockets, spoken to byte by byte.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::*;
use crate::status::{Status, sample};

struct Served {
    tcp: SocketAddr,
    socket: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

async fn served(status: fn() -> Status) -> Served {
    let dir = tempfile::tempdir().expect("tempdir");
    let socket = dir.path().join("run/admin.sock");
    let admin = Admin::bind("127.0.0.1:0".parse().ok(), &socket).await.expect("bind");
    let tcp =
        axum::serve::Listener::local_addr(admin.tcp.as_ref().expect("TCP was asked for")).expect("address");
    let stop = CancellationToken::new();
    let status: StatusSource = Arc::new(status);
    let state = AdminState { metrics: Arc::new(Metrics::new(status.clone())), status };
    let task = tokio::spawn(admin.serve(state, stop.clone()));
    Served { tcp, socket, stop, task, _dir: dir }
}

impl Served {
    async fn tcp(&self, request: &str) -> String {
        exchange(TcpStream::connect(self.tcp).await.expect("connect"), request).await
    }

    async fn unix(&self, request: &str) -> String {
        exchange(UnixStream::connect(&self.socket).await.expect("connect"), request).await
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    stream.write_all(format!("{request} HTTP/1.0\r\n\r\n").as_bytes()).await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    answer
}

fn code(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

#[tokio::test]
async fn health_and_readiness() {
    let ready = served(sample::ready).await;
    let answer = ready.tcp("GET /healthz").await;
    assert!(code(&answer) == "200" && answer.ends_with("\r\n\r\nweftd is running\n"), "{answer}");
    let answer = ready.tcp("GET /readyz").await;
    assert!(code(&answer) == "200" && answer.ends_with("weftd is ready\n"), "{answer}");

    let noticed = served(sample::with_notices).await;
    let answer = noticed.tcp("GET /readyz").await;
    assert_eq!(code(&answer), "200");
    for line in [
        "weftd is ready",
        "notice: network, lease and peers are from disk, saved 90 s ago",
        "notice: the last good one stays in force: network configuration: Network = 7",
        "notice: the underlay stays as it is: no such address",
        "notice: 3 NetworkPolicies exist, and nothing that weft knows enforces them on this node",
        "notice: 3 pods live in 10.5.9.0/24, which this node has no more",
    ] {
        assert!(answer.lines().any(|l| l == line), "{line:?} is not in {answer}");
    }

    let waiting = served(sample::waiting).await;
    assert_eq!(code(&waiting.tcp("GET /healthz").await), "200");
    let answer = waiting.tcp("GET /readyz").await;
    assert_eq!(code(&answer), "503");
    assert!(
        answer.contains("not ready yet\nwaiting for the store: http://127.0.0.1:2379 does not answer"),
        "{answer}"
    );
}

#[tokio::test]
async fn metrics_and_state_on_both_listeners() {
    let served = served(sample::ready).await;
    for answer in [served.tcp("GET /metrics").await, served.unix("GET /metrics").await] {
        assert!(answer.to_lowercase().contains("content-type: application/openmetrics-text"), "{answer}");
        assert!(answer.ends_with("# EOF\n") && answer.contains("\nweft_ready 1\n"), "{answer}");
    }
    for answer in [served.tcp("GET /debug/state").await, served.unix("GET /debug/state").await] {
        let (_, body) = answer.split_once("\r\n\r\n").expect("body");
        let status: Status = serde_json::from_str(body).expect("a status");
        assert_eq!(status.peers, sample::ready().peers);
    }
}

#[tokio::test]
async fn ping_is_for_the_socket_alone() {
    let served = served(sample::ready).await;
    assert_eq!(code(&served.tcp("POST /ping?peer=1").await), "404");
    let answer = served.unix("POST /ping?peer=10.77.0.1").await;
    assert!(code(&answer) == "404" && answer.contains("no peer \"10.77.0.1\""), "{answer}");
    let answer = served.unix("POST /ping?peer=1&count=0").await;
    assert!(code(&answer) == "400" && answer.contains("count = 0: expected 1 to 100"), "{answer}");
    assert_eq!(code(&served.unix("POST /ping").await), "400");
    assert_eq!(code(&served.unix("GET /ping?peer=1").await), "405");
}

#[tokio::test]
async fn the_socket_is_its_owners_and_replaces_a_dead_one_only() {
    let served = served(sample::ready).await;
    let mode = |path: &Path| std::fs::metadata(path).expect("exists").permissions().mode() & 0o777;
    assert_eq!(mode(&served.socket), 0o600);
    assert_eq!(mode(served.socket.parent().expect("parent")), 0o700);
    let error = Admin::bind(None, &served.socket).await.expect_err("in use").to_string();
    assert!(
        error.starts_with("--admin-socket: ") && error.contains("is answered by another weftd"),
        "{error}"
    );

    // Dead, its file left behind.
    served.task.abort();
    assert!(served.task.await.is_err_and(|e| e.is_cancelled()));
    assert!(served.socket.exists());
    Admin::bind(None, &served.socket).await.expect("a dead agent's socket is replaced");
}

#[tokio::test]
async fn what_cannot_be_bound_is_named() {
    let error =
        Admin::bind(None, Path::new("/proc/weft/admin.sock")).await.expect_err("no such place").to_string();
    assert!(error.starts_with("--admin-socket: /proc/weft: "), "{error}");
}

#[tokio::test]
async fn a_port_that_somebody_has_is_named_and_taken_as_soon_as_it_is_free() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = other.local_addr().expect("address");
    let dir = tempfile::tempdir().expect("tempdir");
    let socket = dir.path().join("run/admin.sock");
    let admin = Admin::bind(Some(addr), &socket).await.expect("the socket is enough");
    let mut problem = admin.port_problem();
    let named = problem.borrow_and_update().clone().expect("a problem");
    assert!(named.starts_with(&format!("--admin-listen = {addr}: cannot listen there: ")), "{named}");
    let stop = CancellationToken::new();
    let status: StatusSource = Arc::new(sample::ready);
    let state = AdminState { metrics: Arc::new(Metrics::new(status.clone())), status };
    let task = tokio::spawn(admin.serve(state, stop.clone()));
    let over_socket = exchange(UnixStream::connect(&socket).await.expect("connect"), "GET /metrics").await;
    assert_eq!(code(&over_socket), "200", "served meanwhile");

    drop(other);
    let free = tokio::time::timeout(Duration::from_secs(60), problem.wait_for(Option::is_none));
    free.await.expect("tried again").expect("the agent lives");
    let by_port = exchange(TcpStream::connect(addr).await.expect("connect"), "GET /metrics").await;
    assert_eq!(code(&by_port), "200");
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), task).await.expect("in time").expect("no panic");
}

#[tokio::test]
async fn it_stops_when_told_and_takes_its_socket_along() {
    let served = served(sample::ready).await;
    // An idle connection does not hold the stop up.
    let mut idle = TcpStream::connect(served.tcp).await.expect("connect");
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("write");
    let mut first = [0; 12];
    idle.read_exact(&mut first).await.expect("answer");
    assert_eq!(&first, b"HTTP/1.1 200");
    served.stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), served.task).await.expect("in time").expect("no panic");
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).await.expect("closed, not reset");
    assert!(!served.socket.exists());
    assert!(TcpStream::connect(served.tcp).await.is_err());
}

#[tokio::test]
async fn a_successors_socket_is_not_ours_to_remove() {
    let served = served(sample::ready).await;
    std::fs::remove_file(&served.socket).expect("remove");
    let successor = std::os::unix::net::UnixListener::bind(&served.socket).expect("bind");
    served.stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), served.task).await.expect("in time").expect("no panic");
    assert!(served.socket.exists());
    drop(successor);
}

#[tokio::test]
async fn a_directory_that_others_write_to_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o1777)).expect("chmod");
    let error = Admin::bind(None, &dir.path().join("admin.sock")).await.expect_err("open").to_string();
    assert!(error.contains("open to others, mode 1777: expected a directory that root alone"), "{error}");
}

#[tokio::test]
async fn a_client_that_says_nothing_is_let_go() {
    let (client, server) = UnixStream::pair().expect("pair");
    let state: StatusSource = Arc::new(sample::ready);
    let router = routes::public(AdminState { metrics: Arc::new(Metrics::new(state.clone())), status: state });
    let header = Duration::from_millis(50);
    let ended = listen::connection::<UnixListener>(server, router, header, CancellationToken::new());
    tokio::time::timeout(Duration::from_secs(10), ended).await.expect("let go, though the client stays");
    drop(client);
}
