//! One process's part in a group that all get the same bytes, from its first rank: for weights, which go from one to many.
//!
//! A thread of its own owns the communicator: it posts what is asked for, in order, and looks what is done. Whatever goes wrong, also
//! a rank that does not come or stops half-way, ends the communicator when its time is over; then a new one has to be made.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::NcclSetup;
use crate::config::Path;
use crate::ffi::Search;
use crate::ffi::nccl::{Buffer, Group, GroupSettings, Library, NcclError, UNIQUE_ID_BYTES, UniqueId};
use crate::memory::{Device, Region};
use crate::transport::TransportError;
use crate::transport::mapped::unusable;

/// How long the thread sleeps between two looks at what is under way.
const LOOK: Duration = Duration::from_micros(20);
/// How long it waits for something to do before it looks whether it is still wanted.
const IDLE: Duration = Duration::from_millis(200);

/// One number, in memory as it is handed out.
const GREETING_BYTES: usize = 256;

/// Told once how it ended.
pub type Ended = Box<dyn FnOnce(Result<(), TransportError>) + Send>;

/// Which group, and who of it this process is.
#[derive(Clone)]
pub struct Seat {
    /// What [`group_name`] gave the first rank.
    pub name: Vec<u8>,
    pub rank: u32,
    pub ranks: u32,
    /// The GPU of this rank. `None`: host memory, which only a stand-in for the library moves.
    pub device: Option<Arc<Device>>,
    /// All ranks add up one number once they have met, as vLLM's communicators do.
    pub greets: bool,
}

struct Cast {
    region: Arc<Region>,
    offset: u64,
    len: u64,
    deadline: Instant,
    ended: Ended,
}

/// A rank of a group. Dropping it ends the communicator, beside whoever drops it: that takes most of a second.
pub struct Caster {
    casts: Sender<Cast>,
    given_up: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
}

fn library(setup: &NcclSetup) -> Result<&'static Library, TransportError> {
    let search = Search { library: setup.library.as_deref(), environments: &setup.environments };
    Library::open(&search).map_err(|error| unusable(Path::Nccl, error.to_string()))
}

fn greeting(device: Option<&Arc<Device>>) -> Result<Arc<Region>, TransportError> {
    let failed =
        |error: &dyn std::fmt::Display| unusable(Path::Nccl, format!("no memory to greet a group with: {error}"));
    let region = match device {
        Some(device) => Region::allocated_on(device, GREETING_BYTES).map_err(|error| failed(&error))?,
        None => Region::shared(GREETING_BYTES).map_err(|error| failed(&error))?,
    };
    region.copy_in(0, &[0; GREETING_BYTES]).map_err(|error| failed(&error))?;
    Ok(region)
}

/// A name for a new group.
pub fn group_name(setup: &NcclSetup) -> Result<Vec<u8>, TransportError> {
    let id = library(setup)?.unique_id().map_err(|error| unusable(Path::Nccl, error.to_string()))?;
    Ok(id.0.to_vec())
}

/// Whether there is an NCCL to be used.
pub fn casts_here(setup: &NcclSetup) -> Result<(), TransportError> {
    library(setup).map(drop)
}

impl Caster {
    /// Takes its seat together with all other ranks, within [`NcclSetup::connect_max`]; `made` is told.
    pub fn start(setup: &NcclSetup, seat: Seat, made: Ended) -> Result<Self, TransportError> {
        let library = library(setup)?;
        let id = <[u8; UNIQUE_ID_BYTES]>::try_from(seat.name.as_slice());
        let id = id.map_err(|_| unusable(Path::Nccl, format!("a group's name has {} bytes", seat.name.len())))?;
        let settings = GroupSettings {
            id: UniqueId(id),
            rank: seat.rank,
            ranks: seat.ranks,
            multiprocessors_max: setup.multiprocessors_max,
            device: seat.device,
        };
        // What is added up: a zero of each.
        let greeting = seat.greets.then(|| greeting(settings.device.as_ref())).transpose()?;
        let (casts, queue) = channel();
        let (given_up, broken) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let work = Work { ranks: seat.ranks, queue, given_up: given_up.clone(), under_way: VecDeque::new() };
        let (ends, connect_max) = (broken.clone(), setup.connect_max);
        let run = move || {
            work.run(library, &settings, (connect_max, greeting), made);
            ends.store(true, Ordering::Release);
        };
        std::thread::Builder::new()
            .name("pdlink-cast".to_owned())
            .spawn(run)
            .map_err(|error| unusable(Path::Nccl, format!("no thread: {error}")))?;
        Ok(Self { casts, given_up, broken })
    }

