//! Concurrent dispatch between two runtimes: decode claims and names its blocks while prefill computes, and is pushed part
//! after part.

#[path = "support/fake_nccl.rs"]
mod fake_nccl;
#[path = "support/kv_cache.rs"]
mod kv_cache;
#[path = "support/kv_worker.rs"]
mod kv_worker;

use std::sync::Arc;

use kv_cache::{Arrangement, Cache, Shape};
use kv_worker::{Plan, Worker, until};
use pdlink::config::{DigestPolicy, Dispatch, KvSendType, Path, Role};
use pdlink::kv::{
    Begin, BlockId, EarlyParams, End, KvError, KvLink, Offer, ParamsError, Progress, Prompt, TransferFailure,
    TransferHandle, TransferId,
};
use pdlink::security::Secret;
use pdlink::telemetry::TransferOutcome;
use pdlink::transport::{LoopbackHub, Nccl, Transport};

const TOKENS: u32 = 30;
const SEED: u64 = 7;
/// Tokens of each chunk of the prompt: not a whole number of blocks.
const CHUNK: u32 = 11;

/// A path that two workers of one process can take: loopback, if none. With `shm` a permission to write cannot be taken back.
const WAYS: [Option<Path>; 4] = [None, Some(Path::Shm), Some(Path::Tcp), Some(Path::Nccl)];

fn plan(name: &'static str, role: Role) -> Plan {
    let mut plan = Plan::new(name, role);
    plan.send_type = KvSendType::PutAsync;
    plan.kv.part_bytes_min = 0;
    plan
}

fn pair(way: Option<Path>, mut prefill: Plan, mut decode: Plan) -> (Worker, Worker) {
    let hub = LoopbackHub::new();
    for plan in [&mut prefill, &mut decode] {
        let hub = Arc::clone(&hub);
        match way {
            // Over a stand-in for the library, which moves host memory; NCCL does not, so no worker would offer it.
            Some(Path::Nccl) => {
                plan.transports = Some(Box::new(|cache: &Cache| -> Vec<Arc<dyn Transport>> {
                    vec![Arc::new(Nccl::new(&cache.regions, &Secret::loopback(), &fake_nccl::setup()).unwrap())]
                }));
            }
            Some(path) => plan.kv.paths = Some(vec![path]),
            None => {
                plan.transports = Some(Box::new(move |cache: &Cache| -> Vec<Arc<dyn Transport>> {
                    vec![hub.transport(Path::Shm, &cache.regions)]
                }));
            }
        }
    }
    (prefill.start(), decode.start())
}

fn a_pair(way: Option<Path>) -> (Worker, Worker) {
    pair(way, plan("prefill", Role::Prefill), plan("decode", Role::Decode))
}

fn one_pair() -> (Worker, Worker) {
    a_pair(Some(Path::Tcp))
}

/// Paths on which whoever writes can be kept out.
const FENCED: [Option<Path>; 2] = [Some(Path::Tcp), Some(Path::Nccl)];

/// One request on both sides.
struct Request<'a> {
    prefill: &'a Worker,
    decode: &'a Worker,
    id: TransferId,
    src: Vec<BlockId>,
    dst: Vec<BlockId>,
    first_token: u32,
}

impl<'a> Request<'a> {
    fn of(pair: &'a (Worker, Worker), first_token: u32) -> Self {
        let (prefill, decode) = (&pair.0, &pair.1);
        Self {
            prefill,
            decode,
            id: TransferId::random(),
            src: prefill.cache.shape.scattered_blocks(TOKENS, SEED),
            dst: decode.cache.shape.scattered_blocks(TOKENS - first_token, SEED ^ 1),
            first_token,
        }
    }

    fn prompt() -> Prompt {
        Prompt { tokens: TOKENS, fingerprint: 99 }
    }

    fn begin(&self) {
        let (transfer_id, prompt) = (self.id, Self::prompt());
        self.prefill.runtime.begin(Begin { transfer_id, request_id: "cmpl-early".to_owned(), prompt }).unwrap();
    }

