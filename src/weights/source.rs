//! Gives weights to receivers: packs them bucket by bucket from where they lie, or has them whole in memory already.
//!
//! One task owns a source. Receivers come over control connections and pull the bytes over a path; `ring` says when a
//! bucket may be packed over an older one. What is packed is digested on the way (WT-5), so nothing is read twice.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::Staged;
use super::digest::{StreamDigests, TensorDigest};
use super::manifest::{Buckets, Manifest, Tensor};
use super::messages::{Ask, Head, Join, PART_TENSORS, Ready, Said, Taken};
use super::ring::Ring;
use super::tensors::{TensorBytes, lay};
use crate::config::{KvConfig, WeightsConfig};
use crate::control::{Answerer, Connection, ControlError, Inbound, Message, Sink, from_body, to_body};
use crate::memory::{Region, to_usize};
use crate::security::Secret;
use crate::transport::{self, Transport, TransportError, export_all};

/// Buckets that a sender has memory for: one is packed while receivers pull the other.
const SLOTS: u64 = 2;

/// How paths between senders and receivers of weights are opened.
#[derive(Clone)]
pub struct Paths {
    pub weights: WeightsConfig,
    /// For what the paths themselves can be told: streams, threads, how long a copy may stall.
    pub kv: KvConfig,
    pub secret: Secret,
    /// Where data ports listen, and how peers reach them.
    pub bind: IpAddr,
    pub advertise_host: String,
    /// Put around each path: how tests make paths go wrong.
    #[doc(hidden)]
    pub wrap_path: Option<WrapPath>,
}

/// Makes one path of another.
#[doc(hidden)]
pub type WrapPath = Arc<dyn Fn(Arc<dyn Transport>) -> Arc<dyn Transport> + Send + Sync>;

impl Paths {
    /// Opens every allowed path to `region`.
    pub(super) fn open(&self, region: &Arc<Region>) -> Result<Vec<Arc<dyn Transport>>, TransportError> {
        let kv = KvConfig { paths: Some(self.weights.paths.clone()), ..self.kv.clone() };
        let regions = [Arc::clone(region)];
        let opened = transport::offers(&transport::Setup {
            config: &kv,
            regions: &regions,
            secret: &self.secret,
            bind: self.bind,
            advertise_host: &self.advertise_host,
        })?;
        Ok(match &self.wrap_path {
            Some(wrap) => opened.into_iter().map(|path| wrap(path)).collect(),
            None => opened,
        })
    }
}

/// Why a source cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("no memory for {bytes} bytes of buckets: {why}")]
    Memory { bytes: u64, why: std::io::Error },
    #[error("cannot open a path for weights: {0}")]
    Paths(#[from] TransportError),
}

/// How far a sender is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that every receiver has, of how many.
    pub sent_bytes: u64,
    pub total_bytes: u64,
    /// Receivers that have come, of how many; unknown until the first came.
    pub joined: u32,
    pub receivers: Option<u32>,
    /// Why no more can be sent.
    pub failed: Option<String>,
}

/// A handle on a source, which ends when all handles and connections are gone.
#[derive(Clone)]
pub struct Source {
    events: mpsc::UnboundedSender<Event>,
    numbers: Arc<AtomicU64>,
    progress: watch::Receiver<Progress>,
}

enum Event {
    Up { visitor: u64, connection: Connection },
    From { visitor: u64, inbound: Inbound },
    Packed(Packed),
}

/// A bucket that was packed, or could not be.
struct Packed {
    digests: StreamDigests,
    result: Result<(), String>,
}

