//! Workers that run one process for each tensor-parallel rank: every rank a runtime of its own, here in one process.

#[path = "support/kv_cache.rs"]
mod kv_cache;
#[path = "support/kv_worker.rs"]
mod kv_worker;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use kv_cache::{Arrangement, Shape};
use kv_worker::{PATIENCE, Plan, Worker, until};
use pdlink::config::{DigestPolicy, KvSendType, Path, Role};
use pdlink::control::{AbortAnswer, AdminClient};
use pdlink::kv::{BlockId, End, KvError, KvLink, Offer, ParamsMaker, TransferFailure, TransferId, TransferParams};
use pdlink::security::Secret;
use pdlink::transport::{Fault, FaultPlan, Faulty, LoopbackHub, Shm, Transport, When};

const SEND_TYPES: [KvSendType; 3] = [KvSendType::Get, KvSendType::Put, KvSendType::PutAsync];
const TOKENS: u32 = 29;

/// The ranks of one engine.
struct Engine {
    ranks: Vec<Worker>,
    shape: Shape,
    secret: Secret,
}

impl Engine {
    /// One runtime for each rank, or one for all.
    fn start(shape: &Shape, role: Role, together: bool, edit: impl Fn(&mut Plan)) -> Self {
        let count = if together { 1 } else { shape.tp_size };
        let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect();
        let start = |(rank, listener): (u32, TcpListener)| {
            let mut plan = Plan::new(role.name(), role).path(Path::Shm);
            plan.shape = Shape { held: (!together).then_some(rank), ..shape.clone() };
            plan.siblings.clone_from(&addresses);
            plan.siblings.remove(rank as usize);
            edit(&mut plan);
            plan.start_on(listener)
        };
        let ranks = (0..count).zip(listeners).map(start).collect();
        Self { ranks, shape: shape.clone(), secret: Secret::loopback() }
    }

    fn params(&self, transfer_id: TransferId, blocks: &[BlockId], tokens: u32) -> TransferParams {
        if self.ranks.len() == 1 && self.shape.tp_size > 1 {
            panic!("a runtime that holds all ranks makes its own parameters");
        }
        let cards = self.ranks.iter().map(|rank| rank.runtime.card()).collect();
        let maker = ParamsMaker::new(cards, self.secret.clone()).unwrap();
        maker.params(transfer_id, "cmpl-test".to_owned(), vec![blocks.to_vec()], tokens)
    }

    fn offer_of(transfer_id: TransferId, blocks: &[BlockId], tokens: u32) -> Offer {
        Offer { transfer_id, request_id: "cmpl-test".to_owned(), blocks: vec![blocks.to_vec()], tokens }
    }

    /// Puts the KV there and offers it on every rank.
    fn offer(&self, blocks: &[BlockId], tokens: u32, seed: u64) -> TransferParams {
        let transfer_id = TransferId::random();
        let mut own = None;
        for rank in &self.ranks {
            rank.cache.put_tokens(blocks, 0, tokens, seed);
            own = Some(rank.runtime.offer(Self::offer_of(transfer_id, blocks, tokens)).unwrap());
        }
        if self.ranks.len() == 1 { own.unwrap() } else { self.params(transfer_id, blocks, tokens) }
    }

    fn expect(&self, params: &TransferParams) {
        for rank in &self.ranks {
            rank.expect(params);
        }
    }

    /// Expects on every rank, and fetches.
    fn fetch(&self, params: &TransferParams, blocks: &[BlockId], first_token: u32) {
        for rank in &self.ranks {
            let handle = rank.expect(params);
            rank.fetch(handle, blocks, first_token);
        }
    }

    fn ends(&self, transfer_id: TransferId) -> Vec<End> {
        self.ranks.iter().map(|rank| rank.end_of(transfer_id)).collect()
    }

    fn abort(&self, transfer_id: TransferId) {
        self.ranks.iter().for_each(|rank| rank.runtime.abort(transfer_id));
    }

    fn assert_at_rest(&self) {
        self.ranks.iter().for_each(Worker::assert_at_rest);
    }
}

fn shape(kv_heads: u32, mla: bool, tp_size: u32) -> Shape {
    Shape { kv_heads, mla, tp_size, num_blocks: 48, ..Shape::default() }
}

