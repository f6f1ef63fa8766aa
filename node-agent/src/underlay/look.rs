//! What the kernel knows of interfaces and routes, handed to the choice. Blocking calls, on the runtime's blocking pool.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tokio::task::spawn_blocking;
use weft_shared::IfName;
use weft_shared::names::{LINK_GROUP, UDP_DEVICE};

use super::follow::follow_underlay;
use super::{HostAddr, HostIface, HostNetwork, ReachRoute, Underlay, UnderlayChoice, choose_underlay};
use crate::kernel::{FoundAddr, FoundLink, KernelError, LinuxKernel};
use crate::object::LinkKind;

/// The underlay by the settings; `current` is kept while it is there.
pub async fn find_underlay(choice: UnderlayChoice, current: Option<Underlay>) -> anyhow::Result<Underlay> {
    spawn_blocking(move || {
        let host = host_network(&mut LinuxKernel::open()?, choice.can_reach.map(IpAddr::from))?;
        Ok(match current {
            Some(current) => follow_underlay(&choice, &host, &current)?,
            None => choose_underlay(&choice, &host)?,
        })
    })
    .await?
}

fn host_network(kernel: &mut LinuxKernel, reach: Option<IpAddr>) -> Result<HostNetwork, KernelError> {
    let (links, addrs) = kernel.links_and_addrs()?;
    let host_addr = |found: &FoundAddr| HostAddr {
        addr: found.addr,
        scope: found.scope,
        deprecated: found.deprecated,
        dynamic: found.form.expires,
        temporary: found.temporary,
    };
    let ifaces = links.iter().map(|(name, found)| HostIface {
        index: found.index,
        name: name.clone(),
        mtu: found.link.mtu,
        up: found.link.up,
        of_weft: is_of_weft(name, found, &links),
        addrs: addrs.iter().filter(|a| a.dev == *name).map(host_addr).collect(),
    });
    let reach = match reach {
        Some(ip) => kernel.route_to(ip)?.map(|(index, source)| ReachRoute {
            index,
            source: source.and_then(|ip| match ip {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            }),
        }),
        None => None,
    };
    Ok(HostNetwork { ifaces: ifaces.collect(), default_route: kernel.default_route()?, reach })
}

/// What weft made, its tunnel's end if it was adopted, and whatever bridge its pods hang on.
fn is_of_weft(name: &IfName, found: &FoundLink, links: &BTreeMap<IfName, FoundLink>) -> bool {
    let has_pods =
        || links.iter().any(|(port, link)| link.port.bridge.as_ref() == Some(name) && link.is_our_veth(port));
    found.group == LINK_GROUP
        || matches!(found.link.kind, LinkKind::Vxlan(_)) && name.as_str().starts_with("flannel.")
        || matches!(found.link.kind, LinkKind::Tun(_)) && name.as_str() == UDP_DEVICE
        || has_pods()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::object::{Alterations, BridgePort, Link, LinkMac, Tun, Vxlan, VxlanTuning};

    #[test]
    fn wefts_own_and_the_bridges_of_its_pods() {
        let vxlan = || {
            LinkKind::Vxlan(Vxlan {
                vni: 1,
                underlay: 2,
                local: [192, 0, 2, 1].into(),
                port: 8472,
                gbp: false,
                foreign_options: BTreeSet::new(),
                tuning: VxlanTuning::with_learning(false),
            })
        };
        let tun = || LinkKind::Tun(Tun { persistent: false, marked: false, ..Tun::for_queues() });
        let veth = || LinkKind::Other("veth".into());
        let links: BTreeMap<IfName, FoundLink> = [
            ("cni0", LinkKind::Bridge, LINK_GROUP, None),
            ("br-adopted", LinkKind::Bridge, 0, None),
            ("br-lan", LinkKind::Bridge, 0, None),
            ("eth0", veth(), 0, Some("br-lan")),
            ("flannel.1", vxlan(), 0, None),
            ("flannel0", tun(), 0, None),
            ("tun7", tun(), 0, None),
            ("tunnel7", vxlan(), 0, None),
            ("vethab2cd3ef4gh", veth(), LINK_GROUP, Some("br-adopted")),
            ("vethij5kl6mn7op", veth(), 0, Some("br-lan")),
        ]
        .into_iter()
        .map(|(name, kind, group, bridge)| {
            let mac = LinkMac::Exactly("02:00:00:00:00:01".parse().expect("MAC"));
            let link = Link { kind, mac, mtu: 1500, up: true, altered: Alterations::default() };
            let port = BridgePort {
                bridge: bridge.map(|name| name.parse().expect(name)),
                hairpin: false,
                isolated: false,
                mtu: 1500,
                up: true,
                marked: group == LINK_GROUP,
                altered: false,
            };
            (name.parse().expect(name), FoundLink { index: 9, link, group, port })
        })
        .collect();
        let own = links.iter().filter(|(name, found)| is_of_weft(name, found, &links));
        let own: Vec<&str> = own.map(|(name, _)| name.as_str()).collect();
        assert_eq!(own, ["br-adopted", "cni0", "flannel.1", "flannel0", "vethab2cd3ef4gh"]);
    }
}
