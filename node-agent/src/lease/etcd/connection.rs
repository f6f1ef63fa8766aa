//! One live connection out of several endpoints, a deadline on every call, and etcd's errors in our words.
//!
//! The client library's own balancing hands every other call to a dead endpoint; flannel's default list has one. So
//! the endpoints are raced with a read that needs a quorum, the first to answer is used until it fails, and a call is
//! never repeated here: whoever called knows whether that would be right.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, GetOptions, Identity, TlsOptions};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::super::StoreError;
use super::{BadTlsFile, EtcdConfig, Login, Paths};

/// For an endpoint to prove that it is alive.
const PROBE: Duration = Duration::from_secs(2);
/// For one call.
pub(super) const DEADLINE: Duration = Duration::from_secs(4);
/// etcd closes connections that ping more often than every 5 s (`grpc-keepalive-min-time`), or without a stream.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// Where distributions keep the certificates that they trust.
const SYSTEM_ROOTS: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

pub(super) struct Connection {
    pub(super) location: String,
    /// What etcdctl needs beside the endpoints to reach the same store; never the password.
    pub(super) etcdctl_options: String,
    endpoints: Vec<Endpoint>,
    config_key: String,
    /// What a login must be allowed to do, for the message that says it is not.
    permissions: String,
    live: Mutex<Option<Arc<Live>>>,
}

#[derive(Clone)]
struct Endpoint {
    url: String,
    options: ConnectOptions,
    login: Option<Login>,
}

/// The client in use, comparable by identity so that an old failure does not end a new connection.
pub(super) struct Live {
    client: Client,
    given_up: CancellationToken,
}

impl Connection {
    pub(super) fn new(config: &EtcdConfig, paths: &Paths) -> Result<Self, BadTlsFile> {
        let tls = Tls::read(config)?;
        let endpoints: Vec<_> =
            config.endpoints.iter().map(|url| tls.endpoint(url, config)).collect::<Result<_, _>>()?;
        let file = |option: &str, path: Option<&PathBuf>| {
            path.map(|path| format!(" --{option} {}", path.display())).unwrap_or_default()
        };
        let cert = config.client_cert.as_ref();
        let user = config.login.as_ref().map(|login| format!(" --user {}", login.username));
        Ok(Self {
            location: format!("etcd at {}, prefix {}", config.endpoints.join(","), config.prefix),
            etcdctl_options: [
                file("cacert", config.ca_file.as_ref()),
                file("cert", cert.map(|c| &c.cert_file)),
                file("key", cert.map(|c| &c.key_file)),
                user.unwrap_or_default(),
            ]
            .concat(),
            endpoints,
            config_key: paths.config.clone(),
            permissions: format!(
                "expected a role that may read {} and read and write keys that begin with {}",
                paths.config, paths.subnets
            ),
            live: Mutex::new(None),
        })
    }

    pub(super) fn endpoints(&self) -> Vec<&str> {
        self.endpoints.iter().map(|endpoint| endpoint.url.as_str()).collect()
    }

