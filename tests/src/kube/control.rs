//! The control plane: API server, controller manager and scheduler in the underlay's namespace, at its address, secured as
//! kubeadm secures one: a CA that pods are told of, RBAC, tokens of service accounts, kubelets that may touch their own
//! node only. Instead of client certificates there are tokens in a file, one for each of the cluster's own programs.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{POD_NETWORK, Programs, SERVICE_NETWORK};
use crate::netns::Netns;
use crate::underlay::{NodeNumber, Underlay};
use crate::wait::patiently;

const PORT: u16 = 6443;
/// The first of the services' addresses is the API's.
const API_SERVICE: &str = "10.96.0.1";
/// A machine that does much else takes its time.
const SERVING: Duration = Duration::from_secs(120);

/// A CA, the API server's certificate for the names in `$1`, and the key that signs service accounts' tokens.
const CERTIFICATES: &str = r#"set -e
key() { openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out $1.key; }
key ca
openssl req -x509 -new -key ca.key -subj /CN=kubernetes -days 3650 -out ca.crt
key server
openssl req -new -key server.key -subj /CN=kube-apiserver -out server.csr
printf 'extendedKeyUsage=serverAuth\nsubjectAltName=%s' "$1" >server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile server.ext -out server.crt
openssl ecparam -name prime256v1 -genkey -noout -out accounts.key
openssl ec -in accounts.key -pubout -out accounts.pub
"#;

#[derive(Debug)]
pub struct ControlPlane {
    dir: PathBuf,
    netns: Netns,
    programs: Programs,
    pub api: Daemon,
    pub controllers: Daemon,
    pub scheduler: Daemon,
}

impl ControlPlane {
    /// On an etcd that serves at `store`; `nodes` may join. Returns when the API answers.
    pub fn start(netns: &Netns, dir: &Path, programs: &Programs, store: &str, nodes: u8) -> Result<Self> {
        let names = format!(
            "IP:{},IP:{API_SERVICE},DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc",
            Underlay::GATEWAY
        );
        let made = Command::new("sh").args(["-c", CERTIFICATES, "sh", &names]).current_dir(dir).output()?;
        ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        let nodes: Vec<String> = (1..=nodes).map(|number| NodeNumber(number).name()).collect();
        fs::write(dir.join("tokens"), tokens(&nodes))?;
        let daemon = |name: &str, args: Vec<String>| Daemon {
            name: name.to_owned(),
            program: programs.path(name),
            args,
            log: dir.join(format!("{name}.log")),
            netns: netns.clone(),
            child: None,
        };
        let file = |name: &str| dir.join(name).display().to_string();
        let config = |user: &str| -> Result<String> {
            let path = dir.join(format!("{user}.conf"));
            fs::write(&path, kubeconfig(&token_of(user), &file("ca.crt")))?;
            Ok(format!("--kubeconfig={}", path.display()))
        };
        config("admin")?;
        let api = daemon(
            "kube-apiserver",
            vec![
                format!("--etcd-servers={store}"),
                format!("--bind-address={}", Underlay::GATEWAY),
                format!("--advertise-address={}", Underlay::GATEWAY),
                format!("--secure-port={PORT}"),
                format!("--cert-dir={}", file("")),
                format!("--tls-cert-file={}", file("server.crt")),
                format!("--tls-private-key-file={}", file("server.key")),
                format!("--token-auth-file={}", file("tokens")),
                "--authorization-mode=Node,RBAC".to_owned(),
                "--enable-admission-plugins=NodeRestriction".to_owned(),
                "--allow-privileged=true".to_owned(),
                format!("--service-cluster-ip-range={SERVICE_NETWORK}"),
                "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
                format!("--service-account-key-file={}", file("accounts.pub")),
                format!("--service-account-signing-key-file={}", file("accounts.key")),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
            ],
        );
        let controllers = daemon(
            "kube-controller-manager",
            vec![
                config("kube-controller-manager")?,
                "--bind-address=127.0.0.1".to_owned(),
                format!("--cert-dir={}", file("controllers")),
                "--leader-elect=false".to_owned(),
                "--use-service-account-credentials=true".to_owned(),
                format!("--service-account-private-key-file={}", file("accounts.key")),
                format!("--root-ca-file={}", file("ca.crt")),
                "--allocate-node-cidrs=true".to_owned(),
                format!("--cluster-cidr={POD_NETWORK}"),
                format!("--service-cluster-ip-range={SERVICE_NETWORK}"),
            ],
        );
        let scheduler = daemon(
            "kube-scheduler",
            vec![
                config("kube-scheduler")?,
                "--bind-address=127.0.0.1".to_owned(),
                format!("--cert-dir={}", file("scheduler")),
                "--leader-elect=false".to_owned(),
                "--authentication-tolerate-lookup-failure=true".to_owned(),
            ],
        );
        let mut control = Self {
            dir: dir.to_owned(),
            netns: netns.clone(),
            programs: programs.clone(),
            api,
            controllers,
            scheduler,
        };
        control.start_api()?;
        control.controllers.start()?;
        control.scheduler.start()?;
        Ok(control)
    }

