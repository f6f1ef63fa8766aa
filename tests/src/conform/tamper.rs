//! Somebody alters what ADD made; CHECK must say what, or must not mind.

use anyhow::{Context as _, Result};

use super::case::{Checked, expect};
use super::container::{Container, refused, shown, silent};
use super::stand::Stand;

/// `{address}`, `{gateway}` and `{veth}` (the end on the node) stand for the container's.
#[derive(Debug)]
pub enum Hand {
    /// `ip` in the container.
    Inside(&'static str),
    /// `ip` on the node.
    OnNode(&'static str),
    /// `bridge` on the node.
    Bridge(&'static str),
    /// A key below `/proc/sys/net` of the node, and its value.
    Sysctl(&'static str, &'static str),
}

#[derive(Debug)]
pub struct Tampering {
    pub hand: Hand,
    /// One of them must be in CHECK's error, in whatever case; none: CHECK must succeed.
    pub words: &'static [&'static str],
}

impl Tampering {
    pub fn judge(&self, stand: &Stand) -> Checked {
        let container = stand.container()?;
        let result = container.add()?;
        silent(&container.check(&result)?, "CHECK right after ADD")?;
        let address = container.addresses()?.into_iter().next().context("an address")?;
        let address = address.split('/').next().unwrap_or_default().to_owned();
        let gateway = stand.subnet().gateway().to_string();
        let veth = container.host_end()?["ifname"].as_str().context("a name")?.to_owned();
        let fill = |text: &str| {
            text.replace("{address}", &address).replace("{gateway}", &gateway).replace("{veth}", &veth)
        };
        let alter = || self.hand.act(stand, &container, &fill);
        if self.words.is_empty() {
            alter()?;
            return silent(&container.check(&result)?, "CHECK");
        }
        let outcome = stand.unattended(|| alter().and_then(|()| container.check(&result)))?;
        let refused = refused(&outcome, "CHECK")?;
        let text = refused.text.to_lowercase();
        let named = self.words.iter().any(|word| text.contains(&fill(word).to_lowercase()));
        expect(named, "CHECK fails without saying what is altered", shown(&outcome))
    }
}

impl Hand {
    fn act(&self, stand: &Stand, container: &Container<'_>, fill: &dyn Fn(&str) -> String) -> Result<()> {
        match self {
            Self::Inside(words) => container.netns.ip(&fill(words)).map(drop),
            Self::OnNode(words) => stand.netns().ip(&fill(words)).map(drop),
            Self::Bridge(words) => stand.netns().bridge(&fill(words)).map(drop),
            Self::Sysctl(key, value) => stand.netns().set_sysctl(&fill(key), value),
        }
    }
}
