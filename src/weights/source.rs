//! Gives weights to receivers: packs them bucket by bucket from where they lie, or has them whole in memory already.
//!
//! One task owns a source. Receivers come over control connections and pull the bytes over a path; `ring` says when a
//! bucket may be packed over an older one. What is packed is digested on the way (WT-5), so nothing is read twice.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::Staged;
use super::digest::{StreamDigests, TensorDigest};
use super::manifest::{Buckets, Manifest, Tensor};
use super::messages::{Ask, Bucket, Head, Join, PART_TENSORS, Ready, Said, Taken, Wish};
use super::paths::Paths;
use super::ring::Ring;
use super::seating::Seating;
use super::slots::{SLOTS, Slots};
use super::tensors::{Packer, TensorBytes};
use crate::control::{Answerer, Connection, ControlError, Inbound, Message, Sink, from_body, to_body};
use crate::memory::Region;
use crate::transport::TransportError;

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
    Up {
        visitor: u64,
        connection: Connection,
    },
    From {
        visitor: u64,
        inbound: Inbound,
    },
    Packed(Packed),
    /// A bucket lies in host memory too, or could not be brought there.
    Mirrored(u64, Result<(), String>),
    /// The group is there, or could not be made.
    Made(Result<(), TransportError>),
    /// A broadcast did not end well.
    NotCast(TransportError),
}

/// A bucket that was packed, or could not be.
struct Packed {
    packing: Box<Packing>,
    result: Result<(), String>,
}

/// What goes from bucket to bucket.
#[derive(Default)]
struct Packing {
    packer: Packer,
    digests: StreamDigests,
}

