//! A node of the cluster: a machine with a root of its own, containerd, a kubelet and kube-proxy on it, each a service that
//! scenarios stop and start by name.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::control::{ControlPlane, kubeconfig, token_of};
use super::{POD_NETWORK, Programs, ProxyMode};
use crate::cgroups::Cgroups;
use crate::machine::{Machine, path_below};
use crate::netns::Netns;
use crate::wait::{SECOND, until_ok};

/// As containerd's own documentation has it for Kubernetes (docs/cri/config.md); Debian's package keeps plugins elsewhere.
/// A sandbox's `oom_score_adj` of -998 takes CAP_SYS_RESOURCE, which a test machine that is itself a container lacks.
const CONTAINERD: &str = r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/opt/cni/bin"
  conf_dir = "/etc/cni/net.d"
"#;

/// What a kubelet sets for the whole machine (pkg/kubelet/cm, `setupKernelTunables`). It finds it set, in files
/// of the node's own.
const TUNED: &str = r"
mkdir -p /run/tuned
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    path=${setting%=*}; file=/run/tuned/$(basename $path)
    echo ${setting#*=} >$file
    mount --bind $file /proc/sys/$path
done
# As systemd leaves it.
mount --make-rshared /
";

/// Where containerd has a folder for every container that runs.
const TASKS: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";

/// The machine ends before its containers' cgroups are removed.
#[derive(Debug)]
pub struct KubeNode {
    pub name: String,
    /// In the underlay.
    pub address: Ipv4Addr,
    pub machine: Machine,
    cgroups: Cgroups,
}

impl KubeNode {
    /// Joins the cluster. containerd serves and has the images when this returns; the kubelet may not have said a word.
    pub fn join(
        machine: Machine,
        address: Ipv4Addr,
        control: &ControlPlane,
        programs: &Programs,
        images: &[&Path],
        proxy: ProxyMode,
    ) -> Result<Self> {
        let node = Self { name: machine.name.clone(), address, machine, cgroups: Cgroups::default() };
        let machine = &node.machine;
        machine.sh(TUNED)?;
        machine.put("/etc/containerd/config.toml", CONTAINERD.as_bytes())?;
        machine.sh("mkdir -p /opt/cni/bin /etc/cni/net.d; systemctl start containerd")?;
        until_ok("containerd to serve", SECOND * 60, || machine.sh("ctr version"))?;
        for image in images {
            node.import(image)?;
        }
        machine.put("/etc/kubernetes/ca.crt", &fs::read(control.ca())?)?;
        for user in [&node.name[..], "kube-proxy"] {
            let config = kubeconfig(&token_of(user), "/etc/kubernetes/ca.crt");
            machine.put(&format!("/etc/kubernetes/{user}.conf"), config.as_bytes())?;
        }
        machine.put("/etc/kubernetes/kubelet.yaml", kubelet_config().as_bytes())?;
        node.service(
            "kubelet",
            programs,
            &format!(
                "--kubeconfig=/etc/kubernetes/{name}.conf --config=/etc/kubernetes/kubelet.yaml \
                 --hostname-override={name} --node-ip={address} --root-dir=/var/lib/kubelet",
                name = node.name
            ),
        )?;
        node.service(
            "kube-proxy",
            programs,
            &format!(
                "--kubeconfig=/etc/kubernetes/kube-proxy.conf --hostname-override={} --proxy-mode={} \
                 --cluster-cidr={POD_NETWORK} --conntrack-max-per-core=0 --conntrack-min=0 --oom-score-adj=0",
                node.name,
                proxy.name()
            ),
        )?;
        machine.sh("systemctl start kubelet kube-proxy")?;
        Ok(node)
    }

    /// An OCI archive, for pods that name it and never pull.
    pub fn import(&self, image: &Path) -> Result<()> {
        self.machine.copy(image, "/root/image.tar")?;
        self.machine.sh("ctr --namespace k8s.io images import image.tar; rm image.tar").map(drop)
    }

    /// The namespace of the pod with that address.
    pub fn pod_netns(&self, address: Ipv4Addr) -> Result<Netns> {
        pod_netns(&self.machine.path("/run/netns"), address).with_context(|| self.name.clone())
    }

    /// What containerd keeps namespaces of: one for each pod that is not of the host's network.
    pub fn pod_namespaces(&self) -> Result<usize> {
        Ok(fs::read_dir(self.machine.path("/run/netns"))?.count())
    }

    /// A program of Kubernetes' as a service. Its folder may lie in a file system that this root does not show.
    fn service(&self, name: &str, programs: &Programs, args: &str) -> Result<()> {
        let mut program = programs.path(name).display().to_string();
        if !self.machine.exists(&program) {
            let there = format!("/usr/local/bin/{name}");
            self.machine.copy(Path::new(&program), &there)?;
            program = there;
        }
        ensure!(!program.contains([' ', '$']), "{program}: a path that a unit file can hold");
        let unit = format!("[Unit]\nDescription={name}\n[Service]\nExecStart={program} {args}\n");
        self.machine.put(&format!("/etc/systemd/system/{name}.service"), unit.as_bytes())
    }
}

impl Drop for KubeNode {
    fn drop(&mut self) {
        for end in cgroups_of(self.machine.first()) {
            self.cgroups.add(end);
        }
    }
}

/// The ends of the paths of the cgroups that the containers have which run on the machine with that first process.
pub fn cgroups_of(first: u32) -> Vec<String> {
    let tasks = fs::read_dir(path_below(first, TASKS)).into_iter().flatten().flatten();
    tasks.map(|task| format!("k8s.io/{}", task.file_name().to_string_lossy())).collect()
}

/// In the folder that containerd keeps pods' namespaces in.
pub fn pod_netns(dir: &Path, address: Ipv4Addr) -> Result<Netns> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let netns = Netns::at(&entry?.path());
        // One that goes just now is not the one that is looked for.
        let addresses = netns.ip("-4 -oneline address show").unwrap_or_default();
        if addresses.contains(&format!(" inet {address}/")) {
            return Ok(netns);
        }
    }
    bail!("no pod's namespace has address {address}")
}

/// kubernetes.io, "Kubelet Configuration (v1beta1)". Without cgroups of its own for classes of pods, and without a care for
/// the machine's memory and disk, which are not the node's.
fn kubelet_config() -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs", "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "evictionHard": { "memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%" },
        "imageMinimumGCAge": "100h", "localStorageCapacityIsolation": false,
        "failSwapOn": false, "oomScoreAdj": 0, "protectKernelDefaults": true, "resolvConf": "",
    })
    .to_string()
}
