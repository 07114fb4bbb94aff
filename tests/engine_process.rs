//! `pdlink engine` as a process: starts fast, listens beside a holder of its port, drains, says what is wrong.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(20);

fn engine(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
    command.arg("engine").args(args).env_remove("PDLINK_SECRET_FILE");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
}

/// Ends what a test started, also when the test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(args: &[&str]) -> (Self, String) {
        let mut child = engine(args);
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        (Self(child), line)
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("it runs");
    }

    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What follows `before` in the ready line, up to a character that no address has.
fn address(line: &str, before: &str) -> SocketAddr {
    let rest = &line[line.find(before).unwrap_or_else(|| panic!("no {before:?} in {line:?}")) + before.len()..];
    let end = rest.find([',', ')', '/']).expect("something behind it");
    rest[..end].parse().unwrap_or_else(|_| panic!("an address in {line:?}"))
}

#[test]
fn it_says_where_it_listens_and_ends_with_status_0() {
    for (role, signal) in [("prefill", Signal::TERM), ("decode", Signal::INT), ("both", Signal::TERM)] {
        let (mut running, line) = Running::start(&["--role", role, "--port", "0", "--kv-port", "0", "--model", "m"]);
        assert!(line.starts_with("ready: http://127.0.0.1:"), "{line}");
        assert!(line.contains(role), "{line}");
        TcpStream::connect(address(&line, "http://")).expect("HTTP listens");
        TcpStream::connect(address(&line, "KV ")).expect("the KV address listens");
        running.signal(signal);
        assert!(running.end().success(), "{role}");
    }
}

#[test]
fn on_every_address_it_names_one_that_peers_can_reach() {
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("secret");
    pdlink::security::Secret::generate().expect("random bytes").write_file(&secret).expect("written");
    let (_running, line) =
        Running::start(&["--port", "0", "--host", "0.0.0.0", "--secret-file", secret.to_str().expect("a path")]);
    let kv = address(&line, "KV ");
    assert!(!kv.ip().is_unspecified(), "{line}");
    TcpStream::connect(kv).expect("the KV address listens");
}

#[test]
fn it_listens_beside_whoever_holds_its_ports() {
    let holder = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
        socket.set_reuse_address(true).expect("set after the bind");
        socket
    };
    let (http, kv) = (holder(), holder());
    let port = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap().port().to_string();
    let (running, line) = Running::start(&["--role", "decode", "--port", &port(&http), "--kv-port", &port(&kv)]);
    assert!(line.starts_with(&format!("ready: http://127.0.0.1:{}/", port(&http))), "{line}");
    TcpStream::connect(address(&line, "http://")).expect("it listens");
    drop(running);
}

#[test]
fn a_wrong_command_line_or_shape_ends_with_a_reason() {
    // (arguments, exit code, what stderr names)
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--role", "middle", "--port", "0"], 2, "middle"),
        (&["--role", "both"], 2, "--port"),
        (&["--port", "0", "--inference.reference.layer", "3"], 2, "layers"),
        (&["--port", "0", "--inference.reference.layers", "many"], 2, "layers"),
        (&["--port", "0", "--tp", "3"], 1, "4 KV heads"),
        (&["--port", "0", "--host", "192.0.2.1"], 1, "192.0.2.1"),
        (&["--port", "0", "--host", "0.0.0.0"], 1, "--secret-file"),
        (&["--port", "0", "--secret-file", "/nowhere/secret"], 1, "/nowhere/secret"),
    ];
    for (args, code, named) in cases {
        let mut running = Running(engine(args));
        assert_eq!(running.end().code(), Some(*code), "case: {args:?}");
        let mut text = String::new();
        running.0.stderr.take().expect("piped").read_to_string(&mut text).expect("text");
        assert!(text.contains(named), "case: {args:?}: {text}");
    }
}
