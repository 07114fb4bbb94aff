//! Caches of several KV groups: full attention, sliding windows, latents and recurrent states beside one another.

#[path = "support/kv_cache.rs"]
mod kv_cache;

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kv_cache::{Arrangement, Cache, Shape, oracle_copy};
use pdlink::config::{DigestPolicy, KvConfig, KvSendType, Path, Role};
use pdlink::kv::{
    BlockId, End, Extent, Geometry, KvError, KvLink, KvMetrics, KvRuntime, Layout, LayoutError, MemoryMap, Offer,
    PairPlan, ParamsMaker, RankMemory, Report, RuntimeConfig, Span, TransferId, digest,
};
use pdlink::memory::Region;
use pdlink::security::Secret;
use proptest::prelude::*;

const NUM_BLOCKS: u32 = 48;
const PATIENCE: Duration = Duration::from_secs(30);

/// A cache of several groups, each with memory of its own, all of the same ranks.
struct Hybrid {
    groups: Vec<Cache>,
    layout: Layout,
    regions: Vec<Arc<Region>>,
}

impl Hybrid {
    fn new(shapes: &[Shape], arrangement: Arrangement, seed: u64) -> Self {
        let groups: Vec<Cache> =
            shapes.iter().map(|shape| Cache::patterned(shape, arrangement, seed ^ u64::from(shape.layers))).collect();
        let geometry = Geometry { groups: shapes.iter().map(Shape::group).collect(), ..shapes[0].geometry() };
        let held = shapes[0].ranks();
        let mut map = MemoryMap {
            num_blocks: NUM_BLOCKS,
            region_lens: Vec::new(),
            first_rank: held.start,
            ranks: held.map(|_| Vec::new()).collect(),
        };
        for cache in &groups {
            let first = u16::try_from(map.region_lens.len()).unwrap();
            for (all, own) in map.ranks.iter_mut().zip(&cache.layout.map().ranks) {
                all.extend(own.iter().map(|placement| {
                    let mut placement = *placement;
                    placement.region += first;
                    placement
                }));
            }
            map.region_lens.extend(&cache.layout.map().region_lens);
        }
        let regions = groups.iter().flat_map(|cache| cache.regions.iter().cloned()).collect();
        Self { groups, layout: Layout::new(geometry, map).unwrap(), regions }
    }

    /// Of a cache of one rank.
    fn rank_memory(&self) -> RankMemory {
        let map = self.layout.map();
        let layers = map.ranks[0].clone();
        RankMemory { rank: map.first_rank, regions: self.regions.clone(), layers, num_blocks: map.num_blocks }
    }

    fn bytes(&self) -> Vec<Vec<Vec<u8>>> {
        self.groups.iter().map(Cache::bytes).collect()
    }
}

/// What each group of a pair is, apart from ranks.
fn group(kind: u32, number: usize) -> Shape {
    let window = if kind == 1 { Some(9) } else { None };
    let kv_heads = if kind == 2 { 1 } else { 4 };
    let layers = u32::try_from(number).unwrap() + 1;
    Shape { layers, kv_heads, window, mla: kind == 2, state: kind == 3, num_blocks: NUM_BLOCKS, ..Shape::default() }
}

fn lists(blocks: &[Vec<BlockId>]) -> Vec<&[BlockId]> {
    blocks.iter().map(Vec::as_slice).collect()
}

/// One list for each group that reaches to the last token, with `absent` blocks fewer at its front if it may be so.
fn blocks(shapes: &[Shape], tokens: u32, first: u32, absent: u32, seed: u64) -> Vec<Vec<BlockId>> {
    let list = |shape: &Shape| {
        let group = shape.group();
        let first_block = first / group.block_size;
        let needed = group.needed_from(tokens).max(first) / group.block_size;
        let all = group.blocks_for(tokens) - first_block;
        let absent = absent.min(needed.saturating_sub(first_block)).min(all.saturating_sub(1));
        shape.scattered_blocks(all * shape.block_size, seed)[absent as usize..].to_vec()
    };
    shapes.iter().map(list).collect()
}

prop_compose! {
    fn pairs()(
        kinds in prop::collection::vec(0..4u32, 1..4), src_log in 0..3u32, dst_log in 0..3u32,
        sizes in prop::collection::vec((0..2u32, 0..2u32), 3),
        arrangements in (0..8usize, 0..8usize), tokens in 1..40u32, first in 0..4u32, absent in (0..5u32, 0..5u32),
        seed in any::<u64>(),
    ) -> (Vec<Shape>, Vec<Shape>, Arrangement, Arrangement, u32, u32, (u32, u32), u64) {
        let dst_log = if kinds.contains(&3) { src_log } else { dst_log };
        let side = |tp_log: u32, pick: fn(&(u32, u32)) -> u32| {
            let shape = |(number, kind): (usize, &u32)| Shape {
                tp_size: 1 << tp_log, block_size: 2 << pick(&sizes[number]), ..group(*kind, number)
            };
            kinds.iter().enumerate().map(shape).collect::<Vec<_>>()
        };
        let (src, dst) = (side(src_log, |sizes| sizes.0), side(dst_log, |sizes| sizes.1));
        let first_token = (first * 4).min(tokens / 4 * 4);
        let all = Arrangement::ALL;
        (src, dst, all[arrangements.0], all[arrangements.1], tokens, first_token, absent, seed)
    }
}

