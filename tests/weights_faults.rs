//! What goes wrong in an update of a fleet, phase by phase: the old version serves on, resumed, and the fault is named.

#[path = "support/checkpoints.rs"]
mod checkpoints;
#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;
#[path = "support/weights_worker.rs"]
mod weights_worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pdlink::config::{InFlight, WeightsConfig};
use pdlink::control::{self, Hello, WeightSource, WeightsOffer, WeightsPhase, WeightsRequest};
use pdlink::proxy::WorkerAddress;
use pdlink::weights::{Checkpoint, Source};
use proxied::{Answer, Proxied, Setup, good_decode, good_prefill};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use weights_worker::{PATIENCE, Trouble, Worker, listen, paths};

/// Everything that could wait is short.
fn config() -> WeightsConfig {
    WeightsConfig {
        in_flight: InFlight::Restart,
        bucket_bytes: 4096,
        stage_timeout_s: 5.0,
        drain_timeout_s: 0.2,
        pause_timeout_s: 0.5,
        commit_timeout_s: 0.5,
        hold_timeout_s: 3.0,
        ..WeightsConfig::default()
    }
}

/// Two workers and the proxy before them, all of version 1.
struct Fleet {
    proxy: Proxied,
    workers: [Worker; 2],
    _mocks: (mock_worker::MockWorker, mock_worker::MockWorker),
    folder: tempfile::TempDir,
}

impl Fleet {
    async fn start(config: WeightsConfig) -> Self {
        let workers = [Worker::start(paths(config.clone())).await, Worker::start(paths(config.clone())).await];
        let mocks = (good_prefill().await, good_decode().await);
        let mut setup = Setup::new(&[&mocks.0], &[&mocks.1]);
        let address = |url: String, worker: &Worker| WorkerAddress {
            kv_addr: Some(worker.address.clone()),
            ..WorkerAddress::new(url)
        };
        setup.prefill = vec![address(mocks.0.url(), &workers[0])];
        setup.decode = vec![address(mocks.1.url(), &workers[1])];
        setup.weights = config;
        let folder = tempfile::tempdir().unwrap();
        let fleet = Self { proxy: setup.start().await, workers, _mocks: mocks, folder };
        let first = fleet.update(json!({"folder": fleet.checkpoint(1)})).await;
        assert_eq!((first.status, first.json()["version"].as_u64()), (200, Some(1)), "{}", first.body);
        fleet
    }

    fn checkpoint(&self, seed: u64) -> PathBuf {
        let folder = self.folder.path().join(format!("checkpoint-{seed}"));
        checkpoints::write(&folder, &checkpoints::tensors(seed, 10, 2000), 1);
        folder
    }

    async fn update(&self, body: Value) -> Answer {
        self.proxy.post("/admin/weights/update", body.to_string()).await
    }

    async fn status(&self) -> Value {
        self.proxy.get("/admin/weights").await.json()
    }

