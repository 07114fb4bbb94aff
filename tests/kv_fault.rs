//! A path that goes wrong, leases that end, and clients that leave: every transfer is reported once on each side, no
//! block stays held, and no byte that is wrong is ever called received.

#[path = "support/fake_nccl.rs"]
mod fake_nccl;
#[path = "support/kv_cache.rs"]
mod kv_cache;
#[path = "support/kv_worker.rs"]
mod kv_worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kv_cache::Cache;
use kv_worker::{PATIENCE, Plan, Worker, until};
use pdlink::config::{DigestPolicy, KvSendType, Path, Role};
use pdlink::control::{AbortAnswer, AdminClient};
use pdlink::kv::{BlockId, End, KvLink, Offer, TransferFailure, TransferId};
use pdlink::security::Secret;
use pdlink::telemetry::{Side, TransferOutcome};
use pdlink::transport::{Fault, FaultPlan, Faulty, LoopbackHub, Nccl, Shm, Tcp, TcpSetup, Transport, When};

const MODES: [KvSendType; 2] = [KvSendType::Get, KvSendType::PutAsync];
const PATHS: [Path; 3] = [Path::Shm, Path::Tcp, Path::Nccl];
const SRC: [BlockId; 2] = [BlockId(4), BlockId(9)];
const DST: [BlockId; 2] = [BlockId(11), BlockId(2)];

fn real(path: Path, cache: &Cache) -> Arc<dyn Transport> {
    match path {
        Path::Shm => return Arc::new(Shm::new(&cache.regions, 2).unwrap()),
        // Over a stand-in for the library, which moves host memory.
        Path::Nccl => {
            return Arc::new(Nccl::new(&cache.regions, &Secret::loopback(), &fake_nccl::setup()).unwrap());
        }
        _ => {}
    }
    let setup = TcpSetup {
        bind: "127.0.0.1".parse().unwrap(),
        advertise_host: "127.0.0.1".to_owned(),
        streams: 2,
        stall_max: PATIENCE,
    };
    Arc::new(Tcp::new(&cache.regions, &Secret::loopback(), &setup).unwrap())
}

/// A pair whose bytes go wrong as `faults` say, whoever moves them.
fn faulty(path: Path, send_type: KvSendType, faults: &[(When, Fault)], edit: impl Fn(&mut Plan)) -> (Worker, Worker) {
    let mut plans = [Plan::new("prefill", Role::Prefill), Plan::new("decode", Role::Decode)];
    for plan in &mut plans {
        let faults = FaultPlan { seed: 1, faults: faults.to_vec() };
        plan.send_type = send_type;
        plan.transports =
            Some(Box::new(move |cache| -> Vec<Arc<dyn Transport>> { vec![Faulty::around(real(path, cache), faults)] }));
        edit(plan);
    }
    let [prefill, decode] = plans;
    (prefill.start(), decode.start())
}

fn each_way(mut test: impl FnMut(Path, KvSendType)) {
    for path in PATHS {
        for send_type in MODES {
            test(path, send_type);
        }
    }
}

#[test]
fn kv_4_what_arrives_damaged_or_not_at_all_is_failed_on_both_sides() {
    each_way(|path, send_type| {
        for fault in [Fault::Corrupt, Fault::Lose] {
            let (prefill, decode) = faulty(path, send_type, &[(When::Nth(2), fault)], |_| {});
            for number in 1..=3 {
                let params = prefill.offer(&SRC, 8, number);
                let transfer_id = params.pdlink.transfer_id;
                let handle = decode.expect(&params);
                decode.fetch(handle, &DST, 0);
                let (received, sent) = (decode.end_of(transfer_id), prefill.end_of(transfer_id));
                if number == 2 {
                    for end in [&received, &sent] {
                        let mismatch = TransferFailure::name;
                        let End::Failed { failure, fenced: true } = end else { panic!("{end:?}") };
                        assert_eq!(mismatch(failure), "digest_mismatch");
                    }
                    assert!(matches!(decode.runtime.record(transfer_id).unwrap().outcome, TransferOutcome::Failed(_)));
                } else {
                    assert_eq!((received, sent), (End::Received, End::Sent), "{path:?} {send_type:?} {number}");
                    assert!(decode.cache.holds_tokens(&DST, 0, 8, number));
                }
                prefill.assert_at_rest();
                decode.assert_at_rest();
            }
        }
    });
}

