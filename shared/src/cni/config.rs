//! The network configuration on stdin: what every verb needs of it. What ADD and CHECK need more is in `interface`.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{CniResult, Code, Failure, NetworkName, SpecVersion, Target};
use crate::json::{Case, Keys};
use crate::names;
use crate::protocol::Attachment;

/// A configuration whose name and version are good. Unknown keys are ignored: runtimes add their own.
#[derive(Debug, Clone)]
pub struct NetConf {
    pub version: SpecVersion,
    pub name: NetworkName,
    body: Map<String, Value>,
}

impl NetConf {
    /// Checks in the reference's order: JSON, `name`, `cniVersion`. An error comes with the version to print it in.
    pub fn parse(stdin: &[u8]) -> Result<Self, (SpecVersion, Failure)> {
        let body = match serde_json::from_slice(stdin) {
            Ok(Value::Object(body)) => body,
            Ok(other) => {
                let msg =
                    format!("network configuration on stdin is {}: expected a JSON object", kind(&other));
                return Err((SpecVersion::NEWEST, Failure::new(Code::Decode, msg)));
            }
            Err(e) => {
                let failure = Failure::new(Code::Decode, "network configuration on stdin is not valid JSON");
                return Err((SpecVersion::NEWEST, failure.with_details(e.to_string())));
            }
        };
        let keys = Keys::top(&body, Case::Exact);
        let version = spec_version(&keys);
        let name = network_name(&keys).map_err(|e| (*version.as_ref().unwrap_or(&SpecVersion::NEWEST), e))?;
        let version = version.map_err(|e| (SpecVersion::NEWEST, e))?;
        Ok(Self { version, name, body })
    }

    /// Refuses a verb that the configuration's version does not have.
    pub fn require(&self, since: SpecVersion, verb: &str) -> Result<(), Failure> {
        if self.version >= since {
            return Ok(());
        }
        let msg = format!(
            "cniVersion = {:?} does not have {verb}: expected {since} or newer",
            self.version.as_str()
        );
        Err(Failure::new(Code::IncompatibleVersion, msg))
    }

    /// Where the agent listens.
    pub fn socket(&self) -> Result<PathBuf, Failure> {
        let keys = self.keys();
        let Some(path) = keys.str("socket", "the absolute path of the agent's socket")? else {
            return Ok(PathBuf::from(names::CNI_SOCKET));
        };
        if path.starts_with('/') && path.len() <= names::MAX_SOCKET_PATH {
            Ok(PathBuf::from(path))
        } else {
            let most = names::MAX_SOCKET_PATH;
            let expected = format!("the absolute path of the agent's socket, at most {most} bytes");
            Err(keys.bad("socket", &expected).into())
        }
    }

    pub fn has_prev_result(&self) -> bool {
        self.body.get("prevResult").is_some_and(|v| !v.is_null())
    }

    pub fn prev_result(&self) -> Result<Option<CniResult>, Failure> {
        match self.body.get("prevResult") {
            None | Some(Value::Null) => Ok(None),
            Some(value) => CniResult::parse(value, self.version).map(Some),
        }
    }

    /// The same as text in the configuration's version: for a plugin that passes it on. As it came, if it is of that
    /// version, with whatever is in it that nobody here reads.
    pub fn prev_result_as_configured(&self) -> Result<Option<String>, Failure> {
        match self.body.get("prevResult") {
            Some(value) if value["cniVersion"] == self.version.as_str() => Ok(Some(value.to_string())),
            _ => self.prev_result()?.map(|result| result.render(self.version)).transpose(),
        }
    }

    /// The attachments that GC must spare. `None` when the caller passed no list at all: then nothing may be concluded.
    /// `null` is a Go nil slice and means an empty list, as ocicni sends it.
    pub fn valid_attachments(&self) -> Result<Option<Vec<Attachment>>, Failure> {
        const KEYS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        let Some(key) = KEYS.into_iter().find(|key| self.body.contains_key(*key)) else { return Ok(None) };
        let expected = "a list of {\"containerID\": …, \"ifname\": …}";
        let keys = self.keys();
        let list = keys.list(key, expected)?;
        let one = |item: &Value| {
            let text = |name: &str| item.get(name).and_then(Value::as_str);
            Some(Attachment {
                network: self.name.clone(),
                container_id: text("containerID")?.parse().ok()?,
                ifname: text("ifname")?.parse().ok()?,
            })
        };
        list.iter()
            .map(|item| one(item).ok_or_else(|| keys.bad_part(key, item, expected).into()))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    pub fn attachment(&self, target: &Target) -> Attachment {
        Attachment {
            network: self.name.clone(),
            container_id: target.container_id.clone(),
            ifname: target.ifname.clone(),
        }
    }

    pub(super) fn keys(&self) -> Keys<'_> {
        Keys::top(&self.body, Case::Exact)
    }
}

