//! The runtime of one worker: starts the thread that owns all transfers, and is the engine's way to it.
//!
//! One thread with a single-threaded tokio runtime owns every connection, every machine and every timer (`core`). The
//! engine's calls check what can be checked without it, and send it an event; bytes are moved by the transports' own
//! threads. Nothing that the engine calls waits for the thread or for bytes, except [`KvRuntime::shutdown`] and
//! [`KvRuntime::wait_for_pushes`].

use std::collections::HashSet;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc;

use super::core::{Command, Core, Event, Expect};
use super::link::{Begin, KvLink, Offer, Progress, Prompt, TransferHandle};
use super::marks::Marks;
use super::past::Records;
use super::push_gate::PushGate;
use super::run_list::by_group;
use super::shares::Split;
use super::{
    BLOCKS_MAX, Basis, BlockId, Geometry, KvError, KvMetrics, Layout, ParamsError, ParamsMaker, RankCard, RankMemory,
    Report, TransferParams,
};
use crate::config::{KvConfig, KvSendType, Role, host_port};
use crate::control::{EarlyParams, RuntimeStatus, TransferId, WeightsDoor};
use crate::memory::{GpuDigests, Region};
use crate::security::Secret;
use crate::telemetry::{Side, TransferRecord, clock};
use crate::transport::{Setup, StreamMark, Transport, offers};

/// Everything that a runtime needs to know.
pub struct RuntimeConfig<'a> {
    pub kv: &'a KvConfig,
    /// Unique among the workers of a run.
    pub engine_id: String,
    pub role: Role,
    /// Who drives the copy of what this worker prefills.
    pub send_type: KvSendType,
    pub geometry: Geometry,
    /// The tensor-parallel ranks that this process holds: all in order, or one.
    pub ranks: Vec<RankMemory>,
    /// `host:port` of the runtimes that hold the worker's other ranks: an abort told to one is passed on to all.
    pub siblings: Vec<String>,
    pub secret: Secret,
    /// The worker's KV address, bound and listening.
    pub listener: TcpListener,
    /// Under which name or address peers reach the listener.
    pub advertise_host: String,
    pub weight_version: u64,
    /// Who answers what is asked about weights; nobody where the engine gets them in another way.
    pub weights: Option<WeightsDoor>,
    /// The paths to offer, best first. `None`: what `kv.paths` allows and this memory can use.
    pub transports: Option<Vec<Arc<dyn Transport>>>,
    pub metrics: KvMetrics,
}

/// Where the one report of each transfer goes (KV-1). Runs on the runtime's thread: must not block.
pub type ReportSink = Box<dyn Fn(Report) + Send + Sync>;

/// A running KV link.
pub struct KvRuntime {
    shared: Arc<Shared>,
    card: RankCard,
    params: ParamsMaker,
    events: mpsc::UnboundedSender<Event>,
    /// A push that takes longer has failed, or is about to.
    push_max: Duration,
    /// Where the KV is on a GPU: what waits for it.
    marks: Option<Marks>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the engine's threads and the runtime's share.
pub(super) struct Shared {
    pub(super) engine_id: String,
    pub(super) incarnation: u64,
    pub(super) role: Role,
    pub(super) send_type: KvSendType,
    pub(super) layout: Arc<Layout>,
    pub(super) regions: Vec<Arc<Region>>,
    pub(super) secret: Secret,
    pub(super) geometry_digest: u64,
    pub(super) weight_version: AtomicU64,
    pub(super) weights: Option<WeightsDoor>,
    pub(super) records: Mutex<Records>,
    pub(super) metrics: KvMetrics,
    /// With `PUT`: what the engine's next step waits for.
    pub(super) pushes: Option<PushGate>,
    /// Made when it is first needed; `None` where all KV lies in host memory.
    gpu_digests: OnceLock<Option<Mutex<GpuDigests>>>,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    transfers: HashSet<(Side, TransferId)>,
    /// Those of prefill's that are not offered yet.
    begun: HashSet<TransferId>,
    held_blocks: u64,
}

impl Shared {
    /// What digests KV on the GPU that it lies on. Where that cannot be, the processor does it, which takes longer.
    pub(super) fn gpu_digests(&self) -> Option<&Mutex<GpuDigests>> {
        let make = || {
            let device = self.regions.iter().find_map(|region| region.device())?;
            let made = GpuDigests::on(device);
            made.map(Mutex::new).inspect_err(|error| tracing::warn!(%error, "digests are made by the processor")).ok()
        };
        self.gpu_digests.get_or_init(make).as_ref()
    }

