//! The thread that owns the agents. It sleeps while there is nothing to do, and polls, first often and then seldom, while
//! something is in flight: NIXL tells nobody that a request is done.
//!
//! There are two agents. Peers reach our memory by the one whose metadata is exported. Our own transfers go over the other,
//! because ending it is the only way to be sure that a read which does not end writes nothing any more (TR-3): NIXL's way to
//! disconnect waits, in the background, for what is on the way. So where a peer hangs, that agent is replaced. Transfers with
//! other peers are waited for first and go on over the new one; whoever reads our memory notices nothing.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use super::help::{Ask, Asker, Wire};
use super::pack::Packer;
use super::peer::{Ours, Peer, PeerState};
use super::{Description, GRACE_MAX, HelpDescription, NixlSetup, RegionDescription, Staging, memory, spread};
use crate::config::Path;
use crate::ffi::Search;
use crate::ffi::nixl::{Agent, AgentSetup, Library, MemoryType, NixlError, Progress, Registrable, Transfer};
use crate::memory::Region;
use crate::transport::flight::Flight;
use crate::transport::identity::Identity;
use crate::transport::mapped::unusable;
use crate::transport::{Export, TransportError};

/// NIXL's own thread sleeps until something arrives; this is only how often it looks whether it overlooked something.
const WAKE_INTERVAL: Duration = Duration::from_millis(100);
/// Rounds without news before the thread begins to sleep between them, and the longest sleep. The first covers what takes some
/// microseconds; the second is little beside what takes longer.
const BUSY_ROUNDS: u32 = 50;
const SLEEP_MAX: Duration = Duration::from_micros(200);
const SLEEP_MIN: Duration = Duration::from_micros(10);
/// How long the thread stays awake for another command once everything is done: waking it takes longer than a small transfer.
const AWAKE: Duration = Duration::from_micros(200);
/// How often the peers with something in flight are looked at for having ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Who asked for a connection.
pub(super) type Tell = SyncSender<Result<Arc<PeerState>, TransportError>>;

/// What the driver is asked.
pub(super) enum Command {
    Connect {
        description: Box<Description>,
        deadline: Instant,
        tell: Tell,
    },
    /// `packed`: in slots of the size that the peer's state has.
    Submit {
        flight: Arc<Flight>,
        peer: Arc<PeerState>,
        packed: bool,
    },
    Disconnect {
        peer: Arc<PeerState>,
    },
    Close,
}

/// Both agents, and the peers that ours knows.
pub(super) struct Driver {
    connecting: Vec<Connecting>,
    peers: HashMap<*const PeerState, Peer>,
    ours: Ours,
    scratch: Arc<Region>,
    packer: Option<Packer>,
    library: &'static Library,
    setup: NixlSetup,
    /// For our transfers. Absent once it could not be replaced.
    agent: Option<Agent>,
    /// For those of peers.
    _served: Agent,
    closing: bool,
    looked_at: Instant,
}

/// What the thread that owns the agents needs to start.
pub(super) struct Opening {
    pub(super) setup: NixlSetup,
    pub(super) regions: Vec<Arc<Region>>,
    pub(super) memory: MemoryType,
    pub(super) owner: Identity,
    pub(super) staging: Option<Staging>,
}

/// A peer whose first byte is being read, and which may be asked for slots.
struct Connecting {
    /// `None`: the byte is here.
    transfer: Option<Transfer>,
    peer: Peer,
    deadline: Instant,
    /// Whoever asked for it.
    waiting: Vec<Tell>,
}

