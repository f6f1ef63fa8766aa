//! GC: what the runtime does not know any more goes, and nothing else (SPEC.md section 2, "GC").

use serde_json::{Value, json};

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{Container, refused, silent};
use crate::conform::stand::Stand;

pub(super) const GROUP: Group = Group {
    name: "gc",
    title: "GC",
    cases: &[
        Case::run("keeps-valid", "attachments in the list stay, the others go", keeps_valid),
        Case::run(
            "by-interface",
            "an attachment is valid by container ID and interface name together",
            by_interface,
        ),
        Case::run("null", "null means that none is valid: all go", |stand| {
            all_go(stand, "cni.dev/valid-attachments", Value::Null)
        }),
        Case::run("empty", "an empty list means that none is valid: all go", |stand| {
            all_go(stand, "cni.dev/valid-attachments", json!([]))
        }),
        Case::run("absent", "without a list nothing goes", absent),
        Case::run(
            "older-key",
            "the key that libcni sends along, cni.dev/attachments, is understood",
            |stand| all_go(stand, "cni.dev/attachments", json!([])),
        ),
        Case::run("other-network", "attachments of another network stay", other_network),
        Case::run("frees", "the address of what goes is free", frees),
        Case::run("no-list", "a value that is no list is refused with code 7, and nothing goes", no_list),
        Case::run("nothing-to-do", "it succeeds when there is nothing to do", nothing_to_do),
    ],
};

const KEY: &str = "cni.dev/valid-attachments";

/// GC as a runtime calls it: no container.
fn collect(stand: &Stand, key: &str, list: Option<Value>) -> Checked {
    let mut caller = stand.container()?;
    if let Some(list) = list {
        caller.config()[key] = list;
    }
    let mut env = caller.env("GC");
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        env.insert(name, String::new());
    }
    let input = crate::conform::container::Input::Text(caller.list[0].to_string());
    silent(&caller.raw(&env, &input)?, "GC")
}

fn is_wired(container: &Container<'_>) -> Checked<bool> {
    Ok(container.interface()?.is_some())
}

fn keeps_valid(stand: &Stand) -> Checked {
    let (kept, stale) = (stand.container()?, stand.container()?);
    let result = kept.add()?;
    stale.add()?;
    collect(stand, KEY, Some(json!([{ "containerID": kept.id, "ifname": kept.ifname }])))?;
    expect(!is_wired(&stale)?, "the stale attachment is left", "")?;
    expect(is_wired(&kept)?, "the valid attachment is gone", "")?;
    kept.must_check(&result)?;
    kept.del(Some(&result))
}

fn by_interface(stand: &Stand) -> Checked {
    let kept = stand.container()?;
    let mut stale = kept.clone();
    stale.ifname = "eth1".into();
    let result = kept.add()?;
    stale.add()?;
    collect(stand, KEY, Some(json!([{ "containerID": kept.id, "ifname": "eth0" }])))?;
    expect(!is_wired(&stale)?, "the stale interface is left", "")?;
    expect(is_wired(&kept)?, "the valid interface is gone", "")?;
    kept.del(Some(&result))
}

fn all_go(stand: &Stand, key: &str, list: Value) -> Checked {
    let containers = [stand.container()?, stand.container()?];
    for container in &containers {
        container.add()?;
    }
    collect(stand, key, Some(list))?;
    for container in &containers {
        expect(!is_wired(container)?, "an attachment is left", "")?;
    }
    let left = stand.host_links()?;
    expect(left.is_empty(), "an interface is left on the node", format!("{left:?}"))
}

fn absent(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    collect(stand, KEY, None)?;
    expect(is_wired(&container)?, "the attachment is gone", "")?;
    container.must_check(&result)?;
    container.del(Some(&result))
}

fn other_network(stand: &Stand) -> Checked {
    let container = stand.container()?.with("name", json!("other"));
    let result = container.add()?;
    collect(stand, KEY, Some(json!([])))?;
    expect(is_wired(&container)?, "the other network's attachment is gone", "")?;
    container.del(Some(&result))
}

fn frees(stand: &Stand) -> Checked {
    let address = stand.address(9)?;
    let stale = stand.container()?.with_capability("ips", json!([address]));
    stale.add()?;
    collect(stand, KEY, Some(json!([])))?;
    let next = stand.container()?.with_capability("ips", json!([address]));
    let result = next.add()?;
    next.del(Some(&result))
}

fn no_list(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    let caller = stand.container()?.with(KEY, json!("all"));
    let error = refused(&caller.call("GC", None)?, "GC with a string")?;
    expect(error.code == 7, format!("code {}, expected 7", error.code), &error.text)?;
    expect(is_wired(&container)?, "the attachment is gone", "")?;
    container.del(Some(&result))
}

fn nothing_to_do(stand: &Stand) -> Checked {
    collect(stand, KEY, Some(json!([])))?;
    collect(stand, KEY, Some(json!([{ "containerID": "gone", "ifname": "eth0" }])))
}
