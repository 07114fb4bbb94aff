//! Copies between host memory and a GPU's, over a stand-in for NVIDIA's driver, whose GPU memory is the host's.

#[path = "support/fake_cuda.rs"]
mod fake_cuda;

use fake_cuda::Driver;
use pdlink::ffi::cuda::OrderedStream;
use pdlink::memory::{Device, GpuCopies, GpuDigests, GpuRuns, Launches, Region, Run, RunSlice, in_rows};

/// Longer than what goes in one part, and no multiple of it.
const BYTES: u64 = (20 << 20) + 77;

const ON_EVERY_DRIVER: &[&str] = &["short_runs_arrive", "copies_both_ways"];
/// Alone in its process: it counts launches.
const FEW_RUNS: &[&str] = &["few_runs_arrive"];

#[test]
fn what_a_gpu_does_is_right_over_a_stand_in_too() {
    fake_cuda::pass(Driver::New, &[], ON_EVERY_DRIVER, 2);
    fake_cuda::pass(Driver::New, &[], FEW_RUNS, 1);
}

/// Without numbers written by streams, and without priorities of them: by asking, and by the usual one.
#[test]
fn and_over_a_driver_that_lacks_what_came_later_or_a_gpu_that_cannot_do_it() {
    for (driver, switches) in [(Driver::Old, &[][..]), (Driver::New, &[("FAKE_CUDA_NO_WRITES", "1")])] {
        fake_cuda::pass(driver, switches, ON_EVERY_DRIVER, 2);
        fake_cuda::pass(driver, switches, FEW_RUNS, 1);
    }
}

#[test]
fn what_the_model_computes_comes_before_what_we_copy() {
    fake_cuda::pass(Driver::New, &[("FAKE_CUDA_LEAST", "2")], &["streams_of_ours_are_the_lowest"], 1);
}

/// What the test above runs over a stand-in, whose lowest priority is another than the usual one.
#[test]
fn streams_of_ours_are_the_lowest() {
    if !fake_cuda::is_here() {
        return;
    }
    let device = Device::open(0).unwrap();
    // Copies of KV, digests, NCCL's, and those between a GPU and the host.
    let _copies = GpuCopies::on(&device, 8, Launches::ONE).unwrap();
    let _digests = GpuDigests::on(&device).unwrap();
    let _stream = OrderedStream::new(&device).unwrap();
    let (host, gpu) = (Region::shared(4096).unwrap(), Region::allocated_on(&device, 4096).unwrap());
    host.copy_to(0, &gpu, 0, 4096).unwrap();
    let (lowest, others) = fake_cuda::streams();
    assert!(lowest >= 5 && others == 0, "{lowest} streams of the lowest priority, {others} of others");
}

/// Heads of tokens: many short runs at equal distances, of lengths and places that suit the GPU and that do not.
#[test]
#[ignore = "needs a GPU"]
fn short_runs_arrive_whole_and_nothing_beside_them() {
    let device = Device::open(0).unwrap();
    let size = 8 << 20;
    let bytes: Vec<u8> = (0..size).map(|at: u32| u8::try_from(at * 31 % 251).unwrap()).collect();
    let (src, dst) =
        (Region::allocated_on(&device, bytes.len()).unwrap(), Region::allocated_on(&device, bytes.len()).unwrap());
    src.copy_in(0, &bytes).unwrap();
    for launches in [Launches::ONE, Launches { first_bytes: 64 << 10, most_bytes: 256 << 10, in_place_from: u64::MAX }]
    {
        let mut copies = GpuCopies::on(&device, 8, launches).unwrap();
        for (len, src_step, dst_step, rows, at) in [
            (1024, 2048, 1024, 16, 0),
            (1024, 1024, 2048, 700, 64),
            (256, 2048, 512, 16, 0),
            (1008, 2032, 1011, 33, 5),
            (7, 16, 9, 40, 1),
        ] {
            // Blocks in another order on the other side.
            let block = |number: u64, step: u64| at + number * rows * step;
            let run = |number: u64, row: u64| Run {
                src: block(number, src_step) + row * src_step,
                dst: block(number * 3 % 5, dst_step) + row * dst_step,
                len,
            };
            let runs: Vec<Run> = (0..5).flat_map(|number| (0..rows).map(move |row| run(number, row))).collect();
            let rows = in_rows(&runs, runs.iter().map(|run| run.len).sum()).expect("rows");
            let mut want = vec![9; bytes.len()];
            for run in &runs {
                let [from, to, len] = [run.src, run.dst, run.len].map(|number| usize::try_from(number).unwrap());
                want[to..to + len].copy_from_slice(&bytes[from..from + len]);
            }
            for rows in [Some(&rows[..]), None] {
                dst.copy_in(0, &vec![9; bytes.len()]).unwrap();
                let (src, dst, runs) = (&*src, &*dst, RunSlice::whole(&runs));
                copies.copy_slices([GpuRuns { src, src_offset: 0, dst, dst_offset: 0, runs, rows }]).unwrap();
                let got = dst.to_vec(0, dst.len()).unwrap();
                assert!(got == want, "{len} bytes, as rows: {}, {launches:?}", rows.is_some());
            }
        }
        // Rows that reach out of their region are refused, and named.
        let runs: Vec<Run> =
            (0..64).map(|row| Run { src: row * 4096, dst: row * (128 << 10) + 1, len: 4096 }).collect();
        let rows = in_rows(&runs, 64 * 4096).unwrap();
        let slice = GpuRuns {
            src: &src,
            src_offset: 0,
            dst: &dst,
            dst_offset: 128 << 10,
            runs: RunSlice::whole(&runs),
            rows: Some(&rows),
        };
        assert!(copies.copy_slices([slice]).unwrap_err().to_string().contains("outside"), "{launches:?}");
    }
}

