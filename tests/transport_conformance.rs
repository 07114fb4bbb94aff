//! What every path must show: TR-1, TR-2, TR-3, exact bytes, refusals before any byte moves, and clean ends.

#[path = "support/links.rs"]
mod links;

use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use links::fake_cuda::Driver;
use links::*;
use pdlink::memory::{to_u64, to_usize};
use pdlink::transport::{Direction, RunList, TransferRequest, TransportError};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// The other process of the tests that need one, when it is told to be it.
#[test]
fn peer_process() {
    be_peer();
}

const BOTH: [Direction; 2] = [Direction::Pull, Direction::Push];
const MIB: usize = 1024 * 1024;

/// Transfers `runs` in both directions and holds every byte of every destination region, so also all round the runs.
fn moves_exactly(pair: &Pair, runs: &RunList, what: &str) {
    for direction in BOTH {
        let (src, dst) = pair.ends(direction);
        let want = oracle(src, dst, runs);
        let copied = pair.transfer(direction, runs.clone()).unwrap();
        assert_eq!(copied.bytes, runs.bytes(), "{what}, {direction:?}");
        // TR-2: the completion has come, so the bytes are there.
        assert_same(&contents(dst), &want, &format!("{what}, {direction:?}"));
    }
}

fn bytes_arrive_where_they_belong_and_nowhere_else(kind: Kind) {
    let pair = Pair::new(kind, &[9 * MIB, 5000], &[9 * MIB, 70_000]);
    let tiny: Vec<_> = (0..4096_u64).map(|i| (i * 16 + 3, 60_000 - i * 14, 5 + i % 9)).collect();
    let scattered: Vec<_> = (0..100_u64).map(|i| (i * 80_000 + i, (99 - i) * 90_000 + 7, 65_536)).collect();
    let cases = [
        ("nothing at all", list(vec![])),
        ("a segment without runs", list(vec![segment(0, 0, &[])])),
        ("runs of no length, at the very end too", list(vec![segment(1, 1, &[(0, 9, 0), (5000, 5000, 0)])])),
        ("one byte", list(vec![segment(1, 0, &[(4999, to_u64(9 * MIB) - 1, 1)])])),
        ("4 KiB", list(vec![segment(0, 1, &[(1, 0, 4096)])])),
        ("one large run, off every boundary", list(vec![segment(0, 0, &[(13, 1, to_u64(9 * MIB) - 13)])])),
        ("thousands of tiny runs", list(vec![segment(0, 0, &tiny)])),
        ("a hundred scattered blocks", list(vec![segment(0, 0, &scattered)])),
        (
            "several segments, some empty between",
            list(vec![
                segment(0, 1, &[(8, 0, 1000), (9, 1000, 0), (100_000, 1001, 3999)]),
                segment(1, 1, &[]),
                segment(1, 0, &[(0, 500_000, 2500), (2500, 400_000, 2500)]),
            ]),
        ),
    ];
    for (what, runs) in &cases {
        moves_exactly(&pair, runs, what);
    }
}

fn random_run_lists_match_a_naive_copy(kind: Kind) {
    const LENS: [usize; 3] = [1, 40_000, 300_000];
    let pair = Pair::new(kind, &LENS, &LENS);
    // Slots of equal size, filled in a random order, so that destinations never overlap.
    let run = (0_u64..300_000, 0_u64..3000);
    let part = (0_u16..3, 1_u16..3, prop::collection::vec(run, 0..60));
    let mut runner = TestRunner::new(Config { cases: 40, failure_persistence: None, ..Config::default() });
    let lists = prop::collection::vec(part, 0..5);
    runner
        .run(&lists, |parts| {
            let mut used = [0_u64; 3];
            let segments = parts.iter().map(|(src_region, dst_region, wanted)| {
                let (src_len, dst_len) =
                    (to_u64(LENS[usize::from(*src_region)]), to_u64(LENS[usize::from(*dst_region)]));
                let mut runs = Vec::new();
                for (src, len) in wanted {
                    let dst = &mut used[usize::from(*dst_region)];
                    let src = src % src_len;
                    let len = (*len).min(src_len - src).min(dst_len - *dst);
                    runs.push((src, *dst, len));
                    // A guard byte behind each run.
                    *dst = (*dst + len + 1).min(dst_len);
                }
                runs.reverse();
                segment(*src_region, *dst_region, &runs)
            });
            let runs = list(segments.collect());
            moves_exactly(&pair, &runs, "random list");
            Ok(())
        })
        .unwrap();
}

