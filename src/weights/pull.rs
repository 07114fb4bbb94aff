//! Pulls weights from a source, bucket by bucket: one is copied while the next is asked for and the last one is checked.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

use super::digest::{StreamDigests, TensorDigest};
use super::manifest::{Buckets, Manifest, TENSORS_MAX};
use super::messages::{Ask, Head, Join, Ready, Said, Taken};
use super::stage::{Room, Stage, StageError};
use crate::control::{
    Connection, Hello, Identity, Inbound, Liveness, Part, Role, Sink, VERSIONS, connect, connection, from_body, open,
    to_body,
};
use crate::transport::{
    Direction, Link, Offer, Run, RunList, Segment, TransferRequest, Transport, TransportError, connect_best,
};

/// A sender that is packing says nothing for a while, but answers pings.
const LIVENESS: Liveness = Liveness { ping_interval: Duration::from_millis(500), peer_timeout: Duration::from_secs(5) };
/// How long connecting and the handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// An open connection to a source.
pub(super) struct Pull {
    connection: Connection,
    offers: Vec<Offer>,
    deadline: Instant,
    /// Runs the connection; ends with it.
    _driver: JoinSet<()>,
}

/// The path to the source. The link goes before what it was made by.
struct Way {
    link: Arc<dyn Link>,
    _transports: Vec<Arc<dyn Transport>>,
}

type Checking = JoinHandle<Result<StreamDigests, StageError>>;

impl Pull {
    /// Connects and reads the manifest. Also answers the length of the source's buckets.
    pub(super) async fn open(stage: &Stage, address: &str) -> Result<(Self, Manifest, u64), StageError> {
        let hello = Hello {
            part: Part::Weights,
            engine_id: format!("receiver {} of {}", stage.offer.receiver, stage.offer.receivers),
            incarnation: 0,
            role: Role::Both,
            payload: Vec::new(),
        };
        let timeout = CONNECT_TIMEOUT.min(stage.deadline.saturating_duration_since(Instant::now()));
        let identity = Identity { secret: stage.paths.secret.clone(), versions: VERSIONS, hello, timeout };
        let mut stream = connect(address, timeout).await?;
        let (_hello, buffer) = open(&mut stream, &identity, address).await?;
        let ignore = |_: &Connection| -> Sink { Box::new(|_: Inbound| {}) };
        let (connection, driver) = connection(stream, buffer, address.to_owned(), LIVENESS, ignore);
        let mut drivers = JoinSet::new();
        drivers.spawn(driver);
        let mut pull = Self { connection, offers: Vec::new(), deadline: stage.deadline, _driver: drivers };
        let head = pull.join(stage).await?;
        let manifest = pull.manifest(head.tensors).await?;
        pull.offers = head.offers;
        Ok((pull, manifest, head.bucket_bytes))
    }

    fn peer(&self) -> String {
        self.connection.peer().to_owned()
    }

    fn malformed(&self, why: impl Into<String>) -> StageError {
        StageError::Malformed { peer: self.peer(), why: why.into() }
    }

