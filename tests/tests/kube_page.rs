//! docs/kubernetes.md does what it says: its commands are extracted from the page and executed, in the page's order, on a
//! cluster of three nodes that has nothing of weft's but the image and the manifests. What the page promises of the
//! pod's rights is asked of the cluster; afterwards the nodes are as they were.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use e2e::bed::Bed;
use e2e::dist::{self, CHECKOUT};
use e2e::kube::{Kube, KubeNode, PATIENCE, ProxyMode, RunningPod, web};
use e2e::page::{Block, blocks};
use e2e::report;
use e2e::traffic::echo::ping;
use e2e::wait::{SECOND, patiently, until_ok};
use serde_json::{Value, json};

const NAMESPACE: &str = "kube-weft";
/// Nothing of weft's is there when it has gone.
const PATHS: [&str; 6] = [
    "/run/weft",
    "/var/lib/weft",
    "/run/flannel",
    "/opt/cni/bin/weft",
    "/opt/cni/bin/loopback",
    "/etc/cni/net.d/10-weft.conflist",
];

/// What the reader's ConfigMap says and the manifest's does not: it contains the cluster's podCIDRs too.
const NETWORK: &str = "10.244.0.0/15";

/// Links, addresses, routes and tables of the packet filter.
const FACTS: &str = "ip -o link show | cut -d: -f2 | sort; ip -o address show scope global | awk '{ print $2, $4 }' | sort; \
                     ip route show table all type unicast | sort; nft list tables | sort; cat /proc/sys/net/ipv4/ip_forward";

struct Page {
    kube: Kube,
    /// Where the administrator works.
    admin: PathBuf,
    pods: Vec<RunningPod>,
}

impl Page {
    fn start() -> Result<Self> {
        let bed = Bed::for_test()?;
        let image = dist::image()?;
        let kube = Kube::start(bed, 3, ProxyMode::Nftables, &[])?;
        let admin = kube.bed.dir("admin")?;
        for manifest in ["weft.yaml", "uninstall.yaml"] {
            fs::copy(Path::new(CHECKOUT).join("conf/kubernetes").join(manifest), admin.join(manifest))?;
        }
        let kubectl = format!("#!/bin/sh\nexec {} \"$@\"\n", kube.control.kubectl_line().join(" "));
        fs::create_dir(admin.join("bin"))?;
        fs::write(admin.join("bin/kubectl"), kubectl)?;
        fs::set_permissions(admin.join("bin/kubectl"), fs::Permissions::from_mode(0o755))?;
        let name = image.file_name().context("a file")?.to_string_lossy().into_owned();
        for node in &kube.nodes {
            node.machine.copy(&image, &format!("/root/{name}"))?;
        }
        Ok(Self { kube, admin, pods: Vec::new() })
    }

    fn as_admin(&self, script: &str) -> Result<String> {
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", &format!("exec 2>&1\n{script}")]).current_dir(&self.admin);
        command.env_remove("KUBECONFIG").env("NETWORK", NETWORK).stdin(Stdio::null());
        command.env("PATH", format!("{}/bin:/usr/sbin:/usr/bin:/sbin:/bin", self.admin.display()));
        let output = self.kube.underlay.netns.output(&mut command)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { Ok(text) } else { bail!("{script}\n{text}") }
    }

    /// What is true in the reader's world before a block can work, and not in ours.
    fn before(&mut self, block: &Block) -> Result<()> {
        match block.note.as_str() {
            "when all are ready" => {
                for node in &self.kube.nodes {
                    patiently(&format!("the peers of {}", node.name), PATIENCE, || {
                        let peers = self.weftctl(node, "peers")?;
                        let peers = peers.as_array().context("peers")?;
                        ensure!(
                            peers.len() == 2 && peers.iter().all(|peer| peer["programmed"] == true),
                            "{peers:?}"
                        );
                        Ok(())
                    })?;
                }
                self.rights()?;
                self.live()
            }
            "in the order of these blocks" => {
                self.network_is("after the upgrade")?;
                self.pods_have_lived_through()?;
                self.refused_while_pods_are_attached()
            }
            "when they have succeeded" => {
                self.uninstalled_without_a_word_of_failure()?;
                self.replacements_wait()
            }
            "" | "where nothing has rolled and something has to" => Ok(()),
            note if note.starts_with("with NETWORK set") => Ok(()),
            other => bail!("nobody knows what is meant by {other:?}"),
        }
    }