    /// Enters a transfer; one id can be in progress once on each side.
    fn enter(&self, side: Side, transfer_id: TransferId, blocks: usize) -> Result<(), KvError> {
        let mut live = locked(&self.live);
        if !live.transfers.insert((side, transfer_id)) {
            return Err(KvError::Duplicate { transfer_id });
        }
        live.held_blocks += blocks as u64;
        self.metrics.gauge(live.held_blocks, live.transfers.len() as u64);
        Ok(())
    }

    /// Enters what prefill is about to compute.
    fn enter_begun(&self, transfer_id: TransferId) -> Result<(), KvError> {
        self.enter(Side::Prefill, transfer_id, 0)?;
        locked(&self.live).begun.insert(transfer_id);
        Ok(())
    }

    /// Enters an offer: a new transfer, or one that was begun. Says which.
    fn enter_offer(&self, transfer_id: TransferId, blocks: usize) -> Result<bool, KvError> {
        {
            let mut live = locked(&self.live);
            if live.begun.remove(&transfer_id) {
                live.held_blocks += blocks as u64;
                self.metrics.gauge(live.held_blocks, live.transfers.len() as u64);
                return Ok(true);
            }
        }
        self.enter(Side::Prefill, transfer_id, blocks).map(|()| false)
    }

    /// Lets go of a transfer that was begun, unless the engine has offered it meanwhile: then it waits for its report.
    pub(super) fn leave_begun(&self, transfer_id: TransferId) {
        let mut live = locked(&self.live);
        if live.begun.remove(&transfer_id) {
            live.transfers.remove(&(Side::Prefill, transfer_id));
            self.metrics.gauge(live.held_blocks, live.transfers.len() as u64);
        }
    }

    /// Lets go of a transfer and the blocks held for it.
    pub(super) fn leave(&self, side: Side, transfer_id: TransferId, blocks: usize) {
        let mut live = locked(&self.live);
        live.transfers.remove(&(side, transfer_id));
        live.held_blocks -= blocks as u64;
        self.metrics.gauge(live.held_blocks, live.transfers.len() as u64);
    }

