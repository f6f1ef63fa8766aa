//! Debian's containerd through CRI, as a kubelet drives it: pods come, talk across hosts, publish ports and go, on the
//! config.toml of the package.

mod cri;

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Result, ensure};
use e2e::fleet::{Host, fleet, fleet_prepared};
use e2e::wait::{SECOND, eventually, until_ok};

use cri::{Cri, PodSpec, Sandbox};

const LIST: &str = "/etc/cni/net.d/10-weft.conflist";

/// Another list, whole at once. containerd has it when this returns: a pod of an older one can be deleted by no newer.
fn put_list(host: &Host, cri: &Cri, text: &str) -> Result<()> {
    host.machine.sh(&format!("rm {LIST}"))?;
    eventually("containerd to miss the list", SECOND * 30, || Ok(!cri.network_ready()?.0))?;
    host.machine.put(&format!("{LIST}.new"), text.as_bytes())?;
    host.machine.sh(&format!("mv {LIST}.new {LIST}"))?;
    cri.wait_network_ready()
}

/// A pod that says its name by HTTP.
fn server(cri: &Cri, spec: &PodSpec) -> Result<(Sandbox, String, Ipv4Addr)> {
    let pod = cri.run_pod(spec)?;
    let serve = format!("echo {} >/tmp/who; exec httpd -f -p 80 -h /tmp", spec.name);
    let container = cri.start_container(&pod, &["sh", "-c", &serve])?;
    let address = cri.address(&pod)?;
    Ok((pod, container, address))
}

/// One host whose plugin folder holds nothing but weft and its links: no stock plugin is needed.
#[test]
fn a_pod_comes_and_goes_with_nothing_but_weft_in_the_plugin_folder() -> Result<()> {
    fleet_prepared(1, |fleet| {
        let host = &fleet.hosts[0];
        host.machine.sh("mount -t tmpfs none /usr/lib/cni")?;
        fleet.install_weft()?;
        let plugins =
            host.machine.sh("cd /usr/lib/cni; find . -type f; find . -type l -printf '%p -> %l\\n'")?;
        ensure!(plugins == "./weft\n./loopback -> weft\n", "{plugins}");
        let cri = Cri::start(host)?;
        cri.wait_network_ready()?;

        let (pod, container, address) = server(&cri, &PodSpec::named("only"))?;
        let pods = host.pods()?;
        ensure!(pods.len() == 1 && pods[0]["addresses"][0] == address.to_string(), "{pods:?}");
        let inside = cri.exec(&container, &["ip", "address"])?;
        ensure!(inside.contains(&format!("inet {address}/24")), "{inside}");
        for local in ["127.0.0.1/8", "::1/128"] {
            ensure!(inside.contains(local), "{inside}");
        }
        // By its own loopback: whose ADD is a plugin of its own to containerd.
        let got = until_ok("the pod's own answer", SECOND * 20, || {
            cri.exec(&container, &["wget", "-q", "-O", "-", "http://127.0.0.1/who"])
        })?;
        ensure!(got == "only\n", "{got}");

        cri.stop_pod(&pod)?;
        host.wait_without_pods()?;
        cri.remove_pod(&pod)?;
        Ok(())
    })
}

#[test]
fn pods_of_two_hosts_reach_each_other_and_a_hosts_port_leads_to_its_pod() -> Result<()> {
    fleet(2, |fleet| {
        let cris = [Cri::start(&fleet.hosts[0])?, Cri::start(&fleet.hosts[1])?];
        let mut pods = Vec::new();
        for (cri, name) in cris.iter().zip(["first", "second"]) {
            cri.wait_network_ready()?;
            pods.push(server(cri, &PodSpec::named(name).host_port(8080, 80))?);
        }
        for (client, far) in [(0, 1), (1, 0)] {
            let (_, container, _) = &pods[client];
            let name = ["first\n", "second\n"][far];
            for url in [
                format!("http://{}/who", pods[far].2),
                format!("http://{}:8080/who", fleet.hosts[far].address),
            ] {
                let got = until_ok(&format!("{url} from a pod of the other host"), SECOND * 20, || {
                    cris[client].exec(container, &["busybox", "timeout", "5", "wget", "-q", "-O", "-", &url])
                })?;
                ensure!(got == name, "{url}: {got}");
                let got = until_ok(&format!("{url} from the other host"), SECOND * 20, || {
                    fleet.hosts[client].machine.sh(&format!("busybox timeout 5 busybox wget -q -O - {url}"))
                })?;
                ensure!(got == name, "{url}: {got}");
            }
            cris[client].exec(container, &["ping", "-c", "1", "-W", "5", &pods[far].2.to_string()])?;
        }
        for ((cri, (pod, ..)), host) in cris.iter().zip(&pods).zip(&fleet.hosts) {
            cri.stop_pod(pod)?;
            host.wait_without_pods()?;
            let rules = host.machine.netns.run(Command::new("nft").args(["list", "ruleset"]))?;
            ensure!(!rules.contains("dport 8080"), "{rules}");
            cri.remove_pod(pod)?;
        }
        Ok(())
    })
}

