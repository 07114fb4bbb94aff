//! An agent: its backend, and the memory that it registers.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::library::{AgentConfig, Handle, Library, NixlError, c_string};
use super::transfer::Remote;

/// No thread listens, so on no port.
const NO_PORT: c_int = 0;
/// The library need not lock: one thread makes all calls.
const NO_SYNC: c_int = 0;

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum MemoryType {
    Host,
    Gpu,
}

impl MemoryType {
    pub(super) fn code(self) -> c_int {
        match self {
            Self::Host => 0,
            Self::Gpu => 1,
        }
    }
}

/// A piece of memory. `device` is the GPU's number in its process, 0 for host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub address: u64,
    pub len: u64,
    pub device: u64,
}

/// Memory that an agent may register.
///
/// # Safety
/// What `span` names is there, readable and writable by this process, for as long as the value lives; and nobody relies on
/// its bytes staying as they are, because peers write them at any time.
pub unsafe trait Registrable: Send + Sync {
    fn span(&self) -> Span;
    fn memory_type(&self) -> MemoryType;
}

/// How an agent is to be.
#[derive(Debug, Clone, Copy)]
pub struct AgentSetup<'a> {
    /// Its name, which no other agent of its peers may have.
    pub name: &'a str,
    pub backend: &'a str,
    /// What the backend is told, over its own defaults.
    pub parameters: &'a [(String, String)],
    /// The library's own thread, which answers peers. It sleeps until something arrives, and this long at the most. `None`:
    /// there is none, and things move only while transfers are polled.
    pub wake_interval: Option<Duration>,
}

/// One agent with one backend. Dropping it ends its threads, then lets go of the memory.
pub struct Agent {
    shared: Rc<Shared>,
}

/// What everything that came out of an agent keeps alive.
pub(super) struct Shared {
    pub(super) library: &'static Library,
    pub(super) agent: Handle,
    backend: Handle,
    /// Each with the memory that it covers.
    registered: RefCell<Vec<(Handle, Arc<dyn Registrable>)>>,
}

impl Agent {
    pub fn new(library: &'static Library, setup: &AgentSetup) -> Result<Self, NixlError> {
        // Two backends that come up at the same instant may take each other's place: UCX draws names from the clock.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let name = c_string(setup.name)?;
        let config = AgentConfig {
            progress_thread: setup.wake_interval.is_some(),
            listen_thread: false,
            listen_port: NO_PORT,
            thread_sync: NO_SYNC,
            workers: 1,
            progress_delay_us: setup
                .wake_interval
                .map_or(0, |interval| u64::try_from(interval.as_micros()).unwrap_or(u64::MAX)),
            listen_delay_us: 0,
            capture_telemetry: false,
        };
        let mut agent: Handle = ptr::null_mut();
        // SAFETY: a terminated string and a whole configuration, read during the call; writes one handle.
        let code = unsafe { (library.create_agent)(name.as_ptr(), &raw const config, &raw mut agent) };
        Library::check("nixl_capi_create_configured_agent", code)?;
        // From here on dropping it destroys the agent.
        let mut shared = Shared { library, agent, backend: ptr::null_mut(), registered: RefCell::default() };
        shared.backend = shared.create_backend(setup.backend, setup.parameters)?;
        Ok(Self { shared: Rc::new(shared) })
    }

    /// Lets peers reach `memory`, and transfers name it, until the agent and all that came out of it are dropped.
    pub fn register(&self, memory: Arc<dyn Registrable>) -> Result<(), NixlError> {
        let Shared { library, agent, .. } = *self.shared;
        let Span { address, len, device } = memory.span();
        let mut list: Handle = ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (library.create_registrations)(memory.memory_type().code(), &raw mut list) };
        Library::check("nixl_capi_create_reg_dlist", code)?;
        // SAFETY: the list is live; two numbers and no metadata.
        let added =
            unsafe { (library.registrations_add)(list, to_usize(address), to_usize(len), device, ptr::null(), 0) };
        let registered = Library::check("nixl_capi_reg_dlist_add_desc", added).and_then(|()| {
            // SAFETY: both are live. The memory is there, as its type promises, and stays: it is kept beside the list until
            // the list is deregistered.
            let code = unsafe { (library.register)(agent, list, ptr::null_mut()) };
            Library::check("nixl_capi_register_mem", code)
        });
        match registered {
            Ok(()) => self.shared.registered.borrow_mut().push((list, memory)),
            // SAFETY: live, and nobody else has it.
            Err(_) => drop(unsafe { (library.destroy_registrations)(list) }),
        }
        registered
    }

    /// What a peer must load to reach the memory registered so far.
    pub fn metadata(&self) -> Result<Vec<u8>, NixlError> {
        let (mut data, mut len): (*mut c_void, usize) = (ptr::null_mut(), 0);
        // SAFETY: the agent is live; writes a pointer and a length.
        let code = unsafe { (self.shared.library.local_metadata)(self.shared.agent, &raw mut data, &raw mut len) };
        Library::check("nixl_capi_get_local_md", code)?;
        let mut bytes = vec![0; len];
        // SAFETY: the library gave as many bytes as it said, in memory of their own.
        unsafe { ptr::copy_nonoverlapping(data.cast::<u8>(), bytes.as_mut_ptr(), len) };
        // SAFETY: it came out of malloc for the caller to free, and is freed once.
        unsafe { libc::free(data) };
        Ok(bytes)
    }

    /// Names of the backends that the library has plugins for.
    pub fn backends(&self) -> Result<Vec<String>, NixlError> {
        self.shared.backends()
    }

    /// Gets to know a peer by its metadata. Its name must not be that of a peer that is still known.
    pub fn load(&self, metadata: &[u8]) -> Result<Rc<Remote>, NixlError> {
        let mut name: *mut c_char = ptr::null_mut();
        let (library, agent) = (self.shared.library, self.shared.agent);
        // SAFETY: the agent is live, the bytes are as many as are named and only read; writes one pointer.
        let code = unsafe { (library.load_remote)(agent, metadata.as_ptr().cast(), metadata.len(), &raw mut name) };
        Library::check("nixl_capi_load_remote_md", code)?;
        // SAFETY: on success it is a terminated string of its own.
        let copy = unsafe { CStr::from_ptr(name) }.to_owned();
        // SAFETY: it came out of malloc for the caller to free, and is freed once.
        unsafe { libc::free(name.cast()) };
        Ok(Rc::new(Remote { shared: self.shared.clone(), name: copy }))
    }
}

