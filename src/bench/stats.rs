//! What many measurements of one thing come to: the median, and how far they spread.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Equal steps of a [`Curve`] from the smallest measurement to the largest.
const CURVE_STEPS: u32 = 50;

/// Measurements of one quantity, in whatever unit the caller keeps.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    values: Vec<f64>,
}

/// Median, and how far the measurements lie around it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Spread {
    /// Measurements behind the others.
    pub count: usize,
    pub min: f64,
    pub p25: f64,
    pub median: f64,
    pub p75: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// The whole distribution: the values below which 0 %, 2 %, 4 % … 100 % of the measurements lie.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Curve(pub Vec<f64>);

impl Samples {
    pub fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    pub fn iter(&self) -> impl Iterator<Item = f64> + '_ {
        self.values.iter().copied()
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The value below which `share` (0 to 1) of the measurements lie: the nearest one that was measured. `None` without any.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        quantile_of(&self.sorted(), share)
    }

    /// Median and spread. `None` without measurements.
    pub fn spread(&self) -> Option<Spread> {
        let sorted = self.sorted();
        let at = |share| quantile_of(&sorted, share);
        Some(Spread {
            count: sorted.len(),
            min: at(0.0)?,
            p25: at(0.25)?,
            median: median_of(&sorted)?,
            p75: at(0.75)?,
            p90: at(0.9)?,
            p99: at(0.99)?,
            max: at(1.0)?,
        })
    }

    /// The whole distribution. `None` without measurements.
    pub fn curve(&self) -> Option<Curve> {
        let sorted = self.sorted();
        let at = |step| quantile_of(&sorted, f64::from(step) / f64::from(CURVE_STEPS));
        (0..=CURVE_STEPS).map(at).collect::<Option<Vec<_>>>().map(Curve)
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

fn quantile_of(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the last index")]
    let at = (share.clamp(0.0, 1.0) * last as f64).ceil() as usize;
    sorted.get(at).copied()
}

fn median_of(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], upper) } else { upper })
}

impl Extend<f64> for Samples {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, values: I) {
        self.values.extend(values);
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
        let three = spread(&[3.0, 1.0, 2.0]).expect("some");
        assert_eq!((three.min, three.median, three.max, three.count), (1.0, 2.0, 3.0, 3));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]).map(|four| (four.median, four.max)), Some((3.0, 9.0)));
        let hundred: Samples = (1..=101).map(f64::from).collect();
        let all = hundred.spread().expect("some");
        assert_eq!((all.p25, all.median, all.p75, all.p90, all.p99), (26.0, 51.0, 76.0, 91.0, 100.0));
        assert_eq!((hundred.quantile(0.99), hundred.quantile(0.5)), (Some(100.0), Some(51.0)));
    }

    #[test]
    fn a_curve_rises_from_the_smallest_to_the_largest() {
        let Curve(values) = (1..=101).rev().map(f64::from).collect::<Samples>().curve().expect("some");
        assert_eq!((values.len(), values[0], values[25], values[50]), (51, 1.0, 51.0, 101.0));
        assert!(values.is_sorted() && Samples::default().curve().is_none());
    }
}
