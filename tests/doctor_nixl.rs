//! `pdlink doctor` against NIXL and UCX: stand-ins of each with one fault, laid out as the wheels are, and the real ones.

#[path = "support/doctor.rs"]
mod doctor;
#[path = "support/nixl.rs"]
mod nixl_library;

use std::path::{Path, PathBuf};
use std::process::Command;

use doctor::{Diagnosis, diagnose_with, vllm};

/// A Python environment whose wheel has a NIXL and a UCX that do nothing, with these modules of UCX.
struct Wheel {
    folder: tempfile::TempDir,
    packages: PathBuf,
}

fn compile(arguments: &[&str], output: &Path) {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut command = Command::new(compiler);
    let done = command.args(["-shared", "-fPIC", "-Wl,--no-as-needed", "-o"]).arg(output).args(arguments).status();
    assert!(done.expect("a C compiler, which Rust's linker is too").success());
}

impl Wheel {
    fn new(version: &str, modules: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let packages = folder.path().join("lib/python3.12/site-packages");
        let (own, libs) = (packages.join(".nixl_cu13.mesonpy.libs"), packages.join("nixl_cu13.libs"));
        for made in [&own, &libs.join("ucx"), &packages.join(format!("nixl_cu13-{version}.dist-info"))] {
            std::fs::create_dir_all(made).expect("folder");
        }
        let ucp = libs.join("libucp-0.so.0");
        stub_ucx(folder.path(), &ucp);
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake_nixl.c");
        let (ucp, rpath) = (ucp.to_str().expect("UTF-8"), format!("-Wl,-rpath,{}", libs.display()));
        compile(&[source, ucp, &rpath], &own.join("libnixl_capi.so"));
        for module in modules {
            std::fs::write(libs.join(format!("ucx/libuct_{module}.so.0.0.0")), "").expect("write");
        }
        Self { folder, packages }
    }

    fn environment(&self) -> &str {
        self.folder.path().to_str().expect("UTF-8")
    }

    fn libs(&self) -> String {
        self.packages.join("nixl_cu13.libs").to_str().expect("UTF-8").to_owned()
    }
}

/// A library by UCX's name, with nothing in it.
fn stub_ucx(scratch: &Path, file: &Path) {
    let source = scratch.join("ucp.c");
    std::fs::write(&source, "int ucp_of_a_stub;\n").expect("write");
    let soname = format!("-Wl,-soname,{}", file.file_name().expect("a name").to_str().expect("UTF-8"));
    compile(&[source.to_str().expect("UTF-8"), &soname], file);
}

/// The libraries of a run of reference engines over nixl.
fn over_nixl(environment: &str, env: &[(&str, &str)]) -> Diagnosis {
    over_nixl_with(environment, &[], env)
}

fn over_nixl_with(environment: &str, more: &[&str], env: &[(&str, &str)]) -> Diagnosis {
    let args = [
        "@",
        "configs/debug/local.toml",
        "--only",
        "libraries",
        "--kv.paths",
        "[\"nixl\"]",
        "--kv.nixl.environment",
        environment,
    ];
    diagnose_with(&[&args, more].concat(), env)
}

