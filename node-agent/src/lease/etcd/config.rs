//! How to reach etcd, as checked as it can be without asking anybody: [`crate::config`] makes it from the settings.

use std::fmt;
use std::path::PathBuf;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`, at least one; all https when a TLS file is given.
    pub endpoints: Vec<String>,
    /// As Go's path.Join leaves it: no slash at its end, unless it is `/`.
    pub prefix: String,
    /// Enough alone: it then only proves the server.
    pub ca_file: Option<PathBuf>,
    pub client_cert: Option<ClientCert>,
    pub login: Option<Login>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCert {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    pub username: String,
    pub password: Secret,
}

/// A text that no log shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// A file that a setting names, or should have named, and that is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{setting} = {value}: expected {expected}")]
pub struct BadTlsFile {
    pub setting: &'static str,
    pub value: String,
    pub expected: String,
}