    fn run(&mut self, block: &Block) -> Result<()> {
        let Some(place) = &block.place else { return Ok(()) };
        self.before(block)?;
        let text = match place.as_str() {
            "admin" => self.as_admin(&block.script)?,
            "nodes" => {
                let texts = self.kube.nodes.iter().map(|node| node.machine.sh(&block.script));
                texts.collect::<Result<Vec<_>>>()?.concat()
            }
            other => bail!("{other:?}: expected admin or nodes"),
        };
        report::figure(format_args!("--- {}\n{text}", block.script));
        Ok(())
    }

    fn weftctl(&self, node: &KubeNode, verb: &str) -> Result<Value> {
        let agent = self.agent_on(node)?;
        let text = self
            .kube
            .kubectl(&["-n", NAMESPACE, "exec", &agent, "-c", "weftd", "--", "weftctl", "--json", verb])?;
        serde_json::from_str(&text).with_context(|| text)
    }

    fn agent_on(&self, node: &KubeNode) -> Result<String> {
        let agents = self.kube.wait_pods(NAMESPACE, "app=weft", 3)?;
        let agent = agents.into_iter().find(|agent| agent.node == node.name);
        Ok(agent.with_context(|| format!("an agent on {}", node.name))?.name)
    }

    /// What the page says that the pod may do: by the manifest as the API has it, and by the API's own judgement.
    fn rights(&self) -> Result<()> {
        self.kube.kubectl(&[
            "apply",
            "--dry-run=server",
            "--validate=strict",
            "-f",
            &self.file("weft.yaml"),
        ])?;
        let set = self.kube.get(&["-n", NAMESPACE, "daemonset", "weft"])?;
        let spec = &set["spec"]["template"]["spec"];
        let all = ["initContainers", "containers"].map(|kind| spec[kind][0].clone());
        let added =
            all.each_ref().map(|container| container["securityContext"]["capabilities"]["add"].clone());
        ensure!(added == [json!(["DAC_OVERRIDE"]), json!(["NET_ADMIN", "NET_RAW"])], "{added:?}");
        for container in &all {
            let context = &container["securityContext"];
            ensure!(
                context["capabilities"]["drop"] == json!(["ALL"])
                    && context["readOnlyRootFilesystem"] == true
                    && context["allowPrivilegeEscalation"] == false
                    && context["privileged"].is_null(),
                "{context}"
            );
        }
        ensure!(all[1]["livenessProbe"]["httpGet"]["path"] == "/healthz", "{}", all[1]);
        let volumes = spec["volumes"].as_array().context("volumes")?;
        let paths: BTreeSet<&str> =
            volumes.iter().filter_map(|volume| volume["hostPath"]["path"].as_str()).collect();
        let expected = [
            "/dev/net",
            "/etc/cni/net.d",
            "/opt/cni/bin",
            "/proc/sys/net",
            "/run/flannel",
            "/run/weft",
            "/var/lib/weft",
        ];
        ensure!(paths == BTreeSet::from(expected), "{paths:?}");

        let may_in = |namespaces: &str, question: &str| {
            let who = format!("--as=system:serviceaccount:{NAMESPACE}:weft");
            let text = self.as_admin(&format!("kubectl auth can-i {question} {who} {namespaces} || true"))?;
            Ok::<_, anyhow::Error>(text.lines().last() == Some("yes"))
        };
        let may = |question: &[&str]| may_in("-A", &question.join(" "));
        for question in [
            &["list", "nodes"][..],
            &["watch", "nodes"],
            &["patch", "nodes", "--subresource=status"],
            &["list", "networkpolicies"],
        ] {
            ensure!(may(question)?, "weft may not {question:?}");
        }
        for question in [
            &["get", "pods"][..],
            &["get", "secrets"],
            &["patch", "nodes"],
            &["update", "nodes", "--subresource=status"],
            &["delete", "nodes"],
            &["get", "networkpolicies"],
            &["watch", "networkpolicies"],
            &["create", "events"],
            &["create", "events.events.k8s.io"],
            &["list", "configmaps"],
        ] {
            ensure!(!may(question)?, "weft may {question:?}");
        }
        ensure!(may_in("-n default", "create events.events.k8s.io")?, "weft may not create Events");
        for question in ["create events", "list events.events.k8s.io", "patch events.events.k8s.io"] {
            ensure!(!may_in("-n default", question)?, "weft may {question}");
        }
        Ok(())
    }

