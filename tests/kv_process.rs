//! Two processes, one of which is killed: the other notices at once, frees what it held, and works with the one that
//! comes back at the same address, without a restart of its own (KV-8).

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/fake_nccl.rs"]
mod fake_nccl;
#[path = "support/kv_cache.rs"]
mod kv_cache;
#[path = "support/kv_worker.rs"]
mod kv_worker;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kv_cache::Shape;
use kv_worker::{PATIENCE, Plan, Worker};
use pdlink::config::{DigestPolicy, KvSendType, Path, Role};
use pdlink::kv::{
    Begin, BlockId, EarlyParams, End, KvLink, Offer, ParamsMaker, Progress, Prompt, TransferFailure, TransferId,
    TransferParams,
};
use pdlink::security::Secret;
use pdlink::transport::{CudaIpc, Fault, FaultPlan, Faulty, Nccl, Shm, Tcp, TcpSetup, Transport, When};

const CHILD_ENV: &str = "PDLINK_TEST_KV_CHILD";
const SRC: [BlockId; 2] = [BlockId(4), BlockId(9)];
const DST: [BlockId; 2] = [BlockId(11), BlockId(2)];

/// Paths of host memory, `nccl` over a stand-in for its library; and where the driver is a stand-in, those of its GPUs: each
/// worker sees one of its own.
fn paths() -> &'static [Path] {
    if fake_cuda::is_here() { &[Path::CudaIpc, Path::Nccl] } else { &[Path::Shm, Path::Tcp, Path::Nccl] }
}

#[test]
fn all_of_it_holds_on_gpus_of_a_stand_in() {
    fake_cuda::pass(fake_cuda::Driver::New, &[], &["kv_8"], 4);
}

fn transport(path: Path, cache: &kv_cache::Cache) -> Arc<dyn Transport> {
    match path {
        Path::Shm => return Arc::new(Shm::new(&cache.regions, 2).unwrap()),
        Path::CudaIpc => return Arc::new(CudaIpc::new(&cache.regions).unwrap()),
        Path::Nccl => {
            return Arc::new(Nccl::new(&cache.regions, &Secret::loopback(), &fake_nccl::setup()).unwrap());
        }
        _ => {}
    }
    let setup = TcpSetup {
        bind: "127.0.0.1".parse().unwrap(),
        advertise_host: "127.0.0.1".to_owned(),
        streams: 2,
        stall_max: PATIENCE,
    };
    Arc::new(Tcp::new(&cache.regions, &Secret::loopback(), &setup).unwrap())
}

/// A worker whose own copies start late: a transfer of its making can be killed in its middle.
fn worker(role: Role, path: Path, send_type: KvSendType, delay_ms: u64, listener: TcpListener) -> Worker {
    rank_worker((1, 0), role, path, send_type, delay_ms, listener)
}

/// One rank of so many.
fn rank_worker(
    (tp_size, rank): (u32, u32),
    role: Role,
    path: Path,
    send_type: KvSendType,
    delay_ms: u64,
    listener: TcpListener,
) -> Worker {
    let mut plan = Plan::new(role.name(), role);
    plan.shape = Shape { tp_size, held: Some(rank), ..plan.shape };
    (plan.send_type, plan.gpu) = (send_type, fake_cuda::is_here().then_some(0));
    (plan.kv.digest, plan.kv.part_bytes_min) = (DigestPolicy::Every, 0);
    plan.transports = Some(Box::new(move |cache| -> Vec<Arc<dyn Transport>> {
        let delay = (When::Always, Fault::Delay(Duration::from_millis(delay_ms)));
        let faults = if delay_ms == 0 { Vec::new() } else { vec![delay] };
        vec![Faulty::around(transport(path, cache), FaultPlan { seed: 1, faults })]
    }));
    plan.start_on(listener)
}

/// What the other process is told, and says. One line each.
struct Other {
    child: Child,
    lines: Receiver<String>,
    address: String,
}

