//! One rank's runtime, as the worker side of the connector holds it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use pdlink::config::KvConfig;
use pdlink::control::WeightsDoor;
use pdlink::kv::{
    Begin, BlockId, End, KvError, KvFigures, KvLink, KvMetrics, KvRequest as Parsed, KvRuntime, Offer, Progress,
    Prompt, RankMemory, Report as Ended, RuntimeConfig, TransferHandle, TransferId, TransferParams,
};
use pdlink::memory::Device;
use pdlink::telemetry::names;
use pdlink::transport::StreamMark;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::maker::block_ids;
use crate::settings::LinkSettings;
use crate::weights::WeightReceiver;
use crate::{errors, regions, request, settings};

/// How one transfer ended, with what the runtime recorded of it.
#[pyclass(frozen, get_all, module = "pdlink")]
pub(crate) struct Report {
    transfer_id: String,
    side: &'static str,
    /// `sent`, `received`, `released`, `aborted`, `expired` or `failed`.
    end: &'static str,
    /// Of a failure: its short name, and what happened in words.
    reason: Option<&'static str>,
    failure: Option<String>,
    /// False: a peer that cannot be asked may still write into decode's blocks.
    fenced: bool,
    path: Option<&'static str>,
    bytes: u64,
    posts: u64,
    wait_us: u64,
    copy_us: u64,
    validate_us: u64,
    digest_checked: bool,
}

/// What a rank's link has to show beside its reports. Numbers that only grow are of this link, since it was opened.
#[pyclass(frozen, get_all, module = "pdlink")]
pub(crate) struct Figures {
    /// Blocks held for decode, and transfers of either side that have not ended.
    held: u64,
    active: u64,
    /// Of this process.
    gpu_bytes: u64,
    leases_renewed: u64,
    /// Connected workers, by this one's own side.
    peers: BTreeMap<&'static str, u64>,
    peer_failures: BTreeMap<&'static str, u64>,
}

/// A running KV link. No call waits for a peer or for bytes, but for `wait_for_pushes`; ends come by `take_reports`, one for each `offer` and each
/// `expect` that did not raise.
#[pyclass(frozen, module = "pdlink")]
pub(crate) struct Link {
    /// Gone after `shutdown`.
    runtime: RwLock<Option<KvRuntime>>,
    ended: Arc<Mutex<Vec<Ended>>>,
    address: String,
    metrics: KvMetrics,
    /// The GPU that the KV is on.
    device: Option<Arc<Device>>,
    /// Prompts of this step that decode may have claimed.
    step: Mutex<Vec<Chunk>>,
}

/// What one step computes of one prompt.
struct Chunk {
    transfer_id: TransferId,
    blocks: Arc<Vec<Vec<BlockId>>>,
    tokens: u32,
}

#[pymethods]
impl Link {
    /// Borrows the memory, listens and starts the runtime's thread. `memory` is a list of (address, bytes, owner, GPU), the GPU `None` for host memory.
    /// `receiver` answers what is asked here about weights.
    #[new]
    #[pyo3(signature = (text, memory, receiver=None))]
    fn new(
        py: Python<'_>,
        text: &str,
        memory: Vec<regions::Memory>,
        receiver: Option<PyRef<'_, WeightReceiver>>,
    ) -> PyResult<Self> {
        let link = LinkSettings::parse(text)?;
        let regions = regions::borrow(memory)?;
        let weights = receiver.and_then(|receiver| receiver.door());
        py.detach(|| start(link, regions, weights))
    }

    /// `host:port`, as peers are told.
    #[getter]
    fn address(&self) -> &str {
        &self.address
    }

    /// What the scheduler needs to make parameters, as JSON.
    fn card(&self) -> PyResult<String> {
        let card = self.with(|runtime| Ok(runtime.card()))?;
        serde_json::to_string(&card).map_err(|error| errors::settings("the card", &error))
    }

    /// `stream`: that of the GPU on which the last of it is computed, where decode may have claimed it before.
    #[pyo3(signature = (transfer_id, request_id, blocks, tokens, stream=None))]
    fn offer(
        &self,
        transfer_id: &str,
        request_id: String,
        blocks: Vec<Vec<u32>>,
        tokens: u32,
        stream: Option<usize>,
    ) -> PyResult<()> {
        let transfer_id = request::transfer_id(transfer_id)?;
        let mark = self.mark(stream)?;
        let offer = Offer { transfer_id, request_id, blocks: block_ids(blocks), tokens };
        self.with(|runtime| runtime.offer_behind(mark, offer).map(drop))
    }

    /// Prefill: this prompt will be computed, and decode may claim it meanwhile.
    fn begin(&self, transfer_id: &str, request_id: String, tokens: u32, fingerprint: u64) -> PyResult<()> {
        let transfer_id = request::transfer_id(transfer_id)?;
        let begin = Begin { transfer_id, request_id, prompt: Prompt { tokens, fingerprint } };
        self.with(|runtime| runtime.begin(begin))
    }