    pub fn start_api(&mut self) -> Result<()> {
        self.api.start()?;
        patiently("the API to be ready", SERVING, || {
            self.api.is_running()?;
            self.kubectl(&["get", "--raw=/readyz"]).map(drop)
        })
    }

    /// As the cluster's administrator, from the underlay.
    pub fn kubectl<A: AsRef<OsStr>>(&self, args: &[A]) -> Result<String> {
        self.netns.run(self.kubectl_command().args(args))
    }

    /// For what is run otherwise than to its good end.
    pub fn kubectl_command(&self) -> Command {
        let [program, options @ ..] = self.kubectl_line();
        let mut command = Command::new(program);
        command.env_remove("KUBECONFIG").args(options);
        command
    }

    /// The program and the options that every call needs.
    pub fn kubectl_line(&self) -> [String; 3] {
        let program = self.programs.path("kubectl").display().to_string();
        let config = format!("--kubeconfig={}", self.dir.join("admin.conf").display());
        [program, config, format!("--cache-dir={}", self.dir.join("cache").display())]
    }

    /// A kubeconfig for the bearer of this token.
    pub fn kubeconfig(&self, file: &str, token: &str) -> Result<PathBuf> {
        let path = self.dir.join(file);
        fs::write(&path, kubeconfig(token, &self.ca().display().to_string()))?;
        Ok(path)
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    pub fn daemons(&mut self) -> [&mut Daemon; 3] {
        [&mut self.api, &mut self.controllers, &mut self.scheduler]
    }
}

/// A program of the control plane, ended with this value.
#[derive(Debug)]
pub struct Daemon {
    pub name: String,
    pub log: PathBuf,
    program: PathBuf,
    args: Vec<String>,
    netns: Netns,
    child: Option<Child>,
}

impl Daemon {
    pub fn start(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new("setsid");
        command.arg(&self.program).args(&self.args).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        self.child = Some(self.netns.spawn(&mut command)?);
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL)?;
            child.wait()?;
        }
        Ok(())
    }

    /// Leaves it running when this value goes.
    pub fn detach(&mut self) {
        self.child = None;
    }

    fn is_running(&mut self) -> Result<()> {
        let child = self.child.as_mut().with_context(|| format!("{} was not started", self.name))?;
        match child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended: {status}; see {}", self.name, self.log.display()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

pub(super) fn kubeconfig(token: &str, ca: &str) -> String {
    let server = format!("https://{}:{PORT}", Underlay::GATEWAY);
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "weft",
        "clusters": [{ "name": "weft", "cluster": { "server": server, "certificate-authority": ca } }],
        "users": [{ "name": "weft", "user": { "token": token } }],
        "contexts": [{ "name": "weft", "context": { "cluster": "weft", "user": "weft" } }],
    })
    .to_string()
}

/// The cluster is reached from namespaces of this machine only.
pub(super) fn token_of(user: &str) -> String {
    format!("token-of-{user}")
}

/// Lines of token, name, identifier and groups: kubernetes.io, "Static token file".
fn tokens(nodes: &[String]) -> String {
    let mut lines = format!("{},admin,admin,system:masters\n", token_of("admin"));
    for program in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
        // Known to RBAC by its own name; kubeadm binds kube-proxy's role to a service account instead.
        lines += &format!("{},system:{program},{program}\n", token_of(program));
    }
    for node in nodes {
        lines += &format!("{},system:node:{node},{node},system:nodes\n", token_of(node));
    }
    lines
}
