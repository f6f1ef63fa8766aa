//! A container, and every way to call plugins for it: as libcni does (a list in order, each with the result of the one
//! before, DEL backwards), and one invocation with anything in it that a runtime should not send.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::case::{Checked, Finding, expect, red};
use super::stand::Stand;
use super::subject::Kind;
use crate::kernel::query;
use crate::netns::Netns;
use crate::plugin::{Outcome, finish};
use crate::wait::eventually;

#[derive(Debug, Clone)]
pub struct Container<'a> {
    stand: &'a Stand,
    pub id: String,
    pub netns: Netns,
    pub ifname: String,
    /// `CNI_NETNS`; `None` leaves the variable out.
    pub netns_var: Option<PathBuf>,
    pub args: Option<String>,
    /// The network's list of plugins: the subject first.
    pub list: Vec<Value>,
}

/// More than any plugin allows itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an invocation reads.
#[derive(Debug, Clone)]
pub enum Input {
    Text(String),
    /// A stream that cannot be read.
    Directory,
    /// A pipe in which nothing comes and that nobody closes.
    Silence,
}

pub type Env = BTreeMap<&'static str, String>;

impl<'a> Container<'a> {
    pub(super) fn new(stand: &'a Stand, id: String, netns: Netns, config: Value) -> Self {
        let netns_var = Some(netns.path().to_owned());
        Self { stand, id, netns, ifname: "eth0".into(), netns_var, args: None, list: vec![config] }
    }