/// What a kubelet does: stop until it succeeds, once more to be sure, then remove.
#[test]
fn containerd_says_del_three_times_and_twice_without_a_namespace() -> Result<()> {
    fleet(1, |fleet| {
        let host = &fleet.hosts[0];
        host.record_calls()?;
        let cri = Cri::start(host)?;
        cri.wait_network_ready()?;
        let pod = cri.run_pod(&PodSpec::named("thrice"))?;
        let other = cri.run_pod(&PodSpec::named("other"))?;
        cri.stop_pod(&pod)?;
        cri.stop_pod(&pod)?;
        cri.remove_pod(&pod)?;
        let calls = host.calls()?;
        let of_pod: Vec<_> = calls.iter().filter(|call| call.container_id == pod.id).collect();
        let verbs: Vec<_> = of_pod.iter().map(|call| (call.verb.as_str(), call.netns.is_empty())).collect();
        ensure!(verbs == [("ADD", false), ("DEL", false), ("DEL", true), ("DEL", true)], "{of_pod:?}");
        ensure!(of_pod[0].args.contains("K8S_POD_NAME=thrice"), "{of_pod:?}");
        let pods = host.pods()?;
        ensure!(pods.len() == 1 && pods[0]["addresses"][0] == cri.address(&other)?.to_string(), "{pods:?}");
        cri.stop_pod(&other)?;
        host.wait_without_pods()
    })
}

/// The agent hangs, the runtime kills the plugin in the middle of its ADD, and says DEL; the agent goes on later.
#[test]
fn an_add_that_containerd_kills_leaves_nothing() -> Result<()> {
    fleet(1, |fleet| {
        let host = &fleet.hosts[0];
        host.record_calls()?;
        let cri = Cri::start(host)?;
        cri.wait_network_ready()?;
        host.machine.sh("kill -STOP $(cat /run/systemctl/weftd)")?;
        let verbs =
            || -> Result<Vec<String>> { Ok(host.calls()?.into_iter().map(|call| call.verb).collect()) };
        cri.run_pod_until(&PodSpec::named("hasty"), || Ok(verbs().unwrap_or_default() == ["ADD"]))?;
        eventually("the DEL", SECOND * 60, || Ok(verbs()? == ["ADD", "DEL"]))?;
        eventually("containerd to tell why", SECOND * 60, || {
            Ok(host.machine.read("/var/log/containerd.log")?.contains("signal: killed"))
        })?;
        // Killed by now: no plugin of that ADD is left to wire.
        eventually("no plugin to run", SECOND * 30, || {
            Ok(host
                .machine
                .sh("cat /proc/[0-9]*/comm 2>/dev/null || true")?
                .lines()
                .all(|name| name != "weft"))
        })?;
        host.machine.sh("kill -CONT $(cat /run/systemctl/weftd)")?;
        host.wait_without_pods()?;
        let pod = cri.run_pod(&PodSpec::named("hasty-again"))?;
        ensure!(host.pods()?.len() == 1);
        cri.stop_pod(&pod)?;
        host.wait_without_pods()
    })
}

/// containerd that is there first and never restarted loads weft's list, because install renames it within the folder;
/// one that is moved in from elsewhere it does not notice, and removal is noticed at once.
#[test]
fn a_running_containerd_loads_the_installed_list() -> Result<()> {
    fleet_prepared(1, |fleet| {
        let host = &fleet.hosts[0];
        host.machine.sh("mkdir -p /etc/cni/net.d")?;
        let cri = Cri::start(host)?;
        let (ready, why) = cri.network_ready()?;
        ensure!(!ready && why.contains("cni plugin not initialized"), "{why}");
        fleet.install_weft()?;
        cri.wait_network_ready()?;
        let pod = cri.run_pod(&PodSpec::named("loaded"))?;

        // Without a list there is no way to delete a pod either: weftd never takes it away.
        host.machine.sh("systemctl stop weftd")?;
        ensure!(host.machine.exists(LIST) && cri.network_ready()?.0);
        host.machine.sh(&format!("mv {LIST} /root/list"))?;
        eventually("containerd to notice", SECOND * 20, || Ok(!cri.network_ready()?.0))?;
        let error = format!("{:#}", cri.stop_pod(&pod).expect_err("no list"));
        ensure!(error.contains("cni plugin not initialized"), "{error}");
        // As install does it, from a copy.
        host.machine.sh(&format!(
            "cp /root/list {LIST}.weft-new; mv {LIST}.weft-new {LIST}; systemctl start weftd"
        ))?;
        cri.wait_network_ready()?;
        cri.stop_pod(&pod)?;
        host.wait_without_pods()
    })
}

/// containerd 1.6 knows no result of 1.1.0. Ours says 1.0.0; whoever says 1.1.0 gets an error that names it, and the pod
/// that was wired for nothing is taken back.
#[test]
fn a_list_newer_than_the_runtime_fails_in_words_and_the_installed_one_works() -> Result<()> {
    fleet(1, |fleet| {
        let host = &fleet.hosts[0];
        let cri = Cri::start(host)?;
        cri.wait_network_ready()?;
        let installed = host.machine.read(LIST)?;
        let newer = installed.replace("\"1.0.0\"", "\"1.1.0\"");
        ensure!(newer != installed, "{installed}");
        put_list(host, &cri, &newer)?;
        let error = format!("{:#}", cri.run_pod(&PodSpec::named("early")).expect_err("a newer result"));
        ensure!(error.contains("unsupported CNI result version \"1.1.0\""), "{error}");
        host.wait_without_pods()?;
        put_list(host, &cri, &installed)?;
        let pod = cri.run_pod(&PodSpec::named("old"))?;
        cri.stop_pod(&pod)?;
        host.wait_without_pods()
    })
}
