//! How long it takes to get from block ids to runs, and to digest KV.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pdlink::kv::{
    BlockId, Extent, Geometry, GroupGeometry, GroupKind, LayerPlacement, Layout, MemoryMap, PairPlan, Span, digest,
};
use pdlink::memory::Region;

const BLOCK_SIZE: u32 = 16;

/// Qwen3-8B, `[block, 2, token, head, dim]`, one region for each layer.
fn layout(num_blocks: u32, layers: u32) -> Layout {
    let group = GroupGeometry {
        kind: GroupKind::Heads,
        layers,
        kv_heads: 8,
        head_size: 128,
        element_bytes: 2,
        dtype: "bfloat16".to_owned(),
        block_size: BLOCK_SIZE,
        window: None,
        opaque_planes: None,
    };
    let geometry = Geometry { model: "qwen3-8b".to_owned(), tp_size: 1, groups: vec![group] };
    let half = u64::from(BLOCK_SIZE) * 8 * 256;
    let placement = |layer: u32| LayerPlacement {
        region: u16::try_from(layer).unwrap(),
        base: 0,
        block_stride: 2 * half,
        half_stride: half,
        token_stride: 8 * 256,
        head_stride: 256,
    };
    let region_lens = vec![2 * half * u64::from(num_blocks); layers as usize];
    let map = MemoryMap { num_blocks, region_lens, first_rank: 0, ranks: vec![(0..layers).map(placement).collect()] };
    Layout::new(geometry, map).unwrap()
}

fn run_lists(criterion: &mut Criterion) {
    let (num_blocks, count) = (4096, 1000);
    let layout = layout(num_blocks, 36);
    criterion.bench_function("plan of a pair", |bencher| {
        bencher.iter(|| PairPlan::new(black_box(&layout), black_box(&layout)).unwrap());
    });
    let plan = PairPlan::new(&layout, &layout).unwrap();
    let adjacent: Vec<BlockId> = (0..count).map(BlockId).collect();
    let scattered: Vec<BlockId> = (0..count).map(|index| BlockId(index * 1237 % num_blocks)).collect();
    for (name, blocks) in [("adjacent", &adjacent), ("scattered", &scattered)] {
        let extent =
            Extent { src_blocks: &[blocks], dst_blocks: &[&adjacent], first_token: 0, tokens: count * BLOCK_SIZE };
        criterion.bench_function(&format!("runs of 16,000 tokens, blocks {name}"), |bencher| {
            bencher.iter(|| plan.runs(black_box(extent)).unwrap());
        });
        let runs = plan.runs(extent).unwrap();
        let lens = &layout.map().region_lens;
        criterion.bench_function(&format!("holding them against their regions, blocks {name}"), |bencher| {
            bencher.iter(|| black_box(&runs).validate(lens, lens).unwrap());
        });
    }
}

fn digests(criterion: &mut Criterion) {
    let layout = layout(256, 4);
    let regions: Vec<Arc<Region>> =
        layout.map().region_lens.iter().map(|len| Region::shared(usize::try_from(*len).unwrap()).unwrap()).collect();
    let blocks: Vec<BlockId> = (0..256).map(|index| BlockId(index * 77 % 256)).collect();
    let span = Span { blocks: &[&blocks], from: &[0], tokens: 256 * BLOCK_SIZE };
    let mut group = criterion.benchmark_group("digest");
    group.throughput(Throughput::Bytes(u64::from(span.tokens) * layout.geometry().token_bytes()));
    group.bench_function("64 MiB", |bencher| {
        bencher.iter(|| digest(&layout, &regions, black_box(span)).unwrap());
    });
    group.finish();
}

criterion_group!(benches, run_lists, digests);
criterion_main!(benches);
