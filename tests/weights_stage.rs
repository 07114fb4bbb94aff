//! Weights from a sender, a folder or another worker into workers: every byte checked, every failure named.

#[path = "support/checkpoints.rs"]
mod checkpoints;
#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/weights_worker.rs"]
mod weights_worker;

use std::path::Path as File;
use std::sync::Arc;
use std::time::Duration;

use pdlink::config::{Path, Staging, WeightsConfig};
use pdlink::control::{self, Hello, WeightSource, WeightsOffer, WeightsPhase, WeightsRequest};
use pdlink::memory::Region;
use pdlink::transport::{Fault, FaultPlan, Faulty, Transport, When};
use pdlink::weights::{Checkpoint, Due, Gathered, Manifest, Paths, Progress, ReadError, Sender, Source, TensorBytes};
use tokio::task::JoinSet;
use weights_worker::{PATIENCE, Worker, listen, paths, small_buckets};

/// A sender of one version; its address.
async fn send(tasks: &mut JoinSet<()>, version: u64, bytes: Arc<dyn TensorBytes>, paths: &Paths) -> (Source, String) {
    let (source, running) = Source::packing(version, bytes, paths).unwrap();
    tasks.spawn(running);
    let door = source.clone();
    let welcome = move |_: Hello, connection: &control::Connection| door.welcome(connection);
    (source, listen(tasks, Arc::new(welcome)).await)
}

fn checkpoint(folder: &File, seed: u64) -> Arc<Checkpoint> {
    checkpoints::write(folder, &checkpoints::tensors(seed, 20, 1500), 3);
    Arc::new(Checkpoint::open(folder).unwrap())
}

#[tokio::test]
async fn wt_5_two_workers_get_every_byte_of_a_sender_over_each_path() {
    for path in [Path::Shm, Path::Tcp] {
        let folder = tempfile::tempdir().unwrap();
        let mut tasks = JoinSet::new();
        let paths = paths(WeightsConfig { paths: vec![path], ..small_buckets() });
        let workers = [Worker::start(paths.clone()).await, Worker::start(paths.clone()).await];
        let (source, address) = send(&mut tasks, 3, checkpoint(folder.path(), 1), &paths).await;
        for (number, worker) in workers.iter().enumerate() {
            worker.offer(3, WeightSource::Peer(address.clone()), u32::try_from(number).unwrap(), 2).await;
        }
        let mut digests = Vec::new();
        for worker in &workers {
            let status = worker.staged().await;
            assert_eq!((status.phase, status.path.as_deref()), (WeightsPhase::Staged, Some(path.name())), "{status:?}");
            assert_eq!((status.version, status.staged_bytes), (0, status.total_bytes));
            digests.push(status.staged_digest.expect("a digest"));
            assert!(worker.notes.said.lock().unwrap().is_empty(), "WT-2: nothing is paused while bytes move");
        }
        assert_eq!(digests[0], digests[1]);
        // A worker may have checked its last bucket before its word for it has come here.
        let mut progress = source.progress();
        let is_all = |progress: &Progress| (progress.sent_bytes, progress.receivers) == (progress.total_bytes, Some(2));
        tokio::time::timeout(PATIENCE, progress.wait_for(is_all)).await.expect("everybody has everything").unwrap();
        for worker in &workers {
            worker.commit(3).await;
            assert_eq!(*worker.notes.said.lock().unwrap(), ["pause", "commit 3", "resume"]);
            let mut want = checkpoints::tensors(1, 20, 1500);
            want.sort();
            assert_eq!(worker.tensors(), want);
        }
    }
}

