//! The library: where it is looked for, its functions, and what they answer.

use std::ffi::{CString, OsStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};

use crate::ffi::search::{Another, Once, Search, children};

/// Any of the library's objects: all are pointers that only it looks behind.
pub(super) type Handle = *mut c_void;
pub(super) type Status = c_int;

pub(super) const SUCCESS: Status = 0;
pub(super) const IN_PROGRESS: Status = 1;

/// How an agent is to be, as the library reads it.
#[repr(C)]
pub(super) struct AgentConfig {
    pub(super) progress_thread: bool,
    pub(super) listen_thread: bool,
    pub(super) listen_port: c_int,
    pub(super) thread_sync: c_int,
    pub(super) workers: c_uint,
    pub(super) progress_delay_us: u64,
    pub(super) listen_delay_us: u64,
    pub(super) capture_telemetry: bool,
}

/// The oldest version that has every function, and the newest that ours were held against (`tests/ffi_abi.rs`): major and minor.
pub const TESTED: ((u32, u32), (u32, u32)) = ((0, 9), (1, 5));

/// Whether a version is known to be outside of [`TESTED`].
pub fn is_untested(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else { return false };
    let (from, to) = TESTED;
    (major, minor) < from || (major, minor) > to
}

/// Why something could not be done with NIXL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NixlError {
    #[error(
        "NIXL's library cannot be opened: {tried}; install nixl-cu13 or nixl-cu12, and name its environment in \
         kv.nixl.environment or the library itself in kv.nixl.library"
    )]
    NotFound { tried: String },
    #[error("{path}, NIXL {version}, lacks {symbol}; install nixl 0.9.0 or newer")]
    TooOld { path: String, version: String, symbol: String },
    #[error("NIXL is loaded from {loaded}, and a process has it once; {wanted} cannot be used beside it")]
    Another { loaded: String, wanted: String },
    #[error("NIXL has no backend {backend}; there are {available}")]
    NoBackend { backend: String, available: String },
    #[error("{call} failed: {} ({code})", name_of(*code))]
    Call { call: &'static str, code: i32 },
    #[error("{0:?} has a zero byte, which NIXL cannot be given")]
    ZeroByte(String),
}

fn name_of(code: Status) -> &'static str {
    match code {
        -1 => "invalid parameter",
        -2 => "the backend failed; NIXL's own log says why",
        -3 => "invalid state",
        -4 => "an exception",
        -5 => "no telemetry",
        -6 => "not found",
        _ => "unknown",
    }
}

impl From<Another> for NixlError {
    fn from(Another { loaded, wanted }: Another) -> Self {
        Self::Another { loaded, wanted }
    }
}

/// Declares the functions that are used: field, symbol, argument types. All answer with a status.
macro_rules! functions {
    ($($name:ident = $symbol:literal ($($arg:ty),*);)*) => {
        /// NIXL's library, open. Each pointer stays valid because it is never closed: its threads and those of its backends
        /// may still be in it.
        pub struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> Status,)*
            path: PathBuf,
            version: String,
            _library: libloading::Library,
        }

        impl Library {
            fn load(path: &Path) -> Result<Self, Failed> {
                // SAFETY: NIXL's initialisers are made to be run by any process; each file runs them once.
                let library = unsafe { libloading::Library::new(path) }.map_err(|error| Failed::Open(error.to_string()))?;
                let version = version_beside(path).unwrap_or_else(|| "of unknown version".to_owned());
                $(
                    // SAFETY: the symbol has had this signature in all versions that have it (tests/ffi_abi.rs).
                    let $name = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> Status>($symbol) };
                    let $name = *$name.map_err(|_| Failed::Symbol(version.clone(), symbol_name($symbol)))?;
                )*
                Ok(Self { $($name,)* path: path.to_owned(), version, _library: library })
            }
        }
    };
}

functions! {
    create_agent = b"nixl_capi_create_configured_agent\0" (*const c_char, *const AgentConfig, *mut Handle);
    destroy_agent = b"nixl_capi_destroy_agent\0" (Handle);
    plugins = b"nixl_capi_get_available_plugins\0" (Handle, *mut Handle);
    strings_len = b"nixl_capi_string_list_size\0" (Handle, *mut usize);
    strings_get = b"nixl_capi_string_list_get\0" (Handle, usize, *mut *const c_char);
    destroy_strings = b"nixl_capi_destroy_string_list\0" (Handle);
    create_params = b"nixl_capi_create_params\0" (*mut Handle);
    params_add = b"nixl_capi_params_add\0" (Handle, *const c_char, *const c_char);
    destroy_params = b"nixl_capi_destroy_params\0" (Handle);
    create_backend = b"nixl_capi_create_backend\0" (Handle, *const c_char, Handle, *mut Handle);
    destroy_backend = b"nixl_capi_destroy_backend\0" (Handle);
    create_registrations = b"nixl_capi_create_reg_dlist\0" (c_int, *mut Handle);
    registrations_add = b"nixl_capi_reg_dlist_add_desc\0" (Handle, usize, usize, u64, *const c_void, usize);
    destroy_registrations = b"nixl_capi_destroy_reg_dlist\0" (Handle);
    register = b"nixl_capi_register_mem\0" (Handle, Handle, Handle);
    deregister = b"nixl_capi_deregister_mem\0" (Handle, Handle, Handle);
    local_metadata = b"nixl_capi_get_local_md\0" (Handle, *mut *mut c_void, *mut usize);
    load_remote = b"nixl_capi_load_remote_md\0" (Handle, *const c_void, usize, *mut *mut c_char);
    invalidate_remote = b"nixl_capi_invalidate_remote_md\0" (Handle, *const c_char);
    create_descriptors = b"nixl_capi_create_xfer_dlist\0" (c_int, *mut Handle);
    descriptors_add = b"nixl_capi_xfer_dlist_add_desc\0" (Handle, usize, usize, u64);
    destroy_descriptors = b"nixl_capi_destroy_xfer_dlist\0" (Handle);
    create_request = b"nixl_capi_create_xfer_req\0" (Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle);
    post_request = b"nixl_capi_post_xfer_req\0" (Handle, Handle, Handle);
    request_status = b"nixl_capi_get_xfer_status\0" (Handle, Handle);
    release_request = b"nixl_capi_release_xfer_req\0" (Handle, Handle);
    destroy_request = b"nixl_capi_destroy_xfer_req\0" (Handle);
}

