//! A small transfer over one path, held byte for byte against what it must bring, both ways, and its speed beside that of the
//! plainest copy there is. What `pdlink doctor` sends ahead of everything else.

use std::sync::Arc;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::peer::{Orders, Ready};
use super::workload::{Window, scattered};
use super::{Rig, Way, rate};
use crate::bench::stats::Samples;
use crate::security::Secret;
use crate::transport::{Direction, Fault, FaultPlan, Faulty, Transport, When};

/// Memory at each end.
pub const SPAN_BYTES: u64 = 64 << 20;
const BYTES: u64 = 16 << 20;
const CHECKED_RUN_BYTES: u64 = 16 << 10;
const TIMED_RUN_BYTES: u64 = 64 << 10;
/// The first only warms up.
const ROUNDS: usize = 8;

/// What came of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Flown {
    /// Held against what they must be, over both directions.
    pub bytes: u64,
    pub gigabytes_per_second: f64,
    pub ceiling_gigabytes_per_second: f64,
}

/// Flies to the end that is `ready`, from one set up by `orders`. With `corrupt` one run of what is pulled arrives wrong, which
/// must be found.
pub fn fly(orders: &Orders, ready: &Ready, corrupt: bool) -> anyhow::Result<Flown> {
    let around = |ours: Arc<dyn Transport>| -> Arc<dyn Transport> {
        let plan = FaultPlan { seed: 1, faults: vec![(When::Nth(1), Fault::Corrupt)] };
        if corrupt { Faulty::around(ours, plan) } else { ours }
    };
    let secret = Secret::read_file(&orders.secret_file)?;
    let mut rig = Rig::joined(orders, ready, Way::Pull, &secret, around)?;
    rig.check(Direction::Pull, BYTES, CHECKED_RUN_BYTES).context("pulling")?;
    let (ours, ceiling) = speeds(&rig)?;
    rig.turn(Way::Push);
    rig.check(Direction::Push, BYTES, CHECKED_RUN_BYTES).context("pushing")?;
    rig.close();
    Ok(Flown { bytes: 2 * BYTES, gigabytes_per_second: ours, ceiling_gigabytes_per_second: ceiling })
}

/// Medians of ours and of the ceiling, taken in turns.
fn speeds(rig: &Rig) -> anyhow::Result<(f64, f64)> {
    let mut window = Window::new(rig.span, BYTES);
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for round in 0..ROUNDS {
        let moved = rig.transfer(Direction::Pull, scattered(window.next(), BYTES, TIMED_RUN_BYTES))?;
        let ceiling = rig.ceiling.run_at([window.next(), window.next()], BYTES)?;
        if round > 0 {
            ours.push(rate(BYTES, moved));
            theirs.push(rate(BYTES, ceiling));
        }
    }
    let median = |samples: Samples| samples.spread().map(|spread| spread.median).context("no sample");
    Ok((median(ours)?, median(theirs)?))
}