impl Other {
    /// Starts this test binary again, as a worker.
    fn spawn(role: Role, path: Path, send_type: KvSendType, delay_ms: u64, address: &str) -> Self {
        Self::spawn_rank((1, 0), role, path, send_type, delay_ms, address)
    }

    fn spawn_rank(
        (tp_size, rank): (u32, u32),
        role: Role,
        path: Path,
        send_type: KvSendType,
        delay_ms: u64,
        address: &str,
    ) -> Self {
        let (path, send_type) = (path.name(), send_type.name());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env("FAKE_CUDA_FIRST", "1")
            .env(CHILD_ENV, format!("{} {path} {send_type} {delay_ms} {address} {tp_size} {rank}", role.name()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(at) = line.find("kv: ")
                    && sender.send(line[at + 4..].to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let mut other = Self { child, lines, address: String::new() };
        other.address = other.line();
        other
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line in time")
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.line()
    }

    /// kill -9, and wait until it is dead.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other process, when it is told to be one. Ends when its standard input does, or after a while.
#[test]
fn child() {
    let Ok(spec) = std::env::var(CHILD_ENV) else { return };
    let words: Vec<&str> = spec.split(' ').collect();
    let role = if words[0] == "prefill" { Role::Prefill } else { Role::Decode };
    let path = *paths().iter().find(|path| path.name() == words[1]).unwrap();
    let send_type = if words[2] == "GET" { KvSendType::Get } else { KvSendType::PutAsync };
    let ranks = (words[5].parse().unwrap(), words[6].parse().unwrap());
    let listener = TcpListener::bind(words[4]).unwrap();
    let worker = rank_worker(ranks, role, path, send_type, words[3].parse().unwrap(), listener);
    println!("\nkv: {}", worker.runtime.address());
    for line in std::io::stdin().lines().map_while(Result::ok) {
        match line.split_once(' ').unwrap() {
            ("offer", seed) => println!("\nkv: {}", worker.offer(&SRC, 8, seed.parse().unwrap()).to_json()),
            ("fetch", params) => {
                let params = TransferParams::parse(&serde_json::from_str(params).unwrap()).unwrap();
                let handle = worker.expect(&params);
                worker.fetch(handle, &DST, 0);
                println!("\nkv: fetching");
            }
            ("card", _) => println!("\nkv: {}", serde_json::to_string(&worker.runtime.card()).unwrap()),
            ("offer-as", transfer_id) => {
                let (blocks, transfer_id) = (vec![SRC.to_vec()], transfer_id.parse().unwrap());
                let offer = Offer { transfer_id, request_id: String::new(), blocks, tokens: 8 };
                worker.cache.put_tokens(&SRC, 0, 8, 1);
                worker.runtime.offer(offer).unwrap();
                println!("\nkv: offered");
            }
            ("begin", transfer_id) => {
                let (transfer_id, prompt) = (transfer_id.parse().unwrap(), EARLY);
                worker.runtime.begin(Begin { transfer_id, request_id: String::new(), prompt }).unwrap();
                worker.cache.put_tokens(&SRC[..1], 0, 4, 1);
                let blocks = Arc::new(vec![SRC[..1].to_vec()]);
                worker.runtime.progress(Progress { transfer_id, blocks, layers: 0..2, tokens: 4 });
                println!("\nkv: computing");
            }
            ("report", _) => println!("\nkv: {:?}", worker.report().end),
            ("holds", seed) => println!("\nkv: {}", worker.cache.holds_tokens(&DST, 0, 8, seed.parse().unwrap())),
            _ => return,
        }
    }
}

/// What prefill is killed while it computes.
const EARLY: Prompt = Prompt { tokens: 8, fingerprint: 3 };

fn parse(params: &str) -> TransferParams {
    TransferParams::parse(&serde_json::from_str(params).unwrap()).unwrap()
}

fn each_way(test: impl Fn(Path, KvSendType)) {
    for &path in paths() {
        for send_type in [KvSendType::Get, KvSendType::PutAsync] {
            test(path, send_type);
        }
    }
}

fn here(role: Role, path: Path, send_type: KvSendType, delay_ms: u64) -> Worker {
    worker(role, path, send_type, delay_ms, TcpListener::bind("127.0.0.1:0").unwrap())
}

/// One good transfer from the other process to this one.
fn fetch_from(other: &mut Other, decode: &Worker, seed: u64) {
    let params = parse(&other.ask(&format!("offer {seed}")));
    let handle = decode.expect(&params);
    decode.fetch(handle, &DST, 0);
    assert_eq!(decode.end_of(params.pdlink.transfer_id), End::Received);
    assert_eq!(other.ask("report -"), "Sent");
    assert!(decode.cache.holds_tokens(&DST, 0, 8, seed));
}

/// Has the two connect, however busy the machine is: by a claim that is let go of.
fn meet(other: &mut Other, decode: &Worker) {
    let params = parse(&other.ask("offer 9"));
    decode.runtime.release(decode.expect(&params));
    assert_eq!(decode.end_of(params.pdlink.transfer_id), End::Released);
    assert_eq!(other.ask("report -"), "Released");
}

#[test]
fn kv_8_prefill_killed_while_it_computes_what_decode_has_claimed() {
    for &path in paths() {
        // A part is on its way when it dies, or has just arrived.
        for delay_ms in [60_000, 0] {
            let decode = here(Role::Decode, path, KvSendType::PutAsync, 0);
            let mut prefill = Other::spawn(Role::Prefill, path, KvSendType::PutAsync, delay_ms, "127.0.0.1:0");
            let id = TransferId::random();
            assert_eq!(prefill.ask(&format!("begin {id}")), "computing");
            let params = EarlyParams::sealed(id, vec![prefill.address.clone()], &Secret::loopback());
            let handle = decode.runtime.expect_early(&params, EARLY).unwrap();
            decode.fetch(handle, &DST, 0);
            if delay_ms == 0 {
                kv_worker::until("a part has landed", || decode.cache.holds_tokens(&DST[..1], 0, 4, 1));
            } else {
                kv_worker::until("it is claimed", || decode.runtime.status().transfers_active == 1);
            }
            prefill.kill();
            let end = decode.end_of(id);
            assert!(matches!(end, End::Failed { fenced: true, .. }), "{path:?}, {delay_ms} ms: {end:?}");
            decode.assert_at_rest();
            let address = prefill.address.clone();
            let mut again = Other::spawn(Role::Prefill, path, KvSendType::PutAsync, 0, &address);
            fetch_from(&mut again, &decode, 5);
        }
    }
}

#[test]
fn kv_8_prefill_killed_under_a_transfer_and_restarted_at_its_address() {
    each_way(|path, send_type| {
        // Whoever moves the bytes is slow, so that the kill comes in time.
        let (here_ms, there_ms) = if send_type == KvSendType::Get { (60_000, 0) } else { (0, 60_000) };
        let decode = here(Role::Decode, path, send_type, here_ms);
        let mut prefill = Other::spawn(Role::Prefill, path, send_type, there_ms, "127.0.0.1:0");
        meet(&mut prefill, &decode);
        let params = parse(&prefill.ask("offer 1"));
        let handle = decode.expect(&params);
        decode.fetch(handle, &DST, 0);
        let waiting = parse(&prefill.ask("offer 2"));
        decode.expect(&waiting);
        std::thread::sleep(Duration::from_millis(200));
        prefill.kill();
        let mut ends = [decode.report(), decode.report()];
        ends.sort_by_key(|report| report.transfer_id != params.pdlink.transfer_id);
        for report in ends {
            let lost = matches!(&report.end, End::Failed { failure: TransferFailure::PeerLost { .. }, fenced: true });
            assert!(lost, "{path:?} {send_type:?}: {report:?}");
        }
        decode.assert_at_rest();

        // Back at the same address: its own parameters work, those of its former self do not.
        let decode = here(Role::Decode, path, send_type, 0);
        let address = prefill.address.clone();
        let mut prefill = Other::spawn(Role::Prefill, path, send_type, 0, &address);
        fetch_from(&mut prefill, &decode, 3);
        prefill.kill();
        let mut prefill = Other::spawn(Role::Prefill, path, send_type, 0, &address);
        fetch_from(&mut prefill, &decode, 4);
        decode.expect(&waiting);
        let end = decode.end_of(waiting.pdlink.transfer_id);
        assert!(matches!(end, End::Failed { failure: TransferFailure::StaleIncarnation { .. }, .. }), "{end:?}");
        fetch_from(&mut prefill, &decode, 5);
        decode.assert_at_rest();
    });
}

#[test]
fn kv_8_decode_killed_under_a_transfer_and_restarted_at_its_address() {
    each_way(|path, send_type| {
        let (here_ms, there_ms) = if send_type == KvSendType::Get { (0, 60_000) } else { (60_000, 0) };
        let prefill = here(Role::Prefill, path, send_type, here_ms);
        let mut decode = Other::spawn(Role::Decode, path, send_type, there_ms, "127.0.0.1:0");
        let params = prefill.offer(&SRC, 8, 1);
        assert_eq!(decode.ask(&format!("fetch {}", params.to_json())), "fetching");
        std::thread::sleep(Duration::from_millis(500));
        decode.kill();
        let end = prefill.end_of(params.pdlink.transfer_id);
        let lost = matches!(&end, End::Failed { failure: TransferFailure::PeerLost { .. }, fenced: true });
        assert!(lost, "{path:?} {send_type:?}: {end:?}");
        prefill.assert_at_rest();

        let prefill = here(Role::Prefill, path, send_type, 0);
        let mut decode = Other::spawn(Role::Decode, path, send_type, 0, &decode.address);
        for seed in 2..4 {
            let params = prefill.offer(&SRC, 8, seed);
            assert_eq!(decode.ask(&format!("fetch {}", params.to_json())), "fetching");
            assert_eq!(prefill.end_of(params.pdlink.transfer_id), End::Sent);
            assert_eq!(decode.ask("report -"), "Received");
            assert_eq!(decode.ask(&format!("holds {seed}")), "true");
            let address = decode.address.clone();
            decode.kill();
            decode = Other::spawn(Role::Decode, path, send_type, 0, &address);
        }
        prefill.assert_at_rest();
    });
}

#[test]
fn kv_8_one_rank_of_prefill_killed_under_a_transfer_ends_it_on_every_rank() {
    each_way(|path, send_type| {
        let (here_ms, there_ms) = if send_type == KvSendType::Get { (60_000, 0) } else { (0, 60_000) };
        let decode = here(Role::Decode, path, send_type, here_ms);
        let spawn = |rank| Other::spawn_rank((2, rank), Role::Prefill, path, send_type, there_ms, "127.0.0.1:0");
        let mut ranks = [spawn(0), spawn(1)];
        let cards = ranks.each_mut().map(|rank| serde_json::from_str(&rank.ask("card -")).unwrap()).to_vec();
        let maker = ParamsMaker::new(cards, Secret::loopback()).unwrap();
        let transfer_id = TransferId::random();
        let params = maker.params(transfer_id, String::new(), vec![SRC.to_vec()], 8);
        for rank in &mut ranks {
            assert_eq!(rank.ask(&format!("offer-as {transfer_id}")), "offered");
        }
        let handle = decode.expect(&params);
        decode.fetch(handle, &DST, 0);
        std::thread::sleep(Duration::from_millis(500));
        ranks[1].kill();
        let end = decode.end_of(transfer_id);
        let lost = matches!(&end, End::Failed { failure: TransferFailure::PeerLost { .. }, fenced: true });
        assert!(lost, "{path:?} {send_type:?}: {end:?}");
        let end = ranks[0].ask("report -");
        assert!(end.starts_with("Failed"), "{path:?} {send_type:?}: {end}");
        decode.assert_at_rest();
    });
}