    pub(super) fn status(&self) -> RuntimeStatus {
        let live = locked(&self.live);
        RuntimeStatus {
            engine_id: self.engine_id.clone(),
            incarnation: self.incarnation,
            role: self.role,
            held_blocks: live.held_blocks,
            transfers_active: live.transfers.len() as u64,
            weight_version: self.weight_version.load(Relaxed),
        }
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvRuntime {
    /// Checks the memory's description, opens the paths, and starts the thread. `reports` gets the end of every transfer.
    pub fn start(config: RuntimeConfig<'_>, reports: ReportSink) -> Result<Self, KvError> {
        let start = |what: &str, error: &dyn std::fmt::Display| KvError::Start(format!("{what}: {error}"));
        let (layout, regions) = Layout::of_ranks(config.geometry.clone(), &config.ranks)?;
        let address = config.listener.local_addr().map_err(|error| start("the KV listener", &error))?;
        config.secret.allowed_on(address.ip()).map_err(|error| start("the KV listener", &error))?;
        let transports = match config.transports {
            Some(transports) => transports,
            None => offers(&Setup {
                config: config.kv,
                regions: &regions,
                secret: &config.secret,
                bind: address.ip(),
                advertise_host: &config.advertise_host,
            })
            .map_err(|error| start("the paths", &error))?,
        };
        let shared = Arc::new(Shared {
            geometry_digest: layout.geometry().digest(),
            engine_id: config.engine_id,
            incarnation: incarnation(),
            role: config.role,
            send_type: config.send_type,
            layout: Arc::new(layout),
            regions,
            secret: config.secret,
            weight_version: AtomicU64::new(config.weight_version),
            weights: config.weights,
            records: Mutex::default(),
            metrics: config.metrics,
            pushes: (config.send_type == KvSendType::Put).then(PushGate::default),
            gpu_digests: OnceLock::new(),
            live: Mutex::default(),
        });
        let card = RankCard {
            engine_id: shared.engine_id.clone(),
            rank: shared.layout.held().start,
            tp_size: shared.layout.geometry().tp_size,
            endpoint: host_port(&config.advertise_host, address.port()),
            incarnation: shared.incarnation,
            geometry_digest: shared.geometry_digest,
            weight_version: config.weight_version,
        };
        let cards: Vec<RankCard> = shared.layout.held().map(|rank| RankCard { rank, ..card.clone() }).collect();
        let params = ParamsMaker::of_some(&cards, shared.secret.clone())?;
        let (events, queue) = mpsc::unbounded_channel();
        let core = Core::new(
            config.kv,
            config.send_type,
            &config.siblings,
            Arc::clone(&shared),
            transports,
            events.clone(),
            reports,
        );
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(4)
            .build()
            .map_err(|error| start("the runtime", &error))?;
        config.listener.set_nonblocking(true).map_err(|error| start("the KV listener", &error))?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(config.listener).map_err(|error| start("the KV listener", &error))?
        };
        let thread = std::thread::Builder::new()
            .name("pdlink-kv".to_owned())
            .spawn(move || runtime.block_on(core.run(listener, queue)))
            .map_err(|error| start("the thread", &error))?;
        let marks = match shared.regions.iter().any(|region| region.device().is_some()) {
            true => {
                Some(Marks::start(events.clone()).map_err(|error| start("the thread that waits for the GPU", &error))?)
            }
            false => None,
        };
        let push_max = Duration::from_millis(config.kv.transfer_timeout_ms);
        Ok(Self { shared, card, params, events, push_max, marks, thread: Mutex::new(Some(thread)) })
    }

    /// `host:port` of the control listener, as peers are told.
    pub fn address(&self) -> String {
        self.card.endpoint.clone()
    }

    /// What the scheduler of the engine is to know of this rank; of the first, if several are here.
    pub fn card(&self) -> RankCard {
        RankCard { weight_version: self.shared.weight_version.load(Relaxed), ..self.card.clone() }
    }

    pub fn incarnation(&self) -> u64 {
        self.shared.incarnation
    }

    /// For the engine to call between two steps. With `PUT`: waits until no push of ours is in flight, and no longer than
    /// `kv.transfer_timeout_ms`. Otherwise returns at once.
    pub fn wait_for_pushes(&self) {
        if let Some(pushes) = &self.shared.pushes {
            pushes.wait(self.push_max);
        }
    }

    /// The same as [`KvLink::progress`], of KV that a GPU may still be writing: it is final once the GPU has come to `mark`.
    pub fn progress_behind(&self, mark: Option<StreamMark>, progress: Vec<Progress>) {
        let transfers = progress.iter().map(|progress| progress.transfer_id).collect();
        // After the runtime has gone there is nobody to push.
        let _ = self.behind(mark, transfers, Command::Progress(progress));
    }

    /// The same as [`KvLink::offer`], with blocks that are final once the GPU has come to `mark`.
    pub fn offer_behind(&self, mark: Option<StreamMark>, offer: Offer) -> Result<TransferParams, KvError> {
        if self.shared.role == Role::Decode {
            return Err(KvError::WrongRole { what: "offering KV", role: "decode" });
        }
        self.check_offer(&offer)?;
        let transfer_id = offer.transfer_id;
        let blocks = offer.blocks.iter().map(Vec::len).sum();
        let params = self.params.params(transfer_id, offer.request_id.clone(), offer.blocks.clone(), offer.tokens);
        let is_begun = self.shared.enter_offer(transfer_id, blocks)?;
        let weight_version = params.pdlink.weight_version.unwrap_or_else(|| self.shared.weight_version.load(Relaxed));
        let command = Command::Offer { offer, weight_version };
        // What nobody can have claimed yet is final by the time that anybody does: decode hears of it with the first token.
        let told = if is_begun { self.behind(mark, vec![transfer_id], command) } else { self.command(command) };
        told.inspect_err(|_| self.shared.leave(Side::Prefill, transfer_id, blocks))?;
        Ok(params)
    }

    /// Tells the thread in the order in which the engine's stream comes to it.
    fn behind(&self, mark: Option<StreamMark>, transfers: Vec<TransferId>, command: Command) -> Result<(), KvError> {
        match &self.marks {
            Some(marks) => marks.tell(mark, transfers, command).then_some(()).ok_or(KvError::ShutDown),
            None => self.command(command),
        }
    }

    /// Ends every transfer, with its report, closes every path and waits for the thread.
    pub fn shutdown(self) {
        self.stop();
    }

    fn stop(&self) {
        let _ = self.events.send(Event::Command(Command::ShutDown));
        let Some(thread) = locked(&self.thread).take() else { return };
        // A report may hold the last handle on the runtime: its thread cannot wait for itself, and ends on its own.
        if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
            tracing::error!("the KV runtime's thread panicked");
        }
    }

