//! What is wrong with GPUs on some machines: each is named, with numbers and what to do, or does no harm. Over a stand-in for
//! the driver, which is told to be like that, and NCCL's.
//!
//! Each test here starts this binary again with the stand-in as its driver; what it runs there ends at once anywhere else.

#[path = "support/links.rs"]
mod links;

use std::path::Path as File;
use std::sync::Arc;

use links::fake_cuda::{Driver, is_here, pass};
use links::*;
use pdlink::config::Path;
use pdlink::memory::{Device, Region, to_u64, to_usize};
use pdlink::security::Secret;
use pdlink::transport::{CudaIpc, Direction, Link, Nccl, Offer, Transport, TransportError, connect_best};

const MIB: usize = 1024 * 1024;
const BOTH: [Direction; 2] = [Direction::Pull, Direction::Push];

/// The other process of the tests here, when it is told to be one.
#[test]
fn peer_process() {
    be_peer();
}

fn on_gpu(ordinal: i32, len: usize) -> Arc<Region> {
    Region::allocated_on(&Device::open(ordinal).unwrap(), len).unwrap()
}

fn over_nccl(ordinal: i32, len: usize, secret: &Secret) -> (Arc<Region>, Arc<dyn Transport>) {
    let region = on_gpu(ordinal, len);
    paint(std::slice::from_ref(&region), u64::try_from(ordinal).unwrap());
    let transport = Nccl::new(std::slice::from_ref(&region), secret, &nccl_setup(Kind::Nccl)).unwrap();
    (region, Arc::new(transport))
}

/// A link, and what it is made over, in the order in which it may go.
type Reached = (Arc<dyn Link>, Arc<Region>, CudaIpc);

/// One end over `cuda-ipc` here, on GPU 0, and what connecting to that peer comes to.
fn connect(peer: &PeerProcess) -> Result<Reached, TransportError> {
    let region = on_gpu(0, MIB);
    let ours = CudaIpc::new(std::slice::from_ref(&region)).unwrap();
    Ok((ours.connect(&peer.export, soon())?, region, ours))
}

fn peer(environment: &[(&str, &str)]) -> PeerProcess {
    PeerProcess::that_has(Kind::CudaIpc, &[MIB], File::new("/dev/null"), environment)
}

fn submit(link: &dyn Link, direction: Direction, len: usize, theirs: &dyn Transport) -> Outcome {
    let grant = theirs.grant(&whole(len)).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    link.submit(request(direction, whole(len), Some(grant.token())), done);
    once(&told)
}

fn says(text: &str, words: &[&str]) {
    words.iter().for_each(|word| assert!(text.contains(word), "{word:?} is not in {text:?}"));
}

#[test]
fn gpus_without_peer_access_are_named_and_the_next_path_serves() {
    pass(Driver::New, &[("FAKE_CUDA_GPUS", "2"), ("FAKE_CUDA_NO_PEERS", "1")], &["inner_no_peer_access"], 1);
}

#[test]
fn inner_no_peer_access() {
    if !is_here() {
        return;
    }
    let (apart, together) = (peer(&[("PDLINK_TEST_GPUS", "0,1")]), peer(&[("PDLINK_TEST_GPUS", "0,0")]));
    let refused = connect(&apart).err().unwrap().to_string();
    says(&refused, &["over cuda-ipc", "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED (217)", "GPU-62626262-6262-"]);
    says(&refused, &["GPU 1 here, to which GPU 0 has no peer access", "gpu-peers", "nccl in kv.paths"]);
    assert!(connect(&together).is_ok(), "one GPU needs none");
    // One that is not visible here either, as `pdlink up` starts workers.
    let refused = connect(&peer(&[("FAKE_CUDA_FIRST", "2")])).err().unwrap().to_string();
    says(&refused, &["(217)", "GPU-63636363-6363-", "GPU 0 has no peer access to it", "gpu-peers", "nccl in kv.paths"]);

    let secret = Secret::generate().unwrap();
    let (region, nccl) = over_nccl(0, MIB, &secret);
    let (their_region, their_nccl) = over_nccl(1, MIB, &secret);
    let ours: [Arc<dyn Transport>; 2] = [Arc::new(CudaIpc::new(std::slice::from_ref(&region)).unwrap()), nccl];
    let offer = |path, export| Offer { path, export };
    let theirs = [offer(Path::CudaIpc, apart.export.clone()), offer(Path::Nccl, their_nccl.export())];
    let selected = connect_best(&ours, &theirs, soon()).unwrap();
    assert_eq!((selected.path, selected.passed_over[0].0), (Path::Nccl, Path::CudaIpc));
    submit(&*selected.link, Direction::Pull, MIB, &*their_nccl).unwrap();
    assert_same(&contents(&[region]), &contents(&[their_region]), "over nccl");
}

/// As `pdlink up` starts workers: each sees its own GPU alone.
#[test]
fn a_gpu_that_is_not_visible_here_is_reached_and_one_of_another_container_is_named() {
    pass(Driver::New, &[("CUDA_VISIBLE_DEVICES", "0")], &["inner_not_visible"], 1);
    let apart = [("FAKE_CUDA_APART", "1"), ("CUDA_VISIBLE_DEVICES", "0")];
    pass(Driver::New, &apart, &["inner_of_another_container"], 1);
}

