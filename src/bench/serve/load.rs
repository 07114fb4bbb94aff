//! Sends requests at a pace and gathers what their clients saw.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;

use super::Pace;
use super::stream::{self, Answer};

/// Errors of a row that are kept in words.
const ERRORS_KEPT: usize = 3;

/// What is sent, where, and how fast.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) address: String,
    pub(super) bodies: Vec<Bytes>,
    pub(super) pace: Pace,
    pub(super) seed: u64,
    pub(super) patience: Duration,
}

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) answers: Vec<Answer>,
    pub(super) errors: usize,
    /// The first few errors, in words.
    pub(super) told: Vec<String>,
    pub(super) took: Duration,
}

impl Seen {
    fn take(&mut self, answer: anyhow::Result<Answer>) {
        match answer {
            Ok(answer) => self.answers.push(answer),
            Err(error) => {
                self.errors += 1;
                if self.told.len() < ERRORS_KEPT {
                    self.told.push(format!("{error:#}"));
                }
            }
        }
    }
}

/// Sends every body and waits for every answer.
pub(super) async fn run(load: Load) -> anyhow::Result<Seen> {
    let Load { address, bodies, pace, seed, patience } = load;
    let started = Instant::now();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut waiting: VecDeque<Bytes> = bodies.into();
    let mut asking: JoinSet<anyhow::Result<Answer>> = JoinSet::new();
    let mut seen = Seen::default();
    let mut next_at = tokio::time::Instant::now();
    while !waiting.is_empty() || !asking.is_empty() {
        let may_send = !waiting.is_empty()
            && match pace {
                Pace::AtOnce(clients) => asking.len() < clients.max(1),
                Pace::PerSecond(_) => true,
            };
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(next_at), if may_send => {
                if let Some(body) = waiting.pop_front() {
                    let address = address.clone();
                    asking.spawn(async move { stream::ask(&address, body, patience).await });
                }
                if let Pace::PerSecond(rate) = pace {
                    next_at += pause(rate, rng.random());
                }
            }
            Some(answer) = asking.join_next() => seen.take(answer?),
        }
    }
    seen.took = started.elapsed();
    Ok(seen)
}

/// The time to the next request of a stream of independent ones, from a number drawn evenly out of 0 to 1.
fn pause(rate: f64, drawn: f64) -> Duration {
    let seconds = -(1.0 - drawn).ln() / rate.max(1e-3);
    Duration::try_from_secs_f64(seconds.min(3600.0)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_as_long_on_average_as_the_rate_says() {
        let mut rng = StdRng::seed_from_u64(1);
        let total: Duration = (0..10_000).map(|_| pause(50.0, rng.random())).sum();
        let mean_ms = total.as_secs_f64() / 10.0;
        assert!((19.0..21.0).contains(&mean_ms), "{mean_ms} ms");
        assert_eq!((pause(1.0, 0.0), pause(0.0, 1.0)), (Duration::ZERO, Duration::from_secs(3600)));
    }
}
