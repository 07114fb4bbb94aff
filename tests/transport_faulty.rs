//! The path that goes wrong on purpose does exactly what it says, and keeps TR-1 and TR-3 meanwhile.

#[path = "support/links.rs"]
mod links;

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use links::*;
use pdlink::config::Path;
use pdlink::memory::Region;
use pdlink::transport::{
    Direction, Fault, FaultPlan, Faulty, Link, LoopbackHub, TransferRequest, TransferTicket, Transport, TransportError,
    When,
};

const LEN: usize = 10_000;

struct Rig {
    faulty: Arc<Faulty>,
    theirs: Arc<dyn Transport>,
    link: Arc<dyn Link>,
    ours: Arc<Region>,
    want: Vec<u8>,
}

fn rig(faults: &[(When, Fault)]) -> Rig {
    let hub = LoopbackHub::new();
    let (ours, source) = (Region::shared(LEN).unwrap(), Region::shared(LEN).unwrap());
    paint(std::slice::from_ref(&source), 3);
    let want = source.to_vec(0, source.len()).unwrap();
    let theirs: Arc<dyn Transport> = hub.transport(Path::Tcp, &[source]);
    let plan = FaultPlan { seed: 11, faults: faults.to_vec() };
    let faulty = Faulty::around(hub.transport(Path::Tcp, std::slice::from_ref(&ours)), plan);
    let link = faulty.connect(&theirs.export(), soon()).unwrap();
    Rig { faulty, theirs, link, ours, want }
}

impl Rig {
    fn start(&self, deadline: Instant) -> (TransferTicket, mpsc::Receiver<Outcome>) {
        self.ours.fill(0, self.ours.len(), 0).unwrap();
        let (tell, told) = mpsc::channel();
        let runs = list(vec![segment(0, 0, &[(0, 0, 4000), (4000, 4000, 6000)])]);
        let request = TransferRequest { direction: Direction::Pull, runs, grant: None, deadline };
        (self.link.submit(request, Box::new(move |outcome| tell.send(outcome).unwrap())), told)
    }

    fn pull(&self) -> Outcome {
        once(&self.start(soon()).1)
    }

    fn wrong_bytes(&self) -> usize {
        let got = self.ours.to_vec(0, self.ours.len()).unwrap();
        got.iter().zip(&self.want).filter(|(got, want)| got != want).count()
    }
}

#[test]
fn corrupt_and_lost_runs_say_that_they_are_done() {
    let rig = rig(&[(When::Nth(2), Fault::Corrupt), (When::Nth(4), Fault::Lose)]);
    let wrong: Vec<usize> = (0..5).map(|_| rig.pull().map(|_| rig.wrong_bytes()).unwrap()).collect();
    assert_eq!([wrong[0], wrong[2], wrong[4]], [0, 0, 0]);
    assert!(wrong[1] > 1000 && wrong[3] > 1000, "{wrong:?}");
}

#[test]
fn a_duplicate_is_copied_twice_and_completes_once() {
    let rig = rig(&[(When::Always, Fault::Duplicate)]);
    rig.pull().unwrap();
    assert_eq!(rig.wrong_bytes(), 0);
}

#[test]
fn a_delayed_transfer_comes_later_and_a_dropped_one_at_its_deadline() {
    let delay = Duration::from_millis(60);
    let rig = rig(&[(When::Nth(1), Fault::Delay(delay)), (When::Nth(2), Fault::Drop)]);
    let started = Instant::now();
    rig.pull().unwrap();
    assert!(started.elapsed() >= delay);
    assert_eq!(rig.wrong_bytes(), 0);
    let (_, told) = rig.start(Instant::now() + Duration::from_millis(30));
    assert!(matches!(once(&told), Err(TransportError::DeadlineMissed { .. })));
    assert!(rig.ours.to_vec(0, rig.ours.len()).unwrap() == vec![0; LEN]);
}

#[test]
fn what_is_held_back_can_be_cancelled_and_closed() {
    let rig = rig(&[(When::Always, Fault::Delay(Duration::from_secs(600)))]);
    let (ticket, told) = rig.start(soon());
    let (_, behind) = rig.start(soon());
    rig.link.cancel(ticket);
    assert!(matches!(once(&told), Err(TransportError::Cancelled)));
    rig.link.close();
    assert!(matches!(once(&behind), Err(TransportError::Cancelled)));
    rig.faulty.close();
}

#[test]
fn a_kill_ends_everything_until_the_peer_is_revived() {
    let rig = rig(&[(When::Nth(2), Fault::Delay(Duration::from_secs(600))), (When::Nth(3), Fault::Kill)]);
    rig.pull().unwrap();
    let (_, waiting) = rig.start(soon());
    let gone = |outcome: Outcome| matches!(outcome, Err(TransportError::PeerGone { .. }));
    assert!(gone(rig.pull()) && gone(once(&waiting)) && gone(rig.pull()));
    assert!(rig.link.peer_gone() && !rig.link.usable());
    assert!(rig.faulty.connect(&rig.theirs.export(), soon()).is_err());
    rig.faulty.revive();
    let link = rig.faulty.connect(&rig.theirs.export(), soon()).unwrap();
    let rig = Rig { link, ..rig };
    rig.pull().unwrap();
    assert_eq!(rig.wrong_bytes(), 0);
}

#[test]
fn chance_follows_the_seed() {
    let story = || {
        let rig = rig(&[(When::Chance(0.5), Fault::Lose)]);
        (0..64).map(|_| rig.pull().map(|_| rig.wrong_bytes() > 0).unwrap()).collect::<Vec<_>>()
    };
    let first = story();
    assert_eq!(first, story());
    assert!(first.contains(&true) && first.contains(&false));
}
