//! Two ends of a path, in one process or in two, with memory whose every byte depends on where it is.
#![allow(dead_code, unreachable_pub, reason = "shared by test binaries, each of which uses its own part")]

#[path = "fake_cuda.rs"]
pub mod fake_cuda;
#[path = "fake_nccl.rs"]
pub mod fake_nccl;
#[path = "nixl.rs"]
mod nixl_library;

use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use pdlink::config::Path;
use pdlink::ffi::cuda::IpcHandle;
use pdlink::memory::{Device, Region, to_u64, to_usize};
use pdlink::security::Secret;
use pdlink::transport::{
    Completion, Copied, CudaIpc, Direction, Export, FaultPlan, Faulty, Fence, Grant, GrantToken, Link, LoopbackHub,
    Nccl, NcclSetup, Nixl, NixlSetup, Run, RunList, Segment, Shm, Tcp, TcpSetup, TransferRequest, Transport,
    TransportError,
};

/// Long enough for the slowest machine; every wait ends by it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A path, and the memory it runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Loopback,
    /// GPU memory of another process, on the same GPU or on another one: `PDLINK_TEST_GPUS` names ours and the other's.
    CudaIpc,
    /// Memory files that the other side maps.
    ShmFile,
    /// Memory that only process_vm_readv and its twin reach.
    ShmBorrowed,
    Tcp,
    /// Over a stand-in for NCCL that moves host memory.
    Nccl,
    /// Between the first two GPUs, over the library that `PDLINK_TEST_NCCL` names.
    NcclGpus,
    /// As UCX chooses.
    Nixl,
    /// Where UCX has sockets alone: the peer's side takes part in every copy.
    NixlSockets,
    /// Every transfer packed, a slot at a time.
    NixlPacked,
    /// A faulty path with nothing to do wrong.
    Faultless,
}

pub type Outcome = Result<Copied, TransportError>;

/// Two ends and a link from ours to theirs.
pub struct Pair {
    pub kind: Kind,
    pub ours: Arc<dyn Transport>,
    pub theirs: Arc<dyn Transport>,
    pub our_regions: Vec<Arc<Region>>,
    pub their_regions: Vec<Arc<Region>>,
    pub link: Arc<dyn Link>,
}

/// Memory of one end of a pair.
fn region_of_end(kind: Kind, end: i32, len: usize) -> Arc<Region> {
    match kind {
        Kind::NcclGpus => Region::allocated_on(&Device::open(end).expect("two GPUs"), len).unwrap(),
        Kind::CudaIpc => Region::allocated_on(&device_of_end(to_usize(end.unsigned_abs().into())), len).unwrap(),
        _ => region(kind, len),
    }
}

/// The GPU of one end over `cuda-ipc`.
fn device_of_end(end: usize) -> Arc<Device> {
    let gpus = std::env::var("PDLINK_TEST_GPUS").unwrap_or_else(|_| "0,0".to_owned());
    let ordinals: Vec<i32> = gpus.split(',').map(|gpu| gpu.parse().expect("two numbers of GPUs")).collect();
    Device::open(ordinals[end]).expect("a GPU")
}

/// Memory of the kind that makes the path take the way it is to be tested on.
pub fn region(kind: Kind, len: usize) -> Arc<Region> {
    match kind {
        Kind::ShmBorrowed => {}
        Kind::CudaIpc => return region_of_end(kind, 0, len),
        _ => return Region::shared(len).unwrap(),
    }
    let mut memory = vec![0_u8; len].into_boxed_slice();
    let ptr = NonNull::new(memory.as_mut_ptr()).unwrap();
    // SAFETY: the boxed bytes stay where they are for as long as the region owns the box, and nobody else names them.
    unsafe { Region::borrowed(ptr, len, Box::new(memory)) }
}

/// The byte at `offset` of region `region` as `salt` says. Neighbours, pages and regions all differ.
pub fn pattern(salt: u64, region: usize, offset: u64) -> u8 {
    let mixed = (offset ^ to_u64(region) << 40 ^ salt << 48).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed.to_be_bytes()[0]
}

pub fn paint(regions: &[Arc<Region>], salt: u64) {
    for (index, region) in regions.iter().enumerate() {
        let bytes: Vec<u8> = (0..region.len()).map(|offset| pattern(salt, index, offset)).collect();
        region.copy_in(0, &bytes).unwrap();
    }
}

pub fn contents(regions: &[Arc<Region>]) -> Vec<Vec<u8>> {
    regions.iter().map(|region| region.to_vec(0, region.len()).unwrap()).collect()
}

