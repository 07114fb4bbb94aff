//! KV moves between two runtimes, whatever the path, the send type, the layout and the number of ranks.

#[path = "support/fake_nccl.rs"]
mod fake_nccl;
#[path = "support/kv_cache.rs"]
mod kv_cache;
#[path = "support/kv_worker.rs"]
mod kv_worker;

use std::sync::Arc;

use kv_cache::{Arrangement, Cache, Shape};
use kv_worker::{Plan, Worker};
use pdlink::config::{DigestPolicy, KvSendType, Path, Role};
use pdlink::kv::{BlockId, End, KvLink, TransferFailure, TransferId};
use pdlink::security::Secret;
use pdlink::telemetry::{Side, TransferOutcome};
use pdlink::transport::{LoopbackHub, Nccl, Transport};

const SEND_TYPES: [KvSendType; 3] = [KvSendType::Get, KvSendType::Put, KvSendType::PutAsync];

/// A path that two workers of one process can take.
#[derive(Debug, Clone, Copy)]
enum Way {
    Loopback,
    Real(Path),
    /// Over a stand-in for the library, which moves host memory; NCCL does not, so no worker would offer it.
    Nccl,
}

const WAYS: [Way; 4] = [Way::Loopback, Way::Real(Path::Shm), Way::Real(Path::Tcp), Way::Nccl];

fn pair(way: Way, mut prefill: Plan, mut decode: Plan) -> (Worker, Worker) {
    match way {
        Way::Real(path) => {
            prefill = prefill.path(path);
            decode = decode.path(path);
        }
        Way::Loopback => {
            let hub = LoopbackHub::new();
            for plan in [&mut prefill, &mut decode] {
                let hub = Arc::clone(&hub);
                plan.transports = Some(Box::new(move |cache: &Cache| -> Vec<Arc<dyn Transport>> {
                    vec![hub.transport(Path::Shm, &cache.regions)]
                }));
            }
        }
        Way::Nccl => {
            for plan in [&mut prefill, &mut decode] {
                plan.transports = Some(Box::new(|cache: &Cache| -> Vec<Arc<dyn Transport>> {
                    vec![Arc::new(Nccl::new(&cache.regions, &Secret::loopback(), &fake_nccl::setup()).unwrap())]
                }));
            }
        }
    }
    (prefill.start(), decode.start())
}

/// A path that copies by itself, and one to which both sides must say in one order what comes next.
const ALONE_AND_TOGETHER: [Way; 2] = [Way::Real(Path::Shm), Way::Nccl];

/// Moves `tokens` tokens once, and checks every byte, both reports and both records.
fn move_once(prefill: &Worker, decode: &Worker, tokens: u32, first_token: u32, seed: u64) {
    let src_blocks = prefill.cache.shape.scattered_blocks(tokens, seed);
    let dst_blocks = decode.cache.shape.scattered_blocks(tokens - first_token, seed ^ 1);
    let params = prefill.offer(&src_blocks, tokens, seed);
    let transfer_id = params.pdlink.transfer_id;
    let handle = decode.expect(&params);
    decode.fetch(handle, &dst_blocks, first_token);
    assert_eq!(decode.end_of(transfer_id), End::Received);
    assert_eq!(prefill.end_of(transfer_id), End::Sent);
    assert!(decode.cache.holds_tokens(&dst_blocks, first_token, tokens, seed), "byte for byte");
    decode.assert_at_rest();
    prefill.assert_at_rest();
    let (sent, received) = (prefill.runtime.record(transfer_id).unwrap(), decode.runtime.record(transfer_id).unwrap());
    assert_eq!((sent.side, received.side), (Side::Prefill, Side::Decode));
    assert_eq!((&sent.outcome, &received.outcome), (&TransferOutcome::Done, &TransferOutcome::Done));
    assert_eq!(received.tokens, u64::from(tokens));
    assert!(received.bytes > 0 && received.runs > 0 && received.path.is_some());
    assert_eq!(received.peer_engine_id.as_deref(), Some("prefill"));
    assert_eq!(sent.peer_engine_id.as_deref(), Some("decode"));
}

