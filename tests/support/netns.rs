//! Hosts on one machine: each a network namespace of its own, joined by switches, all gone with the process that made them.
//!
//! A test runs itself again inside of a user namespace, in which it may make networks without being root. The namespaces of the
//! hosts are held by a process each, and end with it.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Set inside.
const INSIDE: &str = "PDLINK_TEST_NETWORK";

/// One network at a time: two of them under load on a small machine only wait for each other.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs `body` where networks may be made. `name` is the test's own.
pub(crate) fn in_a_network_of_its_own(name: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let check =
        ["ip link set lo up", "ip link add check0 type veth peer name check1", "ip link add check2 type bridge"];
    let checked = unshared().args(["sh", "-ec", &check.join("; ")]).output();
    match checked {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!(
            "this machine cannot make networks for tests: {}it needs iproute2 (`apt-get install iproute2`), and user namespaces with \
             networks (`sysctl kernel.unprivileged_userns_clone=1`, or a container with --privileged)",
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!("cannot run unshare ({error}); install util-linux"),
    }
    let exe = std::env::current_exe().expect("this program");
    let status = unshared()
        .arg(exe)
        .args(["--exact", name, "--nocapture", "--test-threads", "1"])
        .env(INSIDE, "1")
        .status()
        .expect("run this test again");
    assert!(status.success(), "the test failed inside; what it said is above");
}

/// A user and a network namespace in which we are root; what runs there ends with `unshare`.
fn unshared() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--fork", "--kill-child", "--"]).stdin(Stdio::null());
    command
}

/// Runs one command line, which must work.
pub(crate) fn run(line: &str) {
    let output = try_run(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn try_run(line: &str) -> Output {
    let words: Vec<&str> = line.split_whitespace().collect();
    Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// The networks: one for requests and control, one for KV.
const SWITCHES: [(&str, &str); 2] = [("br0", "10.77.0"), ("br1", "10.78.0")];

/// One host. Its cables are `e<rank>` and `k<rank>` on the switches' side, `eth0` and `kv0` on its own.
pub(crate) struct Host {
    pub(crate) rank: usize,
    holder: Child,
}

/// All hosts, and the switches between them, on which the test itself has an address.
pub(crate) struct Network {
    pub(crate) hosts: Vec<Host>,
}

impl Network {
    pub(crate) fn of(hosts: usize) -> Self {
        run("ip link set lo up");
        for (switch, net) in SWITCHES {
            run(&format!("ip link add {switch} type bridge"));
            run(&format!("ip addr add {net}.254/24 dev {switch}"));
            run(&format!("ip link set {switch} up"));
        }
        Self { hosts: (0..hosts).map(Host::new).collect() }
    }
}

/// The address of a host for requests.
pub(crate) fn address(rank: usize) -> String {
    format!("{}.{}", SWITCHES[0].1, rank + 1)
}

impl Host {
    fn new(rank: usize) -> Self {
        let holder = Command::new("unshare").args(["--net", "sleep", "86400"]).spawn().expect("a namespace");
        let pid = holder.id();
        let own = std::fs::read_link("/proc/self/ns/net").expect("our namespace");
        let deadline = Instant::now() + Duration::from_secs(20);
        let theirs = || std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        while theirs().is_none_or(|theirs| theirs == own) {
            assert!(Instant::now() < deadline, "unshare made no namespace");
            std::thread::sleep(Duration::from_millis(5));
        }
        let host = Self { rank, holder };
        for (cable, inside, (switch, net)) in [("e", "eth0", SWITCHES[0]), ("k", "kv0", SWITCHES[1])] {
            run(&format!("ip link add {cable}{rank} type veth peer name {inside} netns {pid}"));
            run(&format!("ip link set {cable}{rank} master {switch} up"));
            host.inside(&format!("ip addr add {net}.{}/24 dev {inside}", rank + 1));
            host.inside(&format!("ip link set {inside} up"));
        }
        host.inside("ip link set lo up");
        host
    }

    /// A command on this host, in a process group of its own.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--net", "--"]).arg(program).process_group(0);
        command
    }

    fn inside(&self, line: &str) {
        run(&format!("nsenter --target {} --net -- {line}", self.holder.id()));
    }

    /// Pulls both cables.
    pub(crate) fn unplug(&self) {
        self.cables("down");
    }

    pub(crate) fn plug_in(&self) {
        self.cables("up");
    }

    fn cables(&self, state: &str) {
        for cable in ["e", "k"] {
            self.cable(cable, state);
        }
    }

    /// Pulls (`down`) or plugs in one cable: `e` of requests, `k` of KV.
    pub(crate) fn cable(&self, cable: &str, state: &str) {
        run(&format!("ip link set {cable}{} {state}", self.rank));
    }

    /// Makes both cables long and bad: packets come late, and some do not come. True where the kernel did it; else a program
    /// stands in the middle of the cable.
    pub(crate) fn spoil(&self, delay_ms: u32, loss_percent: u32) -> Spoiled {
        let tc = |cable: &str| {
            try_run(&format!(
                "tc qdisc add dev {cable}{} root netem delay {delay_ms}ms loss {loss_percent}%",
                self.rank
            ))
        };
        let made: Vec<Output> = ["e", "k"].map(tc).into();
        if made.iter().all(|output| output.status.success()) {
            println!("tc netem spoils the cables of host {}", self.rank);
            return Spoiled(Vec::new());
        }
        let why = String::from_utf8_lossy(&made[0].stderr).into_owned();
        println!("no netem in this kernel ({}): a program spoils the cables of host {}", why.trim(), self.rank);
        Spoiled(["e", "k"].map(|cable| self.relay(cable, delay_ms, loss_percent)).into())
    }

    /// Takes a cable off its switch, and lets a program carry each frame between it and a new port of the switch.
    fn relay(&self, cable: &str, delay_ms: u32, loss_percent: u32) -> Child {
        let (port, rank) = (format!("{cable}{}", self.rank), self.rank);
        let switch = if cable == "e" { SWITCHES[0].0 } else { SWITCHES[1].0 };
        let (near, far) = (format!("{cable}n{rank}"), format!("{cable}f{rank}"));
        run(&format!("ip link set {port} nomaster"));
        run(&format!("ip link add {near} type veth peer name {far}"));
        run(&format!("ip link set {far} master {switch} up"));
        run(&format!("ip link set {near} up"));
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/support/bad_cable.py");
        let mut child = Command::new("python3")
            .arg(script)
            .args([&port, &near, &delay_ms.to_string(), &loss_percent.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 (`apt-get install python3`)");
        let mut line = String::new();
        let out = child.stdout.take().expect("stdout");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("a line");
        assert_eq!(line.trim(), "carrying", "the bad cable did not start");
        child
    }
}

/// Programs in the middle of cables; they end with this.
pub(crate) struct Spoiled(Vec<Child>);

impl Drop for Spoiled {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