#[test]
fn late_and_doubled_copies_are_received_once() {
    each_way(|path, send_type| {
        let faults = [(When::Nth(1), Fault::Delay(Duration::from_millis(30))), (When::Nth(2), Fault::Duplicate)];
        let (prefill, decode) = faulty(path, send_type, &faults, |_| {});
        for number in 1..=2 {
            let params = prefill.offer(&SRC, 8, number);
            let handle = decode.expect(&params);
            decode.fetch(handle, &DST, 0);
            assert_eq!(decode.end_of(params.pdlink.transfer_id), End::Received);
            assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Sent);
            assert!(decode.cache.holds_tokens(&DST, 0, 8, number));
        }
        prefill.assert_at_rest();
    });
}

#[test]
fn a_copy_that_never_starts_is_failed_at_its_deadline() {
    each_way(|path, send_type| {
        let (prefill, decode) =
            faulty(path, send_type, &[(When::Always, Fault::Drop)], |plan| plan.kv.transfer_timeout_ms = 200);
        let params = prefill.offer(&SRC, 8, 1);
        let handle = decode.expect(&params);
        decode.fetch(handle, &DST, 0);
        let end = decode.end_of(params.pdlink.transfer_id);
        assert!(matches!(end, End::Failed { fenced: true, .. }), "{path:?} {send_type:?}: {end:?}");
        assert!(matches!(prefill.end_of(params.pdlink.transfer_id), End::Failed { .. }));
        prefill.assert_at_rest();
        decode.assert_at_rest();
    });
}

#[test]
fn kv_2_blocks_that_nobody_claims_are_freed_when_the_lease_ends() {
    let mut plan = Plan::new("prefill", Role::Prefill).path(Path::Shm);
    plan.kv.lease_ms = 50;
    let prefill = plan.start();
    let decode = Plan::new("decode", Role::Decode).path(Path::Shm).start();
    let params = prefill.offer(&SRC, 8, 1);
    assert_eq!(prefill.runtime.status().held_blocks, 2);
    assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Expired);
    prefill.assert_at_rest();
    let handle = decode.expect(&params);
    decode.fetch(handle, &DST, 0);
    let end = decode.end_of(params.pdlink.transfer_id);
    assert!(matches!(end, End::Failed { failure: TransferFailure::Expired { .. }, .. }), "{end:?}");
}

#[test]
fn kv_2_decode_renews_the_lease_while_the_request_waits_for_blocks() {
    for send_type in MODES {
        let mut plan = Plan::new("prefill", Role::Prefill).path(Path::Shm);
        (plan.kv.lease_ms, plan.send_type) = (600, send_type);
        let prefill = plan.start();
        let mut plan = Plan::new("decode", Role::Decode).path(Path::Shm);
        plan.kv.lease_ms = 600;
        let decode = plan.start();
        let params = prefill.offer(&SRC, 8, 1);
        let handle = decode.expect(&params);
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(prefill.runtime.status().held_blocks, 2, "held through more than two leases");
        decode.fetch(handle, &DST, 0);
        assert_eq!(decode.end_of(params.pdlink.transfer_id), End::Received);
        assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Sent);
    }
}

#[test]
fn kv_3_a_lease_that_ends_under_the_copy_is_never_a_success() {
    each_way(|path, send_type| {
        let delay = [(When::Always, Fault::Delay(Duration::from_millis(400)))];
        let (prefill, decode) = faulty(path, send_type, &delay, |plan| {
            // Decode believes in a long lease, and does not renew in time.
            plan.kv.lease_ms = if plan.role == Role::Prefill { 100 } else { 60_000 };
        });
        let params = prefill.offer(&SRC, 8, 1);
        let handle = decode.expect(&params);
        decode.fetch(handle, &DST, 0);
        assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Expired);
        let end = decode.end_of(params.pdlink.transfer_id);
        let named = matches!(end, End::Failed { failure: TransferFailure::Expired { .. }, fenced: true });
        assert!(named, "{path:?} {send_type:?}: {end:?}");
        prefill.assert_at_rest();
        decode.assert_at_rest();
    });
}

/// A pair on a hub that moves bytes only when told, so that a test can act in the middle of a copy.
fn stepped(send_type: KvSendType) -> (Arc<LoopbackHub>, Worker, Worker) {
    let hub = LoopbackHub::stepped();
    let mut plans = [Plan::new("prefill", Role::Prefill), Plan::new("decode", Role::Decode)];
    for plan in &mut plans {
        let hub = Arc::clone(&hub);
        plan.send_type = send_type;
        plan.kv.digest = DigestPolicy::Off;
        plan.shape.head_size = 512;
        plan.transports =
            Some(Box::new(move |cache| -> Vec<Arc<dyn Transport>> { vec![hub.transport(Path::Shm, &cache.regions)] }));
    }
    let [prefill, decode] = plans;
    (hub, prefill.start(), decode.start())
}