    async fn ask(&self, ask: &Ask) -> Result<Said, StageError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let answer = self.connection.request(to_body(ask), left).await?;
        match from_body(&answer).map_err(|error| self.malformed(error.to_string()))? {
            Said::Refused(why) => Err(StageError::Refused { peer: self.peer(), why }),
            said => Ok(said),
        }
    }

    async fn join(&self, stage: &Stage) -> Result<Head, StageError> {
        let offer = &stage.offer;
        let join = Join { version: offer.version, receiver: offer.receiver, receivers: offer.receivers };
        match self.ask(&Ask::Join(join)).await? {
            Said::Head(head) if head.version == offer.version && head.tensors as usize <= TENSORS_MAX => Ok(head),
            Said::Head(head) => {
                Err(self.malformed(format!("it has version {} of {} tensors", head.version, head.tensors)))
            }
            _ => Err(self.malformed("an answer to another question")),
        }
    }

    async fn manifest(&self, count: u32) -> Result<Manifest, StageError> {
        let mut tensors = Vec::new();
        while tensors.len() < count as usize {
            let from = u32::try_from(tensors.len()).expect("less than a u32 of them");
            match self.ask(&Ask::Tensors(from)).await? {
                Said::Tensors(part) if !part.is_empty() && tensors.len() + part.len() <= count as usize => {
                    tensors.extend(part);
                }
                _ => return Err(self.malformed(format!("its manifest breaks off after {from} of {count} tensors"))),
            }
        }
        Ok(Manifest::new(tensors)?)
    }

    /// Pulls every bucket into `room`, and holds each tensor's digest against the sender's (WT-5).
    pub(super) async fn run(
        &self,
        stage: &Stage,
        manifest: &Arc<Manifest>,
        buckets: Buckets,
        room: &Room,
    ) -> Result<StreamDigests, StageError> {
        let way = self.way(stage, room).await?;
        let mut ready = self.bucket(0).await?;
        let mut checking: Option<Checking> = None;
        for bucket in 0..buckets.count() {
            let copied = self.copied(&*way.link, bucket, buckets, room, ready.at);
            let next =
                async { if bucket + 1 < buckets.count() { self.bucket(bucket + 1).await.map(Some) } else { Ok(None) } };
            let (copied_bytes, next, digests) = tokio::try_join!(copied, next, checked(checking.take()))?;
            stage.progress.bytes.fetch_add(copied_bytes, Relaxed);
            checking = Some(self.check(manifest, buckets, bucket, room, ready.digests, digests));
            match next {
                Some(next) => ready = next,
                None => break,
            }
        }
        checked(checking).await
    }

    async fn way(&self, stage: &Stage, room: &Room) -> Result<Way, StageError> {
        let failed = |why| StageError::Path { peer: self.peer(), why };
        let (paths, region, offers) = (stage.paths.clone(), Arc::clone(&room.region), self.offers.clone());
        let deadline = self.deadline.min(Instant::now() + CONNECT_TIMEOUT);
        let connected = spawn_blocking(move || {
            let transports = paths.open(&region)?;
            let selected = connect_best(&transports, &offers, deadline)?;
            Ok((selected, transports))
        });
        let (selected, transports) = connected.await?.map_err(failed)?;
        for (path, error) in &selected.passed_over {
            tracing::warn!(path = path.name(), %error, "a better path for weights cannot be used");
        }
        tracing::info!(peer = self.peer(), path = selected.path.name(), "path for weights chosen");
        stage.progress.takes(selected.path.name());
        Ok(Way { link: selected.link, _transports: transports })
    }

    async fn bucket(&self, bucket: u64) -> Result<Ready, StageError> {
        match self.ask(&Ask::Bucket(bucket)).await? {
            Said::Ready(ready) => Ok(ready),
            _ => Err(self.malformed("an answer to another question")),
        }
    }

    async fn copied(
        &self,
        link: &dyn Link,
        bucket: u64,
        buckets: Buckets,
        room: &Room,
        at: u64,
    ) -> Result<u64, StageError> {
        let range = buckets.range(bucket);
        if range.is_empty() {
            return Ok(0);
        }
        let run = Run { src: at, dst: room.at(bucket), len: range.end - range.start };
        let runs = RunList { segments: vec![Segment { src_region: 0, dst_region: 0, runs: vec![run] }] };
        let request = TransferRequest { direction: Direction::Pull, runs, grant: None, deadline: self.deadline };
        let (done, completion) = oneshot::channel();
        link.submit(request, Box::new(move |result| drop(done.send(result))));
        let result = completion.await.unwrap_or(Err(TransportError::Cancelled));
        let failed = |why| StageError::Copy { peer: self.peer(), bucket, buckets: buckets.count(), why };
        let copied = result.map_err(failed)?;
        self.connection.notify(to_body(&Taken(bucket)))?;
        Ok(copied.bytes)
    }

    /// Digests a bucket beside the loop.
    fn check(
        &self,
        manifest: &Arc<Manifest>,
        buckets: Buckets,
        bucket: u64,
        room: &Room,
        want: Vec<TensorDigest>,
        mut digests: StreamDigests,
    ) -> Checking {
        let (manifest, region, at, peer) =
            (Arc::clone(manifest), Arc::clone(&room.region), room.at(bucket), self.peer());
        spawn_blocking(move || {
            let before = digests.done().len();
            let got = digests.pass(&manifest, buckets.range(bucket), &region, at)?;
            if got.len() != want.len() {
                let why = format!("{} digests for the {} tensors that end in bucket {bucket}", want.len(), got.len());
                return Err(StageError::Malformed { peer, why });
            }
            if let Some(differs) = got.iter().zip(&want).position(|(got, want)| got != want) {
                return Err(StageError::Digest { peer, tensor: manifest.tensors()[before + differs].name.clone() });
            }
            Ok(digests)
        })
    }
}

/// The digests so far, once the bucket before has been checked.
async fn checked(checking: Option<Checking>) -> Result<StreamDigests, StageError> {
    match checking {
        Some(checking) => checking.await?,
        None => Ok(StreamDigests::default()),
    }
}
