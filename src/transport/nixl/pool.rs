//! Copies between this process's own memory and its staging: by threads, so that the driver only moves what they packed, or by
//! the driver.
#![forbid(unsafe_code)]

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use super::driver::Command;
use super::staging::{Copies, Copying, Part, Slots};
use crate::memory::Region;
use crate::transport::flight::locked;
use crate::transport::threads::Threads;

/// One copy.
pub(super) struct Job {
    pub(super) copying: Copying,
    pub(super) parts: Arc<[Part]>,
    pub(super) slot: u16,
    /// Whose it is: told when it is done.
    pub(super) peer: u64,
    pub(super) pack: u64,
}

/// Who copies between this process's memory and its staging.
pub(super) enum Copier {
    /// Threads beside the driver.
    Pool(Sender<Job>),
    /// The driver itself, where there are too few cores for both.
    Here { copies: Box<Copies>, regions: Vec<Arc<Region>> },
}

/// Threads that wait for jobs. They end when the last sender of jobs is gone.
pub(super) struct Pool {
    pub(super) jobs: Sender<Job>,
    threads: Threads,
}

impl Pool {
    pub(super) fn start(
        count: usize,
        regions: &[Arc<Region>],
        own: &Arc<Slots>,
        commands: &Sender<Command>,
    ) -> Result<Self, String> {
        let (jobs, waiting) = mpsc::channel();
        let (pool, waiting) = (Self { jobs, threads: Threads::default() }, Arc::new(Mutex::new(waiting)));
        for index in 0..count.max(1) {
            let copies = Copies::on(None)?;
            let (waiting, regions, own) = (waiting.clone(), regions.to_vec(), own.clone());
            let commands = commands.clone();
            let work = move || work(&waiting, copies, &regions, &own, &commands);
            let started: io::Result<()> = pool.threads.spawn(format!("pdlink-nixl-pack-{index}"), work);
            started.map_err(|error| format!("no thread: {error}"))?;
        }
        Ok(pool)
    }

    /// Ends the threads and waits for them.
    pub(super) fn close(self) {
        let Self { jobs, threads } = self;
        drop(jobs);
        threads.join();
    }
}

fn work(
    waiting: &Mutex<Receiver<Job>>,
    mut copies: Copies,
    regions: &[Arc<Region>],
    own: &Slots,
    commands: &Sender<Command>,
) {
    loop {
        let job = locked(waiting).recv();
        let Ok(Job { copying, parts, slot, peer, pack }) = job else { return };
        let copied = copies.copy(copying, regions, &parts, (&own.region, own.offset(slot)));
        let copied = copied.map_err(|error| error.to_string());
        if commands.send(Command::Copied { peer, pack, copied }).is_err() {
            return;
        }
    }
}
