//! What can be measured, by the names that `--only` and the output use: plugins, how many calls at once, host ports.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::bench::choice::some_or_all;

/// What wires the pods of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Plugin {
    Floor,
    Weft,
    Reference,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Load {
    #[serde(rename = "alone")]
    Alone,
    #[serde(rename = "10")]
    Ten,
    #[serde(rename = "50")]
    Fifty,
    #[serde(rename = "100")]
    Hundred,
}

/// What each pod publishes on the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostPorts {
    #[serde(rename = "no-port")]
    None,
    #[serde(rename = "port")]
    One,
}

/// One of each kind at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    pub plugins: Vec<Plugin>,
    pub loads: Vec<Load>,
    pub host_ports: Vec<HostPorts>,
}

impl Plugin {
    pub const ALL: [Self; 3] = [Self::Floor, Self::Weft, Self::Reference];

    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Weft => "weft",
            Self::Reference => "reference",
        }
    }

    /// For people.
    pub fn title(self, host_ports: HostPorts) -> &'static str {
        match (self, host_ports) {
            (Self::Floor, _) => "floor program",
            (Self::Weft, _) => "weft",
            (Self::Reference, HostPorts::None) => "bridge + host-local",
            (Self::Reference, HostPorts::One) => "bridge + host-local + portmap",
        }
    }

    /// The floor program publishes nothing.
    pub fn can(self, host_ports: HostPorts) -> bool {
        self != Self::Floor || host_ports == HostPorts::None
    }
}

impl Load {
    pub const ALL: [Self; 4] = [Self::Alone, Self::Ten, Self::Fifty, Self::Hundred];

    pub fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Ten => "10",
            Self::Fifty => "50",
            Self::Hundred => "100",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Ten => "10 at once",
            Self::Fifty => "50 at once",
            Self::Hundred => "100 at once",
        }
    }

    /// How many calls run at once.
    pub fn at_once(self) -> usize {
        match self {
            Self::Alone => 1,
            Self::Ten => 10,
            Self::Fifty => 50,
            Self::Hundred => 100,
        }
    }
}

impl HostPorts {
    pub const ALL: [Self; 2] = [Self::None, Self::One];

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "no-port",
            Self::One => "port",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::None => "without a port mapping",
            Self::One => "with a port mapping each",
        }
    }
}

impl Selection {
    pub fn everything() -> Self {
        Self { plugins: Plugin::ALL.into(), loads: Load::ALL.into(), host_ports: HostPorts::ALL.into() }
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
        let selection = Self {
            plugins: some_or_all(everything.plugins, |p| wanted.contains(p.name())),
            loads: some_or_all(everything.loads, |l| wanted.contains(l.name())),
            host_ports: some_or_all(everything.host_ports, |p| wanted.contains(p.name())),
        };
        if selection.cells().next().is_none() {
            bail!(
                "--only floor,port: expected a plugin that maps ports, or no-port: the floor program maps none"
            );
        }
        Ok(selection)
    }

    /// What a round measures.
    pub fn cells(&self) -> impl Iterator<Item = (HostPorts, Load, Plugin)> {
        let of_load = |host_ports: HostPorts, load: Load| {
            let able = self.plugins.iter().filter(move |plugin| plugin.can(host_ports));
            able.map(move |plugin| (host_ports, load, *plugin))
        };
        let of_ports = move |host_ports: &HostPorts| {
            let host_ports = *host_ports;
            self.loads.iter().flat_map(move |load| of_load(host_ports, *load))
        };
        self.host_ports.iter().flat_map(of_ports)
    }
}

fn known_names() -> impl Iterator<Item = &'static str> {
    let plugins = Plugin::ALL.iter().map(|p| p.name());
    plugins.chain(Load::ALL.iter().map(|l| l.name())).chain(HostPorts::ALL.iter().map(|p| p.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_narrow_their_own_kind_only() -> Result<()> {
        let selection = Selection::of(["weft", "floor", "100"])?;
        assert_eq!(selection.plugins, [Plugin::Floor, Plugin::Weft], "in their order");
        assert_eq!((selection.loads.as_slice(), selection.host_ports.len()), ([Load::Hundred].as_slice(), 2));
        assert_eq!(selection.cells().count(), 3, "the floor program has no port mapping");
        assert_eq!(Selection::of([])?, Selection::everything());
        Ok(())
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for (names, expected) in [
            (vec!["weft", "wefd"], "\"wefd\": expected some of floor, weft, reference"),
            (vec!["floor", "port"], "maps none"),
        ] {
            let text = Selection::of(names).expect_err("nothing to measure").to_string();
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn no_name_means_two_things_and_json_uses_the_same_names() -> Result<()> {
        let names: Vec<&str> = known_names().collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
        for plugin in Plugin::ALL {
            assert_eq!(serde_json::to_value(plugin)?, plugin.name());
        }
        for load in Load::ALL {
            assert_eq!(serde_json::to_value(load)?, load.name());
        }
        for host_ports in HostPorts::ALL {
            assert_eq!(serde_json::to_value(host_ports)?, host_ports.name());
        }
        Ok(())
    }
}
