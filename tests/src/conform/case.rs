//! What a case is, and what comes of it.

use anyhow::anyhow;

use super::container::Refusal;
use super::stand::{Pool, Stand};
use super::tamper::{Hand, Tampering};

/// Cases that belong together.
#[derive(Debug)]
pub struct Group {
    pub name: &'static str,
    pub title: &'static str,
    pub cases: &'static [Case],
}

#[derive(Debug)]
pub struct Case {
    pub name: &'static str,
    /// What a good plugin does.
    pub says: &'static str,
    pub pool: Pool,
    /// On a node of its own.
    pub alone: bool,
    pub body: Body,
}

#[derive(Debug)]
pub enum Body {
    /// Each of these invocations is refused, and leaves nothing.
    Refusals(&'static [Refusal]),
    /// ADD, somebody's hand, CHECK.
    Tamper(Tampering),
    /// Whatever else.
    Run(fn(&Stand) -> Checked),
}

/// What a plugin did otherwise than expected, or what kept the harness from finding out.
#[derive(Debug)]
pub enum Finding {
    Red {
        /// The same at every run: it is printed in the matrix's page.
        says: String,
        /// What was seen, with names and numbers of this run.
        seen: String,
    },
    Broken(anyhow::Error),
}

pub type Checked<T = ()> = Result<T, Finding>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Green,
    Red {
        says: String,
        seen: String,
    },
    /// The plugin cannot have the case: why.
    ByDesign(&'static str),
}

impl Case {
    pub const fn run(name: &'static str, says: &'static str, body: fn(&Stand) -> Checked) -> Self {
        Self { name, says, pool: Pool::Ordinary, alone: false, body: Body::Run(body) }
    }

    /// The same on a node where no other case has been, and none will be.
    pub const fn alone(self) -> Self {
        Self { alone: true, ..self }
    }

    /// The same with a pool of thirteen addresses.
    pub const fn in_small_pool(self) -> Self {
        Self { pool: Pool::Small, ..self }
    }

    pub const fn refusals(name: &'static str, says: &'static str, refusals: &'static [Refusal]) -> Self {
        Self { name, says, pool: Pool::Ordinary, alone: false, body: Body::Refusals(refusals) }
    }

    /// CHECK must name one of `words`.
    pub const fn tamper(
        name: &'static str,
        says: &'static str,
        hand: Hand,
        words: &'static [&'static str],
    ) -> Self {
        Self { name, says, pool: Pool::Ordinary, alone: true, body: Body::Tamper(Tampering { hand, words }) }
    }

    /// Whether another case may follow on the same node.
    pub(super) fn leaves_order(&self) -> bool {
        !self.alone
    }

    pub(super) fn judge(&self, stand: &Stand) -> Checked {
        match &self.body {
            Body::Refusals(refusals) => refusals.iter().try_for_each(|refusal| refusal.judge(stand)),
            Body::Tamper(tampering) => tampering.judge(stand),
            Body::Run(run) => run(stand),
        }
    }
}

impl From<anyhow::Error> for Finding {
    fn from(error: anyhow::Error) -> Self {
        Self::Broken(error)
    }
}

impl From<std::io::Error> for Finding {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(anyhow!(error))
    }
}

/// A finding unless `holds`.
pub fn expect(holds: bool, says: impl Into<String>, seen: impl ToString) -> Checked {
    if holds { Ok(()) } else { Err(red(says, seen)) }
}

pub fn red(says: impl Into<String>, seen: impl ToString) -> Finding {
    Finding::Red { says: says.into(), seen: seen.to_string() }
}
