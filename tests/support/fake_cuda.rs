//! A stand-in for NVIDIA's driver, compiled whenever its source has changed, and test binaries run again over it: a process
//! loads the driver's library once, by its name.
#![allow(dead_code, reason = "shared by crates of which each uses its part")]

use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// No run of tests takes longer.
const PATIENCE: Duration = Duration::from_secs(240);

/// Which drivers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driver {
    New,
    /// Lacks what we can do without.
    Old,
}

/// Set in a process that has the stand-in for its driver.
const HERE_ENV: &str = "PDLINK_TEST_FAKE_CUDA";

/// Whether this process has the stand-in for its driver.
pub(crate) fn is_here() -> bool {
    std::env::var_os(HERE_ENV).is_some()
}

/// The folder with its library.
pub(crate) fn folder(driver: Driver) -> PathBuf {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = manifest.join("tests/support/fake_cuda.c");
    // Tests lie in `deps` of a folder of the target's.
    let target = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
    let folder = target.join("tmp").join(format!("fake_cuda_{driver:?}"));
    std::fs::create_dir_all(&folder).unwrap();
    let (file, own) = (folder.join("libcuda.so.1"), folder.join(format!("{}.so", std::process::id())));
    let changed = |path: &Path| std::fs::metadata(path).and_then(|found| found.modified());
    if changed(&file).is_ok_and(|made| changed(&source).is_ok_and(|written| made > written)) {
        return folder;
    }
    // Other test processes compile it at the same time: each puts its own in place whole.
    let compiled = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()))
        .args(["-shared", "-fPIC", "-O2", "-pthread", "-Wl,-soname,libcuda.so.1"])
        .args((driver == Driver::Old).then_some("-DOLD"))
        .arg(&source)
        .arg("-o")
        .arg(&own)
        .status()
        .expect("a C compiler, which Rust's linker is too");
    assert!(compiled.success());
    std::fs::rename(&own, &file).unwrap();
    folder
}

/// This test binary once more, over the stand-in, which is to be like `switches` say. They are at the top of its source.
pub(crate) fn again(driver: Driver, switches: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("LD_LIBRARY_PATH", folder(driver)).env(HERE_ENV, "1").envs(switches.iter().copied());
    command
}

/// How many streams this process has made: of the lowest priority, and of any other.
pub(crate) fn streams() -> (i32, i32) {
    counted(b"fake_cuda_streams\0")
}

/// How many kernels this process has launched: those of few runs, and others.
pub(crate) fn launches() -> (i32, i32) {
    counted(b"fake_cuda_launches\0")
}

/// Two numbers of the stand-in's, by the name of its function.
fn counted(name: &[u8]) -> (i32, i32) {
    // SAFETY: the library is ours, is open already, and has no initialisers.
    let library = unsafe { libloading::Library::new("libcuda.so.1") }.unwrap();
    type Count = unsafe extern "C" fn(*mut i32, *mut i32);
    // SAFETY: fake_cuda.c gives it this type.
    let count = unsafe { library.get::<Count>(name) }.unwrap();
    let (mut first, mut second) = (0, 0);
    // SAFETY: writes two numbers.
    unsafe { count(&raw mut first, &raw mut second) };
    (first, second)
}

/// Runs tests of this binary over the stand-in, ignored ones too: all whose names contain one of `tests`. There must be `count`.
pub(crate) fn pass(driver: Driver, switches: &[(&str, &str)], tests: &[&str], count: usize) {
    assert!(!is_here(), "{tests:?} name the test that runs them");
    let mut output = tempfile::tempfile().unwrap();
    let mut child = again(driver, switches)
        .arg("--include-ignored")
        .args(tests)
        .stdout(output.try_clone().unwrap())
        .stderr(output.try_clone().unwrap())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    let ended = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(10)),
            None => break None,
        }
    };
    if ended.is_none() {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let mut said = String::new();
    output.rewind().unwrap();
    output.read_to_string(&mut said).unwrap();
    let passed = ended.is_some_and(|status| status.success()) && said.contains(&format!("{count} passed; 0 failed"));
    assert!(passed, "{tests:?} over the stand-in, {switches:?}, ended: {ended:?}: {said}");
}
