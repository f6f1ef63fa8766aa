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

use super::super::StoreError;
use super::{BadEtcdConfig, EtcdConfig, Paths};

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
    live: Mutex<Option<Arc<Live>>>,
}

#[derive(Clone)]
struct Endpoint {
    url: String,
    options: ConnectOptions,
    user: Option<(String, String)>,
}

/// The client in use, comparable by identity so that an old failure does not end a new connection.
pub(super) struct Live {
    client: Client,
}

impl Connection {
    pub(super) fn new(config: &EtcdConfig, paths: &Paths) -> Result<Self, BadEtcdConfig> {
        let tls = Tls::read(config)?;
        let endpoints: Vec<_> = config
            .endpoints
            .iter()
            .map(|endpoint| endpoint.trim())
            .filter(|endpoint| !endpoint.is_empty())
            .map(|endpoint| tls.endpoint(endpoint, config))
            .collect::<Result<_, _>>()?;
        if endpoints.is_empty() {
            return Err(bad("etcd-endpoints", "", "at least one URL such as http://127.0.0.1:2379"));
        }
        let urls: Vec<&str> = endpoints.iter().map(|endpoint| endpoint.url.as_str()).collect();
        let prefix = paths.config.trim_end_matches("/config");
        let file = |option: &str, path: &Option<PathBuf>| {
            path.as_ref().map(|path| format!(" --{option} {}", path.display())).unwrap_or_default()
        };
        let user = match config.username.as_str() {
            "" => String::new(),
            name => format!(" --user {name}"),
        };
        Ok(Self {
            location: format!("etcd at {}, prefix {prefix}", urls.join(",")),
            etcdctl_options: [
                file("cacert", &config.ca),
                file("cert", &config.cert),
                file("key", &config.key),
                user,
            ]
            .concat(),
            endpoints,
            config_key: paths.config.clone(),
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
        let result = match timeout(DEADLINE, call(live.client.clone())).await {
            Ok(result) => result.map_err(|e| self.error(&e)),
            Err(_) => Err(self.silent(DEADLINE)),
        };
        if matches!(result, Err(StoreError::Unavailable { .. })) {
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
        let live = Arc::new(Live { client: self.connect().await? });
        *slot = Some(live.clone());
        Ok(live)
    }

    /// Makes the next call connect anew.
    pub(super) async fn forget(&self, failed: &Arc<Live>) {
        let mut slot = self.live.lock().await;
        slot.take_if(|live| Arc::ptr_eq(live, failed));
    }

    pub(super) fn error(&self, error: &Error) -> StoreError {
        let location = self.location.clone();
        match refusal(error) {
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
        while let Some(joined) = probes.join_next().await {
            let Ok((url, result)) = joined else { continue };
            match result {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => match self.error(&error) {
                    StoreError::Unavailable { reason, .. } => reasons.push(format!("{url}: {reason}")),
                    refusal => refused = Some(refusal),
                },
                Err(_) => reasons.push(format!("{url}: no answer in {} s", PROBE.as_secs())),
            }
        }
        reasons.sort();
        let reason = format!("{}; expected etcd v3 there, as --etcd-endpoints says", reasons.join("; "));
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
    const FAILED_PRECONDITION: i32 = 9;
    let plain = endpoint.options.clone();
    let options = match &endpoint.user {
        Some((name, password)) => plain.clone().with_user(name, password),
        None => plain.clone(),
    };
    let client = match Client::connect([&endpoint.url], Some(options)).await {
        Err(Error::GRpcStatus(status)) if i32::from(status.code()) == FAILED_PRECONDITION => {
            Client::connect([&endpoint.url], Some(plain)).await?
        }
        other => other?,
    };
    let keys = GetOptions::new().with_keys_only();
    client.kv_client().get(key, Some(keys)).await?;
    Ok(client)
}

/// What etcd says when it answers and does not want: credentials, permissions, a full disk. Everything else is worth
/// another connection.
fn refusal(error: &Error) -> Option<String> {
    const CANCELLED: i32 = 1;
    const UNKNOWN: i32 = 2;
    const DEADLINE_EXCEEDED: i32 = 4;
    const INTERNAL: i32 = 13;
    const UNAVAILABLE: i32 = 14;
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
    options: Option<TlsOptions>,
    ca_given: bool,
    setting: &'static str,
}

impl Tls {
    fn read(config: &EtcdConfig) -> Result<Self, BadEtcdConfig> {
        let identity = match (&config.cert, &config.key) {
            (None, None) => None,
            (Some(cert), Some(key)) => {
                Some(Identity::from_pem(pem("etcd-certfile", cert)?, pem("etcd-keyfile", key)?))
            }
            (Some(cert), None) => {
                let expected = "etcd-keyfile beside it: a certificate is of no use without its key";
                return Err(bad("etcd-certfile", &cert.display().to_string(), expected));
            }
            (None, Some(key)) => {
                let expected = "etcd-certfile beside it: a key is of no use without its certificate";
                return Err(bad("etcd-keyfile", &key.display().to_string(), expected));
            }
        };
        let mut options = None;
        if let Some(ca) = &config.ca {
            let ca = Certificate::from_pem(pem("etcd-cafile", ca)?);
            options = Some(TlsOptions::new().ca_certificate(ca));
        }
        let setting = if options.is_some() { "etcd-cafile" } else { "etcd-certfile" };
        let ca_given = options.is_some();
        if let Some(identity) = identity {
            options = Some(options.unwrap_or_default().identity(identity));
        }
        Ok(Self { options, ca_given, setting })
    }

    fn endpoint(&self, endpoint: &str, config: &EtcdConfig) -> Result<Endpoint, BadEtcdConfig> {
        let scheme = if self.options.is_some() { "https" } else { "http" };
        let url = match endpoint.split_once("://") {
            None => format!("{scheme}://{endpoint}"),
            Some(("http" | "https", _)) => endpoint.to_owned(),
            Some(_) => return Err(bad("etcd-endpoints", endpoint, "a URL with http:// or https://")),
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(PROBE)
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if url.starts_with("https://") {
            let mut tls = self.options.clone().unwrap_or_default();
            if !self.ca_given {
                tls = tls.ca_certificate(Certificate::from_pem(system_roots(&url)?));
            }
            options = options.with_tls(tls);
        } else if self.options.is_some() {
            let expected = format!("https://, since {} is given", self.setting);
            return Err(bad("etcd-endpoints", endpoint, &expected));
        }
        let user = (config.username.clone(), config.password.clone());
        Ok(Endpoint { url, options, user: Some(user).filter(|(name, _)| !name.is_empty()) })
    }
}

fn system_roots(url: &str) -> Result<Vec<u8>, BadEtcdConfig> {
    SYSTEM_ROOTS.iter().find_map(|path| std::fs::read(path).ok()).ok_or_else(|| {
        let expected =
            format!("etcd-cafile for {url}: this system has no certificates at {}", SYSTEM_ROOTS[0]);
        bad("etcd-cafile", "", &expected)
    })
}

fn pem(setting: &'static str, path: &Path) -> Result<Vec<u8>, BadEtcdConfig> {
    let value = path.display().to_string();
    let text = std::fs::read(path).map_err(|e| bad(setting, &value, &format!("a readable file: {e}")))?;
    let is_pem = text.windows(11).any(|window| window == b"-----BEGIN ");
    if is_pem { Ok(text) } else { Err(bad(setting, &value, "a PEM file")) }
}

fn bad(setting: &'static str, value: &str, expected: &str) -> BadEtcdConfig {
    let value = if value.is_empty() { "nothing".into() } else { value.to_owned() };
    BadEtcdConfig { setting, value, expected: expected.to_owned() }
}