fn of_rank(shapes: &[Shape], rank: u32) -> Vec<Shape> {
    shapes.iter().map(|shape| Shape { held: Some(rank), ..shape.clone() }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_group_moves_between_whichever_processes_hold_it_and_nothing_else_does(
        (src_shapes, dst_shapes, src_arr, dst_arr, tokens, first_token, absent, seed) in pairs()
    ) {
        let whole = Hybrid::new(&src_shapes, src_arr, seed);
        let sources: Vec<Hybrid> =
            (0..src_shapes[0].tp_size).map(|rank| Hybrid::new(&of_rank(&src_shapes, rank), src_arr, seed)).collect();
        let src_blocks = blocks(&src_shapes, tokens, 0, absent.0, seed);
        let dst_blocks = blocks(&dst_shapes, tokens, first_token, absent.1, seed ^ 1);
        let (src_lists, dst_lists) = (lists(&src_blocks), lists(&dst_blocks));
        let extent = Extent { src_blocks: &src_lists, dst_blocks: &dst_lists, first_token, tokens };
        for rank in 0..dst_shapes[0].tp_size {
            let dst = Hybrid::new(&of_rank(&dst_shapes, rank), dst_arr, !seed);
            let want: Vec<_> = (0..src_shapes.len()).map(|number| {
                let (src_blocks, dst_blocks) = ([src_lists[number]], [dst_lists[number]]);
                let extent = Extent { src_blocks: &src_blocks, dst_blocks: &dst_blocks, ..extent };
                oracle_copy(&whole.groups[number], &dst.groups[number], extent)
            }).collect();
            for src in &sources {
                for segment in &PairPlan::new(&src.layout, &dst.layout).unwrap().runs(extent).unwrap().segments {
                    for run in segment.runs.iter() {
                        let to = &dst.regions[usize::from(segment.dst_region)];
                        src.regions[usize::from(segment.src_region)].copy_to(run.src, to, run.dst, run.len).unwrap();
                    }
                }
            }
            prop_assert!(dst.bytes() == want);
        }
    }
}

#[test]
fn groups_in_one_region_are_one_post() {
    let shapes = [group(0, 0), group(1, 1), group(3, 2)];
    let separate = Hybrid::new(&shapes, Arrangement::TokenMajor, 1).layout;
    let (geometry, mut map) = (separate.geometry().clone(), separate.map().clone());
    let starts: Vec<u64> = (0..map.region_lens.len()).map(|at| map.region_lens[..at].iter().sum()).collect();
    for placement in &mut map.ranks[0] {
        placement.base += starts[usize::from(placement.region)];
        placement.region = 0;
    }
    map.region_lens = vec![map.region_lens.iter().sum()];
    let layout = Layout::new(geometry, map).unwrap();
    let blocks = blocks(&shapes, 20, 0, 0, 3);
    let extent = Extent { src_blocks: &lists(&blocks), dst_blocks: &lists(&blocks), first_token: 0, tokens: 20 };
    let runs = PairPlan::new(&layout, &layout).unwrap().runs(extent).unwrap();
    assert_eq!(runs.segments.len(), 1);
    assert_eq!(runs.bytes(), PairPlan::new(&separate, &separate).unwrap().runs(extent).unwrap().bytes());
}

#[test]
fn kv_4_the_digest_sees_every_group() {
    let shapes = [group(0, 0), group(1, 1), group(2, 2), group(3, 3)];
    let cache = Hybrid::new(&shapes, Arrangement::TokenMajor, 1);
    let blocks = blocks(&shapes, 19, 0, 9, 3);
    let firsts = cache.layout.check_cover(&lists(&blocks), 19).unwrap();
    let of =
        || digest(&cache.layout, &cache.regions, Span { blocks: &lists(&blocks), from: &firsts, tokens: 19 }).unwrap();
    let good = of();
    for (number, group) in cache.groups.iter().enumerate() {
        let placement = group.layout.map().ranks[0][0];
        let at = placement.base + u64::from(blocks[number].last().unwrap().0) * placement.block_stride;
        let byte = group.regions[0].to_vec(at, 1).unwrap()[0];
        group.regions[0].copy_in(at, &[byte ^ 1]).unwrap();
        assert_ne!(of(), good, "group {number}");
        group.regions[0].copy_in(at, &[byte]).unwrap();
    }
    assert_eq!(of(), good);
}

/// One rank's runtime over a cache of several groups.
struct Worker {
    runtime: KvRuntime,
    cache: Hybrid,
    reports: Receiver<Report>,
}

fn start(role: Role, shapes: &[Shape], arrangement: Arrangement, send_type: KvSendType) -> Worker {
    let cache = Hybrid::new(shapes, arrangement, u64::from(role == Role::Decode));
    let (sender, reports) = channel();
    let config = RuntimeConfig {
        kv: &KvConfig { digest: DigestPolicy::Every, paths: Some(vec![Path::Shm]), ..KvConfig::default() },
        engine_id: role.name().to_owned(),
        role,
        send_type,
        geometry: cache.layout.geometry().clone(),
        ranks: vec![cache.rank_memory()],
        siblings: Vec::new(),
        secret: Secret::loopback(),
        listener: TcpListener::bind("127.0.0.1:0").unwrap(),
        advertise_host: "127.0.0.1".to_owned(),
        weight_version: 1,
        weights: None,
        transports: None,
        metrics: KvMetrics::unregistered(),
    };
    let runtime = KvRuntime::start(config, Box::new(move |report| drop(sender.send(report)))).unwrap();
    Worker { runtime, cache, reports }
}

#[test]
fn a_hybrid_model_is_handed_over_between_workers_with_a_process_for_each_rank() {
    let (tokens, first_token) = (29, 4);
    for send_type in [KvSendType::Get, KvSendType::PutAsync] {
        let shapes = |sizes: [u32; 3]| {
            let kinds = [0, 1, 3].iter().enumerate().zip(sizes);
            let shape = |((number, kind), block_size): ((usize, &u32), u32)| Shape {
                tp_size: 2,
                block_size,
                ..group(*kind, number)
            };
            kinds.map(shape).collect::<Vec<_>>()
        };
        let (src, dst) = (shapes([8, 4, 16]), shapes([4, 2, 32]));
        let of_ranks = |role, shapes: &[Shape], arrangement| {
            [0, 1].map(|rank| start(role, &of_rank(shapes, rank), arrangement, send_type))
        };
        let prefill = of_ranks(Role::Prefill, &src, Arrangement::HeadMajor);
        let decode = of_ranks(Role::Decode, &dst, Arrangement::TokenMajor);
        let (src_blocks, dst_blocks) = (blocks(&src, tokens, 0, 9, 1), blocks(&dst, tokens, first_token, 9, 2));
        assert!(src_blocks[1].len() < src[1].group().blocks_for(tokens) as usize, "the window left blocks behind");
        let transfer_id = TransferId::random();
        for worker in &prefill {
            for (cache, blocks) in worker.cache.groups.iter().zip(&src_blocks) {
                let first = cache.shape.group().covered_from(blocks.len(), tokens).unwrap();
                cache.put_tokens(blocks, first, tokens, 7);
            }
            let offer = Offer { transfer_id, request_id: String::new(), blocks: src_blocks.clone(), tokens };
            worker.runtime.offer(offer).unwrap();
        }
        let cards = prefill.iter().map(|worker| worker.runtime.card()).collect();
        let maker = ParamsMaker::new(cards, Secret::loopback()).unwrap();
        let params = maker.params(transfer_id, String::new(), src_blocks.clone(), tokens);
        for worker in &decode {
            let handle = worker.runtime.expect(&params).unwrap();
            worker.runtime.fetch(handle, dst_blocks.clone(), first_token);
        }
        for worker in &decode {
            assert_eq!(worker.reports.recv_timeout(PATIENCE).unwrap().end, End::Received, "{send_type:?}");
            assert!(worker.runtime.record(transfer_id).unwrap().digest_checked);
            for (cache, blocks) in worker.cache.groups.iter().zip(&dst_blocks) {
                let first = cache.shape.group().covered_from(blocks.len(), tokens).unwrap();
                assert!(cache.holds_tokens(blocks, first, tokens, 7), "{send_type:?} {:?}", cache.shape);
            }
        }
        for worker in &prefill {
            assert_eq!(worker.reports.recv_timeout(PATIENCE).unwrap().end, End::Sent);
        }
    }
}

#[test]
fn lists_that_do_not_fit_the_groups_are_refused_by_name() {
    let shapes: Vec<Shape> = [0, 1].iter().enumerate().map(|(number, kind)| group(*kind, number)).collect();
    let worker = start(Role::Prefill, &shapes, Arrangement::SplitKv, KvSendType::Get);
    let offer = |blocks: &[&[u32]]| {
        let blocks = blocks.iter().map(|group| group.iter().copied().map(BlockId).collect()).collect();
        let offer = Offer { transfer_id: TransferId::random(), request_id: String::new(), blocks, tokens: 16 };
        match worker.runtime.offer(offer) {
            Err(KvError::Layout(error)) => Err(error),
            other => Ok(other.unwrap()),
        }
    };
    assert!(offer(&[&[0, 1, 2, 3], &[5, 6]]).is_ok(), "the window's last 9 tokens");
    assert!(matches!(offer(&[&[0, 1, 2, 3]]), Err(LayoutError::Groups { given: 1, groups: 2 })));
    assert!(matches!(offer(&[&[1, 2, 3], &[5, 6]]), Err(LayoutError::Uncovered { first_token: 0, .. })));
    assert!(matches!(offer(&[&[0, 1, 2, 3], &[6]]), Err(LayoutError::Uncovered { first_token: 8, .. })));
    assert!(matches!(offer(&[&[0, 1, 2, 3], &[5, 48]]), Err(LayoutError::Block { block: 48, .. })));
}