    fn command(&self, command: Command) -> Result<(), KvError> {
        self.events.send(Event::Command(command)).map_err(|_| KvError::ShutDown)
    }

    fn check_offer(&self, offer: &Offer) -> Result<(), KvError> {
        let Offer { transfer_id, blocks, tokens, .. } = offer;
        let given = blocks.iter().map(Vec::len).sum();
        if *tokens == 0 || given > BLOCKS_MAX {
            return Err(KvError::Extent { transfer_id: *transfer_id, tokens: *tokens, given });
        }
        self.shared.layout.check_cover(&by_group(blocks), *tokens)?;
        Ok(())
    }

    /// How the ranks of prefill, of which each is named by its address, are spread over runtimes: one for each, or one for
    /// all.
    fn split_of(&self, tp_size: u32, endpoints: &[&str]) -> Result<Split, KvError> {
        let mut distinct = endpoints.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let held = match distinct.len() {
            _ if endpoints.is_empty() || endpoints.len() != tp_size as usize => None,
            1 => Some(tp_size),
            count if count == endpoints.len() => Some(1),
            _ => None,
        };
        let Some(held) = held else {
            return Err(KvError::Endpoints { tp_size, named: endpoints.len(), distinct: distinct.len() });
        };
        self.shared.layout.check_ranks_of(tp_size)?;
        Ok(Split { tp_size, held })
    }

    fn expect_at(&self, expect: Expect) -> Result<TransferHandle, KvError> {
        let transfer_id = expect.transfer_id;
        self.shared.enter(Side::Decode, transfer_id, 0)?;
        let told = self.command(Command::Expect(expect));
        told.inspect_err(|_| self.shared.leave(Side::Decode, transfer_id, 0))?;
        Ok(TransferHandle { transfer_id })
    }

    fn check_expects(&self) -> Result<(), KvError> {
        if self.shared.role == Role::Prefill {
            return Err(KvError::WrongRole { what: "expecting KV", role: "prefill" });
        }
        Ok(())
    }
}

impl KvLink for KvRuntime {
    fn begin(&self, begin: Begin) -> Result<(), KvError> {
        let (transfer_id, send_type) = (begin.transfer_id, self.shared.send_type);
        if self.shared.role == Role::Decode {
            return Err(KvError::WrongRole { what: "computing KV for others", role: "decode" });
        }
        if send_type != KvSendType::PutAsync {
            return Err(KvError::NotAsync { transfer_id, send_type: send_type.name() });
        }
        self.shared.enter_begun(transfer_id)?;
        let weight_version = self.shared.weight_version.load(Relaxed);
        let told = self.command(Command::Begin { begin, weight_version });
        told.inspect_err(|_| self.shared.leave_begun(transfer_id))
    }