/// Lengths of runs, where the first begins, and whether one launch brings them with it: at most 8, in at most 32 chunks of 4 KiB if all
/// had as many as the longest.
const FEW: &[(&[u64], u64, bool)] = &[
    (&[4096], 0, true),
    (&[4096], 9, true),
    (&[0], 0, true),
    (&[1], 3, true),
    (&[4095, 1, 8192, 17], 5, true),
    (&[64, 0, 4096 + 32, 64 << 10], 0, false),
    (&[48 << 10, 48 << 10], 16, true),
    (&[44 << 10, 44 << 10, 44 << 10], 16, false),
    (&[128 << 10], 0, true),
    (&[128 << 10], 7, true),
    (&[(128 << 10) + 1], 0, false),
    (&[(128 << 10) + 1], 11, false),
    (&[16 << 10; 8], 16, true),
    (&[100, 16 << 10, 4096, 0, 33, 4097, 8191, 16], 1, true),
    (&[(16 << 10) + 1, 1, 1, 1, 1, 1, 1, 1], 0, false),
    (&[64; 8], 0, true),
    (&[64; 9], 0, false),
];

#[test]
#[ignore = "needs a GPU"]
fn few_runs_arrive_whole_and_nothing_beside_them() {
    let device = Device::open(0).unwrap();
    let bytes: Vec<u8> = (0..1_u32 << 20).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
    let region = || Region::allocated_on(&device, bytes.len()).unwrap();
    let (src, dst) = (region(), region());
    src.copy_in(0, &bytes).unwrap();
    let mut copies = GpuCopies::on(&device, 8, Launches::ONE).unwrap();
    for (lens, at, is_few) in FEW {
        // The other way round on the other side, with bytes between that nobody may touch.
        let (mut from, mut to) = (*at, 3 * at + (512 << 10));
        let place = |len: &u64| {
            to -= len + 48;
            let run = Run { src: from, dst: to, len: *len };
            from += len + 64;
            run
        };
        let runs: Vec<Run> = lens.iter().map(place).collect();
        let mut want = vec![9; bytes.len()];
        for run in &runs {
            let [from, to, len] = [run.src, run.dst, run.len].map(|number| usize::try_from(number).unwrap());
            want[to..to + len].copy_from_slice(&bytes[from..from + len]);
        }
        dst.copy_in(0, &vec![9; bytes.len()]).unwrap();
        let before = fake_cuda::is_here().then(fake_cuda::launches);
        let (src, dst, list) = (&*src, &*dst, RunSlice::whole(&runs));
        copies.copy_slices([GpuRuns { src, src_offset: 0, dst, dst_offset: 0, runs: list, rows: None }]).unwrap();
        assert!(dst.to_vec(0, dst.len()).unwrap() == want, "{lens:?} from {at}");
        if let Some((few, others)) = before {
            let want = if *is_few { (few + 1, others) } else { (few, others + 1) };
            assert_eq!(fake_cuda::launches(), want, "{lens:?}: launches of few runs, and others");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn copies_both_ways() {
    let device = Device::open(0).unwrap();
    let bytes: Vec<u8> = (0..BYTES).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
    let (host, gpu) = (Region::shared(bytes.len()).unwrap(), Region::allocated_on(&device, bytes.len() + 100).unwrap());
    let back = Region::shared(bytes.len() + 10).unwrap();
    host.copy_in(0, &bytes).unwrap();
    host.copy_to(0, &gpu, 33, BYTES).unwrap();
    gpu.copy_to(33, &back, 5, BYTES).unwrap();
    assert!(back.to_vec(5, BYTES).unwrap() == bytes);
    assert_eq!((back.to_vec(0, 5).unwrap(), back.to_vec(BYTES + 5, 5).unwrap()), (vec![0; 5], vec![0; 5]));
    // Neither end is left.
    assert!(gpu.copy_to(33, &back, 11, BYTES).is_err() && host.copy_to(1, &gpu, 0, BYTES).is_err());
}
