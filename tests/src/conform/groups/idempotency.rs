//! ADD once, DEL any number of times, at any moment, with whatever is left of the container (SPEC.md section 2; what
//! runtimes do: containerd sends DEL three times for a pod, the later ones without a namespace).

use std::path::PathBuf;

use serde_json::json;

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{Container, refused};
use crate::conform::stand::{Pool, Stand};

pub(super) const GROUP: Group = Group {
    name: "idempotency",
    title: "ADD once, DEL at any time",
    cases: &[
        Case::run("second-add", "a second ADD fails, the first keeps interface and address", second_add),
        Case::run(
            "interface-exists",
            "ADD fails when the container has an interface of that name, and leaves it alone",
            interface_exists,
        ),
        Case::run("failed-add", "an ADD that fails for want of an address leaves nothing", failed_add)
            .in_small_pool(),
        Case::run("failed-add-keeps-addresses", "ADDs that fail use up no address", failed_adds_use_nothing)
            .in_small_pool(),
        Case::run("add-after-del", "ADD works again after DEL, with the same container ID", add_after_del),
        Case::run(
            "two-interfaces",
            "two interfaces of one container come and go independently",
            two_interfaces,
        ),
        Case::run(
            "del-twice",
            "DEL succeeds again and again, with and without the previous result",
            del_twice,
        ),
        Case::run("del-first", "DEL succeeds for a container that was never added", del_first),
        Case::run("del-empty-netns", "DEL with an empty CNI_NETNS removes everything", |stand| {
            del_without(stand, Some(PathBuf::new()))
        }),
        Case::run("del-unset-netns", "DEL without CNI_NETNS removes everything", |stand| {
            del_without(stand, None)
        }),
        Case::run(
            "del-vanished-netns",
            "DEL with a CNI_NETNS that is gone succeeds and frees the address",
            del_vanished,
        )
        .in_small_pool(),
        Case::run("del-no-netns", "DEL with a CNI_NETNS that is a plain file succeeds", del_plain_file),
        Case::run(
            "del-other-netns",
            "DEL of a container leaves another's interface alone, should CNI_NETNS be the other's",
            del_other,
        ),
        Case::run("del-renamed", "DEL removes the pair when the container has renamed its end", del_renamed),
        Case::run(
            "del-renamed-host",
            "DEL removes the pair when its end on the node was renamed",
            del_renamed_host,
        ),
        Case::run(
            "del-changed-config",
            "DEL succeeds when the configuration has changed since ADD",
            del_changed,
        ),
        Case::run(
            "del-odd-result",
            "DEL does not mind a previous result that is null or empty",
            del_odd_result,
        ),
        Case::run("del-frees", "an address is free as soon as DEL has returned", del_frees).in_small_pool(),
        Case::run(
            "del-agent-hangs",
            "DEL removes the interface while the agent hangs, and succeeds",
            del_unattended,
        ),
    ],
};

fn second_add(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    let before = (container.interface()?, container.addresses()?);
    refused(&container.call("ADD", None)?, "a second ADD")?;
    let after = (container.interface()?, container.addresses()?);
    expect(
        before.1 == after.1
            && before.0.is_some_and(|link| after.0.is_some_and(|now| now["ifindex"] == link["ifindex"])),
        "the first ADD's interface is another, or gone",
        format!("{:?}", after.1),
    )?;
    // Released, its address would be given to the next.
    let other = stand.container()?.with_args(&format!("IgnoreUnknown=1;IP={}", plain(&before.1)));
    refused(&other.call("ADD", None)?, "ADD with the first one's address")?;
    container.del(Some(&result))
}

fn plain(addresses: &[String]) -> String {
    addresses.first().and_then(|a| a.split('/').next()).unwrap_or_default().to_owned()
}

fn interface_exists(stand: &Stand) -> Checked {
    let container = stand.container()?;
    container.netns.ip("link add eth0 type veth peer name other")?;
    let before = container.interface()?;
    refused(&container.call("ADD", None)?, "ADD over an interface")?;
    expect(container.interface()? == before, "the interface is another, or gone", format!("{before:?}"))?;
    let left = stand.host_links()?;
    expect(left.is_empty(), "an interface is left on the node", format!("{left:?}"))?;
    container.netns.ip("link delete eth0")?;
    let result = container.add()?;
    container.del(Some(&result))
}

fn full<'s>(stand: &'s Stand) -> Checked<Vec<Container<'s>>> {
    let mut containers = Vec::new();
    for _ in 0..Pool::SMALL {
        let container = stand.container()?;
        container.add()?;
        containers.push(container);
    }
    Ok(containers)
}

fn failed_add(stand: &Stand) -> Checked {
    let mut containers = full(stand)?;
    let one_more = stand.container()?;
    refused(&one_more.call("ADD", None)?, "ADD without a free address")?;
    one_more.must_be_bare("the failed ADD")?;
    let links = stand.host_links()?;
    expect(links.len() == Pool::SMALL, "an interface is left on the node", format!("{links:?}"))?;
    // No DEL in between: kubelet tries with the same names.
    containers.pop().map_or(Ok(()), |last| last.del(None))?;
    one_more.add()?;
    one_more.del(None)?;
    containers.iter().try_for_each(|container| container.del(None))
}

