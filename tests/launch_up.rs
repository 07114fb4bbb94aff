//! `pdlink up` with real processes, started, watched, killed and ended: a stand-in for vLLM, and the reference engine.

#[path = "support/launch.rs"]
mod launch;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use launch::{Place, Process, all_end, descendants, post, serve_as_stand_in, status, wait_for, zombies_of};
use rustix::process::Signal;

const PD: &str = "[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n\
                  kv_connector = \"NixlConnector\"\nconnector_impl = \"vllm\"\n";

/// The program behind the stand-in for vllm, where a port tells it to be one.
#[test]
fn stand_in_for_vllm() {
    serve_as_stand_in();
}

#[test]
fn a_fleet_comes_up_and_ends_with_status_0_on_sigterm() {
    let place = Place::new();
    let mut up = place.up(&place.stand_in_config(PD), &[], &[]);
    let ready = up.line_with("ready: http");
    assert!(ready.ends_with("/v1 (1 prefill, 1 decode, NixlConnector, vllm)"), "{ready}");
    let base_url = ready.split(' ').nth(1).expect("an address").to_owned();
    assert_eq!(status(&base_url.replace("/v1", "/health")), Some(200), "the proxy serves");
    let processes = descendants(up.pid());
    assert!(processes.len() >= 4, "two guards and two workers: {processes:?}");

    let port = up.ports().remove(0);
    let argv = place.record(&format!("{port}.argv"));
    assert!(
        argv.starts_with("serve\nM\n--host\n127.0.0.1\n") && argv.contains("\"kv_role\":\"kv_producer\""),
        "{argv}"
    );
    let env = place.record(&format!("{port}.env"));
    assert!(env.contains("CUDA_VISIBLE_DEVICES=0\n") && env.contains("VLLM_NIXL_SIDE_CHANNEL_PORT="), "{env}");

    up.signal(Signal::TERM);
    let (ended, said) = up.ended();
    assert!(ended.success(), "{ended}: {said}");
    assert!(said.lines().last().is_some_and(|line| line.starts_with("all has ended, after ")), "{said}");
    assert!(!said.contains('\u{1b}'), "no colours where there is no terminal: {said}");
    all_end(&processes);
    assert_eq!(place.run_dirs(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn no_process_outlives_a_launcher_that_is_killed() {
    let place = Place::new();
    let config = place.stand_in_config(PD);
    let mut up =
        place.up(&config, &["--launcher.grace_s", "0.2"], &[("STAND_IN_CHILDREN", "1"), ("STAND_IN_STUBBORN", "1")]);
    up.base_url();
    let strays =
        || place.record("strays").lines().filter_map(|pid| Process::of(pid.parse().ok()?)).collect::<BTreeSet<_>>();
    // Two of them per worker left the session, one of those ignores SIGTERM and has lost its parent.
    let strays = wait_for(|| Some(strays()).filter(|strays| strays.len() == 4)).expect("four strays");
    let processes: BTreeSet<Process> = descendants(up.pid()).union(&strays).cloned().collect();
    assert!(strays.is_subset(&descendants(up.pid())), "guards adopt what lost its parent");
    assert_eq!(place.run_dirs().len(), 1);
    up.signal(Signal::KILL);
    all_end(&processes);
    let gone = wait_for(|| place.run_dirs().is_empty().then_some(()));
    assert!(gone.is_some(), "the guards remove the folder with the secret");
}

#[test]
fn a_killed_guard_takes_its_worker_along_and_both_come_back() {
    let place = Place::new();
    let mut up = place.up(&place.stand_in_config(PD), &[], &[("STAND_IN_CHILDREN", "1")]);
    up.base_url();
    let before = descendants(up.pid());
    let guard = before.iter().find(|process| process.command_line().contains("guard\0--grace-ms")).expect("a guard");
    let own = descendants(rustix::process::Pid::from_raw(guard.pid).expect("a process id"));
    assert!(own.len() >= 4, "a worker and its children: {own:?}");
    guard.kill();
    up.line_with("was ended together with its guard process");
    all_end(&own);
    up.line_with("ready after");
    up.signal(Signal::INT);
    assert!(up.ended().0.success());
}

#[test]
fn a_worker_that_dies_is_named_and_started_again() {
    let place = Place::new();
    let mut up = place.up(&place.stand_in_config(PD), &[], &[("STAND_IN_CHILDREN", "1")]);
    let base_url = up.base_url();
    let worker = descendants(up.pid()).into_iter().find(|process| process.command_line().contains("stand_in_for_vllm"));
    worker.expect("a worker").kill();
    let line = up.line_with("was ended by signal 9 (SIGKILL)");
    assert!(line.starts_with("warning: prefill_0") || line.starts_with("warning: decode_0"), "{line}");
    up.line_with("starting it again in 0.05 s");
    up.line_with("ready after");
    assert_eq!(status(&base_url.replace("/v1", "/health")), Some(200));
    assert_eq!(zombies_of(up.pid()), 0, "the guard took the status of all that it ended");
    up.signal(Signal::TERM);
    assert!(up.ended().0.success());
}

#[test]
fn with_restart_never_the_run_ends_with_the_reason() {
    let place = Place::new();
    let mut up = place.up(&place.stand_in_config(PD), &["--launcher.restart", "never"], &[]);
    up.base_url();
    let processes = descendants(up.pid());
    let worker = processes.iter().find(|process| process.command_line().contains("stand_in_for_vllm"));
    worker.expect("a worker").kill();
    let (ended, said) = up.ended();
    assert_eq!(ended.code(), Some(1), "{said}");
    assert!(said.contains("was ended by signal 9 (SIGKILL)") && said.contains(".log"), "{said}");
    all_end(&processes);
}

#[test]
fn a_worker_that_never_serves_ends_the_run_with_its_last_lines() {
    let place = Place::new();
    let up = place.up(&place.stand_in_config(PD), &[], &[("STAND_IN_FAILS", "1")]);
    let processes = descendants(up.pid());
    let (ended, said) = up.ended();
    assert_eq!(ended.code(), Some(1));
    assert!(said.contains("ended with status 3 before it was ready"), "{said}");
    assert!(
        said.contains("before it was ready: torch.OutOfMemoryError: CUDA out of memory."),
        "the cause, not its echo: {said}"
    );
    assert!(said.contains("→ lower `inference.gpu_memory_utilization`"), "the mend: {said}");
    assert!(said.contains("line 40") && !said.contains("line 7\n"), "{said}");
    all_end(&processes);
}

#[test]
fn asked_twice_it_ends_at_once() {
    let place = Place::new();
    let config = place.stand_in_config(PD);
    let mut up = place.up(&config, &["--launcher.grace_s", "600"], &[("STAND_IN_STUBBORN", "1")]);
    up.base_url();
    let processes = descendants(up.pid());
    up.signal(Signal::INT);
    up.line_with("once more ends at once");
    up.signal(Signal::INT);
    let (ended, said) = up.ended();
    assert!(ended.success(), "{said}");
    all_end(&processes);
}

#[test]
fn the_secret_is_its_owners_alone_and_in_no_command_line() {
    let place = Place::new();
    // The native connector is given the secret. The stand-in has no runtime to meet, so the run is looked at while it starts.
    let config = place.stand_in_config("[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n");
    let mut up = place.up(&config, &["--inference.vllm.api_key", "sk-of-the-test"], &[("STAND_IN_HANGS", "1")]);
    let ports: Vec<String> = up.ports();
    let envs: Vec<String> = ports.iter().map(|port| place.record(&format!("{port}.env"))).collect();
    let run_dirs = place.run_dirs();
    let file = run_dirs.first().expect("a run folder").join("secret");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
    assert_eq!((mode(&run_dirs[0]), mode(&file)), (0o700, 0o600));
    let secret = std::fs::read_to_string(&file).expect("ours to read");
    for process in descendants(up.pid()) {
        let line = process.command_line();
        assert!(!line.contains(secret.trim()) && !line.contains("sk-of-the-test"), "{line}");
    }
    for env in &envs {
        assert!(env.contains(&format!("PDLINK_SECRET_FILE={}\n", file.display())), "{env}");
        assert!(env.contains("VLLM_API_KEY=sk-of-the-test\n"), "{env}");
    }
    up.signal(Signal::TERM);
    let (_, said) = up.ended();
    assert!(!said.contains(secret.trim()) && !said.contains("sk-of-the-test"), "{said}");
    assert!(place.run_dirs().is_empty());
}

#[test]
fn a_fixed_port_that_is_taken_is_named_with_the_mend() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port().to_string();
    let config = place.stand_in_config(PD);
    let up = place.up(&config, &["--pd_disagg.auto_ports", "false", "--pd_disagg.proxy_port", &port], &[]);
    let (ended, said) = up.ended();
    assert_eq!(ended.code(), Some(1));
    for part in [port.as_str(), "proxy", "pd_disagg.proxy_port", "auto_ports"] {
        assert!(said.contains(part), "{part} in: {said}");
    }
    assert!(!place.path("logs").exists(), "nothing was started");
}

#[test]
fn a_vllm_that_cannot_serve_is_refused_by_name() {
    let place = Place::new();
    let config = place.stand_in_config(PD);
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("STAND_IN_VERSION", "0.19.2")], "vLLM 0.19 is too old: pdlink knows 0.20 and later"),
        (&[("STAND_IN_VERSION", "what")], "names no version"),
        (&[("PATH", "/nowhere")], "`vllm` is neither beside pdlink nor on the PATH"),
    ];
    for (env, want) in cases {
        let (ended, said) = place.up(&config, &[], env).ended();
        assert_eq!(ended.code(), Some(1), "{said}");
        assert!(said.contains(want), "{want} in: {said}");
    }
    let mut untested = place.up(&config, &["--dry-run"], &[("STAND_IN_VERSION", "0.34.0")]);
    untested.line_with("vLLM 0.34 is outside of the range pdlink is tested with (0.24 to 0.33)");
}

