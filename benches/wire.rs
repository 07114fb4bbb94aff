//! What a control message costs, apart from the socket.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use pdlink::control::{Frame, FrameBuffer, TransferId, from_body, to_body};
use pdlink::kv::{BlockId, Granted, PARAMS_VERSION, PdlinkParams, RankEndpoint, ToDecode, ToPrefill, TransferParams};
use pdlink::security::Secret;

fn granted(blocks: u32) -> ToDecode {
    ToDecode::Granted(Granted {
        word: None,
        transfer_id: TransferId([7; 16]),
        blocks: vec![(0..blocks).map(|index| BlockId(index * 1237 % 65_536)).collect()],
        tokens: blocks * 16,
        weight_version: 1,
        lease_ms: 30_000,
    })
}

fn round_trip(bytes: &[u8]) -> Frame {
    let mut buffer = FrameBuffer::default();
    buffer.space().extend_from_slice(bytes);
    buffer.next_frame().unwrap().unwrap()
}

fn wire(criterion: &mut Criterion) {
    let landed = ToPrefill::Landed { transfer_id: TransferId([7; 16]), from: vec![0], digest: None };
    criterion.bench_function("landed, there and read", |bencher| {
        bencher.iter(|| {
            let bytes = Frame::Notice(to_body(black_box(&landed))).encode().unwrap();
            let Frame::Notice(body) = round_trip(&bytes) else { unreachable!() };
            from_body::<ToPrefill>(&body).unwrap()
        });
    });
    for blocks in [16, 1000] {
        let granted = granted(blocks);
        criterion.bench_function(&format!("grant of {blocks} blocks, there and read"), |bencher| {
            bencher.iter(|| {
                let bytes = Frame::Notice(to_body(black_box(&granted))).encode().unwrap();
                let Frame::Notice(body) = round_trip(&bytes) else { unreachable!() };
                from_body::<ToDecode>(&body).unwrap()
            });
        });
    }
}

fn params(criterion: &mut Criterion) {
    let secret = Secret::loopback();
    let params = TransferParams {
        do_remote_prefill: true,
        do_remote_decode: false,
        remote_engine_id: "prefill-0".to_owned(),
        remote_request_id: "cmpl-0123456789abcdef".to_owned(),
        remote_host: "127.0.0.1".to_owned(),
        remote_port: 14_579,
        remote_block_ids: vec![(0..1000).map(BlockId).collect()],
        tp_size: 1,
        remote_num_tokens: 16_000,
        pdlink: PdlinkParams {
            version: PARAMS_VERSION,
            transfer_id: TransferId([7; 16]),
            ranks: vec![RankEndpoint { endpoint: "127.0.0.1:14579".to_owned(), incarnation: 1 }],
            geometry_digest: 1,
            weight_version: Some(1),
            seal: String::new(),
        },
    }
    .sealed(&secret);
    criterion.bench_function("parameters of 1,000 blocks, sealed", |bencher| {
        bencher.iter(|| black_box(&params).clone().sealed(&secret));
    });
    let value = params.to_json();
    criterion.bench_function("parameters of 1,000 blocks, read and checked", |bencher| {
        bencher.iter(|| TransferParams::parse(black_box(&value)).unwrap().check_seal(&secret).unwrap());
    });
}

criterion_group!(benches, wire, params);
criterion_main!(benches);
