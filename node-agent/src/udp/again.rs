//! How long to wait before something is begun again that did not last: longer each time, until it lasts.

use std::time::Duration;

/// What went on for so long is sound: what ends it is something new.
pub(super) const LASTING: Duration = Duration::from_secs(1);

/// The waits between the attempts at one thing.
#[derive(Debug)]
pub(super) struct Pause {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Pause {
    pub(super) const fn new((first, longest): (Duration, Duration)) -> Self {
        Self { first, longest, next: first }
    }

    /// The wait behind an attempt that went well for as long as `lasted`.
    pub(super) fn after(&mut self, lasted: Duration) -> Duration {
        if lasted >= LASTING {
            self.next = self.first;
        }
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_until_something_lasts() {
        let ms = Duration::from_millis;
        let mut pause = Pause::new((ms(5), ms(30)));
        let waits = [0, 0, 999, 0, 1000, 0].map(|lasted| pause.after(ms(lasted)).as_millis());
        assert_eq!(waits, [5, 10, 20, 30, 5, 10]);
    }
}
