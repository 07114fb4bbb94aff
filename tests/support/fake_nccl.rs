//! A stand-in for NCCL's library, compiled whenever its source has changed.
#![allow(dead_code, reason = "shared by test binaries, each of which uses its own part")]

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use pdlink::transport::NcclSetup;

/// The library's file.
pub(crate) fn library() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/fake_nccl.c");
        let file = folder.join("libnccl.so.2");
        let changed = |path: &Path| std::fs::metadata(path).and_then(|found| found.modified());
        // The processes that a test starts find the one that it has made.
        if changed(&file).is_ok_and(|made| changed(&source).is_ok_and(|written| made > written)) {
            return file;
        }
        // Other test processes compile it at the same time: each puts its own in place whole.
        let own = folder.join(format!("fake_nccl_{}.so", std::process::id()));
        let compiled = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()))
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread", "-o"])
            .arg(&own)
            .arg(&source)
            .status()
            .expect("a C compiler, which Rust's linker is too");
        assert!(compiled.success());
        std::fs::rename(&own, &file).unwrap();
        file
    })
}

/// How a test takes part in the path over it.
pub(crate) fn setup() -> NcclSetup {
    NcclSetup {
        library: Some(library().to_owned()),
        environments: Vec::new(),
        staging_bytes: 32 << 20,
        multiprocessors_max: 16,
        bind: Ipv4Addr::LOCALHOST.into(),
        advertise_host: "127.0.0.1".to_owned(),
        stall_max: Duration::from_secs(10),
        connect_max: Duration::from_secs(30),
    }
}

/// A function of the library's own.
fn function<F: Copy>(name: &[u8]) -> F {
    // SAFETY: the library is ours and has no initialisers.
    let open = unsafe { libloading::Library::new(library()) }.unwrap();
    // SAFETY: the callers name the type that fake_nccl.c gives it.
    let found = *unsafe { open.get::<F>(name) }.unwrap();
    // It stays as long as the function is used.
    std::mem::forget(open);
    found
}

/// Makes the how manieth operation of a rank from now on fail, with one of NCCL's codes.
pub(crate) fn fail_at(rank: i32, operations: i32, code: i32) {
    let fail: unsafe extern "C" fn(i32, i32, i32) = function(b"fake_nccl_fail_at\0");
    // SAFETY: takes three numbers.
    unsafe { fail(rank, operations, code) };
}

/// Communicators of this process that were made and not ended.
pub(crate) fn living() -> i32 {
    let living: unsafe extern "C" fn() -> i32 = function(b"fake_nccl_living\0");
    // SAFETY: returns a number.
    unsafe { living() }
}
