//! A trainer's sender of weights: named tensors, packed and digested as workers pull them. They lie in the trainer's memory, or are
//! given one by one as the packer comes to them.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::time::Duration;

use pdlink::config::{KvConfig, WeightsConfig};
use pdlink::memory::{Device, Region};
use pdlink::weights::{Casts, Dtype, Due, Gathered, Manifest, Paths, Progress, ReadError, Sender, Tensor, TensorBytes};
use pyo3::prelude::*;
use serde::Deserialize;

use crate::{errors, regions, settings};

/// As the package's own code writes them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SenderSettings {
    version: u64,
    host: String,
    /// 0 takes a free one.
    port: u16,
    /// None: the well-known secret, for loopback only.
    secret_file: Option<PathBuf>,
    weights: WeightsConfig,
    /// `[kv]`, for what the paths of weights can be told.
    kv: KvConfig,
}

/// The group that this process broadcasts to: it outlives each sender, for to make one takes a second.
static CASTS: LazyLock<Arc<Casts>> = LazyLock::new(Arc::default);

/// One tensor: its name, its dtype as safetensors calls it, its shape, and its memory.
type Given = (String, String, Vec<u64>, regions::Memory);

/// The same without its memory.
type Described = (String, String, Vec<u64>);

fn tensor((name, dtype, shape): Described) -> PyResult<Tensor> {
    let dtype: Dtype = serde_json::from_value(dtype.into())
        .map_err(|error| errors::settings(&format!("the dtype of tensor `{name}`"), &error))?;
    Ok(Tensor { name, dtype, shape })
}

fn manifest(tensors: Vec<Tensor>) -> PyResult<Manifest> {
    Manifest::new(tensors).map_err(|error| errors::settings("the tensors", &error))
}

/// A trainer's tensors. Their memory is borrowed until the sender ends.
struct Tensors {
    manifest: Arc<Manifest>,
    /// In the manifest's order; none of a tensor without elements.
    regions: Vec<Option<Arc<Region>>>,
    /// That all of them lie on.
    gpu: Option<Arc<Device>>,
}

impl Tensors {
    fn borrow(mut given: Vec<Given>) -> PyResult<Self> {
        given.sort_by(|one, other| one.0.cmp(&other.0));
        let (mut tensors, mut regions) = (Vec::with_capacity(given.len()), Vec::with_capacity(given.len()));
        for (name, dtype, shape, memory) in given {
            let tensor = tensor((name, dtype, shape))?;
            if tensor.bytes() != u64::try_from(memory.1).ok() {
                let why = format!("it has {} bytes, its shape and dtype say {:?}", memory.1, tensor.bytes());
                return Err(errors::settings(&format!("tensor `{}`", tensor.name), &why));
            }
            regions.push(if memory.1 == 0 { None } else { regions::borrow(vec![memory])?.pop() });
            tensors.push(tensor);
        }
        let manifest = manifest(tensors)?;
        let mut gpus = regions.iter().flatten().map(|region: &Arc<Region>| region.device());
        let first = gpus.next().flatten().cloned();
        let is_one = gpus.all(|gpu| gpu.map(|gpu| gpu.ordinal()) == first.as_ref().map(|gpu| gpu.ordinal()));
        Ok(Self { manifest: Arc::new(manifest), regions, gpu: first.filter(|_| is_one) })
    }
}

impl TensorBytes for Tensors {
    fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError> {
        let Some(own) = &self.regions[tensor] else { return Ok(()) };
        own.copy_to(skip, region, at, len).map_err(|error| ReadError {
            tensor: self.manifest.tensors()[tensor].name.clone(),
            from: "the trainer's memory".to_owned(),
            why: error.to_string(),
        })
    }

    fn device(&self) -> Option<&Arc<Device>> {
        self.gpu.as_ref()
    }

    fn on_gpu(&self, tensor: usize) -> Option<Arc<Region>> {
        self.regions[tensor].clone()
    }
}

/// A running sender. `close` ends it and lets go of the tensors' memory.
#[pyclass(frozen, module = "pdlink")]
pub(crate) struct WeightSender {
    /// Gone after `close`.
    sender: RwLock<Option<Sender>>,
    address: String,
    progress: tokio::sync::watch::Receiver<Progress>,
    /// Of a sender that is given its tensors.
    gathered: Option<Arc<Gathered>>,
}

