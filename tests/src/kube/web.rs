//! The pods that scenarios ask: each serves by HTTP who it is and who asked. And the asking.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Kube, RunningPod};
use crate::image::BUSYBOX;
use crate::netns::Netns;

/// busybox httpd runs it (httpd.c, "CGI").
const SERVER: &str = r#"mkdir -p /www/cgi-bin
printf '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n%%s %%s" "$HOSTNAME" "$REMOTE_ADDR"\n' >/www/cgi-bin/who
chmod 755 /www/cgi-bin/who
echo "$HOSTNAME serves"
exec httpd -f -p 80 -h /www"#;

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    /// The name of the pod.
    pub server: String,
    /// Who asked, as the pod sees it.
    pub client: Ipv4Addr,
}

/// A pod template; `extra` is merged into its only container.
pub fn template(app: &str, extra: &Value) -> Value {
    let mut container = json!({
        "name": "server", "image": BUSYBOX, "imagePullPolicy": "Never", "command": ["sh", "-c", SERVER],
        "readinessProbe": { "tcpSocket": { "port": 80 }, "periodSeconds": 1 },
    });
    for (key, value) in extra.as_object().into_iter().flatten() {
        container[key] = value.clone();
    }
    json!({
        "metadata": { "labels": { "app": app } },
        // A pod's first process has no handler for SIGTERM: it would be waited for.
        "spec": { "containers": [container], "terminationGracePeriodSeconds": 1 },
    })
}

/// One on every node.
pub fn daemon_set(app: &str, extra: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": app },
        "spec": { "selector": { "matchLabels": { "app": app } }, "template": template(app, extra) },
    })
}

/// So many on one node.
pub fn deployment(app: &str, node: &str, replicas: usize) -> Value {
    let mut template = template(app, &json!({}));
    template["spec"]["nodeSelector"] = json!({ "kubernetes.io/hostname": node });
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": app },
        "spec": { "replicas": replicas, "selector": { "matchLabels": { "app": app } }, "template": template },
    })
}

/// A service of those pods; `spec` is merged into its own.
pub fn service(name: &str, app: &str, spec: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
        "spec": { "selector": { "app": app }, "ports": [{ "port": 80 }] },
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        object["spec"][key] = value.clone();
    }
    object
}

/// Asks who serves there.
pub fn ask(from: &Netns, host: &str) -> Result<Answer> {
    let url = format!("http://{host}/cgi-bin/who");
    let mut command = Command::new("busybox");
    let text = from.run(command.args(["timeout", "5", "busybox", "wget", "-q", "-O", "-", &url]))?;
    let (server, client) = text.split_once(' ').with_context(|| format!("{url}: {text:?}"))?;
    // By IPv6's socket it is written as a mapped address (RFC 4291, 2.5.5.2).
    let client = client.trim().trim_start_matches("[").trim_end_matches("]").trim_start_matches("::ffff:");
    Ok(Answer {
        server: server.to_owned(),
        client: client.parse().with_context(|| format!("{url}: {text:?}"))?,
    })
}

impl Kube {
    /// The cluster address of a service.
    pub fn service_address(&self, name: &str) -> Result<String> {
        let service = self.get(&["service", name])?;
        service["spec"]["clusterIP"].as_str().map(str::to_owned).context("clusterIP")
    }

    /// The port that a service has on every node.
    pub fn node_port(&self, name: &str) -> Result<u64> {
        let service = self.get(&["service", name])?;
        service["spec"]["ports"][0]["nodePort"].as_u64().context("nodePort")
    }
}

/// Whether so many questions, each answered, were answered by every one of these pods.
pub fn all_answer(from: &Netns, host: &str, pods: &[RunningPod], questions: usize) -> Result<()> {
    let names: BTreeSet<&str> = pods.iter().map(|pod| &pod.name[..]).collect();
    let mut seen = BTreeSet::new();
    for _ in 0..questions {
        seen.insert(ask(from, host)?.server);
        if seen.len() == names.len() {
            break;
        }
    }
    ensure!(seen.iter().all(|name| names.contains(&name[..])), "{seen:?} answered, not of {names:?}");
    ensure!(seen.len() == names.len(), "of {names:?} only {seen:?} answered {questions} questions");
    Ok(())
}
