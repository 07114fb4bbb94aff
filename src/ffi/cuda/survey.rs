//! Which GPUs there are, and which reach each other. Makes no context, so it takes nothing of them.

use std::ffi::c_char;

use super::driver::{CudaError, Driver};
use super::sight::{PEER_ACCESS, attribute, count, handle};

const PEER_ATOMICS: i32 = 3;

/// What the driver tells without touching a GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Survey {
    /// Newest CUDA that the driver serves: `13.0`.
    pub cuda: String,
    /// By CUDA's number of them in a process that sees all.
    pub gpus: Vec<Gpu>,
    /// Every ordered pair.
    pub pairs: Vec<Pair>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Gpu {
    pub name: String,
    pub bytes: u64,
}

/// Whether `from` reaches the memory of `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Pair {
    pub from: i32,
    pub to: i32,
    pub access: bool,
    /// Atomic operations across the link, which NVLink has and PCIe has not.
    pub atomics: bool,
}

/// Asks the driver. An error where there is none, or none of its GPUs can be used.
pub fn survey() -> Result<Survey, CudaError> {
    let driver = Driver::get()?;
    let mut version = 0;
    // SAFETY: writes one int.
    driver.check("cuDriverGetVersion", unsafe { (driver.driver_version)(&raw mut version) })?;
    let handles = (0..count(driver)?).map(|ordinal| handle(driver, ordinal)).collect::<Result<Vec<_>, _>>()?;
    let gpus = handles.iter().map(|handle| gpu(driver, *handle)).collect::<Result<Vec<_>, _>>()?;
    let mut pairs = Vec::new();
    for (from, one) in (0..).zip(&handles) {
        for (to, other) in (0..).zip(&handles).filter(|(to, _)| *to != from) {
            let has = |what| attribute(driver, what, *one, *other);
            pairs.push(Pair { from, to, access: has(PEER_ACCESS)?, atomics: has(PEER_ATOMICS)? });
        }
    }
    Ok(Survey { cuda: format!("{}.{}", version / 1000, version % 1000 / 10), gpus, pairs })
}

fn gpu(driver: &Driver, handle: i32) -> Result<Gpu, CudaError> {
    let (mut name, mut bytes): ([u8; 128], usize) = ([0; 128], 0);
    // SAFETY: writes a terminated string into as many bytes as are named.
    let status = unsafe { (driver.device_name)(name.as_mut_ptr().cast::<c_char>(), 128, handle) };
    driver.check("cuDeviceGetName", status)?;
    // SAFETY: writes one number.
    driver.check("cuDeviceTotalMem", unsafe { (driver.device_memory)(&raw mut bytes, handle) })?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(Gpu { name: String::from_utf8_lossy(&name[..end]).into_owned(), bytes: bytes as u64 })
}
