//! What the kernel knows of interfaces and routes, handed to the choice. Blocking calls, on the runtime's blocking pool.

use std::net::IpAddr;

use tokio::task::spawn_blocking;

use super::follow::follow_underlay;
use super::{HostAddr, HostIface, HostNetwork, ReachRoute, Underlay, UnderlayChoice, choose_underlay};
use crate::kernel::{FoundAddr, KernelError, LinuxKernel};

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
