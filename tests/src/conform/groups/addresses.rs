//! An address that is given again: never while an interface may still carry it, and reachable at once by everybody who
//! knew its former owner. An announcement that is sent before the bridge's port forwards is lost, and the neighbours go
//! on sending to the old MAC (containernetworking/plugins issues 756 and 858).

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::conform::case::{Case, Checked, Group, expect, red};
use crate::conform::container::Container;
use crate::conform::stand::Stand;
use crate::kernel::query;
use crate::netns::Netns;
use crate::traffic::echo::ping;
use crate::wait::eventually;

pub(super) const GROUP: Group = Group {
    name: "addresses",
    title: "Addresses that are given again",
    cases: &[
        Case::run(
            "next-is-another",
            "an address that was just freed is not the next one given",
            next_is_another,
        ),
        Case::run("node-knows", "the node reaches an address that was given again at once", |stand| {
            known_at_once(stand, false)
        }),
        Case::run("neighbours-know", "so do containers that knew its former owner", |stand| {
            known_at_once(stand, true)
        }),
        Case::run(
            "carried-empty-netns",
            "after a DEL with an empty CNI_NETNS the address is not on two interfaces",
            |stand| {
                never_twice(stand, |container| {
                    container.netns_var = Some(PathBuf::new());
                    Ok(())
                })
            },
        ),
        Case::run(
            "carried-vanished-netns",
            "nor after one with a path that is gone, while the namespace lives",
            |stand| {
                never_twice(stand, |container| {
                    container.netns_var = Some(PathBuf::from("/nowhere/at/all"));
                    Ok(())
                })
            },
        ),
        Case::run("carried-renamed", "nor when the container has renamed its end", |stand| {
            never_twice(stand, |container| {
                container.netns.ip("link set eth0 down")?;
                container.netns.ip("link set eth0 name net9")?;
                container.netns.ip("link set net9 up").map(drop)
            })
        }),
        Case::run("carried-renamed-host", "nor when the end on the node was renamed", |stand| {
            never_twice(stand, |container| {
                let name = container.host_end()?["ifname"].as_str().context("a name")?.to_owned();
                stand.unattended(|| {
                    stand.netns().ip(&format!("link set {name} down"))?;
                    stand.netns().ip(&format!("link set {name} name other9"))?;
                    stand.netns().ip("link set other9 up").map(drop)
                })
            })
        }),
    ],
};

/// The announcement is lost or not by a race: so often until a loss is as good as certain where there is one.
const ROUNDS: u8 = 10;
/// For an announcement to arrive.
const HEARD: Duration = Duration::from_secs(10);

fn next_is_another(stand: &Stand) -> Checked {
    let mut former = None;
    for _ in 0..4 {
        let container = stand.container()?;
        container.add()?;
        let addresses = container.addresses()?;
        container.del(None)?;
        expect(former.as_ref() != Some(&addresses), "it is given again at once", format!("{addresses:?}"))?;
        former = Some(addresses);
    }
    Ok(())
}

/// The MAC that somebody has for an address; `None` when he would ask for it.
fn neighbour(netns: &Netns, address: Ipv4Addr) -> Result<Option<String>> {
    let rows = query(netns, &format!("ip -json neighbor show to {address}"))?;
    Ok(rows.first().and_then(|row| row["lladdr"].as_str()).map(str::to_owned))
}

fn known_at_once<'s>(stand: &'s Stand, by_neighbour: bool) -> Checked {
    let reused = stand.address(99)?;
    let address: Ipv4Addr = reused.parse().context("an address")?;
    let owner = |stand: &'s Stand| -> Checked<Container<'s>> {
        let container = stand.container()?.with_args(&format!("IgnoreUnknown=1;IP={reused}"));
        container.add()?;
        Ok(container)
    };
    // It also keeps the bridge up: without a port the node forgets every neighbour.
    let witness = stand.container()?;
    witness.add()?;
    let asking = if by_neighbour { witness.netns.clone() } else { stand.netns().clone() };
    for _ in 0..ROUNDS {
        let old = owner(stand)?;
        ping(&asking, address, 10, crate::wait::SECOND)
            .map_err(|e| red("the former owner does not answer", format!("{e:#}")))?;
        let former = neighbour(&asking, address)?.context("a neighbour that was just spoken to")?;
        old.del(None)?;
        let new = owner(stand)?;
        let mac = new.interface()?.context("an interface")?["address"].as_str().map(str::to_owned);
        let heard = eventually("the new owner's MAC to be known", HEARD, || {
            let known = neighbour(&asking, address)?;
            if known.is_none() || known == mac { Ok(true) } else { bail!("it is {known:?}") }
        });
        heard.map_err(|e| {
            red("packets for the address go to its former owner's MAC", format!("{former}: {e:#}"))
        })?;
        ping(&asking, address, 10, crate::wait::SECOND)
            .map_err(|e| red("the new owner does not answer", format!("{e:#}")))?;
        new.del(None)?;
    }
    witness.del(None)
}

/// DEL after `before`, then the address once more: whoever had it must not have it any longer.
fn never_twice(stand: &Stand, before: impl Fn(&mut Container<'_>) -> Result<()>) -> Checked {
    let reused = stand.address(98)?;
    let asking = || stand.container().map(|new| new.with_capability("ips", json!([reused])));
    let mut old = asking()?;
    old.add()?;
    before(&mut old)?;
    old.del(None)?;
    let next = asking()?;
    // Refused is as good.
    if next.call("ADD", None)?.exit == Some(0) {
        let rows = query(&old.netns, "ip -json -4 address show")?;
        let carried = rows.iter().any(|row| row["addr_info"].to_string().contains(&reused));
        expect(!carried, "two interfaces carry the address", format!("{rows:?}"))?;
    }
    next.del(None)
}
