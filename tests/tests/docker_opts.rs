//! `weftctl docker-opts`: Docker's own bridge on the leased subnet, as in flannel's classic set-up: by Debian's dockerd, and
//! once more without it, by a bridge docker0 that is made with the options that were written.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use e2e::bed::Bed;
use e2e::cgroups::Cgroups;
use e2e::cluster::{Backend, Spec, scenario};
use e2e::dist::{CHECKOUT, Dist};
use e2e::etcd::Etcd;
use e2e::image::root_fs;
use e2e::machine::Machine;
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::underlay::{NodeNumber, Underlay};
use e2e::wait::{SECOND, eventually, until_ok};

/// What `weftctl docker-opts` writes with these arguments, beside `-f` and `-d`.
fn written(node: &Node, args: &[&str]) -> Result<String> {
    let file = node.agent.dir().join("docker_opts.env");
    let mut command = Command::new(node.binaries.ctl());
    command.arg("docker-opts").arg("-f").arg(node.agent.subnet_file()).arg("-d").arg(&file).args(args);
    node.netns().run(&mut command)?;
    Ok(fs::read_to_string(&file)?)
}

/// The bridge that dockerd makes of `--bip` and `--mtu`, and a container on it as dockerd wires one.
fn container(node: &Node, name: &str) -> Result<(Netns, String)> {
    let text = written(node, &["-c", "-k", "OPTS"])?;
    let options = text
        .trim_end()
        .strip_prefix("OPTS=\"")
        .and_then(|rest| rest.strip_suffix('"'))
        .context("one line")?;
    let value = |name: &str| {
        let mut words = options.split_whitespace();
        words
            .find_map(|word| word.strip_prefix(name))
            .map(str::to_owned)
            .with_context(|| format!("{name} in {text}"))
    };
    let (bip, mtu) = (value("--bip=")?, value("--mtu=")?);
    ensure!(value("--ip-masq=")? == "false", "weftd masquerades: {text}");
    let (gateway, length) = bip.split_once('/').context("a prefix length")?;
    let address = gateway.strip_suffix(".1").context("the first address")?.to_owned() + ".2";
    let netns = Netns::create(&node.pod_netns_path(name))?;
    for command in [
        "link add docker0 type bridge".to_owned(),
        format!("address add {bip} dev docker0"),
        format!("link set docker0 mtu {mtu} up"),
        format!(
            "link add {name} mtu {mtu} master docker0 type veth peer name eth0 mtu {mtu} netns {}",
            netns.path().display()
        ),
        format!("link set {name} up"),
    ] {
        node.netns().ip(&command)?;
    }
    for command in [
        format!("address add {address}/{length} dev eth0"),
        "link set eth0 up".to_owned(),
        format!("route add default via {gateway}"),
    ] {
        netns.ip(&command)?;
    }
    Ok((netns, address))
}

#[test]
fn docker_bridges_of_two_nodes_exchange_http() -> Result<()> {
    scenario(Spec::etcd(2, Backend::Vxlan).flag("--ip-masq"), |cluster| {
        let (near, far) = (container(&cluster.nodes[0], "near")?, container(&cluster.nodes[1], "far")?);
        let www = cluster.nodes[1].agent.dir().join("www");
        fs::create_dir_all(&www)?;
        // More than one packet of any size.
        let content = "weft ".repeat(100_000);
        fs::write(www.join("file"), &content)?;
        for (server, client) in [(&far, &near), (&near, &far)] {
            let mut httpd = Command::new("busybox");
            httpd.args(["httpd", "-f", "-p", "80", "-h"]).arg(&www).stdin(Stdio::null());
            let mut httpd = server.0.spawn(&mut httpd)?;
            let got = until_ok("the file", SECOND * 60, || {
                client.0.run(Command::new("busybox").args([
                    "timeout",
                    "5",
                    "busybox",
                    "wget",
                    "-q",
                    "-O",
                    "-",
                    &format!("http://{}/file", server.1),
                ]))
            });
            httpd.kill()?;
            httpd.wait()?;
            ensure!(got? == content, "from {}", server.1);
        }
        Ok(())
    })
}

/// The text itself is the unit tests' matter; here it is the agent's own file that is read, and the real routes.
#[test]
fn a_subnet_that_is_routed_elsewhere_and_a_missing_lease_are_errors() -> Result<()> {
    scenario(Spec::embedded(1, Backend::HostGw), |cluster| {
        let node = &cluster.nodes[0];
        let lease = node.lease_key()?.v4;
        let text = written(node, &["-im"])?;
        assert_eq!(
            text,
            format!("DOCKER_OPT_BIP=\"--bip={}/24\"\nDOCKER_OPT_MTU=\"--mtu=1500\"\n", lease.gateway())
        );
        node.netns().ip(&format!("route add {lease} via 192.168.77.1"))?;
        let error = format!("{:#}", written(node, &[]).expect_err("a route by a gateway"));
        let expected =
            format!("Your routing table already contains the subnet: {lease} via 192.168.77.1 dev eth0");
        ensure!(error.contains(&expected), "{error}");
        fs::remove_file(node.agent.subnet_file())?;
        let error = format!("{:#}", written(node, &[]).expect_err("no lease"));
        ensure!(
            error.contains("subnet.env: No such file") && error.contains("once it has a lease"),
            "{error}"
        );
        Ok(())
    })
}