    fn claim_as(&self, prompt: Prompt) -> TransferHandle {
        let ranks = self.prefill.cache.shape.tp_size as usize;
        let endpoints = vec![self.prefill.runtime.address(); ranks];
        let params = EarlyParams::sealed(self.id, endpoints, &Secret::loopback());
        self.decode.runtime.expect_early(&params, prompt).unwrap()
    }

    fn claim(&self) -> TransferHandle {
        self.claim_as(Self::prompt())
    }

    fn fetch(&self, handle: TransferHandle) {
        self.decode.fetch(handle, &self.dst, self.first_token);
    }

    /// Computes the next chunk and tells of it, layer by layer. What was told is in the cache by then.
    fn compute(&self, tokens: std::ops::Range<u32>, seed: u64) {
        let shape = &self.prefill.cache.shape;
        let (first, last) = (tokens.start / shape.block_size, (tokens.end - 1) / shape.block_size);
        let blocks = &self.src[first as usize..=last as usize];
        self.prefill.cache.put_tokens(blocks, first * shape.block_size, tokens.end, seed);
        let blocks = Arc::new(vec![self.src[..=last as usize].to_vec()]);
        for layer in 0..shape.layers {
            let (layers, blocks) = (layer..layer + 1, Arc::clone(&blocks));
            let progress = Progress { transfer_id: self.id, blocks, layers, tokens: tokens.end };
            self.prefill.runtime.progress(progress);
        }
    }

    fn compute_all(&self) {
        for from in (0..TOKENS).step_by(CHUNK as usize) {
            self.compute(from..(from + CHUNK).min(TOKENS), SEED);
        }
    }

    fn offer(&self) {
        let (transfer_id, blocks) = (self.id, vec![self.src.clone()]);
        let offer = Offer { transfer_id, request_id: "cmpl-early".to_owned(), blocks, tokens: TOKENS };
        self.prefill.runtime.offer(offer).unwrap();
    }

    fn holds(&self, tokens: u32) -> bool {
        let count = (tokens - self.first_token).div_ceil(self.decode.cache.shape.block_size) as usize;
        self.decode.cache.holds_tokens(&self.dst[..count], self.first_token, tokens, SEED)
    }

    fn arrives(&self, what: &str) {
        assert_eq!(self.decode.end_of(self.id), End::Received, "{what}");
        assert_eq!(self.prefill.end_of(self.id), End::Sent, "{what}");
        assert!(self.holds(TOKENS), "byte for byte: {what}");
        self.at_rest();
        let records = [&self.prefill, &self.decode].map(|worker| worker.runtime.record(self.id).unwrap());
        for record in records {
            assert_eq!((record.dispatch, &record.outcome), (Dispatch::Concurrent, &TransferOutcome::Done), "{what}");
        }
    }

    fn at_rest(&self) {
        for worker in [self.prefill, self.decode] {
            until("nothing is in progress", || worker.runtime.status().transfers_active == 0);
            worker.assert_at_rest();
        }
    }

    /// Whatever was begun is over for prefill, and what it hands over all the same comes back at once.
    fn is_over_at_prefill(&self, end: &End) {
        until("prefill has let go", || self.prefill.runtime.status().transfers_active == 0);
        self.offer();
        assert_eq!(self.prefill.end_of(self.id), *end);
    }
}

/// What decode does, and when: before, during and after prefill's part.
#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    BeforeBegin,
    AfterBegin,
    WhileComputing,
    AfterOffer,
}

const MOMENTS: [When; 4] = [When::BeforeBegin, When::AfterBegin, When::WhileComputing, When::AfterOffer];

/// One transfer, with the claim and the blocks at these moments.
fn run(request: &Request<'_>, claims: When, places: When) {
    let mut handle = None;
    let mut act = |now| {
        if claims == now {
            handle = Some(request.claim());
        }
        if let Some(handle) = handle.filter(|_| places == now) {
            request.fetch(handle);
        }
    };
    act(When::BeforeBegin);
    request.begin();
    act(When::AfterBegin);
    request.compute(0..11, SEED);
    act(When::WhileComputing);
    request.compute(11..22, SEED);
    request.compute(22..TOKENS, SEED);
    request.offer();
    act(When::AfterOffer);
    request.arrives(&format!("claimed {claims:?}, placed {places:?}"));
}

