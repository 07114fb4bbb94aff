//! Concurrent dispatch: what prefill's scheduler tells the link while it computes a prompt that decode may claim.

use super::*;

fn early(prompt: usize) -> Ask {
    Ask { hand_over: Some(id(1)), early: true, ..ask(prompt, 1) }
}

fn layer(layer: u32, tokens: u32) -> Call {
    Call::Progress { layer, tokens }
}

#[test]
fn each_layer_of_each_chunk_is_told_and_then_offered() {
    let long = STEP_TOKENS_MAX + 10;
    let mut rig = Rig::with(1000, LoadFailurePolicy::Fail, false);
    rig.submit(early(long));
    assert_eq!(rig.link.calls(), [Call::Begin], "before anything is computed");
    rig.settle();
    let tokens = |tokens: usize| u32::try_from(tokens).unwrap();
    let (chunk, all) = (tokens(STEP_TOKENS_MAX), tokens(long));
    let offer = Call::Offer { blocks: long.div_ceil(4), tokens: all };
    assert_eq!(rig.link.calls(), [layer(0, chunk), layer(1, chunk), layer(0, all), layer(1, all), offer]);
}

#[test]
fn what_the_prefix_cache_has_is_final_with_the_first_word() {
    let mut rig = Rig::new(64);
    rig.answer(ask(18, 4));
    rig.submit(early(18));
    rig.settle();
    assert_eq!(rig.scheduler.parts.metrics.prompt_cached.get(), 16);
    let offer = Call::Offer { blocks: 5, tokens: 18 };
    assert_eq!(rig.link.calls(), [Call::Begin, layer(0, 18), layer(1, 18), offer]);
}

#[test]
fn a_preempted_prompt_is_told_to_be_void_and_told_again() {
    let long = STEP_TOKENS_MAX + 10;
    // Blocks for the long prompt and the older one, and none to grow.
    let mut rig = Rig::with(long.div_ceil(4) + 1, LoadFailurePolicy::Fail, false);
    let mut older = rig.submit(ask(4, 12));
    let outcome = rig.scheduler.step();
    rig.scheduler.deliver(outcome);
    rig.submit(early(long));
    rig.settle();
    assert_eq!(rig.scheduler.parts.metrics.preempted.get(), 1);
    assert!(matches!(older.hear(), Heard::Text(_, FinishReason::Length)));
    let calls = rig.link.calls();
    let again = calls.iter().position(|call| *call == Call::Restart).expect("a restart");
    let chunk = u32::try_from(STEP_TOKENS_MAX).unwrap();
    assert_eq!(calls[again + 1..][..2], [layer(0, chunk), layer(1, chunk)]);
    assert!(matches!(calls.last(), Some(Call::Offer { .. })));
}

#[test]
fn kv_9_a_prompt_that_ends_before_its_offer_is_given_up() {
    for steps in 0..2 {
        let mut rig = Rig::with(1000, LoadFailurePolicy::Fail, false);
        let client = rig.submit(early(STEP_TOKENS_MAX + 10));
        for _ in 0..steps {
            let outcome = rig.scheduler.step();
            rig.scheduler.deliver(outcome);
        }
        rig.scheduler.handle(Command::Abort(client.group));
        assert_eq!(rig.link.calls().last(), Some(&Call::Abort), "after {steps} steps");
        assert_eq!((rig.used(), rig.is_empty()), (0, true));
    }
}
