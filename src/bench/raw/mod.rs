//! What the machine does without pdlink's paths: the ceilings that everything else is held against.
//!
//! A memcpy on one thread and on all, plain sockets to another process, the driver's copy between two GPUs, `ncclSend` of one
//! buffer, and one single run by NIXL. Each over all sizes, where there are two ways also both at once.

mod nccl;
mod report;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Context;

pub(super) use nccl::absent as nccl_absent;
pub use nccl::serve as serve_nccl_peer;
pub use report::{Report, Row};

use super::link::{self, Ceiling, Held, Plain};
use super::partner::{Part, Partner, Place};
use super::stats::Samples;
use crate::config::Path;
use crate::transport::Direction;

/// Memory walked through, so that nothing is met again while a cache still has it.
const SPAN_BYTES_MIN: u64 = 256 << 20;
/// Every line is measured in so many parts, with all other lines between them.
const PASSES: usize = 3;
const ROUNDS_MIN: usize = 3;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    pub means: Vec<Means>,
    pub bytes: Vec<u64>,
    /// Most threads, or sockets.
    pub threads: usize,
    /// Time per line of the table.
    pub seconds: f64,
    /// Of this process and of the other.
    pub gpus: [i32; 2],
    pub place: Place,
}

/// Who moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Means {
    Memcpy,
    Sockets,
    GpuCopy,
    NcclSend,
    Nixl,
}

impl Means {
    pub fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::Sockets => "sockets",
            Self::GpuCopy => "gpu-copy",
            Self::NcclSend => "ncclSend",
            Self::Nixl => "nixl",
        }
    }
}

/// Measures all of it.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let mut report = Report { other_host: options.place.other_host(), rows: Vec::new() };
    for means in &options.means {
        let rows = rows(options, *means).with_context(|| format!("raw {}", means.name()))?;
        report.rows.extend(rows);
    }
    Ok(report)
}

fn rows(options: &Options, means: Means) -> anyhow::Result<Vec<Row>> {
    let &Options { threads, gpus, .. } = options;
    let span = SPAN_BYTES_MIN.max(2 * options.bytes.iter().copied().max().context("no size to measure")?);
    // One thread shows what a core does, all of them what the machine does.
    let counts = if threads > 1 { vec![1, threads] } else { vec![1] };
    let mut rows = Vec::new();
    match means {
        Means::Memcpy => {
            let memory = link::memory(span, None)?;
            for count in counts {
                let ceiling = Ceiling::memcpy(count, memory.clone())?;
                rows.extend(lines(options, means, false, count, span, &ceiling)?);
            }
        }
        Means::Sockets => {
            for count in counts {
                for both in [false, true] {
                    let end = PlainEnd::start(&options.place, count, span)?;
                    let ceiling = Ceiling::sockets(&end.plain, count, span, both)?;
                    rows.extend(lines(options, means, both, count, span, &ceiling)?);
                }
            }
        }
        Means::GpuCopy => {
            let memory = link::memory(span, Some(gpus[0]))?;
            let held = Held::start(span, gpus[1])?;
            for both in [false, true] {
                let ceiling = Ceiling::gpu(Some(&held.memory), &memory, both)?;
                rows.extend(lines(options, means, both, 1, span, &ceiling)?);
            }
        }
        Means::NcclSend => rows.extend(nccl::rows(options, span)?),
        Means::Nixl => rows.extend(single_runs(options)?),
    }
    Ok(rows)
}

/// Sockets of the other process, for as long as it lives.
struct PlainEnd {
    plain: Plain,
    _partner: Partner,
}

impl PlainEnd {
    fn start(place: &Place, count: usize, span: u64) -> anyhow::Result<Self> {
        let mut partner = Partner::find(place, Part::Plain)?;
        let plain = partner.ask(&PlainOrders { count, span })?;
        Ok(Self { plain, _partner: partner })
    }
}

/// What the other end of plain sockets is to hold.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
struct PlainOrders {
    count: usize,
    span: u64,
}

/// The life of a process that holds plain sockets: until the one that measures leaves.
pub fn serve_plain(mut lines: super::partner::Lines) -> anyhow::Result<()> {
    let host: IpAddr = lines.host;
    while let Some(PlainOrders { count, span }) = lines.next()? {
        let plain = link::fits(span).and_then(|span| Plain::serve(host, count.max(1), span));
        super::partner::answer(&mut lines, &plain)?;
    }
    Ok(())
}

/// All sizes by one means, some of each line at a time.
fn lines(
    options: &Options,
    means: Means,
    both: bool,
    threads: usize,
    span: u64,
    ceiling: &Ceiling,
) -> anyhow::Result<Vec<Row>> {
    let mut took: Vec<Samples> = options.bytes.iter().map(|_| Samples::default()).collect();
    for _ in 0..PASSES {
        for (&bytes, took) in options.bytes.iter().zip(&mut took) {
            let until = Instant::now() + Duration::from_secs_f64(options.seconds / PASSES as f64);
            let (mut at, mut counted) = (0, 0);
            while counted <= ROUNDS_MIN || Instant::now() < until {
                let seconds = ceiling.run(at, bytes)?;
                // The first only warms up.
                if counted > 0 {
                    took.push(seconds);
                }
                at = (at + bytes) % (span - bytes + 1);
                counted += 1;
            }
        }
    }
    let direction = if both { "both" } else { "one-way" };
    options.bytes.iter().zip(&took).map(|(&bytes, took)| row(means, direction, threads, bytes, took)).collect()
}

/// A line of the table, from the seconds of many rounds.
fn row(means: Means, direction: &str, threads: usize, bytes: u64, took: &Samples) -> anyhow::Result<Row> {
    let spread = |samples: Samples| samples.spread().context("no sample");
    Ok(Row {
        means: means.name().to_owned(),
        direction: direction.to_owned(),
        threads,
        bytes,
        gigabytes_per_second: spread(took.iter().map(|took| bytes as f64 / took / 1e9).collect())?,
        microseconds: spread(took.iter().map(|took| took * 1e6).collect())?,
    })
}

/// One run by NIXL, as it is asked by our path.
fn single_runs(options: &Options) -> anyhow::Result<Vec<Row>> {
    let timed = |bytes: u64| {
        let took = link::timings(Path::Nixl, Direction::Pull, [bytes, bytes], 1, options.seconds)?;
        row(Means::Nixl, "one-way", 1, bytes, &took.into_iter().collect())
    };
    options.bytes.iter().map(|bytes| timed(*bytes)).collect()
}