    /// Prefill: what the step that begins computes of prompts that were begun: transfer, blocks, tokens in the end.
    fn step(&self, chunks: Vec<(String, Vec<Vec<u32>>, u32)>) -> PyResult<()> {
        let chunk = |(transfer_id, blocks, tokens): (String, _, u32)| {
            let transfer_id = request::transfer_id(&transfer_id)?;
            Ok(Chunk { transfer_id, blocks: Arc::new(block_ids(blocks)), tokens })
        };
        *locked(&self.step) = chunks.into_iter().map(chunk).collect::<PyResult<_>>()?;
        Ok(())
    }

    /// Prefill: the step's prompts are computed in layers `first..end`, or will be once the GPU is through with what is on
    /// `stream` now.
    #[pyo3(signature = (first, end, stream=None))]
    fn computed(&self, first: u32, end: u32, stream: Option<usize>) -> PyResult<()> {
        let mark = self.mark(stream)?;
        let progress = |chunk: &Chunk| Progress {
            transfer_id: chunk.transfer_id,
            blocks: Arc::clone(&chunk.blocks),
            layers: first..end,
            tokens: chunk.tokens,
        };
        let progress: Vec<Progress> = locked(&self.step).iter().map(progress).collect();
        self.with(|runtime| {
            runtime.progress_behind(mark, progress);
            Ok(())
        })
    }

    /// Prefill: a prompt that was begun was preempted, and will be computed again.
    fn restart(&self, transfer_id: &str) -> PyResult<()> {
        let transfer_id = request::transfer_id(transfer_id)?;
        self.with(|runtime| {
            runtime.restart(transfer_id);
            Ok(())
        })
    }

    /// Claims what the JSON text of `kv_transfer_params` names.
    fn expect(&self, params: &str) -> PyResult<()> {
        let value = serde_json::from_str(params).map_err(|error| {
            errors::MalformedParamsError::new_err(format!("kv_transfer_params are malformed: {error}"))
        })?;
        let params = TransferParams::parse(&value).map_err(|error| errors::params(&error))?;
        self.with(|runtime| runtime.expect(&params).map(drop))
    }

    /// Claims what the JSON text names and prefill is yet to compute.
    fn expect_early(&self, params: &str, tokens: u32, fingerprint: u64) -> PyResult<()> {
        let value = serde_json::from_str(params).map_err(|error| {
            errors::MalformedParamsError::new_err(format!("kv_transfer_params are malformed: {error}"))
        })?;
        match Parsed::parse(Some(&value)).map_err(|error| errors::params(&error))? {
            Parsed::Early(params) => {
                let prompt = Prompt { tokens, fingerprint };
                self.with(|runtime| runtime.expect_early(&params, prompt).map(drop))
            }
            _ => Err(errors::MalformedParamsError::new_err("kv_transfer_params are of another kind than expected")),
        }
    }

    fn fetch(&self, transfer_id: &str, blocks: Vec<Vec<u32>>, first_token: u32) -> PyResult<()> {
        let handle = handle(transfer_id)?;
        self.with(|runtime| {
            runtime.fetch(handle, block_ids(blocks), first_token);
            Ok(())
        })
    }

    fn release(&self, transfer_id: &str) -> PyResult<()> {
        let handle = handle(transfer_id)?;
        self.with(|runtime| {
            runtime.release(handle);
            Ok(())
        })
    }

    fn abort(&self, transfer_id: &str) -> PyResult<()> {
        let transfer_id = request::transfer_id(transfer_id)?;
        self.with(|runtime| {
            runtime.abort(transfer_id);
            Ok(())
        })
    }

    /// The ends since the last call, oldest first.
    fn take_reports(&self) -> Vec<Report> {
        let ended = std::mem::take(&mut *locked(&self.ended));
        if ended.is_empty() {
            return Vec::new();
        }
        let runtime = self.runtime.read().unwrap_or_else(PoisonError::into_inner);
        ended.into_iter().map(|ended| report(runtime.as_ref(), ended)).collect()
    }

    /// With `PUT`: waits until nothing that is pushed from here is in flight, within the transfer's own bound.
    fn wait_for_pushes(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            self.with(|runtime| {
                runtime.wait_for_pushes();
                Ok(())
            })
        })
    }

    /// What is computed from now on is of these weights (KV-5). Called while nothing is computed.
    fn set_weight_version(&self, version: u64) -> PyResult<()> {
        self.with(|runtime| {
            runtime.set_weight_version(version);
            Ok(())
        })
    }

    /// As they are now; after `shutdown`, with nothing held and nobody connected.
    fn figures(&self) -> Figures {
        let runtime = self.runtime.read().unwrap_or_else(PoisonError::into_inner);
        let status = runtime.as_ref().map(KvRuntime::status);
        let KvFigures { leases_renewed, gpu_bytes, mut peers, peer_failures } = self.metrics.figures();
        if status.is_none() {
            peers.values_mut().for_each(|count| *count = 0);
        }
        let (held, active) = status.map_or((0, 0), |status| (status.held_blocks, status.transfers_active));
        Figures { held, active, gpu_bytes, leases_renewed, peers, peer_failures }
    }

    /// What is known of a recent transfer, as JSON.
    fn record(&self, transfer_id: &str) -> PyResult<Option<String>> {
        let transfer_id = request::transfer_id(transfer_id)?;
        let record = self.with(|runtime| Ok(runtime.record(transfer_id)))?;
        let text = record.map(|record| serde_json::to_string(&record)).transpose();
        text.map_err(|error| errors::settings("a record", &error))
    }

    /// Ends every transfer with its report, closes every path and lets go of the memory. A second call does nothing.
    fn shutdown(&self, py: Python<'_>) {
        py.detach(|| {
            let runtime = self.runtime.write().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(runtime) = runtime {
                runtime.shutdown();
            }
        });
    }
}

