//! Peers that die, hang, lie, or are not peers at all.

#[path = "support/links.rs"]
mod links;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use links::*;
use pdlink::memory::{Region, to_u64};
use pdlink::security::Secret;
use pdlink::transport::{
    CudaIpc, Direction, Export, GrantToken, Link, Nccl, Nixl, RunList, Shm, Tcp, TransferRequest, Transport,
    TransportError,
};
use serde::{Deserialize, Serialize};

const MIB: usize = 1024 * 1024;

/// The other process of the tests here, when it is told to be one.
#[test]
fn peer_process() {
    be_peer();
}

/// One end here, the other in a process of its own.
struct Apart {
    peer: PeerProcess,
    ours: Arc<dyn Transport>,
    region: Arc<Region>,
    link: Arc<dyn Link>,
    secret_file: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

impl Apart {
    fn new(kind: Kind, len: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let secret_file = folder.path().join("secret");
        let secret = Secret::generate().unwrap();
        secret.write_file(&secret_file).unwrap();
        let region = region(kind, len);
        let regions = [region.clone()];
        let ours: Arc<dyn Transport> = match kind {
            Kind::CudaIpc => Arc::new(CudaIpc::new(&regions).unwrap()),
            Kind::Tcp => Arc::new(Tcp::new(&regions, &secret, &tcp_setup()).unwrap()),
            Kind::Nccl => Arc::new(Nccl::new(&regions, &secret, &nccl_setup(Kind::Nccl)).unwrap()),
            Kind::Nixl | Kind::NixlSockets | Kind::NixlPacked => {
                Arc::new(Nixl::new(&regions, &nixl_setup(kind)).unwrap())
            }
            _ => Arc::new(Shm::new(&regions, 2).unwrap()),
        };
        let peer = PeerProcess::start(kind, len, &secret_file);
        let link = ours.connect(&peer.export, soon()).unwrap();
        Self { peer, ours, region, link, secret_file, _folder: folder }
    }

    fn start(&self, direction: Direction, runs: RunList, deadline: Instant) -> mpsc::Receiver<Outcome> {
        let (tell, told) = mpsc::channel();
        let grant = Some(GrantToken([0; 16]));
        let request = TransferRequest { direction, runs, grant, deadline };
        self.link.submit(request, Box::new(move |outcome| tell.send(outcome).unwrap()));
        told
    }

    fn pull(&self, len: usize) -> Outcome {
        once(&self.start(Direction::Pull, whole(len), soon()))
    }

    fn arrived(&self) {
        let want: Vec<u8> = (0..self.region.len()).map(|offset| pattern(2, 0, offset)).collect();
        assert_same(&contents(std::slice::from_ref(&self.region)), &[want], "from the other process");
    }
}

fn a_killed_peer_fails_its_transfers_and_its_successor_serves(kind: Kind) {
    let len = 32 * MIB;
    let mut apart = Apart::new(kind, len);
    apart.pull(len).unwrap();
    apart.arrived();

    let in_flight: Vec<_> = (0..8).map(|_| apart.start(Direction::Pull, whole(len), soon())).collect();
    apart.peer.signal(libc::SIGKILL);
    for told in &in_flight {
        if let Err(error) = once(told) {
            assert!(error.fenced(), "a pull is always fenced: {error}");
        }
    }
    apart.peer.child.wait().unwrap();
    assert!(apart.pull(len).is_err(), "nobody is there any more");
    assert!(!apart.link.usable());
    let knows = !matches!(kind, Kind::Tcp | Kind::Nccl);
    assert_eq!(apart.link.peer_gone(), knows, "paths of one host know that the process has ended");
    assert!(apart.ours.connect(&apart.peer.export, soon()).is_err());
    // TR-3, for good: not a byte moves once all completions have come.
    apart.region.fill(0, to_u64(len), 0x77).unwrap();
    apart.link.close();
    assert!(contents(std::slice::from_ref(&apart.region))[0] == vec![0x77; len]);

    let successor = PeerProcess::start(kind, len, &apart.secret_file);
    apart.link = apart.ours.connect(&successor.export, soon()).unwrap();
    apart.pull(len).unwrap();
    apart.arrived();
}

#[test]
fn a_killed_peer_over_mapped_shm() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::ShmFile);
}

#[test]
fn a_killed_peer_over_process_vm() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::ShmBorrowed);
}