    /// One call, with a deadline. A connection that failed is not used again.
    pub(super) async fn call<T, F, Fut>(&self, call: F) -> Result<T, StoreError>
    where
        F: FnOnce(Client) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        let live = self.live().await?;
        let result = tokio::select! {
            answer = timeout(DEADLINE, call(live.client.clone())) => match answer {
                Ok(result) => result.map_err(|e| self.error(&e)),
                Err(_) => Err(self.silent(DEADLINE)),
            },
            error = self.given_up(&live) => Err(error),
        };
        // A refusal as well: etcd refuses what was authenticated before any user or role was changed, and a member that
        // has gone bad may refuse what another grants.
        if result.is_err() {
            self.forget(&live).await;
        }
        result
    }

    /// The connection in use, or a new one.
    pub(super) async fn live(&self) -> Result<Arc<Live>, StoreError> {
        let mut slot = self.live.lock().await;
        if let Some(live) = &*slot {
            return Ok(live.clone());
        }
        let live = Arc::new(Live { client: self.connect().await?, given_up: CancellationToken::new() });
        *slot = Some(live.clone());
        Ok(live)
    }

    /// Makes the next call connect anew.
    pub(super) async fn forget(&self, failed: &Arc<Live>) {
        let mut slot = self.live.lock().await;
        slot.take_if(|live| Arc::ptr_eq(live, failed));
    }

    /// Ends whatever is under way on the connection in use, and makes the next call connect anew.
    pub(super) fn reset(&self) {
        // Whoever has the lock is connecting already.
        if let Some(live) = self.live.try_lock().ok().and_then(|mut slot| slot.take()) {
            live.given_up.cancel();
        }
    }

    /// When it has been, the error of what was under way.
    pub(super) async fn given_up(&self, live: &Live) -> StoreError {
        live.given_up.cancelled().await;
        let reason = "the connection was given up: this node's address has changed".into();
        StoreError::Unavailable { location: self.location.clone(), reason }
    }

    pub(super) fn error(&self, error: &Error) -> StoreError {
        let location = self.location.clone();
        match refusal(error) {
            Some(reason) if code_of(error) == Some(PERMISSION_DENIED) => {
                StoreError::Refused { location, reason: format!("{reason}: {}", self.permissions) }
            }
            Some(reason) => StoreError::Refused { location, reason },
            None => StoreError::Unavailable { location, reason: reason(error) },
        }
    }

    pub(super) fn silent(&self, deadline: Duration) -> StoreError {
        let reason = format!("no answer in {} s", deadline.as_secs());
        StoreError::Unavailable { location: self.location.clone(), reason }
    }

    /// The first endpoint that answers. A refusal is an answer too, but a worse one than any success.
    async fn connect(&self) -> Result<Client, StoreError> {
        let mut probes = JoinSet::new();
        for endpoint in self.endpoints.clone() {
            let key = self.config_key.clone();
            probes.spawn(async move {
                let result = timeout(PROBE, probe(&endpoint, key)).await;
                (endpoint.url, result)
            });
        }
        let mut refused = None;
        let mut reasons = Vec::new();
        let mut about_tls = false;
        while let Some(joined) = probes.join_next().await {
            let Ok((url, result)) = joined else { continue };
            match result {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => match self.error(&error) {
                    StoreError::Unavailable { reason, .. } => {
                        about_tls |= url.starts_with("https:") && was_reached(&error);
                        reasons.push(format!("{url}: {reason}"));
                    }
                    // A probe says who it is and reads one key: nothing else can be invalid about it.
                    StoreError::Refused { location, reason }
                        if matches!(code_of(&error), Some(INVALID_ARGUMENT | UNAUTHENTICATED)) =>
                    {
                        refused =
                            Some(StoreError::Refused { location, reason: format!("{reason}{LOGIN_HINT}") });
                    }
                    refusal => refused = Some(refusal),
                },
                Err(_) => reasons.push(format!("{url}: no answer in {} s", PROBE.as_secs())),
            }
        }
        reasons.sort();
        let hint = if about_tls { TLS_HINT } else { "" };
        let reason =
            format!("{}; expected etcd v3 there, as --etcd-endpoints says{hint}", reasons.join("; "));
        Err(refused.unwrap_or(StoreError::Unavailable { location: self.location.clone(), reason }))
    }
}

impl Live {
    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.location)
    }
}

/// Connects, and reads something that only a member with a quorum can answer. Like etcd's own client, credentials
/// that a store without authentication has no use for are no mistake.
async fn probe(endpoint: &Endpoint, key: String) -> Result<Client, Error> {
    let plain = endpoint.options.clone();
    let options = match &endpoint.login {
        Some(login) => plain.clone().with_user(&login.username, &login.password.0),
        None => plain.clone(),
    };
    let client = match Client::connect([&endpoint.url], Some(options)).await {
        Err(error) if code_of(&error) == Some(FAILED_PRECONDITION) => {
            Client::connect([&endpoint.url], Some(plain)).await?
        }
        other => other?,
    };
    let keys = GetOptions::new().with_keys_only();
    client.kv_client().get(key, Some(keys)).await?;
    Ok(client)
}

// Of gRPC's status codes (grpc/grpc, doc/statuscodes.md).
const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;
const INVALID_ARGUMENT: i32 = 3;
const DEADLINE_EXCEEDED: i32 = 4;
const PERMISSION_DENIED: i32 = 7;
const FAILED_PRECONDITION: i32 = 9;
const INTERNAL: i32 = 13;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

