//! What the machine can do without us: a parallel memcpy, or plain sockets.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context;

use super::workload::noise;
use crate::ffi::cuda::IpcHandle;
use crate::memory::{Region, RegionOptions, to_u64, to_usize};

/// How much one plain read or write asks for.
pub(super) const PLAIN_BYTES: usize = 256 * 1024;
/// Memory is filled with this many bytes of noise, over and over.
pub(in crate::bench) const FILL_BYTES: u64 = 1 << 20;

/// Threads that wait for a share of a copy, as a path's threads do.
pub(in crate::bench) struct Ceiling {
    orders: Vec<mpsc::Sender<Order>>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

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
    /// `threads` threads, each copying one contiguous share from memory like the peer's to `dst`.
    pub(in crate::bench) fn memcpy(threads: usize, dst: Arc<Region>) -> anyhow::Result<Self> {
        let options = RegionOptions { prefault: true, huge_pages: false };
        let src = Region::shared_with(to_usize(dst.len()), options)?;
        fill(&src, 3)?;
        Self::start(threads, |_| {
            let (src, dst) = (src.clone(), dst.clone());
            Ok(move |at, bytes| Ok(src.copy_to(at, &dst, at, bytes)?))
        })
    }

    /// The driver's own copy, as one piece, from the peer's GPU memory to `dst`.
    pub(in crate::bench) fn gpu(peer: Option<&IpcHandle>, dst: &Arc<Region>) -> anyhow::Result<Self> {
        let device = dst.device().context("the memory is not on a GPU")?;
        let handle = peer.context("the other process named no GPU memory")?;
        Self::start(1, |_| {
            let (dst, src) = (dst.clone(), Region::of_gpu_peer(device, handle, dst.len())?);
            Ok(move |at, bytes| Ok(src.copy_to(at, &dst, at, bytes)?))
        })
    }

    /// `streams` plain sockets to the peer, each read by a thread of its own into memory of its own, in a plain loop.
    pub(super) fn sockets(port: u16, streams: usize, like: Arc<Region>) -> anyhow::Result<Self> {
        Self::start(streams, |_| {
            let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("connecting a plain socket")?;
            socket.set_nodelay(true)?;
            let share = to_usize(like.len()) / streams;
            let mut memory = vec![1_u8; share];
            Ok(move |at: u64, bytes: u64| {
                socket.write_all(&bytes.to_le_bytes())?;
                let bytes = to_usize(bytes).min(share);
                let at = to_usize(at) % (share - bytes + 1);
                let mut left = &mut memory[at..at + bytes];
                while !left.is_empty() {
                    let len = left.len().min(PLAIN_BYTES);
                    let read = socket.read(&mut left[..len])?;
                    anyhow::ensure!(read > 0, "the other process closed a plain socket");
                    left = &mut std::mem::take(&mut left)[read..];
                }
                Ok(())
            })
        })
    }

    fn start<F>(threads: usize, mut work: impl FnMut(usize) -> anyhow::Result<F>) -> anyhow::Result<Self>
    where
        F: FnMut(u64, u64) -> anyhow::Result<()> + Send + 'static,
    {
        let mut ceiling = Self { orders: Vec::new(), threads: Vec::new() };
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
        Ok(whole.min(self.copy(second, bytes, share.div_ceil(CHUNKS_PER_THREAD))?))
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
    let block = noise(to_usize(FILL_BYTES), seed);
    let mut at = 0;
    while at < region.len() {
        let len = to_u64(block.len()).min(region.len() - at);
        region.copy_in(at, &block[..to_usize(len)])?;
        at += len;
    }
    Ok(())
}