#[test]
fn a_claim_and_blocks_may_come_at_any_moment() {
    for way in WAYS {
        for digest in [DigestPolicy::Off, DigestPolicy::Every] {
            let mut decode = plan("decode", Role::Decode);
            decode.kv.digest = digest;
            let pair = pair(way, plan("prefill", Role::Prefill), decode);
            for (at, claims) in MOMENTS.into_iter().enumerate() {
                for places in &MOMENTS[at..] {
                    run(&Request::of(&pair, 0), claims, *places);
                    run(&Request::of(&pair, 8), claims, *places);
                }
            }
        }
    }
}

#[test]
fn unequal_ranks_blocks_and_layouts_change_nothing() {
    let shape = |tp_size, block_size| Shape { tp_size, block_size, kv_heads: 4, num_blocks: 48, ..Shape::default() };
    let cases = [
        ((1, 4, Arrangement::SplitKv), (2, 4, Arrangement::HeadMajor)),
        ((2, 4, Arrangement::TokenMajor), (1, 8, Arrangement::SplitKv)),
        ((4, 8, Arrangement::LayersInBlock), (2, 4, Arrangement::LayersInBlock)),
    ];
    for ((p_tp, p_block, p_layout), (d_tp, d_block, d_layout)) in cases {
        let side = |name, role, shape, arrangement| Plan { shape, arrangement, ..plan(name, role) };
        let prefill = side("prefill", Role::Prefill, shape(p_tp, p_block), p_layout);
        let pair = pair(Some(Path::Shm), prefill, side("decode", Role::Decode, shape(d_tp, d_block), d_layout));
        for claims in MOMENTS {
            run(&Request::of(&pair, 8), claims, claims);
        }
    }
}

#[test]
fn parts_arrive_while_the_rest_is_computed_and_posts_are_few() {
    for pair in FENCED.map(a_pair) {
        let request = Request::of(&pair, 0);
        request.begin();
        request.fetch(request.claim());
        request.compute_all();
        until("all whole blocks have arrived", || request.holds(28));
        assert!(request.decode.reports.try_recv().is_err(), "KV-3: nothing is reported before prefill's word");
        request.offer();
        request.arrives("in parts");
        let record = request.prefill.runtime.record(request.id).unwrap();
        let layers = u64::from(request.prefill.cache.shape.layers);
        assert!((2..=2 * layers + 1).contains(&record.posts), "{record:?}");
        assert_eq!(record.bytes, request.decode.runtime.record(request.id).unwrap().bytes, "each byte once");
    }
}

/// Two workers that prefill for each other: parts of both go out at once, over one path.
#[test]
fn parts_of_many_requests_in_both_directions_at_once_all_arrive() {
    const EACH_WAY: u32 = 8;
    for way in WAYS {
        let both = |name| {
            let mut plan = plan(name, Role::Both);
            plan.shape.num_blocks = 2 * EACH_WAY * 8;
            plan
        };
        let (one, other) = pair(way, both("one"), both("other"));
        let blocks = |n: u32| (8 * n..8 * (n + 1)).map(BlockId).collect::<Vec<_>>();
        let mut requests = Vec::new();
        for n in 0..EACH_WAY {
            for (prefill, decode) in [(&one, &other), (&other, &one)] {
                let (src, dst) = (blocks(n), blocks(2 * EACH_WAY - 1 - n));
                requests.push((
                    u64::from(n),
                    Request { prefill, decode, id: TransferId::random(), src, dst, first_token: 0 },
                ));
            }
        }
        for (_, request) in &requests {
            request.begin();
            request.fetch(request.claim());
        }
        for from in (0..TOKENS).step_by(CHUNK as usize) {
            requests.iter().for_each(|(seed, request)| request.compute(from..(from + CHUNK).min(TOKENS), *seed));
        }
        requests.iter().for_each(|(_, request)| request.offer());
        for worker in [&one, &other] {
            let mut ends: Vec<_> = (0..2 * EACH_WAY).map(|_| worker.report().end).collect();
            ends.sort_by_key(|end| *end == End::Received);
            let half = EACH_WAY as usize;
            assert_eq!(ends, [vec![End::Sent; half], vec![End::Received; half]].concat(), "{way:?}");
        }
        for (seed, request) in &requests {
            assert!(request.decode.cache.holds_tokens(&request.dst, 0, TOKENS, *seed), "byte for byte: {way:?}");
            request.at_rest();
        }
    }
}