fn network_name(keys: &Keys<'_>) -> Result<NetworkName, Failure> {
    let expected = "a network name of letters, digits, '_', '.' and '-'";
    let name = keys.str("name", expected)?.filter(|name| !name.is_empty()).ok_or_else(|| {
        Failure::new(Code::BadConfiguration, format!("name is missing: expected {expected}"))
    })?;
    name.parse().map_err(|e| Failure::new(Code::BadConfiguration, format!("name: {e}")))
}

fn spec_version(keys: &Keys<'_>) -> Result<SpecVersion, Failure> {
    let incompatible = |e: String| Failure::new(Code::IncompatibleVersion, e);
    match keys.str("cniVersion", "a version such as 1.1.0").map_err(|e| incompatible(e.to_string()))? {
        None | Some("") => Ok(SpecVersion::UNSTATED),
        Some(text) => {
            text.parse().map_err(|e: super::version::UnknownVersion| incompatible(format!("cniVersion: {e}")))
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<NetConf, Failure> {
        NetConf::parse(json.as_bytes()).map_err(|(_, failure)| failure)
    }

    #[test]
    fn order_and_codes_are_the_references() {
        for (json, code, part) in [
            ("", Code::Decode, "not valid JSON"),
            ("{", Code::Decode, "not valid JSON"),
            ("[]", Code::Decode, "a list"),
            (r#"{"cniVersion":"9"}"#, Code::BadConfiguration, "name is missing"),
            (r#"{"cniVersion":"9","name":""}"#, Code::BadConfiguration, "name is missing"),
            (r#"{"cniVersion":"9","name":"a/b"}"#, Code::BadConfiguration, "a/b"),
            (r#"{"cniVersion":"9","name":5}"#, Code::BadConfiguration, "name = 5"),
            (r#"{"cniVersion":"9","name":"n"}"#, Code::IncompatibleVersion, "\"9\""),
            (r#"{"cniVersion":"1.0","name":"n"}"#, Code::IncompatibleVersion, "\"1.0\""),
            (r#"{"cniVersion":1,"name":"n"}"#, Code::IncompatibleVersion, "cniVersion = 1"),
        ] {
            let failure = parse(json).expect_err(json);
            assert!(failure.is(code) && failure.msg.contains(part), "{json}: {failure:?}");
        }
        let stated = NetConf::parse(br#"{"cniVersion":"0.3.1"}"#).expect_err("no name").0;
        assert_eq!(stated, SpecVersion::V0_3_1, "an error is printed in the version that was asked for");
    }

    #[test]
    fn versions_and_verbs() {
        assert_eq!(parse(r#"{"name":"n"}"#).expect("no version").version, SpecVersion::V0_1_0);
        for version in SpecVersion::ALL {
            let conf = parse(&format!(r#"{{"name":"n","cniVersion":"{version}"}}"#)).expect("known");
            assert_eq!(
                conf.require(SpecVersion::WITH_CHECK, "CHECK").is_ok(),
                version >= SpecVersion::V0_4_0
            );
            let gc = conf.require(SpecVersion::WITH_GC_AND_STATUS, "GC");
            assert_eq!(gc.is_ok(), version == SpecVersion::V1_1_0);
            assert!(gc.err().is_none_or(|e| e.is(Code::IncompatibleVersion)));
        }
    }

    #[test]
    fn the_socket_is_an_absolute_path() {
        assert_eq!(parse(r#"{"name":"n"}"#).expect("conf").socket(), Ok(PathBuf::from("/run/weft/cni.sock")));
        assert_eq!(
            parse(r#"{"name":"n","socket":"/a/b"}"#).expect("conf").socket(),
            Ok(PathBuf::from("/a/b"))
        );
        for bad in [r#""a/b""#, r#""""#, "5"] {
            let conf = parse(&format!(r#"{{"name":"n","socket":{bad}}}"#)).expect("conf");
            assert!(conf.socket().expect_err(bad).msg.contains(&format!("socket = {bad}: expected")));
        }
    }

    #[test]
    fn null_and_empty_lists_mean_none_and_absent_means_unknown() {
        let valid = |json: &str| parse(json).expect(json).valid_attachments();
        assert_eq!(valid(r#"{"name":"n"}"#), Ok(None));
        for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            for none in ["null", "[]"] {
                assert_eq!(valid(&format!(r#"{{"name":"n","{key}":{none}}}"#)), Ok(Some(vec![])));
            }
            let one = valid(&format!(r#"{{"name":"n","{key}":[{{"containerID":"c","ifname":"eth0"}}]}}"#));
            let one = one.expect("good").expect("present");
            assert_eq!((one[0].network.as_str(), one[0].container_id.as_str()), ("n", "c"));
        }
        let both = r#"{"name":"n","cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}],"cni.dev/attachments":[]}"#;
        assert_eq!(valid(both).expect("good").expect("present").len(), 1);
        for bad in ["5", "[5]", r#"[{"containerID":"c"}]"#, r#"[{"containerID":"c/","ifname":"eth0"}]"#, "{}"]
        {
            let failure = valid(&format!(r#"{{"name":"n","cni.dev/valid-attachments":{bad}}}"#));
            assert!(failure.expect_err(bad).is(Code::BadConfiguration));
        }
    }
}
