//! Pulls weights from a source, bucket by bucket: one is copied while the next is asked for and the last one is checked.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

use super::casts::Held;
use super::digest::{StreamDigests, TensorDigest};
use super::manifest::{Buckets, Manifest, TENSORS_MAX};
use super::messages::{Ask, Bucket, Head, Join, Ready, Said, Taken};
use super::paths::{Paths, of_kind};
use super::room::Room;
use super::stage::{Stage, StageError};
use crate::config::{KvMemory, Path};
use crate::control::{
    Connection, Hello, Identity, Inbound, Liveness, Part, Role, Sink, VERSIONS, connect, connection, from_body, open,
    to_body,
};
use crate::memory::Region;
use crate::transport::{
    Caster, Direction, Link, Offer, Run, RunList, Seat, Segment, TransferRequest, Transport, TransportError,
    casts_here, connect_best,
};

/// A sender that is packing says nothing for a while, but answers pings.
const LIVENESS: Liveness = Liveness { ping_interval: Duration::from_millis(500), peer_timeout: Duration::from_secs(5) };
/// How long connecting and the handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a source is waited for once everything is here.
const FAREWELL_MAX: Duration = Duration::from_secs(2);

/// An open connection to a source.
pub(super) struct Pull {
    connection: Connection,
    offers: Vec<Offer>,
    deadline: Instant,
    stall_max: Duration,
    /// Runs the connection; ends with it.
    _driver: JoinSet<()>,
}

/// What brings the bytes.
enum Carrier {
    /// Goes before what it was made by.
    Link(Arc<dyn Link>, #[expect(dead_code, reason = "kept as long as the link")] Vec<Arc<dyn Transport>>),
    Group(Held),
}

/// The way from the source.
struct Way {
    carrier: Carrier,
    name: &'static str,
    /// The path moves host memory.
    on_host: bool,
    /// Where it writes, if that is not where bytes are staged: two buckets.
    landing: Option<Arc<Region>>,
}

impl Way {
    /// Where it writes a bucket.
    fn at(&self, bucket: u64, room: &Room) -> u64 {
        if self.landing.is_some() { room.in_two(bucket) } else { room.at(bucket) }
    }
}

/// A pull under way.
pub(super) struct Going {
    way: Way,
    digests: StreamDigests,
}

impl Going {
    pub(super) fn digests(&self) -> &[TensorDigest] {
        self.digests.done()
    }
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
        let mut pull = Self {
            connection,
            offers: Vec::new(),
            deadline: stage.deadline,
            stall_max: stage.paths.stall_max(),
            _driver: drivers,
        };
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
        room: &Arc<Room>,
    ) -> Result<Vec<TensorDigest>, StageError> {
        let Going { way, .. } = self.begin(stage, room).await?;
        let mut ready = self.bucket(0, &way).await?;
        let mut checking: Option<Checking> = None;
        for bucket in 0..buckets.count() {
            let copied = self.copied(&way, bucket, buckets, room, ready.at);
            let next = async {
                if bucket + 1 < buckets.count() { self.bucket(bucket + 1, &way).await.map(Some) } else { Ok(None) }
            };
            let (copied_bytes, next, digests) = tokio::try_join!(copied, next, checked(checking.take()))?;
            stage.progress.bytes.fetch_add(copied_bytes, Relaxed);
            let landed = way.landing.clone().map(|landing| (landing, way.at(bucket, room)));
            checking =
                Some(self.check(manifest, buckets.range(bucket), (bucket, room, landed), ready.digests, digests));
            match next {
                Some(next) => ready = next,
                None => break,
            }
        }
        let going = Going { way, digests: checked(checking).await? };
        let digests = going.digests().to_vec();
        self.end(going, stage).await;
        Ok(digests)
    }

    /// It ended well: the source is told, and a group is there for the next time.
    pub(super) async fn end(&self, going: Going, stage: &Stage) {
        // Before the connection goes, with what is on its way. That the source has gone already harms nobody any more.
        let farewell = self.connection.request(to_body(&Ask::Ended), FAREWELL_MAX);
        if let Err(error) = farewell.await {
            tracing::debug!(peer = self.peer(), %error, "the source was gone when all had come");
        }
        if let Carrier::Group(held) = going.way.carrier {
            stage.paths.casts.put(held);
        }
    }

