//! Numbers for random moments and for bulk data: SplitMix64 (Steele, Lea, Flood 2014), repeatable from its seed.

use std::time::{SystemTime, UNIX_EPOCH};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_sequence() {
        // First outputs for seed 0 of the reference implementation.
        let mut random = Random::seeded(0);
        assert_eq!(random.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(random.next_u64(), 0x6e78_9e6a_a1b9_65f4);
    }
}