#[test]
fn kv_moves_over_every_path_in_every_mode() {
    for way in WAYS {
        for send_type in SEND_TYPES {
            for digest in [DigestPolicy::Off, DigestPolicy::Every] {
                let mut prefill = Plan::new("prefill", Role::Prefill);
                prefill.send_type = send_type;
                let mut decode = Plan::new("decode", Role::Decode);
                decode.kv.digest = digest;
                let (prefill, decode) = pair(way, prefill, decode);
                for seed in 0..4 {
                    move_once(&prefill, &decode, 30, 0, seed);
                    move_once(&prefill, &decode, 30, 8, seed);
                }
            }
        }
    }
}

#[test]
fn unequal_ranks_layouts_and_block_sizes_meet_byte_for_byte() {
    let mut seed = 0;
    for (kv_heads, src_tp, dst_tp) in
        [(4, 1, 2), (4, 2, 1), (4, 2, 4), (4, 4, 2), (2, 4, 1), (2, 1, 4), (1, 2, 4), (4, 1, 1)]
    {
        for (src_block, dst_block) in [(4, 4), (4, 8), (8, 4)] {
            seed += 1;
            let all = Arrangement::ALL;
            let (src_arrangement, dst_arrangement) = (all[seed % all.len()], all[(seed * 3 + 1) % all.len()]);
            let shape =
                |tp_size, block_size| Shape { kv_heads, tp_size, block_size, num_blocks: 48, ..Shape::default() };
            let mut prefill = Plan::new("prefill", Role::Prefill);
            prefill.shape = shape(src_tp, src_block);
            prefill.arrangement = src_arrangement;
            prefill.send_type = SEND_TYPES[seed % 3];
            let mut decode = Plan::new("decode", Role::Decode);
            decode.shape = shape(dst_tp, dst_block);
            decode.arrangement = dst_arrangement;
            let (prefill, decode) = pair(WAYS[seed % WAYS.len()], prefill, decode);
            move_once(&prefill, &decode, 29, 0, seed as u64);
            move_once(&prefill, &decode, 29, 16, seed as u64);
        }
    }
}

#[test]
fn mla_latents_move() {
    let shape = |tp_size| Shape { mla: true, kv_heads: 1, head_size: 9, tp_size, num_blocks: 48, ..Shape::default() };
    let mut prefill = Plan::new("prefill", Role::Prefill);
    prefill.shape = shape(2);
    let mut decode = Plan::new("decode", Role::Decode);
    (decode.shape, decode.arrangement) = (shape(4), Arrangement::TokenMajor);
    let (prefill, decode) = pair(Way::Loopback, prefill, decode);
    move_once(&prefill, &decode, 21, 4, 7);
}

#[test]
fn many_transfers_at_once_all_arrive_also_beyond_the_bound_in_flight() {
    for (way, send_type) in ALONE_AND_TOGETHER.into_iter().flat_map(|way| SEND_TYPES.map(|send_type| (way, send_type)))
    {
        let mut prefill = Plan::new("prefill", Role::Prefill);
        prefill.send_type = send_type;
        prefill.shape.num_blocks = 400;
        let mut decode = Plan::new("decode", Role::Decode);
        decode.shape.num_blocks = 400;
        decode.kv.inflight_max = 3;
        let (prefill, decode) = pair(way, prefill, decode);
        let blocks = |n: u32| [BlockId(2 * n), BlockId(2 * n + 1)];
        let mut expected = Vec::new();
        for n in 0..200 {
            let params = prefill.offer(&blocks(n), 7, n.into());
            expected.push(params.pdlink.transfer_id);
            let handle = decode.expect(&params);
            decode.fetch(handle, &blocks(199 - n), 0);
        }
        for worker in [&prefill, &decode] {
            let want = if std::ptr::eq(worker, &raw const prefill) { End::Sent } else { End::Received };
            let mut ended: Vec<TransferId> = Vec::new();
            for _ in 0..200 {
                let report = worker.report();
                assert_eq!(report.end, want);
                ended.push(report.transfer_id);
            }
            ended.sort();
            expected.sort();
            assert_eq!(ended, expected, "KV-1: each exactly once");
        }
        for n in 0..200 {
            assert!(decode.cache.holds_tokens(&blocks(199 - n), 0, 7, n.into()));
        }
        prefill.assert_at_rest();
        decode.assert_at_rest();
    }
}