/// A source's task, to be run until it ends.
pub type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Source {
    /// A sender that packs `bytes` into buckets, one after the other, for receivers that go along together.
    pub fn packing(version: u64, bytes: Arc<dyn TensorBytes>, paths: &Paths) -> Result<(Self, Running), SourceError> {
        let stream_bytes = bytes.manifest().stream_bytes();
        let buckets = Buckets::new(stream_bytes, paths.weights.bucket_bytes.min(stream_bytes));
        let slots = Slots::new(&buckets, bytes.device(), paths)?;
        let (ring, manifest) = (Ring::new(buckets.count(), SLOTS), Arc::clone(bytes.manifest()));
        let store = Store::Ring { ring, bytes, packing: Some(Box::default()), done: Vec::new() };
        let seating = Seating::new(paths, &slots.region());
        Ok(Self::start(version, buckets, &manifest, slots, store, seating))
    }

    /// Weights that lie in `region` whole, for receivers that come one by one.
    pub(super) fn whole(
        version: u64,
        staged: &Arc<Staged>,
        region: &Arc<Region>,
        paths: &Paths,
    ) -> Result<(Self, Running), SourceError> {
        let buckets = Buckets::new(staged.manifest().stream_bytes(), paths.weights.bucket_bytes);
        let (slots, store) = (Slots::whole(region, paths)?, Store::Whole(Arc::clone(staged)));
        Ok(Self::start(version, buckets, staged.manifest(), slots, store, None))
    }

    fn start(
        version: u64,
        buckets: Buckets,
        manifest: &Arc<Manifest>,
        slots: Slots,
        store: Store,
        seating: Option<Seating>,
    ) -> (Self, Running) {
        let (events, queue) = mpsc::unbounded_channel();
        let total_bytes = manifest.stream_bytes();
        let (shown, progress) = watch::channel(Progress { total_bytes, ..Progress::default() });
        let driver = Driver {
            version,
            manifest: Arc::clone(manifest),
            buckets,
            slots,
            store,
            seating,
            visitors: HashMap::new(),
            waiting: Vec::new(),
            pulling: BTreeSet::new(),
            failed: None,
            events: events.downgrade(),
            packing: JoinSet::new(),
            shown,
        };
        (Self { events, numbers: Arc::default(), progress }, Box::pin(driver.run(queue)))
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
    /// `packing` is away while a bucket is being packed; `done` is what its digests said of the buckets before.
    Ring {
        ring: Ring,
        bytes: Arc<dyn TensorBytes>,
        packing: Option<Box<Packing>>,
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
    manifest: Arc<Manifest>,
    buckets: Buckets,
    slots: Slots,
    store: Store,
    /// Of a source that may broadcast.
    seating: Option<Seating>,
    visitors: HashMap<u64, Visitor>,
    /// Asked for and not there yet.
    waiting: Vec<(u64, Bucket, Answerer)>,
    /// Receivers that have asked for buckets, and so ask for no seat any more.
    pulling: BTreeSet<u32>,
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
                Event::Mirrored(bucket, result) => {
                    self.slots.mirrored(bucket, result.is_ok());
                    self.failed = self.failed.take().or_else(|| result.err());
                    self.answer_waiting();
                }
                Event::Made(Ok(())) => {
                    if let Some(seating) = &mut self.seating {
                        seating.made();
                    }
                }
                Event::Made(Err(error)) | Event::NotCast(error) => self.not_cast(&error),
            }
            self.pack();
            self.cast();
            self.show();
        }
        let is_sent = match &self.store {
            Store::Ring { ring, .. } => self.failed.is_none() && ring.taken_by_all() == self.buckets.count(),
            Store::Whole(_) => false,
        };
        if let Some(seating) = self.seating.as_mut().filter(|_| is_sent) {
            seating.keep();
        }
        self.slots.close();
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
            Ask::Ended => Said::Ended,
            Ask::Seat(wish) => return self.seat(visitor, wish, answerer),
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
            offers: self.slots.offers(),
        })
    }

    fn tensors_from(&self, from: u32) -> Vec<Tensor> {
        self.manifest.tensors().iter().skip(from as usize).take(PART_TENSORS).cloned().collect()
    }

    fn bucket(&mut self, visitor: u64, bucket: Bucket, answerer: Answerer) -> Result<(), String> {
        let receiver = self.visitors.get(&visitor).and_then(|visitor| visitor.receiver);
        let receiver = receiver.ok_or("a bucket was asked for before joining")?;
        self.pulling.insert(receiver);
        let is_packed = match &self.store {
            Store::Ring { ring, .. } => ring.is_ready(receiver, bucket.number).map_err(|error| error.to_string())?,
            Store::Whole(_) => bucket.number < self.buckets.count(),
        };
        let is_ready = is_packed && (!bucket.on_host || self.slots.has_on_host(bucket.number));
        match &self.failed {
            Some(why) => answerer.answer(to_body(&Said::Refused(why.clone()))),
            None if is_ready => answerer.answer(to_body(&Said::Ready(self.ready(bucket.number)))),
            None => {
                self.waiting.push((visitor, bucket, answerer));
                if is_packed {
                    self.mirror(bucket.number);
                }
            }
        }
        Ok(())
    }

    fn seat(&mut self, visitor: u64, wish: Wish, answerer: Answerer) -> Result<(), String> {
        let receiver = self.visitors.get(&visitor).and_then(|visitor| visitor.receiver);
        let receiver = receiver.ok_or("a seat was asked for before joining")?;
        match &mut self.seating {
            Some(seating) => seating.asked(receiver, wish, answerer),
            None => answerer.answer(to_body(&Said::Seated(None))),
        }
        Ok(())
    }

    /// Makes the group when all have come, and broadcasts what is packed.
    fn cast(&mut self) {
        let (Some(seating), Store::Ring { ring, .. }) = (&mut self.seating, &self.store) else { return };
        let (events, again) = (self.events.clone(), self.events.clone());
        let send = |events: &mpsc::WeakUnboundedSender<Event>, event| {
            if let Some(events) = events.upgrade() {
                let _ = events.send(event);
            }
        };
        seating.decide(ring.attendance().0, self.pulling.len(), || {
            Box::new(move |result| send(&events, Event::Made(result)))
        });
        let (slots, buckets) = (&self.slots, &self.buckets);
        let place = |bucket| (slots.at(bucket), buckets.range(bucket).end - buckets.range(bucket).start);
        seating.post(ring.packed_so_far(), place, || {
            let events = again.clone();
            Box::new(move |result| {
                if let Err(error) = result {
                    send(&events, Event::NotCast(error));
                }
            })
        });
    }

    fn not_cast(&mut self, error: &TransportError) {
        tracing::error!(%error, "weights cannot be broadcast");
        if let Some(seating) = &mut self.seating {
            seating.broke();
        }
        self.failed.get_or_insert_with(|| error.to_string());
        self.answer_waiting();
    }

    /// Brings a bucket that lies on a GPU to where paths of host memory find it.
    fn mirror(&mut self, bucket: u64) {
        let len = self.buckets.range(bucket);
        let Some(mirror) = self.slots.mirror(bucket, len.end - len.start) else { return };
        let events = self.events.clone();
        self.packing.spawn_blocking(move || {
            let result = mirror();
            if let Some(events) = events.upgrade() {
                let _ = events.send(Event::Mirrored(bucket, result));
            }
        });
    }

    fn ready(&self, bucket: u64) -> Ready {
        let (digests, at) = match &self.store {
            Store::Ring { done, .. } => (done.as_slice(), self.slots.at(bucket)),
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
        let Store::Ring { ring, bytes, packing, .. } = &mut self.store else { return };
        if self.failed.is_some() || packing.is_none() {
            return;
        }
        let Some(bucket) = ring.pack() else { return };
        while self.packing.try_join_next().is_some() {}
        let (bytes, region, manifest) = (Arc::clone(bytes), self.slots.region(), Arc::clone(&self.manifest));
        let (range, at) = (self.buckets.range(bucket), self.slots.at(bucket));
        let mut packing = packing.take().expect("looked at above");
        let events = self.events.clone();
        self.packing.spawn_blocking(move || {
            let laid = packing.packer.lay(&*bytes, &range, &region, at).map_err(|error| error.to_string());
            let result = laid.and_then(|()| {
                let passed = packing.digests.pass(&manifest, range, &region, at);
                passed.map(drop).map_err(|error| error.to_string())
            });
            if let Some(events) = events.upgrade() {
                let _ = events.send(Event::Packed(Packed { packing, result }));
            }
        });
    }

    fn packed(&mut self, packed: Packed) {
        let Store::Ring { ring, packing, done, .. } = &mut self.store else { return };
        done.extend_from_slice(&packed.packing.digests.done()[done.len()..]);
        *packing = Some(packed.packing);
        match packed.result {
            Ok(()) => ring.packed(),
            Err(why) => {
                tracing::error!(%why, "weights cannot be sent");
                self.failed = Some(why);
            }
        }
        self.answer_waiting();
    }

    fn answer_waiting(&mut self) {
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
