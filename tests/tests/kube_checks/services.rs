//! What kube-proxy, the plugin's portmap and the kubelet make of pods' addresses.

use anyhow::{Context as _, Result, ensure};
use e2e::kube::web::{all_answer, ask, service};
use e2e::kube::{Kube, PATIENCE, RunningPod};
use e2e::underlay::Underlay;
use e2e::wait::{SECOND, eventually, until_ok};
use serde_json::json;

use super::{EACH, HOST_PORT};

/// kube-proxy chooses at random: of so many questions each of three pods gets one, but for once in 10^17 runs.
const QUESTIONS: usize = 100;

/// A cluster address leads to every pod, from pods (their own among them) and from nodes.
pub(crate) fn a_service_is_balanced_over_nodes(kube: &Kube, pods: &[RunningPod]) -> Result<()> {
    kube.apply(&service("balanced", EACH, &json!({})).to_string())?;
    let address = kube.service_address("balanced")?;
    let node = kube.nodes.iter().map(|node| (&node.name, &node.machine.netns));
    for (name, from) in pods.iter().map(|pod| (&pod.name, &pod.netns)).chain(node) {
        until_ok(&format!("the service's rules to lead from {name} to all pods"), SECOND * 60, || {
            all_answer(from, &address, pods, QUESTIONS)
        })?;
    }
    Ok(())
}

/// From another node, from a pod of it, and from outside.
pub(crate) fn a_host_port_leads_to_its_pod(kube: &Kube, pods: &[RunningPod]) -> Result<()> {
    for (place, pod) in pods.iter().enumerate() {
        let far = &pods[(place + 1) % pods.len()];
        let host = format!("{}:{HOST_PORT}", kube.node(&pod.node)?.address);
        let clients = [&far.netns, &kube.node(&far.node)?.machine.netns, &kube.underlay.netns];
        for from in clients {
            let answer = until_ok(&format!("{host} from {from:?}"), SECOND * 60, || ask(from, &host))?;
            ensure!(answer.server == pod.name, "{host}: {answer:?}, expected {}", pod.name);
        }
    }
    Ok(())
}

/// `externalTrafficPolicy: Local`: a client outside of the cluster is seen by its own address.
pub(crate) fn a_local_service_sees_its_client(kube: &Kube, pods: &[RunningPod]) -> Result<()> {
    let local = json!({ "type": "NodePort", "externalTrafficPolicy": "Local" });
    kube.apply(&service("local", EACH, &local).to_string())?;
    let port = kube.node_port("local")?;
    for pod in pods {
        let host = format!("{}:{port}", kube.node(&pod.node)?.address);
        let answer =
            until_ok(&format!("{host} from outside"), SECOND * 60, || ask(&kube.underlay.netns, &host))?;
        ensure!(answer.server == pod.name, "{host}: {answer:?}, expected {}", pod.name);
        ensure!(answer.client == Underlay::GATEWAY, "{host}: {answer:?}, expected {}", Underlay::GATEWAY);
    }
    Ok(())
}

/// The API server asks the kubelet for both.
pub(crate) fn exec_and_logs_work(kube: &Kube, pods: &[RunningPod]) -> Result<()> {
    for pod in pods {
        let inside = kube.kubectl(&["exec", &pod.name, "--", "ip", "address", "show", "eth0"])?;
        ensure!(inside.contains(&format!("inet {}/", pod.address)), "{inside}");
        let log = kube.kubectl(&["logs", &pod.name])?;
        ensure!(log.trim() == format!("{} serves", pod.name), "{log:?}");
    }
    Ok(())
}

/// A pod that uses its service account: the way that every agent in a cluster takes to the API.
pub(crate) fn the_api_answers_a_pod(kube: &Kube, pod: &RunningPod) -> Result<()> {
    let script = "cat /var/run/secrets/kubernetes.io/serviceaccount/ca.crt; \
                  echo $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT; \
                  cat /var/run/secrets/kubernetes.io/serviceaccount/token";
    let text = kube.kubectl(&["exec", &pod.name, "--", "sh", "-c", script])?;
    let (certificate, rest) = text.split_once("-----END CERTIFICATE-----\n").context("a certificate")?;
    let (place, token) = rest.split_once('\n').context("a place")?;
    let file = kube.bed.dir("kube")?.join("ca-of-pod.crt");
    std::fs::write(&file, format!("{certificate}-----END CERTIFICATE-----\n"))?;
    let mut command = kube.control.kubectl_command();
    // The flags that are given last count.
    command
        .args(["--kubeconfig=/dev/null", "--cache-dir=/dev/null"])
        .arg(format!("--server=https://{place}"));
    command.arg(format!("--certificate-authority={}", file.display())).arg(format!("--token={token}"));
    let who = pod.netns.run(command.args(["auth", "whoami"]))?;
    ensure!(who.contains("system:serviceaccount:default:default"), "{who}");
    Ok(())
}

/// Of pods that are gone nothing answers any more: what the other checks leave.
pub(crate) fn clear(kube: &Kube) -> Result<()> {
    kube.kubectl(&["delete", "service", "balanced", "local"])?;
    kube.kubectl(&["delete", "daemonset", EACH, "--wait=false"])?;
    kube.wait_no_pods("default", "app=each")?;
    eventually("every pod's namespace to be gone", PATIENCE, || {
        let left: usize = kube.nodes.iter().map(|node| node.pod_namespaces()).sum::<Result<_>>()?;
        Ok(left == 0)
    })?;
    Ok(())
}
