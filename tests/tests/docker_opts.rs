//! `weftctl docker-opts`: Docker's own bridge on the leased subnet, as in flannel's classic set-up. Here a bridge docker0
//! is made with the options that were written; containers behind it on two nodes exchange HTTP.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Backend, Spec, scenario};
use e2e::netns::Netns;
use e2e::node::Node;
use e2e::wait::{SECOND, until_ok};

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
            let got = until_ok("the file", SECOND * 10, || {
                client.0.run(Command::new("busybox").args([
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
