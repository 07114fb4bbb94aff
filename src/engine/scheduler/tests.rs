//! The scheduler as a machine: commands and reports in, events out, blocks counted at the end.

mod early;
mod link;

use std::sync::{Arc, Mutex};

use prometheus_client::registry::Registry;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::config::{ReferenceConfig, ReferenceLayout};
use crate::control::RuntimeStatus;
use crate::engine::kv_cache::KvCache;
use crate::engine::model::Sampling;
use crate::engine::request::{Event, HandOver, NewSequence, Params, Slots, Source};
use crate::engine::tokenizer::{Token, decode};
use crate::kv::{
    Begin, EarlyParams, End, KvError, Offer, PdlinkParams, Progress, Prompt, TransferFailure, TransferHandle,
    TransferParams,
};
use crate::telemetry::{Side, TransferRecord};
use link::{Call, FakeLink};

fn params(transfer_id: TransferId, tokens: u32) -> TransferParams {
    TransferParams {
        do_remote_prefill: true,
        do_remote_decode: false,
        remote_engine_id: "p".into(),
        remote_request_id: "cmpl-p".into(),
        remote_host: "127.0.0.1".into(),
        remote_port: 1,
        remote_block_ids: vec![Vec::new()],
        tp_size: 1,
        remote_num_tokens: tokens,
        pdlink: PdlinkParams {
            version: 1,
            transfer_id,
            ranks: Vec::new(),
            geometry_digest: 0,
            weight_version: Some(0),
            seal: String::new(),
        },
    }
}

/// A scheduler of 4-token blocks, and what its clients hear.
pub(super) struct Rig {
    pub(super) scheduler: Scheduler,
    link: Arc<FakeLink>,
    next_group: u64,
}

pub(super) struct Client {
    group: u64,
    events: UnboundedReceiver<Event>,
}

pub(super) struct Ask {
    prompt: Vec<Token>,
    max_tokens: usize,
    source: Source,
    hand_over: Option<TransferId>,
    /// Whether decode may claim it meanwhile.
    early: bool,
    salt: Option<&'static str>,
    streams: bool,
}

pub(super) fn ask(prompt: usize, max_tokens: usize) -> Ask {
    let prompt = (0..prompt).map(|at| Token::try_from(at % 200).unwrap()).collect();
    Ask { prompt, max_tokens, source: Source::Local, hand_over: None, early: false, salt: None, streams: false }
}

impl Ask {
    pub(super) fn streamed(self) -> Self {
        Self { streams: true, ..self }
    }

    pub(super) fn remote(self, id: TransferId) -> Self {
        let tokens = u32::try_from(self.prompt.len()).unwrap();
        Self { source: Source::Remote(Box::new(params(id, tokens))), ..self }
    }
}

#[derive(Debug, PartialEq)]
pub(super) enum Heard {
    Text(String, FinishReason),
    Failed(u16),
    Nothing,
}

impl Client {
    /// What the client has, if its answer has ended.
    pub(super) fn hear(&mut self) -> Heard {
        let mut tokens = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            match event {
                Event::Failed(error) => return Heard::Failed(error.status.as_u16()),
                Event::Restarted { .. } => tokens.clear(),
                Event::Token(event) => {
                    tokens.extend(event.token.map(|token| token.token));
                    if let Some(finish) = event.finish {
                        return Heard::Text(decode(&tokens, false), finish.reason);
                    }
                }
            }
        }
        Heard::Nothing
    }

    pub(super) fn text(&mut self) -> String {
        match self.hear() {
            Heard::Text(text, FinishReason::Length) => text,
            other => panic!("no whole answer: {other:?}"),
        }
    }
}

impl Rig {
    pub(super) fn new(num_blocks: usize) -> Self {
        Self::with(num_blocks, LoadFailurePolicy::Fail, true)
    }

    fn with(num_blocks: usize, policy: LoadFailurePolicy, prefix_caching: bool) -> Self {
        let config = ReferenceConfig {
            layers: 2,
            kv_heads: 2,
            head_size: 4,
            block_size: 4,
            num_blocks,
            layout: ReferenceLayout::SplitKv,
            ..ReferenceConfig::default()
        };
        let link = Arc::new(FakeLink::default());
        let scheduler = Scheduler::new(SchedulerParts {
            blocks: Blocks::new(KvCache::new("m", &config, 1).unwrap(), prefix_caching),
            link: link.clone(),
            metrics: Arc::new(EngineMetrics::new(&mut Registry::default())),
            policy,
            model_len_max: num_blocks * 4,
            weights: Weights::base(0),
        });
        Self { scheduler, link, next_group: 0 }
    }