/// Moves a little, and no more.
fn first_piece(hub: &LoopbackHub) {
    until("a copy has begun", || hub.step());
}

#[test]
fn kv_7_and_kv_9_an_abort_in_any_state_frees_both_sides_and_no_write_lands_after_it() {
    for send_type in MODES {
        for at_prefill in [false, true] {
            for state in ["offered", "claimed", "copying", "received"] {
                let (hub, prefill, decode) = stepped(send_type);
                let params = prefill.offer(&SRC, 8, 1);
                let transfer_id = params.pdlink.transfer_id;
                let abort = || if at_prefill { &prefill } else { &decode }.runtime.abort(transfer_id);
                if state == "offered" {
                    abort();
                    if !at_prefill {
                        // Decode learns of the request only after the abort, and tells prefill.
                        decode.expect(&params);
                    }
                } else {
                    let handle = decode.expect(&params);
                    if state == "claimed" {
                        abort();
                    } else {
                        decode.fetch(handle, &DST, 0);
                        first_piece(&hub);
                        if state == "copying" {
                            abort();
                        } else {
                            until("all is moved", || !hub.step());
                        }
                    }
                }
                let what = format!("{send_type:?}, {state}, at prefill: {at_prefill}");
                if state == "received" {
                    assert_eq!(decode.end_of(transfer_id), End::Received, "{what}");
                    assert_eq!(prefill.end_of(transfer_id), End::Sent, "{what}");
                    abort();
                } else {
                    assert_eq!(prefill.end_of(transfer_id), End::Aborted, "{what}");
                    if state != "offered" || !at_prefill {
                        assert_eq!(decode.end_of(transfer_id), End::Aborted, "{what}");
                    }
                }
                let after = decode.cache.bytes();
                while hub.step() {}
                assert!(after == decode.cache.bytes(), "KV-7: {what}: a write landed after the report");
                prefill.assert_at_rest();
                decode.assert_at_rest();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_9_an_abort_that_comes_before_the_offer_is_remembered() {
    let prefill = Plan::new("prefill", Role::Prefill).path(Path::Shm).start();
    let admin = AdminClient::new(prefill.runtime.address(), Secret::loopback(), PATIENCE);
    let transfer_id = TransferId::random();
    assert_eq!(admin.abort(transfer_id).await.unwrap(), AbortAnswer::Unknown);
    assert_eq!(admin.abort(transfer_id).await.unwrap(), AbortAnswer::Unknown);
    let offer = Offer { transfer_id, request_id: String::new(), blocks: vec![SRC.to_vec()], tokens: 8 };
    prefill.runtime.offer(offer).unwrap();
    assert_eq!(prefill.end_of(transfer_id), End::Aborted);
    prefill.assert_at_rest();
    assert_eq!(admin.abort(transfer_id).await.unwrap(), AbortAnswer::Ended);
    let params = prefill.offer(&SRC, 8, 1);
    assert_eq!(admin.abort(params.pdlink.transfer_id).await.unwrap(), AbortAnswer::Aborted);
    assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Aborted);
    let found = admin.records(params.pdlink.transfer_id).await.unwrap();
    assert_eq!(found.records[0].outcome, TransferOutcome::Aborted);
}

#[test]
fn kv_8_transfers_fail_at_once_when_either_runtime_shuts_down() {
    for send_type in MODES {
        for which in [Role::Prefill, Role::Decode] {
            let (hub, prefill, decode) = stepped(send_type);
            let params = prefill.offer(&SRC, 8, 1);
            let transfer_id = params.pdlink.transfer_id;
            let handle = decode.expect(&params);
            decode.fetch(handle, &DST, 0);
            first_piece(&hub);
            // Both ends report: the one that shuts down too (KV-1).
            let (survivor, ended) = if which == Role::Prefill { (decode, prefill) } else { (prefill, decode) };
            ended.runtime.shutdown();
            let end = ended.reports.recv_timeout(PATIENCE).unwrap();
            assert!(matches!(end.end, End::Failed { failure: TransferFailure::ShutDown { .. }, .. }), "{end:?}");
            let end = survivor.end_of(transfer_id);
            assert!(matches!(end, End::Failed { .. }), "{send_type:?} {which:?}: {end:?}");
            survivor.assert_at_rest();
        }
    }
}

#[test]
fn with_put_the_engines_next_step_waits_until_what_is_pushed_has_gone_out() {
    for send_type in [KvSendType::Put, KvSendType::PutAsync] {
        let (hub, prefill, decode) = stepped(send_type);
        prefill.runtime.wait_for_pushes();
        let params = prefill.offer(&SRC, 8, 1);
        let handle = decode.expect(&params);
        // Held, but not pushed yet: decode may come for it at any time.
        prefill.runtime.wait_for_pushes();
        decode.fetch(handle, &DST, 0);
        first_piece(&hub);
        let goes_on = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let step = scope.spawn(|| {
                prefill.runtime.wait_for_pushes();
                goes_on.load(Ordering::SeqCst)
            });
            if send_type == KvSendType::PutAsync {
                assert!(!step.join().unwrap());
                until("all is pushed", || !hub.step());
            } else {
                std::thread::sleep(Duration::from_millis(50));
                goes_on.store(true, Ordering::SeqCst);
                until("the step begins", || {
                    hub.step();
                    step.is_finished()
                });
                assert!(step.join().unwrap(), "it did not wait");
            }
        });
        assert_eq!(decode.end_of(params.pdlink.transfer_id), End::Received);
        assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Sent);
    }
}

