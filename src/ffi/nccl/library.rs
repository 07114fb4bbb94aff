//! The library: where it is looked for, its functions, and what they answer.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

use crate::ffi::search::{Another, Once, Search};

/// A communicator, which only the library looks behind.
pub(super) type Comm = *mut c_void;
/// A CUDA stream.
pub(super) type Stream = *mut c_void;
pub(super) type Status = c_int;

pub(super) const SUCCESS: Status = 0;
pub(super) const IN_PROGRESS: Status = 7;
/// `ncclUint8`.
pub(super) const BYTES: c_int = 1;
/// `ncclFloat32`.
pub(super) const FLOATS: c_int = 7;
/// `ncclSum`.
pub(super) const SUM: c_int = 0;

/// Oldest version that is used, as `ncclGetVersion` counts.
pub const FLOOR: u32 = 21_800;
pub const UNIQUE_ID_BYTES: usize = 128;

/// Names a communicator that is yet to be made: one rank draws it, all pass it in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

/// How a communicator is to be, as NCCL 2.18 and every later version reads it.
#[repr(C)]
pub(super) struct Config {
    pub(super) size: usize,
    pub(super) magic: u32,
    pub(super) version: u32,
    pub(super) blocking: c_int,
    pub(super) cga_cluster_size: c_int,
    pub(super) min_ctas: c_int,
    pub(super) max_ctas: c_int,
    pub(super) net_name: *const c_char,
    pub(super) split_share: c_int,
}

pub(super) const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// What says that a setting is left to the library.
pub(super) const UNSET: c_int = c_int::MIN;

/// Why something could not be done with NCCL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    #[error(
        "NCCL's library cannot be opened: {tried}; install nvidia-nccl-cu13 or nvidia-nccl-cu12, or name the library in \
         kv.nccl.library"
    )]
    NotFound { tried: String },
    #[error("{path} lacks {symbol}; NCCL 2.18 or newer is needed")]
    Symbol { path: String, symbol: String },
    #[error("{path} is NCCL {version}; 2.18 or newer is needed")]
    TooOld { path: String, version: String },
    #[error("NCCL is loaded from {loaded}, and is used once in a process; {wanted} cannot be used beside it")]
    Another { loaded: String, wanted: String },
    #[error("{call} failed: {text} ({code}){detail}")]
    Call { call: &'static str, code: i32, text: String, detail: String },
    #[error("{call} of {len} bytes at {offset} leaves a buffer of {buffer_len} bytes")]
    OutOfRange { call: &'static str, offset: u64, len: u64, buffer_len: u64 },
    #[error("making a communicator was given up")]
    GivenUp,
    #[error("CUDA: {0}")]
    Cuda(#[from] crate::ffi::cuda::CudaError),
}

impl From<Another> for NcclError {
    fn from(Another { loaded, wanted }: Another) -> Self {
        Self::Another { loaded, wanted }
    }
}

/// Declares the functions that are used: field, symbol, argument types. All answer with a status.
macro_rules! functions {
    ($($name:ident = $symbol:literal ($($arg:ty),*);)*) => {
        /// NCCL's library, open. Each pointer stays valid because it is never closed.
        pub struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> Status,)*
            error_text: unsafe extern "C" fn(Status) -> *const c_char,
            last_error: unsafe extern "C" fn(Comm) -> *const c_char,
            path: PathBuf,
            version: u32,
            _library: Handle,
        }

        impl Library {
            fn bind(library: Handle, path: &Path) -> Result<Self, NcclError> {
                let lacks = |symbol: &[u8]| NcclError::Symbol {
                    path: path.display().to_string(),
                    symbol: String::from_utf8_lossy(symbol).trim_end_matches('\0').to_owned(),
                };
                $(
                    // SAFETY: the symbol has had this signature since 2.18 (tests/ffi_abi.rs).
                    let $name = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> Status>($symbol) };
                    let $name = *$name.map_err(|_| lacks($symbol))?;
                )*
                // SAFETY: as above.
                let error_text = unsafe { library.get(b"ncclGetErrorString\0") };
                let error_text = *error_text.map_err(|_| lacks(b"ncclGetErrorString"))?;
                // SAFETY: as above.
                let last_error = unsafe { library.get(b"ncclGetLastError\0") };
                let last_error = *last_error.map_err(|_| lacks(b"ncclGetLastError"))?;
                Ok(Self { $($name,)* error_text, last_error, path: path.to_owned(), version: 0, _library: library })
            }
        }
    };
}