#[tokio::test]
async fn a_folder_and_a_sender_of_it_give_the_same_weights_and_a_worker_gives_them_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let paths = paths(small_buckets());
    let (first, second, third) =
        (Worker::start(paths.clone()).await, Worker::start(paths.clone()).await, Worker::start(paths.clone()).await);
    let (_source, address) = send(&mut tasks, 1, checkpoint(folder.path(), 2), &paths).await;
    first.offer(1, WeightSource::Peer(address), 0, 1).await;
    second.offer(1, WeightSource::Folder(folder.path().to_str().unwrap().to_owned()), 0, 1).await;
    let digests = [first.staged().await.staged_digest, second.staged().await.staged_digest];
    assert!(digests[0].is_some() && digests[0] == digests[1]);
    assert!(!first.ask(WeightsRequest::Status).await.serves_peers, "not before it is committed");
    first.commit(1).await;
    // A worker that was restarted gets the committed version from one that has it, twice if need be.
    for update in [1, 2] {
        let source = WeightSource::Peer(first.address.clone());
        let offer =
            WeightsOffer { update, version: 1, source, receivers: 1, receiver: 0, stage_ms: 10_000, hold_ms: 10_000 };
        third.ask(WeightsRequest::Offer(offer)).await;
        assert_eq!(third.staged().await.staged_digest, digests[0]);
        third.ask(WeightsRequest::Abort { update, why: "again".to_owned() }).await;
    }
    let wrong = WeightSource::Peer(first.address.clone());
    third.offer(7, wrong, 0, 1).await;
    let why = third.staged().await.failure.unwrap().why;
    assert!(why.contains("version 7 is wanted, and version 1 is here"), "{why}");
}

#[tokio::test]
async fn wt_5_bytes_that_changed_on_the_way_are_refused_with_the_tensor_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let plan = FaultPlan { seed: 1, faults: vec![(When::Nth(2), Fault::Corrupt)] };
    let wrap = move |path: Arc<dyn Transport>| -> Arc<dyn Transport> { Faulty::around(path, plan.clone()) };
    let sound = paths(small_buckets());
    let worker = Worker::start(Paths { wrap_path: Some(Arc::new(wrap)), ..sound.clone() }).await;
    let (_source, address) = send(&mut tasks, 1, checkpoint(folder.path(), 1), &sound).await;
    worker.offer(1, WeightSource::Peer(address), 0, 1).await;
    let status = worker.staged().await;
    let failure = status.failure.expect("it failed");
    assert_eq!((status.version, status.phase, failure.phase), (0, WeightsPhase::Serving, WeightsPhase::Staging));
    assert!(failure.why.contains("layers.") && failure.why.contains("its digest differs"), "{}", failure.why);
    assert!(worker.notes.said.lock().unwrap().is_empty());
}

#[tokio::test]
async fn wt_4_a_sender_that_dies_or_never_was_is_named_and_the_old_version_serves() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths(small_buckets());
    let worker = Worker::start(paths.clone()).await;
    let mut tasks = JoinSet::new();
    // Two receivers were announced and one comes: the sender waits for the other, and dies waiting.
    let (source, address) = send(&mut tasks, 1, checkpoint(folder.path(), 1), &paths).await;
    worker.offer(1, WeightSource::Peer(address.clone()), 0, 2).await;
    let mut progress = source.progress();
    tokio::time::timeout(PATIENCE, progress.wait_for(|now| now.joined == 1)).await.unwrap().unwrap();
    tasks.shutdown().await;
    let why = worker.staged().await.failure.unwrap().why;
    assert!(why.contains(&address) && why.contains("lost"), "{why}");
    worker.offer(2, WeightSource::Peer(address.clone()), 0, 1).await;
    let why = worker.staged().await.failure.unwrap().why;
    assert!(why.contains(&format!("cannot connect to {address}")), "{why}");
    assert!(worker.notes.said.lock().unwrap().is_empty());
}

#[tokio::test]
async fn wt_4_an_extra_receiver_is_refused_and_a_missing_one_ends_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let paths = paths(small_buckets());
    let workers = [Worker::start(paths.clone()).await, Worker::start(paths.clone()).await];
    let (_source, address) = send(&mut tasks, 1, checkpoint(folder.path(), 1), &paths).await;
    workers[0].offer(1, WeightSource::Peer(address.clone()), 0, 1).await;
    assert_eq!(workers[0].staged().await.phase, WeightsPhase::Staged);
    workers[1].offer(1, WeightSource::Peer(address), 0, 1).await;
    let why = workers[1].staged().await.failure.unwrap().why;
    assert!(why.contains("receiver 0 has joined already"), "{why}");

    let (_source, address) = send(&mut tasks, 2, checkpoint(folder.path(), 1), &paths).await;
    let source = WeightSource::Peer(address);
    let offer = WeightsOffer { update: 9, version: 2, source, receivers: 2, receiver: 0, stage_ms: 300, hold_ms: 1000 };
    workers[1].ask(WeightsRequest::Offer(offer)).await;
    let why = workers[1].staged().await.failure.unwrap().why;
    assert!(why.contains("did not"), "{why}");
}

