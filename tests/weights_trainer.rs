//! The NCCL stream of a trainer that knows nothing of us, over a stand-in for NCCL that moves host memory: the trainer of these tests
//! is rank 0 of the group and says what PRIME-RL's says, in its order.

#[path = "support/checkpoints.rs"]
mod checkpoints;
#[path = "support/fake_nccl.rs"]
mod fake_nccl;
#[path = "support/weights_worker.rs"]
mod weights_worker;

use std::time::Instant;

use pdlink::config::{Path, WeightsConfig};
use pdlink::control::{
    TrainerGroup, TrainerState, WeightSource, WeightsOffer, WeightsPhase, WeightsRequest, WeightsStatus,
};
use pdlink::memory::Region;
use pdlink::transport::{Caster, NcclSetup, Seat, group_name};
use pdlink::weights::Paths;
use tokio::sync::{Mutex, oneshot};
use weights_worker::{PATIENCE, Worker, paths, small_buckets};

/// The stand-in is one for the whole process.
static ALONE: Mutex<()> = Mutex::const_new(());

const GROUP: u64 = 7;

fn taking() -> Paths {
    let mut paths = paths(WeightsConfig { paths: vec![Path::Shm], ..small_buckets() });
    paths.kv.nccl.library = Some(fake_nccl::library().to_owned());
    paths.casts_host = true;
    paths
}

fn step(number: u64) -> WeightSource {
    WeightSource::Trainer { group: GROUP, step: format!("/run/broadcasts/step_{number}") }
}

/// Pickle's words, as far as these tests say them: protocol 2.
struct Pickle(Vec<u8>);

impl Pickle {
    fn of(says: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut pickle = Self(vec![0x80, 2]);
        says(&mut pickle);
        pickle.0.push(b'.');
        pickle.0
    }

    fn word(&mut self, word: u8) -> &mut Self {
        self.0.push(word);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.0.push(b'X');
        self.0.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
        self.0.extend(text.as_bytes());
        self
    }

    fn number(&mut self, number: usize) -> &mut Self {
        self.0.push(b'J');
        self.0.extend(i32::try_from(number).unwrap().to_le_bytes());
        self
    }

    fn global(&mut self, module: &str, name: &str) -> &mut Self {
        self.0.extend(format!("c{module}\n{name}\n").as_bytes());
        self
    }

    /// `{torch.dtype: [(name, torch.Size, elements)]}`.
    fn groups(&mut self, groups: &[Group]) {
        self.word(b'}').word(b'(');
        for (dtype, size, tensors) in groups {
            self.global("torch", dtype).word(b']').word(b'(');
            for (name, bytes) in tensors {
                let elements = bytes.len() / size;
                self.text(name).global("torch", "Size").number(elements).word(0x85).word(0x85).word(b'R');
                self.number(elements).word(0x87);
            }
            self.word(b'e');
        }
        self.word(b'u');
    }
}

/// What vLLM's communicator puts into its store.
fn pickled_name(name: &[u8]) -> Vec<u8> {
    Pickle::of(|pickle| {
        pickle
            .global("_ctypes", "_unpickle")
            .global("vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId");
        pickle.word(b'}').word(b'C').word(128).0.extend(name);
        pickle.word(0x86).word(0x86).word(b'R');
    })
}

