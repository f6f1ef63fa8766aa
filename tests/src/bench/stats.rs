//! Median and quartiles: few samples, of a machine that others use as well.

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    pub median: f64,
    pub q1: f64,
    pub q3: f64,
    pub n: usize,
}

impl Summary {
    /// Quantiles by linear interpolation between the neighbours in order; none without a sample.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share| quantile(&sorted, share);
        Some(Self { median: at(0.5)?, q1: at(0.25)?, q3: at(0.75)?, n: sorted.len() })
    }
}

/// Of samples in order; none without a sample.
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let at = share * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    Some(sorted[below] + (sorted[above] - sorted[below]) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let summary = |samples: &[f64]| Summary::of(samples.iter().copied());
        assert_eq!(summary(&[]), None);
        assert_eq!(summary(&[7.0]), Some(Summary { median: 7.0, q1: 7.0, q3: 7.0, n: 1 }));
        assert_eq!(
            summary(&[9.0, 1.0, 5.0, 3.0, 7.0]),
            Some(Summary { median: 5.0, q1: 3.0, q3: 7.0, n: 5 })
        );
        assert_eq!(summary(&[4.0, 1.0, 2.0, 3.0]), Some(Summary { median: 2.5, q1: 1.75, q3: 3.25, n: 4 }));
    }
}