#[test]
fn what_was_preempted_is_pushed_again() {
    for (way, arrives_before) in FENCED.into_iter().flat_map(|way| [false, true].map(|before| (way, before))) {
        let pair = a_pair(way);
        let mut request = Request::of(&pair, 0);
        request.begin();
        request.fetch(request.claim());
        request.compute(0..22, 1234);
        if arrives_before {
            until("it was pushed", || request.decode.cache.holds_tokens(&request.dst[..5], 0, 20, 1234));
        }
        request.prefill.runtime.restart(request.id);
        // It is computed again, into other blocks; whoever got the old ones may write what he likes.
        let old = std::mem::replace(&mut request.src, (30..38).map(BlockId).collect());
        request.prefill.cache.put_tokens(&old, 0, TOKENS, 4321);
        request.compute(0..TOKENS, SEED);
        request.offer();
        request.arrives("preempted");
    }
}

#[test]
fn kv_3_a_claim_for_another_prompt_is_refused_by_name() {
    let pair = one_pair();
    let others = [Prompt { fingerprint: 98, ..Request::prompt() }, Prompt { tokens: TOKENS - 1, fingerprint: 99 }];
    for other in others {
        let request = Request::of(&pair, 0);
        request.begin();
        request.claim_as(other);
        let End::Failed { failure: TransferFailure::BadReference { why, .. }, .. } = request.decode.end_of(request.id)
        else {
            panic!("not refused")
        };
        assert!(why.contains("prompt") || why.contains("29 tokens"), "{why}");
        request.prefill.runtime.abort(request.id);
        request.at_rest();
    }
    let plain = Request::of(&pair, 0);
    plain.offer();
    plain.claim();
    let end = plain.decode.end_of(plain.id);
    assert!(matches!(end, End::Failed { failure: TransferFailure::BadReference { .. }, .. }), "{end:?}");
    plain.prefill.runtime.abort(plain.id);
    assert_eq!(plain.prefill.end_of(plain.id), End::Aborted);
}

#[test]
fn early_parameters_need_the_runs_seal_and_put_async() {
    let pair = one_pair();
    let request = Request::of(&pair, 0);
    let endpoints = vec![request.prefill.runtime.address()];
    let foreign = EarlyParams::sealed(request.id, endpoints, &Secret::generate().unwrap());
    let refused = request.decode.runtime.expect_early(&foreign, Request::prompt());
    assert!(matches!(refused, Err(KvError::Params(ParamsError::BrokenEarlySeal { .. }))), "{refused:?}");
    for send_type in [KvSendType::Get, KvSendType::Put] {
        let (mut prefill, decode) = (plan("prefill", Role::Prefill), plan("decode", Role::Decode));
        prefill.send_type = send_type;
        let pair = self::pair(Some(Path::Tcp), prefill, decode);
        let request = Request::of(&pair, 0);
        let (transfer_id, prompt) = (request.id, Request::prompt());
        let refused = request.prefill.runtime.begin(Begin { transfer_id, request_id: String::new(), prompt });
        assert!(refused.unwrap_err().to_string().contains("PUT_ASYNC"));
        request.claim();
        let end = request.decode.end_of(request.id);
        let End::Failed { failure, .. } = end else { panic!("{end:?}") };
        assert!(failure.to_string().contains("kv_send_type"), "{failure}");
        request.at_rest();
    }
}

/// How far a request has come when something happens to it.
const STAGES: usize = 6;

fn come_to(request: &Request<'_>, stage: usize) {
    let mut handle = None;
    for step in 1..=stage {
        match step {
            1 => handle = Some(request.claim()),
            2 => request.begin(),
            3 => handle.into_iter().for_each(|handle| request.fetch(handle)),
            4 => request.compute(0..CHUNK, SEED),
            _ => request.compute(0..TOKENS, SEED),
        }
    }
}

