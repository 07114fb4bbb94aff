//! Bad references: each has its own name, none becomes a success, and none disturbs a transfer beside it.

#[path = "support/kv_cache.rs"]
mod kv_cache;
#[path = "support/kv_raw.rs"]
mod kv_raw;
#[path = "support/kv_worker.rs"]
mod kv_worker;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use kv_raw::{RawDecode, claim_of};
use kv_worker::{PATIENCE, Plan, Worker};
use pdlink::config::{DigestPolicy, KvSendType, Path, Role};
use pdlink::control::{AbortAnswer, AdminClient};
use pdlink::kv::{
    BlockId, End, Ending, KvError, KvLink, ParamsError, ToDecode, ToPrefill, TransferFailure, TransferId,
    TransferParams,
};
use pdlink::security::Secret;
use pdlink::telemetry::Side;

fn workers() -> (Worker, Worker) {
    let prefill = Plan::new("prefill", Role::Prefill).path(Path::Shm).start();
    let decode = Plan::new("decode", Role::Decode).path(Path::Shm).start();
    (prefill, decode)
}

/// Expects, fetches, and gives the failure, which must be fenced.
fn failure(decode: &Worker, params: &TransferParams) -> TransferFailure {
    let handle = decode.expect(params);
    decode.fetch(handle, &[BlockId(0), BlockId(1)], 0);
    match decode.end_of(params.pdlink.transfer_id) {
        End::Failed { failure, fenced: true } => failure,
        end => panic!("{end:?}"),
    }
}

/// A transfer that works, to show that it still does.
fn assert_works(prefill: &Worker, decode: &Worker) {
    let (src, dst) = ([BlockId(40), BlockId(41)], vec![BlockId(7), BlockId(3)]);
    let params = prefill.offer(&src, 8, 77);
    let handle = decode.expect(&params);
    decode.fetch(handle, &dst, 0);
    assert_eq!(decode.end_of(params.pdlink.transfer_id), End::Received);
    assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Sent);
    assert!(decode.cache.holds_tokens(&dst, 0, 8, 77));
    prefill.assert_at_rest();
    decode.assert_at_rest();
}

#[test]
fn edited_parameters_are_refused_before_anything_is_opened() {
    let (prefill, decode) = workers();
    let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
    let edits: [fn(&mut TransferParams); 5] = [
        |params| params.remote_num_tokens = 4,
        |params| params.remote_block_ids[0][0] = BlockId(9),
        |params| params.pdlink.ranks[0].endpoint = "10.255.255.1:1".to_owned(),
        |params| params.pdlink.transfer_id = TransferId::random(),
        |params| params.pdlink.weight_version = Some(9),
    ];
    for edit in edits {
        let mut edited = params.clone();
        edit(&mut edited);
        let refused = decode.runtime.expect(&edited).unwrap_err();
        assert!(matches!(refused, KvError::Params(ParamsError::BrokenSeal { .. })), "{refused}");
    }
    prefill.runtime.abort(params.pdlink.transfer_id);
    assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Aborted);
    assert_works(&prefill, &decode);
}

#[test]
fn kv_3_references_that_do_not_hold_are_named() {
    let (prefill, decode) = workers();
    type Case = (fn(&mut TransferParams), fn(&TransferFailure) -> bool);
    let cases: [Case; 5] = [
        (|params| params.pdlink.ranks[0].incarnation -= 1, |f| matches!(f, TransferFailure::StaleIncarnation { .. })),
        (|params| params.pdlink.geometry_digest ^= 1, |f| matches!(f, TransferFailure::BadReference { .. })),
        (|params| params.remote_num_tokens = 9, |f| matches!(f, TransferFailure::BadReference { .. })),
        (|params| params.pdlink.weight_version = Some(2), |f| matches!(f, TransferFailure::BadReference { .. })),
        (|params| params.pdlink.transfer_id = TransferId([3; 16]), |f| matches!(f, TransferFailure::Unknown { .. })),
    ];
    for (number, (edit, is_named)) in cases.into_iter().enumerate() {
        // A process of the run could make such parameters: their seal holds.
        let mut params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
        edit(&mut params);
        let failure = failure(&decode, &params.sealed(&Secret::loopback()));
        assert!(is_named(&failure), "case {number}: {failure}");
        // What was really offered stays held for whoever comes with the right parameters.
        assert_eq!(prefill.runtime.status().held_blocks, 2, "case {number}");
        end_offers(&prefill);
    }
    assert_works(&prefill, &decode);
}

/// Ends the one open offer, by making its weights old (KV-5).
fn end_offers(prefill: &Worker) {
    prefill.runtime.set_weight_version(2);
    let report = prefill.report();
    assert!(matches!(report.end, End::Failed { failure: TransferFailure::WeightVersion { .. }, .. }), "{report:?}");
    prefill.runtime.set_weight_version(1);
    prefill.assert_at_rest();
}