    pub(super) fn submit(&mut self, ask: Ask) -> Client {
        let (sender, events) = unbounded_channel();
        self.next_group += 1;
        let group = self.next_group;
        let params = Params {
            max_tokens: ask.max_tokens,
            min_tokens: 0,
            ignore_eos: true,
            stop: Vec::new(),
            include_stop: false,
            stop_token_ids: Vec::new(),
            logprobs: None,
            cache_salt: ask.salt.map(str::to_owned),
            adapter: None,
        };
        let sequence = NewSequence {
            index: 0,
            request_id: format!("cmpl-{group}"),
            prompt: ask.prompt.into(),
            params: Arc::new(params),
            sampling: Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 },
            source: ask.source,
            hand_over: ask.hand_over.map(|transfer_id| HandOver { transfer_id, early: ask.early }),
            streams: ask.streams,
            slot: Slots::new(1).take(1).unwrap().remove(0),
        };
        let external_id = format!("request-{group}");
        self.scheduler.handle(Command::Submit(Group {
            id: group,
            external_id,
            sequences: vec![sequence],
            events: sender,
        }));
        Client { group, events }
    }

    /// Steps until nothing moves without another command.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            let outcome = self.scheduler.step();
            if outcome.is_stuck() {
                return;
            }
            self.scheduler.deliver(outcome);
        }
        panic!("it never comes to rest");
    }

    pub(super) fn answer(&mut self, ask: Ask) -> String {
        let mut client = self.submit(ask);
        self.settle();
        client.text()
    }

    pub(super) fn report(&mut self, transfer_id: TransferId, side: Side, end: End) {
        self.scheduler.handle(Command::Report(Report { transfer_id, side, end }));
    }

    /// Whether nothing of any request is left.
    pub(super) fn is_empty(&self) -> bool {
        let s = &self.scheduler;
        s.waiting.is_empty()
            && s.running.is_empty()
            && s.loading.is_empty()
            && s.leaving.is_empty()
            && s.held.is_empty()
    }

    pub(super) fn used(&self) -> usize {
        self.scheduler.parts.blocks.used()
    }

    /// Puts the KV of a prompt where the link would, from `first_token` on.
    pub(super) fn land(&self, ask: &Ask, blocks: &[BlockId], first_token: u32) {
        let cache = &self.scheduler.parts.blocks.cache;
        let mut context = crate::engine::model::Context::start(Weights::base(0));
        let first = first_token as usize;
        for (position, &token) in ask.prompt.iter().enumerate() {
            context = context.then(token);
            if position >= first {
                (0..2).for_each(|layer| cache.write(blocks, position - first, layer, context));
            }
        }
    }

    pub(super) fn fetched(&self) -> (Vec<BlockId>, u32) {
        match self.link.calls().pop() {
            Some(Call::Fetch { blocks, first_token }) => (blocks, first_token),
            other => panic!("no fetch but {other:?}"),
        }
    }
}

pub(super) fn id(byte: u8) -> TransferId {
    TransferId([byte; 16])
}

pub(super) fn lost(fenced: bool) -> End {
    End::Failed { failure: TransferFailure::ShutDown { side: Side::Prefill }, fenced }
}

#[test]
fn answers_do_not_depend_on_company_caching_or_preemption() {
    let alone: Vec<_> = (1..20).map(|len| Rig::with(64, LoadFailurePolicy::Fail, false).answer(ask(len, 12))).collect();
    for caching in [false, true] {
        for blocks in [256, 9] {
            let mut rig = Rig::with(blocks, LoadFailurePolicy::Fail, caching);
            let mut clients: Vec<_> = (1..20).map(|len| rig.submit(ask(len, 12))).collect();
            rig.settle();
            for (client, want) in clients.iter_mut().zip(&alone) {
                assert_eq!(client.text(), *want, "{blocks} blocks, caching {caching}");
            }
            assert_eq!(rig.used(), 0);
            assert_eq!(rig.scheduler.parts.metrics.preempted.get() > 0, blocks == 9, "{blocks} blocks");
        }
    }
}

