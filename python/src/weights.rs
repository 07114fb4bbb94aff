//! A vLLM worker's part in updates of the weights: the native receiver, whose orders Python carries out.
//!
//! The receiver's thread stages and checks while the engine serves. What the engine itself has to do becomes an [`Order`],
//! taken by the worker's own thread in Python and answered by `Order.done`.

use std::net::{IpAddr, TcpListener};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use pdlink::config::{InFlight, KvConfig, Staging, WeightsConfig};
use pdlink::control::{TrainerGroup, WeightsDoor};
use pdlink::memory::Region;
use pdlink::weights::{
    Arrived, Listening, Manifest, NewWeights, Paths, ReceiverSetup, Staged, Stream, WeightTarget, WeightsMetrics,
    WeightsReceiver,
};
use pyo3::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{errors, settings};

/// As the package's own code writes them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReceiverSettings {
    version: u64,
    weights: WeightsConfig,
    /// `[kv]`, for what the paths of weights can be told.
    kv: KvConfig,
    bind_host: String,
    advertise_host: String,
    /// A listener of its own; without one the KV link's has to be given the door.
    port: Option<u16>,
    secret_file: Option<PathBuf>,
    /// The folder that the worker was started with, if it is one.
    base: Option<String>,
    /// The rank's GPU.
    gpu: Option<i32>,
    /// `host:port` of every rank of the worker.
    ranks: Vec<String>,
}

enum Answer {
    Paused(Box<dyn FnOnce() + Send>),
    Committed(Box<dyn FnOnce(Result<(), String>) + Send>),
    Met(Box<dyn FnOnce(Result<Vec<u8>, String>) + Send>),
}

/// What the engine is to do.
#[pyclass(frozen, module = "pdlink")]
pub(crate) struct Order {
    /// `pause`, `commit`, `resume` or `meet`.
    #[pyo3(get)]
    kind: &'static str,
    /// Of a pause: what becomes of answers in flight.
    #[pyo3(get)]
    in_flight: Option<String>,
    /// Of a commit.
    #[pyo3(get)]
    update: u64,
    #[pyo3(get)]
    version: u64,
    staged: Option<Arc<Staged>>,
    stream: Option<Arc<Stream>>,
    /// Whom to meet.
    group: Option<TrainerGroup>,
    answer: Mutex<Option<Answer>>,
}

#[pymethods]
impl Order {
    /// Tells that it was done, or that it was not and the old weights are still there, whole. A second word means nothing.
    #[pyo3(signature = (error=None))]
    fn done(&self, error: Option<String>) {
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner).take();
        match answer {
            Some(Answer::Paused(done)) => done(),
            Some(Answer::Committed(done)) => done(error.map_or(Ok(()), Err)),
            Some(Answer::Met(done)) => done(Err(error.unwrap_or_else(|| "nothing was found there".to_owned()))),
            None => {}
        }
    }

    /// Of a meeting: the host and port of a trainer's store, this rank, how many ranks there are, and seconds that they may take.
    #[getter]
    fn group(&self) -> Option<(String, u16, u32, u32, f64)> {
        let group = self.group.as_ref()?;
        let within_s = Duration::from_millis(group.timeout_ms).as_secs_f64();
        Some((group.host.clone(), group.port, group.rank, group.ranks, within_s))
    }

    /// Of a meeting: what was found in the store, pickled as it is.
    fn met(&self, name: Vec<u8>) {
        if let Some(Answer::Met(done)) = self.answer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            done(Ok(name));
        }
    }

    /// Of a commit: where the new weights lie, or come to. `None`: they are what the worker was started with.
    fn memory(&self) -> Option<StagedMemory> {
        match &self.stream {
            Some(stream) => Some(StagedMemory(Arc::clone(stream.region()))),
            None => self.staged.as_ref()?.region().map(StagedMemory),
        }
    }

    /// Of a commit: all tensors, whole. Of one whose weights come as they are taken, as they lie in the stream of all bytes.
    fn tensors(&self) -> Vec<Part> {
        let streamed = self.stream.as_ref().map(|stream| stream.manifest());
        let Some(manifest) = streamed.or_else(|| self.staged.as_ref().map(|staged| staged.manifest())) else {
            return Vec::new();
        };
        let all = (0..manifest.tensors().len()).map(|number| (number, manifest.place(number)));
        all.map(|(number, place)| part_of(manifest, number, 0, place.start, place.end)).collect()
    }

    /// Of a commit: its weights come as they are taken, by `arrived`.
    #[getter]
    fn streams(&self) -> bool {
        self.stream.is_some()
    }

    /// The parts of tensors that came next; `None` after the last. Waits for them. Those before are gone.
    fn arrived(&self, py: Python<'_>) -> PyResult<Option<Vec<Part>>> {
        let Some(stream) = &self.stream else { return Ok(None) };
        let next = py.detach(|| stream.next());
        let next = next.map_err(|why| errors::SendError::new_err(format!("new weights did not come: {why}")))?;
        let told = |part: &Arrived| part_of(stream.manifest(), part.tensor, part.skip, part.at, part.at + part.len);
        Ok(next.map(|next| next.iter().map(told).collect()))
    }
}