pub fn tcp_setup() -> TcpSetup {
    TcpSetup {
        bind: Ipv4Addr::LOCALHOST.into(),
        advertise_host: "127.0.0.1".to_owned(),
        streams: 2,
        stall_max: Duration::from_secs(10),
    }
}

pub fn nccl_setup(kind: Kind) -> NcclSetup {
    let real = || std::env::var_os("PDLINK_TEST_NCCL").expect("PDLINK_TEST_NCCL names the library").into();
    let stand_in = fake_nccl::setup();
    NcclSetup { library: if kind == Kind::NcclGpus { Some(real()) } else { stand_in.library }, ..stand_in }
}

pub fn nixl_setup(kind: Kind) -> NixlSetup {
    let parameters = match kind {
        Kind::NixlSockets => vec![("engine_config".to_owned(), "TLS=tcp".to_owned())],
        _ => Vec::new(),
    };
    let environments = vec![nixl_library::environment()];
    let (staging_mb, pack_run_kb, pack_runs_min) = match kind {
        // Every run, however long.
        Kind::NixlPacked => (Some(8), Some(u64::MAX), Some(1)),
        _ => (Some(0), None, None),
    };
    NixlSetup {
        library: None,
        environments,
        backend: "UCX".to_owned(),
        parameters,
        threads: 4,
        staging_mb,
        pack_run_kb,
        pack_runs_min,
    }
}

pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

impl Pair {
    pub fn new(kind: Kind, our_lens: &[usize], their_lens: &[usize]) -> Self {
        if kind == Kind::CudaIpc {
            return Self::over_cuda_ipc(our_lens, their_lens);
        }
        let make = |end, lens: &[usize]| lens.iter().map(|len| region_of_end(kind, end, *len)).collect::<Vec<_>>();
        let (our_regions, their_regions) = (make(0, our_lens), make(1, their_lens));
        paint(&our_regions, 1);
        paint(&their_regions, 2);
        let hub = LoopbackHub::new();
        let secret = Secret::generate().unwrap();
        let open = |regions: &[Arc<Region>]| -> Arc<dyn Transport> {
            match kind {
                Kind::Loopback => hub.transport(Path::Shm, regions),
                Kind::Faultless => Faulty::around(hub.transport(Path::Shm, regions), FaultPlan::default()),
                Kind::ShmFile | Kind::ShmBorrowed => Arc::new(Shm::new(regions, 2).unwrap()),
                Kind::Tcp => Arc::new(Tcp::new(regions, &secret, &tcp_setup()).unwrap()),
                Kind::CudaIpc => unreachable!("the other end is another process"),
                Kind::Nccl | Kind::NcclGpus => Arc::new(Nccl::new(regions, &secret, &nccl_setup(kind)).unwrap()),
                Kind::Nixl | Kind::NixlSockets | Kind::NixlPacked => {
                    Arc::new(Nixl::new(regions, &nixl_setup(kind)).unwrap())
                }
            }
        };
        let (ours, theirs) = (open(&our_regions), open(&their_regions));
        let link = ours.connect(&theirs.export(), soon()).unwrap();
        Self { kind, ours, theirs, our_regions, their_regions, link }
    }

    /// A process cannot map its own GPU memory, so the other end is a process of its own. The test looks into its memory through
    /// mappings of its own.
    fn over_cuda_ipc(our_lens: &[usize], their_lens: &[usize]) -> Self {
        let peer = PeerProcess::of_regions(Kind::CudaIpc, their_lens, std::path::Path::new("/dev/null"));
        let device = device_of_end(0);
        let their_regions: Vec<_> =
            peer.handles.iter().map(|(handle, len)| Region::of_gpu_peer(&device, handle, *len).unwrap()).collect();
        let regions = |lens: &[usize]| lens.iter().map(|len| region(Kind::CudaIpc, *len)).collect::<Vec<_>>();
        let our_regions = regions(our_lens);
        paint(&our_regions, 1);
        paint(&their_regions, 2);
        let ours: Arc<dyn Transport> = Arc::new(CudaIpc::new(&our_regions).unwrap());
        let link = ours.connect(&peer.export, soon()).unwrap();
        let theirs = Arc::new(Elsewhere { grants: CudaIpc::new(&regions(their_lens)).unwrap(), peer });
        Self { kind: Kind::CudaIpc, ours, theirs, our_regions, their_regions, link }
    }