#[test]
fn kv_9_prefills_request_may_end_at_any_moment() {
    for way in WAYS {
        let pair = pair(way, plan("prefill", Role::Prefill), plan("decode", Role::Decode));
        for stage in 1..STAGES {
            let request = Request::of(&pair, 0);
            come_to(&request, stage);
            request.prefill.runtime.abort(request.id);
            assert_eq!(request.decode.end_of(request.id), End::Aborted, "{way:?}, stage {stage}");
            request.is_over_at_prefill(&End::Aborted);
            request.at_rest();
        }
    }
}

#[test]
fn kv_7_decodes_request_may_end_at_any_moment() {
    for way in WAYS {
        let pair = pair(way, plan("prefill", Role::Prefill), plan("decode", Role::Decode));
        for stage in 1..STAGES {
            let request = Request::of(&pair, 0);
            come_to(&request, stage);
            request.decode.runtime.abort(request.id);
            assert_eq!(request.decode.end_of(request.id), End::Aborted, "{way:?}, stage {stage}");
            if stage >= 2 {
                // Computed on, to the end: nothing of it may land any more.
                request.decode.cache.put_tokens(&request.dst, 0, TOKENS, 555);
                request.compute(0..TOKENS, SEED);
            }
            request.is_over_at_prefill(&End::Aborted);
            request.at_rest();
            let untouched = request.decode.cache.holds_tokens(&request.dst, 0, TOKENS, 555);
            assert!(untouched || stage < 2, "{way:?}, stage {stage}: a write landed after the report");
        }
    }
}

#[test]
fn what_decode_has_already_is_let_go_of() {
    let pair = one_pair();
    for stage in [1, 2] {
        let request = Request::of(&pair, 0);
        let handle = request.claim();
        if stage == 2 {
            request.begin();
        }
        request.decode.runtime.release(handle);
        assert_eq!(request.decode.end_of(request.id), End::Released);
        if stage == 1 {
            request.begin();
        }
        request.compute_all();
        request.is_over_at_prefill(&End::Released);
        request.at_rest();
    }
}

#[test]
fn kv_8_a_worker_that_goes_ends_what_was_begun() {
    for (way, stage) in FENCED.into_iter().flat_map(|way| (2..STAGES).map(move |stage| (way, stage))) {
        let (prefill, decode) = a_pair(way);
        let pair = (prefill, decode);
        let request = Request::of(&pair, 0);
        come_to(&request, stage);
        let id = request.id;
        let (prefill, decode) = pair;
        prefill.runtime.shutdown();
        let end = decode.end_of(id);
        assert!(matches!(end, End::Failed { fenced: true, .. }), "{way:?}, stage {stage}: {end:?}");
        decode.assert_at_rest();
    }
    for (way, stage) in FENCED.into_iter().flat_map(|way| (2..STAGES).map(move |stage| (way, stage))) {
        let (prefill, decode) = a_pair(way);
        let pair = (prefill, decode);
        let request = Request::of(&pair, 0);
        come_to(&request, stage);
        let (id, src) = (request.id, request.src);
        let (prefill, decode) = pair;
        // Prefill hears of it at the latest when decode's connection ends.
        until("prefill was claimed", || decode.runtime.status().transfers_active == 1);
        decode.runtime.shutdown();
        assert!(matches!(decode.reports.recv().unwrap().end, End::Failed { .. }));
        until("prefill has let go", || prefill.runtime.status().transfers_active == 0);
        let offer = Offer { transfer_id: id, request_id: String::new(), blocks: vec![src], tokens: TOKENS };
        prefill.runtime.offer(offer).unwrap();
        assert_eq!(prefill.end_of(id), End::Aborted, "{way:?}, stage {stage}");
        prefill.assert_at_rest();
    }
}

#[test]
fn kv_5_weights_that_change_meanwhile_end_what_was_begun() {
    let pair = one_pair();
    let request = Request::of(&pair, 0);
    come_to(&request, 4);
    until("parts move", || request.holds(8));
    request.prefill.runtime.set_weight_version(2);
    let end = request.decode.end_of(request.id);
    assert!(matches!(end, End::Failed { failure: TransferFailure::WeightVersion { .. }, .. }), "{end:?}");
    request.is_over_at_prefill(&End::Aborted);
    request.at_rest();
}
