//! What the scan and the two splices of a request cost, by body size and kind of text. Throughput is of the client's body.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pdlink::openai::splice::{Field, Fields, RequestBody};

const DROPS: Fields = Fields::of(&[Field::Stream, Field::MaxTokens, Field::KvTransferParams]);

/// Bodies of about `bytes` bytes: plain words with a line break now and then, tokens, and text that is mostly not ASCII.
fn body(kind: &str, bytes: usize) -> Bytes {
    let prompt = match kind {
        "words" => {
            let line = "the words of a prompt that goes on and on without saying very much\\n";
            format!("\"{}\"", line.repeat(bytes / line.len() + 1))
        }
        "tokens" => format!("[{}1]", "15496,995,".repeat(bytes / 10)),
        _ => format!("\"{}\"", "文字列は長い。".repeat(bytes / 21 + 1)),
    };
    format!(r#"{{"model":"m","prompt":{prompt},"max_tokens":64,"temperature":0.7,"stream":true}}"#).into()
}

fn splices(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("splice");
    for kind in ["words", "tokens", "wide"] {
        for bytes in [200, 20_000, 200_000] {
            let body = body(kind, bytes);
            group.throughput(Throughput::Bytes(body.len() as u64));
            group.bench_with_input(BenchmarkId::new(kind, bytes), &body, |bencher, body| {
                bencher.iter(|| {
                    let scanned = RequestBody::scan(black_box(body.clone())).expect("valid");
                    let prefill = scanned.splice(DROPS, br#""stream":false,"max_tokens":1"#);
                    let decode = scanned.splice(DROPS, br#""kv_transfer_params":{}"#);
                    black_box((prefill.bytes(), decode.bytes()))
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, splices);
criterion_main!(benches);