fn failed_adds_use_nothing(stand: &Stand) -> Checked {
    for _ in 0..2 * Pool::SMALL {
        let bad = stand.container()?.with_args("IgnoreUnknown=1;IP=192.0.2.7");
        refused(&bad.call("ADD", None)?, "ADD with an address of elsewhere")?;
        bad.del(None)?;
    }
    let containers = full(stand)?;
    containers.iter().try_for_each(|container| container.del(None))
}

fn add_after_del(stand: &Stand) -> Checked {
    let container = stand.container()?;
    for _ in 0..3 {
        let result = container.add()?;
        container.must_check(&result)?;
        container.del(Some(&result))?;
        container.must_be_bare("DEL")?;
    }
    Ok(())
}

fn two_interfaces(stand: &Stand) -> Checked {
    let first = stand.container()?;
    let mut second = first.clone();
    second.ifname = "eth1".into();
    let (one, two) = (first.add()?, second.add()?);
    expect(first.addresses()? != second.addresses()?, "both have the same address", &two)?;
    first.must_check(&one)?;
    second.must_check(&two)?;
    first.del(Some(&one))?;
    expect(first.interface()?.is_none(), "the first is left", "")?;
    expect(second.addresses()?.len() == 1, "the second went with the first", "")?;
    second.must_check(&two)?;
    second.del(Some(&two))?;
    second.must_be_bare("both DELs")
}

fn del_twice(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    container.del(Some(&result))?;
    container.must_be_bare("DEL")?;
    container.del(Some(&result))?;
    container.del(None)
}

fn del_first(stand: &Stand) -> Checked {
    stand.container()?.del(None)
}

fn del_without(stand: &Stand, netns: Option<PathBuf>) -> Checked {
    let mut container = stand.container()?;
    let result = container.add()?;
    container.netns_var = netns;
    container.del(Some(&result))?;
    container.must_be_bare("DEL")?;
    let left = stand.host_links()?;
    expect(left.is_empty(), "an interface is left on the node", format!("{left:?}"))
}

fn del_vanished(stand: &Stand) -> Checked {
    let containers = full(stand)?;
    for container in &containers {
        container.netns.remove()?;
        container.del(None)?;
    }
    stand.wait_bare()?;
    let containers = full(stand)?;
    containers.iter().try_for_each(|container| container.del(None))
}

fn del_plain_file(stand: &Stand) -> Checked {
    let mut container = stand.container()?;
    container.add()?;
    let file = stand.place.data.join("no-netns");
    std::fs::write(&file, "")?;
    container.netns.remove()?;
    container.netns_var = Some(file);
    container.del(None)?;
    Ok(stand.wait_bare()?)
}

fn del_other(stand: &Stand) -> Checked {
    let living = stand.container()?;
    let result = living.add()?;
    // Its path was given to the living one meanwhile.
    let mut dead = stand.container()?;
    dead.netns_var = Some(living.netns.path().to_owned());
    dead.del(None)?;
    expect(living.interface()?.is_some(), "the other container's interface is gone", "")?;
    living.must_check(&result)?;
    living.del(Some(&result))
}

fn del_renamed(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    container.netns.ip("link set eth0 down")?;
    container.netns.ip("link set eth0 name net9")?;
    container.netns.ip("link set net9 up")?;
    container.del(Some(&result))?;
    container.must_be_bare("DEL")
}

fn del_renamed_host(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    let name = container.host_end()?["ifname"].as_str().unwrap_or_default().to_owned();
    stand.unattended(|| {
        stand.netns().ip(&format!("link set {name} down"))?;
        stand.netns().ip(&format!("link set {name} name other9"))?;
        stand.netns().ip("link set other9 up")
    })?;
    container.del(Some(&result))?;
    container.must_be_bare("DEL")
}

fn del_changed(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    let mut changed = container.clone().with("mtu", json!(1280)).with("hairpinMode", json!(false));
    changed.list[0]["isDefaultGateway"] = json!(false);
    changed.list[0]["bridge"] = json!("cni9");
    changed.del(Some(&result))?;
    changed.must_be_bare("DEL")
}

fn del_odd_result(stand: &Stand) -> Checked {
    for odd in [json!(null), json!({})] {
        let container = stand.container()?;
        container.add()?;
        container.del(Some(&odd))?;
        container.must_be_bare("DEL")?;
    }
    Ok(())
}

fn del_frees(stand: &Stand) -> Checked {
    let containers = full(stand)?;
    for container in &containers {
        container.del(None)?;
        container.add()?;
    }
    containers.iter().try_for_each(|container| container.del(None))
}

fn del_unattended(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    stand.unattended(|| Ok(container.del(Some(&result))?))?;
    container.must_be_bare("DEL")
}
