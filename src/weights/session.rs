//! One worker's part in an update of the fleet: a machine with the time as an argument.
//!
//! The states are drawn in `control::weights`. Requests come from the coordinator, [`Heard`] from staging and from the
//! engine; [`Act`] says what is to be done about it. What holds here:
//!
//! - a version is taken only if it is newer than the one served;
//! - until the commit any failure, abort or silence leaves the old version serving and resumed (WT-1, WT-4);
//! - a commit is taken only while the engine is paused, and once (WT-3: nothing is computed across it);
//! - after the commit silence leaves the new version serving and resumed.

use std::time::{Duration, Instant};

use super::digest::WeightsDigest;
use crate::config::InFlight;
use crate::control::{WeightsFailure, WeightsOffer, WeightsPhase, WeightsRequest};

/// What is told by the parts that do the work. Each names the update it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// All bytes are here and are right; `None` for what the worker was started with.
    Staged { update: u64, result: Result<Option<WeightsDigest>, String> },
    /// Nothing is computed any more.
    Paused { update: u64 },
    /// The engine has the new weights, or could not take them and has the old ones.
    Committed { update: u64, result: Result<(), String> },
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    Stage(WeightsOffer),
    /// Stop staging, and forget what was staged.
    Drop,
    Pause {
        update: u64,
        in_flight: InFlight,
    },
    /// Hand the engine what was staged.
    Commit {
        update: u64,
        version: u64,
    },
    Resume,
}

/// A worker's part in updates.
#[derive(Debug, Clone)]
pub(super) struct Session {
    version: u64,
    digest: Option<WeightsDigest>,
    /// The last update that was committed.
    committed: Option<u64>,
    failure: Option<WeightsFailure>,
    current: Option<Current>,
}

/// The update under way.
#[derive(Debug, Clone)]
struct Current {
    update: u64,
    version: u64,
    phase: WeightsPhase,
    staged: Option<WeightsDigest>,
    hold: Duration,
    /// When the phase is given up. The engine's flip is not: it happens or the engine is dead.
    until: Option<Instant>,
}

use WeightsPhase::{Committed, Committing, Paused, Pausing, Serving, Staged, Staging};

impl Session {
    pub(super) fn new(version: u64) -> Self {
        Self { version, digest: None, committed: None, failure: None, current: None }
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn digest(&self) -> Option<WeightsDigest> {
        self.digest
    }

    pub(super) fn failure(&self) -> Option<&WeightsFailure> {
        self.failure.as_ref()
    }

    pub(super) fn phase(&self) -> WeightsPhase {
        self.current.as_ref().map_or(Serving, |current| current.phase)
    }

    /// The update under way, or the last one committed.
    pub(super) fn update(&self) -> Option<u64> {
        self.current.as_ref().map(|current| current.update).or(self.committed)
    }

    pub(super) fn staged(&self) -> Option<WeightsDigest> {
        self.current.as_ref().and_then(|current| current.staged)
    }

    /// When [`Session::tick`] is due.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.current.as_ref().and_then(|current| current.until)
    }

    /// The coordinator asks. `Err`: refused, and nothing has changed.
    pub(super) fn ask(&mut self, request: &WeightsRequest, now: Instant) -> Result<Vec<Act>, String> {
        match request {
            // What joins a trainer's group is the driver's.
            WeightsRequest::Status | WeightsRequest::Join(_) => Ok(Vec::new()),
            WeightsRequest::Offer(offer) => self.offer(offer, now),
            WeightsRequest::Pause { update, in_flight } => self.pause(*update, *in_flight, now),
            WeightsRequest::Commit { update } => self.commit(*update),
            WeightsRequest::Resume { update } => self.resume(*update),
            WeightsRequest::Abort { update, why } => self.abort(*update, why),
        }
    }

    fn offer(&mut self, offer: &WeightsOffer, now: Instant) -> Result<Vec<Act>, String> {
        if self.update() == Some(offer.update) {
            return Ok(Vec::new());
        }
        if let Some(current) = &self.current {
            let (version, phase) = (current.version, current.phase.name());
            return Err(format!("an update to version {version} is under way here ({phase}); let it end first"));
        }
        if offer.version <= self.version {
            return Err(format!("version {} is not newer than version {}, which serves", offer.version, self.version));
        }
        let until = now.checked_add(Duration::from_millis(offer.stage_ms));
        let hold = Duration::from_millis(offer.hold_ms);
        let (update, version) = (offer.update, offer.version);
        self.current = Some(Current { update, version, phase: Staging, staged: None, hold, until });
        Ok(vec![Act::Stage(offer.clone())])
    }