fn move_once(prefill: &Engine, decode: &Engine, first_token: u32, seed: u64, what: &str) {
    let src = prefill.shape.scattered_blocks(TOKENS, seed);
    let dst = decode.shape.scattered_blocks(TOKENS - first_token, seed ^ 1);
    let params = prefill.offer(&src, TOKENS, seed);
    let transfer_id = params.pdlink.transfer_id;
    decode.fetch(&params, &dst, first_token);
    assert!(decode.ends(transfer_id).iter().all(|end| *end == End::Received), "{what}");
    for end in prefill.ends(transfer_id) {
        assert!(matches!(end, End::Sent | End::Released), "{what}: {end:?}");
    }
    for rank in &decode.ranks {
        assert!(rank.cache.holds_tokens(&dst, first_token, TOKENS, seed), "{what}: byte for byte");
    }
    prefill.assert_at_rest();
    decode.assert_at_rest();
}

const KINDS: [(u32, bool); 4] = [(4, false), (2, false), (1, false), (1, true)];
const SIZES: [u32; 3] = [1, 2, 4];

#[test]
fn every_rank_of_decode_gets_its_heads_from_whichever_ranks_of_prefill_hold_them() {
    let mut seed = 0;
    for (kv_heads, mla) in KINDS {
        for (src_tp, dst_tp) in SIZES.into_iter().flat_map(|src| SIZES.map(|dst| (src, dst))) {
            seed += 1;
            let (src_block, dst_block) = [(4, 4), (8, 4), (4, 8)][seed % 3];
            let all = Arrangement::ALL;
            let start = |role, tp, block_size, arrangement: usize| {
                let shape = Shape { block_size, ..shape(kv_heads, mla, tp) };
                Engine::start(&shape, role, false, |plan| {
                    plan.send_type = SEND_TYPES[seed / 3 % 3];
                    plan.arrangement = all[arrangement % all.len()];
                })
            };
            let prefill = start(Role::Prefill, src_tp, src_block, seed);
            let decode = start(Role::Decode, dst_tp, dst_block, seed * 3 + 1);
            let what = format!("{kv_heads} heads, MLA {mla}, {src_tp} to {dst_tp} ranks");
            move_once(&prefill, &decode, 0, seed as u64, &what);
            // Where decode has a beginning already: a multiple of its own block size alone.
            move_once(&prefill, &decode, dst_block, seed as u64 + 1, &what);
        }
    }
}

#[test]
fn a_worker_with_a_process_for_each_rank_meets_one_with_a_process_for_all() {
    for (kv_heads, mla) in KINDS {
        for (src_tp, dst_tp) in [(2, 2), (4, 2), (2, 4), (1, 4), (4, 1)] {
            for src_together in [false, true] {
                let prefill = Engine::start(&shape(kv_heads, mla, src_tp), Role::Prefill, src_together, |_| {});
                let decode = Engine::start(&shape(kv_heads, mla, dst_tp), Role::Decode, !src_together, |_| {});
                move_once(&prefill, &decode, 4, 3, &format!("{kv_heads} heads, MLA {mla}, {src_tp} to {dst_tp}"));
            }
        }
    }
}

#[test]
fn a_full_local_hit_frees_every_rank() {
    for (src_tp, dst_tp) in [(2, 2), (4, 2), (2, 4)] {
        let prefill = Engine::start(&shape(2, false, src_tp), Role::Prefill, false, |_| {});
        let decode = Engine::start(&shape(2, false, dst_tp), Role::Decode, false, |_| {});
        let params = prefill.offer(&[BlockId(1)], 4, 1);
        for rank in &decode.ranks {
            rank.runtime.release(rank.expect(&params));
        }
        let transfer_id = params.pdlink.transfer_id;
        assert!(decode.ends(transfer_id).iter().all(|end| *end == End::Released));
        assert!(prefill.ends(transfer_id).iter().all(|end| *end == End::Released));
    }
}

