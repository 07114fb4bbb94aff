//! Weights by broadcast: one rank for each worker, over a stand-in for NCCL that moves host memory.

#[path = "support/checkpoints.rs"]
mod checkpoints;
#[path = "support/fake_nccl.rs"]
mod fake_nccl;
#[path = "support/weights_worker.rs"]
mod weights_worker;

use std::sync::Arc;

use pdlink::config::{Path, WeightsConfig};
use pdlink::control::{self, Hello, WeightSource, WeightsPhase, WeightsRequest, WeightsStatus};
use pdlink::weights::{Checkpoint, Paths, Source};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use weights_worker::{PATIENCE, Worker, listen, paths, small_buckets};

/// The stand-in is one for the whole process, and so is what it is told to do wrong.
static ALONE: Mutex<()> = Mutex::const_new(());

fn broadcasting() -> Paths {
    let mut paths = paths(WeightsConfig { paths: vec![Path::Nccl, Path::Shm], ..small_buckets() });
    paths.kv.nccl.library = Some(fake_nccl::library().to_owned());
    paths.kv.nccl.connect_timeout_ms = 2_000;
    paths.kv.transfer_timeout_ms = 2_000;
    paths.casts_host = true;
    paths
}

/// Waits until the groups of tests before have ended: that is done beside whoever lets go of them.
async fn nobody_is_left() {
    let ended = async {
        while fake_nccl::living() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("a group that nobody holds ends");
}

/// One update up to the point where all have staged it, or not; then the sender ends.
async fn stage(sender: &Paths, version: u64, workers: &[&Worker]) -> Vec<WeightsStatus> {
    let folder = tempfile::tempdir().unwrap();
    checkpoints::write(folder.path(), &checkpoints::tensors(version, 20, 1500), 3);
    let bytes = Arc::new(Checkpoint::open(folder.path()).unwrap());
    let (source, running) = Source::packing(version, bytes, sender).unwrap();
    let (mut listening, mut sending) = (JoinSet::new(), JoinSet::new());
    sending.spawn(running);
    let mut progress = source.progress();
    let welcome = Arc::new(move |_: Hello, connection: &control::Connection| source.welcome(connection));
    let address = listen(&mut listening, welcome).await;
    let receivers = u32::try_from(workers.len()).unwrap();
    for (worker, number) in workers.iter().zip(0..) {
        worker.offer(version, WeightSource::Peer(address.clone()), number, receivers).await;
    }
    let mut staged = Vec::new();
    for worker in workers {
        staged.push(worker.staged().await);
    }
    if staged.iter().all(|status| status.phase == WeightsPhase::Staged) {
        // Their words for the last bucket are on their way: without them the sender does not know that it ended well.
        let all = progress.wait_for(|progress| progress.sent_bytes == progress.total_bytes);
        tokio::time::timeout(PATIENCE, all).await.expect("everybody has everything").unwrap();
    }
    listening.shutdown().await;
    tokio::time::timeout(PATIENCE, sending.join_next()).await.expect("the sender ends with its connections");
    staged
}

async fn update(sender: &Paths, version: u64, workers: &[&Worker]) {
    for status in stage(sender, version, workers).await {
        assert_eq!((status.phase, status.path.as_deref()), (WeightsPhase::Staged, Some("nccl")), "{status:?}");
    }
    let mut want = checkpoints::tensors(version, 20, 1500);
    want.sort();
    for worker in workers {
        worker.commit(version).await;
        assert!(worker.tensors() == want, "version {version} is not what was sent");
    }
}

#[tokio::test]
async fn wt_5_all_workers_get_every_byte_of_each_broadcast_in_one_group_that_lasts() {
    let _alone = ALONE.lock().await;
    nobody_is_left().await;
    let sender = broadcasting();
    let (one, two, three) =
        (Worker::start(broadcasting()).await, Worker::start(broadcasting()).await, Worker::start(broadcasting()).await);
    update(&sender, 1, &[&one, &two, &three]).await;
    assert_eq!(fake_nccl::living(), 4, "a rank of each worker and one of the sender");
    update(&sender, 2, &[&one, &two, &three]).await;
    assert_eq!(fake_nccl::living(), 4, "the same group");
    // A worker that died and came back is another process. The others stay as they are.
    let again = Worker::start(broadcasting()).await;
    update(&sender, 3, &[&one, &again, &three]).await;
    // One that is alone makes a group with the sender.
    update(&sender, 4, &[&two]).await;
}

#[tokio::test]
async fn wt_1_a_broadcast_that_fails_is_named_and_the_next_one_works() {
    let _alone = ALONE.lock().await;
    let sender = broadcasting();
    let workers = [Worker::start(broadcasting()).await, Worker::start(broadcasting()).await];
    let all: Vec<&Worker> = workers.iter().collect();
    update(&sender, 1, &all).await;
    // NCCL's "unhandled system error", at the second thing that a worker's rank is asked for.
    fake_nccl::fail_at(1, 2, 2);
    let failed = stage(&sender, 2, &all).await;
    let whys: Vec<String> =
        failed.iter().filter_map(|status| status.failure.as_ref()).map(|it| it.why.clone()).collect();
    assert!(
        whys.iter().any(|why| why.contains("the group of 3 ranks") && why.contains("unhandled system error (2)")),
        "{whys:?}"
    );
    for worker in &workers {
        worker.ask(WeightsRequest::Abort { update: 2, why: "it failed".to_owned() }).await;
        assert!(!worker.notes.said().contains(&"commit 2".to_owned()));
    }
    update(&sender, 3, &all).await;
}

#[tokio::test]
async fn wt_4_a_worker_without_nccl_pulls_and_one_that_goes_is_no_hang() {
    let _alone = ALONE.lock().await;
    let sender = broadcasting();
    let pulling = Worker::start(paths(WeightsConfig { paths: vec![Path::Shm], ..small_buckets() })).await;
    let other = Worker::start(broadcasting()).await;
    let staged = stage(&sender, 1, &[&pulling, &other]).await;
    let ways: Vec<_> = staged.iter().map(|status| (status.phase, status.path.as_deref())).collect();
    assert_eq!(ways, [(WeightsPhase::Staged, Some("shm")), (WeightsPhase::Staged, Some("nccl"))]);
    for worker in [&pulling, &other] {
        worker.commit(1).await;
    }
    // Two are announced, and one never takes its seat: the other gives up at its time.
    let folder = tempfile::tempdir().unwrap();
    checkpoints::write(folder.path(), &checkpoints::tensors(2, 5, 100), 1);
    let (source, running) = Source::packing(2, Arc::new(Checkpoint::open(folder.path()).unwrap()), &sender).unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(running);
    let welcome = Arc::new(move |_: Hello, connection: &control::Connection| source.welcome(connection));
    let address = listen(&mut tasks, welcome).await;
    other.offer(2, WeightSource::Peer(address), 0, 2).await;
    let status = other.staged().await;
    assert_eq!(status.phase, WeightsPhase::Serving);
    assert!(status.failure.is_some_and(|failure| failure.phase == WeightsPhase::Staging));
}
