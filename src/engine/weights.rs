//! The engine as the weights runtime drives it: everything goes to the scheduler, in order.

use super::front::Front;
use super::model::Weights;
use super::scheduler::{Command, Done};
use crate::config::InFlight;
use crate::weights::{NewWeights, WeightTarget};

pub(super) struct Target {
    pub front: Front,
    /// What the worker was started with.
    pub base: Weights,
}

impl WeightTarget for Target {
    fn pause(&self, in_flight: InFlight, done: Box<dyn FnOnce() + Send>) {
        self.front.send(Command::Pause(in_flight, Done::new(done)));
    }

    fn commit(&self, weights: NewWeights, done: Box<dyn FnOnce(Result<(), String>) + Send>) {
        let NewWeights { version, staged, .. } = weights;
        let weights = match &staged {
            Some(staged) => Weights::of(version, staged.digest().0),
            None => self.base.as_version(version),
        };
        self.front.send(Command::TakeWeights(weights, Done::new(move || done(Ok(())))));
    }

    fn resume(&self) {
        self.front.send(Command::Resume);
    }
}