    /// The subject's configuration.
    pub fn config(&mut self) -> &mut Value {
        &mut self.list[0]
    }

    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.list[0][key] = value;
        self
    }

    pub fn with_args(mut self, args: &str) -> Self {
        self.args = Some(args.to_owned());
        self
    }

    /// `runtimeConfig` of the subject.
    pub fn with_capability(mut self, name: &str, value: Value) -> Self {
        self.list[0]["capabilities"][name] = json!(true);
        self.list[0]["runtimeConfig"][name] = value;
        self
    }

    /// A capability that the plugin has itself, or that the stock plugin behind it has for it.
    pub fn with_capability_by(self, stock: &str, name: &str, value: Value) -> Self {
        match self.stand.subject.kind {
            Kind::Weft => self.with_capability(name, value),
            Kind::Bridge => self.chained(stock, json!({ "runtimeConfig": { name: value } })),
        }
    }

    /// One more plugin behind.
    pub fn chained(mut self, stock: &str, config: Value) -> Self {
        let mut plugin = config;
        plugin["type"] = json!(stock);
        plugin["name"] = self.list[0]["name"].clone();
        plugin["cniVersion"] = self.list[0]["cniVersion"].clone();
        self.list.push(plugin);
        self
    }

    pub fn env(&self, verb: &str) -> Env {
        let mut env: Env = [
            ("CNI_COMMAND", verb.to_owned()),
            ("CNI_CONTAINERID", self.id.clone()),
            ("CNI_IFNAME", self.ifname.clone()),
            ("CNI_PATH", self.stand.subject.cni_path()),
        ]
        .into();
        if let Some(netns) = &self.netns_var {
            env.insert("CNI_NETNS", netns.display().to_string());
        }
        if let Some(args) = &self.args {
            env.insert("CNI_ARGS", args.clone());
        }
        env
    }

    /// The subject's executable with this environment and input.
    pub fn raw(&self, env: &Env, input: &Input) -> Result<Outcome> {
        self.spawn(&self.stand.subject.program, env, input)
    }

    fn spawn(&self, program: &str, env: &Env, input: &Input) -> Result<Outcome> {
        let mut command = Command::new(self.stand.subject.executable(program)?);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(env);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(match input {
            Input::Directory => Stdio::from(File::open("/")?),
            Input::Text(_) | Input::Silence => Stdio::piped(),
        });
        let mut child = self.stand.netns().spawn(&mut command)?;
        let mut stdin = child.stdin.take();
        if let (Some(pipe), Input::Text(text)) = (&mut stdin, input) {
            // A plugin that ends before it has read everything is judged by its answer, not by the pipe.
            let _ = pipe.write_all(text.as_bytes());
        }
        if !matches!(input, Input::Silence) {
            drop(stdin.take());
        }
        // One that waits for ever is ended, and judged by that.
        let ended = eventually("the plugin to end", PATIENCE, || Ok(child.try_wait()?.is_some()));
        if ended.is_err() {
            child.kill()?;
        }
        drop(stdin);
        finish(child)
    }

    /// One plugin of the list.
    fn call_one(&self, verb: &str, config: &Value, previous: Option<&Value>) -> Result<Outcome> {
        let mut config = config.clone();
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        let program = config["type"].as_str().context("a type")?.to_owned();
        self.spawn(&program, &self.env(verb), &Input::Text(config.to_string()))
    }

    /// The subject alone.
    pub fn call(&self, verb: &str, previous: Option<&Value>) -> Result<Outcome> {
        self.call_one(verb, &self.list[0], previous)
    }

    /// ADD of the list, which must succeed.
    pub fn add(&self) -> Checked<Value> {
        let mut result: Option<Value> = None;
        for plugin in &self.list {
            let outcome = self.call_one("ADD", plugin, result.as_ref())?;
            result = Some(printed(&outcome, &format!("ADD by {}", named(plugin, self.stand)))?);
        }
        Ok(result.context("a list of plugins")?)
    }

    /// CHECK of the list: the first refusal, or the last success.
    pub fn check(&self, result: &Value) -> Result<Outcome> {
        self.each("CHECK", self.list.iter(), Some(result))
    }

    pub fn must_check(&self, result: &Value) -> Checked {
        silent(&self.check(result)?, "CHECK")
    }

    /// DEL of the list, backwards, which must succeed.
    pub fn del(&self, result: Option<&Value>) -> Checked {
        silent(&self.each("DEL", self.list.iter().rev(), result)?, "DEL")
    }

    fn each<'c>(
        &self,
        verb: &str,
        list: impl Iterator<Item = &'c Value>,
        result: Option<&Value>,
    ) -> Result<Outcome> {
        let mut last = None;
        for plugin in list {
            let outcome = self.call_one(verb, plugin, result)?;
            let refused = outcome.exit != Some(0);
            last = Some(outcome);
            if refused {
                break;
            }
        }
        last.context("a list of plugins")
    }

    /// The row of the container's interface in `ip -details link show`.
    pub fn interface(&self) -> Result<Option<Value>> {
        self.stand.link(&self.netns, &self.ifname)
    }

    /// The row of the pair's end on the node.
    pub fn host_end(&self) -> Result<Value> {
        let inside = self.interface()?.with_context(|| format!("no {} in {}", self.ifname, self.id))?;
        let rows = query(self.stand.netns(), "ip -json -details link show")?;
        let found = rows.into_iter().find(|row| row["ifindex"] == inside["link_index"]);
        found.with_context(|| format!("the other end of {inside}"))
    }

    /// The addresses of the interface, with their prefix lengths.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let rows = query(&self.netns, "ip -json -4 address show")?;
        let row = rows.iter().find(|row| row["ifname"] == self.ifname.as_str());
        let infos = row.and_then(|row| row["addr_info"].as_array()).into_iter().flatten();
        Ok(infos.filter_map(|a| Some(format!("{}/{}", a["local"].as_str()?, a["prefixlen"]))).collect())
    }

    /// Nothing of the container's is left, neither in it nor on the node.
    pub fn must_be_bare(&self, after: &str) -> Checked {
        let links = query(&self.netns, "ip -json link show")?;
        let names: Vec<_> = links.iter().filter_map(|row| row["ifname"].as_str()).collect();
        expect(names == ["lo"], format!("after {after} the container's interface is left"), names.join(" "))
    }
}

/// One invocation that must be refused, as data.
#[derive(Debug)]
pub struct Refusal {
    pub what: &'static str,
    pub verb: &'static str,
    /// Changes of the environment; `None` unsets.
    pub env: &'static [(&'static str, Option<&'static str>)],
    pub input: Bad,
    /// `None` where neither specification nor reference sets one.
    pub code: Option<u64>,
    /// All of them in the error's text.
    pub words: &'static [&'static str],
}

/// What is wrong with the input, if anything.
#[derive(Debug)]
pub enum Bad {
    Config(fn(&mut Value)),
    Text(&'static str),
    Unreadable,
}

impl Refusal {
    pub const fn new(what: &'static str, verb: &'static str, code: u64) -> Self {
        Self { what, verb, env: &[], input: Bad::Config(|_| ()), code: Some(code), words: &[] }
    }

    pub const fn env(self, env: &'static [(&'static str, Option<&'static str>)]) -> Self {
        Self { env, ..self }
    }

    pub const fn config(self, change: fn(&mut Value)) -> Self {
        Self { input: Bad::Config(change), ..self }
    }

    pub const fn text(self, text: &'static str) -> Self {
        Self { input: Bad::Text(text), ..self }
    }