    /// Chooses the way.
    pub(super) async fn begin(&self, stage: &Stage, room: &Arc<Room>) -> Result<Going, StageError> {
        let way = match self.seat(stage, room).await? {
            Some(way) => way,
            None => self.way(stage, room).await?,
        };
        Ok(Going { way, digests: StreamDigests::default() })
    }

    /// One bucket, checked. They have to be asked for in order.
    pub(super) async fn one(
        &self,
        going: Going,
        stage: &Stage,
        manifest: &Arc<Manifest>,
        buckets: Buckets,
        bucket: u64,
        room: &Room,
    ) -> Result<Going, StageError> {
        let Going { way, digests } = going;
        let ready = self.bucket(bucket, &way).await?;
        let copied_bytes = self.copied(&way, bucket, buckets, room, ready.at).await?;
        stage.progress.bytes.fetch_add(copied_bytes, Relaxed);
        let landed = way.landing.clone().map(|landing| (landing, way.at(bucket, room)));
        let digests =
            self.check(manifest, buckets.range(bucket), (bucket, room, landed), ready.digests, digests).await??;
        Ok(Going { way, digests })
    }

    /// A place among those that get the buckets at once, if there is one. Dropping what is answered ends the group.
    async fn seat(&self, stage: &Stage, room: &Arc<Room>) -> Result<Option<Way>, StageError> {
        let paths = &stage.paths;
        let device = paths.device()?;
        let Some(setup) = paths.nccl(device.as_ref()) else { return Ok(None) };
        if let Err(error) = casts_here(&setup) {
            tracing::warn!(%error, "weights are pulled: there is no NCCL here");
            return Ok(None);
        }
        let wish = paths.casts.wish(device.as_ref().map(|device| device.uuid()).transpose()?);
        let group = match self.ask(&Ask::Seat(wish)).await? {
            Said::Seated(Some(group)) => group,
            Said::Seated(None) => return Ok(None),
            _ => return Err(self.malformed("an answer to another question")),
        };
        let failed = |why| StageError::Path { peer: self.peer(), why };
        let held = if group.name.is_empty() {
            paths.casts.take(group.token).ok_or_else(|| self.malformed("it speaks of a group that is not there"))?
        } else {
            drop(paths.casts.take_any());
            let seat =
                Seat { name: group.name, rank: group.rank, ranks: group.ranks, device: device.clone(), greets: false };
            let (done, made) = oneshot::channel();
            let caster =
                Caster::start(&setup, seat, Box::new(move |result| drop(done.send(result)))).map_err(failed)?;
            made.await.unwrap_or(Err(TransportError::Cancelled)).map_err(failed)?;
            Held { token: group.token, caster: Arc::new(caster), members: Vec::new() }
        };
        tracing::info!(peer = self.peer(), rank = group.rank, ranks = group.ranks, "weights come by broadcast");
        stage.progress.takes(Path::Nccl.name());
        let is_there = room.region.device().is_some() == device.is_some();
        let (room, staged) = (Arc::clone(room), device);
        let landing = if is_there { None } else { Some(spawn_blocking(move || room.landing(staged.as_ref())).await??) };
        Ok(Some(Way { carrier: Carrier::Group(held), name: Path::Nccl.name(), on_host: false, landing }))
    }

    async fn way(&self, stage: &Stage, room: &Arc<Room>) -> Result<Way, StageError> {
        let (paths, room, offers) = (stage.paths.clone(), Arc::clone(room), self.offers.clone());
        let deadline = self.deadline.min(Instant::now() + CONNECT_TIMEOUT);
        let peer = self.peer();
        let way = spawn_blocking(move || best_way(&paths, &room, &offers, &peer, deadline)).await??;
        tracing::info!(peer = self.peer(), path = way.name, "path for weights chosen");
        stage.progress.takes(way.name);
        Ok(way)
    }

    async fn bucket(&self, number: u64, way: &Way) -> Result<Ready, StageError> {
        match self.ask(&Ask::Bucket(Bucket { number, on_host: way.on_host })).await? {
            Said::Ready(ready) => Ok(ready),
            _ => Err(self.malformed("an answer to another question")),
        }
    }

