//! What is refused, in which order and with which code (SPEC.md section 2, "Parameters"; section 5, "Error"; the order is
//! the reference skeleton's): environment, container ID and interface name, stdin, JSON, network name, version.

use serde_json::json;

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{Env, Input};
use crate::conform::container::{Refusal, refused, shown};
use crate::conform::stand::Stand;
use crate::kernel::query;

pub(super) const GROUP: Group = Group {
    name: "protocol",
    title: "Validation: order and codes",
    cases: &[
        Case::refusals(
            "unknown-verb",
            "a verb that nobody knows is refused with code 4 and named",
            &[
                Refusal::new("verb FROB", "FROB", 4).naming(&["FROB"]),
                Refusal::new("verb add", "add", 4).naming(&["add"]),
            ],
        ),
        Case::refusals(
            "add-variables",
            "ADD names every variable that it misses in one error, code 4",
            &[
                Refusal::new("ADD without variables", "ADD", 4)
                    .env(&[("CNI_CONTAINERID", None), ("CNI_NETNS", None), ("CNI_IFNAME", None)])
                    .naming(&["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
                Refusal::new("ADD with empty variables", "ADD", 4)
                    .env(&[("CNI_CONTAINERID", Some("")), ("CNI_NETNS", Some("")), ("CNI_IFNAME", Some(""))])
                    .naming(&["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
                Refusal::new("ADD without CNI_NETNS", "ADD", 4)
                    .env(&[("CNI_NETNS", None)])
                    .naming(&["CNI_NETNS"]),
            ],
        ),
        Case::refusals(
            "check-variables",
            "CHECK names every variable that it misses in one error, code 4",
            &[Refusal::new("CHECK without variables", "CHECK", 4)
                .env(&[("CNI_CONTAINERID", None), ("CNI_NETNS", None), ("CNI_IFNAME", None)])
                .naming(&["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"])],
        ),
        Case::refusals(
            "del-variables",
            "DEL names container ID and interface name when it misses them, code 4",
            &[Refusal::new("DEL without variables", "DEL", 4)
                .env(&[("CNI_CONTAINERID", None), ("CNI_NETNS", None), ("CNI_IFNAME", None)])
                .naming(&["CNI_CONTAINERID", "CNI_IFNAME"])],
        ),
        Case::refusals(
            "container-id",
            "a container ID of other characters than the specification's is refused, code 4",
            &[
                Refusal::new("container ID a/b", "ADD", 4).env(&[("CNI_CONTAINERID", Some("a/b"))]),
                Refusal::new("container ID ../a", "DEL", 4).env(&[("CNI_CONTAINERID", Some("../a"))]),
                Refusal::new("container ID -a", "ADD", 4).env(&[("CNI_CONTAINERID", Some("-a"))]),
                Refusal::new("container ID with a space", "ADD", 4).env(&[("CNI_CONTAINERID", Some("a b"))]),
                Refusal::new("container ID of another alphabet", "CHECK", 4)
                    .env(&[("CNI_CONTAINERID", Some("ä"))]),
            ],
        ),
        Case::refusals(
            "interface-name",
            "an interface name that Linux or the specification forbids is refused, code 4",
            &[
                Refusal::new("interface name of 16 bytes", "ADD", 4)
                    .env(&[("CNI_IFNAME", Some("sixteen-bytes-xx"))]),
                Refusal::new("interface name .", "ADD", 4).env(&[("CNI_IFNAME", Some("."))]),
                Refusal::new("interface name ..", "ADD", 4).env(&[("CNI_IFNAME", Some(".."))]),
                Refusal::new("interface name a/b", "ADD", 4).env(&[("CNI_IFNAME", Some("a/b"))]),
                Refusal::new("interface name a:b", "DEL", 4).env(&[("CNI_IFNAME", Some("a:b"))]),
                Refusal::new("interface name with a space", "CHECK", 4).env(&[("CNI_IFNAME", Some("a b"))]),
            ],
        ),
        Case::refusals(
            "stdin",
            "a configuration that cannot be read is refused with code 5",
            &[Refusal::new("stdin is a directory", "ADD", 5).unreadable()],
        ),
        Case::refusals(
            "json",
            "what is no JSON object is refused with code 6",
            &[
                Refusal::new("empty stdin", "ADD", 6).text(""),
                Refusal::new("half an object", "ADD", 6).text("{\"name\":"),
                Refusal::new("a list", "ADD", 6).text("[]"),
                Refusal::new("a string", "DEL", 6).text("\"x\""),
            ],
        ),
        Case::refusals(
            "network-name",
            "a network name that is missing or no name is refused with code 7",
            &[
                Refusal::new("no name", "ADD", 7)
                    .config(|c| drop(c.as_object_mut().and_then(|c| c.remove("name")))),
                Refusal::new("an empty name", "ADD", 7).config(|c| c["name"] = json!("")),
                Refusal::new("name a/b", "ADD", 7).config(|c| c["name"] = json!("a/b")),
                Refusal::new("name ../b", "DEL", 7).config(|c| c["name"] = json!("../b")),
            ],
        ),
        Case::refusals(
            "spec-version",
            "a version that the plugin does not list is refused with code 1",
            &[
                Refusal::new("cniVersion 9.9.9", "ADD", 1).config(|c| c["cniVersion"] = json!("9.9.9")),
                Refusal::new("cniVersion 1.0", "ADD", 1).config(|c| c["cniVersion"] = json!("1.0")),
                Refusal::new("cniVersion 0.4", "DEL", 1).config(|c| c["cniVersion"] = json!("0.4")),
            ],
        ),
        Case::refusals(
            "verb-of-later-version",
            "a verb that the configuration's version does not have is refused with code 1",
            &[
                Refusal::new("CHECK in 0.3.1", "CHECK", 1).config(|c| c["cniVersion"] = json!("0.3.1")),
                Refusal::new("GC in 1.0.0", "GC", 1).config(|c| c["cniVersion"] = json!("1.0.0")),
                Refusal::new("STATUS in 1.0.0", "STATUS", 1).config(|c| c["cniVersion"] = json!("1.0.0")),
            ],
        ),
        Case::refusals(
            "order",
            "of several faults the first in order is told",
            &[
                Refusal::new("a variable missing, no JSON", "ADD", 4).env(&[("CNI_NETNS", None)]).text("{"),
                Refusal::new("a bad container ID, no JSON", "ADD", 4)
                    .env(&[("CNI_CONTAINERID", Some("-"))])
                    .text("{"),
                Refusal::new("a bad interface name, no name", "ADD", 4)
                    .env(&[("CNI_IFNAME", Some(".."))])
                    .text("{}"),
                Refusal::new("no name, a bad version", "ADD", 7).text("{\"cniVersion\":\"9.9.9\"}"),
                Refusal::new("a bad version, a bad option", "ADD", 1).config(|c| {
                    c["cniVersion"] = json!("9.9.9");
                    c["mtu"] = json!("big");
                }),
            ],
        ),
        Case::run(
            "no-verb",
            "without CNI_COMMAND it tells a person on stderr what it is, and succeeds",
            no_verb,
        ),
        Case::run(
            "path-is-optional",
            "CNI_PATH, which the specification makes optional, is not demanded",
            without_path,
        ),
        Case::run(
            "error-object",
            "an error is an object with cniVersion, code and msg, in the configuration's version",
            error_object,
        ),
        Case::run(
            "unknown-keys",
            "keys that nobody knows are ignored, as runtimes and later versions add some",
            unknown_keys,
        ),
        Case::run(
            "no-netns",
            "a CNI_NETNS that is no network namespace fails an ADD and nothing is left",
            no_netns,
        ),
        Case::run(
            "own-netns",
            "the runtime's own namespace is refused before anything is made in it",
            own_netns,
        ),
    ],
};

fn no_verb(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let outcome = container.raw(&Env::new(), &Input::Text(String::new()))?;
    expect(outcome.exit == Some(0), "it fails", shown(&outcome))?;
    expect(outcome.stdout.is_empty(), "something on stdout", shown(&outcome))?;
    expect(outcome.stderr.contains("1.0.0"), "stderr does not name the versions", shown(&outcome))
}

fn without_path(stand: &Stand) -> Checked {
    // STATUS calls nobody else, whatever the plugin is made of.
    let container = stand.container()?;
    let mut env = container.env("STATUS");
    env.remove("CNI_PATH");
    let outcome = container.raw(&env, &Input::Text(container.list[0].to_string()))?;
    expect(outcome.exit == Some(0), "STATUS without CNI_PATH fails", shown(&outcome))
}

fn error_object(stand: &Stand) -> Checked {
    for version in ["0.3.1", "1.0.0", "1.1.0"] {
        let container = stand.container_of(version)?.with("mtu", json!("big"));
        let error = refused(&container.call("ADD", None)?, "mtu \"big\"")?;
        let says = format!("the error's cniVersion is not the configuration's, {version}");
        expect(error.object["cniVersion"] == version, says, &error.object)?;
        let known = ["cniVersion", "code", "msg", "details"];
        let extra =
            error.object.as_object().and_then(|o| o.keys().find(|key| !known.contains(&key.as_str())));
        expect(extra.is_none(), "the error has other keys than the specification's", &error.object)?;
    }
    Ok(())
}

fn unknown_keys(stand: &Stand) -> Checked {
    let container = stand
        .container()?
        .with("x-later", json!({ "list": [1, null] }))
        .with("cni.dev/later", json!(true))
        .with("args", json!({ "labels": [{ "key": "app", "value": "web" }] }))
        .with_capability("io.kubernetes.cri.pod-annotations", json!({ "a": "b" }))
        .with_capability("aliases", json!({ "weft": ["web"] }));
    let result = container.add()?;
    container.del(Some(&result))
}

fn no_netns(stand: &Stand) -> Checked {
    let mut container = stand.container()?;
    for path in ["/etc/hostname", "/proc/self/ns/uts", "/nowhere/at/all"] {
        container.netns_var = Some(path.into());
        refused(&container.call("ADD", None)?, "ADD into what is no network namespace")?;
    }
    let left = stand.host_links()?;
    expect(left.is_empty(), "an interface is left on the node", format!("{left:?}"))
}

fn own_netns(stand: &Stand) -> Checked {
    let mut container = stand.container()?;
    container.netns_var = Some(stand.netns().path().to_owned());
    container.ifname = "pod0".into();
    refused(&container.call("ADD", None)?, "ADD into the runtime's own namespace")?;
    let links = query(stand.netns(), "ip -json link show")?;
    let made = links.iter().any(|row| row["ifname"] == "pod0");
    expect(!made, "the interface was made in the runtime's own namespace", format!("{links:?}"))
}
