//! Debian's podman with its CNI backend: published ports, a fixed address and a fixed MAC, and what weft says to a
//! podman that is not root's.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::fleet::fleet;
use e2e::podman::IMAGE;
use e2e::wait::{SECOND, until_ok};
use serde_json::Value;

const AS_SOMEBODY: &str = "cd /home/somebody && setpriv --reuid somebody --regid somebody --clear-groups env HOME=/home/somebody \
     XDG_RUNTIME_DIR=/run/user/somebody podman --storage-driver vfs";

#[test]
fn podman_gives_a_port_an_address_and_a_mac() -> Result<()> {
    const MAC: &str = "02:00:00:00:77:01";
    fleet(1, |fleet| {
        let host = &fleet.hosts[0];
        host.podman()?;
        host.record_calls()?;
        let subnet =
            host.machine.sh("sed -n 's/^FLANNEL_SUBNET=\\(.*\\)[.]1.24$/\\1/p' /run/flannel/subnet.env")?;
        let address = format!("{}.77", subnet.trim());
        host.machine.sh(&format!(
            "podman run --detach --name web --network weft --publish 8081:80 --ip {address} --mac-address {MAC} {IMAGE} \
             sh -c 'echo here >/tmp/who; exec httpd -f -p 80 -h /tmp'"
        ))?;
        let inside = host.machine.sh("podman exec web ip address show eth0")?;
        ensure!(inside.contains(&format!("inet {address}/24")) && inside.contains(MAC), "{inside}");
        let inspected: Value = serde_json::from_str(&host.machine.sh("podman inspect web")?)?;
        let network = &inspected[0]["NetworkSettings"]["Networks"]["weft"];
        ensure!(network["IPAddress"] == address && network["MacAddress"] == MAC, "{network}");
        let pods = host.pods()?;
        ensure!(pods.len() == 1 && pods[0]["addresses"][0] == address, "{pods:?}");

        let url = format!("http://{}:8081/who", host.address);
        let got = until_ok("the published port from another host", SECOND * 20, || {
            let fetch = ["timeout", "5", "busybox", "wget", "-q", "-O", "-", &url];
            fleet.underlay.netns.run(Command::new("busybox").args(fetch))
        })?;
        ensure!(got == "here\n", "{got}");

        // A second one may have neither address nor port.
        let refused = host
            .machine
            .refused(&format!("podman run --rm --name other --network weft --ip {address} {IMAGE} true"))?;
        ensure!(refused.contains(&format!("requested address {address} is already in use")), "{refused}");
        let refused = host.machine.refused(&format!(
            "podman run --rm --name other --network weft --publish 8081:80 {IMAGE} true"
        ))?;
        ensure!(refused.contains("8081"), "{refused}");

        let calls = host.calls()?;
        let add = calls.iter().find(|call| call.verb == "ADD").context("an ADD")?;
        // Not by capabilities, although the list declares them.
        ensure!(
            add.args.contains(&format!("IP={address}")) && add.args.contains(&format!("MAC={MAC}")),
            "{add:?}"
        );
        ensure!(add.netns.starts_with("/run/netns/"), "{add:?}");
        host.machine.sh("podman rm --force --time 0 web")?;
        host.wait_without_pods()
    })
}

/// A user's podman calls weft as the root of a user namespace. The refusal is a sentence, and nothing is left of it.
#[test]
fn a_users_podman_is_refused_in_a_sentence() -> Result<()> {
    fleet(1, |fleet| {
        let host = &fleet.hosts[0];
        host.podman()?;
        // A device that users may open, as udev makes it; the machine's own, beside the host's.
        host.machine.sh("mount -t tmpfs none /dev/net; mknod -m 666 /dev/net/tun c 10 200")?;
        host.machine.sh(&format!(
            "useradd --create-home somebody; : >/etc/subuid; : >/etc/subgid; cp rootfs.tar /home/somebody; mkdir -p /home/somebody/.config/cni/net.d; \
             cp /etc/cni/net.d/10-weft.conflist /home/somebody/.config/cni/net.d; chown -R somebody /home/somebody; \
             mkdir -p /run/user/somebody; chown somebody /run/user/somebody; \
             {} import /home/somebody/rootfs.tar {IMAGE}", AS_SOMEBODY
        ))?;
        let text = host.machine.refused(&format!("{AS_SOMEBODY} run --rm --network weft {IMAGE} true"))?;
        ensure!(
            text.contains("weft serves runtimes of the host's root: this one runs rootless, expected one that root has started"),
            "{text}"
        );
        ensure!(host.pods()?.is_empty());
        Ok(())
    })
}
