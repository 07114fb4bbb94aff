//! What the machine does without pdlink's paths: the ceilings that everything else is held against.
//!
//! A memcpy on one thread and on all, plain sockets to another process, the driver's copy between two GPUs, `ncclSend` of one
//! buffer, and one single run by NIXL. Each over all sizes, where there are two ways also both at once, and by one thread alone.

mod nccl;
mod report;

use std::net::IpAddr;

use anyhow::Context;

pub(super) use nccl::absent as nccl_absent;
pub use nccl::serve as serve_nccl_peer;
pub use report::{Report, Row};

use super::link::{self, Case, Ceiling, Held, Plain};
use super::partner::{Part, Partner, Place};
use super::stats::Samples;
use super::turns::in_turns;
use crate::config::Path;
use crate::transport::Direction;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    pub means: Vec<Means>,
    /// Sizes, for all threads one way. From the shortest to the longest.
    pub bytes: Vec<u64>,
    /// Sizes for one thread alone, and for both ways.
    pub bytes_aside: Vec<u64>,
    /// Most threads, or sockets.
    pub threads: usize,
    /// Time per line of the table; lines that are slower have it from the others.
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

/// Lines that are measured in turns: one means, so many threads, one way or both.
struct Variant<'a> {
    means: Means,
    threads: usize,
    both: bool,
    bytes: &'a [u64],
}

impl Variant<'_> {
    /// Memory to walk through.
    fn span(&self) -> u64 {
        link::span(self.bytes.iter().copied().max().unwrap_or(0))
    }
}

impl Options {
    /// Lines of the table.
    pub fn lines(&self) -> usize {
        self.means.iter().flat_map(|means| self.variants(*means)).map(|variant| variant.bytes.len()).sum()
    }

    /// One thread shows what a core does, all of them what the machine does.
    fn variants(&self, means: Means) -> Vec<Variant<'_>> {
        let all = self.threads.max(1);
        let threads = if all > 1 { vec![1, all] } else { vec![1] };
        let (threads, ways) = match means {
            Means::Memcpy => (threads, vec![false]),
            Means::Sockets => (threads, vec![false, true]),
            Means::GpuCopy => (vec![1], vec![false, true]),
            Means::NcclSend | Means::Nixl => (vec![1], vec![false]),
        };
        let most = threads.last().copied();
        let variants = threads.iter().flat_map(|&threads| ways.iter().map(move |&both| (threads, both)));
        variants
            .map(|(threads, both)| {
                let bytes = if Some(threads) == most && !both { &self.bytes } else { &self.bytes_aside };
                Variant { means, threads, both, bytes }
            })
            .filter(|variant| !variant.bytes.is_empty())
            .collect()
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
    let mut rows = Vec::new();
    // A process that opens a GPU takes its time for it.
    let on_gpus = || -> anyhow::Result<_> {
        let span = link::span(options.bytes.iter().chain(&options.bytes_aside).copied().max().unwrap_or(0));
        Ok((link::memory(span, Some(options.gpus[0]))?, Held::start(span, options.gpus[1])?))
    };
    let on_gpus = if means == Means::GpuCopy { Some(on_gpus()?) } else { None };
    for variant in options.variants(means) {
        let (span, &Variant { threads, both, .. }) = (variant.span(), &variant);
        rows.extend(match means {
            Means::Memcpy => {
                let ceiling = Ceiling::memcpy(threads, link::memory(span, None)?)?;
                lines(options, &variant, &ceiling)?
            }
            Means::Sockets => {
                let end = PlainEnd::start(&options.place, threads, span)?;
                let ceiling = Ceiling::sockets(&end.plain, threads, span, both)?;
                lines(options, &variant, &ceiling)?
            }
            Means::GpuCopy => {
                let (memory, held) = on_gpus.as_ref().context("no GPU memory")?;
                let ceiling = Ceiling::gpu(Some(&held.memory), memory, both)?;
                lines(options, &variant, &ceiling)?
            }
            Means::NcclSend => nccl::rows(options, &variant)?,
            Means::Nixl => single_runs(options, &variant)?,
        });
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

/// All sizes of a variant, some of each line at a time.
fn lines(options: &Options, variant: &Variant<'_>, ceiling: &Ceiling) -> anyhow::Result<Vec<Row>> {
    let (bytes, span) = (variant.bytes, variant.span());
    let mut places = vec![0; bytes.len()];
    let mut took: Vec<Samples> = bytes.iter().map(|_| Samples::default()).collect();
    in_turns(bytes.len(), options.seconds, |line, counts| {
        let (bytes, at) = (bytes[line], &mut places[line]);
        let seconds = ceiling.run(*at, bytes)?;
        if counts {
            took[line].push(seconds);
        }
        *at = (*at + bytes) % (span - bytes + 1);
        Ok(())
    })?;
    bytes.iter().zip(&took).map(|(&bytes, took)| row(variant, bytes, took)).collect()
}

/// A line of the table, from the seconds of many rounds.
fn row(variant: &Variant<'_>, bytes: u64, took: &Samples) -> anyhow::Result<Row> {
    let spread = |samples: Samples| samples.spread().context("no sample");
    Ok(Row {
        means: variant.means.name().to_owned(),
        direction: if variant.both { "both" } else { "one-way" }.to_owned(),
        threads: variant.threads,
        bytes,
        gigabytes_per_second: spread(took.iter().map(|took| bytes as f64 / took / 1e9).collect())?,
        microseconds: spread(took.iter().map(|took| took * 1e6).collect())?,
    })
}

/// One run by NIXL, as it is asked by our path.
fn single_runs(options: &Options, variant: &Variant<'_>) -> anyhow::Result<Vec<Row>> {
    let cases: Vec<Case> = variant.bytes.iter().map(|&bytes| Case::single(bytes, bytes)).collect();
    let took = link::timings(Path::Nixl, Direction::Pull, &cases, variant.threads, options.seconds)?;
    variant.bytes.iter().zip(&took).map(|(&bytes, took)| row(variant, bytes, took)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_are_moved_one_way_by_all_threads_alone() {
        let options = Options {
            means: vec![Means::Memcpy, Means::Sockets, Means::GpuCopy],
            bytes: vec![1, 2, 3],
            bytes_aside: vec![1],
            threads: 4,
            seconds: 0.0,
            gpus: [0, 0],
            place: Place::Here,
        };
        let of = |means| -> Vec<(usize, bool, usize)> {
            let variants = options.variants(means);
            variants.iter().map(|variant| (variant.threads, variant.both, variant.bytes.len())).collect()
        };
        assert_eq!(of(Means::Memcpy), [(1, false, 1), (4, false, 3)]);
        assert_eq!(of(Means::Sockets), [(1, false, 1), (1, true, 1), (4, false, 3), (4, true, 1)]);
        assert_eq!(of(Means::GpuCopy), [(1, false, 3), (1, true, 1)]);
        assert_eq!(options.lines(), 14);
    }
}
