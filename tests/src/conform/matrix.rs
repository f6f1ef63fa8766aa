//! Verdicts as a matrix, plugin by case: for a terminal, and as the page `docs/conformance.md`.
//!
//! The page has nothing in it that differs from one run to the next, so that a test can compare it.

use std::fmt::Write as _;

use super::GROUPS;
use super::case::Verdict;

/// What one plugin did, by group in the order of [`GROUPS`] and by case in the group's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    /// In words.
    pub is: String,
    pub groups: Vec<Vec<Verdict>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    pub green: usize,
    pub red: usize,
    pub by_design: usize,
}

impl Column {
    /// Of a plugin without a fault.
    pub fn green(name: &str, is: &str) -> Self {
        let groups = GROUPS.iter().map(|group| vec![Verdict::Green; group.cases.len()]).collect();
        Self { name: name.into(), is: is.into(), groups }
    }

    pub fn count(&self) -> Count {
        let mut count = Count::default();
        for verdict in self.groups.iter().flatten() {
            match verdict {
                Verdict::Green => count.green += 1,
                Verdict::Red { .. } => count.red += 1,
                Verdict::ByDesign(_) => count.by_design += 1,
            }
        }
        count
    }
}

impl Verdict {
    pub fn mark(&self) -> &'static str {
        match self {
            Self::Green => "yes",
            Self::Red { .. } => "**no**",
            Self::ByDesign(_) => "–",
        }
    }
}

/// The page, without a first column's numbers of this run.
pub fn page(columns: &[Column]) -> String {
    let mut page = String::from(
        "<!-- Made by scripts/conform: a test compares it with what the plugins do. -->\n\
         # Conformance\n\n\
         Every case is one promise of the [CNI specification](https://www.cni.dev/docs/spec/) or, where that is silent, of what \
         runtimes and users of flannel rely on. A plugin is called as a runtime calls it and judged by what it prints and by what \
         the kernel holds afterwards; `scripts/conform --plugin NAME=PATH` judges another one.\n\n",
    );
    for column in columns {
        let Count { green, red, by_design } = column.count();
        let _ = writeln!(
            page,
            "- **{}**: {}. {green} yes, {red} no, {by_design} not to be asked (–).",
            column.name, column.is
        );
    }
    for (place, group) in GROUPS.iter().enumerate() {
        let names: Vec<_> = columns.iter().map(|column| column.name.as_str()).collect();
        let _ = write!(page, "\n## {}\n| case | | {} |\n|---|---|", group.title, names.join(" | "));
        let _ = writeln!(page, "{}", "---|".repeat(columns.len()));
        for (row, case) in group.cases.iter().enumerate() {
            let marks: Vec<_> = columns.iter().map(|column| column.groups[place][row].mark()).collect();
            let _ = writeln!(page, "| {} | {} | {} |", case.name, case.says, marks.join(" | "));
        }
    }
    for column in columns {
        notes(&mut page, column);
    }
    page
}

/// What a plugin did instead.
fn notes(page: &mut String, column: &Column) {
    let mut lines = String::new();
    for (group, verdicts) in GROUPS.iter().zip(&column.groups) {
        for (case, verdict) in group.cases.iter().zip(verdicts) {
            let _ = match verdict {
                Verdict::Green => Ok(()),
                Verdict::Red { says, .. } => writeln!(lines, "- {}/{}: {says}", group.name, case.name),
                Verdict::ByDesign(why) => {
                    writeln!(lines, "- {}/{}: – {}, it {why}", group.name, case.name, column.name)
                }
            };
        }
    }
    if !lines.is_empty() {
        let _ = write!(page, "\n## What {} does instead\n{lines}", column.name);
    }
}