#[test]
fn long_prompts_are_computed_in_chunks_wherever_these_end() {
    let long = || ask(STEP_TOKENS_MAX * 2 + 100, 4);
    let mut rig = Rig::with(3000, LoadFailurePolicy::Fail, false);
    let want = rig.answer(long());
    let mut first = rig.submit(Ask { salt: Some("first"), ..ask(700, 40) });
    let mut second = rig.submit(long());
    let mut steps = 0;
    while first.hear() == Heard::Nothing {
        let outcome = rig.scheduler.step();
        assert!(outcome.prefill_tokens + outcome.decodes <= STEP_TOKENS_MAX);
        rig.scheduler.deliver(outcome);
        steps += 1;
    }
    assert_eq!(steps, 40, "the older one decodes at every step while the long one is prefilled");
    rig.settle();
    assert_eq!(second.text(), want);
}

#[test]
fn a_prefix_hit_shortens_the_work_and_a_salt_prevents_it() {
    let mut rig = Rig::new(64);
    let cold = rig.answer(ask(18, 4));
    let computed = rig.scheduler.parts.metrics.prompt_computed.get();
    assert_eq!((computed, rig.answer(ask(18, 4)) == cold), (18, true));
    assert_eq!(rig.scheduler.parts.metrics.prompt_computed.get() - computed, 2, "four blocks of four were found");
    assert_eq!(rig.answer(Ask { salt: Some("s"), ..ask(18, 4) }), cold);
    assert_eq!(rig.scheduler.parts.metrics.prompt_cached.get(), 16, "nothing was found under another salt");
}

#[test]
fn a_prompt_that_is_cached_whole_still_computes_its_last_token() {
    let mut rig = Rig::new(64);
    let cold = rig.answer(ask(16, 4));
    assert_eq!(rig.answer(ask(16, 4)), cold);
    assert_eq!(rig.scheduler.parts.metrics.prompt_cached.get(), 12);
}

#[test]
fn one_wrong_byte_changes_the_answer() {
    let want = Rig::new(64).answer(ask(10, 16));
    for at in [0, 31, 16 * 9] {
        let mut rig = Rig::new(64);
        let mut client = rig.submit(ask(10, 16));
        let outcome = rig.scheduler.step();
        rig.scheduler.deliver(outcome);
        let cache = &rig.scheduler.parts.blocks.cache;
        let region = &cache.ranks()[0].regions[0];
        let old = region.to_vec(at, 1).unwrap();
        region.copy_in(at, &[old[0] ^ 0x10]).unwrap();
        rig.settle();
        assert_ne!(client.text(), want, "byte {at}");
    }
}

#[test]
fn prefill_holds_the_prompts_blocks_until_its_report() {
    for (end, name) in
        [(End::Sent, "sent"), (End::Expired, "expired"), (End::Aborted, "aborted"), (lost(true), "failed")]
    {
        let mut rig = Rig::with(64, LoadFailurePolicy::Fail, false);
        let mut client = rig.submit(Ask { hand_over: Some(id(1)), ..ask(9, 1) });
        rig.settle();
        assert!(matches!(client.hear(), Heard::Text(_, FinishReason::Length)));
        assert_eq!(rig.link.calls(), [Call::Offer { blocks: 3, tokens: 9 }]);
        assert_eq!((rig.used(), rig.is_empty()), (3, false), "KV-2, case: {name}");
        rig.report(id(1), Side::Prefill, end);
        assert_eq!((rig.used(), rig.is_empty()), (0, true), "KV-2, case: {name}");
    }
}

#[test]
fn an_answer_longer_than_one_token_hands_over_the_prompt_alone() {
    let mut rig = Rig::with(64, LoadFailurePolicy::Fail, false);
    rig.submit(Ask { hand_over: Some(id(1)), ..ask(4, 9) });
    rig.settle();
    assert_eq!(rig.link.calls(), [Call::Offer { blocks: 1, tokens: 4 }]);
    assert_eq!(rig.used(), 1);
}

