//! What the machine can do without us: a parallel memcpy, or plain sockets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;

use super::plain::{self, Plain};
use super::workload::noise;
use crate::ffi::cuda::IpcHandle;
use crate::memory::{Region, RegionOptions, to_u64, to_usize};

/// Memory is filled with this many bytes of noise, over and over.
pub(in crate::bench) const FILL_BYTES: u64 = 1 << 20;

/// Threads that wait for a share of a copy, as a path's threads do.
pub(in crate::bench) struct Ceiling {
    orders: Vec<mpsc::Sender<Order>>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
    /// The same by the caller, without a thread.
    alone: Option<Alone>,
}

type Alone = Box<dyn Fn(u64, u64) -> anyhow::Result<()> + Send>;

/// Up to this size a copy may be done before another thread has woken.
const ALONE_BYTES_MAX: u64 = 1 << 20;

/// One copy, of which every thread takes chunks until none is left.
#[derive(Clone)]
struct Order {
    at: u64,
    bytes: u64,
    chunk: u64,
    taken: Arc<AtomicU64>,
    done: Arc<Barrier>,
}

impl Order {
    /// Where the next chunk starts, and its length.
    fn take(&self) -> Option<(u64, u64)> {
        let start = self.taken.fetch_add(self.chunk, Ordering::Relaxed);
        (start < self.bytes).then(|| (self.at + start, self.chunk.min(self.bytes - start)))
    }
}

/// Chunks per thread when they are handed out as threads get to them.
const CHUNKS_PER_THREAD: u64 = 8;

impl Ceiling {
    /// `threads` threads, each copying one contiguous share from memory like the peer's to `dst`; a short copy is made by the
    /// caller itself where that is faster.
    pub(in crate::bench) fn memcpy(threads: usize, dst: Arc<Region>) -> anyhow::Result<Self> {
        let options = RegionOptions { prefault: true, huge_pages: false };
        let src = Region::shared_with(to_usize(dst.len()), options)?;
        fill(&src, 3)?;
        let copy = move |at, bytes| Ok(src.copy_to(at, &dst, at, bytes)?);
        let mut ceiling = Self::start(threads, |_| Ok(copy.clone()))?;
        ceiling.alone = Some(Box::new(copy));
        Ok(ceiling)
    }

    /// The driver's own copy, as one piece, from the peer's GPU memory to `dst`, or half of it and half the other way at once.
    pub(in crate::bench) fn gpu(peer: Option<&IpcHandle>, dst: &Arc<Region>, both: bool) -> anyhow::Result<Self> {
        let device = dst.device().context("the memory is not on a GPU")?;
        let handle = peer.context("the other process named no GPU memory")?;
        Self::start(1 + usize::from(both), |index| {
            let (ours, theirs) = (dst.clone(), Region::of_gpu_peer(device, handle, dst.len())?);
            let (src, dst) = if index == 0 { (theirs, ours) } else { (ours, theirs) };
            Ok(move |at, bytes| Ok(src.copy_to(at, &dst, at, bytes)?))
        })
    }

    /// `streams` plain sockets from the peer, each read by a thread of its own into memory of its own, in a plain loop; for
    /// `both` ways as many more to it.
    pub(in crate::bench) fn sockets(to: &Plain, streams: usize, span: u64, both: bool) -> anyhow::Result<Self> {
        let share = to_usize(span) / streams;
        Self::start(streams * (1 + usize::from(both)), |index| {
            let mut socket = plain::Socket::connect(to, share)?;
            Ok(move |at, bytes| if index < streams { socket.take(at, bytes) } else { socket.give(at, bytes) })
        })
    }

    fn start<F>(threads: usize, mut work: impl FnMut(usize) -> anyhow::Result<F>) -> anyhow::Result<Self>
    where
        F: FnMut(u64, u64) -> anyhow::Result<()> + Send + 'static,
    {
        let mut ceiling = Self { orders: Vec::new(), threads: Vec::new(), alone: None };
        for index in 0..threads {
            let (order, orders) = mpsc::channel::<Order>();
            let mut copy = work(index)?;
            ceiling.orders.push(order);
            ceiling.threads.push(std::thread::Builder::new().name(format!("ceiling-{index}")).spawn(move || {
                for order in orders {
                    let copied = std::iter::from_fn(|| order.take()).try_for_each(|(at, bytes)| copy(at, bytes));
                    order.done.wait();
                    copied?;
                }
                Ok(())
            })?);
        }
        Ok(ceiling)
    }

    /// [`Ceiling::run_at`] from one place, for windows that no cache holds anyway.
    pub(in crate::bench) fn run(&self, at: u64, bytes: u64) -> anyhow::Result<f64> {
        self.run_at([at, at], bytes)
    }

    /// Seconds that copying `bytes` bytes takes, from one place and then from another: the faster of one large share per
    /// thread, which lets memcpy use its way for large copies, and of smaller chunks, which makes up for a thread that the
    /// machine holds back.
    pub(super) fn run_at(&self, [first, second]: [u64; 2], bytes: u64) -> anyhow::Result<f64> {
        let share = bytes.div_ceil(to_u64(self.orders.len())).max(1);
        let whole = self.copy(first, bytes, share)?;
        let best = whole.min(self.copy(second, bytes, share.div_ceil(CHUNKS_PER_THREAD))?);
        match &self.alone {
            Some(alone) if bytes <= ALONE_BYTES_MAX => {
                let started = Instant::now();
                alone(first, bytes)?;
                Ok(best.min(started.elapsed().as_secs_f64()))
            }
            _ => Ok(best),
        }
    }

    fn copy(&self, at: u64, bytes: u64, chunk: u64) -> anyhow::Result<f64> {
        let done = Arc::new(Barrier::new(self.orders.len() + 1));
        let order = Order { at, bytes, chunk, taken: Arc::new(AtomicU64::new(0)), done: done.clone() };
        let started = Instant::now();
        for orders in &self.orders {
            orders.send(order.clone()).ok().context("a thread of the ceiling ended early")?;
        }
        done.wait();
        Ok(started.elapsed().as_secs_f64())
    }
}

impl Drop for Ceiling {
    fn drop(&mut self) {
        self.orders.clear();
        for thread in self.threads.drain(..) {
            // What went wrong in it has failed the run that waited for it.
            let _ = thread.join();
        }
    }
}

/// Fills a region with noise, piece by piece.
pub(in crate::bench) fn fill(region: &Region, seed: u64) -> anyhow::Result<()> {
    fill_first(region, region.len(), seed)
}

/// The same of its first bytes alone.
pub(super) fn fill_first(region: &Region, bytes: u64, seed: u64) -> anyhow::Result<()> {
    let block = noise(to_usize(FILL_BYTES), seed);
    let mut at = 0;
    while at < bytes {
        let len = to_u64(block.len()).min(bytes - at);
        region.copy_in(at, &block[..to_usize(len)])?;
        at += len;
    }
    Ok(())
}
