//! A network configuration that an operator gives `weftctl install-cni`: read as a runtime and weft's plugin will read it,
//! before anything is installed. One that fails there fails every pod of the node.

use serde_json::{Map, Value};
use weft_shared::cni::{CniArgs, Failure, InterfaceConf, NetConf, SpecVersion};

const PLUGIN: &str = "weft";

/// Why it is none, with key, value and what was expected.
pub(super) fn check(text: &str) -> Result<(), String> {
    let json: Value = serde_json::from_str(text).map_err(|e| format!("expected JSON: {e}"))?;
    let list = json.as_object().ok_or_else(|| format!("{}: expected a JSON object", shown(&json)))?;
    let network = parsed(list)?;
    versions(list)?;
    let plugins = list.get("plugins").unwrap_or(&Value::Null);
    let expected = "expected a list of plugins, the first of type \"weft\"";
    let plugins = plugins
        .as_array()
        .filter(|plugins| !plugins.is_empty())
        .ok_or_else(|| format!("plugins = {}: {expected}", shown(plugins)))?;
    for (at, plugin) in plugins.iter().enumerate() {
        let key = format!("plugins[{at}]");
        let keys = plugin.as_object();
        let keys =
            keys.ok_or_else(|| format!("{key} = {}: expected an object with a type", shown(plugin)))?;
        let found = &plugin["type"];
        let expected = match (at, found.as_str()) {
            (0, Some(PLUGIN)) => {
                interface(keys, network.name.as_str(), network.version)
                    .map_err(|failure| format!("{key}: {failure}"))?;
                continue;
            }
            // It makes the interface, and would find one made.
            (0, _) => "\"weft\", which makes the interface and comes first",
            (_, Some(PLUGIN)) => "another plugin: weft is the first, and once is enough",
            (_, Some(name)) if !name.is_empty() && !name.contains('/') => continue,
            _ => "the name of a program in the runtime's plugin folder",
        };
        return Err(format!("{key}.type = {}: expected {expected}", shown(found)));
    }
    Ok(())
}

/// Name and version, by the plugin's own rules.
fn parsed(list: &Map<String, Value>) -> Result<NetConf, String> {
    let bytes = serde_json::to_vec(list).map_err(|e| e.to_string())?;
    NetConf::parse(&bytes).map_err(|(_, failure)| failure.to_string())
}

/// From CNI 1.1 on a list may name several, of which a runtime takes the newest (SPEC.md, "Network configuration format").
fn versions(list: &Map<String, Value>) -> Result<(), String> {
    let Some(found) = list.get("cniVersions") else { return Ok(()) };
    let known = SpecVersion::ALL.map(SpecVersion::as_str);
    let is_known = |version: &Value| version.as_str().is_some_and(|version| known.contains(&version));
    match found.as_array() {
        Some(versions) if versions.iter().all(is_known) => Ok(()),
        _ => Err(format!("cniVersions = {}: expected a list of {}", shown(found), known.join(", "))),
    }
}

/// What ADD will read of weft's entry, as a runtime passes it on: with the list's name and version.
fn interface(plugin: &Map<String, Value>, name: &str, version: SpecVersion) -> Result<(), Failure> {
    let mut plugin = plugin.clone();
    plugin.insert("name".to_owned(), name.into());
    plugin.insert("cniVersion".to_owned(), version.as_str().into());
    let conf =
        NetConf::parse(Value::Object(plugin).to_string().as_bytes()).map_err(|(_, failure)| failure)?;
    conf.socket()?;
    InterfaceConf::parse(&conf, &CniArgs::default()).map(drop)
}

/// A value in one line that is not too long.
fn shown(value: &Value) -> String {
    const MOST: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= MOST { text } else { text.chars().take(MOST).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_weftctl_brings_is_good_and_so_is_a_chain() {
        for good in [
            include_str!("../../../conf/10-weft.conflist"),
            r#"{"cniVersion":"1.1.0","cniVersions":["0.4.0","1.1.0"],"name":"a.b_c-1","plugins":[
                {"type":"weft","mtu":1400,"socket":"/run/x/cni.sock"},{"type":"tuning","sysctl":{}}]}"#,
            r#"{"name":"old","plugins":[{"type":"weft"}]}"#,
        ] {
            check(good).expect(good);
        }
    }

    #[test]
    fn what_would_fail_every_pod_is_named_with_what_was_expected() {
        let with = |name: &str, version: &str, plugins: &str| {
            format!(r#"{{"cniVersion":{version},"name":{name},"plugins":{plugins}}}"#)
        };
        let plugins = |plugins: &str| with(r#""n""#, r#""1.0.0""#, plugins);
        let weft = r#"[{"type":"weft"}]"#;
        for (text, said) in [
            ("{".to_owned(), "expected JSON"),
            ("[1]".to_owned(), "[1]: expected a JSON object"),
            (format!(r#"{{"plugins":{weft}}}"#), "name is missing: expected a network name"),
            (with(r#""../x/y""#, r#""1.0.0""#, weft), r#"network name "../x/y" must begin with"#),
            (with("5", r#""1.0.0""#, weft), "name = 5: expected"),
            (with(r#""n""#, r#""9.9""#, weft), r#"cniVersion: CNI spec version "9.9" is not one of 0.1.0"#),
            (with(r#""n""#, "1", weft), "cniVersion = 1: expected a version"),
            (
                r#"{"name":"n","cniVersions":["1.0.0","2"],"plugins":[{"type":"weft"}]}"#.to_owned(),
                r#"cniVersions = ["1.0.0","2"]: expected a list of 0.1.0"#,
            ),
            (r#"{"name":"n","type":"weft"}"#.to_owned(), "plugins = null: expected a list of plugins"),
            (plugins("[]"), "plugins = []: expected a list of plugins"),
            (plugins("{}"), "plugins = {}: expected a list of plugins"),
            (plugins(r#"[{"type":"weft"},3,"x"]"#), "plugins[1] = 3: expected an object with a type"),
            (plugins(r#"[{"type":"flannel"}]"#), r#"plugins[0].type = "flannel": expected "weft""#),
            (
                plugins(r#"[{"type":"tuning"},{"type":"weft"}]"#),
                r#"plugins[0].type = "tuning": expected "weft""#,
            ),
            (
                plugins(r#"[{"type":"weft"},{"type":"weft"}]"#),
                r#"plugins[1].type = "weft": expected another plugin"#,
            ),
            (
                plugins(r#"[{"type":"weft"},{"name":"x"}]"#),
                "plugins[1].type = null: expected the name of a program",
            ),
            (plugins(r#"[{"type":"weft"},{"type":""}]"#), r#"plugins[1].type = "": expected the name"#),
            (
                plugins(r#"[{"type":"weft"},{"type":"../x"}]"#),
                r#"plugins[1].type = "../x": expected the name"#,
            ),
            (
                plugins(r#"[{"type":"weft","socket":"x"}]"#),
                r#"plugins[0]: socket = "x": expected the absolute path"#,
            ),
            (plugins(r#"[{"type":"weft","mtu":"x"}]"#), r#"plugins[0]: mtu = "x": expected"#),
        ] {
            let wrong = check(&text).expect_err(&text);
            assert!(wrong.contains(said), "{text}: {wrong}");
        }
        let long = check(&plugins(&format!(r#""{}""#, "x".repeat(500)))).expect_err("long");
        assert!(long.len() < 150, "{long}");
    }
}
