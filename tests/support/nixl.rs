//! NIXL for tests: where its library is.
#![allow(dead_code, unreachable_pub, reason = "shared by test binaries, each of which uses its own part")]

use std::path::PathBuf;

pub const ENVIRONMENT_ENV: &str = "PDLINK_TEST_NIXL";

/// A Python environment with NIXL's wheel.
pub fn environment() -> PathBuf {
    let Some(prefix) = std::env::var_os(ENVIRONMENT_ENV) else {
        panic!("set {ENVIRONMENT_ENV} to a Python environment that has nixl-cu13 or nixl-cu12");
    };
    PathBuf::from(prefix)
}
