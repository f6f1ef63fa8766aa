//! The environment of one invocation (SPEC.md section 2, "Parameters").
//!
//! libcni exports every `CNI_` variable on every verb, possibly empty or `dummy`: only what a verb needs is looked at.

use std::fmt;
use std::str::FromStr;

use super::{Code, ContainerId, Failure};
use crate::IfName;

/// What the runtime asks for, with all that the verb needs from the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Add { target: Target, netns: String, args: String },
    Del { target: Target, netns: Option<String> },
    Check { target: Target, netns: String },
    Gc,
    Status,
    Version,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub container_id: ContainerId,
    pub ifname: IfName,
}

impl Call {
    /// Reads the environment through `var`; an unset variable and an empty one are the same. `None`: there is no
    /// `CNI_COMMAND`, so a person has started the program.
    pub fn parse(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Failure> {
        let var = |name| var(name).filter(|v| !v.is_empty());
        let Some(command) = var("CNI_COMMAND") else { return Ok(None) };
        let needed: &[&str] = match command.as_str() {
            "ADD" | "CHECK" => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            "DEL" => &["CNI_CONTAINERID", "CNI_IFNAME"],
            "GC" => return Ok(Some(Self::Gc)),
            "STATUS" => return Ok(Some(Self::Status)),
            "VERSION" => return Ok(Some(Self::Version)),
            other => {
                return Err(Failure::new(
                    Code::BadEnvironment,
                    format!("CNI_COMMAND = {other:?}: expected ADD, DEL, CHECK, GC, STATUS or VERSION"),
                ));
            }
        };
        let missing: Vec<_> = needed.iter().copied().filter(|name| var(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(Failure::new(
                Code::BadEnvironment,
                format!("{command} needs environment variables that are not set: {}", missing.join(", ")),
            ));
        }
        let target = Target {
            container_id: parsed("CNI_CONTAINERID", &var("CNI_CONTAINERID").unwrap_or_default())?,
            ifname: parsed("CNI_IFNAME", &var("CNI_IFNAME").unwrap_or_default())?,
        };
        let netns = var("CNI_NETNS");
        Ok(Some(match command.as_str() {
            "DEL" => Self::Del { target, netns },
            "CHECK" => Self::Check { target, netns: netns.unwrap_or_default() },
            _ => Self::Add {
                target,
                netns: netns.unwrap_or_default(),
                args: var("CNI_ARGS").unwrap_or_default(),
            },
        }))
    }
}

fn parsed<T: FromStr<Err: fmt::Display>>(name: &str, value: &str) -> Result<T, Failure> {
    value.parse().map_err(|e: T::Err| Failure::new(Code::BadEnvironment, format!("{name}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vars: &[(&str, &str)]) -> Result<Option<Call>, Failure> {
        Call::parse(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn a_verb_needs_only_its_own_variables() {
        assert_eq!(parse(&[]), Ok(None));
        assert_eq!(parse(&[("CNI_COMMAND", "")]), Ok(None));
        let dummy = [("CNI_NETNS", "dummy"), ("CNI_IFNAME", "a/b"), ("CNI_CONTAINERID", "-")];
        for (verb, call) in [("GC", Call::Gc), ("STATUS", Call::Status), ("VERSION", Call::Version)] {
            let mut vars = dummy.to_vec();
            vars.push(("CNI_COMMAND", verb));
            assert_eq!(parse(&vars), Ok(Some(call)));
        }
        let del = [
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", ""),
            ("CNI_ARGS", "=;="),
        ];
        let Ok(Some(Call::Del { target, netns: None })) = parse(&del) else { panic!("{:?}", parse(&del)) };
        assert_eq!((target.container_id.as_str(), target.ifname.as_str()), ("c1", "eth0"));
    }

    #[test]
    fn all_missing_names_come_in_one_message() {
        for (verb, missing) in [
            ("ADD", "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
            ("CHECK", "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
            ("DEL", "CNI_CONTAINERID, CNI_IFNAME"),
        ] {
            let failure = parse(&[("CNI_COMMAND", verb)]).expect_err(verb);
            assert!(failure.is(Code::BadEnvironment) && failure.msg.ends_with(missing), "{failure}");
        }
    }

    #[test]
    fn bad_values_are_named() {
        let base = |id, ifname| {
            parse(&[
                ("CNI_COMMAND", "ADD"),
                ("CNI_CONTAINERID", id),
                ("CNI_NETNS", "/n"),
                ("CNI_IFNAME", ifname),
            ])
        };
        assert!(base("C1_.-x", "eth0").is_ok());
        let long = "a".repeat(256);
        for id in ["-a", ".a", "_a", "a/b", "a b", "ä", "a\n", long.as_str()] {
            let failure = base(id, "eth0").expect_err(id);
            assert!(
                failure.is(Code::BadEnvironment) && failure.msg.starts_with("CNI_CONTAINERID"),
                "{failure}"
            );
        }
        for ifname in [".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx", "a\u{a0}b"] {
            let failure = base("c1", ifname).expect_err(ifname);
            assert!(failure.is(Code::BadEnvironment) && failure.msg.starts_with("CNI_IFNAME"), "{failure}");
        }
        for verb in ["add", "FOO", "ADD "] {
            let failure = parse(&[("CNI_COMMAND", verb)]).expect_err(verb);
            assert!(failure.is(Code::BadEnvironment) && failure.msg.contains(verb), "{failure}");
        }
    }
}
