//! What goes to which stream: a result or an error to stdout and nothing else, logs to stderr and not in good times
//! (libcni hands stderr on even then; SPEC.md section 2, "Execution Protocol").

use serde_json::{Value, json};

use crate::conform::case::{Case, Checked, Group, expect};
use crate::conform::container::{Env, Input, printed, refused, shown, silent};
use crate::conform::stand::Stand;
use crate::plugin::Outcome;

pub(super) const GROUP: Group = Group {
    name: "streams",
    title: "Streams",
    cases: &[
        Case::run("add-stdout", "ADD prints one JSON object on stdout and nothing else", add_stdout),
        Case::run("del-stdout", "DEL prints nothing on stdout", del_stdout),
        Case::run("check-stdout", "CHECK prints nothing on stdout", check_stdout),
        Case::run("gc-stdout", "GC prints nothing on stdout", gc_stdout),
        Case::run("status-stdout", "STATUS prints nothing on stdout", status_stdout),
        Case::run(
            "stderr",
            "ADD, CHECK, STATUS, DEL and VERSION say nothing on stderr when all is well",
            quiet,
        ),
        Case::run("error-stderr", "an error is told on stdout, and not on stderr as well", error_once),
    ],
};

fn add_stdout(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let outcome = container.call("ADD", None)?;
    let result = printed(&outcome, "ADD")?;
    expect(result.is_object(), "stdout holds no object", &result)?;
    container.del(Some(&result))
}

fn del_stdout(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    silent(&container.call("DEL", Some(&result))?, "DEL")
}

fn check_stdout(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let result = container.add()?;
    silent(&container.call("CHECK", Some(&result))?, "CHECK")?;
    container.del(Some(&result))
}

fn gc_stdout(stand: &Stand) -> Checked {
    let container = stand.container()?.with("cni.dev/valid-attachments", json!([]));
    silent(&container.call("GC", None)?, "GC")
}

fn status_stdout(stand: &Stand) -> Checked {
    silent(&stand.container()?.call("STATUS", None)?, "STATUS")
}

fn quiet(stand: &Stand) -> Checked {
    let container = stand.container()?;
    let silence = |verb: &str, previous: Option<&Value>| -> Checked<Outcome> {
        let outcome = container.call(verb, previous)?;
        expect(outcome.stderr.is_empty(), format!("{verb}: something on stderr"), shown(&outcome))?;
        Ok(outcome)
    };
    let result = printed(&silence("ADD", None)?, "ADD")?;
    for (verb, previous) in
        [("CHECK", Some(&result)), ("STATUS", None), ("DEL", Some(&result)), ("DEL", None)]
    {
        silence(verb, previous)?;
    }
    let verb: Env = [("CNI_COMMAND", "VERSION".to_owned())].into();
    let version = container.raw(&verb, &Input::Text(String::new()))?;
    expect(version.stderr.is_empty(), "VERSION: something on stderr", shown(&version))
}

fn error_once(stand: &Stand) -> Checked {
    let container = stand.container()?.with("mtu", json!("big"));
    let outcome = container.call("ADD", None)?;
    refused(&outcome, "mtu \"big\"")?;
    expect(outcome.stderr.is_empty(), "something on stderr", shown(&outcome))
}
