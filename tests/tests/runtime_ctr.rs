//! `ctr run --cni`: containerd's own client, which knows the fewest of the specification's duties. It names namespaces by
//! /proc, says DEL when the namespace is gone, with an empty CNI_NETNS, and for a container in the background never.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::containerd;
use e2e::fleet::{Host, fleet};
use e2e::image::BUSYBOX;
use e2e::random::Random;
use e2e::wait::{SECOND, until_ok};
use sha2::{Digest as _, Sha256};

const SIZE: usize = 8 << 20;

/// A file of random bytes on a host, and its hash.
fn put_file(host: &Host, path: &str) -> Result<String> {
    let mut bytes = vec![0; SIZE];
    Random::of_the_moment().fill(&mut bytes);
    host.machine.put(path, &bytes)?;
    Ok(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The address of the only pod that a host's agent has on record.
fn only_address(host: &Host) -> Result<String> {
    let pods = host.pods()?;
    ensure!(pods.len() == 1, "{pods:?}");
    Ok(pods[0]["addresses"][0].as_str().context("an address")?.to_owned())
}

#[test]
fn a_container_fetches_a_file_from_another_hosts_and_nothing_is_left_of_either() -> Result<()> {
    fleet(2, |fleet| {
        let [client, server] = [&fleet.hosts[0], &fleet.hosts[1]];
        for host in &fleet.hosts {
            host.record_calls()?;
            containerd::start(&host.machine)?;
            for name in ["www", "get"] {
                host.cgroups.add(format!("default/{name}"));
            }
        }
        let hash = put_file(server, "/srv/www/file")?;
        server.machine.sh(&format!(
            "ctr run --detach --cni --mount type=bind,src=/srv/www,dst=/www,options=rbind:ro {BUSYBOX} www httpd -f -p 80 -h /www"
        ))?;
        let url = format!("http://{}/file", only_address(server)?);
        let get = format!("ctr run --rm --cni {BUSYBOX} get sh -c 'wget -q -O - {url} | sha256sum'");
        let got = until_ok("the file", SECOND * 30, || {
            // A run that failed leaves its container.
            let _ = client
                .machine
                .try_sh("ctr task kill -s KILL get; ctr task delete -f get; ctr container delete get");
            client.machine.sh(&get)
        })?;
        ensure!(got.trim_end().trim_end_matches(['-', ' ']) == hash, "{got}, expected {hash}");

        // By its DEL, with nothing but the attachment's name.
        client.wait_without_pods()?;
        let calls = client.calls()?;
        let [.., add, del] = &calls[..] else { anyhow::bail!("{calls:?}") };
        ensure!((add.verb.as_str(), add.container_id.as_str()) == ("ADD", "default-get"), "{calls:?}");
        ensure!(add.netns.starts_with("/proc/") && add.netns.ends_with("/ns/net"), "{calls:?}");
        ensure!(
            (del.verb.as_str(), del.container_id.as_str(), del.netns.as_str()) == ("DEL", "default-get", ""),
            "{calls:?}"
        );

        // Without any: the namespace went, and its half of the pair with it.
        server.machine.sh("ctr task kill -s KILL www")?;
        until_ok("the task to end", SECOND * 20, || server.machine.sh("ctr task delete www"))?;
        server.machine.sh("ctr container delete www")?;
        server.wait_without_pods()?;
        let calls = server.calls()?;
        ensure!(calls.iter().map(|call| call.verb.as_str()).eq(["ADD"]), "{calls:?}");
        for host in &fleet.hosts {
            let links = host.machine.netns.run(Command::new("ip").args(["-o", "link"]))?;
            ensure!(!links.contains("veth"), "{links}");
        }
        Ok(())
    })
}
