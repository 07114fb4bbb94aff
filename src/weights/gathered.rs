//! Tensors that come one by one while they are sent: of a trainer that has none of them whole until its ranks gather it.
//!
//! The manifest is known from the start. The packer says which range of the stream it is about to pack, lets go of what lies
//! before it, and waits for what is missing; the giving side gathers what is *due*: what begins before the end of that range, or
//! in the bucket after it. Thus what is held is what overlaps one bucket, and what begins in the next. Either side may end, and
//! wakes the other.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::manifest::{Buckets, Manifest};
use super::tensors::{ReadError, TensorBytes};
use crate::memory::{Device, Region};

/// Where a trainer's tensors are put as they are gathered, in the order of the manifest.
pub struct Gathered {
    manifest: Arc<Manifest>,
    device: Option<Arc<Device>>,
    buckets: Buckets,
    shelf: Mutex<Shelf>,
    changed: Condvar,
}

/// What is there of the tensors, and how far the packer is.
#[derive(Default)]
struct Shelf {
    /// The next tensor to be given.
    next: usize,
    /// Those before it that are held. A tensor without bytes has no memory.
    held: VecDeque<Option<Arc<Region>>>,
    /// End of the range that the packer wants.
    wanted_end: u64,
    /// Why nothing more comes.
    ended: Option<String>,
}

/// Whether the next tensors are to be gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    Now,
    /// The packer is not near enough.
    Early,
    /// Nobody wants them any more.
    Ended,
}

/// A tensor that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GiveError {
    #[error("tensor `{name}` was given where {due} is due: tensors come in the order of their names, each once")]
    Order { name: String, due: String },
    #[error("tensor `{name}` was given with {given} bytes, {described} were described")]
    Length { name: String, given: u64, described: u64 },
    #[error("tensor `{name}` was given {given}, all tensors were described as on GPU {described}")]
    Elsewhere { name: String, given: String, described: i32 },
}

impl Gathered {
    /// `device` is the GPU that all of them will lie on, if they will; `bucket_bytes` is what the sender cuts the stream into.
    pub fn new(manifest: Manifest, device: Option<Arc<Device>>, bucket_bytes: u64) -> Self {
        let buckets = Buckets::new(manifest.stream_bytes(), bucket_bytes.min(manifest.stream_bytes()));
        Self { manifest: Arc::new(manifest), device, buckets, shelf: Mutex::default(), changed: Condvar::new() }
    }

    /// The tensors in parts, each of those that begin in one bucket: how many each part has.
    pub fn parts(&self) -> Vec<usize> {
        let last = self.buckets.count() - 1;
        let bucket_of = |tensor: &usize| (self.manifest.place(*tensor).start / self.buckets.bucket_bytes()).min(last);
        let tensors: Vec<usize> = (0..self.manifest.tensors().len()).collect();
        tensors.chunk_by(|one, other| bucket_of(one) == bucket_of(other)).map(<[usize]>::len).collect()
    }

