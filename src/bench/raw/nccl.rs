//! `ncclSend` of one buffer from the GPU of another process: the library's own calls, with nothing of ours between.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::{Options, Row, Variant, row};
use crate::bench::link::{self, python_environment};
use crate::bench::partner::{Lines, Part, Partner, Place, answer};
use crate::bench::stats::Samples;
use crate::bench::turns::in_turns;
use crate::config::NcclConfig;
use crate::ffi::Search;
use crate::ffi::nccl::{Buffer, Communicator, Half, Library, Origin, Settings, Side, UniqueId};
use crate::memory::Region;

const MAKE_MAX: Duration = Duration::from_secs(60);
/// A round sends at least so much, in several sends where one is small: a clock is read before and after.
const ROUND_BYTES_MIN: u64 = 32 << 20;
const SENDS_MAX: u64 = 256;

/// What the other process is to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Order {
    Open {
        id: Vec<u8>,
        gpu: i32,
        span: u64,
    },
    /// Make the communicator, as we do in the same moment.
    Make,
    Send {
        bytes: u64,
        times: u64,
    },
}

/// One end.
struct End {
    settings: Settings,
    memory: Arc<dyn Buffer>,
}

impl End {
    fn open(side: Side, id: UniqueId, gpu: i32, span: u64) -> anyhow::Result<Self> {
        let memory: Arc<Region> = link::memory(span, Some(gpu))?;
        let device = memory.device().cloned();
        let memory: Arc<dyn Buffer> = memory;
        let multiprocessors_max = NcclConfig::default().multiprocessors;
        Ok(Self { settings: Settings { side, id, multiprocessors_max, device, scratch: memory.clone() }, memory })
    }

    fn make(&self) -> anyhow::Result<(Communicator, Origin)> {
        let until = Instant::now() + MAKE_MAX;
        Ok(Communicator::make(library()?, &self.settings, &|| Instant::now() > until)?)
    }

    /// Moves `times` buffers. Seconds from the moment at which both ends were there until the last had come.
    fn move_all(&self, made: &Communicator, half: Half, bytes: u64, times: u64) -> anyhow::Result<f64> {
        let stream = made.stream().context("the communicator has no stream")?;
        made.post(half, &self.memory, 0, 1)?;
        stream.wait()?;
        let started = Instant::now();
        for _ in 0..times {
            made.post(half, &self.memory, 0, bytes)?;
        }
        stream.wait()?;
        Ok(started.elapsed().as_secs_f64())
    }
}

fn library() -> anyhow::Result<&'static Library> {
    Ok(Library::open(&Search { library: None, environments: &python_environment() })?)
}

/// Why NCCL cannot be used here.
pub(in crate::bench) fn absent() -> Option<String> {
    library().err().map(|error| format!("{error:#}"))
}

/// All sizes.
pub(super) fn rows(options: &Options, variant: &Variant<'_>) -> anyhow::Result<Vec<Row>> {
    let ([ours, theirs], span, all) = (options.gpus, variant.span(), variant.bytes);
    ensure!(ours != theirs, "NCCL needs two GPUs, and both ends are on GPU {ours}");
    let id = library()?.unique_id()?;
    let mut partner = Partner::find(&Place::Here, Part::Nccl)?;
    let end = End::open(Side::First, id, ours, span)?;
    let () = partner.ask(&Order::Open { id: id.0.to_vec(), gpu: theirs, span })?;
    partner.tell(&Order::Make)?;
    let (made, _origin) = end.make()?;
    let () = partner.hear()?;
    let mut took: Vec<Samples> = all.iter().map(|_| Samples::default()).collect();
    in_turns(all.len(), options.seconds, |line, counts| {
        let bytes = all[line];
        let times = (ROUND_BYTES_MIN / bytes).clamp(1, SENDS_MAX);
        partner.tell(&Order::Send { bytes, times })?;
        let seconds = end.move_all(&made, Half::Receive, bytes, times)?;
        let () = partner.hear()?;
        if counts {
            took[line].push(seconds / times as f64);
        }
        Ok(())
    })?;
    all.iter().zip(&took).map(|(&bytes, took)| row(variant, bytes, took)).collect()
}

/// The life of the other process: until the one that measures leaves.
pub fn serve(mut lines: Lines) -> anyhow::Result<()> {
    let (mut end, mut made): (Option<End>, Option<(Communicator, Origin)>) = (None, None);
    while let Some(order) = lines.next::<Order>()? {
        let done = obey(order, &mut end, &mut made);
        answer(&mut lines, &done)?;
    }
    Ok(())
}

fn obey(order: Order, end: &mut Option<End>, made: &mut Option<(Communicator, Origin)>) -> anyhow::Result<()> {
    match order {
        Order::Open { id, gpu, span } => {
            let id = UniqueId(id.try_into().ok().context("a unique id of another length")?);
            *end = Some(End::open(Side::Second, id, gpu, span)?);
        }
        Order::Make => *made = Some(end.as_ref().context("not open yet")?.make()?),
        Order::Send { bytes, times } => {
            let (end, (made, _)) = end.as_ref().zip(made.as_ref()).context("not made yet")?;
            end.move_all(made, Half::Send, bytes, times)?;
        }
    }
    Ok(())
}
