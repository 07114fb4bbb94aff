//! What many measurements of one thing come to: the median, and how far they spread.

use serde::Serialize;

/// Measurements of one quantity, in whatever unit the caller keeps.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    values: Vec<f64>,
}

/// Median with the smallest and the largest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// Measurements behind the three.
    pub count: usize,
}

impl Samples {
    pub fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The value below which `share` (0 to 1) of the measurements lie: the nearest one that was measured. `None` without any.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = (0..=last).find(|at| *at as f64 >= share.clamp(0.0, 1.0) * last as f64)?;
        sorted.get(at).copied()
    }

    /// Median and spread. `None` without measurements.
    pub fn spread(&self) -> Option<Spread> {
        let (median, min, max) = (self.median()?, self.quantile(0.0)?, self.quantile(1.0)?);
        Some(Spread { median, min, max, count: self.values.len() })
    }

    fn median(&self) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        Some(if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], upper) } else { upper })
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self { values: values.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_stands_in_the_middle_of_its_spread() {
        let spread = |values: &[f64]| values.iter().copied().collect::<Samples>().spread();
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0, count: 3 }));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]), Some(Spread { median: 3.0, min: 1.0, max: 9.0, count: 4 }));
        let hundred: Samples = (1..=101).map(f64::from).collect();
        assert_eq!((hundred.quantile(0.99), hundred.quantile(0.5)), (Some(100.0), Some(51.0)));
    }
}
