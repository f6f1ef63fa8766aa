//! Numbers for random moments and for bulk data: SplitMix64 (Steele, Lea, Flood 2014), repeatable from its seed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    pub fn seeded(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A seed of the moment, printed: a failure can be looked at again with the same one.
    pub fn of_the_moment() -> Self {
        let seed = Self::seed_of_the_moment();
        eprintln!("random seed {seed}");
        Self::seeded(seed)
    }

    /// That of `WEFT_SEED`, for a failure to be looked at again, or one of the moment.
    pub fn seed_of_the_moment() -> u64 {
        let given = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok());
        given.unwrap_or_else(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
        })
    }

    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Random moments within something whose length nobody knows: it is learnt. A strike that came too late halves the span
/// in which the next falls, one that hit widens it. So moments reach past the end, and most come before it, however fast
/// the machine is and whatever else it does meanwhile.
#[derive(Debug, Clone)]
pub struct Moments {
    span: Duration,
}

impl Moments {
    /// `about`: how long it lasts, at a guess.
    pub fn within(about: Duration) -> Self {
        Self { span: about }
    }

    pub fn span(&self) -> Duration {
        self.span
    }

    pub fn next(&self, random: &mut Random) -> Duration {
        self.at(random.below(1_000))
    }

    /// So many thousandths into the span.
    pub fn at(&self, thousandths: u64) -> Duration {
        self.span.mul_f64(thousandths as f64 / 1_000.0)
    }

    /// What became of a strike.
    pub fn learn(&mut self, hit: bool) {
        self.span =
            if hit { self.span + self.span / 8 } else { (self.span / 2).max(Duration::from_micros(10)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_moments_come_before_an_end_that_nobody_knew() {
        for length in [Duration::from_micros(300), Duration::from_secs(3)] {
            let (mut random, mut moments) = (Random::seeded(7), Moments::within(Duration::from_millis(20)));
            let mut hits = 0;
            for _ in 0..500 {
                let hit = moments.next(&mut random) < length;
                moments.learn(hit);
                hits += u32::from(hit);
            }
            assert!((350..490).contains(&hits), "{hits} of 500 within {length:?}");
        }
    }

    #[test]
    fn the_published_sequence() {
        // First outputs for seed 0 of the reference implementation.
        let mut random = Random::seeded(0);
        assert_eq!(random.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(random.next_u64(), 0x6e78_9e6a_a1b9_65f4);
    }
}
