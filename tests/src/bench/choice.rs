//! What can be measured, by the names that `--only` and the output use: configurations, settings of the underlay and
//! the cores, loads.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// What carries the packets between two pods, or between the nodes themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Configuration {
    Node,
    HostGw,
    Vxlan,
    Udp,
    UdpPlain,
    Naive,
}

/// How the underlay's interfaces are set, and what everything runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Setting {
    Full,
    NoSeg,
    Gro,
    TwoCores,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Load {
    #[serde(rename = "tcp-1")]
    Tcp1,
    #[serde(rename = "tcp-4")]
    Tcp4,
    #[serde(rename = "udp-1")]
    Udp1,
    #[serde(rename = "udp-64")]
    Udp64,
    #[serde(rename = "rr-1")]
    Exchange1,
    #[serde(rename = "rr-16")]
    Exchange16,
}

/// One of each kind at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    pub configurations: Vec<Configuration>,
    pub settings: Vec<Setting>,
    pub loads: Vec<Load>,
}

impl Configuration {
    pub const ALL: [Self; 6] =
        [Self::Node, Self::HostGw, Self::Vxlan, Self::Udp, Self::UdpPlain, Self::Naive];

    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::HostGw => "host-gw",
            Self::Vxlan => "vxlan",
            Self::Udp => "udp",
            Self::UdpPlain => "udp-plain",
            Self::Naive => "naive",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Node => "node to node",
            Self::HostGw => "host-gw",
            Self::Vxlan => "vxlan",
            Self::Udp => "udp",
            Self::UdpPlain => "udp, offloads off",
            Self::Naive => "one packet per system call",
        }
    }
}

impl Setting {
    pub const ALL: [Self; 4] = [Self::Full, Self::NoSeg, Self::Gro, Self::TwoCores];

    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::NoSeg => "no-seg",
            Self::Gro => "gro",
            Self::TwoCores => "two-cores",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Full => "one core, underlay with full offload",
            Self::NoSeg => "one core, underlay without segmentation offload",
            Self::Gro => "one core, underlay with GRO only",
            Self::TwoCores => "two cores, underlay with full offload",
        }
    }

    pub fn is_pinned(self) -> bool {
        self != Self::TwoCores
    }
}

impl Load {
    pub const ALL: [Self; 6] =
        [Self::Tcp1, Self::Tcp4, Self::Udp1, Self::Udp64, Self::Exchange1, Self::Exchange16];

    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp-1",
            Self::Tcp4 => "tcp-4",
            Self::Udp1 => "udp-1",
            Self::Udp64 => "udp-64",
            Self::Exchange1 => "rr-1",
            Self::Exchange16 => "rr-16",
        }
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Selection {
    pub fn everything() -> Self {
        Self {
            configurations: Configuration::ALL.into(),
            settings: Setting::ALL.into(),
            loads: Load::ALL.into(),
        }
    }

    /// Names of any kind. A kind of which none is named stays whole; no name at all is everything.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut wanted = BTreeSet::new();
        for name in names {
            if !known_names().any(|known| known == name) {
                bail!("--only {name:?}: expected some of {}", known_names().collect::<Vec<_>>().join(", "));
            }
            wanted.insert(name);
        }
        let everything = Self::everything();
        Ok(Self {
            configurations: some_or_all(everything.configurations, |c| wanted.contains(c.name())),
            settings: some_or_all(everything.settings, |s| wanted.contains(s.name())),
            loads: some_or_all(everything.loads, |l| wanted.contains(l.name())),
        })
    }

    /// How many measurements a round has.
    pub fn cells(&self) -> usize {
        self.configurations.len() * self.settings.len() * self.loads.len()
    }
}

fn known_names() -> impl Iterator<Item = &'static str> {
    let configurations = Configuration::ALL.iter().map(|c| c.name());
    configurations.chain(Setting::ALL.iter().map(|s| s.name())).chain(Load::ALL.iter().map(|l| l.name()))
}

pub(super) fn some_or_all<T: Copy>(all: Vec<T>, is_wanted: impl Fn(&T) -> bool) -> Vec<T> {
    let some: Vec<T> = all.iter().copied().filter(is_wanted).collect();
    if some.is_empty() { all } else { some }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_narrow_their_own_kind_only() -> Result<()> {
        let selection = Selection::of(["naive", "node", "tcp-1"])?;
        assert_eq!(selection.configurations, [Configuration::Node, Configuration::Naive], "in their order");
        assert_eq!(selection.settings, Setting::ALL);
        assert_eq!(selection.loads, [Load::Tcp1]);
        assert_eq!(selection.cells(), 8);
        assert_eq!(Selection::of([])?, Selection::everything());
        Ok(())
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_that_exist() {
        let text = Selection::of(["udp", "upd"]).expect_err("no such name").to_string();
        assert!(text.contains("\"upd\"") && text.contains("udp-plain") && text.contains("rr-16"), "{text}");
    }

    #[test]
    fn no_name_means_two_things_and_json_uses_the_same_names() -> Result<()> {
        let names: Vec<&str> = known_names().collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
        for configuration in Configuration::ALL {
            assert_eq!(serde_json::to_value(configuration)?, configuration.name());
        }
        for setting in Setting::ALL {
            assert_eq!(serde_json::to_value(setting)?, setting.name());
        }
        for load in Load::ALL {
            assert_eq!(serde_json::to_value(load)?, load.name());
        }
        Ok(())
    }
}