/// A source's task, to be run until it ends.
pub type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Source {
    /// A sender that packs `bytes` into buckets, one after the other, for receivers that go along together.
    pub fn packing(version: u64, bytes: Arc<dyn TensorBytes>, paths: &Paths) -> Result<(Self, Running), SourceError> {
        let stream_bytes = bytes.manifest().stream_bytes();
        let buckets = Buckets::new(stream_bytes, paths.weights.bucket_bytes.min(stream_bytes));
        let memory_bytes = buckets.bucket_bytes() * SLOTS.min(buckets.count());
        let failed = |why| SourceError::Memory { bytes: memory_bytes, why };
        let region = Region::shared(to_usize(memory_bytes)).map_err(failed)?;
        let ring = Ring::new(buckets.count(), SLOTS);
        let store =
            Store::Ring { ring, bytes: Arc::clone(&bytes), digests: Some(StreamDigests::default()), done: Vec::new() };
        Self::start(version, buckets, bytes.manifest(), region, store, paths)
    }

    /// Weights that lie in `region` whole, for receivers that come one by one.
    pub(super) fn whole(
        version: u64,
        staged: &Arc<Staged>,
        region: &Arc<Region>,
        paths: &Paths,
    ) -> Result<(Self, Running), SourceError> {
        let buckets = Buckets::new(staged.manifest().stream_bytes(), paths.weights.bucket_bytes);
        let store = Store::Whole(Arc::clone(staged));
        Self::start(version, buckets, staged.manifest(), Arc::clone(region), store, paths)
    }

    fn start(
        version: u64,
        buckets: Buckets,
        manifest: &Arc<Manifest>,
        region: Arc<Region>,
        store: Store,
        paths: &Paths,
    ) -> Result<(Self, Running), SourceError> {
        let (events, queue) = mpsc::unbounded_channel();
        let transports = paths.open(&region)?;
        let total_bytes = manifest.stream_bytes();
        let (shown, progress) = watch::channel(Progress { total_bytes, ..Progress::default() });
        let driver = Driver {
            version,
            transports,
            manifest: Arc::clone(manifest),
            buckets,
            region,
            store,
            visitors: HashMap::new(),
            waiting: Vec::new(),
            failed: None,
            events: events.downgrade(),
            packing: JoinSet::new(),
            shown,
        };
        Ok((Self { events, numbers: Arc::default(), progress }, Box::pin(driver.run(queue))))
    }

    /// Where a receiver's messages go: for a control listener's welcome.
    pub fn welcome(&self, connection: &Connection) -> Sink {
        let visitor = self.numbers.fetch_add(1, Relaxed);
        let events = self.events.clone();
        let _ = events.send(Event::Up { visitor, connection: connection.clone() });
        Box::new(move |inbound| drop(events.send(Event::From { visitor, inbound })))
    }

    /// How far the sending is; changes as it goes.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

/// Where the buckets come from.
enum Store {
    /// `digests` are away while a bucket is being packed; `done` is what they said of the buckets before.
    Ring {
        ring: Ring,
        bytes: Arc<dyn TensorBytes>,
        digests: Option<StreamDigests>,
        done: Vec<TensorDigest>,
    },
    Whole(Arc<Staged>),
}

struct Visitor {
    connection: Connection,
    receiver: Option<u32>,
}

struct Driver {
    version: u64,
    transports: Vec<Arc<dyn Transport>>,
    manifest: Arc<Manifest>,
    buckets: Buckets,
    region: Arc<Region>,
    store: Store,
    visitors: HashMap<u64, Visitor>,
    /// Asked for and not there yet.
    waiting: Vec<(u64, u64, Answerer)>,
    /// Why no more buckets come.
    failed: Option<String>,
    /// Weak: the source ends when nobody else can send it anything.
    events: mpsc::WeakUnboundedSender<Event>,
    packing: JoinSet<()>,
    shown: watch::Sender<Progress>,
}

impl Driver {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = queue.recv().await {
            match event {
                Event::Up { visitor, connection } => {
                    self.visitors.insert(visitor, Visitor { connection, receiver: None });
                }
                Event::From { visitor, inbound } => self.hear(visitor, inbound),
                Event::Packed(packed) => self.packed(packed),
            }
            self.pack();
            self.show();
        }
        for transport in &self.transports {
            transport.close();
        }
    }

    fn hear(&mut self, visitor: u64, inbound: Inbound) {
        let heard = match inbound {
            Inbound::Request(message, answerer) => self.request(visitor, &message, answerer),
            Inbound::Notice(message) => self.notice(visitor, &message),
            Inbound::Closed(error) => return self.left(visitor, &error),
        };
        if let (Err(why), Some(visitor)) = (heard, self.visitors.get(&visitor)) {
            let peer = visitor.connection.peer().to_owned();
            visitor.connection.close(ControlError::Malformed { peer, why });
        }
    }

    fn request(&mut self, visitor: u64, message: &Message, answerer: Answerer) -> Result<(), String> {
        let said = match from_body(&message.body).map_err(|error| error.to_string())? {
            Ask::Join(join) => self.join(visitor, &join),
            Ask::Tensors(from) => Said::Tensors(self.tensors_from(from)),
            Ask::Bucket(bucket) => return self.bucket(visitor, bucket, answerer),
        };
        answerer.answer(to_body(&said));
        Ok(())
    }

    fn join(&mut self, visitor: u64, join: &Join) -> Said {
        if join.version != self.version {
            let why = format!("version {} is wanted, and version {} is here", join.version, self.version);
            return Said::Refused(why);
        }
        if let Store::Ring { ring, .. } = &mut self.store
            && let Err(error) = ring.join(join.receiver, join.receivers)
        {
            return Said::Refused(error.to_string());
        }
        if let Some(visitor) = self.visitors.get_mut(&visitor) {
            visitor.receiver = Some(join.receiver);
        }
        Said::Head(Head {
            version: self.version,
            tensors: u32::try_from(self.manifest.tensors().len()).expect("bounded when the manifest was made"),
            bucket_bytes: self.buckets.bucket_bytes(),
            offers: export_all(&self.transports),
        })
    }

    fn tensors_from(&self, from: u32) -> Vec<Tensor> {
        self.manifest.tensors().iter().skip(from as usize).take(PART_TENSORS).cloned().collect()
    }

    fn bucket(&mut self, visitor: u64, bucket: u64, answerer: Answerer) -> Result<(), String> {
        let receiver = self.visitors.get(&visitor).and_then(|visitor| visitor.receiver);
        let receiver = receiver.ok_or("a bucket was asked for before joining")?;
        let is_ready = match &self.store {
            Store::Ring { ring, .. } => ring.is_ready(receiver, bucket).map_err(|error| error.to_string())?,
            Store::Whole(_) => bucket < self.buckets.count(),
        };
        match &self.failed {
            Some(why) => answerer.answer(to_body(&Said::Refused(why.clone()))),
            None if is_ready => answerer.answer(to_body(&Said::Ready(self.ready(bucket)))),
            None => self.waiting.push((visitor, bucket, answerer)),
        }
        Ok(())
    }

    fn ready(&self, bucket: u64) -> Ready {
        let (digests, at) = match &self.store {
            Store::Ring { done, .. } => (done.as_slice(), bucket % SLOTS * self.buckets.bucket_bytes()),
            Store::Whole(staged) => (staged.digests(), self.buckets.range(bucket).start),
        };
        let ended = self.manifest.pieces(self.buckets.range(bucket)).filter(|piece| piece.is_last);
        Ready { at, digests: ended.filter_map(|piece| digests.get(piece.tensor).copied()).collect() }
    }

    fn notice(&mut self, visitor: u64, message: &Message) -> Result<(), String> {
        let Taken(bucket) = from_body(&message.body).map_err(|error| error.to_string())?;
        let receiver = self.visitors.get(&visitor).and_then(|visitor| visitor.receiver);
        let receiver = receiver.ok_or("a bucket was taken before joining")?;
        match &mut self.store {
            Store::Ring { ring, .. } => ring.take(receiver, bucket).map_err(|error| error.to_string()),
            Store::Whole(_) => Ok(()),
        }
    }

    fn left(&mut self, visitor: u64, error: &ControlError) {
        let Some(gone) = self.visitors.remove(&visitor) else { return };
        self.waiting.retain(|(waiting, ..)| *waiting != visitor);
        tracing::debug!(peer = gone.connection.peer(), %error, "a receiver of weights left");
        if let (Store::Ring { ring, .. }, Some(receiver)) = (&mut self.store, gone.receiver) {
            ring.leave(receiver);
        }
    }

    /// Packs the next bucket, if there is room for it.
    fn pack(&mut self) {
        let Store::Ring { ring, bytes, digests, .. } = &mut self.store else { return };
        if self.failed.is_some() || digests.is_none() {
            return;
        }
        let Some(bucket) = ring.pack() else { return };
        while self.packing.try_join_next().is_some() {}
        let (bytes, region, manifest) = (Arc::clone(bytes), Arc::clone(&self.region), Arc::clone(&self.manifest));
        let (range, at) = (self.buckets.range(bucket), bucket % SLOTS * self.buckets.bucket_bytes());
        let mut digests = digests.take().expect("looked at above");
        let events = self.events.clone();
        self.packing.spawn_blocking(move || {
            let laid = lay(&*bytes, &range, &region, at).map_err(|error| error.to_string());
            let result = laid.and_then(|()| {
                let passed = digests.pass(&manifest, range, &region, at);
                passed.map(drop).map_err(|error| error.to_string())
            });
            if let Some(events) = events.upgrade() {
                let _ = events.send(Event::Packed(Packed { digests, result }));
            }
        });
    }

    fn packed(&mut self, packed: Packed) {
        let Store::Ring { ring, digests, done, .. } = &mut self.store else { return };
        done.extend_from_slice(&packed.digests.done()[done.len()..]);
        *digests = Some(packed.digests);
        match packed.result {
            Ok(()) => ring.packed(),
            Err(why) => {
                tracing::error!(%why, "weights cannot be sent");
                self.failed = Some(why);
            }
        }
        for (visitor, bucket, answerer) in std::mem::take(&mut self.waiting) {
            if let Err(why) = self.bucket(visitor, bucket, answerer) {
                tracing::debug!(%why, "a receiver of weights is out of turn");
            }
        }
    }

    fn show(&self) {
        let Store::Ring { ring, .. } = &self.store else { return };
        let (receivers, joined) = ring.attendance();
        let sent_bytes = self.buckets.range(ring.taken_by_all()).start;
        let now = Progress {
            sent_bytes,
            total_bytes: self.manifest.stream_bytes(),
            joined,
            receivers,
            failed: self.failed.clone(),
        };
        self.shown.send_if_modified(|shown| {
            let differs = *shown != now;
            *shown = now;
            differs
        });
    }
}