#[test]
fn a_killed_peer_over_tcp() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::Tcp);
}

#[test]
#[ignore = "needs a GPU"]
fn a_killed_peer_over_cuda_ipc() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::CudaIpc);
}

#[test]
fn what_holds_on_gpus_holds_over_a_stand_in_for_the_driver() {
    let gpus = [("FAKE_CUDA_GPUS", "2"), ("PDLINK_TEST_GPUS", "0,1")];
    fake_cuda::pass(fake_cuda::Driver::New, &gpus, &["peer_over_cuda_ipc"], 3);
}

/// Whoever copies is killed in the middle: the owner of the memory goes on, keeps it once no grant is left, and serves others.
fn a_killed_copying_peer_harms_nobody(kind: Kind) {
    let len = 4 * MIB;
    let mut apart = Apart::new(kind, len);
    let filled = |apart: &Apart, byte: u8| contents(std::slice::from_ref(&apart.region))[0] == vec![byte; len];
    for _ in 0..2 {
        apart.region.fill(0, to_u64(len), 0).unwrap();
        let grant = apart.ours.grant(&whole(len)).unwrap();
        apart.peer.copy_for(&*apart.ours, grant.token());
        let until = soon();
        while apart.region.to_vec(0, 1).unwrap()[0] != pattern(2, 0, 0) {
            assert!(Instant::now() < until, "nothing is copied");
            std::thread::sleep(Duration::from_millis(1));
        }
        apart.peer.signal(libc::SIGKILL);
        apart.peer.child.wait().unwrap();
        drop(grant);
        apart.region.fill(0, to_u64(len), 0x55).unwrap();
        // The link to what was killed ends, and its memory goes with it.
        apart.link.close();
        apart.peer = PeerProcess::start(kind, len, &apart.secret_file);
        assert!(filled(&apart, 0x55), "TR-3: nothing of the dead peer's lands any more");
        apart.link = apart.ours.connect(&apart.peer.export, soon()).unwrap();
        apart.pull(len).unwrap();
        apart.arrived();
    }
}

#[test]
fn a_killed_copying_peer_over_mapped_shm() {
    a_killed_copying_peer_harms_nobody(Kind::ShmFile);
}

#[test]
fn a_killed_copying_peer_over_tcp() {
    a_killed_copying_peer_harms_nobody(Kind::Tcp);
}

#[test]
fn a_killed_copying_peer_over_nccl() {
    a_killed_copying_peer_harms_nobody(Kind::Nccl);
}

#[test]
#[ignore = "needs a GPU"]
fn a_killed_copying_peer_over_cuda_ipc() {
    a_killed_copying_peer_harms_nobody(Kind::CudaIpc);
}

/// Where whoever submits copies alone, an owner of memory that hangs holds up nobody, and closing neither.
fn a_hung_owner_holds_up_nobody(kind: Kind) {
    let len = 4 * MIB;
    let apart = Apart::new(kind, len);
    apart.peer.stop();
    apart.pull(len).unwrap();
    apart.arrived();
    once(&apart.start(Direction::Push, whole(len), soon())).unwrap();
    assert!(apart.link.usable() && !apart.link.peer_gone());
    let in_flight: Vec<_> = (0..4).map(|_| apart.start(Direction::Pull, whole(len), soon())).collect();
    apart.link.close();
    for told in &in_flight {
        let outcome = once(told);
        assert!(matches!(outcome, Ok(_) | Err(TransportError::Cancelled)), "{outcome:?}");
    }
    apart.region.fill(0, to_u64(len), 0x66).unwrap();
    apart.peer.signal(libc::SIGCONT);
    assert!(contents(std::slice::from_ref(&apart.region))[0] == vec![0x66; len], "TR-3: nothing lands after the close");
}

#[test]
fn a_hung_peer_over_mapped_shm() {
    a_hung_owner_holds_up_nobody(Kind::ShmFile);
}

#[test]
#[ignore = "needs a GPU"]
fn a_hung_peer_over_cuda_ipc() {
    a_hung_owner_holds_up_nobody(Kind::CudaIpc);
}

