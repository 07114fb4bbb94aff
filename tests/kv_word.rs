//! Where decode sees for itself that prefill's blocks were held (KV-3): the word of a grant.

#[path = "support/kv_cache.rs"]
mod kv_cache;
#[path = "support/kv_raw.rs"]
mod kv_raw;
#[path = "support/kv_worker.rs"]
mod kv_worker;

use std::sync::Arc;

use kv_cache::{Arrangement, Cache, Shape};
use kv_raw::{RawDecode, RawPrefill, claim_of};
use kv_worker::{Plan, Worker};
use pdlink::config::{DigestPolicy, KvSendType, Path, Role};
use pdlink::kv::{BlockId, End, Granted, KvLink, ToDecode, ToPrefill, TransferFailure};
use pdlink::transport::{Board, PeerBoard, Shm, Tcp, TcpSetup, Transport, Word, export_all};

const SRC: [BlockId; 2] = [BlockId(4), BlockId(9)];
const DST: [BlockId; 2] = [BlockId(11), BlockId(2)];
const TOKENS: u32 = 8;
const SEED: u64 = 77;

fn granted(said: ToDecode) -> Granted {
    match said {
        ToDecode::Granted(granted) => granted,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_3_the_word_is_up_while_blocks_are_held_and_down_before_their_end_is_reported() {
    let mut plan = Plan::new("prefill", Role::Prefill).path(Path::Shm);
    (plan.kv.lease_ms, plan.kv.digest) = (400, DigestPolicy::Off);
    let prefill = plan.start();
    let mut raw = RawDecode::connect(&prefill, &prefill).await;
    let seen = PeerBoard::open(raw.info.board.clone().expect("prefill has a board")).unwrap();
    let offer = || prefill.offer(&SRC, TOKENS, SEED);
    // Landed, aborted, and left to its lease.
    for end in [End::Sent, End::Aborted, End::Expired] {
        let params = offer();
        let transfer_id = params.pdlink.transfer_id;
        raw.say(&claim_of(&prefill, &params));
        let word = granted(raw.hear().await.unwrap()).word.expect("a word");
        assert!(seen.shows(word), "before {end:?}");
        match end {
            End::Sent => raw.say(&ToPrefill::Landed { transfer_id, from: vec![0], digest: None }),
            End::Aborted => prefill.runtime.abort(transfer_id),
            _ => {}
        }
        assert_eq!(prefill.end_of(transfer_id), end);
        assert!(!seen.shows(word), "after {end:?}");
        raw.hear().await.unwrap();
    }
    prefill.assert_at_rest();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_pushes_puts_no_word_up() {
    let mut plan = Plan::new("prefill", Role::Prefill).path(Path::Shm);
    plan.send_type = KvSendType::PutAsync;
    let prefill = plan.start();
    let mut raw = RawDecode::connect(&prefill, &prefill).await;
    let params = prefill.offer(&SRC, TOKENS, SEED);
    raw.say(&claim_of(&prefill, &params));
    assert_eq!(granted(raw.hear().await.unwrap()).word, None);
}

/// Decode, and a prefill worker that says what a test has it say. Both reach its memory over `path`.
struct Pair {
    decode: Worker,
    prefill: RawPrefill,
    cache: Cache,
    board: Arc<Board>,
    _transport: Arc<dyn Transport>,
}

impl Pair {
    async fn new(path: Path, digest: DigestPolicy) -> Self {
        let shape = Shape { num_blocks: 48, ..Shape::default() };
        let cache = Cache::patterned(&shape, Arrangement::SplitKv, 1);
        cache.put_tokens(&SRC, 0, TOKENS, SEED);
        let transport: Arc<dyn Transport> = if path == Path::Shm {
            Arc::new(Shm::new(&cache.regions, 1).unwrap())
        } else {
            let (bind, advertise_host) = ("127.0.0.1".parse().unwrap(), "127.0.0.1".to_owned());
            let setup = TcpSetup { bind, advertise_host, streams: 1, stall_max: kv_worker::PATIENCE };
            Arc::new(Tcp::new(&cache.regions, &pdlink::security::Secret::loopback(), &setup).unwrap())
        };
        let board = Board::new();
        let offers = export_all(std::slice::from_ref(&transport));
        let prefill = RawPrefill::start(&cache, offers, board.at().unwrap()).await;
        let mut plan = Plan::new("decode", Role::Decode).path(path);
        plan.kv.digest = digest;
        Self { decode: plan.start(), prefill, cache, board, _transport: transport }
    }

    /// Has decode claim and copy what is granted with `word`; returns when it has said that the bytes have landed.
    async fn land(&mut self, word: Option<Word>) -> pdlink::kv::TransferId {
        let params = self.prefill.params(&SRC, TOKENS);
        let transfer_id = params.pdlink.transfer_id;
        let handle = self.decode.expect(&params);
        self.decode.fetch(handle, &DST, 0);
        assert!(matches!(self.prefill.hear().await, ToPrefill::Claim(_)));
        let (blocks, tokens, weight_version) = (vec![SRC.to_vec()], TOKENS, 1);
        let granted = Granted { transfer_id, blocks, tokens, weight_version, lease_ms: 30_000, word };
        self.prefill.say(&ToDecode::Granted(granted));
        loop {
            match self.prefill.hear().await {
                ToPrefill::Copying { .. } => {}
                ToPrefill::Landed { .. } => return transfer_id,
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_3_decode_waits_for_no_answer_where_it_sees_that_the_blocks_were_held() {
    let mut pair = Pair::new(Path::Shm, DigestPolicy::Off).await;
    let up = pair.board.put_up().unwrap();
    let transfer_id = pair.land(Some(up.word())).await;
    assert_eq!(pair.decode.end_of(transfer_id), End::Received);
    assert!(pair.decode.cache.holds_tokens(&DST, 0, TOKENS, SEED), "the bytes are there");
    // What is answered all the same comes too late to matter.
    let failure = TransferFailure::Expired { peer: "raw".to_owned(), transfer_id };
    pair.prefill.say(&ToDecode::Refused { transfer_id, failure });
    drop(up);
    assert!(pair.cache.holds_tokens(&SRC, 0, TOKENS, SEED));
    pair.decode.assert_at_rest();
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_3_what_the_word_does_not_say_is_asked() {
    let cases = [
        ("the blocks are held no more", Path::Shm, DigestPolicy::Off, false),
        ("prefill's digest is wanted", Path::Shm, DigestPolicy::Every, true),
        ("its memory is not open to us", Path::Tcp, DigestPolicy::Off, true),
    ];
    for (case, path, digest, is_up) in cases {
        let mut pair = Pair::new(path, digest).await;
        let up = pair.board.put_up().unwrap();
        let word = up.word();
        let _up = is_up.then_some(up);
        let transfer_id = pair.land(Some(word)).await;
        assert!(pair.decode.reports.try_recv().is_err(), "{case}: an end before the answer");
        let failure = TransferFailure::Expired { peer: "raw".to_owned(), transfer_id };
        pair.prefill.say(&ToDecode::Refused { transfer_id, failure: failure.clone() });
        assert_eq!(pair.decode.end_of(transfer_id), End::Failed { failure, fenced: true }, "{case}");
    }
    // Nor is anything taken for granted where no word was given.
    let mut pair = Pair::new(Path::Shm, DigestPolicy::Off).await;
    let transfer_id = pair.land(None).await;
    pair.prefill.say(&ToDecode::Confirmed { transfer_id, digest: None });
    assert_eq!(pair.decode.end_of(transfer_id), End::Received);
}