#[test]
fn inner_not_visible() {
    if !is_here() {
        return;
    }
    let other = peer(&[("FAKE_CUDA_FIRST", "1"), ("CUDA_VISIBLE_DEVICES", "1")]);
    let (link, region, ours) = connect(&other).unwrap();
    submit(&*link, Direction::Pull, MIB, &ours).unwrap();
    let want: Vec<u8> = (0..to_u64(MIB)).map(|offset| pattern(2, 0, offset)).collect();
    assert_same(&contents(&[region]), &[want], "from a GPU that is not visible");
}

#[test]
fn inner_of_another_container() {
    if !is_here() {
        return;
    }
    let refused = connect(&peer(&[("FAKE_CUDA_FIRST", "1")])).err().unwrap().to_string();
    says(&refused, &["CUDA_ERROR_INVALID_DEVICE (101)", "GPU-62626262-6262-", "none of the 1 that are visible here"]);
    says(&refused, &["CUDA_VISIBLE_DEVICES is \"0\"", "MIG", "nccl in kv.paths"]);
    // One that has ended since it said what it has is on a GPU that could be reached.
    let mut gone = peer(&[]);
    gone.child.kill().unwrap();
    gone.child.wait().unwrap();
    says(&connect(&gone).err().unwrap().to_string(), &["has ended"]);
}

#[test]
fn a_gpu_that_is_not_there_is_refused_with_those_that_are() {
    let two = [("FAKE_CUDA_GPUS", "2"), ("CUDA_VISIBLE_DEVICES", "4,5")];
    pass(Driver::New, &two, &["inner_no_such_gpu"], 1);
    pass(Driver::New, &[("FAKE_CUDA_GPUS", "0"), ("CUDA_VISIBLE_DEVICES", "")], &["inner_no_gpu"], 1);
}

#[test]
fn inner_no_such_gpu() {
    if !is_here() {
        return;
    }
    assert!(Device::open(1).is_ok());
    for ordinal in [2, -1] {
        let want = format!(
            "there is no GPU {ordinal} here: 2 visible, numbered from 0 (CUDA_VISIBLE_DEVICES is \"4,5\"); ask for one of \
             those, or leave it more"
        );
        assert_eq!(Device::open(ordinal).err().unwrap().to_string(), want);
    }
}

#[test]
fn inner_no_gpu() {
    if is_here() {
        let want = "no GPU is visible here (CUDA_VISIBLE_DEVICES is \"\"); leave it one, or use host memory";
        assert_eq!(Device::open(0).err().unwrap().to_string(), want);
    }
}

/// Memory that each GPU has in the next test.
const GPU_BYTES: &str = "134217728";

#[test]
fn staging_that_does_not_fit_fails_by_name_and_what_fits_once_is_waited_for() {
    let little = [("FAKE_CUDA_GPUS", "2"), ("FAKE_CUDA_BYTES", GPU_BYTES)];
    pass(Driver::New, &little, &["inner_no_room_to_stage"], 1);
    pass(Driver::New, &little, &["inner_room_for_one_buffer"], 1);
}

/// Takes all memory of a GPU but `left` bytes.
fn all_but(ordinal: i32, left: usize) -> Arc<Region> {
    let free = Device::open(ordinal).unwrap().free_bytes().unwrap();
    on_gpu(ordinal, to_usize(free) - left)
}

#[test]
fn inner_no_room_to_stage() {
    if !is_here() {
        return;
    }
    let secret = Secret::generate().unwrap();
    let ((region, ours), (their_region, theirs)) = (over_nccl(0, MIB, &secret), over_nccl(1, MIB, &secret));
    // Buffers that were made stay: who has none yet is asked for one in this order.
    for (short, direction) in [(0, Direction::Pull), (1, Direction::Push), (0, Direction::Push), (1, Direction::Pull)] {
        let link = ours.connect(&theirs.export(), soon()).unwrap();
        let taken = all_but(short, 4 * MIB);
        let error = submit(&*link, direction, MIB, &*theirs).unwrap_err();
        let text = error.to_string();
        // Who has no memory says so; the other side knows whom it lost.
        says(&text, &["127.0.0.1:"]);
        if short == 0 {
            says(&text, &["a staging buffer of 8 MiB: 8388608 bytes on GPU 0 cannot be had, 4194304 of its"]);
            says(&text, &[GPU_BYTES, "CUDA_ERROR_OUT_OF_MEMORY (2)", "kv.nccl.staging_mib"]);
        }
        assert!(!link.usable());
        drop(taken);
    }
    let link = ours.connect(&theirs.export(), soon()).unwrap();
    for direction in BOTH {
        submit(&*link, direction, MIB, &*theirs).unwrap();
    }
    assert_same(&contents(&[region]), &contents(&[their_region]), "once there is memory");
}

#[test]
fn inner_room_for_one_buffer() {
    if !is_here() {
        return;
    }
    let (len, secret) = (24 * MIB, Secret::generate().unwrap());
    for direction in BOTH {
        let ((region, ours), (their_region, theirs)) = (over_nccl(0, len, &secret), over_nccl(1, len, &secret));
        let link = ours.connect(&theirs.export(), soon()).unwrap();
        // One buffer on each side, where two were meant.
        let _taken = [all_but(0, 9 * MIB), all_but(1, 9 * MIB)];
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| submit(&*link, direction, len, &*theirs).unwrap());
            }
        });
        assert_same(&contents(&[region]), &contents(&[their_region]), "through one buffer");
    }
}
