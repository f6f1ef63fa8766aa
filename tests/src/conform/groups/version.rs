//! VERSION (SPEC.md section 2, "VERSION").

use serde_json::json;

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{Env, Input, printed};
use crate::conform::stand::Stand;

pub(super) const GROUP: Group = Group {
    name: "version",
    title: "VERSION",
    cases: &[
        Case::run("reply", "it lists every released version of the specification, and one of its own", reply),
        Case::run("needs-nothing", "it needs no other variable, and no configuration", needs_nothing),
        Case::run("does-not-read", "it does not wait for a stdin that nobody closes", does_not_read),
        Case::run("dummies", "it looks at nothing of what libcni sends along as dummy", dummies),
    ],
};

pub(super) const RELEASED: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

fn asked(stand: &Stand, env: &Env, input: &Input) -> Checked {
    let reply = printed(&stand.container()?.raw(env, input)?, "VERSION")?;
    let listed =
        |version: &&str| reply["supportedVersions"].as_array().is_some_and(|l| l.contains(&json!(version)));
    if let Some(missing) = RELEASED.iter().find(|version| !listed(version)) {
        expect(false, format!("supportedVersions lacks {missing}"), &reply)?;
    }
    expect(reply["cniVersion"].as_str().is_some_and(|v| listed(&v)), "cniVersion is none of the list", &reply)
}

fn verb() -> Env {
    [("CNI_COMMAND", "VERSION".to_owned())].into()
}

fn reply(stand: &Stand) -> Checked {
    asked(stand, &verb(), &Input::Text(json!({ "cniVersion": "1.1.0" }).to_string()))
}

fn needs_nothing(stand: &Stand) -> Checked {
    asked(stand, &verb(), &Input::Text(String::new()))?;
    asked(stand, &verb(), &Input::Text("no JSON".into()))
}

fn does_not_read(stand: &Stand) -> Checked {
    asked(stand, &verb(), &Input::Silence)
}

fn dummies(stand: &Stand) -> Checked {
    let mut env = verb();
    for name in ["CNI_NETNS", "CNI_IFNAME", "CNI_PATH"] {
        env.insert(name, "dummy".into());
    }
    env.insert("CNI_CONTAINERID", String::new());
    env.insert("CNI_ARGS", String::new());
    asked(stand, &env, &Input::Text(json!({ "cniVersion": "0.4.0" }).to_string()))
}