#[test]
fn a_ucx_without_cuda_is_named_where_kv_lies_on_gpus() {
    let (without, with) = (Wheel::new("1.5.1", &["ib", "cma"]), Wheel::new("1.5.1", &["cuda", "ib"]));
    let programs = tempfile::tempdir().expect("folder");
    let program = vllm(programs.path(), "0.33.0");
    let on_gpus = |wheel: &Wheel| {
        let args = [
            "--only",
            "libraries",
            "--inference.engine",
            "vllm",
            "--launcher.vllm_program",
            &program,
            "--pd_disagg.enabled",
            "true",
            "--pd_disagg.prefill_gpu_ids",
            "[0]",
            "--pd_disagg.decode_gpu_ids",
            "[1]",
            "--pd_disagg.connector_impl",
            "vllm",
            "--pd_disagg.kv_connector",
            "NixlConnector",
            "--kv.nixl.environment",
            wheel.environment(),
        ];
        diagnose_with(&args, &[])
    };
    let found = on_gpus(&without);
    found.assert("libraries", "nixl", "ok", &["NIXL 1.5.1", without.environment()]);
    let named = ["take GPU memory for host memory", "libuct_cuda", &without.libs(), "nixl-cu13"];
    found.assert("libraries", "nixl-gpu-memory", "fail", &named);
    let seen = on_gpus(&with).check("libraries", "nixl-gpu-memory")["seen"].as_str().expect("seen").to_owned();
    assert!(!seen.contains("for host memory:"), "{seen}");
    // KV in host memory is none of its business.
    let on_host = over_nixl(without.environment(), &[]);
    assert_ne!(on_host.check("libraries", "nixl-gpu-memory")["result"], "fail");
    on_host.assert("libraries", "ucx-transports", "ok", &["rc_verbs", "cma"]);
}

#[test]
fn two_copies_of_ucx_in_one_process_are_named_with_both_files() {
    let wheel = Wheel::new("1.5.1", &["cma"]);
    over_nixl(wheel.environment(), &[]).assert("libraries", "ucx-copies", "ok", &[&wheel.libs()]);
    let other = tempfile::tempdir().expect("folder");
    let system = other.path().join("libucp.so.0");
    stub_ucx(other.path(), &system);
    let system = system.to_str().expect("UTF-8");
    let found = over_nixl(wheel.environment(), &[("LD_PRELOAD", system)]);
    found.assert("libraries", "ucx-copies", "fail", &[system, &wheel.libs(), "LD_PRELOAD"]);
}

#[test]
fn a_version_that_nobody_tested_and_agents_that_do_not_work_are_named() {
    let wheel = Wheel::new("9.9.0", &["cma"]);
    let found = over_nixl(wheel.environment(), &[]);
    found.assert("libraries", "nixl", "warn", &["NIXL 9.9.0", "never tested", "0.9 to 1.5"]);
    // The stand-in's agents come up and have nothing to tell.
    found.assert("libraries", "nixl-together", "fail", &["starting the first", "nixl_capi_get_local_md"]);
    found.assert("libraries", "nixl-restart", "fail", &["starting the reader"]);
}

#[test]
fn a_backend_that_has_no_plugin_is_named() {
    let wheel = Wheel::new("1.5.1", &[]);
    let found = over_nixl_with(wheel.environment(), &["--kv.nixl.backend", "LIBFABRIC"], &[]);
    found.assert("libraries", "nixl", "fail", &["no backend LIBFABRIC", "there are UCX", "kv.nixl.backend"]);
}

#[test]
#[ignore = "needs NIXL's wheel"]
fn the_real_one_is_well_and_its_canary_arrives() {
    let environment = nixl_library::environment();
    let environment = environment.to_str().expect("UTF-8");
    let args = [
        "@",
        "configs/debug/local.toml",
        "--only",
        "libraries,links",
        "--kv.paths",
        "[\"nixl\"]",
        "--kv.nixl.environment",
        environment,
    ];
    let found = diagnose_with(&args, &[]);
    found.assert("libraries", "nixl", "ok", &[environment, "UCX came up"]);
    found.assert("libraries", "ucx-transports", "ok", &["tcp", "cuda_ipc", "rc_mlx5", "cma"]);
    found.assert("libraries", "ucx-copies", "ok", &[environment]);
    found.assert("libraries", "nixl-together", "ok", &["read each other"]);
    found.assert("libraries", "nixl-restart", "ok", &["was killed"]);
    found.assert("links", "nixl", "ok", &["32 MiB right"]);
    let corrupted = diagnose_with(&[&args[..], &["--corrupt", "nixl"]].concat(), &[]);
    corrupted.assert("links", "nixl", "fail", &["nixl brought wrong bytes"]);
}
