//! DEL answers before the kernel has freed the pod's veth. What a runtime may rely on from its answer on: nothing can be
//! found of the pod, nothing leaves it, its address may be another's, and nothing depends on the agent any more.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::books::{invariant, live_veths};
use e2e::cluster::{Backend, READY, Spec, scenario};
use e2e::kernel::query;
use e2e::node::Node;
use e2e::pod::Pod;
use e2e::wait::{SECOND, eventually};
use nix::libc::{EHOSTUNREACH, ENETDOWN, ENOBUFS};

/// As many have traffic on their way when they are deleted.
const ROUNDS: u32 = 10;
const PORT: u16 = 7777;

fn socket(pod: &Pod, port: u16) -> Result<UdpSocket> {
    let socket = pod.netns.enter(|| Ok(UdpSocket::bind(("0.0.0.0", port))?))?;
    socket.set_read_timeout(Some(SECOND))?;
    Ok(socket)
}

/// Sends until the network is gone; any other end is an error.
fn talk(socket: &UdpSocket, to: SocketAddr) -> Result<()> {
    loop {
        match socket.send_to(b"talk", to) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NetworkUnreachable => return Ok(()),
            // The way there: the queue is full, the device goes down.
            Err(error) if matches!(error.raw_os_error(), Some(ENOBUFS | ENETDOWN | EHOSTUNREACH)) => {}
            Err(error) => return Err(error).context("send"),
        }
    }
}

/// The deleted pod has nothing left to send by, and the node nothing of it.
fn is_cut_off(node: &Node, pod: &Pod, socket: &UdpSocket, to: SocketAddr) -> Result<()> {
    match socket.send_to(b"late", to) {
        Err(error) if error.kind() == ErrorKind::NetworkUnreachable => {}
        other => bail!("a packet after DEL: {other:?}, expected that the network is unreachable"),
    }
    let left = query(&pod.netns, "ip -json link show")?;
    ensure!(left.len() == 1, "left in the pod: {left:?}");
    let veth = pod.host_veth()?;
    ensure!(!live_veths(node)?.contains(veth.as_str()), "{veth} is left on the node");
    Ok(())
}

/// A neighbour reaches the new owner of an address.
fn is_reached(from: &UdpSocket, pod: &Pod) -> Result<()> {
    let owner = socket(pod, PORT)?;
    eventually("the address to lead to its new owner", READY, || {
        from.send_to(b"hello", (pod.address, PORT))?;
        let mut buffer = [0; 8];
        Ok(owner.recv_from(&mut buffer).is_ok_and(|(length, _)| &buffer[..length] == b"hello"))
    })?;
    Ok(())
}

#[test]
fn a_pod_is_cut_off_and_its_address_free_when_del_has_answered() -> Result<()> {
    scenario(Spec::embedded(1, Backend::Vxlan), |cluster| {
        let node = &cluster.nodes[0];
        let stays = node.pod("stays")?;
        let (neighbour, to) = (socket(&stays, PORT)?, SocketAddr::from((stays.address, PORT)));
        for round in 0..ROUNDS {
            let pod = node.pod(&format!("talks-{round}"))?;
            let talking = socket(&pod, 0)?;
            thread::scope(|scope| {
                let talk = scope.spawn(|| talk(&talking, to));
                let cut_off = (|| {
                    let sender = SocketAddr::from((pod.address, talking.local_addr()?.port()));
                    eventually("the pod to be heard", READY, || {
                        Ok(neighbour.recv_from(&mut [0; 8]).is_ok_and(|(_, from)| from == sender))
                    })?;
                    pod.unwire()?;
                    is_cut_off(node, &pod, &talking, to)
                })();
                // The talker ends with the network: were it to go on for ever, nobody would learn why.
                if cut_off.is_err() {
                    let _ = pod.netns.ip("link delete eth0");
                }
                let talked = talk.join().expect("no panic");
                cut_off.and(talked)
            })
            .with_context(|| format!("round {round}"))?;
            let next = Pod::create_at(node, &format!("next-{round}"), &pod.address.to_string())?;
            ensure!(next.address == pod.address, "{} instead of {}", next.address, pod.address);
            is_reached(&neighbour, &next).with_context(|| format!("round {round}"))?;
            next.unwire()?;
        }
        invariant(node, std::slice::from_ref(&stays))
    })
}

/// It has told the kernel everything: no successor need finish what it began.
#[test]
fn an_agent_killed_right_after_del_leaves_nothing() -> Result<()> {
    scenario(Spec::embedded(1, Backend::Vxlan), |cluster| {
        let node = &mut cluster.nodes[0];
        let stays = node.pod("stays")?;
        for round in 0..3 {
            let pod = node.pod(&format!("gone-{round}"))?;
            let socket = socket(&pod, 0)?;
            pod.unwire()?;
            node.agent.kill()?;
            is_cut_off(node, &pod, &socket, SocketAddr::from((stays.address, PORT)))?;
            node.agent.start()?;
            node.agent.wait_ready(READY)?;
            invariant(node, std::slice::from_ref(&stays))?;
        }
        Ok(())
    })
}
