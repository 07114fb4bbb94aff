//! Both ends of one link and the ceiling beside it: what is moved between them, checked and timed.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::ceiling::{Ceiling, FILL_BYTES, fill_first};
use super::peer::{self, Orders, Peer, Ready, SEED, memory};
use super::report::{Latency, Row};
use super::workload::{Window, is_noise, noise, scattered};
use super::{PATIENCE, Way, rate};
use crate::bench::stats::Samples;
use crate::config::Path;
use crate::memory::{Region, to_u64, to_usize};
use crate::security::Secret;
use crate::transport::{Direction, GrantToken, Link, RunList, TransferRequest, Transport};

const LATENCY_BYTES: u64 = 4096;
const LATENCY_ROUNDS_MAX: usize = 20_000;
/// What our memory is filled with before a push is checked.
const OUR_SEED: u64 = 11;

/// One line: so many transfers at once, each of `bytes` in runs of `run_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    pub(super) bytes: u64,
    pub(super) run_bytes: u64,
    pub(super) at_once: usize,
}

impl Case {
    /// One transfer alone. It is one run where it is smaller than that.
    pub fn single(bytes: u64, run_bytes: u64) -> Self {
        Self { bytes, run_bytes: run_bytes.min(bytes), at_once: 1 }
    }

    /// All sizes in all runs, so many at once, each line once.
    pub fn all(bytes: &[u64], run_bytes: &[u64], at_once: &[usize]) -> Vec<Self> {
        let mut cases = Vec::new();
        for &at_once in at_once {
            for &bytes in bytes {
                for &run_bytes in run_bytes {
                    let case = Self { at_once, ..Self::single(bytes, run_bytes) };
                    if !cases.contains(&case) {
                        cases.push(case);
                    }
                }
            }
        }
        cases
    }

    /// Of all transfers of one direction.
    pub(super) fn bytes_at_once(&self) -> u64 {
        self.bytes * to_u64(self.at_once)
    }
}

/// What one line has come to so far.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) case: Case,
    window: Window,
    ours: Samples,
    micros: Samples,
    ceiling: Samples,
}

/// Both processes, connected over one path, and the ceiling beside it.
pub(super) struct Rig {
    pub(super) path: Path,
    way: Way,
    threads: usize,
    region: Arc<Region>,
    transport: Arc<dyn Transport>,
    link: Arc<dyn Link>,
    pub(super) ceiling: Ceiling,
    grant: GrantToken,
    pub(super) span: u64,
    /// The other process, where it is ours to end.
    _peer: Option<Peer>,
}

impl Rig {
    /// Connects to an end that stands elsewhere, over what `around` makes of our transport.
    pub(super) fn joined(
        orders: &Orders,
        ready: &Ready,
        way: Way,
        secret: &Secret,
        around: impl FnOnce(Arc<dyn Transport>) -> Arc<dyn Transport>,
    ) -> anyhow::Result<Self> {
        let &Orders { path, span, threads, gpu, .. } = orders;
        let region = memory(span, gpu)?;
        let transport = around(peer::open(orders, &region, secret)?);
        let link =
            transport.connect(&ready.export, Instant::now() + PATIENCE).context("connecting to the other process")?;
        let both = way == Way::Both;
        let elsewhere = !ready.plain.host.is_loopback();
        let ceiling = match path {
            _ if path == Path::Tcp || elsewhere => Ceiling::sockets(&ready.plain, threads, span, both)?,
            _ if gpu.is_some() => Ceiling::gpu(ready.gpu_memory.as_ref(), &region, both)?,
            _ => Ceiling::memcpy(threads, region.clone())?,
        };
        Ok(Self { path, way, threads, region, transport, link, ceiling, grant: ready.grant, span, _peer: None })
    }

    /// Keeps the other process for as long as this.
    pub(super) fn with(self, peer: Peer) -> Self {
        Self { _peer: Some(peer), ..self }
    }

    pub(super) fn turn(&mut self, way: Way) {
        self.way = way;
    }

    /// Holds every byte of one transfer of each kind against what it must be: a fast copy of wrong bytes is worth nothing.
    /// Pulls come first, while the other side's memory is as it was filled.
    pub(super) fn check_all(&self, cases: &[Case]) -> anyhow::Result<()> {
        for way in [Direction::Pull, Direction::Push] {
            for case in cases.iter().filter(|_| self.way.directions().contains(&way)) {
                self.check(way, case.bytes, case.run_bytes)?;
            }
        }
        Ok(())
    }

    /// One such transfer. What was pushed is pulled back in one run.
    pub(super) fn check(&self, direction: Direction, bytes: u64, run_bytes: u64) -> anyhow::Result<()> {
        let runs = scattered(0, bytes, run_bytes);
        let seed = match direction {
            Direction::Pull => {
                self.region.fill(0, bytes, 0)?;
                self.transfer(direction, runs.clone())?;
                SEED
            }
            Direction::Push => {
                fill_first(&self.region, bytes, OUR_SEED)?;
                self.transfer(direction, runs.clone())?;
                self.region.fill(0, bytes, 0)?;
                self.transfer(Direction::Pull, scattered(0, bytes, bytes))?;
                OUR_SEED
            }
        };
        let block = noise(to_usize(FILL_BYTES), seed);
        let got = self.region.to_vec(0, bytes)?;
        for run in runs.segments.iter().flat_map(|segment| segment.runs.iter()) {
            let got = &got[to_usize(run.dst)..to_usize(run.dst + run.len)];
            ensure!(is_noise(got, run.src, &block), "{} brought wrong bytes: {run:?}", self.path.name());
        }
        Ok(())
    }