#[tokio::test]
async fn kv_6_a_decode_rank_names_the_prefill_ranks_that_it_will_connect_to() {
    let decode = Engine::start(&shape(2, false, 2), Role::Decode, false, |_| {});
    let prefill = Engine::start(&shape(2, false, 4), Role::Prefill, false, |_| {});
    let mut met = Vec::new();
    for rank in &decode.ranks {
        let admin = AdminClient::new(rank.runtime.address(), Secret::loopback(), PATIENCE);
        for peer in admin.peers_of(4).await.unwrap() {
            admin.pair(&prefill.ranks[peer as usize].runtime.address()).await.unwrap();
            met.push((rank.runtime.card().rank, peer));
        }
        let refused = admin.peers_of(3).await.unwrap_err().to_string();
        assert!(refused.contains("2 KV heads cannot be spread over 3 ranks"), "{refused}");
    }
    assert_eq!(met, [(0, 0), (0, 2), (1, 3), (1, 1)], "of two ranks with the same head, one is read and one let go of");
}

#[tokio::test]
async fn every_ranks_record_is_told_by_each() {
    let prefill = Engine::start(&shape(4, false, 1), Role::Prefill, false, |_| {});
    let mut decode = Engine::start(&shape(4, false, 2), Role::Decode, false, |_| {});
    let (src, dst) = ([BlockId(4), BlockId(9)], [BlockId(11), BlockId(2)]);
    let params = prefill.offer(&src, 8, 1);
    let transfer_id = params.pdlink.transfer_id;
    decode.fetch(&params, &dst, 0);
    assert_eq!(decode.ends(transfer_id), [End::Received, End::Received]);
    for rank in &decode.ranks {
        let admin = AdminClient::new(rank.runtime.address(), Secret::loopback(), PATIENCE);
        let found = admin.records(transfer_id).await.unwrap();
        let told: Vec<_> = found.records.iter().map(|record| (record.rank, record.bytes > 0)).collect();
        assert_eq!((told, found.unheard.len()), (vec![(0, true), (1, true)], 0));
    }
    let admin = AdminClient::new(decode.ranks[0].runtime.address(), Secret::loopback(), PATIENCE);
    let gone = decode.ranks.remove(1);
    let address = gone.runtime.address();
    gone.runtime.shutdown();
    let found = admin.records(transfer_id).await.unwrap();
    assert_eq!(found.records.len(), 1);
    assert!(found.unheard.len() == 1 && found.unheard[0].contains(&address), "{:?}", found.unheard);
}

#[test]
fn a_claim_may_be_faster_than_the_offer() {
    let prefill = Engine::start(&shape(4, false, 2), Role::Prefill, false, |_| {});
    let decode = Engine::start(&shape(4, false, 1), Role::Decode, false, |_| {});
    let (src, dst) = ([BlockId(4), BlockId(9)], [BlockId(11), BlockId(2)]);
    let transfer_id = TransferId::random();
    let params = prefill.params(transfer_id, &src, 8);
    decode.fetch(&params, &dst, 0);
    std::thread::sleep(Duration::from_millis(50));
    for rank in &prefill.ranks {
        rank.cache.put_tokens(&src, 0, 8, 6);
        rank.runtime.offer(Engine::offer_of(transfer_id, &src, 8)).unwrap();
    }
    assert_eq!(decode.ends(transfer_id), [End::Received]);
    assert_eq!(prefill.ends(transfer_id), [End::Sent, End::Sent]);
    assert!(decode.ranks[0].cache.holds_tokens(&dst, 0, 8, 6));
    // KV-9: decode gave up before the offer. The rank that nobody would have read is let go of, too.
    let prefill = Engine::start(&shape(1, true, 2), Role::Prefill, false, |_| {});
    let transfer_id = TransferId::random();
    let params = prefill.params(transfer_id, &src, 8);
    let handle = decode_mla(&params);
    handle.ranks[0].runtime.abort(transfer_id);
    assert_eq!(handle.ends(transfer_id), [End::Aborted]);
    std::thread::sleep(Duration::from_millis(50));
    for rank in &prefill.ranks {
        rank.runtime.offer(Engine::offer_of(transfer_id, &src, 8)).unwrap();
    }
    assert_eq!(prefill.ends(transfer_id), [End::Aborted, End::Released]);
    prefill.assert_at_rest();
}

fn decode_mla(params: &TransferParams) -> Engine {
    let decode = Engine::start(&shape(1, true, 1), Role::Decode, false, |_| {});
    decode.ranks[0].expect(params);
    decode
}

