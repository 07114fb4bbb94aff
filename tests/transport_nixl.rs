//! What the nixl path shows beyond what every path does: it rests, it does not grow, and agents may come up together.

#[path = "support/links.rs"]
mod links;

use std::sync::Arc;
use std::time::Duration;

use links::*;
use pdlink::transport::{Direction, GrantToken, Nixl, NixlSetup, RunList, Transport, TransportError};

const MIB: usize = 1024 * 1024;

/// Set in the process that a test here starts for itself: what it measures is the whole process's.
const ALONE_ENV: &str = "PDLINK_TEST_ALONE";

/// Whether this is that process; if not, runs `test` in one.
fn is_alone(test: &str) -> bool {
    if std::env::var_os(ALONE_ENV).is_some() {
        return true;
    }
    let alone = std::process::Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--include-ignored", "--nocapture"])
        .env(ALONE_ENV, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&alone.stdout).into_owned() + &String::from_utf8_lossy(&alone.stderr);
    assert!(alone.status.success(), "{said}");
    false
}

/// Processor time that this process has used.
fn used() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum::<u64>();
    Duration::from_millis(ticks * 10)
}

/// Memory that this process has in use, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn at_rest_it_uses_no_processor() {
    const REST: Duration = Duration::from_secs(4);
    if !is_alone("at_rest_it_uses_no_processor") {
        return;
    }
    for kind in [Kind::Nixl, Kind::NixlSockets, Kind::NixlPacked] {
        let pair = Pair::new(kind, &[MIB], &[MIB]);
        pair.transfer(Direction::Pull, whole(MIB)).unwrap();
        pair.transfer(Direction::Push, whole(MIB)).unwrap();
        let before = used();
        std::thread::sleep(REST);
        let at_rest = used() - before;
        assert!(at_rest <= REST / 50, "{kind:?}: {at_rest:?} of {REST:?}, with both ends in this process");
    }
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn memory_does_not_grow_with_transfers() {
    if !is_alone("memory_does_not_grow_with_transfers") {
        return;
    }
    for kind in [Kind::Nixl, Kind::NixlPacked] {
        let pair = Pair::new(kind, &[MIB], &[MIB]);
        let runs = || list(vec![segment(0, 0, &[(4096, 8192, 4096), (0, 100_000, 1000)])]);
        let transfers = |count: usize| {
            for _ in 0..count / 2 {
                pair.transfer(Direction::Pull, runs()).unwrap();
                pair.transfer(Direction::Push, runs()).unwrap();
            }
        };
        transfers(5_000);
        let before = resident();
        transfers(100_000);
        let grown = resident().saturating_sub(before);
        assert!(grown < 2 << 20, "{kind:?}: {grown} bytes more after 100,000 transfers");
    }
}

/// What is packed passes through the hands of whoever has the memory, who writes only what is granted (KV-7).
#[test]
#[ignore = "needs NIXL's wheel"]
fn kv_7_a_packed_push_lands_only_under_its_grant() {
    let len = 8 * MIB;
    let pair = Pair::new(Kind::NixlPacked, &[len], &[len]);
    let push = |runs: RunList, grant: Option<GrantToken>| {
        let (tell, told) = std::sync::mpsc::channel();
        pair.link.submit(request(Direction::Push, runs, grant), Box::new(move |outcome| tell.send(outcome).unwrap()));
        told
    };
    let before = contents(&pair.their_regions);
    let inside = || list(vec![segment(0, 0, &[(0, 4096, 4096)])]);
    let narrow = pair.theirs.grant(&inside()).unwrap();
    let token = Some(narrow.token());
    for (grant, runs) in [
        (None, inside()),
        (Some(GrantToken([9; 16])), inside()),
        (token, list(vec![segment(0, 0, &[(0, 4095, 2)])])),
        (token, list(vec![segment(0, 0, &[(0, 4096, 4), (0, 8191, 2)])])),
    ] {
        let outcome = once(&push(runs, grant));
        assert!(matches!(outcome, Err(TransportError::NotGranted { .. })), "{outcome:?}");
    }
    assert_same(&contents(&pair.their_regions), &before, "without a grant");
    once(&push(inside(), token)).unwrap();
    drop(narrow);
    assert!(matches!(once(&push(inside(), token)), Err(TransportError::NotGranted { .. })));

    for delay_us in [0, 100, 500, 2000, 5000] {
        let grant = pair.theirs.grant(&whole(len)).unwrap();
        let told = push(whole(len), Some(grant.token()));
        std::thread::sleep(Duration::from_micros(delay_us));
        drop(grant);
        pair.their_regions[0].fill(0, len as u64, 0xA5).unwrap();
        let outcome = once(&told);
        assert!(matches!(outcome, Ok(_) | Err(TransportError::NotGranted { .. })), "{outcome:?}");
        assert!(contents(&pair.their_regions)[0] == vec![0xA5; len], "revoked after {delay_us} us");
    }
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn many_short_runs_go_packed_where_there_is_staging_and_all_others_one_by_one() {
    const SLOT: u64 = 512 << 10;
    let regions: Vec<_> = (0..2).map(|_| region(Kind::Nixl, 64 * MIB)).collect();
    let setup = NixlSetup { staging_mb: Some(32), ..nixl_setup(Kind::Nixl) };
    let open = |region| Nixl::new(std::slice::from_ref(region), &setup).unwrap();
    let (ours, theirs) = (open(&regions[0]), open(&regions[1]));
    let link = ours.connect(&theirs.export(), soon()).unwrap();
    let posts = |runs: u64, run_bytes: u64| {
        let runs: Vec<_> = (0..runs).map(|index| (index * run_bytes, index * (run_bytes + 1), run_bytes)).collect();
        let (tell, told) = std::sync::mpsc::channel();
        let done = Box::new(move |outcome| tell.send(outcome).unwrap());
        link.submit(request(Direction::Pull, list(vec![segment(0, 0, &runs)]), None), done);
        once(&told).unwrap().posts
    };
    assert_eq!(posts(2048, 16 << 10), (32 << 20) / SLOT, "a request for each slot");
    assert_eq!(posts(16, 4096), 1);
    assert_eq!(posts(256, 128 << 10), 8, "a request for each 4 MiB");
    assert_eq!(posts(1, 32 << 20), 8);
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn agents_that_come_up_at_the_same_instant_all_serve() {
    let regions: Vec<_> = (0..3).map(|_| region(Kind::Nixl, MIB)).collect();
    paint(&regions, 3);
    let transports: Vec<Arc<Nixl>> = std::thread::scope(|scope| {
        let open = |region| move || Arc::new(Nixl::new(std::slice::from_ref(region), &nixl_setup(Kind::Nixl)).unwrap());
        let opening: Vec<_> = regions.iter().map(|region| scope.spawn(open(region))).collect();
        opening.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (from, owner) in transports.iter().enumerate() {
        for (to, reader) in transports.iter().enumerate().filter(|(to, _)| *to != from) {
            let link = reader.connect(&owner.export(), soon()).unwrap();
            let (tell, told) = std::sync::mpsc::channel();
            link.submit(
                request(Direction::Pull, whole(4096), None),
                Box::new(move |outcome| tell.send(outcome).unwrap()),
            );
            once(&told).unwrap();
            let (got, want) = (regions[to].to_vec(0, 4096), regions[from].to_vec(0, 4096));
            assert!(got.unwrap() == want.unwrap(), "from {from} to {to}");
            paint(&regions, 3);
        }
    }
}
