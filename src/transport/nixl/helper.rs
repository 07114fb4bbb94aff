//! Whoever has the memory helps: packs what a peer reads, unpacks what a peer wrote. One thread for each peer, asleep until
//! asked.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use super::help::{self, Answer, Ask, Wire};
use super::staging::{Copies, Copying, LENT_MAX, Part, SLOT_RUNS_MAX, Slots};
use crate::memory::{Device, Region};
use crate::transport::flight::locked;
use crate::transport::grant_table::{GrantTable, Granted};
use crate::transport::threads::Threads;
use crate::transport::{GrantToken, TransportError};

/// Most peers that are helped at once; with more, runs go one by one.
const PEERS_MAX: usize = 64;
/// How long slots rest whose peer ended without a goodbye: what it wrote last may still be on its way.
const REST: Duration = Duration::from_secs(30);

/// This process's help for its peers. Dropping it ends the threads.
pub(super) struct Helper {
    listener: Arc<OwnedFd>,
    shared: Arc<Shared>,
    threads: Arc<Threads>,
}

struct Shared {
    word: [u8; 16],
    regions: Vec<Arc<Region>>,
    lent: Arc<Slots>,
    grants: Arc<GrantTable>,
    gpu: Option<Arc<Device>>,
    peers: Mutex<Peers>,
}

#[derive(Default)]
struct Peers {
    wires: Vec<Arc<Wire>>,
    resting: Vec<(Instant, u16)>,
    closed: bool,
}

impl Helper {
    /// Listens under `name` for peers that say `word`.
    pub(super) fn start(
        name: &[u8],
        word: [u8; 16],
        regions: &[Arc<Region>],
        lent: Arc<Slots>,
        grants: Arc<GrantTable>,
        gpu: Option<Arc<Device>>,
    ) -> io::Result<Self> {
        let listener = Arc::new(help::listen(name, i32::try_from(PEERS_MAX).unwrap_or(i32::MAX))?);
        let regions = regions.to_vec();
        let shared = Arc::new(Shared { word, regions, lent, grants, gpu, peers: Mutex::default() });
        let helper = Self { listener, shared, threads: Arc::default() };
        let (listener, shared, threads) = (helper.listener.clone(), helper.shared.clone(), helper.threads.clone());
        helper.threads.spawn("pdlink-nixl-door".to_owned(), move || {
            while let Some(wire) = Wire::accept(&listener) {
                let wire = Arc::new(wire);
                if !shared.admit(&wire) {
                    continue;
                }
                let peer = shared.clone();
                let serve = move || peer.serve(&wire);
                if let Err(error) = threads.spawn("pdlink-nixl-help".to_owned(), serve) {
                    tracing::warn!(%error, "no thread to pack for a peer: its runs go one by one");
                }
            }
        })?;
        Ok(helper)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        {
            let mut peers = locked(&self.shared.peers);
            peers.closed = true;
            peers.wires.iter().for_each(|wire| wire.shut());
        }
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        // Once more for a thread that the first to end still started.
        self.threads.join();
        self.threads.join();
    }
}

impl Shared {
    fn admit(&self, wire: &Arc<Wire>) -> bool {
        let mut peers = locked(&self.peers);
        peers.wires.retain(|wire| Arc::strong_count(wire) > 1);
        let admitted = !peers.closed && peers.wires.len() < PEERS_MAX;
        if admitted {
            peers.wires.push(wire.clone());
        }
        admitted
    }

    /// Helps one peer until it is gone.
    fn serve(&self, wire: &Arc<Wire>) {
        let mut buffer = Vec::new();
        match wire.hear(&mut buffer) {
            Ok(Some(Ask::Hello { word })) if word == self.word => {}
            _ => return,
        }
        let slots = self.lend();
        let ended = self.help(wire, &slots, &mut buffer);
        let clean = matches!(ended, Ok(true));
        if let Err(error) = ended {
            tracing::warn!(%error, "a peer's short runs are not packed any more");
        }
        // The peer must not take a silence for patience.
        wire.shut();
        self.take_back(&slots, clean);
    }

