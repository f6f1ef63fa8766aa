//! STATUS: would an ADD succeed (SPEC.md section 2, "STATUS")? containerd asks every five seconds, without a deadline of
//! its own.

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{Input, refused, silent};
use crate::conform::stand::{Pool, Stand};

pub(super) const GROUP: Group = Group {
    name: "status",
    title: "STATUS",
    cases: &[
        Case::run("ready", "it succeeds when an ADD would", ready),
        Case::run("before-first-add", "asking changes nothing on the node", no_trace),
        Case::run("exhausted", "with no address left it fails with code 50", exhausted).in_small_pool(),
        Case::run("recovers", "it succeeds again when an address is free", recovers).in_small_pool(),
        Case::run("agent-hangs", "with an agent that hangs it fails with code 50, by itself", agent_hangs),
    ],
};

fn ready(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let mut env = container.env("STATUS");
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        env.insert(name, String::new());
    }
    silent(&container.raw(&env, &Input::Text(container.list[0].to_string()))?, "STATUS")
}

fn no_trace(stand: &Stand) -> Checked {
    let seen = || stand.netns().ip("-o link show");
    let before = seen()?;
    silent(&stand.container()?.call("STATUS", None)?, "STATUS")?;
    let after = seen()?;
    expect(before.lines().count() == after.lines().count(), "the node's interfaces are others", after)
}

fn fill(stand: &Stand) -> Checked {
    (0..Pool::SMALL).try_for_each(|_| stand.container()?.add().map(drop))
}

fn exhausted(stand: &Stand) -> Checked {
    fill(stand)?;
    let error = refused(&stand.container()?.call("STATUS", None)?, "STATUS without a free address")?;
    expect(error.code == 50, format!("code {}, expected 50", error.code), &error.text)
}

fn recovers(stand: &Stand) -> Checked {
    let last = stand.container()?;
    last.add()?;
    (1..Pool::SMALL).try_for_each(|_| stand.container()?.add().map(drop))?;
    refused(&stand.container()?.call("STATUS", None)?, "STATUS without a free address")?;
    last.del(None)?;
    silent(&stand.container()?.call("STATUS", None)?, "STATUS")
}

fn agent_hangs(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let outcome = stand.unattended(|| container.call("STATUS", None))?;
    let error = refused(&outcome, "STATUS")?;
    expect(error.code == 50, format!("code {}, expected 50", error.code), &error.text)
}