    fn file(&self, name: &str) -> String {
        self.admin.join(name).display().to_string()
    }

    /// Pods on every node, which live through what the page does next.
    fn live(&mut self) -> Result<()> {
        self.kube.apply(&web::daemon_set("each", &json!({})).to_string())?;
        // On one node, so that a second one has no more to hold than the DaemonSet's.
        self.kube.apply(&web::deployment("many", "n1", 2).to_string())?;
        self.pods = self.kube.wait_pods("default", "app in (each, many)", 5)?;
        self.network_is("as installed")?;
        for node in &self.kube.nodes {
            let mode = node.machine.sh("stat -c %a /run/weft")?;
            ensure!(mode == "700\n", "/run/weft of {} is {mode}", node.name);
            let conditions = self.kube.get(&["node", &node.name])?["status"]["conditions"].clone();
            let network = conditions.as_array().into_iter().flatten();
            let network = network.filter(|condition| condition["type"] == "NetworkUnavailable");
            let network: Vec<&Value> = network.collect();
            ensure!(network.len() == 1 && network[0]["status"] == "False", "{conditions}");
        }
        self.reach()
    }

    fn reach(&self) -> Result<()> {
        for from in &self.pods {
            for to in self.pods.iter().filter(|to| to.name != from.name) {
                ping(&from.netns, to.address, 10, SECOND).with_context(|| format!("{from:?} to {to:?}"))?;
            }
        }
        Ok(())
    }

    /// The agent of a node is in its second pod by now, which sees no namespace of any pod. Whatever list a runtime has, no
    /// address is free while its veth lives.
    fn pods_have_lived_through(&self) -> Result<()> {
        for node in &self.kube.nodes {
            let seen = node.machine.sh("for process in /proc/[0-9]*; do\n\
                 [ \"$(cat $process/comm 2>/dev/null)\" != weftd ] || cat $process/mountinfo\n\
                 done")?;
            ensure!(seen.contains(" /host/proc/sys/net "), "the mounts of no agent: {seen}");
            ensure!(!seen.contains("netns") && !seen.contains(" nsfs "), "weftd sees namespaces: {seen}");
            let pods = self.weftctl(node, "pods")?;
            let ids: Vec<Value> =
                pods.as_array().context("pods")?.iter().map(|pod| pod["container_id"].clone()).collect();
            ensure!(!ids.is_empty() && ids.iter().all(Value::is_string), "{pods}");
            let valid: Vec<Value> =
                ids.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
            let config = json!({
                "cniVersion": "1.1.0", "name": "weft", "type": "weft", "cni.dev/valid-attachments": valid,
            });
            node.machine
                .sh(&format!("echo '{config}' | CNI_COMMAND=GC CNI_PATH=/opt/cni/bin /opt/cni/bin/weft"))?;
            let passes = || {
                let status = self.weftctl(node, "status")?;
                status["dataplane"]["passes"].as_u64().with_context(|| format!("passes in {status}"))
            };
            let then = passes()?;
            patiently("two more looks at the kernel", PATIENCE, || {
                let now = passes()?;
                ensure!(now > then + 1, "{now} looks, {then} before");
                Ok(())
            })?;
            ensure!(self.weftctl(node, "pods")? == pods, "pods of {} were freed", node.name);
        }
        let now = self.kube.wait_pods("default", "app in (each, many)", 5)?;
        let names = |pods: &[RunningPod]| {
            pods.iter().map(|pod| (pod.name.clone(), pod.address)).collect::<BTreeSet<_>>()
        };
        ensure!(names(&now) == names(&self.pods), "{now:?}");
        self.reach()
    }