/// A dead peer's memory is free for its successor: the mappings of one that was killed go with its links.
#[test]
#[ignore = "needs a GPU"]
fn killed_peers_leave_no_gpu_memory_behind() {
    let restarts: usize = std::env::var("PDLINK_TEST_RESTARTS").map_or(100, |count| count.parse().unwrap());
    let len = 256 * MIB;
    let apart = Apart::new(Kind::CudaIpc, len);
    let free = || apart.region.device().unwrap().free_bytes().unwrap();
    let at_rest = free();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..restarts.div_ceil(8) {
                    let peer = PeerProcess::start(Kind::CudaIpc, len, &apart.secret_file);
                    let link = apart.ours.connect(&peer.export, soon()).unwrap();
                    let (tell, told) = mpsc::channel();
                    // Half of them die in the middle.
                    let pull = request(Direction::Pull, whole(len), None);
                    link.submit(pull, Box::new(move |outcome| tell.send(outcome).unwrap()));
                    peer.signal(libc::SIGKILL);
                    let _ = once(&told);
                    drop(peer);
                    link.close();
                }
            });
        }
    });
    // The driver takes a moment to clear up after a process.
    let until = soon();
    while free() + to_u64(len) < at_rest {
        assert!(Instant::now() < until, "{} of {at_rest} bytes free after {restarts} restarts", free());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_killed_peer_over_nccl() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::Nccl);
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn a_killed_peer_over_nixl() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::Nixl);
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn a_killed_peer_over_nixl_sockets() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::NixlSockets);
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn a_killed_peer_over_packing_nixl() {
    a_killed_peer_fails_its_transfers_and_its_successor_serves(Kind::NixlPacked);
}

/// As over tcp, though NIXL cannot take back a read: the agent that reads goes, and links to other peers do not notice.
#[test]
#[ignore = "needs NIXL's wheel"]
fn a_hung_peer_over_nixl_is_bounded_and_costs_no_other_link() {
    a_hung_peer_is_bounded_and_costs_no_other_link(Kind::NixlSockets);
}

/// Here it is the peer's own packing that hangs.
#[test]
#[ignore = "needs NIXL's wheel"]
fn a_hung_peer_over_packing_nixl_is_bounded_and_costs_no_other_link() {
    a_hung_peer_is_bounded_and_costs_no_other_link(Kind::NixlPacked);
}

fn a_hung_peer_is_bounded_and_costs_no_other_link(kind: Kind) {
    let len = 32 * MIB;
    for direction in [Direction::Pull, Direction::Push] {
        let mut apart = Apart::new(kind, len);
        let bystander = PeerProcess::start(kind, len, &apart.secret_file);
        let link = apart.ours.connect(&bystander.export, soon()).unwrap();
        apart.pull(10).unwrap();
        apart.peer.stop();
        let hung = apart.start(direction, whole(len), Instant::now() + Duration::from_millis(200));
        let error = once(&hung).unwrap_err();
        assert_eq!(error.fenced(), direction == Direction::Pull, "{error}");
        assert!(!apart.link.usable() && !apart.link.peer_gone());
        apart.region.fill(0, to_u64(len), 0x33).unwrap();
        apart.peer.signal(libc::SIGCONT);
        std::thread::sleep(Duration::from_millis(200));
        assert!(
            contents(std::slice::from_ref(&apart.region))[0] == vec![0x33; len],
            "TR-3: late bytes are thrown away"
        );
        assert!(link.usable());
        apart.link = link;
        apart.pull(len).unwrap();
        apart.arrived();
    }
}

/// A peer that hangs costs no more than the deadline, and says whether the bytes are fenced.
fn a_hung_peer_is_bounded_by_the_deadline(kind: Kind) {
    let len = 32 * MIB;
    let apart = Apart::new(kind, len);
    apart.peer.stop();
    let pulled = apart.start(Direction::Pull, whole(len), Instant::now() + Duration::from_millis(200));
    let behind = apart.start(Direction::Pull, whole(10), Instant::now() + Duration::from_millis(250));
    for told in [pulled, behind] {
        let outcome = once(&told);
        assert!(matches!(outcome, Err(TransportError::DeadlineMissed { .. })), "{outcome:?}");
    }
    apart.region.fill(0, to_u64(len), 0x33).unwrap();
    apart.peer.signal(libc::SIGCONT);
    std::thread::sleep(Duration::from_millis(100));
    assert!(contents(std::slice::from_ref(&apart.region))[0] == vec![0x33; len], "TR-3: late bytes are thrown away");

    let apart = Apart::new(kind, len);
    apart.peer.stop();
    let pushed = apart.start(Direction::Push, whole(len), Instant::now() + Duration::from_millis(200));
    let error = once(&pushed).unwrap_err();
    assert!(
        matches!(error, TransportError::Unfenced { .. }) && !error.fenced(),
        "only the peer's grant fences it: {error}"
    );
    apart.link.close();
    apart.peer.signal(libc::SIGCONT);
}

