//! What weft promises within a time, asked of it on machines that take the processor away now and then.
//!
//! A promise is about weft, a single measurement as much about the machine. So what comes too late once is tried again:
//! of three strikes the quickest counts. What weft is too slow for is too late each time.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};

const STRIKES: usize = 3;

/// Strikes until what follows came within the time that is promised, three times at most; how long it took. `strike`
/// waits for as long as it takes.
pub fn kept(
    what: &str,
    promised: Duration,
    mut strike: impl FnMut() -> Result<Duration>,
) -> Result<Duration> {
    let mut times = Vec::new();
    while times.len() < STRIKES {
        let took = strike()?;
        if took <= promised {
            return Ok(took);
        }
        times.push(took);
    }
    bail!("{what}: within {promised:?} is promised, it took {times:.2?}")
}

/// How long the steps of a run took, at best.
#[derive(Debug, Default)]
pub struct Steps {
    best: BTreeMap<String, Duration>,
}

impl Steps {
    pub fn took(&mut self, what: &str, time: Duration) {
        let best = self.best.entry(what.to_owned()).or_insert(time);
        *best = time.min(*best);
    }

    fn late(&self, promised: Duration) -> Vec<(&String, &Duration)> {
        self.best.iter().filter(|(_, time)| **time > promised).collect()
    }
}

/// The same for steps that only follow from one another: the whole run is made again, and no step may be late each
/// time.
pub fn kept_throughout(promised: Duration, mut run: impl FnMut(&mut Steps) -> Result<()>) -> Result<()> {
    let mut steps = Steps::default();
    for _ in 0..STRIKES {
        run(&mut steps)?;
        if steps.late(promised).is_empty() {
            return Ok(());
        }
    }
    bail!("within {promised:?} is promised, at best it took {:.2?}", steps.late(promised))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::SECOND;

    #[test]
    fn what_is_late_each_time_is_a_broken_promise() {
        let mut times = [3, 2, 1].map(|n| SECOND * n).into_iter();
        let took = kept("dinner", SECOND, || Ok(times.next().expect("three at most")));
        assert_eq!(took.expect("the third was in time"), SECOND);
        let mut strikes = 0;
        let error = kept("dinner", SECOND, || {
            strikes += 1;
            Ok(SECOND * 2)
        });
        let text = format!("{:#}", error.expect_err("always late"));
        assert!(strikes == STRIKES && text.contains("dinner") && text.contains("2.00s"), "{text}");
        assert!(kept("dinner", SECOND, || bail!("burnt")).is_err(), "a failure is none of time");
    }

    #[test]
    fn no_step_of_a_run_may_be_late_each_time() {
        let mut runs = 0;
        kept_throughout(SECOND, |steps| {
            runs += 1;
            // Each is late once, and never both in one run.
            steps.took("starter", SECOND * if runs == 1 { 5 } else { 1 });
            steps.took("pudding", SECOND * if runs == 2 { 5 } else { 1 });
            Ok(())
        })
        .expect("each was in time once");
        assert_eq!(runs, 2);
        let error = kept_throughout(SECOND, |steps| {
            steps.took("starter", SECOND);
            steps.took("pudding", SECOND * 2);
            Ok(())
        });
        let text = format!("{:#}", error.expect_err("no pudding"));
        assert!(text.contains("pudding") && !text.contains("starter"), "{text}");
    }
}
