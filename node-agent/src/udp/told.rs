//! What the threads tell of themselves, for status and the log. Nothing here is on behalf of a packet.
//!
//! A start meets problems that are over in milliseconds: there is no device before the reconciler has made it. They are
//! in status at once, and a warning only when they stay.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::again::LASTING;
use super::offload::{Offload, Outcome, Outcomes};

/// Written when something changes.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) trouble: Trouble,
    pub(super) offloads: Outcomes,
    /// What the log has: a refusal that comes again and again is in it once.
    refusals: BTreeMap<Offload, String>,
    /// Why no ICMP errors are sent.
    pub(super) icmp_problem: Option<String>,
}

/// Why nothing is forwarded, and since when.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    problem: Option<String>,
    /// Moments in which it worked do not end it.
    since: Option<Instant>,
    works_since: Option<Instant>,
    warned_of: BTreeSet<String>,
}

/// How loud the log is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Say {
    Nothing,
    Quietly,
    Warning,
}

impl Told {
    pub(super) fn not_started() -> Self {
        let trouble = Trouble { problem: Some("not started yet".into()), ..Trouble::default() };
        Self { trouble, ..Self::default() }
    }

    pub(super) fn outcome(&mut self, offload: Offload, outcome: Outcome) -> Say {
        let say = match &outcome {
            Outcome::Refused(how) if self.refusals.get(&offload) != Some(how) => {
                self.refusals.insert(offload, how.clone());
                Say::Quietly
            }
            _ => Say::Nothing,
        };
        self.offloads.insert(offload, outcome);
        say
    }

    /// Whether that is news.
    pub(super) fn icmp(&mut self, problem: Option<String>) -> bool {
        let is_news = self.icmp_problem != problem;
        self.icmp_problem = problem;
        is_news
    }
}

impl Trouble {
    pub(super) fn problem(&self) -> Option<&String> {
        self.problem.as_ref()
    }

    /// Told again with every attempt.
    pub(super) fn met(&mut self, problem: &str, now: Instant) -> Say {
        if self.works_since.take().is_some_and(|at| now.saturating_duration_since(at) >= LASTING) {
            self.since = None;
            self.warned_of.clear();
        }
        let since = *self.since.get_or_insert(now);
        let is_new = self.problem.as_deref() != Some(problem);
        if is_new {
            self.problem = Some(problem.to_owned());
        }
        if now.saturating_duration_since(since) >= LASTING && !self.warned_of.contains(problem) {
            self.warned_of.insert(problem.to_owned());
            Say::Warning
        } else if is_new {
            Say::Quietly
        } else {
            Say::Nothing
        }
    }

    pub(super) fn over(&mut self, now: Instant) {
        self.problem = None;
        self.works_since = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_problem_is_warned_of_once_and_only_when_it_stays() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        let met = |trouble: &mut Trouble, problem: &str, ms| {
            trouble.met(problem, start + Duration::from_millis(ms))
        };
        assert_eq!(met(&mut trouble, "no device", 0), Say::Quietly);
        assert_eq!(met(&mut trouble, "no device", 300), Say::Nothing);
        assert_eq!(met(&mut trouble, "no device", 1000), Say::Warning);
        assert_eq!(met(&mut trouble, "no device", 9000), Say::Nothing);
        assert_eq!(
            met(&mut trouble, "port taken", 9100),
            Say::Warning,
            "another one, and still nothing works"
        );
        assert_eq!(trouble.problem().map(String::as_str), Some("port taken"));
        // It works for a moment, and then for long.
        trouble.over(start + Duration::from_millis(9200));
        assert_eq!(trouble.problem(), None);
        assert_eq!(met(&mut trouble, "no device", 9300), Say::Quietly);
        trouble.over(start + Duration::from_millis(9400));
        assert_eq!(met(&mut trouble, "no device", 10_400), Say::Quietly);
        assert_eq!(met(&mut trouble, "no device", 11_400), Say::Warning, "a new one");
    }

    /// Attached to and lost again at once, for ever.
    #[test]
    fn moments_in_which_it_works_do_not_silence_the_warning() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        let said: Vec<Say> = (0..30)
            .map(|round| {
                trouble.over(start + Duration::from_millis(100 * round));
                trouble.met("gone", start + Duration::from_millis(100 * round + 5))
            })
            .filter(|say| *say == Say::Warning)
            .collect();
        assert_eq!(said, [Say::Warning]);
    }

    #[test]
    fn a_refusal_that_comes_again_is_said_once() {
        let mut told = Told::default();
        let refused = || Outcome::Refused("no".into());
        assert_eq!(told.outcome(Offload::UdpSegment, refused()), Say::Quietly);
        assert_eq!(told.outcome(Offload::UdpSegment, Outcome::InUse), Say::Nothing);
        assert_eq!(told.outcome(Offload::UdpSegment, refused()), Say::Nothing);
        assert_eq!(told.offloads.get(&Offload::UdpSegment), Some(&refused()));
    }
}