    async fn copied(&self, way: &Way, bucket: u64, buckets: Buckets, room: &Room, at: u64) -> Result<u64, StageError> {
        let range = buckets.range(bucket);
        if range.is_empty() {
            return Ok(0);
        }
        let (len, to) = (range.end - range.start, way.at(bucket, room));
        let (done, completion) = oneshot::channel();
        match &way.carrier {
            Carrier::Link(link, _) => {
                let run = Run { src: at, dst: to, len };
                let runs = RunList { segments: vec![Segment::new(0, 0, vec![run])] };
                let request =
                    TransferRequest { direction: Direction::Pull, runs, grant: None, deadline: self.deadline };
                link.submit(request, Box::new(move |result| drop(done.send(result.map(drop)))));
            }
            Carrier::Group(held) => {
                let region = way.landing.as_ref().unwrap_or(&room.region);
                let deadline = self.deadline.min(Instant::now() + self.stall_max);
                held.caster.cast(region, to, len, deadline, Box::new(move |result| drop(done.send(result))));
            }
        }
        let result = completion.await.unwrap_or(Err(TransportError::Cancelled));
        result.map_err(|why| StageError::Copy { peer: self.peer(), bucket, buckets: buckets.count(), why })?;
        self.connection.notify(to_body(&Taken(bucket)))?;
        Ok(len)
    }

    /// Brings a bucket to its place, if it has landed elsewhere, and digests it there, beside the loop.
    fn check(
        &self,
        manifest: &Arc<Manifest>,
        range: Range<u64>,
        (bucket, room, landed): (u64, &Room, Option<(Arc<Region>, u64)>),
        want: Vec<TensorDigest>,
        mut digests: StreamDigests,
    ) -> Checking {
        let (manifest, region, at, peer) =
            (Arc::clone(manifest), Arc::clone(&room.region), room.at(bucket), self.peer());
        spawn_blocking(move || {
            if let Some((landing, from)) = landed {
                landing.copy_to(from, &region, at, range.end - range.start)?;
            }
            let before = digests.done().len();
            let got = digests.pass(&manifest, range, &region, at)?;
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

/// Connects by the best path that both sides have, whatever memory it moves.
fn best_way(paths: &Paths, room: &Room, offers: &[Offer], peer: &str, deadline: Instant) -> Result<Way, StageError> {
    let failed = |why| StageError::Path { peer: peer.to_owned(), why };
    let staged = if room.region.device().is_some() { KvMemory::Gpu } else { KvMemory::Host };
    let mut tried = String::new();
    for kind in paths.kinds() {
        let theirs = of_kind(offers, kind);
        if theirs.is_empty() || paths.that_move(kind).is_empty() {
            continue;
        }
        let landing = match kind {
            _ if kind == staged => None,
            KvMemory::Gpu => Some(room.landing(paths.device()?.as_ref())?),
            _ => Some(room.landing(None)?),
        };
        let connected = paths
            .open(landing.as_ref().unwrap_or(&room.region))
            .and_then(|transports| connect_best(&transports, &theirs, deadline).map(|selected| (selected, transports)));
        match connected {
            Ok((selected, transports)) => {
                for (path, error) in &selected.passed_over {
                    tracing::warn!(path = path.name(), %error, "a better path for weights cannot be used");
                }
                let (link, name, on_host) = (selected.link, selected.path.name(), kind == KvMemory::Host);
                return Ok(Way { carrier: Carrier::Link(link, transports), name, on_host, landing });
            }
            Err(error) => {
                tracing::warn!(peer, %error, "weights cannot come by the paths of one kind of memory");
                tried = format!("{tried}; {error}");
            }
        }
    }
    Err(failed(TransportError::NoCommonPath {
        local: Path::list(paths.weights.paths.iter().copied()),
        remote: Path::list(offers.iter().map(|offer| offer.path)),
        tried,
    }))
}

/// The digests so far, once the bucket before has been checked.
async fn checked(checking: Option<Checking>) -> Result<StreamDigests, StageError> {
    match checking {
        Some(checking) => checking.await?,
        None => Ok(StreamDigests::default()),
    }
}
