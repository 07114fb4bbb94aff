//! Sharing a request among threads of UCX.
//!
//! UCX copies host memory in the thread that asks, as fast as one core does and with some microseconds for each run. NIXL's UCX
//! backend can keep threads, which sleep while there is nothing to do, and splits requests of many runs between them.
#![forbid(unsafe_code)]

use super::NixlSetup;
use crate::ffi::nixl::MemoryType;

/// Names that NIXL gives to the number of threads, and to the fewest runs that one of them is given.
const THREADS: &str = "num_threads";
const RUNS_MIN: &str = "split_batch_size";
/// Fewer are done sooner than a thread wakes up.
const RUNS_MIN_DEFAULT: usize = 8;
/// Even where there is only one core to spare, a second thread copies while the first enters the kernel.
const THREADS_MIN: usize = 2;
/// Longer runs go as several, so that all threads have some.
const SPAN_BYTES_MAX: u64 = 128 << 10;

/// What the agent of our own transfers tells its backend: as configured, and threads where that leaves them open.
pub(super) fn parameters(setup: &NixlSetup, memory: MemoryType) -> Vec<(String, String)> {
    let mut parameters = setup.parameters.clone();
    if suits(setup, memory) && !parameters.iter().any(|(key, _)| key == THREADS) {
        parameters.push((THREADS.to_owned(), setup.threads.max(THREADS_MIN).to_string()));
        if !parameters.iter().any(|(key, _)| key == RUNS_MIN) {
            parameters.push((RUNS_MIN.to_owned(), RUNS_MIN_DEFAULT.to_string()));
        }
    }
    parameters
}

/// Most bytes of a run that is not cut.
pub(super) fn span_bytes_max(setup: &NixlSetup, memory: MemoryType) -> u64 {
    let alone = setup.parameters.iter().any(|(key, value)| key == THREADS && matches!(value.as_str(), "0" | "1"));
    if suits(setup, memory) && !alone { SPAN_BYTES_MAX } else { u64::MAX }
}

/// A GPU's copies are not made by the threads that ask for them.
fn suits(setup: &NixlSetup, memory: MemoryType) -> bool {
    setup.backend == "UCX" && memory == MemoryType::Host
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NixlConfig;

    fn told(config: &NixlConfig, threads: usize, memory: MemoryType) -> (String, u64) {
        let setup = NixlSetup::of(config, threads);
        let told: Vec<_> = parameters(&setup, memory).iter().map(|(key, value)| format!("{key}={value}")).collect();
        (told.join(" "), span_bytes_max(&setup, memory))
    }

    #[test]
    fn host_memory_is_shared_among_threads_unless_the_configuration_says_otherwise() {
        let plain = NixlConfig::default();
        assert_eq!(told(&plain, 8, MemoryType::Host), ("num_threads=8 split_batch_size=8".to_owned(), 128 << 10));
        assert_eq!(told(&plain, 1, MemoryType::Host).0, "num_threads=2 split_batch_size=8");
        assert_eq!(told(&plain, 8, MemoryType::Gpu), (String::new(), u64::MAX));
        let other = NixlConfig { backend: "LIBFABRIC".to_owned(), ..NixlConfig::default() };
        assert_eq!(told(&other, 8, MemoryType::Host), (String::new(), u64::MAX));
        let alone =
            NixlConfig { parameters: [("num_threads".to_owned(), "0".to_owned())].into(), ..NixlConfig::default() };
        assert_eq!(told(&alone, 8, MemoryType::Host), ("num_threads=0".to_owned(), u64::MAX));
    }
}