    /// Waits until the next tensor is due, for `within` at most.
    pub fn wait_until_due(&self, within: Duration) -> Due {
        let shelf = self.shelf();
        let waited = self.changed.wait_timeout_while(shelf, within, |shelf| self.due(shelf) == Due::Early);
        self.due(&waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    fn due(&self, shelf: &Shelf) -> Due {
        let is_given = shelf.next == self.manifest.tensors().len();
        match shelf.ended {
            Some(_) => Due::Ended,
            None if is_given
                || self.manifest.place(shelf.next).start < shelf.wanted_end + self.buckets.bucket_bytes() =>
            {
                Due::Now
            }
            None => Due::Early,
        }
    }

    /// Takes the next tensor. It is held until the packer is past it. `false`: nobody wants it any more.
    pub fn give(&self, name: &str, region: Option<Arc<Region>>) -> Result<bool, GiveError> {
        let mut shelf = self.shelf();
        if shelf.ended.is_some() {
            return Ok(false);
        }
        self.check(shelf.next, name, region.as_deref())?;
        shelf.next += 1;
        shelf.held.push_back(region);
        drop(shelf);
        self.changed.notify_all();
        Ok(true)
    }

    fn check(&self, next: usize, name: &str, region: Option<&Region>) -> Result<(), GiveError> {
        let name = name.to_owned();
        let due = self.manifest.tensors().get(next).map(|tensor| &tensor.name);
        if due != Some(&name) {
            let due = due.map_or_else(|| "nothing more".to_owned(), |due| format!("`{due}`"));
            return Err(GiveError::Order { name, due });
        }
        let (place, given) = (self.manifest.place(next), region.map_or(0, Region::len));
        let described = place.end - place.start;
        if given != described {
            return Err(GiveError::Length { name, given, described });
        }
        let (Some(device), Some(region)) = (&self.device, region) else { return Ok(()) };
        match region.device().map(|own| own.ordinal()) {
            Some(own) if own == device.ordinal() => Ok(()),
            own => {
                let given = own.map_or_else(|| "in host memory".to_owned(), |own| format!("on GPU {own}"));
                Err(GiveError::Elsewhere { name, given, described: device.ordinal() })
            }
        }
    }

    /// Nothing more comes. Whoever waits is told why, the first time that this is called.
    pub fn fail(&self, why: &str) {
        let mut shelf = self.shelf();
        shelf.ended.get_or_insert_with(|| why.to_owned());
        let held = std::mem::take(&mut shelf.held);
        drop(shelf);
        self.changed.notify_all();
        drop(held);
    }

    fn held(&self, tensor: usize) -> Option<Arc<Region>> {
        self.shelf().held(tensor)
    }

    fn error(&self, tensor: usize, why: String) -> ReadError {
        let tensor = self.manifest.tensors().get(tensor).map(|tensor| tensor.name.clone()).unwrap_or_default();
        ReadError { tensor, from: "the ranks of the trainer".to_owned(), why }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn held(&self, tensor: usize) -> Option<Arc<Region>> {
        let first = self.next - self.held.len();
        self.held.get(tensor.checked_sub(first)?)?.clone()
    }

    /// Yields what ends before `start` of the stream.
    fn take_before(&mut self, manifest: &Manifest, start: u64) -> VecDeque<Option<Arc<Region>>> {
        let first = self.next - self.held.len();
        let past = (first..self.next).take_while(|&tensor| manifest.place(tensor).end <= start).count();
        let rest = self.held.split_off(past);
        std::mem::replace(&mut self.held, rest)
    }
}

impl TensorBytes for Gathered {
    fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError> {
        let Some(own) = self.held(tensor) else { return Err(self.error(tensor, "it is not held".to_owned())) };
        own.copy_to(skip, region, at, len).map_err(|error| self.error(tensor, error.to_string()))
    }

    fn device(&self) -> Option<&Arc<Device>> {
        self.device.as_ref()
    }

    fn on_gpu(&self, tensor: usize) -> Option<Arc<Region>> {
        self.held(tensor)
    }

    fn attend(&self, range: &Range<u64>) -> Result<(), ReadError> {
        let needed = self.manifest.begun_by(range.end);
        // Gone before anything more is due: the two are never there together.
        let past = self.shelf().take_before(&self.manifest, range.start);
        drop(past);
        let mut shelf = self.shelf();
        shelf.wanted_end = shelf.wanted_end.max(range.end);
        self.changed.notify_all();
        let lacks = |shelf: &mut Shelf| shelf.next < needed && shelf.ended.is_none();
        let shelf = self.changed.wait_while(shelf, lacks).unwrap_or_else(PoisonError::into_inner);
        let next = shelf.next;
        let ended = shelf.ended.clone();
        drop(shelf);
        ended.map_or(Ok(()), |why| Err(self.error(next, why)))
    }

    fn close(&self) {
        self.fail("the sender has ended");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::manifest::{Dtype, Tensor};
    use super::*;

    /// How long a test waits for what must come.
    const PATIENCE: Duration = Duration::from_secs(20);
    const NOW: Duration = Duration::ZERO;

    /// Tensors of bytes `a`, `b`, ... of these sizes, sent in buckets of 512 bytes.
    fn gathered(sizes: &[u64]) -> Arc<Gathered> {
        let tensor = |(name, &size): (char, &u64)| Tensor { name: name.into(), dtype: Dtype::U8, shape: vec![size] };
        let manifest = Manifest::new(('a'..).zip(sizes).map(tensor).collect()).unwrap();
        Arc::new(Gathered::new(manifest, None, 512))
    }

    fn memory(len: usize, byte: u8) -> Option<Arc<Region>> {
        let region = Region::shared(len).unwrap();
        region.copy_in(0, &vec![byte; len]).unwrap();
        Some(region)
    }

    /// Attends on a thread, and says what came of it.
    fn attending(gathered: &Arc<Gathered>, range: Range<u64>) -> mpsc::Receiver<Result<(), ReadError>> {
        let (said, hear) = mpsc::channel();
        let gathered = Arc::clone(gathered);
        std::thread::spawn(move || said.send(gathered.attend(&range)));
        hear
    }

    fn due_at(gathered: &Gathered, wanted_end: u64) -> Due {
        gathered.shelf().wanted_end = wanted_end;
        gathered.wait_until_due(NOW)
    }

    #[test]
    fn parts_are_the_tensors_that_begin_in_one_bucket() {
        // At 0, 256, 512 (as long as three buckets), 2048, and one without bytes at the very end.
        assert_eq!(gathered(&[100, 256, 1400, 512, 0]).parts(), [2, 1, 2]);
        assert_eq!(gathered(&[0]).parts(), [1]);
    }

    #[test]
    fn a_tensor_is_due_when_the_packer_is_a_bucket_away() {
        let gathered = gathered(&[512, 512, 512, 100]);
        assert_eq!(gathered.wait_until_due(NOW), Due::Now, "the first bucket, before anybody asks");
        assert_eq!(gathered.give("a", memory(512, 1)), Ok(true));
        assert_eq!(gathered.wait_until_due(NOW), Due::Early);
        assert_eq!(due_at(&gathered, 512), Due::Now);
        assert_eq!(gathered.give("b", memory(512, 2)), Ok(true));
        assert_eq!(gathered.wait_until_due(NOW), Due::Early);
        assert_eq!(due_at(&gathered, 1024), Due::Now);
    }

    #[test]
    fn the_packer_waits_for_what_overlaps_its_range_and_lets_go_of_what_is_before() {
        let gathered = gathered(&[300, 700, 300]);
        let first = memory(300, 1).unwrap();
        assert_eq!(gathered.give("a", Some(Arc::clone(&first))), Ok(true));
        // `b` begins in the first bucket, which ends within it.
        let hear = attending(&gathered, 0..512);
        assert_eq!(gathered.give("b", memory(700, 2)), Ok(true));
        assert_eq!(hear.recv_timeout(PATIENCE).unwrap(), Ok(()));
        let bucket = Region::shared(512).unwrap();
        gathered.read(0, 0, 300, &bucket, 0).unwrap();
        assert_eq!(bucket.to_vec(0, 300).unwrap(), [1; 300]);
        assert!(gathered.on_gpu(1).is_some() && gathered.on_gpu(2).is_none());

        let hear = attending(&gathered, 512..1024);
        assert_eq!(hear.recv_timeout(PATIENCE).unwrap(), Ok(()));
        assert_eq!(gathered.shelf().held.len(), 1, "`a` is past, `b` goes on");
        assert_eq!(Arc::strong_count(&first), 1, "nobody has it any more");
        assert!(
            gathered.read(0, 0, 1, &bucket, 0).unwrap_err().to_string().contains("`a` from the ranks of the trainer")
        );
        assert_eq!(gathered.give("c", memory(300, 3)), Ok(true));
        assert_eq!(attending(&gathered, 1024..1580).recv_timeout(PATIENCE).unwrap(), Ok(()));
        assert_eq!(gathered.wait_until_due(NOW), Due::Now, "there is nothing to wait for");
    }

    #[test]
    fn what_is_past_is_gone_before_more_is_due() {
        let gathered = gathered(&[512, 512, 512]);
        let first = memory(512, 1).unwrap();
        assert_eq!(gathered.give("a", Some(Arc::clone(&first))), Ok(true));
        let packer = attending(&gathered, 512..1024);
        assert_eq!(gathered.give("b", memory(512, 2)), Ok(true));
        // `c` is due as soon as the packer has said where it is.
        assert_eq!(gathered.wait_until_due(PATIENCE), Due::Now);
        assert_eq!(Arc::strong_count(&first), 1);
        assert_eq!(packer.recv_timeout(PATIENCE).unwrap(), Ok(()));
    }

    #[test]
    fn tensors_without_bytes_at_the_end_are_waited_for_too() {
        let gathered = gathered(&[512, 0]);
        assert_eq!(gathered.give("a", memory(512, 1)), Ok(true));
        let hear = attending(&gathered, 0..512);
        assert_eq!(gathered.give("b", None), Ok(true));
        assert_eq!(hear.recv_timeout(PATIENCE).unwrap(), Ok(()));
    }

    #[test]
    fn whoever_waits_is_told_when_the_other_side_ends() {
        for why in ["rank 1 of 2 failed", "the sender has ended"] {
            let gathered = gathered(&[512, 512, 512]);
            assert_eq!(gathered.give("a", memory(512, 1)), Ok(true));
            let packer = attending(&gathered, 512..1024);
            // As after the next tensor was given: the giving side waits for the packer to come nearer.
            let (said, giver) = mpsc::channel();
            let other = Arc::clone(&gathered);
            std::thread::spawn(move || said.send((0..).find(|_| other.wait_until_due(PATIENCE) == Due::Ended)));
            if why.starts_with("rank") {
                gathered.fail(why)
            } else {
                gathered.close()
            }
            let error = packer.recv_timeout(PATIENCE).unwrap().unwrap_err();
            assert!(error.why == why && error.tensor == "b", "{error}");
            assert!(giver.recv_timeout(PATIENCE).unwrap().is_some());
            assert_eq!(gathered.give("b", memory(512, 2)), Ok(false));
            assert_eq!(gathered.shelf().held.len(), 0, "nothing is held for nobody");
            gathered.fail("later");
            assert_eq!(gathered.attend(&(0..512)).unwrap_err().why, why, "the first reason stands");
        }
    }

    #[test]
    fn what_was_not_described_is_not_taken() {
        let gathered = gathered(&[512, 100]);
        let refused = |name, region| gathered.give(name, region).unwrap_err().to_string();
        assert!(refused("b", memory(100, 1)).contains("`b` was given where `a` is due"));
        assert!(refused("a", memory(100, 1)).contains("with 100 bytes, 512 were described"));
        assert!(refused("a", None).contains("with 0 bytes"));
        assert_eq!(gathered.give("a", memory(512, 1)), Ok(true));
        assert_eq!(gathered.give("b", memory(100, 1)), Ok(true));
        assert!(refused("b", memory(100, 1)).contains("nothing more is due"));
    }
}