fn runs_outside_a_region_are_refused_before_any_byte_moves(kind: Kind) {
    let pair = Pair::new(kind, &[200_000], &[200_000]);
    let good = (0, 0, 100_000);
    let bad = [
        segment(0, 0, &[good, (150_000, 100_000, 50_001)]),
        segment(0, 0, &[good, (0, 150_000, 50_001)]),
        segment(0, 0, &[good, (200_001, 0, 0)]),
        segment(0, 0, &[good, (u64::MAX, 0, 2)]),
        segment(0, 0, &[good, (0, u64::MAX - 1, 2)]),
        segment(1, 0, &[good]),
        segment(0, 1, &[good]),
    ];
    for direction in BOTH {
        for bad in &bad {
            let (_, dst) = pair.ends(direction);
            let before = contents(dst);
            let refused = pair.transfer(direction, list(vec![segment(0, 0, &[good]), bad.clone()])).unwrap_err();
            let named = matches!(refused, TransportError::OutOfRange { .. } | TransportError::UnknownRegion { .. });
            assert!(named && refused.fenced(), "{refused}");
            assert_same(&contents(dst), &before, "refused");
        }
    }
    moves_exactly(&pair, &whole(200_000), "after the refusals");
}

fn concurrent_transfers_complete_once_each(kind: Kind) {
    const SLOT: u64 = 150_000;
    let pair = Pair::new(kind, &[to_usize(32 * SLOT)], &[to_usize(32 * SLOT)]);
    let (src, dst) = pair.ends(Direction::Pull);
    let runs = |slot: u64| {
        let runs: Vec<_> =
            (0..10).map(|i| (slot * SLOT + i * 15_000, slot * SLOT + (9 - i) * 15_000, 15_000)).collect();
        list(vec![segment(0, 0, &runs)])
    };
    let want = oracle(src, dst, &list((0..32).map(|slot| runs(slot).segments.remove(0)).collect()));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (pair, runs) = (&pair, &runs);
            scope.spawn(move || {
                let started: Vec<_> = (0..8).map(|i| pair.start(Direction::Pull, runs(thread * 8 + i)).1).collect();
                for told in &started {
                    assert_eq!(once(told).unwrap().bytes, SLOT);
                }
            });
        }
    });
    assert_same(&contents(dst), &want, "32 transfers from 4 threads");
}

/// TR-3: whatever the moment of the cancel, nothing is written once the completion has come.
fn a_cancelled_transfer_writes_nothing_after_its_completion(kind: Kind) {
    let len = 8 * MIB;
    let pair = Pair::new(kind, &[len], &[len]);
    for direction in BOTH {
        for delay_us in [0, 30, 200, 800, 3000, 20_000] {
            let (ticket, told) = pair.start(direction, whole(len));
            std::thread::sleep(Duration::from_micros(delay_us));
            pair.link.cancel(ticket);
            let outcome = once(&told);
            assert!(matches!(outcome, Ok(_) | Err(TransportError::Cancelled)), "{outcome:?}");
            let (_, dst) = pair.ends(direction);
            dst[0].fill(0, to_u64(len), 0x5A).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert!(contents(dst)[0] == vec![0x5A; len], "{direction:?} cancelled after {delay_us} us");
            pair.link.cancel(ticket);
        }
    }
    paint(&pair.our_regions, 5);
    moves_exactly(&pair, &whole(len), "after the cancels");
}