const NATIVE: &str = "[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n";

#[test]
fn the_environment_of_vllm_is_asked_before_anything_starts() {
    let place = Place::new().with_python();
    let ours = env!("CARGO_PKG_VERSION");
    let packages =
        |vllm: &str, wheel: &str, why: &str| format!(r#"{{"vllm": "{vllm}", "wheel": {wheel}, "why": {why}}}"#);
    let config = place.stand_in_config(NATIVE);
    let cases = [
        (packages("0.32.0", "null", "null"), "pdlink's connector is not installed with vLLM 0.32.0"),
        (packages("0.32.0", "\"9.9.9\"", "null"), "the connector in vLLM's environment is 9.9.9"),
        (packages("0.32.0", &format!("\"{ours}\""), "\"ImportError: no GLIBC\""), "ImportError: no GLIBC"),
        (packages("0.23.0", &format!("\"{ours}\""), "null"), "too old for pdlink's connector"),
    ];
    for (packages, want) in &cases {
        let (ended, said) = place.up(&config, &[], &[("STAND_IN_PACKAGES", packages)]).ended();
        assert_eq!(ended.code(), Some(1), "{said}");
        assert!(said.contains(want) && !place.path("logs/prefill_0.log").exists(), "{want} in: {said}");
    }
    let mut dry = place.up(&config, &["--dry-run"], &[("STAND_IN_PACKAGES", &cases[0].0)]);
    dry.line_with("warning: pdlink's connector is not installed");
    assert!(dry.ended().0.success(), "a dry run is for another host, perhaps");

    let good = packages("0.32.0+cpu", &format!("\"{ours}\""), "null");
    let (ended, said) = place.up(&config, &["--dry-run"], &[("STAND_IN_PACKAGES", &good)]).ended();
    assert!(ended.success() && !said.contains("warning"), "{said}");
    assert!(said.contains("by shm, tcp") && said.contains("computes on the CPU"), "{said}");

    let elsewhere = packages("0.33.0", "null", "null");
    let apart = place.stand_in_config(&format!("{NATIVE}prefill_env = {{ PYTHONPATH = '{elsewhere}' }}\n"));
    let (ended, said) = place.up(&apart, &[], &[("STAND_IN_PACKAGES", &good)]).ended();
    assert_eq!(ended.code(), Some(1), "{said}");
    assert!(said.contains("different versions of vLLM: 0.33.0") && said.contains("0.32.0+cpu"), "{said}");
    let same = packages("0.32.0+cpu", "null", "null");
    let apart = place.stand_in_config(&format!("{NATIVE}decode_env = {{ PYTHONPATH = '{same}' }}\n"));
    let (ended, said) = place.up(&apart, &[], &[("STAND_IN_PACKAGES", &good)]).ended();
    assert!(
        ended.code() == Some(1) && said.contains("connector is not installed"),
        "the role without it counts: {said}"
    );
}

#[test]
fn a_model_that_is_not_there_is_refused_before_anything_starts() {
    let place = Place::new();
    let (ended, said) =
        place.up(&place.stand_in_config(PD), &["--inference.model.name", "/no/such/model"], &[]).ended();
    assert_eq!(ended.code(), Some(1), "{said}");
    assert!(said.contains("the model `/no/such/model` is a path, and there is nothing"), "{said}");
    assert!(!place.path("logs").exists());
}

#[test]
fn a_start_is_told_as_the_log_tells_it() {
    let place = Place::new();
    let mut up = place.up(&place.stand_in_config(PD), &[], &[("STAND_IN_SLOW", "1")]);
    up.line_with("loading weights, 100 %");
    up.line_with("KV cache of 16,384 tokens");
    let ready = up.line_with("ready after");
    assert!(ready.ends_with(", KV cache of 16,384 tokens"), "{ready}");
    up.signal(Signal::TERM);
    assert!(up.ended().0.success());
}

#[test]
fn machines_get_one_object_a_line() {
    let place = Place::new();
    let mut up = place.up(&place.stand_in_config(PD), &["--json"], &[("STAND_IN_SLOW", "1")]);
    let plan = up.event("plan");
    let progress = up.event("progress");
    assert_eq!((&progress["part"], &progress["percent"]), (&"weights".into(), &100.into()));
    assert_eq!(plan["plan"]["workers"].as_array().map(Vec::len), Some(2));
    let ready = up.event("ready");
    assert_eq!(ready["base_url"], plan["plan"]["proxy"]["base_url"]);
    assert_eq!((&ready["prefill"], &ready["decode"]), (&1.into(), &1.into()));
    up.signal(Signal::TERM);
    up.event("ending");
    up.event("all_ended");
    assert!(up.ended().0.success());
}

#[test]
fn a_dry_run_starts_nothing() {
    let place = Place::new();
    let config = place.stand_in_config(PD);
    let (ended, said) = place.up(&config, &["--dry-run"], &[]).ended();
    assert!(ended.success(), "{said}");
    for part in ["prefill_0", "CUDA_VISIBLE_DEVICES=1", "serve M --host", "'{\"kv_connector\":\"NixlConnector\""] {
        assert!(said.contains(part), "{part} in: {said}");
    }
    assert!(!place.path("logs").exists() && place.run_dirs().is_empty());

    let wrong = ["--dry-run", "--inference.vllm.pipeline_parallel_size", "2"];
    let (ended, said) = place.up(&config, &wrong, &[]).ended();
    assert_eq!(ended.code(), Some(2), "{said}");
    assert!(said.contains("pipeline_parallel_size"), "{said}");

    // What only vLLM's version tells names the place too.
    let wrong = ["--dry-run", "--pd_disagg.kv_connector", "P2pNcclConnector"];
    let (ended, said) = place.up(&config, &wrong, &[]).ended();
    assert_eq!(ended.code(), Some(2), "{said}");
    assert!(said.contains("command line (--pd_disagg.kv_connector P2pNcclConnector): vLLM 0."), "{said}");
}

#[test]
fn plain_workers_stand_behind_the_same_proxy() {
    let place = Place::new();
    let mut up = place.up(&place.stand_in_config("inference_gpu_ids = [0, 1]\n"), &[], &[]);
    let ready = up.line_with("ready: http");
    assert!(ready.ends_with("(2 plain)"), "{ready}");
    up.signal(Signal::TERM);
    assert!(up.ended().0.success());
}

#[test]
fn kv_6_a_pair_that_cannot_meet_is_refused_at_start() {
    let place = Place::new();
    // KV-6: the stand-in has no runtime of ours behind its KV port.
    let config = place.stand_in_config("[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n");
    let (ended, said) = place.up(&config, &[], &[]).ended();
    assert_eq!(ended.code(), Some(1), "{said}");
    assert!(said.contains("error: decode_0 cannot take KV from prefill_0"), "{said}");
    assert!(place.run_dirs().is_empty());
}

/// The reference engine, small, on any machine.
fn reference(place: &Place) -> std::path::PathBuf {
    place.config(&format!(
        "[inference]\nengine = \"reference\"\nreference = {{ num_blocks = 64 }}\n\
         [pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n[kv]\npaths = [\"shm\"]\n\
         [launcher]\nrestart_backoff_s = 0.05\nlog_dir = {:?}\n",
        place.path("logs")
    ))
}

const QUESTION: &str = r#"{"model": "pdlink-reference", "prompt": "The same question, asked again.", "max_tokens": 8}"#;

#[test]
fn reference_workers_serve_over_the_path_of_the_ready_line_and_again_after_a_restart() {
    let place = Place::new();
    let mut up = place.up(&reference(&place), &[], &[]);
    let ready = up.line_with("ready: http");
    assert!(ready.ends_with("/v1 (1 prefill, 1 decode, P2pNcclConnector, shm)"), "{ready}");
    let url = ready.split(' ').nth(1).map(|base_url| format!("{base_url}/completions")).expect("an address");
    let first = post(&url, QUESTION);
    assert!(first.contains("\"completion_tokens\":8"), "{first}");
    for role in ["prefill", "decode"] {
        let is_worker = |process: &Process| {
            let line = process.command_line();
            line.contains(&format!("\0--role\0{role}\0")) && !line.contains("\0guard\0")
        };
        descendants(up.pid()).into_iter().find(is_worker).expect("a worker").kill();
        up.line_with("was ended by signal 9 (SIGKILL)");
        up.line_with("ready after");
        let answer = wait_for(|| Some(post(&url, QUESTION)).filter(|answer| text(answer) == text(&first)));
        assert!(answer.is_some(), "the same answer after {role} came back: {}", post(&url, QUESTION));
    }
    up.signal(Signal::TERM);
    assert!(up.ended().0.success());
}

/// The answer's text alone: ids and times differ.
fn text(answer: &str) -> Option<&str> {
    answer.split("\"text\":").nth(1)?.split(",\"logprobs\"").next()
}

#[test]
fn sixteen_launchers_at_once_all_come_up() {
    let places: Vec<Place> = (0..16).map(|_| Place::new()).collect();
    let mut ups: Vec<_> = places.iter().map(|place| place.up(&reference(place), &[], &[])).collect();
    let urls: BTreeSet<String> = ups.iter_mut().map(|up| up.base_url()).collect();
    assert_eq!(urls.len(), 16, "each has its own port: {urls:?}");
    for up in &ups {
        up.signal(Signal::TERM);
    }
    for up in ups {
        let (ended, said) = up.ended();
        assert!(ended.success(), "{said}");
    }
}

#[test]
fn two_launchers_in_one_folder_keep_their_logs_apart() {
    let place = Place::new();
    let config = reference(&place);
    let mut first = place.up(&config, &[], &[]);
    let first_url = first.base_url();
    let mut second = place.up(&config, &[], &[]);
    let folder = place.path("logs").join(second.pid().to_string());
    let said = second.line_with("logs are in ");
    assert!(said.contains(&*folder.to_string_lossy()), "{said}");
    let second_url = second.base_url();
    for url in [&first_url, &second_url] {
        assert!(post(&format!("{url}/completions"), QUESTION).contains("\"completion_tokens\":8"), "{url}");
    }
    let ups = [(first, first_url, place.path("logs")), (second, second_url, folder)];
    for (up, ..) in &ups {
        up.signal(Signal::TERM);
    }
    for (mut up, _, folder) in ups {
        let ports = up.ports();
        let (ended, said) = up.ended();
        assert!(ended.success(), "{said}");
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect("a log");
        assert_eq!(read("proxy.log").matches("end=\"done\"").count(), 1, "{}", read("proxy.log"));
        for (name, port) in ["prefill_0.log", "decode_0.log"].iter().zip(&ports) {
            let log = read(name);
            assert_eq!(log.matches("ready: http").count(), 1, "{log}");
            assert!(log.contains(&format!("ready: http://127.0.0.1:{port}/v1")), "{port}: {log}");
        }
    }
}
