//! The underlay's interfaces as different network cards would have them, set and read back by ethtool(8).
//!
//! A veth passes super-packets unsegmented by default, like a card with every offload. Checksum offload stays on
//! everywhere: hardly any card lacks it, and without it a veth computes sums that no card would leave to the processor.

use std::process::Command;

use anyhow::{Result, ensure};

use super::choice::Setting;
use crate::netns::Netns;

/// ethtool's short name, its long name in `-k`, and whether it is on.
type Feature = (&'static str, &'static str, bool);

pub fn set(netns: &Netns, interface: &str, setting: Setting) -> Result<()> {
    let features = features(setting);
    let mut command = Command::new("ethtool");
    command.args(["-K", interface]);
    for (name, _, is_on) in features {
        command.args([name, on_off(is_on)]);
    }
    netns.run(&mut command)?;
    let listing = netns.run(Command::new("ethtool").args(["-k", interface]))?;
    check(&listing, &features)
}

fn features(setting: Setting) -> [Feature; 4] {
    let (segmentation, gro) = match setting {
        Setting::Full | Setting::TwoCores => (true, false),
        Setting::NoSeg => (false, false),
        Setting::Gro => (false, true),
    };
    [
        ("tso", "tcp-segmentation-offload", segmentation),
        ("gso", "generic-segmentation-offload", segmentation),
        ("tx-udp-segmentation", "tx-udp-segmentation", segmentation),
        ("gro", "generic-receive-offload", gro),
    ]
}

/// The kernel may keep a feature as it was without an error.
fn check(listing: &str, features: &[Feature]) -> Result<()> {
    for (_, name, is_on) in features {
        let found = listing.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
        // Behind the word may stand why: [fixed], [requested on].
        let is_so = found.and_then(|value| value.split(' ').next()) == Some(on_off(*is_on));
        ensure!(is_so, "expected {name} {}, ethtool -k says {found:?}", on_off(*is_on));
    }
    Ok(())
}

fn on_off(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_that_the_kernel_did_not_change_is_an_error() -> Result<()> {
        let listing = |udp: &str| {
            format!(
                "Features for eth0:\ntcp-segmentation-offload: off\n\ttx-tcp-segmentation: off\n\
                 generic-segmentation-offload: off\n\ttx-udp-segmentation: {udp}\n\
                 generic-receive-offload: on\nrx-gro-list: off\n"
            )
        };
        check(&listing("off"), &features(Setting::Gro))?;
        check(&listing("off [requested on]"), &features(Setting::Gro))?;
        for still_on in ["on", "on [fixed]"] {
            let error = check(&listing(still_on), &features(Setting::Gro)).expect_err("still on");
            assert!(error.to_string().contains("expected tx-udp-segmentation off"), "{error}");
        }
        assert!(check(&listing("off"), &features(Setting::NoSeg)).is_err(), "GRO is on");
        Ok(())
    }
}