/// Engines whose copies go only as far as the test lets them.
fn stepped(sizes: (u32, u32), send_type: KvSendType) -> (Arc<LoopbackHub>, Engine, Engine) {
    let hub = LoopbackHub::stepped();
    let start = |role, tp| {
        let shape = Shape { head_size: 512, ..shape(4, false, tp) };
        Engine::start(&shape, role, false, |plan| {
            let hub = Arc::clone(&hub);
            plan.send_type = send_type;
            plan.kv.digest = DigestPolicy::Off;
            plan.transports = Some(Box::new(move |cache| -> Vec<Arc<dyn Transport>> {
                vec![hub.transport(Path::Shm, &cache.regions)]
            }));
        })
    };
    let (prefill, decode) = (start(Role::Prefill, sizes.0), start(Role::Decode, sizes.1));
    (hub, prefill, decode)
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_7_and_kv_9_an_abort_in_any_state_frees_every_rank_of_both_sides() {
    let (src, dst) = ([BlockId(4), BlockId(9)], [BlockId(11), BlockId(2)]);
    for sizes in [(2, 2), (1, 2), (2, 1), (4, 2)] {
        for send_type in [KvSendType::Get, KvSendType::PutAsync] {
            for by_proxy in [false, true] {
                for state in ["offered", "claimed", "copying"] {
                    let what = format!("{sizes:?} {send_type:?} {state}, by the proxy: {by_proxy}");
                    let (hub, prefill, decode) = stepped(sizes, send_type);
                    let params = prefill.offer(&src, 8, 1);
                    let transfer_id = params.pdlink.transfer_id;
                    match state {
                        "claimed" => decode.expect(&params),
                        "copying" => {
                            decode.fetch(&params, &dst, 0);
                            until("a copy has begun", || hub.step());
                        }
                        _ => {}
                    }
                    if by_proxy {
                        // The proxy knows one address of prefill.
                        let admin = AdminClient::new(prefill.ranks[0].runtime.address(), Secret::loopback(), PATIENCE);
                        assert_eq!(admin.abort(transfer_id).await.unwrap(), AbortAnswer::Aborted, "{what}");
                    } else {
                        decode.abort(transfer_id);
                        if state == "offered" {
                            decode.expect(&params);
                        }
                    }
                    for end in prefill.ends(transfer_id) {
                        assert_eq!(end, End::Aborted, "{what}");
                    }
                    if !by_proxy || state != "offered" {
                        assert!(decode.ends(transfer_id).iter().all(|end| *end == End::Aborted), "{what}");
                    }
                    let bytes = || decode.ranks.iter().map(|rank| rank.cache.bytes()).collect::<Vec<_>>();
                    let after = bytes();
                    while hub.step() {}
                    assert!(after == bytes(), "KV-7: {what}: a write landed after the report");
                    prefill.assert_at_rest();
                    decode.assert_at_rest();
                }
            }
        }
    }
}

#[test]
fn kv_8_a_rank_that_ends_in_the_middle_fails_the_transfer_on_every_rank_that_needs_it() {
    let (src, dst) = ([BlockId(4), BlockId(9)], [BlockId(11), BlockId(2)]);
    for send_type in [KvSendType::Get, KvSendType::PutAsync] {
        for sizes in [(2, 1), (1, 2)] {
            let (hub, mut prefill, mut decode) = stepped(sizes, send_type);
            let params = prefill.offer(&src, 8, 1);
            let transfer_id = params.pdlink.transfer_id;
            decode.fetch(&params, &dst, 0);
            until("a copy has begun", || hub.step());
            let many = if sizes.0 == 2 { &mut prefill } else { &mut decode };
            let dead = many.ranks.remove(1);
            dead.runtime.shutdown();
            let end = dead.reports.recv_timeout(PATIENCE).unwrap();
            assert!(matches!(end.end, End::Failed { failure: TransferFailure::ShutDown { .. }, .. }), "{end:?}");
            for end in decode.ends(transfer_id).into_iter().chain(prefill.ends(transfer_id)) {
                assert!(matches!(end, End::Failed { .. }), "{sizes:?} {send_type:?}: {end:?}");
            }
            let bytes = || decode.ranks.iter().map(|rank| rank.cache.bytes()).collect::<Vec<_>>();
            let after = bytes();
            while hub.step() {}
            assert!(after == bytes(), "KV-7: a write landed after the report");
            prefill.assert_at_rest();
            decode.assert_at_rest();
        }
    }
}

#[test]
fn kv_4_damage_between_one_pair_of_ranks_fails_the_transfer_on_the_rank_that_has_it() {
    for send_type in [KvSendType::Get, KvSendType::PutAsync] {
        // The mover's second copy is damaged: from prefill's rank 1, or to decode's rank 1.
        let sizes = if send_type == KvSendType::Get { (2, 1) } else { (1, 2) };
        let start = |role, tp| {
            Engine::start(&shape(4, false, tp), role, false, |plan| {
                plan.send_type = send_type;
                let faults = FaultPlan { seed: 1, faults: vec![(When::Nth(2), Fault::Corrupt)] };
                plan.transports = Some(Box::new(move |cache| -> Vec<Arc<dyn Transport>> {
                    vec![Faulty::around(Arc::new(Shm::new(&cache.regions, 1).unwrap()), faults)]
                }));
            })
        };
        let (prefill, decode) = (start(Role::Prefill, sizes.0), start(Role::Decode, sizes.1));
        let params = prefill.offer(&[BlockId(1), BlockId(2)], 8, 1);
        let transfer_id = params.pdlink.transfer_id;
        decode.fetch(&params, &[BlockId(3), BlockId(4)], 0);
        let ends = [decode.ends(transfer_id), prefill.ends(transfer_id)].concat();
        let mismatch =
            |end: &&End| matches!(end, End::Failed { failure, fenced: true } if failure.name() == "digest_mismatch");
        assert!(ends.iter().filter(mismatch).count() >= 2, "both ends of the pair say why: {ends:?}");
        prefill.assert_at_rest();
        decode.assert_at_rest();
    }
}

#[test]
fn parameters_that_do_not_name_every_rank_are_refused() {
    let prefill = Engine::start(&shape(4, false, 2), Role::Prefill, false, |_| {});
    let decode = Engine::start(&shape(4, false, 1), Role::Decode, false, |_| {});
    let transfer_id = TransferId::random();
    let partial = prefill.ranks[0].runtime.offer(Engine::offer_of(transfer_id, &[BlockId(1)], 4)).unwrap();
    let refused = decode.ranks[0].runtime.expect(&partial).unwrap_err();
    assert!(matches!(refused, KvError::Endpoints { tp_size: 2, named: 1, .. }), "{refused}");
    let swapped = |params: &mut TransferParams| params.pdlink.ranks.swap(0, 1);
    let mut params = prefill.params(transfer_id, &[BlockId(1)], 4);
    prefill.ranks[1].runtime.offer(Engine::offer_of(transfer_id, &[BlockId(1)], 4)).unwrap();
    swapped(&mut params);
    let handle = decode.ranks[0].expect(&params.sealed(&Secret::loopback()));
    decode.ranks[0].fetch(handle, &[BlockId(1)], 0);
    let end = decode.ranks[0].end_of(transfer_id);
    let named = matches!(&end, End::Failed { failure: TransferFailure::BadReference { why, .. }, .. } if why.contains("other ranks"));
    assert!(named, "{end:?}");
    assert!(prefill.ends(transfer_id).iter().all(|end| matches!(end, End::Failed { .. })));
}

#[test]
fn kv_2_a_hold_ends_only_when_every_reader_has_ended() {
    let prefill = Engine::start(&shape(2, false, 1), Role::Prefill, false, |_| {});
    let decode = Engine::start(&shape(2, false, 4), Role::Decode, false, |_| {});
    let params = prefill.offer(&[BlockId(1), BlockId(2)], 8, 5);
    let transfer_id = params.pdlink.transfer_id;
    let handles: Vec<_> = decode.ranks.iter().map(|rank| rank.expect(&params)).collect();
    for (number, (rank, handle)) in decode.ranks.iter().zip(handles).enumerate() {
        assert_eq!(prefill.ranks[0].runtime.status().held_blocks, 2, "before rank {number}");
        rank.fetch(handle, &[BlockId(3), BlockId(4)], 0);
        assert_eq!(rank.end_of(transfer_id), End::Received);
    }
    assert_eq!(prefill.ends(transfer_id), [End::Sent]);
    prefill.assert_at_rest();
}
