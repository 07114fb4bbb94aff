//! The library, its functions, and what they answer.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

pub(super) type Context = *mut c_void;
pub(super) type Stream = *mut c_void;
pub(super) type Event = *mut c_void;
pub(super) type Module = *mut c_void;
pub(super) type Function = *mut c_void;
pub(super) type DevicePtr = u64;
pub(super) type Status = c_int;

/// As the driver wants it, by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RawIpcHandle(pub(super) [u8; 64]);

/// Why something could not be done on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("NVIDIA's driver library cannot be used: {0}")]
    NoDriver(String),
    #[error("{call} failed: {name} ({code}), {text}")]
    Call { call: &'static str, code: i32, name: String, text: String },
    #[error("no GPU is visible here (CUDA_VISIBLE_DEVICES is {variable}); leave it one, or use host memory")]
    NoGpu { variable: String },
    #[error(
        "there is no GPU {ordinal} here: {visible} visible, numbered from 0 (CUDA_VISIBLE_DEVICES is {variable}); ask for \
         one of those, or leave it more"
    )]
    NoSuchGpu { ordinal: i32, visible: i32, variable: String },
    #[error("{bytes} bytes on GPU {ordinal} cannot be had, {free} of its {total} are free: {name} ({code})")]
    NoRoom { ordinal: i32, bytes: u64, free: u64, total: u64, code: i32, name: String },
    #[error("the GPU does not know our kernel: {0}")]
    Kernel(String),
}

/// Declares the functions that are used: field, symbol, argument types. What is optional has come with a later driver, and
/// whoever calls it can do without.
macro_rules! functions {
    (required { $($name:ident = $symbol:literal ($($arg:ty),*);)* }
     optional { $($later:ident = $later_symbol:literal ($($later_arg:ty),*);)* }) => {
        /// The functions of the library. Each pointer stays valid because the library is never closed.
        pub(super) struct Driver {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> Status,)*
            $(pub(super) $later: Option<unsafe extern "C" fn($($later_arg),*) -> Status>,)*
            _library: Library,
        }

        impl Driver {
            fn load() -> Result<Self, String> {
                // SAFETY: the driver's initialisers are made to be run by any process, once or many times.
                let library = unsafe { Library::new("libcuda.so.1") }.map_err(|error| error.to_string())?;
                $(
                    // SAFETY: the symbol, by its versioned name, has had this signature since the version that named it.
                    let $name = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> Status>($symbol) };
                    let $name = *$name.map_err(|error| error.to_string())?;
                )*
                $(
                    // SAFETY: as above.
                    let $later = unsafe { library.get::<unsafe extern "C" fn($($later_arg),*) -> Status>($later_symbol) };
                    let $later = $later.ok().map(|found| *found);
                )*
                Ok(Self { $($name,)* $($later,)* _library: library })
            }
        }
    };
}

