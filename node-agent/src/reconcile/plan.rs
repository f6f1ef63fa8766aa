//! From what is there to what should be: the operations, in an order that never breaks what works.
//!
//! Creation in the order of [`Key`], then removal in reverse: a change is a replacement, made before anything is
//! taken away. Pure; `plan(d, d)` is empty.

use std::collections::BTreeSet;

use weft_shared::IfName;

use crate::object::{Desired, Key, Object, Observed, Op};

/// `may_remove` stays false until the first full snapshot: before it nobody knows what is stale.
pub fn plan(desired: &Desired, observed: &Observed, may_remove: bool) -> Vec<Op> {
    // Everything else is told by names: the next look sees them right.
    if !observed.renamed.is_empty() {
        let names = observed.renamed.iter();
        let object = |(name, now): (&IfName, &IfName)| Object::Name { name: name.clone(), now: now.clone() };
        return names.map(object).map(|object| Op::Set { object, found: None }).collect();
    }
    let mut ops = Vec::new();
    let mut recreated: BTreeSet<&IfName> = BTreeSet::new();
    for (key, object) in desired.objects() {
        if observed.denies(object) {
            continue;
        }
        // What stands under a wanted route's key may be one by the tunnel, while the wanted one is not: to replace what
        // is gone would be to replace a foreign route beside it.
        let gone = |object: &Object| object.stands_on().is_some_and(|dev| recreated.contains(dev));
        let found = observed.objects.get(key).filter(|found| !gone(object) && !gone(&found.object));
        match found {
            Some(found) if object.satisfied_by(&found.object) && !found.overruled => continue,
            Some(found) if object.needs_recreation(&found.object) => {
                if let Key::Link(name) = key {
                    recreated.insert(name);
                }
            }
            // A port is altered, never made: the pair comes from the plugin and goes with the container.
            None if matches!(key, Key::BridgePort(_)) => continue,
            _ => {}
        }
        ops.push(Op::Set { object: object.clone(), found: found.cloned() });
    }
    if may_remove {
        let surplus = observed.surplus.iter();
        let stale =
            observed.objects.iter().rev().filter(|(key, found)| found.ours && desired.get(key).is_none());
        let mut removals: Vec<&Object> = surplus.chain(stale.map(|(_, found)| &found.object)).collect();
        removals.retain(|object| object.stands_on().is_none_or(|dev| !recreated.contains(dev)));
        removals.retain(|object| !observed.denies(object));
        removals.sort_by_key(|object| std::cmp::Reverse(object.key()));
        ops.extend(removals.into_iter().cloned().map(Op::Remove));
    }
    ops
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
