//! The conformance suite, a test for each group of cases, so that a failure is named: weft is without fault, and what
//! docs/conformance.md says of the reference is true.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::conform::case::Verdict;
use e2e::conform::matrix::{self, Column};
use e2e::conform::subject::Subject;
use e2e::conform::{GROUPS, group, run, run_group};

/// Every case of a group.
fn without_fault(name: &str) -> Result<()> {
    let subject = Subject::weft()?;
    let group = group(name)?;
    let verdicts = run_group(&subject, group, &mut |_, _| ())?;
    let faults: Vec<String> = group
        .cases
        .iter()
        .zip(verdicts)
        .filter(|(_, verdict)| *verdict != Verdict::Green)
        .map(|(case, verdict)| format!("{name}/{}: {verdict:?}", case.name))
        .collect();
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// A test for each group; one that is forgotten here fails [`every_group_is_here`].
macro_rules! groups {
    ($($name:ident)*) => {
        $(#[test] fn $name() -> Result<()> { without_fault(stringify!($name)) })*
        const HERE: &[&str] = &[$(stringify!($name)),*];
    };
}

groups! {
    protocol version results streams idempotency check gc status chaining capabilities addresses options
}

#[test]
fn every_group_is_here() {
    let here: BTreeSet<_> = HERE.iter().copied().collect();
    assert_eq!(here, GROUPS.iter().map(|group| group.name).collect());
}

#[test]
fn the_page_says_what_the_reference_does() -> Result<()> {
    let weft = Subject::weft()?;
    let reference = run(&Subject::reference()?, &mut |_, _, _| ())?;
    let page = matrix::page(&[Column::green(&weft.name, &weft.is), reference]);
    let written = include_str!("../../docs/conformance.md");
    let difference = page.lines().zip(written.lines()).find(|(now, then)| now != then);
    if let Some((now, then)) = difference {
        Err(anyhow::anyhow!("the page says\n{then}\nand it is\n{now}"))
            .context("scripts/conform writes it anew")?;
    }
    ensure!(page == written, "the page is longer or shorter: scripts/conform writes it anew");
    Ok(())
}

/// A case that neither a plugin that always says yes nor one that always says no can fail asks nothing.
#[test]
fn every_case_can_be_failed() -> Result<()> {
    let [yes, no] = ["/usr/bin/true", "/usr/bin/false"].map(|program| -> Result<Column> {
        run(&Subject::at("any", Path::new(program))?, &mut |_, _, _| ())
    });
    let (yes, no) = (yes?, no?);
    let mut asks_nothing = Vec::new();
    for (place, group) in GROUPS.iter().enumerate() {
        for (row, case) in group.cases.iter().enumerate() {
            let verdicts = [&yes.groups[place][row], &no.groups[place][row]];
            if verdicts.iter().all(|verdict| **verdict == Verdict::Green) {
                asks_nothing.push(format!("{}/{}", group.name, case.name));
            }
        }
    }
    ensure!(asks_nothing.is_empty(), "{asks_nothing:?}");
    Ok(())
}

/// No two cases of a group have one name, by which the page and the subjects know them.
#[test]
fn names_are_told_apart() {
    for group in GROUPS {
        let names: BTreeSet<_> = group.cases.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), group.cases.len(), "{}", group.name);
    }
}
