//! Keeps a worker whose weights are not the fleet's out of the pools, and lets it catch up.
//!
//! A worker that was restarted has what it was started with. Its control connection ends with its process, long before a
//! new one listens: from that moment until its version was asked, it gets no request. Then it takes the fleet's version from
//! a worker that has it, or from the folder that it came from, alone, and serves.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::sleep;

use super::super::health::State;
use super::super::shared::Shared;
use super::desk::{Refused, members};
use super::members::{Member, tell_all};
use super::update::Update;
use crate::control::{ControlError, WeightSource, WeightsPhase, WeightsRequest, WeightsStatus};

/// How soon a worker that could not be asked, or not be helped, is asked again.
const AGAIN: Duration = Duration::from_millis(200);
/// How often one that is well is asked although nothing has happened.
const NOW_AND_THEN: Duration = Duration::from_secs(5);
/// How often one that takes no weights from us is asked whether it does now.
const SELDOM: Duration = Duration::from_secs(30);

/// Never ends by itself.
pub(super) async fn watch(shared: Arc<Shared>, member: Member) {
    let mut changed = shared.weights.changed.subscribe();
    let mut said = String::new();
    loop {
        let pause = match member.client.weights(WeightsRequest::Status).await {
            Ok(status) => match look(&shared, &member, &status).await {
                Ok(()) => {
                    said.clear();
                    NOW_AND_THEN
                }
                Err(why) => {
                    if said != why {
                        tracing::warn!(
                            worker = member.worker.name(),
                            why,
                            "a worker is kept out: its weights are not the fleet's"
                        );
                        said = why;
                    }
                    AGAIN
                }
            },
            // It is updated in another way, or not at all.
            Err(ControlError::Refused { .. }) => SELDOM,
            // Slow is not gone: a process that ended says so by the end of its connection.
            Err(ControlError::TimedOut { .. }) => AGAIN,
            Err(_) => {
                bar_unless_new(&shared, &member);
                AGAIN
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            _ = changed.changed() => {}
            lost = member.client.lost() => match lost {
                Ok(()) => bar_unless_new(&shared, &member),
                Err(_) => sleep(AGAIN).await,
            },
        }
    }
}

/// While the fleet has what everybody is started with, a restarted worker has that too.
fn bar_unless_new(shared: &Shared, member: &Member) {
    let version = shared.weights.fleet().version;
    if version.is_some_and(|version| version > 0) {
        member.worker.health.bar(true);
    }
}

/// Holds a worker against the fleet. `Err`: it is kept out, and this is why.
async fn look(shared: &Arc<Shared>, member: &Member, status: &WeightsStatus) -> Result<(), String> {
    // Not while an update is under way: what a worker says then is half of something.
    let Ok(turn) = shared.weights.turn.try_read() else { return Ok(()) };
    let (Some(version), digest) = learn(shared, status) else { return Ok(()) };
    if let (WeightsPhase::Committed, Some(update), true) = (status.phase, status.update, status.version == version) {
        // It was slow, and the word to go on came before it could take it.
        tell_all(&hear_ranks(shared, member, status).await?, &WeightsRequest::Resume { update }).await;
    }
    if !matches!(status.phase, WeightsPhase::Serving | WeightsPhase::Staging | WeightsPhase::Staged) {
        member.worker.health.bar(true);
        return Err(format!("it is {} in an update that is not under way any more", status.phase.name()));
    }
    let ranks = match hear_ranks(shared, member, status).await {
        Ok(ranks) => ranks,
        Err(why) => {
            member.worker.health.bar(true);
            return Err(why);
        }
    };
    if status.version == version && status.digest != digest {
        member.worker.health.bar(true);
        return Err(format!("it has other weights under the fleet's version {version}; restart it"));
    }
    if status.version == version {
        if member.worker.health.bar(false) {
            tracing::info!(worker = member.worker.name(), version, "a worker has the fleet's weights and serves");
        }
        return Ok(());
    }
    member.worker.health.bar(true);
    if status.version > version {
        return Err(format!(
            "it has version {}, the fleet has {version}; restart it, or update the fleet",
            status.version
        ));
    }
    if member.worker.health.state() == State::Down {
        return Err(format!("it has version {}, and does not serve yet", status.version));
    }
    let mut wanted = shared.weights.wanted.subscribe();
    let update = rand::random();
    let caught_up = tokio::select! {
        caught_up = catch_up(shared, &ranks, update, version) => caught_up,
        _ = wanted.changed() => {
            let why = "an update of the whole fleet comes first".to_owned();
            tell_all(&ranks, &WeightsRequest::Abort { update, why: why.clone() }).await;
            Err(why)
        }
    };
    drop(turn);
    caught_up?;
    member.worker.health.bar(false);
    tracing::info!(
        worker = member.worker.name(),
        version,
        "a worker has caught up with the fleet's weights and serves"
    );
    Ok(())
}

/// All ranks of a worker, the first one's status being known. `Err`: they are not of one mind, or one cannot be asked.
async fn hear_ranks(shared: &Shared, member: &Member, first: &WeightsStatus) -> Result<Vec<Member>, String> {
    let others = member.others(shared, first);
    for (other, status) in others.iter().zip(tell_all(&others, &WeightsRequest::Status).await) {
        let status = status.map_err(|error| format!("rank {} cannot be asked: {error}", other.rank))?;
        if (status.version, status.digest, status.phase) != (first.version, first.digest, first.phase) {
            let told = |status: &WeightsStatus| format!("version {}, {}", status.version, status.phase.name());
            return Err(format!("rank 0 has {}, rank {} {}", told(first), other.rank, told(&status)));
        }
    }
    Ok(std::iter::once(member.clone()).chain(others).collect())
}

/// The fleet's version. A proxy that was restarted before workers that were not learns it from them: the highest that any
/// has, until it has made an update itself. With it, its digest.
fn learn(shared: &Shared, status: &WeightsStatus) -> (Option<u64>, Option<[u8; 16]>) {
    let desk = &shared.weights;
    let mut fleet = desk.fleet();
    if desk.learning.load(Ordering::Acquire) && fleet.version.is_none_or(|version| version < status.version) {
        fleet.version = Some(status.version);
        fleet.digest = status.digest;
        desk.now_serves(status.version);
    }
    (fleet.version, fleet.digest)
}

/// Gives one worker the fleet's version: the same phases, with nobody else in them.
async fn catch_up(shared: &Arc<Shared>, ranks: &[Member], update: u64, version: u64) -> Result<(), String> {
    let (digest, source) = {
        let fleet = shared.weights.fleet();
        (fleet.digest, fleet.source.clone())
    };
    let source = match source {
        Some(WeightSource::Base) => WeightSource::Base,
        other => match peer(shared, &ranks[0], version).await {
            Some(address) => WeightSource::Peer(address),
            None => other.filter(|source| matches!(source, WeightSource::Folder(_))).ok_or_else(|| {
                format!("no worker keeps version {version} for it to take; it waits for the next update")
            })?,
        },
    };
    tracing::info!(worker = ranks[0].worker.name(), version, %source, "a worker catches up");
    let update = Update { shared, members: ranks, id: update, version, source };
    update.run_alone(digest).await.map_err(|failed| failed.to_string())
}

/// A worker that has the version and gives it away.
async fn peer(shared: &Shared, member: &Member, version: u64) -> Option<String> {
    let others = members(shared).into_iter().filter(|other| other.worker.number != member.worker.number);
    let asked = others.map(|other| async move {
        let status = other.client.weights(WeightsRequest::Status).await.ok()?;
        (status.version == version && status.serves_peers).then(|| other.client.addr().to_owned())
    });
    join_all(asked).await.into_iter().flatten().next()
}

/// What the workers serve, and all of their ranks: the same, or one of them is named.
pub(super) async fn all_ranks(shared: &Shared, members: &[Member]) -> Result<(u64, Vec<Member>), Refused> {
    let mut serves: Option<u64> = None;
    let mut ranks = Vec::new();
    for (member, status) in members.iter().zip(tell_all(members, &WeightsRequest::Status).await) {
        let status = same_version(member, status, &mut serves)?;
        let others = member.others(shared, &status);
        for (other, status) in others.iter().zip(tell_all(&others, &WeightsRequest::Status).await) {
            same_version(other, status, &mut serves)?;
        }
        ranks.push(member.clone());
        ranks.extend(others);
    }
    Ok((serves.unwrap_or_default(), ranks))
}

fn same_version(
    member: &Member,
    status: Result<WeightsStatus, ControlError>,
    serves: &mut Option<u64>,
) -> Result<WeightsStatus, Refused> {
    const DOING: &str = "asking for versions";
    let status = match status {
        Ok(status) => status,
        Err(ControlError::Refused { why, .. }) => {
            return Err(Refused::NoMembers { why: format!("{}: {why}", member.name()) });
        }
        Err(error) => return Err(member.failed(DOING, error).into()),
    };
    let before = *serves.get_or_insert(status.version);
    if before != status.version {
        let why = format!("it serves version {}, others serve {before}; it is still catching up", status.version);
        return Err(member.failed(DOING, why).into());
    }
    Ok(status)
}
