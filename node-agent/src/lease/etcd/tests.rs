use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use tempfile::TempDir;
use tokio::time::timeout;

use super::super::Departure;
use super::*;
use crate::lease::contract::{self, DAY, Fixture, PATIENCE, Watching, acquire, small_pool, value, want};

contract::contract!(Server);

const PREFIX: &str = "/weft/test";

/// A real etcd on loopback with a directory of its own. Missing binaries fail the test: install `etcd-server` and
/// `etcd-client`.
struct Server {
    dir: TempDir,
    client: u16,
    peer: u16,
    flags: Vec<String>,
    child: Option<Child>,
}

impl Server {
    fn stopped() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let free = || TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (client, peer) = (free(), free());
        let port = |listener: &TcpListener| listener.local_addr().expect("address").port();
        Self { client: port(&client), peer: port(&peer), dir, flags: Vec::new(), child: None }
    }

    async fn started() -> Self {
        let mut server = Self::stopped();
        server.start().await;
        server
    }

    fn url(&self) -> String {
        let scheme = if self.flags.is_empty() { "http" } else { "https" };
        format!("{scheme}://127.0.0.1:{}", self.client)
    }

    /// Starts it on the same ports with the same data, and waits until it answers.
    async fn start(&mut self) {
        let peer = format!("http://127.0.0.1:{}", self.peer);
        let child = Command::new("etcd")
            .args(["--name", "s1", "--log-level", "error", "--logger", "zap"])
            .args(["--data-dir", &self.dir.path().join("data").display().to_string()])
            .args(["--listen-client-urls", &self.url(), "--advertise-client-urls", &self.url()])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("s1={peer}")])
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| {
                panic!("etcd does not start ({e}): install Debian's etcd-server and etcd-client")
            });
        self.child = Some(child);
        let store = EtcdStore::new(&self.config()).expect("settings");
        let deadline = Instant::now() + PATIENCE;
        while let Err(StoreError::Unavailable { reason, .. }) = store.network_config().await {
            assert!(Instant::now() < deadline, "etcd does not answer: {reason}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill etcd");
            child.wait().expect("reap etcd");
        }
    }

    /// Stops it where watches look for it and starts it on another port, so that none can look in between. Returns the
    /// port to come back on.
    async fn restart_elsewhere(&mut self) -> u16 {
        self.stop();
        let port = self.client;
        self.client = TcpListener::bind("127.0.0.1:0").expect("port").local_addr().expect("address").port();
        self.start().await;
        port
    }

    async fn restart_at(&mut self, port: u16) {
        self.stop();
        self.client = port;
        self.start().await;
    }

    /// Puts the data directory back to what `etcdctl snapshot save` wrote. The server must be stopped.
    fn restore(&self, snapshot: &Path) {
        self.wipe();
        let peer = format!("http://127.0.0.1:{}", self.peer);
        self.etcdctl(&[
            "snapshot",
            "restore",
            &snapshot.display().to_string(),
            "--name=s1",
            &format!("--data-dir={}", self.dir.path().join("data").display()),
            &format!("--initial-cluster=s1={peer}"),
            &format!("--initial-advertise-peer-urls={peer}"),
        ]);
    }

    fn wipe(&self) {
        std::fs::remove_dir_all(self.dir.path().join("data")).expect("wipe");
    }

    fn config(&self) -> EtcdConfig {
        let tls = |name: &str| Some(self.dir.path().join(name)).filter(|path| path.exists());
        let client_cert = tls("client.crt").zip(tls("client.key"));
        let client_cert = client_cert.map(|(cert_file, key_file)| ClientCert { cert_file, key_file });
        EtcdConfig { ca_file: tls("ca.crt"), client_cert, ..at(&self.url()) }
    }

    /// As an operator types it. Off the runtime's thread would be nicer; these tests have it to themselves.
    fn etcdctl(&self, args: &[&str]) -> String {
        let output = self.try_etcdctl(args);
        assert!(output.status.success(), "etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("utf-8").trim_end().to_owned()
    }

    fn try_etcdctl(&self, args: &[&str]) -> Output {
        Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.url()])
            .args(args)
            .output()
            .unwrap_or_else(|e| panic!("etcdctl does not start ({e}): install Debian's etcd-client"))
    }

    fn path(key: &str) -> String {
        format!("{PREFIX}/subnets/{key}")
    }

    fn leases(&self) -> usize {
        let text = self.etcdctl(&["lease", "list"]);
        text.lines().filter(|line| !line.starts_with("found")).count()
    }

    /// Reads that the server has been asked for, by its own count.
    fn range_requests(&self) -> u64 {
        self.counted("grpc_server_started_total", "Range")
    }

    fn counted(&self, figure: &str, method: &str) -> u64 {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.client)).expect("connect");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("ask");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("metrics");
        let counts = text.lines().filter(|l| l.starts_with(&format!("{figure}{{grpc_method=\"{method}\"")));
        let counts: Vec<u64> = counts.filter_map(|l| l.rsplit(' ').next()?.parse().ok()).collect();
        assert!(!counts.is_empty(), "{text}");
        counts.iter().sum()
    }

    fn revision(&self) -> String {
        let json = self.etcdctl(&["get", "x", "-w", "json"]);
        let json: serde_json::Value = serde_json::from_str(&json).expect(&json);
        json["header"]["revision"].to_string()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Without TLS and without a login.
fn at(url: &str) -> EtcdConfig {
    let endpoints = vec![url.to_owned()];
    EtcdConfig { endpoints, prefix: PREFIX.into(), ca_file: None, client_cert: None, login: None }
}

fn login(name: &str, password: &str) -> Option<Login> {
    Some(Login { username: name.into(), password: Secret(password.into()) })
}

impl Fixture for Server {
    type Store = EtcdStore;

    async fn new() -> Self {
        Self::started().await
    }

    /// It takes its time to tell a hand from an expiry.
    fn store(&self) -> EtcdStore {
        EtcdStore::new(&self.config()).expect("settings").with_patience(PATIENCE)
    }

    async fn put_config(&self, json: &str) {
        self.etcdctl(&["put", &format!("{PREFIX}/config"), json]);
    }

    async fn put(&self, key: &str, value: &str, ttl: Option<Duration>) {
        let path = Self::path(key);
        match ttl {
            None => self.etcdctl(&["put", &path, value]),
            Some(ttl) => {
                let grant = self.etcdctl(&["lease", "grant", &ttl.as_secs().to_string()]);
                let id = grant.split(' ').nth(1).expect(&grant).to_owned();
                self.etcdctl(&["put", &path, value, "--lease", &id])
            }
        };
    }

    async fn delete(&self, key: &str) {
        assert_eq!(self.etcdctl(&["del", &Self::path(key)]), "1");
    }

    async fn get(&self, key: &str) -> Option<(String, bool)> {
        let value = self.etcdctl(&["get", &Self::path(key), "--print-value-only"]);
        let fields = self.etcdctl(&["get", &Self::path(key), "-w", "fields"]);
        let fields: BTreeMap<_, _> = fields.lines().filter_map(|line| line.split_once(" : ")).collect();
        fields.get("\"Lease\"").map(|lease| (value, *lease != "0"))
    }
}

#[test]
fn keys_are_where_flannel_looks() {
    for (prefix, config) in [
        ("/coreos.com/network", "/coreos.com/network/config"),
        ("relative", "relative/config"),
        ("/", "/config"),
    ] {
        assert_eq!(Paths::new(prefix).config, config, "{prefix:?}");
    }
    let paths = Paths::new("/p");
    assert_eq!((paths.subnets.as_str(), paths.end.as_str()), ("/p/subnets/", "/p/subnets0"));
    assert_eq!(paths.lease(&"10.5.52.0-24".parse().expect("key")), "/p/subnets/10.5.52.0-24");
}

#[test]
fn tls_files_of_no_use_are_refused_at_once() {
    let dir = tempfile::tempdir().expect("directory");
    let (text, missing) = (dir.path().join("text"), dir.path().join("missing"));
    std::fs::write(&text, "no certificate").expect("write");
    let base = at("https://127.0.0.1:2379");
    let cert = Some(ClientCert { cert_file: text.clone(), key_file: text.clone() });
    for (config, setting, expected) in [
        (EtcdConfig { ca_file: Some(missing), ..base.clone() }, "--etcd-cafile = ", "a readable file"),
        (EtcdConfig { ca_file: Some(text), ..base.clone() }, "--etcd-cafile = ", "a PEM file"),
        (EtcdConfig { client_cert: cert, ..base }, "--etcd-certfile = ", "a PEM file"),
    ] {
        let error = EtcdStore::new(&config).expect_err(expected).to_string();
        assert!(error.starts_with(setting) && error.contains(&format!("expected {expected}")), "{error}");
    }
}

#[test]
fn the_password_is_never_printed() {
    let config = EtcdConfig { login: login("flannel", "hunter2"), ..at("http://127.0.0.1:1") };
    let store = EtcdStore::new(&config).expect("settings");
    let printed = format!("{config:?} {store:?} {} {}", store.location(), store.connection.etcdctl_options);
    assert!(!printed.contains("hunter2"), "{printed}");
    assert!(printed.contains("flannel"));
}

#[tokio::test]
async fn what_is_stored_is_flannels_byte_for_byte() {
    let server = Server::started().await;
    let mut request = want(&small_pool(), "192.168.64.3", Some("10.5.0.64-28"));
    request.attrs.backend_type = "vxlan".into();
    request.attrs.backend_data = Some(serde_json::json!({"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}));
    acquire(&server.store(), &request).await;
    assert_eq!(
        server.etcdctl(&["get", PREFIX, "--prefix"]),
        format!(
            "{PREFIX}/subnets/10.5.0.64-28\n{}",
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#
        )
    );
    let lease = server.etcdctl(&["lease", "list"]).lines().nth(1).expect("a lease object").to_owned();
    assert!(server.etcdctl(&["lease", "timetolive", &lease]).contains("granted with TTL(86400s)"));
}

#[tokio::test]
async fn a_missing_configuration_is_answered_with_a_command_that_works() {
    let server = Server::started().await;
    let Err(StoreError::NoConfig { key, command }) = server.store().network_config().await else {
        panic!("expected no configuration");
    };
    assert_eq!(key, format!("{PREFIX}/config (is --etcd-prefix right?)"));
    let output = Command::new("sh").args(["-c", &command]).output().expect("sh");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(server.store().network_config().await, NetworkConfig::parse(EXAMPLE).map_err(Into::into));
}

#[tokio::test]
async fn no_lease_object_is_left_behind() {
    let server = Server::started().await;
    let (store, config) = (server.store(), small_pool());
    let mut held = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    for _ in 0..3 {
        held = store.renew(&held, DAY).await.expect("ours");
    }
    held = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    assert_eq!(server.leases(), 1);
    let stolen = OwnedLease { mod_revision: 1, ..held.clone() };
    server.put(&held.lease.key.to_string(), &value("192.0.2.9"), None).await;
    store.renew(&stolen, DAY).await.expect_err("lost");
    assert_eq!(server.leases(), 1, "the failed renewal's own grant");
}

#[tokio::test]
async fn a_lease_object_that_others_hang_on_is_let_be() {
    let server = Server::started().await;
    let (store, config) = (server.store(), small_pool());
    let held = acquire(&store, &want(&config, "192.0.2.1", Some("10.5.0.16-28"))).await;
    let id = format!("{:x}", held.lease_id);
    server.etcdctl(&["put", &Server::path("10.5.0.240-28"), &value("192.0.2.2"), "--lease", &id]);
    store.renew(&held, DAY).await.expect("ours");
    assert!(server.get("10.5.0.240-28").await.is_some());
}

#[tokio::test]
async fn one_ipv4_half_is_not_leased_twice_with_two_ipv6_halves() {
    let server = Server::started().await;
    let mut config = small_pool();
    config.v6 = Some(weft_shared::netconf::Range {
        network: "fd00::/48".parse().expect("network"),
        subnet_len: 64,
        any_len: false,
        min: "fd00:0:0:1::".parse().expect("min"),
        max: "fd00:0:0:ffff::".parse().expect("max"),
    });
    let mut contenders = tokio::task::JoinSet::new();
    for n in 1..=12 {
        let previous = format!("10.5.0.64-28&fd00:0:0:{n:x}::-64");
        let (store, want) = (server.store(), want(&config, &format!("192.0.2.{n}"), Some(&previous)));
        contenders.spawn(async move { store.acquire(&want).await });
    }
    let keys: Vec<_> = contenders.join_all().await.into_iter().map(|r| r.expect("room").lease.key).collect();
    for (n, key) in keys.iter().enumerate() {
        assert!(!keys[n + 1..].iter().any(|other| other.overlaps(key)), "{key} overlaps another of {keys:?}");
    }
}

#[tokio::test]
async fn a_neighbouring_prefix_is_not_ours() {
    let server = Server::started().await;
    server.etcdctl(&["put", &format!("{PREFIX}/subnets-foo"), "x"]);
    server.etcdctl(&["put", &format!("{PREFIX}/subnetsa/10.5.0.16-28"), &value("192.0.2.1")]);
    let mut watching = Watching::start(server.store());
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    assert!(watching.world.is_empty() && watching.malformed.is_empty());
}

#[tokio::test]
async fn a_dead_endpoint_in_the_list_is_never_asked_again() {
    let server = Server::started().await;
    let mut config = server.config();
    let dead = TcpListener::bind("127.0.0.1:0").expect("port");
    dead.set_nonblocking(true).expect("nonblocking");
    // It takes connections and answers none: whoever waits for it learns nothing.
    config.endpoints.insert(0, format!("http://{}", dead.local_addr().expect("address")));
    let store = EtcdStore::new(&config).expect("settings");
    for _ in 0..20 {
        assert!(matches!(store.network_config().await, Err(StoreError::NoConfig { .. })));
    }
    let connects = std::iter::from_fn(|| dead.accept().ok()).count();
    assert!(connects <= 1, "the race for a connection, and no more: {connects}");
}

#[tokio::test]
async fn silence_is_reported() {
    // Listens, and never accepts.
    let deaf = TcpListener::bind("127.0.0.1:0").expect("port");
    let silent = format!("http://{}", deaf.local_addr().expect("address"));
    for endpoint in ["http://127.0.0.1:1".to_owned(), silent] {
        let store = EtcdStore::new(&at(&endpoint)).expect("settings");
        match timeout(PATIENCE, store.network_config()).await.expect("bounded") {
            Err(StoreError::Unavailable { location, reason }) => {
                assert!(location.contains(&endpoint) && reason.contains(&endpoint), "{location}: {reason}");
            }
            other => panic!("expected no answer, got {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_given_up_and_found_again() {
    use nix::sys::signal::{Signal, kill};
    let server = Server::started().await;
    let (store, config) = (server.store(), small_pool());
    let held = acquire(&store, &want(&config, "192.0.2.1", None)).await;
    let pid = nix::unistd::Pid::from_raw(server.child.as_ref().expect("runs").id() as i32);
    kill(pid, Signal::SIGSTOP).expect("stop");
    let renewed = timeout(PATIENCE, store.renew(&held, DAY)).await.expect("bounded").map(drop);
    let read = timeout(PATIENCE, store.network_config()).await.expect("bounded").map(drop);
    for result in [renewed, read] {
        assert!(matches!(result, Err(StoreError::Unavailable { .. })), "{result:?}");
    }
    kill(pid, Signal::SIGCONT).expect("continue");
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = store.renew(&held, DAY).await {
        assert!(Instant::now() < deadline, "{error}");
    }
}

#[tokio::test]
async fn the_watch_begins_anew_when_the_server_comes_back() {
    let mut server = Server::stopped();
    let mut watching = Watching::start(server.store());
    watching.until_health("away", |health| health.problem.is_some()).await;
    server.start().await;
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    server.put("10.5.0.16-28", &value("192.0.2.1"), None).await;
    watching.until("a lease", |w| w.world.len() == 1).await;

    server.stop();
    watching.until_health("away", |health| !health.connected).await;
    assert_eq!(watching.world.len(), 1, "a store that is away is no empty world");
    let (store, request) = (server.store(), want(&small_pool(), "192.0.2.2", None));
    let error = timeout(PATIENCE, store.acquire(&request)).await.expect("bounded").expect_err("away");
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");

    server.start().await;
    server.put("10.5.0.32-28", &value("192.0.2.2"), None).await;
    watching.until("what came after", |w| w.world.len() == 2).await;
    assert_eq!(watching.snapshots, 2, "what answers may be another store, past our revision");
    watching.until_health("connected", |health| health.connected && health.relists == 1).await;
}

#[tokio::test]
async fn a_compacted_watch_begins_anew() {
    let mut server = Server::started().await;
    server.put("10.5.0.16-28", &value("192.0.2.1"), None).await;
    server.put("10.5.0.32-28", &value("192.0.2.2"), None).await;
    let mut watching = Watching::start(server.store());
    watching.until("the snapshot", |w| w.world.len() == 2).await;
    server.stop();
    watching.until_health("away", |health| !health.connected).await;
    // While the watch is away: one removed, one changed, and the history gone.
    let port = server.restart_elsewhere().await;
    server.delete("10.5.0.16-28").await;
    server.put("10.5.0.32-28", &value("192.0.2.7"), None).await;
    server.etcdctl(&["compact", &server.revision()]);
    server.restart_at(port).await;
    watching.until("the second snapshot", |w| w.snapshots == 2).await;
    assert_eq!(watching.ips(), [("10.5.0.32-28", "192.0.2.7")]);
    watching.until_health("relisted", |health| health.relists == 1).await;
    // Without the history nobody can say that it was a hand.
    assert_eq!(watching.departed, [("10.5.0.16-28".to_owned(), Departure::Expired)]);
}

#[tokio::test]
async fn what_departed_behind_the_watchs_back_is_told_apart() {
    let mut server = Server::started().await;
    server.put("10.5.0.16-28", &value("192.0.2.1"), Some(DAY)).await;
    server.put("10.5.0.32-28", &value("192.0.2.2"), Some(Duration::from_secs(4))).await;
    server.put("10.5.0.48-28", &value("192.0.2.3"), None).await;
    let mut watching = Watching::start(server.store());
    watching.until("the snapshot", |w| w.world.len() == 3).await;
    server.stop();
    watching.until_health("away", |health| !health.connected).await;
    let port = server.restart_elsewhere().await;
    server.delete("10.5.0.16-28").await;
    server.delete("10.5.0.48-28").await;
    let deadline = Instant::now() + PATIENCE;
    while server.get("10.5.0.32-28").await.is_some() {
        assert!(Instant::now() < deadline, "it never expired");
    }
    server.restart_at(port).await;
    watching.until("the second snapshot", |w| w.snapshots == 2).await;
    let expected = [
        ("10.5.0.16-28", Departure::ByHand),
        ("10.5.0.32-28", Departure::Expired),
        ("10.5.0.48-28", Departure::ByHand),
    ];
    assert_eq!(watching.departed, expected.map(|(key, how)| (key.to_owned(), how)));
}

#[tokio::test]
async fn a_store_restored_from_an_older_snapshot_removes_nobody_by_hand() {
    for overtaken in [false, true] {
        let mut server = Server::started().await;
        server.put("10.5.0.16-28", &value("192.0.2.1"), Some(DAY)).await;
        // Its lease object is in the snapshot and lives; its key is not.
        let grant = server.etcdctl(&["lease", "grant", "86400"]);
        let id = grant.split(' ').nth(1).expect(&grant).to_owned();
        let saved = server.dir.path().join("saved");
        server.etcdctl(&["snapshot", "save", &saved.display().to_string()]);
        server.etcdctl(&["put", &Server::path("10.5.0.32-28"), &value("192.0.2.2"), "--lease", &id]);
        server.etcdctl(&["put", "/elsewhere", "x"]);
        let mut watching = Watching::start(server.store());
        watching.until("the snapshot", |w| w.world.len() == 2).await;
        server.stop();
        watching.until_health("away", |health| !health.connected).await;
        server.restore(&saved);
        let port = server.restart_elsewhere().await;
        for n in 0..if overtaken { 5 } else { 0 } {
            server.etcdctl(&["put", "/elsewhere", &n.to_string()]);
        }
        server.restart_at(port).await;
        watching.until("the older world", |w| w.snapshots == 2).await;
        assert_eq!(watching.ips(), [("10.5.0.16-28", "192.0.2.1")]);
        assert_eq!(watching.departed, [("10.5.0.32-28".to_owned(), Departure::Expired)], "{overtaken}");
    }
}

#[tokio::test]
async fn many_departures_are_told_apart_in_bounded_time() {
    let server = Server::started().await;
    let store = EtcdStore::new(&server.config()).expect("settings");
    let client = store.connection.live().await.expect("connected").client();
    for n in 0..300_i64 {
        let id = client.lease_client().grant(86_400, None).await.expect("grant").id();
        let path = Server::path(&format!("10.{}.{}.0-24", 6 + n / 200, n % 200));
        let options = etcd_client::PutOptions::new().with_lease(id);
        client.kv_client().put(path, value("192.0.2.1"), Some(options)).await.expect("put");
    }
    let mut watching = Watching::start(store);
    watching.until("all of them", |w| w.world.len() == 300).await;
    // One revision, so one batch.
    server.etcdctl(&["del", &Server::path("10.6."), "--prefix"]);
    server.put("10.9.0.0-24", &value("192.0.2.9"), None).await;
    let start = Instant::now();
    watching.until("what came after", |w| w.world.contains_key("10.9.0.0-24")).await;
    let took = start.elapsed();
    assert_eq!((watching.world.len(), watching.departed.len()), (101, 200));
    // As many as could be asked about in time: all, unless that is what it took.
    let by_hand = watching.departed.iter().filter(|(_, how)| *how == Departure::ByHand).count();
    assert!(by_hand == 200 || by_hand > 0 && took > Duration::from_millis(900), "{by_hand} in {took:?}");
}

#[tokio::test]
async fn a_replaced_cluster_begins_anew() {
    let mut server = Server::started().await;
    for n in 1..=8 {
        server.put(&format!("10.5.0.{}-28", n * 16), &value("192.0.2.1"), None).await;
    }
    let mut watching = Watching::start(server.store());
    watching.until("the snapshot", |w| w.world.len() == 8).await;
    server.stop();
    watching.until_health("away", |health| !health.connected).await;
    // Same name, same ports, hence the same cluster id: only the revision tells.
    server.wipe();
    server.start().await;
    watching.until("the new world", |w| w.snapshots == 2 && w.world.is_empty()).await;
    server.put("10.5.0.16-28", &value("192.0.2.1"), None).await;
    watching.until("its first lease", |w| w.world.len() == 1).await;
}

#[tokio::test]
async fn a_replaced_store_that_has_overtaken_the_watch_begins_anew() {
    let mut server = Server::started().await;
    server.put("10.5.0.16-28", &value("192.0.2.1"), None).await;
    let mut watching = Watching::start(server.store());
    watching.until("the snapshot", |w| w.world.len() == 1).await;
    server.stop();
    watching.until_health("away", |health| !health.connected).await;
    // The new store runs past the watch's revision.
    server.wipe();
    let port = server.restart_elsewhere().await;
    for n in 1..=8 {
        server.put(&format!("10.5.0.{}-28", n * 16), &value("192.0.2.9"), None).await;
        server.delete(&format!("10.5.0.{}-28", n * 16)).await;
    }
    server.restart_at(port).await;
    watching.until("the new world", |w| w.snapshots == 2 && w.world.is_empty()).await;
    assert_eq!(watching.departed, [("10.5.0.16-28".to_owned(), Departure::Expired)]);
}

#[tokio::test]
async fn a_healthy_watch_is_checked_from_time_to_time() {
    let server = Server::started().await;
    let mut watching = Watching::start(server.store().with_relist(Duration::from_millis(100)));
    watching.until("the third snapshot", |w| w.snapshots == 3).await;
    assert_eq!(watching.health.borrow().relists, 0, "nothing was wrong");
    server.put("10.5.0.16-28", &value("192.0.2.1"), None).await;
    watching.until("a lease", |w| w.world.len() == 1).await;
}

#[tokio::test]
async fn a_quiet_watch_is_asked_where_it_stands() {
    use nix::sys::signal::{Signal, kill};
    let server = Server::started().await;
    let mut watching = Watching::start(server.store().with_quiet(Duration::from_millis(100)));
    watching.until("the snapshot", |w| w.snapshots == 1).await;
    let deadline = Instant::now() + PATIENCE;
    // Two watches are asked for, the rest are questions.
    while server.counted("grpc_server_msg_received_total", "Watch") < 7 {
        assert!(Instant::now() < deadline, "it is not asked");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!((watching.health.borrow().relists, watching.snapshots), (0, 1), "nothing was wrong");
    // One that does not answer is no healthy watch, long before the connection is given up (10 s and 4 s).
    let pid = nix::unistd::Pid::from_raw(server.child.as_ref().expect("runs").id() as i32);
    kill(pid, Signal::SIGSTOP).expect("stop");
    let start = Instant::now();
    watching.until_health("away", |health| !health.connected).await;
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    kill(pid, Signal::SIGCONT).expect("continue");
    watching.until("the next snapshot", |w| w.snapshots == 2).await;
    watching.until_health("connected", |health| health.connected).await;
}

#[tokio::test]
async fn user_and_password() {
    let server = Server::started().await;
    let plain = server.store();
    let with = |name: &str, password: &str| {
        let config = EtcdConfig { login: login(name, password), ..server.config() };
        EtcdStore::new(&config).expect("settings")
    };
    // Credentials are no mistake where none are asked for.
    acquire(&with("flannel", "secret"), &want(&small_pool(), "192.0.2.1", None)).await;

    server.etcdctl(&["user", "add", "root:rootpw"]);
    server.etcdctl(&["user", "add", "flannel:secret"]);
    server.etcdctl(&["role", "add", "net"]);
    server.etcdctl(&["role", "grant-permission", "net", "readwrite", "--prefix", PREFIX]);
    server.etcdctl(&["user", "grant-role", "flannel", "net"]);
    server.etcdctl(&["auth", "enable"]);
    acquire(&with("flannel", "secret"), &want(&small_pool(), "192.0.2.2", None)).await;
    let mut watching = Watching::start(with("flannel", "secret"));
    watching.until("the snapshot", |w| w.world.len() == 2).await;
    for store in [with("flannel", "wrong"), plain] {
        match store.network_config().await {
            Err(StoreError::Refused { reason, .. }) => assert!(!reason.contains("wrong"), "{reason}"),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }
}

#[tokio::test]
async fn tls_with_a_ca_alone_and_with_a_client_certificate() {
    let mut server = Server::stopped();
    certificates(server.dir.path());
    let file = |name: &str| server.dir.path().join(name).display().to_string();
    let tls = vec!["--cert-file".into(), file("server.crt"), "--key-file".into(), file("server.key")];
    server.flags = tls.clone();
    let ca_alone = EtcdConfig { client_cert: None, ..server.config() };
    server.start().await;
    acquire(&EtcdStore::new(&ca_alone).expect("settings"), &want(&small_pool(), "192.0.2.1", None)).await;
    // Without the CA the server is a stranger.
    let stranger = EtcdConfig { ca_file: None, ..ca_alone.clone() };
    let error = EtcdStore::new(&stranger).expect("system roots").network_config().await.expect_err("unknown");
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");

    server.stop();
    let ca = server.dir.path().join("ca.crt").display().to_string();
    server.flags = [tls, vec!["--client-cert-auth".into(), "--trusted-ca-file".into(), ca]].concat();
    server.start().await;
    acquire(&server.store(), &want(&small_pool(), "192.0.2.2", None)).await;
    let error =
        EtcdStore::new(&ca_alone).expect("settings").network_config().await.expect_err("no certificate");
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn five_thousand_leases_in_one_read() {
    let server = Server::started().await;
    let store = server.store();
    let client = store.connection.live().await.expect("connected").client();
    for block in 0..50_u32 {
        let puts: Vec<_> = (0..100_u32)
            .map(|n| std::net::Ipv4Addr::from(0x0a00_0100 + ((block * 100 + n) << 8)))
            .map(|ip| etcd_client::TxnOp::put(Server::path(&format!("{ip}-24")), value("192.0.2.1"), None))
            .collect();
        client.kv_client().txn(etcd_client::Txn::new().and_then(puts)).await.expect("put");
    }
    let before = server.range_requests();
    let world = store.read().await.expect("read");
    assert_eq!(world.entries.len(), 5000);
    assert_eq!(server.range_requests() - before, 1);
    let mut watching = Watching::start(store);
    watching.until("all of them", |w| w.world.len() == 5000).await;
}

/// A CA, and two certificates of it: for the server at 127.0.0.1, and for a client.
fn certificates(dir: &Path) {
    let script = r#"set -e
        openssl ecparam -name prime256v1 -genkey -noout -out ca.key
        openssl req -x509 -new -key ca.key -subj /CN=ca -days 2 -out ca.crt
        for name in server client; do
            openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out $name.key
            openssl req -new -key $name.key -subj /CN=$name -out $name.csr
            echo 'subjectAltName=IP:127.0.0.1
extendedKeyUsage=serverAuth,clientAuth' > $name.ext
            openssl x509 -req -in $name.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile $name.ext -out $name.crt
        done"#;
    let output = Command::new("sh").args(["-c", script]).current_dir(dir).output().expect("sh");
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
}