impl Link {
    /// None where the KV is not on a GPU: what is computed there is there.
    fn mark(&self, stream: Option<usize>) -> PyResult<Option<StreamMark>> {
        self.device.as_ref().zip(stream).map(|(device, stream)| regions::mark(device, stream)).transpose()
    }

    fn with<T>(&self, call: impl FnOnce(&KvRuntime) -> Result<T, KvError>) -> PyResult<T> {
        let runtime = self.runtime.read().unwrap_or_else(PoisonError::into_inner);
        let result = runtime.as_ref().ok_or(KvError::ShutDown).and_then(call);
        result.map_err(|error| errors::kv(&error))
    }
}

/// Our names of the link's metrics, for the page that vLLM serves.
pub(crate) fn metric_names(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let names = HashMap::from([
        ("transfers", names::KV_TRANSFERS),
        ("bytes", names::KV_TRANSFER_BYTES),
        ("posts", names::KV_TRANSFER_POSTS),
        ("leases", names::KV_LEASES_RENEWED),
        ("digests", names::KV_DIGESTS_CHECKED),
        ("seconds", names::KV_TRANSFER_SECONDS),
        ("held", names::KV_BLOCKS_HELD),
        ("active", names::KV_TRANSFERS_ACTIVE),
        ("gpu_bytes", names::GPU_MEMORY_BYTES),
        ("peers", names::KV_PEERS),
        ("peer_failures", names::KV_PEER_FAILURES),
    ]);
    names.into_pyobject(py)
}

fn start(
    link: LinkSettings,
    regions: Vec<Arc<pdlink::memory::Region>>,
    weights: Option<WeightsDoor>,
) -> PyResult<Link> {
    let listener = link.listen()?;
    let secret = settings::secret(link.secret_file.as_ref())?;
    let device = regions.iter().find_map(|region| region.device()).cloned();
    let rank = RankMemory { rank: link.rank, regions, layers: link.layers, num_blocks: link.num_blocks };
    let ended = Arc::new(Mutex::new(Vec::new()));
    let metrics = KvMetrics::unregistered();
    let config = RuntimeConfig {
        kv: &KvConfig { ..link.kv },
        engine_id: link.engine_id,
        role: link.role,
        send_type: link.send_type,
        geometry: link.geometry,
        ranks: vec![rank],
        siblings: link.siblings,
        secret,
        listener,
        advertise_host: link.advertise_host,
        weight_version: link.weight_version,
        weights,
        transports: None,
        // vLLM's page shows what the reports say: the runtime's own registry would have no reader.
        metrics: metrics.clone(),
    };
    let sink = ended.clone();
    let runtime = KvRuntime::start(config, Box::new(move |end| locked(&sink).push(end)));
    let runtime = runtime.map_err(|error| errors::kv(&error))?;
    let address = runtime.address();
    Ok(Link { runtime: RwLock::new(Some(runtime)), ended, address, metrics, device, step: Mutex::default() })
}

fn report(runtime: Option<&KvRuntime>, ended: Ended) -> Report {
    let record = runtime.and_then(|runtime| runtime.record(ended.transfer_id));
    let record = record.filter(|record| record.side == ended.side);
    let (reason, failure, fenced) = match &ended.end {
        End::Failed { failure, fenced } => (Some(failure.name()), Some(failure.to_string()), *fenced),
        _ => (None, None, true),
    };
    let number = |of: fn(&pdlink::telemetry::TransferRecord) -> u64| record.as_ref().map_or(0, of);
    Report {
        transfer_id: ended.transfer_id.to_string(),
        side: ended.side.name(),
        end: name(&ended.end),
        reason,
        failure,
        fenced,
        path: record.as_ref().and_then(|record| record.path).map(|path| path.name()),
        bytes: number(|record| record.bytes),
        posts: number(|record| record.posts),
        wait_us: number(|record| record.wait_us),
        copy_us: number(|record| record.copy_us),
        validate_us: number(|record| record.validate_us),
        digest_checked: record.as_ref().is_some_and(|record| record.digest_checked),
    }
}

fn name(end: &End) -> &'static str {
    match end {
        End::Sent => "sent",
        End::Received => "received",
        End::Released => "released",
        End::Aborted => "aborted",
        End::Expired => "expired",
        End::Failed { .. } => "failed",
    }
}

fn handle(transfer_id: &str) -> PyResult<TransferHandle> {
    Ok(TransferHandle { transfer_id: request::transfer_id(transfer_id)? })
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