#[test]
fn what_was_loaded_is_not_computed_again_but_for_the_last_token() {
    for len in 1..14 {
        let want = Rig::new(64).answer(ask(len, 8));
        let mut rig = Rig::new(64);
        let mut client = rig.submit(ask(len, 8).remote(id(1)));
        rig.settle();
        if len == 1 {
            assert_eq!(rig.link.calls(), [Call::Expect, Call::Release], "the only token is computed in any case");
        } else {
            let (blocks, first_token) = rig.fetched();
            assert_eq!((blocks.len(), first_token), (len.div_ceil(4), 0));
            assert_eq!(client.hear(), Heard::Nothing, "nothing is decoded before the KV is there");
            rig.land(&ask(len, 8), &blocks, 0);
            rig.report(id(1), Side::Decode, End::Received);
            rig.settle();
            assert_eq!(rig.scheduler.parts.metrics.prompt_loaded.get(), len as u64);
        }
        assert_eq!(client.text(), want, "{len} tokens");
        assert_eq!(rig.scheduler.parts.metrics.prompt_computed.get(), 1);
        assert_eq!(rig.used(), 0);
    }
}

#[test]
fn a_local_hit_shortens_the_load() {
    let mut rig = Rig::new(64);
    rig.answer(ask(8, 1));
    let want = Rig::new(64).answer(ask(14, 8));
    let mut client = rig.submit(ask(14, 8).remote(id(1)));
    rig.settle();
    let (blocks, first_token) = rig.fetched();
    assert_eq!((blocks.len(), first_token), (2, 8));
    rig.land(&ask(14, 8), &blocks, 8);
    rig.report(id(1), Side::Decode, End::Received);
    rig.settle();
    assert_eq!(client.text(), want);
}

#[test]
fn kv_that_did_not_arrive_is_seen_in_the_answer() {
    let want = Rig::new(64).answer(ask(9, 8));
    let mut rig = Rig::new(64);
    let mut client = rig.submit(ask(9, 8).remote(id(1)));
    rig.settle();
    rig.report(id(1), Side::Decode, End::Received);
    rig.settle();
    assert_ne!(client.text(), want, "poisoned blocks were decoded as if they were KV");
}

#[test]
fn a_failed_load_ends_as_the_policy_says() {
    use LoadFailurePolicy::{Fail, Recompute};
    // (name, policy, how it ended, whether the blocks were there already, status or 200)
    let cases = [
        ("fail", Fail, lost(true), true, 500),
        ("fail while waiting", Fail, lost(true), false, 500),
        ("recompute", Recompute, lost(true), true, 200),
        ("recompute while waiting", Recompute, lost(true), false, 200),
        ("recompute, not fenced", Recompute, lost(false), true, 200),
        ("abort is no failure to mend", Recompute, End::Aborted, true, 500),
        ("abort while waiting", Recompute, End::Aborted, false, 500),
    ];
    for (name, policy, end, with_blocks, status) in cases {
        let want = Rig::new(64).answer(ask(9, 8));
        let mut rig = Rig::with(64, policy, true);
        let quarantined = if end == lost(false) { 3 } else { 0 };
        let mut client = rig.submit(ask(9, 8).remote(id(1)));
        if with_blocks {
            rig.settle();
        }
        rig.report(id(1), Side::Decode, end);
        rig.settle();
        let heard = client.hear();
        if status == 200 {
            assert_eq!(heard, Heard::Text(want, FinishReason::Length), "case: {name}");
            assert_eq!(rig.scheduler.parts.metrics.recomputed.get(), 1, "case: {name}");
        } else {
            assert_eq!(heard, Heard::Failed(status), "case: {name}");
        }
        assert_eq!(rig.used(), 0, "case: {name}");
        assert_eq!(rig.scheduler.parts.blocks.quarantined(), quarantined, "KV-7, case: {name}");
        assert_eq!(rig.scheduler.parts.blocks.available(), 64 - quarantined, "KV-7, case: {name}");
    }
}