fn a_transfer_that_is_late_fails_and_moves_nothing_more(kind: Kind) {
    let pair = Pair::new(kind, &[MIB], &[MIB]);
    for (direction, salt) in BOTH.into_iter().zip(7..) {
        let grant = pair.theirs.grant(&whole(MIB)).unwrap();
        let (tell, told) = mpsc::channel();
        let late = TransferRequest {
            deadline: Instant::now().checked_sub(Duration::from_millis(1)).unwrap(),
            ..request(direction, whole(MIB), Some(grant.token()))
        };
        let before = contents(pair.ends(direction).1);
        pair.link.submit(late, Box::new(move |outcome| tell.send(outcome).unwrap()));
        let outcome = once(&told);
        assert!(matches!(outcome, Err(TransportError::DeadlineMissed { .. })), "{outcome:?}");
        assert_same(&contents(pair.ends(direction).1), &before, "late");
        paint(pair.ends(direction).0, salt);
    }
    moves_exactly(&pair, &whole(MIB), "after the late ones");
}

fn closing_ends_what_is_in_flight_and_refuses_what_comes(kind: Kind) {
    let len = 4 * MIB;
    let pair = Pair::new(kind, &[len], &[len]);
    assert!(pair.link.usable());
    let started: Vec<_> = (0..6).map(|i| pair.start(BOTH[i % 2], whole(len)).1).collect();
    pair.link.close();
    for told in &started {
        let outcome = once(told);
        assert!(matches!(outcome, Ok(_) | Err(TransportError::Cancelled)), "{outcome:?}");
    }
    assert!(!pair.link.usable());
    let outcome = pair.transfer(Direction::Pull, whole(len));
    assert!(matches!(outcome, Err(TransportError::LinkClosed { .. })), "{outcome:?}");
    pair.link.close();
    let again = pair.ours.connect(&pair.theirs.export(), soon()).unwrap();
    let pair = Pair { link: again, ..pair };
    moves_exactly(&pair, &whole(len), "over a second link");
}

/// A completion may close its own link, and drop everything it has.
fn a_completion_may_close_its_link(kind: Kind) {
    for len in [100, MIB] {
        let pair = Pair::new(kind, &[len], &[len]);
        let (link, transport) = (pair.link.clone(), pair.ours.clone());
        let (tell, told) = mpsc::channel();
        let done = Box::new(move |outcome| {
            link.close();
            transport.close();
            tell.send(outcome).unwrap();
        });
        pair.link.submit(request(Direction::Pull, whole(len), None), done);
        once(&told).unwrap();
        assert!(!pair.link.usable());
    }
}

/// KV-7, where the path can hold a peer back: outside a grant, and after it, nothing is written.
fn a_push_lands_only_under_its_grant(kind: Kind) {
    let len = 8 * MIB;
    let pair = Pair::new(kind, &[len], &[len]);
    if !pair.fences() {
        return;
    }
    let push = |runs: RunList, grant| {
        let (tell, told) = mpsc::channel();
        pair.link.submit(request(Direction::Push, runs, grant), Box::new(move |outcome| tell.send(outcome).unwrap()));
        told
    };
    let before = contents(&pair.their_regions);
    let narrow = pair.theirs.grant(&list(vec![segment(0, 0, &[(0, 4096, 4096)])])).unwrap();
    let inside = segment(0, 0, &[(0, 4096, 4096)]);
    for (grant, runs) in [
        (None, inside.clone()),
        (Some(pdlink::transport::GrantToken([9; 16])), inside.clone()),
        (Some(narrow.token()), segment(0, 0, &[(0, 4095, 2)])),
        (Some(narrow.token()), segment(0, 0, &[(0, 8191, 2)])),
    ] {
        let outcome = once(&push(list(vec![runs]), grant));
        assert!(matches!(outcome, Err(TransportError::NotGranted { .. })), "{outcome:?}");
    }
    assert_same(&contents(&pair.their_regions), &before, "without a grant");
    once(&push(list(vec![inside.clone()]), Some(narrow.token()))).unwrap();
    let token = narrow.token();
    drop(narrow);
    assert!(matches!(once(&push(list(vec![inside]), Some(token))), Err(TransportError::NotGranted { .. })));

    for delay_us in [0, 100, 500, 2000, 5000] {
        let grant = pair.theirs.grant(&whole(len)).unwrap();
        let told = push(whole(len), Some(grant.token()));
        std::thread::sleep(Duration::from_micros(delay_us));
        drop(grant);
        pair.their_regions[0].fill(0, to_u64(len), 0xA5).unwrap();
        let outcome = once(&told);
        assert!(matches!(outcome, Ok(_) | Err(TransportError::NotGranted { .. })), "{outcome:?}");
        assert!(contents(&pair.their_regions)[0] == vec![0xA5; len], "revoked after {delay_us} us");
    }
}