/// A tensor's name, dtype as safetensors calls it, and shape; and of a part of it, how many bytes of the tensor are before it, and
/// where its first and last byte are in the commit's memory.
type Part = (String, String, Vec<u64>, u64, u64, u64);

fn part_of(manifest: &Manifest, number: usize, skip: u64, start: u64, end: u64) -> Part {
    let tensor = &manifest.tensors()[number];
    (tensor.name.clone(), name_of(&tensor.dtype), tensor.shape.clone(), skip, start, end)
}

/// Memory that new weights lie in. It is valid while this lives.
#[pyclass(frozen, module = "pdlink")]
pub(crate) struct StagedMemory(Arc<Region>);

#[pymethods]
impl StagedMemory {
    #[getter]
    fn address(&self) -> u64 {
        self.0.address()
    }

    #[getter]
    fn bytes(&self) -> u64 {
        self.0.len()
    }

    /// The GPU that it is on, by CUDA's number of it in this process.
    #[getter]
    fn gpu(&self) -> Option<i32> {
        self.0.device().map(|device| device.ordinal())
    }
}

/// A dtype's or mode's name, as it is in configuration and checkpoints.
fn name_of(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Makes orders of what the receiver's thread wants.
struct Target(Mutex<Sender<Order>>);

impl Target {
    fn order(&self, order: Order) {
        // After the worker has closed its receiver nobody carries anything out.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).send(order);
    }
}

fn order(kind: &'static str, answer: Option<Answer>) -> Order {
    let answer = Mutex::new(answer);
    Order { kind, in_flight: None, update: 0, version: 0, staged: None, stream: None, group: None, answer }
}

impl WeightTarget for Target {
    fn pause(&self, in_flight: InFlight, done: Box<dyn FnOnce() + Send>) {
        self.order(Order { in_flight: Some(name_of(&in_flight)), ..order("pause", Some(Answer::Paused(done))) });
    }

    fn commit(&self, weights: NewWeights, done: Box<dyn FnOnce(Result<(), String>) + Send>) {
        let NewWeights { update, version, staged, stream } = weights;
        self.order(Order { update, version, staged, stream, ..order("commit", Some(Answer::Committed(done))) });
    }

    fn resume(&self) {
        self.order(order("resume", None));
    }

    fn meet(&self, group: TrainerGroup, done: Box<dyn FnOnce(Result<Vec<u8>, String>) + Send>) {
        self.order(Order { group: Some(group), ..order("meet", Some(Answer::Met(done))) });
    }
}

/// A running receiver of one rank.
#[pyclass(frozen, module = "pdlink")]
pub(crate) struct WeightReceiver {
    /// Gone after `close`. The listener first: it must not let anybody in who would find nothing.
    running: RwLock<Option<(Option<Listening>, WeightsReceiver)>>,
    orders: Mutex<Receiver<Order>>,
    port: Option<u16>,
}

#[pymethods]
impl WeightReceiver {
    #[new]
    fn new(py: Python<'_>, text: &str) -> PyResult<Self> {
        let given: ReceiverSettings =
            serde_json::from_str(text).map_err(|error| errors::settings("the receiver's settings", &error))?;
        py.detach(|| start(given))
    }

    /// The port of its own listener.
    #[getter]
    fn port(&self) -> Option<u16> {
        self.port
    }

    /// The next order; `None` if there is none within the time. After `close` it raises.
    fn next_order(&self, py: Python<'_>, within_s: f64) -> PyResult<Option<Order>> {
        let within = Duration::try_from_secs_f64(within_s).unwrap_or(Duration::from_secs(3600));
        let taken = py.detach(|| self.orders.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(within));
        match taken {
            Ok(order) => Ok(Some(order)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(errors::ShutDownError::new_err("the weights' receiver is closed"))
            }
        }
    }

    /// Ends it. An update under way is left to the coordinator's deadline.
    fn close(&self, py: Python<'_>) {
        let running = self.running.write().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(running));
    }
}

