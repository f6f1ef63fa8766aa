//! A client of the container runtime interface, as a kubelet is one: pods and their containers by gRPC on containerd's
//! socket (kubernetes/cri-api, runtime/v1). Blocking, and shared by threads. Not of the harness: its generated code would be
//! compiled for the lab as well.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use e2e::cgroups::Cgroups;
use e2e::containerd;
use e2e::fleet::Host;
use e2e::image::BUSYBOX;
use e2e::wait::{SECOND, eventually, until_ok};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, ImageSpec,
    LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata, PodSandboxStatusRequest, PortMapping,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StatusRequest,
    StopPodSandboxRequest, VersionRequest,
};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Response, Status};

/// As long as a kubelet waits for a sandbox.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const EXEC_SECONDS: i64 = 30;

#[derive(Debug)]
pub(crate) struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
    cgroups: Arc<Cgroups>,
}

/// What a kubelet asks for.
#[derive(Debug, Clone)]
pub(crate) struct PodSpec {
    pub(crate) name: String,
    /// Ports of the host, and where in the pod they lead.
    pub(crate) host_ports: Vec<(u16, u16)>,
}

/// A pod as the runtime knows it.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    config: PodSandboxConfig,
}

impl PodSpec {
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.to_owned(), host_ports: Vec::new() }
    }

    pub(crate) fn host_port(mut self, host: u16, pod: u16) -> Self {
        self.host_ports.push((host, pod));
        self
    }

    fn config(&self) -> PodSandboxConfig {
        let port = |(host, pod): &(u16, u16)| PortMapping {
            host_port: i32::from(*host),
            container_port: i32::from(*pod),
            ..PortMapping::default()
        };
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: self.name.clone(),
                uid: format!("uid-of-{}", self.name),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: self.name.clone(),
            port_mappings: self.host_ports.iter().map(port).collect(),
            linux: Some(LinuxPodSandboxConfig::default()),
            ..PodSandboxConfig::default()
        }
    }
}

impl Cri {
    /// A host's containerd, started, once its service answers.
    pub(crate) fn start(host: &Host) -> Result<Self> {
        containerd::start(&host.machine)?;
        let socket = host.machine.path("/run/containerd/containerd.sock");
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let client = until_ok("containerd's CRI service", SECOND * 30, || {
            runtime.block_on(async {
                let mut client = RuntimeServiceClient::new(channel(socket.clone()).await?);
                let version = client.version(VersionRequest::default()).await?.into_inner();
                if version.runtime_api_version != "v1" {
                    bail!("it speaks {version:?}");
                }
                Ok(client)
            })
        })?;
        Ok(Self { runtime, client, cgroups: host.cgroups.clone() })
    }

    fn call<T>(
        &self,
        what: &str,
        call: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        let answer = self.runtime.block_on(call(self.client.clone()));
        answer
            .map(Response::into_inner)
            .map_err(|status| anyhow!("{what}: {:?}: {}", status.code(), status.message()))
    }

    /// Whether the runtime calls its network ready, and why not.
    pub(crate) fn network_ready(&self) -> Result<(bool, String)> {
        let status = self.call("Status", async |mut client| client.status(StatusRequest::default()).await)?;
        let conditions = status.status.context("a status")?.conditions;
        let network = conditions.into_iter().find(|condition| condition.r#type == "NetworkReady");
        let network = network.context("a condition NetworkReady")?;
        Ok((network.status, network.message))
    }

    /// containerd reads a new list within seconds, if it notices it at all.
    pub(crate) fn wait_network_ready(&self) -> Result<()> {
        eventually("NetworkReady", SECOND * 30, || match self.network_ready()? {
            (true, _) => Ok(true),
            (false, why) => bail!("{why}"),
        })
        .map(drop)
    }

    /// RunPodSandbox.
    pub(crate) fn run_pod(&self, spec: &PodSpec) -> Result<Sandbox> {
        let config = spec.config();
        let request = run_request(&config);
        let id = self
            .call("RunPodSandbox", async |mut client| client.run_pod_sandbox(request).await)?
            .pod_sandbox_id;
        self.leaves_cgroup(&id);
        Ok(Sandbox { id, config })
    }

    /// RunPodSandbox that is called off once `seen` holds, before its answer: as by a kubelet that has run out of patience.
    pub(crate) fn run_pod_until(&self, spec: &PodSpec, mut seen: impl FnMut() -> Result<bool>) -> Result<()> {
        let request = run_request(&spec.config());
        let mut client = self.client.clone();
        let what = format!("{} to be called off", spec.name);
        self.runtime.block_on(async {
            let asked = client.run_pod_sandbox(request);
            let looks = async {
                while !seen()? {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Ok(())
            };
            tokio::select! {
                answer = asked => bail!("{what}: it has ended already: {answer:?}"),
                looked = tokio::time::timeout(PATIENCE, looks) => looked.context(what)?,
            }
        })?;
        // What is dropped above is told to the server by whatever drives the connection next.
        self.call("Version", async |mut client| client.version(VersionRequest::default()).await).map(drop)
    }

    /// The pod's address, as a kubelet learns it.
    pub(crate) fn address(&self, pod: &Sandbox) -> Result<Ipv4Addr> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        let answer =
            self.call("PodSandboxStatus", async |mut client| client.pod_sandbox_status(request).await)?;
        let network = answer.status.and_then(|status| status.network).context("a network")?;
        network.ip.parse().with_context(|| format!("address {:?}", network.ip))
    }

    /// A container of the pod, running.
    pub(crate) fn start_container(&self, pod: &Sandbox, command: &[&str]) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: BUSYBOX.to_owned(), ..ImageSpec::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let id = self
            .call("CreateContainer", async |mut client| client.create_container(request).await)?
            .container_id;
        self.leaves_cgroup(&id);
        let request = StartContainerRequest { container_id: id.clone() };
        self.call("StartContainer", async |mut client| client.start_container(request).await)?;
        Ok(id)
    }

    /// What a command prints in a container, which must succeed.
    pub(crate) fn exec(&self, container: &str, command: &[&str]) -> Result<String> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: EXEC_SECONDS,
        };
        let answer = self.call("ExecSync", async |mut client| client.exec_sync(request).await)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if answer.exit_code != 0 {
            bail!("{command:?} exits with {}: {}", answer.exit_code, text(&answer.stderr));
        }
        Ok(text(&answer.stdout))
    }

    pub(crate) fn stop_pod(&self, pod: &Sandbox) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        self.call("StopPodSandbox", async |mut client| client.stop_pod_sandbox(request).await).map(drop)
    }

    pub(crate) fn remove_pod(&self, pod: &Sandbox) -> Result<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        self.call("RemovePodSandbox", async |mut client| client.remove_pod_sandbox(request).await).map(drop)
    }

    fn leaves_cgroup(&self, id: &str) {
        self.cgroups.add(format!("k8s.io/{id}"));
    }
}

fn run_request(config: &PodSandboxConfig) -> Request<RunPodSandboxRequest> {
    let asked = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    let mut request = Request::new(asked);
    request.set_timeout(PATIENCE);
    request
}

async fn channel(socket: PathBuf) -> Result<Channel> {
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    // The name serves for nothing but the authority, which containerd's server wants to be a valid one.
    Ok(Endpoint::from_static("http://localhost").connect_with_connector(connector).await?)
}