    fn progress(&self, progress: Progress) {
        self.progress_behind(None, vec![progress]);
    }

    fn restart(&self, transfer_id: TransferId) {
        let _ = self.behind(None, vec![transfer_id], Command::Restart(transfer_id));
    }

    fn offer(&self, offer: Offer) -> Result<TransferParams, KvError> {
        self.offer_behind(None, offer)
    }

    fn expect_early(&self, params: &EarlyParams, prompt: Prompt) -> Result<TransferHandle, KvError> {
        self.check_expects()?;
        let transfer_id = params.transfer_id;
        if !params.check_seal(&self.shared.secret) {
            return Err(ParamsError::BrokenEarlySeal { transfer_id }.into());
        }
        let endpoints: Vec<&str> = params.endpoints.iter().map(String::as_str).collect();
        let src = self.split_of(u32::try_from(endpoints.len()).unwrap_or(u32::MAX), &endpoints)?;
        let basis = Basis::Early { fingerprint: prompt.fingerprint };
        let named = params.endpoints.iter().step_by(src.held as usize);
        self.expect_at(Expect {
            transfer_id,
            runtimes: named.map(|endpoint| (endpoint.clone(), basis)).collect(),
            src,
            weight_version: self.shared.weight_version.load(Relaxed),
            tokens: prompt.tokens,
        })
    }

    fn expect(&self, params: &TransferParams) -> Result<TransferHandle, KvError> {
        self.check_expects()?;
        params.check_seal(&self.shared.secret)?;
        let ranks = &params.pdlink.ranks;
        let endpoints: Vec<&str> = ranks.iter().map(|rank| rank.endpoint.as_str()).collect();
        let src = self.split_of(params.tp_size, &endpoints)?;
        let (geometry_digest, weight_version) = (params.pdlink.geometry_digest, params.pdlink.weight_version);
        let named = ranks.iter().step_by(src.held as usize).map(|rank| {
            let incarnation = rank.incarnation;
            (rank.endpoint.clone(), Basis::Params { incarnation, geometry_digest, weight_version })
        });
        self.expect_at(Expect {
            transfer_id: params.pdlink.transfer_id,
            runtimes: named.collect(),
            src,
            weight_version: weight_version.unwrap_or_else(|| self.shared.weight_version.load(Relaxed)),
            tokens: params.remote_num_tokens,
        })
    }

    fn fetch(&self, handle: TransferHandle, blocks: Vec<Vec<BlockId>>, first_token: u32) {
        // After the runtime has gone every transfer has been reported already.
        let _ = self.command(Command::Fetch { transfer_id: handle.transfer_id, blocks, first_token });
    }

    fn release(&self, handle: TransferHandle) {
        let _ = self.command(Command::Release(handle.transfer_id));
    }

    fn abort(&self, transfer_id: TransferId) {
        let _ = self.command(Command::Abort(transfer_id));
    }

    fn record(&self, transfer_id: TransferId) -> Option<TransferRecord> {
        locked(&self.shared.records).of(transfer_id)
    }

    fn records(&self) -> Vec<TransferRecord> {
        locked(&self.shared.records).all()
    }

    fn status(&self) -> RuntimeStatus {
        self.shared.status()
    }

    fn set_weight_version(&self, weight_version: u64) {
        self.shared.weight_version.store(weight_version, Relaxed);
        self.params.set_weight_version(weight_version);
        let _ = self.command(Command::WeightVersion(weight_version));
    }
}

impl Drop for KvRuntime {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Nanoseconds since 1970: grows from one start of a worker to the next, so that of two incarnations at one address the
/// later is known (KV-8).
fn incarnation() -> u64 {
    u64::try_from(clock::unix().as_nanos()).unwrap_or(u64::MAX)
}