#[test]
fn a_client_that_leaves_frees_everything_in_any_state() {
    // Waiting, with a claim.
    let mut rig = Rig::new(64);
    let client = rig.submit(ask(9, 8).remote(id(1)));
    rig.scheduler.handle(Command::Abort(client.group));
    assert_eq!(rig.link.calls(), [Call::Expect, Call::Abort]);
    assert!(rig.is_empty(), "KV-9 waiting");
    rig.report(id(1), Side::Decode, End::Aborted);

    // Loading: blocks stay until the report.
    let client = rig.submit(ask(9, 8).remote(id(2)));
    rig.settle();
    rig.link.calls();
    rig.scheduler.handle(Command::Abort(client.group));
    assert_eq!(rig.link.calls(), [Call::Abort]);
    assert_eq!((rig.used(), rig.is_empty()), (3, false), "KV-7 loading");
    for end in [End::Aborted, End::Received] {
        rig.report(id(2), Side::Decode, end);
        assert_eq!((rig.used(), rig.is_empty()), (0, true), "KV-9 loading");
    }

    // Running.
    let mut client = rig.submit(ask(9, 8));
    let outcome = rig.scheduler.step();
    rig.scheduler.handle(Command::Abort(client.group));
    rig.scheduler.deliver(outcome);
    assert_eq!(client.hear(), Heard::Text(String::new(), FinishReason::Abort));
    assert_eq!((rig.used(), rig.is_empty()), (0, true), "KV-9 running");

    // Held: the answer was made but nobody took it.
    let client = rig.submit(Ask { hand_over: Some(id(3)), ..ask(9, 1) });
    rig.settle();
    rig.link.calls();
    rig.scheduler.handle(Command::Abort(client.group));
    assert_eq!(rig.link.calls(), [Call::Abort], "KV-9 held");
    rig.report(id(3), Side::Prefill, End::Aborted);
    assert_eq!((rig.used(), rig.is_empty()), (0, true), "KV-9 held");
}

#[test]
fn a_prompt_of_another_length_is_never_decoded() {
    let mut rig = Rig::new(64);
    let mut wrong = ask(9, 8).remote(id(1));
    wrong.prompt.push(1);
    let mut client = rig.submit(wrong);
    assert_eq!(client.hear(), Heard::Failed(400));
    assert_eq!(rig.link.calls(), [Call::Expect, Call::Abort], "prefill's blocks do not wait for it");
    assert!(rig.is_empty());
}

#[test]
fn waiting_for_blocks_is_in_order_and_ends_when_a_lease_does() {
    let mut rig = Rig::with(4, LoadFailurePolicy::Fail, false);
    rig.submit(Ask { hand_over: Some(id(1)), ..ask(9, 1) });
    rig.settle();
    let mut long = rig.submit(ask(8, 2));
    let mut short = rig.submit(ask(1, 1));
    rig.settle();
    assert_eq!((long.hear(), short.hear()), (Heard::Nothing, Heard::Nothing));
    rig.report(id(1), Side::Prefill, End::Expired);
    rig.settle();
    long.text();
    short.text();
    assert_eq!(rig.used(), 0);
}

#[test]
fn requests_are_ended_by_the_name_their_client_gave() {
    let mut rig = Rig::new(64);
    let mut clients = [rig.submit(ask(3, 4)), rig.submit(ask(3, 4)), rig.submit(ask(3, 4))];
    let end = |rig: &mut Rig, names| {
        let (answer, mut ended) = tokio::sync::oneshot::channel();
        rig.scheduler.handle(Command::AbortNamed(names, answer));
        ended.try_recv().unwrap()
    };
    assert_eq!(end(&mut rig, Some(vec!["request-2".to_owned(), "nobody".to_owned()])), 1);
    assert_eq!(clients[1].hear(), Heard::Text(String::new(), FinishReason::Abort));
    assert_eq!(end(&mut rig, None), 2);
    assert!(rig.is_empty());
    assert_eq!(clients[0].hear(), Heard::Text(String::new(), FinishReason::Abort));
}

#[test]
fn the_prefix_cache_is_reset_only_when_no_block_is_used() {
    let mut rig = Rig::new(64);
    let reset = |rig: &mut Rig| {
        let (answer, mut done) = tokio::sync::oneshot::channel();
        rig.scheduler.handle(Command::ResetPrefixCache(answer));
        done.try_recv().unwrap()
    };
    rig.submit(Ask { hand_over: Some(id(1)), ..ask(9, 1) });
    rig.settle();
    assert!(!reset(&mut rig));
    rig.report(id(1), Side::Prefill, End::Sent);
    assert!(reset(&mut rig));
    rig.answer(ask(9, 1));
    assert_eq!(rig.scheduler.parts.metrics.prompt_cached.get(), 0);
}