/// A checkpoint whose disk fails half-way.
struct BadDisk(Arc<Checkpoint>);

impl TensorBytes for BadDisk {
    fn manifest(&self) -> &Arc<Manifest> {
        self.0.manifest()
    }

    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError> {
        if tensor > 8 {
            let tensor = self.manifest().tensors()[tensor].name.clone();
            return Err(ReadError { tensor, from: "a disk".to_owned(), why: "input/output error".to_owned() });
        }
        self.0.read(tensor, skip, len, region, at)
    }
}

#[tokio::test]
async fn a_disk_that_fails_is_told_to_every_receiver() {
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let paths = paths(small_buckets());
    let worker = Worker::start(paths.clone()).await;
    let bad = Arc::new(BadDisk(checkpoint(folder.path(), 1)));
    let (source, address) = send(&mut tasks, 1, bad, &paths).await;
    worker.offer(1, WeightSource::Peer(address), 0, 1).await;
    let why = worker.staged().await.failure.unwrap().why;
    assert!(why.contains("cannot read tensor") && why.contains("input/output error"), "{why}");
    assert!(source.progress().borrow().failed.as_ref().is_some_and(|why| why.contains("a disk")));

    worker.offer(2, WeightSource::Folder("/nowhere/at/all".to_owned()), 0, 1).await;
    let why = worker.staged().await.failure.unwrap().why;
    assert!(why.contains("cannot read /nowhere/at/all"), "{why}");
}

/// What a trainer's ranks gather: a checkpoint's tensors, none of them there yet.
fn gathered(checkpoint: &Checkpoint, paths: &Paths) -> Arc<Gathered> {
    let manifest = Manifest::clone(checkpoint.manifest());
    Arc::new(Gathered::new(manifest, None, paths.weights.bucket_bytes))
}

/// Gives the first `count` tensors, each when it is due.
fn give(gathered: &Gathered, checkpoint: &Checkpoint, count: usize) {
    for (number, tensor) in checkpoint.manifest().tensors().iter().enumerate().take(count) {
        assert_eq!(gathered.wait_until_due(PATIENCE), Due::Now, "tensor {number}");
        let bytes = tensor.bytes().unwrap();
        let region = (bytes > 0).then(|| Region::shared(usize::try_from(bytes).unwrap()).unwrap());
        if let Some(region) = &region {
            checkpoint.read(number, 0, bytes, region, 0).unwrap();
        }
        assert_eq!(gathered.give(&tensor.name, region), Ok(true));
    }
}

#[tokio::test]
async fn wt_5_tensors_that_come_while_they_are_sent_are_what_their_checkpoint_is() {
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let paths = paths(small_buckets());
    let (worker, reader) = (Worker::start(paths.clone()).await, Worker::start(paths.clone()).await);
    let whole = checkpoint(folder.path(), 1);
    let coming = gathered(&whole, &paths);
    assert!(coming.parts().len() > 3, "several buckets: {:?}", coming.parts());
    let (_source, address) = send(&mut tasks, 1, Arc::clone(&coming) as Arc<dyn TensorBytes>, &paths).await;
    let giving = tokio::task::spawn_blocking(move || give(&coming, &whole, usize::MAX));
    worker.offer(1, WeightSource::Peer(address), 0, 1).await;
    reader.offer(1, WeightSource::Folder(folder.path().to_str().unwrap().to_owned()), 0, 1).await;
    let digests = [worker.staged().await.staged_digest, reader.staged().await.staged_digest];
    assert!(digests[0].is_some() && digests[0] == digests[1]);
    tokio::time::timeout(PATIENCE, giving).await.expect("all was wanted").unwrap();
}

#[tokio::test]
async fn wt_4_workers_are_told_why_no_more_tensors_come() {
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let paths = paths(small_buckets());
    let worker = Worker::start(paths.clone()).await;
    let whole = checkpoint(folder.path(), 1);
    let coming = gathered(&whole, &paths);
    let (_source, address) = send(&mut tasks, 1, Arc::clone(&coming) as Arc<dyn TensorBytes>, &paths).await;
    worker.offer(1, WeightSource::Peer(address), 0, 1).await;
    let failing = tokio::task::spawn_blocking(move || {
        give(&coming, &whole, coming.parts()[0]);
        coming.fail("rank 1 of 2 of the trainer failed: no memory");
    });
    let why = worker.staged().await.failure.unwrap().why;
    assert!(why.contains("from the ranks of the trainer: rank 1 of 2 of the trainer failed: no memory"), "{why}");
    tokio::time::timeout(PATIENCE, failing).await.expect("nothing is waited for").unwrap();
}