/// Why a file that was tried is not the one.
enum Failed {
    Open(String),
    Symbol(String, String),
}

impl Library {
    /// NIXL as this process has it: opened where `search` finds it first, and kept for good.
    pub fn open(search: &Search) -> Result<&'static Self, NixlError> {
        static OPEN: Once<Library> = Once::new();
        OPEN.get(search, Self::path, || Self::find(search))
    }

    fn find(search: &Search) -> Result<Self, NixlError> {
        let mut tried = Vec::new();
        for path in candidates(search) {
            match Self::load(&path) {
                Ok(library) => return Ok(library),
                Err(Failed::Open(error)) => tried.push(error),
                Err(Failed::Symbol(version, symbol)) => {
                    return Err(NixlError::TooOld { path: path.display().to_string(), version, symbol });
                }
            }
        }
        Err(NixlError::NotFound { tried: tried.join("; ") })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As its wheel says, or that it is unknown.
    pub fn version(&self) -> &str {
        &self.version
    }

    pub(super) fn check(call: &'static str, code: Status) -> Result<(), NixlError> {
        if code == SUCCESS { Ok(()) } else { Err(NixlError::Call { call, code }) }
    }
}

pub(super) fn c_string(text: &str) -> Result<CString, NixlError> {
    CString::new(text).map_err(|_| NixlError::ZeroByte(text.to_owned()))
}

fn symbol_name(symbol: &[u8]) -> String {
    String::from_utf8_lossy(symbol).trim_end_matches('\0').to_owned()
}

const FILE: &str = "libnixl_capi.so";

/// The wheels put it into a folder of their own beside the packages, such as `.nixl_cu13.mesonpy.libs`. The newest CUDA first.
fn candidates(search: &Search) -> Vec<PathBuf> {
    search.candidates(FILE, |packages| {
        let mut folders = children(packages, |name| name.starts_with(".nixl_cu"));
        folders.sort();
        folders.into_iter().rev().map(|folder| folder.join(FILE)).collect()
    })
}

/// The version of the wheel that the library came with: the C face does not tell it. `.nixl_cu13.mesonpy.libs` belongs to
/// `nixl_cu13-1.5.1.dist-info`.
fn version_beside(library: &Path) -> Option<String> {
    let folder = library.parent()?;
    let package = folder.file_name().and_then(OsStr::to_str)?.strip_prefix('.')?.split('.').next()?;
    let told = children(folder.parent()?, |name| name.starts_with(package) && name.ends_with(".dist-info"));
    let name = told.first()?.file_name()?.to_str()?;
    Some(name.strip_prefix(package)?.strip_prefix('-')?.strip_suffix(".dist-info")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_is_found_in_its_environment_with_its_version() {
        let environment = tempfile::tempdir().unwrap();
        let packages = environment.path().join("lib/python3.12/site-packages");
        for folder in [".nixl_cu12.mesonpy.libs", ".nixl_cu13.mesonpy.libs", "nixl_cu13-1.5.1.dist-info"] {
            std::fs::create_dir_all(packages.join(folder)).unwrap();
        }
        for cuda in [12, 13] {
            std::fs::write(packages.join(format!(".nixl_cu{cuda}.mesonpy.libs/{FILE}")), "not a library").unwrap();
        }
        let environments = [environment.path().to_owned()];
        let found = candidates(&Search { library: None, environments: &environments });
        let names: Vec<_> = found.iter().map(|path| path.strip_prefix(&packages).unwrap_or(path)).collect();
        let want = [".nixl_cu13.mesonpy.libs/libnixl_capi.so", ".nixl_cu12.mesonpy.libs/libnixl_capi.so", FILE];
        assert_eq!(names, want.map(Path::new));
        assert_eq!(version_beside(&found[0]).as_deref(), Some("1.5.1"));
        assert_eq!(version_beside(&found[1]), None);
        assert_eq!(version_beside(Path::new(FILE)), None);
    }

    #[test]
    fn versions_are_held_against_the_tested_range() {
        let untested = ["0.8.1", "1.6.0", "2.0"].map(is_untested);
        let tested = ["0.9.0", "1.5.1", "1.0.0", "of unknown version"].map(is_untested);
        assert_eq!((untested, tested), ([true; 3], [false; 4]));
    }

    #[test]
    fn what_is_no_library_is_named_and_so_is_what_lacks_a_function() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        std::fs::write(&file, "not a library").unwrap();
        let error = Library::find(&Search { library: Some(&file), environments: &[] }).err().unwrap();
        let told = error.to_string();
        assert!(matches!(error, NixlError::NotFound { .. }), "{told}");
        assert!(told.contains(file.to_str().unwrap()) && told.contains("kv.nixl.library"), "{told}");
        // A library that is there on every machine, and is not NIXL's.
        let error = Library::find(&Search { library: Some(Path::new("libc.so.6")), environments: &[] }).err().unwrap();
        let told = error.to_string();
        let want =
            "libc.so.6, NIXL of unknown version, lacks nixl_capi_create_configured_agent; install nixl 0.9.0 or newer";
        assert_eq!(told, want);
    }
}