    pub const fn unreadable(self) -> Self {
        Self { input: Bad::Unreadable, ..self }
    }

    pub const fn naming(self, words: &'static [&'static str]) -> Self {
        Self { words, ..self }
    }

    /// With whatever code.
    pub const fn by_any_code(self) -> Self {
        Self { code: None, ..self }
    }

    pub fn judge(&self, stand: &Stand) -> Checked {
        let mut container = stand.container()?;
        let input = match self.input {
            Bad::Config(change) => {
                change(container.config());
                Input::Text(container.list[0].to_string())
            }
            Bad::Text(text) => Input::Text(text.to_owned()),
            Bad::Unreadable => Input::Directory,
        };
        let mut env = container.env(self.verb);
        for (name, value) in self.env {
            env.remove(name);
            env.extend(value.map(|value| (*name, value.to_owned())));
        }
        let outcome = container.raw(&env, &input)?;
        let refused = refused(&outcome, self.what)?;
        if let Some(expected) = self.code {
            let says = format!("{}: code {}, expected {expected}", self.what, refused.code);
            expect(refused.code == expected, says, &refused.text)?;
        }
        for word in self.words {
            let says = format!("{}: the error does not name {word}", self.what);
            expect(refused.text.contains(word), says, &refused.text)?;
        }
        container.must_be_bare(self.what)?;
        let left = stand.host_links()?;
        expect(
            left.is_empty(),
            format!("{}: an interface is left on the node", self.what),
            format!("{left:?}"),
        )
    }
}

/// An error object.
#[derive(Debug)]
pub struct Refused {
    pub code: u64,
    /// Message and details.
    pub text: String,
    pub object: Value,
}

/// The error object of an invocation that must be refused: on stdout, beside an exit status that is not 0.
pub fn refused(outcome: &Outcome, what: &str) -> Checked<Refused> {
    let shown = shown(outcome);
    expect(outcome.exit != Some(0), format!("{what}: succeeds, expected an error"), &shown)?;
    let object: Value = serde_json::from_str(&outcome.stdout)
        .map_err(|_| red(format!("{what}: stdout holds no error object"), &shown))?;
    let code =
        object["code"].as_u64().ok_or_else(|| red(format!("{what}: the error has no code"), &shown))?;
    let part = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let text = format!("{} {}", part("msg"), part("details"));
    expect(text.trim() != "", format!("{what}: the error has no message"), &shown)?;
    Ok(Refused { code, text, object })
}

/// The result of a verb that must succeed with one.
pub fn printed(outcome: &Outcome, what: &str) -> Checked<Value> {
    succeeded(outcome, what)?;
    serde_json::from_str(&outcome.stdout)
        .map_err(|_| red(format!("{what}: stdout holds no result"), shown(outcome)))
}

/// A verb that must succeed, and say nothing.
pub fn silent(outcome: &Outcome, what: &str) -> Checked {
    succeeded(outcome, what)?;
    expect(outcome.stdout.is_empty(), format!("{what}: something on stdout"), shown(outcome))
}

fn succeeded(outcome: &Outcome, what: &str) -> Checked {
    if outcome.exit == Some(0) {
        return Ok(());
    }
    let error: Value = serde_json::from_str(&outcome.stdout).unwrap_or_default();
    let how = match (outcome.exit, error["code"].as_u64()) {
        (None, _) => "is ended by a signal".to_owned(),
        (Some(_), Some(code)) => format!("is refused with code {code}"),
        (Some(exit), None) => format!("ends with exit status {exit} and no error object"),
    };
    Err(red(format!("{what} {how}"), shown(outcome)))
}

pub fn shown(outcome: &Outcome) -> String {
    let Outcome { exit, stdout, stderr } = outcome;
    format!("exit {exit:?}, stdout {:?}, stderr {:?}", stdout.trim(), stderr.trim())
}

/// A plugin of a list, for people: the subject is "the plugin".
fn named(plugin: &Value, stand: &Stand) -> String {
    match plugin["type"].as_str() {
        Some(kind) if kind != stand.subject.program => format!("{kind} behind it"),
        _ => "the plugin".into(),
    }
}

impl From<Finding> for anyhow::Error {
    /// For the harness's own steps, in which a plugin's failure is a failure of the step.
    fn from(finding: Finding) -> Self {
        match finding {
            Finding::Red { says, seen } => anyhow::anyhow!("{says}: {seen}"),
            Finding::Broken(error) => error,
        }
    }
}