const LOGIN_HINT: &str = "; expected --etcd-username and --etcd-password of a user of this store";
const TLS_HINT: &str =
    ", and certificates that both sides accept (--etcd-cafile; --etcd-certfile and --etcd-keyfile)";

fn code_of(error: &Error) -> Option<i32> {
    match error {
        Error::GRpcStatus(status) => Some(status.code().into()),
        _ => None,
    }
}

/// Whether the other side was there, and yet there is no connection. With TLS that is about certificates: a server that
/// does not like ours closes the connection, often without a word that arrives (RFC 8446, section 4.4.2.4).
fn was_reached(error: &Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
    let mut cause: Option<&(dyn std::error::Error + 'static)> = match error {
        Error::GRpcStatus(status) => Some(status),
        Error::TransportError(error) => Some(error),
        other => Some(other),
    };
    let causes = std::iter::from_fn(|| {
        let this = cause?;
        cause = this.source();
        Some(this)
    });
    let unreached = [ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut];
    !causes.filter_map(|cause| cause.downcast_ref::<std::io::Error>()).any(|e| unreached.contains(&e.kind()))
}

/// What etcd says when it answers and does not want: credentials, permissions, a full disk. Everything else is worth
/// another connection.
fn refusal(error: &Error) -> Option<String> {
    match error {
        Error::GRpcStatus(status) => {
            let no_answer = [CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE];
            (!no_answer.contains(&i32::from(status.code()))).then(|| status.message().to_owned())
        }
        _ => None,
    }
}

/// The innermost cause: the outer ones only say "transport error".
fn reason(error: &Error) -> String {
    fn innermost(error: &dyn std::error::Error) -> String {
        match error.source() {
            Some(source) => innermost(source),
            None => error.to_string(),
        }
    }
    match error {
        Error::GRpcStatus(status) => match std::error::Error::source(status) {
            Some(source) => innermost(source),
            None => status.message().to_owned(),
        },
        Error::TransportError(error) => innermost(error),
        other => other.to_string(),
    }
}

/// The TLS settings, with the files read.
struct Tls {
    options: TlsOptions,
    ca_given: bool,
}

impl Tls {
    fn read(config: &EtcdConfig) -> Result<Self, BadTlsFile> {
        let mut options = TlsOptions::new();
        if let Some(ca) = &config.ca_file {
            options = options.ca_certificate(Certificate::from_pem(pem("etcd-cafile", ca)?));
        }
        if let Some(client) = &config.client_cert {
            let cert = pem("etcd-certfile", &client.cert_file)?;
            options = options.identity(Identity::from_pem(cert, pem("etcd-keyfile", &client.key_file)?));
        }
        Ok(Self { options, ca_given: config.ca_file.is_some() })
    }

    fn endpoint(&self, url: &str, config: &EtcdConfig) -> Result<Endpoint, BadTlsFile> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(PROBE)
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if url.starts_with("https://") {
            let mut tls = self.options.clone();
            if !self.ca_given {
                tls = tls.ca_certificate(Certificate::from_pem(system_roots(url)?));
            }
            options = options.with_tls(tls);
        }
        Ok(Endpoint { url: url.to_owned(), options, login: config.login.clone() })
    }
}

fn system_roots(url: &str) -> Result<Vec<u8>, BadTlsFile> {
    SYSTEM_ROOTS.iter().find_map(|path| std::fs::read(path).ok()).ok_or_else(|| {
        let expected =
            format!("etcd-cafile for {url}: this system has no certificates at {}", SYSTEM_ROOTS[0]);
        bad("etcd-cafile", "", &expected)
    })
}

fn pem(setting: &'static str, path: &Path) -> Result<Vec<u8>, BadTlsFile> {
    let value = path.display().to_string();
    let text = std::fs::read(path).map_err(|e| bad(setting, &value, &format!("a readable file: {e}")))?;
    let is_pem = text.windows(11).any(|window| window == b"-----BEGIN ");
    if is_pem { Ok(text) } else { Err(bad(setting, &value, "a PEM file")) }
}

fn bad(setting: &'static str, value: &str, expected: &str) -> BadTlsFile {
    let value = if value.is_empty() { "nothing".into() } else { value.to_owned() };
    BadTlsFile { setting, value, expected: expected.to_owned() }
}