    /// What the reader has made holds, whatever the manifest beside it says.
    fn network_is(&self, when: &str) -> Result<()> {
        for node in &self.kube.nodes {
            patiently(&format!("the Network of {} {when}", node.name), PATIENCE, || {
                let file = node.machine.read("/run/flannel/subnet.env")?;
                ensure!(file.contains(&format!("FLANNEL_NETWORK={NETWORK}\n")), "{file}");
                Ok(())
            })?;
        }
        let config = self.kube.get(&["-n", NAMESPACE, "configmap", "weft"])?["data"].to_string();
        ensure!(config.contains(NETWORK), "{when}: {config}");
        Ok(())
    }

    /// Somebody was too early. It stays, and what the page does next makes it succeed.
    fn refused_while_pods_are_attached(&self) -> Result<()> {
        let uninstall = fs::read_to_string(self.file("uninstall.yaml"))?.replace("NODE_NAME", "n1");
        self.kube.apply(&uninstall)?;
        let said = patiently("the refusal", PATIENCE, || {
            let log =
                self.kube.kubectl(&["-n", "kube-system", "logs", "weft-uninstall-n1", "-c", "uninstall"])?;
            ensure!(log.contains("nothing was removed"), "{log}");
            Ok(log)
        })?;
        ensure!(
            said.contains("weftd runs in this network namespace") && said.contains("3 pods are attached"),
            "{said}"
        );
        self.reach()
    }

    /// What controllers have put in the place of the deleted pods has no address.
    fn replacements_wait(&self) -> Result<()> {
        let before: BTreeSet<&str> = self.pods.iter().map(|pod| pod.name.as_str()).collect();
        patiently("pods in the place of others", PATIENCE, || {
            let pods = self.kube.list(&["pods", "-l", "app in (each, many)"])?;
            let waits = |pod: &Value| {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                !before.contains(name)
                    && pod["status"]["phase"] == "Pending"
                    && pod["status"]["podIP"].is_null()
            };
            ensure!(pods.len() == 5 && pods.iter().all(waits), "{pods:?}");
            Ok(())
        })
    }

    fn uninstalled_without_a_word_of_failure(&self) -> Result<()> {
        for node in &self.kube.nodes {
            let pod = format!("weft-uninstall-{}", node.name);
            let log = self.kube.kubectl(&["-n", "kube-system", "logs", &pod, "-c", "uninstall"])?;
            ensure!(log.contains("removed; the programs are left") && !log.contains("FAILED"), "{log}");
        }
        Ok(())
    }
}

#[test]
fn the_kubernetes_page_works_as_written() -> Result<()> {
    let text = fs::read_to_string(Path::new(CHECKOUT).join("docs/kubernetes.md"))?;
    let blocks = blocks(&text)?;
    ensure!(blocks.iter().filter(|block| block.place.is_some()).count() >= 9, "{blocks:?}");
    let mut page = Page::start()?;
    let before: Vec<String> = facts(&page)?;
    let done = blocks.iter().try_for_each(|block| page.run(block)).and_then(|()| {
        for (node, before) in page.kube.nodes.iter().zip(&before) {
            for path in PATHS {
                ensure!(!node.machine.exists(path), "{path} is left on {}", node.name);
            }
            let after = node.machine.sh(FACTS)?;
            ensure!(after == *before, "{} before:\n{before}\nafter:\n{after}", node.name);
            let object = page.kube.get(&["node", &node.name])?;
            let annotations = object["metadata"]["annotations"].to_string();
            ensure!(!annotations.contains("flannel"), "{annotations}");
            let conditions = object["status"]["conditions"].to_string();
            ensure!(!conditions.contains("NetworkUnavailable"), "{conditions}");
        }
        let left = page.as_admin(
            "kubectl get clusterroles,clusterrolebindings,roles,rolebindings,namespaces,pods -A -o name",
        )?;
        ensure!(!left.contains("weft"), "{left}");
        Ok(())
    });
    done.map_err(|error| anyhow!("{error:#}\n{}", page.kube.explain()))
}

/// Once kube-proxy has put its tables there.
fn facts(page: &Page) -> Result<Vec<String>> {
    let of = |node: &KubeNode| {
        until_ok(&format!("kube-proxy of {}", node.name), PATIENCE, || {
            let facts = node.machine.sh(FACTS)?;
            // It makes the one some time after the other.
            for family in ["ip", "ip6"] {
                ensure!(facts.contains(&format!("table {family} kube-proxy")), "{facts}");
            }
            Ok(facts)
        })
    };
    page.kube.nodes.iter().map(of).collect()
}