    /// The update under way, if it is this one.
    fn of(&mut self, update: u64, asked: &str) -> Result<&mut Current, String> {
        let late = self.failure.as_ref().filter(|failure| failure.update == update);
        let late = late.map(|failure| format!("{asked} comes too late: {}", failure.why));
        match self.current.as_mut() {
            Some(current) if current.update != update => Err(format!(
                "{asked} is of another update than the one to version {}, which is under way",
                current.version
            )),
            Some(current) => Ok(current),
            None => Err(late.unwrap_or_else(|| format!("{asked} is of an update that is not under way here"))),
        }
    }

    fn pause(&mut self, update: u64, in_flight: InFlight, now: Instant) -> Result<Vec<Act>, String> {
        let current = self.of(update, "a pause")?;
        match current.phase {
            Staged => {
                current.enter(Pausing, now);
                Ok(vec![Act::Pause { update, in_flight }])
            }
            Pausing | Paused => Ok(Vec::new()),
            phase => Err(format!("a pause does not follow `{}`", phase.name())),
        }
    }

    fn commit(&mut self, update: u64) -> Result<Vec<Act>, String> {
        if self.current.is_none() && self.committed == Some(update) {
            return Ok(Vec::new());
        }
        let current = self.of(update, "a commit")?;
        match current.phase {
            Paused => {
                (current.phase, current.until) = (Committing, None);
                Ok(vec![Act::Commit { update, version: current.version }])
            }
            Committing | Committed => Ok(Vec::new()),
            phase => Err(format!("a commit does not follow `{}`", phase.name())),
        }
    }

    fn resume(&mut self, update: u64) -> Result<Vec<Act>, String> {
        if self.current.is_none() && self.committed == Some(update) {
            return Ok(Vec::new());
        }
        let current = self.of(update, "a resumption")?;
        if current.phase != Committed {
            return Err(format!("a resumption does not follow `{}`; an abort would", current.phase.name()));
        }
        self.current = None;
        Ok(vec![Act::Resume])
    }

    fn abort(&mut self, update: u64, why: &str) -> Result<Vec<Act>, String> {
        match &self.current {
            Some(current) if current.update == update && matches!(current.phase, Committing | Committed) => {
                Err(format!("version {} is committed here", current.version))
            }
            Some(current) if current.update == update => Ok(self.give_up(why.to_owned())),
            _ if self.committed == Some(update) => Err(format!("version {} is committed here", self.version)),
            _ => Ok(Vec::new()),
        }
    }

    /// The old version serves on.
    fn give_up(&mut self, why: String) -> Vec<Act> {
        let Some(current) = self.current.take() else { return Vec::new() };
        self.failure = Some(WeightsFailure { update: current.update, phase: current.phase, why });
        match current.phase {
            Pausing | Paused | Committing => vec![Act::Drop, Act::Resume],
            _ => vec![Act::Drop],
        }
    }

    /// What serves was known by no digest before it had all come.
    pub(super) fn serves(&mut self, digest: Option<WeightsDigest>) {
        self.digest = digest;
    }

    /// Staging or the engine has something to say. What is about another update comes too late and means nothing.
    pub(super) fn hear(&mut self, heard: Heard, now: Instant) -> Vec<Act> {
        let update = match &heard {
            Heard::Staged { update, .. } | Heard::Paused { update } | Heard::Committed { update, .. } => *update,
        };
        let Some(current) = self.current.as_mut().filter(|current| current.update == update) else { return Vec::new() };
        match (heard, current.phase) {
            (Heard::Staged { result: Ok(digest), .. }, Staging) => {
                current.staged = digest;
                // Slower workers may take what is left of the time for staging.
                let others = current.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
                current.enter(Staged, now + others);
                Vec::new()
            }
            (Heard::Staged { result: Err(why), .. }, Staging) => self.give_up(why),
            (Heard::Paused { .. }, Pausing) => {
                current.enter(Paused, now);
                Vec::new()
            }
            (Heard::Committed { result: Ok(()), .. }, Committing) => {
                current.enter(Committed, now);
                (self.version, self.digest, self.committed) = (current.version, current.staged, Some(update));
                self.failure = None;
                Vec::new()
            }
            (Heard::Committed { result: Err(why), .. }, Committing) => {
                self.give_up(format!("the engine did not take the weights: {why}"))
            }
            _ => Vec::new(),
        }
    }