#[test]
fn kv_2_a_decode_worker_that_ends_takes_its_claims_back_also_where_it_is_not_connected_yet() {
    let reason = |end: &End| match end {
        End::Failed { failure, fenced: true } => failure.clone(),
        end => panic!("{end:?}"),
    };
    for send_type in MODES {
        let plan = |name, role| Plan { send_type, ..Plan::new(name, role).path(Path::Shm) };
        let prefill = plan("prefill", Role::Prefill).start();
        let decode = plan("decode", Role::Decode).start();
        let ids: Vec<TransferId> = (0..3).map(|_| announced(&prefill, &decode)).collect();
        decode.runtime.shutdown();
        for id in &ids {
            let end = decode.reports.recv_timeout(PATIENCE).unwrap();
            assert!(ids.contains(&end.transfer_id), "{id}");
            assert_eq!(reason(&end.end), TransferFailure::ShutDown { side: Side::Decode });
            let end = prefill.report();
            assert!(ids.contains(&end.transfer_id));
            assert_eq!(reason(&end.end), TransferFailure::ShutDown { side: Side::Decode });
        }
        prefill.assert_at_rest();
    }
}

/// Offers, and announces to decode.
fn announced(prefill: &Worker, decode: &Worker) -> TransferId {
    let params = prefill.offer(&SRC, 8, 1);
    decode.expect(&params);
    params.pdlink.transfer_id
}

#[test]
fn kv_1_a_storm_of_faults_and_aborts_reports_each_transfer_once_on_each_side() {
    each_way(|path, send_type| {
        let chance = |p, fault| (When::Chance(p), fault);
        let faults = [
            chance(0.1, Fault::Corrupt),
            chance(0.1, Fault::Lose),
            chance(0.1, Fault::Delay(Duration::from_millis(5))),
            chance(0.1, Fault::Duplicate),
        ];
        let (prefill, decode) = faulty(path, send_type, &faults, |plan| {
            plan.kv.inflight_max = 4;
            plan.shape.num_blocks = 200;
        });
        let mut ids = Vec::new();
        for n in 0..100_u32 {
            let blocks = [BlockId(2 * n), BlockId(2 * n + 1)];
            let params = prefill.offer(&blocks, 8, n.into());
            ids.push(params.pdlink.transfer_id);
            let handle = decode.expect(&params);
            decode.fetch(handle, &blocks, 0);
            match n % 10 {
                3 => decode.runtime.abort(params.pdlink.transfer_id),
                7 => prefill.runtime.abort(params.pdlink.transfer_id),
                _ => {}
            }
        }
        let mut received = 0;
        for worker in [&prefill, &decode] {
            let mut ended: Vec<TransferId> = Vec::new();
            for _ in 0..ids.len() {
                let report = worker.report();
                ended.push(report.transfer_id);
                if report.end == End::Received {
                    received += 1;
                    let n = u32::try_from(ids.iter().position(|id| *id == report.transfer_id).unwrap()).unwrap();
                    let blocks = [BlockId(2 * n), BlockId(2 * n + 1)];
                    assert!(decode.cache.holds_tokens(&blocks, 0, 8, n.into()), "KV-4: received and wrong");
                }
            }
            ended.sort();
            let mut ids = ids.clone();
            ids.sort();
            assert_eq!(ended, ids, "{path:?} {send_type:?}");
        }
        assert!(received > 0);
        prefill.assert_at_rest();
        decode.assert_at_rest();
    });
}