/// A dtype as PyTorch calls it, bytes of an element, and tensors of it.
type Group = (&'static str, usize, Vec<(String, Vec<u8>)>);

/// One step: dictionaries of tensors.
fn weights(version: u8) -> Vec<Vec<Group>> {
    let bytes =
        |seed: usize, len: usize| (0..len).map(|at| u8::try_from((at * 7 + seed) % 251).unwrap() ^ version).collect();
    let layer = |number: usize| {
        let tensor =
            |part: usize| (format!("model.layers.{number}.{part}"), bytes(number * 10 + part, 1000 + 2 * part));
        vec![
            ("bfloat16", 2, (0..5).map(tensor).collect()),
            ("float32", 4, vec![(format!("model.layers.{number}.scale"), bytes(number, 36))]),
        ]
    };
    let rest =
        vec![("bfloat16", 2, vec![("lm_head".to_owned(), bytes(3, 20_000)), ("nothing".to_owned(), Vec::new())])];
    vec![rest, layer(0), Vec::new(), layer(1)]
}

struct Trainer(Caster);

impl Trainer {
    /// Goes to the group, and has the workers told of it.
    async fn with(workers: &[&Worker]) -> Self {
        let setup = NcclSetup { connect_max: PATIENCE, ..fake_nccl::setup() };
        let (name, ranks) = (group_name(&setup).unwrap(), u32::try_from(workers.len()).unwrap() + 1);
        for (worker, rank) in workers.iter().zip(1..) {
            *worker.notes.name.lock().unwrap() = Some(pickled_name(&name));
            worker.ask(WeightsRequest::Join(group(rank, ranks))).await;
        }
        let (done, made) = oneshot::channel();
        let seat = Seat { name, rank: 0, ranks, device: None, greets: true };
        let caster = Caster::start(&setup, seat, Box::new(move |result| drop(done.send(result)))).unwrap();
        made.await.unwrap().unwrap();
        for worker in workers {
            let joined = worker.until(|status| state(status) != TrainerState::Joining).await;
            assert_eq!(state(&joined), TrainerState::Joined);
        }
        Self(caster)
    }

    async fn says(&self, bytes: &[u8]) {
        let region = Region::shared(bytes.len().max(1)).unwrap();
        region.copy_in(0, bytes).unwrap();
        let (done, ended) = oneshot::channel();
        let deadline = Instant::now() + PATIENCE;
        self.0.cast(
            &region,
            0,
            u64::try_from(bytes.len()).unwrap(),
            deadline,
            Box::new(move |result| drop(done.send(result))),
        );
        ended.await.unwrap().unwrap();
    }

    async fn number(&self, number: usize) {
        self.says(&u64::try_from(number).unwrap().to_le_bytes()).await;
    }

    async fn sends(&self, dictionaries: &[Vec<Group>]) {
        self.number(dictionaries.len()).await;
        for groups in dictionaries {
            let description = Pickle::of(|pickle| pickle.groups(groups));
            self.number(description.len()).await;
            self.says(&description).await;
            for (_, _, tensors) in groups {
                let all: Vec<u8> = tensors.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
                self.says(&all).await;
            }
        }
    }
}

fn group(rank: u32, ranks: u32) -> TrainerGroup {
    TrainerGroup { id: GROUP, host: "trainer".to_owned(), port: 1, rank, ranks, timeout_ms: 20_000 }
}

fn state(status: &WeightsStatus) -> TrainerState {
    status.trainer.as_ref().map(|link| link.state.clone()).expect("it was told to join one")
}

async fn offer(workers: &[&Worker], update: u64) {
    let receivers = u32::try_from(workers.len()).unwrap();
    for (worker, number) in workers.iter().zip(0..) {
        worker.offer(update, step(update), number, receivers).await;
    }
}

fn sorted(dictionaries: &[Vec<Group>]) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = dictionaries.iter().flatten().flat_map(|(_, _, tensors)| tensors.clone()).collect();
    all.sort();
    all
}

fn loaded(worker: &Worker) -> Vec<(String, Vec<u8>)> {
    let mut tensors = worker.tensors();
    tensors.sort();
    tensors
}

#[tokio::test]
async fn wt_5_every_step_of_the_trainer_is_staged_by_all_alike_and_serves() {
    let _alone = ALONE.lock().await;
    let (one, two) = (Worker::start(taking()).await, Worker::start(taking()).await);
    let workers = [&one, &two];
    let trainer = Trainer::with(&workers).await;
    assert_eq!((one.notes.said(), two.notes.said()), (vec!["meet 1 of 3".to_owned()], vec!["meet 2 of 3".to_owned()]));
    for update in 1..=3 {
        let sent = weights(u8::try_from(update).unwrap());
        offer(&workers, update).await;
        trainer.sends(&sent).await;
        let staged = [one.staged().await, two.staged().await];
        assert!(
            staged.iter().all(|status| status.phase == WeightsPhase::Staged && status.path.as_deref() == Some("nccl"))
        );
        assert_eq!(staged[0].staged_digest, staged[1].staged_digest, "what they have is the same");
        for worker in workers {
            worker.commit(update).await;
            assert!(loaded(worker) == sorted(&sent), "update {update} is not what was sent");
        }
    }
}

