//! Our declarations of foreign functions, held against the real libraries.

#[path = "support/nixl.rs"]
mod nixl_library;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pdlink::ffi::Search;
use pdlink::ffi::nixl::{Agent, AgentSetup, Direction, Library, MemoryType, NixlError, Progress, Remote, Span};
use pdlink::memory::Region;

const LEN: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

fn library() -> &'static Library {
    let environments = [nixl_library::environment()];
    // Opening it finds every function that is declared, or fails with the one that is not there.
    Library::open(&Search { library: None, environments: &environments }).unwrap()
}

fn setup(name: &str) -> AgentSetup<'_> {
    AgentSetup { name, backend: "UCX", parameters: &[], wake_interval: Some(Duration::from_millis(100)) }
}

fn agent(name: &str, region: &Arc<Region>) -> Agent {
    let agent = Agent::new(library(), &setup(name)).unwrap();
    agent.register(region.clone()).unwrap();
    agent
}

fn span(region: &Region, offset: u64, len: u64) -> Span {
    Span { address: region.address() + offset, len, device: 0 }
}

fn copy(remote: &std::rc::Rc<Remote>, direction: Direction, pairs: &[(Span, Span)]) -> Result<(), NixlError> {
    let host = MemoryType::Host;
    let (mut transfer, mut progress) = remote.start(direction, host, host, pairs)?;
    let until = Instant::now() + PATIENCE;
    while progress == Progress::Moving {
        assert!(Instant::now() < until, "the transfer does not end");
        progress = transfer.poll()?;
        std::thread::yield_now();
    }
    Ok(())
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn nixl_is_of_a_version_that_these_declarations_were_held_against() {
    let library = library();
    assert!(library.path().starts_with(nixl_library::environment()), "{}", library.path().display());
    assert!(
        !pdlink::ffi::nixl::is_untested(library.version())
            && library.version().starts_with(|c: char| c.is_ascii_digit()),
        "NIXL {}: read its changes, then widen this",
        library.version()
    );
    let other = Search { library: Some(std::path::Path::new("/elsewhere/libnixl_capi.so")), environments: &[] };
    assert!(matches!(Library::open(&other), Err(NixlError::Another { .. })));
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn nixl_moves_the_bytes_that_are_named_and_forgets_peers() {
    let before = threads();
    {
        let (ours, theirs) = (Region::shared(LEN).unwrap(), Region::shared(LEN).unwrap());
        let bytes: Vec<u8> = (0..LEN).map(|at| u8::try_from(at % 251).unwrap()).collect();
        theirs.copy_in(0, &bytes).unwrap();
        let (here, there) = (agent("here", &ours), agent("there", &theirs));
        let told = there.metadata().unwrap();
        // Twice: a peer that was let go of can be loaded anew.
        for round in 0..2_u8 {
            let remote = here.load(&told).unwrap();
            assert_eq!(remote.name(), "there");
            ours.fill(0, ours.len(), round).unwrap();
            let pairs =
                [(span(&ours, 10, 1000), span(&theirs, 5000, 1000)), (span(&ours, 4096, 1), span(&theirs, 0, 1))];
            copy(&remote, Direction::Read, &pairs).unwrap();
            let mut want = vec![round; LEN];
            want[10..1010].copy_from_slice(&bytes[5000..6000]);
            want[4096] = bytes[0];
            assert!(ours.to_vec(0, ours.len()).unwrap() == want, "read, round {round}");

            let pairs = [(span(&ours, 0, 100), span(&theirs, 900_000, 100))];
            copy(&remote, Direction::Write, &pairs).unwrap();
            assert_eq!(theirs.to_vec(900_000, 100).unwrap(), want[..100], "written, round {round}");
        }
        let remote = here.load(&told).unwrap();
        let outside = [
            (span(&ours, 0, 2), span(&theirs, theirs.len() - 1, 2)),
            (span(&ours, ours.len() - 1, 2), span(&theirs, 0, 2)),
        ];
        for pair in outside {
            let refused = copy(&remote, Direction::Write, &[pair]).unwrap_err();
            assert!(matches!(refused, NixlError::Call { .. }), "{refused}");
        }
        copy(&remote, Direction::Read, &[(span(&ours, 0, 1), span(&theirs, 0, 1))]).unwrap();
    }
    let until = Instant::now() + PATIENCE;
    while threads() > before {
        // UCX keeps one thread of its own for the whole process.
        if threads() == before + 1 {
            break;
        }
        assert!(Instant::now() < until, "{} threads are left of {before}", threads());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn nixl_says_what_it_lacks() {
    let unknown = Agent::new(library(), &AgentSetup { backend: "CARRIER-PIGEON", ..setup("lonely") });
    let refused = unknown.err().unwrap().to_string();
    assert!(
        refused.starts_with("NIXL has no backend CARRIER-PIGEON; there are ") && refused.contains("UCX"),
        "{refused}"
    );
    let region = Region::shared(4096).unwrap();
    let agent = agent("reader", &region);
    for rubbish in [&b""[..], b"nixl", &[0xFF; 300]] {
        let refused = agent.load(rubbish).err().unwrap();
        assert!(matches!(refused, NixlError::Call { .. }), "{refused}");
    }
    let own = agent.metadata().unwrap();
    assert!(agent.load(&own[..own.len() - 20]).is_err(), "cut short, and its own");
}