    /// Regions that a transfer in this direction reads, and those that it writes.
    pub fn ends(&self, direction: Direction) -> (&[Arc<Region>], &[Arc<Region>]) {
        match direction {
            Direction::Pull => (&self.their_regions, &self.our_regions),
            Direction::Push => (&self.our_regions, &self.their_regions),
        }
    }

    /// Starts a transfer, with a grant that lives as long as its completion does.
    pub fn start(&self, direction: Direction, runs: RunList) -> (pdlink::transport::TransferTicket, Receiver<Outcome>) {
        let grant = (direction == Direction::Push).then(|| self.theirs.grant(&runs)).and_then(Result::ok);
        let token = grant.as_ref().map(pdlink::transport::Grant::token);
        let (tell, told) = mpsc::channel();
        let done: Completion = Box::new(move |outcome| {
            drop(grant);
            let _ = tell.send(outcome);
        });
        (self.link.submit(request(direction, runs, token), done), told)
    }

    pub fn transfer(&self, direction: Direction, runs: RunList) -> Outcome {
        once(&self.start(direction, runs).1)
    }

    pub fn close(&self) {
        self.ours.close();
        self.theirs.close();
    }

    /// Whether dropping a grant alone keeps a peer out.
    pub fn fences(&self) -> bool {
        self.theirs.grant(&RunList::default()).unwrap().fence() == Fence::Fenced
    }
}

/// The transport of another process whose grants fence nobody, so that any memory like its own can give them.
struct Elsewhere {
    peer: PeerProcess,
    grants: CudaIpc,
}

impl Transport for Elsewhere {
    fn path(&self) -> Path {
        self.grants.path()
    }

    fn export(&self) -> Export {
        self.peer.export.clone()
    }

    fn connect(&self, peer: &Export, deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        self.grants.connect(peer, deadline)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        self.grants.grant(runs)
    }

    fn close(&self) {
        self.grants.close();
    }
}

pub fn request(direction: Direction, runs: RunList, grant: Option<GrantToken>) -> TransferRequest {
    TransferRequest { direction, runs, grant, deadline: soon() }
}

/// The one completion of a transfer (TR-1).
pub fn once(told: &Receiver<Outcome>) -> Outcome {
    let outcome = told.recv_timeout(PATIENCE).expect("TR-1: a completion comes");
    // The sender is gone with the completion, or about to be: either way nothing more can come.
    assert!(told.recv_timeout(PATIENCE).is_err(), "TR-1: one completion, not two");
    outcome
}

pub fn segment(src_region: u16, dst_region: u16, runs: &[(u64, u64, u64)]) -> Segment {
    let runs = runs.iter().map(|&(src, dst, len)| Run { src, dst, len }).collect();
    Segment::new(src_region, dst_region, runs)
}

pub fn list(segments: Vec<Segment>) -> RunList {
    RunList { segments }
}

/// One run over all of region 0.
pub fn whole(len: usize) -> RunList {
    list(vec![segment(0, 0, &[(0, 0, to_u64(len))])])
}

/// What a transfer must leave behind, byte by byte.
pub fn oracle(src: &[Arc<Region>], dst: &[Arc<Region>], runs: &RunList) -> Vec<Vec<u8>> {
    let (from, mut to) = (contents(src), contents(dst));
    for segment in &runs.segments {
        for run in segment.runs.iter() {
            let (src, dst, len) = (to_usize(run.src), to_usize(run.dst), to_usize(run.len));
            let bytes = &from[usize::from(segment.src_region)][src..src + len];
            to[usize::from(segment.dst_region)][dst..dst + len].copy_from_slice(bytes);
        }
    }
    to
}

/// Fails with the first byte that differs, rather than with megabytes.
pub fn assert_same(got: &[Vec<u8>], want: &[Vec<u8>], what: &str) {
    for (region, (got, want)) in got.iter().zip(want).enumerate() {
        if got == want {
            continue;
        }
        if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
            panic!("{what}: region {region} differs first at byte {at}: {} instead of {}", got[at], want[at]);
        }
    }
}

const PEER_ENV: &str = "PDLINK_TEST_PEER";

/// Another process with some memory, painted with salt 2, that offers one path and does nothing else.
pub struct PeerProcess {
    pub child: Child,
    pub export: Export,
    /// Of its regions on a GPU.
    pub handles: Vec<(IpcHandle, u64)>,
}

impl PeerProcess {
    pub fn start(kind: Kind, len: usize, secret: &std::path::Path) -> Self {
        Self::of_regions(kind, &[len], secret)
    }

    /// Runs this test binary again, as `peer_process`, a test that must call [`be_peer`].
    pub fn of_regions(kind: Kind, lens: &[usize], secret: &std::path::Path) -> Self {
        Self::that_has(kind, lens, secret, &[])
    }