impl WeightReceiver {
    /// For the control listener of the KV link.
    pub(crate) fn door(&self) -> Option<WeightsDoor> {
        let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(|(_, receiver)| receiver.door())
    }
}

fn start(given: ReceiverSettings) -> PyResult<WeightReceiver> {
    if given.weights.staging == Staging::Device && given.gpu.is_none() {
        let why = "\"device\" is for ranks on a GPU, and this one has none; set it to \"host\"";
        return Err(errors::settings("weights.staging", &why));
    }
    let failed = |error: &dyn std::fmt::Display| errors::StartError::new_err(format!("the weights' receiver: {error}"));
    let secret = settings::secret(given.secret_file.as_ref())?;
    let listener = given.port.map(|port| listen(&given.bind_host, port)).transpose()?;
    let bind = match &listener {
        Some(listener) => listener.local_addr().map_err(|error| failed(&error))?,
        // Only the address counts, for the paths that other workers pull kept weights over.
        None => TcpListener::bind((given.bind_host.as_str(), 0))
            .and_then(|probe| probe.local_addr())
            .map_err(|error| failed(&error))?,
    };
    let bind_ip: IpAddr = bind.ip();
    secret.allowed_on(bind_ip).map_err(|error| errors::secret(&error))?;
    let paths = Paths {
        weights: given.weights,
        kv: given.kv,
        secret: secret.clone(),
        bind: bind_ip,
        advertise_host: given.advertise_host,
        gpu: given.gpu,
        streams: true,
        casts: Arc::default(),
        casts_host: false,
        wrap_path: None,
    };
    let (orders, queue) = channel();
    let setup = ReceiverSetup {
        version: given.version,
        paths,
        target: Arc::new(Target(Mutex::new(orders))),
        base: given.base,
        ranks: given.ranks,
        metrics: WeightsMetrics::unregistered(),
    };
    let receiver = WeightsReceiver::start(setup).map_err(|error| failed(&error))?;
    let port = listener.is_some().then(|| bind.port());
    let listening = listener.map(|listener| Listening::start(receiver.door(), listener, secret));
    let listening = listening.transpose().map_err(|error| failed(&error))?;
    Ok(WeightReceiver { running: RwLock::new(Some((listening, receiver))), orders: Mutex::new(queue), port })
}

fn listen(host: &str, port: u16) -> PyResult<TcpListener> {
    TcpListener::bind((host, port)).map_err(|error| {
        errors::AddressError::new_err(format!(
            "cannot listen for orders about weights on {host}:{port}: {error}; name a free port for each rank in `ports` of \
             PDLINK_WEIGHTS"
        ))
    })
}