functions! {
    required {
        init = b"cuInit\0" (c_uint);
        driver_version = b"cuDriverGetVersion\0" (*mut c_int);
        device_count = b"cuDeviceGetCount\0" (*mut c_int);
        device_name = b"cuDeviceGetName\0" (*mut c_char, c_int, c_int);
        device_memory = b"cuDeviceTotalMem_v2\0" (*mut usize, c_int);
        peer_attribute = b"cuDeviceGetP2PAttribute\0" (*mut c_int, c_int, c_int, c_int);
        device_get = b"cuDeviceGet\0" (*mut c_int, c_int);
        device_attribute = b"cuDeviceGetAttribute\0" (*mut c_int, c_int, c_int);
        device_uuid = b"cuDeviceGetUuid_v2\0" (*mut [u8; 16], c_int);
        primary_retain = b"cuDevicePrimaryCtxRetain\0" (*mut Context, c_int);
        primary_release = b"cuDevicePrimaryCtxRelease_v2\0" (c_int);
        context_push = b"cuCtxPushCurrent_v2\0" (Context);
        context_pop = b"cuCtxPopCurrent_v2\0" (*mut Context);
        memory_allocate = b"cuMemAlloc_v2\0" (*mut DevicePtr, usize);
        memory_free = b"cuMemFree_v2\0" (DevicePtr);
        memory_info = b"cuMemGetInfo_v2\0" (*mut usize, *mut usize);
        memory_range = b"cuMemGetAddressRange_v2\0" (*mut DevicePtr, *mut usize, DevicePtr);
        memory_set = b"cuMemsetD8_v2\0" (DevicePtr, u8, usize);
        copy_in = b"cuMemcpyHtoD_v2\0" (DevicePtr, *const c_void, usize);
        copy_in_async = b"cuMemcpyHtoDAsync_v2\0" (DevicePtr, *const c_void, usize, Stream);
        copy_out = b"cuMemcpyDtoH_v2\0" (*mut c_void, DevicePtr, usize);
        copy_out_async = b"cuMemcpyDtoHAsync_v2\0" (*mut c_void, DevicePtr, usize, Stream);
        copy_within = b"cuMemcpyDtoD_v2\0" (DevicePtr, DevicePtr, usize);
        host_allocate = b"cuMemHostAlloc\0" (*mut *mut c_void, usize, c_uint);
        host_free = b"cuMemFreeHost\0" (*mut c_void);
        host_register = b"cuMemHostRegister_v2\0" (*mut c_void, usize, c_uint);
        host_unregister = b"cuMemHostUnregister\0" (*mut c_void);
        host_address = b"cuMemHostGetDevicePointer_v2\0" (*mut DevicePtr, *mut c_void, c_uint);
        ipc_handle = b"cuIpcGetMemHandle\0" (*mut RawIpcHandle, DevicePtr);
        ipc_open = b"cuIpcOpenMemHandle_v2\0" (*mut DevicePtr, RawIpcHandle, c_uint);
        ipc_close = b"cuIpcCloseMemHandle\0" (DevicePtr);
        stream_create = b"cuStreamCreate\0" (*mut Stream, c_uint);
        stream_destroy = b"cuStreamDestroy_v2\0" (Stream);
        stream_synchronize = b"cuStreamSynchronize\0" (Stream);
        stream_query = b"cuStreamQuery\0" (Stream);
        event_create = b"cuEventCreate\0" (*mut Event, c_uint);
        event_destroy = b"cuEventDestroy_v2\0" (Event);
        event_record = b"cuEventRecord\0" (Event, Stream);
        event_query = b"cuEventQuery\0" (Event);
        event_synchronize = b"cuEventSynchronize\0" (Event);
        module_load = b"cuModuleLoadData\0" (*mut Module, *const c_void);
        module_unload = b"cuModuleUnload\0" (Module);
        module_function = b"cuModuleGetFunction\0" (*mut Function, Module, *const c_char);
        launch = b"cuLaunchKernel\0" (Function, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Stream, *mut *mut c_void, *mut *mut c_void);
        error_name = b"cuGetErrorName\0" (Status, *mut *const c_char);
        error_text = b"cuGetErrorString\0" (Status, *mut *const c_char);
    }
    optional {
        stream_create_below = b"cuStreamCreateWithPriority\0" (*mut Stream, c_uint, c_int);
        stream_priorities = b"cuCtxGetStreamPriorityRange\0" (*mut c_int, *mut c_int);
        stream_write = b"cuStreamWriteValue32_v2\0" (Stream, DevicePtr, u32, c_uint);
    }
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(super) const OUT_OF_MEMORY: Status = 2;
/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: Status = 100;
/// `CUDA_ERROR_INVALID_DEVICE`.
pub(super) const INVALID_DEVICE: Status = 101;
/// `CUDA_ERROR_NOT_READY`: what an event that has not happened yet answers.
pub(super) const NOT_READY: Status = 600;
/// `CUDA_ERROR_NOT_SUPPORTED`.
pub(super) const NOT_SUPPORTED: Status = 801;

impl Driver {
    /// The library of this process, opened and initialised at the first call.
    pub(super) fn get() -> Result<&'static Self, CudaError> {
        static DRIVER: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
        let driver = DRIVER.get_or_init(|| {
            let driver = Self::load().map_err(CudaError::NoDriver)?;
            // SAFETY: takes a number; 0 is the one that is defined.
            let status = unsafe { (driver.init)(0) };
            if status == NO_DEVICE {
                return Err(CudaError::NoGpu { variable: visible_devices() });
            }
            driver.check("cuInit", status)?;
            Ok(driver)
        });
        driver.as_ref().map_err(Clone::clone)
    }

    /// An error unless `status` is success.
    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        let (name, text) = (self.name(status), self.said(self.error_text, status));
        Err(CudaError::Call { call, code: status, name, text })
    }

    /// What the driver calls a status.
    pub(super) fn name(&self, status: Status) -> String {
        self.said(self.error_name, status)
    }

    fn said(&self, ask: unsafe extern "C" fn(Status, *mut *const c_char) -> Status, status: Status) -> String {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: writes one pointer, to a string of the library's own or null.
        let known = unsafe { ask(status, &raw mut text) } == 0 && !text.is_null();
        if !known {
            return "unknown".to_owned();
        }
        // SAFETY: not null, and the library's strings are terminated and never freed.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// `CUDA_VISIBLE_DEVICES` as messages have it: the driver has read it, and numbers GPUs by it.
pub(super) fn visible_devices() -> String {
    std::env::var("CUDA_VISIBLE_DEVICES").map_or_else(|_| "not set".to_owned(), |said| format!("\"{said}\""))
}