    /// Gives up what has waited too long (WT-4).
    pub(super) fn tick(&mut self, now: Instant) -> Vec<Act> {
        let Some(current) = self.current.as_ref().filter(|current| current.until.is_some_and(|until| until <= now))
        else {
            return Vec::new();
        };
        match current.phase {
            // Every worker was told to commit before any was told to resume: the new version is the fleet's.
            Committed => {
                self.current = None;
                vec![Act::Resume]
            }
            Staging => self.give_up("staging did not end within its time".to_owned()),
            phase => self.give_up(format!("no word came while it was {}", phase.name())),
        }
    }
}

impl Current {
    fn enter(&mut self, phase: WeightsPhase, now: Instant) {
        self.phase = phase;
        self.until = now.checked_add(self.hold);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::WeightSource;

    const DIGEST: WeightsDigest = WeightsDigest([7; 16]);

    fn offer(update: u64, version: u64) -> WeightsRequest {
        let source = WeightSource::Folder("w".to_owned());
        let offer = WeightsOffer { update, version, source, receivers: 1, receiver: 0, stage_ms: 100, hold_ms: 10 };
        WeightsRequest::Offer(offer)
    }

    fn pause(update: u64) -> WeightsRequest {
        WeightsRequest::Pause { update, in_flight: InFlight::Restart }
    }

    fn staged(update: u64) -> Heard {
        Heard::Staged { update, result: Ok(Some(DIGEST)) }
    }

    /// A session in the phase that these steps lead to.
    fn at(phase: WeightsPhase, now: Instant) -> Session {
        let mut session = Session::new(4);
        let steps: [&dyn Fn(&mut Session); 6] = [
            &|session| drop(session.ask(&offer(1, 5), now).unwrap()),
            &|session| drop(session.hear(staged(1), now)),
            &|session| drop(session.ask(&pause(1), now).unwrap()),
            &|session| drop(session.hear(Heard::Paused { update: 1 }, now)),
            &|session| drop(session.ask(&WeightsRequest::Commit { update: 1 }, now).unwrap()),
            &|session| drop(session.hear(Heard::Committed { update: 1, result: Ok(()) }, now)),
        ];
        for step in steps {
            if session.phase() != phase {
                step(&mut session);
            }
        }
        session
    }

    #[test]
    fn wt_1_an_update_goes_through_its_phases_and_ends_with_the_new_version() {
        let now = Instant::now();
        let mut session = at(Committed, now);
        assert_eq!((session.version(), session.digest()), (5, Some(DIGEST)));
        assert_eq!(session.ask(&WeightsRequest::Resume { update: 1 }, now), Ok(vec![Act::Resume]));
        assert_eq!((session.phase(), session.update(), session.wake()), (Serving, Some(1), None));
        for again in [offer(1, 5), WeightsRequest::Commit { update: 1 }, WeightsRequest::Resume { update: 1 }] {
            assert_eq!(session.ask(&again, now), Ok(vec![]), "said twice: {again:?}");
        }
        assert!(session.ask(&offer(2, 5), now).unwrap_err().contains("version 5 is not newer than version 5"));
    }

    #[test]
    fn wt_1_before_the_commit_an_abort_or_silence_leaves_the_old_version_serving_and_resumed() {
        let now = Instant::now();
        let abort = WeightsRequest::Abort { update: 1, why: "the sender died".to_owned() };
        for phase in [Staging, Staged, Pausing, Paused] {
            let acts = if matches!(phase, Pausing | Paused) { vec![Act::Drop, Act::Resume] } else { vec![Act::Drop] };
            let mut session = at(phase, now);
            assert_eq!(session.ask(&abort, now), Ok(acts.clone()), "{phase:?}");
            assert_eq!((session.version(), session.phase()), (4, Serving));
            assert_eq!(session.failure().unwrap().phase, phase);
            assert_eq!(session.ask(&abort, now), Ok(vec![]), "said twice");
            assert!(session.ask(&pause(1), now).unwrap_err().contains("the sender died"));

            let mut silent = at(phase, now);
            let due = silent.wake().expect("WT-4: every phase has a deadline");
            assert_eq!(silent.tick(due - Duration::from_millis(1)), vec![], "{phase:?}");
            assert_eq!(silent.tick(due), acts, "{phase:?}");
            assert_eq!((silent.version(), silent.phase()), (4, Serving));
            // What comes too late changes nothing.
            for late in [staged(1), Heard::Paused { update: 1 }, Heard::Committed { update: 1, result: Ok(()) }] {
                assert_eq!(silent.hear(late, due), vec![]);
            }
            assert_eq!(silent.version(), 4);
        }
    }

    #[test]
    fn wt_1_after_the_commit_an_abort_is_refused_and_silence_serves_the_new_version() {
        let now = Instant::now();
        let abort = WeightsRequest::Abort { update: 1, why: String::new() };
        for phase in [Committing, Committed] {
            assert!(at(phase, now).ask(&abort, now).unwrap_err().contains("version 5 is committed here"), "{phase:?}");
        }
        let mut session = at(Committed, now);
        assert_eq!(session.tick(session.wake().unwrap()), vec![Act::Resume]);
        assert_eq!((session.version(), session.phase()), (5, Serving));
        assert!(session.ask(&abort, now).is_err());
    }

    #[test]
    fn what_failed_on_the_way_is_kept_with_its_phase() {
        let now = Instant::now();
        let mut session = at(Staging, now);
        let failed = Heard::Staged { update: 1, result: Err("disk".to_owned()) };
        assert_eq!(session.hear(failed, now), vec![Act::Drop]);
        assert_eq!(session.failure().map(|failure| (failure.phase, &*failure.why)), Some((Staging, "disk")));
        let mut session = at(Committing, now);
        let failed = Heard::Committed { update: 1, result: Err("no".to_owned()) };
        assert_eq!(session.hear(failed, now), vec![Act::Drop, Act::Resume]);
        assert_eq!((session.version(), session.phase()), (4, Serving));
    }

    #[test]
    fn a_second_update_waits_for_the_first() {
        let now = Instant::now();
        let mut session = at(Staged, now);
        assert!(session.ask(&offer(2, 9), now).unwrap_err().contains("version 5 is under way here (staged)"));
        assert!(session.ask(&pause(2), now).is_err());
        assert_eq!(session.ask(&WeightsRequest::Abort { update: 2, why: String::new() }, now), Ok(vec![]));
        assert_eq!(session.phase(), Staged);
    }

    proptest! {
        /// Any order of anything: the engine is told to commit only what was staged and only while it is paused, never
        /// twice; whoever was paused is resumed; the version only grows.
        #[test]
        fn the_engine_is_never_told_what_it_must_not_be(
            steps in prop::collection::vec((0..9_u8, 1..4_u64, 0..15_u64), 0..80)
        ) {
            let mut now = Instant::now();
            let mut session = Session::new(0);
            let (mut paused, mut staging) = (false, None);
            let mut versions = vec![0];
            for (step, update, wait) in steps {
                now += Duration::from_millis(wait);
                let acts = match step {
                    0 => session.ask(&offer(update, update), now).unwrap_or_default(),
                    1 => session.ask(&pause(update), now).unwrap_or_default(),
                    2 => session.ask(&WeightsRequest::Commit { update }, now).unwrap_or_default(),
                    3 => session.ask(&WeightsRequest::Resume { update }, now).unwrap_or_default(),
                    4 => session.ask(&WeightsRequest::Abort { update, why: String::new() }, now).unwrap_or_default(),
                    5 => session.hear(staged(update), now),
                    6 => session.hear(Heard::Paused { update }, now),
                    7 => session.hear(Heard::Committed { update, result: Ok(()) }, now),
                    _ => session.tick(now),
                };
                for act in acts {
                    match act {
                        Act::Stage(offer) => staging = Some(offer.update),
                        Act::Drop => staging = None,
                        Act::Pause { update, .. } => {
                            prop_assert!(!paused && staging == Some(update));
                            paused = true;
                        }
                        Act::Commit { update, version } => {
                            prop_assert!(paused && staging == Some(update));
                            prop_assert!(version > *versions.last().unwrap());
                            versions.push(version);
                        }
                        Act::Resume => prop_assert!(std::mem::take(&mut paused)),
                    }
                }
                prop_assert_eq!(paused, !matches!(session.phase(), Serving | Staging | Staged));
            }
            // Whatever was left undone ends by itself.
            for _ in 0..4 {
                let committing = session.update().filter(|_| session.phase() == Committing);
                if let Some(update) = committing {
                    session.hear(Heard::Committed { update, result: Ok(()) }, now);
                }
                now += Duration::from_millis(100);
                session.tick(now);
            }
            prop_assert_eq!(session.phase(), Serving);
        }
    }
}