/// Debian's docker.io and what it depends on, as scripts/test has fetched them: on the test machine itself they are not
/// installed, for there dockerd might start.
fn docker_packages() -> Result<Vec<std::path::PathBuf>> {
    let dir = Path::new(CHECKOUT).join("target/docker");
    let entries =
        fs::read_dir(&dir).with_context(|| format!("{}: scripts/test install fetches it", dir.display()))?;
    let files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(files.into_iter().filter(|file| file.extension().is_some_and(|end| end == "deb")).collect())
}

/// A host with weft from the tarball and Docker, its bridge as docker-opts says.
fn docker_host(bed: &Bed, underlay: &Underlay, number: u8, etcd: &Etcd) -> Result<Machine> {
    let net = underlay.attach(bed, NodeNumber(number))?;
    let host = Machine::start(&net.netns, &bed.dir(&format!("docker{number}"))?, &format!("docker{number}"))?;
    let dist = Dist::native()?;
    host.copy(&dist.tarball, "/root/weft.tar.gz")?;
    host.copy(&bed.root().join("image/rootfs.tar"), "/root/rootfs.tar")?;
    for package in docker_packages()? {
        let name = package.file_name().context("a file")?.to_string_lossy().into_owned();
        host.copy(&package, &format!("/root/{name}"))?;
    }
    host.sh("mount -t tmpfs none /tmp; mkdir -p /var/lib/docker; mount -t tmpfs none /var/lib/docker; dpkg -i ./*.deb")?;
    host.sh(&format!("tar xzf weft.tar.gz; {}/install", dist.name()))?;
    host.sh(&format!(
        "echo FLANNELD_ETCD_ENDPOINTS={} >>/etc/weft/weftd.env; systemctl start weftd",
        etcd.endpoint()
    ))?;
    host.sh("weftctl docker-opts -c; systemctl start containerd")?;
    host.sh(
        ". /run/docker_opts.env; setsid dockerd -H unix:///run/docker.sock --containerd /run/containerd/containerd.sock \
         $DOCKER_OPTS >/var/log/dockerd.log 2>&1 </dev/null &",
    )?;
    eventually("dockerd", SECOND * 60, || {
        Ok(host.try_sh("/usr/bin/docker -H unix:///run/docker.sock info")?.0)
    })
    .with_context(|| host.read("/var/log/dockerd.log").unwrap_or_default())?;
    host.sh("/usr/bin/docker -H unix:///run/docker.sock import rootfs.tar weft-e2e/busybox")?;
    Ok(host)
}

#[test]
fn containers_of_debians_docker_exchange_http_between_two_hosts() -> Result<()> {
    const DOCKER: &str = "/usr/bin/docker -H unix:///run/docker.sock";
    // A parent of the test's own: Docker's usual one may be another Docker's too.
    let parent = format!("weft-e2e-docker-{}", std::process::id());
    let _cgroups = Cgroups::of([parent.clone()]);
    let bed = Bed::for_test()?;
    root_fs(&bed.dir("image")?)?;
    let underlay = Underlay::create(&bed)?;
    let etcd = Etcd::start(&underlay.netns, Underlay::GATEWAY, &bed.dir("etcd")?)?;
    etcd.put_config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
    let hosts = [docker_host(&bed, &underlay, 1, &etcd)?, docker_host(&bed, &underlay, 2, &etcd)?];
    let mut addresses = Vec::new();
    for host in &hosts {
        // As Docker leaves it where it comes before weftd: it drops what no rule of its own accepts.
        host.sh("iptables -P FORWARD DROP")?;
        let run = format!(
            "{DOCKER} run --detach --cgroup-parent /{parent} --name www weft-e2e/busybox /bin/sh -c 'echo {} >/tmp/who; exec httpd -f -p 80 -h /tmp'",
            host.name
        );
        host.sh(&run)?;
        let address =
            host.sh(&format!("{DOCKER} inspect --format '{{{{.NetworkSettings.IPAddress}}}}' www"))?;
        let lease = host.sh("sed -n 's/^FLANNEL_SUBNET=\\(.*\\)[.]1.24$/\\1/p' /run/flannel/subnet.env")?;
        ensure!(address.starts_with(lease.trim()), "{address} is not of {lease}");
        addresses.push(address.trim().to_owned());
    }
    for (client, server) in [(0, 1), (1, 0)] {
        let wget =
            format!("{DOCKER} exec www busybox timeout 5 wget -q -O - http://{}/who", addresses[server]);
        let got =
            until_ok("the answer of the other host's container", SECOND * 60, || hosts[client].sh(&wget))?;
        ensure!(got.trim() == hosts[server].name, "{got}");
    }
    for host in &hosts {
        host.sh(&format!("{DOCKER} rm --force www"))?;
    }
    Ok(())
}