functions! {
    get_version = b"ncclGetVersion\0" (*mut c_int);
    get_unique_id = b"ncclGetUniqueId\0" (*mut UniqueId);
    init = b"ncclCommInitRankConfig\0" (*mut Comm, c_int, UniqueId, c_int, *mut Config);
    split = b"ncclCommSplit\0" (Comm, c_int, c_int, *mut Comm, *mut Config);
    async_error = b"ncclCommGetAsyncError\0" (Comm, *mut Status);
    abort = b"ncclCommAbort\0" (Comm);
    send = b"ncclSend\0" (*const c_void, usize, c_int, c_int, Comm, Stream);
    broadcast = b"ncclBroadcast\0" (*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
    all_reduce = b"ncclAllReduce\0" (*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
    receive = b"ncclRecv\0" (*mut c_void, usize, c_int, c_int, Comm, Stream);
}

impl Library {
    /// NCCL as this process has it already, whoever opened it, or opened where `search` finds it first, and kept for good.
    pub fn open(search: &Search) -> Result<&'static Self, NcclError> {
        static OPEN: Once<Library> = Once::new();
        OPEN.get(search, Self::path, || Self::find(search))
    }

    fn find(search: &Search) -> Result<Self, NcclError> {
        if let (None, Some((library, path))) = (search.library, loaded()) {
            return Self::usable(library, &path);
        }
        let mut tried = Vec::new();
        for path in candidates(search) {
            // SAFETY: NCCL's initialisers are made to be run by any process.
            match unsafe { Handle::open(Some(&path), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => return Self::usable(library, &path),
                Err(error) => tried.push(error.to_string()),
            }
        }
        Err(NcclError::NotFound { tried: tried.join("; ") })
    }

    fn usable(library: Handle, path: &Path) -> Result<Self, NcclError> {
        let mut library = Self::bind(library, path)?;
        let mut version = 0;
        // SAFETY: writes one int.
        let status = unsafe { (library.get_version)(&raw mut version) };
        library.check("ncclGetVersion", status)?;
        library.version = u32::try_from(version).unwrap_or(0);
        if library.version < FLOOR {
            return Err(NcclError::TooOld { path: path.display().to_string(), version: library.version_text() });
        }
        Ok(library)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As people write it: `2.28.9`.
    pub fn version_text(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// A new name for a communicator.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: writes that many bytes.
        let status = unsafe { (self.get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", status).map(|()| id)
    }

    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<(), NcclError> {
        if status == SUCCESS { Ok(()) } else { Err(self.error(call, status)) }
    }

    /// As `check`, for calls that may go on after they return.
    pub(super) fn begun(&self, call: &'static str, status: Status) -> Result<(), NcclError> {
        if status == IN_PROGRESS { Ok(()) } else { self.check(call, status) }
    }

    pub(super) fn error(&self, call: &'static str, status: Status) -> NcclError {
        // SAFETY: takes any number and answers with a string of the library's own.
        let text = said(unsafe { (self.error_text)(status) });
        // SAFETY: null is allowed: the last error of this thread, in a string of the library's own.
        let last = said(unsafe { (self.last_error)(std::ptr::null_mut()) });
        let detail = if last.is_empty() { last } else { format!("; {}", last.trim()) };
        NcclError::Call { call, code: status, text, detail }
    }
}

fn said(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and the library's strings are terminated and stay.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

const FILE: &str = "libnccl.so.2";

/// The one that the process has already, and where it came from.
fn loaded() -> Option<(Handle, PathBuf)> {
    const RTLD_NOLOAD: i32 = libc::RTLD_NOLOAD;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps.lines().filter_map(|line| line.split_whitespace().last()).find(|path| path.ends_with(FILE))?;
    // SAFETY: nothing is loaded, so nothing is run: the library is there.
    let library = unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_NOLOAD) }.ok()?;
    Some((library, PathBuf::from(path)))
}

/// The wheels `nvidia-nccl-cu12` and `nvidia-nccl-cu13` put it into the same folder.
fn candidates(search: &Search) -> Vec<PathBuf> {
    search.candidates(FILE, |packages| vec![packages.join("nvidia/nccl/lib").join(FILE)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_is_found_in_its_environment() {
        let environment = tempfile::tempdir().unwrap();
        let folder = environment.path().join("lib/python3.12/site-packages/nvidia/nccl/lib");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(FILE), "not a library").unwrap();
        let environments = [environment.path().to_owned()];
        let found = candidates(&Search { library: None, environments: &environments });
        assert_eq!(found, [folder.join(FILE), PathBuf::from(FILE)]);
        let named = Path::new("/a/libnccl.so");
        assert_eq!(candidates(&Search { library: Some(named), environments: &environments }), [named]);
    }

    #[test]
    fn what_is_no_library_is_named_and_so_is_what_lacks_a_function() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        std::fs::write(&file, "not a library").unwrap();
        let error = Library::find(&Search { library: Some(&file), environments: &[] }).err().unwrap().to_string();
        assert!(error.contains(file.to_str().unwrap()) && error.contains("kv.nccl.library"), "{error}");
        let libc = Path::new("libc.so.6");
        let error = Library::find(&Search { library: Some(libc), environments: &[] }).err().unwrap().to_string();
        assert_eq!(error, "libc.so.6 lacks ncclGetVersion; NCCL 2.18 or newer is needed");
    }
}
