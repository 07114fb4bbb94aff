//! The scheduler when its weights change.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::tests::{Heard, Rig, ask, id, lost};
use super::*;
use crate::kv::End;
use crate::telemetry::Side;

const NEW: [u8; 16] = [1; 16];

/// What the new weights answer to a prompt, by an engine that has had no others.
fn new_answer(prompt: usize, max_tokens: usize) -> String {
    let mut rig = Rig::new(64);
    flip(&mut rig, InFlight::Continue);
    rig.answer(ask(prompt, max_tokens))
}

fn old_answer(prompt: usize, max_tokens: usize) -> String {
    Rig::new(64).answer(ask(prompt, max_tokens))
}

fn count() -> (Arc<AtomicUsize>, impl Fn() -> Done) {
    let counter = Arc::new(AtomicUsize::new(0));
    let shared = Arc::clone(&counter);
    (counter, move || {
        let shared = Arc::clone(&shared);
        Done::new(move || {
            shared.fetch_add(1, Ordering::Relaxed);
        })
    })
}

/// Pauses, steps as far as that goes, flips, resumes.
fn flip(rig: &mut Rig, in_flight: InFlight) {
    let (counter, done) = count();
    rig.scheduler.handle(Command::Pause(in_flight, done()));
    rig.settle();
    assert_eq!(counter.load(Ordering::Relaxed), 1, "paused");
    rig.scheduler.handle(Command::TakeWeights(Weights::of(1, NEW), done()));
    assert_eq!(counter.load(Ordering::Relaxed), 2, "flipped");
    rig.scheduler.handle(Command::Resume);
}

/// Steps until each running sequence has some tokens.
fn run(rig: &mut Rig, steps: usize) {
    for _ in 0..steps {
        let outcome = rig.scheduler.step();
        rig.scheduler.deliver(outcome);
    }
}

#[test]
fn wt_3_nothing_cached_with_the_old_weights_is_found_after_the_flip() {
    let mut rig = Rig::new(64);
    let before = rig.answer(ask(20, 6));
    flip(&mut rig, InFlight::Continue);
    let (cached, computed) = {
        let metrics = &rig.scheduler.parts.metrics;
        (metrics.prompt_cached.get(), metrics.prompt_computed.get())
    };
    let after = rig.answer(ask(20, 6));
    assert_ne!(before, after);
    assert_eq!(after, new_answer(20, 6));
    let metrics = &rig.scheduler.parts.metrics;
    assert_eq!((metrics.prompt_cached.get(), metrics.prompt_computed.get()), (cached, computed + 20));
}

#[test]
fn while_paused_nothing_moves_and_new_requests_wait_for_the_new_weights() {
    let mut rig = Rig::new(64);
    let (_, done) = count();
    rig.scheduler.handle(Command::Pause(InFlight::Restart, done()));
    let mut client = rig.submit(ask(9, 5));
    rig.settle();
    assert_eq!(client.hear(), Heard::Nothing);
    rig.scheduler.handle(Command::TakeWeights(Weights::of(1, NEW), done()));
    rig.settle();
    assert_eq!(client.hear(), Heard::Nothing);
    rig.scheduler.handle(Command::Resume);
    rig.settle();
    assert_eq!(client.text(), new_answer(9, 5));
    // A pause that is taken back leaves everything as it was.
    rig.scheduler.handle(Command::Pause(InFlight::Restart, done()));
    rig.scheduler.handle(Command::Resume);
    assert_eq!(rig.answer(ask(9, 5)), new_answer(9, 5));
}

#[test]
fn restarted_answers_are_wholly_of_the_new_weights_and_streams_that_began_end() {
    let mut rig = Rig::new(64);
    let mut whole = rig.submit(ask(9, 12));
    let mut begun = rig.submit(ask(10, 12).streamed());
    run(&mut rig, 4);
    let mut fresh = rig.submit(ask(11, 12).streamed());
    flip(&mut rig, InFlight::Restart);
    rig.settle();
    assert_eq!(whole.text(), new_answer(9, 12));
    assert_eq!(begun.hear(), Heard::Failed(503));
    assert_eq!(fresh.text(), new_answer(11, 12));
    assert!(rig.is_empty() && rig.used() == 0);
}

#[test]
fn continued_answers_keep_what_they_said_and_go_on_with_the_new_weights() {
    let (old, new) = (old_answer(9, 12), new_answer(9, 12));
    let mut rig = Rig::new(64);
    let mut client = rig.submit(ask(9, 12).streamed());
    run(&mut rig, 5);
    flip(&mut rig, InFlight::Continue);
    rig.settle();
    let text = client.text();
    assert_eq!(text[..5], old[..5]);
    assert!(text != old && text != new, "{text}");
    assert!(rig.is_empty() && rig.used() == 0);
}

#[test]
fn finished_answers_are_wholly_of_the_old_weights_and_later_ones_wait() {
    let mut rig = Rig::new(64);
    let mut clients: Vec<_> = (5..9).map(|len| rig.submit(ask(len, 12).streamed())).collect();
    run(&mut rig, 3);
    let (paused, done) = count();
    rig.scheduler.handle(Command::Pause(InFlight::Finish, done()));
    let mut late = rig.submit(ask(5, 12));
    run(&mut rig, 3);
    assert_eq!(paused.load(Ordering::Relaxed), 0, "answers are still being made");
    rig.settle();
    assert_eq!(paused.load(Ordering::Relaxed), 1);
    for (len, client) in (5..9).zip(&mut clients) {
        assert_eq!(client.text(), old_answer(len, 12));
    }
    assert_eq!(late.hear(), Heard::Nothing);
    rig.scheduler.handle(Command::TakeWeights(Weights::of(1, NEW), done()));
    rig.scheduler.handle(Command::Resume);
    rig.settle();
    assert_eq!(late.text(), new_answer(5, 12));
}

#[test]
fn wt_3_kv_that_was_on_its_way_is_not_used_whatever_became_of_it() {
    for end in [End::Received, lost(true), End::Aborted] {
        let mut rig = Rig::new(64);
        let mut client = rig.submit(ask(9, 12).remote(id(1)));
        rig.settle();
        let (blocks, first_token) = rig.fetched();
        flip(&mut rig, InFlight::Restart);
        rig.land(&ask(9, 12), &blocks, first_token);
        rig.report(id(1), Side::Decode, end.clone());
        rig.settle();
        assert_eq!(client.text(), new_answer(9, 12), "{end:?}");
        assert!(rig.is_empty() && rig.used() == 0);
    }
}

#[test]
fn wt_3_kv_that_was_claimed_and_not_fetched_is_let_go_of() {
    let mut rig = Rig::new(64);
    let (_, done) = count();
    rig.scheduler.handle(Command::Pause(InFlight::Continue, done()));
    let mut client = rig.submit(ask(9, 12).remote(id(1)));
    rig.scheduler.handle(Command::TakeWeights(Weights::of(1, NEW), done()));
    rig.scheduler.handle(Command::Resume);
    rig.report(id(1), Side::Decode, End::Aborted);
    rig.settle();
    assert_eq!(client.text(), new_answer(9, 12));
}