#[tokio::test]
async fn a_sender_ends_while_its_packer_waits_for_a_tensor_that_never_comes() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths(small_buckets());
    let worker = Worker::start(paths.clone()).await;
    let whole = checkpoint(folder.path(), 1);
    let coming = gathered(&whole, &paths);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let sender = Sender::start(1, Arc::clone(&coming) as Arc<dyn TensorBytes>, &paths, listener).unwrap();
    worker.offer(1, WeightSource::Peer(sender.address().to_owned()), 0, 1).await;
    let first = coming.parts()[0];
    let gives = Arc::clone(&coming);
    let giving = tokio::task::spawn_blocking(move || give(&gives, &whole, first));
    tokio::time::timeout(PATIENCE, giving).await.expect("the first bucket is due at once").unwrap();
    // The worker has the first bucket: the second is being packed, of which nothing is there.
    let mut progress = sender.progress();
    tokio::time::timeout(PATIENCE, progress.wait_for(|now| now.sent_bytes > 0)).await.unwrap().unwrap();
    let ending = tokio::task::spawn_blocking(move || drop(sender));
    tokio::time::timeout(PATIENCE, ending).await.expect("it waits for nobody").unwrap();
    assert_eq!(coming.wait_until_due(Duration::ZERO), Due::Ended);
    assert!(worker.staged().await.failure.is_some());
}

#[tokio::test]
async fn without_staging_the_bytes_are_checked_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let paths = paths(WeightsConfig { staging: Staging::None, ..small_buckets() });
    let worker = Worker::start(paths.clone()).await;
    let (_source, address) = send(&mut tasks, 1, checkpoint(folder.path(), 1), &paths).await;
    worker.offer(1, WeightSource::Peer(address), 0, 1).await;
    let pulled = worker.staged().await;
    worker.ask(WeightsRequest::Abort { update: 1, why: "again".to_owned() }).await;
    worker.offer(2, WeightSource::Folder(folder.path().to_str().unwrap().to_owned()), 0, 1).await;
    let read = worker.staged().await;
    assert!(pulled.staged_digest.is_some() && pulled.staged_digest == read.staged_digest);
    worker.commit(2).await;
    assert!(worker.notes.weights.lock().unwrap().as_ref().unwrap().staged.as_ref().unwrap().region().is_none());
    assert!(!worker.ask(WeightsRequest::Status).await.serves_peers);
}

#[test]
fn weights_that_do_not_fit_on_a_gpu_are_refused_with_numbers_and_a_mend() {
    fake_cuda::pass(fake_cuda::Driver::New, &[("FAKE_CUDA_BYTES", "5000")], &["inner_weights_beyond_a_gpu"], 1);
}

/// What the test above runs over a stand-in for the driver, whose GPU has 5,000 bytes.
#[tokio::test]
async fn inner_weights_beyond_a_gpu() {
    if !fake_cuda::is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut tasks = JoinSet::new();
    let sender = paths(WeightsConfig { paths: vec![Path::Tcp], ..small_buckets() });
    let cases = [
        // The whole of them, and two buckets.
        (Staging::Device, false, "bytes of GPU memory, and 5000 are available", "weights.staging = \"host\""),
        (Staging::None, true, "take 8192 bytes of GPU memory, and 5000 are available", "weights.bucket_bytes"),
    ];
    for (staging, streams, numbers, mend) in cases {
        let (_source, address) = send(&mut tasks, 1, checkpoint(folder.path(), 1), &sender).await;
        let weights = WeightsConfig { staging, paths: vec![Path::Tcp], ..small_buckets() };
        let worker = Worker::start(Paths { gpu: Some(0), streams, ..paths(weights) }).await;
        worker.offer(1, WeightSource::Peer(address), 0, 1).await;
        let status = worker.staged().await;
        let why = status.failure.unwrap().why;
        assert!(why.contains(numbers) && why.contains(mend), "{why}");
        assert_eq!((status.phase, status.version), (WeightsPhase::Serving, 0), "WT-1: the old ones serve on");
        assert!(worker.notes.said().is_empty(), "WT-2: nothing was paused");
    }
}