    fn lend(&self) -> Vec<u16> {
        let mut peers = locked(&self.peers);
        let now = Instant::now();
        peers.resting.retain(|(until, slot)| {
            let rests = now < *until;
            if !rests {
                self.lent.give(*slot);
            }
            rests
        });
        std::iter::from_fn(|| self.lent.take()).take(LENT_MAX).collect()
    }

    fn take_back(&self, slots: &[u16], clean: bool) {
        if clean {
            return slots.iter().rev().for_each(|slot| self.lent.give(*slot));
        }
        let until = Instant::now() + REST;
        locked(&self.peers).resting.extend(slots.iter().map(|slot| (until, *slot)));
    }

    /// Answers until the peer ends; says whether it took its leave.
    fn help(&self, wire: &Wire, slots: &[u16], buffer: &mut Vec<u8>) -> io::Result<bool> {
        wire.tell(&Answer::Lent { slots: slots.to_vec() })?;
        let mut copies = Copies::on(self.gpu.as_ref()).map_err(io::Error::other)?;
        while let Some(ask) = wire.hear(buffer)? {
            let answer = match ask {
                Ask::Bye => return Ok(true),
                Ask::Hello { .. } => return Err(io::Error::other("it said hello twice")),
                Ask::Gather { slot, parts } => {
                    self.check(slots, slot, &parts)?;
                    self.copy(&mut copies, Copying::IntoSlot, slot, &parts)?;
                    Answer::Done { slot }
                }
                Ask::Scatter { slot, grant, parts } => {
                    self.check(slots, slot, &parts)?;
                    self.scatter(&mut copies, slot, grant, &parts)?
                }
            };
            wire.tell(&answer)?;
        }
        Ok(false)
    }

    /// Holds what a peer names against what was lent to it and what there is.
    fn check(&self, slots: &[u16], slot: u16, parts: &[Part]) -> io::Result<()> {
        let mut bytes = 0_u64;
        for part in parts {
            let region = self.regions.get(usize::from(part.region));
            let region = region.ok_or_else(|| io::Error::other(format!("it named region {}", part.region)))?;
            for (offset, len) in &part.runs {
                region.check(*offset, *len).map_err(io::Error::other)?;
                bytes = bytes.saturating_add(*len);
            }
        }
        let runs: usize = parts.iter().map(|part| part.runs.len()).sum();
        if !slots.contains(&slot) || bytes > self.lent.slot_bytes || runs > SLOT_RUNS_MAX {
            return Err(io::Error::other(format!("it named {runs} runs of {bytes} bytes for slot {slot}")));
        }
        Ok(())
    }

    fn copy(&self, copies: &mut Copies, copying: Copying, slot: u16, parts: &[Part]) -> io::Result<()> {
        let at = (&*self.lent.region, self.lent.offset(slot));
        copies.copy(copying, &self.regions, parts, at).map_err(io::Error::other)
    }

    /// Writes only what is granted, and only while it is (KV-7): whoever revokes the grant waits for a write in progress.
    fn scatter(&self, copies: &mut Copies, slot: u16, grant: Option<GrantToken>, parts: &[Part]) -> io::Result<Answer> {
        let granted = grant.and_then(|token| self.grants.find(token));
        let allowed = granted.as_deref().filter(|granted| allows(granted, parts).is_ok());
        let wrote =
            allowed.and_then(|granted| granted.unless_revoked(|| self.copy(copies, Copying::OutOfSlot, slot, parts)));
        let refused = match (wrote, granted.as_deref().map(|granted| allows(granted, parts))) {
            (Some(wrote), _) => return wrote.map(|()| Answer::Done { slot }),
            (None, Some(Err(TransportError::NotGranted { region, offset, len }))) => (region, offset, len),
            (None, _) => first(parts),
        };
        let (region, offset, len) = refused;
        Ok(Answer::NotGranted { slot, region, offset, len })
    }
}

fn allows(granted: &Granted, parts: &[Part]) -> Result<(), TransportError> {
    let runs = parts.iter().flat_map(|part| part.runs.iter().map(|run| (part.region, *run)));
    runs.into_iter().try_for_each(|(region, (offset, len))| granted.check(region, offset, len))
}

fn first(parts: &[Part]) -> (u16, u64, u64) {
    let run = |part: &Part| part.runs.first().map(|(offset, len)| (part.region, *offset, *len));
    parts.iter().find_map(run).unwrap_or_default()
}
