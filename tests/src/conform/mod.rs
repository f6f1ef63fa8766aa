//! A black-box suite for CNI plugins: any executable, called as a runtime calls it, judged by what it prints and by what
//! the kernel holds afterwards.
//!
//! ```text
//! Subject (how a plugin is called) --> Stand (a node of its own) --> Case (what is done, what is expected) --> Verdict
//!                                                                                        Matrix: verdicts as a page
//! ```
//! What is expected is the specification's (SPEC.md, sections 2 to 5), the behaviour of the reference `bridge` where the
//! specification is silent, and what both leave undone where runtimes need it. A case knows no plugin: what differs
//! from one to the next is in its [`subject::Subject`], and so is what one cannot have by design.

pub mod case;
pub mod container;
mod groups;
pub mod matrix;
pub mod schema;
pub mod stand;
pub mod subject;
pub mod tamper;

use anyhow::{Result, ensure};

use self::case::{Finding, Group, Verdict};
use self::matrix::Column;
use self::stand::Stand;
use self::subject::Subject;

pub use self::groups::GROUPS;

/// The group of that name.
pub fn group(name: &str) -> Result<&'static Group> {
    let names: Vec<_> = GROUPS.iter().map(|group| group.name).collect();
    ensure!(names.contains(&name), "no group {name:?}: expected one of {}", names.join(", "));
    Ok(GROUPS.iter().find(|group| group.name == name).unwrap_or(&GROUPS[0]))
}

/// Runs every case of a group; an error means that there is no node to run them on.
pub fn run_group(
    subject: &Subject,
    group: &Group,
    told: &mut dyn FnMut(&str, &Verdict),
) -> Result<Vec<Verdict>> {
    let mut stand: Option<Stand> = None;
    let mut verdicts = Vec::new();
    for case in group.cases {
        if let Some(why) = subject.lacks(group.name, case.name) {
            verdicts.push(Verdict::ByDesign(why));
            continue;
        }
        let here = match stand.take() {
            Some(used) if !case.alone && used.is_as_new()? => used,
            _ => Stand::new(subject, case.pool)?,
        };
        let verdict = match case.judge(&here) {
            Ok(()) => Verdict::Green,
            Err(Finding::Red { says, seen }) => Verdict::Red { says, seen },
            // The plugin's fault or not: nobody has seen that the promise is kept.
            Err(Finding::Broken(error)) => {
                Verdict::Red { says: "the case could not be carried out".into(), seen: format!("{error:#}") }
            }
        };
        told(case.name, &verdict);
        // What a red case leaves is nobody else's trouble, nor is what a hand has done, nor a pool of another size.
        let next = group.cases.get(verdicts.len() + 1);
        if verdict == Verdict::Green && case.leaves_order() && next.is_some_and(|next| next.pool == case.pool)
        {
            stand = Some(here);
        }
        verdicts.push(verdict);
    }
    Ok(verdicts)
}

/// Runs everything; `told` hears of each group, case and verdict.
pub fn run(subject: &Subject, told: &mut dyn FnMut(&str, &str, &Verdict)) -> Result<Column> {
    let mut one =
        |group: &Group| run_group(subject, group, &mut |case, verdict| told(group.name, case, verdict));
    let groups = GROUPS.iter().map(&mut one).collect::<Result<_>>()?;
    Ok(Column { name: subject.name.clone(), is: subject.is.clone(), groups })
}