#[test]
fn a_second_claim_and_a_used_up_transfer_are_refused() {
    let (prefill, decode) = workers();
    let other = Plan::new("other", Role::Decode).path(Path::Shm).start();
    let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
    let handle = decode.expect(&params);
    assert!(matches!(decode.runtime.expect(&params), Err(KvError::Duplicate { .. })));
    let client = other.expect(&params);
    // Which of the two was first is for the network to say; one is refused, and only one.
    let refused = |worker: &Worker| match worker.reports.recv_timeout(Duration::from_millis(300)) {
        Ok(report) => {
            assert!(
                matches!(report.end, End::Failed { failure: TransferFailure::AlreadyClaimed { .. }, .. }),
                "{report:?}"
            );
            true
        }
        Err(_) => false,
    };
    let (first_refused, second_refused) = (refused(&decode), refused(&other));
    assert_ne!(first_refused, second_refused);
    let (winner, handle) = if first_refused { (&other, client) } else { (&decode, handle) };
    winner.fetch(handle, &[BlockId(0), BlockId(1)], 0);
    assert_eq!(winner.end_of(params.pdlink.transfer_id), End::Received);
    assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Sent);
    assert!(matches!(failure(&decode, &params), TransferFailure::Unknown { .. }), "used up");
    assert_works(&prefill, &decode);
}

#[test]
fn blocks_out_of_range_and_too_few_are_refused_on_both_sides() {
    for send_type in [KvSendType::Get, KvSendType::PutAsync] {
        let mut plan = Plan::new("prefill", Role::Prefill).path(Path::Shm);
        plan.send_type = send_type;
        let prefill = plan.start();
        let decode = Plan::new("decode", Role::Decode).path(Path::Shm).start();
        let offer = |blocks: &[u32], tokens| pdlink::kv::Offer {
            transfer_id: TransferId::random(),
            request_id: String::new(),
            blocks: vec![blocks.iter().copied().map(BlockId).collect()],
            tokens,
        };
        assert!(matches!(prefill.runtime.offer(offer(&[48], 4)), Err(KvError::Layout(_))));
        assert!(matches!(prefill.runtime.offer(offer(&[1], 5)), Err(KvError::Layout(_))));
        assert!(matches!(prefill.runtime.offer(offer(&[], 0)), Err(KvError::Extent { .. })));
        assert!(matches!(decode.runtime.offer(offer(&[1], 4)), Err(KvError::WrongRole { .. })));
        let bad: [(&[u32], u32); 3] = [(&[0, 48], 0), (&[0], 0), (&[0, 1], 3)];
        for (blocks, first_token) in bad {
            let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
            let handle = decode.expect(&params);
            decode.fetch(handle, &blocks.iter().copied().map(BlockId).collect::<Vec<_>>(), first_token);
            let end = decode.end_of(params.pdlink.transfer_id);
            let named = matches!(end, End::Failed { failure: TransferFailure::BadReference { .. }, fenced: true });
            assert!(named, "{send_type:?} {blocks:?}: {end:?}");
            assert!(matches!(prefill.end_of(params.pdlink.transfer_id), End::Failed { .. }));
        }
        assert_works(&prefill, &decode);
    }
}

#[test]
fn kv_5_kv_of_other_weights_is_never_used() {
    let (prefill, decode) = workers();
    let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
    decode.runtime.set_weight_version(2);
    assert!(matches!(failure(&decode, &params), TransferFailure::WeightVersion { .. }));
    // Held still: prefill serves that version.
    prefill.runtime.set_weight_version(2);
    assert!(matches!(
        prefill.end_of(params.pdlink.transfer_id),
        End::Failed { failure: TransferFailure::WeightVersion { theirs: 1, ours: 2, .. }, .. }
    ));
    // Both serve the new version: what was made by the old is gone, what is made by the new moves.
    assert!(matches!(failure(&decode, &params), TransferFailure::Unknown { .. }));
    assert_works(&prefill, &decode);
    // Changed under a request that waits for blocks.
    let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
    decode.expect(&params);
    decode.runtime.set_weight_version(3);
    let end = decode.end_of(params.pdlink.transfer_id);
    assert!(
        matches!(end, End::Failed { failure: TransferFailure::WeightVersion { theirs: 2, ours: 3, .. }, .. }),
        "{end:?}"
    );
    assert!(matches!(prefill.end_of(params.pdlink.transfer_id), End::Failed { .. }));
}