#[tokio::test]
async fn wt_1_a_step_that_came_and_did_not_serve_serves_at_the_next_try_without_being_sent_again() {
    let _alone = ALONE.lock().await;
    let worker = Worker::start(taking()).await;
    let trainer = Trainer::with(&[&worker]).await;
    let sent = weights(9);
    worker.offer(1, step(1), 0, 1).await;
    trainer.sends(&sent).await;
    worker.staged().await;
    worker.ask(WeightsRequest::Abort { update: 1, why: "another worker did not pause".to_owned() }).await;
    // The orchestrator's next try: another transaction, about the same step.
    worker.offer(2, step(1), 0, 1).await;
    assert_eq!(worker.staged().await.phase, WeightsPhase::Staged);
    worker.commit(2).await;
    assert!(loaded(&worker) == sorted(&sent));
    // The next step is another one.
    worker.offer(3, step(3), 0, 1).await;
    trainer.sends(&weights(4)).await;
    worker.staged().await;
    worker.commit(3).await;
    assert!(loaded(&worker) == sorted(&weights(4)));
}

#[tokio::test]
async fn wt_4_a_trainer_that_goes_half_way_or_talks_nonsense_is_named_and_the_old_version_serves() {
    let _alone = ALONE.lock().await;
    const SOON_MS: u64 = 600;
    let cases = [
        ("goes", "did not come from the trainer"),
        ("says no more", "a broadcast did not end in time"),
        ("nonsense", "cannot be read"),
        ("too many", "at most 65536"),
    ];
    for (case, expected) in cases {
        let worker = Worker::start(taking()).await;
        let trainer = Trainer::with(&[&worker]).await;
        let (source, stage_ms) = (step(1), if case == "says no more" { SOON_MS } else { 10_000 });
        let offer =
            WeightsOffer { update: 1, version: 1, source, receivers: 1, receiver: 0, stage_ms, hold_ms: 10_000 };
        worker.ask(WeightsRequest::Offer(offer)).await;
        // Held until it was seen what becomes of it: who goes is another case.
        let _lives = match case {
            "goes" => {
                trainer.number(3).await;
                drop(trainer);
                None
            }
            "says no more" => {
                trainer.number(3).await;
                Some(trainer)
            }
            "nonsense" => {
                trainer.number(1).await;
                trainer.number(4).await;
                trainer.says(b"\x80\x02N.").await;
                Some(trainer)
            }
            _ => {
                trainer.number(usize::MAX).await;
                Some(trainer)
            }
        };
        let status = worker.staged().await;
        let failure = status.failure.expect("it failed");
        assert_eq!((status.phase, status.version, failure.phase), (WeightsPhase::Serving, 0, WeightsPhase::Staging));
        assert!(failure.why.contains(expected), "case {case}: {}", failure.why);
        // There is nobody to ask again.
        let broken = worker.until(|status| matches!(state(status), TrainerState::Broken(_))).await;
        assert!(matches!(state(&broken), TrainerState::Broken(why) if why.contains("ends the group")));
        worker.offer(2, step(2), 0, 1).await;
        let why = worker.staged().await.failure.expect("it failed").why;
        assert!(why.contains("restart it"), "case {case}: {why}");
        assert!(!worker.notes.said().iter().any(|said| said.starts_with("commit")));
    }
}

#[tokio::test]
async fn wt_4_a_trainer_that_is_not_there_is_named() {
    let worker = Worker::start(taking()).await;
    worker.ask(WeightsRequest::Join(group(1, 2))).await;
    let status = worker.until(|status| state(status) != TrainerState::Joining).await;
    assert!(matches!(state(&status), TrainerState::Broken(why) if why.contains("trainer:1: connection refused")));
    *worker.notes.name.lock().unwrap() = Some(b"\x80\x02}.".to_vec());
    worker.ask(WeightsRequest::Join(TrainerGroup { id: GROUP + 1, ..group(1, 2) })).await;
    let status = worker.until(|status| state(status) != TrainerState::Joining).await;
    assert!(matches!(state(&status), TrainerState::Broken(why) if why.contains("is no name of an NCCL group")));
    let none = Worker::start(Paths { casts_host: false, ..taking() }).await;
    none.ask(WeightsRequest::Join(group(1, 2))).await;
    let status = none.until(|status| state(status) != TrainerState::Joining).await;
    assert!(matches!(state(&status), TrainerState::Broken(why) if why.contains("no GPU")));
    // Others of the group wait in vain no longer than they were told to.
    let alone = Worker::start(taking()).await;
    *alone.notes.name.lock().unwrap() = Some(pickled_name(&group_name(&fake_nccl::setup()).unwrap()));
    alone.ask(WeightsRequest::Join(TrainerGroup { timeout_ms: 50, ..group(1, 2) })).await;
    let status = alone.until(|status| state(status) != TrainerState::Joining).await;
    assert!(
        matches!(state(&status), TrainerState::Broken(why) if why.contains("rank 1 of 2") && why.contains("in time"))
    );
}