#[test]
fn a_hung_peer_over_tcp() {
    a_hung_peer_is_bounded_by_the_deadline(Kind::Tcp);
}

#[test]
fn a_hung_peer_over_nccl() {
    a_hung_peer_is_bounded_by_the_deadline(Kind::Nccl);
}

#[test]
fn closing_a_link_to_a_hung_peer_does_not_hang() {
    closing_does_not_hang(Kind::Tcp);
}

#[test]
fn closing_a_link_to_a_hung_peer_does_not_hang_over_nccl() {
    closing_does_not_hang(Kind::Nccl);
}

fn closing_does_not_hang(kind: Kind) {
    let apart = Apart::new(kind, 8 * MIB);
    apart.peer.stop();
    let pull = apart.start(Direction::Pull, whole(8 * MIB), soon());
    let push = apart.start(Direction::Push, whole(8 * MIB), soon());
    apart.link.close();
    assert!(matches!(once(&pull), Err(TransportError::Cancelled)));
    // Unfenced if any of it was on its way already.
    assert!(matches!(once(&push), Err(TransportError::Cancelled | TransportError::Unfenced { .. })));
    apart.peer.signal(libc::SIGCONT);
}

/// What a tcp export says, spelt out here so that a test can lie in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct TcpExport {
    id: [u8; 16],
    host: String,
    port: u16,
    region_lens: Vec<u64>,
}

impl TcpExport {
    fn of(transport: &dyn Transport) -> Self {
        postcard::from_bytes(transport.export().as_bytes()).unwrap()
    }

    fn export(&self) -> Export {
        Export::from_bytes(postcard::to_stdvec(self).unwrap())
    }
}

#[test]
fn the_owner_of_the_memory_checks_what_it_is_asked_for() {
    let pair = Pair::new(Kind::Tcp, &[1 << 20, 1 << 20], &[4096]);
    let truth = TcpExport::of(&*pair.theirs);
    // Our own checks believe these lengths; the peer knows better.
    let lie = TcpExport { region_lens: vec![1 << 20, 1 << 20], ..truth };
    let link = pair.ours.connect(&lie.export(), soon()).unwrap();
    let submit = |direction, runs: RunList, grant| {
        let (tell, told) = mpsc::channel();
        link.submit(request(direction, runs, grant), Box::new(move |outcome| tell.send(outcome).unwrap()));
        once(&told)
    };
    let before = (contents(&pair.our_regions), contents(&pair.their_regions));
    let outside = || list(vec![segment(0, 0, &[(4000, 4000, 97)])]);
    let nowhere = || list(vec![segment(1, 1, &[(0, 0, 1)])]);
    let outcome = submit(Direction::Pull, outside(), None);
    assert!(matches!(outcome, Err(TransportError::OutOfRange { region_len: 4096, .. })), "{outcome:?}");
    let outcome = submit(Direction::Pull, nowhere(), None);
    assert!(matches!(outcome, Err(TransportError::UnknownRegion { regions: 1, .. })), "{outcome:?}");
    let grant = pair.theirs.grant(&whole(4096)).unwrap();
    let outcome = submit(Direction::Push, outside(), Some(grant.token()));
    assert!(matches!(outcome, Err(TransportError::OutOfRange { .. })), "{outcome:?}");
    let outcome = submit(Direction::Push, nowhere(), Some(grant.token()));
    assert!(matches!(outcome, Err(TransportError::UnknownRegion { .. })), "{outcome:?}");
    assert_eq!((contents(&pair.our_regions), contents(&pair.their_regions)), before, "not a byte moved");
    // The connections are still in step.
    submit(Direction::Pull, whole(4096), None).unwrap();
    assert_eq!(pair.our_regions[0].to_vec(0, 4096).unwrap(), before.1[0]);
}