impl Shared {
    fn create_backend(&self, backend: &str, parameters: &[(String, String)]) -> Result<Handle, NixlError> {
        let available = self.backends()?;
        if !available.iter().any(|name| name == backend) {
            return Err(NixlError::NoBackend { backend: backend.to_owned(), available: available.join(", ") });
        }
        let mut params: Handle = ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.library.create_params)(&raw mut params) };
        Library::check("nixl_capi_create_params", code)?;
        let created = self.create_backend_with(backend, params, parameters);
        // SAFETY: live, and the library has copied what it wants of it.
        unsafe { (self.library.destroy_params)(params) };
        created
    }

    fn create_backend_with(
        &self,
        backend: &str,
        params: Handle,
        parameters: &[(String, String)],
    ) -> Result<Handle, NixlError> {
        for (key, value) in parameters {
            let (key, value) = (c_string(key)?, c_string(value)?);
            // SAFETY: the list is live, the strings are terminated and copied.
            let code = unsafe { (self.library.params_add)(params, key.as_ptr(), value.as_ptr()) };
            Library::check("nixl_capi_params_add", code)?;
        }
        let backend = c_string(backend)?;
        let mut handle: Handle = ptr::null_mut();
        // SAFETY: agent and parameters are live, the name is terminated; writes one handle.
        let code = unsafe { (self.library.create_backend)(self.agent, backend.as_ptr(), params, &raw mut handle) };
        Library::check("nixl_capi_create_backend", code).map(|()| handle)
    }

    /// Names of the backends that the library has plugins for.
    fn backends(&self) -> Result<Vec<String>, NixlError> {
        let mut list: Handle = ptr::null_mut();
        // SAFETY: the agent is live; writes one handle.
        let code = unsafe { (self.library.plugins)(self.agent, &raw mut list) };
        Library::check("nixl_capi_get_available_plugins", code)?;
        let mut len = 0;
        // SAFETY: the list is live; writes one number.
        let code = unsafe { (self.library.strings_len)(list, &raw mut len) };
        let names = Library::check("nixl_capi_string_list_size", code).map(|()| {
            let name = |index| {
                let mut text: *const c_char = ptr::null();
                // SAFETY: the list is live; writes one pointer, or answers that there is no such entry.
                let code = unsafe { (self.library.strings_get)(list, index, &raw mut text) };
                // SAFETY: a terminated string that belongs to the list, which lives until below.
                (code == 0).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
            };
            (0..len).filter_map(name).collect()
        });
        // SAFETY: live, and nobody else has it.
        unsafe { (self.library.destroy_strings)(list) };
        names
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for (list, memory) in self.registered.get_mut().drain(..) {
            // SAFETY: both are live, and the list is the one that was registered.
            unsafe { (self.library.deregister)(self.agent, list, ptr::null_mut()) };
            // SAFETY: live, and nobody else has it.
            unsafe { (self.library.destroy_registrations)(list) };
            drop(memory);
        }
        if !self.backend.is_null() {
            // SAFETY: frees the handle only; the backend itself is the agent's.
            unsafe { (self.library.destroy_backend)(self.backend) };
        }
        // SAFETY: live, and nothing that came out of it is left: all of that holds `Shared`. Ends its threads.
        unsafe { (self.library.destroy_agent)(self.agent) };
    }
}

/// An address or length of this machine's memory.
pub(super) fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("pdlink runs on 64-bit machines")
}