    /// Posts this rank's part in the next broadcast: from there on the first rank, to there on the others.
    pub fn cast(&self, region: &Arc<Region>, offset: u64, len: u64, deadline: Instant, ended: Ended) {
        let cast = Cast { region: Arc::clone(region), offset, len, deadline, ended };
        if let Err(refused) = self.casts.send(cast) {
            (refused.0.ended)(Err(TransportError::Cancelled));
        }
    }

    /// Whether more can be broadcast. False for good once something has gone wrong.
    pub fn is_sound(&self) -> bool {
        !self.broken.load(Ordering::Acquire) && !self.given_up.load(Ordering::Acquire)
    }

    /// Ends it for whoever else holds it too.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }
}

impl Drop for Caster {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// The group, once all of it are there.
fn meet(
    library: &'static Library,
    settings: &GroupSettings,
    greeting: Option<Arc<Region>>,
    gives_up: &dyn Fn() -> bool,
) -> Result<Group, NcclError> {
    let group = Group::make(library, settings, gives_up)?;
    if let Some(greeting) = greeting {
        let greeting: Arc<dyn Buffer> = greeting;
        group.sum(&greeting, gives_up)?;
        while group.under_way()? > 0 {
            if gives_up() {
                return Err(NcclError::GivenUp);
            }
            std::thread::sleep(LOOK);
        }
    }
    Ok(group)
}

struct Work {
    ranks: u32,
    queue: Receiver<Cast>,
    given_up: Arc<AtomicBool>,
    /// Posted and not known to be done, in order.
    under_way: VecDeque<(Instant, Ended)>,
}

impl Work {
    fn failed(&self, doing: &str, error: &NcclError) -> TransportError {
        let reason = match error {
            NcclError::GivenUp => {
                format!("{doing} did not end in time; is one of its processes gone, or slower than all others?")
            }
            error => format!("{doing}: {error}"),
        };
        TransportError::Unreachable { path: "nccl", peer: format!("the group of {} ranks", self.ranks), reason }
    }

    fn run(
        mut self,
        library: &'static Library,
        settings: &GroupSettings,
        (connect_max, greeting): (Duration, Option<Arc<Region>>),
        made: Ended,
    ) {
        let until = Instant::now() + connect_max;
        let wanted = self.given_up.clone();
        let gives_up = || wanted.load(Ordering::Acquire) || Instant::now() >= until;
        let group = match meet(library, settings, greeting, &gives_up) {
            Ok(group) => group,
            Err(error) => return made(Err(self.failed("making it", &error))),
        };
        made(Ok(()));
        let failed = self.casts(&group).err().map(|error| self.failed("a broadcast", &error));
        // First: after this nothing writes into anybody's memory.
        drop(group);
        let failed = failed.unwrap_or(TransportError::Cancelled);
        for (_, ended) in self.under_way.drain(..) {
            ended(Err(failed.clone()));
        }
        while let Ok(cast) = self.queue.try_recv() {
            (cast.ended)(Err(failed.clone()));
        }
    }

    /// Until nobody wants it any more.
    fn casts(&mut self, group: &Group) -> Result<(), NcclError> {
        loop {
            let next = if self.under_way.is_empty() {
                match self.queue.recv_timeout(IDLE) {
                    Ok(cast) => Some(cast),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            } else {
                self.queue.try_recv().ok()
            };
            if self.given_up.load(Ordering::Acquire) {
                if let Some(cast) = next {
                    (cast.ended)(Err(TransportError::Cancelled));
                }
                return Ok(());
            }
            if let Some(cast) = next {
                self.post(group, cast)?;
            }
            self.look(group)?;
        }
    }

    fn post(&mut self, group: &Group, cast: Cast) -> Result<(), NcclError> {
        let Cast { region, offset, len, deadline, ended } = cast;
        self.under_way.push_back((deadline, ended));
        let wanted = self.given_up.clone();
        let gives_up = || wanted.load(Ordering::Acquire) || Instant::now() >= deadline;
        let buffer: Arc<dyn Buffer> = region;
        group.broadcast(&buffer, offset, len, &gives_up)
    }

    fn look(&mut self, group: &Group) -> Result<(), NcclError> {
        let Some((deadline, _)) = self.under_way.front() else { return Ok(()) };
        let deadline = *deadline;
        let left = group.under_way()?;
        while self.under_way.len() > left
            && let Some((_, ended)) = self.under_way.pop_front()
        {
            ended(Ok(()));
        }
        if !self.under_way.is_empty() {
            if Instant::now() >= deadline {
                return Err(NcclError::GivenUp);
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}
