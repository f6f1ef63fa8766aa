//! Waiting for a condition with a deadline: the tests' substitute for sleeping.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

pub const SECOND: Duration = Duration::from_secs(1);

/// How often a condition is looked at.
const PACE: Duration = Duration::from_millis(10);
/// The same where each look is a large program's start, which takes what is waited for of the processor.
const SLOW_PACE: Duration = Duration::from_millis(500);

/// Looks until `condition` holds and says how long that took. An error of the condition means "not yet", and is told
/// when time is up.
pub fn eventually(
    what: &str,
    deadline: Duration,
    condition: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    look(PACE, what, deadline, condition)
}

fn look(
    pace: Duration,
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let state = condition();
        if matches!(state, Ok(true)) {
            return Ok(start.elapsed());
        }
        if start.elapsed() >= deadline {
            return match state {
                Err(error) => Err(error).with_context(|| format!("waited {deadline:?} for {what}")),
                Ok(_) => bail!("waited {deadline:?} for {what}"),
            };
        }
        let_pass(pace);
    }
}

/// Tries until `attempt` succeeds, and returns what it made.
pub fn until_ok<T>(what: &str, deadline: Duration, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    try_at(PACE, what, deadline, attempt)
}

/// [`until_ok`], twice a second.
pub fn patiently<T>(what: &str, deadline: Duration, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    try_at(SLOW_PACE, what, deadline, attempt)
}

fn try_at<T>(
    pace: Duration,
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut made = None;
    look(pace, what, deadline, || {
        made = Some(attempt()?);
        Ok(true)
    })?;
    made.context("condition held without a value")
}

/// Lets time itself pass: where a test strikes at a random moment, or paces what it sends.
#[expect(clippy::disallowed_methods, reason = "time itself is meant")]
pub fn let_pass(time: Duration) {
    thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_never_holds_names_what_was_waited_for() {
        let error = eventually("spring", Duration::from_millis(20), || bail!("snow"));
        let text = format!("{:#}", error.expect_err("never holds"));
        assert!(text.contains("spring") && text.contains("snow"), "{text}");
        let mut looks = 0;
        eventually("third look", Duration::from_secs(5), || {
            looks += 1;
            Ok(looks == 3)
        })
        .expect("holds");
        assert_eq!(looks, 3);
    }
}