#[test]
fn garbage_on_the_data_port_closes_that_connection_and_no_other() {
    let pair = Pair::new(Kind::Tcp, &[MIB], &[MIB]);
    let TcpExport { host, port, .. } = TcpExport::of(&*pair.theirs);
    let greeting = b"PDLD\x01\x00".to_vec();
    let wrong_version = b"PDLD\x63\x00".to_vec();
    let garbage =
        [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0xFF; 100_000], wrong_version, [greeting, vec![7; 500]].concat()];
    for bytes in garbage {
        let mut stranger = TcpStream::connect((host.as_str(), port)).unwrap();
        stranger.set_read_timeout(Some(PATIENCE)).unwrap();
        // The other side may close while this is still being sent.
        let _ = stranger.write_all(&bytes);
        let mut answer = Vec::new();
        let ended = stranger.read_to_end(&mut answer);
        assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset));
        assert!(answer.is_empty(), "a stranger is told nothing");
    }
    // One that says nothing at all is closed as well, and holds up nobody meanwhile.
    let mut silent = TcpStream::connect((host.as_str(), port)).unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(pair.transfer(Direction::Pull, whole(MIB)).unwrap().bytes, to_u64(MIB));
    assert_eq!(pair.transfer(Direction::Push, whole(MIB)).unwrap().bytes, to_u64(MIB));
    assert_eq!(silent.read(&mut [0]).unwrap(), 0, "closed for its silence");
    assert!(pair.link.usable());
}

#[test]
fn another_secret_or_another_process_on_the_port_is_refused_by_name() {
    let pair = Pair::new(Kind::Tcp, &[4096], &[4096]);
    let stranger = Tcp::new(&pair.our_regions, &Secret::generate().unwrap(), &tcp_setup()).unwrap();
    let refused = stranger.connect(&pair.theirs.export(), soon()).err().unwrap();
    assert!(matches!(refused, TransportError::Unauthenticated { .. }), "{refused}");
    let replaced = TcpExport { id: [1; 16], ..TcpExport::of(&*pair.theirs) };
    assert!(pair.ours.connect(&replaced.export(), soon()).is_err());
    let nobody = TcpExport { port: 1, ..TcpExport::of(&*pair.theirs) };
    assert!(matches!(pair.ours.connect(&nobody.export(), soon()), Err(TransportError::Io { attempt: "connect", .. })));
}

/// What an shm export says.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ShmExport {
    boot: String,
    pid_namespace: u64,
    pid: i32,
    start_time: u64,
    regions: Vec<(u64, Place)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Place {
    File { fd: i32, device: u64, inode: u64, prefault: bool },
    Address(u64),
}

#[test]
fn shm_maps_the_very_file_of_the_very_process_or_nothing() {
    let pair = Pair::new(Kind::ShmFile, &[4096], &[4096]);
    let truth: ShmExport = postcard::from_bytes(pair.theirs.export().as_bytes()).unwrap();
    let connect = |change: &dyn Fn(&mut ShmExport)| {
        let mut lie = truth.clone();
        change(&mut lie);
        pair.ours.connect(&Export::from_bytes(postcard::to_stdvec(&lie).unwrap()), soon()).err()
    };
    let place = |change: &dyn Fn(&mut u64, &mut i32, &mut u64)| {
        connect(&|export| {
            let (len, Place::File { fd, inode, .. }) = &mut export.regions[0] else { panic!("a file") };
            change(len, fd, inode);
        })
    };
    assert!(connect(&|_| {}).is_none(), "the truth is accepted");
    let unreachable = |error: Option<TransportError>, why: &str| {
        let told = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(told.contains(why), "{told:?} should say {why:?}");
    };
    unreachable(connect(&|export| export.start_time += 1), "has ended");
    unreachable(connect(&|export| export.boot.push('0')), "another host");
    unreachable(connect(&|export| export.pid_namespace += 1), "process id namespace");
    unreachable(connect(&|export| export.pid = 0), "no process has that id");
    unreachable(connect(&|export| export.pid = -5), "no process has that id");
    unreachable(place(&|_, _, inode| *inode += 1), "another file now");
    unreachable(place(&|_, fd, _| *fd = i32::MAX), "/proc/");
    unreachable(place(&|len, _, _| *len = 8192), "4096 bytes, 8192 were announced");
    unreachable(connect(&|export| export.regions[0].1 = Place::Address(u64::MAX - 1)), "wrap round");
    unreachable(connect(&|export| export.regions[0].1 = Place::Address(4096)), "region 0");
}
