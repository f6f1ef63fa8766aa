//! iptables-legacy, the packet filter beside nf_tables: its `FORWARD` as `iptables-save` writes it.
//!
//! It announces nothing and has no generation, so it is read from time to time, and only where its filter table is in
//! use. IPv4 only, as the overlay is.

use std::collections::BTreeMap;

use weft_shared::Subnet;

use super::rule::MARK;
use super::{ChainPolicy, Family, Networks, Part, Ruleset};

const FORWARD: &str = "FORWARD";
const MAX_DEPTH: u32 = 16;

/// The filter table: policies and rules, each rule without its `-A CHAIN`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LegacyTable {
    pub policy: Option<ChainPolicy>,
    pub chains: BTreeMap<String, Vec<String>>,
}

/// What a look has made of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LegacyFilter {
    #[default]
    Unused,
    Table(LegacyTable),
    /// In use, and its program is missing or fails.
    Unreadable(String),
}

impl LegacyFilter {
    pub fn table(&self) -> Option<&LegacyTable> {
        match self {
            Self::Table(table) => Some(table),
            Self::Unused | Self::Unreadable(_) => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step<'a> {
    On,
    Accept,
    Drop,
    Return,
    Jump(&'a str),
    Goto(&'a str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Accepted,
    Dropped(Option<usize>),
    Returned,
}

impl LegacyTable {
    pub fn parse(saved: &str) -> Self {
        let mut table = Self::default();
        for line in saved.lines() {
            if let Some(rest) = line.strip_prefix(':') {
                let mut words = rest.split_whitespace();
                let (name, policy) = (words.next().unwrap_or_default(), words.next());
                table.chains.entry(name.to_owned()).or_default();
                if name == FORWARD {
                    table.policy = policy.map(|policy| match policy {
                        "DROP" => ChainPolicy::Drop,
                        _ => ChainPolicy::Accept,
                    });
                }
            } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|r| r.split_once(' ')) {
                table.chains.entry(chain.to_owned()).or_default().push(rule.to_owned());
            }
        }
        table
    }

    fn forward(&self) -> &[String] {
        self.chains.get(FORWARD).map(Vec::as_slice).unwrap_or_default()
    }

    fn fate(&self) -> Fate {
        match self.walk(self.forward(), MAX_DEPTH) {
            Fate::Returned if self.policy == Some(ChainPolicy::Drop) => Fate::Dropped(None),
            Fate::Returned => Fate::Accepted,
            decided => decided,
        }
    }

    fn walk(&self, rules: &[String], depth: u32) -> Fate {
        let call = |name: &str| match (self.chains.get(name), depth) {
            (Some(rules), 1..) => self.walk(rules, depth - 1),
            _ => Fate::Returned,
        };
        for (at, rule) in rules.iter().enumerate() {
            let fate = match step(rule) {
                Step::On => continue,
                Step::Accept => Fate::Accepted,
                Step::Drop => Fate::Dropped(None),
                Step::Return => return Fate::Returned,
                Step::Jump(name) => match call(name) {
                    Fate::Returned => continue,
                    decided => decided,
                },
                Step::Goto(name) => call(name),
            };
            return if matches!(fate, Fate::Dropped(_)) { Fate::Dropped(Some(at)) } else { fate };
        }
        Fate::Returned
    }

    /// The input of `iptables-restore --noflush` after which exactly `rules` are there of ours, before what drops.
    /// One commit, so that no packet meets half of it. `None`: nothing is to be done.
    pub fn edit(&self, rules: &[String]) -> Option<String> {
        let ours: Vec<&String> = self.forward().iter().filter(|rule| is_marked(rule)).collect();
        if ours.is_empty() && rules.is_empty() {
            return None;
        }
        let mut others = self.clone();
        if let Some(forward) = others.chains.get_mut(FORWARD) {
            forward.retain(|rule| !is_marked(rule));
        }
        let deletions = ours.iter().map(|rule| format!("-D {FORWARD} {rule}\n"));
        let additions = rules.iter().enumerate().map(|(n, rule)| match others.fate() {
            // Places count from 1.
            Fate::Dropped(Some(at)) => format!("-I {FORWARD} {} {rule}\n", at + 1 + n),
            _ => format!("-A {FORWARD} {rule}\n"),
        });
        Some(format!("*filter\n{}{}COMMIT\n", deletions.collect::<String>(), additions.collect::<String>()))
    }
}

fn is_marked(rule: &str) -> bool {
    rule.contains(&format!("--comment \"{MARK}\""))
}

/// A rule without a condition begins with its target, a comment apart.
fn step(rule: &str) -> Step<'_> {
    let mut rest = rule.trim();
    if let Some(comment) = rest.strip_prefix("-m comment --comment ") {
        let quoted = comment.strip_prefix('"').and_then(|text| text.split_once("\" "));
        rest = quoted.or_else(|| comment.split_once(' ')).map_or("", |(_, after)| after);
    }
    let mut words = rest.split_whitespace();
    match (words.next(), words.next()) {
        (Some("-j"), Some("ACCEPT")) => Step::Accept,
        (Some("-j"), Some("DROP" | "REJECT")) => Step::Drop,
        (Some("-j"), Some("RETURN")) => Step::Return,
        (Some("-j"), Some(chain)) => Step::Jump(chain),
        (Some("-g"), Some(chain)) => Step::Goto(chain),
        _ => Step::On,
    }
}

fn accepts(network: Subnet) -> Vec<String> {
    ["-s", "-d"].map(|side| format!("{side} {network} -m comment --comment \"{MARK}\" -j ACCEPT")).into()
}

pub(super) fn desired(networks: &Networks, seen: &Ruleset) -> Option<Part> {
    let drops = seen.legacy.table().is_some_and(|table| matches!(table.fate(), Fate::Dropped(_)));
    let v4 = networks.families().find(|(family, _)| *family == Family::Ip)?;
    drops.then(|| Part::Legacy { rules: accepts(v4.1), in_place: true })
}

pub(super) fn found(table: &LegacyTable) -> Option<Part> {
    let rules: Vec<String> = table.forward().iter().filter(|rule| is_marked(rule)).cloned().collect();
    let end = match table.fate() {
        Fate::Dropped(Some(at)) => at,
        _ => table.forward().len(),
    };
    let start = end.checked_sub(rules.len());
    let in_place = start.is_some_and(|start| table.forward()[start..end].iter().all(|rule| is_marked(rule)));
    (!rules.is_empty()).then_some(Part::Legacy { rules, in_place })
}