#[tokio::test]
async fn kv_6_pairs_that_cannot_work_are_refused_at_start_by_name() {
    let prefill = Plan::new("prefill", Role::Prefill).path(Path::Shm).start();
    let mut plan = Plan::new("decode", Role::Decode).path(Path::Shm);
    plan.model = Some("another/model".to_owned());
    let other = plan.start();
    let decode = Plan::new("decode", Role::Decode).path(Path::Shm).start();
    let admin = |worker: &Worker| AdminClient::new(worker.runtime.address(), Secret::loopback(), PATIENCE);
    let paired = admin(&decode).pair(&prefill.runtime.address()).await.unwrap();
    assert_eq!((paired.path, paired.peer_engine_id.as_str()), (Path::Shm, "prefill"));
    let refused = admin(&other).pair(&prefill.runtime.address()).await.unwrap_err().to_string();
    assert!(refused.contains("the model differs: test at prefill, another/model at decode"), "{refused}");
    let refused = admin(&decode).pair(&other.runtime.address()).await.unwrap_err().to_string();
    assert!(refused.contains("decode worker"), "{refused}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let refused = admin(&decode).pair(&nobody.to_string()).await.unwrap_err().to_string();
    assert!(refused.contains("cannot reach"), "{refused}");
    let status = admin(&decode).status().await.unwrap();
    assert_eq!((status.engine_id.as_str(), status.role, status.held_blocks), ("decode", Role::Decode, 0));
    assert_eq!(admin(&prefill).abort(TransferId::random()).await.unwrap(), AbortAnswer::Unknown);
}

#[test]
fn garbage_on_the_control_port_harms_no_transfer() {
    let (prefill, decode) = workers();
    assert_works(&prefill, &decode);
    let address = prefill.runtime.address();
    let mut preamble = b"PDLK\x09\x00\x09\x00".to_vec();
    preamble.extend([0; 32]);
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &preamble, b"PD"] {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        assert_works(&prefill, &decode);
        // Hung up on, in time for everything but silence.
        if bytes.len() > 2 {
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
    let mut plan = Plan::new("stranger", Role::Decode).path(Path::Shm);
    plan.secret = Secret::generate().unwrap();
    let secret = plan.secret.clone();
    let stranger = plan.start();
    let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
    let refused = stranger.runtime.expect(&params).unwrap_err();
    assert!(matches!(refused, KvError::Params(ParamsError::BrokenSeal { .. })), "{refused}");
    let failure = failure(&stranger, &params.clone().sealed(&secret));
    assert!(matches!(&failure, TransferFailure::Unreachable { why, .. } if why.contains("secret")), "{failure}");
    prefill.runtime.abort(params.pdlink.transfer_id);
    assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Aborted);
    assert_works(&prefill, &decode);
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_3_a_peer_cannot_touch_what_another_has_claimed() {
    let prefill = Plan::new("prefill", Role::Prefill).path(Path::Shm).start();
    let mut holder = RawDecode::connect(&prefill, &prefill).await;
    let mut thief = RawDecode::connect(&prefill, &prefill).await;
    let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
    let transfer_id = params.pdlink.transfer_id;
    holder.say(&claim_of(&prefill, &params));
    assert!(matches!(holder.hear().await.unwrap(), ToDecode::Granted(granted) if granted.blocks[0].len() == 2));
    let grabs = [
        claim_of(&prefill, &params),
        ToPrefill::Landed { transfer_id, from: vec![0], digest: None },
        ToPrefill::Copying { transfer_id, from: vec![0] },
        ToPrefill::Accepted(transfer_id),
    ];
    for grab in grabs {
        thief.say(&grab);
        let answer = thief.hear().await.unwrap();
        let refused = matches!(answer, ToDecode::Refused { failure: TransferFailure::AlreadyClaimed { .. }, .. });
        assert!(refused, "{grab:?}: {answer:?}");
    }
    thief.say(&ToPrefill::Ended { transfer_id, how: Ending::Aborted });
    // A message that is none ends this connection, and nothing else.
    thief.connection.notify(bytes::Bytes::from_static(&[250, 1, 2])).unwrap();
    assert!(thief.hear().await.is_err());
    assert_eq!(prefill.runtime.status().held_blocks, 2);
    holder.say(&ToPrefill::Landed { transfer_id, from: vec![0], digest: None });
    assert_eq!(holder.hear().await.unwrap(), ToDecode::Confirmed { transfer_id, digest: None });
    assert_eq!(prefill.end_of(transfer_id), End::Sent);
    prefill.assert_at_rest();
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_3_bytes_that_landed_after_the_lease_are_never_confirmed() {
    let mut plan = Plan::new("prefill", Role::Prefill).path(Path::Shm);
    (plan.kv.lease_ms, plan.kv.digest) = (100, DigestPolicy::Off);
    let prefill = plan.start();
    let mut raw = RawDecode::connect(&prefill, &prefill).await;
    let params = prefill.offer(&[BlockId(0), BlockId(1)], 8, 1);
    let transfer_id = params.pdlink.transfer_id;
    raw.say(&claim_of(&prefill, &params));
    assert!(matches!(raw.hear().await.unwrap(), ToDecode::Granted(_)));
    // It copies slowly and renews nothing.
    assert_eq!(prefill.end_of(transfer_id), End::Expired);
    assert!(matches!(raw.hear().await.unwrap(), ToDecode::Ended { .. }));
    raw.say(&ToPrefill::Landed { transfer_id, from: vec![0], digest: None });
    let refused = raw.hear().await.unwrap();
    assert!(matches!(refused, ToDecode::Refused { failure: TransferFailure::Expired { .. }, .. }), "{refused:?}");
    assert_eq!(prefill.runtime.record(transfer_id).unwrap().side, Side::Prefill);
    prefill.assert_at_rest();
}
