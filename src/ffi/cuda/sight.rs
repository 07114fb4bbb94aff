//! How a GPU is seen from here: for the words of what cannot be reached.

use std::fmt::Write;

use super::device::Device;
use super::driver::{CudaError, Driver, visible_devices};

/// That one GPU reaches the memory of another.
pub(super) const PEER_ACCESS: i32 = 2;

/// Where a GPU is, seen from another one of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sight {
    Same,
    /// Visible here, under this number; and whether its memory is reached.
    Visible {
        ordinal: i32,
        reached: bool,
    },
    /// None of those that are visible. That alone keeps nobody from its memory.
    Elsewhere {
        visible: i32,
        variable: String,
    },
}

impl Device {
    /// How the GPU that has this number on any machine is seen from this one.
    pub fn sight_of(&self, uuid: &[u8; 16]) -> Result<Sight, CudaError> {
        if self.uuid()? == *uuid {
            return Ok(Sight::Same);
        }
        let (driver, visible) = (self.driver(), count(self.driver())?);
        for ordinal in 0..visible {
            let handle = handle(driver, ordinal)?;
            if uuid_of(driver, handle)? == *uuid {
                let reached = attribute(driver, PEER_ACCESS, self.handle(), handle)?;
                return Ok(Sight::Visible { ordinal, reached });
            }
        }
        Ok(Sight::Elsewhere { visible, variable: visible_devices() })
    }
}

/// As NVIDIA's tools write it.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = "GPU".to_owned();
    for (place, byte) in uuid.iter().enumerate() {
        let dash = if [0, 4, 6, 8, 10].contains(&place) { "-" } else { "" };
        let _ = write!(text, "{dash}{byte:02x}");
    }
    text
}

pub(super) fn count(driver: &Driver) -> Result<i32, CudaError> {
    let mut count = 0;
    // SAFETY: writes one int.
    driver.check("cuDeviceGetCount", unsafe { (driver.device_count)(&raw mut count) }).map(|()| count)
}

pub(super) fn handle(driver: &Driver, ordinal: i32) -> Result<i32, CudaError> {
    let mut handle = 0;
    // SAFETY: writes one int.
    driver.check("cuDeviceGet", unsafe { (driver.device_get)(&raw mut handle, ordinal) }).map(|()| handle)
}

pub(super) fn uuid_of(driver: &Driver, handle: i32) -> Result<[u8; 16], CudaError> {
    let mut uuid = [0; 16];
    // SAFETY: writes sixteen bytes.
    let status = unsafe { (driver.device_uuid)(&raw mut uuid, handle) };
    driver.check("cuDeviceGetUuid", status).map(|()| uuid)
}

/// What one GPU can do with the memory of another.
pub(super) fn attribute(driver: &Driver, what: i32, from: i32, to: i32) -> Result<bool, CudaError> {
    let mut value = 0;
    // SAFETY: writes one int.
    let status = unsafe { (driver.peer_attribute)(&raw mut value, what, from, to) };
    driver.check("cuDeviceGetP2PAttribute", status).map(|()| value != 0)
}

#[cfg(test)]
mod tests {
    use super::uuid_text;

    #[test]
    fn a_number_is_written_as_nvidia_smi_writes_it() {
        let uuid: [u8; 16] = std::array::from_fn(|place| u8::try_from(place * 16 + 1).unwrap());
        assert_eq!(uuid_text(&uuid), "GPU-01112131-4151-6171-8191-a1b1c1d1e1f1");
    }
}