    /// A request that goes through both legs.
    async fn serves(&self) {
        let body = r#"{"model":"m","prompt":"p","max_tokens":4}"#;
        let answer = self.proxy.post("/v1/completions", body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }

    /// Version 1 serves, is resumed, and nothing of an update is left.
    async fn is_as_before(&self, worker: usize) {
        let status = self.workers[worker].until(|status| status.phase == WeightsPhase::Serving).await;
        assert_eq!((status.version, status.staged_digest), (1, None), "{status:?}");
        let said = self.workers[worker].notes.said();
        let count = |what: &str| said.iter().filter(|said| *said == what).count();
        assert_eq!(count("pause"), count("resume"), "{said:?}");
    }

    async fn until(&self, what: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let status = self.status().await;
            if what(&status) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{status}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn names(answer: &Answer, parts: &[&str]) {
    let message = answer.error();
    assert!(answer.status == 502 && parts.iter().all(|part| message.contains(part)), "{} {message}", answer.status);
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_a_worker_that_does_not_pause_or_dies_before_the_commit_leaves_the_old_version() {
    for (trouble, dies) in [(Trouble::NeverPauses, false), (Trouble::DiesAtPause, true)] {
        let fleet = Fleet::start(config()).await;
        fleet.workers[1].trouble(trouble);
        let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
        names(&answer, &["while pausing", "on worker http://"]);
        fleet.is_as_before(0).await;
        let status = fleet.status().await;
        assert_eq!((&status["version"], &status["under_way"]), (&json!(1), &Value::Null), "{status}");
        if !dies {
            names(&answer, &["did not come to `paused` within 0.5 s"]);
            fleet.is_as_before(1).await;
            fleet.serves().await;
            let again = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
            assert_eq!((again.status, &again.json()["version"]), (200, &json!(2)), "{}", again.body);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_weights_that_no_engine_takes_leave_the_old_version() {
    let fleet = Fleet::start(config()).await;
    fleet.workers.iter().for_each(|worker| worker.trouble(Trouble::RefusesWeights));
    let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
    names(&answer, &["while committing", "it does not fit the model"]);
    fleet.is_as_before(0).await;
    fleet.is_as_before(1).await;
    fleet.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_a_worker_that_did_not_commit_is_kept_out_until_it_has_caught_up() {
    let fleet = Fleet::start(config()).await;
    fleet.workers[1].trouble(Trouble::RefusesWeights);
    let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
    let done = answer.json();
    assert_eq!((answer.status, &done["version"]), (200, &json!(2)), "{done}");
    assert!(done["behind"][0]["why"].as_str().unwrap().contains("it does not fit the model"), "{done}");
    let status = fleet.until(|status| status["workers"][1]["version"] == 2).await;
    assert_eq!(status["workers"][0]["digest"], status["workers"][1]["digest"]);
    fleet.until(|status| status["workers"][1]["kept_out"] == false).await;
    fleet.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_4_a_worker_that_never_commits_or_dies_then_is_named_and_the_others_serve_on() {
    for trouble in [Trouble::NeverCommits, Trouble::DiesAtCommit] {
        let fleet = Fleet::start(config()).await;
        fleet.workers[1].trouble(trouble);
        let begun = Instant::now();
        let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
        let done = answer.json();
        assert_eq!((answer.status, &done["version"]), (200, &json!(2)), "{trouble:?} {done}");
        assert_eq!(done["behind"].as_array().unwrap().len(), 1, "{done}");
        assert!(begun.elapsed() < PATIENCE);
        let status = fleet.workers[0].until(|status| status.phase == WeightsPhase::Serving).await;
        assert_eq!(status.version, 2);
        let status = fleet.status().await;
        assert_eq!((&status["workers"][1]["kept_out"], &status["version"]), (&json!(true), &json!(2)), "{status}");
        let refused = fleet.proxy.post("/v1/completions", r#"{"model":"m","prompt":"p"}"#).await;
        assert_eq!(refused.status, 503, "a decode worker with other weights gets no request");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_workers_that_load_for_longer_than_expected_are_not_taken_for_old() {
    let fleet = Fleet::start(config()).await;
    fleet.workers.iter().for_each(|worker| worker.trouble(Trouble::CommitsLate));
    let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
    assert_eq!((answer.status, &answer.json()["behind"]), (200, &json!([])), "{}", answer.body);
    // One that is slower than the other catches up with its own word.
    let fleet = Fleet::start(config()).await;
    fleet.workers[1].trouble(Trouble::CommitsLate);
    let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
    assert_eq!(answer.json()["behind"].as_array().map(Vec::len), Some(1), "{}", answer.body);
    let status = fleet.workers[1].until(|status| status.phase == WeightsPhase::Serving && status.version == 2).await;
    assert_eq!(status.failure, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_4_a_sender_that_dies_while_it_sends_is_named() {
    let fleet = Fleet::start(config()).await;
    let checkpoint = Arc::new(Checkpoint::open(&fleet.checkpoint(2)).unwrap());
    let (source, running) = Source::packing(2, checkpoint, &paths(config())).unwrap();
    let mut tasks = JoinSet::new();
    let door = source.clone();
    let address = listen(&mut tasks, Arc::new(move |_: Hello, up: &control::Connection| door.welcome(up))).await;
    let mut progress = source.progress();
    // It lets both in, packs nothing, and dies.
    let sender = async {
        let mut running = running;
        tokio::select! {
            () = &mut running => {}
            joined = progress.wait_for(|now| now.joined == 2) => drop(joined),
        }
        tasks.shutdown().await;
    };
    let (answer, ()) = tokio::join!(fleet.update(json!({"peer": address, "version": 2})), sender);
    names(&answer, &["while staging", "on worker http://", &address]);
    fleet.is_as_before(0).await;
    fleet.is_as_before(1).await;
    fleet.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_4_a_worker_that_dies_while_it_stages_is_named() {
    let fleet = Fleet::start(config()).await;
    // Nobody packs: staging would last until its deadline.
    let checkpoint = Arc::new(Checkpoint::open(&fleet.checkpoint(2)).unwrap());
    let (source, _running) = Source::packing(2, checkpoint, &paths(config())).unwrap();
    let mut tasks = JoinSet::new();
    let address = listen(&mut tasks, Arc::new(move |_: Hello, up: &control::Connection| source.welcome(up))).await;
    let killing = async {
        fleet.workers[1].until(|status| status.phase == WeightsPhase::Staging).await;
        fleet.workers[1].kill();
    };
    let (answer, ()) = tokio::join!(fleet.update(json!({"peer": address, "version": 2})), killing);
    names(&answer, &["while staging", "on worker http://", &fleet.workers[1].address]);
    fleet.is_as_before(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_4_a_worker_in_somebody_elses_update_is_named() {
    let fleet = Fleet::start(config()).await;
    let other = fleet.folder.path().join("other");
    checkpoints::write(&other, &checkpoints::tensors(8, 10, 2000), 1);
    // A worker that is in an update of somebody else's is in the way of ours, by name.
    let stray = WeightsOffer {
        update: 77,
        version: 2,
        source: WeightSource::Folder(path(&other)),
        receivers: 1,
        receiver: 0,
        stage_ms: 5000,
        hold_ms: 300,
    };
    fleet.workers[1].ask(WeightsRequest::Offer(stray)).await;
    let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
    names(&answer, &["while staging", "an update to version 2 is under way here"]);
    fleet.is_as_before(0).await;
    fleet.workers[1].until(|status| status.phase == WeightsPhase::Serving).await;
    let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn path(folder: &Path) -> String {
    folder.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_order_is_joined_and_another_one_is_refused_while_one_is_under_way() {
    let fleet = Fleet::start(config()).await;
    fleet.workers[1].trouble(Trouble::NeverPauses);
    let folder = fleet.checkpoint(2);
    let first = fleet.update(json!({"folder": folder}));
    let others = async {
        fleet.until(|status| status["under_way"].is_object()).await;
        tokio::join!(fleet.update(json!({"folder": folder})), fleet.update(json!({"base": true})))
    };
    let (first, (joined, other)) = tokio::join!(first, others);
    assert_eq!((first.status, first.error()), (joined.status, joined.error()));
    assert_eq!(other.status, 409, "{}", other.body);
    assert!(other.error().contains("is under way"), "{}", other.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_a_proxy_that_was_restarted_learns_the_version_and_who_is_behind() {
    let fleet = Fleet::start(config()).await;
    // While no proxy looks, one worker goes ahead: as after a proxy that died between two commits.
    let Fleet { proxy, workers, _mocks: mocks, folder } = fleet;
    drop(proxy);
    let ahead = folder.path().join("ahead");
    checkpoints::write(&ahead, &checkpoints::tensors(5, 10, 2000), 1);
    let offer = |version, source| WeightsOffer {
        update: 500 + version,
        version,
        source,
        receivers: 1,
        receiver: 0,
        stage_ms: 5000,
        hold_ms: 5000,
    };
    workers[0].ask(WeightsRequest::Offer(offer(2, WeightSource::Folder(path(&ahead))))).await;
    workers[0].staged().await;
    workers[0].commit(502).await;
    let mut setup = Setup::new(&[&mocks.0], &[&mocks.1]);
    setup.unwell = true;
    let address = |url: String, worker: &Worker| WorkerAddress {
        kv_addr: Some(worker.address.clone()),
        ..WorkerAddress::new(url)
    };
    setup.prefill = vec![address(mocks.0.url(), &workers[0])];
    setup.decode = vec![address(mocks.1.url(), &workers[1])];
    setup.weights = config();
    let fleet = Fleet { proxy: setup.start().await, workers, _mocks: mocks, folder };
    let status =
        fleet.until(|status| status["workers"][1]["version"] == 2 && status["workers"][1]["kept_out"] == false).await;
    assert_eq!((&status["version"], &status["workers"][0]["kept_out"]), (&json!(2), &json!(false)), "{status}");
    assert_eq!(status["workers"][0]["digest"], status["workers"][1]["digest"]);
    let next = fleet.update(json!({"base": true})).await;
    assert_eq!((next.status, &next.json()["version"]), (200, &json!(3)), "{}", next.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_5_a_folder_that_has_changed_since_is_not_what_a_worker_catches_up_with() {
    // Nobody keeps what it staged, so the folder is all there is.
    let fleet = Fleet::start(WeightsConfig { keep: false, ..config() }).await;
    fleet.workers[1].trouble(Trouble::RefusesWeights);
    // Written over once it has been read: when the pause begins, every worker has staged.
    let folder = fleet.checkpoint(2);
    let overwriting = async {
        while fleet.workers[1].notes.said().iter().filter(|said| *said == "pause").count() < 2 {
            tokio::task::yield_now().await;
        }
        checkpoints::write(&folder, &checkpoints::tensors(9, 10, 2000), 1);
    };
    let (answer, ()) = tokio::join!(fleet.update(json!({"folder": folder})), overwriting);
    assert_eq!((answer.status, &answer.json()["version"]), (200, &json!(2)), "{}", answer.body);
    let status = fleet
        .until(|status| {
            status["workers"][1]["failure"]["why"].as_str().is_some_and(|why| why.contains("other weights"))
        })
        .await;
    assert_eq!((&status["workers"][1]["kept_out"], &status["workers"][1]["version"]), (&json!(true), &json!(1)));
    let status = fleet.workers[1].until(|status| status.phase == WeightsPhase::Serving).await;
    assert_eq!(status.version, 1);
}

/// Every pair of troubles, in the two workers of one update: whoever serves afterwards, serves the fleet's version.
#[tokio::test(flavor = "multi_thread")]
async fn wt_1_whatever_goes_wrong_in_two_workers_those_that_serve_agree() {
    const TROUBLES: [Option<Trouble>; 6] = [
        None,
        Some(Trouble::NeverPauses),
        Some(Trouble::DiesAtPause),
        Some(Trouble::RefusesWeights),
        Some(Trouble::NeverCommits),
        Some(Trouble::DiesAtCommit),
    ];
    let mut pairs: Vec<_> = TROUBLES.into_iter().flat_map(|one| TROUBLES.map(|other| [one, other])).collect();
    while !pairs.is_empty() {
        let mut running = JoinSet::new();
        for pair in pairs.split_off(pairs.len().saturating_sub(6)) {
            running.spawn(those_that_serve_agree(pair));
        }
        running.join_all().await;
    }
}

async fn those_that_serve_agree(troubles: [Option<Trouble>; 2]) {
    let fleet = Fleet::start(config()).await;
    for (worker, trouble) in fleet.workers.iter().zip(troubles) {
        trouble.into_iter().for_each(|trouble| worker.trouble(trouble));
    }
    let begun = Instant::now();
    let answer = fleet.update(json!({"folder": fleet.checkpoint(2)})).await;
    assert!(begun.elapsed() < PATIENCE, "{troubles:?}: WT-4");
    let stops = |trouble| matches!(trouble, Some(Trouble::NeverPauses | Trouble::DiesAtPause));
    let takes = |trouble: &Option<Trouble>| trouble.is_none();
    let commits = !troubles.iter().any(|trouble| stops(*trouble)) && troubles.iter().any(takes);
    let version = if commits { 2 } else { 1 };
    assert_eq!(answer.status, if commits { 200 } else { 502 }, "{troubles:?}: {}", answer.body);
    // Each worker ends as one that serves the fleet's version, or as one that is kept out.
    let status = fleet
        .until(|status| {
            let settled = |worker: &Value| {
                worker["kept_out"] == true || (worker["version"] == version && worker["phase"] == "serving")
            };
            status["under_way"].is_null() && status["workers"].as_array().unwrap().iter().all(settled)
        })
        .await;
    assert_eq!(status["version"], version, "{troubles:?}: {status}");
    for (worker, trouble) in status["workers"].as_array().unwrap().iter().zip(troubles) {
        let is_lost = matches!(trouble, Some(Trouble::DiesAtPause | Trouble::DiesAtCommit | Trouble::NeverCommits));
        assert!(is_lost || worker["version"] == version || worker["kept_out"] == true, "{troubles:?}: {worker}");
    }
}