    /// Seconds that one transfer took.
    pub(super) fn transfer(&self, direction: Direction, runs: RunList) -> anyhow::Result<f64> {
        self.at_once(vec![(direction, runs)]).map(|(all, _)| all)
    }

    /// Submits all of these before it waits for any. Seconds until all had ended, and of each.
    fn at_once(&self, transfers: Vec<(Direction, RunList)>) -> anyhow::Result<(f64, Vec<f64>)> {
        let (tell, told) = mpsc::channel();
        let wanted: Vec<u64> = transfers.iter().map(|(_, runs)| runs.bytes()).collect();
        let mut submitted = Vec::with_capacity(transfers.len());
        let deadline = Instant::now() + PATIENCE;
        let started = Instant::now();
        for (index, (direction, runs)) in transfers.into_iter().enumerate() {
            let grant = (direction == Direction::Push).then_some(self.grant);
            let tell = tell.clone();
            submitted.push(Instant::now());
            let request = TransferRequest { direction, runs, grant, deadline };
            self.link.submit(request, Box::new(move |outcome| drop(tell.send((index, outcome, Instant::now())))));
        }
        drop(tell);
        let (mut each, mut last) = (Vec::with_capacity(wanted.len()), started);
        for _ in 0..wanted.len() {
            let (index, outcome, ended) = told.recv().context("the link dropped a completion")?;
            let bytes = wanted[index];
            if outcome.context("transfer")?.bytes != bytes {
                bail!("a transfer of {bytes} bytes ended with another number");
            }
            each.push((ended - submitted[index]).as_secs_f64());
            last = last.max(ended);
        }
        Ok(((last - started).as_secs_f64(), each))
    }

    /// A line before its first round.
    pub(super) fn tally(&self, case: Case) -> Tally {
        let window = Window::new(self.span, case.bytes_at_once() * to_u64(self.way.directions().len()));
        let [ours, micros, ceiling] = [(); 3].map(|()| Samples::default());
        Tally { case, window, ours, micros, ceiling }
    }

    /// One round of a line. Ours and the ceiling take turns, so that whatever else the machine does meets both alike.
    pub(super) fn round(&self, tally: &mut Tally, counts: bool) -> anyhow::Result<()> {
        let (Case { bytes, run_bytes, at_once }, window) = (tally.case, &mut tally.window);
        let directions = self.way.directions();
        let each = at_once * directions.len();
        let whole = bytes * to_u64(each);
        let at = window.next();
        let transfers = (0..each).map(|index| {
            let runs = scattered(at + bytes * to_u64(index), bytes, run_bytes);
            (directions[index % directions.len()], runs)
        });
        let (took, of_each) = self.at_once(transfers.collect())?;
        let ceiling = self.ceiling.run_at([window.next(), window.next()], whole)?;
        if counts {
            tally.ours.push(rate(whole, took));
            tally.ceiling.push(rate(whole, ceiling));
            of_each.iter().for_each(|took| tally.micros.push(took * 1e6));
        }
        Ok(())
    }

    pub(super) fn row(&self, tally: &Tally) -> anyhow::Result<Row> {
        let case = tally.case;
        let ours = tally.ours.spread().context("no sample")?;
        let ceiling = tally.ceiling.spread().context("no sample")?;
        Ok(Row {
            path: self.path.name().to_owned(),
            direction: self.way.name().to_owned(),
            at_once: case.at_once,
            bytes: case.bytes,
            run_bytes: case.run_bytes,
            threads: self.threads,
            gigabytes_per_second: ours,
            microseconds: tally.micros.spread().context("no sample")?,
            ceiling_gigabytes_per_second: ceiling,
            share_of_ceiling: ours.median / ceiling.median,
        })
    }

    /// One short run at a time, in the first direction of the line.
    pub(super) fn latency(&self, seconds: f64) -> anyhow::Result<Latency> {
        let direction = self.way.directions()[0];
        let mut window = Window::new(self.span, LATENCY_BYTES);
        let mut took = Samples::default();
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        while took.len() < 100 || (Instant::now() < until && took.len() < LATENCY_ROUNDS_MAX) {
            let runs = scattered(window.next(), LATENCY_BYTES, LATENCY_BYTES);
            took.push(self.transfer(direction, runs)? * 1e6);
        }
        Ok(Latency {
            path: self.path.name().to_owned(),
            direction: self.way.name().to_owned(),
            run_bytes: LATENCY_BYTES,
            microseconds: took.spread().context("no sample")?,
            curve: took.curve().context("no sample")?,
        })
    }

    pub(super) fn close(self) {
        self.link.close();
        self.transport.close();
    }
}