fn a_grant_names_only_our_own_memory(kind: Kind) {
    let pair = Pair::new(kind, &[4096], &[4096]);
    for bad in [segment(0, 0, &[(0, 4096, 1)]), segment(0, 1, &[(0, 0, 1)])] {
        assert!(pair.theirs.grant(&list(vec![bad])).is_err());
    }
}

fn an_export_of_rubbish_is_refused(kind: Kind) {
    let pair = Pair::new(kind, &[4096], &[4096]);
    let good = pair.theirs.export();
    let mut longer = good.as_bytes().to_vec();
    longer.push(0);
    let huge = vec![0xFF; 600 * 1024];
    for bytes in [vec![], vec![0xFF; 64], good.as_bytes()[..good.as_bytes().len() - 1].to_vec(), longer, huge] {
        let refused = pair.ours.connect(&pdlink::transport::Export::from_bytes(bytes), soon()).err().unwrap();
        let named = matches!(refused, TransportError::BadExport { .. } | TransportError::Unreachable { .. });
        assert!(named, "{refused}");
    }
}

macro_rules! conformance {
    ($($(#[$attr:meta])? $path:ident = $kind:expr;)*) => { $(
        mod $path {
            use super::*;
            conformance!(@each [$(#[$attr])?] $kind;
                bytes_arrive_where_they_belong_and_nowhere_else
                random_run_lists_match_a_naive_copy
                runs_outside_a_region_are_refused_before_any_byte_moves
                concurrent_transfers_complete_once_each
                a_cancelled_transfer_writes_nothing_after_its_completion
                a_transfer_that_is_late_fails_and_moves_nothing_more
                closing_ends_what_is_in_flight_and_refuses_what_comes
                a_completion_may_close_its_link
                a_push_lands_only_under_its_grant
                a_grant_names_only_our_own_memory
                an_export_of_rubbish_is_refused
            );
        }
    )* };
    (@each $attr:tt $kind:expr; $($name:ident)*) => { $( conformance!(@one $attr $kind; $name); )* };
    (@one [$($attr:tt)*] $kind:expr; $name:ident) => {
        #[test]
        $($attr)*
        fn $name() {
            super::$name($kind);
        }
    };
}

conformance! {
    loopback = Kind::Loopback;
    shm_file = Kind::ShmFile;
    shm_borrowed = Kind::ShmBorrowed;
    tcp = Kind::Tcp;
    nccl = Kind::Nccl;
    #[ignore = "needs a GPU"] cuda_ipc = Kind::CudaIpc;
    #[ignore = "needs two GPUs and NCCL"] nccl_gpus = Kind::NcclGpus;
    #[ignore = "needs NIXL's wheel"] nixl = Kind::Nixl;
    #[ignore = "needs NIXL's wheel"] nixl_sockets = Kind::NixlSockets;
    #[ignore = "needs NIXL's wheel"] nixl_packed = Kind::NixlPacked;
    faultless = Kind::Faultless;
}

/// Two GPUs of a stand-in for the driver, and NCCL's.
fn stand_ins<'a>() -> [(&'a str, &'a str); 3] {
    let nccl = fake_nccl::library().to_str().unwrap();
    [("FAKE_CUDA_GPUS", "2"), ("PDLINK_TEST_GPUS", "0,1"), ("PDLINK_TEST_NCCL", nccl)]
}

#[test]
fn gpus_of_a_stand_in_show_it_too() {
    fake_cuda::pass(Driver::New, &stand_ins(), &["cuda_ipc::"], 11);
}

#[test]
fn gpus_of_a_stand_in_show_it_over_nccl_too() {
    fake_cuda::pass(Driver::New, &stand_ins(), &["nccl_gpus::"], 11);
}

#[test]
fn and_so_does_one_gpu_alone() {
    let bytes = ["cuda_ipc::bytes_arrive", "cuda_ipc::random_run_lists", "cuda_ipc::concurrent"];
    fake_cuda::pass(Driver::New, &[], &bytes, 3);
}

/// Threads, descriptors and mapped regions of this process.
fn holdings() -> (usize, usize, usize) {
    let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (
        count("/proc/self/task"),
        count("/proc/self/fd"),
        maps.lines().filter(|line| line.contains("pdlink-region")).count(),
    )
}

/// Set in the process that `nothing_is_left_behind` starts.
const ALONE_ENV: &str = "PDLINK_TEST_ALONE";

/// What `nothing_is_left_behind` runs in a process of its own: what it counts is the whole process's.
#[test]
fn open_use_and_close_everything() {
    let kinds = match std::env::var(ALONE_ENV).as_deref() {
        Ok("gpus") => vec![Kind::CudaIpc, Kind::NcclGpus],
        Ok("nixl") => vec![Kind::Nixl, Kind::NixlSockets, Kind::NixlPacked],
        Ok(_) => vec![Kind::Loopback, Kind::ShmFile, Kind::ShmBorrowed, Kind::Tcp, Kind::Nccl, Kind::Faultless],
        Err(_) => return,
    };
    let lasting = Mutex::new(None);
    for round in 0..4 {
        for &kind in &kinds {
            let pair = Pair::new(kind, &[2 * MIB], &[2 * MIB]);
            moves_exactly(&pair, &whole(2 * MIB), "before the close");
            let unfinished: Vec<_> = (0..4).map(|i| pair.start(BOTH[i % 2], whole(2 * MIB)).1).collect();
            let mapped = holdings().2;
            pair.link.close();
            if kind == Kind::ShmFile {
                assert_eq!(holdings().2, mapped - 1, "the peer's region is unmapped when its link closes");
            }
            pair.close();
            unfinished.iter().for_each(|told| drop(once(told)));
        }
        // The first round may open what stays for good, such as the source of random bytes.
        let now = holdings();
        if round > 0 {
            assert_eq!(*lasting.lock().unwrap(), Some(now), "threads, descriptors, mapped regions after round {round}");
        }
        *lasting.lock().unwrap() = Some(now);
    }
}

fn leaves_nothing_behind(mut again: Command, what: &str) {
    let alone = again
        .args(["open_use_and_close_everything", "--exact", "--test-threads=1"])
        .env(ALONE_ENV, what)
        .output()
        .unwrap();
    assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stdout));
}

fn this_binary() -> Command {
    Command::new(std::env::current_exe().unwrap())
}

#[test]
fn nothing_is_left_behind() {
    leaves_nothing_behind(this_binary(), "built in");
}

#[test]
fn nothing_is_left_behind_on_gpus_of_a_stand_in() {
    leaves_nothing_behind(fake_cuda::again(Driver::New, &stand_ins()), "gpus");
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn nothing_is_left_behind_by_nixl() {
    leaves_nothing_behind(this_binary(), "nixl");
}