impl Driver {
    /// Opens NIXL and registers everything.
    pub(super) fn start(opening: Opening) -> Result<(Self, Export), TransportError> {
        let Opening { setup, regions, memory: kind, owner, staging } = opening;
        let failed = |error: NixlError| unusable(Path::Nixl, error.to_string());
        let search = Search { library: setup.library.as_deref(), environments: &setup.environments };
        let library = Library::open(&search).map_err(failed)?;
        let (name, served) = agent(library, &setup, &regions, For::Peers).map_err(failed)?;
        if let Some(staging) = &staging {
            served.register(staging.lent.region.clone()).map_err(failed)?;
        }
        let description = Description {
            owner,
            agent: name,
            memory: kind,
            regions: regions.iter().map(|region| describe(region)).collect(),
            help: staging.as_ref().map(|staging| HelpDescription {
                name: staging.name.clone(),
                word: staging.word,
                lent: describe(&staging.lent.region),
                slot_bytes: staging.lent.slot_bytes,
            }),
            metadata: served.metadata().map_err(failed)?,
        };
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        memory::check_backend(&setup.backend, kind, &maps).map_err(|reason| unusable(Path::Nixl, reason))?;
        let gpu = regions.first().and_then(|region| region.device());
        let scratch = memory::scratch(gpu).map_err(|reason| unusable(Path::Nixl, reason))?;
        let packer = staging
            .map(|staging| Packer::new(staging.own, &regions))
            .transpose()
            .map_err(|reason| unusable(Path::Nixl, reason))?;
        let (path, version, backend) = (library.path().display(), library.version(), &setup.backend);
        tracing::info!(library = %path, version, backend, "NIXL is in use");
        let device = regions.first().map_or(0, |region| region.span().device);
        let mut driver = Self {
            connecting: Vec::new(),
            peers: HashMap::new(),
            ours: Ours { regions, memory: kind, device, span_bytes_max: spread::span_bytes_max(&setup, kind) },
            scratch,
            packer,
            library,
            setup,
            agent: None,
            _served: served,
            closing: false,
            looked_at: Instant::now(),
        };
        driver.agent = Some(driver.new_agent().map_err(failed)?);
        Ok((driver, Export::encode(&description)))
    }

    fn new_agent(&self) -> Result<Agent, NixlError> {
        let (_, agent) = agent(self.library, &self.setup, &self.ours.regions, For::Us(self.ours.memory))?;
        agent.register(self.scratch.clone())?;
        if let Some(packer) = &self.packer {
            agent.register(packer.own.region.clone())?;
        }
        Ok(agent)
    }