    /// One with something of its own in its environment.
    pub fn that_has(kind: Kind, lens: &[usize], secret: &std::path::Path, environment: &[(&str, &str)]) -> Self {
        let lens: Vec<_> = lens.iter().map(usize::to_string).collect();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["peer_process", "--exact", "--nocapture"])
            .env(PEER_ENV, format!("{kind:?} {} {}", lens.join(","), secret.display()))
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut said = lines.filter_map(|line| Some(hex::decode(line.split_once("peer says ")?.1).unwrap()));
        let mut next = || said.next().expect("the peer says what it has");
        let (handles, export) = (next(), next());
        Self { child, export: Export::from_bytes(export), handles: postcard::from_bytes(&handles).unwrap() }
    }

    /// Has it copy all of its first region into that of `owner` and back, over and over, until it is killed.
    pub fn copy_for(&mut self, owner: &dyn Transport, grant: GrantToken) {
        let order = format!("{} {}", hex::encode(owner.export().as_bytes()), hex::encode(grant.0));
        writeln!(self.child.stdin.as_mut().unwrap(), "{order}").unwrap();
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the process is our child and not yet waited for, so its id is still its own.
        assert_eq!(unsafe { libc::kill(i32::try_from(self.child.id()).unwrap(), signal) }, 0);
    }
}

impl PeerProcess {
    /// Stops it, and waits until every thread of it stands still.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        let stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('T'))
        };
        let until = soon();
        while !std::fs::read_dir(&tasks).unwrap().flatten().all(stopped) {
            assert!(Instant::now() < until, "the peer does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The life of a [`PeerProcess`]: until its standard input closes.
pub fn be_peer() {
    let Ok(orders) = std::env::var(PEER_ENV) else { return };
    let orders: Vec<&str> = orders.split(' ').collect();
    let kind = match orders[0] {
        "ShmBorrowed" => Kind::ShmBorrowed,
        "CudaIpc" => Kind::CudaIpc,
        _ => Kind::ShmFile,
    };
    let regions: Vec<_> = orders[1].split(',').map(|len| region_of_end(kind, 1, len.parse().unwrap())).collect();
    paint(&regions, 2);
    let secret = || Secret::read_file(std::path::Path::new(orders[2])).unwrap();
    let transport: Box<dyn Transport> = match orders[0] {
        "CudaIpc" => Box::new(CudaIpc::new(&regions).unwrap()),
        "Tcp" => Box::new(Tcp::new(&regions, &secret(), &tcp_setup()).unwrap()),
        "Nccl" => Box::new(Nccl::new(&regions, &secret(), &nccl_setup(Kind::Nccl)).unwrap()),
        "Nixl" => Box::new(Nixl::new(&regions, &nixl_setup(Kind::Nixl)).unwrap()),
        "NixlSockets" => Box::new(Nixl::new(&regions, &nixl_setup(Kind::NixlSockets)).unwrap()),
        "NixlPacked" => Box::new(Nixl::new(&regions, &nixl_setup(Kind::NixlPacked)).unwrap()),
        _ => Box::new(Shm::new(&regions, 1).unwrap()),
    };
    let shared = |region: &Arc<Region>| Some((region.device()?.share(region.address()).unwrap(), region.len()));
    let handles: Vec<(IpcHandle, u64)> = regions.iter().filter_map(shared).collect();
    println!("peer says {}", hex::encode(postcard::to_stdvec(&handles).unwrap()));
    println!("peer says {}", hex::encode(transport.export().as_bytes()));
    std::io::stdout().flush().unwrap();
    for order in std::io::stdin().lines().map_while(Result::ok) {
        copy_on(&*transport, regions[0].len(), &order);
    }
}

/// What [`PeerProcess::copy_for`] asks for.
fn copy_on(transport: &dyn Transport, len: u64, order: &str) {
    let (export, grant) = order.split_once(' ').unwrap();
    let link = transport.connect(&Export::from_bytes(hex::decode(export).unwrap()), soon()).unwrap();
    let grant = GrantToken(hex::decode(grant).unwrap().try_into().unwrap());
    for direction in [Direction::Push, Direction::Pull].into_iter().cycle() {
        let (tell, told) = mpsc::channel();
        let done = Box::new(move |outcome| drop(tell.send(outcome)));
        link.submit(request(direction, whole(to_usize(len)), Some(grant)), done);
        // Its owner may go first.
        if once(&told).is_err() {
            return;
        }
    }
}
