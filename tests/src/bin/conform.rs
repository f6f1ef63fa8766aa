//! `conform`: what `scripts/conform` starts once the programs are built.

use std::fs;
use std::path::PathBuf;
use std::process::exit;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use e2e::conform::case::Verdict;
use e2e::conform::subject::Subject;
use e2e::conform::{group, matrix, run, run_group};
use e2e::lab::out::{complain, say};

/// Judges CNI plugins, weft and the reference bridge among them, case by case.
#[derive(Debug, Parser)]
#[command(name = "scripts/conform")]
struct Arguments {
    /// One more plugin: an executable that is configured as the reference bridge is
    #[arg(long = "plugin", value_name = "NAME=PATH", value_parser = named)]
    plugins: Vec<(String, PathBuf)>,
    /// Only this group of cases; prints, and writes no page
    #[arg(long)]
    group: Option<String>,
    /// Only this plugin, by name; prints, and writes no page
    #[arg(long)]
    only: Option<String>,
    /// Where the page goes; without --plugin, --group and --only
    #[arg(long, default_value = "docs/conformance.md")]
    out: PathBuf,
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.into(), path.into())),
        _ => Err("expected NAME=PATH".into()),
    }
}

fn main() {
    let arguments = Arguments::parse();
    match judge(&arguments) {
        Ok(true) => {}
        Ok(false) => exit(1),
        Err(error) => {
            complain(format!("{error:#}"));
            exit(2);
        }
    }
}

/// Whether weft is without fault, or whoever else was asked for.
fn judge(arguments: &Arguments) -> Result<bool> {
    let mut subjects = vec![Subject::weft()?, Subject::reference()?];
    for (name, path) in &arguments.plugins {
        if subjects.iter().any(|subject| subject.name == *name) {
            bail!("--plugin {name}=…: expected another name, {name} is judged already");
        }
        subjects.push(Subject::at(name, path)?);
    }
    if let Some(only) = &arguments.only {
        subjects.retain(|subject| subject.name == *only);
    }
    let first = subjects.first().context("--only: no plugin of that name")?.name.clone();
    let told = |subject: &str, group: &str, case: &str, verdict: &Verdict| match verdict {
        Verdict::Green => say(format!("{subject:<8} yes  {group}/{case}")),
        Verdict::ByDesign(why) => say(format!("{subject:<8} -    {group}/{case}: it {why}")),
        Verdict::Red { says, seen } => {
            say(format!("{subject:<8} NO   {group}/{case}: {says}\n              {seen}"))
        }
    };
    if let Some(name) = &arguments.group {
        let group = group(name)?;
        let mut good = true;
        for subject in &subjects {
            let verdicts =
                run_group(subject, group, &mut |case, verdict| told(&subject.name, name, case, verdict))?;
            good &= subject.name != first || !verdicts.iter().any(|v| matches!(v, Verdict::Red { .. }));
        }
        return Ok(good);
    }
    let columns = subjects
        .iter()
        .map(|subject| run(subject, &mut |group, case, verdict| told(&subject.name, group, case, verdict)))
        .collect::<Result<Vec<_>>>()?;
    for column in &columns {
        let count = column.count();
        say(format!(
            "{}: {} yes, {} no, {} not to be asked",
            column.name, count.green, count.red, count.by_design
        ));
    }
    if arguments.plugins.is_empty() && arguments.only.is_none() {
        fs::write(&arguments.out, matrix::page(&columns))
            .with_context(|| arguments.out.display().to_string())?;
        say(format!("wrote {}", arguments.out.display()));
    }
    Ok(columns.first().is_some_and(|column| column.count().red == 0))
}