/// Each worker prefills for the other, many requests at once: what one side posts meets what the other posts at that moment.
#[test]
fn transfers_in_both_directions_at_once_all_arrive() {
    for (way, send_type) in WAYS.into_iter().flat_map(|way| SEND_TYPES.map(|send_type| (way, send_type))) {
        let plan = |name| {
            let mut plan = Plan::new(name, Role::Both);
            (plan.send_type, plan.shape.num_blocks) = (send_type, 200);
            plan
        };
        let (one, other) = pair(way, plan("one"), plan("other"));
        let blocks = |n: u32| [BlockId(2 * n), BlockId(2 * n + 1)];
        // What is offered lies in the first half of a cache, what comes in the second.
        let ways = [(&one, &other), (&other, &one)];
        for n in 0..50 {
            for (prefill, decode) in ways {
                let params = prefill.offer(&blocks(n), 7, n.into());
                decode.fetch(decode.expect(&params), &blocks(99 - n), 0);
            }
        }
        for worker in [&one, &other] {
            let mut ended: Vec<_> = (0..100).map(|_| worker.report()).map(|report| (report.side, report.end)).collect();
            ended.sort_by_key(|(side, _)| *side);
            let want = [vec![(Side::Prefill, End::Sent); 50], vec![(Side::Decode, End::Received); 50]].concat();
            assert_eq!(ended, want, "{way:?} {send_type:?}");
            let holds = (0..50).all(|n| worker.cache.holds_tokens(&blocks(99 - n), 0, 7, n.into()));
            assert!(holds, "byte for byte: {way:?} {send_type:?}");
        }
        one.assert_at_rest();
        other.assert_at_rest();
    }
}

#[test]
fn a_full_local_hit_releases_prefills_blocks_and_moves_nothing() {
    let (prefill, decode) =
        pair(Way::Real(Path::Shm), Plan::new("prefill", Role::Prefill), Plan::new("decode", Role::Decode));
    let params = prefill.offer(&[BlockId(1)], 4, 1);
    let transfer_id = params.pdlink.transfer_id;
    let handle = decode.expect(&params);
    decode.runtime.release(handle);
    assert_eq!(decode.end_of(transfer_id), End::Released);
    assert_eq!(prefill.end_of(transfer_id), End::Released);
    assert_eq!(decode.runtime.record(transfer_id).unwrap().bytes, 0);
    prefill.assert_at_rest();
}

#[test]
fn one_worker_can_be_both_ends() {
    let both = Plan::new("both", Role::Both).path(Path::Shm).start();
    let (src, dst) = ([BlockId(0), BlockId(1)], [BlockId(5), BlockId(3)]);
    let params = both.offer(&src, 8, 3);
    let handle = both.expect(&params);
    both.fetch(handle, &dst, 0);
    let mut ends = [both.report(), both.report()].map(|report| (report.side, report.end));
    ends.sort_by_key(|(side, _)| *side);
    assert_eq!(ends, [(Side::Prefill, End::Sent), (Side::Decode, End::Received)]);
    assert!(both.cache.holds_tokens(&dst, 0, 8, 3));
    assert_eq!(both.runtime.record(params.pdlink.transfer_id).unwrap().side, Side::Decode);
}

#[test]
fn no_path_in_common_is_refused_by_name_never_replaced() {
    let prefill = Plan::new("prefill", Role::Prefill).path(Path::Tcp).start();
    let decode = Plan::new("decode", Role::Decode).path(Path::Shm).start();
    let params = prefill.offer(&[BlockId(1)], 4, 1);
    let handle = decode.expect(&params);
    decode.fetch(handle, &[BlockId(1)], 0);
    let End::Failed { failure: TransferFailure::Incompatible { why, .. }, fenced: true } =
        decode.end_of(params.pdlink.transfer_id)
    else {
        panic!("not refused");
    };
    assert!(why.contains("no path in common"), "{why}");
}
