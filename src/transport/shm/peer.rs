//! A peer's memory, opened: mapped where it is a file, addressed where it is not.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, fstat, open};

use super::process_vm::{ProcessVm, Way};
use super::{Description, Place, RegionDescription};
use crate::memory::Region;
use crate::transport::copy_pool::Carrier;
use crate::transport::flight::Flight;
use crate::transport::mapped::PeerMemory;
use crate::transport::process::Process;
use crate::transport::{Direction, Piece, Segment, TransportError};

/// Transfers from this size on are copied past the caches: they would not fit. Below it, whoever reads the bytes next may find
/// them there.
const STREAM_BYTES_MIN: u64 = 32 << 20;

/// One peer process and our way into its memory. Dropping it unmaps everything.
pub struct Peer {
    process: Process,
    regions: Vec<PeerRegion>,
    ours: Arc<[Arc<Region>]>,
    our_lens: Vec<u64>,
    their_lens: Vec<u64>,
    vm: ProcessVm,
}

enum PeerRegion {
    Mapped(Arc<Region>),
    /// The address of its first byte, over there.
    Address(u64),
}

impl Peer {
    pub(super) fn open(description: &Description, ours: Arc<[Arc<Region>]>) -> Result<Self, TransportError> {
        let process = Process::open(&description.owner, "shm")?;
        let (pid, name) = (process.pid(), process.name().to_owned());
        let unreachable = |reason: String| TransportError::Unreachable { path: "shm", peer: name.clone(), reason };
        let vm = ProcessVm::new(pid);
        let open = |(index, region): (usize, &RegionDescription)| {
            open_region(pid, region, &vm).map_err(|error| unreachable(format!("region {index}: {error}")))
        };
        let regions = description.regions.iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
        let our_lens = ours.iter().map(|region| region.len()).collect();
        let their_lens = description.regions.iter().map(|region| region.len).collect();
        let peer = Self { process, regions, ours, our_lens, their_lens, vm };
        if peer.gone() { Err(peer.ended()) } else { Ok(peer) }
    }

    fn carry_mapped(&self, theirs: &Region, ours: &Region, flight: &Flight, piece: Piece) {
        let (src, dst) = match flight.direction {
            Direction::Pull => (theirs, ours),
            Direction::Push => (ours, theirs),
        };
        let mut runs = flight.runs.walk(piece);
        let copied = if flight.totals.bytes >= STREAM_BYTES_MIN {
            src.stream_to(dst, runs.map(|run| (run.src, run.dst, run.len)))
        } else {
            runs.try_for_each(|run| src.copy_to(run.src, dst, run.dst, run.len))
        };
        copied.expect("validated when the flight was admitted");
    }

    fn carry_addressed(&self, base: u64, ours: &Region, flight: &Flight, piece: Piece) -> Result<(), TransportError> {
        let way = match flight.direction {
            Direction::Pull => Way::Read,
            Direction::Push => Way::Write,
        };
        let runs = flight.runs.walk(piece).map(|run| match flight.direction {
            Direction::Pull => (run.dst, base + run.src, run.len),
            Direction::Push => (run.src, base + run.dst, run.len),
        });
        self.vm.copy(way, ours, runs).map_err(|error| match error {
            _ if self.gone() => self.ended(),
            error => TransportError::io(way.call(), self.name(), error),
        })
    }

    fn ended(&self) -> TransportError {
        TransportError::PeerGone { peer: self.name().to_owned() }
    }
}

impl PeerMemory for Peer {
    fn name(&self) -> &str {
        self.process.name()
    }

    fn gone(&self) -> bool {
        self.process.gone()
    }

    fn lens(&self) -> (&[u64], &[u64]) {
        (&self.our_lens, &self.their_lens)
    }
}

impl Carrier for Peer {
    fn carry(&self, flight: &Flight, piece: Piece) -> Result<(), TransportError> {
        // Also what keeps process_vm_writev off a stranger: a process id is not given out again before the process that
        // had it was reaped, and then not before all others have been.
        if self.gone() {
            return Err(self.ended());
        }
        let Segment { src_region, dst_region, .. } = &flight.runs.segments[piece.segment];
        let (ours, theirs) = match flight.direction {
            Direction::Pull => (dst_region, src_region),
            Direction::Push => (src_region, dst_region),
        };
        let ours = &self.ours[usize::from(*ours)];
        match &self.regions[usize::from(*theirs)] {
            PeerRegion::Mapped(theirs) => {
                self.carry_mapped(theirs, ours, flight, piece);
                Ok(())
            }
            PeerRegion::Address(base) => self.carry_addressed(*base, ours, flight, piece),
        }
    }
}

fn open_region(pid: i32, region: &RegionDescription, vm: &ProcessVm) -> io::Result<PeerRegion> {
    match region.place {
        Place::File { fd, device, inode, prefault } => {
            let file = open_file(pid, fd, device, inode)?;
            Ok(PeerRegion::Mapped(Region::of_peer(file.as_fd(), region.len, prefault)?))
        }
        Place::Address(base) => {
            if base.checked_add(region.len).is_none() {
                return Err(io::Error::other(format!("{} bytes at address {base} wrap round", region.len)));
            }
            vm.probe(base, region.len).map_err(explain_refusal)?;
            Ok(PeerRegion::Address(base))
        }
    }
}

/// Opens a peer's memory file, and makes sure that it is the one that was announced.
fn open_file(pid: i32, fd: i32, device: u64, inode: u64) -> io::Result<OwnedFd> {
    let name = format!("/proc/{pid}/fd/{fd}");
    let file = open(name.as_str(), OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .map_err(|error| io::Error::new(error.kind(), format!("open {name}: {error}")))?;
    let stat = fstat(&file)?;
    if (stat.st_dev, stat.st_ino) != (device, inode) {
        return Err(io::Error::other(format!("{name} is another file now")));
    }
    Ok(file)
}

/// Says what forbids it, where that is known.
fn explain_refusal(error: io::Error) -> io::Error {
    if error.raw_os_error() != Some(rustix::io::Errno::PERM.raw_os_error()) {
        return error;
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let scope = scope.trim();
    let mend = "run both as one user with CAP_SYS_PTRACE allowed, or allow tcp in kv.paths";
    let scope = if scope.is_empty() { String::new() } else { format!("; kernel.yama.ptrace_scope is {scope}") };
    io::Error::new(error.kind(), format!("reading another process's memory is not permitted{scope}; {mend}"))
}
