//! One number of a report under a name that another run's report has as well.

use serde::Serialize;

use crate::bench::stats::Spread;

/// A measured quantity.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// Level, path, sizes: all that must be equal for two figures to be of one thing.
    pub name: String,
    pub unit: Unit,
    pub spread: Spread,
    /// What the machine itself took for the same in the same run, in whatever grows with it: a figure that moves as its control
    /// does has met another machine, not another pdlink.
    pub control: Option<f64>,
    /// Whether this is such a control: nothing of pdlink is in it.
    pub is_machine: bool,
}

/// What it is counted in, which says what is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Unit {
    #[serde(rename = "GB/s")]
    GigabytesPerSecond,
    #[serde(rename = "µs")]
    Microseconds,
    #[serde(rename = "ms")]
    Milliseconds,
    /// Processor time of 1,000 requests.
    #[serde(rename = "CPU ms/1000")]
    CpuPerThousand,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Self::GigabytesPerSecond => "GB/s",
            Self::Microseconds => "µs",
            Self::Milliseconds => "ms",
            Self::CpuPerThousand => "CPU ms/1000",
        }
    }

    /// Whether more is better.
    pub fn grows_better(self) -> bool {
        self == Self::GigabytesPerSecond
    }
}

impl Figure {
    pub fn new(name: String, unit: Unit, spread: Spread) -> Self {
        Self { name, unit, spread, control: None, is_machine: false }
    }

    /// The same beside its control.
    pub fn beside(self, control: Option<f64>) -> Self {
        // Nothing can be told by a control of 0.
        Self { control: control.filter(|control| *control > 0.0), ..self }
    }

    /// The same, of the machine alone.
    pub fn of_machine(self, is_machine: bool) -> Self {
        Self { is_machine, ..self }
    }
}