    /// Carries flights until told to close and nothing is in flight any more.
    pub(super) fn run(&mut self, orders: &Receiver<Command>) {
        let mut quiet = 0;
        loop {
            if self.connecting.is_empty() && self.peers.values().all(Peer::is_idle) {
                if self.closing {
                    return;
                }
                let Some(order) = next(orders) else { return };
                self.obey(order);
                quiet = 0;
            }
            while let Ok(order) = orders.try_recv() {
                self.obey(order);
                quiet = 0;
            }
            quiet = if self.advance(Instant::now()) { 0 } else { quiet + 1 };
            if quiet == 0 {
                continue;
            }
            // Where everything is with a thread that will tell, there is nothing to look at.
            if !self.polls() {
                match orders.recv_timeout(LOOK_INTERVAL) {
                    Ok(order) => self.obey(order),
                    Err(_) => quiet = 0,
                }
                continue;
            }
            if quiet < BUSY_ROUNDS {
                std::thread::yield_now();
                continue;
            }
            let sleep = (SLEEP_MIN * (quiet - BUSY_ROUNDS + 1)).min(SLEEP_MAX);
            match orders.recv_timeout(sleep) {
                Ok(order) => {
                    self.obey(order);
                    quiet = 0;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(sleep),
            }
        }
    }

    /// Whether NIXL or a peer's socket has to be looked at.
    fn polls(&self) -> bool {
        !self.connecting.is_empty() || self.peers.values().any(|peer| peer.has_requests() || peer.packs.may_hang())
    }

    fn obey(&mut self, order: Command) {
        match order {
            Command::Connect { description, deadline, tell } => self.connect(*description, deadline, tell),
            Command::Submit { flight, peer, packed } => match self.peers.get_mut(&Arc::as_ptr(&peer)) {
                Some(found) => found.push(flight, packed),
                None => flight.fail(TransportError::LinkClosed { peer: peer.name().to_owned() }),
            },
            Command::Disconnect { peer } => {
                if let Some(found) = self.peers.get_mut(&Arc::as_ptr(&peer)) {
                    found.links -= 1;
                }
                self.forget_unused();
            }
            Command::Close => {
                self.closing = true;
                self.connecting.clear();
            }
        }
    }

    fn connect(&mut self, description: Description, deadline: Instant, tell: Tell) {
        if let Some(known) = self.peers.values_mut().find(|peer| peer.agent == description.agent) {
            // What came of it is seen when it is used.
            known.links += usize::from(tell.send(Ok(known.state.clone())).is_ok());
            return;
        }
        if let Some(known) = self.connecting.iter_mut().find(|known| known.peer.agent == description.agent) {
            known.deadline = known.deadline.max(deadline);
            return known.waiting.push(tell);
        }
        let begun = PeerState::of(&description).and_then(|state| self.begin(Peer::new(description, Arc::new(state))));
        match begun {
            Ok((peer, transfer)) => {
                self.connecting.push(Connecting { transfer, peer, deadline, waiting: vec![tell] });
            }
            Err(error) => drop(tell.send(Err(error))),
        }
    }

    fn begin(&mut self, mut peer: Peer) -> Result<(Peer, Option<Transfer>), TransportError> {
        let Some(agent) = &self.agent else { return Err(peer.state.unreachable("NIXL failed here".to_owned())) };
        peer.load(agent)?;
        let probe = peer.probe(&self.ours, &self.scratch).map_err(|error| peer.state.unreachable(error.to_string()))?;
        if self.packer.is_some() && peer.state.is_near() {
            ask_for_slots(&mut peer);
        }
        Ok((peer, probe))
    }

    fn connected(&mut self, mut peer: Peer, waiting: &[Tell]) {
        let state = peer.state.clone();
        // Whoever asked may have given up meanwhile.
        peer.links = waiting.iter().filter(|tell| tell.send(Ok(state.clone())).is_ok()).count();
        if peer.links > 0 {
            self.peers.insert(Arc::as_ptr(&state), peer);
        }
    }

    /// One round over everything in flight. Says whether anything happened.
    fn advance(&mut self, now: Instant) -> bool {
        let mut news = self.advance_connecting(now);
        let look = now.saturating_duration_since(self.looked_at) >= LOOK_INTERVAL;
        if look {
            self.looked_at = now;
        }
        for peer in self.peers.values_mut().filter(|peer| !peer.is_idle()) {
            if look && let Some(ended) = peer.state.ended() {
                peer.die(ended, now + GRACE_MAX);
            }
            news |= peer.post(&self.ours, self.packer.as_mut(), now);
            news |= peer.poll(self.packer.as_mut(), now);
        }
        if self.peers.values().any(|peer| peer.is_stuck(now) && peer.has_requests()) {
            self.replace_agent();
            news = true;
        }
        for peer in self.peers.values_mut().filter(|peer| peer.is_stuck(now)) {
            let given = peer.abandon(self.packer.as_mut());
            peer.give_up(&given);
            news = true;
        }
        if news {
            self.forget_unused();
        }
        news
    }

    /// Ends the agent, and with it every request that does not end otherwise.
    fn replace_agent(&mut self) {
        let until = Instant::now() + GRACE_MAX;
        loop {
            let now = Instant::now();
            let mut moving =
                self.peers.values_mut().filter(|peer| peer.has_requests() && !peer.is_stuck(now)).peekable();
            if now >= until || moving.peek().is_none() {
                break;
            }
            for peer in moving {
                peer.poll(self.packer.as_mut(), now);
            }
            std::thread::sleep(SLEEP_MIN);
        }
        let mut abandoned = Vec::new();
        for peer in self.peers.values_mut() {
            if peer.has_requests() {
                peer.die(peer.state.unreachable("it does not answer".to_owned()), until);
                tracing::warn!(peer = peer.state.name(), "it does not answer: what was begun with it is given up");
                let given = peer.abandon(self.packer.as_mut());
                abandoned.push((Arc::as_ptr(&peer.state), given));
            }
            peer.unload();
        }
        for connecting in std::mem::take(&mut self.connecting) {
            let refused = connecting.peer.state.unreachable("another peer hung meanwhile; try again".to_owned());
            connecting.waiting.iter().for_each(|tell| drop(tell.send(Err(refused.clone()))));
        }
        // The last of what held it is gone: no write of its lands from here on.
        self.agent = None;
        abandoned.iter().for_each(|(key, given)| self.peers[key].give_up(given));
        let agent = self.new_agent().map_err(|error| unusable(Path::Nixl, error.to_string()));
        for peer in self.peers.values_mut() {
            let loaded = agent.as_ref().map_err(Clone::clone).and_then(|agent| peer.load(agent));
            if let Err(error) = loaded {
                peer.die(error, until);
            }
        }
        self.agent = agent.ok();
    }

    fn advance_connecting(&mut self, now: Instant) -> bool {
        let waiting = std::mem::take(&mut self.connecting);
        let before = waiting.len();
        for mut connecting in waiting {
            let state = connecting.peer.state.clone();
            let late = || state.unreachable("it did not answer in time".to_owned());
            let failed = match connecting.transfer.as_mut().map_or(Ok(Progress::Done), Transfer::poll) {
                Ok(Progress::Done) if !connecting.peer.is_asking(self.packer.as_mut()) => {
                    let Connecting { transfer, peer, waiting, .. } = connecting;
                    drop(transfer);
                    self.connected(peer, &waiting);
                    continue;
                }
                Ok(Progress::Done) => {
                    connecting.transfer = None;
                    state.ended().or_else(|| (now > connecting.deadline).then(late))
                }
                Ok(Progress::Moving) => state.ended().or_else(|| (now > connecting.deadline).then(late)),
                Err(error) => Some(state.ended().unwrap_or_else(|| state.unreachable(error.to_string()))),
            };
            match failed {
                Some(error) => connecting.waiting.iter().for_each(|tell| drop(tell.send(Err(error.clone())))),
                None => self.connecting.push(connecting),
            }
        }
        self.connecting.len() != before
    }

    /// Forgets peers without a link, once nothing of theirs is in flight.
    fn forget_unused(&mut self) {
        self.peers.retain(|_, peer| !peer.is_dead() && (peer.links > 0 || !peer.is_idle()));
    }
}

/// The next command. `None`: there will be none.
fn next(orders: &Receiver<Command>) -> Option<Command> {
    let until = Instant::now() + AWAKE;
    while Instant::now() < until {
        match orders.try_recv() {
            Ok(order) => return Some(order),
            Err(TryRecvError::Empty) => std::thread::yield_now(),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    orders.recv().ok()
}

/// Asks a peer for slots, if it has any.
fn ask_for_slots(peer: &mut Peer) {
    let Some(help) = &peer.help else { return };
    let connected = Wire::connect(help.name.as_bytes()).map(Asker::over).and_then(|mut asker| {
        asker.ask(&Ask::Hello { word: help.word })?;
        Ok(asker)
    });
    match connected {
        Ok(asker) => peer.asking = Some(asker),
        Err(error) => {
            tracing::info!(peer = peer.state.name(), %error, "it cannot be asked to pack: short runs go one by one");
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.connecting.clear();
        self.peers.clear();
    }
}

/// Whose transfers go over an agent.
enum For {
    /// They find its thread awake when something arrives.
    Peers,
    /// The driver looks after them.
    Us(MemoryType),
}

/// An agent of a name of its own that has everything registered.
fn agent(
    library: &'static Library,
    setup: &NixlSetup,
    regions: &[Arc<Region>],
    whose: For,
) -> Result<(String, Agent), NixlError> {
    let name = format!("pdlink-{:032x}", rand::random::<u128>());
    let (wake_interval, parameters) = match whose {
        For::Peers => (Some(WAKE_INTERVAL), setup.parameters.clone()),
        For::Us(memory) => (None, spread::parameters(setup, memory)),
    };
    let agent = Agent::new(
        library,
        &AgentSetup { name: &name, backend: &setup.backend, parameters: &parameters, wake_interval },
    )?;
    for region in regions.iter().filter(|region| region.len() > 0) {
        agent.register(region.clone())?;
    }
    Ok((name, agent))
}

fn describe(region: &Region) -> RegionDescription {
    let span = region.span();
    RegionDescription { address: span.address, len: span.len, device: span.device }
}
