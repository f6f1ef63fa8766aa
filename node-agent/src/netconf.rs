//! A network configuration that changes in the store under a running node: what can be applied is, what cannot is
//! said, and what is in force is never torn down for it.

use std::fmt;

use weft_shared::netconf::{BackendConfig, NetworkConfig, Range, UdpConfig, VxlanConfig};

/// What stands in the store in place of the configuration in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigNotice {
    /// Another one, which takes a restart: `Backend.VNI = 7, in force: 1`.
    Differs(Vec<String>),
    /// One that cannot be used: why, by key, value and expectation.
    Invalid(String),
    /// None at all.
    Missing(String),
}

impl ConfigNotice {
    /// As metrics name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Differs(_) => "differs",
            Self::Invalid(_) => "invalid",
            Self::Missing(_) => "missing",
        }
    }
}

impl fmt::Display for ConfigNotice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Differs(changes) => write!(
                f,
                "the store's network configuration differs, needs restart of weftd: {}",
                changes.join("; ")
            ),
            Self::Invalid(why) => write!(f, "the last good one stays in force: {why}"),
            Self::Missing(why) => write!(f, "the last one stays in force: {why}"),
        }
    }
}

/// What of `stored` a running node cannot take over from `in_force`; empty when it can be applied as it is: first and
/// last subnet only say what may be leased next, and whose packets the udp backend believes is part of the peer table,
/// which is replaced whole.
pub fn needs_restart(in_force: &NetworkConfig, stored: &NetworkConfig) -> Vec<String> {
    let mut changes = Changes::default();
    changes.range("", Some(in_force.v4), Some(stored.v4));
    changes.range("IPv6", in_force.v6, stored.v6);
    match (&in_force.backend, &stored.backend) {
        (BackendConfig::Vxlan(old), BackendConfig::Vxlan(new)) => changes.vxlan(old, new),
        (BackendConfig::Udp(old), BackendConfig::Udp(new)) => changes.udp(old, new),
        (old, new) if old.kind() != new.kind() => changes.note("Backend.Type", &old.kind(), &new.kind()),
        _ => {}
    }
    changes.0
}

#[derive(Default)]
struct Changes(Vec<String>);

impl Changes {
    fn note<T: fmt::Display + PartialEq>(&mut self, key: &str, old: &T, new: &T) {
        if old != new {
            self.0.push(format!("{key} = {new}, in force: {old}"));
        }
    }

    fn range(&mut self, family: &str, old: Option<Range>, new: Option<Range>) {
        let network = |range: Option<Range>| range.map_or("none".to_owned(), |r| r.network.to_string());
        self.note(&format!("{family}Network"), &network(old), &network(new));
        let len = |range: Option<Range>| range.filter(|r| !r.any_len).map_or(0, |r| r.subnet_len);
        self.note(&format!("{family}SubnetLen"), &len(old), &len(new));
    }

    fn vxlan(&mut self, old: &VxlanConfig, new: &VxlanConfig) {
        let VxlanConfig { vni, port, mtu: _, gbp, learning, direct_routing } = new;
        let mtu =
            |config: &VxlanConfig| config.mtu.map_or("the interface's".to_owned(), |mtu| mtu.to_string());
        self.note("Backend.VNI", &old.vni, vni);
        self.note("Backend.Port", &old.port, port);
        self.note("Backend.MTU", &mtu(old), &mtu(new));
        self.note("Backend.GBP", &old.gbp, gbp);
        self.note("Backend.Learning", &old.learning, learning);
        self.note("Backend.DirectRouting", &old.direct_routing, direct_routing);
    }

    fn udp(&mut self, old: &UdpConfig, new: &UdpConfig) {
        let UdpConfig { port, strict_source: _, peers_behind_nat: _ } = new;
        self.note("Backend.Port", &old.port, port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).expect(json)
    }

    #[test]
    fn first_and_last_subnet_are_applied_and_everything_else_takes_a_restart() {
        let vxlan = config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let changes = |json: &str| needs_restart(&vxlan, &config(json)).join("; ");
        for (json, expected) in [
            (r#"{"Network":"10.5.0.0/16","SubnetLen":24,"Backend":{"Type":"VXLAN","VNI":1}}"#, ""),
            (
                r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.90.0","Backend":{"Type":"vxlan"}}"#,
                "",
            ),
            (
                r#"{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}"#,
                "Network = 10.6.0.0/16, in force: 10.5.0.0/16",
            ),
            (
                r#"{"Network":"10.5.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan"}}"#,
                "SubnetLen = 25, in force: 24",
            ),
            (
                r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#,
                "Backend.Type = host-gw, in force: vxlan",
            ),
            (
                r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789,"MTU":1400}}"#,
                "Backend.VNI = 7, in force: 1; Backend.Port = 4789, in force: 8472; Backend.MTU = 1400, in force: the interface's",
            ),
            (
                r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#,
                "Backend.DirectRouting = true, in force: false",
            ),
            (
                r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","Learning":true}}"#,
                "Backend.Learning = true, in force: false",
            ),
        ] {
            assert_eq!(changes(json), expected, "{json}");
        }
        assert!(needs_restart(&vxlan, &vxlan).is_empty());
    }

    #[test]
    fn whose_packets_are_believed_is_applied_and_the_port_is_not() {
        let udp =
            |keys: &str| config(&format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"udp"{keys}}}}}"#));
        let policies = udp(r#","StrictSource":true,"PeersBehindNAT":true"#);
        assert!(needs_restart(&udp(""), &policies).is_empty() && udp("") != policies);
        let changes = needs_restart(&udp(""), &udp(r#","Port":9000,"StrictSource":true"#));
        assert_eq!(changes, ["Backend.Port = 9000, in force: 8285"]);
        let absent = config(r#"{"Network":"10.5.0.0/16"}"#);
        assert!(needs_restart(&udp(""), &absent).is_empty(), "absent is udp");
    }

    #[test]
    fn a_notice_says_what_to_do() {
        let notice = ConfigNotice::Differs(vec!["Backend.VNI = 7, in force: 1".into()]).to_string();
        assert!(notice.contains("differs, needs restart") && notice.ends_with("in force: 1"), "{notice}");
    }
}