#[pymethods]
impl WeightSender {
    #[new]
    fn new(py: Python<'_>, text: &str, tensors: Vec<Given>) -> PyResult<Self> {
        let settings = read(text)?;
        let tensors = Arc::new(Tensors::borrow(tensors)?);
        py.detach(|| start(settings, tensors, None))
    }

    /// A sender of tensors that are only described, and are given when they are due. `gpu` is where all of them will lie, if they will.
    #[staticmethod]
    #[pyo3(signature = (text, tensors, gpu=None))]
    fn gathering(py: Python<'_>, text: &str, mut tensors: Vec<Described>, gpu: Option<i32>) -> PyResult<Self> {
        let settings = read(text)?;
        tensors.sort_by(|one, other| one.0.cmp(&other.0));
        let manifest = manifest(tensors.into_iter().map(tensor).collect::<PyResult<_>>()?)?;
        let device = gpu.map(Device::open).transpose().map_err(|error| errors::settings("the tensors' GPU", &error))?;
        let gathered = Arc::new(Gathered::new(manifest, device, settings.weights.bucket_bytes));
        py.detach(|| start(settings, Arc::clone(&gathered) as Arc<dyn TensorBytes>, Some(gathered)))
    }

    /// How many tensors each part has: those that begin in one bucket, in the order of their names.
    fn parts(&self) -> PyResult<Vec<usize>> {
        Ok(self.gathered()?.parts())
    }

    /// Waits until the next tensor is to be given: `now`, or not within this time: `early`, or never: `ended`.
    fn wait_until_due(&self, py: Python<'_>, within_s: f64) -> PyResult<&'static str> {
        let gathered = self.gathered()?;
        let within = Duration::try_from_secs_f64(within_s).map_err(|error| errors::settings("within_s", &error))?;
        Ok(match py.detach(|| gathered.wait_until_due(within)) {
            Due::Now => "now",
            Due::Early => "early",
            Due::Ended => "ended",
        })
    }

    /// Gives the next tensor, whose memory is borrowed until the packer is past it. False: the sender has ended.
    fn give(&self, name: &str, memory: regions::Memory) -> PyResult<bool> {
        let gathered = self.gathered()?;
        let region = if memory.1 == 0 { None } else { regions::borrow(vec![memory])?.pop() };
        gathered.give(name, region).map_err(|error| errors::settings("a tensor", &error))
    }

    /// No more tensors come: workers are told why.
    fn fail(&self, why: &str) -> PyResult<()> {
        self.gathered()?.fail(why);
        Ok(())
    }

    /// `host:port`, as workers are told.
    #[getter]
    fn address(&self) -> &str {
        &self.address
    }

    /// Bytes that every worker has, bytes in all, workers that have come.
    fn progress(&self) -> (u64, u64, u32) {
        let now = self.progress.borrow();
        (now.sent_bytes, now.total_bytes, now.joined)
    }

    fn close(&self, py: Python<'_>) {
        let sender = self.sender.write().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(sender));
    }
}

impl WeightSender {
    fn gathered(&self) -> PyResult<&Arc<Gathered>> {
        let has = || errors::settings("the sender", &"it was made with its tensors' memory, and is given none");
        self.gathered.as_ref().ok_or_else(has)
    }
}

fn read(text: &str) -> PyResult<SenderSettings> {
    serde_json::from_str(text).map_err(|error| errors::settings("the sender's settings", &error))
}

fn start(
    given: SenderSettings,
    tensors: Arc<dyn TensorBytes>,
    gathered: Option<Arc<Gathered>>,
) -> PyResult<WeightSender> {
    let SenderSettings { version, host, port, secret_file, weights, kv } = given;
    let listener = TcpListener::bind((host.as_str(), port)).map_err(|error| {
        errors::AddressError::new_err(format!("cannot listen for workers on {host}:{port}: {error}"))
    })?;
    let failed = |error: &dyn std::fmt::Display| errors::SendError::new_err(error.to_string());
    let paths = Paths {
        weights,
        kv,
        secret: settings::secret(secret_file.as_ref())?,
        bind: listener.local_addr().map_err(|error| failed(&error))?.ip(),
        advertise_host: host,
        gpu: tensors.device().map(|gpu| gpu.ordinal()),
        streams: false,
        casts: Arc::clone(&CASTS),
        casts_host: false,
        wrap_path: None,
    };
    let sender = Sender::start(version, tensors, &paths, listener).map_err(|error| failed(&error))?;
    let (address, progress) = (sender.address().to_owned(), sender.progress());
    Ok(WeightSender { sender: RwLock::new(Some(sender)), address, progress, gathered })
}
