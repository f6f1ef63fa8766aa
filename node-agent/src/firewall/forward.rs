//! The host's own chains on the forward hook: which of them drop what nobody speaks for, and where our accepts belong.

use std::collections::BTreeMap;

use weft_shared::Subnet;

use super::rule::{MARK, Side, Step, of_family, within};
use super::{ChainId, ChainPolicy, Expr, Family, Networks, Part, Rule, Ruleset};

/// Chains that call each other without end are refused by the kernel; this is for what one look may read.
const MAX_DEPTH: u32 = 16;

/// A base chain of somebody else's, and the chains that it leads to without a condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostChain {
    pub id: ChainId,
    pub policy: ChainPolicy,
    pub keeper: Keeper,
    pub rules: Vec<Rule>,
    pub called: BTreeMap<String, Vec<Rule>>,
}

/// Who may write into a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeper {
    Anybody,
    /// Rebuilds the table as a whole, and has commands of its own to let something through.
    Firewalld,
    /// The table belongs to a process (`NFT_TABLE_F_OWNER`): the kernel lets nobody else write.
    Process,
}

/// What becomes of a packet that no condition of a chain speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Accepted,
    /// By the rule at this place of the base chain; by the policy if there is none.
    Dropped(Option<usize>),
    /// Only of a chain that was called: the caller goes on.
    Returned,
}

impl HostChain {
    pub fn fate(&self, family: Family) -> Fate {
        match walk(&self.rules, family, &self.called, MAX_DEPTH) {
            Fate::Returned if self.policy == ChainPolicy::Drop => Fate::Dropped(None),
            Fate::Returned => Fate::Accepted,
            decided => decided,
        }
    }

    /// The families of `networks` whose packets this chain drops.
    pub fn drops(&self, networks: &Networks) -> Vec<(Family, Subnet)> {
        let of_this = networks.families().filter(|(family, _)| self.id.table.family.sees(*family));
        of_this.filter(|(family, _)| matches!(self.fate(*family), Fate::Dropped(_))).collect()
    }

    /// Somebody has let this network through already, in words of his own.
    pub fn speaks_for(&self, network: Subnet) -> bool {
        let all = self.rules.iter().chain(self.called.values().flatten());
        all.filter(|rule| {
            rule.exprs.iter().any(|e| matches!(e, Expr::Accept | Expr::Jump(_) | Expr::Goto(_)))
        })
        .any(|rule| rule.prefix(Side::Source).is_some_and(|from| from.covers(network)))
    }

    /// Whether ours are the last before what drops: behind everything that somebody decided, however late.
    fn in_place(&self) -> bool {
        let end = place(self).unwrap_or(self.rules.len());
        let ours = self.rules.iter().filter(|rule| rule.is_marked()).count();
        end.checked_sub(ours).is_some_and(|start| self.rules[start..end].iter().all(Rule::is_marked))
    }
}

fn walk(rules: &[Rule], family: Family, called: &BTreeMap<String, Vec<Rule>>, depth: u32) -> Fate {
    let call = |name: &String| match (called.get(name), depth) {
        (Some(rules), 1..) => walk(rules, family, called, depth - 1),
        _ => Fate::Returned,
    };
    for (at, rule) in rules.iter().enumerate() {
        let fate = match rule.step(family) {
            Step::On => continue,
            Step::Accept => Fate::Accepted,
            Step::Drop => Fate::Dropped(None),
            Step::Return => return Fate::Returned,
            Step::Jump(name) => match call(&name) {
                Fate::Returned => continue,
                decided => decided,
            },
            Step::Goto(name) => call(&name),
        };
        return if matches!(fate, Fate::Dropped(_)) { Fate::Dropped(Some(at)) } else { fate };
    }
    Fate::Returned
}

/// The accepts that a chain of this family needs for these networks.
fn accepts(chain: Family, networks: &[(Family, Subnet)]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for (family, network) in networks {
        for side in [Side::Source, Side::Destination] {
            let mut conditions = vec![within(side, *network, true)];
            if chain == Family::Inet {
                conditions.insert(0, of_family(*family));
            }
            rules.push(Rule::new(conditions, Expr::Accept).with_comment(MARK));
        }
    }
    rules
}

pub(super) fn desired(networks: &Networks, seen: &Ruleset) -> Vec<Part> {
    let open = seen.forward.iter().filter(|chain| chain.keeper == Keeper::Anybody);
    open.filter_map(|chain| {
        let dropped = chain.drops(networks);
        let rules = accepts(chain.id.table.family, &dropped);
        let part = Part::Accepts { chain: chain.id.clone(), rules, in_place: true };
        (!dropped.is_empty()).then_some(part)
    })
    .collect()
}

pub(super) fn found(chain: &HostChain) -> Option<Part> {
    let rules: Vec<Rule> = chain.rules.iter().filter(|rule| rule.is_marked()).cloned().collect();
    let present = !rules.is_empty();
    present.then(|| Part::Accepts { chain: chain.id.clone(), rules, in_place: chain.in_place() })
}

/// The place of the first rule that drops everything; `None`: the policy does, and ours go to the end.
pub(crate) fn place(chain: &HostChain) -> Option<usize> {
    let families = Family::ALL.into_iter().filter(|family| chain.id.table.family.sees(*family));
    let ends = families.filter_map(|family| match chain.fate(family) {
        Fate::Dropped(at) => at,
        _ => None,
    });
    ends.min()
}
