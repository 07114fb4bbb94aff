//! One update of the fleet: a transaction over all its workers (WT-1).
//!
//! ```text
//! offer ──► all staged ──► hold hand-offs, let those in flight land ──► pause ──► commit ──► resume
//!   │            │                                                        │         │
//!   └────────────┴──────────── abort: the old version serves on ◄─────────┘         └─ at least one has committed:
//!                                                                                      the new version is the fleet's,
//!                                                                                      the others catch up first
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::super::shared::Shared;
use super::members::{Failed, Goal, Member, bring_all, bring_each, tell_all};
use crate::config::{InFlight, WeightsConfig};
use crate::control::{Role, WeightSource, WeightsOffer, WeightsPhase, WeightsRequest, WeightsStatus};

/// How often it is looked whether the last KV in flight has landed.
const DRAIN_POLL: Duration = Duration::from_millis(2);
const LOADING_POLL: Duration = Duration::from_millis(50);

/// The times of `[weights]`, ready for use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    stage: Duration,
    drain: Duration,
    pause: Duration,
    commit: Duration,
    hold: Duration,
    /// An update's, from first to last.
    pub(super) all: Duration,
    in_flight: InFlight,
}

impl Times {
    pub(crate) fn of(config: &WeightsConfig) -> Self {
        let time = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(1 << 30));
        Self {
            stage: time(config.stage_timeout_s),
            drain: time(config.drain_timeout_s),
            pause: time(config.pause_timeout_s),
            commit: time(config.commit_timeout_s),
            hold: time(config.hold_timeout_s),
            all: time(config.update_max_s()),
            in_flight: config.in_flight,
        }
    }
}

/// Workers, and why they did not commit.
type Behind = Vec<(Member, String)>;

/// How an update ended well.
#[derive(Debug, Clone)]
pub(super) struct Committed {
    pub(super) digest: Option<[u8; 16]>,
    pub(super) bytes: u64,
    pub(super) staging: Duration,
    /// From the first pause to the last resumption.
    pub(super) paused: Duration,
    /// Workers that did not commit, and why: they catch up before they serve.
    pub(super) behind: Behind,
}

/// An update that is being made.
pub(super) struct Update<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) members: &'a [Member],
    pub(super) id: u64,
    pub(super) version: u64,
    pub(super) source: WeightSource,
}

