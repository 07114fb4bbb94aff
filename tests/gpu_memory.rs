//! Copies between host memory and a GPU's, over a stand-in for NVIDIA's driver, whose GPU memory is the host's.

use std::process::Command;

use pdlink::memory::{Device, Region};

/// Longer than what goes in one part, and no multiple of it.
const BYTES: u64 = (20 << 20) + 77;

/// The driver's library is loaded by name once in a process: so the copies are made in one that was told where the stand-in is.
#[test]
fn much_memory_that_is_not_fixed_goes_to_a_gpu_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake_cuda.c");
    let compiled = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()))
        .args(["-shared", "-fPIC", "-O2", "-pthread", "-Wl,-soname,libcuda.so.1", source, "-o"])
        .arg(folder.path().join("libcuda.so.1"))
        .status()
        .expect("a C compiler");
    assert!(compiled.success());
    let copied = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "copies_both_ways", "--ignored"])
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&copied.stdout);
    assert!(copied.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&copied.stderr));
}

#[test]
#[ignore = "needs a GPU"]
fn copies_both_ways() {
    let device = Device::open(0).unwrap();
    let bytes: Vec<u8> = (0..BYTES).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
    let (host, gpu) = (Region::shared(bytes.len()).unwrap(), Region::allocated_on(&device, bytes.len() + 100).unwrap());
    let back = Region::shared(bytes.len() + 10).unwrap();
    host.copy_in(0, &bytes).unwrap();
    host.copy_to(0, &gpu, 33, BYTES).unwrap();
    gpu.copy_to(33, &back, 5, BYTES).unwrap();
    assert!(back.to_vec(5, BYTES).unwrap() == bytes);
    assert_eq!((back.to_vec(0, 5).unwrap(), back.to_vec(BYTES + 5, 5).unwrap()), (vec![0; 5], vec![0; 5]));
    // Neither end is left.
    assert!(gpu.copy_to(33, &back, 11, BYTES).is_err() && host.copy_to(1, &gpu, 0, BYTES).is_err());
}
