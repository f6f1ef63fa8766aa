//! Token buckets and redirections as the kernel has them, with tc as a foreign hand. Root is needed.

use std::process::Command;

use weft_shared::names::{LINK_GROUP, egress_ifname, host_ifname};
use weft_shared::protocol::{Attachment, Limit};

use super::super::linux::LinuxKernel;
use super::super::linux::tests::{in_namespace, ip, name};
use super::*;
use crate::kernel::Kernel as _;
use crate::object::{Alterations, Link, LinkKind, LinkMac, Op};

fn tc(args: &str) -> String {
    let output = Command::new("tc").args(args.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "tc {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Of those that are wanted, what is not there; made so afterwards.
fn mend(kernel: &mut LinuxKernel, wanted: &[Object]) -> Vec<String> {
    let found = |kernel: &mut LinuxKernel| {
        kernel.dump(None).expect("dump");
        kernel.shaping(&wanted.iter().collect::<Vec<_>>()).expect("look")
    };
    let before = found(kernel);
    let wrong: Vec<&Object> = wanted.iter().filter(|object| !before.contains(object)).collect();
    let ops: Vec<Op> =
        wrong.iter().map(|object| Op::Set { object: (*object).clone(), found: None }).collect();
    for (op, result) in ops.iter().zip(kernel.apply(&ops)) {
        result.unwrap_or_else(|e| panic!("{}: {e}", op.key()));
    }
    assert_eq!(found(kernel), wanted);
    wrong.iter().map(|object| object.key().to_string()).collect()
}

#[test]
fn limits_are_made_and_every_alteration_is_seen_and_mended() {
    in_namespace(|| {
        let mut kernel = LinuxKernel::open().expect("netlink");
        let attachment = Attachment {
            network: "weft".parse().expect("name"),
            container_id: "c1".parse().expect("ID"),
            ifname: name("eth0"),
        };
        let veth = host_ifname(&attachment);
        let ifb = egress_ifname(&veth).expect("name");
        ip(&format!("link add {veth} group {LINK_GROUP} type veth peer name pod0"));
        let link = Link {
            kind: LinkKind::Ifb,
            mac: LinkMac::Any,
            mtu: 1400,
            up: true,
            altered: Alterations::default(),
        };
        let device = Object::Link { name: ifb.clone(), link };
        kernel.dump(None).expect("dump");
        let made = kernel.apply(&[Op::Set { object: device.clone(), found: None }]);
        assert_eq!(made, [Ok(())]);
        let dump = kernel.dump(None).expect("dump");
        assert!(
            device.satisfied_by(&Object::Link { name: ifb.clone(), link: dump.links[&ifb].link.clone() })
        );
        assert_eq!(dump.links[&ifb].group, LINK_GROUP);

        let bucket = |dev: &IfName, rate, burst| Object::Shaper {
            dev: dev.clone(),
            tbf: Tbf::of(Limit { rate, burst }),
        };
        let redirect = Object::Redirect { dev: veth.clone(), to: ifb.clone() };
        // What containerd asks for, and more than 32 bits of bytes a second.
        for (rate, burst) in
            [(125_000, 536_870_911), (1, 1500), (8_000_000_000, 4_000_000_000), (1_000_000, 65_536)]
        {
            let wanted = [bucket(&veth, rate, burst), bucket(&ifb, rate, burst), redirect.clone()];
            assert_ne!(mend(&mut kernel, &wanted), [""; 0]);
        }
        let wanted = [bucket(&veth, 1_000_000, 65_536), bucket(&ifb, 1_000_000, 65_536), redirect];
        assert!(tc(&format!("qdisc show dev {veth}")).contains("rate 8Mbit burst 64Kb lat 25ms"));
        let on_veth = format!("token bucket on {veth}");
        let on_ifb = format!("token bucket on {ifb}");
        let led = format!("redirection of what comes in by {veth}");
        for (hand, wrong) in [
            (format!("qdisc delete dev {veth} root"), &on_veth),
            (format!("qdisc replace dev {veth} root pfifo"), &on_veth),
            (format!("qdisc change dev {veth} root tbf rate 16mbit burst 64k latency 25ms"), &on_veth),
            (format!("qdisc change dev {ifb} root tbf rate 8mbit burst 32k latency 25ms"), &on_ifb),
            (format!("qdisc change dev {ifb} root tbf rate 8mbit burst 64k latency 50ms"), &on_ifb),
            (format!("qdisc change dev {ifb} root tbf rate 8mbit burst 32k limit 90536"), &on_ifb),
            (format!("qdisc delete dev {veth} ingress"), &led),
            (format!("filter delete dev {veth} ingress"), &led),
            (
                format!(
                    "filter add dev {veth} ingress prio 30565 protocol all u32 match ip dst 192.0.2.1/32 action mirred egress redirect dev pod0"
                ),
                &led,
            ),
        ] {
            tc(&hand);
            assert_eq!(mend(&mut kernel, &wanted), [wrong.as_str()], "{hand}");
        }
        // Somebody else's filter of another priority, before ours, is his.
        tc(&format!(
            "filter add dev {veth} ingress prio 7 protocol all u32 match u32 0 0 action mirred egress mirror dev {ifb}"
        ));
        assert_eq!(mend(&mut kernel, &wanted), [""; 0]);
        tc(&format!("filter delete dev {veth} ingress prio 30565"));
        assert_eq!(mend(&mut kernel, &wanted), [led.as_str()]);
        assert!(tc(&format!("filter show dev {veth} ingress")).contains("pref 7"));
        // Nothing stands on what is gone.
        ip(&format!("link delete {veth}"));
        kernel.dump(None).expect("dump");
        let left = kernel.shaping(&wanted.iter().collect::<Vec<_>>()).expect("look");
        assert_eq!(left, [wanted[1].clone()]);
    });
}
