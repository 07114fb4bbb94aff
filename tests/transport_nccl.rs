//! What is NCCL's own: errors that it finds, requests in both directions at once, staging that is short.

#[path = "support/links.rs"]
mod links;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use links::*;
use pdlink::memory::{Region, to_u64};
use pdlink::security::Secret;
use pdlink::transport::{Direction, Link, Nccl, NcclSetup, Transport, TransportError};

const MIB: usize = 1024 * 1024;
const SYSTEM_ERROR: i32 = 2;
const BOTH: [Direction; 2] = [Direction::Pull, Direction::Push];

/// The other process of the tests here, when it is told to be one.
#[test]
fn peer_process() {
    be_peer();
}

/// What goes wrong is set for the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    static LOGS: std::sync::Once = std::sync::Once::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    LOGS.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).init());
    LOGGED.lock().unwrap().clear();
    fake_nccl::fail_at(0, 0, 0);
    turn
}

/// What was logged since the test began. The side that serves has nobody else to tell.
static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOGGED.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Waits for a line of the log that has all of these.
fn logs(words: &[&str]) {
    let until = soon();
    loop {
        let logged = String::from_utf8_lossy(&LOGGED.lock().unwrap()).into_owned();
        if logged.lines().any(|line| words.iter().all(|word| line.contains(word))) {
            return;
        }
        assert!(Instant::now() < until, "no line has {words:?}: {logged}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ranks of a link's communicator: who connects, and who serves.
const OURS: i32 = 0;
const THEIRS: i32 = 1;

/// The name under which we know the other end.
fn name_of(transport: &dyn Transport) -> String {
    let (_, host, port, ..): Exported = postcard::from_bytes(transport.export().as_bytes()).unwrap();
    format!("{host}:{port}")
}

/// What an export says.
type Exported = ([u8; 16], String, u16, Option<[u8; 16]>, Vec<u64>);

#[test]
fn a_communicator_that_cannot_be_made_is_named_and_the_next_one_serves() {
    let _turn = alone();
    const NAMED: &str = "ncclCommInitRankConfig failed: unhandled system error (2); made to fail";
    let pair = Pair::new(Kind::Nccl, &[MIB], &[MIB]);
    for rank in [OURS, THEIRS] {
        fake_nccl::fail_at(rank, 1, SYSTEM_ERROR);
        let error = pair.ours.connect(&pair.theirs.export(), soon()).err().unwrap().to_string();
        assert!(error.contains(&name_of(&*pair.theirs)), "rank {rank}: {error}");
        match rank {
            OURS => assert!(error.contains(NAMED), "{error}"),
            _ => logs(&[NAMED, "an nccl connection is given up", "127.0.0.1:"]),
        }
        assert_eq!(pair.transfer(Direction::Pull, whole(MIB)).unwrap().bytes, to_u64(MIB), "the first link goes on");
        pair.ours.connect(&pair.theirs.export(), soon()).unwrap();
    }
    pair.link.close();
    pair.close();
    drop(pair);
    let until = soon();
    // What a communicator was made out of ends by itself.
    while fake_nccl::living() > 0 {
        assert!(Instant::now() < until, "{} communicators were not ended", fake_nccl::living());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_error_in_the_middle_fails_the_transfer_by_name_and_the_next_link_serves() {
    let _turn = alone();
    const NAMED: &str = "what was posted (ncclCommGetAsyncError) failed: unhandled system error (2); made to fail";
    for (direction, rank) in BOTH.into_iter().flat_map(|direction| [(direction, OURS), (direction, THEIRS)]) {
        let mut pair = Pair::new(Kind::Nccl, &[16 * MIB], &[16 * MIB]);
        LOGGED.lock().unwrap().clear();
        fake_nccl::fail_at(rank, 2, SYSTEM_ERROR);
        let error = pair.transfer(direction, whole(16 * MIB)).unwrap_err();
        let (text, fenced) = (error.to_string(), error.fenced());
        assert_eq!(fenced, direction == Direction::Pull, "{direction:?}, rank {rank}: {text}");
        assert!(text.contains(&name_of(&*pair.theirs)), "{direction:?}, rank {rank}: {text}");
        match rank {
            OURS => assert!(text.contains(NAMED), "{direction:?}: {text}"),
            _ => logs(&[NAMED, "an nccl connection is given up", "127.0.0.1:"]),
        }
        assert!(!pair.link.usable());
        pair.link = pair.ours.connect(&pair.theirs.export(), soon()).unwrap();
        for direction in BOTH {
            pair.transfer(direction, whole(16 * MIB)).unwrap();
        }
        assert_same(&contents(&pair.our_regions), &contents(&pair.their_regions), "after the error");
    }
}

/// Three processes' worth of paths, all linked with each other, every link in both directions at once, with staging for two
/// requests a side: whoever waits for a buffer waits for somebody who gets on.
#[test]
fn transfers_in_all_directions_with_little_staging_end() {
    let _turn = alone();
    const LEN: usize = 8 * MIB;
    let secret = Secret::generate().unwrap();
    let setup = NcclSetup { staging_bytes: 16 << 20, ..nccl_setup(Kind::Nccl) };
    let ends: Vec<(Arc<Region>, Arc<Nccl>)> = (0..3)
        .map(|salt| {
            let region = Region::shared(6 * LEN).unwrap();
            paint(std::slice::from_ref(&region), salt);
            let regions = [region.clone()];
            (region, Arc::new(Nccl::new(&regions, &secret, &setup).unwrap()))
        })
        .collect();
    let mut links: Vec<(usize, usize, Arc<dyn Link>)> = Vec::new();
    for (from, to) in [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)] {
        links.push((from, to, ends[from].1.connect(&ends[to].1.export(), soon()).unwrap()));
    }
    // Each end is written by two pulls and two pushes, each into a stretch of its own; the first two stretches are read.
    let mut next = [2; 3];
    let mut started = Vec::new();
    for (from, to, link) in &links {
        for direction in BOTH {
            let (reader, written) = if direction == Direction::Pull { (*to, *from) } else { (*from, *to) };
            let at = next[written];
            next[written] += 1;
            let runs: Vec<_> =
                (0..to_u64(LEN) / 16_384).map(|run| (run * 16_384, to_u64(at * LEN) + run * 16_384, 16_384)).collect();
            let runs = list(vec![segment(0, 0, &runs)]);
            let grant = ends[written].1.grant(&runs).unwrap();
            let token = (direction == Direction::Push).then(|| grant.token());
            let (tell, told) = std::sync::mpsc::channel();
            let done = Box::new(move |outcome| {
                drop(grant);
                let _ = tell.send(outcome);
            });
            link.submit(request(direction, runs, token), done);
            started.push((reader, written, at, told));
        }
    }
    for (reader, written, at, told) in started {
        once(&told).unwrap();
        let got = ends[written].0.to_vec(to_u64(at * LEN), to_u64(LEN)).unwrap();
        assert!(got == ends[reader].0.to_vec(0, to_u64(LEN)).unwrap(), "stretch {at} of {written}");
    }
}

#[test]
fn what_a_peer_asks_for_is_held_against_what_there_is() {
    let _turn = alone();
    let pair = Pair::new(Kind::Nccl, &[MIB], &[4096]);
    // Our own checks believe these lengths; the peer knows better.
    let (id, host, port, gpu, _): Exported = postcard::from_bytes(pair.theirs.export().as_bytes()).unwrap();
    let lie = postcard::to_stdvec(&(id, host, port, gpu, vec![to_u64(MIB)])).unwrap();
    let lie = pdlink::transport::Export::from_bytes(lie);
    let before = (contents(&pair.our_regions), contents(&pair.their_regions));
    let outside = || list(vec![segment(0, 0, &[(4000, 4000, 97)])]);
    let submit = |direction, grant| {
        let link = pair.ours.connect(&lie, soon()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        link.submit(request(direction, outside(), grant), Box::new(move |outcome| tell.send(outcome).unwrap()));
        once(&told)
    };
    // Who reads is receiving already: all that is left is to end the connection.
    let outcome = submit(Direction::Pull, None);
    assert!(outcome.as_ref().is_err_and(TransportError::fenced), "{outcome:?}");
    let grant = pair.theirs.grant(&whole(4096)).unwrap();
    let outcome = submit(Direction::Push, Some(grant.token()));
    assert!(matches!(outcome, Err(TransportError::OutOfRange { region_len: 4096, .. })), "{outcome:?}");
    assert_eq!((contents(&pair.our_regions), contents(&pair.their_regions)), before, "not a byte moved");
    assert_eq!(pair.transfer(Direction::Pull, whole(4096)).unwrap().bytes, 4096, "the other link does not notice");
}

#[test]
fn a_library_that_is_not_there_is_named_with_the_mend() {
    let setup = NcclSetup { library: Some(PathBuf::from("/nowhere/libnccl.so.2")), ..nccl_setup(Kind::Nccl) };
    let regions = [Region::shared(4096).unwrap()];
    let error = Nccl::new(&regions, &Secret::generate().unwrap(), &setup).err().unwrap().to_string();
    assert!(error.contains("/nowhere/libnccl.so.2"), "{error}");
}

const OLD_ENV: &str = "PDLINK_TEST_OLD_NCCL";

/// What the test below runs in a process of its own: a library is opened once in a process.
#[test]
fn open_an_old_library() {
    if std::env::var_os(OLD_ENV).is_none() {
        return;
    }
    let regions = [Region::shared(4096).unwrap()];
    let opened = Nccl::new(&regions, &Secret::generate().unwrap(), &nccl_setup(Kind::Nccl));
    println!("opened: {}", opened.err().map_or_else(|| "yes".to_owned(), |error| error.to_string()));
}

#[test]
fn a_library_below_the_floor_is_refused_with_both_versions() {
    for (version, want) in [("21705", "libnccl.so.2 is NCCL 2.17.5; 2.18 or newer is needed"), ("21800", "opened: yes")]
    {
        let opened = Command::new(std::env::current_exe().unwrap())
            .args(["open_an_old_library", "--exact", "--nocapture"])
            .envs([(OLD_ENV, "1"), ("FAKE_NCCL_VERSION", version)])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&opened.stdout);
        assert!(opened.status.success() && said.contains(want), "{version}: {said}");
    }
}
