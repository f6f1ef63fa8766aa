//! Certificates and logins: of the members, of an agent, of `etcdctl`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::Member;

/// Makes a CA, and certificates of it for the members and for a client, and a second CA with a client of its own.
const SCRIPT: &str = r#"set -e
certificate() { # CA NAME SUBJECTALTNAME
    openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out $2.key
    openssl req -new -key $2.key -subj /CN=$2 -out $2.csr
    printf 'extendedKeyUsage=serverAuth,clientAuth\n%s' "$3" > $2.ext
    openssl x509 -req -in $2.csr -CA $1.crt -CAkey $1.key -CAcreateserial -days 2 -extfile $2.ext -out $2.crt
}
for ca in ca stranger; do
    openssl ecparam -name prime256v1 -genkey -noout -out $ca.key
    openssl req -x509 -new -key $ca.key -subj /CN=$ca -days 2 -out $ca.crt
done
certificate ca server "$1"
certificate ca client ""
certificate stranger nobody ""
"#;

#[derive(Debug, Clone, Default)]
pub struct Security {
    /// Where the certificates lie.
    dir: Option<PathBuf>,
    login: bool,
}

impl Security {
    pub fn plain() -> Self {
        Self::default()
    }

    pub(super) fn certified(dir: &Path, members: &[Member]) -> Result<Self> {
        let mut names = "subjectAltName=IP:127.0.0.1".to_owned();
        members.iter().try_for_each(|member| write!(names, ",IP:{}", member.address))?;
        let output = Command::new("sh").args(["-c", SCRIPT, "sh", &names]).current_dir(dir).output()?;
        if !output.status.success() {
            bail!("openssl: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(Self { dir: Some(dir.to_owned()), login: false })
    }

    pub(super) fn log_in(&mut self) {
        self.login = true;
    }

    pub(super) fn scheme(&self) -> &'static str {
        if self.dir.is_some() { "https" } else { "http" }
    }

    /// A file of those that [`Security`] made: `ca.crt`, `stranger.crt`, `nobody.key`.
    pub fn file(&self, name: &str) -> String {
        self.dir.as_ref().map(|dir| dir.join(name).display().to_string()).unwrap_or_default()
    }

    pub(super) fn member_flags(&self) -> Vec<String> {
        if self.dir.is_none() {
            return Vec::new();
        }
        vec![
            format!("--cert-file={}", self.file("server.crt")),
            format!("--key-file={}", self.file("server.key")),
            format!("--trusted-ca-file={}", self.file("ca.crt")),
            "--client-cert-auth".to_owned(),
        ]
    }

    pub(super) fn agent_flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if self.dir.is_some() {
            flags.push(format!("--etcd-cafile={}", self.file("ca.crt")));
            flags.push(format!("--etcd-certfile={}", self.file("client.crt")));
            flags.push(format!("--etcd-keyfile={}", self.file("client.key")));
        }
        if self.login {
            flags.extend(["--etcd-username=flannel".to_owned(), "--etcd-password=secret".to_owned()]);
        }
        flags
    }

    pub(super) fn etcdctl_flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if self.dir.is_some() {
            flags.push(format!("--cacert={}", self.file("ca.crt")));
            flags.push(format!("--cert={}", self.file("client.crt")));
            flags.push(format!("--key={}", self.file("client.key")));
        }
        if self.login {
            flags.push("--user=root:rootpw".to_owned());
        }
        flags
    }
}
