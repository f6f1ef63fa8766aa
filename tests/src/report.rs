//! What a run has measured, for whoever reads its output: docs/faults.md shows these figures.

use std::fmt::Display;
use std::time::Duration;

/// How long something took.
pub fn took(what: impl Display, time: Duration) {
    figure(format_args!("{:>6} ms  {what}", time.as_millis()));
}

/// A figure that is no time of one thing: a count, a seed, several times in one line.
#[expect(clippy::print_stdout, reason = "the harness catches it, and shows it on demand or with a failure")]
pub fn figure(text: impl Display) {
    println!("{text}");
}