impl Update<'_> {
    fn goal(&self, phase: WeightsPhase, doing: &'static str, within: Duration) -> Goal {
        Goal { update: self.id, phase, doing, within }
    }

    /// Runs it. `serve` is called between commit and resumption: from then on the version is the fleet's.
    pub(super) async fn run(&self, serve: impl FnOnce(&Committed)) -> Result<Committed, Failed> {
        let times = self.shared.weights.times;
        let begun = Instant::now();
        let statuses = self.or_abort(self.stage(times).await).await?;
        let staging = begun.elapsed();
        let held = self.shared.weights.handoffs.close();
        self.drain(times.drain).await;
        let pausing = Instant::now();
        let pause = self.goal(WeightsPhase::Paused, "pausing", times.pause);
        let request = |_| WeightsRequest::Pause { update: self.id, in_flight: times.in_flight };
        self.or_abort(bring_all(self.members, pause, request).await).await?;
        let (behind, digest) = self.or_abort(self.commit(times).await).await?;
        let bytes = statuses[0].total_bytes;
        let mut committed = Committed { digest, bytes, staging, paused: Duration::ZERO, behind };
        serve(&committed);
        tell_all(self.members, &WeightsRequest::Resume { update: self.id }).await;
        committed.paused = pausing.elapsed();
        drop(held);
        Ok(committed)
    }

    /// For one worker that catches up, with no hand-offs held back: it serves nothing yet. What it gets must have `digest`.
    pub(super) async fn run_alone(&self, digest: Option<[u8; 16]>) -> Result<(), Failed> {
        let times = self.shared.weights.times;
        let staged = self.stage(times).await.and_then(|statuses| match statuses[0].staged_digest == digest {
            true => Ok(()),
            false => Err(Failed {
                doing: "comparing digests",
                worker: self.members[0].name(),
                why: format!("{} has other weights than the fleet serves", self.source),
            }),
        });
        self.or_abort(staged).await?;
        let pause = self.goal(WeightsPhase::Paused, "pausing", times.pause);
        let request = |_| WeightsRequest::Pause { update: self.id, in_flight: InFlight::Restart };
        self.or_abort(bring_all(self.members, pause, request).await).await?;
        let commit = self.goal(WeightsPhase::Committed, "committing", times.commit);
        bring_all(self.members, commit, |_| WeightsRequest::Commit { update: self.id }).await?;
        tell_all(self.members, &WeightsRequest::Resume { update: self.id }).await;
        Ok(())
    }

    /// Every worker has all bytes, and the same.
    async fn stage(&self, times: Times) -> Result<Vec<WeightsStatus>, Failed> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let receivers = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        let offer = |number: usize| {
            WeightsRequest::Offer(WeightsOffer {
                update: self.id,
                version: self.version,
                source: self.source.clone(),
                receivers,
                receiver: u32::try_from(number).unwrap_or(u32::MAX),
                stage_ms: millis(times.stage),
                hold_ms: millis(times.hold),
            })
        };
        let staged = self.goal(WeightsPhase::Staged, "staging", times.stage);
        let statuses = bring_all(self.members, staged, offer).await?;
        let first = &statuses[0];
        match statuses.iter().position(|status| status.staged_digest != first.staged_digest) {
            None => Ok(statuses),
            Some(differs) => {
                let why = format!(
                    "its weights are not those of {}; did the files change while they were read?",
                    self.members[0].name()
                );
                Err(Failed { doing: "comparing digests", worker: self.members[differs].name(), why })
            }
        }
    }

    /// Waits until no prefill leg is in flight and no KV is held for decode. What is left at the end of the time is of the
    /// old version, and refused by its number (KV-5).
    async fn drain(&self, within: Duration) {
        let deadline = Instant::now() + within;
        let handoffs = &self.shared.weights.handoffs;
        loop {
            let legs = handoffs.begun();
            if legs == 0 && !self.holds_kv().await {
                return;
            }
            if Instant::now() >= deadline {
                tracing::warn!(legs, "hand-offs did not land in time; their prompts are computed again");
                return;
            }
            sleep(DRAIN_POLL).await;
        }
    }

    async fn holds_kv(&self) -> bool {
        for member in self.members.iter().filter(|member| member.worker.role == Role::Prefill) {
            if member.client.status().await.is_ok_and(|status| status.transfers_active > 0) {
                return true;
            }
        }
        false
    }

    /// Who did not commit, and why; and the digest of what the others serve, which is not known before of what was staged nowhere.
    /// An error: nobody did.
    async fn commit(&self, times: Times) -> Result<(Behind, Option<[u8; 16]>), Failed> {
        let goal = self.goal(WeightsPhase::Committed, "committing", times.commit);
        let each = bring_each(self.members, goal, |_| WeightsRequest::Commit { update: self.id }).await;
        let mut digest = each.iter().flatten().next().and_then(|status| status.digest);
        let mut behind: Vec<(Member, Failed)> = Vec::new();
        for (member, result) in self.members.iter().zip(each) {
            if let Err(failed) = result {
                behind.push((member.clone(), failed));
            }
        }
        if behind.len() == self.members.len() {
            self.outwait_loading(times.hold).await;
            // Nobody said that it has committed. One that did all the same does not go back, and says so.
            let why = "no worker is known to have committed".to_owned();
            let doubted: Vec<Member> = behind.iter().map(|(member, _)| member.clone()).collect();
            tell_all(&doubted, &WeightsRequest::Abort { update: self.id, why }).await;
            let answers_of = tell_all(&doubted, &WeightsRequest::Status).await;
            let mut answers = answers_of.iter();
            let committed =
                |answer: &Result<WeightsStatus, _>| answer.as_ref().is_ok_and(|status| status.version == self.version);
            behind.retain(|_| !answers.next().is_some_and(committed));
            let late = answers_of.iter().flatten().find(|status| status.version == self.version);
            digest = late.and_then(|status| status.digest);
        }
        if behind.len() == self.members.len() {
            return Err(behind.remove(0).1);
        }
        Ok((behind.into_iter().map(|(member, failed)| (member, failed.why)).collect(), digest))
    }

    /// A worker that is loading does not stop half-way, and nobody else serves: what becomes of it is waited for.
    async fn outwait_loading(&self, within: Duration) {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            let statuses = tell_all(self.members, &WeightsRequest::Status).await;
            let is_loading = |status: &WeightsStatus| status.phase == WeightsPhase::Committing;
            if !statuses.iter().any(|status| status.as_ref().is_ok_and(is_loading)) {
                return;
            }
            sleep(LOADING_POLL).await;
        }
    }

    /// The old version serves on wherever `result` is an error.
    async fn or_abort<T>(&self, result: Result<T, Failed>) -> Result<T, Failed> {
        if let Err(failed) = &result {
            tell_all(self.members, &WeightsRequest::Abort { update: self.id, why: failed.to_string() }).await;
        }
        result
    }
}
