//! How GPUs are wired to one another and to the host, and how much of their memory is free, as NVIDIA's management library tells.
//! It sees all GPUs of the machine or container, whatever `CUDA_VISIBLE_DEVICES` leaves, in the order of the bus.
#![forbid(unsafe_code)]

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device as NvmlDevice, Nvml};

/// More than any GPU has.
const NVLINKS_MAX: u32 = 36;

/// One GPU's wires.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Wires {
    pub uuid: String,
    /// `00000000:1B:00.0`
    pub bus_id: String,
    /// Lanes in use, and those that GPU and board have.
    pub pcie_width: Option<(u32, u32)>,
    /// Newest generation that GPU and board speak. They fall back to an older one at rest.
    pub pcie_generation: Option<u32>,
    /// For each NVLink that it has: whether it is up.
    pub nvlinks: Vec<bool>,
}

/// Asks the library. An error where there is none.
pub fn wires() -> Result<Vec<Wires>, String> {
    of_each(|gpu| of(&gpu))
}

fn of_each<T>(ask: impl Fn(NvmlDevice<'_>) -> Result<T, NvmlError>) -> Result<Vec<T>, String> {
    let all = || -> Result<Vec<T>, NvmlError> {
        let nvml = Nvml::init()?;
        (0..nvml.device_count()?).map(|number| ask(nvml.device_by_index(number)?)).collect()
    };
    all().map_err(|error| format!("NVIDIA's management library cannot be used: {error}"))
}

/// One GPU's memory, whoever uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub bytes: u64,
    pub free_bytes: u64,
}

/// Asks the library. An error where there is none.
pub fn rooms() -> Result<Vec<Room>, String> {
    of_each(|gpu| gpu.memory_info().map(|memory| Room { bytes: memory.total, free_bytes: memory.free }))
}

fn of(gpu: &NvmlDevice<'_>) -> Result<Wires, NvmlError> {
    let width = gpu.current_pcie_link_width().ok().zip(gpu.max_pcie_link_width().ok());
    // The first that does not exist is answered with an error.
    let nvlinks = (0..NVLINKS_MAX).map_while(|link| gpu.link_wrapper_for(link).is_active().ok()).collect();
    Ok(Wires {
        uuid: gpu.uuid()?,
        bus_id: gpu.pci_info()?.bus_id,
        pcie_width: width,
        pcie_generation: gpu.max_pcie_link_gen().ok(),
        nvlinks,
    })
}
