//! Waiting between attempts: exponential, with full jitter so that a cluster of agents does not come back in step.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

/// Doubles from `min` to `max`; every wait is drawn from the upper half of the current step.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    step: Duration,
}

impl Backoff {
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, step: min }
    }

    /// The next wait.
    pub fn wait(&mut self) -> Duration {
        let step = self.step;
        self.step = (step * 2).min(self.max);
        jittered(step)
    }

    pub fn reset(&mut self) {
        self.step = self.min;
    }
}

/// Between half of `duration` and all of it.
pub fn jittered(duration: Duration) -> Duration {
    let half = duration / 2;
    half + half.mul_f64(random() as f64 / u64::MAX as f64)
}

/// A number nobody can guess from its predecessor: the standard library's hash keys come from the kernel.
pub fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_its_limit_and_starts_over() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(350));
        for step in [100, 200, 350, 350] {
            let wait = backoff.wait();
            assert!((ms(step / 2)..=ms(step)).contains(&wait), "{wait:?} after a step of {step} ms");
        }
        backoff.reset();
        assert!(backoff.wait() <= ms(100));
    }

    #[test]
    fn waits_differ() {
        let waits: std::collections::BTreeSet<_> =
            (0..32).map(|_| jittered(Duration::from_secs(1))).collect();
        assert!(waits.len() > 16);
    }
}
